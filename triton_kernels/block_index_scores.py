"""Scores of an indexer over a cache of keys that all its heads share, one for a block of keys and a head.

    score_tie = max of q_ti . k_s over the s with s // block_size = e and s < lengths[b] - T + t + 1, or -inf

How the work is shared out: see `indexer`. Source: MiniMax-M3 (MSA, arXiv 2606.13392).
"""

import torch
import triton
import triton.language as tl

from torch_ref.ops import check
from triton_kernels import indexer
from triton_kernels.indexer import FILL, products, seen_keys
from triton_kernels.plan import Record, pow2_ceil, sweep_tiles
from triton_kernels.tiles import load_tile, ordered, split_range, unordered


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


def run(q_index, k_index, lengths, *, block_size, k_scale=None, config=None):
    """`block_index_scores` on arguments that were checked; `config` overrides the plan (for tuning)."""
    slots = k_index.shape[1]
    size = min(int(block_size), max(slots, 1))
    out = torch.empty((*q_index.shape[:3], -(-slots // size)), dtype=torch.float32, device=q_index.device)
    config = config or OP.config(q_index, *indexer.site(q_index, k_index, k_scale=k_scale))
    return indexer.launch(
        OP.name, block_kernel, (q_index, k_index), k_scale, lengths, out, config, unit=size, BLOCK=size,
        PIECE=min(config.block_n, pow2_ceil(size)),
    )  # fmt: skip


def block_index_scores(q_index, k_index, lengths, *, block_size, k_scale=None):
    """The largest product of every block of keys, for each head; the equation is at the top of this file.

    Arguments, errors and limits as in `index_scores`, without weights. block_size: >= 1; the last block can be partial.
    Returns float32 B T I ceil(S / block_size), unscaled, -inf where a query sees no key of the block.
    """
    check.block_index_scores(q_index, k_index, lengths, block_size=block_size, k_scale=k_scale)
    indexer.check(OP.name, q_index, k_index, lengths)
    return run(q_index, k_index, lengths, block_size=block_size, k_scale=k_scale)


def calls(device, *, M=128, **sizes):
    """Arguments of `run`; M: block size."""
    for q_index, k_index, _, lengths, k_scale in indexer.draws(device, **sizes):
        yield (q_index, k_index, lengths), dict(block_size=M, k_scale=k_scale)


OP = Record(
    "block_index_scores", run=run, site=indexer.site, calls=calls, kernels=(block_kernel,), sweep=sweep_tiles,
    shapes=(dict(B=16, I=4, S=131072), dict(B=1, I=4, S=131072), dict(B=64, I=4, S=32768)),
    offline=(
        dict(I=4), dict(T=2, I=4, M=16), dict(T=2, I=4, M=300), dict(T=2, I=256, J=256),
        dict(T=2, I=4, stored="float8_e4m3fn"), dict(T=2, I=256, M=64, dtype="float32"),
    ),
)  # fmt: skip
