"""CSA, the compressed sparse layer of DeepSeek-V4: the window, and the L best of the entries that are complete.

    score_t,w = sum_i w_t,i relu(q_t,i . k_index_w),   q_i = rope_t(c_q wq_index_i),   w = x ww_index I^-1/2 J^-1/2
    I_t   = the min(index_topk, floor((t + 1) / m)) entries w with (w + 1) m <= t + 1 of largest score; ties: lower w
    o_t,n = rope_-t(sum over the keys of p key),   keys = [kv_s : t - W < s <= t] and [c_kv_w : w in I_t]

One softmax over both, with the sink, as in `v4_window`. c_kv and k_index are two compressors over the same blocks, both
with overlap (`v4_compressor`). c_q is the normed query latent; the index queries have no norm of their own. m is 4.
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
from . import inputs, v4_window
from . import v4_compressor as compressor
from .dsa import best, picked
from .rows import begin, finish, given_positions

ENTRIES = compressor.Compressor("c", "c_kv", "state_kv", "state_score", "head_dim", overlap=True)
INDEX = compressor.Compressor("ic", "k_index", "index_state_kv", "index_state_score", "index_head_dim", overlap=True)


def init_cache(cfg, batch, capacity, dtype=torch.bfloat16):
    """An empty cache with room for `capacity` tokens per row, the ring, the entries and the index keys in dtype."""
    check_fields(cfg)
    return v4_window.init_cache(cfg, batch, capacity, dtype) | compressor.init_cache(
        [ENTRIES, INDEX], cfg, batch, capacity, dtype
    )


def forward(params, cfg, x, positions=None):
    """y: B T D from x: B T D without a cache; positions and errors as in `v4_window.forward`.

    Blocks and windows count tokens; entry w turns at positions[b, w m].
    """
    check(params, cfg, x)
    positions = given_positions(x, positions)
    c_q, q, kv = v4_window.project(params, cfg, x, positions)
    entries, k_index = (compressor.entries_of(one, params, cfg, x, positions) for one in (ENTRIES, INDEX))
    order = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    seen = compressor.visible(cfg, order, entries.shape[1])
    q_index, weights = index_queries(params, cfg, x, c_q, positions)
    seen = seen & picked(best(cfg, masked_index_scores(q_index, k_index, weights, seen)), entries.shape[1])
    keys, mask = torch.cat([kv, entries], dim=1), torch.cat([v4_window.window_mask(cfg, x), seen], dim=-1)
    return v4_window.project_out(params, cfg, x, v4_window.attend(params, cfg, q, keys, mask), positions)


def prefill(params, cfg, x, cache, lengths=None):
    """(y, cache) after appending the first lengths[b] of the T tokens of row b, as in `v4_window.prefill`."""
    check(params, cfg, x)
    rows = begin(x, cache, compressor.checked_room([ENTRIES, INDEX], cfg, x, cache), lengths)
    c_q, q, kv = v4_window.project(params, cfg, rows.x, rows.positions)
    after = appended(params, cfg, cache, kv, rows)
    entries, k_index = after["c_kv"], after["k_index"]
    seen = compressor.visible(cfg, rows.positions, entries.shape[1]) & rows.queries[..., None]
    q_index, weights = index_queries(params, cfg, rows.x, c_q, rows.positions)
    scores = masked_index_scores(q_index.to(k_index.dtype), k_index, weights, seen)
    seen = seen & picked(best(cfg, scores), entries.shape[1])
    keys, mask = v4_window.ring_then_new(cfg, rows, cache["kv"], kv)
    keys, mask = torch.cat([keys, entries], dim=1), torch.cat([mask, seen], dim=-1)
    out = v4_window.attend(params, cfg, q.to(keys.dtype), keys, mask)
    return finish(v4_window.project_out(params, cfg, rows.x, out, rows.positions), rows), after


def decode(params, cfg, x, cache, ops=reference_ops):
    """(y, cache) after appending one token per row; x, y: B 1 D. Dtypes and rows without room: as in `prefill`.

    ops: any namespace with `decode_attention`, `decode_block_sparse`, `index_scores`, `topk_indices` and
    `merge_states`.
    """
    check(params, cfg, x, tokens=1)
    rows = begin(x, cache, compressor.checked_room([ENTRIES, INDEX], cfg, x, cache))
    c_q, q, kv = v4_window.project(params, cfg, x, rows.positions)
    cache = appended(params, cfg, cache, kv, rows)
    q_index, weights = index_queries(params, cfg, x, c_q, rows.positions)
    k_index, complete = cache["k_index"], cache["length"] // cfg.compress_rate
    picks = best(cfg, ops.index_scores(q_index.to(k_index.dtype), k_index, weights, complete), ops)
    q = q.to(cache["kv"].dtype)
    parts = (
        v4_window.window_part(params, cfg, q, cache, ops),
        ops.decode_block_sparse(
            q,
            cache["c_kv"][:, :, None],
            None,
            picks[:, :, None],
            None,
            block_size=1,
            scale=cfg.head_dim**-0.5,
            out_dtype=accumulator(q.dtype),
        ),
    )
    out, _ = ops.merge_states(*(torch.stack(part) for part in zip(*parts, strict=True)))
    return finish(v4_window.project_out(params, cfg, x, out, rows.positions), rows), cache


def index_queries(params, cfg, x, c_q, positions):
    """q_index B T I J in x's dtype, turned at positions, and the head weights B T I in float32 or wider, scaled."""
    q_index = einsum("btl,lij->btij", c_q, params["wq_index"], out_dtype=x.dtype)
    weights = einsum("btd,di->bti", x, params["ww_index"]) * (cfg.index_n_heads * cfg.index_head_dim) ** -0.5
    return v4_window.rotate(cfg, q_index, positions), weights


def appended(params, cfg, cache, kv, rows):
    """The cache after the rows' new tokens and the entries that they complete; the given cache is not changed."""
    after = v4_window.appended(cache, kv, rows)
    for one in (ENTRIES, INDEX):
        after |= compressor.appended(one, params, cfg, cache, rows)
    return after


def check(params, cfg, x, tokens=None):
    """Raise ValueError or TypeError for fields, parameters and tokens that do not fit together."""
    check_fields(cfg)
    v4_window.check(params, cfg, x, tokens)
    shapes = compressor.shapes(ENTRIES, cfg) | compressor.shapes(INDEX, cfg)
    shapes["wq_index"] = (cfg.q_lora_rank, cfg.index_n_heads, cfg.index_head_dim)
    shapes["ww_index"] = (cfg.hidden_size, cfg.index_n_heads)
    for name, shape in shapes.items():
        inputs.check_parameter(params, name, *shape)


def check_fields(cfg):
    """Raise ValueError or TypeError for fields that do not fit together."""
    v4_window.check_fields(cfg)
    inputs.check_counts(cfg, 1, "compress_rate", "index_n_heads", "index_head_dim", "index_topk")
    if cfg.index_head_dim < cfg.qk_rope_head_dim:
        raise ValueError(
            f"index_head_dim is {cfg.index_head_dim}; allowed: at least qk_rope_head_dim {cfg.qk_rope_head_dim}"
        )
