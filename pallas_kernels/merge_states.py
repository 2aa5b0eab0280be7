"""Merge of partial attention results over disjoint sets of keys: one kernel, one program per query and head."""

import functools
import math

import jax
import numpy as np

from jforge.ops import check
from pallas_kernels.compat import BY_ROW, jnp, launch, lax, pl, plgpu

LOG2E = math.log2(math.e)
LOWEST = float(np.finfo(np.float32).min)
GROUP = 32  # parts that one TMA copy brings in: 32 KB of float32 at 256 columns
COLUMNS = 256  # of one program, the longest side of a TMA box


def merge_states(outs, lses):
    """lse = log sum_p exp(lse_p);  out = sum_p exp(lse_p - lse) out_p.

    outs: P B T N V in float16, bfloat16 or float32; lses: float32 P B T N, natural log. A part with lse = -inf
    contributes nothing, even where it is NaN; all parts empty give 0 and -inf. Knows no sink. Accumulates in float32
    in the order of the parts, so the result is deterministic; out keeps the dtype of outs.

    Raises ValueError and TypeError from jforge.ops.check; NotImplementedError for float64 and for rows of V elements
    that are not a positive multiple of 16 bytes (TMA).
    """
    check.merge_states(outs, lses)
    if "float64" in (str(outs.dtype), str(lses.dtype)):
        raise NotImplementedError("outs or lses is float64; Mosaic GPU kernels accumulate in float32")
    V = outs.shape[-1]
    if V == 0 or V * outs.dtype.itemsize % 16:
        raise NotImplementedError(f"outs has V={V} ({outs.dtype}); TMA needs rows of a positive multiple of 16 bytes")
    if outs.size == 0:
        return jnp.zeros(outs.shape[1:], outs.dtype), jnp.zeros(lses.shape[1:], jnp.float32)
    return _merge_jit(outs, lses)


@jax.jit
def _merge_jit(outs, lses):
    P, B, T, N, V = outs.shape
    return merge(outs.reshape(P, B, T * N, V), lses.reshape(P, B, T * N), (T, N, V), outs.dtype)


def merge(outs, lses, sizes, out_dtype, sinks=None):
    """The merge inside a jit: outs P B X W with X >= T*N rows and W >= V columns, the rest of which is not read.

    sizes: T, N, V. `sinks` (N, natural-log units) adds one logit per head to the denominator and to lse. Returns out
    B T N V in `out_dtype` and float32 lse.
    """
    (P, B, X, _), (T, N, V) = outs.shape, sizes
    rows, width = B * T * N, min(-(-V // 64) * 64, COLUMNS)
    group, slots = min(P, GROUP), 1 if P <= GROUP else 2
    operands = (outs.reshape(P, B * X, -1), lses.reshape(P, B * X)) + (() if sinks is None else (sinks,))
    out, lse = launch(
        functools.partial(_kernel, P, (T * N, X), N, sinks is not None),
        *operands,
        out_type=[jax.ShapeDtypeStruct((rows, V), out_dtype), jax.ShapeDtypeStruct((rows,), jnp.float32)],
        scratch_types=[
            plgpu.SMEM((slots, group, width), outs.dtype),
            plgpu.SMEM((1, width), out_dtype),
            plgpu.Barrier(num_barriers=slots),
        ],
        grid=(-(-V // width), rows),
        grid_names=("column", "row"),
        kernel_name="merge_states",
    )
    return out.reshape(B, T, N, V), lse.reshape(B, T, N)


def _kernel(P, strides, N, has_sinks, outs, lses, *refs):
    """Running (numerator, maximum, denominator) over groups of parts; the sink enters the denominator last.

    strides: rows of one b in out and in outs.
    """
    sinks, (out, lse, parts, staged, barriers) = refs[0] if has_sinks else None, refs[has_sinks:]
    slots, group, width = parts.shape
    groups = -(-P // group)
    V, row, column = out.shape[-1], lax.axis_index("row"), lax.axis_index("column")
    columns = pl.ds(column * width, width)
    kept, given = (jnp.int32(stride) for stride in strides)
    source = row if strides[0] == strides[1] else lax.div(row, kept) * given + lax.rem(row, kept)

    def fetch(j):
        slot = lax.rem(j, jnp.int32(slots))
        box = outs.at[pl.ds(j * group, group), source, columns]
        plgpu.copy_gmem_to_smem(box, parts.at[slot], barriers.at[slot])

    def step(j, carry):
        if groups > 1:
            plgpu.commit_smem()  # the last reads of the other slot come before the copy that overwrites it
            pl.when(j + 1 < groups)(lambda: fetch(j + 1))
        levels = [_part_lse(lses, j * group + i, P, source) for i in range(group)]
        slot = lax.rem(j, jnp.int32(slots))
        plgpu.barrier_wait(barriers.at[slot])
        return _fold(parts.at[slot], levels, carry)

    fetch(jnp.int32(0))
    zero = plgpu.layout_cast(jnp.zeros((width,), jnp.float32), BY_ROW)
    total, top, mass = lax.fori_loop(jnp.int32(0), jnp.int32(groups), step, (zero, jnp.float32(LOWEST), jnp.float32(0)))
    if has_sinks:
        sink = sinks[lax.rem(row, jnp.int32(N))].astype(jnp.float32) * LOG2E
        raised = jnp.maximum(top, sink)
        total = total * jnp.full((width,), jnp.exp2(top - raised))
        mass = mass * jnp.exp2(top - raised) + jnp.exp2(sink - raised)
        top = raised
    pl.when(column == 0)(lambda: _store(lse, row, (top + jnp.log2(mass)) * math.log(2)))
    share = jnp.where(mass > 0, 1 / mass, jnp.float32(0))
    result = (total * jnp.full((width,), share)).astype(out.dtype)
    if V % width == 0:
        out.at[row, columns][...] = result
    else:  # a copy of one contiguous row is not clipped at its end on a GPU, so the last one has its own length
        staged.at[0][...] = result
        plgpu.commit_smem()
        whole = V // width

        def store(length):
            at = pl.ds(row, 1), pl.ds(column * width, length)
            plgpu.copy_smem_to_gmem(staged.at[:, pl.ds(0, length)], out.at[at])

        pl.when(column < whole)(lambda: store(width))
        pl.when(column == whole)(lambda: store(V % width))
        plgpu.wait_smem_to_gmem(0)


def _store(ref, at, value):
    ref[at] = value


def _part_lse(lses, part, P, row):
    """Base-2 lse of a part; -inf past the last one, whose tile TMA filled with zeros."""
    value = lses[jnp.minimum(part, P - 1), row] * LOG2E
    return jnp.where(part < P, value, jnp.float32(-jnp.inf))


def _fold(parts, levels, carry):
    """One group of parts into the running result. The maximum starts finite, so no difference is inf - inf."""
    total, top, mass = carry
    raised = functools.reduce(jnp.maximum, levels, top)
    shrink = jnp.exp2(top - raised)
    total, mass = total * jnp.full(total.shape, shrink), mass * shrink
    for i, level in enumerate(levels):
        weight = jnp.exp2(level - raised)
        mass = mass + weight
        spread = jnp.full(total.shape, weight)
        part = plgpu.load(parts.at[i], layout=BY_ROW).astype(jnp.float32)
        # An empty part may hold NaN, and its weight of 0 would not hide it.
        total = total + jnp.where(spread > 0, part, jnp.zeros_like(part)) * spread
    return total, raised, mass
