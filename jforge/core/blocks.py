"""Lists of picked blocks, as the block-sparse mechanisms hand them to their op, and what they stand for."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jforge.core import masks


@masks.with_infinities
def choose(
    scores: Float[Array, "B T X E"], own: Int[Array, "B T"], count: int, *, first: int, local: int, ops
) -> Int[Array, "B T X L"]:
    """The `count` blocks of the highest scores; -1 where there are fewer.

    The `first` blocks and the `local` ones up to the query's own come before all others, later ones never.
    """
    block, own = jnp.arange(scores.shape[-1]), own[..., None, None]
    forced = (block < first) | (block > own - local)
    scores = jnp.where(block > own, -jnp.inf, jnp.where(forced, jnp.inf, scores))
    return ops.topk_indices(scores, min(count, max(1, scores.shape[-1])))


def tokens(lists: Int[Array, "B T X L"], size: int, S: int) -> Bool[Array, "B T X S"]:
    """Which of S tokens lie in the listed blocks of `size`; -1 stands for none."""
    blocks = -(-S // size)
    at = jnp.ix_(*map(jnp.arange, lists.shape[:-1]))
    picked = jnp.zeros((*lists.shape[:-1], blocks), bool)
    picked = picked.at[*(axis[..., None] for axis in at), jnp.where(lists < 0, blocks, lists)].set(True, mode="drop")
    return jnp.repeat(picked, size, axis=-1)[..., :S]


def tokens_of(selection: Int[Array, "B T X L"] | Int[Array, "B T L"] | None, size: int, S: int) -> Bool[Array, "B T S"]:
    """`Attention.tokens_of` where the listed blocks of `size` are read, those of any list, and nothing beside them."""
    if selection is None:
        return jnp.zeros((1, S, S), bool)
    return tokens(selection if selection.ndim == 4 else selection[:, :, None], size, S).any(axis=2)


def visible(
    lists: Int[Array, "B T X L"], size: int, q_pos: Int[Array, "B T"], S: int, heads: int
) -> Bool[Array, "B T N S"]:
    """The mask of each query head: tokens of its list up to the query's own. Lists are per head or per group."""
    causal = jnp.arange(S) <= q_pos[..., None, None]
    return jnp.repeat(tokens(lists, size, S) & causal, heads // lists.shape[2], axis=2)
