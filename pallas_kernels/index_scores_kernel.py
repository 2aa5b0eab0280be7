"""Bodies of the index kernels: a producer warpgroup (TMA ring of keys) and a compute warpgroup. See index_scores.py."""

from pallas_kernels.compat import BY_COLUMN, BY_ROW, TILE, jnp, lax, pl, plgpu, spread
from pallas_kernels.decode_common import BOX, matmul

ROWS = 64  # of an MMA
WIDEST = 128  # columns of an accumulator
NARROW = plgpu.Layout.WGMMA_UPCAST_2X  # for tiles of 8-bit elements: a thread holds 4 neighbours


class Share:
    """What one program works on: of row b the tiles first .. first + steps - 1, which some query sees, and `unseen`
    groups from `dark` on, which get -inf. A group is the tiles whose scores leave together.
    """

    def __init__(self, f, lengths):
        self.b, split, self.rows = (lax.axis_index(name) for name in ("b", "split", "rows"))
        self.n = lengths[self.b]
        end = lax.div(self.n + (f.tile - 1), jnp.int32(f.tile))
        seen = lax.div(end + (f.group - 1), jnp.int32(f.group))
        total = -(-f.S // (f.tile * f.group))
        first, count = _cut(f, split, seen)
        self.first = first * f.group
        self.steps = jnp.maximum(jnp.minimum((first + count) * f.group, end) - self.first, 0)
        first, self.unseen = _cut(f, split, total - seen)
        self.dark = seen + first


def _cut(f, split, total):
    """(first, count) of this split's even share of `total`."""
    per = lax.div(total + (f.splits - 1), jnp.int32(f.splits))
    first = split * per
    return first, jnp.clip(total - first, 0, per)


class Ring:
    """The keys of a share, tile by tile: filled by one warpgroup, read by the other.

    8-bit keys come with a scale each and are widened to the queries' dtype, in which they are exact: wgmma multiplies
    operands of one type.
    """

    def __init__(self, f, share, k, scale, *, k_s, full, free, scale_s=None, wide_s=None):
        self.f, self.share, self.k, self.scale = f, share, k, scale
        self.k_s, self.scale_s, self.wide_s, self.full, self.free = k_s, scale_s, wide_s, full, free

    def slot(self, i):
        return lax.rem(i, jnp.int32(self.f.stages))

    def fill(self):
        f, share = self.f, self.share

        @pl.loop(0, share.steps)
        def _(i):
            slot, keys = self.slot(i), pl.ds((share.first + i) * f.tile, f.tile)
            pl.when(i >= f.stages)(lambda: plgpu.barrier_wait(self.free.at[slot]))
            plgpu.copy_gmem_to_smem(self.k.at[share.b, keys], self.k_s.at[slot], self.full.at[slot])
            if self.scale is not None:
                plgpu.copy_gmem_to_smem(self.scale.at[share.b, keys], self.scale_s.at[slot], self.full.at[slot])

        # A barrier must not be left with a completed phase that nobody waited for.
        @pl.loop(jnp.maximum(share.steps - f.stages, 0), share.steps)
        def _(i):
            plgpu.barrier_wait(self.free.at[self.slot(i)])

    def take(self, i, layout):
        """The i-th tile as an operand of an MMA, and its scales as a vector in `layout`, or None."""
        slot = self.slot(i)
        plgpu.barrier_wait(self.full.at[slot])
        if self.scale is None:
            return self.k_s.at[slot], None
        keys, factor = plgpu.load(self.k_s.at[slot], layout=NARROW), plgpu.load(self.scale_s.at[slot], layout=layout)
        if keys.dtype != jnp.int8:
            keys = keys.astype(jnp.float16)  # the only conversion of 8-bit floats that sm_90 has
            keys = keys if self.wide_s.dtype == jnp.float16 else keys.astype(jnp.float32)
        self.wide_s[...] = keys.astype(self.wide_s.dtype)
        plgpu.commit_smem()  # for the MMA, and for the copy that overwrites what was read here
        return self.wide_s, factor

    def give_back(self, i):
        plgpu.barrier_arrive(self.free.at[self.slot(i)])


def _run(ring, queries, q_s, q_full, consume):
    """The two warpgroups. `queries` are (source, its rows of q_s)."""

    def produce():
        for source, rows in queries:
            plgpu.copy_gmem_to_smem(source, q_s.at[rows], q_full)
        ring.fill()

    warpgroup = lax.axis_index("warpgroup")
    pl.when(warpgroup == 0)(consume)
    pl.when(warpgroup == 1)(produce)


def scores(f, q, k, weights, lengths, *refs, w_s, out_s, q_s, q_full, **ring):
    """index_scores of `queries` queries over one share of the keys of row b."""
    *scale, out = refs
    share = Share(f, lengths)
    ring = Ring(f, share, k, scale[0] if scale else None, **ring)
    tokens = [share.rows * f.queries + j for j in range(f.queries)]
    boxes = [
        (q.at[share.b, t, u, pl.ds(0, BOX)], pl.ds((j * f.units + u) * BOX, BOX))
        for j, t in enumerate(tokens)
        for u in range(f.units)
    ]

    def consume():
        for j, t in enumerate(tokens):
            w_s.at[j][...] = _weights(f, weights, share.b, t)
        plgpu.barrier_wait(q_full)

        @pl.loop(0, share.steps)
        def _(i):
            tile, turn = share.first + i, lax.rem(i, jnp.int32(2))
            keys, factor = ring.take(i, BY_ROW)
            sums = [_token_scores(f, keys, factor, q_s, w_s, j) for j in range(f.queries)]
            ring.give_back(i)
            key = plgpu.broadcasted_iota(jnp.int32, (f.tile,), 0, layout=BY_ROW) + tile * f.tile
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            for j, (t, total) in enumerate(zip(tokens, sums, strict=True)):
                out_s.at[turn, j][...] = jnp.where(key < share.n - (f.T - 1) + t, total, -jnp.inf)
            plgpu.commit_smem()
            store(turn, tile)

        @pl.when(share.unseen > 0)
        def _():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for j in range(f.queries):
                out_s.at[0, j][...] = plgpu.layout_cast(jnp.full((f.tile,), -jnp.inf, jnp.float32), BY_ROW)
            plgpu.commit_smem()
            pl.loop(0, share.unseen)(lambda i: store(0, share.dark + i))

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def store(turn, tile):
        # The last tile leaves at its own length: what is not swizzled is copied as plain bytes, past the end of a row.
        whole, rest = f.S // f.tile, f.S % f.tile
        if whole:
            send = pl.when(tile < whole) if rest else lambda do: do()
            send(lambda: _send(turn, tile, f.tile))
        if rest:
            pl.when(tile == whole)(lambda: _send(turn, tile, rest))

    def _send(turn, tile, count):
        for j, t in enumerate(tokens):
            keys = out.at[share.b, t, pl.ds(tile * f.tile, count)]
            plgpu.copy_smem_to_gmem(out_s.at[turn, j, pl.ds(0, count)], keys, commit_group=False)
        plgpu.commit_smem_to_gmem_group()

    _run(ring, boxes, q_s, q_full, consume)


def _weights(f, weights, b, t):
    """The weights of query t in the order of its rows; those of rows that are not real multiply 0."""
    if f.heads == BOX:
        return plgpu.load(weights.at[b, t], layout=BY_COLUMN, optimized=False)
    row = plgpu.broadcasted_iota(jnp.int32, (f.padded,), 0, layout=BY_COLUMN)
    values = plgpu.layout_cast(jnp.zeros((f.padded,), jnp.float32), BY_COLUMN)
    for i in range(f.units * f.heads):
        at = i // f.heads * BOX + i % f.heads
        values = jnp.where(row == at, jnp.full((f.padded,), weights[b, t, i]), values)
    return values


def _token_scores(f, keys, factor, q_s, w_s, j):
    """sum_i w_i relu(q_i . k) for the keys of a tile and the j-th query: [tile]."""
    total = plgpu.layout_cast(jnp.zeros((f.tile,), jnp.float32), BY_ROW)
    for column in range(0, f.padded, WIDEST):
        width = min(WIDEST, f.padded - column)
        shape, rows = (f.tile, width), pl.ds(j * f.padded + column, width)
        x = matmul(keys, q_s.at[rows].transpose((1, 0)), shape)
        if factor is not None:
            x = x * spread(factor, shape, 0)
        w = plgpu.load(w_s.at[j, pl.ds(column, width)], layout=BY_COLUMN)
        total = total + (jnp.maximum(x, 0) * spread(w, shape, 1)).sum(axis=1)
    return total


def block_scores(f, q, k, lengths, *refs, out_s, q_s, q_full, **ring):
    """block_index_scores of up to 64 rows (query, head) over one share of the keys of row b.

    y: [64, 8], the maxima of a group of 8 blocks, one a column.
    """
    *scale, out = refs
    share = Share(f, lengths)
    ring = Ring(f, share, k, scale[0] if scale else None, **ring)
    units = [share.rows * f.queries + j for j in range(f.queries)]
    spare = f.units < f.queries * f.row_blocks
    boxes = [
        (q.at[share.b, jnp.minimum(unit, f.units - 1), pl.ds(0, BOX)], pl.ds(j * BOX, BOX))
        for j, unit in enumerate(units)
    ]
    none = plgpu.layout_cast(jnp.full((ROWS, BOX), -jnp.inf, jnp.float32), TILE)

    def consume():
        limit = _limits(f, share, units[0])
        plgpu.barrier_wait(q_full)

        def step(i, y):
            tile = share.first + i
            keys, factor = ring.take(i, BY_COLUMN)
            x = matmul(q_s, keys.transpose((1, 0)), (ROWS, f.tile))
            if factor is not None:
                x = x * spread(factor, x.shape, 1)
            ring.give_back(i)
            y = _fold(f, x, y, tile * f.tile, limit)
            complete = (lax.rem(tile + 1, jnp.int32(f.group)) == 0) | (i == share.steps - 1)
            pl.when(complete)(lambda: leave(y, lax.div(tile, jnp.int32(f.group))))
            return jnp.where(jnp.full(y.shape, complete), none, y)

        lax.fori_loop(0, share.steps, step, none)

        @pl.when(share.unseen > 0)
        def _():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_s.at[0][...] = none
            plgpu.commit_smem()
            pl.loop(0, share.unseen)(lambda i: store(0, share.dark + i))

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def leave(y, group):
        turn = lax.rem(group, jnp.int32(2))
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        out_s.at[turn][...] = y
        plgpu.commit_smem()
        store(turn, group)

    def store(turn, group):
        for j, unit in enumerate(units):

            def send(j=j, unit=unit):
                box = out.at[share.b, unit, pl.ds(0, BOX), pl.ds(group * BOX, BOX)]
                plgpu.copy_smem_to_gmem(out_s.at[turn, pl.ds(j * BOX, BOX)], box, commit_group=False)

            pl.when(unit < f.units)(send) if spare else send()
        plgpu.commit_smem_to_gmem_group()

    _run(ring, boxes, q_s, q_full, consume)


def _limits(f, share, first):
    """The number of keys that each of the 64 rows sees, as a tile of scores; a scalar where it is the same for all."""
    if f.T == 1:
        return share.n
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=BY_ROW)
    eight, per_query = (jnp.full((ROWS,), count, jnp.int32) for count in (BOX, f.per_query))
    number = (first + lax.div(row, eight)) * f.heads + lax.rem(row, eight)
    return spread(share.n - (f.T - 1) + lax.div(number, per_query), (ROWS, f.tile), 0)


def _fold(f, x, y, start, limit):
    """Maxima of the blocks of a tile into their columns of y."""
    key = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=TILE) + start
    x = jnp.where(key < limit, x, -jnp.inf)
    column = plgpu.broadcasted_iota(jnp.int32, y.shape, 1, layout=TILE)
    for at in range(0, f.tile, f.piece):
        highest = spread(x[:, at : at + f.piece].max(axis=1), y.shape, 0)
        block = lax.rem(lax.div(start + at, jnp.int32(f.size)), jnp.int32(BOX))
        y = jnp.where(column == block, jnp.maximum(y, highest), y)
    return y
