"""Body of the decode kernel: a producer warpgroup (TMA ring) and a compute warpgroup. See decode_attention.py."""

import math

from pallas_kernels.compat import BY_COLUMN, TILE, TILE_T, jnp, lax, pl, plgpu, spread
from pallas_kernels.decode_common import BOX, Place, blank, load_sinks, matmul, sources, store_rows, visible
from pallas_kernels.merge_states import LOG2E, LOWEST


def kernel(f, has_pages, has_sinks, q, k, v, lengths, *refs, **smem):
    """One program: query boxes of KV head `kv` of row b against one split of its keys. f: decode_attention.Facts.

    A split without keys writes lse = -inf only: the merge does not look at its out. A single split writes the final
    result in any case.
    """
    *options, out, lse = refs
    pages, sinks = options[0] if has_pages else None, options[-1] if has_sinks else None
    where = Place(f, lengths)
    computes = lax.axis_index("warpgroup") == 0

    def work():
        pl.when(computes)(lambda: _consume(f, where, sinks, out, lse, **smem))
        pl.when(jnp.logical_not(computes))(lambda: _produce(f, where, pages, q, k, v, **smem))

    if f.splits == 1:
        work()
    else:
        pl.when(where.steps > 0)(work)
        pl.when(jnp.logical_and(computes, where.steps == 0))(
            lambda: store_rows(f, where, lambda row: jnp.float32(-jnp.inf), lse)
        )


def _produce(f, where, pages, q, k, v, *, q_s, k_s, v_s, q_full, k_full, v_full, k_free, v_free, **_):
    """Copy the query boxes once, then K and V tiles into the ring."""
    for j in range(f.boxes):
        t, unit, _ = where.box(f, j)
        plgpu.copy_gmem_to_smem(q.at[where.b, t, unit, pl.ds(0, BOX)], q_s.at[pl.ds(j * BOX, BOX)], q_full)

    @pl.loop(0, where.steps)
    def _(i):
        slot = lax.rem(i, jnp.int32(f.stages))
        # Before the waits, so that page numbers load while the slot is still in use.
        pieces = sources(f, where, pages, where.first + i)
        pl.when(i >= f.stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))
        for (row, keys), part in pieces:
            plgpu.copy_gmem_to_smem(k.at[row, keys, where.kv], k_s.at[slot, part], k_full.at[slot])
        pl.when(i >= f.stages)(lambda: plgpu.barrier_wait(v_free.at[slot]))
        for (row, keys), part in pieces:
            box = v.at[row, keys, where.kv, pl.ds(0, f.width)]
            plgpu.copy_gmem_to_smem(box, v_s.at[slot, part], v_full.at[slot])

    # A barrier must not be left with a completed phase that nobody waited for.
    @pl.loop(jnp.maximum(where.steps - f.stages, 0), where.steps)
    def _(i):
        slot = lax.rem(i, jnp.int32(f.stages))
        plgpu.barrier_wait(k_free.at[slot])
        plgpu.barrier_wait(v_free.at[slot])


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
        x = matmul(k_s.at[slot], q_s.transpose((1, 0)), keys_by_rows)
        plgpu.barrier_arrive(k_free.at[slot])
        x = jnp.where(visible(f, where, start), logits(f, x), -jnp.inf)
        raised = jnp.maximum(top, x.max(axis=0))
        shrink = jnp.exp2(top - raised)
        p = jnp.exp2(x - spread(raised, keys_by_rows, 1))
        mass = mass * spread(shrink, keys_by_rows, 1) + p
        p_s.transpose((1, 0))[...] = p.astype(p_s.dtype)
        plgpu.barrier_wait(v_full.at[slot])
        unread = jnp.logical_or(start + f.block > where.n, start < where.lowest)
        pl.when(unread)(lambda: blank(f, where, start, v_s.at[slot]))
        plgpu.commit_smem()
        more = matmul(v_s.at[slot].transpose((1, 0)), p_s.transpose((1, 0)), tile)
        plgpu.barrier_arrive(v_free.at[slot])
        return acc * spread(shrink, tile, 1) + more, raised, mass

    acc = plgpu.layout_cast(jnp.zeros(tile, jnp.float32), TILE)
    top = plgpu.layout_cast(jnp.full((f.rows,), LOWEST, jnp.float32), BY_COLUMN)
    mass = plgpu.layout_cast(jnp.zeros(keys_by_rows, jnp.float32), TILE)
    acc, top, mass = lax.fori_loop(0, where.steps, step, (acc, top, mass))
    finish(f, where, acc, top, mass.sum(axis=0), sinks, out, lse, **smem)


def logits(f, x):
    """Scaled and capped logits in base-2 units. tanh by exp2, as the hardware's has only 11 bits; where 1 - 2 / (e + 1)
    would cancel, by its series, which is exact to float32 there.
    """
    if f.softcap is None:
        return x * (f.scale * LOG2E)
    y = x * (f.scale / f.softcap)
    square = y * y
    small = y * (1 + square * (square * (2 / 15) - 1 / 3))
    e = jnp.exp2(y * (2 * LOG2E))
    return (f.softcap * LOG2E) * jnp.where(square < 0.0625**2, small, 1 - 2 / (e + 1))


def finish(f, where, acc, top, mass, sinks, out, lse, *, out_s, row_s):
    """Fold in the sink, normalise and store out and lse: the split's, or the final ones when it is the only split."""
    if sinks is not None:
        sink = load_sinks(f, where, sinks, row_s) * LOG2E
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
    store_rows(f, where, lambda row: row_s[row], lse)
    plgpu.wait_smem_to_gmem(0)
