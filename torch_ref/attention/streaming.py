"""StreamingLLM: the first s tokens stay, then the most recent R; positions count what is kept, not what was seen.

    o_t,n = sum of p_j v_j over j <= t with j < s or j > t - R,   p = softmax(cap(scaling z))
    z_j   = rope(q_t, t - e) . rope(k_j, j)   for j < s,    e = max(0, t + 1 - (s + R)) the tokens that were dropped
    z_j   = rope(q_t, t)     . rope(k_j, j)   for j >= s

The paper rotates the kept keys at 0, 1, 2 .. in the order of the cache and the query at the last of these numbers.
Inside the window that is the true distance, and the sinks are e positions nearer: two rotations of the query give the
same logits and no key is rotated again. The row drops a token before it adds one, so it attends min(t + 1, s + R)
keys, its own included. Xiao et al. 2023 (2309.17453), `evict_for_space`.

cfg: the fields of `dense`, start_size (s >= 1), recent_size (R >= 1).
params: those of `dense`.
cache: {"k": B S K H, "v": B S K V, "length": int32 B}, S = min(s + R, capacity). The token at position p < s lies in
slot p, the one at p >= s in slot s + (p - s) mod (S - s); keys after norm and RoPE at p. With S = s + R the cache never
overflows, else it holds S tokens.
"""

import torch

from .. import ops as reference_ops
from ..core import ring
from ..core.append import append
from ..core.dtypes import accumulator
from ..core.softmax import grouped_attention
from . import dense, inputs
from .sliding_window import in_window, ring_then_new
from .step import begin, end, in_order, token_by_token


def init_cache(cfg, batch, capacity, dtype=torch.bfloat16):
    """Empty sinks with an empty ring behind them, min(s + R, capacity) slots per row, in dtype."""
    check_fields(cfg)
    return dense.init_cache(cfg, batch, min(cfg.start_size + cfg.recent_size, capacity), dtype)


def forward(params, cfg, x, positions=None):
    """y: B T D from x: B T D without a cache; positions and errors as in `dense.forward`.

    s, R and e count tokens of the row, whatever their positions: the query meets the sinks at positions - e.
    """
    check_fields(cfg)
    inputs.check_tokens(x, cfg.hidden_size)
    order, positions = in_order(x, positions)
    q, k, v = dense.qkv(params, cfg, x)
    k, first = dense.rotate(cfg, k, positions), order < cfg.start_size
    out = attend(cfg, *both_queries(cfg, q, positions, order), k, v, first, visible(cfg, order, order))
    return dense.project_out(params, cfg, x, out)


def prefill(params, cfg, x, cache, lengths=None):
    """(y, cache) after appending the first lengths[b] of the T tokens of row b, as in `dense.prefill`.

    The queries see what the cache held before the call and the new tokens, both as stored.
    """
    step = begin(x, cache, checked_room(cfg, x, cache), lengths)
    q, k, v = dense.qkv(params, cfg, step.x)
    k, stored = dense.rotate(cfg, k, step.positions), cache["k"].dtype
    after = appended(cfg, cache, k, v, step)
    sink_k, sink_v, _, _ = parts(cfg, after)
    _, _, ring_k, ring_v = parts(cfg, cache)
    held, keys, values = ring_then_new(step, ring_k, ring_v, k, v, first=cfg.start_size)
    # a new token before s is attended as a sink, from its slot
    window_mask = visible(cfg, step.positions, held) & (held >= cfg.start_size)[:, None]
    slots = torch.arange(sink_k.shape[1], device=x.device).expand(len(x), -1)
    mask = torch.cat([visible(cfg, step.positions, slots), window_mask], dim=-1) & step.keep[..., None]
    first = torch.cat([torch.ones_like(slots, dtype=torch.bool), torch.zeros_like(held, dtype=torch.bool)], dim=1)
    keys, values = torch.cat([sink_k, keys], dim=1), torch.cat([sink_v, values], dim=1)
    queries = (z.to(stored) for z in both_queries(cfg, q, step.positions, step.positions))
    out = attend(cfg, *queries, keys, values, first, mask)
    return end(step, dense.project_out(params, cfg, step.x, out)), after


@token_by_token
def decode(params, cfg, x, cache, ops=reference_ops):
    """(y, cache) after appending 1 to 16 tokens per row; x, y: B T D. Dtypes and rows without room: as in `prefill`.

    ops: any namespace with `decode_attention` and `merge_states`.
    """
    step = begin(x, cache, checked_room(cfg, x, cache, tokens=1))
    q, k, v = dense.qkv(params, cfg, x)
    cache = appended(cfg, cache, dense.rotate(cfg, k, step.positions), v, step)
    stored, length = cache["k"].dtype, cache["length"]
    options = dict(out_dtype=accumulator(x.dtype, stored), **dense.options(cfg))
    q_window, q_sink = (z.to(stored) for z in both_queries(cfg, q, step.positions, step.positions))
    sink_k, sink_v, ring_k, ring_v = parts(cfg, cache)
    sinks = length.clamp(max=sink_k.shape[1])
    recent = (length - cfg.start_size).clamp(0, ring_k.shape[1])
    both = (
        ops.decode_attention(q_sink, sink_k, sink_v, sinks, **options),
        ops.decode_attention(q_window, ring_k, ring_v, recent, **options),
    )
    out, _ = ops.merge_states(*(torch.stack(part) for part in zip(*both, strict=True)))
    return end(step, dense.project_out(params, cfg, x, out)), cache


def visible(cfg, query, key):
    """bool B T S: key <= query and (key < s or key > query - R), for indices in the row: query int B T, key int B S."""
    near = in_window(query, key, cfg.recent_size)
    return near | (in_window(query, key, None) & (key < cfg.start_size)[:, None])


def both_queries(cfg, q, positions, index):
    """(q for the window, q for the sinks), B T N H: rotated at positions, and at positions - e; index: int B T, in the
    row."""
    evicted = (index + 1 - (cfg.start_size + cfg.recent_size)).clamp(min=0)
    q = dense.rescaled(cfg, q, index)
    return dense.rotate(cfg, q, positions), dense.rotate(cfg, q, positions - evicted)


def attend(cfg, q_window, q_sink, k, v, first, mask):
    """B T N V in float32 or wider: one softmax over all keys, those marked in `first` (bool B S) meeting q_sink.

    mask: bool B T S.
    """
    first = first[..., None, None]
    # each key fills one half of a vector twice as long, so that one product serves both queries
    keys = torch.cat([k.masked_fill(first, 0.0), k.masked_fill(~first, 0.0)], dim=-1)
    q = torch.cat([q_window, q_sink], dim=-1)
    return grouped_attention(q, keys, v, mask, **dense.options(cfg))[0]


def appended(cfg, cache, k, v, step):
    """The cache after the step's new tokens; the given cache is not changed."""
    sink_k, sink_v, ring_k, ring_v = parts(cfg, cache)
    after = {"length": step.start + step.new}
    for name, fresh, first, recent in (("k", k, sink_k, ring_k), ("v", v, sink_v, ring_v)):
        first = append(first, fresh, step.start, step.new)
        after[name] = torch.cat([first, ring.write(recent, fresh, step.start, step.new, cfg.start_size)], dim=1)
    return after


def parts(cfg, cache):
    """Views (sink_k, sink_v, ring_k, ring_v) of the first s slots and of those behind them."""
    s = cfg.start_size
    return cache["k"][:, :s], cache["v"][:, :s], cache["k"][:, s:], cache["v"][:, s:]


def check_fields(cfg):
    """Raise ValueError or TypeError for fields that do not fit together."""
    inputs.check_counts(cfg, 1, "start_size", "recent_size")
    # a rotation tells a distance; slopes count the tokens themselves, and weights behind a rotation see where it ended
    inputs.check_off(cfg, "sinks are met at another distance than theirs", "alibi", "qk_norm_after_rope")


def checked_room(cfg, x, cache, tokens=None):
    """As `dense.checked_room`; None when the buffers are whole, and the row never overflows."""
    check_fields(cfg)
    slots, whole = dense.checked_room(cfg, x, cache, tokens), cfg.start_size + cfg.recent_size
    if slots > whole:
        raise ValueError(f'cache["k"] has {slots} slots; allowed: at most start_size + recent_size = {whole}')
    return None if slots == whole else slots
