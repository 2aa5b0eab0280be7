"""The last step of every split kernel, and of the public op: parts of a result, merged by their log-sum-exps.

    m = max_p lse_p      w_p = exp(lse_p - m)      out = sum_p w_p out_p / sum_p w_p      lse = m + log sum_p w_p

A sink is one more logit without a value, so it only enlarges the denominator: with w_s = exp(sink - m), out shrinks by
1 / (1 + w_s) and lse grows by log(1 + w_s). It is folded in once, after the merge.

The order of the sum is fixed: parts in blocks of BLOCK_P, blocks in sequence. A part with weight 0 adds exact zeros, so
empty parts at the end change no bit.
"""

import torch
import triton
import triton.language as tl

from triton_kernels import runtime
from triton_kernels.plan import pow2_ceil
from triton_kernels.tiles import finite_or_zero, log_sum, sink_factor

# Parts per block of a merge whose bits must not depend on the number of parts (`chunk`, and the public op).
FIXED_BLOCK_P = 32
MAX_BLOCK_P = 64
BLOCK_V = 64


@triton.jit
def merge_kernel(
    parts,  # [.., V] rows: part p of row r starts at p * part_stride + r * row_stride, in rows
    lses,  # float32, same numbering, natural logs
    sinks,
    out,  # [rows, V]
    lse,  # [rows], natural log
    n_parts,
    part_stride,
    row_stride,
    HEADS: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
    HAS_SINK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    p = tl.arange(0, BLOCK_P)
    first = row * row_stride

    peak = float("-inf")
    for start in tl.range(0, n_parts, BLOCK_P):
        index = first + (start + p).to(tl.int64) * part_stride
        part_lse = tl.load(lses + index, mask=start + p < n_parts, other=float("-inf"))
        peak = tl.maximum(peak, tl.max(part_lse, 0))
    peak = finite_or_zero(peak)

    acc = tl.zeros([BLOCK_V], tl.float32)
    total = 0.0
    for start in tl.range(0, n_parts, BLOCK_P):
        index = first + (start + p).to(tl.int64) * part_stride
        part_lse = tl.load(lses + index, mask=start + p < n_parts, other=float("-inf"))
        weight = tl.exp(part_lse - peak)
        # An empty part may be unwritten memory: it is not read at all. (A NaN weight is read, and stays NaN.)
        used = (weight != 0.0)[:, None] & (col < V)[None, :]
        value = tl.load(parts + index[:, None] * V + col[None, :], mask=used, other=0.0).to(tl.float32)
        acc += tl.sum(value * weight[:, None], 0)
        total += tl.sum(weight, 0)

    acc = acc / tl.where(total == 0.0, 1.0, total)
    merged = log_sum(peak, total)
    if HAS_SINK:
        factor, merged = sink_factor(merged, tl.load(sinks + row % HEADS).to(tl.float32))
        acc = acc * factor
    tl.store(out + row * V + col, acc.to(out.dtype.element_ty), mask=col < V)
    if tl.program_id(1) == 0:
        tl.store(lse + row, merged)


def merge_warps(block_p):
    """Warps of a merge program: a narrow tile leaves most of four warps idle, and small programs share an SM better."""
    return 1 if block_p <= 4 else 2 if block_p <= 16 else 4


def launch_merge(parts, lses, sinks, out, lse, *, n_parts, part_stride, row_stride, block_p):
    """Launch `merge_kernel` on flat buffers; out [.., N, V] and lse [.., N] are contiguous and written in full."""
    heads, width = out.shape[-2:]
    runtime.launch(
        merge_kernel, (lse.numel(), triton.cdiv(width, BLOCK_V)),
        parts, lses, lse if sinks is None else sinks,  # never read without HAS_SINK; Triton wants a pointer
        out, lse, n_parts, part_stride, row_stride,
        HEADS=heads, V=width, BLOCK_V=BLOCK_V, BLOCK_P=block_p, HAS_SINK=sinks is not None,
        num_warps=merge_warps(block_p),
    )  # fmt: skip


def outputs(q, width, out_dtype):
    """out B T N width and lse B T N of a call whose queries are q: B T N ..."""
    out = torch.empty((*q.shape[:3], width), dtype=out_dtype or q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def part_buffers(out, lse, n_splits):
    """What a kernel writes: out and lse themselves, or the float32 parts [row, split, width] of several splits and
    their lses [row, split], flat in one allocation.
    """
    if n_splits == 1:
        return out, lse
    size, width = lse.numel() * n_splits, out.shape[-1]
    work = torch.empty(size * (width + 1), dtype=torch.float32, device=lse.device)
    return work[: size * width], work[size * width :]


def merge_parts(part, part_lse, sinks, out, lse, *, n_splits, fixed):
    """Merge what a kernel wrote into `part_buffers`; `fixed`: with bits that do not depend on `n_splits`."""
    if n_splits > 1:
        block_p = FIXED_BLOCK_P if fixed else min(MAX_BLOCK_P, pow2_ceil(n_splits))
        numbering = dict(n_parts=n_splits, part_stride=1, row_stride=n_splits)
        launch_merge(part, part_lse, sinks, out, lse, **numbering, block_p=block_p)
