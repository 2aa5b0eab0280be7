"""Body of the kernels over listed keys that are the values too: the consumers of decode_mla.py behind a gather.

The last warpgroup fills the ring: its threads copy the listed rows, 16 bytes at a time, into tiles of 64 keys. Keys
without a rope part leave its tile to P alone.
"""

from pallas_kernels import decode_mla_few, decode_mla_many
from pallas_kernels.compat import copy_rows, lax, pl, plgpu
from pallas_kernels.decode_common import BOX
from pallas_kernels.decode_listed import Gathered, stream


def kernel(f, names, *refs, rows_s, **smem):
    """One program: query rows of one list against one split of it. f: decode_sparse_mla.Facts; names: of the inputs."""
    *inputs, out, lse = refs
    given = dict(zip(names, inputs, strict=True))
    where = Gathered(f, given["lists"], given.get("lengths"), given.get("pages"), rows_s)
    sinks = where.own(f, given.get("sinks"))
    warpgroup = lax.axis_index("warpgroup")
    if f.many:
        for w in (0, 1):
            pl.when(warpgroup == w)(lambda w=w: decode_mla_many.consume(f, where, w, sinks, out, lse, **smem))
        pl.when(warpgroup == 2)(lambda: _produce_many(f, where, given, **smem))
    else:
        pl.when(warpgroup == 0)(lambda: decode_mla_few.consume(f, where, sinks, out, lse, **smem))
        pl.when(warpgroup == 1)(lambda: _produce_few(f, where, given, **smem))


def _produce_few(f, where, given, *, ql_s, qr_s, l_s, r_s, q_full, full, free, **_):
    """Copy the query boxes once, then gather tiles into the ring."""
    for j in range(f.boxes):
        t, unit, _ = where.box(f, j)
        at, rows = (where.b, t, unit, pl.ds(0, BOX)), pl.ds(j * BOX, BOX)
        plgpu.copy_gmem_to_smem(given["q_latent"].at[at], ql_s.at[0, rows], q_full)
        if f.R:
            plgpu.copy_gmem_to_smem(given["q_rope"].at[(*at, pl.ds(0, f.rope))], qr_s.at[0, rows], q_full)

    def fetch(rows, slot):
        copy_rows(where.source(given["latent"]), rows, l_s.at[slot])
        if f.R:
            copy_rows(where.source(given["k_rope"]), rows, r_s.at[slot])

    def announce(slot):
        plgpu.barrier_arrive(full.at[slot])

    stream(f, where, fetch, announce, lambda slot: plgpu.barrier_wait(free.at[slot]), ahead=f.stages)


def _produce_many(f, where, given, *, ql_s, qr_s, l_s, r_s, q_full, full, free, **_):
    """Copy the query rows once, then gather tiles into the ring, one half of the channels beside the other.

    A tile is freed only after the next one was announced, since the tiles of a pair belong to one warpgroup each.
    """
    plgpu.set_max_registers(40, action="decrease")
    rows = pl.ds(where.row_block * f.rows, f.rows)
    plgpu.copy_gmem_to_smem(given["q_latent"].at[where.b, rows], ql_s.at[0], q_full)
    if f.R:
        plgpu.copy_gmem_to_smem(given["q_rope"].at[where.b, rows, pl.ds(0, f.rope)], qr_s.at[0], q_full)

    def fetch(rows, slot):
        for half in (0, 1):
            channels = pl.ds(half * (f.C // 2), f.C // 2)
            copy_rows(where.source(given["latent"], channels), rows, l_s.at[slot, half])
        if f.R:
            copy_rows(where.source(given["k_rope"]), rows, r_s.at[slot])

    def announce(slot):
        for part in range(3):
            plgpu.barrier_arrive(full.at[slot * 3 + part])

    def reclaim(slot):
        for half in (0, 1):
            plgpu.barrier_wait(free.at[slot * 2 + half])

    stream(f, where, fetch, announce, reclaim, ahead=f.stages - 1)
