"""Parts that the sparse decode kernels share: which keys a list names, and where they lie.

A list names blocks (or, with blocks of one slot, tokens) of the cache. Position i of a list is slot i % size of its
block i // size; positions come in tiles of `f.block` like the keys of a dense cache, whatever slots they lead to.
Every list is a row of the batch of its own, so that each program has one list and query rows that share it.
"""

from pallas_kernels import limits
from pallas_kernels.compat import BY_COLUMN, BY_COPY, BY_ROW, hidden, jnp, lax, pl, plgpu, spread, take
from pallas_kernels.ring import slot_of
from pallas_kernels.tiles import Place

FAR = 2**30  # past every position of a list


def refuse(lists, dtype, out_dtype, B, N, names) -> None:
    """NotImplementedError for calls without a kernel. names: what the caller calls queries, keys and lists."""
    q, keys, entries = names
    limits.halves(q, dtype, out_dtype)
    limits.need(lists.S, f"{keys} has S={lists.S} slots; the kernel needs at least one")
    limits.need(lists.L, f"{entries} has L={lists.L} entries; the kernel needs at least one")
    limits.grid(q, "BT", dict(B=B, T=lists.T, N=N))


class Listed(Place):
    """What this program works on: list b, its row of the cache and KV head, and its tiles first .. first + steps - 1.

    f has a field `lists`. `limit` is the first slot that the query may not see. n and lowest are positions, not slots,
    and no position is outside of them.
    """

    def __init__(self, f, given):
        x, self.f, lengths, pages = f.lists, f, given.get("lengths"), given.get("pages")
        query, self.split, head = (lax.axis_index(name) for name in ("b", "split", "head"))
        number, self.row_block = lax.div(head, jnp.int32(f.row_blocks)), lax.rem(head, jnp.int32(f.row_blocks))
        self.b, self.number = query * x.count + number, number
        self.kv = lax.div(number, jnp.int32(x.count // x.K))
        self.row, t = lax.div(query, jnp.int32(x.T)), lax.rem(query, jnp.int32(x.T))
        self.limit = jnp.int32(x.S) if lengths is None else lengths[self.row] - x.T + t + 1
        self.list, self.pages = given["lists"].at[self.b], None if pages is None else pages.at[self.row]
        self.n, self.lowest = FAR, 0
        tiles = -(-x.keys // f.block)
        per = f.chunk // f.block if f.chunk else -(-tiles // f.splits)
        self.first = self.split * per
        self.steps = hidden(jnp.clip(tiles - self.first, 0, per))  # a bound on it would undo hidden_zero
        share = f.heads * f.units
        self.sinks = given["sinks"].at[pl.ds(number * share, share)] if "sinks" in given else None

    def box(self, j):
        """(0, unit) of box j, counted from the list's first head, and whether it exists."""
        f = self.f
        number = self.row_block * f.boxes + j
        real = True if f.row_blocks * f.boxes == f.units else number < f.units
        return 0, jnp.minimum(number, f.units - 1), real


class Gathered(Listed):
    """A Listed whose tiles are gathered key by key; rows_s holds `rows` of the tiles in the ring."""

    def __init__(self, f, given, rows_s):
        super().__init__(f, given)
        self.rows_s = rows_s

    def source(self, cache, columns=slice(None)):
        """The rows that `rows` counts: of a cache B S K W, or of a pool 1 pages*page K W."""
        return cache.at[0 if self.pages is not None else self.row, :, self.kv, columns]

    def rows(self, tile):
        """Where the 64 keys of a tile lie among the cache's rows, in layout BY_COPY: -1 for one that is not seen."""
        x = self.f.lists
        position = plgpu.broadcasted_iota(jnp.int32, (64,), 0, layout=BY_COPY) + tile * 64
        entry, offset = _divide(position, x.size)
        index = take(self.list, jnp.minimum(entry, x.L - 1))
        slot = index * x.size + offset
        seen = (entry < x.L) & (index >= 0) & (index < -(-x.S // x.size)) & (slot < self.limit)
        if x.page is None:
            return jnp.where(seen, slot, -1)
        page, offset = _divide(jnp.where(seen, slot, 0), x.page)
        return jnp.where(seen, take(self.pages, page) * x.page + offset, -1)

    def visible(self, start, keys_first=True):
        """Which keys of the tile at position `start` the query sees: [block, rows], or [rows, block]."""
        f = self.f
        axis, shape = (0, (f.block, f.rows)) if keys_first else (1, (f.rows, f.block))
        slot = slot_of(f, lax.div(start, jnp.int32(f.block)) - self.first)
        rows = plgpu.load(self.rows_s.at[slot], layout=BY_ROW if keys_first else BY_COLUMN)
        # Where the tiles come in pairs, the last of an odd number starts past FAR and was never loaded.
        return (spread(rows, shape, axis) >= 0) & jnp.full(shape, start < FAR)


def _divide(value, by: int):
    """(value // by, value % by) of values that are not negative."""
    if by == 1:
        return value, jnp.zeros_like(value)
    by = jnp.full(value.shape, by, jnp.int32)
    return lax.div(value, by), lax.rem(value, by)
