# %% [markdown]
# # 16B. A kernel for the delta rule
#
# Notebook 16A ends with a cost: a decode step of Gated DeltaNet or KDA reads the states of all heads and writes them
# back. For a token t and one head, with the state S before it:
#
#     S <- decay S        u = beta (v - S^T k)        S <- S + k u^T        out = S^T q
#
# 11B has a kernel for the same without the delta rule, and its columns and sectors. Here the state is *read before it
# is written*, and that brings three questions: which numbers need which others, how often the state has to be loaded,
# and where threads wait for each other.
#
# Letters: B rows, N heads, H key channels, V value channels; a state is H x V; decay has a factor for each key channel
# (a single gate is the same factor H times), beta is one number a row and head.
#
# Words of 01B and 05B: a kernel runs in many copies, the *programs*, each on an *SM*, one of the card's processors. A
# program loads *tiles* from global memory into the *registers* of its threads and stores results back. *Shared memory*
# is a small memory on the SM; what threads tell each other goes through it.

# %%
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from beartype import beartype
from jaxtyping import Float, jaxtyped

from jforge.harness.backends import BACKENDS, for_programs_that_run_once

for_programs_that_run_once()  # before JAX starts: threads for Mosaic's interpreter, where there is no GPU
pallas_kernels, triton_kernels = BACKENDS["pallas"].ops, BACKENDS["triton"].ops
device = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU Triton's kernels run in its interpreter
torch.set_default_device(device)

import triton
import triton.language as tl

import jforge
from jforge.core import compare
from jforge.lessons import exercise, plots, reveal, traffic
from pallas_kernels import compat
from pallas_kernels.device import DEVICES

h100 = next(device for device in DEVICES if device.name == "H100")
launch = triton_kernels.runtime.launch  # kernel[grid](*arguments), without NumPy's warnings in the interpreter

# %% [markdown]
# ## The step, one operation after the other
#
# In float64, row by row and head by head, is what the kernels must equal. H = 96 is Olmo-Hybrid's, and no power of two.

# %%
B, N, H, V = 2, 3, 96, 64
torch.manual_seed(0)


def drawn(*shape):
    return torch.randn(*shape, device="cpu").to(device)  # the same numbers on every device


def uniform(*shape):
    return torch.rand(*shape, device="cpu").to(device)


q, k, v = drawn(B, N, H), drawn(B, N, H), drawn(B, N, V)
k = k / torch.linalg.norm(k, dim=-1, keepdim=True)  # keys of length 1, as the delta rule wants them
state, decay, beta = drawn(B, N, H, V), 0.5 + uniform(B, N, H) / 2, uniform(B, N)
given = q, k, v, state, decay, beta


@jaxtyped(typechecker=beartype)
def reference(
    q: Float[torch.Tensor, "B N H"], k: Float[torch.Tensor, "B N H"], v: Float[torch.Tensor, "B N V"],
    state: Float[torch.Tensor, "B N H V"], decay: Float[torch.Tensor, "B N H"], beta: Float[torch.Tensor, "B N"],
) -> tuple[Float[torch.Tensor, "B N V"], Float[torch.Tensor, "B N H V"]]:  # fmt: skip
    q, k, v, state, decay, beta = (a.double() for a in (q, k, v, state, decay, beta))
    out, after = torch.zeros_like(v), torch.zeros_like(state)
    for b in range(len(q)):
        for n in range(q.shape[1]):
            faded = decay[b, n][:, None] * state[b, n]  # reads the state, writes another
            u = beta[b, n] * (v[b, n] - faded.T @ k[b, n])  # reads one
            added = torch.outer(k[b, n], u)  # writes a third
            after[b, n] = faded + added  # reads two, writes one
            out[b, n] = after[b, n].T @ q[b, n]  # reads one
    return out, after


want, want_state = reference(*given)


def close(a, b=want):
    return compare.relative(a, b) <= compare.OUT["float32"]


whole = state.numel() * 4
print(f"the states: {whole:,} bytes; moved by the operations: {8 * whole:,}; needed: {2 * whole:,}")

# %% [markdown]
# Five reads and three writes of something as large as the state; one of each is needed, since every number of the state
# changes in every step.
#
# ## What a number needs
#
# With a sum, a number of the new state needs the same number of the old one and no other. With the delta rule it needs
# more: u_c is made from S^T k. Change one number of the old state and see which numbers of the new one are others:

# %%


def changed(beta):
    """The numbers of a head's new state that are others once row 20, column 10 of the old one is another."""
    poked = state.clone()
    poked[..., 20, 10] += 1
    *vectors, factor, one, other = (jnp.asarray(a[:1, :1].cpu().numpy()) for a in (q, k, v, decay, state, poked))
    one, other = (jforge.ops.decode_linear(*vectors, a, factor, beta=beta)[1] for a in (one, other))
    return np.asarray(one != other)[0, 0]


plt = plots()
figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
for ax, (name, strength) in zip(axes, (("sum", None), ("delta rule", jnp.ones((1, 1)))), strict=True):
    spots = changed(strength)
    ax.pcolormesh(spots, cmap=plt.matplotlib.colors.ListedColormap(["#dddddd", "#0072b2"]))
    ax.set(title=f"{name}: {spots.sum()} changed", xlabel="value channel", ylim=(H, 0))
axes[0].set_ylabel("key channel")
plt.show()

# %% [markdown]
# A whole column, and still no other column. So a program that owns *columns* of one state can do all of it alone: it
# loads its H x COLUMNS numbers once, keeps them in registers, asks what they answer for k, changes them, and stores
# them where they were. The question costs arithmetic and no byte.
#
# ## One pass
#
# The columns are summed over H twice, for S^T k and for S^T q. In the equations the second sum comes after the write.
# It need not. The new state is S + k u^T, so
#
#     out = (S + k u^T)^T q = S^T q + (k . q) u
#
# with the decayed S on the right: both sums are of the same numbers, before the write. EARLY chooses.


# %%
@triton.jit
def delta_kernel(q, k, v, state, decay, beta, out, V, H: tl.constexpr, H_PAD: tl.constexpr,
                 COLUMNS: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    head = tl.program_id(1)  # of B N
    h, c = tl.arange(0, H_PAD), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row, column = h < H, c < V
    mask = row[:, None] & column[None, :]
    places = state + head * H * V + h[:, None] * V + c[None, :]
    s = tl.load(places, mask=mask, other=0.0)
    s = s * tl.load(decay + head * H + h, mask=row, other=0.0)[:, None]
    k_row = tl.load(k + head * H + h, mask=row, other=0.0)
    q_row = tl.load(q + head * H + h, mask=row, other=0.0)
    u = tl.load(v + head * V + c, mask=column, other=0.0)
    u = tl.load(beta + head) * (u - tl.sum(s * k_row[:, None], 0))
    if EARLY:
        o = tl.sum(s * q_row[:, None], 0) + tl.sum(k_row * q_row, 0) * u
    s = s + k_row[:, None] * u[None, :]
    tl.store(places, s, mask=mask)
    if not EARLY:
        o = tl.sum(s * q_row[:, None], 0)
    tl.store(out + head * V + c, o, mask=column)


def step(q, k, v, state, decay, beta, columns=16, early=True):
    """The outputs; state is overwritten."""
    B, N, H, V = state.shape
    out = torch.empty(B, N, V)
    grid = triton.cdiv(V, columns), B * N
    sizes = {"H": H, "H_PAD": triton.next_power_of_2(H), "COLUMNS": columns, "EARLY": early}
    launch(delta_kernel, grid, q, k, v, state, decay, beta, out, V, **sizes)
    return out


for columns, early in ((16, False), (16, True), (64, True)):
    after = state.clone()
    out = step(q, k, v, after, decay, beta, columns, early)
    print(f"{columns} columns, both sums early {early!s:5}: output {close(out)}, state {close(after, want_state)}")

# %% [markdown]
# (Where torch sees no GPU, Triton's *interpreter* ran this: results can be trusted, times mean nothing.)
#
# Why early? A tile of 96 x 16 numbers lies in the registers of many threads, each with some rows. For a sum over the
# rows they leave their parts in shared memory and wait until all are there. With the second sum after the write they
# wait for u, change the tile, and wait once more. With both before it neither sum needs the other, and after the write
# nobody waits for anybody.
#
# `tl.arange` wants a power of two, so the tile is 128 rows high and the mask leaves out 32 of them. They are not
# loaded; they do take registers.
#
# ## Loads and stores
#
# The interpreter asks a method for each load and store. With the addresses written down (`traffic`, with a GPU too), we
# can say what a step moves and who moves it:

# %%


def inside(addresses, tensor):
    """Byte offsets of those addresses that lie in a tensor."""
    at = addresses - tensor.data_ptr()
    return at[(at >= 0) & (at < tensor.numel() * tensor.element_size())]


def moved(run, tensor):
    """[what is loaded, what is stored] of a tensor inside run(), as lists of (program, number of the tensor)."""
    with traffic() as sides:
        run()
    return [[(program, at // 4) for program, addresses in side for at in inside(addresses, tensor)] for side in sides]


after = state.clone()
loads, stores = moved(lambda: step(q, k, v, after, decay, beta), after)
att = jforge.get("gated_deltanet")
cost = att.cost(
    att.Config(
        hidden_size=32, linear_num_key_heads=N, linear_num_value_heads=N, linear_key_head_dim=H, linear_value_head_dim=V
    ),
    context=1000,
    batch=B,
)
print(f"state: loaded {4 * len(loads):,} bytes, cost {cost.read['state']:,}; ", end="")
print(f"stored {4 * len(stores):,}, cost {cost.written['state']:,}")
print("each number once, by one program:", len({at for _, at in loads}) == len(loads) == state.numel())
print("stored by the program that loaded it:", set(loads) == set(stores))

# %% [markdown]
# The last line is what makes *in place* safe. No program loads a number that another one stores, so it does not matter
# who runs first. Two tokens after each other in the same memory:

# %%
after = state.clone()
first, second = step(q, k, v, after, decay, beta), step(k, q, v, after, decay, beta)
middle, middle_state = reference(q, k, v, state, decay, beta)
last, last_state = reference(k, q, v, middle_state, decay, beta)
print("two tokens:", close(first, middle), close(second, last), close(after, last_state))
rows, layers = 64, 36
qwen = att.models["Qwen3-Next-80B-A3B"]
size = layers * att.cost(qwen, context=1, batch=rows).stored["state"]
print(f"a second buffer for {rows} rows of Qwen3-Next's {layers} layers would be {size / 2**30:.1f} GiB")

# %% [markdown]
# ## And by rows?
#
# A program could own ROWS key channels and all columns. Then S^T k is a sum over programs, and none may write before
# all have summed. Programs of one kernel do not wait for each other, since some of them may not have begun. So it takes
# two kernels: one leaves each program's part of the two sums, one writes.


# %%
@triton.jit
def sums_kernel(q, k, state, decay, parts, H, V: tl.constexpr, ROWS: tl.constexpr):
    part, head = tl.program_id(0), tl.program_id(1)
    h, c = part * ROWS + tl.arange(0, ROWS), tl.arange(0, V)
    s = tl.load(state + head * H * V + h[:, None] * V + c[None, :])
    s = s * tl.load(decay + head * H + h)[:, None]
    for_k = tl.sum(s * tl.load(k + head * H + h)[:, None], 0)
    for_q = tl.sum(s * tl.load(q + head * H + h)[:, None], 0)
    place = parts + (head * tl.num_programs(0) + part) * 2 * V + c
    tl.store(place, for_k)
    tl.store(place + V, for_q)


@triton.jit
def write_kernel(k, u, state, decay, H, V: tl.constexpr, ROWS: tl.constexpr):
    part, head = tl.program_id(0), tl.program_id(1)
    h, c = part * ROWS + tl.arange(0, ROWS), tl.arange(0, V)
    places = state + head * H * V + h[:, None] * V + c[None, :]
    s = tl.load(places) * tl.load(decay + head * H + h)[:, None]
    s = s + tl.load(k + head * H + h)[:, None] * tl.load(u + head * V + c)[None, :]
    tl.store(places, s)


def by_rows(state, rows=32):
    parts = torch.empty(B * N, H // rows, 2, V)
    grid = H // rows, B * N
    launch(sums_kernel, grid, q, k, state, decay, parts, H, V=V, ROWS=rows)
    for_k, for_q = parts.sum(1).unflatten(0, (B, N)).unbind(2)
    u = beta[..., None] * (v - for_k)
    launch(write_kernel, grid, k, u, state, decay, H, V=V, ROWS=rows)
    return for_q + (k * q).sum(-1, keepdim=True) * u


after = state.clone()
print("by rows: output", close(by_rows(after)), "state", close(after, want_state))

# %% [markdown]
# Predict: how many times the bytes of the state does it move that the kernel by columns moves? (Loads and stores of the
# state alone.)

# %% tags=["predict"]
guess = None

# %%
after = state.clone()
loads, stores = moved(lambda: by_rows(after), after)
reveal((len(loads) + len(stores)) * 4 / (2 * whole), guess)

# %% [markdown]
# The sums are of the whole state and come before the first write, so each number is loaded twice and stored once. (The
# parts of the sums come on top; exercise 4 counts them.)
#
# ## Memory-bound
#
# A step does seven operations for each number of the state: one for the decay, two each for S^T k, for k u^T with its
# sum, and for S^T q. It moves eight bytes for them. An H100 moves `h100.bandwidth` GB/s and does 67e12 operations a
# second on float32 outside of its matrix units (data sheet).

# %%
peak = 67e12
numbers = rows * qwen.linear_num_value_heads * qwen.linear_key_head_dim * qwen.linear_value_head_dim
memory, arithmetic = 8 * numbers / (h100.bandwidth * 1e9), 7 * numbers / peak
print(f"a layer of Qwen3-Next, {rows} rows: {8 * numbers / 2**20:.0f} MiB moved, {7 * numbers / 1e6:,.0f}e6 operations")
print(f"memory {memory * 1e6:.0f} us, arithmetic {arithmetic * 1e6:.1f} us: {arithmetic / memory:.0%} of it")

# %% [markdown]
# The arithmetic could take 20 times as long and would still hide behind the memory. The *copy floor* is the fair aim:
# the time of a kernel that does nothing but copy the state, since it too reads all and writes all.
#
# To reach it, much must be under way at once. A program waits for its tile, and only other programs on the SM fill that
# time. With 64 rows there are thousands. With one row there are 32 heads for 132 SMs; narrower tiles make more
# programs, down to 8 columns, the 32 bytes of a memory sector (11B). What the package takes:

# %%
from triton_kernels.decode_linear import PROGRAMS, default_linear_config

print(f"it wants at least {PROGRAMS} programs, two for each SM")
for rows in (1, 2, 4, 8, 64):
    plan = default_linear_config(128, 128, rows * 32, True)
    programs = rows * 32 * (128 // plan.block_v)
    threads, states = 32 * plan.num_warps, programs * plan.block_v * 128 * 4 / 2**20
    print(
        f"{rows:>2} rows, {states:>3.0f} MiB: {plan.block_v:>2} columns, {threads:>3} threads, {programs:>5,} programs"
    )

# %% [markdown]
# ## In Mosaic GPU
#
# *TMA*, the unit that copies boxes while the threads do something else, brings the state in pieces of 64 rows into
# shared memory. A first round over the pieces makes the three sums S^T k, S^T q and k . q, each piece as soon as its
# *barrier* says that it is there. Then u is known, and a second round takes the pieces again, from shared memory and
# not from global memory, changes them, and sends each one back at once.
#
# A vector along the columns (v, u, the sums) has the layout BY_COLUMN, one along the rows (k, q) BY_ROW. In place: JAX
# arrays never change, but a `jax.new_ref` is a piece of memory that a kernel may write to. There is one gate a head.

# %%
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = plgpu.Layout.WGMMA  # which thread holds which number of a 64 x V piece
BY_ROW, BY_COLUMN = TILE.reduce(1), TILE.reduce(0)
PIECE, WIDE = 64, 128  # rows of a piece, and all rows


def spread(vector, axis):
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, (PIECE, V), (axis,)), TILE)


def delta_body(q, k, v, decay, beta, state, out, s_s, q_s, k_s, v_s, out_s, full, rows_full):
    b, n = lax.axis_index("row"), lax.axis_index("head")
    pieces = WIDE // PIECE

    def piece(i):
        return state.at[b, n, pl.ds(i * PIECE, PIECE)]

    def along(vector, i):
        return spread(plgpu.load(vector.at[pl.ds(i * PIECE, PIECE)], layout=BY_ROW), 0)

    def look(i, sums):
        plgpu.barrier_wait(full.at[i])
        s, k_row, q_row = plgpu.load(s_s.at[i], layout=TILE) * decay[b, n], along(k_s, i), along(q_s, i)
        return sums[0] + s * k_row, sums[1] + s * q_row, sums[2] + k_row * q_row

    def write(i, carry):
        s_s.at[i][...] = plgpu.load(s_s.at[i], layout=TILE) * decay[b, n] + along(k_s, i) * spread(u, 1)
        plgpu.commit_smem()  # what threads wrote is seen by TMA only after this
        plgpu.copy_smem_to_gmem(s_s.at[i], piece(i))
        return carry

    for i in range(pieces):
        plgpu.copy_gmem_to_smem(piece(i), s_s.at[i], full.at[i])
    for source, target in ((q, q_s), (k, k_s), (v, v_s)):
        plgpu.copy_gmem_to_smem(source.at[b, n], target, rows_full)
    plgpu.barrier_wait(rows_full)
    zeros = plgpu.layout_cast(jnp.zeros((PIECE, V), jnp.float32), TILE)
    for_k, for_q, met = (x.sum(axis=0) for x in lax.fori_loop(0, pieces, look, (zeros, zeros, zeros)))
    u = beta[b, n] * (plgpu.load(v_s, layout=BY_COLUMN) - for_k)
    out_s[...] = for_q + met * u
    lax.fori_loop(0, pieces, write, None)
    plgpu.copy_smem_to_gmem(out_s, out.at[b, n])
    plgpu.wait_smem_to_gmem(0)


on_gpu = jax.default_backend() == "gpu"
vector = plgpu.SMEM((WIDE,), jnp.float32)
swizzled = plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)  # how a piece lies in the banks of shared memory


def mosaic(interpret):
    return plgpu.kernel(
        delta_body, out_type=jax.ShapeDtypeStruct((B, N, V), jnp.float32), grid=(B, N), grid_names=("row", "head"),
        kernel_name="delta", interpret=interpret,
        scratch_types=[
            plgpu.SMEM((WIDE // PIECE, PIECE, V), jnp.float32, transforms=swizzled), vector, vector,
            plgpu.SMEM((V,), jnp.float32), plgpu.SMEM((V,), jnp.float32), plgpu.Barrier(num_barriers=WIDE // PIECE),
            plgpu.Barrier(num_arrivals=3),
        ],
    )  # fmt: skip


wide_q, wide_k, wide_state = drawn(B, N, WIDE), drawn(B, N, WIDE), drawn(B, N, WIDE, V)
wide_k, gate = wide_k / torch.linalg.norm(wide_k, dim=-1, keepdim=True), 0.5 + uniform(B, N) / 2
every = gate[..., None].expand(B, N, WIDE)
wide_want, wide_after = reference(wide_q, wide_k, v, wide_state, every, beta)
arrays = [jnp.asarray(x.cpu().numpy()) for x in (wide_q, wide_k, v, gate, beta)]
in_place = jax.new_ref(jnp.asarray(wide_state.cpu().numpy()))
found = mosaic(None if on_gpu else plgpu.InterpretGPUParams(detect_races=True))(*arrays, in_place)
print("output", close(found, wide_want), "state", close(jax.freeze(in_place), wide_after), end=" ")
print("a race was seen:", compat.races_found())

# %% [markdown]
# Mosaic's interpreter plays threads, copies and barriers, and looks for *races*, accesses that no barrier orders. It
# plays neither time nor registers. Where JAX has a GPU, the cell compiles this kernel for it instead. Without one it
# can still be lowered to the code that the compiler for an H100 gets. (No GPU has run it yet.)

# %%
with compat.lowering_for_cuda():
    traced = jax.jit(mosaic(None)).trace(*arrays, jax.new_ref(jnp.asarray(wide_state.cpu().numpy())))
    code = traced.lower(lowering_platforms=("cuda",)).as_text()
print("lowered for", h100.kind, "mosaic_gpu" in code)

# %% [markdown]
# ## Against the package
#
# `triton_kernels` has the kernel by columns with both sums early; `pallas_kernels` has the two rounds, 32 rows a piece
# and about 64 columns a program. Both take a factor a head, a row and head, or a channel, and no beta for Mamba-2.

# %%


def to_jax(*tensors):
    return [None if x is None else jnp.asarray(x.cpu().numpy()) for x in tensors]


for name, decays, betas in (
    ("Gated DeltaNet", gate, beta), ("KDA", 0.5 + uniform(B, N, WIDE) / 2, beta), ("Mamba-2", gate, None)
):  # fmt: skip
    exact = jforge.ops.decode_linear(*to_jax(wide_q, wide_k, v, wide_state, decays), beta=to_jax(betas)[0])
    after = wide_state.clone()
    out, same = triton_kernels.decode_linear(wide_q, wide_k, v, after, decays, beta=betas)
    found = pallas_kernels.decode_linear(*to_jax(wide_q, wide_k, v, wide_state, decays), beta=to_jax(betas)[0])
    print(f"{name}: triton {close(out, exact[0])} {close(after, exact[1])}, the same tensor {same is after}; "
          f"pallas {close(found[0], exact[0])} {close(found[1], exact[1])}")  # fmt: skip

# %% [markdown]
# ## Measured
#
# All times of this op in `docs/gpu_runs.jsonl`. `copy` is torch copying the state, where it was measured.

# %%
runs = [json.loads(line) for line in Path("../docs/gpu_runs.jsonl").read_text().splitlines()]
timed = [run for run in runs if run["what"] == "decode_linear" and "median" in run]
ceiling = max(run["GB_per_s"] for run in runs if run["what"] == "ceiling" and run["commit"] == timed[-1]["commit"])
print(f"{timed[-1]['device']}; a kernel that only reads: {ceiling:,.0f} GB/s")
for run in timed:
    rule = "delta rule" if run.get("beta") else "sum"
    print(f"{run['B']:>2} rows x {run['N']:>3} states of {run['H']} x {run.get('V', run['H'])}, {rule}: "
          f"{run['implementation']:6} {run['median']:6.1f} us, {run['GB_per_s'] / ceiling:.0%}")  # fmt: skip

# %% [markdown]
# Bytes are bytes: a kernel that reads and writes as much as a copy cannot be faster than one, and what is left between
# these rows and 100 % is all that a better kernel could win.
#
# ## Exercises
#
# Set the answer, run the two cells. A function is called by the second one.
#
# **1.** Qwen3-Next, 64 rows: how many milliseconds does an H100 (`h100.bandwidth`, in GB/s) need at least for the
# states of all 36 layers in one step? (32 heads, 128 x 128, float32.)

# %%
answer_1 = None

# %% tags=["solution"]
answer_1 = 36 * 64 * 32 * 128 * 128 * 8 / (h100.bandwidth * 1e9) * 1e3

# %%
exercise(1, answer_1, "f86f775bd410")

# %% [markdown]
# **2.** Write `answer_2(q, k, v, state, decay, beta)` for one head in NumPy: the output of the step, V numbers, without
# making the new state. q, k and decay have H numbers, v has V, state is H x V.

# %%
answer_2 = None


# %% tags=["solution"]
def answer_2(q, k, v, state, decay, beta):
    state = decay[:, None] * state
    return state.T @ q + (k @ q) * beta * (v - state.T @ k)


# %%
vectors = np.array([1.0, -1.0, 2.0]), np.array([0.6, 0.0, 0.8]), np.array([1.0, 3.0])
matrix = np.array([[1.0, 2.0], [0.0, -1.0], [4.0, 0.5]])
exercise(2, answer_2, "ac390479e6d8", *vectors, matrix, np.array([0.5, 1.0, 0.25]), 0.5)

# %% [markdown]
# **3.** A kernel takes m tokens of a row at once, as when drafted tokens are checked. It loads and stores the state
# once and does seven operations for each number and token. From which m (a real number) on does the arithmetic of an
# H100 take as long as the memory? (`peak`, `h100.bandwidth`.)

# %%
answer_3 = None

# %% tags=["solution"]
answer_3 = 8 / (h100.bandwidth * 1e9) / (7 / peak)

# %%
exercise(3, answer_3, "030921f11c3b")

# %% [markdown]
# **4.** The kernel by rows with H = V = 128 and ROWS = 32: how many bytes does `sums_kernel` store in `parts` for each
# head?

# %%
answer_4 = None

# %% tags=["solution"]
answer_4 = 128 // 32 * 2 * 128 * 4

# %%
exercise(4, answer_4, "9c0bd8792a6b")
