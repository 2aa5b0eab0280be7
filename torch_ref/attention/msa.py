"""MiniMax Sparse Attention: `dense` in which every KV head picks blocks of tokens by the best index score in each.

    q_I,g = rope(norm(x wq_index_g)),   k_I = rope(norm(x wk_index))      one index head per KV head, one key for all
    score_t,g,j = max over s <= t of block j (s // M = j) of q_I,t,g . k_I,s
    score = +inf for j < init_blocks and for t // M - local_blocks < j, -inf for j > t // M
    I_t,g   = the topk_blocks blocks of largest score, the forced ones included, in ties the lower block
    o_t,n   = sum of p_s v_s over s <= t with s // M in I_t,g,   g = n // (N/K),   p = softmax(cap(scaling q_t,n . k_s))

While a row has at most topk_blocks blocks this is `dense`. MiniMax-M3 (2606.13392), as its published layers compute it:
norms and RoPE in the index branch, scores without a scale, which changes no order. A budget smaller than the forced
blocks goes to the lowest of them, the tie rule.

cfg: the fields of `dense`, index_head_dim (J), index_block_size (M), index_topk_blocks (>= 1), index_local_blocks
(>= 1), index_init_blocks (>= 0). The index norms take norm_offset and rms_norm_eps; RoPE turns the first channels of
J by the angles of the main heads, so J is at least the number that turns there.
params: those of `dense`, wq_index D K J, wk_index D J, q_index_norm J, k_index_norm J.
cache: that of `dense`, and k_index B S J after norm and RoPE, in the dtype of k.
"""

import torch

from .. import ops as reference_ops
from ..core import blocks
from ..core.dtypes import einsum
from ..core.norm import rms_norm
from ..core.rope import frequencies
from ..ops.block_index_scores import block_maxima
from . import dense, inputs
from .step import begin, empty, end, in_order, token_by_token


def init_cache(cfg, batch, capacity, dtype=torch.bfloat16):
    """An empty cache with room for `capacity` tokens per row, k, v and k_index in dtype."""
    check_fields(cfg)
    return dense.init_cache(cfg, batch, capacity, dtype) | empty(batch, dtype, k_index=(capacity, cfg.index_head_dim))


def forward(params, cfg, x, positions=None):
    """y: B T D from x: B T D without a cache; positions and errors as in `dense.forward`.

    Blocks are counted from the row's first token, whatever the positions.
    """
    check(params, cfg)
    inputs.check_tokens(x, cfg.hidden_size)
    order, positions = in_order(x, positions)
    q, k, v = dense.project(params, cfg, x, positions, order)
    q_index, k_index = project_index(params, cfg, x, positions)
    mask = visible(cfg, q_index, k_index, order, order[:, None] <= order[..., None])
    out = blocks.headwise_attention(q, k, v, mask, **dense.options(cfg))
    return dense.project_out(params, cfg, x, out)


def prefill(params, cfg, x, cache, lengths=None):
    """(y, cache) after appending the first lengths[b] of the T tokens of row b, as in `dense.prefill`.

    Blocks are picked by the index keys as stored.
    """
    check(params, cfg)
    step = begin(x, cache, checked_room(cfg, x, cache), lengths)
    q, k, v = dense.project(params, cfg, step.x, step.positions)
    q_index, k_index = project_index(params, cfg, step.x, step.positions)
    cache = step.appended(cache, k=k, v=v, k_index=k_index)
    k, v = cache["k"], cache["v"]
    mask = visible(cfg, q_index.to(k.dtype), cache["k_index"], step.positions, step.causal(k.shape[1]))
    out = blocks.headwise_attention(q.to(k.dtype), k, v, mask, **dense.options(cfg))
    return end(step, dense.project_out(params, cfg, step.x, out)), cache


@token_by_token
def decode(params, cfg, x, cache, ops=reference_ops):
    """(y, cache) after appending 1 to 16 tokens per row; x, y: B T D. Dtypes and rows without room: as in `prefill`.

    ops: any namespace with `block_index_scores`, `topk_indices` and `decode_block_sparse`.
    """
    check(params, cfg)
    step = begin(x, cache, checked_room(cfg, x, cache, tokens=1))
    q, k, v = dense.project(params, cfg, x, step.positions)
    q_index, k_index = project_index(params, cfg, x, step.positions)
    cache = step.appended(cache, k=k, v=v, k_index=k_index)
    k, v, length, size = cache["k"], cache["v"], cache["length"], cfg.index_block_size
    scores = ops.block_index_scores(q_index.to(k.dtype), cache["k_index"], length, block_size=size)
    lists, options = choose(cfg, scores, step.positions, ops), dense.options(cfg) | {"out_dtype": x.dtype}
    out, _ = ops.decode_block_sparse(q.to(k.dtype), k, v, lists, length, block_size=size, **options)
    return end(step, dense.project_out(params, cfg, x, out)), cache


def project_index(params, cfg, x, positions):
    """q_index B T K J and k_index B T J of the new tokens, in x's dtype: norm, then RoPE; positions: int B T."""
    q = einsum("btd,dkj->btkj", x, params["wq_index"], out_dtype=x.dtype)
    k = einsum("btd,dj->btj", x, params["wk_index"], out_dtype=x.dtype)
    q = rms_norm(q, params["q_index_norm"], cfg.rms_norm_eps, cfg.norm_offset)
    k = rms_norm(k, params["k_index_norm"], cfg.rms_norm_eps, cfg.norm_offset)
    return dense.rotate(cfg, q, positions), dense.rotate(cfg, k[:, :, None], positions)[:, :, 0]


def choose(cfg, scores, positions, ops=reference_ops):
    """int32 B T K L: the picks for the queries at positions (int B T), L = min(index_topk_blocks, blocks).

    scores: B T K blocks, those of `block_index_scores`.
    """
    block = torch.arange(scores.shape[-1], device=scores.device)
    current = (positions // cfg.index_block_size)[..., None, None]
    forced = (block < cfg.index_init_blocks) | (block > current - cfg.index_local_blocks)
    scores = scores.masked_fill(forced, torch.inf).masked_fill(block > current, -torch.inf)
    return ops.topk_indices(scores, min(cfg.index_topk_blocks, max(1, len(block))))


def visible(cfg, q_index, k_index, positions, causal):
    """bool B T K S: the tokens of the blocks that each KV head picks, of those in causal (bool B T S).

    positions: int B T. Index keys that no query may see can hold NaN or Inf.
    """
    scores = block_maxima(q_index, k_index, causal, cfg.index_block_size)
    lists = choose(cfg, scores, positions)
    return blocks.tokens(lists, cfg.index_block_size, k_index.shape[1]) & causal[:, :, None]


def check_fields(cfg):
    """Raise ValueError or TypeError for fields that do not fit together."""
    inputs.check_counts(cfg, 1, "index_head_dim", "index_block_size", "index_topk_blocks", "index_local_blocks")
    inputs.check_counts(cfg, 0, "index_init_blocks")
    inputs.check_off(cfg, "the op over blocks knows no slopes", "alibi")
    if cfg.rope_parameters is not None:
        turned = 2 * len(frequencies(cfg.rope_parameters, cfg.head_dim)[0])
        if cfg.index_head_dim < turned:
            raise ValueError(f"index_head_dim is {cfg.index_head_dim}; allowed: >= {turned}, the channels RoPE turns")


def check(params, cfg):
    """Raise ValueError or TypeError for fields and for index parameters that are not the config's."""
    check_fields(cfg)
    d, heads, width = cfg.hidden_size, cfg.num_key_value_heads, cfg.index_head_dim
    shapes = {"wq_index": (d, heads, width), "wk_index": (d, width), "q_index_norm": (width,), "k_index_norm": (width,)}
    inputs.check_parameters(params, shapes)


def checked_room(cfg, x, cache, tokens=None):
    """As `dense.checked_room`."""
    return dense.checked_room(cfg, x, cache, tokens, k_index=(cfg.index_head_dim,))
