"""Decode attention over listed entries of a latent cache (absorbed MLA); the equation and the kernel: `listed_latents`.

Sources: DeepSeek-V3.2 (DSA, arXiv 2512.02556) with the absorbed form of DeepSeek-V2 (arXiv 2405.04434).
"""

import torch

from torch_ref.ops import check
from triton_kernels import listed_latents, runtime
from triton_kernels.plan import Record, sweep_latents


def site(q_latent, q_rope, latent, k_rope, indices, **options):
    """(Key, default) of a call."""
    return listed_latents.site(q_latent, q_rope.shape[-1], 1, indices.shape[-1])


def run(q_latent, q_rope, latent, k_rope, indices, *, chunk=None, config=None, **options):
    """`decode_sparse_mla` on arguments that were checked; `config` overrides the plan (for tuning)."""
    key, default = site(q_latent, q_rope, latent, k_rope, indices)
    config = config or OP.config(q_latent, None if chunk else key, default)  # tables look at the batch
    general = (OP.name, q_latent, q_rope, latent[:, :, None], k_rope, indices[:, :, None])
    return listed_latents.run(*general, chunk=chunk, config=config, **options)


def decode_sparse_mla(
    q_latent, q_rope, latent, k_rope, indices, *, scale, sinks=None, latent_scale=None, chunk=None, out_dtype=None
):
    """Attention of T tokens of every row over the listed entries of its latent cache; see `listed_latents`.

    q_latent: B T N C, q_rope: B T N R, latent: B S C, k_rope: B S R of one dtype (float16, bfloat16, float32), C at
    most 512 and R at most 64; any strides, the last dimension contiguous. indices: int32 B T L, one list of entries for
    all heads of a query, distinct (the caller's duty) and in any order; -1 and what is not in 0 .. S-1 is ignored.
    sinks: N, natural-log units, unscaled. chunk: entries of one split (rounded up to whole tiles); results are then
    bitwise the same whatever else is in the batch, and if a list is made longer by -1.
    Returns out_latent: B T N C in out_dtype (default q_latent's dtype) and lse: float32 B T N, natural log, sink
    included; W_uv of each head is the caller's to apply.

    A query whose list has no entry gives out = 0 and lse = -inf, or its sink. Entries that no list names can hold NaN
    or Inf. Raises ValueError for shapes, strides and devices, TypeError for dtypes and for CPU tensors outside the
    interpreter, NotImplementedError for latent_scale and wider caches; always before any launch.
    """
    options = dict(scale=scale, sinks=sinks, chunk=chunk, out_dtype=out_dtype)
    check.decode_sparse_mla(q_latent, q_rope, latent, k_rope, indices, **options, latent_scale=latent_scale)
    runtime.check_latents(OP.name, out_dtype, latent_scale, q_latent, q_rope, latent, k_rope)
    runtime.check_rows(OP.name, indices=indices)
    return run(q_latent, q_rope, latent, k_rope, indices, **options)


def calls(device, *, B=1, T=1, N=128, S=32768, L=2048, C=512, R=64, dtype="bfloat16", sinks=False):
    """Arguments of `run`: one cache, other lists."""
    kind = dict(dtype=getattr(torch, dtype), device=device)
    tensors = [torch.randn(shape, **kind) for shape in ((B, T, N, C), (B, T, N, R), (B, S, C), (B, S, R))]
    options = dict(scale=(C + R) ** -0.5, sinks=torch.zeros(N, device=device) if sinks else None)
    while True:
        yield (*tensors, torch.rand(B, T, S, device=device).topk(L).indices.int()), options


OP = Record(
    "decode_sparse_mla", run=run, site=site, calls=calls, kernels=(listed_latents.latent_list_kernel,),
    sweep=sweep_latents, shapes=(dict(B=64), dict(B=8), dict(B=1), dict(B=64, N=64), dict(B=64, N=16)),
    # One split where L is 128.
    offline=(
        dict(L=128), dict(T=2, sinks=True), dict(T=2, N=32), dict(T=2, N=16), dict(T=2, L=64, dtype="float32"),
    ),
)  # fmt: skip
