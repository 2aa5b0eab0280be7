"""Decode attention over listed entries of a cache whose rows are keys and values at once.

    s_tj = scale * (q_latent_t . latent_j + q_rope_t . k_rope_j)   for the entries j of the cache that t's list names
    out_t = sum_j exp(s_tj) latent_j / (sum_j exp(s_tj) + exp(sink));   lse_t = log of that denominator

One program owns one list, one block of the heads that share it, and one split of its positions. A tile is gathered row
by row into shared memory and used twice, as keys and as values; what it costs does not depend on S. An ignored entry
has a mask and no address: nothing is read for it. Splits and their merge are those of `decode_attention`, the tiles and
the layout of the MMAs those of `decode_mla` ("Layouts" and "Copies" at the top of that file).

The kernel also serves `decode_block_sparse` with v=None: R = 0, several KV heads, blocks of entries, lengths, pages and
softcap. Sources: DeepSeek-V3.2 (DSA, arXiv 2512.02556) with the absorbed form of DeepSeek-V2 (arXiv 2405.04434);
DeepSeek-V4 (CSA) for keys that are their own values.
"""

import torch
import triton
import triton.language as tl

from torch_ref.ops import check
from triton_kernels import runtime
from triton_kernels.decode_attention import cap_logits, close_rows, load_tile, store_tile
from triton_kernels.decode_mla import MAX_LATENT, MAX_ROPE, absorb
from triton_kernels.merge_states import LOG2E, merge_parts, part_buffers
from triton_kernels.plan import MlaConfig, block_rows, default_mla_config, fill_splits, nearest, pow2_ceil

OP = "decode_sparse_mla"


@triton.jit
def seen_slots(lengths, batch, t, slots, T: tl.constexpr, HAS_LENGTHS: tl.constexpr):
    """How many slots query t of a row sees: all of them where the lists alone decide."""
    if HAS_LENGTHS:
        return tl.load(lengths + batch) - T + t + 1
    return slots


@triton.jit
def split_range(n_positions, split, n_splits, BLOCK_N: tl.constexpr):
    """Positions [start, end) of one split of a list, in whole tiles."""
    size = tl.cdiv(tl.cdiv(n_positions, n_splits), BLOCK_N) * BLOCK_N
    start = split * size
    return start, tl.minimum(start + size, n_positions)


@triton.jit
def listed_slot(entries, table, position, end, seen, BLOCK: tl.constexpr, PAGE: tl.constexpr):
    """(slot, page) at a position, or a vector of positions, of a list of blocks; slot -1 where nothing is to be read.

    Neither the list past `end` nor the table's entry for a slot that is not seen is read.
    """
    block = tl.load(entries + position // BLOCK, mask=position < end, other=-1)
    # Compared as a block: the first slot of a block number from outside the cache may not fit 32 bits.
    listed = (block >= 0) & (block <= (seen - 1) // BLOCK) & (seen > 0)
    slot = tl.where(listed, block, 0) * BLOCK + position % BLOCK
    slot = tl.where(listed & (slot < seen), slot, -1)
    page = slot
    if PAGE > 0:
        page = tl.load(table + slot // PAGE, mask=slot >= 0, other=0)
    return slot, page


@triton.jit
def tile_rows(base, slot, page, j, page_stride, slot_stride, PAGE: tl.constexpr, WHOLE: tl.constexpr):
    """Pointer and offsets of a tile's rows: one slot and its neighbours (WHOLE), or a slot for each row."""
    if PAGE > 0:
        row = page.to(tl.int64) * page_stride + (slot % PAGE).to(tl.int64) * slot_stride
    else:
        row = slot.to(tl.int64) * slot_stride
    if WHOLE:
        return base + row, j * slot_stride
    else:
        return base, row


@triton.jit(do_not_specialize=["slots", "n_entries"])
def sparse_mla_kernel(
    q_latent, q_rope, latent, k_rope, indices, lengths, page_table, sinks, out, lse,
    ql_stride_b, ql_stride_t, ql_stride_n, qr_stride_b, qr_stride_t, qr_stride_n,
    latent_stride_b, latent_stride_k, rope_stride_b, list_stride_b, list_stride_t, list_stride_n, table_stride,
    scale, softcap, slots, n_entries,
    T: tl.constexpr, LISTS: tl.constexpr, SHARE: tl.constexpr, G: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, C_PAD: tl.constexpr, R_PAD: tl.constexpr,
    LATENT_STRIDE: tl.constexpr, ROPE_STRIDE: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_SINK: tl.constexpr, HAS_CAP: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    # Blocks of heads of one list are neighbours in the grid: the second reads the latent from L2.
    block = tl.program_id(0) % BLOCKS
    number = tl.program_id(0) // BLOCKS
    split = tl.program_id(1)
    n_splits = tl.num_programs(1)
    head = number % LISTS
    t = number // LISTS % T
    batch = number // LISTS // T

    g = block * ROWS + tl.arange(0, ROWS)
    n = head * G + g
    seen = seen_slots(lengths, batch, t, slots, T, HAS_LENGTHS)
    start, end = split_range(n_entries * BLOCK, split, n_splits, BLOCK_N)

    ql_base = q_latent + batch.to(tl.int64) * ql_stride_b + t * ql_stride_t
    ql = load_tile(ql_base, n * ql_stride_n, g < G, 0, C_PAD, C, False)
    if R > 0:
        qr_base = q_rope + batch.to(tl.int64) * qr_stride_b + t * qr_stride_t
        qr = load_tile(qr_base, n * qr_stride_n, g < G, 0, R_PAD, R, False)

    entries = indices + batch.to(tl.int64) * list_stride_b + t * list_stride_t + head * list_stride_n
    table = page_table + batch.to(tl.int64) * table_stride
    latent += (head // SHARE).to(tl.int64) * latent_stride_k
    if PAGE == 0:
        latent += batch.to(tl.int64) * latent_stride_b
        k_rope += batch.to(tl.int64) * rope_stride_b

    j = tl.arange(0, BLOCK_N)
    lane = j
    if WHOLE:
        lane = 0
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    acc = tl.zeros([ROWS, C_PAD], tl.float32)
    # The slots are loaded one tile ahead: a chain of loads inside a tile would have to share the pipeline's stages.
    # With EARLY the list's loads hide behind q . k, and slots kept for a tile would spill.
    if not EARLY:
        next_slot, next_page = listed_slot(entries, table, start + lane, end, seen, BLOCK, PAGE)
    for tile in tl.range(start, end, BLOCK_N):
        if EARLY:
            slot, page = listed_slot(entries, table, tile + lane, end, seen, BLOCK, PAGE)
        else:
            slot, page = next_slot, next_page
            next_slot, next_page = listed_slot(entries, table, tile + BLOCK_N + lane, end, seen, BLOCK, PAGE)
        inside = slot >= 0
        if WHOLE:
            inside = inside & (slot + j < seen)
        latent_tile, offsets = tile_rows(latent, slot, page, j, latent_stride_b, LATENT_STRIDE, PAGE, WHOLE)
        # Values are 0, not only unweighted, where nobody looks: 0 * NaN is NaN.
        c = load_tile(latent_tile, offsets, inside, 0, C_PAD, C, False)
        # Sums of scaled products and branches that are always taken, for the layout of the MMAs: see decode_mla.
        if R > 0:
            rope_tile, offsets = tile_rows(k_rope, slot, page, j, rope_stride_b, ROPE_STRIDE, PAGE, WHOLE)
            r = load_tile(rope_tile, offsets, inside, 0, R_PAD, R, True)
            x_rope = tl.dot(qr, r, input_precision="ieee")
            x = tl.dot(ql, tl.trans(c), input_precision="ieee")
            x = x * scale + x_rope * scale
        else:
            x = tl.dot(ql, tl.trans(c), input_precision="ieee") * scale
        if tile + BLOCK_N > start:
            if HAS_CAP:
                x = cap_logits(x, softcap) * LOG2E
            x = tl.where(inside[None, :], x, float("-inf"))
        if EARLY:
            if tile < end:
                peak, total, acc = absorb(x, c, j, seen, 0, peak, total, acc, 1, False)
        else:
            peak, total, acc = absorb(x, c, j, seen, 0, peak, total, acc, 1, False)

    total = tl.sum(total, 1)
    # Anew, in a form that the compiler cannot tell to be the first one: kept through the loop, the rows would spill.
    g = (block + tl.minimum(n_entries, 0)) * ROWS + tl.arange(0, ROWS)
    index = (number.to(tl.int64) * G + g) * n_splits + split
    factor, shrink, keep = close_rows(peak, total, lse, index, g < G, sinks, head * G + g, HAS_SINK, SPLIT)
    store_tile(out, index, keep, acc * factor[:, None] * shrink[:, None], 0, C_PAD, C)


def whole_tiles(block_size, page, block_n):
    """Whether every tile lies in one block, and in one page: its rows then have one slot and one stride."""
    return block_size % block_n == 0 and page % block_n == 0


def specialise(shape, strides, block_size, page, config, *, lengths, sink, softcap, split):
    """The compile-time arguments of `sparse_mla_kernel`.

    shape: (T, lists, lists of one KV head, heads of one list, C, R); strides: of a latent and of a rope slot.
    """
    tokens, lists, share, group, latent_dim, rope_dim = shape
    return {
        "T": tokens, "LISTS": lists, "SHARE": share, "G": group, "C": latent_dim, "R": rope_dim,
        "C_PAD": max(16, pow2_ceil(latent_dim)), "R_PAD": max(16, pow2_ceil(rope_dim)),
        "LATENT_STRIDE": strides[0], "ROPE_STRIDE": strides[1], "BLOCK": block_size, "PAGE": page,
        "WHOLE": whole_tiles(block_size, page, config.block_n), "ROWS": config.rows, "BLOCKS": -(-group // config.rows),
        "BLOCK_N": config.block_n, "EARLY": config.early,
        "HAS_LENGTHS": lengths, "HAS_SINK": sink, "HAS_CAP": softcap, "SPLIT": split,
    }  # fmt: skip


def _plan(q_latent, rope_dim, lists, span, config):
    """(MlaConfig, number of splits) for lists of `span` positions."""
    batch, tokens, heads, latent_dim = q_latent.shape
    group = heads // lists
    if config is None:
        key = (latent_dim + rope_dim, latent_dim, block_rows(group), group, batch * tokens * lists, span)
        found = nearest(OP, runtime.FLOAT_DTYPES[q_latent.dtype], *key, runtime.device_name(q_latent.device))
        config = MlaConfig(**found) if found else default_mla_config(q_latent.element_size(), latent_dim, 1, group)
    programs = batch * tokens * lists * -(-group // config.rows)
    return config, fill_splits(programs, span, config, runtime.sm_count(q_latent.device))


def run(q_latent, q_rope, latent, k_rope, indices, lengths=None, *, scale, block_size=1, sinks=None, softcap=None,
        page_table=None, out_dtype=None, config=None):  # fmt: skip
    """The general call on arguments that were checked: latent B S K C (or pages), indices B T lists L.

    q_rope and k_rope are tensors or both None; `config` overrides the table (for tuning).
    """
    batch, tokens, heads, latent_dim = q_latent.shape
    lists, n_entries = indices.shape[2:]
    rope_dim = 0 if q_rope is None else q_rope.shape[-1]
    page = 0 if page_table is None else latent.shape[1]
    slots = latent.shape[1] if page_table is None else page_table.shape[1] * page
    out = torch.empty(q_latent.shape, dtype=out_dtype or q_latent.dtype, device=q_latent.device)
    lse = torch.empty(q_latent.shape[:3], dtype=torch.float32, device=q_latent.device)
    if not out.numel():
        return out, lse

    config, n_splits = _plan(q_latent, rope_dim, lists, n_entries * block_size, config)
    split = n_splits > 1
    part, part_lse = part_buffers(lse, latent_dim, n_splits) if split else (out, lse)
    sinks, lengths = (None if x is None else x.contiguous() for x in (sinks, lengths))
    indices, table = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (indices, page_table))
    # What a kernel never reads still needs a tensor.
    table = indices if table is None else table
    q_rope, k_rope = (q_latent, latent[:, :, 0]) if q_rope is None else (q_rope, k_rope)
    flags = dict(lengths=lengths is not None, sink=sinks is not None, softcap=softcap is not None, split=split)
    shape = (tokens, lists, lists // latent.shape[2], heads // lists, latent_dim, rope_dim)
    constants = specialise(shape, (latent.stride(1), k_rope.stride(1)), block_size, page, config, **flags)
    runtime.launch(
        sparse_mla_kernel, (batch * tokens * lists * constants["BLOCKS"], n_splits),
        q_latent, q_rope, latent, k_rope, indices, indices if lengths is None else lengths, table,
        lse if sinks is None else sinks, part, part_lse,
        *q_latent.stride()[:3], *q_rope.stride()[:3],
        latent.stride(0), latent.stride(2), k_rope.stride(0), *indices.stride()[:3], table.stride(0),
        float(scale) * (1.0 if softcap else LOG2E.value), float(softcap or 0.0), slots, n_entries,
        **constants, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if split:
        merge_parts(part, part_lse, sinks, out, lse, n_splits=n_splits, fixed=False)
    return out, lse


def decode_sparse_mla(
    q_latent, q_rope, latent, k_rope, indices, *, scale, sinks=None, latent_scale=None, out_dtype=None
):
    """Attention of T tokens of every row over the listed entries of its latent cache; see the top of this file.

    q_latent: B T N C, q_rope: B T N R, latent: B S C, k_rope: B S R of one dtype (float16, bfloat16, float32), C at
    most 512 and R at most 64; any strides, the last dimension contiguous. indices: int32 B T L, one list of entries for
    all heads of a query, distinct (the caller's duty) and in any order; -1 and what is not in 0 .. S-1 is ignored.
    sinks: N, natural-log units, unscaled.
    Returns out_latent: B T N C in out_dtype (default q_latent's dtype) and lse: float32 B T N, natural log, sink
    included; W_uv of each head is the caller's to apply.

    A query whose list has no entry gives out = 0 and lse = -inf, or its sink. Entries that no list names can hold NaN
    or Inf. Raises ValueError for shapes, strides and devices, TypeError for dtypes and for CPU tensors outside the
    interpreter, NotImplementedError for latent_scale and wider caches; always before any launch.
    """
    options = dict(scale=scale, sinks=sinks, out_dtype=out_dtype)
    check.decode_sparse_mla(q_latent, q_rope, latent, k_rope, indices, **options, latent_scale=latent_scale)
    if latent_scale is not None:
        raise NotImplementedError(f"{OP}: a quantised latent (latent_scale) has no Triton kernel yet")
    widths = {"C": (q_latent.shape[-1], MAX_LATENT), "R": (q_rope.shape[-1], MAX_ROPE)}
    runtime.check_inputs(OP, widths, out_dtype, q_latent=q_latent, q_rope=q_rope, latent=latent, k_rope=k_rope)
    runtime.check_slots(OP, latent=latent, k_rope=k_rope)
    runtime.check_rows(OP, q_latent=q_latent, q_rope=q_rope, indices=indices)
    return run(q_latent, q_rope, latent[:, :, None], k_rope, indices[:, :, None], **options)
