"""Attention of T new queries per row over a cache of keys and values."""

import torch

from ..core.alibi import bias
from ..core.softmax import grouped_attention
from . import check


def decode_attention(
    q, k, v, lengths, *, scale, window=None, sinks=None, softcap=None, page_table=None, k_scale=None, v_scale=None,
    chunk=None, out_dtype=None, alibi=None,
):  # fmt: skip
    """out_t = sum_s p_s v_s,  p = softmax over seen s of cap(scale q_t . k_s) + alibi (s - t').

    cap(z) = softcap tanh(z / softcap);  t' = lengths[b] - T + t, the slot of query t itself.

    Query t of row b sees the slots s < lengths[b] - T + t + 1, the last `window` of them when a window is given.
    q: B T N H. k: B S K H. v: B S K V. lengths: int32 B, the keys of the row, its T new ones included, 0 to S.
    page_table: int32 B P; then k and v are pools `pages page K H`, and slot s of row b is slot s % page of the page
    page_table[b, s // page]; entries whose slots no query sees are not read. k_scale, v_scale: float32 B S K (pools:
    pages page K) for int8 and float8 k, v: value = stored * scale. sinks: N, logits in natural-log units that join
    the denominator alone, neither scaled nor capped. alibi: float32 or wider, N, slopes that are neither scaled nor
    capped; with pages s is the token's place in the row. scale: a float32. softcap: 1e-30 to 1e38.
    chunk: the split size of the kernels; no effect on the result.
    Returns out B T N V in out_dtype or q's dtype, and lse B T N in float32 (float64 for float64), the natural log of
    the denominator, sink included. A query that sees no key gives out = 0 and lse = -inf, or its sink. Slots that no
    query sees may hold NaN or Inf. Raises ValueError (shapes, ranges, devices; values of lengths and of page_table on
    the CPU) and TypeError (dtypes).
    Vaswani et al. 2017; grouped heads: Ainslie et al. 2023; pages: Kwon et al. 2023; sinks: gpt-oss; cap: Gemma 2;
    alibi: Press et al. 2021.
    """
    check.decode_attention(**locals())
    slots = k.shape[1] if page_table is None else page_table.shape[1] * k.shape[1]
    check.length_values(lengths, slots)
    mask = visible(lengths, q.shape[1], slots, window)
    if page_table is not None:
        pages = readable_pages(page_table, mask, *k.shape[:2])
        k, v, k_scale, v_scale = (gather_pages(pool, pages) for pool in (k, v, k_scale, v_scale))
    k, v = dequantise(k, k_scale), dequantise(v, v_scale)
    out, lse = grouped_attention(q, k, v, mask, scale, sinks, softcap, slot_bias(alibi, lengths, *mask.shape[1:]))
    return out.to(out_dtype or q.dtype), lse


def visible(lengths, new, slots, window):
    """bool B T S: slot s is seen by query t, n - window <= s < n with n = lengths - T + t + 1."""
    seen = lengths[:, None] - new + 1 + torch.arange(new, device=lengths.device)
    behind = seen[:, :, None] - torch.arange(slots, device=lengths.device)  # 1 for the query's own slot
    return (behind >= 1) if window is None else (behind >= 1) & (behind <= window)


def slot_bias(alibi, lengths, new, slots):
    """B T N S: alibi (s - t') for slot s and the own slot t' of each of the T queries; None without slopes N."""
    if alibi is None:
        return None
    own = lengths[:, None] - new + torch.arange(new, device=lengths.device)
    return bias(alibi, own, torch.arange(slots, device=lengths.device).expand(len(lengths), -1))


def readable_pages(page_table, mask, pages, page):
    """page_table with 0 in the entries whose slots no query sees: those may hold anything, so they are not followed."""
    needed = mask.any(dim=1).unflatten(1, (-1, page)).any(-1)
    if page_table.device.type == "cpu":
        check.page_values(page_table, needed, pages)
    return page_table.masked_fill(~needed, 0)


def gather_pages(pool, pages):
    """pages page ... -> B S ..., the slots of each row in order. None stays None."""
    return None if pool is None else pool[pages.long()].flatten(1, 2)


def dequantise(stored, scale):
    """stored * scale in float32, scale one number per slot and head; without a scale, stored itself."""
    return stored if scale is None else stored.to(scale.dtype) * scale[..., None]
