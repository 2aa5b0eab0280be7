"""Argument checks of `decode_linear`, as in `check`."""

import torch

from . import check

WIDE = (torch.float32, torch.float64)
DECAYS = ("N", "B N", "B N H")


def decode_linear(q, k, v, state, decay, *, beta=None):
    """Check the arguments of `decode_linear`; shapes and dtypes are those of its docstring."""
    sizes = {}
    check.tensor("q", q, "B N H", sizes, check.FLOATS)
    check.tensor("k", k, "B N H", sizes, (q.dtype,), q.device)
    check.tensor("v", v, "B N V", sizes, (q.dtype,), q.device)
    check.tensor("state", state, "B N H V", sizes, WIDE, q.device)
    check.is_tensor("decay", decay)
    if not 1 <= decay.ndim <= len(DECAYS):
        allowed = ", ".join(f"[{dims}]" for dims in DECAYS)
        raise ValueError(f"decay has shape {list(decay.shape)}; allowed: {allowed}")
    check.tensor("decay", decay, DECAYS[decay.ndim - 1], sizes, WIDE, q.device)
    if beta is not None:
        check.tensor("beta", beta, "B N", sizes, WIDE, q.device)
