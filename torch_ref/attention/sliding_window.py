"""Sliding-window attention: `dense` in which a query sees the last W tokens, its own included.

    o_t,n = sum over t - W < s <= t of p_s v_s,   p = softmax(cap(scaling q_t,n . k_s)),   KV head n // (N/K)

Mistral 7B v0.1 (2310.06825); the local layers of Gemma 2, Gemma 3 and gpt-oss.

cfg: the fields of `dense`, and sliding_window (W >= 1).
params: those of `dense`.
cache: {"k": B W' K H, "v": B W' K V, "length": int32 B} with W' = min(W, capacity); the token at position p lies in
slot p mod W', k after norm and RoPE. With W' = W it never overflows, with W' < W it holds W' tokens in all.
"""

import torch

from .. import ops as reference_ops
from ..core.ring import append_ring, ring_positions
from ..core.softmax import grouped_attention
from . import dense, inputs
from .rows import begin, finish, given_positions


def init_cache(cfg, batch, capacity, dtype=torch.bfloat16):
    """An empty ring of min(W, capacity) slots per row, k and v in dtype."""
    inputs.check_counts(cfg, 1, "sliding_window")
    return dense.init_cache(cfg, batch, min(cfg.sliding_window, capacity), dtype)


def forward(params, cfg, x, positions=None):
    """y: B T D from x: B T D without a cache; positions and errors as in `dense.forward`."""
    inputs.check_counts(cfg, 1, "sliding_window")
    return forward_window(params, cfg, x, positions, cfg.sliding_window)


def prefill(params, cfg, x, cache, lengths=None):
    """(y, cache) after appending the first lengths[b] of the T tokens of row b, as in `dense.prefill`.

    The queries see what the ring held before the call and the new tokens, both as stored; the ring is written after.
    """
    inputs.check_counts(cfg, 1, "sliding_window")
    return prefill_window(params, cfg, x, cache, lengths, cfg.sliding_window)


def decode(params, cfg, x, cache, ops=reference_ops):
    """(y, cache) after appending one token per row; x, y: B 1 D. ops: any namespace with `decode_attention`."""
    inputs.check_counts(cfg, 1, "sliding_window")
    return decode_window(params, cfg, x, cache, ops, cfg.sliding_window)


def forward_window(params, cfg, x, positions, window, sinks=None):
    """`forward` with window (None: all tokens) and sinks (N, or None) as arguments."""
    inputs.check_tokens(x, cfg.hidden_size)
    q, k, v = dense.project(params, cfg, x, given_positions(x, positions))
    order = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    mask = in_window(order, order, window)
    out, _ = grouped_attention(q, k, v, mask, dense.scaling(cfg), sinks, cfg.attn_logit_softcapping)
    return dense.project_out(params, cfg, x, out.to(x.dtype))


def prefill_window(params, cfg, x, cache, lengths, window, sinks=None):
    """`prefill` with window (None: a cache that never wraps) and sinks (N, or None) as arguments."""
    inputs.check_tokens(x, cfg.hidden_size)
    rows = begin(x, cache, checked_room(cfg, x, cache, window), lengths)
    q, k, v = dense.project(params, cfg, rows.x, rows.positions)
    held, keys, values = ring_then_new(rows, cache["k"], cache["v"], k, v)
    mask = in_window(rows.positions, held, window) & (held >= 0)[:, None] & rows.queries[..., None]
    out, _ = grouped_attention(
        q.to(keys.dtype), keys, values, mask, dense.scaling(cfg), sinks, cfg.attn_logit_softcapping
    )
    y = dense.project_out(params, cfg, rows.x, out.to(x.dtype))
    return finish(y, rows), appended(cache, k, v, rows)


def decode_window(params, cfg, x, cache, ops, window, sinks=None):
    """`decode` with window (None: a cache that never wraps) and sinks (N, or None) as arguments."""
    inputs.check_tokens(x, cfg.hidden_size, tokens=1)
    rows = begin(x, cache, checked_room(cfg, x, cache, window))
    q, k, v = dense.project(params, cfg, x, rows.positions)
    cache = appended(cache, k, v, rows)
    # written first, so that the slots hold the window and nothing else: their order does not matter to a softmax
    out, _ = ops.decode_attention(
        q.to(cache["k"].dtype),
        cache["k"],
        cache["v"],
        cache["length"].clamp(max=cache["k"].shape[1]),
        scale=dense.scaling(cfg),
        sinks=sinks,
        softcap=cfg.attn_logit_softcapping,
        out_dtype=x.dtype,
    )
    return finish(dense.project_out(params, cfg, x, out), rows), cache


def in_window(query, key, window):
    """bool B T S: the keys at positions key (int B S) that the queries at positions query (int B T) see."""
    behind = query[..., None] - key[:, None]
    return (behind >= 0) if window is None else (behind >= 0) & (behind < window)


def ring_then_new(rows, ring_k, ring_v, k, v, first=0):
    """(held, keys, values): the slots of the ring before the call, then the T new tokens, rounded as the ring stores.

    held: int32 B (W' + T), the position of each, below `first` for an empty slot. Writing the new tokens first would
    destroy keys that earlier queries of the same call still see.
    """
    held = torch.cat([ring_positions(rows.start, ring_k.shape[1], first), rows.positions], dim=1)
    return held, torch.cat([ring_k, k.to(ring_k.dtype)], dim=1), torch.cat([ring_v, v.to(ring_v.dtype)], dim=1)


def appended(cache, k, v, rows):
    """The cache after the rows' new tokens; the given cache is not changed."""
    return {
        "k": append_ring(cache["k"], k, rows.start, rows.new),
        "v": append_ring(cache["v"], v, rows.start, rows.new),
        "length": rows.start + rows.new,
    }


def checked_room(cfg, x, cache, window):
    """The tokens that a row may have in all: the slots of the ring, or None when it has the window's W of them."""
    inputs.check_cache(cache, x, k=(cfg.num_key_value_heads, cfg.head_dim), v=(cfg.num_key_value_heads, cfg.v_head_dim))
    slots = cache["k"].shape[1]
    if window is None or slots < window:
        return slots
    if slots > window:
        raise ValueError(f'cache["k"] has S={slots} slots; allowed: at most {window}, the window')
    return None
