"""Parts that the sparse decode kernels share: which keys a list names, and how they come into shared memory.

A list names blocks (or, with blocks of one slot, tokens) of the cache. Position i of a list is slot i % size of its
block i // size; positions come in tiles of `f.block` like the keys of a dense cache, whatever slots they lead to.
Every list is a row of the batch of its own, so that each program has one list and query rows that share it.
"""

from dataclasses import dataclass

from pallas_kernels.compat import (
    BY_COLUMN,
    BY_COPY,
    BY_ROW,
    await_rows,
    commit_rows,
    hidden,
    jnp,
    lax,
    pl,
    plgpu,
    spread,
    take,
)
from pallas_kernels.decode_common import Place

FAR = 2**30  # past every position of a list


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

    def tiles(self, block: int) -> int:
        return -(-self.L * self.size // block)

    def even_splits(self, splits: int, block: int) -> int:
        """As many splits as have tiles when each takes the tiles of one of `splits`."""
        tiles = self.tiles(block)
        return -(-tiles // -(-tiles // min(splits, tiles)))


def refuse(lists, dtype, out_dtype, B, N, names) -> None:
    """NotImplementedError for calls without a kernel. names: what the caller calls queries, keys and lists."""
    q, keys, entries = names
    if dtype not in (jnp.float16, jnp.bfloat16):
        raise NotImplementedError(f"{q} has dtype {dtype}; wgmma multiplies 16-bit inputs, and float32 only as tf32")
    if out_dtype is not None and jnp.dtype(out_dtype) == jnp.float64:
        raise NotImplementedError("out_dtype is float64; the kernel accumulates in float32")
    if lists.S == 0:
        raise NotImplementedError(f"{keys} has S={lists.S} slots; the kernel needs at least one")
    if lists.L == 0:
        raise NotImplementedError(f"{entries} has L={lists.L} entries; the kernel needs at least one")
    if min(B, lists.T, N) == 0 or B * lists.T > 65535:
        raise NotImplementedError(f"{q} has B={B}, T={lists.T}, N={N}; the grid must not be empty, B*T at most 65535")


class Listed(Place):
    """What this program works on: list b, its row of the cache and KV head, and its tiles first .. first + steps - 1.

    f has a field `lists`. `limit` is the first slot that the query may not see. n and lowest are positions, not slots,
    and no position is outside of them.
    """

    def __init__(self, f, lists, lengths, pages):
        x = f.lists
        query, self.split, head = (lax.axis_index(name) for name in ("b", "split", "head"))
        number, self.row_block = lax.div(head, jnp.int32(f.row_blocks)), lax.rem(head, jnp.int32(f.row_blocks))
        self.b, self.number = query * x.count + number, number
        self.kv = lax.div(number, jnp.int32(x.count // x.K))
        self.row, t = lax.div(query, jnp.int32(x.T)), lax.rem(query, jnp.int32(x.T))
        self.limit = jnp.int32(x.S) if lengths is None else lengths[self.row] - x.T + t + 1
        self.list, self.pages = lists.at[self.b], None if pages is None else pages.at[self.row]
        self.n, self.lowest = FAR, 0
        tiles = x.tiles(f.block)
        per = -(-tiles // f.splits)
        self.first = self.split * per
        self.steps = hidden(jnp.clip(tiles - self.first, 0, per))  # a bound on it would undo hidden_zero

    def box(self, f, j):
        """(0, unit) of box j, counted from the list's first head, and whether it exists."""
        number = self.row_block * f.boxes + j
        real = True if f.row_blocks * f.boxes == f.units else number < f.units
        return 0, jnp.minimum(number, f.units - 1), real

    def own(self, f, sinks):
        """The sinks of the list's heads."""
        share = f.heads * f.units
        return None if sinks is None else sinks.at[pl.ds(self.number * share, share)]

    def source(self, cache, columns=slice(None)):
        """The rows that `rows` counts: of a cache B S K W, or of a pool 1 pages*page K W."""
        return cache.at[0 if self.pages is not None else self.row, :, self.kv, columns]

    def rows(self, f, tile):
        """Where the 64 keys of a tile lie among the cache's rows, in layout BY_COPY: -1 for one that is not seen."""
        x = f.lists
        position = plgpu.broadcasted_iota(jnp.int32, (64,), 0, layout=BY_COPY) + tile * 64
        entry, offset = _divide(position, x.size)
        index = take(self.list, jnp.minimum(entry, x.L - 1))
        slot = index * x.size + offset
        seen = (entry < x.L) & (index >= 0) & (index < -(-x.S // x.size)) & (slot < self.limit)
        if x.page is None:
            return jnp.where(seen, slot, -1)
        page, offset = _divide(jnp.where(seen, slot, 0), x.page)
        return jnp.where(seen, take(self.pages, page) * x.page + offset, -1)


class Gathered(Listed):
    """A Listed whose tiles are gathered key by key; rows_s holds `rows` of the tiles in the ring."""

    def __init__(self, f, lists, lengths, pages, rows_s):
        super().__init__(f, lists, lengths, pages)
        self.rows_s = rows_s

    def visible(self, f, start, keys_first):
        """Which keys of the tile at position `start` the query sees: [block, rows], or [rows, block]."""
        axis, shape = (0, (f.block, f.rows)) if keys_first else (1, (f.rows, f.block))
        slot = lax.rem(lax.div(start, jnp.int32(f.block)) - self.first, jnp.int32(f.stages))
        rows = plgpu.load(self.rows_s.at[slot], layout=BY_ROW if keys_first else BY_COLUMN)
        # Where the tiles come in pairs, the last of an odd number starts past FAR and was never loaded.
        return (spread(rows, shape, axis) >= 0) & jnp.full(shape, start < FAR)


def _divide(value, by: int):
    """(value // by, value % by) of values that are not negative."""
    if by == 1:
        return value, jnp.zeros_like(value)
    by = jnp.full(value.shape, by, jnp.int32)
    return lax.div(value, by), lax.rem(value, by)


def stream(f, where, fetch, announce, reclaim, ahead: int):
    """Gather the tiles of a program into its ring, one loop turn a tile.

    fetch(rows, slot) issues the copies, announce(slot) tells the others that they arrived, reclaim(slot) waits until
    the slot is free. A tile is announced `ahead` turns after it was issued, before the turn's reclaim: up to the ring's
    stages, less what the others hold unread while they wait for more.
    """

    @pl.loop(0, where.steps + ahead)
    def _(i):
        # Before the waits, so that the list loads while the slot is still in use.
        rows = where.rows(f, where.first + i)

        @pl.when(i >= ahead)
        def _():
            await_rows(ahead - 1)
            announce(lax.rem(i - ahead, jnp.int32(f.stages)))

        @pl.when(i < where.steps)
        def _():
            slot = lax.rem(i, jnp.int32(f.stages))
            pl.when(i >= f.stages)(lambda: reclaim(slot))
            where.rows_s.at[slot][...] = rows
            fetch(rows, slot)

        commit_rows()

    # A barrier must not be left with a completed phase that nobody waited for.
    @pl.loop(jnp.maximum(where.steps - f.stages, 0), where.steps)
    def _(i):
        reclaim(lax.rem(i, jnp.int32(f.stages)))
