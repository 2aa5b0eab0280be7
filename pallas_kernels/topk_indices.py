"""The selection rule of every sparse mechanism. It has no kernel of its own: XLA's top-k on the GPU does it."""

import jax

from jforge.ops import check
from pallas_kernels.compat import jnp


def topk_indices(scores, k):
    """Indices of the k largest scores on the last axis, score descending and index ascending: int32 [..., k].

    Picks of -inf become -1; k above the number S of scores gives S picks followed by -1. 0 and -0 are equal, and NaN
    ranks above everything: a broken score is picked and shows. Raises TypeError for scores that are not floating point,
    ValueError for scores without an axis and for k below 1.
    """
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise TypeError(f"scores has dtype {scores.dtype}; it must be floating point")
    if scores.ndim == 0:
        raise ValueError("scores has shape (); it needs at least one axis")
    check.positive("k", k, integer=True)
    # top_k keeps the lower index first among equals, but tells -0 from 0 and the NaNs of either sign apart.
    ordered = jnp.where(scores == 0, jnp.zeros_like(scores), scores)
    ordered = jnp.where(jnp.isnan(scores), jnp.full_like(scores, jnp.nan), ordered)
    values, picks = jax.lax.top_k(ordered, min(int(k), scores.shape[-1]))
    picks = jnp.where(jnp.isneginf(values), -1, picks.astype(jnp.int32))
    missing = k - picks.shape[-1]
    return jnp.pad(picks, [(0, 0)] * (picks.ndim - 1) + [(0, missing)], constant_values=-1)
