"""Multi-head latent attention (MLA): the cache holds one latent and one rotary key a token, shared by all heads.

    c_q = norm(x Wq_a)                 q = c_q Wq_b  (or q = x Wq)      per head [q_nope | q_rope]
    [latent | k_rope] = x Wkv_a        latent <- norm(latent)           k_rope is not normed
    q_rope, k_rope <- RoPE
    naive:     k_sn = [latent_s Wk_b_n | k_rope_s]    v_sn = latent_s Wv_b_n    out_n = softmax(scale q_n . k_n) v_n
    absorbed:  logits (Wk_b_n^T q_nope_n) . latent_s + q_rope_n . k_rope_s      out_n = (softmax latent) Wv_b_n
    y = out Wo

The two forms are equal in exact arithmetic. forward and prefill take the naive one, 2(nope + R) + 2V flops a pair of
query and key; decode the absorbed one, 2(C + R) + 2C, which reads the cache as it lies: (C + R) elements a token.
Sources: DeepSeek-V2 (arXiv 2405.04434), V3 (2412.19437), Kimi-K2; without RoPE the full layers of Kimi-Linear.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jforge import ops as jax_ops
from jforge.core import rope
from jforge.core.attend import attend, einsum
from jforge.core.attention import Attention, causal
from jforge.core.config import Derived, FrozenDict, one_of, positive, positive_int, positive_ints
from jforge.core.norm import rms_norm
from jforge.core.params import Params
from jforge.core.spec import Buffer, CacheSpec, cache_class
from jforge.core.step import Tokens, append, begin, end, few_tokens, in_order
from jforge.cost import Work


@dataclass(frozen=True, kw_only=True)
class Config(Derived):
    """Field names follow Hugging Face's deepseek_v3.

    hidden_size: D, of the activations
    num_attention_heads: N
    q_lora_rank: of the query latent; None: q straight from x (V2-Lite, Kimi-Linear)
    kv_lora_rank: C, of the latent that is cached
    qk_nope_head_dim: channels of a query head without rotation
    qk_rope_head_dim: R, channels of a query head that turn, and of the one rotary key
    v_head_dim: V
    attention_bias: on wq_a, wkv_a and wo
    rms_norm_eps: of the latent norms: Hugging Face uses 1e-6 there whatever the model's eps
    rope_parameters: as in config.json, {"rope_type": "default", "rope_theta": 1e4}; or linear, llama3, yarn. None: the
        rope slice exists and is not rotated, so no positions at all (NoPE)
    rope_layout: "interleaved" pairs channels 2j and 2j + 1, "half" j and j + R/2
    scaling: of the logits; None: (nope + R) ** -0.5 * m ** 2, m from yarn's mscale_all_dim
    """

    hidden_size: int
    num_attention_heads: int
    q_lora_rank: int | None = None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    attention_bias: bool = False
    rms_norm_eps: float = 1e-6
    rope_parameters: Mapping[str, Any] | None = None
    rope_layout: str = "interleaved"
    scaling: float | None = None

    def __post_init__(self):
        positive_ints(self, "hidden_size", "num_attention_heads", "kv_lora_rank")
        positive_ints(self, "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        if self.q_lora_rank is not None:
            positive_int("q_lora_rank", self.q_lora_rank)
        positive("rms_norm_eps", self.rms_norm_eps)
        one_of("rope_layout", self.rope_layout, rope.LAYOUTS)
        object.__setattr__(self, "rope_parameters", rope.freeze(self.rope_parameters))
        if self.rope_parameters is not None:
            rope.rotary_dim(self.rope_parameters, self.qk_rope_head_dim)
        self._derive("scaling", self._softmax_scale())
        positive("scaling", self.scaling)

    def _softmax_scale(self) -> float:
        """DeepSeek scales the logits by m^2 and, as mscale = mscale_all_dim there, cos and sin by 1."""
        plain = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        p = self.rope_parameters or {}
        if p.get("rope_type", "default") == "default" or not p.get("mscale_all_dim"):
            return plain
        return plain * rope.yarn_magnitude(p["factor"], p["mscale_all_dim"]) ** 2


@cache_class
class LatentCache:
    """Latents after their norm, rotary keys after RoPE; slot s holds token s."""

    latent: jax.Array  # B S C
    k_rope: jax.Array  # B S R
    length: jax.Array  # int32[B]


def shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """{parameter: shape} of a Config."""
    D, N, C, R, V = cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank, cfg.qk_rope_head_dim, cfg.v_head_dim
    nope, L = cfg.qk_nope_head_dim, cfg.q_lora_rank
    if L is None:
        out = {"wq": (D, N, nope + R)}
    else:
        out = {"wq_a": (D, L), "q_norm": (L,), "wq_b": (L, N, nope + R)}
    out |= {"wkv_a": (D, C + R), "kv_norm": (C,), "wk_b": (C, N, nope), "wv_b": (C, N, V), "wo": (N, V, D)}
    if cfg.attention_bias:
        out |= {"bkv_a": (C + R,), "bo": (D,)} | ({} if L is None else {"bq_a": (L,)})
    return out


def query_latent(params: Params, cfg: Config, x: Tokens) -> Float[Array, "B T L"]:
    """The normed low-rank query, where there is one (DSA's indexer reads it too)."""
    down = einsum("btd,dl->btl", x, params["wq_a"]) + (params["bq_a"] if cfg.attention_bias else 0)
    return rms_norm(down, params["q_norm"], eps=cfg.rms_norm_eps)


def project(params: Params, cfg: Config, x: Tokens, positions) -> tuple[Array, Array, Array, Array]:
    """q_nope: B T N nope, q_rope: B T N R, latent: B T C, k_rope: B T R of the new tokens, normed and rotated."""
    if cfg.q_lora_rank is None:
        q = einsum("btd,dnq->btnq", x, params["wq"])
    else:
        q = einsum("btl,lnq->btnq", query_latent(params, cfg, x), params["wq_b"])
    q_nope, q_rope = jnp.split(q, [cfg.qk_nope_head_dim], axis=-1)
    down = einsum("btd,dc->btc", x, params["wkv_a"]) + (params["bkv_a"] if cfg.attention_bias else 0)
    latent, k_rope = jnp.split(down, [cfg.kv_lora_rank], axis=-1)
    latent = rms_norm(latent, params["kv_norm"], eps=cfg.rms_norm_eps)
    q_rope = rope.apply_rope(q_rope, positions, cfg.rope_parameters, cfg.rope_layout)
    k_rope = rope.apply_rope(k_rope[:, :, None], positions, cfg.rope_parameters, cfg.rope_layout)[:, :, 0]
    return q_nope, q_rope, latent, k_rope


def attend_naive(
    params: Params,
    cfg: Config,
    q_nope: Float[Array, "B T N nope"],
    q_rope: Float[Array, "B T N R"],
    latent: Float[Array, "B S C"],
    k_rope: Float[Array, "B S R"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N V"]:
    """Attention over the keys and values of every head, expanded from the latents. Unseen slots may be NaN."""
    readable = mask.any(axis=1)[..., None]  # blank before expanding: the gradient of wk_b sums over all slots
    latent, k_rope = jnp.where(readable, latent, 0), jnp.where(readable, k_rope, 0)
    k_nope = einsum("bsc,cnh->bsnh", latent, params["wk_b"])
    shared = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
    k = jnp.concatenate([k_nope, shared.astype(k_nope.dtype)], axis=-1)
    v = einsum("bsc,cnv->bsnv", latent, params["wv_b"])
    out, _ = attend(jnp.concatenate([q_nope, q_rope], axis=-1), k, v, mask, scale=cfg.scaling)
    return out


def attend_absorbed(
    params: Params,
    cfg: Config,
    q_nope: Float[Array, "B T N nope"],
    q_rope: Float[Array, "B T N R"],
    cache: LatentCache,
    op: Callable,
    which: Int[Array, "B"] | Int[Array, "B T L"],
    out_dtype=None,
) -> Float[Array, "B T N V"]:
    """The same over the latents as they lie in the cache: no key or value is expanded.

    op: `decode_mla`, which = the rows' lengths, or `decode_sparse_mla`, which = the slots to read.
    """
    dtype, more = cache.latent.dtype, {"scale": cfg.scaling, "out_dtype": out_dtype}
    q_latent = einsum("btnh,cnh->btnc", q_nope, params["wk_b"]).astype(dtype)
    out, _ = op(q_latent, q_rope.astype(dtype), cache.latent, cache.k_rope, which, **more)
    return einsum("btnc,cnv->btnv", out, params["wv_b"])


def project_out(params: Params, cfg: Config, out: Float[Array, "B T N V"]) -> Tokens:
    y = einsum("btnv,nvd->btd", out, params["wo"])
    return y + params["bo"].astype(y.dtype) if cfg.attention_bias else y


def forward(params: Params, cfg: Config, x: Tokens, positions=None) -> Tokens:
    """The definition, in the naive form. `positions` (int B T, default 0..T-1) feed RoPE only."""
    order, positions = in_order(cfg, x, positions)
    parts = project(params, cfg, x, positions)
    out = attend_naive(params, cfg, *parts, causal(cfg, order[..., None], order[:, None]))
    return project_out(params, cfg, out).astype(x.dtype)


def prefill(params: Params, cfg: Config, x: Tokens, cache: LatentCache, lengths=None) -> tuple[Tokens, LatentCache]:
    """Append T tokens (row b its first lengths[b]); naive form over the stored, so rounded, latents."""
    step = begin(cfg, cache_spec(cfg), x, cache, lengths)
    q_nope, q_rope, latent, k_rope = project(params, cfg, step.x, step.positions)
    cache = append(cache, step, latent=latent, k_rope=k_rope)
    mask = causal(cfg, step.positions[..., None], jnp.arange(cache.latent.shape[1])) & step.keep[..., None]
    q_nope, q_rope = q_nope.astype(cache.latent.dtype), q_rope.astype(cache.latent.dtype)
    out = attend_naive(params, cfg, q_nope, q_rope, cache.latent, cache.k_rope, mask)
    return end(step, project_out(params, cfg, out), x.dtype), cache


def decode(params: Params, cfg: Config, x: Tokens, cache: LatentCache, ops=jax_ops) -> tuple[Tokens, LatentCache]:
    """Append 1 to 16 tokens a row and attend in the absorbed form through `ops.decode_mla`."""
    step = begin(cfg, cache_spec(cfg), few_tokens(x), cache)
    q_nope, q_rope, latent, k_rope = project(params, cfg, step.x, step.positions)
    cache = append(cache, step, latent=latent, k_rope=k_rope)
    out = attend_absorbed(params, cfg, q_nope, q_rope, cache, ops.decode_mla, cache.length, x.dtype)
    return end(step, project_out(params, cfg, out), x.dtype), cache


def cache_spec(cfg: Config) -> CacheSpec:
    latent = Buffer(("B", "S", "C"), (cfg.kv_lora_rank,))
    return CacheSpec(LatentCache, {"latent": latent, "k_rope": Buffer(("B", "S", "R"), (cfg.qk_rope_head_dim,))})


def flops(cfg: Config, tokens: int) -> int:
    """2 N ((C + R) + C) for each token, in the absorbed form."""
    return 2 * cfg.num_attention_heads * (2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim) * tokens


def work(cfg: Config, context: int, capacity: int, closing: bool) -> Work:
    """One step writes C + R elements and reads those of all tokens once."""
    return Work({"latent": context, "k_rope": context}, {"latent": 1, "k_rope": 1}, flops(cfg, context), context)


_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 4096,
         "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
_V3 = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}

mla = Attention(
    summary="one latent and one rotary key a token for all heads (DeepSeek-V2/V3, Kimi-K2)",
    traded="arithmetic for bytes: heads share one latent, which each of them multiplies out (or absorbs) anew",
    Config=Config, shapes=shapes, cache_spec=cache_spec, work=work,
    forward=forward, prefill=prefill, decode=decode,
    models=FrozenDict({
        "DeepSeek-V3": Config(**_V3, hidden_size=7168, num_attention_heads=128, q_lora_rank=1536,
                              rope_parameters=_YARN),
        "Kimi-Linear": Config(hidden_size=2304, num_attention_heads=32, **_V3),
    }),
    examples=(
        Config(hidden_size=22, num_attention_heads=3, q_lora_rank=10, kv_lora_rank=12, qk_nope_head_dim=7,
               qk_rope_head_dim=6, v_head_dim=5, attention_bias=True,
               rope_parameters={**_YARN, "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7}),
        Config(hidden_size=20, num_attention_heads=4, kv_lora_rank=9, qk_nope_head_dim=5, qk_rope_head_dim=4,
               v_head_dim=6),
    ),
)  # fmt: skip
