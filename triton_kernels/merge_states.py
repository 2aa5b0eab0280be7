"""Merge partial attention results of the same queries by their log-sum-exps; the equation and the kernel: `merge`."""

import torch

from torch_ref.ops import check
from triton_kernels import runtime
from triton_kernels.merge import FIXED_BLOCK_P, launch_merge, merge_kernel, merge_parts, part_buffers
from triton_kernels.plan import Record


def merge_states(outs, lses):
    """Merge P partial results of the same queries; see `merge` for the equation.

    outs: P B T N V, float16, bfloat16 or float32; lses: float32 P B T N, natural log, sinks included.
    Returns out: B T N V in outs' dtype, and lse: float32 B T N, natural log.

    A part with lse = -inf contributes nothing, even if it is NaN. If no part has anything, out = 0 and lse = -inf.
    Parts that are not contiguous are copied first. Raises ValueError for shapes and devices, TypeError for dtypes and
    for CPU tensors outside the interpreter. Source: the split-KV merge of Flash-Decoding and FlashInfer
    (arXiv 2501.01005, "attention states").
    """
    check.merge_states(outs, lses)
    runtime.check_float(OP.name, "outs", outs.dtype)
    if lses.dtype != torch.float32:
        raise TypeError(f"{OP.name}: lses must be float32 in triton_kernels, got {lses.dtype}")
    runtime.check_device(OP.name, "outs", outs.device)
    n_parts, rows = outs.shape[0], outs[0, ..., 0].numel()
    out = torch.empty(outs.shape[1:], dtype=outs.dtype, device=outs.device)
    lse = torch.empty(outs.shape[1:-1], dtype=torch.float32, device=outs.device)
    if rows:
        numbering = dict(n_parts=n_parts, part_stride=rows, row_stride=1)
        parts = (outs.contiguous(), lses.contiguous(), None)
        launch_merge(*parts, out, lse, **numbering, block_p=FIXED_BLOCK_P)
    return out, lse


def calls(device, *, P, V, dtype="bfloat16", sinks=False, fixed=False):
    """Arguments of `merge_parts`, which is how the kernels of this package launch the merge."""
    out = torch.empty(1, 1, 32, V, dtype=getattr(torch, dtype), device=device)
    lse = torch.zeros(1, 1, 32, device=device)
    while True:
        yield (*part_buffers(out, lse, P), lse[0, 0] if sinks else None, out, lse), dict(n_splits=P, fixed=fixed)


OP = Record(
    "merge_states", run=merge_parts, calls=calls, kernels=(merge_kernel,),
    offline=(
        dict(P=4, V=128), dict(P=64, V=128, dtype="float32", sinks=True), dict(P=40, V=192, sinks=True, fixed=True),
    ),
)  # fmt: skip
