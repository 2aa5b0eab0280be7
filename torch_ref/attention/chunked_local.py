"""Chunked attention: `dense` in which a query sees the tokens of its own chunk of C, up to itself.

    o_t,n = sum over s <= t with s // C = t // C of p_s v_s,   p as in `dense`,   KV head n // (N/K)

The first token of a chunk sees itself alone: no window slides, a counter starts again. Llama 4.

cfg: the fields of `dense`, and attention_chunk_size (C >= 1).
params: those of `dense`.
cache: {"k": B C' K H, "v": B C' K V, "length": int32 B} with C' = min(C, capacity); the token at position p lies in
slot p mod C', k after norm and RoPE. With C' = C it never overflows, with C' < C it holds C' tokens in all. The first
(length - 1) mod C + 1 slots are of the chunk of the last token; the others may hold anything.
"""

import torch

from .. import ops as reference_ops
from ..core import ring
from . import dense, inputs
from .sliding_window import ring_then_new
from .step import begin, end, in_order, token_by_token


def init_cache(cfg, batch, capacity, dtype=torch.bfloat16):
    """An empty ring of min(C, capacity) slots per row, k and v in dtype."""
    inputs.check_counts(cfg, 1, "attention_chunk_size")
    return dense.init_cache(cfg, batch, min(cfg.attention_chunk_size, capacity), dtype)


def forward(params, cfg, x, positions=None):
    """y: B T D from x: B T D without a cache; positions and errors as in `dense.forward`; chunks count tokens."""
    inputs.check_counts(cfg, 1, "attention_chunk_size")
    inputs.check_tokens(x, cfg.hidden_size)
    order, positions = in_order(x, positions)
    q, k, v = dense.project(params, cfg, x, positions, order)
    out = dense.attend(params, cfg, q, k, v, in_chunk(cfg, order, order), order, order)
    return dense.project_out(params, cfg, x, out)


def prefill(params, cfg, x, cache, lengths=None):
    """(y, cache) after appending the first lengths[b] of the T tokens of row b, as in `sliding_window.prefill`."""
    step = begin(x, cache, checked_room(cfg, x, cache), lengths)
    q, k, v = dense.project(params, cfg, step.x, step.positions)
    held, keys, values = ring_then_new(step, cache["k"], cache["v"], k, v)
    mask = in_chunk(cfg, step.positions, held) & (held >= 0)[:, None] & step.keep[..., None]
    out = dense.attend(params, cfg, q.to(keys.dtype), keys, values, mask, step.positions, held)
    return end(step, dense.project_out(params, cfg, step.x, out)), step.appended(cache, ring.write, k=k, v=v)


@token_by_token
def decode(params, cfg, x, cache, ops=reference_ops):
    """(y, cache) after appending 1 to 16 tokens per row; x, y: B T D. ops: any namespace with `decode_attention`."""
    step = begin(x, cache, checked_room(cfg, x, cache, tokens=1))
    q, k, v = dense.project(params, cfg, x, step.positions)
    cache = step.appended(cache, ring.write, k=k, v=v)
    # a chunk starts in slot 0, so that its tokens lie in their order and the op needs no mask
    filled = torch.where(cache["length"] > 0, (cache["length"] - 1) % cfg.attention_chunk_size + 1, 0)
    out = dense.attend_slots(params, cfg, x, q, cache["k"], cache["v"], filled, ops)
    return end(step, dense.project_out(params, cfg, x, out)), cache


def in_chunk(cfg, query, key):
    """bool B T S: key <= query and both in one chunk, for indices in the row: query int B T, key int B S."""
    query, key, size = query[..., None], key[:, None], cfg.attention_chunk_size
    return (key <= query) & (key // size == query // size)


def checked_room(cfg, x, cache, tokens=None):
    """As `dense.checked_room`; None when the ring has the chunk's C slots, and never overflows."""
    inputs.check_counts(cfg, 1, "attention_chunk_size")
    slots = dense.checked_room(cfg, x, cache, tokens)
    return inputs.ring_room("k", slots, cfg.attention_chunk_size, "the chunk")
