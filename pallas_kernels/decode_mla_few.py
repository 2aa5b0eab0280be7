"""Body of the latent decode kernel for up to 32 query rows: keys on the rows of the MMA. See decode_mla.py.

Warpgroup 1 fills a ring of latent and rope tiles by TMA; warpgroup 0 computes, for every tile of 64 keys,

    S^T = K Q^T,   P^T = exp2(S^T - max),   O^T <- O^T exp2(old max - max) + L^T P^T,

where K is a tile's latents L beside its rope keys. L lies in shared memory once and is read as keys and as values.
"""

import math

from pallas_kernels.compat import BY_COLUMN, TILE, TILE_T, accumulate, jnp, lax, pl, plgpu, spread
from pallas_kernels.decode_common import BOX, Place, blank, hidden_zero, load_sinks, sources, store_rows, visible
from pallas_kernels.merge_states import LOG2E, LOWEST

COLUMNS = 128  # of the result that are staged at a time


def kernel(f, has_pages, has_sinks, q_latent, q_rope, latent, k_rope, lengths, *refs, **smem):
    """One program: query boxes of row b against one split of its keys. f: decode_mla.Facts.

    A split without keys writes lse = -inf only: the merge does not look at its out. A single split writes the final
    result in any case.
    """
    *options, out, lse = refs
    pages, sinks = options[0] if has_pages else None, options[-1] if has_sinks else None
    where = Place(f, lengths)
    computes = lax.axis_index("warpgroup") == 0

    def work():
        pl.when(computes)(lambda: consume(f, where, sinks, out, lse, **smem))
        pl.when(jnp.logical_not(computes))(lambda: _produce(f, where, pages, q_latent, q_rope, latent, k_rope, **smem))

    if f.splits == 1:
        work()
    else:
        pl.when(where.steps > 0)(work)
        pl.when(jnp.logical_and(computes, where.steps == 0))(
            lambda: store_rows(f, where, lambda row: jnp.float32(-jnp.inf), lse)
        )


def _produce(f, where, pages, q_latent, q_rope, latent, k_rope, *, ql_s, qr_s, l_s, r_s, q_full, full, free, **_):
    """Copy the query boxes once, then latent and rope tiles into the ring."""
    for j in range(f.boxes):
        t, unit, _ = where.box(f, j)
        at, rows = (where.b, t, unit, pl.ds(0, BOX)), pl.ds(j * BOX, BOX)
        plgpu.copy_gmem_to_smem(q_latent.at[at], ql_s.at[0, rows], q_full)
        plgpu.copy_gmem_to_smem(q_rope.at[(*at, pl.ds(0, f.rope))], qr_s.at[0, rows], q_full)

    @pl.loop(0, where.steps)
    def _(i):
        slot = lax.rem(i, jnp.int32(f.stages))
        # Before the wait, so that page numbers load while the slot is still in use.
        pieces = sources(f, where, pages, where.first + i)
        pl.when(i >= f.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
        for at, part in pieces:
            plgpu.copy_gmem_to_smem(latent.at[at], l_s.at[slot, part], full.at[slot])
            plgpu.copy_gmem_to_smem(k_rope.at[(*at, pl.ds(0, f.rope))], r_s.at[slot, part], full.at[slot])

    # A barrier must not be left with a completed phase that nobody waited for.
    @pl.loop(jnp.maximum(where.steps - f.stages, 0), where.steps)
    def _(i):
        plgpu.barrier_wait(free.at[lax.rem(i, jnp.int32(f.stages))])


def consume(f, where, sinks, out, lse, *, ql_s, qr_s, l_s, r_s, p_s, q_full, full, free, **smem):
    """Online softmax over the tiles. acc: O^T [C, rows]; top: running maximum [rows], base 2 and finite from the start
    so that no difference is inf - inf; mass: [block, rows], summed over keys only once, after the loop."""
    result, keys_by_rows = (f.C, f.rows), (f.block, f.rows)
    plgpu.barrier_wait(q_full)

    def step(i, carry):
        acc, top, mass = carry
        slot, zero = lax.rem(i, jnp.int32(f.stages)), hidden_zero(i)
        start = (where.first + i) * f.block
        plgpu.barrier_wait(full.at[slot])

        def scores(accumulator):
            plgpu.wgmma(accumulator, l_s.at[slot], ql_s.at[zero].transpose((1, 0)))
            if f.R:
                plgpu.wgmma(accumulator, r_s.at[slot], qr_s.at[zero].transpose((1, 0)))
            return accumulator[...]

        x = pl.run_scoped(scores, plgpu.ACC(keys_by_rows, jnp.float32)) * (f.scale * LOG2E)
        x = jnp.where(visible(f, where, start), x, -jnp.inf)
        raised = jnp.maximum(top, x.max(axis=0))
        shrink = jnp.exp2(top - raised)
        p = jnp.exp2(x - spread(raised, keys_by_rows, 1))
        mass = mass * spread(shrink, keys_by_rows, 1) + p
        p_s.transpose((1, 0))[...] = p.astype(p_s.dtype)
        unread = jnp.logical_or(start + f.block > where.n, start < where.lowest)
        pl.when(unread)(lambda: blank(f, where, start, l_s.at[slot]))
        plgpu.commit_smem()
        (acc,) = accumulate(
            acc * spread(shrink, result, 1),
            lambda total: plgpu.wgmma(total, l_s.at[slot].transpose((1, 0)), p_s.transpose((1, 0))),
        )
        plgpu.barrier_arrive(free.at[slot])
        return acc, raised, mass

    acc = plgpu.layout_cast(jnp.zeros(result, jnp.float32), TILE)
    top = plgpu.layout_cast(jnp.full((f.rows,), LOWEST, jnp.float32), BY_COLUMN)
    mass = plgpu.layout_cast(jnp.zeros(keys_by_rows, jnp.float32), TILE)
    acc, top, mass = lax.fori_loop(0, where.steps, step, (acc, top, mass))
    _finish(f, where, acc, top, mass.sum(axis=0), sinks, out, lse, **smem)


def _finish(f, where, acc, top, mass, sinks, out, lse, *, out_s, row_s):
    """Fold in the sink, normalise and store out and lse: the split's, or the final ones when it is the only split."""
    if sinks is not None:
        sink = load_sinks(f, where, sinks, row_s) * LOG2E
        raised = jnp.maximum(top, sink)
        shrink = jnp.exp2(top - raised)
        acc, top, mass = acc * spread(shrink, acc.shape, 1), raised, mass * shrink + jnp.exp2(sink - raised)
    share = jnp.where(mass > 0, 1 / mass, 0.0)
    result = acc * spread(share, acc.shape, 1)
    row_s[...] = (top + jnp.log2(mass)) * math.log(2)
    columns = out_s.shape[-1]
    for column in range(0, f.C, columns):
        part = plgpu.layout_cast(result[column : column + columns], TILE_T)
        out_s.transpose((1, 0))[...] = part.astype(out_s.dtype)
        plgpu.commit_smem()
        for j in range(f.boxes):
            t, unit, real = where.box(f, j)

            def store(j=j, t=t, unit=unit, column=column):
                box = out.at[where.split, where.b, t, unit, pl.ds(0, BOX), pl.ds(column, columns)]
                plgpu.copy_smem_to_gmem(out_s.at[pl.ds(j * BOX, BOX)], box)

            store() if real is True else pl.when(real)(store)
        plgpu.wait_smem_to_gmem(0)
    store_rows(f, where, lambda row: row_s[row], lse)
