"""Sliding-window attention with a ring cache: each token sees the last W tokens, itself included.

    o_t = sum over t - W < s <= t of softmax_s(scale q_t . k_s) v_s

Projections, norms, RoPE and everything else are those of the dense family. The cache is a ring of W slots, the token
at position p in slot p mod W: storage and reads stop growing at W tokens. A decode step writes its slot and then reads
the ring without a mask, since what is left in it is exactly the window.

A prefill chunk must not write first: its early queries still need keys that its late tokens replace. It attends over
the old ring beside the new tokens and writes afterwards.

Sources: Mistral 7B (arXiv 2310.06825), Gemma 2 and 3 local layers; transformers' masking_utils for the window's size.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array

import jforge.ops as jax_ops
from jforge.attention import dense
from jforge.attention.dense import PLAIN, KVCache
from jforge.core import masks, ring
from jforge.core.attend import attend, over_queries
from jforge.core.attention import Attention
from jforge.core.config import FrozenDict, positive_int
from jforge.core.params import Params
from jforge.core.spec import CacheSpec
from jforge.core.step import Queries, Tokens, all_of, begin, end, few_tokens, one_by_one, several
from jforge.cost import Work, seen


@dataclass(frozen=True, kw_only=True)
class Config(dense.Config):
    """The dense family's fields and the window.

    sliding_window: W, keys visible to a query, its own included
    """

    sliding_window: int | None

    def __post_init__(self):
        super().__post_init__()
        positive_int("sliding_window", self.sliding_window)


def visible(cfg: Config, q_pos: Array, k_pos: Array) -> Array:
    """The last W tokens up to the query's own."""
    return masks.window(q_pos, k_pos, cfg.sliding_window)


def forward(params: Params, cfg: Config, x: Tokens, positions=None) -> Tokens:
    """The definition: attention of x over itself under a banded mask. `positions` (int B T) feed RoPE only."""
    rows = all_of(cfg, x, positions)
    return _attend(params, cfg, rows, ring.in_order(rows.order, *dense.project_keys(params, cfg, rows)))


def _attend(params: Params, cfg: Config, rows: Queries, recent: ring.Recent) -> Tokens:
    """Attention of `rows`, projected in and out, in blocks of queries that read their windows."""

    def block(rows, _):
        rows = Queries(*rows)
        positions, k, v = recent.around(rows.order, cfg.sliding_window)
        q = dense.rotate(cfg, dense.queries(params, cfg, rows.x), rows.positions).astype(k.dtype)
        mask = visible(cfg, rows.order[..., None], positions[:, None]) & rows.keep[..., None]
        out, _ = attend(q, k, v, mask, **dense.options(params, cfg))
        return dense.project_out(params, cfg, rows.x, out).astype(rows.x.dtype)

    return over_queries(block, rows, recent.numbers(cfg.num_attention_heads, cfg.sliding_window))


def prefill(params: Params, cfg: Config, x: Tokens, cache: KVCache, lengths=None) -> tuple[Tokens, KVCache]:
    """Attend over the old ring and the new tokens (as stored, so rounded), then write those that stay in the ring."""
    step = begin(cfg, cache_spec(cfg), x, cache, lengths)
    k, v = dense.project_keys(params, cfg, step.queries)
    y = _attend(params, cfg, step.queries, ring.beside(step, cache.length, (cache.k, k), (cache.v, v)))
    return end(step, y, x.dtype), ring.write(cache, step, k=k, v=v)


def decode(params: Params, cfg: Config, x: Tokens, cache: KVCache, ops=jax_ops) -> tuple[Tokens, KVCache]:
    """Token by token: write over the oldest and attend over the whole ring through `ops.decode_attention`."""
    if several(x):
        return one_by_one(decode, cache_spec(cfg), params, cfg, x, cache, ops)
    step = begin(cfg, cache_spec(cfg), few_tokens(x), cache)
    q, k, v = dense.project(params, cfg, step.x, step.positions)
    cache = ring.write(cache, step, k=k, v=v)
    filled, q = jnp.minimum(step.length, cache.k.shape[1]), q.astype(cache.k.dtype)
    out, _ = ops.decode_attention(q, cache.k, cache.v, filled, out_dtype=x.dtype, **dense.options(params, cfg))
    return end(step, dense.project_out(params, cfg, step.x, out), x.dtype), cache


def cache_spec(cfg: Config) -> CacheSpec:
    return CacheSpec(KVCache, dense.kv_buffers(cfg, cfg.sliding_window))


def work(cfg: Config, context: int, capacity: int, new: int, closing: bool) -> Work:
    """The ring is read, min(context, W) slots, and of the new tokens those written that stay in it."""
    W = cfg.sliding_window
    return dense.work_on(cfg, min(context, W), min(new, W), seen(context, new, W))


sliding_window = Attention(
    summary="the last W tokens in a ring cache (Mistral-7B-v0.1, Gemma 2 and 3 local layers)",
    traded="what is older than W tokens is lost, so cache and reads stop growing",
    Config=Config, shapes=dense.shapes, cache_spec=cache_spec, work=work,
    forward=forward, prefill=prefill, decode=decode, visible=visible,
    models=FrozenDict({
        "Mistral-7B-v0.1": Config(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, sliding_window=4096,
                                  rms_norm_eps=1e-5, rope_parameters=PLAIN),
        "Gemma-3-27B local": Config(hidden_size=5376, num_attention_heads=32, num_key_value_heads=16, head_dim=128,
                                    sliding_window=1024, qk_norm="head", norm_offset=1.0, scaling=168**-0.5,
                                    rope_parameters=PLAIN),
    }),
    examples=(
        Config(hidden_size=12, num_attention_heads=4, num_key_value_heads=2, head_dim=6, sliding_window=4,
               rope_parameters=PLAIN, qk_norm="head", norm_offset=1.0, attn_logit_softcapping=5.0),
        Config(hidden_size=10, num_attention_heads=2, num_key_value_heads=1, head_dim=4, v_head_dim=6,
               sliding_window=1, rope_parameters=PLAIN, attention_bias=True),
    ),
)  # fmt: skip
