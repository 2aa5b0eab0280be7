"""One step of linear attention on a matrix state: decay, write, read, in one pass over the state.

A program owns one head of one row of the batch and about 64 value columns of its state: the columns do not depend on
each other. TMA brings the tile in as pieces of 32 key channels, and each piece goes back as soon as it is updated, so
that several tiles of an SM are on their way in both directions. The state is read and written once, in place; the delta
rule, which needs S^T k before it can write, reads the tile a second time from shared memory.

The 4 warps of a program take every fourth key channel, the lanes the value columns; sums over the key channels stay in
the threads until the end of the tile.
"""

import functools
from dataclasses import dataclass

import jax

from jforge.ops import check
from pallas_kernels.compat import jnp, lax, pl, plgpu, swizzled
from pallas_kernels.limits import MOST_ROWS, need
from pallas_kernels.plan import card, planned
from pallas_kernels.tiles import launch_programs

PIECE = 32  # key channels that one TMA copy brings in


def decode_linear(q, k, v, state, decay, *, beta=None):
    """S <- decay S;  u = v, or beta (v - S^T k);  S <- S + k u^T;  out = S^T q, all for one token a row.

    q, k: B N H and v: B N V in float16, bfloat16 or float32; state: float32 B N H V; decay, a factor and not its log:
    float32 N, B N, or B N H for one a key channel; beta: float32 B N, the delta rule. Returns (out B N V in q's dtype,
    state). The state is updated in place where XLA may do so: under a jit that donates it there is no copy of it.

    Raises ValueError and TypeError from jforge.ops.check, and NotImplementedError for what has no kernel: float64, H
    that is not a multiple of 8 or above 256, V that is a multiple of neither 16 nor, below 32, of 8 (TMA), such as
    Mamba's V = 1. Lightning attention is from MiniMax-01 (arXiv 2501.08313), the delta rule from DeltaNet (arXiv
    2102.11174, 2406.06484), a decay for every key channel from KDA (arXiv 2510.26692), Mamba-2 as linear attention from
    arXiv 2405.21060.
    """
    check.decode_linear(q, k, v, state, decay, beta=beta)
    _refuse(q, state, decay, beta)
    return run(q, k, v, state, decay, beta, make_facts(q.shape, state.shape[-1], decay.ndim, beta is not None))


def _refuse(q, state, decay, beta) -> None:
    """NotImplementedError for shapes and dtypes without a kernel."""
    for name, array in dict(q=q, state=state, decay=decay, beta=beta).items():
        wide = array is not None and array.dtype == jnp.float64
        need(not wide, f"{name} has dtype float64; Mosaic GPU kernels compute in float32")
    (B, N, H), V = q.shape, state.shape[-1]
    need(H % 8 == 0 and H <= 256, f"q has H={H}; the kernel takes multiples of 8 up to 256")
    whole = V % 16 == 0 or (V % 8 == 0 and V < 32)
    need(whole, f"v has V={V}; the kernel takes multiples of 16, and of 8 below 32")
    fits = min(B, N, H, V) > 0 and max(B, N) <= MOST_ROWS
    need(fits, f"state has B={B}, N={N}, H={H}, V={V}; none may be 0, B and N at most {MOST_ROWS}")


@dataclass(frozen=True)
class Facts:
    """Everything static about one call."""

    H: int
    V: int
    width: int  # value columns of a program
    decay_axes: int  # of N, B N, B N H
    delta: bool

    @property
    def by_channel(self):
        return self.decay_axes == 3

    @property
    def pieces(self):
        return -(-self.H // PIECE)

    @property
    def tile(self):
        """Register layout of a piece: a warp has one of every 4 key channels, a lane adjacent columns; of columns that
        are no thirty-twos a warp has two channels and 16 at a time.
        """
        if self.width % 32:
            return plgpu.Layout.TILED(plgpu.Tiling(((8, 16), (2, 16), (1,))), (-5,), (-3, -2), -1)
        return plgpu.Layout.TILED(plgpu.Tiling(((4, self.width), (self.width // 32,))), (-3,), (-2,), -1)


def make_facts(shape, V, decay_axes, delta) -> Facts:
    """The plan of a call: the widest tiles of which every SM gets two."""
    B, N, H = shape
    fit = [w for w in (64, 32) if V % w == 0 and B * N * (V // w) >= 2 * card().sms]
    if V > 32 and V % 32:
        fit = [max(w for w in range(16, 128, 16) if V % w == 0)]
    return Facts(H, V, planned("width", lambda: max(fit, default=32)), decay_axes, delta)


@functools.partial(jax.jit, static_argnames="facts")
def run(q, k, v, state, decay, beta, facts):
    """The kernel on a mutable reference to the state, to which XLA gives the donated buffer."""
    f, (B, N, _), dtype = facts, q.shape, q.dtype
    channels = f.pieces * PIECE
    scratch = dict(
        state_s=plgpu.SMEM((f.pieces, PIECE, f.width), jnp.float32, transforms=swizzled(f.width, 4)),
        q_s=plgpu.SMEM((channels,), dtype),
        k_s=plgpu.SMEM((channels,), dtype),
        v_s=plgpu.SMEM((f.width,), dtype),
        out_s=plgpu.SMEM((f.width,), dtype),
        full=plgpu.Barrier(num_barriers=f.pieces),
        rows_full=plgpu.Barrier(num_arrivals=4 if f.by_channel else 3),
    )
    if f.by_channel:
        scratch |= dict(decay_s=plgpu.SMEM((channels,), jnp.float32))
    cell = jax.new_ref(state)
    operands = dict(q=q, k=k, v=v, decay=decay, beta=beta, state=cell)
    out_type, grid = jax.ShapeDtypeStruct((B, N, f.V), dtype), (B, N, -(-f.V // f.width))
    axes = "b", "head", "column"
    out = launch_programs(_kernel, f, operands, out_type, scratch, grid, "decode_linear", axes=axes, warpgroups=None)
    return out, jax.freeze(cell)


def _kernel(f, given, out, *, state_s, q_s, k_s, v_s, out_s, full, rows_full, decay_s=None):
    """One program: the columns of one tile of one head. TMA fills what lies past H and V with zeros, and drops it on
    the way out."""
    at, column = (lax.axis_index("b"), lax.axis_index("head")), lax.axis_index("column") * f.width
    channels, columns = pl.ds(0, k_s.shape[0]), pl.ds(column, f.width)

    def piece(j):
        return given["state"].at[(*at, pl.ds(j * PIECE, PIECE), columns)]

    pl.loop(0, f.pieces)(lambda j: plgpu.copy_gmem_to_smem(piece(j), state_s.at[j], full.at[j]))
    for name, part, to in (("k", channels, k_s), ("q", channels, q_s), ("v", columns, v_s)):
        plgpu.copy_gmem_to_smem(given[name].at[(*at, part)], to, rows_full)
    if f.by_channel:
        plgpu.copy_gmem_to_smem(given["decay"].at[(*at, channels)], decay_s, rows_full)
    factor = None if f.by_channel else given["decay"][at[2 - f.decay_axes :]]
    plgpu.barrier_wait(rows_full)

    def along_channels(row_s, j):
        return _spread(f, plgpu.load(row_s.at[pl.ds(j * PIECE, PIECE)], layout=f.tile.reduce(1)), 0)

    def decayed(j):
        by = along_channels(decay_s, j) if f.by_channel else jnp.full((PIECE, f.width), factor)
        return plgpu.load(state_s.at[j], layout=f.tile) * by

    zeros = plgpu.layout_cast(jnp.zeros((PIECE, f.width), jnp.float32), f.tile)
    u = plgpu.load(v_s, layout=f.tile.reduce(0)).astype(jnp.float32)
    if f.delta:

        def look(j, total):
            plgpu.barrier_wait(full.at[j])
            return total + decayed(j) * along_channels(k_s, j)

        known = lax.fori_loop(0, f.pieces, look, zeros).sum(axis=0)
        u = (u - known) * jnp.full((f.width,), given["beta"][at])
    u = _spread(f, u, 1)

    def write(j, total):
        if not f.delta:
            plgpu.barrier_wait(full.at[j])
        updated = decayed(j) + along_channels(k_s, j) * u
        state_s.at[j][...] = updated
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(state_s.at[j], piece(j))
        return total + updated * along_channels(q_s, j)

    out_s[...] = lax.fori_loop(0, f.pieces, write, zeros).sum(axis=0).astype(out.dtype)
    plgpu.commit_smem()
    # No wider than V: what is not swizzled leaves as plain bytes, past the end of a row too.
    real = min(f.width, f.V)
    plgpu.copy_smem_to_gmem(out_s.at[pl.ds(0, real)], out.at[(*at, pl.ds(column, real))])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _spread(f, vector, axis):
    """Broadcast a vector that lies along `axis` of a piece, as float32."""
    shape = PIECE, f.width
    return plgpu.layout_cast(lax.broadcast_in_dim(vector.astype(jnp.float32), shape, (axis,)), f.tile)
