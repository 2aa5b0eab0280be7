# %% [markdown]
# # 11B. Kernels of a state and of an index: MiniMax
#
# Notebook 11A has the two mechanisms. Their decode steps have two kernels of their own. Lightning attention changes a
# matrix, the *state*, and reads it:
#
#     S <- lambda S + k v^T        out = S^T q
#
# MSA scores blocks of tokens: score_e = the largest q . k_s in block e. Both are short formulas, and both move so many
# bytes for so little arithmetic that only the bytes count. A kernel for them is a question of what is loaded and stored
# how often.
#
# Letters: B rows, N heads, H key channels, V value channels, so a state is H x V; I index heads (one for each key
# head), J channels of an index key, M tokens of a block, S slots of the cache.
#
# Words of 01B and 05B: a kernel runs in many copies, the *programs*, each on an *SM*, one of the card's processors. A
# program loads *tiles* from global memory into the *registers* of its threads and stores results back.

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
# In a framework the formula is four operations. The loop over rows and heads, in float64, is what the kernels must
# equal:

# %%
B, N, H, V = 2, 3, 64, 64
torch.manual_seed(0)


def drawn(*shape):
    return torch.randn(*shape, device="cpu").to(device)  # the same numbers on every device


q, k, v = drawn(B, N, H), drawn(B, N, H), drawn(B, N, V)
state, decay = drawn(B, N, H, V), torch.tensor([0.5, 0.9, 0.99])


@jaxtyped(typechecker=beartype)
def reference(
    q: Float[torch.Tensor, "B N H"], k: Float[torch.Tensor, "B N H"], v: Float[torch.Tensor, "B N V"],
    state: Float[torch.Tensor, "B N H V"], decay: Float[torch.Tensor, "N"],
) -> tuple[Float[np.ndarray, "B N V"], Float[np.ndarray, "B N H V"]]:  # fmt: skip
    out, after = torch.zeros(v.shape, dtype=torch.float64), torch.zeros(state.shape, dtype=torch.float64)
    for b in range(len(q)):
        for n in range(q.shape[1]):
            faded = state[b, n].double() * decay[n].double()  # reads the state, writes another
            added = torch.outer(k[b, n].double(), v[b, n].double())  # writes a third
            after[b, n] = faded + added  # reads two, writes one
            out[b, n] = after[b, n].T @ q[b, n].double()  # reads one
    return out.cpu().numpy(), after.cpu().numpy()


want, want_state = reference(q, k, v, state, decay)


def close(a, b=want):
    return compare.relative(a, b) <= compare.OUT["float32"]


whole = state.numel() * 4
print(f"the states: {whole:,} bytes; moved by the four operations: {7 * whole:,}; needed: {2 * whole:,}")

# %% [markdown]
# The comments count: four reads and three writes of something as large as the state. What is needed is one of each.
# There is nothing to be saved beyond that, since every number of the state changes in every step.
#
# ## One pass
#
# Look at one *column* of the state, the H numbers that belong to value channel c. Its new content needs the old column,
# k and one number of v; its output is the product of the new column with q, one number. No column needs another one. So
# a program takes some columns of one state, COLUMNS of them: loads them, changes them in registers, stores them where
# they were, and has their outputs.
#
# That it stores *in place* is safe for the same reason: nobody else reads these columns.


# %%
@triton.jit
def step_kernel(q, k, v, state, decay, out, N,
                H: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    head = tl.program_id(1)  # of B N
    h, c = tl.arange(0, H), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    places = state + head * H * V + h[:, None] * V + c[None, :]
    s = tl.load(places)
    k_row, q_row = tl.load(k + head * H + h), tl.load(q + head * H + h)
    u = tl.load(v + head * V + c)
    s = s * tl.load(decay + head % N) + k_row[:, None] * u[None, :]
    tl.store(places, s)
    tl.store(out + head * V + c, tl.sum(s * q_row[:, None], 0))


def step(columns):
    out, after = torch.empty(B, N, V), state.clone()
    grid = triton.cdiv(V, columns), B * N
    launch(step_kernel, grid, q, k, v, after, decay, out, N, H=H, V=V, COLUMNS=columns)
    return out, after


for columns in (64, 16):
    out, after = step(columns)
    print(f"{columns} columns a program: output {close(out)}, state {close(after, want_state)}")

# %% [markdown]
# Where torch sees no GPU, Triton's *interpreter* ran this: one program after the other, in NumPy. Its results can be
# trusted here, its times mean nothing, and programs that disturb each other would go unnoticed.
#
# Rows instead of columns would not do: the product S^T q sums over H, so programs with a share of the rows would each
# have a part of every output, and somebody would have to add them.
#
# ## Loads and stores
#
# The interpreter asks a method for each load and store. Writing down the addresses (`traffic`, with a GPU too), we can
# count.


# %%
def inside(addresses, tensor):
    """Byte offsets of those addresses that lie in a tensor."""
    at = addresses - tensor.data_ptr()
    return at[(at >= 0) & (at < tensor.numel() * tensor.element_size())]


def count(columns):
    """(bytes of the state loaded, stored, in sectors that the loads touch, the program of each number of a state)"""
    out, after = torch.empty(B, N, V), state.clone()
    with traffic() as (loads, stores):
        launch(step_kernel, (triton.cdiv(V, columns), B * N), q, k, v, after, decay, out, N, H=H, V=V, COLUMNS=columns)
    owner, sectors = np.full(H * V, -1), 0
    for (program, *_), addresses in loads:
        at = inside(addresses, after)
        sectors += len(np.unique(at // 32))
        owner[at[at < H * V * 4] // 4] = program
    moved = [sum(len(inside(addresses, after)) * 4 for _, addresses in side) for side in (loads, stores)]
    return *moved, sectors * 32, owner.reshape(H, V)


att = jforge.get("lightning")
cost = att.cost(att.Config(hidden_size=N * H, num_attention_heads=N, head_dim=H), context=1000, batch=B)
loaded, stored, _, owner = count(16)
print(f"loaded {loaded:,}, cost {cost.read['state']:,}; stored {stored:,}, cost {cost.written['state']:,}")

# %% [markdown]
# The kernel moves what `cost` counts. How few columns may a program have? Few columns mean many programs, which fill a
# card even if there are few heads. But memory is not read in numbers: it is read in *sectors* of 32 bytes, eight
# float32 side by side. A program that wants part of a sector gets all of it.
#
# Predict: a program has **two** columns. The sectors that all programs load are together how many times the bytes of
# the state?

# %% tags=["predict"]
guess = None

# %%
reveal(count(2)[2] / whole, guess)
for columns in (1, 4, 8, 16, 64):
    print(f"{columns:>2} columns: {V // columns:>2} programs a head, sectors / bytes: {count(columns)[2] / whole:.0f}")

# %%
plt = plots()
figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
for ax, columns in zip(axes, (16, 2), strict=True):
    owner = count(columns)[3]
    ax.pcolormesh(owner % 4, cmap=plt.matplotlib.colors.ListedColormap(["#0072b2", "#e69f00", "#56b4e9", "#d55e00"]))
    for edge in range(0, V + 1, 8):
        ax.axvline(edge, color="white", linewidth=1.5)
    ax.set(
        title=f"{columns} columns a program",
        xlabel="value channel; a line each sector",
        ylim=(H, 0),
        xticks=range(0, 65, 16),
    )
axes[0].set_ylabel("key channel")
plt.show()

# %% [markdown]
# A colour is a program. On the left a program has two whole sectors of each row; on the right four programs share each
# sector, and each of them loads it. (*L2*, the cache that all SMs share, may answer three of the four; the wires to it
# carry all.) The package takes eight columns at least.
#
# ## Why float32
#
# The state could be stored in bfloat16, which has 8 bits for the digits, for half of the bytes. But it is a sum of many
# terms, and each step rounds all of it. A slow head, lambda = 0.9995, after some thousand steps:

# %%
torch.manual_seed(1)
exact, short = torch.zeros(32, 32).double(), torch.zeros(32, 32).bfloat16()
for t in range(1, 4001):
    a, b = drawn(32) + 0.5, drawn(32) + 0.5
    exact = 0.9995 * exact + torch.outer(a, b).double()
    short = (0.9995 * short.float() + torch.outer(a, b)).bfloat16()
    if t in (10, 100, 1000, 4000):
        error = torch.linalg.norm(short.double() - exact) / torch.linalg.norm(exact)
        print(
            f"{t:>5} steps: relative error {error:.3f}, a number that is stored once is off by at most {2**-8 / 2:.3f}"
        )

# %% [markdown]
# Where the sum is large, multiplying by 0.9995 changes less than half of the last digit and is rounded away, and small
# terms are lost. A cache of keys has no such problem: each is rounded once.
#
# ## More rules, the same pass
#
# Other linear attention differs in what is added. The *delta rule* (DeltaNet) first asks the state what it would answer
# for k, and adds only beta times what is missing: u = beta (v - S^T k). That reads the state before it is written.
# Since a program has whole columns in registers, the question costs arithmetic and no byte:


# %%
@triton.jit
def delta_kernel(q, k, v, state, decay, beta, out, N,
                 H: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    head = tl.program_id(1)
    h, c = tl.arange(0, H), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    places = state + head * H * V + h[:, None] * V + c[None, :]
    s = tl.load(places) * tl.load(decay + head % N)
    k_row, q_row = tl.load(k + head * H + h), tl.load(q + head * H + h)
    u = tl.load(v + head * V + c)
    u = tl.load(beta + head) * (u - tl.sum(s * k_row[:, None], 0))
    s = s + k_row[:, None] * u[None, :]
    tl.store(places, s)
    tl.store(out + head * V + c, tl.sum(s * q_row[:, None], 0))


beta, out, after = torch.rand(B, N, device="cpu").to(device), torch.empty(B, N, V), state.clone()
unit = k / torch.linalg.norm(k, dim=-1, keepdim=True)
launch(delta_kernel, (V // 16, B * N), q, unit, v, after, decay, beta, out, N, H=H, V=V, COLUMNS=16)
arrays = [jnp.asarray(x.cpu().numpy()) for x in (q, unit, v, state, decay)]
by_definition = jforge.ops.decode_linear(*arrays, beta=jnp.asarray(beta.cpu().numpy()))
print("delta rule:", *(close(a, np.asarray(b)) for a, b in zip((out, after), by_definition, strict=True)))

# %% [markdown]
# ## In Mosaic GPU
#
# *TMA*, the unit that copies boxes while the threads do something else, works in both directions. The state comes in
# pieces of 64 rows; each piece is changed and sent back while the next one is still on its way. A *barrier* says when a
# piece is there. A vector lies along the rows (k, q) or along the columns (v, out) of the piece.
#
# In place: JAX arrays never change, but a `jax.new_ref` is a piece of memory that a kernel may write to.

# %%
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = plgpu.Layout.WGMMA  # which thread holds which number of a 64 x V piece
BY_ROW, BY_COLUMN = TILE.reduce(1), TILE.reduce(0)
PIECE, WIDE = 64, 128  # rows of a piece, and all rows


def spread(vector, axis):
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, (PIECE, V), (axis,)), TILE)


def step_body(q, k, v, decay, state, out, s_s, q_s, k_s, v_s, out_s, full, rows_full):
    b, n = lax.axis_index("row"), lax.axis_index("head")
    pieces = WIDE // PIECE

    def piece(i):
        return state.at[b, n, pl.ds(i * PIECE, PIECE)]

    def turn(i, total):
        plgpu.barrier_wait(full.at[i])
        k_row, q_row = (plgpu.load(x.at[pl.ds(i * PIECE, PIECE)], layout=BY_ROW) for x in (k_s, q_s))
        s = plgpu.load(s_s.at[i], layout=TILE) * decay[n] + spread(k_row, 0) * u
        s_s.at[i][...] = s
        plgpu.commit_smem()  # what threads wrote is seen by TMA only after this
        plgpu.copy_smem_to_gmem(s_s.at[i], piece(i))
        return total + s * spread(q_row, 0)

    for i in range(pieces):
        plgpu.copy_gmem_to_smem(piece(i), s_s.at[i], full.at[i])
    for source, target in ((q, q_s), (k, k_s), (v, v_s)):
        plgpu.copy_gmem_to_smem(source.at[b, n], target, rows_full)
    plgpu.barrier_wait(rows_full)
    u = spread(plgpu.load(v_s, layout=BY_COLUMN), 1)
    total = plgpu.layout_cast(jnp.zeros((PIECE, V), jnp.float32), TILE)
    out_s[...] = lax.fori_loop(0, pieces, turn, total).sum(axis=0)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_s, out.at[b, n])
    plgpu.wait_smem_to_gmem(0)


on_gpu = jax.default_backend() == "gpu"
vector = plgpu.SMEM((WIDE,), jnp.float32)
swizzled = plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)  # how a piece lies in the banks of shared memory
mosaic_step = plgpu.kernel(
    step_body, out_type=jax.ShapeDtypeStruct((B, N, V), jnp.float32), grid=(B, N), grid_names=("row", "head"),
    kernel_name="linear",
    scratch_types=[
        plgpu.SMEM((WIDE // PIECE, PIECE, V), jnp.float32, transforms=swizzled), vector, vector,
        plgpu.SMEM((V,), jnp.float32), plgpu.SMEM((V,), jnp.float32), plgpu.Barrier(num_barriers=WIDE // PIECE),
        plgpu.Barrier(num_arrivals=3),
    ],
    interpret=None if on_gpu else plgpu.InterpretGPUParams(detect_races=True),
)  # fmt: skip

wide_q, wide_k = drawn(B, N, WIDE), drawn(B, N, WIDE)
wide_state = drawn(B, N, WIDE, V)
wide_want, wide_after = reference(wide_q, wide_k, v, wide_state, decay)
in_place = jax.new_ref(jnp.asarray(wide_state.cpu().numpy()))
found = mosaic_step(*(jnp.asarray(x.cpu().numpy()) for x in (wide_q, wide_k, v, decay)), in_place)
print("output", close(found, wide_want), "state", close(jax.freeze(in_place), wide_after), end=" ")
print("a race was seen:", compat.races_found())

# %% [markdown]
# Mosaic's interpreter plays threads, copies and barriers, and looks for *races*, accesses that no barrier orders. It
# does not play time, nor the number of registers. Where JAX has a GPU, the cell compiles this kernel for it instead.
# (It runs on an NVIDIA H200 as well.)
#
# ## Scores of blocks
#
# The scan of MSA. A program takes tiles of index keys, multiplies them with the I index queries on the matrix unit
# (`tl.dot`, which wants at least 16 of them, so there are empty columns), and keeps of each column the largest product
# of the block. A tile is a block here, M = KEYS; only the last one can be in part. Nothing is written but one number a
# block and head.


# %%
@triton.jit
def block_kernel(q, k, lengths, out, S, BLOCKS, HEADS: tl.constexpr, J: tl.constexpr, M: tl.constexpr,
                 COLUMNS: tl.constexpr):  # fmt: skip
    block, b = tl.program_id(0), tl.program_id(1)
    i, j, s = tl.arange(0, COLUMNS), tl.arange(0, J), block * M + tl.arange(0, M)
    seen = s < tl.load(lengths + b)
    queries = tl.load(q + (b * HEADS + i)[None, :] * J + j[:, None], mask=(i < HEADS)[None, :], other=0.0)
    keys = tl.load(k + (b * S + s)[:, None] * J + j[None, :], mask=seen[:, None], other=0.0)
    x = tl.dot(keys, queries, input_precision="ieee")
    best = tl.max(tl.where(seen[:, None], x, float("-inf")), 0)
    tl.store(out + (b * HEADS + i) * BLOCKS + block, best, mask=i < HEADS)


I, J, M, S = 4, 64, 32, 300
q_index, k_index = drawn(B, I, J).half(), drawn(B, S, J).half()
lengths = torch.tensor([300, 130], dtype=torch.int32)
blocks = triton.cdiv(S, M)
scores = torch.empty(B, I, blocks)
with traffic() as (loads, stores):
    launch(block_kernel, (blocks, B), q_index, k_index, lengths, scores, S, blocks, HEADS=I, J=J, M=M, COLUMNS=16)

exact = torch.einsum("bij,bsj->bis", q_index.double(), k_index.double())
exact = torch.where(torch.arange(S) < lengths[:, None, None], exact, -torch.inf)
exact = torch.nn.functional.pad(exact, (0, -S % M), value=-torch.inf).unflatten(-1, (blocks, M)).amax(-1).cpu().numpy()
print("equal:", compare.worst_row(scores, exact) <= compare.OUT["float16"])

msa = jforge.get("msa")
sizes = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": I, "head_dim": 8, "index_head_dim": J}
of_cost = [msa.cost(msa.Config(**sizes), context=int(n), dtype=jnp.float16).read["k_index"] for n in lengths]
read = 2 * sum(len(inside(addresses, k_index)) for _, addresses in loads)
written = 4 * sum(len(inside(addresses, scores)) for _, addresses in stores)
print(f"index keys: {read:,} bytes, cost {sum(of_cost):,}; scores: {written:,} bytes")

# %% [markdown]
# All index keys are read once, for all I heads, and no more. The scores are little beside them. Compare DSA's scan
# (notebook 09B), which writes a number for every token: here the maximum has made them M / I times fewer, and the top-k
# that follows has as many fewer to look at.
#
# ## Against the package

# %%
after = state.clone()
out, _ = triton_kernels.decode_linear(q, k, v, after, decay)
other, other_state = pallas_kernels.decode_linear(*(jnp.asarray(x.cpu().numpy()) for x in (q, k, v, state, decay)))
print("decode_linear, triton_kernels:", close(out), close(after, want_state), end="; ")
print("pallas_kernels:", close(other), close(other_state, want_state))
pad = -S % 8  # TMA wants a multiple of 8 slots
given = q_index[:, None], torch.nn.functional.pad(k_index, (0, 0, 0, pad)), lengths
theirs = triton_kernels.block_index_scores(*given, block_size=M)[:, 0]
other = pallas_kernels.block_index_scores(*(jnp.asarray(x.cpu().numpy()) for x in given), block_size=M)[:, 0]
print("block_index_scores:", *(compare.worst_row(x, exact) <= compare.OUT["float16"] for x in (theirs, other)))

# %% [markdown]
# ## Measured
#
# From `docs/gpu_runs.jsonl`: 64 rows of MiniMax-Text-01's states (64 heads, 128 x 128), and the scan of MiniMax-M3.

# %%
runs = [json.loads(line) for line in Path("../docs/gpu_runs.jsonl").read_text().splitlines()]
moved = 2 * 64 * 64 * 128 * 128 * 4
print(f"the states, read and written: {moved / 1e6:.0f} MB")
ceilings = {(run["device"], run["commit"]): run["GB_per_s"] for run in runs if run["what"] == "ceiling"}
for card, ceiling in ceilings.items():
    print(f"{card[0]}, commit {card[1]}; a kernel that only reads: {ceiling:.0f} GB/s, {moved / ceiling / 1e3:.0f} us")
    for run in runs:
        scan = run["what"] in ("block_index_scores", "msa step")
        state = run["what"] == "decode_linear" and (run["B"], run["N"]) == (64, 64) and not run["beta"]
        if (scan or state) and (run["device"], run["commit"]) == card and "median" in run:
            print(f"  {run['what']:18} {run['implementation']:6} {run['median']:5.1f} us in {run['kernels']} kernels, "
                  f"{run['of_ceiling']:.0%} of the ceiling")  # fmt: skip

# %% [markdown]
# Both kernels come near the ceiling, and only fewer bytes would make them much faster. The `msa step` is scan, top-k
# and attention over the picked blocks together: small kernels between large ones, and the whole is further from the
# ceiling than its scan.
#
# ## Exercises
#
# Set the answer, run the two cells. A function is called by the second one.
#
# **1.** A step of lightning attention does five operations for each number of the state (fade; product and sum of k
# v^T; product and sum of S^T q). How many flops is that for each byte that is moved, read or written?

# %%
answer_1 = None

# %% tags=["solution"]
answer_1 = 5 / 8

# %%
exercise(1, answer_1, "b8016253edd6")

# %% [markdown]
# **2.** 70 layers of MiniMax-Text-01, 64 rows, 64 heads with 128 x 128 numbers of float32. How many milliseconds does
# an H100 (`h100.bandwidth`, in GB/s) need at least to read and write all states once?

# %%
answer_2 = None

# %% tags=["solution"]
answer_2 = 70 * 64 * 64 * 128 * 128 * 4 * 2 / (h100.bandwidth * 1e9) * 1e3

# %%
exercise(2, answer_2, "7d90b6eb39be")

# %% [markdown]
# **3.** Write `answer_3(q, k, v, state, decay)` for one head in NumPy, q and k of H, v of V, with a decay for each *key
# channel*, H numbers (as in Kimi Linear). Give the output, V numbers.

# %%
answer_3 = None


# %% tags=["solution"]
def answer_3(q, k, v, state, decay):
    return (decay[:, None] * state + np.outer(k, v)).T @ q


# %%
given = np.array([1.0, -1.0]), np.array([0.5, 2.0]), np.array([1.0, 3.0, -2.0])
exercise(3, answer_3, "51aae6010ea3", *given, np.ones((2, 3)), np.array([0.5, 0.25]))

# %% [markdown]
# **4.** A block may be longer than a tile. Write `answer_4(products, tile, M)`: products is a vector with one number
# for each key, and only `tile` of them may be looked at at once (tile divides M, M divides the length). Give the
# largest of each block of M.

# %%
answer_4 = None


# %% tags=["solution"]
def answer_4(products, tile, M):
    best = np.full(len(products) // M, -np.inf)
    for first in range(0, len(products), tile):
        best[first // M] = max(best[first // M], products[first : first + tile].max())
    return best


# %%
exercise(4, answer_4, "7c31c435f326", np.array([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0, -5.0, -3.0, -5.0, -8.0]), 2, 4)
