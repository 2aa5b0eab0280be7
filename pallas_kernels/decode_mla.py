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
from dataclasses import dataclass

import jax

from jforge.ops import check
from pallas_kernels import decode_mla_few, decode_mla_many, limits
from pallas_kernels.compat import jnp, plgpu, swizzled
from pallas_kernels.merge_states import merged
from pallas_kernels.plan import RESERVED, Config, Tunable, card, fill_splits, walk
from pallas_kernels.tiles import BOX, Facts, boxes_of, launch_programs

ROPE = 64  # columns of a rope tile
FEW, MANY = 32, 64  # query rows of a program of the two kernels


def decode_mla(q_latent, q_rope, latent, k_rope, lengths, *, scale, window=None, sinks=None, page_table=None,
               latent_scale=None, chunk=None, out_dtype=None):  # fmt: skip
    """out_t = sum_s softmax_s(scale * (q_latent_t . latent_s + q_rope_t . k_rope_s)) latent_s

    over s < lengths[b]-T+t+1, the last `window` of them.

    q_latent: B T N C, q_rope: B T N R, latent: B S C, k_rope: B S R (or pools `pages page C`, `pages page R` with
    page_table: int32 B P) in float16 or bfloat16, lengths: int32 B, sinks: N. Returns out B T N C in `out_dtype`
    (default q_latent's) and float32 lse B T N. Everything means what it means in jforge.ops.decode_mla; splits and
    `chunk` are as in decode_attention.py.

    Raises ValueError and TypeError from jforge.ops.check, and NotImplementedError for what has no kernel: float32 and
    float64, latent_scale, empty sizes, more rows or splits than a CUDA grid takes, S or a page that is not a multiple
    of 8 (TMA), C that is not a multiple of 64 or above 512, R that is not a multiple of 8 or above 64. Absorbed latent
    attention is from DeepSeek-V2 (arXiv 2405.04434).
    """
    sizes = check.decode_mla(
        q_latent, q_rope, latent, k_rope, lengths, scale=scale, window=window, sinks=sinks, page_table=page_table,
        latent_scale=latent_scale, chunk=chunk, out_dtype=out_dtype,
    )  # fmt: skip
    refuse_scale(latent_scale)
    if page_table is not None:
        sizes |= dict(S=sizes["P"] * sizes["page"])
    check.length_values(lengths, sizes["S"])
    limits.halves("q_latent", q_latent.dtype, out_dtype)
    axis = "page" if "page" in sizes else "S"
    limits.slots("latent", axis, sizes[axis])
    limits.width("latent", "C", sizes["C"], 64, 512)
    limits.width("k_rope", "R", sizes["R"], 8, ROPE)
    limits.grid("q_latent", "B", {axis: sizes[axis] for axis in "BTNS"})
    facts = make_facts(sizes, q_latent.dtype, out_dtype, scale=scale, window=window, chunk=chunk)
    return run(q_latent, q_rope, latent, k_rope, lengths, page_table, sinks, facts)


def refuse_scale(latent_scale) -> None:
    limits.need(latent_scale is None, "latent_scale is given; the kernel reads float16 and bfloat16 latents only")


@dataclass(frozen=True, kw_only=True)
class LatentFacts(Facts):
    """Everything static about one call over keys that are the values."""

    N: int
    R: int
    many: bool  # which kernel
    rope: int = ROPE

    @property
    def C(self):
        """Latent channels, which are the value columns."""
        return self.V

    @property
    def kernel(self):
        """The module of the kernel: its scratch, producer and consumers."""
        return decode_mla_many if self.many else decode_mla_few


def default_config(C, rows) -> Config:
    """The deepest ring that fits, in pairs of tiles: a tile belongs to one of two warpgroups."""
    tile, fixed = 2 * 64 * (C + ROPE), RESERVED + 2 * rows * (C + ROPE) + (0 if rows == MANY else rows * 640)
    return Config(64, 4 if fixed + 4 * tile <= card().smem else 2)


def make_facts(sizes, dtype, out_dtype, *, scale, window=None, chunk=None, config=None, op="decode_mla",
               together=True) -> LatentFacts:  # fmt: skip
    """The plan of a call: kernel, query boxes of a program, ring and splits. `config` overrides the table of `op`.

    together: whether blocks of 64 query rows may be partly filled.
    """
    B, T, S, N, C, R = (sizes[x] for x in "BTSNCR")
    out_dtype = jnp.dtype(out_dtype or dtype)
    heads, units = boxes_of(N)
    total = T * units
    many = total > FEW // BOX and heads == BOX and C % 128 == 0 and (together or N % MANY == 0)
    row_blocks = -(-total // ((MANY if many else FEW) // BOX))
    boxes = MANY // BOX if many else -(-total // row_blocks)

    def model(config, tiles):
        return fill_splits(B * row_blocks, tiles, part=BOX * boxes / 16)

    key = str(dtype), C, R, T * N, B
    plan = walk(op, key, default_config(C, BOX * boxes), model, S=S, T=T, window=window, chunk=chunk, config=config)
    # The kernel of many rows stores what is not 16 bits wide in whole blocks of 64 rows.
    final = chunk is None and (not many or T * N % MANY == 0 or out_dtype == dtype)
    return LatentFacts(**plan, T=T, N=N, V=C, R=R, heads=heads, units=units, boxes=boxes, many=many, scale=float(scale),
                       page=sizes.get("page"), final=final, out_dtype=out_dtype)  # fmt: skip


@functools.partial(jax.jit, static_argnames="facts")
def run(q_latent, q_rope, latent, k_rope, lengths, page_table, sinks, facts):
    """The decode kernel, and the merge kernel when there are splits. Reshapes only relabel; nothing is moved."""
    f, (B, T, N, C) = facts, q_latent.shape
    boxes = (B, T * N) if f.many else (B, T, f.units, f.heads)
    operands = dict(
        q_latent=q_latent.reshape(*boxes, C), q_rope=q_rope.reshape(*boxes, -1), latent=latent, k_rope=k_rope,
        lengths=lengths, pages=page_table, sinks=sinks if f.alone else None,
    )  # fmt: skip
    copies = f.block // f.piece * (1 if f.many else 2)
    out, lse = launch_latent(f.kernel.kernel, f, operands, boxes, copies, (B, f.splits, f.row_blocks), "decode_mla")
    return merged(f, out, lse, (B, T, N), sinks)


def launch_latent(body, f, operands, boxes, copies, grid, name, **more):
    """out and lse by split: [splits, *boxes, ...]; parts of the kernel of many rows fill whole blocks of 64 rows.

    copies: of one part of a tile; more: scratch.
    """
    rows = (boxes[0], f.row_blocks * f.rows) if f.many and not f.alone else boxes
    tiles = swizzled(64, 2)
    dtype = operands["q_latent"].dtype
    scratch = dict(
        ql_s=plgpu.SMEM((1, f.rows, f.C), dtype, transforms=tiles),
        qr_s=plgpu.SMEM((1, f.rows, f.rope), dtype, transforms=tiles),
        r_s=plgpu.SMEM((f.stages, f.block, f.rope), dtype, transforms=tiles),
    )
    scratch |= f.kernel.scratch(f, dtype, copies) | more
    name, warpgroups = (f"{name}_many", 3) if f.many else (f"{name}_few", 2)
    return launch_programs(body, f, operands, f.outputs(rows, f.C), scratch, grid, name, warpgroups=warpgroups)


TUNABLE = Tunable(
    op="decode_mla", letters="CR", arrays=("BTNC", "BTNR", "BSC", "BSR"), make_facts=make_facts, run=run,
    shapes=(
        (512, 64, 128, 16, 1, 4096), (512, 64, 128, 128, 1, 4096), (512, 64, 16, 128, 1, 16384),
        (512, 64, 64, 64, 1, 8192), (512, 64, 1, 128, 1, 131072),
    ),
    candidates=(Config(64, 2),),  # no other tile fits beside its own exchange; what is left to measure is the splits
    splits=lambda modelled: sorted({max(1, modelled // 2), modelled * 2} - {modelled}), finalists=1,
)  # fmt: skip
