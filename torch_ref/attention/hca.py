"""HCA, the heavily compressed layer of DeepSeek-V4: the window, and every entry over m tokens that is complete.

    o_t,n = rope_-t(sum over the keys of p key),   keys = [kv_s : t - W < s <= t] and [c_kv_w : (w + 1) m <= t + 1]

One softmax over both, with the sink, as in `v4_window`; entries as in `v4_compressor`, without overlap. m is 128.
DeepSeek-V4 (2606.19348).

cfg: the fields of `v4_window`, and compress_rate (m).
params: those of `v4_window`; wc_kv and wc_gate D H, c_bias m H, c_norm H.
cache: that of `v4_window` (kv: B W' H, length: int32 B); c_kv: B E H with E = max(1, capacity // m), after norm and
RoPE; state_kv, state_score: B m H, float32 or wider. It overflows past E m + m - 1 tokens, or past W' if W' < W.
"""

import torch

from .. import ops as reference_ops
from ..core.dtypes import accumulator
from . import inputs, v4_window
from . import v4_compressor as compressor
from .rows import begin, finish, given_positions

ENTRIES = compressor.Compressor("c", "c_kv", "state_kv", "state_score", "head_dim", overlap=False)


def init_cache(cfg, batch, capacity, dtype=torch.bfloat16):
    """An empty cache with room for `capacity` tokens per row, the ring and the entries in dtype."""
    check_fields(cfg)
    return v4_window.init_cache(cfg, batch, capacity, dtype) | compressor.init_cache(
        [ENTRIES], cfg, batch, capacity, dtype
    )


def forward(params, cfg, x, positions=None):
    """y: B T D from x: B T D without a cache; positions and errors as in `v4_window.forward`.

    Blocks and windows count tokens; entry w turns at positions[b, w m].
    """
    check(params, cfg, x)
    positions = given_positions(x, positions)
    _, q, kv = v4_window.project(params, cfg, x, positions)
    entries = compressor.entries_of(ENTRIES, params, cfg, x, positions)
    order = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    seen = compressor.visible(cfg, order, entries.shape[1])
    keys, mask = torch.cat([kv, entries], dim=1), torch.cat([v4_window.window_mask(cfg, x), seen], dim=-1)
    return v4_window.project_out(params, cfg, x, v4_window.attend(params, cfg, q, keys, mask), positions)


def prefill(params, cfg, x, cache, lengths=None):
    """(y, cache) after appending the first lengths[b] of the T tokens of row b, as in `v4_window.prefill`."""
    check(params, cfg, x)
    rows = begin(x, cache, compressor.checked_room([ENTRIES], cfg, x, cache), lengths)
    _, q, kv = v4_window.project(params, cfg, rows.x, rows.positions)
    after = appended(params, cfg, cache, kv, rows)
    entries = after["c_kv"]
    seen = compressor.visible(cfg, rows.positions, entries.shape[1]) & rows.queries[..., None]
    keys, mask = v4_window.ring_then_new(cfg, rows, cache["kv"], kv)
    keys, mask = torch.cat([keys, entries], dim=1), torch.cat([mask, seen], dim=-1)
    out = v4_window.attend(params, cfg, q.to(keys.dtype), keys, mask)
    return finish(v4_window.project_out(params, cfg, rows.x, out, rows.positions), rows), after


def decode(params, cfg, x, cache, ops=reference_ops):
    """(y, cache) after appending one token per row; x, y: B 1 D. Dtypes and rows without room: as in `prefill`.

    ops: any namespace with `decode_attention` and `merge_states`.
    """
    check(params, cfg, x, tokens=1)
    rows = begin(x, cache, compressor.checked_room([ENTRIES], cfg, x, cache))
    _, q, kv = v4_window.project(params, cfg, x, rows.positions)
    cache = appended(params, cfg, cache, kv, rows)
    q, entries = q.to(cache["kv"].dtype), cache["c_kv"][:, :, None]
    complete = cache["length"] // cfg.compress_rate
    parts = (
        v4_window.window_part(params, cfg, q, cache, ops),
        ops.decode_attention(q, entries, entries, complete, scale=cfg.head_dim**-0.5, out_dtype=accumulator(q.dtype)),
    )
    out, _ = ops.merge_states(*(torch.stack(part) for part in zip(*parts, strict=True)))
    return finish(v4_window.project_out(params, cfg, x, out, rows.positions), rows), cache


def appended(params, cfg, cache, kv, rows):
    """The cache after the rows' new tokens and the entries that they complete; the given cache is not changed."""
    return v4_window.appended(cache, kv, rows) | compressor.appended(ENTRIES, params, cfg, cache, rows)


def check(params, cfg, x, tokens=None):
    """Raise ValueError or TypeError for fields, parameters and tokens that do not fit together."""
    check_fields(cfg)
    v4_window.check(params, cfg, x, tokens)
    for name, shape in compressor.shapes(ENTRIES, cfg).items():
        inputs.check_parameter(params, name, *shape)


def check_fields(cfg):
    """Raise ValueError or TypeError for fields that do not fit together."""
    v4_window.check_fields(cfg)
    inputs.check_counts(cfg, 1, "compress_rate")
