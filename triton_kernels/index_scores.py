"""Scores of an indexer over a cache of keys that all its heads share, one for a token, summed over the heads.

    score_ts = sum_i weights_ti relu(q_ti . k_s)   for s < lengths[b] - T + t + 1, else -inf

How the work is shared out: see `indexer`. Source: DeepSeek-V3.2 (arXiv 2512.02556), the lightning indexer.
"""

import torch
import triton
import triton.language as tl

from torch_ref.ops import check
from triton_kernels import indexer
from triton_kernels.indexer import FILL, products, seen_keys
from triton_kernels.plan import Record, sweep_tiles
from triton_kernels.tiles import load_tile, split_range


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


def run(q_index, k_index, weights, lengths, *, k_scale=None, config=None):
    """`index_scores` on arguments that were checked; `config` overrides the plan (for tuning)."""
    shape = (*q_index.shape[:2], k_index.shape[1])
    out = torch.empty(shape, dtype=torch.float32, device=q_index.device)
    config = config or OP.config(q_index, *indexer.site(q_index, k_index, k_scale=k_scale))
    return indexer.launch(OP.name, token_kernel, (q_index, k_index, weights), k_scale, lengths, out, config)


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
        raise TypeError(f"{OP.name}: weights must be float32 in triton_kernels, got {weights.dtype}")
    indexer.check(OP.name, q_index, k_index, lengths)
    return run(q_index, k_index, weights, lengths, k_scale=k_scale)


def calls(device, **sizes):
    """Arguments of `run`."""
    for *args, k_scale in indexer.draws(device, **sizes):
        yield args, dict(k_scale=k_scale)


OP = Record(
    "index_scores", run=run, site=indexer.site, calls=calls, kernels=(token_kernel,), sweep=sweep_tiles,
    shapes=(dict(B=16, S=65536), dict(B=1, S=131072), dict(B=64, S=32768), dict(B=16, I=32, S=65536)),
    offline=(
        dict(), dict(T=2, I=32, dtype="float16"), dict(T=2, I=256, J=256), dict(T=2, stored="float8_e4m3fn"),
        dict(T=2, I=256, stored="int8"), dict(T=2, I=256, dtype="float32"), dict(T=2, I=128, J=256, dtype="float32"),
    ),
)  # fmt: skip
