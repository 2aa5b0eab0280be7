"""Block scores of an indexer."""

import torch

from ..core.dtypes import einsum
from . import check
from .decode_attention import dequantise, visible


def block_index_scores(q_index, k_index, lengths, *, block_size, k_scale=None):
    """score_tim = max over the seen s with s // block_size = m of q_index_ti . k_index_s;  -inf when none is seen.

    Query t of row b sees the slots s < lengths[b] - T + t + 1.
    q_index: B T I J. k_index: B S J, one key for all index heads, of q_index's dtype. lengths: int32 B, the keys of
    the row, its T new ones included, 0 to S. k_scale: float32 B S for an int8 or float8 k_index: value = stored *
    scale. Returns B T I ceil(S / block_size) in float32 (float64 for float64); the last block may be partial. Slots
    that no query sees may hold NaN or Inf. Raises ValueError (shapes, ranges, devices; values of lengths on the CPU)
    and TypeError (dtypes). MiniMax Sparse Attention (2606.13392), without its scale, which changes no order.
    """
    check.block_index_scores(**locals())
    slots = k_index.shape[1]
    check.length_values(lengths, slots)
    seen = visible(lengths, q_index.shape[1], slots, None)
    return block_maxima(q_index, dequantise(k_index, k_scale), seen, block_size)


def block_maxima(q_index, k_index, seen, block_size):
    """B T I ceil(S / block_size): the scores of the op for the keys seen, bool B T S."""
    # a NaN in a slot that no query sees would come back through the gradient of the queries
    k_index = k_index.masked_fill(~seen.any(dim=1)[..., None], 0.0)
    scores = einsum("btij,bsj->btis", q_index, k_index).masked_fill(~seen[:, :, None], -torch.inf)
    slots = scores.shape[-1]
    blocks = -(-slots // block_size)
    scores = torch.nn.functional.pad(scores, (0, blocks * block_size - slots), value=-torch.inf)
    return scores.unflatten(-1, (blocks, block_size)).amax(-1)
