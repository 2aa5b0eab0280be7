"""Dense attention: single head, MHA, MQA and GQA are one code path with G = N / K.

    q = x Wq (+bq)   k = x Wk (+bk)   v = x Wv (+bv)          N query heads, K key/value heads
    q, k <- RMSNorm (per head, or over all heads), then RoPE
    out_t = sum_{s <= t} softmax_s(cap(scale * q_t . k_s)) v_s       query head n reads KV head n // G
    y = (out * sigmoid(x Wg)) Wo (+bo)                        the gate only where the model has one

Cache: k and v after norm and RoPE, 2 K H elements a token. A decode step appends one slot and reads them all.
Sources: Vaswani et al. 2017 (MHA), Shazeer 2019 (MQA), Ainslie et al. 2023 (GQA); options as in the Hugging Face
modules of llama, qwen2, qwen3, qwen3_next, gemma2, gemma3, olmo2, falcon and minimax_m2.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jforge import ops as jax_ops
from jforge.core import masks, rope
from jforge.core.attend import attend, einsum, over_queries
from jforge.core.attention import Attention
from jforge.core.config import Derived, FrozenDict, one_of, positive, positive_ints, reject, within
from jforge.core.norm import rms_norm
from jforge.core.params import Drawn, Params
from jforge.core.softmax import CAPS, common
from jforge.core.spec import Buffer, CacheSpec, cache_class
from jforge.core.step import Queries, Tokens, all_of, append, begin, end, few_tokens
from jforge.cost import Work, seen


@dataclass(frozen=True, kw_only=True)
class Config(Derived):
    """GQA. Names follow Hugging Face; where a default is given after `None:`, None picks it.

    hidden_size: D, of the activations
    num_attention_heads: N, of the queries
    num_key_value_heads: K, a divisor of N; None: num_attention_heads
    head_dim: H, of queries and keys; None: hidden_size // num_attention_heads
    v_head_dim: V, of values; None: head_dim
    attention_bias: on q, k and v (Qwen2)
    attention_output_bias: on o (gpt-oss)
    qk_norm: "head": one weight for all heads (Qwen3); "flat": over N H and K H channels (OLMo-2); None: no norm
    norm_offset: 1.0 for Gemma's (1 + w)
    rms_norm_eps: of the norms of q and k
    rope_parameters: as in config.json, {"rope_type": "default", "rope_theta": 1e4}; or linear, llama3, yarn, and with
        partial_rotary_factor if not all channels turn. None: no positions at all (NoPE)
    rope_layout: "half" pairs channels j and j + r/2 (Hugging Face), "interleaved" 2j and 2j + 1
    scaling: of the logits; None: head_dim ** -0.5
    attn_logit_softcapping: c, logits become c tanh(logit / c) (Gemma 2); None: no cap
    attn_output_gate: a sigmoid gate on the heads' outputs (Qwen3-Next)
    """

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    v_head_dim: int | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    qk_norm: str | None = None
    norm_offset: float = 0.0
    rms_norm_eps: float = 1e-6
    rope_parameters: Mapping[str, Any] | None = None
    rope_layout: str = "half"
    scaling: float | None = None
    attn_logit_softcapping: float | None = None
    attn_output_gate: bool = False

    def __post_init__(self):
        positive_ints(self, "hidden_size", "num_attention_heads")
        heads = self.num_attention_heads
        self._derive("num_key_value_heads", heads)
        self._derive("head_dim", None if self.hidden_size % heads else self.hidden_size // heads)
        if self.head_dim is None:
            reject(
                "head_dim", None, f"given: hidden_size={self.hidden_size} is no multiple of num_attention_heads={heads}"
            )
        self._derive("v_head_dim", self.head_dim)
        positive_ints(self, "num_key_value_heads", "head_dim", "v_head_dim")
        self._derive("scaling", self.head_dim**-0.5)
        if heads % self.num_key_value_heads:
            reject("num_attention_heads", heads, f"a multiple of num_key_value_heads={self.num_key_value_heads}")
        one_of("qk_norm", self.qk_norm, (None, "head", "flat"))
        one_of("rope_layout", self.rope_layout, rope.LAYOUTS)
        positive("scaling", self.scaling)
        positive("rms_norm_eps", self.rms_norm_eps)
        if self.attn_logit_softcapping is not None:
            within("attn_logit_softcapping", self.attn_logit_softcapping, *CAPS)
        object.__setattr__(self, "rope_parameters", rope.freeze(self.rope_parameters))
        if self.rope_parameters is not None:
            rope.rotary_dim(self.rope_parameters, self.head_dim)


@dataclass(frozen=True, kw_only=True)
class MHAConfig(Config):
    """As many key/value heads as query heads.

    num_key_value_heads: num_attention_heads, or None
    """

    def __post_init__(self):
        super().__post_init__()
        if self.num_key_value_heads != self.num_attention_heads:
            allowed = f"num_attention_heads={self.num_attention_heads} in mha"
            reject("num_key_value_heads", self.num_key_value_heads, allowed)


@dataclass(frozen=True, kw_only=True)
class MQAConfig(Config):
    """One key/value head for all query heads.

    num_key_value_heads: 1
    """

    num_key_value_heads: int | None = 1

    def __post_init__(self):
        super().__post_init__()
        one_of("num_key_value_heads", self.num_key_value_heads, (1,))


@dataclass(frozen=True, kw_only=True)
class SingleHeadConfig(MHAConfig):
    """One query head, one key/value head.

    num_attention_heads: 1
    """

    num_attention_heads: int = 1

    def __post_init__(self):
        super().__post_init__()
        one_of("num_attention_heads", self.num_attention_heads, (1,))


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
    if cfg.attention_output_bias:
        out |= {"bo": (D,)}
    if cfg.qk_norm == "head":
        out |= {"q_norm": norm_weight(cfg, H), "k_norm": norm_weight(cfg, H)}
    if cfg.qk_norm == "flat":
        out |= {"q_norm": norm_weight(cfg, N, H), "k_norm": norm_weight(cfg, K, H)}
    if cfg.attn_output_gate:
        out |= {"wg": (D, N, V)}
    return out


def norm_weight(cfg: Config, *shape: int) -> Drawn:
    """The shape of a norm's weight, drawn about what leaves a normed vector as it is."""
    return Drawn(*shape, mean=1 - cfg.norm_offset)


def queries(params: Params, cfg: Config, x: Tokens) -> Float[Array, "B T N H"]:
    """q of the new tokens, normed, before RoPE."""
    q = _linear(params, cfg, x, "q")
    return _normed(params, cfg, q, "q_norm")


def keys_values(params: Params, cfg: Config, x: Tokens) -> tuple[Array, Array]:
    """k: B T K H, v: B T K V of the new tokens, normed, before RoPE."""
    k, v = (_linear(params, cfg, x, which) for which in "kv")
    return _normed(params, cfg, k, "k_norm"), v


def _linear(params: Params, cfg: Config, x: Tokens, which: str) -> Array:
    heads = einsum("btd,dnh->btnh", x, params[f"w{which}"])
    return heads + params[f"b{which}"] if cfg.attention_bias else heads


def _normed(params: Params, cfg: Config, heads: Array, norm: str) -> Array:
    if not cfg.qk_norm:
        return heads
    return rms_norm(heads, params[norm], eps=cfg.rms_norm_eps, offset=cfg.norm_offset)


def qkv(params: Params, cfg: Config, x: Tokens) -> tuple[Array, Array, Array]:
    """q: B T N H, k: B T K H, v: B T K V of the new tokens, normed, before RoPE."""
    return queries(params, cfg, x), *keys_values(params, cfg, x)


def rotate(cfg: Config, x: Float[Array, "B T N H"], positions: Int[Array, "B T"]) -> Float[Array, "B T N H"]:
    """RoPE of queries or keys at `positions`."""
    return rope.apply_rope(x, positions, cfg.rope_parameters, cfg.rope_layout)


def project(params: Params, cfg: Config, x: Tokens, positions) -> tuple[Array, Array, Array]:
    """q: B T N H, k: B T K H, v: B T K V of the new tokens, normed and rotated."""
    q, k, v = qkv(params, cfg, x)
    return rotate(cfg, q, positions), rotate(cfg, k, positions), v


def project_out(params: Params, cfg: Config, x: Tokens, out: Float[Array, "B T N V"]) -> Array:
    """Gate, output projection, bias: B T D."""
    if cfg.attn_output_gate:
        out, gate = common(out, jax.nn.sigmoid(einsum("btd,dnv->btnv", x, params["wg"])))
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
    return rotate(cfg, k, rows.positions), v


def attend_over(params: Params, cfg: Config, rows: Queries, k: Array, v: Array, mask: Callable) -> Tokens:
    """Attention of `rows` over slots of k and v, projected in and out, in blocks of queries; slot s has token s.

    mask(q, rows, S): which of the first S slots a block sees, bool B t S or B t N S; none after a query's own.
    `sinks` in params join the softmax.
    """

    def block(rows, keys):
        rows, (k, v) = Queries(*rows), keys
        q = rotate(cfg, queries(params, cfg, rows.x), rows.positions).astype(k.dtype)
        seen = mask(q, rows, k.shape[1])
        seen &= jnp.expand_dims(rows.keep, tuple(range(2, seen.ndim)))
        out, _ = attend(q, k, v, seen, **options(params, cfg))
        return project_out(params, cfg, rows.x, out).astype(rows.x.dtype)

    numbers = cfg.num_attention_heads * k.shape[0] * k.shape[1]
    return over_queries(block, rows, numbers, (k, v), jnp.where(rows.keep, rows.order, 0))


def options(params: Params, cfg: Config) -> dict[str, Any]:
    """What `attend` and the decode ops are told beside their arrays."""
    return {"scale": cfg.scaling, "softcap": cfg.attn_logit_softcapping, "sinks": params.get("sinks")}


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


def kv_buffers(cfg: Config, window: int | None = None) -> dict[str, Buffer]:
    """k and v, with a slot a token or as a ring of `window` slots."""
    K, axis = cfg.num_key_value_heads, "S" if window is None else "W"
    k = Buffer(("B", axis, "K", "H"), (K, cfg.head_dim), limit=window)
    return {"k": k, "v": Buffer(("B", axis, "K", "V"), (K, cfg.v_head_dim), limit=window)}


def cache_spec(cfg: Config) -> CacheSpec:
    return CacheSpec(KVCache, kv_buffers(cfg))


def flops(cfg: Config, pairs: int) -> int:
    """2 N (H + V) for each pair of a query, of all heads, and a key that it sees."""
    return 2 * cfg.num_attention_heads * (cfg.head_dim + cfg.v_head_dim) * pairs


def work_on(cfg: Config, slots: int, written: int, pairs: int) -> Work:
    """A call that reads so many slots of k and v and writes so many, in which so many pairs of query and key meet."""
    return Work({"k": slots, "v": slots}, {"k": written, "v": written}, flops(cfg, pairs), slots)


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
    forward=forward, prefill=prefill, decode=decode, visible=visible,
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
    ),
)  # fmt: skip
mha = gqa._replace(
    summary="multi-head: every query head has its own keys and values (Vaswani et al. 2017, OLMo-2)",
    traded="nothing is saved: every head keeps and reads keys and values of its own",
    Config=MHAConfig,
    models=FrozenDict({"Llama-2-7B": MHAConfig(hidden_size=4096, num_attention_heads=32, rms_norm_eps=1e-5,
                                               rope_parameters=PLAIN)}),
    examples=(MHAConfig(hidden_size=21, num_attention_heads=3, head_dim=6,
                        rope_parameters={**PLAIN, "rope_type": "linear", "factor": 2.0}),),
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
