"""Dense split-KV decode attention with keys on the rows of the MMA ("swap-AB"), for MHA, GQA and MQA.

Each program owns up to 64 query rows, in boxes of 8 (tiles.py). Warpgroup 1 fills a ring of K and V tiles by TMA;
warpgroup 0 does the online softmax over them (softmax.attend). With keys on M and query rows on N (a multiple of 8) a
group of 4 or 8 heads wastes almost nothing of the 64-row MMA, and the accumulators take few registers, so that several
programs share an SM. P goes through shared memory: the interpreter cannot feed an MMA from registers, and on an H100
the way through shared memory costs under 1%.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import jax

from jforge.ops import check
from pallas_kernels import limits, ring, softmax
from pallas_kernels.compat import TILE_T, jnp, pl, plgpu, spread, swizzled
from pallas_kernels.merge_states import merged
from pallas_kernels.plan import Config, Tunable, default_config, fill_splits, programs_per_sm, walk
from pallas_kernels.tiles import (
    BOX,
    Facts,
    boxes_of,
    launch_programs,
    load_boxes,
    load_heads,
    matmul,
    store_rows,
    two_warpgroups,
)


def decode_attention(q, k, v, lengths, *, scale, window=None, sinks=None, softcap=None, page_table=None,
                     k_scale=None, v_scale=None, chunk=None, out_dtype=None, alibi=None):  # fmt: skip
    """out_t = sum_s softmax_s(cap(scale * q_t . k_s) + alibi_n (s - p)) v_s over s <= p, the last `window` of them; the
    query's own slot is p = lengths[b] - T + t.

    q: B T N H, k: B S K H, v: B S K V (or pools `pages page K H` with page_table: int32 B P) in float16 or bfloat16,
    lengths: int32 B, sinks: N, alibi: float32 N. Returns out B T N V in `out_dtype` (default q's) and float32 lse
    B T N. Everything means what it means in jforge.ops.decode_attention.

    The number of splits follows from the shapes alone, and each row's tiles are shared evenly among them on the device.
    `chunk` fixes the split size instead (rounded up to a multiple of 64 keys): then a row's result is bitwise the same
    in any batch. A second kernel merges the splits; with one split that no `chunk` asked for there is none.

    Raises ValueError and TypeError from jforge.ops.check, and NotImplementedError for what has no kernel: float32 and
    float64 (wgmma multiplies float32 as tf32), k_scale and v_scale, S or a page that is not a multiple of 8 (TMA), head
    and value dims that are not multiples of 16 or above 256, empty sizes, more rows or splits than a CUDA grid takes.
    """
    sizes = check.decode_attention(
        q, k, v, lengths, scale=scale, window=window, sinks=sinks, softcap=softcap, page_table=page_table,
        k_scale=k_scale, v_scale=v_scale, chunk=chunk, out_dtype=out_dtype, alibi=alibi,
    )  # fmt: skip
    limits.need(k_scale is None, "k_scale is given; the kernel reads float16 and bfloat16 caches only")
    if page_table is not None:
        sizes |= dict(S=sizes["P"] * sizes["page"])
    check.length_values(lengths, sizes["S"])
    limits.halves("q", q.dtype, out_dtype)
    axis = "page" if "page" in sizes else "S"
    limits.slots("k", axis, sizes[axis])
    limits.width("q", "H", sizes["H"], 16, 256)
    limits.width("v", "V", sizes["V"], 16, 256)
    limits.grid("q", "B", {axis: sizes[axis] for axis in "BTNS"})
    options = dict(scale=scale, window=window, softcap=softcap, chunk=chunk, biased=alibi is not None)
    facts = make_facts(sizes, q.dtype, out_dtype, **options)
    return run(q, k, v, lengths, page_table, sinks, facts, alibi if alibi is None else alibi.astype(jnp.float32))


@dataclass(frozen=True, kw_only=True)
class KvFacts(Facts):
    """Everything static about one call over K and V apart."""

    K: int
    H: int
    softcap: float | None
    biased: bool = False  # by ALiBi

    @property
    def unit(self):
        return 1.0 if self.biased or self.softcap is not None else super().unit

    @property
    def width(self):
        """Value columns of the accumulator, whose M is a multiple of 64; TMA fills the ones past V with zeros."""
        return -(-self.V // 64) * 64


def make_facts(sizes, dtype, out_dtype, *, scale, window=None, softcap=None, chunk=None, biased=False,
               config=None) -> KvFacts:  # fmt: skip
    """The plan of a call: query boxes of a program, tiles and splits. `config` overrides the table (for tuning)."""
    B, T, S, N, K, H, V = (sizes[x] for x in "BTSNKHV")
    heads, units = boxes_of(N // K)
    width = -(-V // 64) * 64
    most = (64 if width <= 128 else 32) // BOX  # accumulators of at most 64 registers a thread
    row_blocks = -(-T * units // most)
    boxes = -(-T * units // row_blocks)
    shape = H, width, BOX * boxes

    def model(config, tiles):
        return fill_splits(B * K * row_blocks, tiles, programs_per_sm(config, *shape))

    key = str(dtype), H, V, T * N // K, B * K
    plan = walk("decode_attention", key, default_config(*shape), model, S=S, T=T, window=window, chunk=chunk,
                config=config)  # fmt: skip
    return KvFacts(**plan, T=T, K=K, H=H, V=V, heads=heads, units=units, boxes=boxes, page=sizes.get("page"),
                   softcap=softcap and float(softcap), biased=biased, scale=float(scale), final=chunk is None,
                   out_dtype=jnp.dtype(out_dtype or dtype))  # fmt: skip


@functools.partial(jax.jit, static_argnames="facts")
def run(q, k, v, lengths, page_table, sinks, facts, alibi=None):
    """The decode kernel, and the merge kernel when there are splits. Reshapes only relabel; nothing is moved."""
    f, (B, T, N, _) = facts, q.shape
    operands = dict(
        q=q.reshape(B, T, -1, f.heads, f.H), k=k, v=v, lengths=lengths, pages=page_table,
        sinks=sinks if f.alone else None, alibi=alibi,
    )  # fmt: skip
    copies, body = f.block // f.piece, two_warpgroups(consume, copy_in)
    return launch_kv(body, f, operands, (B, T, N), sinks, copies, "decode_attention")


def launch_kv(body, f, operands, sizes, sinks, copies, name, **more):
    """The kernel `body` over K and V apart, and the merge of its splits. sizes: B, T, N; copies: of one tile."""
    (B, T, _), dtype, heads = sizes, operands["q"].dtype, operands["q"].shape[:-1]
    scratch = dict(
        k=ring.lane(f, (f.block, f.H), dtype, copies=copies),
        v=ring.lane(f, (f.block, f.width), dtype, copies=copies, swizzle=f.V),
        q_s=plgpu.SMEM((f.rows, f.H), dtype, transforms=swizzled(f.H, 2)),
        p_s=plgpu.SMEM((f.rows, f.block), dtype, transforms=swizzled(f.V, 2)),
        out_s=plgpu.SMEM((f.rows, f.width), f.part_dtype),
        row_s=plgpu.SMEM((f.rows,), jnp.float32),
        q_full=plgpu.Barrier(num_arrivals=f.boxes),
    )
    grid = B if "lists" not in operands else B * T, f.splits, f.K * f.row_blocks
    columns = f.V if f.alone else f.width
    out, lse = launch_programs(body, f, operands, f.outputs(heads, columns), scratch | more, grid, name)
    return merged(f, out, lse, sizes, sinks)


def copy_in(f, where, given, *, k, v, q_s, q_full, **_):
    """Copy the query boxes once, then the pieces of K and V tiles into the ring."""
    load_boxes(where, q_full, (given["q"], q_s))

    def fetch(i, slot, reuse):
        # Before the waits, so that page numbers and lists load while the slot is still in use.
        pieces = where.pieces(i)
        for lane, cache in ((k, given["k"]), (v, given["v"])):
            reuse(lambda free=lane.free: free.at[slot])
            for j, (row, keys, *_) in enumerate(pieces):
                box = cache.at[row, keys, where.kv, pl.ds(0, lane.tiles.shape[-1])]
                plgpu.copy_gmem_to_smem(box, lane.tiles.at[slot, pl.ds(j * f.piece, f.piece)], lane.full.at[slot])

    ring.fill(f, where.steps, fetch, k, v)


def consume(f, where, out, lse, *, k, v, q_s, p_s, q_full, **smem):
    """O^T [width, rows] of the tiles of a program, and its rows of out and lse."""
    result = f.width, f.rows
    slopes = load_heads(where, where.alibi, smem["row_s"]) if f.biased else None
    plgpu.barrier_wait(q_full)

    def scores(at, seen):
        slot, tile = at
        plgpu.barrier_wait(k.full.at[slot])
        x = matmul(k.tiles.at[slot], q_s.transpose((1, 0)), (f.block, f.rows))
        plgpu.barrier_arrive(k.free.at[slot])
        visible, x = seen(), _scores(f, x)
        if f.biased:
            x = _biased(where, x, slopes, (where.first + tile) * f.block)
        return jnp.where(visible, x, -jnp.inf)

    def values(at):
        plgpu.barrier_wait(v.full.at[at[0]])
        return v.tiles.at[at[0]]

    def add(at, acc, shrink):
        slot, _ = at
        more = matmul(v.tiles.at[slot].transpose((1, 0)), p_s.transpose((1, 0)), result)
        plgpu.barrier_arrive(v.free.at[slot])
        return acc * spread(shrink, result, 1) + more

    carry = softmax.attend(where, p_s, result, lambda i: (ring.slot_of(f, i), i), scores, values, add)
    _finish(where, *carry, out, lse, **smem)


def _scores(f, x):
    """Products as scores. Capped, they are logits: tanh by exp2, as the hardware's has only 11 bits; where
    1 - 2 / (e + 1) would cancel, by its series, which is exact to float32 there, and without the cap as a factor, whose
    quotient may be 0.
    """
    if f.softcap is None:
        return x * f.scale if f.biased else f.signed(x)
    y = x * min(f.scale / f.softcap, softmax.LARGEST)
    square = y * y
    small = x * f.scale * (1 + square * (square * (2 / 15) - 1 / 3))
    return jnp.where(square < 0.0625**2, small, f.softcap * (1 - 2 / (softmax.power(y, 2) + 1)))


def _biased(where, x, slopes, start):
    """Logits [block, rows] of the tile at `start`, with the biases of ALiBi."""
    key, limit = where.keys_and_limits(start)
    return x + spread(slopes, x.shape, 1) * (key - (limit - 1)).astype(jnp.float32)


def _finish(where, acc, top, mass, out, lse, *, out_s, row_s):
    """Store out and lse: the split's, or the final ones when it is the only split."""
    acc, top, mass = softmax.finish(where, acc, top, mass, 1, row_s)
    out_s.transpose((1, 0))[...] = plgpu.layout_cast(acc, TILE_T).astype(out_s.dtype)
    row_s[...] = softmax.natural_lse(top, mass)
    plgpu.commit_smem()
    total = out.shape[-1]
    # Copies no wider than a tile that divides V: out_s has one layout, and it is inferred from these slices.
    columns = total if total % 64 == 0 else math.gcd(total, 64)

    def store(j, t, unit):
        for column in range(0, total, columns):
            part = pl.ds(column, columns)
            box = out.at[where.split, where.b, t, unit, pl.ds(0, BOX), part]
            plgpu.copy_smem_to_gmem(out_s.at[pl.ds(j * BOX, BOX), part], box)

    where.each_box(store)
    store_rows(where, lambda row: row_s[row], lse)
    plgpu.wait_smem_to_gmem(0)


TUNABLE = Tunable(
    op="decode_attention", letters="HV", arrays=("BTNH", "BSKH", "BSKV"), make_facts=make_facts, run=run,
    shapes=(
        (128, 128, 1, 32, 8, 1024), (128, 128, 1, 32, 8, 4096), (128, 128, 1, 32, 8, 131072),
        (128, 128, 8, 32, 8, 32768), (128, 128, 16, 32, 8, 1024), (128, 128, 64, 32, 8, 8192),
        (128, 128, 128, 32, 8, 2048), (128, 128, 256, 32, 8, 512), (128, 128, 16, 32, 32, 8192),
        (128, 128, 64, 8, 1, 32768), (64, 64, 64, 64, 8, 8192), (256, 256, 16, 8, 4, 8192),
        (192, 128, 16, 16, 16, 8192),
    ),
    candidates=tuple(Config(block, stages) for block, stages in itertools.product((64, 128), (2, 3, 4, 6))),
    splits=lambda modelled: (1, 2, 4, 8, 16, 24, 32, 48, 64), finalists=2,
)  # fmt: skip
