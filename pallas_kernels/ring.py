"""A ring of tiles in shared memory, which one warpgroup fills and others read: slot i % stages holds the i-th tile.

A slot has two barriers: on `full` arrive the copies of a tile, on `free` its readers, and the next tile waits for them.
Tiles come by TMA (`fill`), or are gathered row by row by the threads of the producer (`stream`).
"""

from typing import NamedTuple

from pallas_kernels.compat import await_rows, commit_rows, copy_rows, jnp, lax, pl, plgpu, swizzled


class Lane(NamedTuple):
    """Tiles of one kind and their barriers, as scratch types and, in a kernel, as references."""

    free: object
    full: object
    tiles: object

    def each(self, barriers, slot):
        """The barriers of a slot one after the other, one for each part that comes or goes apart."""
        parts = barriers.shape[0] // self.tiles.shape[0]
        return (barriers.at[slot if parts == 1 else slot * parts + part] for part in range(parts))


def lane(f, shape: tuple, dtype, *, copies=1, swizzle=None, parts=(1, 1)) -> Lane:
    """Scratch of f.stages tiles, each of `copies` TMA copies. swizzle: columns that decide it, the last axis without.
    parts: barriers of a slot, free and full, where its parts come and go apart."""
    transforms = swizzled(swizzle or shape[-1], dtype.itemsize)
    return Lane(
        free=plgpu.Barrier(num_barriers=f.stages * parts[0]),
        full=plgpu.Barrier(num_arrivals=copies, num_barriers=f.stages * parts[1]),
        tiles=plgpu.SMEM((f.stages, *shape), dtype, transforms=transforms),
    )


def slot_of(f, i):
    return lax.rem(i, jnp.int32(f.stages))


def fill(f, steps, fetch, *lanes):
    """Bring the tiles of a program in by TMA.

    fetch(i, slot, reuse) issues the copies of the i-th tile. Before those into a part of the slot it calls
    reuse(lambda: barrier), which waits until the part's last tile was read.
    """

    @pl.loop(0, steps)
    def _(i):
        fetch(i, slot_of(f, i), lambda free: pl.when(i >= f.stages)(lambda: plgpu.barrier_wait(free())))

    _drain(f, steps, lanes)


def stream(f, where, copies, *lanes, ahead: int):
    """Gather the tiles of a program, one loop turn a tile.

    copies(slot): (rows of a cache, tile) pairs. A tile is announced `ahead` turns after its copies were issued, before
    the turn waits for its slot: up to the ring's stages, less what the others hold unread while they wait for more.
    """

    @pl.loop(0, where.steps + ahead)
    def _(i):
        # Before the waits, so that the list loads while the slot is still in use.
        rows = where.rows(where.first + i)

        @pl.when(i >= ahead)
        def _():
            await_rows(ahead - 1)
            slot = slot_of(f, i - ahead)
            for lane in lanes:
                for barrier in lane.each(lane.full, slot):
                    plgpu.barrier_arrive(barrier)

        @pl.when(i < where.steps)
        def _():
            slot = slot_of(f, i)
            pl.when(i >= f.stages)(lambda: _reclaim(lanes, slot))
            where.rows_s.at[slot][...] = rows
            for source, tile in copies(slot):
                copy_rows(source, rows, tile)

        commit_rows()

    _drain(f, where.steps, lanes)


def _drain(f, steps, lanes):
    """A barrier must not be left with a completed phase that nobody waited for."""
    pl.loop(jnp.maximum(steps - f.stages, 0), steps)(lambda i: _reclaim(lanes, slot_of(f, i)))


def _reclaim(lanes, slot):
    for lane in lanes:
        for barrier in lane.each(lane.free, slot):
            plgpu.barrier_wait(barrier)
