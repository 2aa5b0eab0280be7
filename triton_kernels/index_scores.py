"""Scores of an indexer over a cache of keys that all its heads share: one for a token, or one for a block and head.

    x_tis = q_ti . k_s;   query t of row b sees s < lengths[b] - T + t + 1, and every score that sees nothing is -inf
    index_scores:        score_ts  = sum_i weights_ti relu(x_tis)
    block_index_scores:  score_tie = max of x_tis over the seen s with s // block_size = e

One program owns one query and one split of the keys that it sees; a tile of keys is copied to shared memory once, as
the rows of an MMA whose columns are the heads. Scores never leave registers before they are final: a key's sum runs
along its row, a block's maximum down the columns. A row of an MMA depends on no other, so a NaN in an unseen key stays
in a score that is not kept. Splits share the seen keys evenly, and evenly write the -inf of the rest, so that a short
row in a long cache costs its own length. The bits of a score do not depend on the splits.

Keys of one byte (int8, fp8) become q's dtype in registers, which is exact, and k_scale multiplies the product before
the relu: a negative scale means what it says. Sources: DeepSeek-V3.2 (arXiv 2512.02556) for the lightning indexer,
MiniMax-M3 (MSA, arXiv 2606.13392) for the block scores.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from torch_ref.ops import check
from triton_kernels import runtime
from triton_kernels.decode_attention import load_tile
from triton_kernels.decode_sparse_mla import split_range
from triton_kernels.plan import Config, default_score_config, fill_splits, nearest, pow2_ceil
from triton_kernels.topk_indices import ordered, unordered

MAX_HEADS, MAX_DIM = 256, 256
MAX_QUERY_BYTES = 128 * 1024  # the queries of a program stay in shared memory beside its tiles of keys
MAX_SPLITS = 1024
FILL: tl.constexpr = tl.constexpr(1024)  # scores of -inf that are written at once


@triton.jit
def seen_keys(lengths, batch, t, slots, T: tl.constexpr):
    """How many keys query t of a row sees; a length from outside 0 .. S must not move a store out of its row."""
    return tl.minimum(tl.maximum(tl.load(lengths + batch) - T + t + 1, 0), slots)


@triton.jit
def products(queries, k, k_scale, first, offsets, inside, k_stride, scale_stride, J: tl.constexpr, J_PAD: tl.constexpr,
             SCALED: tl.constexpr):  # fmt: skip
    """x [keys, heads] of the keys first + offsets with the queries [J_PAD, heads]; 0 where not `inside`."""
    keys = load_tile(k + tl.cast(first, tl.int64) * k_stride, offsets * k_stride, inside, 0, J_PAD, J, False)
    x = tl.dot(keys.to(queries.dtype), queries, input_precision="ieee")
    if SCALED:
        scales = k_scale + tl.cast(first, tl.int64) * scale_stride + offsets * scale_stride
        x = x * tl.load(scales, mask=inside, other=0.0)[:, None]
    return x


@triton.jit(do_not_specialize=["slots"])
def token_kernel(
    q, k, weights, k_scale, lengths, out,
    q_stride_b, q_stride_t, q_stride_i, k_stride_b, k_stride_s, weights_b, weights_t, weights_i,
    scale_b, scale_s, slots,
    T: tl.constexpr, HEADS: tl.constexpr, J: tl.constexpr, HEADS_PAD: tl.constexpr, J_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    # Queries of one row are neighbours in the grid: the second reads the keys from L2.
    t = tl.program_id(0)
    split = tl.program_id(1)
    n_splits = tl.num_programs(1)
    batch = tl.program_id(2)
    seen = seen_keys(lengths, batch, t, slots, T)
    start, end = split_range(seen, split, n_splits, BLOCK_N)

    i = tl.arange(0, HEADS_PAD)
    real = i < HEADS
    row = batch.to(tl.int64)
    queries = tl.trans(load_tile(q + row * q_stride_b + t * q_stride_t, i * q_stride_i, real, 0, J_PAD, J, False))
    w = tl.load(weights + row * weights_b + t * weights_t + i * weights_i, mask=real, other=0.0)
    # What grows with batch or position is 64-bit and scalar, so that the offsets inside a tile stay 32-bit.
    k += row * k_stride_b
    k_scale += row * scale_b
    out += (batch * T + t).to(tl.int64) * slots
    j = tl.arange(0, BLOCK_N)
    for tile in tl.range(start, end, BLOCK_N):
        inside = tile + j < end
        x = products(queries, k, k_scale, tile, j, inside, k_stride_s, scale_s, J, J_PAD, SCALED)
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)  # a broken key must show
        if HEADS < HEADS_PAD:
            x = tl.where(real[None, :], x, 0.0)  # 0 * Inf is NaN
        tl.store(out + tile + j, tl.sum(x * w[None, :], 1), mask=inside)

    first, last = split_range(slots - seen, split, n_splits, FILL)
    for place in tl.range(seen + first, seen + last, FILL):
        unseen = place + tl.arange(0, FILL)
        tl.store(out + unseen, tl.full([FILL], float("-inf"), tl.float32), mask=unseen < seen + last)


@triton.jit(do_not_specialize=["slots"])
def block_kernel(
    q, k, k_scale, lengths, out,
    q_stride_b, q_stride_t, q_stride_i, k_stride_b, k_stride_s, scale_b, scale_s, slots,
    T: tl.constexpr, HEADS: tl.constexpr, J: tl.constexpr, HEADS_PAD: tl.constexpr, J_PAD: tl.constexpr,
    BLOCK: tl.constexpr, PIECE: tl.constexpr, BLOCK_N: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    # A tile has BLOCK_N rows: `whole` blocks, each in PIECE rows (a power of two, so some rows can be empty), or one of
    # the `pieces` of a block that is longer than a tile.
    whole: tl.constexpr = BLOCK_N // PIECE
    pieces: tl.constexpr = (BLOCK + PIECE - 1) // PIECE
    t = tl.program_id(0)
    split = tl.program_id(1)
    n_splits = tl.num_programs(1)
    batch = tl.program_id(2)
    seen = seen_keys(lengths, batch, t, slots, T)
    n_blocks = tl.cdiv(slots, BLOCK)
    groups = tl.cdiv(tl.cdiv(seen, BLOCK), whole)
    start, end = split_range(groups, split, n_splits, 1)

    i = tl.arange(0, HEADS_PAD)
    row = batch.to(tl.int64)
    queries = tl.trans(load_tile(q + row * q_stride_b + t * q_stride_t, i * q_stride_i, i < HEADS, 0, J_PAD, J, False))
    k += row * k_stride_b
    k_scale += row * scale_b
    heads = out + ((batch * T + t) * HEADS + i).to(tl.int64)[None, :] * n_blocks
    j = tl.arange(0, BLOCK_N)
    offsets = j // PIECE * BLOCK + j % PIECE
    e = tl.arange(0, whole)
    best = ordered(tl.full([whole, HEADS_PAD], float("-inf"), tl.float32))
    for tile in tl.range(start * pieces, end * pieces):
        first = tile // pieces * (whole * BLOCK) + tile % pieces * PIECE
        inside = first + offsets < seen
        if pieces * PIECE > BLOCK:
            inside = inside & (tile % pieces * PIECE + j % PIECE < BLOCK)
        x = products(queries, k, k_scale, first, offsets, inside, k_stride_s, scale_s, J, J_PAD, SCALED)
        x = tl.where(inside[:, None], x, float("-inf"))
        # Compared as integers, where NaN is the largest: a broken key must show, and a maximum of floats drops it.
        x = tl.max(tl.reshape(ordered(x), [whole, PIECE, HEADS_PAD]), 1)
        if pieces > 1:
            x = tl.where(tile % pieces == 0, x, tl.maximum(best, x))
        best = x
        block = tile // pieces * whole + e
        keep = (block < n_blocks) & (tile % pieces == pieces - 1)
        tl.store(heads + block[:, None], unordered(best), mask=keep[:, None] & (i < HEADS)[None, :])

    rows: tl.constexpr = FILL // HEADS_PAD
    rest = tl.maximum(n_blocks - groups * whole, 0)
    first, last = split_range(rest, split, n_splits, rows)
    for place in tl.range(groups * whole + first, groups * whole + last, rows):
        block = place + tl.arange(0, rows)
        keep = (block < groups * whole + last)[:, None] & (i < HEADS)[None, :]
        tl.store(heads + block[:, None], tl.full([rows, HEADS_PAD], float("-inf"), tl.float32), mask=keep)


def specialise(tokens, heads, dim, config, *, scaled, block_size=None):
    """The compile-time arguments of `token_kernel`, or with a block size of `block_kernel`."""
    constants = {
        "T": tokens, "HEADS": heads, "J": dim, "HEADS_PAD": max(16, pow2_ceil(heads)), "J_PAD": max(16, pow2_ceil(dim)),
        "BLOCK_N": config.block_n, "SCALED": scaled,
    }  # fmt: skip
    if block_size is None:
        return constants
    return constants | {"BLOCK": block_size, "PIECE": min(config.block_n, pow2_ceil(block_size))}


def _plan(op, q_index, k_index, scaled, unit, config):
    """(Config, number of splits); unit: keys that no split cuts. Tables are measured with keys in q's dtype."""
    batch, tokens, heads, dim = q_index.shape
    slots = k_index.shape[1]
    if config is None and not scaled:
        key = (dim, 0, max(16, pow2_ceil(heads)), heads, batch * tokens, slots, runtime.device_name(q_index.device))
        found = nearest(op, runtime.FLOAT_DTYPES[q_index.dtype], *key)
        config = Config(**found) if found else None
    config = config or default_score_config(q_index.element_size(), k_index.element_size(), dim, heads)
    step = max(unit, config.block_n)
    steps = replace(config, block_n=step, min_split=max(step, config.min_split))
    sms = runtime.sm_count(q_index.device)
    return config, fill_splits(batch * tokens, slots, steps, sms, MAX_SPLITS, tolerance=0.0)


def run_tokens(q_index, k_index, weights, lengths, *, k_scale=None, config=None):
    """`index_scores` on arguments that were checked; `config` overrides the table (for tuning)."""
    batch, tokens, heads, dim = q_index.shape
    slots = k_index.shape[1]
    out = torch.empty((batch, tokens, slots), dtype=torch.float32, device=q_index.device)
    if not out.numel():
        return out
    scaled = k_scale is not None
    config, n_splits = _plan("index_scores", q_index, k_index, scaled, 1, config)
    runtime.check_grid("index_scores", batch, n_splits)
    constants = specialise(tokens, heads, dim, config, scaled=scaled)
    scale_strides = k_scale.stride() if scaled else (0, 0)
    runtime.launch(
        token_kernel, (tokens, n_splits, batch),
        q_index, k_index, weights, k_scale if scaled else weights, lengths.contiguous(), out,
        *q_index.stride()[:3], *k_index.stride()[:2], *weights.stride(), *scale_strides, slots,
        **constants, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def run_blocks(q_index, k_index, lengths, *, block_size, k_scale=None, config=None):
    """As `run_tokens`, for `block_index_scores`."""
    batch, tokens, heads, dim = q_index.shape
    slots = k_index.shape[1]
    block_size = min(int(block_size), max(slots, 1))
    shape = (batch, tokens, heads, -(-slots // block_size))
    out = torch.empty(shape, dtype=torch.float32, device=q_index.device)
    if not out.numel():
        return out
    scaled = k_scale is not None
    config, n_splits = _plan("block_index_scores", q_index, k_index, scaled, block_size, config)
    runtime.check_grid("block_index_scores", batch, n_splits)
    constants = specialise(tokens, heads, dim, config, scaled=scaled, block_size=block_size)
    scale_strides = k_scale.stride() if scaled else (0, 0)
    runtime.launch(
        block_kernel, (tokens, n_splits, batch),
        q_index, k_index, k_scale if scaled else out, lengths.contiguous(), out,
        *q_index.stride()[:3], *k_index.stride()[:2], *scale_strides, slots,
        **constants, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def _check(op, q_index, k_index, lengths):
    """What the kernels ask beyond the contract."""
    runtime.check_lengths(lengths, k_index)
    runtime.check_slots(op, k_index=k_index)
    runtime.check_rows(op, q_index=q_index)
    heads, dim = q_index.shape[2:]
    runtime.check_inputs(op, {"I": (heads, MAX_HEADS), "J": (dim, MAX_DIM)}, None, q_index=q_index, k_index=k_index)
    if pow2_ceil(heads) * pow2_ceil(dim) * q_index.element_size() > MAX_QUERY_BYTES:
        raise NotImplementedError(
            f"{op}: I={heads} heads of J={dim} in {q_index.dtype} need more shared memory than a program has; at most "
            f"{MAX_QUERY_BYTES} bytes, I and J rounded up to powers of two"
        )


def index_scores(q_index, k_index, weights, lengths, *, k_scale=None):
    """Token scores of a lightning indexer, summed over its heads; the equation is at the top of this file.

    q_index: B T I J (float16, bfloat16, float32), I and J at most 256. k_index: B S J in q_index's dtype, or int8 or
    float8 with k_scale: float32 B S, value = stored * scale. weights: float32 B T I, of either sign, every scale
    included. lengths: int32 B, keys with the T new ones included, 0 to S. Any strides; the last dimension of q_index
    and k_index contiguous.
    Returns float32 B T S, -inf where a query does not see the key. Unseen keys and their scales can hold NaN or Inf.

    Raises ValueError for shapes, strides and devices, TypeError for dtypes and for CPU tensors outside the interpreter,
    NotImplementedError for more or wider heads; always before any launch.
    """
    check.index_scores(q_index, k_index, weights, lengths, k_scale=k_scale)
    if weights.dtype != torch.float32:
        raise TypeError(f"index_scores: weights must be float32 in triton_kernels, got {weights.dtype}")
    _check("index_scores", q_index, k_index, lengths)
    return run_tokens(q_index, k_index, weights, lengths, k_scale=k_scale)


def block_index_scores(q_index, k_index, lengths, *, block_size, k_scale=None):
    """The largest product of every block of keys, for each head; the equation is at the top of this file.

    Arguments, errors and limits as in `index_scores`, without weights. block_size: >= 1; the last block can be partial.
    Returns float32 B T I ceil(S / block_size), unscaled, -inf where a query sees no key of the block.
    """
    check.block_index_scores(q_index, k_index, lengths, block_size=block_size, k_scale=k_scale)
    _check("block_index_scores", q_index, k_index, lengths)
    return run_blocks(q_index, k_index, lengths, block_size=block_size, k_scale=k_scale)
