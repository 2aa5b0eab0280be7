"""DeepSeek sparse attention: MLA over the tokens that a small, cheap indexer scores highest.

    q^I_t,i = c_t W_q^I,   k^I_s = layernorm(x_s W_k^I),   w_t = x_t W_w      I heads of width J; c_t MLA's query latent
    score_{t,s} = sum_i w_t,i I^-1/2 J^-1/2 relu(q^I_t,i . k^I_s)             over s <= t
    o_t = MLA's softmax over the index_topk tokens of the highest score, the same for all heads

RoPE turns the first R channels of q^I and k^I, in halves for DeepSeek-V3.2 and interleaved for GLM-5, whatever MLA's
layout is. Weights may be negative. While a row has at most index_topk tokens this is MLA.

The cache is MLA's and the index keys. A decode step scans all index keys, 2 J bytes a token in bf16, and gathers
index_topk latents: what it reads of the latents does not grow with the context, what it reads of the keys does.

`index_quantised` rotates queries and keys by a Hadamard matrix and stores keys in e4m3 with a power-of-two scale, as
DeepSeek's kernels do. They round what RoPE has turned, so the picks may change when all positions shift by the same
number (law L10). With `index_shared` (GLM-5.2) a layer has no indexer: it takes the `indices` of another layer.

Sources: DeepSeek-V3.2 (arXiv 2512.02556), transformers' deepseek_v32 and glm_moe_dsa; for the layout of RoPE in the
indexer, where DeepSeek's first code differs, docs/divergences.md.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import jforge.ops as jax_ops
from jforge.attention import mla
from jforge.attention.mla import LatentCache
from jforge.core import blocks, distil, masks, quant, rope
from jforge.core.attend import einsum, over_queries
from jforge.core.attention import Attention
from jforge.core.config import FrozenDict, one_of, positive_ints, reject
from jforge.core.norm import layer_norm
from jforge.core.params import Params
from jforge.core.softmax import accumulation_dtype
from jforge.core.spec import Buffer, CacheSpec, cache_class
from jforge.core.step import Queries, Step, Token, Tokens, all_of, append, begin, end, few_tokens, one_token
from jforge.cost import Work, seen
from jforge.ops.index_scores import token_scores

LAYER_NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Config(mla.Config):
    """MLA's fields, with q_lora_rank required, and the indexer's.

    index_n_heads: I, of the index queries
    index_head_dim: J, of index queries and keys
    index_topk: L, tokens that a query attends
    index_rope_layout: "half", or "interleaved" in GLM-5
    index_quantised: index keys in e4m3 after a Hadamard matrix
    index_shared: no indexer, the picks are another layer's (GLM-5.2)
    """

    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 2048
    index_rope_layout: str = "half"
    index_quantised: bool = False
    index_shared: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.q_lora_rank is None:
            reject("q_lora_rank", None, "a positive integer: the indexer reads the query latent")
        positive_ints(self, "index_n_heads", "index_head_dim", "index_topk")
        one_of("index_rope_layout", self.index_rope_layout, rope.LAYOUTS)
        J = self.index_head_dim
        if self.rope_parameters is not None and J < self.qk_rope_head_dim:
            reject("index_head_dim", J, f"at least qk_rope_head_dim={self.qk_rope_head_dim}, which turn")
        if self.index_quantised and J & (J - 1):
            reject("index_head_dim", J, "a power of two with index_quantised, for the Hadamard matrix")


@cache_class
class DSACache(LatentCache):
    """MLA's cache and the index keys after norm and RoPE."""

    k_index: jax.Array  # B S J


@cache_class
class QuantisedCache(DSACache):
    """Index keys in e4m3; a key is k_index * k_index_scale."""

    k_index_scale: jax.Array  # B S, float32


def shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """{parameter: shape}: MLA's and, unless the layer shares another's picks, the indexer's."""
    if cfg.index_shared:
        return mla.shapes(cfg)
    D, heads, J = cfg.hidden_size, cfg.index_n_heads, cfg.index_head_dim
    index = {"wq_index": (cfg.q_lora_rank, heads, J), "wk_index": (D, J), "ww_index": (D, heads)}
    return mla.shapes(cfg) | index | {"k_index_norm": (J,), "k_index_bias": (J,)}


def index_queries(params: Params, cfg: Config, x: Tokens, positions, dtype) -> tuple[Array, Array]:
    """q_index: B T I J, rotated, as it is scored: in `dtype`, or rounded to e4m3; weights: B T I, float32 or wider.

    Both scales are in the weights, and that of a quantised query too, since relu(s x) = s relu(x).
    """
    q = _turn(cfg, einsum("btl,lij->btij", mla.query_latent(params, cfg, x), params["wq_index"]), positions)
    weights = einsum("btd,di->bti", x.astype(accumulation_dtype(x)), params["ww_index"])
    weights = weights * (cfg.index_n_heads * cfg.index_head_dim) ** -0.5
    if not cfg.index_quantised:
        return q.astype(dtype), weights
    q, scale = quant.e4m3(quant.hadamard(q))
    return q.astype(dtype), weights * scale


def index_keys(params: Params, cfg: Config, x: Tokens, positions, dtype) -> dict[str, Array]:
    """{leaf: B T ...} of the index keys, normed and rotated, as they are stored: in `dtype`, or in e4m3 with scales."""
    k = einsum("btd,dj->btj", x, params["wk_index"])
    k = layer_norm(k, params["k_index_norm"], params["k_index_bias"], eps=LAYER_NORM_EPS)
    k = _turn(cfg, k[:, :, None], positions)[:, :, 0]
    if not cfg.index_quantised:
        return {"k_index": k.astype(dtype)}
    k, scale = quant.e4m3(quant.hadamard(k))
    return {"k_index": k, "k_index_scale": scale}


def _turn(cfg: Config, heads: Float[Array, "B T I J"], positions) -> Float[Array, "B T I J"]:
    return rope.apply_rope(heads, positions, cfg.rope_parameters, cfg.index_rope_layout, dim=cfg.qk_rope_head_dim)


def choose(cfg, scores: Float[Array, "B T S"], ops=jax_ops) -> Int[Array, "B T L"]:
    """The tokens (in csa entries) of the highest scores; -1 where a query sees fewer."""
    return ops.topk_indices(scores, min(cfg.index_topk, max(1, scores.shape[-1])))


def _check_indices(cfg: Config, indices, x: Array) -> None:
    if not cfg.index_shared and indices is None:
        return
    if indices is None:
        raise ValueError("indices is None; a layer with index_shared needs the picks of another layer, int32 B T L")
    if indices.ndim != 3 or indices.shape[:2] != x.shape[:2]:
        raise ValueError(f"indices has shape {tuple(indices.shape)}; it must be B T L with B T = {x.shape[:2]}, as x")
    if indices.dtype != jnp.int32:
        raise TypeError(f"indices has dtype {indices.dtype}; it must be int32")


def forward(params: Params, cfg: Config, x: Tokens, positions=None, indices=None) -> Tokens:
    """The definition, MLA's naive form under the mask of the picks. `positions` (int B T) feed RoPE only.

    indices: int32 B T L, for a layer with index_shared, or the layer's own, if they are known (`lend`).
    """
    rows = all_of(cfg, x, positions)
    _check_indices(cfg, indices, x)
    if indices is None:
        indices = picks(params, cfg, rows, index_keys(params, cfg, rows.x, rows.positions, x.dtype), x.dtype)
    latents = mla.latents(params, cfg, rows.x, rows.positions)
    return mla.attend_naive(params, cfg, rows, *latents, indices).astype(x.dtype)


def picks(params: Params, cfg: Config, rows: Queries, index: dict[str, Array], dtype) -> Int[Array, "B T L"]:
    """The tokens that each query reads, of the index keys up to its own, in blocks of queries; -1 for none."""
    S = index["k_index"].shape[1]

    def block(rows, _):
        rows = Queries(*rows)
        q, weights = index_queries(params, cfg, rows.x, rows.positions, dtype)
        seen = masks.causal(rows.order[..., None], jnp.arange(S)) & rows.keep[..., None]
        return choose(cfg, token_scores(q, index["k_index"], weights, seen, index.get("k_index_scale")))

    return over_queries(block, rows, cfg.index_n_heads * rows.x.shape[0] * S)


def _append(params: Params, cfg: Config, step: Step, cache):
    """The cache with the new tokens."""
    latent, k_rope = mla.latents(params, cfg, step.x, step.positions)
    index = {} if cfg.index_shared else index_keys(params, cfg, step.x, step.positions, cache.latent.dtype)
    return append(cache, step, latent=latent, k_rope=k_rope, **index)


def prefill(params: Params, cfg: Config, x: Tokens, cache, lengths=None, indices=None):
    """Append T tokens (row b its first lengths[b]); each attends, in the naive form, to its picks of what is stored."""
    step = begin(cfg, cache_spec(cfg), x, cache, lengths)
    _check_indices(cfg, indices, x)
    cache = _append(params, cfg, step, cache)
    if indices is None:
        indices = picks(params, cfg, step.queries, _index_leaves(cache), cache.latent.dtype)
    y = mla.attend_naive(params, cfg, step.queries, cache.latent, cache.k_rope, indices)
    return end(step, y, x.dtype), cache


def decode(params: Params, cfg: Config, x: Tokens, cache, ops=jax_ops, indices=None):
    """1 to 16 tokens a row: a scan of the index keys, a top-k, and the absorbed form over a gather of the picks."""
    step = begin(cfg, cache_spec(cfg), few_tokens(x), cache)
    _check_indices(cfg, indices, x)
    q_nope, q_rope = mla.queries(params, cfg, step.x, step.positions)
    cache = _append(params, cfg, step, cache)
    if indices is None:
        indices = _select(params, cfg, step, cache, ops)
    else:  # another layer's picks: none of a token that is not there
        indices = jnp.where(indices < cache.length[:, None, None], indices, -1)
    out = mla.attend_absorbed(params, cfg, q_nope, q_rope, cache, ops.decode_sparse_mla, indices, x.dtype)
    return end(step, mla.project_out(params, cfg, out), x.dtype), cache


def _index_leaves(cache) -> dict[str, Array]:
    return {name: getattr(cache, name) for name in ("k_index", "k_index_scale") if hasattr(cache, name)}


def _select(params: Params, cfg: Config, step: Step, cache, ops) -> Int[Array, "B T L"]:
    q, weights = index_queries(params, cfg, step.x, step.positions, cache.latent.dtype)
    scale = getattr(cache, "k_index_scale", None)
    return choose(cfg, ops.index_scores(q, cache.k_index, weights, cache.length, k_scale=scale), ops)


def _has_indexer(cfg: Config) -> None:
    if cfg.index_shared:
        raise ValueError("index_shared is True; such a layer has no indexer, ask the layer whose picks it takes")


def index(params: Params, cfg: Config, x: Tokens, cache, lengths=None) -> Int[Array, "B T L"]:
    """The picks of the new tokens x (row b its first lengths[b]) given the cache before them; -1 at pads."""
    return lend(params, cfg, begin(cfg, cache_spec(cfg), x, cache, lengths).queries, cache)


def lend(params: Params, cfg: Config, rows: Queries, cache, ops=None) -> Int[Array, "B T L"]:
    """The picks of the new tokens, for layers with index_shared and for this one itself."""
    _has_indexer(cfg)
    if cache is None:
        return picks(params, cfg, rows, index_keys(params, cfg, rows.x, rows.positions, rows.x.dtype), rows.x.dtype)
    count = rows.keep.sum(axis=1, dtype=jnp.int32)
    step = Step(rows.x, rows.order, rows.keep, jnp.ones(len(count), bool), cache.length + count)
    cache = _append(params, cfg, step, cache)
    if ops is not None:
        return _select(params, cfg, step, cache, ops)
    return picks(params, cfg, rows, _index_leaves(cache), cache.latent.dtype)


def select(params: Params, cfg: Config, x: Token, cache) -> Int[Array, "B 1 L"]:
    """The tokens that decode would gather for x."""
    _has_indexer(cfg)
    step = begin(cfg, cache_spec(cfg), one_token(x), cache)
    return _select(params, cfg, step, _append(params, cfg, step, cache), jax_ops)


def index_loss(params: Params, cfg: Config, x: Tokens) -> Float[Array, ""]:
    """KL of what the heads attend to, without an indexer, from the softmax of the index scores (jforge.core.distil).

    A quantised index has no gradient.
    """
    _has_indexer(cfg)
    params, x = distil.apart(params, x, shapes(cfg).keys() - mla.shapes(cfg).keys())
    rows = all_of(cfg, x, None)
    seen = masks.causal(rows.order[..., None], jnp.arange(x.shape[1]))
    keys, _ = mla.expand(params, *mla.latents(params, cfg, x, rows.positions))
    queries = jnp.concatenate(mla.queries(params, cfg, x, rows.positions), axis=-1)
    target = distil.mean_weights(queries, keys, seen, scale=cfg.scaling)
    q, weights = index_queries(params, cfg, x, rows.positions, x.dtype)
    index = index_keys(params, cfg, x, rows.positions, x.dtype)
    scores = token_scores(q, index["k_index"], weights, seen, index.get("k_index_scale"))
    return distil.divergence(target, scores, seen)


def tokens_of(cfg: Config, selection, S: int) -> Bool[Array, "B T S"]:
    """The picked tokens; nothing is attended beside them."""
    return blocks.tokens_of(selection, 1, S)


def cache_spec(cfg: Config) -> CacheSpec:
    buffers = dict(mla.cache_spec(cfg))
    if cfg.index_shared:
        return CacheSpec(LatentCache, buffers)
    dtype = "float8_e4m3fn" if cfg.index_quantised else None
    buffers["k_index"] = Buffer(("B", "S", "J"), (cfg.index_head_dim,), dtype=dtype)
    if not cfg.index_quantised:
        return CacheSpec(DSACache, buffers)
    return CacheSpec(QuantisedCache, buffers | {"k_index_scale": Buffer(("B", "S"), (), dtype="float32")})


def work(cfg: Config, context: int, capacity: int, new: int, closing: bool) -> Work:
    """One step scans all index keys and gathers index_topk latents and rotary keys; a prefill masks all slots."""
    spec, slots = cache_spec(cfg), min(cfg.index_topk, context) if new == 1 else context
    scanned = [name for name in spec if name.startswith("k_index")]
    scored = cfg.index_n_heads * (cfg.index_head_dim + 1) * seen(context, new) if scanned else 0  # + 1: the sum
    attended = seen(context, new, cfg.index_topk)  # over heads
    return Work(
        read={"latent": slots, "k_rope": slots} | dict.fromkeys(scanned, context),
        written=dict.fromkeys(spec, new),
        flops=(mla.flops if new == 1 else mla.naive_flops)(cfg, attended) + 2 * scored,
        entries_read=slots + (context if scanned else 0),
    )


_V32 = mla.mla.models["DeepSeek-V3"]
_V32_FIELDS = {field.name: getattr(_V32, field.name) for field in dataclasses.fields(_V32)}
_TINY = {
    "hidden_size": 22, "num_attention_heads": 3, "q_lora_rank": 10, "kv_lora_rank": 12, "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 4, "v_head_dim": 5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip

dsa = Attention(
    summary="MLA over the tokens that a lightning indexer picks (DeepSeek-V3.2, GLM-5)",
    traded="reads of latents for reads of an index: all is kept, and all index keys are scanned",
    Config=Config, shapes=shapes, cache_spec=cache_spec, work=work,
    forward=forward, prefill=prefill, decode=decode, select=select, tokens_of=tokens_of,
    lend=lend, index_loss=index_loss,
    models=FrozenDict({
        "DeepSeek-V3.2": Config(**_V32_FIELDS),
        "DeepSeek-V3.2, e4m3 index": Config(**_V32_FIELDS, index_quantised=True),
    }),
    examples=(
        Config(**_TINY, index_n_heads=8, index_head_dim=6, index_topk=3, attention_bias=True),
        Config(**{**_TINY, "rope_parameters": None}, index_n_heads=8, index_head_dim=8, index_topk=4,
               index_quantised=True),
    ),
)  # fmt: skip
