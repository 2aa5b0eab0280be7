"""Somebody's own mechanism, correct: a token sees its chunk of C tokens up to itself (Llama 4's chunked attention).

The cache is a ring of C slots, of which a step reads t % C + 1: what the chunk before left is not read again.
"""

from dataclasses import dataclass, replace

import jax.numpy as jnp

import jforge
from jforge.attention import dense
from jforge.core import ring
from jforge.core.attend import attend
from jforge.core.spec import CacheSpec
from jforge.core.step import all_of, begin, end

GQA = jforge.get("gqa")


@dataclass(frozen=True, kw_only=True)
class Config(dense.Config):
    chunk_size: int


def visible(cfg, q_pos, k_pos):
    return (k_pos <= q_pos) & (k_pos // cfg.chunk_size == q_pos // cfg.chunk_size)


def filled(cfg, length):
    return jnp.where(length > 0, (length - 1) % cfg.chunk_size + 1, 0)


def cache_spec(cfg):
    buffers = dense.kv_buffers(cfg, cfg.chunk_size)
    return CacheSpec(dense.KVCache, {name: replace(buffer, filled=filled) for name, buffer in buffers.items()})


def forward(params, cfg, x, positions=None):
    rows = all_of(cfg, x, positions)

    def mask(q, rows, S):
        return visible(cfg, rows.order[..., None], jnp.arange(S))

    return dense.attend_over(params, cfg, rows, *dense.project_keys(params, cfg, rows), mask)


def prefill(params, cfg, x, cache, lengths=None):
    step = begin(cfg, cache_spec(cfg), x, cache, lengths)
    q, k, v = dense.project(params, cfg, step.x, step.positions)
    _, positions, (keys, values) = ring.beside(step, cache.length, (cache.k, k), (cache.v, v))
    mask = visible(cfg, step.positions[..., None], positions[:, None]) & step.keep[..., None]
    out, _ = attend(q.astype(keys.dtype), keys, values, mask, **dense.options(params, cfg))
    return end(step, dense.project_out(params, cfg, step.x, out), x.dtype), ring.write(cache, step, k=k, v=v)


def decode_reading(count):
    """decode that hands its op count(cfg, length) as lengths."""

    def decode(params, cfg, x, cache, ops=jforge.ops):
        step = begin(cfg, cache_spec(cfg), x, cache)
        q, k, v = dense.project(params, cfg, step.x, step.positions)
        cache = ring.write(cache, step, k=k, v=v)
        n, more = count(cfg, step.length), dense.options(params, cfg)
        out, _ = ops.decode_attention(q.astype(cache.k.dtype), cache.k, cache.v, n, out_dtype=x.dtype, **more)
        return end(step, dense.project_out(params, cfg, step.x, out), x.dtype), cache

    return decode


def work(cfg, context, capacity, new, closing):
    """Of a decode step."""
    read = (context - 1) % cfg.chunk_size + 1
    return dense.work_on(cfg, read, 1, read)


chunked = GQA._replace(
    summary="chunks of C tokens",
    Config=Config,
    cache_spec=cache_spec,
    work=work,
    forward=forward,
    prefill=prefill,
    decode=decode_reading(filled),
    visible=visible,
    examples=(Config(hidden_size=12, num_attention_heads=4, num_key_value_heads=2, head_dim=6, chunk_size=4),),
)
