"""Times of decode_mla in both kernel packages, beside the naive peer: torch's attention on expanded heads."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

import jforge
from jforge.harness.bench import L2_BYTES, Call, jax_call, read_ceiling, shape_row


class LatentShape(NamedTuple):
    """One absorbed MLA decode call with DeepSeek's sizes: every row holds S tokens."""

    B: int
    N: int
    S: int
    C: int = 512
    R: int = 64

    @property
    def bytes_moved(self) -> int:
        """bf16 bytes of both queries, the cache and out."""
        return 2 * self.B * (self.S * (self.C + self.R) + self.N * (2 * self.C + self.R))


LATENT_SHAPES = tuple(
    LatentShape(*sizes)
    for sizes in (
        (128, 16, 4096),
        (128, 64, 4096),
        (128, 128, 4096),
        (16, 128, 16384),
        (1, 128, 131072),
        (1, 128, 4096),
    )
)


def bench_mla(shapes=LATENT_SHAPES, *, samples: int = 50, seed: int = 0) -> Iterator[dict]:
    """Rows for every shape, both packages, bf16; the first row is the read ceiling. Needs an NVIDIA GPU."""
    ceiling = read_ceiling()
    yield {"what": "ceiling", "GB_per_s": ceiling, "samples": samples}
    for shape in shapes:
        sets = min(64, max(1, math.ceil(4 * L2_BYTES / shape.bytes_moved)))
        inputs = [_latent_inputs(shape, seed + i) for i in range(sets)]
        want = jax.jit(_latent_reference)(*inputs[0])
        for call in _latent_implementations(shape, inputs):
            yield shape_row("decode_mla", call, shape, sets, want, samples, ceiling)
        del inputs, want
        yield _expanded_row(shape, samples, ceiling, seed)


def _latent_inputs(shape: LatentShape, seed: int) -> tuple[jax.Array, ...]:
    B, N, S, C, R = shape
    keys = jax.random.split(jax.random.key(seed), 4)
    sizes = ((B, 1, N, C), (B, 1, N, R), (B, S, C), (B, S, R))
    arrays = [jax.random.normal(key, size, jnp.bfloat16) for key, size in zip(keys, sizes, strict=True)]
    return (*arrays, jnp.full((B,), S, jnp.int32))


def _latent_reference(*arrays):
    return jforge.ops.decode_mla(*arrays, scale=LATENT_SCALE, out_dtype=jnp.float32)[0]


LATENT_SCALE = 192**-0.5  # of the expanded heads: nope 128 + rope 64


def _latent_implementations(shape: LatentShape, inputs) -> Iterator[Call]:
    import torch

    import pallas_kernels
    import triton_kernels

    yield jax_call("pallas", lambda *a: pallas_kernels.decode_mla(*a, scale=LATENT_SCALE)[0], inputs)
    tensors = [[torch.from_dlpack(a) for a in arrays] for arrays in inputs]
    wait = torch.cuda.synchronize
    yield Call("triton", lambda i: triton_kernels.decode_mla(*tensors[i], scale=LATENT_SCALE)[0], wait)


def _expanded_row(shape: LatentShape, samples: int, ceiling: float, seed: int) -> dict:
    """The naive peer: torch's attention over the keys and values of every head (nope 128 + rope 64, values 128), as a
    cache of expanded heads would hold them. Its rate counts the bytes of that cache; one buffer, as it exceeds L2.
    """
    import torch
    import torch.nn.functional as F

    B, N, S, C, R = shape
    keys, values = 128 + R, 128
    moved = 2 * B * N * (S + 1) * (keys + values)
    if moved > EXPANDED_BYTES:
        row = {"what": "decode_mla", "implementation": "sdpa (expanded)", "dtype": "bfloat16", **shape._asdict()}
        return {**row, "refused": f"the expanded cache takes {moved / 1e9:.0f} GB"}
    generator = torch.Generator("cuda").manual_seed(seed)
    q, k, v = (
        torch.randn(B, N, *size, generator=generator, device="cuda", dtype=torch.bfloat16)
        for size in ((1, keys), (S, keys), (S, values))
    )

    def run():
        return F.scaled_dot_product_attention(q, k, v, scale=LATENT_SCALE)

    first = (a[:1].float() for a in (q, k, v))
    want = F.scaled_dot_product_attention(*first, scale=LATENT_SCALE).transpose(1, 2).cpu().numpy()
    call = Call("sdpa (expanded)", lambda _: run()[:1].transpose(1, 2), torch.cuda.synchronize)
    row = shape_row("decode_mla", call, shape, 1, want, samples, ceiling)
    if "median" in row:
        row["GB_per_s"] = moved / row["median"] / 1e3
        row["of_ceiling"] = row["GB_per_s"] / ceiling
    return row


EXPANDED_BYTES = 48e9  # of one call that still fits an 80 GB card beside the rest
