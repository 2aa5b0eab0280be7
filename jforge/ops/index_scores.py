"""Scores of an indexer: which tokens or blocks a sparse mechanism should read."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jforge.core import masks
from jforge.core.attend import einsum
from jforge.core.softmax import accumulation_dtype
from jforge.ops import check


@masks.with_infinities
def index_scores(
    q_index: Float[Array, "B T I J"],
    k_index: Array,
    weights: Float[Array, "B T I"],
    lengths: Int[Array, "B"],
    *,
    k_scale: Float[Array, "B S"] | None = None,
) -> Float[Array, "B T S"]:
    """score_{t,s} = sum_i w_{t,i} relu(q_{t,i} . k_s); -inf for s that query t does not see. float32 or wider.

    k_index: B S J in q's dtype, or int8 or fp8 with k_scale: value = stored * scale. Query t sees
    s < lengths[b]-T+t+1. Source: the lightning indexer of DeepSeek-V3.2.
    """
    check.index_scores(q_index, k_index, weights, lengths, k_scale=k_scale)
    check.length_values(lengths, k_index.shape[1])
    return token_scores(q_index, k_index, weights, masks.decode(lengths, q_index.shape[1], k_index.shape[1]), k_scale)


@masks.with_infinities
def token_scores(q, k, weights, seen: Bool[Array, "B T S"], k_scale=None) -> Float[Array, "B T S"]:
    """index_scores under any mask."""
    products = jnp.maximum(_products(q, k, seen, k_scale), 0)
    return jnp.where(seen, einsum("bti,btis->bts", weights.astype(products.dtype), products), -jnp.inf)


@masks.with_infinities
def block_index_scores(
    q_index: Float[Array, "B T I J"],
    k_index: Array,
    lengths: Int[Array, "B"],
    *,
    block_size: int,
    k_scale: Float[Array, "B S"] | None = None,
) -> Float[Array, "B T I E"]:
    """score_{t,i,e} = max of q_{t,i} . k_s over the tokens s of block e that query t sees; -inf where it sees none.

    No relu and no weights. Arguments as in index_scores; E = ceil(S / block_size). Source: MiniMax-M3.
    """
    check.block_index_scores(q_index, k_index, lengths, block_size=block_size, k_scale=k_scale)
    check.length_values(lengths, k_index.shape[1])
    seen = masks.decode(lengths, q_index.shape[1], k_index.shape[1])
    return block_maxima(q_index, k_index, seen, block_size, k_scale)


@masks.with_infinities
def block_maxima(q, k, seen: Bool[Array, "B T S"], size: int, k_scale=None) -> Float[Array, "B T I E"]:
    """block_index_scores under any mask."""
    products = jnp.where(seen[:, :, None], _products(q, k, seen, k_scale), -jnp.inf)
    entries = -(-products.shape[-1] // size)
    padding = entries * size - products.shape[-1]
    products = jnp.pad(products, [(0, 0)] * 3 + [(0, padding)], constant_values=-jnp.inf)
    return products.reshape(*products.shape[:3], entries, size).max(axis=-1)


def _products(q, k, seen: Bool[Array, "B T S"], k_scale) -> Float[Array, "B T I S"]:
    """q . k, with keys that no query sees blanked: they may be NaN."""
    wide = accumulation_dtype(q)
    k = k.astype(wide) if k_scale is None else k.astype(wide) * k_scale[..., None]
    k = jnp.where(seen.any(axis=1)[..., None], k, 0)
    return einsum("btij,bsj->btis", q.astype(wide), k)
