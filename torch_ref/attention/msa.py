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
from ..core.append import append
from ..core.block_lists import headwise_attention, tokens_of_blocks
from ..core.dtypes import einsum
from ..core.norm import rms_norm
from ..core.rope import frequencies
from ..ops.block_index_scores import block_maxima
from . import dense, inputs
from .rows import begin, finish, given_positions


def init_cache(cfg, batch, capacity, dtype=torch.bfloat16):
    """An empty cache with room for `capacity` tokens per row, k, v and k_index in dtype."""
    check_fields(cfg)
    k_index = torch.zeros(batch, capacity, cfg.index_head_dim, dtype=dtype)
    return dense.init_cache(cfg, batch, capacity, dtype) | {"k_index": k_index}


def forward(params, cfg, x, positions=None):
    """y: B T D from x: B T D without a cache; positions and errors as in `dense.forward`.

    Blocks are counted from the row's first token, whatever the positions.
    """
    check(params, cfg)
    inputs.check_tokens(x, cfg.hidden_size)
    positions = given_positions(x, positions)
    q, k, v = dense.project(params, cfg, x, positions)
    q_index, k_index = project_index(params, cfg, x, positions)
    order = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    mask = visible(cfg, q_index, k_index, order, order[:, None] <= order[..., None])
    out = headwise_attention(q, k, v, mask, dense.scaling(cfg), cfg.attn_logit_softcapping)
    return dense.project_out(params, cfg, x, out.to(x.dtype))


def prefill(params, cfg, x, cache, lengths=None):
    """(y, cache) after appending the first lengths[b] of the T tokens of row b, as in `dense.prefill`.

    Blocks are picked by the index keys as stored.
    """
    check(params, cfg)
    inputs.check_tokens(x, cfg.hidden_size)
    rows = begin(x, cache, checked_room(cfg, x, cache), lengths)
    q, k, v = dense.project(params, cfg, rows.x, rows.positions)
    q_index, k_index = project_index(params, cfg, rows.x, rows.positions)
    cache, stored = appended(cache, k, v, k_index, rows), cache["k"].dtype
    slot = torch.arange(cache["k"].shape[1], device=x.device)
    causal = (slot <= rows.positions[..., None]) & rows.queries[..., None]
    mask = visible(cfg, q_index.to(stored), cache["k_index"], rows.positions, causal)
    out = headwise_attention(q.to(stored), cache["k"], cache["v"], mask, dense.scaling(cfg), cfg.attn_logit_softcapping)
    return finish(dense.project_out(params, cfg, rows.x, out.to(x.dtype)), rows), cache


def decode(params, cfg, x, cache, ops=reference_ops):
    """(y, cache) after appending one token per row; x, y: B 1 D. Dtypes and rows without room: as in `prefill`.

    ops: any namespace with `block_index_scores`, `topk_indices` and `decode_block_sparse`.
    """
    check(params, cfg)
    inputs.check_tokens(x, cfg.hidden_size, tokens=1)
    rows = begin(x, cache, checked_room(cfg, x, cache))
    q, k, v = dense.project(params, cfg, x, rows.positions)
    q_index, k_index = project_index(params, cfg, x, rows.positions)
    cache, stored = appended(cache, k, v, k_index, rows), cache["k"].dtype
    scores = ops.block_index_scores(
        q_index.to(stored), cache["k_index"], cache["length"], block_size=cfg.index_block_size
    )
    out, _ = ops.decode_block_sparse(
        q.to(stored),
        cache["k"],
        cache["v"],
        chosen_blocks(cfg, scores, rows.positions, ops),
        cache["length"],
        block_size=cfg.index_block_size,
        scale=dense.scaling(cfg),
        softcap=cfg.attn_logit_softcapping,
        out_dtype=x.dtype,
    )
    return finish(dense.project_out(params, cfg, x, out), rows), cache


def project_index(params, cfg, x, positions):
    """q_index B T K J and k_index B T J of the new tokens, in x's dtype: norm, then RoPE; positions: int B T."""
    q = einsum("btd,dkj->btkj", x, params["wq_index"], out_dtype=x.dtype)
    k = einsum("btd,dj->btj", x, params["wk_index"], out_dtype=x.dtype)
    q = rms_norm(q, params["q_index_norm"], cfg.rms_norm_eps, cfg.norm_offset)
    k = rms_norm(k, params["k_index_norm"], cfg.rms_norm_eps, cfg.norm_offset)
    return dense.rotate(cfg, q, positions), dense.rotate(cfg, k[:, :, None], positions)[:, :, 0]


def chosen_blocks(cfg, scores, positions, ops=reference_ops):
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
    lists = chosen_blocks(cfg, scores, positions)
    return tokens_of_blocks(lists, cfg.index_block_size, k_index.shape[1]) & causal[:, :, None]


def appended(cache, k, v, k_index, rows):
    """The cache after the rows' new tokens; the given cache is not changed."""
    k_index = append(cache["k_index"], k_index, rows.start, rows.new)
    return dense.appended(cache, k, v, rows.new) | {"k_index": k_index}


def check_fields(cfg):
    """Raise ValueError or TypeError for fields that do not fit together."""
    inputs.check_counts(cfg, 1, "index_head_dim", "index_block_size", "index_topk_blocks", "index_local_blocks")
    inputs.check_counts(cfg, 0, "index_init_blocks")
    if cfg.rope_parameters is not None:
        turned = 2 * len(frequencies(cfg.rope_parameters, cfg.head_dim)[0])
        if cfg.index_head_dim < turned:
            raise ValueError(f"index_head_dim is {cfg.index_head_dim}; allowed: >= {turned}, the channels RoPE turns")


def check(params, cfg):
    """Raise ValueError or TypeError for fields and for index parameters that are not the config's."""
    check_fields(cfg)
    width = cfg.index_head_dim
    inputs.check_parameter(params, "wq_index", cfg.hidden_size, cfg.num_key_value_heads, width)
    inputs.check_parameter(params, "wk_index", cfg.hidden_size, width)
    inputs.check_parameter(params, "q_index_norm", width)
    inputs.check_parameter(params, "k_index_norm", width)


def checked_room(cfg, x, cache):
    """The tokens that a row may have in all: the slots of the cache."""
    heads = cfg.num_key_value_heads
    inputs.check_cache(cache, x, k=(heads, cfg.head_dim), v=(heads, cfg.v_head_dim), k_index=(cfg.index_head_dim,))
    return cache["k"].shape[1]
