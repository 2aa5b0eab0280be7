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
from jaxtyping import Array, Float

import jforge.ops as jax_ops
from jforge.attention import dense
from jforge.attention.dense import KVCache, Params
from jforge.core import masks, ring
from jforge.core.attend import attend
from jforge.core.attention import Attention, init_cache_from, no_selection, no_tokens
from jforge.core.config import FrozenDict, positive_int
from jforge.core.spec import Buffer, CacheSpec
from jforge.core.step import begin, end, one_token
from jforge.cost import Cost, step_cost


@dataclass(frozen=True, kw_only=True)
class Config(dense.Config):
    """The dense family's fields and the window: keys visible to a query, its own included."""

    sliding_window: int | None

    def __post_init__(self):
        super().__post_init__()
        positive_int("sliding_window", self.sliding_window)


def visible(cfg: Config, q_pos: Array, k_pos: Array) -> Array:
    """The last W tokens up to the query's own."""
    return masks.window(q_pos, k_pos, cfg.sliding_window)


def forward(params: Params, cfg: Config, x: Float[Array, "B T D"], positions=None) -> Float[Array, "B T D"]:
    """The definition: attention of x over itself under a banded mask. `positions` (int B T) feed RoPE only."""
    return dense.forward_under(visible, params, cfg, x, positions)


def prefill(
    params: Params, cfg: Config, x: Float[Array, "B T D"], cache: KVCache, lengths=None
) -> tuple[Array, KVCache]:
    """Attend over the old ring and the new tokens (as stored, so rounded), then write those that stay in the ring."""
    cache_spec(cfg).check(cache)
    W, dtype = cache.k.shape[1], cache.k.dtype
    step = begin(x, cache.length, lengths, cfg.hidden_size, ring.capacity(W, cfg.sliding_window))
    q, k, v = (a.astype(dtype) for a in dense.project(params, cfg, step.x, step.positions))
    held = jnp.concatenate([ring.held(cache.length, W), jnp.where(step.keep, step.positions, -1)], axis=1)
    mask = visible(cfg, step.positions[..., None], held[:, None]) & (held >= 0)[:, None] & step.keep[..., None]
    keys, values = jnp.concatenate([cache.k, k], axis=1), jnp.concatenate([cache.v, v], axis=1)
    out, _ = attend(q, keys, values, mask, **dense.options(params, cfg))
    cache = KVCache(ring.write(cache.k, k, step), ring.write(cache.v, v, step), step.length)
    return end(step, dense.project_out(params, cfg, step.x, out), x.dtype), cache


def decode(
    params: Params, cfg: Config, x: Float[Array, "B 1 D"], cache: KVCache, ops=jax_ops
) -> tuple[Float[Array, "B 1 D"], KVCache]:
    """Write one token a row over the oldest and attend over the whole ring through `ops.decode_attention`."""
    cache_spec(cfg).check(cache)
    W = cache.k.shape[1]
    step = begin(one_token(x), cache.length, None, cfg.hidden_size, ring.capacity(W, cfg.sliding_window))
    q, k, v = dense.project(params, cfg, step.x, step.positions)
    cache = KVCache(ring.write(cache.k, k, step), ring.write(cache.v, v, step), step.length)
    filled = jnp.minimum(step.length, W)
    q = q.astype(cache.k.dtype)
    out, _ = ops.decode_attention(q, cache.k, cache.v, filled, out_dtype=x.dtype, **dense.options(params, cfg))
    return end(step, dense.project_out(params, cfg, step.x, out), x.dtype), cache


def cache_spec(cfg: Config) -> CacheSpec:
    K, W = cfg.num_key_value_heads, cfg.sliding_window
    return CacheSpec(
        KVCache,
        {
            "k": Buffer(("B", "W", "K", "H"), (K, cfg.head_dim), limit=W),
            "v": Buffer(("B", "W", "K", "V"), (K, cfg.v_head_dim), limit=W),
        },
    )


def cost(
    cfg: Config, *, context: int, batch: int = 1, capacity: int | None = None, dtype=jnp.bfloat16, closing: bool = False
) -> Cost:
    """One step writes a slot of k and v and reads min(context, W) of them."""
    slots = min(context, cfg.sliding_window)
    return step_cost(
        cache_spec(cfg),
        context=context,
        batch=batch,
        capacity=capacity,
        dtype=dtype,
        read={"k": slots, "v": slots},
        written={"k": 1, "v": 1},
        flops=2 * cfg.num_attention_heads * (cfg.head_dim + cfg.v_head_dim) * slots,
        entries_read=slots,
    )


_PLAIN = {"rope_type": "default", "rope_theta": 1e4}

sliding_window = Attention(
    summary="the last W tokens in a ring cache (Mistral-7B-v0.1, Gemma 2 and 3 local layers)",
    Config=Config,
    init_params=dense.init_params,
    init_cache=init_cache_from(cache_spec),
    forward=forward,
    prefill=prefill,
    decode=decode,
    visible=visible,
    select=no_selection,
    tokens_of=no_tokens,
    cache_spec=cache_spec,
    cost=cost,
    models=FrozenDict({
        "Mistral-7B-v0.1": Config(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, sliding_window=4096),
        "Gemma-3-27B local": Config(hidden_size=5376, num_attention_heads=32, num_key_value_heads=16, head_dim=128,
                                    sliding_window=1024, qk_norm="head", norm_offset=1.0, scaling=168**-0.5,
                                    rope_parameters=_PLAIN),
    }),
    examples=(
        Config(hidden_size=12, num_attention_heads=4, num_key_value_heads=2, head_dim=6, sliding_window=4,
               rope_parameters=_PLAIN, qk_norm="head", norm_offset=1.0, attn_logit_softcapping=5.0),
        Config(hidden_size=10, num_attention_heads=2, num_key_value_heads=1, head_dim=4, v_head_dim=6,
               sliding_window=1, rope_parameters=_PLAIN, attention_bias=True),
    ),
)  # fmt: skip
