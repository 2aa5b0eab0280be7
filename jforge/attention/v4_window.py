"""DeepSeek-V4's attention without compression (v4_window), and what csa and hca share with it.

    c_q = norm(x Wq_a)    q = c_q Wq_b, each head divided by its rms    kv = norm(x Wkv), one head for all N
    q, kv <- interleaved RoPE on their last R channels
    p     = softmax over s in t-W+1 .. t of H^-1/2 q_t . kv_s, with one more logit sigma_n that has no value
    o     = sum over s of p_s kv_s, then turned back by -t on its last R channels
    y     = concat_gamma(o_gamma Wo_a,gamma) Wo_b      gamma: one of g groups of N/g heads

Key and value are one stored vector, its rotation included. So the value of token s carries R(s), and turning the sum
back by the query's position leaves R(s - t): relative positions in the values as well.

The cache is a ring of the last W vectors, the token at position p in slot p mod W. Layers of this kind turn with base
1e4; csa and hca layers with 1.6e5 and YaRN, the window's vectors there included. YaRN's magnitude factor is not used.

Sources: DeepSeek-V4 (arXiv 2606.19348), its inference code, transformers' deepseek_v4.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jforge import ops as jax_ops
from jforge.core import masks, ring, rope
from jforge.core.attend import attend, einsum, over_queries
from jforge.core.attention import Attention
from jforge.core.config import Described, FrozenDict, positive, positive_ints, reject
from jforge.core.norm import rms_norm
from jforge.core.params import Drawn, Params
from jforge.core.softmax import accumulation_dtype
from jforge.core.spec import Buffer, CacheSpec, cache_class
from jforge.core.step import Queries, Step, Tokens, all_of, begin, end, few_tokens, one_by_one, several
from jforge.cost import Work, seen


@dataclass(frozen=True, kw_only=True)
class Config(Described):
    """Field names follow Hugging Face's deepseek_v4.

    hidden_size: D, of the activations
    num_attention_heads: N
    head_dim: H, of a query head and of the vectors that are key and value of all heads
    qk_rope_head_dim: R, the last channels of a head, those that turn; head_dim times partial_rotary_factor
    q_lora_rank: of the query latent
    o_groups: g, groups of heads in the output projection, a divisor of N
    o_lora_rank: of a group's output
    sliding_window: W, vectors of single tokens that a query sees, its own included
    rms_norm_eps: of all norms
    rope_parameters: as in config.json, {"rope_type": "default", "rope_theta": 1e4}; or yarn, without a factor on cos
        and sin. None: no positions at all (NoPE)
    """

    hidden_size: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    rms_norm_eps: float = 1e-6
    rope_parameters: Mapping[str, Any] | None = None

    def __post_init__(self):
        positive_ints(self, "hidden_size", "num_attention_heads", "head_dim", "qk_rope_head_dim", "q_lora_rank")
        positive_ints(self, "o_groups", "o_lora_rank", "sliding_window")
        positive("rms_norm_eps", self.rms_norm_eps)
        if self.qk_rope_head_dim % 2 or self.qk_rope_head_dim > self.head_dim:
            reject("qk_rope_head_dim", self.qk_rope_head_dim, f"even and at most head_dim={self.head_dim}")
        if self.num_attention_heads % self.o_groups:
            reject("num_attention_heads", self.num_attention_heads, f"a multiple of o_groups={self.o_groups}")
        object.__setattr__(self, "rope_parameters", _unscaled(rope.freeze(self.rope_parameters)))

    @property
    def scaling(self) -> float:
        """The softmax scale: YaRN does not change it."""
        return self.head_dim**-0.5


def _unscaled(parameters: FrozenDict | None) -> FrozenDict | None:
    """YaRN with a factor of 1 on cos and sin: with another one, turning back would not undo turning."""
    if parameters is None or parameters["rope_type"] != "yarn":
        return parameters
    if (factor := parameters.get("attention_factor", 1.0)) != 1:
        reject("attention_factor", factor, "1, as DeepSeek-V4 leaves the magnitude alone")
    return FrozenDict({**parameters, "attention_factor": 1.0})


@cache_class
class WindowCache:
    """Vectors after norm and RoPE, keys and values in one; the token at position p in slot p mod W."""

    kv: jax.Array  # B W H
    length: jax.Array  # int32[B]


def shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """{parameter: shape} that all three kinds of layers have. The fan-in of wo_a is N/g H, that of wo_b g O."""
    D, N, H, g, O = cfg.hidden_size, cfg.num_attention_heads, cfg.head_dim, cfg.o_groups, cfg.o_lora_rank  # noqa: E741
    out = {"wq_a": (D, cfg.q_lora_rank), "q_norm": (cfg.q_lora_rank,), "wq_b": (cfg.q_lora_rank, N, H)}
    out |= {"wkv": (D, H), "kv_norm": (H,), "sinks": (N,)}
    wo_a = Drawn(g, N // g, H, O, gains=((g / (N // g * H)) ** 0.5,))
    return out | {"wo_a": wo_a, "wo_b": Drawn(g, O, D, gains=(O**-0.5,))}


def rotate(cfg: Config, x: Float[Array, "B T N H"], positions: Int[Array, "B T"]) -> Float[Array, "B T N H"]:
    """Interleaved RoPE on the last R channels; negative positions turn back."""
    still, turned = x[..., : -cfg.qk_rope_head_dim], x[..., -cfg.qk_rope_head_dim :]
    turned = rope.apply_rope(turned, positions, cfg.rope_parameters, "interleaved", dim=cfg.qk_rope_head_dim)
    return jnp.concatenate([still, turned], axis=-1)


def query_latent(params: Params, cfg: Config, x: Tokens) -> Float[Array, "B T L"]:
    """c_q: what the queries (in csa the indexer's too) are made from."""
    return rms_norm(einsum("btd,dl->btl", x, params["wq_a"]), params["q_norm"], eps=cfg.rms_norm_eps)


def queries(params: Params, cfg: Config, latent: Float[Array, "B T L"], positions) -> Float[Array, "B T N H"]:
    """q, each head divided by its rms, rotated."""
    q = einsum("btl,lnh->btnh", latent, params["wq_b"])
    return rotate(cfg, rms_norm(q, jnp.ones(cfg.head_dim, q.dtype), eps=cfg.rms_norm_eps), positions)


def key_value(params: Params, cfg: Config, x: Tokens, positions) -> Float[Array, "B T H"]:
    """The vectors that are key and value of all heads, normed and rotated."""
    kv = rms_norm(einsum("btd,dh->bth", x, params["wkv"]), params["kv_norm"], eps=cfg.rms_norm_eps)
    return rotate(cfg, kv[:, :, None], positions)[:, :, 0]


def project(params: Params, cfg: Config, x: Tokens, positions) -> tuple[Array, Array, Array]:
    """q: B T N H and kv: B T H, and between them the query latent: B T L."""
    latent = query_latent(params, cfg, x)
    return queries(params, cfg, latent, positions), latent, key_value(params, cfg, x, positions)


def project_out(params: Params, cfg: Config, out: Float[Array, "B T N H"], positions) -> Tokens:
    """Turn back by the queries' positions, then down group by group, then to the model's width."""
    B, T, N, H = out.shape
    grouped = rotate(cfg, out, -positions).reshape(B, T, cfg.o_groups, N // cfg.o_groups, H)
    down = einsum("btgnh,gnho->btgo", grouped, params["wo_a"])
    return einsum("btgo,god->btd", down, params["wo_b"])


def attend_shared(
    params: Params, cfg: Config, q: Float[Array, "B T N H"], kv: Float[Array, "B S H"], mask: Bool[Array, "#B T S"]
) -> Float[Array, "B T N H"]:
    """One softmax, sinks included, over vectors that are key and value of all heads. float32 or wider."""
    return attend(q, kv[:, :, None], kv[:, :, None], mask, scale=cfg.scaling, sinks=params["sinks"])[0]


def visible(cfg: Config, q_pos: Array, k_pos: Array) -> Array:
    """The last W tokens up to the query's own."""
    return masks.window(q_pos, k_pos, cfg.sliding_window)


def forward(params: Params, cfg: Config, x: Tokens, positions=None) -> Tokens:
    """The definition. `positions` (int B T, default 0..T-1) feed RoPE only."""
    rows = all_of(cfg, x, positions)
    kv = key_value(params, cfg, rows.x, rows.positions)
    return attend_over(params, cfg, rows, ring.in_order(rows.order, kv))


def attend_over(
    params: Params,
    cfg: Config,
    rows: Queries,
    recent: ring.Recent,
    entries: Float[Array, "B E H"] | None = None,
    far: Callable[[Queries, Array], Bool[Array, "B t E"]] | None = None,
    more: int = 0,
) -> Tokens:
    """Attention of `rows`, projected in and out, in blocks of queries: one softmax over their windows and `entries`.

    far(rows, query latent): the entries that a block sees; more: numbers that it scores a query for this.
    """

    def block(rows, _):
        rows = Queries(*rows)
        latent = query_latent(params, cfg, rows.x)
        positions, kv = recent.around(rows.order, cfg.sliding_window)
        seen = visible(cfg, rows.order[..., None], positions[:, None]) & rows.keep[..., None]
        if entries is not None:
            kv = jnp.concatenate([kv, entries], axis=1)
            seen = jnp.concatenate([seen, far(rows, latent) & rows.keep[..., None]], axis=-1)
        q = queries(params, cfg, latent, rows.positions).astype(kv.dtype)
        out = attend_shared(params, cfg, q, kv, seen)
        return project_out(params, cfg, out, rows.positions).astype(rows.x.dtype)

    heads, count = cfg.num_attention_heads, 0 if entries is None else entries.shape[1]
    numbers = recent.numbers(heads, cfg.sliding_window) + heads * rows.x.shape[0] * count
    return over_queries(block, rows, numbers + rows.x.shape[0] * more)


def attend_ring(params: Params, cfg: Config, q: Float[Array, "B 1 N H"], kv: Array, step: Step, ops):
    """(out, lse) of one token a row over its window, sinks included; the ring holds nothing else, so no mask."""
    filled = jnp.minimum(step.length, kv.shape[1])
    more = {"scale": cfg.scaling, "sinks": params["sinks"], "out_dtype": accumulation_dtype(step.x)}
    return ops.decode_attention(q, kv[:, :, None], kv[:, :, None], filled, **more)


def prefill(params: Params, cfg: Config, x: Tokens, cache: WindowCache, lengths=None) -> tuple[Tokens, WindowCache]:
    """Attend over the old ring and the new tokens (as stored, so rounded), then write those that stay in the ring."""
    step = begin(cfg, cache_spec(cfg), x, cache, lengths)
    kv = key_value(params, cfg, step.x, step.positions)
    y = attend_over(params, cfg, step.queries, ring.beside(step, cache.length, (cache.kv, kv)))
    return end(step, y, x.dtype), ring.write(cache, step, kv=kv)


def decode(params: Params, cfg: Config, x: Tokens, cache: WindowCache, ops=jax_ops) -> tuple[Tokens, WindowCache]:
    """Token by token: write over the oldest and attend over the whole ring."""
    if several(x):
        return one_by_one(decode, cache_spec(cfg), params, cfg, x, cache, ops)
    step = begin(cfg, cache_spec(cfg), few_tokens(x), cache)
    q, _, kv = project(params, cfg, step.x, step.positions)
    cache = ring.write(cache, step, kv=kv)
    out, _ = attend_ring(params, cfg, q.astype(cache.kv.dtype), cache.kv, step, ops)
    return end(step, project_out(params, cfg, out, step.positions), x.dtype), cache


def window_buffer(cfg: Config) -> Buffer:
    return Buffer(("B", "W", "H"), (cfg.head_dim,), limit=cfg.sliding_window)


def cache_spec(cfg: Config) -> CacheSpec:
    return CacheSpec(WindowCache, {"kv": window_buffer(cfg)})


def work(cfg: Config, context: int, capacity: int, new: int, closing: bool) -> Work:
    """min(context, W) slots of H elements are read, and of the new tokens those written that stay."""
    W = cfg.sliding_window
    flops = 4 * cfg.num_attention_heads * cfg.head_dim * seen(context, new, W)
    return Work({"kv": min(context, W)}, {"kv": min(new, W)}, flops, min(context, W))


FLASH = {"hidden_size": 4096, "num_attention_heads": 64, "head_dim": 512, "qk_rope_head_dim": 64, "q_lora_rank": 1024,
         "o_groups": 8, "o_lora_rank": 1024, "sliding_window": 128}  # fmt: skip
PRO = FLASH | {"hidden_size": 7168, "num_attention_heads": 128, "q_lora_rank": 1536, "o_groups": 16}
LONG = {"rope_type": "yarn", "rope_theta": 1.6e5, "factor": 16.0, "original_max_position_embeddings": 65536,
        "beta_fast": 32, "beta_slow": 1}  # fmt: skip
TINY = {"hidden_size": 14, "num_attention_heads": 6, "head_dim": 10, "qk_rope_head_dim": 6, "q_lora_rank": 7,
        "o_groups": 2, "o_lora_rank": 5}  # fmt: skip
ODD = {"hidden_size": 9, "num_attention_heads": 2, "head_dim": 6, "qk_rope_head_dim": 2, "q_lora_rank": 5,
       "o_groups": 1, "o_lora_rank": 3}  # fmt: skip
TINY_YARN = {"rope_type": "yarn", "rope_theta": 1.6e5, "factor": 4.0, "original_max_position_embeddings": 32}
_PLAIN = {"rope_type": "default", "rope_theta": 1e4}

v4_window = Attention(
    summary="the last W tokens, key and value in one vector, turned back (DeepSeek-V4's first layers)",
    traded="what is older than W tokens is lost; one vector serves as key and value of all heads",
    Config=Config, shapes=shapes, cache_spec=cache_spec, work=work,
    forward=forward, prefill=prefill, decode=decode, visible=visible,
    models=FrozenDict({"DeepSeek-V4-Flash": Config(**FLASH, rope_parameters=_PLAIN)}),
    examples=(
        Config(**TINY, sliding_window=4, rope_parameters=_PLAIN),
        Config(hidden_size=9, num_attention_heads=3, head_dim=4, qk_rope_head_dim=4, q_lora_rank=5, o_groups=3,
               o_lora_rank=2, sliding_window=3, rms_norm_eps=1e-2,
               rope_parameters={**_PLAIN, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    ),
)  # fmt: skip
