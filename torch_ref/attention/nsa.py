"""Native sparse attention: a compressed, a selected and a window branch over one query, mixed by gates.

    o_t,n = sum over b of g_t,n,b o_t,n,b,   b in (cmp, slc, win),   g = sigmoid(x_t wgate_n)
    cmp:  softmax over the entries i with id + l - 1 <= t (`nsa_compress`); 0 when there is none
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
from ..core import blocks, ring
from ..core.append import append
from ..core.dtypes import accumulator, einsum
from ..core.softmax import capped, grouped_attention, masked_softmax
from . import dense, inputs, nsa_compress
from .sliding_window import in_window, ring_then_new
from .step import begin, empty, end, in_order, token_by_token


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
    nsa_compress.check_fields(cfg)
    cache, widths = dense.init_cache(cfg, batch, capacity, dtype), (cfg.head_dim, cfg.v_head_dim)
    for pair, slots in buffers(cfg, capacity).items():
        shapes = {name: (slots, cfg.num_key_value_heads, width) for name, width in zip(pair, widths, strict=True)}
        cache |= empty(batch, dtype, **shapes)
    return cache


def forward(params, cfg, x, positions=None):
    """y: B T D from x: B T D without a cache; positions and errors as in `dense.forward`.

    Blocks, entries and windows are counted from the row's first token; entry i is rotated at positions[b, id].
    """
    check(params, cfg)
    inputs.check_tokens(x, cfg.hidden_size)
    (order, positions), tokens = in_order(x, positions), x.shape[1]
    new = project(params, cfg, x, positions, order)
    start = torch.arange(nsa_compress.entry_count(cfg, tokens), device=x.device) * cfg.kernel_stride
    under = start[:, None] + torch.arange(cfg.kernel_size, device=x.device)
    rows_k, rows_v = new.raw_k[:, under], new.raw_v[:, under]
    k_cmp, v_cmp = nsa_compress.entries(params, cfg, rows_k, rows_v, positions[:, start], x.dtype)
    p = entry_probabilities(cfg, new.q, k_cmp, nsa_compress.seen(cfg, order, len(start)))
    selected = selected_tokens(cfg, p, order, tokens)
    parts = (
        read_entries(p, v_cmp),
        blocks.headwise_attention(new.q, new.k, new.v, selected, **dense.options(cfg)),
        attend(cfg, new.q, new.k_win, new.v_win, in_window(order, order, cfg.window_size)),
    )
    return mix(params, cfg, x, parts)


def prefill(params, cfg, x, cache, lengths=None):
    """(y, cache) after appending the first lengths[b] of the T tokens of row b, as in `dense.prefill`."""
    check(params, cfg)
    step = begin(x, cache, checked_room(cfg, x, cache), lengths)
    new = project(params, cfg, step.x, step.positions)
    after, q = appended(params, cfg, cache, new, step), new.q.to(cache["k"].dtype)
    keep, slots = step.keep[..., None], after["k"].shape[1]
    seen = nsa_compress.seen(cfg, step.positions, after["k_cmp"].shape[1]) & keep
    p = entry_probabilities(cfg, q, after["k_cmp"], seen)
    selected = selected_tokens(cfg, p, step.positions, slots) & keep[..., None]
    if cfg.separate_branches:
        held, k_win, v_win = ring_then_new(step, cache["k_win"], cache["v_win"], new.k_win, new.v_win)
    else:
        held, k_win, v_win = torch.arange(slots, device=x.device).expand(len(x), -1), after["k"], after["v"]
    window = in_window(step.positions, held, cfg.window_size) & (held >= 0)[:, None] & keep
    parts = (
        read_entries(p, after["v_cmp"].masked_fill(~seen.any(1)[..., None, None], 0.0)),
        blocks.headwise_attention(q, after["k"], after["v"], selected, **dense.options(cfg)),
        attend(cfg, q, k_win, v_win, window),
    )
    return end(step, mix(params, cfg, step.x, parts)), after


@token_by_token
def decode(params, cfg, x, cache, ops=reference_ops):
    """(y, cache) after appending 1 to 16 tokens per row; x, y: B T D. Dtypes and rows without room: as in `prefill`.

    ops: any namespace with `decode_attention`, `topk_indices` and `decode_block_sparse`.
    """
    check(params, cfg)
    step = begin(x, cache, checked_room(cfg, x, cache, tokens=1))
    new = project(params, cfg, x, step.positions)
    cache = appended(params, cfg, cache, new, step)
    q, k, v, length = new.q.to(cache["k"].dtype), cache["k"], cache["v"], cache["length"]
    options = dense.options(cfg) | {"out_dtype": accumulator(x.dtype, q.dtype)}
    complete = nsa_compress.entry_count(cfg, length)
    o_cmp, _ = ops.decode_attention(q, cache["k_cmp"], cache["v_cmp"], complete, **options)
    seen = nsa_compress.seen(cfg, step.positions, cache["k_cmp"].shape[1])
    lists = choose(cfg, entry_probabilities(cfg, q, cache["k_cmp"], seen), step.positions, k.shape[1], ops)
    o_slc, _ = ops.decode_block_sparse(q, k, v, lists, length, block_size=cfg.block_size, **options)
    k_win, v_win = window_rows(cfg, cache)
    o_win, _ = ops.decode_attention(q, k_win, v_win, length.clamp(max=k_win.shape[1]), **options)
    return end(step, mix(params, cfg, x, (o_cmp, o_slc, o_win))), cache


def project(params, cfg, x, positions, order=None):
    """Projected of the new tokens, in x's dtype; the branches share wk and wv unless they are separate."""
    q, raw_k, raw_v = dense.qkv(params, cfg, x)
    q = dense.rescaled(cfg, dense.rotate(cfg, q, positions), positions if order is None else order)
    k, v = dense.rotate(cfg, raw_k, positions), raw_v
    k_win, v_win = k, v
    if cfg.separate_branches:
        raw_k, raw_v = branch(params, cfg, x, "cmp")
        k_win, v_win = branch(params, cfg, x, "win")
        k_win = dense.rotate(cfg, k_win, positions)
    return Projected(q, k, v, raw_k, raw_v, k_win, v_win)


def branch(params, cfg, x, name):
    """(k, v) of a branch with weights of its own, k after norm and clip and before RoPE; no bias."""
    k, v = (einsum("btd,dkh->btkh", x, params[f"w{side}_{name}"], out_dtype=x.dtype) for side in "kv")
    return dense.settled(params, cfg, k, "k_norm"), dense.values(cfg, v)


def entry_probabilities(cfg, q, k_cmp, seen):
    """p: B T K G E in float32 or wider, the softmax over the entries seen (bool B T E); all 0 when there is none."""
    k_cmp = k_cmp.masked_fill(~seen.any(dim=1)[..., None, None], 0.0)
    logits = einsum("btkgh,bekh->btkge", q.unflatten(2, (k_cmp.shape[2], -1)), k_cmp)
    return masked_softmax(capped(logits, **dense.options(cfg)), seen[:, :, None, None])[0]


def read_entries(p, v_cmp):
    """B T N V: the values v_cmp B E K V averaged with p B T K G E."""
    return einsum("btkge,bekv->btkgv", p, v_cmp).flatten(2, 3)


def choose(cfg, p, positions, slots, ops=reference_ops):
    """int32 B T K L: the blocks that each KV head selects, L = min(topk, blocks)."""
    count = max(1, -(-slots // cfg.block_size))
    return ops.topk_indices(nsa_compress.block_scores(cfg, p, positions, count), min(cfg.topk, count))


def selected_tokens(cfg, p, positions, slots):
    """bool B T K S: the tokens s <= t of the selected blocks."""
    return blocks.visible(choose(cfg, p, positions, slots), cfg.block_size, positions, slots)


def attend(cfg, q, k, v, mask):
    """`grouped_attention` with the config's scale and cap, its output alone."""
    return grouped_attention(q, k, v, mask, **dense.options(cfg))[0]


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
    return dense.project_out(params, cfg, x, out)


def appended(params, cfg, cache, new, step):
    """The cache after the step's new tokens and the entries that they complete; the given cache is not changed."""
    after = step.appended(cache, k=new.k, v=new.v)
    first, count, rows_k = nsa_compress.new_entry_rows(cfg, cache["tail_k"], new.raw_k, step)
    _, _, rows_v = nsa_compress.new_entry_rows(cfg, cache["tail_v"], new.raw_v, step)
    order = torch.arange(rows_k.shape[1], dtype=torch.int32, device=first.device)
    positions = (first[:, None] + order) * cfg.kernel_stride
    k_cmp, v_cmp = nsa_compress.entries(params, cfg, rows_k, rows_v, positions, cache["k"].dtype)
    after["k_cmp"] = append(cache["k_cmp"], k_cmp, first, count)
    after["v_cmp"] = append(cache["v_cmp"], v_cmp, first, count)
    rings = {"tail_k": new.raw_k, "tail_v": new.raw_v}
    if cfg.separate_branches:
        rings |= {"k_win": new.k_win, "v_win": new.v_win}
    return after | step.appended(cache, ring.write, **rings)


def buffers(cfg, capacity):
    """{(key's name, value's name): slots} of the buffers beside k and v."""
    entries = max(1, nsa_compress.entry_count(cfg, capacity))
    sizes = {("k_cmp", "v_cmp"): entries, ("tail_k", "tail_v"): min(cfg.kernel_size, capacity)}
    return sizes | ({("k_win", "v_win"): min(cfg.window_size, capacity)} if cfg.separate_branches else {})


def check(params, cfg):
    """Raise ValueError or TypeError for fields and for parameters that are not the config's."""
    nsa_compress.check_fields(cfg)
    gates = {"wgate": (cfg.hidden_size, cfg.num_attention_heads, 3)}
    inputs.check_parameters(params, nsa_compress.shapes(cfg) | gates)


def checked_room(cfg, x, cache, tokens=None):
    """As `dense.checked_room`."""
    capacity = dense.checked_room(cfg, x, cache, tokens)
    sizes = {"K": cfg.num_key_value_heads, "H": cfg.head_dim, "V": cfg.v_head_dim}
    for names, slots in buffers(cfg, capacity).items():
        for name, width in zip(names, "HV", strict=True):
            inputs.check_buffer(cache, x, name, f"B S K {width}", sizes | {"S": slots}, (cache["k"].dtype,))
    return capacity
