"""HCA, heavily compressed attention: the last W tokens, and one entry for every m tokens before, all of them read.

    entry w = norm(sum over the m tokens s of block w of softmax_s(z_s) * u_s), turned at position w m    (v4_compress)
    o_t     = one softmax, with a sink, over the vectors of the window and the entries w with (w + 1) m <= t + 1

The token that completes a block sees its entry. With m = 128 a million tokens are 8192 entries.

Cache: a ring of W vectors, the entries, and float32 rows u and z of the open block.

Sources: DeepSeek-V4 (arXiv 2606.19348), its inference code, transformers' deepseek_v4.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
from jaxtyping import Array

import jforge.ops as jax_ops
from jforge.attention import v4_compress, v4_window
from jforge.attention.v4_compress import Compressor, Config
from jforge.attention.v4_window import FLASH, LONG, ODD, PRO, TINY, TINY_YARN
from jforge.core import ring
from jforge.core.attend import merge
from jforge.core.attention import Attention
from jforge.core.config import FrozenDict
from jforge.core.params import Params
from jforge.core.softmax import accumulation_dtype
from jforge.core.spec import CacheSpec, cache_class
from jforge.core.step import Tokens, all_of, begin, end, few_tokens, one_by_one, several
from jforge.cost import Work, seen


@cache_class
class HCACache:
    """kv: the window's vectors, token p in slot p mod W. States: row r is the token r of the open block, or 0."""

    kv: jax.Array  # B W H
    c_kv: jax.Array  # B S/m H, entries after norm and RoPE
    state_kv: jax.Array  # B m H, float32 or wider
    state_score: jax.Array  # B m H, bias included
    length: jax.Array  # int32[B]


def compressor(cfg: Config) -> Compressor:
    return Compressor("c", "c_kv", "state", cfg.head_dim, cfg.compress_rate, overlap=False)


def shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """{parameter: shape} of a Config."""
    return v4_window.shapes(cfg) | compressor(cfg).shapes(cfg.hidden_size)


def forward(params: Params, cfg: Config, x: Tokens, positions=None) -> Tokens:
    """The definition. `positions` (int B T) feed RoPE only; blocks follow the order of x."""
    rows = all_of(cfg, x, positions)
    kv = v4_window.key_value(params, cfg, rows.x, rows.positions)
    entries = compressor(cfg).compress(params, cfg, rows)
    return v4_window.attend_over(params, cfg, rows, ring.in_order(rows.order, kv), entries, _far(cfg, entries))


def _far(cfg: Config, entries: Array) -> Callable:
    return lambda rows, latent: v4_compress.seen(cfg, rows.order, entries.shape[1])


def prefill(params: Params, cfg: Config, x: Tokens, cache: HCACache, lengths=None) -> tuple[Tokens, HCACache]:
    """Make the entries that the new tokens complete; attend over the old ring, the new tokens and all entries."""
    step = begin(cfg, cache_spec(cfg), x, cache, lengths)
    kv = v4_window.key_value(params, cfg, step.x, step.positions)
    recent = ring.beside(step, cache.length, (cache.kv, kv))
    leaves = compressor(cfg).extend(params, cfg, cache, step)
    cache = replace(ring.write(cache, step, kv=kv), **leaves)
    y = v4_window.attend_over(params, cfg, step.queries, recent, cache.c_kv, _far(cfg, cache.c_kv))
    return end(step, y, x.dtype), cache


def decode(params: Params, cfg: Config, x: Tokens, cache: HCACache, ops=jax_ops) -> tuple[Tokens, HCACache]:
    """Token by token: `ops.decode_attention` over the ring and over the entries, merged."""
    if several(x):
        return one_by_one(decode, cache_spec(cfg), params, cfg, x, cache, ops)
    step = begin(cfg, cache_spec(cfg), few_tokens(x), cache)
    q, _, kv = v4_window.project(params, cfg, step.x, step.positions)
    leaves = compressor(cfg).extend_by_one(params, cfg, cache, step)
    cache = replace(ring.write(cache, step, kv=kv), **leaves)
    q, entries, complete = q.astype(cache.kv.dtype), cache.c_kv[:, :, None], step.length // cfg.compress_rate
    near = v4_window.attend_ring(params, cfg, q, cache.kv, step, ops)
    more = {"scale": cfg.scaling, "out_dtype": accumulation_dtype(x)}
    far = ops.decode_attention(q, entries, entries, complete, **more)
    out = merge(ops, near, far)
    return end(step, v4_window.project_out(params, cfg, out, step.positions), x.dtype), cache


def cache_spec(cfg: Config) -> CacheSpec:
    return CacheSpec(HCACache, {"kv": v4_window.window_buffer(cfg)} | compressor(cfg).buffers("H"))


def work(cfg: Config, context: int, capacity: int, new: int, closing: bool) -> Work:
    """The ring and all entries are read; by a step that completes one, and by a prefill, the open block's rows too."""
    entries = cache_spec(cfg)["c_kv"].slots(context)
    flops = 4 * cfg.num_attention_heads * cfg.head_dim * seen(context, new, every=cfg.compress_rate)
    return v4_compress.layer_work(cfg, (compressor(cfg),), {"c_kv": entries}, flops, context, new, closing)


hca = Attention(
    summary="the last W tokens and one entry for every 128 before (DeepSeek-V4)",
    traded="m tokens become one entry, and all of them are read: detail for memory and reads alike",
    Config=Config, shapes=shapes, cache_spec=cache_spec, work=work,
    forward=forward, prefill=prefill, decode=decode, visible=v4_compress.visible,
    models=FrozenDict({
        "DeepSeek-V4-Flash": Config(**FLASH, rope_parameters=LONG, compress_rate=128),
        "DeepSeek-V4-Pro": Config(**PRO, rope_parameters=LONG, compress_rate=128),
    }),
    examples=(
        Config(**TINY, sliding_window=3, compress_rate=4, rope_parameters=TINY_YARN),
        Config(**ODD, sliding_window=5, compress_rate=3, rope_parameters={"rope_theta": 1e4}),
    ),
)  # fmt: skip
