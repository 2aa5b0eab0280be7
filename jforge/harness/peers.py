"""What others offer for the same work, on a GPU: the calls that a benchmark holds ours to."""

from collections.abc import Callable, Iterator, Sequence

import jax

from jforge.harness.op import Work
from jforge.harness.timing import Call, jax_call


def shared_tensors(inputs: Sequence[list], carry: int | None = None) -> list[list]:
    """The same buffers as torch tensors, but for the argument `carry`, which a call may overwrite."""
    import torch

    tensors = [[None if a is None else torch.from_dlpack(a) for a in arrays] for arrays in inputs]
    for ours, theirs in zip(inputs[0], tensors[0], strict=True):
        if ours is not None and ours.unsafe_buffer_pointer() != theirs.data_ptr():
            raise RuntimeError("dlpack copied an input: the frameworks would not read the same buffer")
    if carry is not None:
        for arrays in tensors:
            arrays[carry] = arrays[carry].clone()
    return tensors


def fused(work: Work, inputs: Sequence[list]) -> Iterator[Call]:
    """Of dense attention: cuDNN through JAX, torch's fused attention twice, FlexAttention. No mask is needed, as every
    key is readable; torch wants B N S H, which are views of the same buffers.
    """
    import torch

    scale = work.options["scale"]
    yield jax_call(
        "cudnn (JAX)",
        lambda q, k, v, n: jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn"),
        inputs,
    )
    tensors = shared_tensors(inputs)
    for name, function in _torch_attention():

        def run(i: int, function=function):
            heads_first = (a.transpose(1, 2) for a in tensors[i][:3])
            return function(*heads_first, scale=scale, enable_gqa=True).transpose(1, 2)

        yield Call(name, run, torch.cuda.synchronize)


def _torch_attention() -> Iterator[tuple[str, Callable]]:
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import flex_attention

    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):

        def attend(*qkv, backend=backend, **options):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*qkv, **options)

        yield f"sdpa {name}", attend
    torch._dynamo.config.cache_size_limit = 64  # one specialisation a shape
    yield "flex", torch.compile(flex_attention, dynamic=False)


def copied(work: Work, inputs: Sequence[list]) -> Iterator[Call]:
    """Of a state that a call reads and writes: torch's copy of it, times one, the floor of what memory takes for both.
    A kernel, as times are those of kernels: plain copies are none.
    """
    import torch

    states = [arrays[3] for arrays in shared_tensors(inputs, carry=3)]
    there = [torch.empty_like(state) for state in states]
    want = states[0].flatten(0, 1).cpu().numpy()[None]

    def copy(i: int):
        return torch.mul(states[i], 1.0, out=there[i]).flatten(0, 1)[None]

    yield Call("copy", copy, torch.cuda.synchronize, want, 2 * states[0].nbytes)


EXPANDED_BYTES = 48e9  # of one call that still fits an 80 GB card beside the rest


def expanded(work: Work, inputs: Sequence[list]) -> Iterator[Call]:
    """Of latent attention, the naive peer: torch's attention over the keys and values of every head (nope 128 + rope
    64, values 128), as a cache of expanded heads would hold them. Its rate counts the bytes of that cache; one buffer,
    as it exceeds L2.
    """
    import torch
    import torch.nn.functional as F

    name, wait = "sdpa (expanded)", torch.cuda.synchronize
    B, N, S, R = (work.sizes[axis] for axis in "BNSR")
    keys, values = 128 + R, 128
    moved = 2 * B * N * (S + 1) * (keys + values)
    if moved > EXPANDED_BYTES:
        yield Call(name, lambda _: None, wait, refused=f"the expanded cache takes {moved / 1e9:.0f} GB")
        return
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(B, N, *size, generator=generator, device="cuda", dtype=torch.bfloat16)
        for size in ((1, keys), (S, keys), (S, values))
    )

    def attend(*qkv):
        return F.scaled_dot_product_attention(*qkv, scale=work.options["scale"])[:1].transpose(1, 2)

    want = attend(*(a[:1].float() for a in (q, k, v))).cpu().numpy()
    yield Call(name, lambda _: attend(q, k, v), wait, want, moved, sets=1)
