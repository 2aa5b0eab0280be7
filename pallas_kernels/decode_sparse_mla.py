"""Split decode attention over listed keys which the heads of a list share, and which are the values too.

It serves `decode_sparse_mla`, and `decode_block_sparse` with v=None, whose keys have no rope part. The kernels are
those of decode_mla.py, for up to 32 query rows a program and for 64, behind another producer: a warpgroup whose threads
gather the listed rows, each of them once, straight into the swizzled tiles of the ring. A row that no query sees is not
read, and its place becomes 0. The work follows from the length of the lists, not from the length of the cache.
"""

import functools
import math
from dataclasses import dataclass

import jax
import numpy as np

from jforge.ops import check
from pallas_kernels.compat import jnp, launch, plgpu, swizzled, target
from pallas_kernels.decode_common import BOX
from pallas_kernels.decode_listed import Lists, refuse
from pallas_kernels.decode_mla import FEW, MANY, ROPE, default_config
from pallas_kernels.decode_mla import Facts as DenseFacts
from pallas_kernels.decode_mla_few import COLUMNS
from pallas_kernels.decode_sparse_mla_kernel import kernel
from pallas_kernels.merge_states import merge
from pallas_kernels.plan import fill_splits, lookup


def decode_sparse_mla(q_latent, q_rope, latent, k_rope, indices, *, scale, sinks=None, latent_scale=None,
                      out_dtype=None):  # fmt: skip
    """out_t = sum_s softmax_s(scale * (q_latent_t . latent_s + q_rope_t . k_rope_s)) latent_s over s in indices_t.

    q_latent: B T N C, q_rope: B T N R, latent: B S C, k_rope: B S R in float16 or bfloat16; indices: int32 B T L, the
    tokens of all heads, distinct, in any order; those outside 0..S-1 are ignored wherever they stand. `sinks` (N) are
    logits in natural-log units, not scaled. Returns out B T N C in `out_dtype` (default q_latent's) and float32 lse
    B T N: natural log, sink included. A query whose list names no token gives 0 and -inf (or its sink). Slots that no
    list names may hold NaN.

    Raises ValueError and TypeError from jforge.ops.check, and NotImplementedError for what has no kernel: float32 and
    float64, latent_scale, empty sizes, B*T above 65535, C that is not a multiple of 64 or above 512, R that is not a
    multiple of 8 or above 64. Attention over the tokens that an indexer picks is from DeepSeek-V3.2 (arXiv 2512.02556).
    """
    sizes = check.decode_sparse_mla(
        q_latent, q_rope, latent, k_rope, indices, scale=scale, sinks=sinks, latent_scale=latent_scale,
        out_dtype=out_dtype,
    )  # fmt: skip
    if latent_scale is not None:
        raise NotImplementedError("latent_scale is given; the kernel reads float16 and bfloat16 latents only")
    B, T, N, S, C, R, L = (sizes[x] for x in "BTNSCRL")
    lists = Lists(T=T, count=1, K=1, L=L, size=1, S=S, page=None)
    refuse(lists, q_latent.dtype, out_dtype, B, N, ("q_latent", "latent", "indices"))
    refuse_rows("latent", C)
    if R % 8 or not 0 < R <= ROPE:
        raise NotImplementedError(f"k_rope has R={R}; the kernel takes multiples of 8 up to {ROPE}")
    facts = make_facts(B, N, C, R, lists, q_latent.dtype, out_dtype, scale=float(scale))
    latent, k_rope = (rows.reshape(B, S, 1, -1) for rows in (latent, k_rope))
    return run(q_latent, q_rope, latent, k_rope, indices, None, None, sinks, facts)


def refuse_rows(keys, C) -> None:
    """NotImplementedError for rows that have no kernel. keys: what the caller calls the array that holds them."""
    if C % 64 or not 0 < C <= 512:
        raise NotImplementedError(
            f"{keys} has rows of {C}; where they are the values too, they must be multiples of 64 up to 512"
        )


@dataclass(frozen=True, kw_only=True)
class Facts(DenseFacts):
    """Everything static about one call. Every list is a row of the batch with one query: T, N and R are a list's."""

    lists: Lists


def make_facts(B, N, C, R, lists, dtype, out_dtype, *, scale, config=None) -> Facts:
    """The plan of a call: kernel, query boxes of a program, ring and splits. `config` overrides the table."""
    N, rows = N // lists.count, B * lists.T * lists.count
    heads = next(g for g in range(BOX, 0, -1) if N % g == 0)
    units = N // heads
    # The kernel of many rows leaves a gap after the last rows of a list, and the merge expects none between lists.
    together = lists.count == 1 or N % MANY == 0
    many = units > FEW // BOX and heads == BOX and C % 128 == 0 and together
    row_blocks = -(-units // ((MANY if many else FEW) // BOX))
    boxes = MANY // BOX if many else -(-units // row_blocks)
    default = default_config(C, BOX * boxes)
    span = lists.L * lists.size
    found = config or lookup("decode_sparse_mla", str(dtype), C, R, N, rows, span, target().device_kind) or default
    tiles = lists.tiles(found.block)
    splits = found.splits or fill_splits(rows * row_blocks, tiles, part=BOX * boxes / 16)
    return Facts(
        T=1, N=N, C=C, R=R, heads=heads, units=units, boxes=boxes, many=many, stages=found.stages,
        splits=lists.even_splits(splits, found.block), page=None, chunk=None, window=None, scale=scale,
        out_dtype=np.dtype(out_dtype or dtype), lists=lists,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="facts")
def run(q_latent, q_rope, latent, k_rope, lists, lengths, page_table, sinks, facts):
    """The decode kernel, and the merge kernel when there are splits. Reshapes only relabel; nothing is moved.

    latent: B S K C, or a pool 1 pages*page K C; k_rope likewise, with q_rope, or both None. lists: int32 B T count L.
    """
    f, (B, T, N, C) = facts, q_latent.shape
    batch = B * T * f.lists.count
    # The kernel of many rows stores what is not 16 bits wide in whole blocks of 64 rows.
    alone = f.splits == 1 and (not f.many or f.N % MANY == 0 or f.out_dtype == q_latent.dtype)
    by_list = (batch, f.N) if f.many else (batch, 1, f.units, f.heads)
    operands = dict(
        q_latent=q_latent.reshape(*by_list, C), q_rope=None if q_rope is None else q_rope.reshape(*by_list, -1),
        latent=latent, k_rope=k_rope, lists=lists.reshape(batch, -1), lengths=lengths, pages=page_table,
        sinks=sinks if alone else None,
    )  # fmt: skip
    out, lse = _launch(f, alone, {name: array for name, array in operands.items() if array is not None})
    if alone:
        return out.reshape(B, T, N, C), lse.reshape(B, T, N)
    parts = out.reshape(f.splits, B * T, -1, C), lse.reshape(f.splits, B * T, -1)
    out, lse = merge(*parts, (1, N, C), f.out_dtype, sinks)
    return out.reshape(B, T, N, C), lse.reshape(B, T, N)


def _launch(f, alone, operands):
    """out and lse by split and list: [splits, lists, 1, units, heads, C], or [splits, lists, rows, C] of many rows."""
    batch, dtype = operands["lists"].shape[0], operands["latent"].dtype
    rows = (f.N if alone else f.row_blocks * f.rows,) if f.many else (1, f.units, f.heads)
    out_dtype = f.out_dtype if alone else jnp.float32
    tiles, copies = swizzled(64, 2), 2 if f.R else 1
    scratch = dict(
        ql_s=plgpu.SMEM((1, f.rows, f.C), dtype, transforms=tiles),
        qr_s=plgpu.SMEM((1, f.rows, f.rope), dtype, transforms=tiles),
        r_s=plgpu.SMEM((f.stages, f.block, f.rope), dtype, transforms=tiles),
        rows_s=plgpu.SMEM((f.stages, f.block), jnp.int32),
    )
    if f.many:
        scratch |= dict(
            l_s=plgpu.SMEM((f.stages, 2, f.block, f.C // 2), dtype, transforms=tiles),
            top_s=plgpu.SMEM((f.stages, f.rows), jnp.float32),
            row_s=plgpu.SMEM((4, f.rows), jnp.float32),
            q_full=plgpu.Barrier(num_arrivals=copies),
            full=plgpu.Barrier(num_barriers=f.stages * 3),
            ready=plgpu.Barrier(num_barriers=f.stages),
            free=plgpu.Barrier(num_barriers=f.stages * 2),
            done=plgpu.Barrier(num_barriers=2),
        )
    else:
        scratch |= dict(
            l_s=plgpu.SMEM((f.stages, f.block, f.C), dtype, transforms=tiles),
            p_s=plgpu.SMEM((f.rows, f.block), dtype, transforms=tiles),
            out_s=plgpu.SMEM((f.rows, math.gcd(f.C, COLUMNS)), out_dtype),
            row_s=plgpu.SMEM((f.rows,), jnp.float32),
            q_full=plgpu.Barrier(num_arrivals=copies * f.boxes),
            full=plgpu.Barrier(num_barriers=f.stages),
            free=plgpu.Barrier(num_barriers=f.stages),
        )
    x = f.lists
    return launch(
        functools.partial(kernel, f, tuple(operands)),
        *operands.values(),
        out_type=[
            jax.ShapeDtypeStruct((f.splits, batch, *rows, f.C), out_dtype),
            jax.ShapeDtypeStruct((f.splits, batch, *rows), jnp.float32),
        ],
        scratch_types=scratch,
        grid=(batch // x.count, f.splits, x.count * f.row_blocks),
        grid_names=("b", "split", "head"),
        num_threads=3 if f.many else 2,
        thread_name="warpgroup",
        kernel_name="decode_sparse_mla_many" if f.many else "decode_sparse_mla_few",
    )
