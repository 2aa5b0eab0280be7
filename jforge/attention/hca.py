"""HCA, heavily compressed attention: the last W tokens, and one entry for every m tokens before, all of them read.

    entry w = norm(sum over the m tokens s of block w of softmax_s(z_s) * u_s), turned at position w m    (v4_compress)
    o_t     = one softmax, with a sink, over the vectors of the window and the entries w with (w + 1) m <= t + 1

The token that completes a block sees its entry. With m = 128 a million tokens are 8192 entries.

Cache: a ring of W vectors, the entries, and float32 rows u and z of the open block.

Sources: DeepSeek-V4 (arXiv 2606.19348), its inference code, transformers' deepseek_v4.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import jforge.ops as jax_ops
from jforge.attention import v4, v4_compress
from jforge.attention.v4 import Params
from jforge.attention.v4_compress import Compressor, Config
from jforge.core import masks, ring
from jforge.core.attention import Attention, init_cache_from, no_selection, no_tokens
from jforge.core.config import FrozenDict
from jforge.core.softmax import accumulation_dtype
from jforge.core.spec import CacheSpec, cache_class
from jforge.core.step import begin, end, one_token
from jforge.cost import Cost


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
    return v4.shapes(cfg) | compressor(cfg).shapes(cfg.hidden_size)


def init_params(key: Array, cfg: Config, dtype=jnp.float32) -> Params:
    return v4.draw(key, cfg, shapes(cfg), dtype)


def forward(params: Params, cfg: Config, x: Float[Array, "B T D"], positions=None) -> Float[Array, "B T D"]:
    """The definition. `positions` (int B T) feed RoPE only; blocks follow the order of x."""
    order, positions = v4.in_order(cfg, x, positions)
    q, _, kv = v4.project(params, cfg, x, positions)
    entries = compressor(cfg).compress(params, cfg, x, order, positions)
    near = masks.window(order[..., None], order[:, None], cfg.sliding_window)
    far = v4_compress.seen(cfg, order, entries.shape[1])
    out = v4_compress.attend_both(params, cfg, q, kv, near, entries, far)
    return v4.project_out(params, cfg, out, positions).astype(x.dtype)


def prefill(
    params: Params, cfg: Config, x: Float[Array, "B T D"], cache: HCACache, lengths=None
) -> tuple[Float[Array, "B T D"], HCACache]:
    """Make the entries that the new tokens complete; attend over the old ring, the new tokens and all entries."""
    cache_spec(cfg).check(cache)
    step = begin(x, cache.length, lengths, cfg.hidden_size, v4_compress.capacity(cfg, cache))
    q, _, kv = v4.project(params, cfg, step.x, step.positions)
    recent, near = v4.recent(cfg, cache.kv, cache.length, kv, step)
    leaves = compressor(cfg).extend(params, cfg, cache, step)
    cache = HCACache(kv=ring.write(cache.kv, kv, step), **leaves, length=step.length)
    far = v4_compress.seen(cfg, step.positions, cache.c_kv.shape[1]) & step.keep[..., None]
    out = v4_compress.attend_both(params, cfg, q.astype(recent.dtype), recent, near, cache.c_kv, far)
    return end(step, v4.project_out(params, cfg, out, step.positions), x.dtype), cache


def decode(
    params: Params, cfg: Config, x: Float[Array, "B 1 D"], cache: HCACache, ops=jax_ops
) -> tuple[Float[Array, "B 1 D"], HCACache]:
    """One token a row: `ops.decode_attention` over the ring and over the entries, merged."""
    cache_spec(cfg).check(cache)
    step = begin(one_token(x), cache.length, None, cfg.hidden_size, v4_compress.capacity(cfg, cache))
    q, _, kv = v4.project(params, cfg, step.x, step.positions)
    leaves = compressor(cfg).extend_by_one(params, cfg, cache, step)
    cache = HCACache(kv=ring.write(cache.kv, kv, step), **leaves, length=step.length)
    q, entries, complete = q.astype(cache.kv.dtype), cache.c_kv[:, :, None], step.length // cfg.compress_rate
    near = v4.attend_ring(params, cfg, q, cache.kv, step, ops)
    more = {"scale": cfg.scaling, "out_dtype": accumulation_dtype(x)}
    far = ops.decode_attention(q, entries, entries, complete, **more)
    out = v4_compress.merge(ops, near, far)
    return end(step, v4.project_out(params, cfg, out, step.positions), x.dtype), cache


def cache_spec(cfg: Config) -> CacheSpec:
    return CacheSpec(HCACache, {"kv": v4.window_buffer(cfg)} | compressor(cfg).buffers("H"))


def cost(
    cfg: Config, *, context: int, batch: int = 1, capacity: int | None = None, dtype=jnp.bfloat16, closing: bool = False
) -> Cost:
    """One step reads the ring and all entries; every m-th reads the open block's rows as well."""
    spec = cache_spec(cfg)
    entries = spec["c_kv"].slots(context)
    return v4_compress.layer_cost(
        spec,
        cfg,
        (compressor(cfg),),
        read={"c_kv": entries},
        flops=4 * cfg.num_attention_heads * cfg.head_dim * entries,
        context=context,
        batch=batch,
        capacity=capacity,
        dtype=dtype,
        closing=closing,
    )


_YARN = {"rope_type": "yarn", "rope_theta": 1.6e5, "factor": 4.0, "original_max_position_embeddings": 32}

hca = Attention(
    summary="the last W tokens and one entry for every 128 before (DeepSeek-V4)",
    Config=Config,
    init_params=init_params,
    init_cache=init_cache_from(cache_spec),
    forward=forward,
    prefill=prefill,
    decode=decode,
    visible=v4_compress.visible,
    select=no_selection,
    tokens_of=no_tokens,
    cache_spec=cache_spec,
    cost=cost,
    models=FrozenDict({
        "DeepSeek-V4-Flash": Config(**v4.FLASH, rope_parameters=v4.LONG, compress_rate=128),
        "DeepSeek-V4-Pro": Config(**v4.PRO, rope_parameters=v4.LONG, compress_rate=128),
    }),
    examples=(
        Config(hidden_size=14, num_attention_heads=6, head_dim=10, qk_rope_head_dim=6, q_lora_rank=7, o_groups=2,
               o_lora_rank=5, sliding_window=3, compress_rate=4, rope_parameters=_YARN),
        Config(hidden_size=9, num_attention_heads=2, head_dim=6, qk_rope_head_dim=2, q_lora_rank=5, o_groups=1,
               o_lora_rank=3, sliding_window=5, compress_rate=3, rope_parameters={"rope_theta": 1e4}),
    ),
)  # fmt: skip
