"""Merging attention over disjoint sets of keys."""

import torch

from ..core.dtypes import accumulator
from . import check


def merge_states(outs, lses):
    """lse = ln sum_p exp(lse_p);  out = sum_p exp(lse_p - lse) out_p: attention over the union of the parts' keys.

    outs: P B T N V, any float dtype. lses: P B T N, float32 or float64, natural log. A part with lse = -inf saw no key
    and contributes nothing, even if its out is NaN; where all parts are so, out = 0 and lse = -inf. Returns out
    B T N V in outs' dtype and lse B T N in lses' dtype; sums in float32 or wider. Raises ValueError (shapes, devices)
    and TypeError (dtypes). The split-K merge of FlashDecoding.
    """
    check.merge_states(**locals())
    acc = accumulator(outs.dtype, lses.dtype)
    wide = lses.to(acc)
    empty = wide == -torch.inf
    top = wide.amax(0).detach()
    top = top.masked_fill(top == -torch.inf, 0.0)  # -inf - (-inf) would be NaN
    weights = torch.exp(wide - top)
    total = weights.sum(0)
    nothing = empty.all(0)
    total = total.masked_fill(nothing, 1.0)
    parts = outs.to(acc).masked_fill(empty[..., None], 0.0)
    out = (weights[..., None] * parts).sum(0) / total[..., None]
    lse = (top + total.log()).masked_fill(nothing, -torch.inf)
    return out.to(outs.dtype), lse.to(lses.dtype)
