"""Argument checks of `block_index_scores`, as in `check`."""

import torch

from . import check


def block_index_scores(q_index, k_index, lengths, *, block_size, k_scale=None):
    """Check the arguments of `block_index_scores`; shapes and dtypes are those of its docstring."""
    sizes = {}
    check.tensor("q_index", q_index, "B T I J", sizes, check.FLOATS)
    check.tensor("k_index", k_index, "B S J", sizes, (q_index.dtype, *check.QUANTISED), q_index.device)
    quantised = k_index.dtype in check.QUANTISED
    if quantised and k_scale is None:
        raise TypeError(f"k_scale is None; allowed: a float32 tensor, because k_index has dtype {k_index.dtype}")
    if not quantised and k_scale is not None:
        raise TypeError(f"k_scale is given for a k_index of dtype {k_index.dtype}; allowed: with int8 and float8")
    if k_scale is not None:
        check.tensor("k_scale", k_scale, "B S", sizes, (torch.float32,), q_index.device)
    check.tensor("lengths", lengths, "B", sizes, (torch.int32,), q_index.device)
    check.integer("block_size", block_size)
