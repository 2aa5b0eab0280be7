"""Lists of picked blocks, as the block-sparse mechanisms hand them to their op, and what they stand for."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def tokens(lists: Int[Array, "B T X L"], size: int, S: int) -> Bool[Array, "B T X S"]:
    """Which of S tokens lie in the listed blocks of `size`; -1 stands for none."""
    blocks = -(-S // size)
    at = jnp.ix_(*map(jnp.arange, lists.shape[:-1]))
    picked = jnp.zeros((*lists.shape[:-1], blocks), bool)
    picked = picked.at[*(axis[..., None] for axis in at), jnp.where(lists < 0, blocks, lists)].set(True, mode="drop")
    return jnp.repeat(picked, size, axis=-1)[..., :S]


def visible(
    lists: Int[Array, "B T X L"], size: int, q_pos: Int[Array, "B T"], S: int, heads: int
) -> Bool[Array, "B T N S"]:
    """The mask of each query head: tokens of its list up to the query's own. Lists are per head or per group."""
    causal = jnp.arange(S) <= q_pos[..., None, None]
    return jnp.repeat(tokens(lists, size, S) & causal, heads // lists.shape[2], axis=2)
