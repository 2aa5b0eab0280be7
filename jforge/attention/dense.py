"""Dense attention: single head, MHA, MQA and GQA are one code path with G = N / K.

    q = x Wq (+bq)   k = x Wk (+bk)   v = x Wv (+bv)          N query heads, K key/value heads
    q, k <- norm (per head, or over all heads), clip, RoPE; or RoPE, then norm;      q <- q (1 + a ln(1 + ...)) by place
    out_t = sum_{s <= t} softmax_s(cap(scale * q_t . k_s) + m_n (s - t)) v_s         query head n reads KV head n // G
    y = (out * sigmoid(x Wg)) Wo (+bo)                        ALiBi, gate and norms only where the model has them

Cache: k and v after norm and RoPE, 2 K H elements a token. A decode step appends one slot and reads them all.
Sources: Vaswani et al. 2017 (MHA), Shazeer 2019 (MQA), Ainslie et al. 2023 (GQA); options as in the Hugging Face
modules of dense models, llama, qwen3, gemma3, olmo2, bloom, cohere, persimmon, llama4 and others (dense_config).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jforge import ops as jax_ops
from jforge.attention.dense_config import Config, MHAConfig, MQAConfig, SingleHeadConfig
from jforge.core import alibi, masks, rope
from jforge.core.attend import attend, einsum, over_queries
from jforge.core.attention import Attention
from jforge.core.config import FrozenDict
from jforge.core.norm import norm
from jforge.core.params import Drawn, Params
from jforge.core.share import NoCache, Source
from jforge.core.softmax import accumulation_dtype, common
from jforge.core.spec import Buffer, CacheSpec, cache_class
from jforge.core.step import Queries, Tokens, all_of, append, begin, end, few_tokens
from jforge.cost import Work, seen


@cache_class
class KVCache:
    """Keys after norm and RoPE, values as projected; slot s holds token s."""

    k: jax.Array  # B S K H
    v: jax.Array  # B S K V
    length: jax.Array  # int32[B]


def shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """{parameter: shape} of a Config."""
    D, N, K, H, V = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.v_head_dim
    out = {"wq": (D, N, H), "wk": (D, K, H), "wv": (D, K, V), "wo": (N, V, D)}
    if cfg.attention_bias:
        out |= {"bq": (N, H), "bk": (K, H), "bv": (K, V)}
    if cfg.attention_k_eq_v:
        out = {name: shape for name, shape in out.items() if name not in ("wv", "bv")}
    if cfg.attention_output_bias:
        out |= {"bo": (D,)}
    if cfg.qk_norm and cfg.qk_norm_weight:
        own = {"q_norm": (N, H), "k_norm": (K, H)}
        weights = dict.fromkeys(own, (H,)) if cfg.qk_norm == "head" else own
        out |= {name: norm_weight(cfg, *shape) for name, shape in weights.items()}
        out |= {f"{name}_bias": shape for name, shape in weights.items() if cfg.qk_norm_bias}
    if cfg.attn_output_gate:
        out |= {"wg": (D, N) if cfg.output_gate_per_head else (D, N, V)}
    return {name: shape for name, shape in out.items() if not (cfg.kv_shared and name in _OF_KEYS)}


_OF_KEYS = ("wk", "wv", "bk", "bv", "k_norm", "k_norm_bias")
"""What a layer that reads another's keys and values has not."""


def norm_weight(cfg: Config, *shape: int) -> Drawn:
    """The shape of a norm's weight, drawn about what leaves a normed vector as it is."""
    return Drawn(*shape, mean=1 - cfg.norm_offset)


def queries(params: Params, cfg: Config, x: Tokens) -> Float[Array, "B T N H"]:
    """q of the new tokens, normed and clipped, before RoPE."""
    return _unturned(params, cfg, _linear(params, cfg, x, "q"), "q_norm")


def keys_values(params: Params, cfg: Config, x: Tokens) -> tuple[Array, Array]:
    """k: B T K H, v: B T K V of the new tokens, normed and clipped, before RoPE."""
    if cfg.kv_shared:
        raise ValueError("kv_shared is True; such a layer has no keys, jforge.stack gives it those of an earlier one")
    k = _linear(params, cfg, x, "k")
    v = k if cfg.attention_k_eq_v else _linear(params, cfg, x, "v")
    v = norm(v, None, eps=cfg.rms_norm_eps) if cfg.v_norm else v
    return _unturned(params, cfg, k, "k_norm"), _clipped(cfg, v)


def _linear(params: Params, cfg: Config, x: Tokens, which: str) -> Array:
    heads = einsum("btd,dnh->btnh", x, params[f"w{which}"])
    return heads + params[f"b{which}"] if cfg.attention_bias else heads


def _unturned(params: Params, cfg: Config, heads: Array, weight: str) -> Array:
    """What RoPE is given."""
    return _clipped(cfg, heads if cfg.qk_norm_after_rope else _normed(params, cfg, heads, weight))


def _clipped(cfg: Config, heads: Array) -> Array:
    return heads if cfg.clip_qkv is None else jnp.clip(heads, -cfg.clip_qkv, cfg.clip_qkv)


def _normed(params: Params, cfg: Config, heads: Array, weight: str) -> Array:
    if not cfg.qk_norm:
        return heads
    axes, centred = 2 if cfg.qk_norm == "flat" else 1, cfg.qk_norm_type == "layer"
    weights = params.get(weight), params.get(f"{weight}_bias")
    return norm(heads, *weights, axes=axes, eps=cfg.rms_norm_eps, offset=cfg.norm_offset, centred=centred)


def qkv(params: Params, cfg: Config, x: Tokens) -> tuple[Array, Array, Array]:
    """q: B T N H, k: B T K H, v: B T K V of the new tokens, normed and clipped, before RoPE."""
    return queries(params, cfg, x), *keys_values(params, cfg, x)


def rotate(cfg: Config, x: Float[Array, "B T N H"], positions: Int[Array, "B T"]) -> Float[Array, "B T N H"]:
    """RoPE of queries or keys at `positions`."""
    return rope.apply_rope(x, positions, cfg.rope_parameters, cfg.rope_layout)


def _turned(params: Params, cfg: Config, heads: Array, positions, weight: str) -> Array:
    heads = rotate(cfg, heads, positions)
    return _normed(params, cfg, heads, weight) if cfg.qk_norm_after_rope else heads


def project_queries(params: Params, cfg: Config, rows: Queries) -> Float[Array, "B T N H"]:
    """q as it meets the keys: normed, rotated, and scaled by the place of its token in the row."""
    q = _turned(params, cfg, queries(params, cfg, rows.x), rows.positions, "q_norm")
    if cfg.attn_scale is None:
        return q
    wide = accumulation_dtype(q)
    steps = jnp.floor((rows.order.astype(wide) + cfg.attn_scale_from) / cfg.floor_scale)
    return (q.astype(wide) * (1 + cfg.attn_scale * jnp.log1p(steps))[..., None, None]).astype(q.dtype)


def project(params: Params, cfg: Config, x: Tokens, positions) -> tuple[Array, Array, Array]:
    """q: B T N H, k: B T K H, v: B T K V of the new tokens, normed and rotated; `positions` are their places too."""
    rows = Queries(x, positions, positions, jnp.ones(x.shape[:2], bool))
    return project_queries(params, cfg, rows), *project_keys(params, cfg, rows)


def project_out(params: Params, cfg: Config, x: Tokens, out: Float[Array, "B T N V"]) -> Array:
    """Gate, output projection, bias: B T D."""
    if cfg.attn_output_gate:
        equation = "btd,dn->btn" if cfg.output_gate_per_head else "btd,dnv->btnv"
        gate = getattr(jax.nn, cfg.output_gate_type)(einsum(equation, x, params["wg"]))
        out, gate = common(out, gate[..., None] if cfg.output_gate_per_head else gate)
        out = out * gate
    y = einsum("btnv,nvd->btd", out, params["wo"])
    return y + params["bo"].astype(y.dtype) if cfg.attention_output_bias else y


def visible(cfg: Config, q_pos: Array, k_pos: Array) -> Array:
    """Every token up to the query's own."""
    return masks.causal(q_pos, k_pos)


def forward(params: Params, cfg: Config, x: Tokens, positions=None) -> Tokens:
    """The definition: causal attention of x over itself. `positions` (int B T, default 0..T-1) feed RoPE only."""
    rows = all_of(cfg, x, positions)
    return attend_over(params, cfg, rows, *project_keys(params, cfg, rows), _mask(cfg))


def _mask(cfg: Config) -> Callable:
    return lambda q, rows, S: visible(cfg, rows.order[..., None], jnp.arange(S))


def project_keys(params: Params, cfg: Config, rows: Queries) -> tuple[Array, Array]:
    """k: B T K H, v: B T K V of the new tokens, normed and rotated."""
    k, v = keys_values(params, cfg, rows.x)
    return _turned(params, cfg, k, rows.positions, "k_norm"), v


def attend_over(params: Params, cfg: Config, rows: Queries, k: Array, v: Array, mask: Callable) -> Tokens:
    """Attention of `rows` over slots of k and v, projected in and out, in blocks of queries; slot s has token s.

    mask(q, rows, S): which of the first S slots a block sees, bool B t S or B t N S; none after a query's own.
    `sinks` in params join the softmax.
    """

    def block(rows, keys):
        rows, (k, v) = Queries(*rows), keys
        q = project_queries(params, cfg, rows).astype(k.dtype)
        seen = mask(q, rows, k.shape[1])
        seen &= jnp.expand_dims(rows.keep, tuple(range(2, seen.ndim)))
        out, _ = attend(q, k, v, seen, distance=distance(rows, jnp.arange(k.shape[1])), **options(params, cfg))
        return project_out(params, cfg, rows.x, out).astype(rows.x.dtype)

    numbers = cfg.num_attention_heads * k.shape[0] * k.shape[1]
    return over_queries(block, rows, numbers, (k, v), jnp.where(rows.keep, rows.order, 0))


def options(params: Params, cfg: Config) -> dict[str, Any]:
    """What `attend` and the decode ops are told beside their arrays."""
    told = {"scale": cfg.scaling, "softcap": cfg.attn_logit_softcapping, "sinks": params.get("sinks")}
    return told | {"alibi": jnp.asarray(alibi.slopes(cfg.num_attention_heads))} if cfg.alibi else told


def distance(rows: Queries, places: Int[Array, "*#B S"]) -> Int[Array, "#B t S"]:
    """The place of each key less that of each query, for the biases of ALiBi."""
    return places[..., None, :] - rows.order[..., None]


def prefill(params: Params, cfg: Config, x: Tokens, cache: KVCache, lengths=None) -> tuple[Tokens, KVCache]:
    """Append T tokens (row b its first lengths[b]) and attend over what is stored then, so after its rounding."""
    step = begin(cfg, cache_spec(cfg), x, cache, lengths)
    k, v = project_keys(params, cfg, step.queries)
    cache = append(cache, step, k=k, v=v)
    y = attend_over(params, cfg, step.queries, cache.k, cache.v, _mask(cfg))
    return end(step, y, x.dtype), cache


def decode(params: Params, cfg: Config, x: Tokens, cache: KVCache, ops=jax_ops) -> tuple[Tokens, KVCache]:
    """Append 1 to 16 tokens a row and attend through `ops.decode_attention`; the same numbers as prefill."""
    step = begin(cfg, cache_spec(cfg), few_tokens(x), cache)
    q, k, v = project(params, cfg, step.x, step.positions)
    cache = append(cache, step, k=k, v=v)
    q = q.astype(cache.k.dtype)
    out, _ = ops.decode_attention(q, cache.k, cache.v, cache.length, out_dtype=x.dtype, **options(params, cfg))
    return end(step, project_out(params, cfg, step.x, out), x.dtype), cache


def lend(params: Params, cfg: Config, rows: Queries, cache, ops=None) -> dict[str, Array]:
    """Keys and values of the new tokens, as they are stored."""
    k, v = project_keys(params, cfg, rows)
    return {"k": k, "v": v} if cache is None else {"k": k.astype(cache.k.dtype), "v": v.astype(cache.v.dtype)}


def read(params: Params, cfg: Config, x: Tokens, source: Source, ops=None) -> Tokens:
    """Attention over the keys and values of another layer, the new tokens' included, with queries of this one."""
    rows = source.rows._replace(x=x)
    k, v = (source.new["k"], source.new["v"]) if source.after is None else (source.after.k, source.after.v)
    if ops is None:
        return attend_over(params, cfg, rows, k, v, _mask(cfg))
    q = project_queries(params, cfg, rows).astype(k.dtype)
    out, _ = ops.decode_attention(q, k, v, source.after.length, out_dtype=x.dtype, **options(params, cfg))
    return project_out(params, cfg, x, out).astype(x.dtype)


def spec_of(cfg: Config, buffers: dict[str, Buffer]) -> CacheSpec:
    """These buffers, or another layer's where keys are shared."""
    return CacheSpec(NoCache, {}, buffers) if cfg.kv_shared else CacheSpec(KVCache, buffers)


def kv_buffers(cfg: Config, window: int | None = None) -> dict[str, Buffer]:
    """k and v, with a slot a token or as a ring of `window` slots."""
    K, axis = cfg.num_key_value_heads, "S" if window is None else "W"
    k = Buffer(("B", axis, "K", "H"), (K, cfg.head_dim), limit=window)
    return {"k": k, "v": Buffer(("B", axis, "K", "V"), (K, cfg.v_head_dim), limit=window)}


def cache_spec(cfg: Config) -> CacheSpec:
    return spec_of(cfg, kv_buffers(cfg))


def flops(cfg: Config, pairs: int) -> int:
    """2 N (H + V) for each pair of a query, of all heads, and a key that it sees."""
    return 2 * cfg.num_attention_heads * (cfg.head_dim + cfg.v_head_dim) * pairs


def work_on(cfg: Config, slots: int, written: int, pairs: int) -> Work:
    """A call that reads so many slots of k and v and writes so many, in which so many pairs of query and key meet."""
    own = {} if cfg.kv_shared else {"k": written, "v": written}
    return Work({"k": slots, "v": slots}, own, flops(cfg, pairs), slots)


def work(cfg: Config, context: int, capacity: int, new: int, closing: bool) -> Work:
    """All `context` slots are read, by each query those up to its own."""
    return work_on(cfg, context, new, seen(context, new))


_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 32}  # fmt: skip
LLAMA_8B = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
            "rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 8192}}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
_HALF = {**PLAIN, "partial_rotary_factor": 0.5}

gqa = Attention(
    summary="grouped queries: G query heads share a key/value head (Llama 3, Qwen3, MiniMax-M2)",
    traded="G query heads read the same keys: 1/G of the cache and of its reads, for less variety among keys",
    Config=Config, shapes=shapes, cache_spec=cache_spec, work=work,
    forward=forward, prefill=prefill, decode=decode, visible=visible, lend=lend, read=read,
    models=FrozenDict({
        "Llama-3.1-8B": Config(**LLAMA_8B),
        "Qwen3-235B-A22B": Config(hidden_size=4096, num_attention_heads=64, num_key_value_heads=4, head_dim=128,
                                  qk_norm="head", rope_parameters={**PLAIN, "rope_theta": 1e6}),
    }),
    examples=(
        Config(hidden_size=24, num_attention_heads=6, num_key_value_heads=2, head_dim=10, rope_parameters=_LLAMA3),
        Config(hidden_size=20, num_attention_heads=4, num_key_value_heads=2, qk_norm="head", head_dim=6,
               v_head_dim=5, norm_offset=1.0, rope_parameters=_YARN, scaling=0.3, attn_output_gate=True),
        Config(hidden_size=18, num_attention_heads=6, num_key_value_heads=3, qk_norm="flat", head_dim=8,
               rope_parameters=_HALF, rope_layout="interleaved", attention_bias=True, attention_output_bias=True,
               attn_logit_softcapping=5.0),
        Config(hidden_size=14, num_attention_heads=6, num_key_value_heads=2, head_dim=10, qk_norm="heads",
               qk_norm_type="layer", qk_norm_bias=True, clip_qkv=1.2, attention_k_eq_v=True, v_norm=True,
               attention_bias=True, attn_scale=0.4, floor_scale=3.0, attn_scale_from=0,
               attn_output_gate=True, output_gate_type="softplus", output_gate_per_head=True,
               rope_parameters={"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    ),
)  # fmt: skip
mha = gqa._replace(
    summary="multi-head: every query head has its own keys and values (Vaswani et al. 2017, OLMo-2)",
    traded="nothing is saved: every head keeps and reads keys and values of its own",
    Config=MHAConfig,
    models=FrozenDict({"Llama-2-7B": MHAConfig(hidden_size=4096, num_attention_heads=32, rms_norm_eps=1e-5,
                                               rope_parameters=PLAIN)}),
    examples=(MHAConfig(hidden_size=21, num_attention_heads=3, head_dim=6,
                        rope_parameters={**PLAIN, "rope_type": "linear", "factor": 2.0}),
              MHAConfig(hidden_size=15, num_attention_heads=5, head_dim=8, qk_norm="head", qk_norm_weight=False,
                        qk_norm_after_rope=True, alibi=True, attn_scale=0.5, floor_scale=2.0,
                        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                                         "factors": (1.5, 4.0), "attention_factor": 1.19})),
)  # fmt: skip
mqa = gqa._replace(
    summary="multi-query: all query heads share one key/value head (Shazeer 2019, Falcon-7B)",
    traded="1/N of the cache and of its reads, for one set of keys that all heads must share",
    Config=MQAConfig,
    models=FrozenDict({"Falcon-7B": MQAConfig(hidden_size=4544, num_attention_heads=71, rope_parameters=PLAIN)}),
    examples=(MQAConfig(hidden_size=30, num_attention_heads=5, rope_parameters=PLAIN),),
)
single_head = gqa._replace(
    summary="one head: softmax(q k) v and nothing else",
    traded="nothing is saved: the one head keeps and reads every token",
    Config=SingleHeadConfig,
    models=FrozenDict(
        {
            "a Llama-3.1-8B head": SingleHeadConfig(
                **{**LLAMA_8B, "num_attention_heads": 1, "num_key_value_heads": 1}, head_dim=128
            )
        }
    ),
    examples=(SingleHeadConfig(hidden_size=11, head_dim=7),),
)
