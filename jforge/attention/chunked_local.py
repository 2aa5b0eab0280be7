"""Chunked local attention: a token sees its own chunk of C tokens, up to itself.

    o_t = sum over s <= t with s // C = t // C of softmax_s(scale q_t . k_s) v_s

Projections, norms, RoPE and everything else are those of the dense family. The first token of a chunk sees only itself:
no window that moves with the query, but a counter that is set back. The token at position p lies in slot p mod C, so
storage stops growing at C tokens, and a decode step reads the leading t mod C + 1 slots. What the chunk before left in
the others may be anything and is not read again.

A prefill attends over the old slots beside the new tokens and writes afterwards, as a ring does.

Sources: Llama 4 (three of four layers, C = 8192); transformers' masking_utils for the mask.
"""

from dataclasses import dataclass, replace

import jax.numpy as jnp
from jaxtyping import Array, Int

import jforge.ops as jax_ops
from jforge.attention import dense
from jforge.attention.dense import PLAIN, KVCache
from jforge.attention.sliding_window import attend_recent, read_recent
from jforge.core import ring
from jforge.core.attention import Attention
from jforge.core.config import FrozenDict, positive_int
from jforge.core.params import Params
from jforge.core.share import Source
from jforge.core.spec import CacheSpec, Lengths
from jforge.core.step import Tokens, all_of, begin, end, few_tokens, one_by_one, several
from jforge.cost import Work


@dataclass(frozen=True, kw_only=True)
class Config(dense.Config):
    """The dense family's fields and the chunk.

    attention_chunk_size: C, tokens of a chunk; a query sees those of its own up to itself
    """

    attention_chunk_size: int

    def __post_init__(self):
        super().__post_init__()
        positive_int("attention_chunk_size", self.attention_chunk_size)


def visible(cfg: Config, q_pos: Array, k_pos: Array) -> Array:
    """The tokens of the query's chunk up to its own."""
    C = cfg.attention_chunk_size
    return (k_pos <= q_pos) & (k_pos // C == q_pos // C)


def forward(params: Params, cfg: Config, x: Tokens, positions=None) -> Tokens:
    """The definition: attention of x over itself, chunk by chunk. `positions` (int B T) feed RoPE only."""
    rows = all_of(cfg, x, positions)
    recent = ring.in_order(rows.order, *dense.project_keys(params, cfg, rows))
    return attend_recent(params, cfg, rows, recent, visible, cfg.attention_chunk_size)


def prefill(params: Params, cfg: Config, x: Tokens, cache: KVCache, lengths=None) -> tuple[Tokens, KVCache]:
    """Attend over the old slots and the new tokens (as stored, so rounded), then write the last of them."""
    step = begin(cfg, cache_spec(cfg), x, cache, lengths)
    k, v = dense.project_keys(params, cfg, step.queries)
    recent = ring.beside(step, cache.length, (cache.k, k), (cache.v, v))
    y = attend_recent(params, cfg, step.queries, recent, visible, cfg.attention_chunk_size)
    return end(step, y, x.dtype), ring.write(cache, step, k=k, v=v)


def decode(params: Params, cfg: Config, x: Tokens, cache: KVCache, ops=jax_ops) -> tuple[Tokens, KVCache]:
    """Token by token: write, and attend over the chunk's slots through `ops.decode_attention`."""
    if several(x):
        return one_by_one(decode, cache_spec(cfg), params, cfg, x, cache, ops)
    step = begin(cfg, cache_spec(cfg), few_tokens(x), cache)
    q, k, v = dense.project(params, cfg, step.x, step.positions)
    cache = ring.write(cache, step, k=k, v=v)
    q, own = q.astype(cache.k.dtype), filled(cfg, step.length)
    out, _ = ops.decode_attention(q, cache.k, cache.v, own, out_dtype=x.dtype, **dense.options(params, cfg))
    return end(step, dense.project_out(params, cfg, step.x, out), x.dtype), cache


def read(params: Params, cfg: Config, x: Tokens, source: Source, ops=None) -> Tokens:
    """Attention over the slots of another layer and its new tokens, with queries of this one."""
    own = None if source.after is None else filled(cfg, source.after.length)
    return read_recent(params, cfg, x, source, ops, visible, cfg.attention_chunk_size, own)


def filled(cfg: Config, length: Int[Array, "B"]) -> Int[Array, "B"]:
    """The leading slots that hold the chunk of the newest token."""
    return jnp.where(length > 0, (length - 1) % cfg.attention_chunk_size + 1, 0)


def _chunk(cfg: Config, length: Lengths) -> Lengths:
    """The number of the newest token's chunk: while it stays, a rewind only shortens what is valid."""
    return (length - 1) // cfg.attention_chunk_size


def cache_spec(cfg: Config) -> CacheSpec:
    buffers = dense.kv_buffers(cfg, cfg.attention_chunk_size)
    return dense.spec_of(cfg, {n: replace(buffer, filled=filled, steady=_chunk) for n, buffer in buffers.items()})


def work(cfg: Config, context: int, capacity: int, new: int, closing: bool) -> Work:
    """The chunk's slots are read, of a prefill all, and of the new tokens those written that stay in a ring of C."""
    C = cfg.attention_chunk_size
    slots = (context - 1) % C + 1 if new == 1 else min(context, C)
    return dense.work_on(cfg, slots, min(new, C), _pairs(context, C) - _pairs(context - new, C))


def _pairs(context: int, C: int) -> int:
    """Pairs of a query and a key that it sees, of so many tokens."""
    chunks, rest = divmod(context, C)
    return chunks * C * (C + 1) // 2 + rest * (rest + 1) // 2


chunked_local = Attention(
    summary="a token sees its own chunk of C tokens (Llama 4, three of four layers)",
    traded="what lies before the chunk is lost, all at once at its edge, so cache and reads stop growing",
    Config=Config, shapes=dense.shapes, cache_spec=cache_spec, work=work,
    forward=forward, prefill=prefill, decode=decode, visible=visible, lend=dense.lend, read=read,
    models=FrozenDict({
        "Llama-4-Scout chunked": Config(hidden_size=5120, num_attention_heads=40, num_key_value_heads=8, head_dim=128,
                                        attention_chunk_size=8192, qk_norm="head", qk_norm_weight=False,
                                        qk_norm_after_rope=True, rms_norm_eps=1e-5, rope_layout="interleaved",
                                        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 16.0,
                                                         "low_freq_factor": 1.0, "high_freq_factor": 1.0,
                                                         "original_max_position_embeddings": 8192}),
    }),
    examples=(
        Config(hidden_size=12, num_attention_heads=4, num_key_value_heads=2, head_dim=6, attention_chunk_size=4,
               qk_norm="head", qk_norm_weight=False, qk_norm_after_rope=True, rope_layout="interleaved",
               rope_parameters=PLAIN),
        Config(hidden_size=10, num_attention_heads=3, num_key_value_heads=1, head_dim=4, v_head_dim=6,
               attention_chunk_size=3, alibi=True, attn_scale=0.7, floor_scale=2.5, attention_bias=True),
    ),
)  # fmt: skip
