"""Scores of an indexer over all cached index keys: which tokens or blocks a sparse mechanism should read.

Both ops read the keys once, in tiles of 64 that warpgroup 1 brings in by TMA; warpgroup 0 multiplies and reduces, and
nothing but the scores is written. The kernels are in index_scores_kernel.py:

* index_scores: keys on the rows of the MMA, heads on its columns; relu, weights and the sum over heads in registers.
* block_index_scores: query rows on the rows of the MMA, keys on its columns, so that the maximum over a block stays
  within a few lanes.

Query rows come in boxes of 8: they are cut into `units` of g <= 8 rows (g divides their number), and TMA fills the rows
past g with zeros. Tiles that no query sees are not read. Each row's tiles are shared evenly among its programs on the
device; a score does not depend on who computes it.
"""

import functools
from dataclasses import dataclass

import jax

from jforge.ops import check
from pallas_kernels import index_scores_kernel as kernels
from pallas_kernels.compat import jnp, launch, plgpu, swizzled
from pallas_kernels.decode_common import BOX
from pallas_kernels.plan import RESERVED, SMEM, SMS

TILE = 64  # keys of a tile
Q_BYTES = 48 * 1024  # of the queries that one program of index_scores holds, unless a single one takes more
MOST_Q_BYTES = 128 * 1024
PROGRAMS = 2  # on one SM
WAVES = 2  # of programs, so that rows of different lengths share the card
LEAST = 8  # tiles of a program, unless the card would idle


def index_scores(q_index, k_index, weights, lengths, *, k_scale=None):
    """score_{t,s} = sum_i w_{t,i} relu(q_{t,i} . k_s) for s < lengths[b]-T+t+1, -inf for the others: float32 B T S.

    q_index: B T I J and k_index: B S J in float16 or bfloat16; weights: float32 B T I, of any sign; lengths: int32 B.
    k_index may be int8 or fp8 with k_scale, float32 B S: value = stored * scale. Slots that no query sees may hold NaN.

    Raises ValueError and TypeError from jforge.ops.check, and NotImplementedError for what has no kernel: float32 and
    float64, S that is not a multiple of 8 (TMA), J above 256 or not a multiple of 16, of 32 with k_scale, more heads
    than shared memory holds. Source: the lightning indexer of DeepSeek-V3.2 (arXiv 2512.02556).
    """
    check.index_scores(q_index, k_index, lengths, k_scale=k_scale, weights=weights)
    check.length_values(lengths, k_index.shape[1])
    if weights.dtype == jnp.float64:
        raise NotImplementedError("weights has dtype float64; the kernel accumulates in float32")
    _refuse(q_index, k_index, k_scale)
    facts = make_facts(q_index.shape, k_index.shape[1], k_index.dtype)
    if facts.padded * facts.J * 2 > MOST_Q_BYTES:
        I, J = q_index.shape[2:]  # noqa: E741
        raise NotImplementedError(f"q_index has I={I}, J={J}; the heads of one query must fit {MOST_Q_BYTES} bytes")
    return run(q_index, k_index, weights, lengths, k_scale, facts)


def block_index_scores(q_index, k_index, lengths, *, block_size, k_scale=None):
    """score_{t,i,e} = max of q_{t,i} . k_s over the tokens s of block e with s < lengths[b]-T+t+1, -inf where there is
    none: float32 B T I ceil(S / block_size).

    Arguments and errors as in index_scores; block_size is 8, 16, 32 or a multiple of 64. Where the number of blocks is
    not a multiple of 8 (TMA), the kernel's result has up to 7 more and XLA copies it. Source: MiniMax-M3 (arXiv
    2606.13392).
    """
    check.index_scores(q_index, k_index, lengths, k_scale=k_scale)
    check.length_values(lengths, k_index.shape[1])
    check.positive("block_size", block_size, integer=True)
    _refuse(q_index, k_index, k_scale)
    if block_size not in (8, 16, 32) and block_size % TILE:
        raise NotImplementedError(f"block_size is {block_size}; the kernel takes 8, 16, 32 and multiples of {TILE}")
    size = min(int(block_size), 2**30)  # of what is longer than the cache, any will do
    facts = make_block_facts(q_index.shape, k_index.shape[1], k_index.dtype, size)
    return run_blocks(q_index, k_index, lengths, k_scale, facts)


def _refuse(q, k, k_scale) -> None:
    """NotImplementedError for shapes and dtypes without a kernel."""
    if k_scale is not None and k_scale.dtype != jnp.float32:
        raise NotImplementedError(f"k_scale has dtype {k_scale.dtype}; the kernel takes float32")
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        raise NotImplementedError(f"q_index has dtype {q.dtype}; wgmma multiplies 16-bit inputs, float32 only as tf32")
    (B, T, count, J), S = q.shape, k.shape[1]
    if S == 0 or S % 8:
        raise NotImplementedError(f"k_index has S={S} slots; TMA needs a positive multiple of 8")
    whole = 32 // k.dtype.itemsize
    if J % whole or not 0 < J <= 256:
        raise NotImplementedError(f"k_index has J={J}; the kernel takes multiples of {whole} up to 256 for {k.dtype}")
    if min(B, T, count) == 0 or B > 65535:
        raise NotImplementedError(f"q_index has B={B}, T={T}, I={count}; the grid must not be empty, B at most 65535")


@dataclass(frozen=True)
class Facts:
    """Everything static about one call."""

    T: int
    J: int
    S: int
    per_query: int  # I
    heads: int  # g, real rows of a box
    units: int  # boxes of a query; of all queries in block_index_scores
    queries: int  # queries, or boxes in block_index_scores, of one program
    row_blocks: int
    stages: int
    splits: int
    size: int = 0  # of a block
    tile: int = TILE

    @property
    def padded(self):
        """Rows of one query, with those that are not real."""
        return BOX * self.units

    @property
    def group(self):
        """Tiles whose scores leave together: those of 8 blocks, or one."""
        return max(1, BOX * self.size // self.tile)

    @property
    def piece(self):
        """Keys that are reduced together: a block, or the part of it that lies in a tile."""
        return min(self.size, self.tile)


def _boxes(rows: int) -> tuple[int, int]:
    """(real rows of a box, boxes): the largest number up to 8 that divides `rows`."""
    heads = next(g for g in range(BOX, 0, -1) if rows % g == 0)
    return heads, rows // heads


def make_facts(shape, S, k_dtype, stages=None, splits=None) -> Facts:
    """The plan of index_scores: queries of a program, ring and splits. `stages` and `splits` override it."""
    B, T, per_query, J = shape
    heads, units = _boxes(per_query)
    most = max(1, Q_BYTES // (units * BOX * J * 2))
    queries = next(x for x in range(min(T, most), 0, -1) if T % x == 0)
    row_blocks = T // queries
    stages = stages or _stages(J, queries * units * BOX, k_dtype)
    splits = splits or _splits(B * row_blocks, S)
    return Facts(T, J, S, per_query, heads, units, queries, row_blocks, stages, splits)


def make_block_facts(shape, S, k_dtype, size, stages=None, splits=None) -> Facts:
    """The plan of block_index_scores: the rows of all queries are alike, and a program holds up to 64 of them."""
    B, T, per_query, J = shape
    heads, units = _boxes(T * per_query)
    row_blocks = -(-units * BOX // kernels.ROWS)
    boxes = -(-units // row_blocks)
    stages = stages or _stages(J, kernels.ROWS, k_dtype)
    splits = splits or _splits(B * row_blocks, S, BOX * size)
    return Facts(T, J, S, per_query, heads, units, boxes, row_blocks, stages, splits, size)


def _stages(J, rows, k_dtype) -> int:
    """The deepest ring, up to 8 tiles, that leaves room for a second program, else for one."""
    wide = 2 * TILE * J if k_dtype.itemsize == 1 else 0
    tile, fixed = TILE * (J * k_dtype.itemsize + 4), RESERVED + wide + rows * (2 * J + 16)
    fit = [(SMEM // programs - fixed) // tile for programs in (PROGRAMS, 1)]
    return min(8, fit[0] if fit[0] >= 3 else fit[1])


def _splits(programs, S, group=TILE) -> int:
    """Programs of a row: as many as fill the card, and more where that leaves each of them enough groups of keys."""
    slots, groups, least = PROGRAMS * SMS, -(-S // group), -(-LEAST * TILE // group)
    return min(groups, max(1, slots // programs, min(WAVES * slots // programs, groups // least)))


@functools.partial(jax.jit, static_argnames="facts")
def run(q, k, weights, lengths, k_scale, facts):
    """The kernel of index_scores. Reshapes only relabel; nothing is moved."""
    f, B = facts, q.shape[0]
    scratch = dict(
        w_s=plgpu.SMEM((f.queries, f.padded), jnp.float32),
        out_s=plgpu.SMEM((2, f.queries, f.tile), jnp.float32),
        q_full=plgpu.Barrier(num_arrivals=f.queries * f.units),
    )
    return _launch(
        functools.partial(kernels.scores, f),
        *(q.reshape(B, f.T, f.units, f.heads, f.J), k, weights, lengths, k_scale),
        out_type=jax.ShapeDtypeStruct((B, f.T, f.S), jnp.float32),
        scratch_types=scratch | _ring(f, q.dtype, k.dtype, f.queries * f.padded),
        grid=(B, f.splits, f.row_blocks),
        kernel_name="index_scores",
    )


@functools.partial(jax.jit, static_argnames="facts")
def run_blocks(q, k, lengths, k_scale, facts):
    """The kernel of block_index_scores, and the removal of blocks that are there for TMA only."""
    f, B = facts, q.shape[0]
    blocks = -(-f.S // f.size)
    scratch = dict(
        out_s=plgpu.SMEM((2, kernels.ROWS, BOX), jnp.float32, transforms=swizzled(BOX, 4)),
        q_full=plgpu.Barrier(num_arrivals=f.queries),
    )
    out = _launch(
        functools.partial(kernels.block_scores, f),
        *(q.reshape(B, f.units, f.heads, f.J), k, lengths, k_scale),
        out_type=jax.ShapeDtypeStruct((B, f.units, f.heads, -(-blocks // BOX) * BOX), jnp.float32),
        scratch_types=scratch | _ring(f, q.dtype, k.dtype, kernels.ROWS),
        grid=(B, f.splits, f.row_blocks),
        kernel_name="block_index_scores",
    )
    return out[..., :blocks].reshape(B, f.T, f.per_query, blocks)


def _launch(body, *operands, **arguments):
    """Two warpgroups a program. Programs of the same keys lie side by side, so that the second reads them from L2."""
    operands = [array for array in operands if array is not None]
    place = dict(grid_names=("b", "split", "rows"), num_threads=2, thread_name="warpgroup")
    return launch(body, *operands, **place, **arguments)


def _ring(f, dtype, k_dtype, rows) -> dict:
    """Shared memory of the queries and of the ring of keys."""
    scaled, tiles = k_dtype.itemsize == 1, swizzled(f.J, 2)
    scratch = dict(
        q_s=plgpu.SMEM((rows, f.J), dtype, transforms=tiles),
        k_s=plgpu.SMEM((f.stages, f.tile, f.J), k_dtype, transforms=swizzled(f.J, k_dtype.itemsize)),
        full=plgpu.Barrier(num_arrivals=2 if scaled else 1, num_barriers=f.stages),
        free=plgpu.Barrier(num_barriers=f.stages),
    )
    if scaled:
        scratch |= dict(
            scale_s=plgpu.SMEM((f.stages, f.tile), jnp.float32),
            wide_s=plgpu.SMEM((f.tile, f.J), dtype, transforms=tiles),
        )
    return scratch
