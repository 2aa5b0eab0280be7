"""CSA, compressed sparse attention: the last W tokens, and of one entry for every m tokens those an indexer picks.

    entry w     = norm(sum over rows of softmax(z) * u), turned at position w m: m tokens of block w with one series
                  of channels, m of block w - 1 with the other                                        (v4_compress)
    key w       = the same with parameters of its own, J wide
    q_I         = c_q Wq_I, no norm, turned at t;     a_t = x Ww (I J)^-1/2
    score_{t,w} = sum over i of a_{t,i} relu(q_I,{t,i} . key_w) over the entries w with (w + 1) m <= t + 1
    o_t         = one softmax, with a sink, over the vectors of the window and the min(L, seen) entries of top score

All heads share the picks; ties take the lower entry. The token that completes a block may pick its entry. L counts
entries: 512 of them stand for 2048 tokens.

Cache: a ring of W vectors, the entries, the index keys, and for both compressors float32 rows u and z of the last
complete block and the open one.

Sources: DeepSeek-V4 (arXiv 2606.19348), its inference code, transformers' deepseek_v4. As in the last, index queries
and keys are neither multiplied by a Hadamard matrix, which changes no product, nor rounded to fp4.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import jforge.ops as jax_ops
from jforge.attention import v4_compress, v4_window
from jforge.attention.dsa import choose
from jforge.attention.v4_compress import Compressor
from jforge.attention.v4_window import FLASH, LONG, ODD, PRO, TINY, TINY_YARN
from jforge.core import blocks, distil, masks, ring
from jforge.core.attend import einsum, merge
from jforge.core.attention import Attention
from jforge.core.config import FrozenDict, positive_ints, reject
from jforge.core.params import Params
from jforge.core.softmax import accumulation_dtype
from jforge.core.spec import CacheSpec, cache_class
from jforge.core.step import (
    Queries,
    Step,
    Token,
    Tokens,
    all_of,
    begin,
    end,
    few_tokens,
    one_by_one,
    one_token,
    several,
)
from jforge.cost import Work, seen
from jforge.ops.index_scores import token_scores


@dataclass(frozen=True, kw_only=True)
class Config(v4_compress.Config):
    """The fields of hca and the indexer's.

    index_n_heads: I, of the index queries
    index_head_dim: J, of index queries and keys
    index_topk: L, entries that a query attends, each of them m tokens and the m before
    """

    index_n_heads: int
    index_head_dim: int
    index_topk: int

    def __post_init__(self):
        super().__post_init__()
        positive_ints(self, "index_n_heads", "index_head_dim", "index_topk")
        if self.index_head_dim < self.qk_rope_head_dim:
            allowed = f"at least qk_rope_head_dim={self.qk_rope_head_dim}, the channels that turn"
            reject("index_head_dim", self.index_head_dim, allowed)


@cache_class
class CSACache:
    """kv: the window's vectors, token p in slot p mod W. States: rows [:m] are the last complete block, row m + r the
    token r of the open one; 0 where there is none.
    """

    kv: jax.Array  # B W H
    c_kv: jax.Array  # B S/m H, entries after norm and RoPE
    k_index: jax.Array  # B S/m J, index keys after norm and RoPE
    state_kv: jax.Array  # B 2m 2H, float32 or wider
    state_score: jax.Array  # B 2m 2H, bias included
    index_state_kv: jax.Array  # B 2m 2J
    index_state_score: jax.Array  # B 2m 2J
    length: jax.Array  # int32[B]


def compressors(cfg: Config) -> tuple[Compressor, Compressor]:
    """Those of the entries and of the index keys."""
    m = cfg.compress_rate
    index = Compressor("ic", "k_index", "index_state", cfg.index_head_dim, m, overlap=True)
    return Compressor("c", "c_kv", "state", cfg.head_dim, m, overlap=True), index


def shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """{parameter: shape} of a Config."""
    D, I, J = cfg.hidden_size, cfg.index_n_heads, cfg.index_head_dim  # noqa: E741
    out = v4_window.shapes(cfg) | {"wq_index": (cfg.q_lora_rank, I, J), "ww_index": (D, I)}
    for compressor in compressors(cfg):
        out |= compressor.shapes(D)
    return out


def index_queries(
    params: Params, cfg: Config, x: Tokens, latent: Float[Array, "B T L"], positions
) -> tuple[Float[Array, "B T I J"], Float[Array, "B T I"]]:
    """(q_I, a) of the new tokens; the weights of the index heads are float32 or wider."""
    q_index = v4_window.rotate(cfg, einsum("btl,lij->btij", latent, params["wq_index"]), positions)
    weights = einsum("btd,di->bti", x, params["ww_index"]).astype(accumulation_dtype(x))
    return q_index, weights * (cfg.index_n_heads * cfg.index_head_dim) ** -0.5


def _attend(
    params: Params, cfg: Config, rows: Queries, recent: ring.Recent, entries: Array, k_index: Float[Array, "B E J"]
) -> Tokens:
    """Attention of `rows` over their windows and the entries that each of them picks."""

    def picked(rows, latent):
        q_index, weights = index_queries(params, cfg, rows.x, latent, rows.positions)
        seen = v4_compress.seen(cfg, rows.order, k_index.shape[1]) & rows.keep[..., None]
        scores = token_scores(q_index.astype(k_index.dtype), k_index, weights, seen)
        return blocks.tokens_of(choose(cfg, scores), 1, seen.shape[-1])

    more = cfg.index_n_heads * k_index.shape[1]
    return v4_window.attend_over(params, cfg, rows, recent, entries, picked, more)


def forward(params: Params, cfg: Config, x: Tokens, positions=None) -> Tokens:
    """The definition. `positions` (int B T) feed RoPE only; blocks follow the order of x."""
    rows = all_of(cfg, x, positions)
    kv = v4_window.key_value(params, cfg, rows.x, rows.positions)
    entries, k_index = (c.compress(params, cfg, rows) for c in compressors(cfg))
    return _attend(params, cfg, rows, ring.in_order(rows.order, kv), entries, k_index)


def prefill(params: Params, cfg: Config, x: Tokens, cache: CSACache, lengths=None) -> tuple[Tokens, CSACache]:
    """Make the entries that the new tokens complete; attend over the old ring, the new tokens and each one's picks."""
    step = begin(cfg, cache_spec(cfg), x, cache, lengths)
    kv = v4_window.key_value(params, cfg, step.x, step.positions)
    recent = ring.beside(step, cache.length, (cache.kv, kv))
    main, index = (c.extend(params, cfg, cache, step) for c in compressors(cfg))
    cache = replace(ring.write(cache, step, kv=kv), **main, **index)
    return end(step, _attend(params, cfg, step.queries, recent, cache.c_kv, cache.k_index), x.dtype), cache


def decode(params: Params, cfg: Config, x: Tokens, cache: CSACache, ops=jax_ops) -> tuple[Tokens, CSACache]:
    """Token by token: the ring, a scan of the index keys, and a gather of the picked entries."""
    if several(x):
        return one_by_one(decode, cache_spec(cfg), params, cfg, x, cache, ops)
    step = begin(cfg, cache_spec(cfg), few_tokens(x), cache)
    q, latent, cache = _append(params, cfg, step, cache)
    picks = _select(params, cfg, step, latent, cache, ops)
    near = v4_window.attend_ring(params, cfg, q, cache.kv, step, ops)
    more = {"block_size": 1, "scale": cfg.scaling, "out_dtype": accumulation_dtype(x)}
    far = ops.decode_block_sparse(q, cache.c_kv[:, :, None], None, picks, None, **more)
    out = merge(ops, near, far)
    return end(step, v4_window.project_out(params, cfg, out, step.positions), x.dtype), cache


def _append(params: Params, cfg: Config, step: Step, cache: CSACache) -> tuple[Array, Array, CSACache]:
    """(q in the cache's dtype, the query latent, the cache with one more token a row)."""
    q, latent, kv = v4_window.project(params, cfg, step.x, step.positions)
    main, index = (c.extend_by_one(params, cfg, cache, step) for c in compressors(cfg))
    cache = replace(ring.write(cache, step, kv=kv), **main, **index)
    return q.astype(cache.kv.dtype), latent, cache


def _select(params: Params, cfg: Config, step: Step, latent, cache: CSACache, ops) -> Int[Array, "B 1 1 L"]:
    q_index, weights = index_queries(params, cfg, step.x, latent, step.positions)
    complete = step.length // cfg.compress_rate
    scores = ops.index_scores(q_index.astype(cache.k_index.dtype), cache.k_index, weights, complete)
    return choose(cfg, scores, ops)[:, :, None]


def select(params: Params, cfg: Config, x: Token, cache: CSACache) -> Int[Array, "B 1 1 L"]:
    """The entries that decode would gather for x; the one that x completes takes part in the choice."""
    step = begin(cfg, cache_spec(cfg), one_token(x), cache)
    _, latent, cache = _append(params, cfg, step, cache)
    return _select(params, cfg, step, latent, cache, jax_ops)


def index_loss(params: Params, cfg: Config, x: Tokens) -> Float[Array, ""]:
    """KL of what the heads attend to among all entries, from the softmax of their index scores (jforge.core.distil)."""
    main, index = compressors(cfg)
    others = {*v4_window.shapes(cfg), *main.shapes(cfg.hidden_size)}
    params, x = distil.apart(params, x, shapes(cfg).keys() - others)
    rows = all_of(cfg, x, None)
    q, latent, _ = v4_window.project(params, cfg, x, rows.positions)
    entries, k_index = (one.compress(params, cfg, rows) for one in (main, index))
    seen = v4_compress.seen(cfg, rows.order, entries.shape[1])
    target = distil.mean_weights(q, entries[:, :, None], seen, scale=cfg.scaling)
    q_index, weights = index_queries(params, cfg, x, latent, rows.positions)
    return distil.divergence(target, token_scores(q_index, k_index, weights, seen), seen)


def tokens_of(cfg: Config, selection, S: int) -> Bool[Array, "B T S"]:
    """The 2m tokens that each picked entry pools, m for the first; with None, those of the window."""
    token = jnp.arange(S)
    if selection is None:
        return masks.window(token[:, None], token, cfg.sliding_window)[None]
    block, picked = token // cfg.compress_rate, selection[..., None]
    pooled = (picked >= 0) & ((block == picked) | (block == picked - 1))
    return pooled.any(axis=(2, 3))


def cache_spec(cfg: Config) -> CacheSpec:
    main, index = (c.buffers(axis) for c, axis in zip(compressors(cfg), "HJ", strict=True))
    return CacheSpec(CSACache, {"kv": v4_window.window_buffer(cfg)} | main | index)


def work(cfg: Config, context: int, capacity: int, new: int, closing: bool) -> Work:
    """One step reads the ring, all index keys and min(L, their number) entries; every m-th the states as well.

    A prefill masks all entries.
    """
    m, L, entries = cfg.compress_rate, cfg.index_topk, cache_spec(cfg)["k_index"].slots(context)
    attended = 2 * cfg.num_attention_heads * cfg.head_dim * seen(context, new, L, every=m)
    scored = cfg.index_n_heads * (cfg.index_head_dim + 1) * seen(context, new, every=m)  # + 1: the sum over heads
    read = {"c_kv": min(L, entries) if new == 1 else entries, "k_index": entries}
    return v4_compress.layer_work(cfg, compressors(cfg), read, 2 * (attended + scored), context, new, closing)


_INDEX = {"index_n_heads": 64, "index_head_dim": 128}

csa = Attention(
    summary="the last W tokens and, of one entry for every 4 before, those an indexer picks (DeepSeek-V4)",
    traded="m tokens become one entry and an index picks among entries: detail for memory, reach for reads",
    Config=Config, shapes=shapes, cache_spec=cache_spec, work=work,
    forward=forward, prefill=prefill, decode=decode, visible=v4_compress.visible, select=select, tokens_of=tokens_of,
    index_loss=index_loss,
    models=FrozenDict({
        "DeepSeek-V4-Flash": Config(**FLASH, **_INDEX, rope_parameters=LONG, compress_rate=4, index_topk=512),
        "DeepSeek-V4-Pro": Config(**PRO, **_INDEX, rope_parameters=LONG, compress_rate=4, index_topk=1024),
    }),
    examples=(
        Config(**TINY, sliding_window=3, compress_rate=2, index_n_heads=8, index_head_dim=7, index_topk=2,
               rope_parameters=TINY_YARN),
        Config(**ODD, sliding_window=5, compress_rate=3, index_n_heads=3, index_head_dim=4, index_topk=3,
               rope_parameters={"rope_theta": 1e4}),
    ),
)  # fmt: skip
