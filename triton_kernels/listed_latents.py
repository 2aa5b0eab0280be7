"""The kernel of decode attention over listed entries of a cache whose rows are keys and values at once.

    s_tj = scale * (q_latent_t . latent_j + q_rope_t . k_rope_j)   for the entries j of the cache that t's list names
    out_t = sum_j exp(s_tj) latent_j / (sum_j exp(s_tj) + exp(sink));   lse_t = log of that denominator

One program owns one list, one block of the heads that share it, and one split of its positions. A tile is gathered row
by row into shared memory and used twice, as keys and as values; what it costs does not depend on S. An ignored entry
has a mask and no address: nothing is read for it. The layout of the MMAs and the copies are those of the dense
latent kernel ("Layouts" and "Copies" at the top of its file).

In general lists name blocks of entries, for several KV heads, in a cache with lengths or pages, and logits are capped.
R = 0: rows without a rope part.
"""

import triton
import triton.language as tl

from triton_kernels import runtime
from triton_kernels.merge import over_lists
from triton_kernels.plan import Key, default_latent_config, mma_width
from triton_kernels.tiles import (
    absorb,
    cap_logits,
    close_rows,
    listed_slot,
    load_tile,
    seen_slots,
    split_range,
    store_tile,
    tile_rows,
)


@triton.jit(do_not_specialize=["slots", "n_entries", "chunk"])
def latent_list_kernel(
    q_latent, q_rope, latent, k_rope, indices, lengths, page_table, sinks, out, lse,
    ql_stride_b, ql_stride_t, ql_stride_n, qr_stride_b, qr_stride_t, qr_stride_n,
    latent_stride_b, latent_stride_k, rope_stride_b, list_stride_b, list_stride_t, list_stride_n, table_stride,
    scale, softcap, inverse, slots, n_entries, chunk,
    T: tl.constexpr, LISTS: tl.constexpr, SHARE: tl.constexpr, G: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, C_PAD: tl.constexpr, R_PAD: tl.constexpr,
    LATENT_STRIDE: tl.constexpr, ROPE_STRIDE: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_SINK: tl.constexpr, HAS_CAP: tl.constexpr, FIXED: tl.constexpr,
    SPLIT: tl.constexpr,
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
    start, end = split_range(n_entries * BLOCK, split, n_splits, BLOCK_N, chunk, FIXED)

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
        # Sums of scaled products and branches that are always taken, for the layout of the MMAs: see decode_mla.py.
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
                x = cap_logits(x, softcap, inverse)
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


def site(q_latent, rope_dim, lists, span):
    """(Key, default) of a call with so many lists a query, each of `span` entries."""
    batch, tokens, heads, latent_dim = q_latent.shape
    group = heads // lists
    dtype = runtime.FLOAT_DTYPES[q_latent.dtype]
    key = Key(dtype, latent_dim + rope_dim, latent_dim, group, batch * tokens * lists, span)
    return key, default_latent_config(q_latent.element_size(), latent_dim, 1, group)


def run(op, q_latent, q_rope, latent, k_rope, indices, lengths=None, page_table=None, *, config, scale, block_size=1,
        **options):  # fmt: skip
    """The general call on arguments that were checked: latent B S K C (or pages), indices B T lists L.

    q_rope and k_rope are tensors or both None.
    """
    latent_dim, rope_dim = q_latent.shape[-1], 0 if q_rope is None else q_rope.shape[-1]
    # What a kernel never reads still needs a tensor.
    q_rope, k_rope = (q_latent, latent[:, :, 0]) if q_rope is None else (q_rope, k_rope)
    strides = *q_latent.stride()[:3], *q_rope.stride()[:3], latent.stride(0), latent.stride(2), k_rope.stride(0)
    return over_lists(
        op, latent_list_kernel, (q_latent, q_rope, latent, k_rope), strides, latent, indices, lengths, page_table,
        width=latent_dim, scale=scale, block_size=block_size, rows=config.rows, config=config, **options,
        C=latent_dim, R=rope_dim, C_PAD=mma_width(latent_dim), R_PAD=mma_width(rope_dim),
        LATENT_STRIDE=latent.stride(1), ROPE_STRIDE=k_rope.stride(1), EARLY=config.early,
    )  # fmt: skip
