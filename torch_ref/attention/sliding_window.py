"""Sliding-window attention: `dense` in which a query sees the last W tokens, its own included.

    o_t,n = sum over t - W < s <= t of p_s v_s,   p as in `dense`,   KV head n // (N/K)

Mistral 7B v0.1 (2310.06825); the local layers of Gemma 2, Gemma 3 and gpt-oss.

cfg: the fields of `dense`, and sliding_window (W >= 1).
params: those of `dense`.
cache: {"k": B W' K H, "v": B W' K V, "length": int32 B} with W' = min(W, capacity); the token at position p lies in
slot p mod W', k after norm and RoPE. With W' = W it never overflows, with W' < W it holds W' tokens in all.
"""

import torch

from .. import ops as reference_ops
from ..core import ring
from . import dense, inputs
from .step import begin, end, in_order, token_by_token


def init_cache(cfg, batch, capacity, dtype=torch.bfloat16):
    """An empty ring of min(W, capacity) slots per row, k and v in dtype."""
    inputs.check_counts(cfg, 1, "sliding_window")
    return dense.init_cache(cfg, batch, min(cfg.sliding_window, capacity), dtype)


def forward(params, cfg, x, positions=None):
    """y: B T D from x: B T D without a cache; positions and errors as in `dense.forward`."""
    inputs.check_counts(cfg, 1, "sliding_window")
    inputs.check_tokens(x, cfg.hidden_size)
    order, positions = in_order(x, positions)
    q, k, v = dense.project(params, cfg, x, positions, order)
    out = dense.attend(params, cfg, q, k, v, in_window(order, order, cfg.sliding_window), order, order)
    return dense.project_out(params, cfg, x, out)


def prefill(params, cfg, x, cache, lengths=None):
    """(y, cache) after appending the first lengths[b] of the T tokens of row b, as in `dense.prefill`.

    The queries see what the ring held before the call and the new tokens, both as stored; the ring is written after.
    """
    step = begin(x, cache, checked_room(cfg, x, cache), lengths)
    q, k, v = dense.project(params, cfg, step.x, step.positions)
    held, keys, values = ring_then_new(step, cache["k"], cache["v"], k, v)
    mask = in_window(step.positions, held, cfg.sliding_window) & (held >= 0)[:, None] & step.keep[..., None]
    out = dense.attend(params, cfg, q.to(keys.dtype), keys, values, mask, step.positions, held)
    return end(step, dense.project_out(params, cfg, step.x, out)), step.appended(cache, ring.write, k=k, v=v)


@token_by_token
def decode(params, cfg, x, cache, ops=reference_ops):
    """(y, cache) after appending 1 to 16 tokens per row; x, y: B T D. ops: any namespace with `decode_attention`."""
    step = begin(x, cache, checked_room(cfg, x, cache, tokens=1))
    q, k, v = dense.project(params, cfg, x, step.positions)
    cache = step.appended(cache, ring.write, k=k, v=v)
    k, v = cache["k"], cache["v"]
    # written first, so that the slots hold the window and nothing else: their order matters to slopes alone
    if cfg.alibi:
        k, v = ring.oldest_first(k, cache["length"]), ring.oldest_first(v, cache["length"])
    out = dense.attend_slots(params, cfg, x, q, k, v, cache["length"].clamp(max=k.shape[1]), ops)
    return end(step, dense.project_out(params, cfg, x, out)), cache


def in_window(query, key, window):
    """bool B T S: the keys at positions key (int B S) that the queries at positions query (int B T) see."""
    behind = query[..., None] - key[:, None]
    return (behind >= 0) if window is None else (behind >= 0) & (behind < window)


def ring_then_new(step, ring_k, ring_v, k, v, first=0):
    """(held, keys, values): the slots of the ring before the call, then the T new tokens, rounded as the ring stores.

    held: int32 B (W' + T), the position of each, below `first` for an empty slot. Writing the new tokens first would
    destroy keys that earlier queries of the same call still see.
    """
    held = torch.cat([ring.held(step.start, ring_k.shape[1], first), step.positions], dim=1)
    return held, torch.cat([ring_k, k.to(ring_k.dtype)], dim=1), torch.cat([ring_v, v.to(ring_v.dtype)], dim=1)


def checked_room(cfg, x, cache, tokens=None):
    """As `dense.checked_room`; None when the ring has the window's W slots, and never overflows."""
    inputs.check_counts(cfg, 1, "sliding_window")
    return inputs.ring_room("k", dense.checked_room(cfg, x, cache, tokens), cfg.sliding_window)
