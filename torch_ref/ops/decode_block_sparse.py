"""Attention of T new queries per row over the blocks of a cache that each query names."""

import torch

from ..core.dtypes import accumulator, einsum
from ..core.softmax import capped, masked_softmax
from . import check
from .decode_attention import dequantise


def decode_block_sparse(
    q, k, v, block_indices, lengths, *, block_size, scale, sinks=None, softcap=None, page_table=None, k_scale=None,
    v_scale=None, chunk=None, out_dtype=None,
):  # fmt: skip
    """out_t = sum_s p_s v_s,  p = softmax over seen s of cap(scale q_t . k_s),  cap(z) = softcap tanh(z / softcap).

    Query t of row b sees the slots s < lengths[b] - T + t + 1 whose block s // block_size its list names; with
    lengths=None it sees all slots of the named blocks (entries of compressed caches).
    q: B T N H. k: B S K H. v: B S K V, or None: the values are k. block_indices: int32 B T K L, a list for each KV head
    and its N/K heads, or B T N L, a list for each head; in any order, distinct within a list (the caller's duty).
    Entries below 0 or at and past ceil(S / block_size) are ignored wherever they stand; the last block may be partial.
    block_size 1 is a gather of tokens. lengths: int32 B, the keys of the row, its T new ones included, 0 to S.
    page_table: int32 B P; then k and v are pools `pages page K H`, and slot s of row b is slot s % page of the page
    page_table[b, s // page]; blocks and pages need not divide each other, and entries whose slots no query sees are
    not read. k_scale, v_scale: float32 B S K (pools: pages page K) for int8 and float8 k, v: value = stored * scale.
    sinks: N, logits in natural-log units that join the denominator alone, neither scaled nor capped. chunk: slots of
    listed blocks in one split of the kernels; no effect on the result.
    Returns out B T N V in out_dtype or q's dtype, and lse B T N in float32 (float64 for float64), the natural log of
    the denominator, sink included. A query that sees no key gives out = 0 and lse = -inf, or its sink. Slots that no
    query sees may hold NaN or Inf. Raises ValueError (shapes, ranges, devices; values of lengths and of page_table on
    the CPU) and TypeError (dtypes).
    Big Bird (2007.14062), NSA (2502.11089) with lists per KV head; MoBA (2502.13189) with lists per head.
    """
    check.decode_block_sparse(**locals())
    slots = k.shape[1] if page_table is None else page_table.shape[1] * k.shape[1]
    if lengths is not None:
        check.length_values(lengths, slots)
    if slots == 0:  # an empty cache has no slot that could stand in for an ignored entry
        block_indices = block_indices[..., :0]
    chosen, seen = listed_slots(block_indices, block_size, slots, lengths)
    index = (*storage_index(chosen, seen, page_table, k), kv_head_of_list(block_indices.shape[2], k))
    keys = gathered(k, k_scale, index, seen)
    values = keys if v is None else gathered(v, v_scale, index, seen)
    out, lse = listed_attention(q, keys, values, seen, scale, sinks, softcap)
    return out.to(out_dtype or q.dtype), lse


def listed_slots(block_indices, block_size, slots, lengths):
    """(chosen, seen), int64 and bool B T lists (L block_size): the slots of the listed blocks, and which are seen.

    chosen is 0 where seen is False, so it can always be followed.
    """
    offset = torch.arange(block_size, device=block_indices.device)
    chosen = (block_indices.long()[..., None] * block_size + offset).flatten(-2)
    seen = (chosen >= 0) & (chosen < slots)
    if lengths is not None:
        new = block_indices.shape[1]
        visible = lengths[:, None] - new + 1 + torch.arange(new, device=lengths.device)
        seen = seen & (chosen < visible[..., None, None])
    return chosen.masked_fill(~seen, 0), seen


def storage_index(chosen, seen, page_table, k):
    """(outer, inner): where slot chosen[b, ...] of row b lies in the two leading dimensions of k (rows or pages)."""
    row = torch.arange(len(chosen), device=chosen.device)[:, None, None, None]
    if page_table is None:
        return row, chosen
    pages, page = k.shape[:2]
    entry = chosen // page
    if page_table.device.type == "cpu":
        needed = torch.zeros(page_table.shape, dtype=torch.bool)
        needed[row.expand_as(entry)[seen], entry[seen]] = True
        check.page_values(page_table, needed, pages)
    return page_table[row, entry].long().masked_fill(~seen, 0), chosen % page


def kv_head_of_list(lists, k):
    """int [lists, 1]: the KV head that each list reads, itself for lists per KV head, n // (N/K) for lists per head."""
    return torch.arange(lists, device=k.device)[:, None] // (lists // k.shape[2])


def gathered(stored, scale, index, seen):
    """B T lists X V: the slots at index, dequantised, 0 where they are not seen (0 * NaN is NaN)."""
    wide = dequantise(stored[index], None if scale is None else scale[index])
    return wide.masked_fill(~seen[..., None], 0.0)


def listed_attention(q, keys, values, seen, scale, sinks, softcap):
    """Attention where the queries of list j read its own keys and values: B T lists X H and B T lists X V."""
    lists = keys.shape[2]
    acc = accumulator(q.dtype, keys.dtype, values.dtype)
    keys, values, q = keys.to(acc), values.to(acc), q.to(acc).unflatten(2, (lists, -1))
    logits = capped(einsum("btjgh,btjxh->btjgx", q, keys), scale, softcap)
    sinks = None if sinks is None else sinks.unflatten(0, (lists, -1))
    p, lse = masked_softmax(logits, seen[:, :, :, None], sinks)
    return einsum("btjgx,btjxv->btjgv", p, values).flatten(2, 3), lse.flatten(2, 3)
