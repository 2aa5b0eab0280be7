"""The last step of every split kernel, and of the public op: parts of a result, merged by their log-sum-exps.

    m = max_p lse_p      w_p = exp(lse_p - m)      out = sum_p w_p out_p / sum_p w_p      lse = m + log sum_p w_p

A sink is one more logit without a value, so it only enlarges the denominator: with w_s = exp(sink - m), out shrinks by
1 / (1 + w_s) and lse grows by log(1 + w_s). It is folded in once, after the merge.

The order of the sum is fixed: parts in blocks of BLOCK_P, blocks in sequence. A part with weight 0 adds exact zeros, so
empty parts at the end change no bit.

`over_cache` and `over_lists` launch an attention kernel and this step after it. Such a kernel takes its tensors, the
sinks, out, lse and numbers, in this order; the first tensor is the query, B T N ...
"""

import torch
import triton
import triton.language as tl

from triton_kernels import runtime
from triton_kernels.device import device_of
from triton_kernels.plan import count_splits, pow2_ceil
from triton_kernels.tiles import cap_numbers, finite_or_zero, log_sum, sink_factor, whole_tiles

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


def _outputs(q, width, out_dtype):
    """out B T N width and lse B T N."""
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


def over_cache(op, kernel, tensors, numbers, *, programs, slots, width, config, window=None, chunk=None, sinks=None,
               out_dtype=None, **constants):  # fmt: skip
    """(out, lse) of queries that see a prefix of a row's cache, or a window of it.

    programs: of one row of the batch and one split; slots: of the cache; width: of out.
    """
    out, lse = _outputs(tensors[0], width, out_dtype)
    if not out.numel():
        return out, lse
    batch, tokens = lse.shape[:2]
    window = None if window is None or window >= slots else int(window)
    span = slots if window is None else min(slots, window + tokens - 1)
    chunk = None if chunk is None else min(int(chunk), max(slots, 1))
    n_splits = count_splits(batch * programs, span, chunk, config, device_of(out))
    runtime.check_grid(op, batch, n_splits)
    constants |= dict(T=tokens, HAS_WINDOW=window is not None, FIXED=chunk is not None)
    numbers = *numbers, window or 0, chunk or 0
    return _launch(kernel, (programs, n_splits, batch), tensors, numbers, out, lse, sinks, config, constants)


def over_lists(op, kernel, tensors, strides, cache, lists, lengths, page_table, *, width, scale, block_size, rows,
               config, softcap=None, chunk=None, sinks=None, out_dtype=None, **constants):  # fmt: skip
    """(out, lse) of queries that see what their list names, with `rows` heads of a list in a program.

    cache: B S K .., or pages; lists: B T count L; width: of out. None of lengths and page_table is read.
    """
    out, lse = _outputs(tensors[0], width, out_dtype)
    if not out.numel():
        return out, lse
    (batch, tokens, heads), (count, n_entries) = lse.shape, lists.shape[2:]
    page = 0 if page_table is None else cache.shape[1]
    slots = cache.shape[1] if page_table is None else page_table.shape[1] * page
    group = heads // count
    blocks = -(-group // rows)
    programs, span = batch * tokens * count * blocks, n_entries * block_size
    chunk = None if chunk is None else -(-min(int(chunk), max(span, 1)) // config.block_n) * config.block_n
    n_splits = count_splits(programs, span, chunk, config, device_of(out))
    runtime.check_grid(op, 1, n_splits)
    lists, table = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (lists, page_table))
    # What a kernel never reads still needs a tensor.
    table, ends = lists if table is None else table, lists if lengths is None else lengths.contiguous()
    numbers = (
        *strides,
        *lists.stride()[:3],
        table.stride(0),
        float(scale),
        *cap_numbers(softcap),
        slots,
        n_entries,
        chunk or 0,
    )
    constants |= dict(
        T=tokens, LISTS=count, SHARE=count // cache.shape[2], G=group, BLOCK=block_size, PAGE=page,
        WHOLE=whole_tiles(block_size, page, config.block_n), ROWS=rows, BLOCKS=blocks, BLOCK_N=config.block_n,
        HAS_LENGTHS=lengths is not None, HAS_CAP=softcap is not None,
        FIXED=chunk is not None,
    )  # fmt: skip
    tensors = *tensors, lists, ends, table
    return _launch(kernel, (programs, n_splits), tensors, numbers, out, lse, sinks, config, constants)


def _launch(kernel, grid, tensors, numbers, out, lse, sinks, config, constants):
    """Splits are the second axis of the grid."""
    n_splits = grid[1]
    part, part_lse = part_buffers(out, lse, n_splits)
    sinks = None if sinks is None else sinks.contiguous()
    runtime.launch(
        kernel, grid, *tensors, lse if sinks is None else sinks, part, part_lse, *numbers, **constants,
        HAS_SINK=sinks is not None, SPLIT=n_splits > 1, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    merge_parts(part, part_lse, sinks, out, lse, n_splits=n_splits, fixed=constants.get("FIXED", False))
    return out, lse
