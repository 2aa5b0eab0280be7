"""MiniMax sparse attention: grouped queries over the 16 blocks of 128 tokens that a small index branch scores highest.

    a_{g,s}    = q_I,g . k_I,s                          one index head for each key head g, one index key for all
    score_{g,b} = max over the tokens s <= t of block b of a_{g,s}
    o_t        = sum over s <= t in the top blocks of g of softmax_s(scale q_t . k_s) v_s

The query's own block and the `index_local_blocks` - 1 before it (and the first `index_init_blocks`) are always picked
and count in the budget. No relu, no weights of heads, no scale: a positive one would not change the order. While all
blocks fit the budget the result is exactly dense.

Index queries and keys have their own RMS norm and turn as many channels as the main heads. The cache is the dense one
and the index keys. The best key of a block depends on the query, so nothing a block could be stored in its place: a
step scans all index keys.

Sources: MiniMax Sparse Attention (arXiv 2606.13392), transformers' minimax_m3_vl; where the paper has no norm and no
RoPE in the index branch, the released model has both.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import jforge.ops as jax_ops
from jforge.attention import dense
from jforge.attention.dense_config import lacks
from jforge.core import blocks, distil, masks, rope
from jforge.core.attend import einsum
from jforge.core.attention import Attention
from jforge.core.config import FrozenDict, natural, positive_ints, reject
from jforge.core.norm import rms_norm
from jforge.core.params import Params
from jforge.core.spec import Buffer, CacheSpec, cache_class
from jforge.core.step import Step, Token, Tokens, all_of, append, begin, end, few_tokens, one_token
from jforge.cost import Work, seen
from jforge.ops.index_scores import block_maxima


@dataclass(frozen=True, kw_only=True)
class Config(dense.Config):
    """The dense family's fields and those of the index branch.

    index_head_dim: J, of index queries and keys
    index_block_size: M, tokens of a block
    index_topk_blocks: blocks that a key head's queries read, those that are always picked among them
    index_local_blocks: the last blocks, always picked, the query's own among them
    index_init_blocks: the first blocks, always picked
    """

    index_head_dim: int
    index_block_size: int = 128
    index_topk_blocks: int = 16
    index_local_blocks: int = 1
    index_init_blocks: int = 0

    def __post_init__(self):
        super().__post_init__()
        lacks(self, "alibi", "kv_shared")
        positive_ints(self, "index_head_dim", "index_block_size", "index_topk_blocks", "index_local_blocks")
        natural("index_init_blocks", self.index_init_blocks)
        if self.index_topk_blocks < self.index_init_blocks + self.index_local_blocks:
            allowed = "at least index_init_blocks + index_local_blocks, which are always picked"
            reject("index_topk_blocks", self.index_topk_blocks, allowed)
        if self.index_head_dim < self.index_rotary_dim:
            reject("index_head_dim", self.index_head_dim, f"at least the {self.index_rotary_dim} channels that turn")

    @property
    def index_rotary_dim(self) -> int:
        """Channels that turn: as many as in the main heads."""
        return 0 if self.rope_parameters is None else rope.rotary_dim(self.rope_parameters, self.head_dim)


@cache_class
class MSACache:
    """Keys and index keys after norm and RoPE, values; slot s holds token s."""

    k: jax.Array  # B S K H
    v: jax.Array  # B S K V
    k_index: jax.Array  # B S J
    length: jax.Array  # int32[B]


def shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """{parameter: shape}: the dense ones and the index branch's."""
    D, K, J = cfg.hidden_size, cfg.num_key_value_heads, cfg.index_head_dim
    norms = dict.fromkeys(("q_index_norm", "k_index_norm"), dense.norm_weight(cfg, J))
    return dense.shapes(cfg) | {"wq_index": (D, K, J), "wk_index": (D, J)} | norms


def index_queries(params: Params, cfg: Config, x: Tokens, positions) -> Float[Array, "B T K J"]:
    """q_index of the new tokens, normed and rotated."""
    return _finish(params, cfg, einsum("btd,dkj->btkj", x, params["wq_index"]), "q_index_norm", positions)


def index_keys(params: Params, cfg: Config, x: Tokens, positions) -> Float[Array, "B T J"]:
    """k_index of the new tokens, normed and rotated."""
    k = einsum("btd,dj->btj", x, params["wk_index"])[:, :, None]
    return _finish(params, cfg, k, "k_index_norm", positions)[:, :, 0]


def _finish(params: Params, cfg: Config, heads: Array, norm: str, positions) -> Array:
    heads = rms_norm(heads, params[norm], eps=cfg.rms_norm_eps, offset=cfg.norm_offset)
    return rope.apply_rope(heads, positions, cfg.rope_parameters, cfg.rope_layout, dim=cfg.index_rotary_dim)


def choose(
    cfg: Config, scores: Float[Array, "B T K E"], q_pos: Int[Array, "B T"], ops=jax_ops
) -> Int[Array, "B T K L"]:
    """The picked blocks of each key head, forced ones first; -1 where there are fewer."""
    forced = {"first": cfg.index_init_blocks, "local": cfg.index_local_blocks}
    return blocks.choose(scores, q_pos // cfg.index_block_size, cfg.index_topk_blocks, **forced, ops=ops)


def _mask(params: Params, cfg: Config, k_index: Float[Array, "B S J"]) -> Callable:
    """The blocks that each key head's queries pick by these index keys, for forward and prefill."""

    def mask(q, rows, S):
        seen = masks.causal(rows.order[..., None], jnp.arange(S)) & rows.keep[..., None]
        q_index = index_queries(params, cfg, rows.x, rows.positions).astype(k_index.dtype)
        lists = choose(cfg, block_maxima(q_index, k_index[:, :S], seen, cfg.index_block_size), rows.order)
        return blocks.visible(lists, cfg.index_block_size, rows.order, S, cfg.num_attention_heads)

    return mask


def forward(params: Params, cfg: Config, x: Tokens, positions=None) -> Tokens:
    """The definition. `positions` (int B T) feed RoPE only; blocks follow the order of x."""
    rows = all_of(cfg, x, positions)
    mask = _mask(params, cfg, index_keys(params, cfg, rows.x, rows.positions))
    return dense.attend_over(params, cfg, rows, *dense.project_keys(params, cfg, rows), mask)


def _append(params: Params, cfg: Config, step: Step, cache: MSACache) -> MSACache:
    """The cache with the new tokens."""
    k, v = dense.project_keys(params, cfg, step.queries)
    return append(cache, step, k=k, v=v, k_index=index_keys(params, cfg, step.x, step.positions))


def prefill(params: Params, cfg: Config, x: Tokens, cache: MSACache, lengths=None) -> tuple[Tokens, MSACache]:
    """Append T tokens (row b its first lengths[b]); each attends to its own picks of what is stored then."""
    step = begin(cfg, cache_spec(cfg), x, cache, lengths)
    cache = _append(params, cfg, step, cache)
    y = dense.attend_over(params, cfg, step.queries, cache.k, cache.v, _mask(params, cfg, cache.k_index))
    return end(step, y, x.dtype), cache


def decode(params: Params, cfg: Config, x: Tokens, cache: MSACache, ops=jax_ops) -> tuple[Tokens, MSACache]:
    """1 to 16 tokens a row: a scan of the index keys, a top-k of blocks, and a gather of the picked ones."""
    step = begin(cfg, cache_spec(cfg), few_tokens(x), cache)
    cache, q = _append(params, cfg, step, cache), dense.project_queries(params, cfg, step.queries)
    q = q.astype(cache.k.dtype)
    lists = _select(params, cfg, step, cache, ops)
    more = {"block_size": cfg.index_block_size, "out_dtype": x.dtype, **dense.options(params, cfg)}
    out, _ = ops.decode_block_sparse(q, cache.k, cache.v, lists, cache.length, **more)
    return end(step, dense.project_out(params, cfg, step.x, out), x.dtype), cache


def _select(params: Params, cfg: Config, step: Step, cache: MSACache, ops) -> Int[Array, "B T K L"]:
    q, size = index_queries(params, cfg, step.x, step.positions).astype(cache.k.dtype), cfg.index_block_size
    scores = ops.block_index_scores(q, cache.k_index, cache.length, block_size=size)
    return choose(cfg, scores, step.positions, ops)


def select(params: Params, cfg: Config, x: Token, cache: MSACache) -> Int[Array, "B 1 K L"]:
    """The blocks that decode would gather for x."""
    step = begin(cfg, cache_spec(cfg), one_token(x), cache)
    return _select(params, cfg, step, _append(params, cfg, step, cache), jax_ops)


def index_loss(params: Params, cfg: Config, x: Tokens) -> Float[Array, ""]:
    """KL of what the heads of each key head attend to, block by block, from the softmax of the blocks' index scores
    (jforge.core.distil).
    """
    params, x = distil.apart(params, x, shapes(cfg).keys() - dense.shapes(cfg).keys())
    rows, size, S = all_of(cfg, x, None), cfg.index_block_size, x.shape[1]
    seen = masks.causal(rows.order[..., None], jnp.arange(S))
    q, (k, _) = dense.project_queries(params, cfg, rows), dense.project_keys(params, cfg, rows)
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    more = {"scale": cfg.scaling, "softcap": cfg.attn_logit_softcapping}
    weights = [distil.mean_weights(q[:, :, n], k[:, :, n : n + 1], seen, **more) for n in range(k.shape[2])]
    padded = jnp.pad(jnp.stack(weights, axis=2), [(0, 0)] * 3 + [(0, -S % size)])
    target = padded.reshape(*padded.shape[:3], -1, size).sum(axis=-1)
    q_index, k_index = (of(params, cfg, x, rows.positions) for of in (index_queries, index_keys))
    scores = block_maxima(q_index, k_index, seen, size)
    return distil.divergence(target, scores, scores > -jnp.inf)


def tokens_of(cfg: Config, selection, S: int) -> Bool[Array, "B T S"]:
    """All tokens of the picked blocks, over all heads; nothing is attended beside them."""
    return blocks.tokens_of(selection, cfg.index_block_size, S)


def cache_spec(cfg: Config) -> CacheSpec:
    return CacheSpec(MSACache, dense.kv_buffers(cfg) | {"k_index": Buffer(("B", "S", "J"), (cfg.index_head_dim,))})


def work(cfg: Config, context: int, capacity: int, new: int, closing: bool) -> Work:
    """One step scans all index keys and gathers the blocks of its lists; a prefill masks all slots."""
    budget = cfg.index_topk_blocks * cfg.index_block_size
    slots = min(context, budget) if new == 1 else context
    scored = cfg.num_key_value_heads * cfg.index_head_dim * seen(context, new)
    return Work(
        read={"k": slots, "v": slots, "k_index": context},
        written={"k": new, "v": new, "k_index": new},
        flops=dense.flops(cfg, seen(context, new, budget)) + 2 * scored,
        entries_read=slots + context,
    )


_PLAIN = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}

msa = Attention(
    summary="grouped queries over the blocks that an index branch picks (MiniMax-M3)",
    traded="reads of keys and values for reads of an index: all is kept, and all index keys are scanned",
    Config=Config, shapes=shapes, cache_spec=cache_spec, work=work,
    forward=forward, prefill=prefill, decode=decode, select=select, tokens_of=tokens_of,
    index_loss=index_loss,
    models=FrozenDict({
        "MiniMax-M3": Config(hidden_size=6144, num_attention_heads=64, num_key_value_heads=4, head_dim=128,
                             qk_norm="head", norm_offset=1.0, rope_parameters=_PLAIN, index_head_dim=128),
    }),
    examples=(
        Config(hidden_size=12, num_attention_heads=4, num_key_value_heads=2, head_dim=8, qk_norm="head",
               norm_offset=1.0, rope_parameters=_PLAIN, index_head_dim=6, index_block_size=2, index_topk_blocks=2),
        Config(hidden_size=12, num_attention_heads=4, num_key_value_heads=1, head_dim=6, v_head_dim=4,
               rope_parameters=None, index_head_dim=3, index_block_size=3, index_topk_blocks=3, index_init_blocks=1,
               index_local_blocks=2),
    ),
)  # fmt: skip
