"""Parts that the decode kernels share: what a call is, what a program works on, masks, blanking, query boxes, rows out.

A program works on a few query boxes of one row of the batch and one KV head, and on one split of its keys. A query box
is 8 rows: the heads of a group are cut into `units` of g <= 8 heads (g divides their number), one box a unit and query
token; TMA fills the rows past g with zeros and drops them again on the way out. So queries and results are used where
they lie, without padding, slicing or transposing.
"""

import functools
import math
from dataclasses import dataclass

import jax
import numpy as np

from pallas_kernels.compat import BY_COLUMN, TILE, jnp, launch, lax, pl, plgpu

BOX = 8  # rows of a query box, the least N of an MMA


@dataclass(frozen=True)
class Lists:
    """Everything static about the lists of one call."""

    T: int  # query tokens of a row
    count: int  # lists of a query token: K, or N when heads choose alone
    K: int  # heads of the cache
    L: int  # entries of a list
    size: int  # slots of an entry
    S: int  # slots of a row
    page: int | None  # slots of a page

    @property
    def keys(self):
        """Positions of a list."""
        return self.L * self.size

    def even_splits(self, splits: int, block: int) -> int:
        """As many splits as have tiles when each takes the tiles of one of `splits`."""
        tiles = -(-self.keys // block)
        return -(-tiles // -(-tiles // min(splits, tiles)))


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything static about one call of a decode kernel."""

    T: int  # query tokens of a row
    heads: int  # g, real rows of a query box
    units: int  # boxes of one KV head and query token
    boxes: int  # query boxes of one program
    V: int  # value columns
    block: int  # keys of a tile
    stages: int  # tiles of the ring
    splits: int
    scale: float
    out_dtype: np.dtype
    final: bool  # one split may write the result: with `chunk` it may not, as a merge's bits differ
    page: int | None = None  # slots of a page
    chunk: int | None = None
    window: int | None = None
    lists: Lists | None = None  # each is a row of the batch with one query, whose keys it names

    @property
    def rows(self):
        return BOX * self.boxes

    @property
    def unit(self):
        """The logit of a score of 1, positive: see softmax.py."""
        return abs(self.scale) or 1.0

    def signed(self, x):
        """Products of queries and keys as scores; logits are scores * unit."""
        return x if self.scale > 0 else -x if self.scale < 0 else x * 0.0

    @property
    def row_blocks(self):
        """Programs of one KV head and split."""
        return -(-self.T * self.units // self.boxes)

    @property
    def piece(self):
        """Keys that one TMA copy brings in."""
        size, page = (self.lists.size, self.lists.page) if self.lists else (0, self.page)
        return math.gcd(size, page or self.block, self.block)

    @property
    def alone(self):
        """Whether no merge follows, so that the kernel folds in the sinks and writes the result."""
        return self.final and self.splits == 1

    @property
    def part_dtype(self):
        """Of what the kernel writes: float32 parts, or the result."""
        return self.out_dtype if self.alone else np.dtype("float32")

    def outputs(self, rows: tuple, columns: int) -> list:
        """Types of what the kernel writes: out [splits, *rows, columns] and lse [splits, *rows]."""
        shape = self.splits, *rows
        return [jax.ShapeDtypeStruct((*shape, columns), self.part_dtype), jax.ShapeDtypeStruct(shape, jnp.float32)]


def boxes_of(rows: int) -> tuple[int, int]:
    """(real rows of a box, boxes): the largest number up to 8 that divides `rows`."""
    heads = next(g for g in range(BOX, 0, -1) if rows % g == 0)
    return heads, rows // heads


def launch_programs(body, f, operands, out_type, scratch, grid, name, *, axes=("b", "split", "head"), warpgroups=2):
    """body(f, given, *outs, **scratch) in every program of the grid; `given` holds the operands that are not None."""
    operands = {name: array for name, array in operands.items() if array is not None}
    return launch(
        functools.partial(_named, body, f, tuple(operands)), *operands.values(), out_type=out_type,
        scratch_types=scratch, grid=grid, grid_names=axes, num_threads=warpgroups,
        thread_name=warpgroups and "warpgroup", kernel_name=name,
    )  # fmt: skip


def _named(body, f, names, *refs, **scratch):
    body(f, dict(zip(names, refs, strict=False)), *refs[len(names) :], **scratch)


class Place:
    """What this program works on: row b, KV head kv, its query boxes and its tiles first .. first + steps - 1.

    n is the row's length and `lowest` the first slot that any of its queries may read. Splits begin at its tile.
    """

    def __init__(self, f, given):
        self.f, self.pages, self.sinks, self.alibi = f, *(given.get(name) for name in ("pages", "sinks", "alibi"))
        self.b, self.split, head = (lax.axis_index(name) for name in ("b", "split", "head"))
        self.kv, self.row_block = lax.div(head, jnp.int32(f.row_blocks)), lax.rem(head, jnp.int32(f.row_blocks))
        self.n = given["lengths"][self.b]
        self.lowest = jnp.int32(0) if f.window is None else jnp.maximum(self.n - (f.T - 1 + f.window), 0)
        base = lax.div(self.lowest, jnp.int32(f.block))
        tiles = lax.div(self.n + (f.block - 1), jnp.int32(f.block)) - base
        per = f.chunk // f.block if f.chunk else lax.div(tiles + (f.splits - 1), jnp.int32(f.splits))
        self.first = base + self.split * per
        self.steps = jnp.clip(base + tiles - self.first, 0, per)

    def box(self, j):
        """(query token, unit) of box j, and whether it exists: the last program of a head may have boxes to spare."""
        f = self.f
        total = f.T * f.units
        number = self.row_block * f.boxes + j
        real = True if f.row_blocks * f.boxes == total else number < total
        number = jnp.minimum(number, total - 1)
        return lax.div(number, jnp.int32(f.units)), self.kv * f.units + lax.rem(number, jnp.int32(f.units)), real

    def each_box(self, do):
        """do(j, query token, unit) for every box that exists."""
        for j in range(self.f.boxes):
            t, unit, real = self.box(j)
            task = functools.partial(do, j, t, unit)
            task() if real is True else pl.when(real)(task)

    def pieces(self, i):
        """(row or page, its keys) of every piece of the i-th tile.

        A contiguous cache is one piece a tile. Pages come in pieces that divide both page and tile. Pieces that no
        query reads take the nearest page that one does, since the other entries of the table may be anything.
        """
        f, tile = self.f, self.first + i
        if self.pages is None:
            return [(self.b, pl.ds(tile * f.block, f.block))]
        count, pieces = f.page // f.piece, []
        lowest, highest = lax.div(self.lowest, jnp.int32(f.page)), lax.div(self.n - 1, jnp.int32(f.page))
        for j in range(f.block // f.piece):
            number = tile * (f.block // f.piece) + j
            page = self.pages[self.b, jnp.clip(lax.div(number, jnp.int32(count)), lowest, highest)]
            pieces.append((page, pl.ds(lax.rem(number, jnp.int32(count)) * f.piece, f.piece)))
        return pieces

    def visible(self, start, keys_first=True):
        """Which keys of the tile at `start` each query row sees: [block, rows], or [rows, block]."""
        key, limit = self.keys_and_limits(start, keys_first)
        seen = key < limit
        return seen if self.f.window is None else jnp.logical_and(seen, key >= limit - self.f.window)

    def keys_and_limits(self, start, keys_first=True):
        """The keys of the tile at `start`, and of each query row the one after its own: it sees those before."""
        f = self.f
        axis, shape = (0, (f.block, f.rows)) if keys_first else (1, (f.rows, f.block))
        key = plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=TILE) + start
        limit = self.n
        if f.T > 1:
            row = plgpu.broadcasted_iota(jnp.int32, shape, 1 - axis, layout=TILE)
            number = self.row_block * f.boxes + lax.div(row, jnp.full(shape, BOX, jnp.int32))
            limit = self.n - (f.T - 1) + lax.div(number, jnp.full(shape, f.units, jnp.int32))
        return key, limit

    def tile(self, i):
        """Of the i-th tile: seen(), the mask of its scores [block, rows], and blank(values), which zeroes the value
        rows that no query may read: they can hold NaN, and 0 * NaN in P V is NaN."""
        start = (self.first + i) * self.f.block

        def blank(values):
            unread = jnp.logical_or(start + self.f.block > self.n, start < self.lowest)
            pl.when(unread)(lambda: self.blank(start, values))

        return lambda: self.visible(start), blank

    def blank(self, start, values):
        """Zero the value rows of the tile at `start` that no query may read."""

        def read(shape):
            key = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=TILE) + start
            inside = key < self.n
            return inside if self.f.window is None else jnp.logical_and(inside, key >= self.lowest)

        keep(self.f, values, read)


def keep(f, values, read):
    """Zero the value rows outside of read(shape), a mask in the layout TILE."""
    columns = math.gcd(f.V, 64)  # no wider: V = 96 must lie in 32-column tiles, and slices are what tells the layouts

    @pl.loop(0, values.shape[-1] // columns)
    def _(piece):
        part = values.at[:, pl.ds(piece * columns, columns)]
        inside = read((f.block, columns))
        x = plgpu.load(part, layout=TILE)
        part[...] = jnp.where(inside, x, jnp.zeros_like(x))


def two_warpgroups(consume, produce):
    """The body of a kernel over a dense cache: warpgroup 0 computes and warpgroup 1 loads the keys of one split.

    A split without keys writes lse = -inf only: the merge does not look at its out. A single split writes the final
    result in any case.
    """

    def body(f, given, out, lse, **smem):
        where, computes = Place(f, given), lax.axis_index("warpgroup") == 0

        def work():
            pl.when(computes)(lambda: consume(f, where, out, lse, **smem))
            pl.when(jnp.logical_not(computes))(lambda: produce(f, where, given, **smem))

        if f.splits == 1:
            work()
        else:
            pl.when(where.steps > 0)(work)
            empty = functools.partial(store_rows, where, lambda row: jnp.float32(-jnp.inf), lse)
            pl.when(jnp.logical_and(computes, where.steps == 0))(empty)

    return body


def load_boxes(where, q_full, *queries):
    """Copy the query boxes, those to spare too. queries: (source, its shared memory) pairs."""
    for j in range(where.f.boxes):
        t, unit, _ = where.box(j)
        for q, q_s in queries:
            first = (0,) * (len(q_s.shape) - 2)
            box = q.at[where.b, t, unit, pl.ds(0, BOX), pl.ds(0, q_s.shape[-1])]
            plgpu.copy_gmem_to_smem(box, q_s.at[(*first, pl.ds(j * BOX, BOX))], q_full)


def hidden_zero(i):
    """0 for a loop counter below 2**30, which the compiler does not know. An operand of an MMA indexed by it has its
    addresses computed in the loop; those of 36 products, computed before the loop, take more registers than there are.
    """
    return lax.shift_right_logical(i, jnp.int32(30))


def matmul(a, b, shape):
    """a @ b of shared-memory operands into a fresh float32 accumulator."""

    def run(accumulator):
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def load_heads(where, of_heads, row_s, layout=BY_COLUMN):
    """A number of every head for every query row, through shared memory, since the heads of a box need not fill it."""
    f = where.f
    for j in range(f.boxes):
        _, unit, _ = where.box(j)
        for i in range(BOX):
            row_s[j * BOX + i] = of_heads[unit * f.heads + min(i, f.heads - 1)].astype(jnp.float32)
    plgpu.commit_smem()
    return plgpu.load(row_s, layout=layout)


def store_rows(where, value, lse):
    """lse of every real query row; rows are stored one by one because TMA moves no fewer than 16 bytes."""

    def store(j, t, unit):
        for i in range(where.f.heads):
            lse[where.split, where.b, t, unit, i] = value(j * BOX + i)

    where.each_box(store)
