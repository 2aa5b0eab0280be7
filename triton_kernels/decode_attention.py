"""Split-KV decode attention for MHA, GQA and MQA over a contiguous cache.

    s_tj = scale * q_t . k_j, softcap * tanh(s_tj / softcap) if capped;   query t of row b sees
    max(0, p + 1 - window) <= j <= p  with its position  p = lengths[b] - T + t
    out_t = sum_j exp(s_tj) v_j / (sum_j exp(s_tj) + exp(sink));   lse_t = log of that denominator

One program owns one row of the batch, one KV head, one block of query rows and one split of the keys. The T * G
queries that share a KV head are the rows of its MMAs, so every key is read once for all of them. Splits write
normalised float32 parts with their lse, and `merge_states.merge_kernel` combines them in a fixed order. With one split
the kernel writes the final output itself and no merge is launched.

Grids are static: lengths are read on the device, a split without keys leaves lse = -inf. Source: Flash-Decoding and
FlashAttention-2 (arXiv 2307.08691) for the algorithm; group packing as in FlashInfer (arXiv 2501.01005).
"""

import torch
import triton
import triton.language as tl

from torch_ref.ops import check
from triton_kernels import runtime
from triton_kernels.merge_states import (
    LN2,
    LOG2E,
    finite_or_zero,
    merge_parts,
    part_buffers,
    safe_log2,
    sink_factor,
)
from triton_kernels.plan import block_rows, default_config, fill_splits, lookup, split_dim, value_chunks

MAX_HEAD_DIM = 256


@triton.jit
def load_tile(base, offsets, keep, COL: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns COL .. COL+COLS of the rows at base + offsets, 0 where not `keep` or past WIDTH.

    COLUMNS: rows of memory become columns of the tile (a transposed read, as K needs).
    """
    col = COL + tl.arange(0, COLS)
    if COLUMNS:
        pointers = base + offsets[None, :] + col[:, None]
        mask = keep[None, :] & (col < WIDTH)[:, None] if COL + COLS > WIDTH else keep[None, :]
    else:
        pointers = base + offsets[:, None] + col[None, :]
        mask = keep[:, None] & (col < WIDTH)[None, :] if COL + COLS > WIDTH else keep[:, None]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def cap_logits(x, softcap):
    """softcap * tanh(x / softcap). tanh from exp2 of a negative number, which cannot overflow."""
    y = x / softcap
    decay = tl.exp2(tl.abs(y) * (-2.0 * LOG2E))
    # 1 - decay cancels for small y; there three terms of the series are exact to float32
    small = y * (1.0 + y * y * (-1.0 / 3.0 + y * y * (2.0 / 15.0)))
    large = tl.where(y < 0.0, -1.0, 1.0) * (1.0 - decay) / (1.0 + decay)
    return softcap * tl.where(tl.abs(y) < 0.0625, small, large)


@triton.jit
def store_tile(base, index, keep, acc, COL: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr):
    col = COL + tl.arange(0, COLS)
    mask = keep[:, None] & (col < WIDTH)[None, :]
    tl.store(base + index[:, None] * WIDTH + col[None, :], acc.to(base.dtype.element_ty), mask=mask)


@triton.jit
def key_range(length, block, split, n_splits, chunk, window, T: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr,
              BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr, FIXED: tl.constexpr):  # fmt: skip
    """Keys [start, end) of one split: the union of what the block's queries see, cut by the row's own length alone.

    The cut starts at the first key that any query sees, so tiles outside a window are never visited. With FIXED every
    split has `chunk` keys; otherwise the row's keys are shared evenly, in whole tiles.
    """
    seen = length - T + 1 + tl.minimum((block * ROWS + ROWS - 1) // G, T - 1)
    high = tl.maximum(seen, 0)
    low = 0
    if HAS_WINDOW:
        low = tl.maximum(length - T + 1 + block * ROWS // G - window, 0)
    size = chunk
    if not FIXED:
        size = tl.cdiv(tl.cdiv(high - low, n_splits), BLOCK_N) * BLOCK_N
    start = low + split * size
    return start, tl.minimum(start + size, high)


@triton.jit
def close_rows(peak, total, lse, index, real, sinks, n, HAS_SINK: tl.constexpr, SPLIT: tl.constexpr):
    """Store the lse of every row; returns its output's two factors, and which rows of the output are to be stored.

    A part of a split keeps its lse in base 2 and leaves the sink to the merge. Otherwise the sink shrinks the output in
    a second multiplication, as in the merge: a row's bits must not depend on how many splits the grid has.
    """
    # Test for 0, not for > 0: a NaN among the visible keys must reach the output.
    factor = 1.0 / tl.where(total == 0.0, 1.0, total)
    lse2 = safe_log2(finite_or_zero(peak), total)
    shrink = tl.full(peak.shape, 1.0, tl.float32)
    keep = real
    if SPLIT:
        tl.store(lse + index, lse2, mask=real)
        keep = real & (total != 0.0)  # the merge does not read empty parts
    else:
        if HAS_SINK:
            shrink, lse2 = sink_factor(lse2, tl.load(sinks + n, mask=real, other=0.0).to(tl.float32) * LOG2E)
        tl.store(lse + index, lse2 * LN2, mask=real)
    return factor, shrink, keep


@triton.jit(do_not_specialize=["window", "chunk"])
def decode_kernel(
    q, k, v, lengths, sinks, out, lse,
    q_stride_b, q_stride_t, q_stride_n, k_stride_b, k_stride_s, k_stride_k, v_stride_b, v_stride_s, v_stride_k,
    scale, softcap, window, chunk,
    T: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
    H1: tl.constexpr, H2: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SINK: tl.constexpr, HAS_CAP: tl.constexpr, FIXED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    # Row blocks of one head are neighbours in the grid: the second reads K and V from L2.
    head = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    split = tl.program_id(1)
    n_splits = tl.num_programs(1)
    batch = tl.program_id(2)

    row = block * ROWS + tl.arange(0, ROWS)
    t = row // G
    n = head * G + row % G
    real = row < T * G
    length = tl.load(lengths + batch)
    seen = length - T + t + 1
    start, end = key_range(length, block, split, n_splits, chunk, window, T, G, ROWS, BLOCK_N, HAS_WINDOW, FIXED)

    q_base = q + batch.to(tl.int64) * q_stride_b
    q_offsets = t * q_stride_t + n * q_stride_n
    q1 = load_tile(q_base, q_offsets, real, 0, H1, H, False)
    if H2 > 0:
        q2 = load_tile(q_base, q_offsets, real, H1, H2, H, False)
    # A cache can pass 2**31 elements: what grows with batch, head or position is 64-bit and scalar, so that the
    # offsets inside a tile stay 32-bit constants of the loop.
    j = tl.arange(0, BLOCK_N)
    k_base = k + batch.to(tl.int64) * k_stride_b + head.to(tl.int64) * k_stride_k
    v_base = v + batch.to(tl.int64) * v_stride_b + head.to(tl.int64) * v_stride_k
    k_offsets = j * k_stride_s
    v_offsets = j * v_stride_s

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc1 = tl.zeros([ROWS, V1], tl.float32)
    if V2 > 0:
        acc2 = tl.zeros([ROWS, V2], tl.float32)
    for tile in tl.range(start, end, BLOCK_N):
        key = tile + j
        inside = key < end
        k_tile = k_base + tl.cast(tile, tl.int64) * k_stride_s
        x = tl.dot(q1, load_tile(k_tile, k_offsets, inside, 0, H1, H, True), input_precision="ieee")
        if H2 > 0:
            x = tl.dot(q2, load_tile(k_tile, k_offsets, inside, H1, H2, H, True), x, input_precision="ieee")
        x = x * scale
        if HAS_CAP:
            x = cap_logits(x, softcap) * LOG2E
        else:
            x = x * LOG2E
        visible = inside[None, :]
        if T > 1:  # a single query sees all of [start, end)
            visible = visible & (key[None, :] < seen[:, None])
            if HAS_WINDOW:
                visible = visible & (key[None, :] >= (seen - window)[:, None])
        x = tl.where(visible, x, float("-inf"))

        new_peak = tl.maximum(peak, tl.max(x, 1))
        shift = finite_or_zero(new_peak)
        alpha = tl.exp2(peak - shift)
        p = tl.exp2(x - shift[:, None])
        total = total * alpha + tl.sum(p, 1)
        peak = new_peak
        # V is 0, not only unweighted, where nobody looks: 0 * NaN is NaN.
        v_tile = v_base + tl.cast(tile, tl.int64) * v_stride_s
        p = p.to(v.dtype.element_ty)
        v1 = load_tile(v_tile, v_offsets, inside, 0, V1, V, False)
        acc1 = tl.dot(p, v1, acc1 * alpha[:, None], input_precision="ieee")
        if V2 > 0:
            v2 = load_tile(v_tile, v_offsets, inside, V1, V2, V, False)
            acc2 = tl.dot(p, v2, acc2 * alpha[:, None], input_precision="ieee")

    index = ((batch * T + t) * HEADS + n).to(tl.int64) * n_splits + split
    factor, shrink, keep = close_rows(peak, total, lse, index, real, sinks, n, HAS_SINK, SPLIT)
    store_tile(out, index, keep, acc1 * factor[:, None] * shrink[:, None], 0, V1, V)
    if V2 > 0:
        store_tile(out, index, keep, acc2 * factor[:, None] * shrink[:, None], V1, V2, V)


def specialise(tokens, group, heads, head_dim, value_dim, config, *, window, sink, softcap, fixed, split):
    """The compile-time arguments of `decode_kernel` for one shape and one set of options."""
    rows = block_rows(tokens * group)
    h1, h2 = split_dim(head_dim)
    v1, v2 = value_chunks(value_dim)
    return {
        "T": tokens, "G": group, "HEADS": heads, "H": head_dim, "V": value_dim, "H1": h1, "H2": h2, "V1": v1, "V2": v2,
        "ROWS": rows, "BLOCKS": -(-tokens * group // rows), "BLOCK_N": config.block_n,
        "HAS_WINDOW": window, "HAS_SINK": sink, "HAS_CAP": softcap, "FIXED": fixed, "SPLIT": split,
    }  # fmt: skip


def _plan(q, k, v, span, chunk, config):
    """(Config, number of splits). A fixed chunk takes nothing from the batch or the other rows."""
    batch, tokens, heads, head_dim = q.shape
    kv_heads, value_dim = v.shape[-2:]
    rows = tokens * (heads // kv_heads)
    shape = (q.element_size(), head_dim, value_dim, block_rows(rows))
    if chunk is not None:
        return config or default_config(*shape), max(1, -(-span // chunk))
    if config is None:
        key = (rows, batch * kv_heads, k.shape[1], runtime.device_name(q.device))
        config = lookup("decode_attention", runtime.FLOAT_DTYPES[q.dtype], *shape, *key)
    programs = batch * kv_heads * -(-rows // block_rows(rows))
    return config, fill_splits(programs, span, config, runtime.sm_count(q.device))


def run(q, k, v, lengths, *, scale, window=None, sinks=None, softcap=None, chunk=None, out_dtype=None, config=None):
    """`decode_attention` on arguments that were checked; `config` overrides the table (for tuning)."""
    batch, tokens, heads, head_dim = q.shape
    slots, kv_heads, value_dim = v.shape[1:]
    out = torch.empty((batch, tokens, heads, value_dim), dtype=out_dtype or q.dtype, device=q.device)
    lse = torch.empty((batch, tokens, heads), dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse

    window = None if window is None or window >= slots else int(window)
    span = slots if window is None else min(slots, window + tokens - 1)
    chunk = None if chunk is None else min(int(chunk), max(slots, 1))
    config, n_splits = _plan(q, k, v, span, chunk, config)
    runtime.check_grid("decode_attention", batch, n_splits)
    split = n_splits > 1
    part, part_lse = out, lse
    if split:
        part, part_lse = part_buffers(lse, value_dim, n_splits)
    sinks = None if sinks is None else sinks.contiguous()
    flags = dict(window=window is not None, sink=sinks is not None, softcap=softcap is not None)
    flags |= dict(fixed=chunk is not None, split=split)
    constants = specialise(tokens, heads // kv_heads, heads, head_dim, value_dim, config, **flags)
    runtime.launch(
        decode_kernel, (kv_heads * constants["BLOCKS"], n_splits, batch),
        q, k, v, lengths.contiguous(), lse if sinks is None else sinks, part, part_lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], float(scale), float(softcap or 0.0), window or 0, chunk or 0,
        **constants, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if split:
        merge_parts(part, part_lse, sinks, out, lse, n_splits=n_splits, fixed=chunk is not None)
    return out, lse


def _check(q, k, v, lengths, page_table, k_scale, v_scale, out_dtype):
    """What this kernel asks beyond the contract; NotImplementedError for the parts of the contract it lacks."""
    op = "decode_attention"
    if page_table is not None:
        raise NotImplementedError(f"{op}: page_table has no Triton kernel yet")
    if k_scale is not None or v_scale is not None:
        raise NotImplementedError(f"{op}: quantised k and v (k_scale, v_scale) have no Triton kernel yet")
    runtime.check_float(op, "q", q.dtype)
    runtime.check_float(op, "out_dtype", out_dtype)
    for name, width in (("H", q.shape[-1]), ("V", v.shape[-1])):
        if width > MAX_HEAD_DIM:
            raise NotImplementedError(f"{op}: {name}={width} needs more registers than a program has; at most 256")
    runtime.check_last_dim(op, q=q, k=k, v=v)
    runtime.check_lengths(lengths, k)
    runtime.check_slots(op, k=k, v=v)
    runtime.check_rows(op, q=q)
    runtime.check_device(op, "q", q.device)


def decode_attention(
    q,
    k,
    v,
    lengths,
    *,
    scale,
    window=None,
    sinks=None,
    softcap=None,
    page_table=None,
    k_scale=None,
    v_scale=None,
    chunk=None,
    out_dtype=None,
):
    """Attention of the last T tokens of every row over its cache; the equation is at the top of this file.

    q: B T N H, k: B S K H, v: B S K V of one dtype (float16, bfloat16, float32), N a multiple of K, H and V at most
    256; any strides, the last dimension contiguous. lengths: int32 B, keys with the T new ones included, 0 to
    S (a CUDA tensor's values are not looked at).
    window: keys that a query sees, its own included. sinks: N, natural-log units, unscaled. softcap: > 0.
    chunk: keys of one split; results are then bitwise the same whatever else is in the batch. By default the number of
    splits follows from the shapes and the card.
    Returns out: B T N V in out_dtype (default q's dtype) and lse: float32 B T N, natural log, sink included.

    A query that sees no key gives out = 0 and lse = -inf, or its sink. Slots that no query may read can hold NaN or
    Inf. Raises ValueError for shapes, ranges, strides and devices, TypeError for dtypes and for CPU tensors outside the
    interpreter, NotImplementedError for page_table, k_scale, v_scale and wider heads; always before any launch.
    """
    options = dict(scale=scale, window=window, sinks=sinks, softcap=softcap, chunk=chunk, out_dtype=out_dtype)
    unwritten = dict(page_table=page_table, k_scale=k_scale, v_scale=v_scale)
    check.decode_attention(q, k, v, lengths, **options, **unwritten)
    _check(q, k, v, lengths, **unwritten, out_dtype=out_dtype or q.dtype)
    return run(q, k, v, lengths, **options)
