"""Sliding-window attention with a ring cache: each token sees the last W tokens, itself included.

    o_t = sum over t - W < s <= t of softmax_s(scale q_t . k_s) v_s

Projections, norms, RoPE and everything else are those of the dense family. The cache is a ring of W slots, the token
at position p in slot p mod W: storage and reads stop growing at W tokens. A decode step writes its slot and then reads
the ring without a mask, since what is left in it is exactly the window.

A prefill chunk must not write first: its early queries still need keys that its late tokens replace. It attends over
the old ring beside the new tokens and writes afterwards.

Sources: Mistral 7B (arXiv 2310.06825), Gemma 2 and 3 local layers; transformers' masking_utils for the window's size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Int

import jforge.ops as jax_ops
from jforge.attention import dense
from jforge.attention.dense import PLAIN, KVCache
from jforge.core import masks, ring
from jforge.core.attend import attend, over_queries
from jforge.core.attention import Attention
from jforge.core.config import FrozenDict, positive_int
from jforge.core.params import Params
from jforge.core.share import Source
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
    recent = ring.in_order(rows.order, *dense.project_keys(params, cfg, rows))
    return attend_recent(params, cfg, rows, recent, visible, cfg.sliding_window)


def attend_recent(
    params: Params, cfg: dense.Config, rows: Queries, recent: ring.Recent, visible: Callable, size: int
) -> Tokens:
    """Attention of `rows`, projected in and out, in blocks of queries that read the tokens that they may see.

    visible(cfg, q_pos, k_pos): which these are, none before the last `size` up to the query's own.
    """

    def block(rows, _):
        rows = Queries(*rows)
        positions, k, v = recent.around(rows.order, size)
        q = dense.project_queries(params, cfg, rows).astype(k.dtype)
        mask = visible(cfg, rows.order[..., None], positions[:, None]) & rows.keep[..., None]
        out, _ = attend(q, k, v, mask, distance=dense.distance(rows, positions), **dense.options(params, cfg))
        return dense.project_out(params, cfg, rows.x, out).astype(rows.x.dtype)

    return over_queries(block, rows, recent.numbers(cfg.num_attention_heads, size))


def prefill(params: Params, cfg: Config, x: Tokens, cache: KVCache, lengths=None) -> tuple[Tokens, KVCache]:
    """Attend over the old ring and the new tokens (as stored, so rounded), then write those that stay in the ring."""
    step = begin(cfg, cache_spec(cfg), x, cache, lengths)
    k, v = dense.project_keys(params, cfg, step.queries)
    recent = ring.beside(step, cache.length, (cache.k, k), (cache.v, v))
    y = attend_recent(params, cfg, step.queries, recent, visible, cfg.sliding_window)
    return end(step, y, x.dtype), ring.write(cache, step, k=k, v=v)


def decode(params: Params, cfg: Config, x: Tokens, cache: KVCache, ops=jax_ops) -> tuple[Tokens, KVCache]:
    """Token by token: write over the oldest and attend over the whole ring through `ops.decode_attention`."""
    if several(x):
        return one_by_one(decode, cache_spec(cfg), params, cfg, x, cache, ops)
    step = begin(cfg, cache_spec(cfg), few_tokens(x), cache)
    q, k, v = dense.project(params, cfg, step.x, step.positions)
    cache = ring.write(cache, step, k=k, v=v)
    filled, q = jnp.minimum(step.length, cache.k.shape[1]), q.astype(cache.k.dtype)
    k, v = (_oldest_first(a, step.length) if cfg.alibi else a for a in (cache.k, cache.v))
    out, _ = ops.decode_attention(q, k, v, filled, out_dtype=x.dtype, **dense.options(params, cfg))
    return end(step, dense.project_out(params, cfg, step.x, out), x.dtype), cache


def read(params: Params, cfg: Config, x: Tokens, source: Source, ops=None) -> Tokens:
    """Attention over the ring of another layer and its new tokens, with queries of this one."""
    filled = None if source.after is None else jnp.minimum(source.after.length, source.after.k.shape[1])
    return read_recent(params, cfg, x, source, ops, visible, cfg.sliding_window, filled)


def read_recent(params, cfg: dense.Config, x, source: Source, ops, visible: Callable, size: int, filled) -> Tokens:
    """`read` of a mechanism with a ring of `size` slots, of which the leading `filled` are those of the next token: it
    reads them as they are; several tokens read the ring before the call beside the new ones.
    """
    rows = source.rows._replace(x=x)
    new = source.new["k"], source.new["v"]
    if ops is not None and x.shape[1] == 1:
        ring_k, ring_v = source.after.k, source.after.v
        if cfg.alibi:
            ring_k, ring_v = (_oldest_first(a, source.after.length) for a in (ring_k, ring_v))
        q = dense.project_queries(params, cfg, rows).astype(ring_k.dtype)
        out, _ = ops.decode_attention(q, ring_k, ring_v, filled, out_dtype=x.dtype, **dense.options(params, cfg))
        return dense.project_out(params, cfg, x, out).astype(x.dtype)
    if source.before is None:
        recent = ring.in_order(rows.order, *new)
    else:
        held = source.before.k, source.before.v
        recent = ring.beside(rows, source.before.length, *zip(held, new, strict=True))
    return attend_recent(params, cfg, rows, recent, visible, size)


def _oldest_first(buffer: Array, length: Int[Array, "B"]) -> Array:
    """A copy of the ring in the order of its tokens, for the op takes slots for places."""
    slots = buffer.shape[1]
    turn = jnp.where(length < slots, 0, length % slots)
    return buffer[jnp.arange(len(buffer))[:, None], (turn[:, None] + jnp.arange(slots)) % slots]


def cache_spec(cfg: Config) -> CacheSpec:
    return dense.spec_of(cfg, dense.kv_buffers(cfg, cfg.sliding_window))


def work(cfg: Config, context: int, capacity: int, new: int, closing: bool) -> Work:
    """The ring is read, min(context, W) slots, and of the new tokens those written that stay in it."""
    W = cfg.sliding_window
    return dense.work_on(cfg, min(context, W), min(new, W), seen(context, new, W))


sliding_window = Attention(
    summary="the last W tokens in a ring cache (Mistral-7B-v0.1, Gemma 2 and 3 local layers)",
    traded="what is older than W tokens is lost, so cache and reads stop growing",
    Config=Config, shapes=dense.shapes, cache_spec=cache_spec, work=work,
    forward=forward, prefill=prefill, decode=decode, visible=visible, lend=dense.lend, read=read,
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
        Config(hidden_size=10, num_attention_heads=3, num_key_value_heads=1, head_dim=4, sliding_window=3, alibi=True,
               attn_scale=0.7, floor_scale=2.5, qk_norm="flat", qk_norm_type="layer", clip_qkv=1.0,
               attn_output_gate=True, output_gate_per_head=True),
    ),
)  # fmt: skip
