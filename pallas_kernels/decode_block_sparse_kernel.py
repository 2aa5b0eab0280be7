"""Body of the decode kernel over listed blocks or tokens, with K and V apart. See decode_block_sparse.py.

Warpgroup 1 fills a ring of K and V tiles, by TMA from blocks or by a gather of tokens; warpgroup 0 computes, for every
tile of 64 positions of the list,

    S^T = K Q^T,   P^T = exp2(S^T - max),   O^T <- O^T exp2(old max - max) + V^T P^T.
"""

from pallas_kernels.compat import BY_COLUMN, TILE, copy_rows, jnp, lax, pl, plgpu, spread
from pallas_kernels.decode_attention_kernel import finish, logits
from pallas_kernels.decode_common import BOX, keep, matmul
from pallas_kernels.decode_listed import Gathered, Listed, stream
from pallas_kernels.merge_states import LOWEST


def kernel(f, names, *refs, rows_s=None, **smem):
    """One program: query boxes of one list against one split of it. f: decode_block_sparse.Facts; names: of inputs."""
    *inputs, out, lse = refs
    given = dict(zip(names, inputs, strict=True))
    facts = given["lists"], given.get("lengths"), given.get("pages")
    where = Gathered(f, *facts, rows_s) if f.tokens else Listed(f, *facts)
    sinks = where.own(f, given.get("sinks"))
    produce = _produce_tokens if f.tokens else _produce_blocks
    warpgroup = lax.axis_index("warpgroup")
    pl.when(warpgroup == 0)(lambda: _consume(f, where, sinks, out, lse, **smem))
    pl.when(warpgroup == 1)(lambda: produce(f, where, given, **smem))


def _queries(f, where, q, q_s, q_full):
    """Copy the list's query boxes."""
    for j in range(f.boxes):
        t, unit, _ = where.box(f, j)
        plgpu.copy_gmem_to_smem(q.at[where.b, t, unit, pl.ds(0, BOX)], q_s.at[pl.ds(j * BOX, BOX)], q_full)


def _produce_tokens(f, where, given, *, q_s, k_s, v_s, q_full, k_full, v_full, k_free, v_free, **_):
    """Gather K and V tiles into the ring."""
    _queries(f, where, given["q"], q_s, q_full)

    def fetch(rows, slot):
        copy_rows(where.source(given["k"]), rows, k_s.at[slot])
        copy_rows(where.source(given["v"]), rows, v_s.at[slot])

    def announce(slot):
        plgpu.barrier_arrive(k_full.at[slot])
        plgpu.barrier_arrive(v_full.at[slot])

    def reclaim(slot):
        plgpu.barrier_wait(k_free.at[slot])
        plgpu.barrier_wait(v_free.at[slot])

    stream(f, where, fetch, announce, reclaim, ahead=f.stages)


def _produce_blocks(f, where, given, *, q_s, k_s, v_s, q_full, k_full, v_full, k_free, v_free, **_):
    """Copy the pieces of K and V tiles into the ring."""
    _queries(f, where, given["q"], q_s, q_full)

    @pl.loop(0, where.steps)
    def _(i):
        slot = lax.rem(i, jnp.int32(f.stages))
        # Before the waits, so that the list loads while the slot is still in use.
        pieces = _pieces(f, where, where.first + i)
        for ring, cache, full, free in ((k_s, given["k"], k_full, k_free), (v_s, given["v"], v_full, v_free)):
            pl.when(i >= f.stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
            for j, (row, keys, _) in enumerate(pieces):
                box = cache.at[row, keys, where.kv, pl.ds(0, ring.shape[-1])]
                plgpu.copy_gmem_to_smem(box, ring.at[slot, pl.ds(j * f.piece, f.piece)], full.at[slot])

    # A barrier must not be left with a completed phase that nobody waited for.
    @pl.loop(jnp.maximum(where.steps - f.stages, 0), where.steps)
    def _(i):
        slot = lax.rem(i, jnp.int32(f.stages))
        plgpu.barrier_wait(k_free.at[slot])
        plgpu.barrier_wait(v_free.at[slot])


def _pieces(f, where, tile):
    """(row or page, its slots, how many of the first of them are seen) of every piece of a tile.

    An entry that is ignored has the first block in its place, and one that lies past what the query sees, in a paged
    cache, the first page: both are there whatever the list and the page table say.
    """
    x, pieces = f.lists, []
    for j in range(f.block // f.piece):
        number = tile * (f.block // f.piece) + j
        entry, part = lax.div(number, jnp.int32(x.size // f.piece)), lax.rem(number, jnp.int32(x.size // f.piece))
        index = where.list[jnp.minimum(entry, x.L - 1)]
        listed = (entry < x.L) & (index >= 0) & (index < -(-x.S // x.size))
        at = jnp.where(listed, index, 0) * (x.size // f.piece) + part  # in pieces
        seen = jnp.where(listed, jnp.clip(where.limit - at * f.piece, 0, f.piece), 0)
        row = where.row
        if x.page is not None:
            count = x.page // f.piece
            page = where.pages[jnp.minimum(lax.div(at, jnp.int32(count)), x.S // x.page - 1)]
            row, at = jnp.where(seen > 0, page, 0), lax.rem(at, jnp.int32(count))
        pieces.append((row, pl.ds(at * f.piece, f.piece), seen))
    return pieces


def _within(f, counts, shape):
    """Which keys, along axis 0, are among the first of their piece that are seen."""
    key = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=TILE)
    end = jnp.full(shape, counts[0])
    for j, count in enumerate(counts[1:], 1):
        end = jnp.where(key < j * f.piece, end, jnp.full(shape, count + j * f.piece))
    return key < end


def _consume(f, where, sinks, out, lse, *, q_s, k_s, v_s, p_s, q_full, k_full, v_full, k_free, v_free, **smem):
    """Online softmax over the tiles. acc: O^T [width, rows]; top: running maximum [rows], base 2 and finite from the
    start so that no difference is inf - inf; mass: [block, rows], summed over keys only once, after the loop."""
    tile, keys_by_rows = (f.width, f.rows), (f.block, f.rows)
    plgpu.barrier_wait(q_full)

    def step(i, carry):
        acc, top, mass = carry
        slot, number = lax.rem(i, jnp.int32(f.stages)), where.first + i
        # Before the wait, so that the list loads while the tile is under way.
        counts = None if f.tokens else [seen for *_, seen in _pieces(f, where, number)]
        plgpu.barrier_wait(k_full.at[slot])
        x = matmul(k_s.at[slot], q_s.transpose((1, 0)), keys_by_rows)
        plgpu.barrier_arrive(k_free.at[slot])
        seen = where.visible(f, number * f.block, True) if f.tokens else _within(f, counts, keys_by_rows)
        x = jnp.where(seen, logits(f, x), -jnp.inf)
        raised = jnp.maximum(top, x.max(axis=0))
        shrink = jnp.exp2(top - raised)
        p = jnp.exp2(x - spread(raised, keys_by_rows, 1))
        mass = mass * spread(shrink, keys_by_rows, 1) + p
        p_s.transpose((1, 0))[...] = p.astype(p_s.dtype)
        plgpu.barrier_wait(v_full.at[slot])
        if not f.tokens:
            values = v_s.at[slot]
            pl.when(sum(counts) < f.block)(lambda: keep(f, values, lambda shape: _within(f, counts, shape)))
        plgpu.commit_smem()
        more = matmul(v_s.at[slot].transpose((1, 0)), p_s.transpose((1, 0)), tile)
        plgpu.barrier_arrive(v_free.at[slot])
        return acc * spread(shrink, tile, 1) + more, raised, mass

    acc = plgpu.layout_cast(jnp.zeros(tile, jnp.float32), TILE)
    top = plgpu.layout_cast(jnp.full((f.rows,), LOWEST, jnp.float32), BY_COLUMN)
    mass = plgpu.layout_cast(jnp.zeros(keys_by_rows, jnp.float32), TILE)
    acc, top, mass = lax.fori_loop(0, where.steps, step, (acc, top, mass))
    finish(f, where, acc, top, mass.sum(axis=0), sinks, out, lse, **smem)
