"""Visibility predicates on absolute positions; both arguments broadcast. No predicate looks at cache slots."""

from collections.abc import Callable
from functools import wraps

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def causal(q_pos: Int[Array, "*#s"], k_pos: Int[Array, "*#s"]) -> Bool[Array, "*s"]:
    """A token sees itself and everything before it."""
    return k_pos <= q_pos


def window(q_pos: Int[Array, "*#s"], k_pos: Int[Array, "*#s"], size: int) -> Bool[Array, "*s"]:
    """The last `size` tokens, the query's own included: q - size < k <= q."""
    return (k_pos <= q_pos) & (k_pos > q_pos - size)


def decode(lengths: Int[Array, "B"], T: int, S: int, size: int | None = None) -> Bool[Array, "B T S"]:
    """What the T newest tokens of each row see of S slots: s < lengths - T + t + 1, the last `size` of them."""
    q_pos = (lengths[:, None] - T + jnp.arange(T))[..., None]
    return causal(q_pos, jnp.arange(S)) if size is None or size >= S else window(q_pos, jnp.arange(S), size)


def with_infinities[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """A function to which infinity is a value: the score of a key that is not seen, or of one that is always picked.

    `jax_debug_infs` does not look inside, nor at what the function returns; it does at all that is made of that.
    """

    @wraps(function)
    def unchecked(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.debug_infs(False):
            return function(*args, **kwargs)

    return unchecked
