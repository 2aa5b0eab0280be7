"""Split decode attention over listed blocks of a cache, for MHA, GQA and MQA; contiguous or paged.

    s_tj = scale * q_t . k_j, softcap * tanh(s_tj / softcap) if capped;   query t of row b sees slot j if its list has
    block j // block_size and j < lengths[b] - T + t + 1 (without lengths: j < S)
    out_t = sum_j exp(s_tj) v_j / (sum_j exp(s_tj) + exp(sink));   lse_t = log of that denominator

One program owns one list, one block of the heads that share it, and one split of its positions: position i of a list is
slot i % block_size of its block i // block_size. The heads of a list are the rows of the MMAs, as in
`decode_attention`; queries of other tokens have other lists and other programs. Where tiles lie in one block, and in
one page, a tile is one address and its neighbours; otherwise every row of it is gathered by its own slot, which serves
any block size from 1 (tokens) on and any page size. An ignored or unseen slot has a mask and no address: nothing is
read for it. With v=None the kernel of `decode_sparse_mla` loads every row once and uses it twice.

Sources: NSA (arXiv 2502.11089) and MiniMax-M3 (MSA) for lists that a KV head's group shares, MoBA (arXiv 2502.13189)
for heads that choose alone.
"""

import torch
import triton
import triton.language as tl

from torch_ref.ops import check
from triton_kernels import runtime
from triton_kernels.decode_attention import MAX_HEAD_DIM, cap_logits, close_rows, load_tile, store_tile
from triton_kernels.decode_mla import MAX_LATENT
from triton_kernels.decode_sparse_mla import listed_slot, seen_slots, split_range, tile_rows, whole_tiles
from triton_kernels.decode_sparse_mla import run as run_keys_as_values
from triton_kernels.merge_states import LOG2E, finite_or_zero, merge_parts, part_buffers
from triton_kernels.plan import (
    Config,
    block_rows,
    default_block_config,
    fill_splits,
    nearest,
    pow2_ceil,
    split_dim,
    value_chunks,
)

OP = "decode_block_sparse"


@triton.jit(do_not_specialize=["slots", "n_entries"])
def block_sparse_kernel(
    q, k, v, block_indices, lengths, page_table, sinks, out, lse,
    q_stride_b, q_stride_t, q_stride_n, k_stride_b, k_stride_s, k_stride_k, v_stride_b, v_stride_s, v_stride_k,
    list_stride_b, list_stride_t, list_stride_n, table_stride,
    scale, softcap, slots, n_entries,
    T: tl.constexpr, LISTS: tl.constexpr, SHARE: tl.constexpr, G: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
    H1: tl.constexpr, H2: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_SINK: tl.constexpr, HAS_CAP: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    # Blocks of heads of one list are neighbours in the grid: the second reads K and V from L2.
    block = tl.program_id(0) % BLOCKS
    number = tl.program_id(0) // BLOCKS
    split = tl.program_id(1)
    n_splits = tl.num_programs(1)
    head = number % LISTS
    t = number // LISTS % T
    batch = number // LISTS // T

    g = block * ROWS + tl.arange(0, ROWS)
    n = head * G + g
    real = g < G
    seen = seen_slots(lengths, batch, t, slots, T, HAS_LENGTHS)
    start, end = split_range(n_entries * BLOCK, split, n_splits, BLOCK_N)

    q_base = q + batch.to(tl.int64) * q_stride_b + t * q_stride_t
    q1 = load_tile(q_base, n * q_stride_n, real, 0, H1, H, False)
    if H2 > 0:
        q2 = load_tile(q_base, n * q_stride_n, real, H1, H2, H, False)
    entries = block_indices + batch.to(tl.int64) * list_stride_b + t * list_stride_t + head * list_stride_n
    table = page_table + batch.to(tl.int64) * table_stride
    k += (head // SHARE).to(tl.int64) * k_stride_k
    v += (head // SHARE).to(tl.int64) * v_stride_k
    if PAGE == 0:
        k += batch.to(tl.int64) * k_stride_b
        v += batch.to(tl.int64) * v_stride_b

    j = tl.arange(0, BLOCK_N)
    lane = j
    if WHOLE:
        lane = 0
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc1 = tl.zeros([ROWS, V1], tl.float32)
    if V2 > 0:
        acc2 = tl.zeros([ROWS, V2], tl.float32)
    # The slots are loaded one tile ahead: a chain of loads inside a tile would have to share the pipeline's stages.
    next_slot, next_page = listed_slot(entries, table, start + lane, end, seen, BLOCK, PAGE)
    for tile in tl.range(start, end, BLOCK_N):
        slot, page = next_slot, next_page
        next_slot, next_page = listed_slot(entries, table, tile + BLOCK_N + lane, end, seen, BLOCK, PAGE)
        inside = slot >= 0
        if WHOLE:
            inside = inside & (slot + j < seen)
        k_tile, offsets = tile_rows(k, slot, page, j, k_stride_b, k_stride_s, PAGE, WHOLE)
        x = tl.dot(q1, load_tile(k_tile, offsets, inside, 0, H1, H, True), input_precision="ieee")
        if H2 > 0:
            x = tl.dot(q2, load_tile(k_tile, offsets, inside, H1, H2, H, True), x, input_precision="ieee")
        x = x * scale
        if HAS_CAP:
            x = cap_logits(x, softcap)
        x = tl.where(inside[None, :], x * LOG2E, float("-inf"))

        new_peak = tl.maximum(peak, tl.max(x, 1))
        shift = finite_or_zero(new_peak)
        alpha = tl.exp2(peak - shift)
        p = tl.exp2(x - shift[:, None])
        total = total * alpha + tl.sum(p, 1)
        peak = new_peak
        # V is 0, not only unweighted, where nobody looks: 0 * NaN is NaN.
        v_tile, offsets = tile_rows(v, slot, page, j, v_stride_b, v_stride_s, PAGE, WHOLE)
        p = p.to(v.dtype.element_ty)
        v1 = load_tile(v_tile, offsets, inside, 0, V1, V, False)
        acc1 = tl.dot(p, v1, acc1 * alpha[:, None], input_precision="ieee")
        if V2 > 0:
            v2 = load_tile(v_tile, offsets, inside, V1, V2, V, False)
            acc2 = tl.dot(p, v2, acc2 * alpha[:, None], input_precision="ieee")

    index = (number.to(tl.int64) * G + g) * n_splits + split
    factor, shrink, keep = close_rows(peak, total, lse, index, real, sinks, n, HAS_SINK, SPLIT)
    store_tile(out, index, keep, acc1 * factor[:, None] * shrink[:, None], 0, V1, V)
    if V2 > 0:
        store_tile(out, index, keep, acc2 * factor[:, None] * shrink[:, None], V1, V2, V)


def specialise(shape, block_size, page, config, *, lengths, sink, softcap, split):
    """The compile-time arguments of `block_sparse_kernel`.

    shape: (T, lists, lists of one KV head, heads of one list, H, V); page: 0 without pages.
    """
    tokens, lists, share, group, head_dim, value_dim = shape
    h1, h2 = split_dim(head_dim)
    v1, v2 = value_chunks(value_dim)
    rows = block_rows(group)
    return {
        "T": tokens, "LISTS": lists, "SHARE": share, "G": group, "H": head_dim, "V": value_dim,
        "H1": h1, "H2": h2, "V1": v1, "V2": v2, "BLOCK": block_size, "PAGE": page,
        "WHOLE": whole_tiles(block_size, page, config.block_n), "ROWS": rows, "BLOCKS": -(-group // rows),
        "BLOCK_N": config.block_n, "HAS_LENGTHS": lengths, "HAS_SINK": sink, "HAS_CAP": softcap, "SPLIT": split,
    }  # fmt: skip


def _plan(q, value_dim, lists, n_entries, block_size, page, config):
    """(Config, number of splits). Tables are measured with whole tiles; gathered ones take the default."""
    batch, tokens, heads, head_dim = q.shape
    group = heads // lists
    span = n_entries * block_size
    shape = (head_dim, value_dim, block_rows(group))
    if config is None:
        key = (*shape, group, batch * tokens * lists, span, runtime.device_name(q.device))
        found = nearest(OP, runtime.FLOAT_DTYPES[q.dtype], *key)
        usable = found and whole_tiles(block_size, page, found["block_n"])
        config = Config(**found) if usable else default_block_config(q.element_size(), *shape)
    programs = batch * tokens * lists * -(-group // block_rows(group))
    return config, fill_splits(programs, span, config, runtime.sm_count(q.device))


def run(q, k, v, block_indices, lengths, *, block_size, scale, sinks=None, softcap=None, page_table=None,
        out_dtype=None, config=None):  # fmt: skip
    """`decode_block_sparse` with v, on arguments that were checked; `config` overrides the table (for tuning)."""
    batch, tokens, heads, head_dim = q.shape
    kv_heads, value_dim = v.shape[2:]
    lists, n_entries = block_indices.shape[2:]
    page = 0 if page_table is None else k.shape[1]
    slots = k.shape[1] if page_table is None else page_table.shape[1] * page
    out = torch.empty((batch, tokens, heads, value_dim), dtype=out_dtype or q.dtype, device=q.device)
    lse = torch.empty((batch, tokens, heads), dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse

    config, n_splits = _plan(q, value_dim, lists, n_entries, block_size, page, config)
    split = n_splits > 1
    part, part_lse = part_buffers(lse, value_dim, n_splits) if split else (out, lse)
    sinks, lengths = (None if x is None else x.contiguous() for x in (sinks, lengths))
    entries, table = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (block_indices, page_table))
    table = entries if table is None else table  # never read without pages; Triton wants a pointer
    flags = dict(lengths=lengths is not None, sink=sinks is not None, softcap=softcap is not None, split=split)
    shape = (tokens, lists, lists // kv_heads, heads // lists, head_dim, value_dim)
    constants = specialise(shape, block_size, page, config, **flags)
    runtime.launch(
        block_sparse_kernel, (batch * tokens * lists * constants["BLOCKS"], n_splits),
        q, k, v, entries, entries if lengths is None else lengths, table, lse if sinks is None else sinks, part,
        part_lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *entries.stride()[:3], table.stride(0),
        float(scale), float(softcap or 0.0), slots, n_entries,
        **constants, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if split:
        merge_parts(part, part_lse, sinks, out, lse, n_splits=n_splits, fixed=False)
    return out, lse


def decode_block_sparse(
    q,
    k,
    v,
    block_indices,
    lengths,
    *,
    block_size,
    scale,
    sinks=None,
    softcap=None,
    page_table=None,
    k_scale=None,
    v_scale=None,
    out_dtype=None,
):
    """Attention of T tokens of every row over listed blocks of its cache; the equation is at the top of this file.

    q: B T N H, k: B S K H, v: B S K V of one dtype (float16, bfloat16, float32), N a multiple of K, H and V at most
    256; any strides, the last dimension contiguous. v=None: the values are k, loaded once, and H is at most 512.
    block_indices: int32 B T K L, one list for a KV head and its group, or B T N L, one for each head; blocks are
    distinct (the caller's duty) and in any order; -1 and what is not in 0 .. ceil(S / block_size) - 1 is ignored.
    block_size: >= 1; the last block of a cache can be partial. lengths: int32 B, keys with the T new ones included, 0
    to S; None: the lists alone decide. page_table: int32 B P; then k and v are pools, `pages page K H` and
    `pages page K V`, S = P * page, and only the entries of listed slots that a query sees are read.
    sinks: N, natural-log units, unscaled. softcap: > 0.
    Returns out: B T N V in out_dtype (default q's dtype) and lse: float32 B T N, natural log, sink included.

    A query that sees no key gives out = 0 and lse = -inf, or its sink. Slots that no query may read can hold NaN or
    Inf. Raises ValueError for shapes, ranges, strides and devices, TypeError for dtypes and for CPU tensors outside the
    interpreter, NotImplementedError for quantised caches and wider heads; always before any launch.
    """
    options = dict(block_size=block_size, scale=scale, sinks=sinks, softcap=softcap, page_table=page_table)
    options |= dict(out_dtype=out_dtype)
    check.decode_block_sparse(q, k, v, block_indices, lengths, **options, k_scale=k_scale, v_scale=v_scale)
    if k_scale is not None or v_scale is not None:
        raise NotImplementedError(f"{OP}: quantised k and v (k_scale, v_scale) have no Triton kernel yet")
    runtime.check_lengths(lengths, k, page_table)
    runtime.check_slots(OP, k=k, v=v)
    runtime.check_rows(OP, q=q, block_indices=block_indices)
    slots = k.shape[1] * (1 if page_table is None else page_table.shape[1])
    options["block_size"] = min(int(block_size), pow2_ceil(max(slots, 1)))  # what is longer is one block too
    if v is None:
        runtime.check_inputs(OP, {"H": (q.shape[-1], MAX_LATENT)}, out_dtype, q=q, k=k)
        return run_keys_as_values(q, None, k, None, block_indices, lengths, **options)
    widths = {"H": (q.shape[-1], MAX_HEAD_DIM), "V": (v.shape[-1], MAX_HEAD_DIM)}
    runtime.check_inputs(OP, widths, out_dtype, q=q, k=k, v=v)
    return run(q, k, v, block_indices, lengths, **options)
