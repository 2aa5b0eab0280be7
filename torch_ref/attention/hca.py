"""HCA, the heavily compressed layer of DeepSeek-V4: the window, and every entry over m tokens that is complete.

    o_t,n = rope_-t(sum over the keys of p key),   keys = [kv_s : t - W < s <= t] and [c_kv_w : (w + 1) m <= t + 1]

One softmax over both, with the sink, as in `v4_window`; entries as in `v4_compress`, without overlap. m is 128.
DeepSeek-V4 (2606.19348).

cfg: the fields of `v4_window`, and compress_rate (m).
params: those of `v4_window`; wc_kv and wc_gate D H, c_bias m H, c_norm H.
cache: that of `v4_window` (kv: B W' H, length: int32 B); c_kv: B E H with E = max(1, capacity // m), after norm and
RoPE; state_kv, state_score: B m H, float32 or wider. It overflows past E m + m - 1 tokens, or past W' if W' < W.
"""

import torch

from .. import ops as reference_ops
from ..core.dtypes import accumulator
from . import inputs, v4_compress, v4_window
from .sliding_window import in_window
from .step import begin, end, in_order, token_by_token

ENTRIES = v4_compress.Compressor("c", "c_kv", "state_kv", "state_score", "head_dim", overlap=False)


def init_cache(cfg, batch, capacity, dtype=torch.bfloat16):
    """An empty cache with room for `capacity` tokens per row, the ring and the entries in dtype."""
    check_fields(cfg)
    entries = v4_compress.init_cache([ENTRIES], cfg, batch, capacity, dtype)
    return v4_window.init_cache(cfg, batch, capacity, dtype) | entries


def forward(params, cfg, x, positions=None):
    """y: B T D from x: B T D without a cache; positions and errors as in `v4_window.forward`.

    Blocks and windows count tokens; entry w turns at positions[b, w m].
    """
    check(params, cfg, x)
    order, positions = in_order(x, positions)
    _, q, kv = v4_window.project(params, cfg, x, positions)
    entries = v4_compress.compress(ENTRIES, params, cfg, x, positions)
    near, far = in_window(order, order, cfg.sliding_window), v4_compress.seen(cfg, order, entries.shape[1])
    out = v4_compress.attend_both(params, cfg, q, kv, near, entries, far)
    return v4_window.project_out(params, cfg, x, out, positions)


def prefill(params, cfg, x, cache, lengths=None):
    """(y, cache) after appending the first lengths[b] of the T tokens of row b, as in `v4_window.prefill`."""
    check(params, cfg, x)
    step = begin(x, cache, v4_compress.checked_room([ENTRIES], cfg, x, cache), lengths)
    _, q, kv = v4_window.project(params, cfg, step.x, step.positions)
    after = v4_compress.appended([ENTRIES], params, cfg, cache, kv, step)
    entries = after["c_kv"]
    keys, near = v4_window.recent(cfg, cache["kv"], kv, step)
    far = v4_compress.seen(cfg, step.positions, entries.shape[1]) & step.keep[..., None]
    out = v4_compress.attend_both(params, cfg, q.to(keys.dtype), keys, near, entries, far)
    return end(step, v4_window.project_out(params, cfg, step.x, out, step.positions)), after


@token_by_token
def decode(params, cfg, x, cache, ops=reference_ops):
    """(y, cache) after appending 1 to 16 tokens per row; x, y: B T D. Dtypes and rows without room: as in `prefill`.

    ops: any namespace with `decode_attention` and `merge_states`.
    """
    check(params, cfg, x, tokens=1)
    step = begin(x, cache, v4_compress.checked_room([ENTRIES], cfg, x, cache))
    _, q, kv = v4_window.project(params, cfg, x, step.positions)
    cache = v4_compress.appended([ENTRIES], params, cfg, cache, kv, step)
    q, entries = q.to(cache["kv"].dtype), cache["c_kv"][:, :, None]
    complete, options = cache["length"] // cfg.compress_rate, dict(scale=cfg.head_dim**-0.5)
    near = v4_window.attend_ring(params, cfg, q, cache, ops)
    far = ops.decode_attention(q, entries, entries, complete, out_dtype=accumulator(q.dtype), **options)
    out = v4_compress.merge(ops, near, far)
    return end(step, v4_window.project_out(params, cfg, x, out, step.positions)), cache


def check(params, cfg, x, tokens=None):
    """Raise ValueError or TypeError for fields, parameters and tokens that do not fit together."""
    check_fields(cfg)
    inputs.check_tokens(x, cfg.hidden_size, tokens)
    inputs.check_parameters(params, v4_window.shapes(cfg) | v4_compress.shapes(ENTRIES, cfg))


def check_fields(cfg):
    """Raise ValueError or TypeError for fields that do not fit together."""
    v4_window.check_fields(cfg)
    inputs.check_counts(cfg, 1, "compress_rate")
