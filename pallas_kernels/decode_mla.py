"""Split-KV decode attention over a latent cache, absorbed form: all heads share the keys, and the values are the keys.

The T*N query rows of one row of the batch share each tile of 64 latents, which TMA loads once and which serves as K and
as V. Two kernels:

* decode_mla_few.py, up to 32 query rows a program: keys on the rows of the MMA, query rows in boxes of 8 on its
  columns, one compute warpgroup. Bound by memory.
* decode_mla_many.py, 64 query rows a program: query rows on the rows of the MMA, two compute warpgroups with half of
  the channels each, every score computed once. Programs of the same keys lie side by side in the grid, so that the
  second reads them from L2.

Rope keys narrower than 64 are filled with zeros by TMA. Nothing is padded, sliced or transposed outside the kernels.
"""

import functools
import math
from dataclasses import dataclass

import jax
import numpy as np

from jforge.ops import check
from pallas_kernels import decode_mla_few, decode_mla_many
from pallas_kernels.compat import jnp, launch, plgpu, swizzled, target
from pallas_kernels.decode_common import BOX
from pallas_kernels.merge_states import merge
from pallas_kernels.plan import RESERVED, SMEM, Config, bounded, fill_splits, lookup

ROPE = 64  # columns of a rope tile
FEW, MANY = 32, 64  # query rows of a program of the two kernels


def decode_mla(q_latent, q_rope, latent, k_rope, lengths, *, scale, window=None, sinks=None, page_table=None,
               latent_scale=None, chunk=None, out_dtype=None):  # fmt: skip
    """out_t = sum_s softmax_s(scale * (q_latent_t . latent_s + q_rope_t . k_rope_s)) latent_s

    over s < lengths[b]-T+t+1, the last `window` of them.

    q_latent: B T N C, q_rope: B T N R, latent: B S C, k_rope: B S R in float16 or bfloat16, lengths: int32 B.
    `sinks` (N) are logits in natural-log units, not scaled. Returns out B T N C in `out_dtype` (default q_latent's) and
    float32 lse B T N: natural log, sink included. A query that sees nothing gives 0 and -inf (or its sink). Slots that
    no query may read may hold NaN. With `page_table` (int32 B P) latent and k_rope are pools `pages page C` and
    `pages page R`; only the entries of pages that a query reads are followed.

    The number of splits follows from the shapes alone, and each row's tiles are shared evenly among them on the device.
    `chunk` fixes the split size instead (rounded up to a multiple of 64 keys): then a row's result is bitwise the same
    in any batch. A second kernel merges the splits; with one split that no `chunk` asked for there is none.

    Lengths outside of 0..S raise ValueError where they are concrete; a traced call does not look at them. Raises
    ValueError and TypeError from jforge.ops.check, and NotImplementedError for what has no kernel: float32 and float64,
    latent_scale, empty sizes, more rows or splits than a CUDA grid takes, S or a page that is not a multiple of 8
    (TMA), C that is not a multiple of 64 or above 512, R that is not a multiple of 8 or above 64. Absorbed latent
    attention is from DeepSeek-V2 (arXiv 2405.04434).
    """
    sizes = check.decode_mla(
        q_latent, q_rope, latent, k_rope, lengths, scale=scale, window=window, sinks=sinks, page_table=page_table,
        latent_scale=latent_scale, chunk=chunk, out_dtype=out_dtype,
    )  # fmt: skip
    if latent_scale is not None:
        raise NotImplementedError("latent_scale is given; the kernel reads float16 and bfloat16 latents only")
    if page_table is not None:
        sizes = sizes | dict(S=sizes["P"] * sizes["page"])
    check.length_values(lengths, sizes["S"])
    out_dtype = jnp.dtype(out_dtype or q_latent.dtype)
    _refuse(sizes, q_latent.dtype, out_dtype)
    facts = make_facts(sizes, q_latent.dtype, out_dtype, scale=float(scale), window=window, chunk=chunk)
    return run(q_latent, q_rope, latent, k_rope, lengths, page_table, sinks, facts)


def _refuse(sizes, dtype, out_dtype) -> None:
    """NotImplementedError for shapes and dtypes without a kernel."""
    if dtype not in (jnp.float16, jnp.bfloat16):
        raise NotImplementedError(f"q_latent has dtype {dtype}; wgmma multiplies 16-bit inputs, float32 only as tf32")
    if out_dtype == jnp.float64:
        raise NotImplementedError("out_dtype is float64; the kernel accumulates in float32")
    name = "page" if "page" in sizes else "S"
    slots, C, R = sizes[name], sizes["C"], sizes["R"]
    if slots == 0 or slots % 8:
        raise NotImplementedError(f"latent has {name}={slots} slots; TMA needs a positive multiple of 8")
    if C % 64 or not 0 < C <= 512:
        raise NotImplementedError(f"latent has C={C}; the kernel takes multiples of 64 up to 512")
    if R % 8 or not 0 < R <= ROPE:
        raise NotImplementedError(f"k_rope has R={R}; the kernel takes multiples of 8 up to {ROPE}")
    B, T, N, S = (sizes[x] for x in "BTNS")
    if min(B, T, N, S) == 0 or B > 65535:
        raise NotImplementedError(f"q_latent has B={B}, T={T}, N={N}, the cache S={S}; none may be 0, B at most 65535")


@dataclass(frozen=True)
class Facts:
    """Everything static about one call."""

    T: int
    N: int
    C: int
    R: int
    heads: int  # g, heads of a unit
    units: int  # units of one query token
    boxes: int  # query boxes of one program
    many: bool  # which kernel
    stages: int
    splits: int
    page: int | None  # slots of a page
    chunk: int | None
    window: int | None
    scale: float
    out_dtype: np.dtype
    block: int = 64
    rope: int = ROPE

    @property
    def rows(self):
        return BOX * self.boxes

    @property
    def V(self):
        return self.C

    @property
    def piece(self):
        """Keys that one TMA copy brings in."""
        return math.gcd(self.page or self.block, self.block)

    @property
    def row_blocks(self):
        return -(-self.T * self.units // self.boxes)


def default_config(C, rows) -> Config:
    """The deepest ring that fits, in pairs of tiles: a tile belongs to one of two warpgroups."""
    tile, fixed = 2 * 64 * (C + ROPE), RESERVED + 2 * rows * (C + ROPE) + (0 if rows == MANY else rows * 640)
    return Config(64, 4 if fixed + 4 * tile <= SMEM else 2)


def make_facts(sizes, dtype, out_dtype, *, scale, window=None, chunk=None, config=None) -> Facts:
    """The plan of a call: kernel, query boxes of a program, ring and splits. `config` overrides the table."""
    B, T, S, N, C, R = (sizes[x] for x in "BTSNCR")
    heads = next(g for g in range(BOX, 0, -1) if N % g == 0)
    boxes = T * N // heads
    many = boxes > FEW // BOX and heads == BOX and C % 128 == 0
    row_blocks = -(-boxes // ((MANY if many else FEW) // BOX))
    boxes = MANY // BOX if many else -(-boxes // row_blocks)
    default = default_config(C, BOX * boxes)
    window, chunk = bounded(window, S), bounded(chunk, S)
    span = S if window is None else min(S, window + T - 1 + default.block)
    if chunk is None:
        config = config or lookup("decode_mla", str(dtype), C, R, T * N, B, S, target().device_kind) or default
        tiles = -(-span // config.block)
        splits = config.splits or fill_splits(B * row_blocks, tiles, part=BOX * boxes / 16)
    else:  # nothing that could differ between batches, so never the table
        config = config or default
        chunk = -(-chunk // config.block) * config.block
        splits = -(-span // chunk)
    plan = heads, N // heads, boxes, many, config.stages, splits
    return Facts(T, N, C, R, *plan, sizes.get("page"), chunk, window, scale, out_dtype)


@functools.partial(jax.jit, static_argnames="facts")
def run(q_latent, q_rope, latent, k_rope, lengths, page_table, sinks, facts):
    """The decode kernel, and the merge kernel when there are splits. Reshapes only relabel; nothing is moved."""
    f, (B, T, N, C) = facts, q_latent.shape
    # The kernel of many rows stores what is not 16 bits wide in whole blocks of 64 rows.
    whole = not f.many or T * N % MANY == 0 or f.out_dtype == q_latent.dtype
    alone = f.splits == 1 and f.chunk is None and whole  # with `chunk` a longer cache would need a merge
    own_sinks = sinks is not None and alone
    operands = lengths, *[page_table] * (page_table is not None), *[sinks] * own_sinks
    place = _many if f.many else _few
    body = functools.partial(
        (decode_mla_many if f.many else decode_mla_few).kernel, f, page_table is not None, own_sinks
    )
    out, lse = place(f, body, alone, q_latent, q_rope, latent, k_rope, *operands)
    if alone:
        return out.reshape(B, T, N, C), lse.reshape(B, T, N)
    return merge(out.reshape(f.splits, B, -1, C), lse.reshape(f.splits, B, -1), (T, N, C), f.out_dtype, sinks)


def _few(f, body, alone, q_latent, q_rope, *operands):
    """Launch the kernel of few rows: out and lse are [splits, B, T, units, heads, ...]."""
    B, dtype = q_latent.shape[0], q_latent.dtype
    queries = [q.reshape(B, f.T, f.units, f.heads, -1) for q in (q_latent, q_rope)]
    heads = (f.splits, B, f.T, f.units, f.heads)
    out_dtype = f.out_dtype if alone else jnp.float32
    columns = math.gcd(f.C, decode_mla_few.COLUMNS)
    tiles = swizzled(64, 2)
    return launch(
        body,
        *(*queries, *operands),
        out_type=[jax.ShapeDtypeStruct((*heads, f.C), out_dtype), jax.ShapeDtypeStruct(heads, jnp.float32)],
        scratch_types=dict(
            ql_s=plgpu.SMEM((1, f.rows, f.C), dtype, transforms=tiles),
            qr_s=plgpu.SMEM((1, f.rows, f.rope), dtype, transforms=tiles),
            l_s=plgpu.SMEM((f.stages, f.block, f.C), dtype, transforms=tiles),
            r_s=plgpu.SMEM((f.stages, f.block, f.rope), dtype, transforms=tiles),
            p_s=plgpu.SMEM((f.rows, f.block), dtype, transforms=tiles),
            out_s=plgpu.SMEM((f.rows, columns), out_dtype),
            row_s=plgpu.SMEM((f.rows,), jnp.float32),
            q_full=plgpu.Barrier(num_arrivals=2 * f.boxes),
            full=plgpu.Barrier(num_arrivals=2 * (f.block // f.piece), num_barriers=f.stages),
            free=plgpu.Barrier(num_barriers=f.stages),
        ),
        grid=(B, f.splits, f.row_blocks),
        grid_names=("b", "split", "head"),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="decode_mla_few",
    )


def _many(f, body, alone, q_latent, q_rope, *operands):
    """Launch the kernel of many rows: out is [splits, B, rows, C], lse [splits, B, rows]; partial ones whole blocks."""
    B, dtype = q_latent.shape[0], q_latent.dtype
    total = f.T * f.N
    queries = [q.reshape(B, total, -1) for q in (q_latent, q_rope)]
    rows = (f.splits, B, total if alone else f.row_blocks * f.rows)
    tiles = swizzled(64, 2)
    copies = f.block // f.piece
    return launch(
        body,
        *(*queries, *operands),
        out_type=[
            jax.ShapeDtypeStruct((*rows, f.C), f.out_dtype if alone else jnp.float32),
            jax.ShapeDtypeStruct(rows, jnp.float32),
        ],
        scratch_types=dict(
            ql_s=plgpu.SMEM((1, f.rows, f.C), dtype, transforms=tiles),
            qr_s=plgpu.SMEM((1, f.rows, f.rope), dtype, transforms=tiles),
            l_s=plgpu.SMEM((f.stages, 2, f.block, f.C // 2), dtype, transforms=tiles),
            r_s=plgpu.SMEM((f.stages, f.block, f.rope), dtype, transforms=tiles),
            top_s=plgpu.SMEM((f.stages, f.rows), jnp.float32),
            row_s=plgpu.SMEM((4, f.rows), jnp.float32),
            q_full=plgpu.Barrier(num_arrivals=2),
            full=plgpu.Barrier(num_arrivals=copies, num_barriers=f.stages * 3),
            ready=plgpu.Barrier(num_barriers=f.stages),
            free=plgpu.Barrier(num_barriers=f.stages * 2),
            done=plgpu.Barrier(num_barriers=2),
        ),
        grid=(B, f.splits, f.row_blocks),
        grid_names=("b", "split", "head"),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="decode_mla_many",
    )
