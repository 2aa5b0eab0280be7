"""Split decode attention over listed keys which the heads of a list share, and which are the values too.

It serves `decode_sparse_mla`, and `decode_block_sparse` with v=None, whose keys have no rope part. The kernels are
those of decode_mla.py, for up to 32 query rows a program and for 64, behind another producer: a warpgroup whose threads
gather the listed rows, each of them once, straight into the swizzled tiles of the ring. A row that no query sees is not
read, and its place becomes 0. The work follows from the length of the lists, not from the length of the cache.
"""

import functools
from dataclasses import replace

import jax

from jforge.ops import check
from pallas_kernels import decode_mla_few, decode_mla_many, limits, ring
from pallas_kernels.compat import jnp, lax, pl, plgpu
from pallas_kernels.decode_mla import ROPE, LatentFacts, launch_latent, refuse_scale
from pallas_kernels.decode_mla import make_facts as latent_facts
from pallas_kernels.lists import Gathered, refuse
from pallas_kernels.merge_states import merged
from pallas_kernels.tiles import Lists


def decode_sparse_mla(q_latent, q_rope, latent, k_rope, indices, *, scale, sinks=None, latent_scale=None,
                      chunk=None, out_dtype=None):  # fmt: skip
    """out_t = sum_s softmax_s(scale * (q_latent_t . latent_s + q_rope_t . k_rope_s)) latent_s over s in indices_t.

    q_latent: B T N C, q_rope: B T N R, latent: B S C, k_rope: B S R in float16 or bfloat16; indices: int32 B T L, the
    tokens of all heads; sinks: N. Returns out B T N C in `out_dtype` (default q_latent's) and float32 lse B T N.
    Everything means what it means in jforge.ops.decode_sparse_mla; `chunk` counts entries and is as in
    decode_attention.py.

    Raises ValueError and TypeError from jforge.ops.check, and NotImplementedError for what has no kernel: float32 and
    float64, latent_scale, empty sizes, B*T above 65535, C that is not a multiple of 64 or above 512, R that is not a
    multiple of 8 or above 64. Attention over the tokens that an indexer picks is from DeepSeek-V3.2 (arXiv 2512.02556).
    """
    sizes = check.decode_sparse_mla(
        q_latent, q_rope, latent, k_rope, indices, scale=scale, sinks=sinks, latent_scale=latent_scale,
        chunk=chunk, out_dtype=out_dtype,
    )  # fmt: skip
    refuse_scale(latent_scale)
    B, T, N, S, C, R, L = (sizes[x] for x in "BTNSCRL")
    lists = Lists(T=T, count=1, K=1, L=L, size=1, S=S, page=None)
    refuse(lists, q_latent.dtype, out_dtype, B, N, ("q_latent", "latent", "indices"))
    refuse_rows("latent", C)
    limits.width("k_rope", "R", R, 8, ROPE)
    facts = make_facts(B, N, C, R, lists, q_latent.dtype, out_dtype, scale=scale, chunk=chunk)
    latent, k_rope = (rows.reshape(B, S, 1, -1) for rows in (latent, k_rope))
    return run(q_latent, q_rope, latent, k_rope, indices, None, None, sinks, facts)


def refuse_rows(keys, C) -> None:
    """NotImplementedError for rows that have no kernel. keys: what the caller calls the array that holds them."""
    whole = 0 < C <= 512 and C % 64 == 0
    limits.need(whole, f"{keys} has rows of {C}; where they are the values too, they must be multiples of 64 up to 512")


def make_facts(B, N, C, R, lists, dtype, out_dtype, *, scale, chunk=None) -> LatentFacts:
    """The plan of a dense cache of as many keys as a list has, by the op's own table."""
    sizes = dict(B=B * lists.T * lists.count, T=1, S=lists.keys, N=N // lists.count, C=C, R=R)
    # The kernel of many rows leaves a gap after the last rows of a list, and the merge expects none between lists.
    together = lists.count == 1
    plan = latent_facts(sizes, dtype, out_dtype, scale=scale, chunk=chunk, op="decode_sparse_mla", together=together)
    return replace(plan, splits=lists.even_splits(plan.splits, plan.block), lists=lists)


@functools.partial(jax.jit, static_argnames="facts")
def run(q_latent, q_rope, latent, k_rope, lists, lengths, page_table, sinks, facts):
    """The decode kernel, and the merge kernel when there are splits. Reshapes only relabel; nothing is moved.

    latent: B S K C, or a pool 1 pages*page K C; k_rope likewise, with q_rope, or both None. lists: int32 B T count L.
    """
    f, (B, T, N, C) = facts, q_latent.shape
    count = f.lists.count
    batch = B * T * count
    boxes = (batch, f.N) if f.many else (batch, 1, f.units, f.heads)
    operands = dict(
        q_latent=q_latent.reshape(*boxes, C), q_rope=None if q_rope is None else q_rope.reshape(*boxes, -1),
        latent=latent, k_rope=k_rope, lists=lists.reshape(batch, -1), lengths=lengths, pages=page_table,
        sinks=sinks if f.alone else None,
    )  # fmt: skip
    grid = B * T, f.splits, count * f.row_blocks
    scratch = dict(rows_s=plgpu.SMEM((f.stages, f.block), jnp.int32))
    out, lse = launch_latent(_kernel, f, operands, boxes, 1, grid, "decode_sparse_mla", **scratch)
    return merged(f, out, lse, (B, T, N), sinks, rows=B * T)


def _kernel(f, given, out, lse, *, rows_s, **smem):
    """One program: query rows of one list against one split of it. Keys without a rope part leave its tile to P."""
    where, warpgroup = Gathered(f, given, rows_s), lax.axis_index("warpgroup")
    if f.many:
        gather = functools.partial(_gather_many, f, where, given, **smem)
        decode_mla_many.three_warpgroups(f, where, warpgroup, out, lse, gather, smem)
    else:
        pl.when(warpgroup == 0)(lambda: decode_mla_few.consume(f, where, out, lse, **smem))
        pl.when(warpgroup == 1)(lambda: _gather_few(f, where, given, **smem))


def _gather_few(f, where, given, *, latents, ql_s, qr_s, r_s, q_full, **_):
    """Copy the query boxes once, then gather tiles into the ring."""
    decode_mla_few.load_queries(f, where, given, ql_s, qr_s, q_full)

    def copies(slot):
        return [(where.source(given["latent"]), latents.tiles.at[slot]), *_rope(where, given, r_s, slot)]

    ring.stream(f, where, copies, latents, ahead=f.stages)


def _gather_many(f, where, given, *, latents, ql_s, qr_s, r_s, q_full, **_):
    """Copy the query rows once, then gather tiles into the ring, one half of the channels beside the other.

    A tile is freed only after the next one was announced, since the tiles of a pair belong to one warpgroup each.
    """
    decode_mla_many.load_queries(f, where, given, ql_s, qr_s, q_full)

    def copies(slot):
        halves = [(decode_mla_many.half_of(f, half), latents.tiles.at[slot, half]) for half in (0, 1)]
        pairs = [(where.source(given["latent"], channels), tile) for channels, tile in halves]
        return [*pairs, *_rope(where, given, r_s, slot)]

    ring.stream(f, where, copies, latents, ahead=f.stages - 1)


def _rope(where, given, r_s, slot):
    return [(where.source(given["k_rope"]), r_s.at[slot])] if "k_rope" in given else []
