"""CSA, the compressed sparse layer of DeepSeek-V4: the window, and the L best of the entries that are complete.

    score_t,w = sum_i w_t,i relu(q_t,i . k_index_w),   q_i = rope_t(c_q wq_index_i),   w = x ww_index I^-1/2 J^-1/2
    I_t   = the min(index_topk, floor((t + 1) / m)) entries w with (w + 1) m <= t + 1 of largest score; ties: lower w
    o_t,n = rope_-t(sum over the keys of p key),   keys = [kv_s : t - W < s <= t] and [c_kv_w : w in I_t]

One softmax over both, with the sink, as in `v4_window`. c_kv and k_index are two compressors over the same blocks, both
with overlap (`v4_compress`). c_q is the normed query latent; the index queries have no norm of their own. m is 4.
DeepSeek-V4 (2606.19348), without the Hadamard rotation and the fp4 rounding of its kernels.

cfg: the fields of `v4_window`, compress_rate (m), index_n_heads (I), index_head_dim (J >= R), index_topk (L).
params: those of `v4_window`; wc_kv and wc_gate D 2H, c_bias m 2H, c_norm H; wq_index Lq I J, ww_index D I, wic_kv and
wic_gate D 2J, ic_bias m 2J, ic_norm J.
cache: that of `v4_window` (kv: B W' H, length: int32 B); c_kv: B E H and k_index: B E J with E = max(1, capacity // m),
after norm and RoPE; state_kv, state_score: B 2m 2H, and index_state_kv, index_state_score: B 2m 2J, float32 or wider.
It overflows past E m + m - 1 tokens, or past W' if W' < W.
"""

import torch

from .. import ops as reference_ops
from ..core.dtypes import accumulator, einsum
from ..ops.index_scores import masked_index_scores
from . import inputs, v4_compress, v4_window
from .dsa import choose, picked
from .sliding_window import in_window
from .step import begin, end, in_order, token_by_token

ENTRIES = v4_compress.Compressor("c", "c_kv", "state_kv", "state_score", "head_dim", overlap=True)
INDEX = v4_compress.Compressor("ic", "k_index", "index_state_kv", "index_state_score", "index_head_dim", overlap=True)
COMPRESSORS = (ENTRIES, INDEX)


def init_cache(cfg, batch, capacity, dtype=torch.bfloat16):
    """An empty cache with room for `capacity` tokens per row, the ring, the entries and the index keys in dtype."""
    check_fields(cfg)
    entries = v4_compress.init_cache(COMPRESSORS, cfg, batch, capacity, dtype)
    return v4_window.init_cache(cfg, batch, capacity, dtype) | entries


def forward(params, cfg, x, positions=None):
    """y: B T D from x: B T D without a cache; positions and errors as in `v4_window.forward`.

    Blocks and windows count tokens; entry w turns at positions[b, w m].
    """
    check(params, cfg, x)
    order, positions = in_order(x, positions)
    c_q, q, kv = v4_window.project(params, cfg, x, positions)
    entries, k_index = (v4_compress.compress(one, params, cfg, x, positions) for one in COMPRESSORS)
    q_index, weights = index_queries(params, cfg, x, c_q, positions)
    near = in_window(order, order, cfg.sliding_window)
    far = picked_entries(cfg, q_index, k_index, weights, v4_compress.seen(cfg, order, entries.shape[1]))
    out = v4_compress.attend_both(params, cfg, q, kv, near, entries, far)
    return v4_window.project_out(params, cfg, x, out, positions)


def prefill(params, cfg, x, cache, lengths=None):
    """(y, cache) after appending the first lengths[b] of the T tokens of row b, as in `v4_window.prefill`."""
    check(params, cfg, x)
    step = begin(x, cache, v4_compress.checked_room(COMPRESSORS, cfg, x, cache), lengths)
    c_q, q, kv = v4_window.project(params, cfg, step.x, step.positions)
    after = v4_compress.appended(COMPRESSORS, params, cfg, cache, kv, step)
    entries, k_index = after["c_kv"], after["k_index"]
    q_index, weights = index_queries(params, cfg, step.x, c_q, step.positions)
    keys, near = v4_window.recent(cfg, cache["kv"], kv, step)
    seen = v4_compress.seen(cfg, step.positions, entries.shape[1]) & step.keep[..., None]
    far = picked_entries(cfg, q_index.to(k_index.dtype), k_index, weights, seen)
    out = v4_compress.attend_both(params, cfg, q.to(keys.dtype), keys, near, entries, far)
    return end(step, v4_window.project_out(params, cfg, step.x, out, step.positions)), after


@token_by_token
def decode(params, cfg, x, cache, ops=reference_ops):
    """(y, cache) after appending 1 to 16 tokens per row; x, y: B T D. Dtypes and rows without room: as in `prefill`.

    ops: any namespace with `decode_attention`, `decode_block_sparse`, `index_scores`, `topk_indices` and
    `merge_states`.
    """
    check(params, cfg, x, tokens=1)
    step = begin(x, cache, v4_compress.checked_room(COMPRESSORS, cfg, x, cache))
    c_q, q, kv = v4_window.project(params, cfg, x, step.positions)
    cache = v4_compress.appended(COMPRESSORS, params, cfg, cache, kv, step)
    q_index, weights = index_queries(params, cfg, x, c_q, step.positions)
    k_index, complete = cache["k_index"], cache["length"] // cfg.compress_rate
    picks = choose(cfg, ops.index_scores(q_index.to(k_index.dtype), k_index, weights, complete), ops)[:, :, None]
    q, entries = q.to(cache["kv"].dtype), cache["c_kv"][:, :, None]
    options = dict(block_size=1, scale=cfg.head_dim**-0.5, out_dtype=accumulator(q.dtype))
    near = v4_window.attend_ring(params, cfg, q, cache, ops)
    far = ops.decode_block_sparse(q, entries, None, picks, None, **options)
    out = v4_compress.merge(ops, near, far)
    return end(step, v4_window.project_out(params, cfg, x, out, step.positions)), cache


def index_queries(params, cfg, x, c_q, positions):
    """q_index B T I J in x's dtype, turned at positions, and the head weights B T I in float32 or wider, scaled."""
    q_index = einsum("btl,lij->btij", c_q, params["wq_index"], out_dtype=x.dtype)
    weights = einsum("btd,di->bti", x, params["ww_index"]) * (cfg.index_n_heads * cfg.index_head_dim) ** -0.5
    return v4_window.rotate(cfg, q_index, positions), weights


def picked_entries(cfg, q_index, k_index, weights, seen):
    """bool B T E: the picks of every query among the entries seen, bool B T E."""
    return seen & picked(choose(cfg, masked_index_scores(q_index, k_index, weights, seen)), seen.shape[-1])


def shapes(cfg):
    """{name: shape} of the parameters."""
    index = {"wq_index": (cfg.q_lora_rank, cfg.index_n_heads, cfg.index_head_dim)}
    index["ww_index"] = (cfg.hidden_size, cfg.index_n_heads)
    return v4_window.shapes(cfg) | v4_compress.shapes(ENTRIES, cfg) | v4_compress.shapes(INDEX, cfg) | index


def check(params, cfg, x, tokens=None):
    """Raise ValueError or TypeError for fields, parameters and tokens that do not fit together."""
    check_fields(cfg)
    inputs.check_tokens(x, cfg.hidden_size, tokens)
    inputs.check_parameters(params, shapes(cfg))


def check_fields(cfg):
    """Raise ValueError or TypeError for fields that do not fit together."""
    v4_window.check_fields(cfg)
    inputs.check_counts(cfg, 1, "compress_rate", "index_n_heads", "index_head_dim", "index_topk")
    if cfg.index_head_dim < cfg.qk_rope_head_dim:
        raise ValueError(
            f"index_head_dim is {cfg.index_head_dim}; allowed: at least qk_rope_head_dim {cfg.qk_rope_head_dim}"
        )
