"""The compressor of DeepSeek-V4: one entry for every block of m tokens, pooled by a softmax gate per channel.

    u_p = x_p wc_kv,   z_p = x_p wc_gate + c_bias[p mod m]
    entry_w = rope_wm(norm(sum over r of a_r u_r)),   a = softmax over the rows r of z_r, each channel by itself
    plain (HCA):     r runs over the m tokens of block w
    overlap (CSA):   over 2m rows: channels [0 : X/2] of the tokens of block w - 1, channels [X/2 : X] of those of block
                     w; block 0 has its own m rows alone

Blocks are counted from the row's first token. Entry w turns at the position of its first token, w m, and exists once
its last token does: query t sees it if (w + 1) m <= t + 1. All of it is float32 or wider until the entry is stored.

State between calls, B m X or, with overlap, B 2m X for u and as much for z: the rows of the open block, length mod m of
them, in [0 : m], or in [m : 2m] behind those of the last complete block, which the next entry still needs. Every other
row is 0.
DeepSeek-V4 (2606.19348) and its inference code. What each mechanism compresses: `csa`, `hca`.
"""

from typing import NamedTuple

import torch

from ..core import ring
from ..core.append import append
from ..core.dtypes import accumulator, einsum
from ..core.norm import rms_norm
from ..ops.check import WIDE
from . import inputs, v4_window


class Compressor(NamedTuple):
    """The names that one compressor has in params and cache, and its kind.

    prefix: params w{prefix}_kv, w{prefix}_gate, {prefix}_bias, {prefix}_norm. entries, kv, score: buffers of the cache.
    width: the field of cfg that is the width of an entry.
    """

    prefix: str
    entries: str
    kv: str
    score: str
    width: str
    overlap: bool

    def rows(self, cfg):
        """The rows of the state."""
        return cfg.compress_rate * (2 if self.overlap else 1)

    def channels(self, cfg):
        """X, the channels of u and z."""
        return getattr(cfg, self.width) * (2 if self.overlap else 1)


def init_cache(compressors, cfg, batch, capacity, dtype):
    """The empty buffers of the compressors: max(1, capacity // m) entries in dtype, states float32 or wider."""
    cache = {}
    for one in compressors:
        entries = max(1, capacity // cfg.compress_rate)
        cache[one.entries] = torch.zeros(batch, entries, getattr(cfg, one.width), dtype=dtype)
        for name in (one.kv, one.score):
            cache[name] = torch.zeros(batch, one.rows(cfg), one.channels(cfg), dtype=accumulator(dtype))
    return cache


def seen(cfg, positions, entries):
    """bool B T E: entry w is complete at the query, (w + 1) m <= t + 1, for positions t int B T."""
    last = (torch.arange(entries, device=positions.device) + 1) * cfg.compress_rate - 1
    return last <= positions[..., None]


def compress(one, params, cfg, x, positions):
    """B (T // m) H in x's dtype: the entries of whole rows x B T D; entry w turns at positions[b, w m]."""
    blocks, m = x.shape[1] // cfg.compress_rate, cfg.compress_rate
    u, z = gates(one, params, cfg, x, torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]))
    u, z = (s[:, : blocks * m].unflatten(1, (blocks, m)) for s in (u, z))
    before = tuple(torch.cat([torch.zeros_like(s[:, :1]), s], dim=1)[:, :blocks] for s in (u, z))
    first = torch.arange(blocks, device=x.device).expand(len(x), -1)
    return entry(one, params, cfg, pool(one, (u, z), before, first), positions[:, : blocks * m : m], x.dtype)


def appended(compressors, params, cfg, cache, kv, step):
    """The cache after the step's new tokens and the entries that they complete; the given cache is not changed."""
    after = step.appended(cache, ring.write, kv=kv)
    for one in compressors:
        after |= extend(one, params, cfg, cache, step)
    return after


def extend(one, params, cfg, cache, step):
    """The entries and the state of one compressor after the step's new tokens; the given cache is not changed."""
    m = cfg.compress_rate
    fresh = gates(one, params, cfg, step.x, step.positions)
    lines = [timeline(one, cfg, cache[name], z, step) for name, z in zip((one.kv, one.score), fresh, strict=True)]
    opened, open_after = step.start // m, (step.start + step.new) // m
    blocks, skip = (step.x.shape[1] + m - 1) // m, one.rows(cfg) - m
    own = [line[:, skip : skip + blocks * m].unflatten(1, (blocks, m)) for line in lines]
    before = [line[:, : blocks * m].unflatten(1, (blocks, m)) for line in lines]
    block = opened[:, None] + torch.arange(blocks, dtype=torch.int32, device=opened.device)
    new = entry(one, params, cfg, pool(one, own, before, block), block * m, cache[one.entries].dtype)
    after = {one.entries: append(cache[one.entries], new, opened, open_after - opened)}
    for name, line in zip((one.kv, one.score), lines, strict=True):
        after[name] = next_state(one, cfg, cache[name], line, step)
    return after


def gates(one, params, cfg, x, order):
    """(u, z): B T X, the values and the biased gates of the tokens x B T D at places order int B T of their rows."""
    u = einsum("btd,dx->btx", x, params[f"w{one.prefix}_kv"])
    z = einsum("btd,dx->btx", x, params[f"w{one.prefix}_gate"])
    return u, z + params[f"{one.prefix}_bias"][(order % cfg.compress_rate).long()]


def pool(one, own, before, block):
    """B blocks H: u pooled by z. own, before: pairs (u, z) of B blocks m X, before read with overlap; block: int."""
    (u, z), half = own, own[0].shape[-1] // 2
    if one.overlap:
        nothing = (block == 0)[..., None, None]
        u = torch.cat([before[0][..., :half].masked_fill(nothing, 0.0), u[..., half:]], dim=2)
        z = torch.cat([before[1][..., :half].masked_fill(nothing, -torch.inf), z[..., half:]], dim=2)
    return (torch.softmax(z, dim=2) * u).sum(2)


def entry(one, params, cfg, pooled, positions, dtype):
    """pooled B blocks H normed, turned at positions int B blocks, and only then rounded to dtype."""
    normed = rms_norm(pooled, params[f"{one.prefix}_norm"], cfg.rms_norm_eps)
    return v4_window.rotate(cfg, normed[:, :, None], positions)[:, :, 0].to(dtype)


def timeline(one, cfg, state, fresh, step):
    """B (rows - 1 + T) X in state's dtype: the rows of the state, then those of the new tokens without a gap.

    Row 0 is the first token of the open block or, with overlap, of the block before it.
    """
    m, tokens = cfg.compress_rate, fresh.shape[1]
    filled = one.rows(cfg) - m + step.start % m
    place = torch.arange(one.rows(cfg) - 1 + tokens, device=fresh.device).expand(len(fresh), -1)
    row = torch.arange(len(fresh), device=fresh.device)[:, None]
    old = state[row, place.clamp(max=state.shape[1] - 1)]
    new = fresh.to(state.dtype)[row, (place - filled[:, None]).clamp(0, tokens - 1)]
    return torch.where((place < filled[:, None])[..., None], old, new)


def next_state(one, cfg, state, line, step):
    """The state after the step's new tokens; a row without any keeps its own."""
    m, length = cfg.compress_rate, step.start + step.new
    place = torch.arange(one.rows(cfg), device=line.device).expand(len(line), -1)
    position = (length // m * m - (one.rows(cfg) - m))[:, None] + place
    moved = (length // m - step.start // m)[:, None] * m + place
    row = torch.arange(len(line), device=line.device)[:, None]
    held = (position >= 0) & (position < length[:, None])
    fresh = line[row, moved.clamp(max=line.shape[1] - 1)].masked_fill(~held[..., None], 0.0)
    return torch.where((step.new > 0)[:, None, None], fresh, state)


def attend_both(params, cfg, q, recent, near, entries, far):
    """One softmax over the window's vectors, seen where `near`, and the entries, seen where `far`: B T N H."""
    keys, mask = torch.cat([recent, entries], dim=1), torch.cat([near, far], dim=-1)
    return v4_window.attend_shared(params, cfg, q, keys, mask)


def merge(ops, *parts):
    """B 1 N H: the softmax over all keys from the (out, lse) of each part."""
    return ops.merge_states(*(torch.stack(part) for part in zip(*parts, strict=True)))[0]


def shapes(one, cfg):
    """{name: shape} of the parameters of one compressor."""
    into, out = (cfg.hidden_size, one.channels(cfg)), getattr(cfg, one.width)
    return {
        f"w{one.prefix}_kv": into,
        f"w{one.prefix}_gate": into,
        f"{one.prefix}_bias": (cfg.compress_rate, one.channels(cfg)),
        f"{one.prefix}_norm": (out,),
    }


def checked_room(compressors, cfg, x, cache):
    """The tokens that a row may have in all: as long as every complete block has a slot for its entry.

    A ring shorter than the window was made for fewer tokens and ends the row at its slots.
    """
    ring, m, sizes = v4_window.checked_room(cfg, x, cache), cfg.compress_rate, {}
    for one in compressors:
        entries = sizes | {"width": getattr(cfg, one.width)}
        inputs.check_buffer(cache, x, one.entries, "B entries width", entries, (cache["kv"].dtype,))
        sizes["entries"] = cache[one.entries].shape[1]
        state = {"rows": one.rows(cfg), "X": one.channels(cfg)}
        for name in (one.kv, one.score):
            inputs.check_buffer(cache, x, name, "B rows X", state, WIDE)
    room = sizes["entries"] * m + m - 1
    return room if ring is None else min(room, ring)
