"""The selection rule of every sparse mechanism. It has no kernel of its own: XLA's top-k on the GPU does it."""

from jforge import ops


def topk_indices(scores, k):
    """jforge.ops.topk_indices: indices of the k largest scores on the last axis, int32 [..., k], with its errors."""
    return ops.topk_indices(scores, k)
