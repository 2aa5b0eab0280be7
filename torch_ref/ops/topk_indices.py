"""The best k of a row of scores, in one fixed order."""

import torch

from . import check


def topk_indices(scores, k):
    """int32 [..., k]: the positions of the k largest scores, by score descending and, in ties, by index ascending.

    scores: [..., S], any float dtype. Masked candidates hold -inf and are never picked: a pick of -inf is -1, and so
    is every pick past S when k > S. +inf forces a pick. 0.0 and -0.0 are equal. NaN of either sign ranks above +inf,
    all NaN equal: a broken score is picked and shows. Raises ValueError (k < 1, no dimension) and TypeError (dtypes).
    """
    check.topk_indices(**locals())
    # torch.topk promises no order among ties; a stable sort keeps the lower index first. On CUDA it tells NaNs apart
    # by their sign.
    scores = scores.masked_fill(scores.isnan(), torch.nan)
    ordered, index = torch.sort(scores, dim=-1, descending=True, stable=True)
    picks = index.masked_fill(ordered == -torch.inf, -1)[..., :k]
    missing = k - picks.shape[-1]
    return torch.nn.functional.pad(picks, (0, missing), value=-1).to(torch.int32)
