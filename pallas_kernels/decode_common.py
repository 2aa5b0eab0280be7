"""Parts that the decode kernels share: what a program works on, where its tiles lie, masks, blanking, rows out.

Every function takes the `Facts` of its op, of which it uses T, units, heads, boxes, row_blocks, block, splits, chunk,
window, page and piece.
"""

import math

from pallas_kernels.compat import BY_COLUMN, TILE, jnp, lax, pl, plgpu

BOX = 8  # rows of a query box, the least N of an MMA


class Place:
    """What this program works on: row b, KV head kv, its query boxes and its tiles first .. first + steps - 1.

    n is the row's length and `lowest` the first slot that any of its queries may read. Splits begin at its tile.
    """

    def __init__(self, f, lengths):
        self.b, self.split, head = (lax.axis_index(name) for name in ("b", "split", "head"))
        self.kv, self.row_block = lax.div(head, jnp.int32(f.row_blocks)), lax.rem(head, jnp.int32(f.row_blocks))
        self.n = lengths[self.b]
        self.lowest = jnp.int32(0) if f.window is None else jnp.maximum(self.n - (f.T - 1 + f.window), 0)
        base = lax.div(self.lowest, jnp.int32(f.block))
        tiles = lax.div(self.n + (f.block - 1), jnp.int32(f.block)) - base
        per = f.chunk // f.block if f.chunk else lax.div(tiles + (f.splits - 1), jnp.int32(f.splits))
        self.first = base + self.split * per
        self.steps = jnp.clip(base + tiles - self.first, 0, per)

    def box(self, f, j):
        """(query token, unit) of box j, and whether it exists: the last program of a head may have boxes to spare."""
        total = f.T * f.units
        number = self.row_block * f.boxes + j
        real = True if f.row_blocks * f.boxes == total else number < total
        number = jnp.minimum(number, total - 1)
        return lax.div(number, jnp.int32(f.units)), self.kv * f.units + lax.rem(number, jnp.int32(f.units)), real

    def visible(self, f, start, keys_first):
        """Which keys of the tile at `start` each query row sees: [block, rows], or [rows, block]."""
        axis, shape = (0, (f.block, f.rows)) if keys_first else (1, (f.rows, f.block))
        key = plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=TILE) + start
        limit = self.n
        if f.T > 1:
            row = plgpu.broadcasted_iota(jnp.int32, shape, 1 - axis, layout=TILE)
            number = self.row_block * f.boxes + lax.div(row, jnp.full(shape, BOX, jnp.int32))
            limit = self.n - (f.T - 1) + lax.div(number, jnp.full(shape, f.units, jnp.int32))
        seen = key < limit
        return seen if f.window is None else jnp.logical_and(seen, key >= limit - f.window)


def sources(f, where, pages, tile):
    """Where the pieces of a tile come from and go to: ((row or page, its keys), keys of the tile).

    A contiguous cache is one piece a tile. Pages come in pieces that divide both page and tile. Pieces that no query
    reads take the nearest page that one does, since the other entries of the table may be anything.
    """
    if pages is None:
        return [((where.b, pl.ds(tile * f.block, f.block)), pl.ds(0, f.block))]
    count, pieces = f.page // f.piece, []
    lowest, highest = lax.div(where.lowest, jnp.int32(f.page)), lax.div(where.n - 1, jnp.int32(f.page))
    for j in range(f.block // f.piece):
        number = tile * (f.block // f.piece) + j
        page = pages[where.b, jnp.clip(lax.div(number, jnp.int32(count)), lowest, highest)]
        keys = pl.ds(lax.rem(number, jnp.int32(count)) * f.piece, f.piece)
        pieces.append(((page, keys), pl.ds(j * f.piece, f.piece)))
    return pieces


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


def visible(f, where, start, keys_first=True):
    """Which keys of the tile at `start` each query row sees: [block, rows], or [rows, block]."""
    return where.visible(f, start, keys_first)


def blank(f, where, start, values):
    """Zero the value rows that no query may read: they can hold NaN, and 0 * NaN in P V is NaN."""

    def read(shape):
        key = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=TILE) + start
        inside = key < where.n
        return inside if f.window is None else jnp.logical_and(inside, key >= where.lowest)

    keep(f, values, read)


def keep(f, values, read):
    """Zero the value rows outside of read(shape), a mask in the layout TILE."""
    columns = math.gcd(f.V, 64)  # no wider: V = 96 must lie in 32-column tiles, and slices are what tells the layouts

    @pl.loop(0, values.shape[-1] // columns)
    def _(piece):
        part = values.at[:, pl.ds(piece * columns, columns)]
        inside = read((f.block, columns))
        x = plgpu.load(part, layout=TILE)
        part[...] = jnp.where(inside, x, jnp.zeros_like(x))


def load_sinks(f, where, sinks, row_s, layout=BY_COLUMN):
    """The sink of every query row, through shared memory, since the heads of a box need not fill it."""
    for j in range(f.boxes):
        _, unit, _ = where.box(f, j)
        for i in range(BOX):
            row_s[j * BOX + i] = sinks[unit * f.heads + min(i, f.heads - 1)].astype(jnp.float32)
    plgpu.commit_smem()
    return plgpu.load(row_s, layout=layout)


def store_rows(f, where, value, lse):
    """lse of every real query row; rows are stored one by one because TMA moves no fewer than 16 bytes."""
    for j in range(f.boxes):
        t, unit, real = where.box(f, j)

        def store(j=j, t=t, unit=unit):
            for i in range(f.heads):
                lse[where.split, where.b, t, unit, i] = value(j * BOX + i)

        store() if real is True else pl.when(real)(store)
