"""The selection rule of every sparse mechanism."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jforge.core import masks
from jforge.ops import check


@masks.with_infinities
def topk_indices(scores: Float[Array, "*b S"], k: int) -> Int[Array, "*b L"]:
    """Indices of the k largest scores, score descending and index ascending; picks of -inf become -1.

    k above S gives S picks followed by -1. int32. NaN ranks above everything: a broken score is picked and shows.
    0 and -0 are equal. Raises ValueError and TypeError from jforge.ops.check.
    """
    check.topk_indices(scores, k)
    # top_k keeps the lower index on a tie, but puts -0.0 after 0.0 and tells the NaNs of either sign apart. Zeros lose
    # their sign as bits: XLA's comparisons with 0 on a CPU, and LLVM's of a float select, take denormals for zeros.
    bits = jax.lax.bitcast_convert_type(scores, f"uint{8 * scores.dtype.itemsize}")
    bits = jnp.where(bits << 1 == 0, 0, bits)
    scores = jax.lax.bitcast_convert_type(bits, scores.dtype)
    scores = jnp.where(jnp.isnan(scores), jnp.nan, scores)
    # XLA for CUDA has a kernel of its own for up to 16 picks, which never picks a NaN: ask for one more.
    size = scores.shape[-1]
    values, picks = (x[..., : min(k, size)] for x in jax.lax.top_k(scores, min(max(int(k), 17), size)))
    picks = jnp.where(jnp.isneginf(values), -1, picks.astype(jnp.int32))
    missing = k - picks.shape[-1]
    return jnp.pad(picks, [(0, 0)] * (picks.ndim - 1) + [(0, missing)], constant_values=-1)
