"""Block maxima of an indexer: query rows on the rows of the MMA, keys on its columns, so that the maximum over a block
stays within a few lanes. The keys, the programs and the ring are those of index_keys.py.
"""

import functools

import jax

from jforge.ops import check
from pallas_kernels.compat import BY_COLUMN, BY_ROW, TILE, jnp, lax, pl, plgpu, spread, swizzled
from pallas_kernels.index_keys import KEYS, IndexFacts, Share, deepest, launch_index, refuse, share_splits
from pallas_kernels.limits import need
from pallas_kernels.tiles import BOX, boxes_of, matmul

ROWS = 64  # of an MMA


def block_index_scores(q_index, k_index, lengths, *, block_size, k_scale=None):
    """score_{t,i,e} = max of q_{t,i} . k_s over the tokens s of block e with s < lengths[b]-T+t+1, -inf where there is
    none: float32 B T I ceil(S / block_size).

    Arguments and errors as in index_scores; block_size is 8, 16, 32 or a multiple of 64. Where the number of blocks is
    not a multiple of 8 (TMA), the kernel's result has up to 7 more and XLA copies it. Source: MiniMax-M3 (arXiv
    2606.13392).
    """
    check.block_index_scores(q_index, k_index, lengths, block_size=block_size, k_scale=k_scale)
    refuse(q_index, k_index, lengths, k_scale)
    whole = block_size in (8, 16, 32) or block_size % KEYS == 0
    need(whole, f"block_size is {block_size}; the kernel takes 8, 16, 32 and multiples of {KEYS}")
    size = min(int(block_size), 2**30)  # of what is longer than the cache, any will do
    facts = make_facts(q_index.shape, k_index.shape[1], k_index.dtype, size)
    return run_blocks(q_index, k_index, lengths, k_scale, facts)


def make_facts(shape, S, k_dtype, size) -> IndexFacts:
    """The plan of a call: a program holds up to 64 rows; ring and splits."""
    B, T, per_query, J = shape
    heads, units = boxes_of(T * per_query)
    row_blocks = -(-units * BOX // ROWS)
    stages, splits = deepest(J, ROWS, k_dtype), share_splits(B * row_blocks, S, BOX * size)
    return IndexFacts(T=T, J=J, S=S, heads=heads, units=units, share=-(-units // row_blocks), row_blocks=row_blocks,
                      stages=stages, splits=splits, size=size)  # fmt: skip


@functools.partial(jax.jit, static_argnames="facts")
def run_blocks(q, k, lengths, k_scale, facts):
    """The kernel, and the removal of blocks that are there for TMA only."""
    f, B = facts, q.shape[0]
    blocks = -(-f.S // f.size)
    operands = dict(q=q.reshape(B, f.units, f.heads, f.J), k=k, lengths=lengths, k_scale=k_scale)
    out_type = jax.ShapeDtypeStruct((B, f.units, f.heads, -(-blocks // BOX) * BOX), jnp.float32)
    out = launch_index(
        _kernel, f, operands, out_type, ROWS, "block_index_scores",
        out_s=plgpu.SMEM((2, ROWS, BOX), jnp.float32, transforms=swizzled(BOX, 4)),
        q_full=plgpu.Barrier(num_arrivals=f.share),
    )  # fmt: skip
    return out[..., :blocks].reshape(B, f.T, -1, blocks)


def _kernel(f, given, out, *, out_s, q_s, q_full, **keys):
    """Up to 64 rows (query, head) over one share of the keys of row b. y: [64, 8], the maxima of a group of 8 blocks,
    one a column."""
    share, q = Share(f, given, **keys), given["q"]
    units = [share.rows * f.share + j for j in range(f.share)]
    spare = f.units < f.share * f.row_blocks
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
            keys, factor = share.take(i, BY_COLUMN)
            x = matmul(q_s, keys.transpose((1, 0)), (ROWS, KEYS))
            if factor is not None:
                x = x * spread(factor, x.shape, 1)
            share.give_back(i)
            y = _fold(f, x, y, tile * KEYS, limit)
            complete = (lax.rem(tile + 1, jnp.int32(f.group)) == 0) | (i == share.steps - 1)
            pl.when(complete)(lambda: leave(y, lax.div(tile, jnp.int32(f.group))))
            return jnp.where(jnp.full(y.shape, complete), none, y)

        lax.fori_loop(0, share.steps, step, none)
        share.darken(clear, lambda group: store(0, group))

    def clear():
        out_s.at[0][...] = none

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

    share.run(boxes, q_s, q_full, consume)


def _limits(f, share, first):
    """The number of keys that each of the 64 rows sees, as a tile of scores; a scalar where it is the same for all."""
    if f.T == 1:
        return share.n
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=BY_ROW)
    eight, per_query = (jnp.full((ROWS,), count, jnp.int32) for count in (BOX, f.heads * f.units // f.T))
    number = (first + lax.div(row, eight)) * f.heads + lax.rem(row, eight)
    return spread(share.n - (f.T - 1) + lax.div(number, per_query), (ROWS, KEYS), 0)


def _fold(f, x, y, start, limit):
    """Maxima of the blocks of a tile into their columns of y."""
    key = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=TILE) + start
    x = jnp.where(key < limit, x, -jnp.inf)
    column = plgpu.broadcasted_iota(jnp.int32, y.shape, 1, layout=TILE)
    piece = min(f.size, KEYS)  # keys that are reduced together: a block, or the part of it that lies in a tile
    for at in range(0, KEYS, piece):
        highest = spread(x[:, at : at + piece].max(axis=1), y.shape, 0)
        block = lax.rem(lax.div(start + at, jnp.int32(f.size)), jnp.int32(BOX))
        y = jnp.where(column == block, jnp.maximum(y, highest), y)
    return y
