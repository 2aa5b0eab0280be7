"""Visibility predicates on absolute positions; both arguments broadcast. No predicate looks at cache slots."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def causal(q_pos: Int[Array, "*#s"], k_pos: Int[Array, "*#s"]) -> Bool[Array, "*s"]:
    """A token sees itself and everything before it."""
    return k_pos <= q_pos


def window(q_pos: Int[Array, "*#s"], k_pos: Int[Array, "*#s"], size: int) -> Bool[Array, "*s"]:
    """The last `size` tokens, the query's own included: q - size < k <= q."""
    return (k_pos <= q_pos) & (k_pos > q_pos - size)


def first(lengths: Int[Array, "B"], slots: int) -> Bool[Array, "B S"]:
    """The leading lengths[b] of `slots` slots."""
    return jnp.arange(slots) < lengths[:, None]
