"""Body of the latent decode kernel for blocks of 64 query rows: query rows on the rows of the MMA. See decode_mla.py.

Warpgroup 2 fills a ring of tiles by TMA. Warpgroups 0 and 1 each own half of the value channels of

    S = Q K^T,   P = exp(S - max),   O <- O exp(old max - max) + P L,

where K is a tile's latents L beside its rope keys. The scores of a tile are computed once, by the warpgroup that owns
it: warpgroup 0 the even tiles, warpgroup 1 the odd ones. An owner publishes P and the running maximum in shared memory,
P in the place of the tile's rope keys, which nobody reads any more. The owners take turns: while warpgroup 0 computes
P of tile 2i, warpgroup 1 multiplies the scores of tile 2i+1; the softmax of those runs beside the products of tile 2i.
The two halves of a slot arrive and are freed separately.

The split of the channels over two warpgroups is FlashMLA's and TileLang's (deepseek-ai/FlashMLA, tile-ai/tilelang).
"""

from pallas_kernels import ring, softmax
from pallas_kernels.compat import BY_ROW, accumulate, jnp, lax, pl, plgpu, spread
from pallas_kernels.tiles import Place, hidden_zero


def scratch(f, dtype, copies) -> dict:
    """Beside the queries and the rope tiles, which come in the ring with the latents, each half with its own barriers.
    copies: of one part of a tile."""
    return dict(
        latents=ring.lane(f, (2, f.block, f.C // 2), dtype, copies=copies, parts=(2, 3)),
        top_s=plgpu.SMEM((f.stages, f.rows), jnp.float32),
        row_s=plgpu.SMEM((4, f.rows), jnp.float32),
        q_full=plgpu.Barrier(num_arrivals=2 if f.R else 1),
        ready=plgpu.Barrier(num_barriers=f.stages),
        done=plgpu.Barrier(num_barriers=2),
    )


def kernel(f, given, out, lse, **smem):
    """One program: 64 query rows of row b against one split of its keys. f: decode_mla.LatentFacts.

    A split without keys writes lse = -inf only, as in tiles.two_warpgroups.
    """
    where, warpgroup = Place(f, given), lax.axis_index("warpgroup")

    def work():
        three_warpgroups(f, where, warpgroup, out, lse, lambda: _produce(f, where, given, **smem), smem)

    if f.splits == 1:
        work()
    else:
        empty = plgpu.layout_cast(jnp.full((f.rows,), -jnp.inf, jnp.float32), BY_ROW)
        pl.when(where.steps > 0)(work)
        pl.when(jnp.logical_and(warpgroup == 0, where.steps == 0))(
            lambda: _store_lse(f, where, empty, lse, smem["row_s"].at[0])
        )


def three_warpgroups(f, where, warpgroup, out, lse, produce, smem):
    """Two copies of the consumer's code, so that the halves' addresses are constants: computed, they would spill."""
    for w in (0, 1):
        pl.when(warpgroup == w)(lambda w=w: consume(f, where, w, out, lse, **smem))
    pl.when(warpgroup == 2)(produce)


def half_of(f, w):
    """The channels of warpgroup w."""
    return pl.ds(w * (f.C // 2), f.C // 2)


def load_queries(f, where, given, ql_s, qr_s, q_full):
    """Copy the query rows, with few registers: the consumers need them."""
    plgpu.set_max_registers(40, action="decrease")
    rows = pl.ds(where.row_block * f.rows, f.rows)
    plgpu.copy_gmem_to_smem(given["q_latent"].at[where.b, rows], ql_s.at[0], q_full)
    if f.R:
        plgpu.copy_gmem_to_smem(given["q_rope"].at[where.b, rows, pl.ds(0, f.rope)], qr_s.at[0], q_full)


def _produce(f, where, given, *, latents, ql_s, qr_s, r_s, q_full, **_):
    """Copy the query rows once, then tiles into the ring: first the half whose warpgroup computes the scores."""
    load_queries(f, where, given, ql_s, qr_s, q_full)

    def fetch(i, slot, reuse):
        owner, pieces = lax.rem(i, jnp.int32(2)), where.pieces(i)
        parts = [pl.ds(j * f.piece, f.piece) for j in range(len(pieces))]
        for half in (owner, 1 - owner):
            reuse(lambda half=half: latents.free.at[slot * 2 + half])
            for at, part in zip(pieces, parts, strict=True):
                channels, full = (*at, half_of(f, half)), latents.full.at[slot * 3 + half]
                plgpu.copy_gmem_to_smem(given["latent"].at[channels], latents.tiles.at[slot, half, part], full)
        for at, part in zip(pieces, parts, strict=True):
            full = latents.full.at[slot * 3 + 2]
            plgpu.copy_gmem_to_smem(given["k_rope"].at[(*at, pl.ds(0, f.rope))], r_s.at[slot, part], full)

    ring.fill(f, where.steps, fetch, latents)


def consume(f, where, w, out, lse, *, latents, ql_s, qr_s, r_s, top_s, row_s, q_full, ready, done):
    """Online softmax over pairs of tiles, of which warpgroup w owns number w. acc: O [rows, C/2]; top: running maximum
    [rows], finite from the start so that no difference is inf - inf; mass: sums of the own P [rows].

    An odd number of tiles ends with an empty one, which takes part without having been loaded.
    """
    plgpu.set_max_registers(232, action="increase")
    result = f.rows, f.C // 2
    plgpu.barrier_wait(q_full)

    def publish(i, slot, x, top):
        return _publish(f, where, i, x, top, latents.tiles.at[slot], r_s.at[slot], top_s.at[slot], ready.at[slot])

    def attend(slot, acc, shrink, beside=tuple):
        def products(total):
            plgpu.wgmma(total, r_s.at[slot], latents.tiles.at[slot, w])

        return accumulate(acc * spread(shrink, result, 0), products, beside)

    def decay(old, new):
        return softmax.power(old - new, f.unit)

    def await_top(slot):
        plgpu.barrier_wait(ready.at[slot])
        return plgpu.load(top_s.at[slot], layout=BY_ROW)

    def step(pair, carry):
        acc, top, mass = carry
        even, odd = 2 * pair, 2 * pair + 1
        slots = [ring.slot_of(f, i) + hidden_zero(pair) for i in (even, odd)]
        x = _scores(f, where, w, (even, odd)[w], slots[w], ql_s, qr_s, latents, r_s)
        if w == 0:
            first, own = publish(even, slots[0], x, top)
            (acc,) = attend(slots[0], acc, decay(top, first))
            plgpu.barrier_arrive(latents.free.at[slots[0] * 2 + w])
            last = await_top(slots[1])
            mass = (mass * decay(top, first) + own) * decay(first, last)
        else:
            first = await_top(slots[0])
            acc, last, own = attend(slots[0], acc, decay(top, first), lambda: publish(odd, slots[1], x, first))
            plgpu.barrier_arrive(latents.free.at[slots[0] * 2 + w])
            mass = mass * decay(top, last) + own
        (acc,) = attend(slots[1], acc, decay(first, last))
        pl.when(odd < where.steps)(lambda: plgpu.barrier_arrive(latents.free.at[slots[1] * 2 + w]))
        return acc, last, mass

    begin = softmax.begin(result, f.rows, (f.rows,), 0)
    acc, top, mass = lax.fori_loop(0, lax.div(where.steps + 1, jnp.int32(2)), step, begin)
    row_s.at[w][...] = mass
    plgpu.commit_smem()
    plgpu.barrier_arrive(done.at[w])
    plgpu.barrier_wait(done.at[1 - w])
    mass = mass + plgpu.load(row_s.at[1 - w], layout=BY_ROW)
    _finish(f, where, w, acc, top, mass, out, lse, latents.tiles, row_s.at[2 + w])


def _scores(f, where, w, i, slot, ql_s, qr_s, latents, r_s):
    """Scores of tile i: [rows, block]. Anything for a tile that does not exist."""
    zero = hidden_zero(i)

    def wait(part):
        pl.when(i < where.steps)(lambda: plgpu.barrier_wait(latents.full.at[slot * 3 + part]))

    def run(accumulator):
        for half in (w, 1 - w):
            wait(half)
            keys = latents.tiles.at[slot, half].transpose((1, 0))
            plgpu.wgmma(accumulator, ql_s.at[zero, :, half_of(f, half)], keys)
        wait(2)
        if f.R:
            plgpu.wgmma(accumulator, qr_s.at[zero], r_s.at[slot].transpose((1, 0)))
        return accumulator[...]

    return f.signed(pl.run_scoped(run, plgpu.ACC((f.rows, f.block), jnp.float32)))


def _publish(f, where, i, x, top, l_s, p_s, top_s, ready):
    """Put P and the running maximum of tile i into shared memory; returns the maximum and the row sums of P."""
    start = jnp.where(i < where.steps, (where.first + i) * f.block, where.n + f.block)
    unread = start + f.block > where.n
    if f.window is not None:
        unread = jnp.logical_or(unread, start < where.lowest)

    def blank_both():
        for half in (0, 1):
            where.blank(start, l_s.at[half])

    pl.when(unread)(blank_both)
    x = jnp.where(where.visible(start, keys_first=False), x, -jnp.inf)
    raised, _, p = softmax.step(f, x, top, 0)
    top_s[...] = raised
    p_s[...] = p.astype(p_s.dtype)
    plgpu.commit_smem()
    plgpu.barrier_arrive(ready)
    return raised, p.sum(axis=1)


def _finish(f, where, w, acc, top, mass, out, lse, l_s, row_s):
    """Store this warpgroup's channels of out, and lse from warpgroup 0.

    16-bit results go through the ring's first slot: its columns of one half are read by one warpgroup only, once the
    scores of the last tile are there. Partial results are float32 and go from registers to memory.
    """
    result, top, mass = softmax.finish(where, acc, top, mass, 0, row_s)
    box = out.at[where.split, where.b, pl.ds(where.row_block * f.rows, f.rows), half_of(f, w)]
    if out.dtype == l_s.dtype:
        staged = l_s.at[0, w]
        staged[...] = result.astype(out.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, box)
        plgpu.wait_smem_to_gmem(0)
    else:
        box[...] = result.astype(out.dtype)
    if w == 0:
        _store_lse(f, where, softmax.natural_lse(top, mass), lse, row_s)


def _store_lse(f, where, value, lse, row_s):
    """lse of the 64 rows, of fewer in the last block: a contiguous copy is not clipped at the end of a row on a GPU."""
    row_s[...] = value
    plgpu.commit_smem()
    whole, tail = divmod(lse.shape[-1], f.rows)

    def store(length):
        at = where.split, where.b, pl.ds(where.row_block * f.rows, length)
        plgpu.copy_smem_to_gmem(row_s.at[pl.ds(0, length)], lse.at[at])

    pl.when(where.row_block < whole)(lambda: store(f.rows))
    if tail:
        pl.when(where.row_block == whole)(lambda: store(tail))
    plgpu.wait_smem_to_gmem(0)
