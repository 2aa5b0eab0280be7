"""The selection rule of every sparse mechanism. There is no kernel here: the call goes to `jforge.ops`, and XLA's top-k
does the work on the GPU.
"""

from jforge import ops


def topk_indices(scores, k):
    """jforge.ops.topk_indices, to which this forwards: it has no Mosaic kernel of its own.

    Indices of the k largest scores on the last axis, int32 [..., k], with the errors of jforge.ops.
    """
    return ops.topk_indices(scores, k)
