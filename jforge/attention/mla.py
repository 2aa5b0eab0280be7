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
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jforge import ops as jax_ops
from jforge.core import blocks, masks, rope
from jforge.core.attend import at_a_time, attend, einsum, over_queries
from jforge.core.attention import Attention
from jforge.core.config import Derived, FrozenDict, one_of, positive, positive_int, positive_ints
from jforge.core.norm import rms_norm
from jforge.core.params import Params
from jforge.core.spec import Buffer, CacheSpec, cache_class
from jforge.core.step import Queries, Tokens, all_of, append, begin, end, few_tokens
from jforge.cost import Work, seen


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


def queries(params: Params, cfg: Config, x: Tokens, positions) -> tuple[Array, Array]:
    """q_nope: B T N nope, q_rope: B T N R of the new tokens, rotated."""
    if cfg.q_lora_rank is None:
        q = einsum("btd,dnq->btnq", x, params["wq"])
    else:
        q = einsum("btl,lnq->btnq", query_latent(params, cfg, x), params["wq_b"])
    q_nope, q_rope = jnp.split(q, [cfg.qk_nope_head_dim], axis=-1)
    return q_nope, rope.apply_rope(q_rope, positions, cfg.rope_parameters, cfg.rope_layout)


def latents(params: Params, cfg: Config, x: Tokens, positions) -> tuple[Array, Array]:
    """latent: B T C, normed, and k_rope: B T R, rotated, of the new tokens."""
    down = einsum("btd,dc->btc", x, params["wkv_a"]) + (params["bkv_a"] if cfg.attention_bias else 0)
    latent, k_rope = jnp.split(down, [cfg.kv_lora_rank], axis=-1)
    latent = rms_norm(latent, params["kv_norm"], eps=cfg.rms_norm_eps)
    return latent, rope.apply_rope(k_rope[:, :, None], positions, cfg.rope_parameters, cfg.rope_layout)[:, :, 0]


def attend_naive(
    params: Params,
    cfg: Config,
    rows: Queries,
    latent: Float[Array, "B S C"],
    k_rope: Float[Array, "B S R"],
    picks: Int[Array, "B T L"] | None = None,
) -> Tokens:
    """Attention of `rows`, projected in and out, over keys and values expanded from the latents; slot s has token s.

    Heads in groups, of which one at a time has its keys and values expanded, and queries in blocks. picks: the slots
    that each query reads, if not all up to its own. Slots that no query sees may be NaN.
    """
    reach, S = jnp.where(rows.keep, rows.order, -1), latent.shape[1]
    # Blank before expanding: the gradient of wk_b sums over all slots.
    readable = (jnp.arange(S) <= reach.max(axis=1, initial=-1)[:, None])[..., None]
    latent, k_rope = jnp.where(readable, latent, 0), jnp.where(readable, k_rope, 0)

    def group(params):
        k, v = expand(params, latent, k_rope)

        def block(rows, keys):
            rows, picked, (k, v) = Queries(*rows[:4]), rows[4:], keys
            mask = masks.causal(rows.order[..., None], jnp.arange(k.shape[1])) & rows.keep[..., None]
            if picked:
                mask &= blocks.tokens_of(picked[0], 1, k.shape[1])
            q = jnp.concatenate(queries(params, cfg, rows.x, rows.positions), axis=-1).astype(k.dtype)
            out, _ = attend(q, k, v, mask, scale=cfg.scaling)
            return einsum("btnv,nvd->btd", out, params["wo"])

        picked = () if picks is None else (picks,)
        return over_queries(block, (*rows, *picked), k.shape[2] * k.shape[0] * S, (k, v), jnp.maximum(reach, 0))

    y = over_heads(group, params, cfg, k_rope.shape[0] * S)
    return y + params["bo"].astype(y.dtype) if cfg.attention_bias else y


def expand(params: Params, latent: Float[Array, "B S C"], k_rope: Float[Array, "B S R"]) -> tuple[Array, Array]:
    """k: B S N (nope + R), v: B S N V of the heads in `params`."""
    k_nope = einsum("bsc,cnh->bsnh", latent, params["wk_b"])
    shared = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
    k = jnp.concatenate([k_nope, shared.astype(k_nope.dtype)], axis=-1)
    return k, einsum("bsc,cnv->bsnv", latent, params["wv_b"])


HEADS = {"wq": 1, "wq_b": 1, "wk_b": 1, "wv_b": 1, "wo": 0}
"""The axis of the heads in each parameter that has one."""


def over_heads(group: Callable, params: Params, cfg: Config, slots: int) -> Tokens:
    """The sum of group(params of some heads) over as many heads at a time as have at most SCORES numbers expanded."""
    N, width = cfg.num_attention_heads, cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim
    size = max(n for n in range(1, N + 1) if N % n == 0 and n <= at_a_time(slots * width))
    if size == N:
        return group(params)

    def of(first) -> Params:
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=size)
        return params | {name: cut(params[name], axis=axis) for name, axis in HEADS.items() if name in params}

    def step(y, first):
        return y + jax.checkpoint(group)(of(first)), None

    starts = jnp.arange(0, N, size)
    y = jax.eval_shape(group, jax.eval_shape(of, starts[0]))
    return jax.lax.scan(step, jnp.zeros(y.shape, y.dtype), starts)[0]


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
    rows = all_of(cfg, x, positions)
    return attend_naive(params, cfg, rows, *latents(params, cfg, rows.x, rows.positions)).astype(x.dtype)


def prefill(params: Params, cfg: Config, x: Tokens, cache: LatentCache, lengths=None) -> tuple[Tokens, LatentCache]:
    """Append T tokens (row b its first lengths[b]); naive form over the stored, so rounded, latents."""
    step = begin(cfg, cache_spec(cfg), x, cache, lengths)
    latent, k_rope = latents(params, cfg, step.x, step.positions)
    cache = append(cache, step, latent=latent, k_rope=k_rope)
    return end(step, attend_naive(params, cfg, step.queries, cache.latent, cache.k_rope), x.dtype), cache


def decode(params: Params, cfg: Config, x: Tokens, cache: LatentCache, ops=jax_ops) -> tuple[Tokens, LatentCache]:
    """Append 1 to 16 tokens a row and attend in the absorbed form through `ops.decode_mla`."""
    step = begin(cfg, cache_spec(cfg), few_tokens(x), cache)
    q_nope, q_rope = queries(params, cfg, step.x, step.positions)
    latent, k_rope = latents(params, cfg, step.x, step.positions)
    cache = append(cache, step, latent=latent, k_rope=k_rope)
    out = attend_absorbed(params, cfg, q_nope, q_rope, cache, ops.decode_mla, cache.length, x.dtype)
    return end(step, project_out(params, cfg, out), x.dtype), cache


def cache_spec(cfg: Config) -> CacheSpec:
    latent = Buffer(("B", "S", "C"), (cfg.kv_lora_rank,))
    return CacheSpec(LatentCache, {"latent": latent, "k_rope": Buffer(("B", "S", "R"), (cfg.qk_rope_head_dim,))})


def flops(cfg: Config, pairs: int) -> int:
    """2 N ((C + R) + C) for each pair of a query and a token that it sees, in the absorbed form."""
    return 2 * cfg.num_attention_heads * (2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim) * pairs


def naive_flops(cfg: Config, pairs: int) -> int:
    """2 N (nope + R + V) for each, in the form of prefill; the expansion is a projection and not counted."""
    return 2 * cfg.num_attention_heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim) * pairs


def work(cfg: Config, context: int, capacity: int, new: int, closing: bool) -> Work:
    """C + R elements of every new token are written, those of all tokens read once."""
    pairs = seen(context, new)
    count = flops(cfg, pairs) if new == 1 else naive_flops(cfg, pairs)
    return Work({"latent": context, "k_rope": context}, {"latent": new, "k_rope": new}, count, context)


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
