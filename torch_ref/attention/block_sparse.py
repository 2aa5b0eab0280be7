"""Static block patterns: `dense` in which a query sees the blocks that its own block's row of a fixed table names.

    o_t,n = sum of p_s v_s over s <= t with s // M in A_n(t // M),   p = softmax(cap(scaling q_t,n . k_s))
    A_n(i) = {0 .. g-1} + {i-w+1 .. i} + Rand_n(i) + {j : (j + n step + 1) mod vert_stride = 0},   cut to 0 <= j <= i
    Rand_n(i): r of the blocks g .. i-w, or all of them when they are no more than r;  step = max(1, vert_stride // N)

Global, local and random blocks: Big Bird (2007.14062) and Longformer (2004.05150) made causal; strided blocks: Sparse
Transformer, Phi-3-small. The last set is there only with a vert_stride.

cfg: the fields of `dense`, block_size (M >= 1), num_global_blocks (g >= 0), num_local_blocks (w >= 1),
num_random_blocks (r >= 0), vert_stride (None, or >= 1), homo_head_pattern (True: all heads take A_0), seed (>= 0).
params, cache: those of `dense`.
"""

import functools
from typing import NamedTuple

import numpy
import torch

from .. import ops as reference_ops
from ..core import blocks
from . import dense, inputs
from .step import begin, end, in_order, token_by_token


class Pattern(NamedTuple):
    """The fields that decide the table: what `_table` is cached by, since a cfg need not be hashable."""

    num_attention_heads: int
    num_global_blocks: int
    num_local_blocks: int
    num_random_blocks: int
    vert_stride: int | None
    homo_head_pattern: bool
    seed: int


def init_cache(cfg, batch, capacity, dtype=torch.bfloat16):
    """An empty cache with room for `capacity` tokens per row, k and v in dtype."""
    check_pattern(cfg)
    return dense.init_cache(cfg, batch, capacity, dtype)


def forward(params, cfg, x, positions=None):
    """y: B T D from x: B T D without a cache; positions and errors as in `dense.forward`.

    Blocks are counted from the row's first token, whatever the positions.
    """
    inputs.check_tokens(x, cfg.hidden_size)
    check_pattern(cfg)
    order, positions = in_order(x, positions)
    q, k, v = dense.project(params, cfg, x, positions, order)
    out = blocks.headwise_attention(q, k, v, visible(cfg, order, x.shape[1]), **dense.options(cfg))
    return dense.project_out(params, cfg, x, out)


def prefill(params, cfg, x, cache, lengths=None):
    """(y, cache) after appending the first lengths[b] of the T tokens of row b, as in `dense.prefill`."""
    step = begin(x, cache, checked_room(cfg, x, cache), lengths)
    q, k, v = dense.project(params, cfg, step.x, step.positions)
    cache = step.appended(cache, k=k, v=v)
    k, v = cache["k"], cache["v"]
    mask = visible(cfg, step.positions, k.shape[1]) & step.keep[..., None, None]
    out = blocks.headwise_attention(q.to(k.dtype), k, v, mask, **dense.options(cfg))
    return end(step, dense.project_out(params, cfg, step.x, out)), cache


@token_by_token
def decode(params, cfg, x, cache, ops=reference_ops):
    """(y, cache) after appending 1 to 16 tokens per row; x, y: B T D. ops: any namespace with `decode_block_sparse`."""
    step = begin(x, cache, checked_room(cfg, x, cache, tokens=1))
    q, k, v = dense.project(params, cfg, x, step.positions)
    cache = step.appended(cache, k=k, v=v)
    k, v = cache["k"], cache["v"]
    lists, options = listed(cfg, step.positions, k.shape[1]).contiguous(), dense.options(cfg) | {"out_dtype": x.dtype}
    out, _ = ops.decode_block_sparse(q.to(k.dtype), k, v, lists, cache["length"], block_size=cfg.block_size, **options)
    return end(step, dense.project_out(params, cfg, x, out)), cache


def pattern(cfg, head, block):
    """A_n(i) as a sorted list, n = head, i = block."""
    n_heads, first_local = cfg.num_attention_heads, block - cfg.num_local_blocks + 1
    chosen = {*range(cfg.num_global_blocks), *range(first_local, block + 1)}
    # a seed of its own for each head and block: decode draws what prefill drew
    candidates = numpy.arange(cfg.num_global_blocks, max(first_local, cfg.num_global_blocks))
    if len(candidates) > cfg.num_random_blocks:
        generator = numpy.random.default_rng([cfg.seed, head, block])
        candidates = generator.choice(candidates, cfg.num_random_blocks, replace=False)
    chosen.update(candidates.tolist())
    if cfg.vert_stride is not None:
        step = max(1, cfg.vert_stride // n_heads)
        chosen.update(j for j in range(block + 1) if (j + head * step + 1) % cfg.vert_stride == 0)
    return sorted(j for j in chosen if 0 <= j <= block)


def table(cfg, count):
    """int32 [heads, count, L] on the CPU: `pattern` of every head (of head 0 alone if all share it), padded by -1."""
    return _table(Pattern(*(getattr(cfg, name) for name in Pattern._fields)), count)


@functools.lru_cache(maxsize=64)
def _table(fields, count):
    heads = 1 if fields.homo_head_pattern else fields.num_attention_heads
    lists = [[pattern(fields, head, block) for block in range(count)] for head in range(heads)]
    longest = max(len(one) for of_head in lists for one in of_head)
    padded = [[one + [-1] * (longest - len(one)) for one in of_head] for of_head in lists]
    return torch.tensor(padded, dtype=torch.int32)


def listed(cfg, positions, slots):
    """int32 B T heads L: the list of each query at positions (int B T) of a cache of S slots; heads is K (all the same)
    or N."""
    count = max(1, -(-slots // cfg.block_size))
    lists = table(cfg, count).to(positions.device)
    # a pad or a row without room may stand past the last block; what it is given is not read
    block = (positions // cfg.block_size).clamp(max=count - 1)
    lists = lists[:, block.long()].permute(1, 2, 0, 3)
    return lists.expand(-1, -1, cfg.num_key_value_heads, -1) if lists.shape[2] == 1 else lists


def visible(cfg, positions, slots):
    """bool B T heads S: key s <= t and its block is listed."""
    return blocks.visible(listed(cfg, positions, slots), cfg.block_size, positions, slots)


def check_pattern(cfg):
    """Raise ValueError or TypeError for a field that gives no pattern, and for slopes."""
    inputs.check_off(cfg, "the op over blocks knows no slopes", "alibi")
    inputs.check_counts(cfg, 1, "block_size", "num_local_blocks")
    inputs.check_counts(cfg, 0, "num_global_blocks", "num_random_blocks", "seed")
    if cfg.vert_stride is not None:
        inputs.check_counts(cfg, 1, "vert_stride")


def checked_room(cfg, x, cache, tokens=None):
    """As `dense.checked_room`."""
    check_pattern(cfg)
    return dense.checked_room(cfg, x, cache, tokens)
