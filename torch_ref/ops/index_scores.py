"""Token scores of a lightning indexer."""

import torch

from ..core.dtypes import einsum
from . import check
from .decode_attention import dequantise, visible


def index_scores(q_index, k_index, weights, lengths, *, k_scale=None):
    """score_ts = sum_i weights_ti relu(q_index_ti . k_index_s) for s < lengths[b] - T + t + 1, -inf for other s.

    q_index: B T I J. k_index: B S J, one key for all heads, in q_index's dtype. weights: float32 or float64 B T I, of
    either sign, every scale included. lengths: int32 B, the keys of the row, its T new ones included, 0 to S. k_scale:
    float32 B S for an int8 or float8 k_index: value = stored * scale. Returns B T S in float32 (float64 for float64).
    Slots that no query sees may hold NaN or Inf. Raises ValueError (shapes, ranges, devices; values of lengths on the
    CPU) and TypeError (dtypes).
    DeepSeek-V3.2; over entries instead of tokens, DeepSeek-V4.
    """
    check.index_scores(**locals())
    check.length_values(lengths, k_index.shape[1])
    mask = visible(lengths, q_index.shape[1], k_index.shape[1], None)
    return masked_index_scores(q_index, k_index, weights, mask, k_scale)


def masked_index_scores(q_index, k_index, weights, mask, k_scale=None):
    """`index_scores` of the slots that mask, bool B T S, shows to each query."""
    # blank the keys too: a NaN in the backward pass of relu would outlive the mask on the scores
    unseen = ~mask.any(dim=1)[..., None]
    k_index = dequantise(k_index, k_scale).masked_fill(unseen, 0.0)
    dots = einsum("btij,bsj->btis", q_index, k_index).relu()
    return einsum("bti,btis->bts", weights, dots).masked_fill(~mask, -torch.inf)
