"""Device functions that the kernels share: tiles of a cache, the online softmax, splits, lists of entries.

Logits stay in natural units until the maximum is taken off: times log2 e, the largest of float32 would overflow.
"""

import triton
import triton.language as tl


@triton.jit
def finite_or_zero(peak):
    """The running maximum as something to subtract: -inf (nothing seen yet) would make -inf - -inf = NaN."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def log_sum(peak, total):
    """peak + log(total), and -inf where total is 0. A NaN total stays NaN."""
    empty = total == 0.0
    return tl.where(empty, float("-inf"), peak + tl.log(tl.where(empty, 1.0, total)))


@triton.jit
def sink_factor(lse, sink):
    """Factor of the output, and the new lse, after a sink logit joins the denominator."""
    peak = finite_or_zero(tl.maximum(lse, sink))
    weight = tl.exp(lse - peak)
    total = weight + tl.exp(sink - peak)
    return weight / tl.where(total == 0.0, 1.0, total), log_sum(peak, total)


@triton.jit
def load_tile(base, offsets, keep, COL: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns COL .. COL+COLS of the rows at base + offsets, 0 where not `keep` or past WIDTH.

    COLUMNS: rows of memory become columns of the tile (a transposed read, as K needs).
    """
    col = COL + tl.arange(0, COLS)
    if COLUMNS:
        pointers = base + offsets[None, :] + col[:, None]
        mask = keep[None, :] & (col < WIDTH)[:, None] if COL + COLS > WIDTH else keep[None, :]
    else:
        pointers = base + offsets[:, None] + col[None, :]
        mask = keep[:, None] & (col < WIDTH)[None, :] if COL + COLS > WIDTH else keep[:, None]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_tile(base, index, keep, acc, COL: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr):
    col = COL + tl.arange(0, COLS)
    mask = keep[:, None] & (col < WIDTH)[None, :]
    tl.store(base + index[:, None] * WIDTH + col[None, :], acc.to(base.dtype.element_ty), mask=mask)


@triton.jit
def cap_logits(x, softcap, inverse):
    """softcap * tanh(x / softcap). tanh from exp of a negative number, which cannot overflow.

    inverse: 1 / softcap from the host, as the hardware's fast division gives 0 for divisors above 2^126.
    """
    y = x * inverse
    decay = tl.exp(-2.0 * tl.abs(y))
    # 1 - decay cancels for small y; there three terms of the series are exact to float32, even where y is a denormal
    small = x * (1.0 + y * y * (-1.0 / 3.0 + y * y * (2.0 / 15.0)))
    large = tl.where(y < 0.0, -softcap, softcap) * ((1.0 - decay) / (1.0 + decay))
    return tl.where(tl.abs(y) < 0.0625, small, large)


@triton.jit
def key_range(length, block, split, n_splits, chunk, window, T: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr,
              BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr, FIXED: tl.constexpr):  # fmt: skip
    """Keys [start, end) of one split: the union of what the block's queries see, cut by the row's own length alone.

    The cut starts at the first key that any query sees, so tiles outside a window are never visited. With FIXED every
    split has `chunk` keys; otherwise the row's keys are shared evenly, in whole tiles.
    """
    seen = length - T + 1 + tl.minimum((block * ROWS + ROWS - 1) // G, T - 1)
    high = tl.maximum(seen, 0)
    low = 0
    if HAS_WINDOW:
        low = tl.maximum(length - T + 1 + block * ROWS // G - window, 0)
    size = chunk
    if not FIXED:
        size = tl.cdiv(tl.cdiv(high - low, n_splits), BLOCK_N) * BLOCK_N
    start = low + split * size
    return start, tl.minimum(start + size, high)


@triton.jit
def close_rows(peak, total, lse, index, real, sinks, n, HAS_SINK: tl.constexpr, SPLIT: tl.constexpr):
    """Store the lse of every row; returns its output's two factors, and which rows of the output are to be stored.

    A part of a split leaves the sink to the merge. Otherwise the sink shrinks the output in
    a second multiplication, as in the merge: a row's bits must not depend on how many splits the grid has.
    """
    # Test for 0, not for > 0: a NaN among the visible keys must reach the output.
    factor = 1.0 / tl.where(total == 0.0, 1.0, total)
    row_lse = log_sum(finite_or_zero(peak), total)
    shrink = tl.full(peak.shape, 1.0, tl.float32)
    keep = real
    if SPLIT:
        tl.store(lse + index, row_lse, mask=real)
        keep = real & (total != 0.0)  # the merge does not read empty parts
    else:
        if HAS_SINK:
            shrink, row_lse = sink_factor(row_lse, tl.load(sinks + n, mask=real, other=0.0).to(tl.float32))
        tl.store(lse + index, row_lse, mask=real)
    return factor, shrink, keep


@triton.jit
def weigh(x, peak):
    """The online softmax after one more tile of logits x: weights, factor of what was, peak."""
    new_peak = tl.maximum(peak, tl.max(x, 1))
    shift = finite_or_zero(new_peak)
    alpha = tl.exp(peak - shift)
    p = tl.exp(x - shift[:, None])
    return p, alpha, new_peak


@triton.jit
def absorb(x, c, key, seen, window, peak, total, acc, T: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """The online softmax after one more tile: logits x, latents c; returns peak, total, acc.

    total keeps a sum for every column of x: a row's sum over the warps would cost barriers in every tile.
    """
    if T > 1:  # a single query sees all keys of the tile that are inside the split
        visible = key[None, :] < seen[:, None]
        if HAS_WINDOW:
            visible = visible & (key[None, :] >= (seen - window)[:, None])
        x = tl.where(visible, x, float("-inf"))
    p, alpha, peak = weigh(x, peak)
    total = total * alpha[:, None] + p
    return peak, total, tl.dot(p.to(c.dtype), c, acc * alpha[:, None], input_precision="ieee")


@triton.jit
def seen_slots(lengths, batch, t, slots, T: tl.constexpr, HAS_LENGTHS: tl.constexpr):
    """How many slots query t of a row sees: all of them where the lists alone decide."""
    if HAS_LENGTHS:
        return tl.load(lengths + batch) - T + t + 1
    return slots


@triton.jit
def split_range(n_positions, split, n_splits, BLOCK_N: tl.constexpr, chunk=0, FIXED: tl.constexpr = False):
    """Positions [start, end) of one split of a list, in whole tiles; with FIXED every split has `chunk` of them."""
    size = chunk
    if not FIXED:
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


@triton.jit
def ordered(x):
    """int32 that compare as the floats do: -0.0 is 0.0, and every NaN is above +inf."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def unordered(rank):
    """The float32 that `ordered` turned into this integer."""
    return tl.where(rank < 0, rank ^ 0x7FFFFFFF, rank).to(tl.float32, bitcast=True)


def whole_tiles(block_size, page, block_n):
    """Whether every tile lies in one block, and in one page: its rows then have one slot and one stride."""
    return block_size % block_n == 0 and page % block_n == 0


def cap_numbers(softcap):
    """softcap and inverse of `cap_logits`; anything without a cap."""
    return (float(softcap), 1.0 / float(softcap)) if softcap else (0.0, 0.0)
