"""Attention of T new queries a row over listed blocks of a cache: the read of every block-sparse mechanism."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jforge.core import masks
from jforge.core.attend import einsum
from jforge.core.softmax import accumulation_dtype, cap, masked_softmax
from jforge.ops import check


@masks.with_infinities
def decode_block_sparse(
    q: Float[Array, "B T N H"],
    k: Array,
    v: Array | None,
    block_indices: Int[Array, "B T X L"],
    lengths: Int[Array, "B"] | None,
    *,
    block_size: int,
    scale: float,
    sinks: Float[Array, "N"] | None = None,
    softcap: float | None = None,
    page_table: Int[Array, "B P"] | None = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    chunk: int | None = None,
    out_dtype=None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """out_t = sum_s softmax_s(cap(scale * q_t . k_s)) v_s over the seen slots s of the listed blocks.

    block_indices: one list for each key head (X = K) or each query head (X = N); block j holds the slots
    j * block_size <= s < (j + 1) * block_size, and with block_size 1 the list is of tokens. -1 and indices past the
    cache are ignored, wherever they stand; those of one list are distinct (the caller's duty), in any order. Query t
    sees s < lengths[b]-T+t+1, so the last block may be partial; lengths=None: the list alone decides.
    v=None: the values are the keys. chunk: slots of a list's blocks in one split, a plan that kernels follow; no effect
    here. All else (pages, scales, sinks, results, errors) is as in decode_attention.

    Only the listed blocks are gathered. Sources: NSA (arXiv 2502.11089), MoBA (2502.13189), DeepSeek-V4, MiniMax-M3.
    """
    sizes = check.decode_block_sparse(**locals())
    K, X = sizes["K"], sizes["X"]
    S = k.shape[1] if page_table is None else page_table.shape[1] * k.shape[1]
    if lengths is not None:
        check.length_values(lengths, S)
    slots, seen = listed_slots(block_indices, block_size, S, lengths)
    where = _addresses(slots, page_table, k.shape[1])
    heads = (jnp.arange(X) // (X // K))[:, None]
    wide = accumulation_dtype(q, *(a for a in (k, v) if k_scale is None and a is not None))

    def gather(pool, scales):
        rows = pool[*where, heads].astype(wide)
        rows = rows if scales is None else rows * scales[*where, heads][..., None]
        return jnp.where(seen[..., None], rows, 0)  # 0 * NaN is NaN, so what is not seen is blanked

    keys = gather(k, k_scale)
    values = keys if v is None else gather(v, v_scale)
    out, lse = attend_gathered(q, keys, values, seen, scale=scale, softcap=softcap, sinks=sinks)
    return out.astype(out_dtype or q.dtype), lse


@masks.with_infinities
def attend_gathered(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B T X s H"],
    values: Float[Array, "B T X s V"],
    seen: Bool[Array, "B T X s"],
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Softmax attention of each query over rows of its own, N/X heads to a list; what is not seen must be finite."""
    (B, T, N, H), X, wide = q.shape, keys.shape[2], keys.dtype
    grouped = q.reshape(B, T, X, N // X, H).astype(wide)
    scores = cap(einsum("btxgh,btxsh->btxgs", grouped, keys) * scale, softcap)
    sink = None if sinks is None else sinks.reshape(X, N // X).astype(wide)
    weights, lse = masked_softmax(scores, seen[:, :, :, None], sink)
    out = einsum("btxgs,btxsv->btxgv", weights, values)
    return out.reshape(B, T, N, values.shape[-1]), lse.reshape(B, T, N)


def listed_slots(blocks: Array, size: int, S: int, lengths) -> tuple[Int[Array, "B T X s"], Bool[Array, "B T X s"]]:
    """(the slots of the listed blocks, inside the cache; which of them the query sees)."""
    if S == 0:  # nothing that could stand in for an entry that is not seen
        blocks = blocks[..., :0]
    listed = (blocks >= 0) & (blocks < -(-S // size))  # before the product, which garbage would overflow
    slots = jnp.where(listed, blocks, 0)[..., None] * size + jnp.arange(size)
    seen = listed[..., None] & (slots < S)
    if lengths is not None:
        end = lengths[:, None] - blocks.shape[1] + jnp.arange(blocks.shape[1]) + 1
        seen &= slots < end[..., None, None, None]
    flat = (*blocks.shape[:3], blocks.shape[3] * size)
    return jnp.clip(slots, 0, max(S - 1, 0)).reshape(flat), seen.reshape(flat)


def _addresses(slots: Array, page_table, page: int) -> tuple[Array, Array]:
    """(row, slot) of each slot in the cache, or (page, slot in it) in a pool."""
    rows = jnp.arange(slots.shape[0])[:, None, None, None]
    if page_table is None:
        return rows, slots
    return page_table[rows, slots // page], slots % page
