"""NSA's compressed branch: entries over windows of l tokens every d tokens, and the block scores made of their softmax.

    entry_i = phi(row_{id} + pe_0, .., row_{id+l-1} + pe_{l-1}),   for keys and for values, each with its own phi and pe
    mean:     (1/l) sum_j row_j                          linear: sum_j row_j phi_j
    weighted: sum_j phi_j row_j                          mlp:    silu(sum_j row_j phi_in_j) phi_out

Rows are keys after their norm and before RoPE, and values; a compressed key is then turned by the rotation of its first
token. cfg and params: see `nsa`.
"""

import torch

from ..core.dtypes import accumulator, einsum
from . import dense, inputs

COMPRESSIONS = ("mean", "weighted", "linear", "mlp")


def entry_count(cfg, tokens):
    """The entries that are complete after `tokens` tokens: floor((T - l) / d) + 1, or 0 for T < l. int or tensor."""
    count = (tokens - cfg.kernel_size) // cfg.kernel_stride + 1
    return count.clamp(min=0) if torch.is_tensor(count) else max(count, 0)


def compress(params, cfg, rows, side):
    """B X K H from the rows B X l K H of X entries, side "k" or "v" (then V for H), in float32 or wider."""
    rows = rows.to(accumulator(rows.dtype, params[f"{side}_pe"].dtype)) + params[f"{side}_pe"]
    if cfg.compress == "mean":
        return rows.mean(2)
    if cfg.compress == "weighted":
        return einsum("bxlkh,lk->bxkh", rows, params[f"phi_{side}"])
    if cfg.compress == "linear":
        return einsum("bxlkh,lkhi->bxki", rows, params[f"phi_{side}"])
    hidden = torch.nn.functional.silu(einsum("bxlkh,lkhf->bxkf", rows, params[f"phi_{side}_in"]))
    return einsum("bxkf,kfh->bxkh", hidden, params[f"phi_{side}_out"])


def entries(params, cfg, rows_k, rows_v, positions, dtype):
    """(k, v): B X K H and B X K V, the entries over rows B X l K .., rounded once to dtype after the rotation.

    positions: int B X, those of the first tokens.
    """
    k = dense.rotate(cfg, compress(params, cfg, rows_k, "k"), positions)
    return k.to(dtype), compress(params, cfg, rows_v, "v").to(dtype)


def new_entry_rows(cfg, tail, fresh, step):
    """(first, count, windows): the entries that a call of T tokens completes, and the raw rows under them.

    tail: B l' K H, the ring of the rows' last tokens before the call. fresh: B T K H, the new raw rows. first, count:
    int32 B. windows: tail's dtype B X l K H for the entries first .. first + X - 1, X the most that T tokens can
    complete; those at and past `count` mean nothing.
    """
    stride = cfg.kernel_stride
    batch, tokens = fresh.shape[:2]
    first = entry_count(cfg, step.start)
    count = entry_count(cfg, step.start + step.new) - first
    order = torch.arange((tokens - 1) // stride + 1, device=fresh.device)
    position = ((first[:, None] + order) * stride)[..., None] + torch.arange(cfg.kernel_size, device=fresh.device)
    is_new = position >= step.start[:, None, None]
    slots = tail.shape[1]
    old_index = position % max(slots, 1)
    new_index = slots + (position - step.start[:, None, None]).clamp(0, tokens - 1)
    source = torch.cat([tail, fresh.to(tail.dtype)], dim=1)
    batch_index = torch.arange(batch, device=fresh.device)[:, None, None]
    windows = source[batch_index, torch.where(is_new, new_index, old_index)]
    return first, count, windows


def seen(cfg, positions, slots):
    """bool B T E: entry i is complete at the query, id + l - 1 <= t, for positions t int B T and E = slots entries."""
    last = torch.arange(slots, device=positions.device) * cfg.kernel_stride + cfg.kernel_size - 1
    return last <= positions[..., None]


def overlaps(cfg, entries, blocks):
    """int64 [entries, blocks]: how many stretches of d tokens entry [id, id + l) and block [jl', (j+1)l') share."""
    start, size = torch.arange(entries)[:, None] * cfg.kernel_stride, cfg.block_size
    block = torch.arange(blocks) * size
    common = torch.minimum(start + cfg.kernel_size, block + size) - torch.maximum(start, block)
    return common.clamp(min=0) // cfg.kernel_stride


def block_scores(cfg, p, positions, blocks):
    """B T K blocks: sum over a group's heads and the entries of p overlap; +inf if forced, -inf past the query's block.

    p: B T K G E, the softmax over the visible entries. positions: int B T. Forced: the first init_blocks blocks, and
    the last local_blocks up to the query's own.
    """
    weights = overlaps(cfg, p.shape[-1], blocks).to(p.device, p.dtype)
    score = einsum("btkge,ej->btkj", p, weights)
    block = torch.arange(blocks, device=p.device)
    current = (positions // cfg.block_size)[..., None, None]
    forced = (block < cfg.init_blocks) | (block > current - cfg.local_blocks)
    return score.masked_fill(forced, torch.inf).masked_fill(block > current, -torch.inf)


def check_fields(cfg):
    """Raise ValueError or TypeError for fields that do not fit together."""
    inputs.check_counts(cfg, 1, "kernel_size", "kernel_stride", "block_size", "topk", "window_size")
    inputs.check_counts(cfg, 0, "init_blocks", "local_blocks")
    inputs.check_off(cfg, "the op over blocks knows no slopes", "alibi")
    inputs.check_off(cfg, "keys are compressed before RoPE, after their norm", "qk_norm_after_rope")
    for name in ("kernel_size", "block_size"):
        if getattr(cfg, name) % cfg.kernel_stride:
            raise ValueError(
                f"{name} is {getattr(cfg, name)}; allowed: a multiple of kernel_stride {cfg.kernel_stride}"
            )
    if cfg.kernel_size > cfg.block_size:
        raise ValueError(f"kernel_size is {cfg.kernel_size}; allowed: at most block_size {cfg.block_size}")
    if cfg.compress not in COMPRESSIONS:
        raise ValueError(f"compress is {cfg.compress!r}; allowed: {', '.join(COMPRESSIONS)}")


def shapes(cfg):
    """{name: shape} of the pe and phi."""
    under, kv, named = cfg.kernel_size, cfg.num_key_value_heads, {}
    for side, width in (("k", cfg.head_dim), ("v", cfg.v_head_dim)):
        named[f"{side}_pe"] = (under, kv, width)
        if cfg.compress == "weighted":
            named[f"phi_{side}"] = (under, kv)
        if cfg.compress == "linear":
            named[f"phi_{side}"] = (under, kv, width, width)
        if cfg.compress == "mlp":
            named[f"phi_{side}_in"] = (under, kv, width, cfg.compress_hidden_size)
            named[f"phi_{side}_out"] = (kv, cfg.compress_hidden_size, width)
    return named
