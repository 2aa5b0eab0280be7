"""MoBA: each query head reads its own block and the past blocks whose mean key it likes best.

    kbar_i = mean of the keys of block i (after RoPE, as stored)
    gate_i = q . kbar_i   (unscaled) for blocks i before the query's own, which is always taken
    o_t    = sum over s <= t in the top moba_topk blocks (its own among them) of softmax_s(scale q_t . k_s) v_s

A past block counts only once it is complete, so its mean never holds a future key. Nothing is learned. Heads choose
alone, G of them on one key head, so a step may read up to G times the blocks that one list names.

The cache has, beside dense k and v, the mean of each complete block and the running sum of the open one, float32 both.

Source: Lu et al. 2025 (arXiv 2502.13189), MoonshotAI/MoBA. Its wrapper decodes densely; `dense_decode` does that, and
then decode is not what `forward` defines once there are more blocks than moba_topk.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import jforge.ops as jax_ops
from jforge.attention import dense
from jforge.attention.dense import LLAMA_8B, PLAIN
from jforge.attention.dense_config import lacks
from jforge.core import blocks, masks
from jforge.core.attend import einsum
from jforge.core.attention import Attention
from jforge.core.config import FrozenDict, positive_ints
from jforge.core.params import Params
from jforge.core.softmax import accumulation_dtype
from jforge.core.spec import Buffer, CacheSpec, cache_class
from jforge.core.step import Step, Token, Tokens, all_of, append, begin, end, few_tokens, one_by_one, several
from jforge.cost import Work, seen


@dataclass(frozen=True, kw_only=True)
class Config(dense.Config):
    """The dense family's fields and MoBA's own.

    moba_chunk_size: M, tokens of a block
    moba_topk: blocks that a query head reads, its own among them
    dense_decode: decode reads every token, as MoBA's wrapper does
    """

    moba_chunk_size: int
    moba_topk: int
    dense_decode: bool = False

    def __post_init__(self):
        super().__post_init__()
        lacks(self, "alibi", "kv_shared")
        positive_ints(self, "moba_chunk_size", "moba_topk")


@cache_class
class MoBACache:
    """Keys after norm and RoPE, values, and what the gates need of the keys."""

    k: jax.Array  # B S K H
    v: jax.Array  # B S K V
    k_mean: jax.Array  # B S/M K H, float32 or wider
    k_sum: jax.Array  # B K H, float32 or wider: the open block; 0 when there is none
    length: jax.Array  # int32[B]


@masks.with_infinities
def choose(
    cfg: Config, q: Float[Array, "B T N H"], k_mean: Float[Array, "B E K H"], q_pos: Int[Array, "B T"], ops=jax_ops
) -> Int[Array, "B T N L"]:
    """The moba_topk blocks of each query head, its own block last; -1 where there are fewer."""
    B, T, N, H = q.shape
    E, K = k_mean.shape[1:3]
    own = q_pos // cfg.moba_chunk_size
    past = jnp.arange(E) < own[..., None]
    k_mean = jnp.where(past.any(axis=1)[..., None, None], k_mean, 0)  # the means of blocks to come may be anything
    grouped = q.reshape(B, T, K, N // K, H).astype(k_mean.dtype)
    gates = einsum("btkgh,bekh->btkge", grouped, k_mean).reshape(B, T, N, E)
    own = jnp.broadcast_to(own[..., None, None], (B, T, N, 1))
    if cfg.moba_topk == 1:
        return own
    picks = ops.topk_indices(jnp.where(past[:, :, None], gates, -jnp.inf), min(cfg.moba_topk - 1, max(1, E)))
    return jnp.concatenate([picks, own], axis=-1)


def _means(cfg: Config, k: Float[Array, "B S K H"], length: Int[Array, "B"]) -> tuple[Array, Array]:
    """(the mean of every complete block, 0 in the others; the sum of the open block) of the first `length` keys."""
    B, S, K, H = k.shape
    M, wide = cfg.moba_chunk_size, accumulation_dtype(k)
    E = max(1, S // M)
    k = jnp.where((jnp.arange(S) < length[:, None])[..., None, None], k.astype(wide), 0)
    whole = jnp.pad(k, [(0, 0), (0, max(0, E * M - S)), (0, 0), (0, 0)])[:, : E * M].reshape(B, E, M, K, H).mean(axis=2)
    complete = jnp.arange(E) < (length // M)[:, None]
    is_open = jnp.arange(S) >= (length // M * M)[:, None]
    return jnp.where(complete[..., None, None], whole, 0), jnp.where(is_open[..., None, None], k, 0).sum(axis=1)


def forward(params: Params, cfg: Config, x: Tokens, positions=None) -> Tokens:
    """The definition. `positions` (int B T) feed RoPE only; blocks follow the order of x."""
    rows = all_of(cfg, x, positions)
    k, v = dense.project_keys(params, cfg, rows)
    k_mean, _ = _means(cfg, k, jnp.full((len(x),), x.shape[1]))
    return dense.attend_over(params, cfg, rows, k, v, _mask(cfg, k_mean))


def _mask(cfg: Config, k_mean: Float[Array, "B E K H"]) -> Callable:
    """The blocks that each query and head chooses by these means."""

    def mask(q, rows, S):
        lists = choose(cfg, q, k_mean, rows.order)
        return blocks.visible(lists, cfg.moba_chunk_size, rows.order, S, cfg.num_attention_heads)

    return mask


def prefill(params: Params, cfg: Config, x: Tokens, cache: MoBACache, lengths=None) -> tuple[Tokens, MoBACache]:
    """Append T tokens, make the means anew from the stored keys, and attend to each query head's own blocks."""
    step = begin(cfg, cache_spec(cfg), x, cache, lengths)
    k, v = dense.project_keys(params, cfg, step.queries)
    cache = append(cache, step, k=k, v=v)
    k_mean, k_sum = (a.astype(cache.k_mean.dtype) for a in _means(cfg, cache.k, step.length))
    y = dense.attend_over(params, cfg, step.queries, cache.k, cache.v, _mask(cfg, k_mean))
    return end(step, y, x.dtype), replace(cache, k_mean=k_mean, k_sum=k_sum)


def decode(params: Params, cfg: Config, x: Tokens, cache: MoBACache, ops=jax_ops) -> tuple[Tokens, MoBACache]:
    """Token by token: append, score the means of all complete blocks, and gather the chosen blocks."""
    if several(x):
        return one_by_one(decode, cache_spec(cfg), params, cfg, x, cache, ops)
    step = begin(cfg, cache_spec(cfg), few_tokens(x), cache)
    q, k, v = dense.project(params, cfg, step.x, step.positions)
    cache, q = _append(cfg, cache, k, v, step), q.astype(cache.k.dtype)
    more = {"out_dtype": x.dtype, **dense.options(params, cfg)}
    if cfg.dense_decode:
        out, _ = ops.decode_attention(q, cache.k, cache.v, cache.length, **more)
    else:
        lists = choose(cfg, q, cache.k_mean, step.positions, ops)
        more["block_size"] = cfg.moba_chunk_size
        out, _ = ops.decode_block_sparse(q, cache.k, cache.v, lists, cache.length, **more)
    return end(step, dense.project_out(params, cfg, step.x, out), x.dtype), cache


def _append(cfg: Config, cache: MoBACache, k: Array, v: Array, step: Step) -> MoBACache:
    """One token a row into k, v and the running sum; a step in which a block closes somewhere publishes its mean."""
    M, wide = cfg.moba_chunk_size, cache.k_mean.dtype
    new = jnp.where(step.keep[..., None, None], k, 0).astype(cache.k.dtype)[:, 0]
    k_sum = cache.k_sum + new.astype(wide)
    closes = (step.length % M == 0) & step.keep[:, 0]

    def publish(k_mean, k_sum):
        entry = jnp.where(closes, step.length // M - 1, k_mean.shape[1])
        k_mean = k_mean.at[jnp.arange(len(closes)), entry].set(k_sum / M, mode="drop")
        return k_mean, jnp.where(closes[:, None, None], 0, k_sum)

    k_mean, k_sum = jax.lax.cond(closes.any(), publish, lambda *same: same, cache.k_mean, k_sum)
    return replace(append(cache, step, k=k, v=v), k_mean=k_mean, k_sum=k_sum)


def select(params: Params, cfg: Config, x: Token, cache: MoBACache) -> Int[Array, "B 1 N L"]:
    """The blocks that decode would gather for x."""
    positions = cache.length[:, None]
    q, _, _ = dense.project(params, cfg, x, positions)
    return choose(cfg, q.astype(cache.k.dtype), cache.k_mean, positions)


def tokens_of(cfg: Config, selection, S: int) -> Bool[Array, "B T S"]:
    """All tokens of the chosen blocks, over all heads; nothing is read beside them."""
    return blocks.tokens_of(selection, cfg.moba_chunk_size, S)


def _open_sum(cfg: Config, cache: MoBACache, length: Int[Array, "B"]) -> Array:
    """k_sum after `length` tokens, from the stored keys."""
    return _means(cfg, cache.k, length)[1]


def cache_spec(cfg: Config) -> CacheSpec:
    K, H = cfg.num_key_value_heads, cfg.head_dim
    k_mean = Buffer(("B", "E", "K", "H"), (K, H), every=cfg.moba_chunk_size, dtype="float32")
    k_sum = Buffer(("B", "K", "H"), (K, H), every=None, dtype="float32", remade=_open_sum)
    return CacheSpec(MoBACache, dense.kv_buffers(cfg) | {"k_mean": k_mean, "k_sum": k_sum})


def work(cfg: Config, context: int, capacity: int, new: int, closing: bool) -> Work:
    """One step scans the means and gathers, for each of G query heads on a key head, moba_topk blocks.

    A prefill makes all means anew from the keys and masks all slots.
    """
    M, N, topk = cfg.moba_chunk_size, cfg.num_attention_heads, cfg.moba_topk
    G, entries = N // cfg.num_key_value_heads, cache_spec(cfg)["k_mean"].slots(context)
    flops = dense.flops(cfg, seen(context, new, topk * M))
    flops += 0 if topk == 1 else 2 * N * cfg.head_dim * seen(context, new, every=M)
    if new > 1:
        written = {"k": new, "v": new, "k_mean": entries, "k_sum": 1}
        return Work({"k": context, "v": context}, written, flops, context)
    written = {"k": 1, "v": 1, "k_sum": 1} | ({"k_mean": 1} if closing else {})
    if cfg.dense_decode:
        read = {"k": context, "v": context, "k_sum": 1}
        return Work(read, written, dense.flops(cfg, context), context)
    slots = min(context, G * (1 + min(topk - 1, entries)) * M)
    scanned = {} if topk == 1 else {"k_mean": entries}
    read = {"k": slots, "v": slots, "k_sum": 1} | scanned
    return Work(read, written, flops, slots + sum(scanned.values()))


moba = Attention(
    summary="each query head reads the blocks whose mean key it likes best (MoBA)",
    traded="reads for a choice by means: all is kept, and a block with an unlikely mean is missed",
    Config=Config, shapes=dense.shapes, cache_spec=cache_spec, work=work,
    forward=forward, prefill=prefill, decode=decode, select=select, tokens_of=tokens_of,
    models=FrozenDict({
        # as Llama-3.1-8B: the paper interpolates positions up to a million tokens and does not say how
        "Llama-8B-1M-MoBA": Config(**LLAMA_8B, moba_chunk_size=4096, moba_topk=12),
    }),
    examples=(
        Config(hidden_size=12, num_attention_heads=4, num_key_value_heads=2, head_dim=6, rope_parameters=PLAIN,
               moba_chunk_size=3, moba_topk=2),
        Config(hidden_size=10, num_attention_heads=2, num_key_value_heads=1, head_dim=4, v_head_dim=6,
               rope_parameters=PLAIN, moba_chunk_size=2, moba_topk=3, attn_logit_softcapping=4.0),
    ),
)  # fmt: skip
