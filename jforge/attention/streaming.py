"""StreamingLLM: the first s tokens and the most recent R, at positions counted inside the cache.

    visible(t) = {k <= t : k < s or k > t - R},  at most s + R keys, the query's own included

When tokens between the two groups are evicted, the paper closes the gap: keys sit at their index in the cache and the
query at index n - 1, n = min(t + 1, s + R). Distances inside the recent group stay true ones; only those to the first
s tokens shrink, by the number e = max(0, t + 1 - (s + R)) of evicted tokens. So nothing is rotated again: keys are
stored after RoPE at their true position, recent keys meet the query rotated at its true position p, and the first s
keys meet the same query rotated at p - e. One softmax over both groups.

The cache has s + R slots: s that stay, then a ring. Its size never grows, and a step never moves a key.

Sources: Xiao et al. 2023 (arXiv 2309.17453), mit-han-lab/streaming-llm. Of the two conventions there this is "evict
before the step" (evict_for_space): a query attends s + R keys, not s + R + 1.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Int

import jforge.ops as jax_ops
from jforge.attention import dense
from jforge.attention.dense import PLAIN, KVCache
from jforge.attention.dense_config import lacks
from jforge.core import masks, ring
from jforge.core.attend import attend, merge, over_queries
from jforge.core.attention import Attention
from jforge.core.config import FrozenDict, positive_ints
from jforge.core.params import Params
from jforge.core.softmax import accumulation_dtype
from jforge.core.spec import CacheSpec
from jforge.core.step import Queries, Tokens, all_of, begin, end, few_tokens, one_by_one, several
from jforge.cost import Work, seen


@dataclass(frozen=True, kw_only=True)
class Config(dense.Config):
    """The dense family's fields and the sizes of the two groups, with streaming-llm's names.

    start_size: s, the first tokens, which stay
    recent_size: R, the last tokens, the query's own included
    """

    start_size: int = 4
    recent_size: int

    def __post_init__(self):
        super().__post_init__()
        lacks(self, "alibi", "attn_scale", "kv_shared", "qk_norm_after_rope")
        positive_ints(self, "start_size", "recent_size")

    @property
    def kept(self) -> int:
        return self.start_size + self.recent_size


def visible(cfg: Config, q_pos: Array, k_pos: Array) -> Array:
    """The first s tokens and the last R."""
    recent = masks.window(q_pos, k_pos, cfg.recent_size)
    return recent | (masks.causal(q_pos, k_pos) & (k_pos < cfg.start_size))


def queries(params: Params, cfg: Config, rows: Queries) -> tuple[Array, Array]:
    """(q for recent keys, q for the first s keys): the two are e positions apart, e by the order of the tokens."""
    q, evicted = dense.queries(params, cfg, rows.x), jnp.maximum(0, rows.order + 1 - cfg.kept)
    return dense.rotate(cfg, q, rows.positions), dense.rotate(cfg, q, rows.positions - evicted)


def _attend(params: Params, cfg: Config, rows: Queries, recent: ring.Recent, k_first, v_first) -> Tokens:
    """One softmax over both groups, each with its own query, merged by their log-sum-exps, in blocks of queries."""
    more = dense.options(params, cfg)

    def block(rows, _):
        rows = Queries(*rows)
        q_recent, q_first = (q.astype(k_first.dtype) for q in queries(params, cfg, rows))
        positions, k, v = recent.around(rows.order, cfg.recent_size)
        late = masks.window(rows.order[..., None], positions[:, None], cfg.recent_size)
        late &= rows.keep[..., None] & (positions >= cfg.start_size)[:, None]
        early = masks.causal(rows.order[..., None], jnp.arange(k_first.shape[1])) & rows.keep[..., None]
        out = merge(jax_ops, attend(q_recent, k, v, late, **more), attend(q_first, k_first, v_first, early, **more))
        return dense.project_out(params, cfg, rows.x, out).astype(rows.x.dtype)

    return over_queries(block, rows, recent.numbers(cfg.num_attention_heads, cfg.kept))


def forward(params: Params, cfg: Config, x: Tokens, positions=None) -> Tokens:
    """The definition. `positions` (int B T) feed RoPE only; how many tokens are evicted follows the order of x."""
    rows = all_of(cfg, x, positions)
    k, v = dense.project_keys(params, cfg, rows)
    first = (a[:, : cfg.start_size] for a in (k, v))
    return _attend(params, cfg, rows, ring.in_order(rows.order, k, v), *first)


def prefill(params: Params, cfg: Config, x: Tokens, cache: KVCache, lengths=None) -> tuple[Tokens, KVCache]:
    """Attend over the first tokens, the old ring and the new tokens (as stored, so rounded); write those that stay."""
    step, fixed = begin(cfg, cache_spec(cfg), x, cache, lengths), cfg.start_size
    k, v = dense.project_keys(params, cfg, step.queries)
    recent = ring.beside(step, cache.length, (cache.k, k), (cache.v, v), fixed=fixed)
    cache = ring.write(cache, step, fixed, k=k, v=v)
    y = _attend(params, cfg, step.queries, recent, cache.k[:, :fixed], cache.v[:, :fixed])
    return end(step, y, x.dtype), cache


def decode(params: Params, cfg: Config, x: Tokens, cache: KVCache, ops=jax_ops) -> tuple[Tokens, KVCache]:
    """Token by token: write, then two calls of `ops.decode_attention` on the one buffer and a merge.

    The recent call sees the last R filled slots. Before anything is evicted those may reach into the first s, and
    both queries are the same; so the other call takes the slots before them, n - R of n, at most s.
    """
    if several(x):
        return one_by_one(decode, cache_spec(cfg), params, cfg, x, cache, ops)
    step = begin(cfg, cache_spec(cfg), few_tokens(x), cache)
    (q_recent, q_first), (k, v) = queries(params, cfg, step.queries), dense.project_keys(params, cfg, step.queries)
    cache = ring.write(cache, step, cfg.start_size, k=k, v=v)
    filled = jnp.minimum(step.length, cache.k.shape[1])

    def part(q, lengths: Int[Array, "B"], window=None):
        q, wide = q.astype(cache.k.dtype), accumulation_dtype(x)
        more = dense.options(params, cfg)
        return ops.decode_attention(q, cache.k, cache.v, lengths, window=window, out_dtype=wide, **more)

    recent = part(q_recent, filled, cfg.recent_size)
    first = part(q_first, jnp.clip(filled - cfg.recent_size, 0, cfg.start_size))
    out = dense.project_out(params, cfg, step.x, merge(ops, recent, first))
    return end(step, out, x.dtype), cache


def cache_spec(cfg: Config) -> CacheSpec:
    return CacheSpec(KVCache, dense.kv_buffers(cfg, cfg.kept))


def work(cfg: Config, context: int, capacity: int, new: int, closing: bool) -> Work:
    """All that is kept is read, min(context, s + R) slots, and of the new tokens those written that stay."""
    return dense.work_on(cfg, min(context, cfg.kept), min(new, cfg.kept), seen(context, new, cfg.kept))


_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}

streaming = Attention(
    summary="the first s tokens and the last R, at positions inside the cache (StreamingLLM)",
    traded="the middle is lost: the first tokens keep the softmax steady, the last ones keep the text",
    Config=Config, shapes=dense.shapes, cache_spec=cache_spec, work=work,
    forward=forward, prefill=prefill, decode=decode, visible=visible,
    models=FrozenDict({
        "Llama-2-7B streaming": Config(hidden_size=4096, num_attention_heads=32, start_size=4, recent_size=2000,
                                       rms_norm_eps=1e-5, rope_parameters=PLAIN),
    }),
    examples=(
        Config(hidden_size=12, num_attention_heads=4, num_key_value_heads=2, head_dim=6, start_size=2, recent_size=4,
               rope_parameters=_YARN),
        Config(hidden_size=10, num_attention_heads=2, num_key_value_heads=1, head_dim=4, v_head_dim=6, start_size=3,
               recent_size=1, rope_parameters=PLAIN, qk_norm="flat"),
    ),
)  # fmt: skip
