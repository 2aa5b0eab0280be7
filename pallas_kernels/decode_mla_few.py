"""Body of the latent decode kernel for up to 32 query rows: keys on the rows of the MMA. See decode_mla.py.

Warpgroup 1 fills a ring of latent and rope tiles by TMA; warpgroup 0 does the online softmax over them
(softmax.attend), where K is a tile's latents beside its rope keys. The latents lie in shared memory once and are read
as keys and as values.
"""

import math

from pallas_kernels import ring, softmax
from pallas_kernels.compat import TILE_T, accumulate, jnp, pl, plgpu, spread, swizzled
from pallas_kernels.tiles import BOX, hidden_zero, load_boxes, store_rows, two_warpgroups

COLUMNS = 128  # of the result that are staged at a time


def scratch(f, dtype, copies) -> dict:
    """Beside the queries and the rope tiles, which come in the ring with the latents. copies: of one tile."""
    return dict(
        latents=ring.lane(f, (f.block, f.C), dtype, copies=copies),
        p_s=plgpu.SMEM((f.rows, f.block), dtype, transforms=swizzled(64, 2)),
        out_s=plgpu.SMEM((f.rows, math.gcd(f.C, COLUMNS)), f.part_dtype),
        row_s=plgpu.SMEM((f.rows,), jnp.float32),
        q_full=plgpu.Barrier(num_arrivals=(2 if f.R else 1) * f.boxes),
    )


def load_queries(f, where, given, ql_s, qr_s, q_full):
    load_boxes(where, q_full, (given["q_latent"], ql_s), *([(given["q_rope"], qr_s)] if f.R else []))


def _produce(f, where, given, *, latents, ql_s, qr_s, r_s, q_full, **_):
    """Copy the query boxes once, then latent and rope tiles into the ring."""
    load_queries(f, where, given, ql_s, qr_s, q_full)

    def fetch(i, slot, reuse):
        # Before the wait, so that page numbers load while the slot is still in use.
        pieces = where.pieces(i)
        reuse(lambda: latents.free.at[slot])
        for j, at in enumerate(pieces):
            part = pl.ds(j * f.piece, f.piece)
            plgpu.copy_gmem_to_smem(given["latent"].at[at], latents.tiles.at[slot, part], latents.full.at[slot])
            plgpu.copy_gmem_to_smem(
                given["k_rope"].at[(*at, pl.ds(0, f.rope))], r_s.at[slot, part], latents.full.at[slot]
            )

    ring.fill(f, where.steps, fetch, latents)


def consume(f, where, out, lse, *, latents, ql_s, qr_s, r_s, p_s, q_full, **smem):
    """O^T [C, rows] of the tiles of a program, and its rows of out and lse."""
    result = f.C, f.rows
    plgpu.barrier_wait(q_full)

    def scores(at, seen):
        slot, zero = at
        plgpu.barrier_wait(latents.full.at[slot])

        def run(accumulator):
            plgpu.wgmma(accumulator, latents.tiles.at[slot], ql_s.at[zero].transpose((1, 0)))
            if f.R:
                plgpu.wgmma(accumulator, r_s.at[slot], qr_s.at[zero].transpose((1, 0)))
            return accumulator[...]

        x = pl.run_scoped(run, plgpu.ACC((f.block, f.rows), jnp.float32))
        return jnp.where(seen(), f.signed(x), -jnp.inf)

    def add(at, acc, shrink):
        def products(total):
            plgpu.wgmma(total, latents.tiles.at[at[0]].transpose((1, 0)), p_s.transpose((1, 0)))

        (acc,) = accumulate(acc * spread(shrink, result, 1), products)
        plgpu.barrier_arrive(latents.free.at[at[0]])
        return acc

    def slots(i):
        return ring.slot_of(f, i), hidden_zero(i)

    carry = softmax.attend(where, p_s, result, slots, scores, lambda at: latents.tiles.at[at[0]], add)
    _finish(f, where, *carry, out, lse, **smem)


def _finish(f, where, acc, top, mass, out, lse, *, out_s, row_s):
    """Store out and lse: the split's, or the final ones when it is the only split."""
    acc, top, mass = softmax.finish(where, acc, top, mass, 1, row_s)
    row_s[...] = softmax.natural_lse(top, mass)
    columns = out_s.shape[-1]
    for column in range(0, f.C, columns):
        part = plgpu.layout_cast(acc[column : column + columns], TILE_T)
        out_s.transpose((1, 0))[...] = part.astype(out_s.dtype)
        plgpu.commit_smem()

        def store(j, t, unit, column=column):
            box = out.at[where.split, where.b, t, unit, pl.ds(0, BOX), pl.ds(column, columns)]
            plgpu.copy_smem_to_gmem(out_s.at[pl.ds(j * BOX, BOX)], box)

        where.each_box(store)
        plgpu.wait_smem_to_gmem(0)
    store_rows(where, lambda row: row_s[row], lse)


kernel = two_warpgroups(consume, _produce)
