"""Attention of T new queries per row over a cache of latents and rotary keys that all heads share."""

import torch

from ..core.softmax import grouped_attention
from . import check
from .decode_attention import dequantise, gather_pages, readable_pages, visible


def decode_mla(
    q_latent, q_rope, latent, k_rope, lengths, *, scale, window=None, sinks=None, page_table=None, latent_scale=None,
    chunk=None, out_dtype=None,
):  # fmt: skip
    """out_t = sum_s p_s latent_s,  p = softmax over seen s of scale (q_latent_t . latent_s + q_rope_t . k_rope_s).

    This is `decode_attention` with one KV head whose key is [latent | k_rope] and whose value is latent: query t of row
    b sees the slots s < lengths[b] - T + t + 1, the last `window` of them when a window is given.
    q_latent: B T N C. q_rope: B T N R. latent: B S C. k_rope: B S R, in the dtype of both queries. lengths: int32 B,
    the keys of the row, its T new ones included, 0 to S. page_table: int32 B P; then latent and k_rope are pools
    `pages page C` and `pages page R`, and slot s of row b is slot s % page of the page page_table[b, s // page];
    entries whose slots no query sees are not read. latent_scale: float32 B S (pools: pages page) for an int8 or
    float8 latent: value = stored * scale. sinks: N, logits in natural-log units that join the denominator alone, not
    scaled. chunk: the split size of the kernels; no effect on the result.
    Returns out B T N C in out_dtype or q_latent's dtype, and lse B T N in float32 (float64 for float64), the natural
    log of the denominator, sink included. A query that sees no key gives out = 0 and lse = -inf, or its sink. Slots
    that no query sees may hold NaN or Inf. Raises ValueError (shapes, ranges, devices; values of lengths and of
    page_table on the CPU) and TypeError (dtypes).
    DeepSeek-V2 (2405.04434), the form with the up-projections absorbed into the query and the output.
    """
    check.decode_mla(**locals())
    slots = latent.shape[1] if page_table is None else page_table.shape[1] * latent.shape[1]
    check.length_values(lengths, slots)
    mask = visible(lengths, q_latent.shape[1], slots, window)
    if page_table is not None:
        pages = readable_pages(page_table, mask, *latent.shape[:2])
        latent, k_rope, latent_scale = (gather_pages(pool, pages) for pool in (latent, k_rope, latent_scale))
    latent = dequantise(latent, latent_scale)
    # torch.cat widens: a dequantised latent is float32 while k_rope still has q's dtype
    key, query = torch.cat([latent, k_rope], dim=-1), torch.cat([q_latent, q_rope], dim=-1)
    out, lse = grouped_attention(query, key[:, :, None], latent[:, :, None], mask, scale, sinks)
    return out.to(out_dtype or q_latent.dtype), lse
