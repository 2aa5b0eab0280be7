"""Merge of partial attention results over disjoint sets of keys."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jforge.core import masks
from jforge.core.attend import einsum
from jforge.core.softmax import accumulation_dtype
from jforge.ops import check


@masks.with_infinities
def merge_states(
    outs: Float[Array, "P B T N V"], lses: Float[Array, "P B T N"]
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """lse = log sum_p exp(lse_p);  out = sum_p exp(lse_p - lse) out_p.

    A part with lse = -inf contributes nothing, even where it is NaN; all parts empty give 0 and -inf. Knows no sink:
    exactly one part of a mechanism carries it. out keeps the dtype of outs.
    """
    check.merge_states(outs, lses)
    wide = accumulation_dtype(outs, lses)
    top = lses.max(axis=0)
    shift = jnp.where(jnp.isneginf(top), 0, top)
    weights = jnp.exp(lses.astype(wide) - shift)
    total = weights.sum(axis=0)
    safe = jnp.where(total == 0, 1, total)
    parts = jnp.where(jnp.isneginf(lses)[..., None], 0, outs.astype(wide))
    out = einsum("pbtn,pbtnv->btnv", weights, parts) / safe[..., None]
    return out.astype(outs.dtype), jnp.where(total == 0, -jnp.inf, jnp.log(safe) + shift)
