"""The selection rule of every sparse mechanism."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def topk_indices(scores: Float[Array, "*b S"], k: int) -> Int[Array, "*b L"]:
    """Indices of the k largest scores, score descending and index ascending; picks of -inf become -1.

    k above S gives S picks followed by -1. int32.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k is {k!r}; it must be a positive integer")
    scores = jnp.where(scores == 0, 0, scores)  # top_k puts -0.0 after 0.0; they are one score
    values, picks = jax.lax.top_k(scores, min(k, scores.shape[-1]))  # top_k keeps the lower index on a tie
    picks = jnp.where(jnp.isneginf(values), -1, picks.astype(jnp.int32))
    missing = k - picks.shape[-1]
    return jnp.pad(picks, [(0, 0)] * (picks.ndim - 1) + [(0, missing)], constant_values=-1)
