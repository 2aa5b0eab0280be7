"""Merge of partial attention results over disjoint sets of keys: one kernel, one program per query and head."""

import functools

import jax

from jforge.ops import check
from pallas_kernels.compat import BY_ROW, jnp, lax, pl, plgpu
from pallas_kernels.limits import need
from pallas_kernels.softmax import LOWEST, fold_sink, natural_lse, normalised, power
from pallas_kernels.tiles import launch_programs

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
    narrow = "float64" not in (str(outs.dtype), str(lses.dtype))
    need(narrow, "outs or lses is float64; Mosaic GPU kernels accumulate in float32")
    V, dtype = outs.shape[-1], outs.dtype
    whole = V > 0 and V * dtype.itemsize % 16 == 0
    need(whole, f"outs has V={V} ({dtype}); TMA needs rows of a positive multiple of 16 bytes")
    if outs.size == 0:
        return jnp.zeros(outs.shape[1:], outs.dtype), jnp.zeros(lses.shape[1:], jnp.float32)
    return _merge_jit(outs, lses)


@jax.jit
def _merge_jit(outs, lses):
    P, B, T, N, V = outs.shape
    return merge(outs.reshape(P, B, T * N, V), lses.reshape(P, B, T * N), (T, N, V), outs.dtype)


def merged(f, out, lse, sizes, sinks, rows=None):
    """out B T N V and lse of what a decode kernel wrote, [splits, ...]; where there are splits, by the merge kernel.

    sizes: B, T, N; rows: B, or B*T where the kernel leaves gaps after the heads of each query.
    """
    B, T, N = sizes
    if not f.alone:
        parts = out.reshape(f.splits, rows or B, -1, out.shape[-1]), lse.reshape(f.splits, rows or B, -1)
        out, lse = merge(*parts, (B * T // (rows or B), N, f.V), f.out_dtype, sinks)
    return out.reshape(B, T, N, f.V), lse.reshape(B, T, N)


def merge(outs, lses, sizes, out_dtype, sinks=None):
    """The merge inside a jit: outs P B X W with X >= T*N rows and W >= V columns, the rest of which is not read.

    sizes: T, N, V. `sinks` (N, natural-log units) adds one logit per head to the denominator and to lse. Returns out
    B T N V in `out_dtype` and float32 lse.
    """
    (P, B, X, _), (T, N, V) = outs.shape, sizes
    rows, width = B * T * N, min(-(-V // 64) * 64, COLUMNS)
    group, slots = min(P, GROUP), 1 if P <= GROUP else 2
    out_type = [jax.ShapeDtypeStruct((rows, V), out_dtype), jax.ShapeDtypeStruct((rows,), jnp.float32)]
    scratch = dict(
        parts=plgpu.SMEM((slots, group, width), outs.dtype),
        staged=plgpu.SMEM((1, width), out_dtype),
        full=plgpu.Barrier(num_barriers=slots),
    )
    operands = dict(outs=outs.reshape(P, B * X, -1), lses=lses.reshape(P, B * X), sinks=sinks)
    grid, axes = (-(-V // width), rows), ("column", "row")
    f = P, N, (T * N, X)
    out, lse = launch_programs(
        _kernel, f, operands, out_type, scratch, grid, "merge_states", axes=axes, warpgroups=None
    )
    return out.reshape(B, T, N, V), lse.reshape(B, T, N)


def _kernel(f, given, out, lse, *, parts, staged, full):
    """Running (numerator, maximum, denominator) over groups of parts; the sink enters the denominator last.

    f: parts, heads, and the rows of one b in out and in outs.
    """
    (P, N, strides), outs, lses = f, given["outs"], given["lses"]
    slots, group, width = parts.shape
    groups = -(-P // group)
    V, row, column = out.shape[-1], lax.axis_index("row"), lax.axis_index("column")
    columns = pl.ds(column * width, width)
    kept, stride = (jnp.int32(rows) for rows in strides)
    source = row if strides[0] == strides[1] else lax.div(row, kept) * stride + lax.rem(row, kept)

    def fetch(j):
        slot = lax.rem(j, jnp.int32(slots))
        box = outs.at[pl.ds(j * group, group), source, columns]
        plgpu.copy_gmem_to_smem(box, parts.at[slot], full.at[slot])

    def step(j, carry):
        if groups > 1:
            plgpu.commit_smem()  # the last reads of the other slot come before the copy that overwrites it
            pl.when(j + 1 < groups)(lambda: fetch(j + 1))
        levels = [_part_lse(lses, j * group + i, P, source) for i in range(group)]
        slot = lax.rem(j, jnp.int32(slots))
        plgpu.barrier_wait(full.at[slot])
        return _fold(parts.at[slot], levels, carry)

    fetch(jnp.int32(0))
    zero = plgpu.layout_cast(jnp.zeros((width,), jnp.float32), BY_ROW)
    total, top, mass = lax.fori_loop(jnp.int32(0), jnp.int32(groups), step, (zero, jnp.float32(LOWEST), jnp.float32(0)))

    def widen(scalar):
        return jnp.full((width,), scalar)

    if "sinks" in given:
        sink = given["sinks"][lax.rem(row, jnp.int32(N))].astype(jnp.float32)
        total, top, mass = fold_sink(total, top, mass, sink, widen)
    pl.when(column == 0)(lambda: _store(lse, row, natural_lse(top, mass)))
    result = normalised(total, mass, widen).astype(out.dtype)
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
    """lse of a part; -inf past the last one, whose tile TMA filled with zeros."""
    value = lses[jnp.minimum(part, P - 1), row]
    return jnp.where(part < P, value, jnp.float32(-jnp.inf))


def _fold(parts, levels, carry):
    """One group of parts into the running result. The maximum starts finite, so no difference is inf - inf."""
    total, top, mass = carry
    raised = functools.reduce(jnp.maximum, levels, top)
    shrink = power(top - raised)
    total, mass = total * jnp.full(total.shape, shrink), mass * shrink
    for i, level in enumerate(levels):
        weight = power(level - raised)
        mass = mass + weight
        spread = jnp.full(total.shape, weight)
        part = plgpu.load(parts.at[i], layout=BY_ROW).astype(jnp.float32)
        # An empty part may hold NaN, and its weight of 0 would not hide it.
        total = total + jnp.where(spread > 0, part, jnp.zeros_like(part)) * spread
    return total, raised, mass
