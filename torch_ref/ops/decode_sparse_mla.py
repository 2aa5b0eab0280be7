"""Attention of T new queries per row over the tokens of a latent cache that each query names."""

import torch

from . import check
from .decode_block_sparse import gathered, listed_attention, listed_slots, storage_index


def decode_sparse_mla(
    q_latent, q_rope, latent, k_rope, indices, *, scale, sinks=None, latent_scale=None, chunk=None, out_dtype=None
):
    """out_t = sum_s p_s latent_s,  p = softmax over picked s of scale (q_latent_t . latent_s + q_rope_t . k_rope_s).

    This is `decode_mla` over the named slots alone: there are no lengths, the indices decide, the same for all heads.
    q_latent: B T N C. q_rope: B T N R. latent: B S C. k_rope: B S R, in the dtype of both queries. indices: int32
    B T L, in any order, distinct within a query (the caller's duty); entries below 0 or at and past S are ignored
    wherever they stand. latent_scale: float32 B S for an int8 or float8 latent: value = stored * scale. sinks: N,
    logits in natural-log units that join the denominator alone, not scaled. chunk: entries of one split of the
    kernels; no effect on the result.
    Returns out B T N C in out_dtype or q_latent's dtype, and lse B T N in float32 (float64 for float64), the natural
    log of the denominator, sink included. A query without a key gives out = 0 and lse = -inf, or its sink. Slots that
    a query does not name may hold NaN or Inf. Raises ValueError (shapes, ranges, devices) and TypeError (dtypes).
    DeepSeek-V3.2; FlashMLA's sparse decode.
    """
    check.decode_sparse_mla(**locals())
    if latent.shape[1] == 0:  # an empty cache has no slot that could stand in for an ignored entry
        indices = indices[..., :0]
    chosen, seen = listed_slots(indices[:, :, None], 1, latent.shape[1], None)
    index = storage_index(chosen, seen, None, latent)
    values = gathered(latent, latent_scale, index, seen)
    # torch.cat widens: a dequantised latent is float32 while k_rope still has q's dtype
    keys = torch.cat([values, gathered(k_rope, None, index, seen)], dim=-1)
    query = torch.cat([q_latent, q_rope], dim=-1)
    out, lse = listed_attention(query, keys, values, seen, scale, sinks, None)
    return out.to(out_dtype or q_latent.dtype), lse
