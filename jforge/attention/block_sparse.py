"""Static block sparsity: which blocks of keys a block of queries sees is fixed before any data is.

    A(i) = {0..g-1}  u  {i-w+1..i}  u  Rand(i)  u  {j : (j + n step + 1) mod vert_stride = 0},   all 0 <= j <= i
    o_t  = sum over s <= t with s // M in A(t // M) of softmax_s(scale q_t . k_s) v_s

g global blocks, w local ones (the query's own, still partial, among them), r random ones drawn once from a seed, and a
stride with an offset for each head n, step = max(1, vert_stride // N). With g and r this is a causal BigBird, with g
and w a causal Longformer, with w and the stride the Sparse Transformer and Phi-3-small.

The cache is the dense one: nothing is saved in memory. A decode step gathers the blocks of A(i) and reads those alone.

Sources: Longformer (arXiv 2004.05150), BigBird (2007.14062), Sparse Transformer (1904.10509), Phi-3 (2404.14219). None
of them ships a causal form with this cache; the judge is a dense softmax under the mask.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

import jforge.ops as jax_ops
from jforge.attention import dense
from jforge.attention.dense import LLAMA_8B, PLAIN, KVCache
from jforge.attention.dense_config import lacks
from jforge.core import blocks, masks
from jforge.core.attention import Attention
from jforge.core.config import FrozenDict, natural, positive_int, positive_ints
from jforge.core.params import Params
from jforge.core.step import Token, Tokens, all_of, append, begin, end, few_tokens
from jforge.cost import Work, seen


@dataclass(frozen=True, kw_only=True)
class Config(dense.Config):
    """The dense family's fields and the pattern.

    block_size: M, tokens of a block
    num_global_blocks: g, the first blocks, seen by all
    num_local_blocks: w, the last blocks, the query's own and partial one among them
    num_random_blocks: r, drawn once from the seed for each block of queries
    vert_stride: every so many blocks one is seen, with an offset for each head; None: no stride
    homo_head_pattern: one pattern for all heads; False: every query head draws and strides on its own
    seed: of the random blocks
    """

    block_size: int
    num_global_blocks: int = 0
    num_local_blocks: int = 1
    num_random_blocks: int = 0
    vert_stride: int | None = None
    homo_head_pattern: bool = True
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        lacks(self, "alibi", "kv_shared")
        positive_ints(self, "block_size", "num_local_blocks")
        for name in ("num_global_blocks", "num_random_blocks", "seed"):
            natural(name, getattr(self, name))
        if self.vert_stride is not None:
            positive_int("vert_stride", self.vert_stride)


@functools.lru_cache(maxsize=64)
def pattern(cfg: Config, count: int) -> np.ndarray:
    """int32 [heads or 1, count, L]: the blocks that each of `count` query blocks sees, ascending, -1 at the end."""
    heads = 1 if cfg.homo_head_pattern else cfg.num_attention_heads
    rows = [[_blocks_of(cfg, n, i) for i in range(count)] for n in range(heads)]
    width = max((len(row) for head in rows for row in head), default=0)
    padded = [[row + [-1] * (width - len(row)) for row in head] for head in rows]
    return np.array(padded, np.int32).reshape(heads, count, width)


def _blocks_of(cfg: Config, n: int, i: int) -> list[int]:
    """A_n(i), ascending. The draw depends on seed, head and block alone, so prefill and decode agree."""
    first_local = i - cfg.num_local_blocks + 1
    found = {*range(min(cfg.num_global_blocks, i + 1)), *range(max(0, first_local), i + 1)}
    candidates = np.arange(cfg.num_global_blocks, first_local)
    if len(candidates) > cfg.num_random_blocks:
        generator = np.random.default_rng([cfg.seed, n, i])
        candidates = generator.choice(candidates, cfg.num_random_blocks, replace=False)
    found |= set(candidates.tolist())
    if cfg.vert_stride is not None:
        step = max(1, cfg.vert_stride // cfg.num_attention_heads)
        found |= {j for j in range(i + 1) if (j + n * step + 1) % cfg.vert_stride == 0}
    return sorted(found)


def longest_list(cfg: Config, count: int) -> int:
    """L of `pattern(cfg, count)`, without the table where it can be counted: up to i + 1 blocks, no list is longer than
    that of the last block, and the parts do not overlap unless blocks are both drawn and strided.
    """
    if cfg.vert_stride is None:
        return min(count, cfg.num_global_blocks + cfg.num_local_blocks + cfg.num_random_blocks)
    if cfg.num_random_blocks:
        return pattern(cfg, count).shape[-1]
    first_local = max(0, count - cfg.num_local_blocks)
    first = min(cfg.num_global_blocks, first_local)  # blocks first .. first_local - 1 are there by the stride alone
    step = max(1, cfg.vert_stride // cfg.num_attention_heads)
    heads = 1 if cfg.homo_head_pattern else cfg.num_attention_heads
    strided = [
        (first_local + n * step) // cfg.vert_stride - (first + n * step) // cfg.vert_stride for n in range(heads)
    ]
    return first + max(strided) + count - first_local


def _lists(cfg: Config, positions: Int[Array, "B T"], S: int) -> Int[Array, "B T X L"]:
    """The list of each query: one a key head, or one a query head where heads differ."""
    table = jnp.asarray(pattern(cfg, -(-S // cfg.block_size)))
    rows = jnp.minimum(positions // cfg.block_size, table.shape[1] - 1)  # a row that does not fit must not fail here
    lists = jnp.moveaxis(table[:, rows], 0, 2)
    width = cfg.num_key_value_heads if cfg.homo_head_pattern else cfg.num_attention_heads
    return jnp.broadcast_to(lists, (*positions.shape, width, lists.shape[-1]))


def visible(cfg: Config, q_pos: Array, k_pos: Array) -> Bool[Array, "..."]:
    """Tokens of the blocks that any head sees, up to the query's own. Needs concrete positions: it draws a table."""
    last = max(int(jnp.max(q_pos)), int(jnp.max(k_pos)))
    lists = pattern(cfg, last // cfg.block_size + 1)
    seen = (lists[..., None] == np.arange(lists.shape[1])).any(axis=(0, 2))
    q_block, k_block = (jnp.asarray(p) // cfg.block_size for p in (q_pos, k_pos))
    return masks.causal(q_pos, k_pos) & jnp.asarray(seen)[q_block, k_block]


def forward(params: Params, cfg: Config, x: Tokens, positions=None) -> Tokens:
    """The definition: a dense softmax under the pattern. `positions` (int B T) feed RoPE only."""
    rows = all_of(cfg, x, positions)
    return dense.attend_over(params, cfg, rows, *dense.project_keys(params, cfg, rows), _mask(cfg, x.shape[1]))


def _mask(cfg: Config, slots: int) -> Callable:
    """The blocks on the list of each query and head, of a cache of so many slots."""

    def mask(q, rows, S):
        lists = _lists(cfg, rows.order, slots)
        return blocks.visible(lists, cfg.block_size, rows.order, S, cfg.num_attention_heads)

    return mask


def prefill(params: Params, cfg: Config, x: Tokens, cache: KVCache, lengths=None) -> tuple[Tokens, KVCache]:
    """Append T tokens (row b its first lengths[b]) and attend under the pattern over what is stored then."""
    step = begin(cfg, dense.cache_spec(cfg), x, cache, lengths)
    k, v = dense.project_keys(params, cfg, step.queries)
    cache = append(cache, step, k=k, v=v)
    y = dense.attend_over(params, cfg, step.queries, cache.k, cache.v, _mask(cfg, cache.k.shape[1]))
    return end(step, y, x.dtype), cache


def decode(params: Params, cfg: Config, x: Tokens, cache: KVCache, ops=jax_ops) -> tuple[Tokens, KVCache]:
    """Append 1 to 16 tokens a row and gather the blocks of their lists through `ops.decode_block_sparse`."""
    step, S = begin(cfg, dense.cache_spec(cfg), few_tokens(x), cache), cache.k.shape[1]
    q, k, v = dense.project(params, cfg, step.x, step.positions)
    cache = append(cache, step, k=k, v=v)
    lists, q = _lists(cfg, step.positions, S), q.astype(cache.k.dtype)
    more = {"block_size": cfg.block_size, "out_dtype": x.dtype, **dense.options(params, cfg)}
    out, _ = ops.decode_block_sparse(q, cache.k, cache.v, lists, cache.length, **more)
    return end(step, dense.project_out(params, cfg, step.x, out), x.dtype), cache


def select(params: Params, cfg: Config, x: Token, cache: KVCache) -> Int[Array, "B 1 X L"]:
    """The list of the next token; it depends on the position alone."""
    return _lists(cfg, cache.length[:, None], cache.k.shape[1])


def tokens_of(cfg: Config, selection, S: int) -> Bool[Array, "B T S"]:
    """All tokens of the listed blocks, over all heads; nothing is read beside them."""
    return blocks.tokens_of(selection, cfg.block_size, S)


def work(cfg: Config, context: int, capacity: int, new: int, closing: bool) -> Work:
    """One step gathers L blocks for each list, L the longest list of this capacity; a prefill masks all slots."""
    gathered = longest_list(cfg, -(-capacity // cfg.block_size)) * cfg.block_size
    lists = 1 if cfg.homo_head_pattern else cfg.num_attention_heads // cfg.num_key_value_heads
    slots = min(context, lists * gathered) if new == 1 else context
    return dense.work_on(cfg, slots, new, seen(context, new, gathered))


block_sparse = Attention(
    summary="a fixed pattern of blocks: global, local, random, strided (BigBird, Longformer, Phi-3-small, causal)",
    traded="reads for reach: all is kept, and which blocks are read was settled before any data",
    Config=Config, shapes=dense.shapes, cache_spec=dense.cache_spec, work=work,
    forward=forward, prefill=prefill, decode=decode, visible=visible, select=select, tokens_of=tokens_of,
    models=FrozenDict({
        "BigBird pattern on Llama-3.1-8B": Config(**LLAMA_8B, block_size=64, num_global_blocks=2, num_local_blocks=3,
                                                  num_random_blocks=3),
        "Phi-3-small": Config(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, block_size=64,
                              num_local_blocks=16, vert_stride=8, homo_head_pattern=False, scaling=1 / 128,
                              attention_bias=True, attention_output_bias=True,
                              rope_parameters={**PLAIN, "rope_theta": 1e6}),
    }),
    examples=(
        Config(hidden_size=12, num_attention_heads=4, num_key_value_heads=2, head_dim=6, rope_parameters=PLAIN,
               block_size=2, num_global_blocks=1, num_local_blocks=1, num_random_blocks=1, seed=3),
        Config(hidden_size=12, num_attention_heads=4, num_key_value_heads=2, head_dim=4, rope_parameters=PLAIN,
               block_size=3, num_local_blocks=1, vert_stride=2, homo_head_pattern=False),
    ),
)  # fmt: skip
