"""The dtype that sums are kept in."""

import functools

import torch


def accumulator(*dtypes):
    """The widest of the dtypes, at least float32: float16 and bfloat16 give float32, float64 gives float64."""
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def einsum(equation, *operands, out_dtype=None):
    """torch.einsum with operands and sums in `accumulator(...)`, rounded once to out_dtype (default: not rounded)."""
    acc = accumulator(*(x.dtype for x in operands))
    return torch.einsum(equation, *(x.to(acc) for x in operands)).to(out_dtype or acc)
