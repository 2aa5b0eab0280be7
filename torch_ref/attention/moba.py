"""MoBA, mixture of block attention: every head of every query picks the past blocks whose mean key it likes best.

    g_t,n,j = q_t,n . mean(k_s : s in block j)   for j < t // M, unscaled;   g = +inf for the current block j = t // M
    I_t,n   = the moba_topk blocks of largest g, in ties the lower block
    o_t,n   = sum of p_s v_s over s <= t with s // M in I_t,n,   p = softmax(cap(scaling q_t,n . k_s))

q and k after norm and RoPE, k as stored; KV head n // (N/K). A past block is complete, so its mean tells nothing of the
future; the current block counts as one of the moba_topk. Moonshot MoBA (2502.13189), `moba_naive`.

cfg: the fields of `dense`, moba_chunk_size (M >= 1), moba_topk (>= 1), dense_decode (True: decode attends all keys, as
the official wrapper does; it then differs from forward once there are more than moba_topk blocks).
params: those of `dense`.
cache: that of `dense` (k, v: B S K H and B S K V), k_mean B (S // M) K H, the mean of every complete block, and k_sum
B K H, the sum of the keys of the open block, 0 when length is a multiple of M; both float32 or wider.
"""

import torch

from .. import ops as reference_ops
from ..core import blocks
from ..core.dtypes import accumulator, einsum
from ..ops.check import WIDE
from . import dense, inputs
from .step import begin, empty, end, in_order, token_by_token


def init_cache(cfg, batch, capacity, dtype=torch.bfloat16):
    """An empty cache with room for `capacity` tokens per row, k and v in dtype."""
    check_fields(cfg)
    heads, wide = (cfg.num_key_value_heads, cfg.head_dim), accumulator(dtype)
    means = empty(batch, wide, k_mean=(capacity // cfg.moba_chunk_size, *heads), k_sum=heads)
    return dense.init_cache(cfg, batch, capacity, dtype) | means


def forward(params, cfg, x, positions=None):
    """y: B T D from x: B T D without a cache; positions and errors as in `dense.forward`.

    Blocks are counted from the row's first token, whatever the positions.
    """
    inputs.check_tokens(x, cfg.hidden_size)
    check_fields(cfg)
    order, positions = in_order(x, positions)
    q, k, v = dense.project(params, cfg, x, positions, order)
    tokens, size = x.shape[1], cfg.moba_chunk_size
    complete = tokens // size
    k_mean = k[:, : complete * size].to(accumulator(k.dtype)).unflatten(1, (complete, size)).mean(2)
    mask = blocks.visible(choose(cfg, q, k_mean, order, tokens), size, order, tokens)
    out = blocks.headwise_attention(q, k, v, mask, **dense.options(cfg))
    return dense.project_out(params, cfg, x, out)


def prefill(params, cfg, x, cache, lengths=None):
    """(y, cache) after appending the first lengths[b] of the T tokens of row b, as in `dense.prefill`.

    Sparse for each of the T tokens, also with dense_decode.
    """
    step = begin(x, cache, checked_room(cfg, x, cache), lengths)
    q, k, v = dense.project(params, cfg, step.x, step.positions)
    cache = appended(cfg, cache, k, v, step)
    k, v = cache["k"], cache["v"]
    q, slots = q.to(k.dtype), k.shape[1]
    lists = choose(cfg, q, cache["k_mean"], step.positions, slots)
    mask = blocks.visible(lists, cfg.moba_chunk_size, step.positions, slots) & step.keep[..., None, None]
    out = blocks.headwise_attention(q, k, v, mask, **dense.options(cfg))
    return end(step, dense.project_out(params, cfg, step.x, out)), cache


@token_by_token
def decode(params, cfg, x, cache, ops=reference_ops):
    """(y, cache) after appending 1 to 16 tokens per row; x, y: B T D. Dtypes and rows without room: as in `prefill`.

    ops: any namespace with `topk_indices` and `decode_block_sparse`; `decode_attention` with dense_decode.
    """
    step = begin(x, cache, checked_room(cfg, x, cache, tokens=1))
    q, k, v = dense.project(params, cfg, x, step.positions)
    cache = appended(cfg, cache, k, v, step)
    q, k, v, length = q.to(cache["k"].dtype), cache["k"], cache["v"], cache["length"]
    options = dense.options(cfg) | {"out_dtype": x.dtype}
    if cfg.dense_decode:
        out, _ = ops.decode_attention(q, k, v, length, **options)
    else:
        lists = choose(cfg, q, cache["k_mean"], step.positions, k.shape[1], ops)
        out, _ = ops.decode_block_sparse(q, k, v, lists, length, block_size=cfg.moba_chunk_size, **options)
    return end(step, dense.project_out(params, cfg, x, out)), cache


def choose(cfg, q, k_mean, positions, slots, ops=reference_ops):
    """int32 B T N L: the picks of each head of the queries at positions (int B T), L = min(moba_topk, blocks).

    q: B T N H. k_mean: B (S // M) K H; the means of blocks that no query looks back on may hold NaN.
    """
    count = max(1, -(-slots // cfg.moba_chunk_size))
    grouped = q.unflatten(2, (cfg.num_key_value_heads, -1))
    gate = einsum("btkgh,bjkh->btkgj", grouped, k_mean).flatten(2, 3)
    gate = torch.nn.functional.pad(gate, (0, count - k_mean.shape[1]))  # a last block that can never be complete
    block = torch.arange(count, device=q.device)
    current = (positions // cfg.moba_chunk_size)[..., None, None]
    gate = gate.masked_fill(block > current, -torch.inf).masked_fill(block == current, torch.inf)
    return ops.topk_indices(gate, min(cfg.moba_topk, count))


def appended(cfg, cache, k, v, step):
    """The cache after the step's new tokens, k and v B T K ..; the given cache is not changed."""
    after = step.appended(cache, k=k, v=v)
    size, wide = cfg.moba_chunk_size, cache["k_sum"].dtype
    fresh = k.to(cache["k"].dtype).to(wide).masked_fill(~step.keep[..., None, None], 0.0)
    block = torch.arange(cache["k_mean"].shape[1] + 1, dtype=torch.int32, device=k.device)
    inside = (step.positions // size)[..., None] == block
    carried = cache["k_sum"].masked_fill((step.start % size == 0)[:, None, None], 0.0)
    first, last = step.start // size, (step.start + step.new) // size  # the blocks open before and after
    sums = einsum("btj,btkh->bjkh", inside.to(wide), fresh)
    sums = sums + carried[:, None].masked_fill((block != first[:, None])[..., None, None], 0.0)
    closing = (block >= first[:, None]) & (block < last[:, None])
    means = torch.where(closing[:, :-1, None, None], sums[:, :-1] / size, cache["k_mean"])
    return after | {"k_mean": means, "k_sum": sums[torch.arange(len(k), device=k.device), last.long()]}


def check_fields(cfg):
    """Raise ValueError or TypeError for a block size or a top-k below 1, and for slopes."""
    inputs.check_off(cfg, "the op over blocks knows no slopes", "alibi")
    inputs.check_counts(cfg, 1, "moba_chunk_size", "moba_topk")


def checked_room(cfg, x, cache, tokens=None):
    """As `dense.checked_room`."""
    check_fields(cfg)
    slots = dense.checked_room(cfg, x, cache, tokens)
    sizes = {"S": slots // cfg.moba_chunk_size, "K": cfg.num_key_value_heads, "H": cfg.head_dim}
    inputs.check_buffer(cache, x, "k_mean", "B S K H", sizes, WIDE)
    inputs.check_buffer(cache, x, "k_sum", "B K H", sizes, (cache["k_mean"].dtype,))
    return slots
