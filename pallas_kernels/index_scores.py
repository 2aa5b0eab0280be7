"""Token scores of an indexer: keys on the rows of the MMA, heads on its columns; relu, weights and the sum over the
heads in registers. The keys, the programs and the ring are those of index_keys.py.
"""

import functools

import jax

from jforge.ops import check
from pallas_kernels.compat import BY_COLUMN, BY_ROW, jnp, lax, pl, plgpu, spread
from pallas_kernels.index_keys import KEYS, IndexFacts, Share, deepest, launch_index, refuse, share_splits
from pallas_kernels.limits import need
from pallas_kernels.tiles import BOX, boxes_of, matmul

Q_BYTES = 48 * 1024  # of the queries that one program holds, unless a single one takes more
MOST_Q_BYTES = 128 * 1024
WIDEST = 128  # columns of an accumulator


def index_scores(q_index, k_index, weights, lengths, *, k_scale=None):
    """score_{t,s} = sum_i w_{t,i} relu(q_{t,i} . k_s) for s < lengths[b]-T+t+1, -inf for the others: float32 B T S.

    q_index: B T I J and k_index: B S J in float16 or bfloat16; weights: float32 B T I, of any sign; lengths: int32 B.
    k_index may be int8 or fp8 with k_scale, float32 B S: value = stored * scale. Slots that no query sees may hold NaN.

    Raises ValueError and TypeError from jforge.ops.check, and NotImplementedError for what has no kernel: float32 and
    float64, S that is not a multiple of 8 (TMA), J above 256 or not a multiple of 16, of 32 with k_scale, more heads
    than shared memory holds. Source: the lightning indexer of DeepSeek-V3.2 (arXiv 2512.02556).
    """
    check.index_scores(q_index, k_index, weights, lengths, k_scale=k_scale)
    need(weights.dtype != jnp.float64, "weights has dtype float64; the kernel accumulates in float32")
    refuse(q_index, k_index, lengths, k_scale)
    facts = make_facts(q_index.shape, k_index.shape[1], k_index.dtype)
    I, J = q_index.shape[2:]  # noqa: E741
    fits = facts.units * BOX * J * 2 <= MOST_Q_BYTES
    need(fits, f"q_index has I={I}, J={J}; the heads of one query must fit {MOST_Q_BYTES} bytes")
    return run(q_index, k_index, weights, lengths, k_scale, facts)


def make_facts(shape, S, k_dtype) -> IndexFacts:
    """The plan of a call: queries of a program, ring and splits."""
    B, T, per_query, J = shape
    heads, units = boxes_of(per_query)
    most = max(1, Q_BYTES // (units * BOX * J * 2))
    queries = next(x for x in range(min(T, most), 0, -1) if T % x == 0)
    stages, splits = deepest(J, queries * units * BOX, k_dtype), share_splits(B * (T // queries), S)
    return IndexFacts(T=T, J=J, S=S, heads=heads, units=units, share=queries, row_blocks=T // queries, stages=stages,
                      splits=splits)  # fmt: skip


@functools.partial(jax.jit, static_argnames="facts")
def run(q, k, weights, lengths, k_scale, facts):
    """The kernel. Reshapes only relabel; nothing is moved."""
    f, B = facts, q.shape[0]
    q = q.reshape(B, f.T, f.units, f.heads, f.J)
    operands = dict(q=q, k=k, weights=weights, lengths=lengths, k_scale=k_scale)
    out_type = jax.ShapeDtypeStruct((B, f.T, f.S), jnp.float32)
    return launch_index(
        _kernel, f, operands, out_type, f.share * f.padded, "index_scores",
        w_s=plgpu.SMEM((f.share, f.padded), jnp.float32),
        out_s=plgpu.SMEM((2, f.share, KEYS), jnp.float32),
        q_full=plgpu.Barrier(num_arrivals=f.share * f.units),
    )  # fmt: skip


def _kernel(f, given, out, *, w_s, out_s, q_s, q_full, **keys):
    """A few queries over one share of the keys of row b."""
    share, q = Share(f, given, **keys), given["q"]
    tokens = [share.rows * f.share + j for j in range(f.share)]
    boxes = [
        (q.at[share.b, t, u, pl.ds(0, BOX)], pl.ds((j * f.units + u) * BOX, BOX))
        for j, t in enumerate(tokens)
        for u in range(f.units)
    ]

    def consume():
        for j, t in enumerate(tokens):
            w_s.at[j][...] = _weights(f, given["weights"], share.b, t)
        plgpu.barrier_wait(q_full)

        @pl.loop(0, share.steps)
        def _(i):
            tile, turn = share.first + i, lax.rem(i, jnp.int32(2))
            keys, factor = share.take(i, BY_ROW)
            sums = [_token_scores(f, keys, factor, q_s, w_s, j) for j in range(f.share)]
            share.give_back(i)
            key = plgpu.broadcasted_iota(jnp.int32, (KEYS,), 0, layout=BY_ROW) + tile * KEYS
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            for j, (t, total) in enumerate(zip(tokens, sums, strict=True)):
                out_s.at[turn, j][...] = jnp.where(key < share.n - (f.T - 1) + t, total, -jnp.inf)
            plgpu.commit_smem()
            store(turn, tile)

        share.darken(clear, lambda tile: store(0, tile))

    def clear():
        for j in range(f.share):
            out_s.at[0, j][...] = plgpu.layout_cast(jnp.full((KEYS,), -jnp.inf, jnp.float32), BY_ROW)

    def store(turn, tile):
        # The last tile leaves at its own length: what is not swizzled is copied as plain bytes, past the end of a row.
        whole, rest = divmod(f.S, KEYS)
        if whole:
            send = pl.when(tile < whole) if rest else lambda do: do()
            send(lambda: _send(turn, tile, KEYS))
        if rest:
            pl.when(tile == whole)(lambda: _send(turn, tile, rest))

    def _send(turn, tile, count):
        for j, t in enumerate(tokens):
            keys = out.at[share.b, t, pl.ds(tile * KEYS, count)]
            plgpu.copy_smem_to_gmem(out_s.at[turn, j, pl.ds(0, count)], keys, commit_group=False)
        plgpu.commit_smem_to_gmem_group()

    share.run(boxes, q_s, q_full, consume)


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
    total = plgpu.layout_cast(jnp.zeros((KEYS,), jnp.float32), BY_ROW)
    for column in range(0, f.padded, WIDEST):
        width = min(WIDEST, f.padded - column)
        shape, rows = (KEYS, width), pl.ds(j * f.padded + column, width)
        x = matmul(keys, q_s.at[rows].transpose((1, 0)), shape)
        if factor is not None:
            x = x * spread(factor, shape, 0)
        w = plgpu.load(w_s.at[j, pl.ds(column, width)], layout=BY_COLUMN)
        total = total + (jnp.maximum(x, 0) * spread(w, shape, 1)).sum(axis=1)
    return total
