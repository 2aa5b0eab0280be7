"""Body of the latent decode kernel for blocks of 64 query rows: query rows on the rows of the MMA. See decode_mla.py.

Warpgroup 2 fills a ring of tiles by TMA. Warpgroups 0 and 1 each own half of the value channels of

    S = Q K^T,   P = exp2(S - max),   O <- O exp2(old max - max) + P L,

where K is a tile's latents L beside its rope keys. The scores of a tile are computed once, by the warpgroup that owns
it: warpgroup 0 the even tiles, warpgroup 1 the odd ones. An owner publishes P and the running maximum in shared memory,
P in the place of the tile's rope keys, which nobody reads any more. The owners take turns: while warpgroup 0 computes
P of tile 2i, warpgroup 1 multiplies the scores of tile 2i+1; the softmax of those runs beside the products of tile 2i.
The two halves of a slot arrive and are freed separately.

The split of the channels over two warpgroups is FlashMLA's and TileLang's (deepseek-ai/FlashMLA, tile-ai/tilelang).
"""

import math

from pallas_kernels.compat import BY_ROW, TILE, accumulate, jnp, lax, pl, plgpu, spread
from pallas_kernels.decode_common import Place, blank, hidden_zero, load_sinks, sources, visible
from pallas_kernels.merge_states import LOG2E, LOWEST


def kernel(f, has_pages, has_sinks, q_latent, q_rope, latent, k_rope, lengths, *refs, **smem):
    """One program: 64 query rows of row b against one split of its keys. f: decode_mla.Facts.

    A split without keys writes lse = -inf only: the merge does not look at its out. A single split writes the final
    result in any case.
    """
    *options, out, lse = refs
    pages, sinks = options[0] if has_pages else None, options[-1] if has_sinks else None
    where = Place(f, lengths)
    warpgroup = lax.axis_index("warpgroup")

    def work():
        # Two copies of the code, so that the halves' addresses are constants: computed, they would spill.
        for w in (0, 1):
            pl.when(warpgroup == w)(lambda w=w: consume(f, where, w, sinks, out, lse, **smem))
        pl.when(warpgroup == 2)(lambda: _produce(f, where, pages, q_latent, q_rope, latent, k_rope, **smem))

    if f.splits == 1:
        work()
    else:
        empty = plgpu.layout_cast(jnp.full((f.rows,), -jnp.inf, jnp.float32), BY_ROW)
        pl.when(where.steps > 0)(work)
        pl.when(jnp.logical_and(warpgroup == 0, where.steps == 0))(
            lambda: _store_lse(f, where, empty, lse, smem["row_s"].at[0])
        )


def _half(f, w):
    """The channels of warpgroup w."""
    return pl.ds(w * (f.C // 2), f.C // 2)


def _produce(f, where, pages, q_latent, q_rope, latent, k_rope, *, ql_s, qr_s, l_s, r_s, q_full, full, free, **_):
    """Copy the query rows once, then tiles into the ring: first the half whose warpgroup computes the scores."""
    plgpu.set_max_registers(40, action="decrease")
    rows = pl.ds(where.row_block * f.rows, f.rows)
    plgpu.copy_gmem_to_smem(q_latent.at[where.b, rows], ql_s.at[0], q_full)
    plgpu.copy_gmem_to_smem(q_rope.at[where.b, rows, pl.ds(0, f.rope)], qr_s.at[0], q_full)

    @pl.loop(0, where.steps)
    def _(i):
        slot, owner = lax.rem(i, jnp.int32(f.stages)), lax.rem(i, jnp.int32(2))
        pieces = sources(f, where, pages, where.first + i)
        for half in (owner, 1 - owner):
            pl.when(i >= f.stages)(lambda half=half: plgpu.barrier_wait(free.at[slot * 2 + half]))
            for at, part in pieces:
                to = l_s.at[slot, half, part]
                plgpu.copy_gmem_to_smem(latent.at[(*at, _half(f, half))], to, full.at[slot * 3 + half])
        for at, part in pieces:
            plgpu.copy_gmem_to_smem(k_rope.at[(*at, pl.ds(0, f.rope))], r_s.at[slot, part], full.at[slot * 3 + 2])

    # A barrier must not be left with a completed phase that nobody waited for.
    @pl.loop(jnp.maximum(where.steps - f.stages, 0), where.steps)
    def _(i):
        slot = lax.rem(i, jnp.int32(f.stages))
        for half in (0, 1):
            plgpu.barrier_wait(free.at[slot * 2 + half])


def consume(f, where, w, sinks, out, lse, *, ql_s, qr_s, l_s, r_s, top_s, row_s, q_full, full, ready, free, done):
    """Online softmax over pairs of tiles, of which warpgroup w owns number w. acc: O [rows, C/2]; top: running maximum
    [rows], base 2 and finite from the start so that no difference is inf - inf; mass: sums of the own P [rows].

    An odd number of tiles ends with an empty one, which takes part without having been loaded.
    """
    plgpu.set_max_registers(232, action="increase")
    result = f.rows, f.C // 2
    plgpu.barrier_wait(q_full)

    def publish(i, slot, x, top):
        return _publish(f, where, i, x, top, l_s.at[slot], r_s.at[slot], top_s.at[slot], ready.at[slot])

    def attend(slot, acc, shrink, beside=tuple):
        acc, *more = accumulate(
            acc * spread(shrink, result, 0), lambda total: plgpu.wgmma(total, r_s.at[slot], l_s.at[slot, w]), beside
        )
        return acc, *more

    def await_top(slot):
        plgpu.barrier_wait(ready.at[slot])
        return plgpu.load(top_s.at[slot], layout=BY_ROW)

    def step(pair, carry):
        acc, top, mass = carry
        even, odd = 2 * pair, 2 * pair + 1
        slots = [lax.rem(i, jnp.int32(f.stages)) + hidden_zero(pair) for i in (even, odd)]
        x = _scores(f, where, w, (even, odd)[w], slots[w], ql_s, qr_s, l_s, r_s, full)
        if w == 0:
            first, own = publish(even, slots[0], x, top)
            (acc,) = attend(slots[0], acc, jnp.exp2(top - first))
            plgpu.barrier_arrive(free.at[slots[0] * 2 + w])
            last = await_top(slots[1])
            mass = (mass * jnp.exp2(top - first) + own) * jnp.exp2(first - last)
        else:
            first = await_top(slots[0])
            acc, last, own = attend(slots[0], acc, jnp.exp2(top - first), lambda: publish(odd, slots[1], x, first))
            plgpu.barrier_arrive(free.at[slots[0] * 2 + w])
            mass = mass * jnp.exp2(top - last) + own
        (acc,) = attend(slots[1], acc, jnp.exp2(first - last))
        pl.when(odd < where.steps)(lambda: plgpu.barrier_arrive(free.at[slots[1] * 2 + w]))
        return acc, last, mass

    acc = plgpu.layout_cast(jnp.zeros(result, jnp.float32), TILE)
    top = plgpu.layout_cast(jnp.full((f.rows,), LOWEST, jnp.float32), BY_ROW)
    mass = plgpu.layout_cast(jnp.zeros((f.rows,), jnp.float32), BY_ROW)
    acc, top, mass = lax.fori_loop(0, lax.div(where.steps + 1, jnp.int32(2)), step, (acc, top, mass))
    row_s.at[w][...] = mass
    plgpu.commit_smem()
    plgpu.barrier_arrive(done.at[w])
    plgpu.barrier_wait(done.at[1 - w])
    mass = mass + plgpu.load(row_s.at[1 - w], layout=BY_ROW)
    _finish(f, where, w, acc, top, mass, sinks, out, lse, l_s, row_s.at[2 + w])


def _scores(f, where, w, i, slot, ql_s, qr_s, l_s, r_s, full):
    """Q K^T of tile i in base-2 units: [rows, block]. Anything for a tile that does not exist."""
    zero = hidden_zero(i)

    def wait(part):
        pl.when(i < where.steps)(lambda: plgpu.barrier_wait(full.at[slot * 3 + part]))

    def run(accumulator):
        for half in (w, 1 - w):
            wait(half)
            plgpu.wgmma(accumulator, ql_s.at[zero, :, _half(f, half)], l_s.at[slot, half].transpose((1, 0)))
        wait(2)
        if f.R:
            plgpu.wgmma(accumulator, qr_s.at[zero], r_s.at[slot].transpose((1, 0)))
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC((f.rows, f.block), jnp.float32)) * (f.scale * LOG2E)


def _publish(f, where, i, x, top, l_s, p_s, top_s, ready):
    """Put P and the running maximum of tile i into shared memory; returns the maximum and the row sums of P."""
    start = jnp.where(i < where.steps, (where.first + i) * f.block, where.n + f.block)
    unread = start + f.block > where.n
    if f.window is not None:
        unread = jnp.logical_or(unread, start < where.lowest)

    def blank_both():
        for half in (0, 1):
            blank(f, where, start, l_s.at[half])

    pl.when(unread)(blank_both)
    x = jnp.where(visible(f, where, start, keys_first=False), x, -jnp.inf)
    raised = jnp.maximum(top, x.max(axis=1))
    p = jnp.exp2(x - spread(raised, x.shape, 0))
    top_s[...] = raised
    p_s[...] = p.astype(p_s.dtype)
    plgpu.commit_smem()
    plgpu.barrier_arrive(ready)
    return raised, p.sum(axis=1)


def _finish(f, where, w, acc, top, mass, sinks, out, lse, l_s, row_s):
    """Fold in the sink, normalise and store this warpgroup's channels, and lse from warpgroup 0.

    16-bit results go through the ring's first slot: its columns of one half are read by one warpgroup only, once the
    scores of the last tile are there. Partial results are float32 and go from registers to memory.
    """
    if sinks is not None:
        sink = load_sinks(f, where, sinks, row_s, BY_ROW) * LOG2E
        raised = jnp.maximum(top, sink)
        shrink = jnp.exp2(top - raised)
        acc, top, mass = acc * spread(shrink, acc.shape, 0), raised, mass * shrink + jnp.exp2(sink - raised)
    share = jnp.where(mass > 0, 1 / mass, 0.0)
    result = acc * spread(share, acc.shape, 0)
    box = out.at[where.split, where.b, pl.ds(where.row_block * f.rows, f.rows), _half(f, w)]
    if out.dtype == l_s.dtype:
        staged = l_s.at[0, w]
        staged[...] = result.astype(out.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, box)
        plgpu.wait_smem_to_gmem(0)
    else:
        box[...] = result.astype(out.dtype)
    if w == 0:
        _store_lse(f, where, (top + jnp.log2(mass)) * math.log(2), lse, row_s)


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
