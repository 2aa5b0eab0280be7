"""Native sparse attention: a compressed, a selected and a window branch over one query, mixed by gates.

    o_t,n = sum over b of g_t,n,b o_t,n,b,   b in (cmp, slc, win),   g = sigmoid(x_t wgate_n)
    cmp:  softmax over the entries i with id + l - 1 <= t (`nsa_compression`); 0 when there is none
    slc:  softmax over s <= t with s // l' in I_t,k, I the `topk` blocks of largest score, in ties the lower block;
          one list per KV head, score_j = sum over the group's heads and the entries of p_cmp overlap(entry, block j);
          the first init_blocks and the last local_blocks blocks are forced and count
    win:  softmax over the last w tokens, the query's own included
    every logit is cap(scaling q . k)

Yuan et al. 2025 (2502.11089); the RoPE of compressed keys and the forced blocks follow XunhaoLai's
native-sparse-attention-triton.

cfg: the fields of `dense`, kernel_size (l), kernel_stride (d), block_size (l'), topk, init_blocks, local_blocks,
window_size (w), compress ("mean", "weighted", "linear", "mlp"), compress_hidden_size (F, of "mlp"), separate_branches;
d divides l and l', and l <= l'.
params: those of `dense`; wgate D N 3; k_pe l K H, v_pe l K V; for "weighted" phi_k and phi_v l K, for "linear" phi_k
l K H H and phi_v l K V V, for "mlp" phi_k_in l K H F, phi_k_out K F H, phi_v_in l K V F, phi_v_out K F V. With
separate_branches, wk_cmp, wv_cmp, wk_win and wv_win, shaped as wk and wv: no bias of their own, k_norm for all;
without, wk and wv serve all branches.
cache: k, v: B S K H and B S K V, the selected branch after RoPE; k_cmp, v_cmp: B E K .., E = max(1, (S - l) // d + 1)
entries; tail_k, tail_v: B min(l, S) K .., raw rows of the compressed branch, position p in slot p mod l; with
separate_branches k_win, v_win: B min(w, S) K .., position p in slot p mod w; length: int32 B.
"""

from typing import NamedTuple

import torch

from .. import ops as reference_ops
from ..core.append import append
from ..core.block_lists import headwise_attention, tokens_of_blocks
from ..core.dtypes import accumulator, einsum
from ..core.ring import append_ring
from ..core.softmax import grouped_attention, masked_softmax
from . import dense, inputs
from . import nsa_compression as compression
from .rows import begin, finish, given_positions
from .sliding_window import in_window, ring_then_new


class Projected(NamedTuple):
    """Queries B T N H, and keys and values B T K .. of the selected (rotated), compressed (raw) and window branch."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    raw_k: torch.Tensor
    raw_v: torch.Tensor
    k_win: torch.Tensor
    v_win: torch.Tensor


def init_cache(cfg, batch, capacity, dtype=torch.bfloat16):
    """An empty cache with room for `capacity` tokens per row, all buffers in dtype."""
    compression.check_fields(cfg)
    cache = dense.init_cache(cfg, batch, capacity, dtype)
    for (k_name, v_name), slots in buffers(cfg, capacity).items():
        heads = (batch, slots, cfg.num_key_value_heads)
        cache[k_name] = torch.zeros(*heads, cfg.head_dim, dtype=dtype)
        cache[v_name] = torch.zeros(*heads, cfg.v_head_dim, dtype=dtype)
    return cache


def forward(params, cfg, x, positions=None):
    """y: B T D from x: B T D without a cache; positions and errors as in `dense.forward`.

    Blocks, entries and windows are counted from the row's first token; entry i is rotated at positions[b, id].
    """
    check(params, cfg)
    inputs.check_tokens(x, cfg.hidden_size)
    positions, tokens = given_positions(x, positions), x.shape[1]
    new = project(params, cfg, x, positions)
    order = torch.arange(tokens, device=x.device).expand(x.shape[:2])
    start = torch.arange(compression.entry_count(cfg, tokens), device=x.device) * cfg.kernel_stride
    under = start[:, None] + torch.arange(cfg.kernel_size, device=x.device)
    k_cmp, v_cmp = compression.entries(
        params, cfg, new.raw_k[:, under], new.raw_v[:, under], positions[:, start], x.dtype
    )
    p = entry_probabilities(cfg, new.q, k_cmp, compression.visible_entries(cfg, order, len(start)))
    selected = selected_tokens(cfg, p, order, tokens)
    window = in_window(order, order, cfg.window_size)
    parts = (
        read_entries(p, v_cmp),
        headwise_attention(new.q, new.k, new.v, selected, dense.scaling(cfg), cfg.attn_logit_softcapping),
        attend(cfg, new.q, new.k_win, new.v_win, window),
    )
    return mix(params, cfg, x, parts)


def prefill(params, cfg, x, cache, lengths=None):
    """(y, cache) after appending the first lengths[b] of the T tokens of row b, as in `dense.prefill`."""
    check(params, cfg)
    inputs.check_tokens(x, cfg.hidden_size)
    rows = begin(x, cache, checked_room(cfg, x, cache), lengths)
    new = project(params, cfg, rows.x, rows.positions)
    after, q = appended(params, cfg, cache, new, rows), new.q.to(cache["k"].dtype)
    queries, slots = rows.queries[..., None], after["k"].shape[1]
    seen = compression.visible_entries(cfg, rows.positions, after["k_cmp"].shape[1]) & queries
    p = entry_probabilities(cfg, q, after["k_cmp"], seen)
    selected = selected_tokens(cfg, p, rows.positions, slots) & queries[..., None]
    if cfg.separate_branches:
        held, k_win, v_win = ring_then_new(rows, cache["k_win"], cache["v_win"], new.k_win, new.v_win)
    else:
        held, k_win, v_win = torch.arange(slots, device=x.device).expand(len(x), -1), after["k"], after["v"]
    window = in_window(rows.positions, held, cfg.window_size) & (held >= 0)[:, None] & queries
    parts = (
        read_entries(p, after["v_cmp"].masked_fill(~seen.any(1)[..., None, None], 0.0)),
        headwise_attention(q, after["k"], after["v"], selected, dense.scaling(cfg), cfg.attn_logit_softcapping),
        attend(cfg, q, k_win, v_win, window),
    )
    return finish(mix(params, cfg, rows.x, parts), rows), after


def decode(params, cfg, x, cache, ops=reference_ops):
    """(y, cache) after appending one token per row; x, y: B 1 D. Dtypes and rows without room: as in `prefill`.

    ops: any namespace with `decode_attention`, `topk_indices` and `decode_block_sparse`.
    """
    check(params, cfg)
    inputs.check_tokens(x, cfg.hidden_size, tokens=1)
    rows = begin(x, cache, checked_room(cfg, x, cache))
    new = project(params, cfg, x, rows.positions)
    cache = appended(params, cfg, cache, new, rows)
    q, length = new.q.to(cache["k"].dtype), cache["length"]
    wide = accumulator(x.dtype, q.dtype)
    options = dict(scale=dense.scaling(cfg), softcap=cfg.attn_logit_softcapping, out_dtype=wide)
    complete = compression.entry_count(cfg, length)
    o_cmp, _ = ops.decode_attention(q, cache["k_cmp"], cache["v_cmp"], complete, **options)
    seen = compression.visible_entries(cfg, rows.positions, cache["k_cmp"].shape[1])
    p = entry_probabilities(cfg, q, cache["k_cmp"], seen)
    lists = selected_blocks(cfg, p, rows.positions, cache["k"].shape[1], ops)
    o_slc, _ = ops.decode_block_sparse(q, cache["k"], cache["v"], lists, length, block_size=cfg.block_size, **options)
    k_win, v_win = window_rows(cfg, cache)
    o_win, _ = ops.decode_attention(q, k_win, v_win, length.clamp(max=k_win.shape[1]), **options)
    return finish(mix(params, cfg, x, (o_cmp, o_slc, o_win)), rows), cache


def project(params, cfg, x, positions):
    """Projected of the new tokens, in x's dtype; the branches share wk and wv unless they are separate."""
    q, raw_k, raw_v = dense.unrotated(params, cfg, x)
    q, k, v = dense.rotate(cfg, q, positions), dense.rotate(cfg, raw_k, positions), raw_v
    k_win, v_win = k, v
    if cfg.separate_branches:
        raw_k, raw_v = branch(params, cfg, x, "cmp")
        k_win, v_win = branch(params, cfg, x, "win")
        k_win = dense.rotate(cfg, k_win, positions)
    return Projected(q, k, v, raw_k, raw_v, k_win, v_win)


def branch(params, cfg, x, name):
    """(k, v) of a branch with weights of its own, k after the norm and before RoPE; no bias."""
    k, v = (einsum("btd,dkh->btkh", x, params[f"w{side}_{name}"], out_dtype=x.dtype) for side in "kv")
    return (k if cfg.qk_norm is None else dense.normalise(cfg, k, "k_norm", params)), v


def entry_probabilities(cfg, q, k_cmp, seen):
    """p: B T K G E in float32 or wider, the softmax over the entries seen (bool B T E); all 0 when there is none."""
    k_cmp = k_cmp.masked_fill(~seen.any(dim=1)[..., None, None], 0.0)
    logits = dense.scaling(cfg) * einsum("btkgh,bekh->btkge", q.unflatten(2, (k_cmp.shape[2], -1)), k_cmp)
    if cfg.attn_logit_softcapping is not None:
        logits = cfg.attn_logit_softcapping * torch.tanh(logits / cfg.attn_logit_softcapping)
    return masked_softmax(logits, seen[:, :, None, None])[0]


def read_entries(p, v_cmp):
    """B T N V: the values v_cmp B E K V averaged with p B T K G E."""
    return einsum("btkge,bekv->btkgv", p, v_cmp).flatten(2, 3)


def selected_blocks(cfg, p, positions, slots, ops=reference_ops):
    """int32 B T K L: the blocks that each KV head selects, L = min(topk, blocks)."""
    blocks = max(1, -(-slots // cfg.block_size))
    return ops.topk_indices(compression.block_scores(cfg, p, positions, blocks), min(cfg.topk, blocks))


def selected_tokens(cfg, p, positions, slots):
    """bool B T K S: the tokens s <= t of the selected blocks."""
    chosen = tokens_of_blocks(selected_blocks(cfg, p, positions, slots), cfg.block_size, slots)
    return chosen & (torch.arange(slots, device=p.device) <= positions[..., None])[:, :, None]


def attend(cfg, q, k, v, mask):
    """`grouped_attention` with the config's scale and cap, its output alone."""
    return grouped_attention(q, k, v, mask, dense.scaling(cfg), softcap=cfg.attn_logit_softcapping)[0]


def window_rows(cfg, cache):
    """(k, v): B W' K .., the last tokens of each row in its first min(length, W') slots, in any order.

    The ring of the window branch, or the last w tokens gathered from the cache that the branches share.
    """
    if cfg.separate_branches:
        return cache["k_win"], cache["v_win"]
    width = min(cfg.window_size, cache["k"].shape[1])
    first = (cache["length"] - width).clamp(min=0)
    slot = first[:, None] + torch.arange(width, device=first.device)
    row = torch.arange(len(first), device=first.device)[:, None]
    return cache["k"][row, slot], cache["v"][row, slot]


def mix(params, cfg, x, parts):
    """y B T D from the branches' outputs B T N V, in the order of the gates."""
    gates = torch.sigmoid(einsum("btd,dng->btng", x, params["wgate"]))
    out = sum(gates[..., i : i + 1] * part for i, part in enumerate(parts))
    return dense.project_out(params, cfg, x, out.to(x.dtype))


def appended(params, cfg, cache, new, rows):
    """The cache after the rows' new tokens and the entries that they complete; the given cache is not changed."""
    after = dense.appended(cache, new.k, new.v, rows.new)
    first, count, rows_k = compression.new_entry_rows(cfg, cache["tail_k"], new.raw_k, rows)
    _, _, rows_v = compression.new_entry_rows(cfg, cache["tail_v"], new.raw_v, rows)
    order = torch.arange(rows_k.shape[1], dtype=torch.int32, device=first.device)
    positions = (first[:, None] + order) * cfg.kernel_stride
    k_cmp, v_cmp = compression.entries(params, cfg, rows_k, rows_v, positions, cache["k"].dtype)
    after["k_cmp"] = append(cache["k_cmp"], k_cmp, first, count)
    after["v_cmp"] = append(cache["v_cmp"], v_cmp, first, count)
    rings = {"tail_k": new.raw_k, "tail_v": new.raw_v}
    if cfg.separate_branches:
        rings |= {"k_win": new.k_win, "v_win": new.v_win}
    return after | {name: append_ring(cache[name], z, rows.start, rows.new) for name, z in rings.items()}


def buffers(cfg, capacity):
    """{(key's name, value's name): slots} of the buffers beside k and v."""
    entries = max(1, compression.entry_count(cfg, capacity))
    sizes = {("k_cmp", "v_cmp"): entries, ("tail_k", "tail_v"): min(cfg.kernel_size, capacity)}
    return sizes | ({("k_win", "v_win"): min(cfg.window_size, capacity)} if cfg.separate_branches else {})


def check(params, cfg):
    """Raise ValueError or TypeError for fields and for parameters that are not the config's."""
    compression.check_fields(cfg)
    compression.check_parameters(params, cfg)
    inputs.check_parameter(params, "wgate", cfg.hidden_size, cfg.num_attention_heads, 3)


def checked_room(cfg, x, cache):
    """The tokens that a row may have in all: the slots of k and v."""
    sizes = {"K": cfg.num_key_value_heads, "H": cfg.head_dim, "V": cfg.v_head_dim}
    inputs.check_cache(cache, x, k=(sizes["K"], sizes["H"]), v=(sizes["K"], sizes["V"]))
    for names, slots in buffers(cfg, cache["k"].shape[1]).items():
        for name, width in zip(names, "HV", strict=True):
            inputs.check_buffer(cache, x, name, f"B S K {width}", sizes | {"S": slots}, (cache["k"].dtype,))
    return cache["k"].shape[1]
