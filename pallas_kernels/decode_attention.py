"""Dense split-KV decode attention with keys on the rows of the MMA ("swap-AB"), for MHA, GQA and MQA.

Each program owns one row of the batch, one KV head, up to 64 query rows and one split of the keys. Warpgroup 1 fills a
ring of K and V tiles by TMA; warpgroup 0 computes, for every tile of 64 keys,

    S^T = K Q^T,   P^T = exp2(S^T - max),   O^T <- O^T exp2(old max - max) + V^T P^T.

With keys on M and query rows on N (a multiple of 8) a group of 4 or 8 heads wastes almost nothing of the 64-row MMA,
and the accumulators take few registers, so that several programs share an SM. P goes through shared memory: the
interpreter cannot feed an MMA from registers, and on an H100 the way through shared memory costs under 1%.

Query rows come in boxes of 8: the heads of a group are cut into `units` of g <= 8 heads (g divides N/K), one box a unit
and query token; TMA fills the rows past g with zeros and drops them again on the way out. So q, k, v and out are used
where they lie, without padding, slicing or transposing.
"""

import functools
import math
from dataclasses import dataclass

import jax
import numpy as np

from jforge.ops import check
from pallas_kernels.compat import jnp, launch, plgpu, swizzled, target
from pallas_kernels.decode_attention_kernel import kernel
from pallas_kernels.decode_common import BOX
from pallas_kernels.merge_states import merge
from pallas_kernels.plan import bounded, default_config, fill_splits, lookup, programs_per_sm


def decode_attention(q, k, v, lengths, *, scale, window=None, sinks=None, softcap=None, page_table=None,
                     k_scale=None, v_scale=None, chunk=None, out_dtype=None):  # fmt: skip
    """out_t = sum_s softmax_s(cap(scale * q_t . k_s)) v_s over s < lengths[b]-T+t+1, the last `window` of them.

    q: B T N H, k: B S K H, v: B S K V in float16 or bfloat16, lengths: int32 B; query head n reads KV head n // (N/K).
    `sinks` (N) are logits in natural-log units, not scaled; cap(x) = softcap * tanh(x / softcap). Returns out B T N V
    in `out_dtype` (default q's) and float32 lse B T N: natural log, sink included. A query that sees nothing gives 0
    and -inf (or its sink). Slots that no query may read may hold NaN. With `page_table` (int32 B P) k and v are pools
    `pages page K H`; only the entries of pages that a query reads are followed.

    The number of splits follows from the shapes alone, and each row's tiles are shared evenly among them on the device.
    `chunk` fixes the split size instead (rounded up to a multiple of 64 keys): then a row's result is bitwise the same
    in any batch. A second kernel merges the splits; with one split that no `chunk` asked for there is none.

    Lengths outside of 0..S raise ValueError where they are concrete; a traced call does not look at them. Raises
    ValueError and TypeError from jforge.ops.check, and NotImplementedError for what has no kernel: float32 and float64
    (wgmma multiplies float32 as tf32), k_scale and v_scale, S or a page that is not a multiple of 8 (TMA), head and
    value dims that are not multiples of 16 or above 256, empty sizes, more rows or splits than a CUDA grid takes.
    """
    sizes = check.decode_attention(
        q, k, v, lengths, scale=scale, window=window, sinks=sinks, softcap=softcap, page_table=page_table,
        k_scale=k_scale, v_scale=v_scale, chunk=chunk, out_dtype=out_dtype,
    )  # fmt: skip
    if k_scale is not None:
        raise NotImplementedError("k_scale is given; the kernel reads float16 and bfloat16 caches only")
    if page_table is not None:
        sizes = sizes | dict(S=sizes["P"] * sizes["page"])
    check.length_values(lengths, sizes["S"])
    out_dtype = jnp.dtype(out_dtype or q.dtype)
    _refuse(sizes, q.dtype, out_dtype)
    facts = make_facts(sizes, q.dtype, out_dtype, scale=float(scale), window=window,
                       softcap=softcap and float(softcap), chunk=chunk)  # fmt: skip
    return run(q, k, v, lengths, page_table, sinks, facts)


def _refuse(sizes, dtype, out_dtype) -> None:
    """NotImplementedError for shapes and dtypes without a kernel."""
    if dtype not in (jnp.float16, jnp.bfloat16):
        raise NotImplementedError(f"q has dtype {dtype}; wgmma multiplies 16-bit inputs, and float32 only as tf32")
    if out_dtype == jnp.float64:
        raise NotImplementedError("out_dtype is float64; the kernel accumulates in float32")
    name = "page" if "page" in sizes else "S"
    slots, H, V = sizes[name], sizes["H"], sizes["V"]
    if slots == 0 or slots % 8:
        raise NotImplementedError(f"k has {name}={slots} slots; TMA needs a positive multiple of 8")
    if H % 16 or not 0 < H <= 256:
        raise NotImplementedError(f"q has H={H}; the kernel takes multiples of 16 up to 256")
    if V % 16 or not 0 < V <= 256:
        raise NotImplementedError(f"v has V={V}; the kernel takes multiples of 16 up to 256")
    B, T, N, S = (sizes[x] for x in "BTNS")
    if min(B, T, N, S) == 0 or B > 65535:
        raise NotImplementedError(f"q has B={B}, T={T}, N={N}, the cache S={S}; none may be 0, B at most 65535")


@dataclass(frozen=True)
class Facts:
    """Everything static about one call."""

    T: int
    K: int
    H: int
    V: int
    heads: int  # g, heads of a unit
    units: int  # units of one KV head and query token
    boxes: int  # query boxes of one program
    block: int
    stages: int
    splits: int
    page: int | None  # slots of a page
    chunk: int | None
    window: int | None
    softcap: float | None
    scale: float
    out_dtype: np.dtype

    @property
    def rows(self):
        return BOX * self.boxes

    @property
    def width(self):
        """Value columns of the accumulator, whose M is a multiple of 64; TMA fills the ones past V with zeros."""
        return -(-self.V // 64) * 64

    @property
    def piece(self):
        """Keys that one TMA copy brings in."""
        return math.gcd(self.page or self.block, self.block)

    @property
    def row_blocks(self):
        return -(-self.T * self.units // self.boxes)


def make_facts(sizes, dtype, out_dtype, *, scale, window=None, softcap=None, chunk=None, config=None) -> Facts:
    """The plan of a call: query boxes of a program, tiles and splits. `config` overrides the table (for tuning)."""
    B, T, S, N, K, H, V = (sizes[x] for x in "BTSNKHV")
    group = N // K
    heads = next(g for g in range(BOX, 0, -1) if group % g == 0)
    units, width = group // heads, -(-V // 64) * 64
    most = (64 if width <= 128 else 32) // BOX  # accumulators of at most 64 registers a thread
    row_blocks = -(-T * units // most)
    boxes = -(-T * units // row_blocks)
    shape = H, width, BOX * boxes
    default = default_config(*shape)
    window, chunk = bounded(window, S), bounded(chunk, S)
    span = S if window is None else min(S, window + T - 1 + default.block)
    if chunk is None:
        key = "decode_attention", str(dtype), H, V, T * group, B * K, S, target().device_kind
        config = config or lookup(*key) or default
        tiles = -(-span // config.block)
        splits = config.splits or fill_splits(B * K * row_blocks, tiles, programs_per_sm(config, *shape))
    else:  # nothing that could differ between batches, so never the table
        config = config or default
        chunk = -(-chunk // config.block) * config.block
        splits = -(-span // chunk)
    return Facts(T, K, H, V, heads, units, boxes, config.block, config.stages, splits, sizes.get("page"), chunk, window,
                 softcap, scale, out_dtype)  # fmt: skip


@functools.partial(jax.jit, static_argnames="facts")
def run(q, k, v, lengths, page_table, sinks, facts):
    """The decode kernel, and the merge kernel when there are splits. Reshapes only relabel; nothing is moved."""
    f, (B, T, N, _) = facts, q.shape
    alone = f.splits == 1 and f.chunk is None  # the bits of a merge differ, and a longer cache would need one
    q = q.reshape(B, T, -1, f.heads, f.H)
    heads = (f.splits, B, T, N // f.heads, f.heads)
    paged, own_sinks = page_table is not None, sinks is not None and alone
    copies = f.block // f.piece
    keys, values = swizzled(f.H, 2), swizzled(f.V, 2)
    out, lse = launch(
        functools.partial(kernel, f, paged, own_sinks),
        *(q, k, v, lengths, *[page_table] * paged, *[sinks] * own_sinks),
        out_type=[
            jax.ShapeDtypeStruct((*heads, f.V if alone else f.width), f.out_dtype if alone else jnp.float32),
            jax.ShapeDtypeStruct(heads, jnp.float32),
        ],
        scratch_types=dict(
            q_s=plgpu.SMEM((f.rows, f.H), q.dtype, transforms=keys),
            k_s=plgpu.SMEM((f.stages, f.block, f.H), q.dtype, transforms=keys),
            v_s=plgpu.SMEM((f.stages, f.block, f.width), q.dtype, transforms=values),
            p_s=plgpu.SMEM((f.rows, f.block), q.dtype, transforms=values),
            out_s=plgpu.SMEM((f.rows, f.width), f.out_dtype if alone else jnp.float32),
            row_s=plgpu.SMEM((f.rows,), jnp.float32),
            q_full=plgpu.Barrier(num_arrivals=f.boxes),
            k_full=plgpu.Barrier(num_arrivals=copies, num_barriers=f.stages),
            v_full=plgpu.Barrier(num_arrivals=copies, num_barriers=f.stages),
            k_free=plgpu.Barrier(num_barriers=f.stages),
            v_free=plgpu.Barrier(num_barriers=f.stages),
        ),
        grid=(B, f.splits, f.K * f.row_blocks),
        grid_names=("b", "split", "head"),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="decode_attention",
    )
    if alone:
        return out.reshape(B, T, N, f.V), lse.reshape(B, T, N)
    out, lse = out.reshape(f.splits, B, T * N, -1), lse.reshape(f.splits, B, T * N)
    return merge(out, lse, (T, N, f.V), f.out_dtype, sinks)
