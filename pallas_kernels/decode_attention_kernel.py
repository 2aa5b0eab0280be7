"""Body of the decode kernel: a producer warpgroup (TMA ring) and a compute warpgroup. See decode_attention.py."""

import math

from pallas_kernels.compat import BY_COLUMN, TILE, TILE_T, jnp, lax, pl, plgpu, spread
from pallas_kernels.merge_states import LOG2E, LOWEST

BOX = 8  # rows of a query box, the least N of an MMA


def kernel(f, has_pages, has_sinks, q, k, v, lengths, *refs, **smem):
    """One program: query boxes of KV head `kv` of row b against one split of its keys. f: decode_attention.Facts.

    A split without keys writes lse = -inf only: the merge does not look at its out. A single split writes the final
    result in any case.
    """
    *options, out, lse = refs
    pages, sinks = options[0] if has_pages else None, options[-1] if has_sinks else None
    where = _Place(f, lengths)
    computes = lax.axis_index("warpgroup") == 0

    def work():
        pl.when(computes)(lambda: _consume(f, where, sinks, out, lse, **smem))
        pl.when(jnp.logical_not(computes))(lambda: _produce(f, where, pages, q, k, v, **smem))

    if f.splits == 1:
        work()
    else:
        pl.when(where.steps > 0)(work)
        pl.when(jnp.logical_and(computes, where.steps == 0))(
            lambda: _store_rows(f, where, lambda row: jnp.float32(-jnp.inf), lse)
        )


class _Place:
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


def _produce(f, where, pages, q, k, v, *, q_s, k_s, v_s, q_full, k_full, v_full, k_free, v_free, **_):
    """Copy the query boxes once, then K and V tiles into the ring."""
    for j in range(f.boxes):
        t, unit, _ = where.box(f, j)
        plgpu.copy_gmem_to_smem(q.at[where.b, t, unit, pl.ds(0, BOX)], q_s.at[pl.ds(j * BOX, BOX)], q_full)

    @pl.loop(0, where.steps)
    def _(i):
        slot = lax.rem(i, jnp.int32(f.stages))
        # Before the waits, so that page numbers load while the slot is still in use.
        sources = _sources(f, where, pages, where.first + i)
        pl.when(i >= f.stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))
        for (row, keys), part in sources:
            plgpu.copy_gmem_to_smem(k.at[row, keys, where.kv], k_s.at[slot, part], k_full.at[slot])
        pl.when(i >= f.stages)(lambda: plgpu.barrier_wait(v_free.at[slot]))
        for (row, keys), part in sources:
            box = v.at[row, keys, where.kv, pl.ds(0, f.width)]
            plgpu.copy_gmem_to_smem(box, v_s.at[slot, part], v_full.at[slot])

    # A barrier must not be left with a completed phase that nobody waited for.
    @pl.loop(jnp.maximum(where.steps - f.stages, 0), where.steps)
    def _(i):
        slot = lax.rem(i, jnp.int32(f.stages))
        plgpu.barrier_wait(k_free.at[slot])
        plgpu.barrier_wait(v_free.at[slot])


def _sources(f, where, pages, tile):
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


def _consume(f, where, sinks, out, lse, *, q_s, k_s, v_s, p_s, q_full, k_full, v_full, k_free, v_free, **smem):
    """Online softmax over the tiles. acc: O^T [width, rows]; top: running maximum [rows], base 2 and finite from the
    start so that no difference is inf - inf; mass: [block, rows], summed over keys only once, after the loop."""
    tile, keys_by_rows = (f.width, f.rows), (f.block, f.rows)
    plgpu.barrier_wait(q_full)

    def step(i, carry):
        acc, top, mass = carry
        slot = lax.rem(i, jnp.int32(f.stages))
        start = (where.first + i) * f.block
        plgpu.barrier_wait(k_full.at[slot])
        x = _matmul(k_s.at[slot], q_s.transpose((1, 0)), keys_by_rows)
        plgpu.barrier_arrive(k_free.at[slot])
        x = jnp.where(_visible(f, where, start), _logits(f, x), -jnp.inf)
        raised = jnp.maximum(top, x.max(axis=0))
        shrink = jnp.exp2(top - raised)
        p = jnp.exp2(x - spread(raised, keys_by_rows, 1))
        mass = mass * spread(shrink, keys_by_rows, 1) + p
        p_s.transpose((1, 0))[...] = p.astype(p_s.dtype)
        plgpu.barrier_wait(v_full.at[slot])
        unread = jnp.logical_or(start + f.block > where.n, start < where.lowest)
        pl.when(unread)(lambda: _blank(f, where, start, v_s.at[slot]))
        plgpu.commit_smem()
        more = _matmul(v_s.at[slot].transpose((1, 0)), p_s.transpose((1, 0)), tile)
        plgpu.barrier_arrive(v_free.at[slot])
        return acc * spread(shrink, tile, 1) + more, raised, mass

    acc = plgpu.layout_cast(jnp.zeros(tile, jnp.float32), TILE)
    top = plgpu.layout_cast(jnp.full((f.rows,), LOWEST, jnp.float32), BY_COLUMN)
    mass = plgpu.layout_cast(jnp.zeros(keys_by_rows, jnp.float32), TILE)
    acc, top, mass = lax.fori_loop(0, where.steps, step, (acc, top, mass))
    _finish(f, where, acc, top, mass.sum(axis=0), sinks, out, lse, **smem)


def _matmul(a, b, shape):
    """a @ b of shared-memory operands into a fresh float32 accumulator."""

    def run(accumulator):
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def _logits(f, x):
    """Scaled and capped logits in base-2 units. tanh by exp2: the hardware's tanh has only 11 bits."""
    if f.softcap is None:
        return x * (f.scale * LOG2E)
    e = jnp.exp2(x * (2 * LOG2E * f.scale / f.softcap))
    return (f.softcap * LOG2E) * (1 - 2 / (e + 1))


def _visible(f, where, start):
    """Which keys of the tile at `start` each query row sees: [block, rows]."""
    shape = f.block, f.rows
    key = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=TILE) + start
    limit = where.n
    if f.T > 1:
        row = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=TILE)
        number = where.row_block * f.boxes + lax.div(row, jnp.full(shape, BOX, jnp.int32))
        limit = where.n - (f.T - 1) + lax.div(number, jnp.full(shape, f.units, jnp.int32))
    seen = key < limit
    return seen if f.window is None else jnp.logical_and(seen, key >= limit - f.window)


def _blank(f, where, start, values):
    """Zero the value rows that no query may read: they can hold NaN, and 0 * NaN in P V is NaN."""
    columns = math.gcd(f.V, 64)  # no wider: V = 96 must lie in 32-column tiles, and slices are what tells the layouts
    for column in range(0, f.width, columns):
        part = values.at[:, pl.ds(column, columns)]
        key = plgpu.broadcasted_iota(jnp.int32, (f.block, columns), 0, layout=TILE) + start
        read = key < where.n
        if f.window is not None:
            read = jnp.logical_and(read, key >= where.lowest)
        x = plgpu.load(part, layout=TILE)
        part[...] = jnp.where(read, x, jnp.zeros_like(x))


def _finish(f, where, acc, top, mass, sinks, out, lse, *, out_s, row_s):
    """Fold in the sink, normalise and store out and lse: the split's, or the final ones when it is the only split."""
    if sinks is not None:
        sink = _load_sinks(f, where, sinks, row_s) * LOG2E
        raised = jnp.maximum(top, sink)
        shrink = jnp.exp2(top - raised)
        acc, top, mass = acc * spread(shrink, acc.shape, 1), raised, mass * shrink + jnp.exp2(sink - raised)
    share = jnp.where(mass > 0, 1 / mass, 0.0)
    result = plgpu.layout_cast(acc * spread(share, acc.shape, 1), TILE_T)
    out_s.transpose((1, 0))[...] = result.astype(out_s.dtype)
    row_s[...] = (top + jnp.log2(mass)) * math.log(2)
    plgpu.commit_smem()
    total = out.shape[-1]
    # Copies no wider than a tile that divides V: out_s has one layout, and it is inferred from these slices.
    columns = total if total % 64 == 0 else math.gcd(total, 64)
    for j in range(f.boxes):
        t, unit, real = where.box(f, j)

        def store(j=j, t=t, unit=unit):
            for column in range(0, total, columns):
                part = pl.ds(column, columns)
                box = out.at[where.split, where.b, t, unit, pl.ds(0, BOX), part]
                plgpu.copy_smem_to_gmem(out_s.at[pl.ds(j * BOX, BOX), part], box)

        store() if real is True else pl.when(real)(store)
    _store_rows(f, where, lambda row: row_s[row], lse)
    plgpu.wait_smem_to_gmem(0)


def _load_sinks(f, where, sinks, row_s):
    """The sink of every query row, through shared memory, since the heads of a box need not fill it."""
    for j in range(f.boxes):
        _, unit, _ = where.box(f, j)
        for i in range(BOX):
            row_s[j * BOX + i] = sinks[unit * f.heads + min(i, f.heads - 1)].astype(jnp.float32)
    plgpu.commit_smem()
    return plgpu.load(row_s, layout=BY_COLUMN)


def _store_rows(f, where, value, lse):
    """lse of every real query row; rows are stored one by one because TMA moves no fewer than 16 bytes."""
    for j in range(f.boxes):
        t, unit, real = where.box(f, j)

        def store(j=j, t=t, unit=unit):
            for i in range(f.heads):
                lse[where.split, where.b, t, unit, i] = value(j * BOX + i)

        store() if real is True else pl.when(real)(store)
