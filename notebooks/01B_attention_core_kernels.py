# %% [markdown]
# # 01B. The core of attention as kernels
#
# A *kernel* is a function that a GPU runs in many copies at once, each on a part of the data. A copy is called a
# *program* here (CUDA says block). The GPU has many *SMs* (streaming multiprocessors), each with its own arithmetic;
# a program runs on one of them.
#
# What decides its speed is where numbers lie. *Global memory* holds all arrays; it is large and far away. Each SM has
# two small memories of its own: *shared memory*, which all threads of a program see, and *registers*, which belong to
# one thread (a *thread* is one lane of the arithmetic; they march in *warps* of 32). A kernel copies a piece of an
# array, a *tile*, from global memory to the SM, works on it there, and writes only the result back.
#
# Letters as in 01A: T queries q with H channels, S keys k with H and values v with V channels; t and s count queries
# and keys.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import torch
from beartype import beartype
from jaxtyping import Array, Float, jaxtyped

from jforge.harness.backends import BACKENDS, for_programs_that_run_once, to_device

for_programs_that_run_once()  # before JAX starts: threads for Mosaic's interpreter, where there is no GPU
pallas_kernels, triton_kernels = BACKENDS["pallas"].ops, BACKENDS["triton"].ops
device = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU Triton's kernels run in its interpreter
torch.set_default_device(device)

import jforge
from jforge.core import compare
from jforge.lessons import exercise, plots, reveal, traffic
from pallas_kernels.device import DEVICES

jax.config.update("jax_default_matmul_precision", "highest")  # a GPU may otherwise round products to fewer digits
jnp.set_printoptions(precision=3, suppress=True)

# %% [markdown]
# ## Why not row by row
#
# 01A makes all T x S logits, then the weights, then the sum. The package knows an H100 card; take a prompt of 8,192
# tokens and one head:

# %%
h100 = next(device for device in DEVICES if device.name == "H100")
print(
    f"{h100.sms} SMs with {h100.smem // 1024} KiB of shared memory each, {h100.sms * h100.smem / 2**20:.0f} MiB in all"
)
print(f"the logits of one head in float32: {8192 * 8192 * 4 / 2**20:.0f} MiB")
print(f"its q, k, v and output, 128 channels each, in bfloat16: {4 * 8192 * 128 * 2 / 2**20:.0f} MiB")

# %% [markdown]
# The logits do not fit on the SMs, and to write them to global memory and read them back is far more than all the rest.
# So they must be used and forgotten tile by tile. But a softmax divides by a sum over the whole
# row and takes away the row's maximum, and neither is known before the last tile.
#
# ## The online softmax
#
# The way out: keep the sums for the maximum *so far*. When a tile raises the maximum from m to m', all that was summed
# is too large by exp(m' - m), so it is multiplied by exp(m - m'). Three things are kept of each query: `top`, the
# maximum; `total`, the sum of exp(l - top); `acc`, the sum of exp(l - top) v. This function is the whole idea, for one
# query.


# %%
@jaxtyped(typechecker=beartype)
def online(q: Float[Array, "H"], k: Float[Array, "S H"], v: Float[Array, "S V"], keys: int) -> Float[Array, "V"]:
    """Attention of one query over all keys, in tiles of `keys`."""
    top, total, acc = -jnp.inf, 0.0, jnp.zeros(v.shape[1])
    for first in range(0, len(k), keys):
        logits = k[first : first + keys] @ q * len(q) ** -0.5
        new_top = jnp.maximum(top, logits.max())
        shrink = jnp.exp(top - new_top)  # exp(-inf) = 0 at the first tile
        weights = jnp.exp(logits - new_top)
        total = total * shrink + weights.sum()
        acc = acc * shrink + weights @ v[first : first + keys]
        top = new_top
    return acc / total


S = H = V = 64
key_q, key_k, key_v = jax.random.split(jax.random.key(0), 3)
q, k, v = (jax.random.normal(key, (104, n)) for key, n in ((key_q, H), (key_k, H), (key_v, V)))
want = jax.nn.softmax(k @ q[0] * H**-0.5) @ v
for keys in (1, 16, 104):
    print(f"tiles of {keys:>3}: equal", compare.relative(online(q[0], k, v, keys), want) <= compare.OUT["float32"])

# %% [markdown]
# The multiplication of `acc` by `shrink` costs V products a tile; it is for nothing when the maximum has not risen,
# as then shrink is 1. Predict: 4,096 keys come one by one, in random order. How often, on average, does the maximum
# rise? (The first key counts as one.)

# %% tags=["predict"]
guess = None

# %%
rows = jax.random.normal(jax.random.key(1), (500, 4096))
highest = jax.lax.cummax(rows, axis=1)
reveal(float((highest[:, 1:] > highest[:, :-1]).sum(axis=1).mean() + 1), guess)
print(f"the sum of 1 / i: {sum(1 / i for i in range(1, 4097)):.2f}")

# %% [markdown]
# Key i is the largest of the first i with probability 1 / i, so the number is near the sum of 1 / i. Most tiles change
# nothing.
#
# ## A first kernel: a tile of logits
#
# *Triton* is a language for kernels in Python syntax: a program is written as if it were one thread that handles whole
# tiles. `tl.program_id(0)` says which copy runs. A tile is loaded by an array of addresses (`k + ...`, counted in
# elements from the array's start), and `mask` says which of them exist; the others give `other`. `tl.dot` multiplies
# two tiles on the *tensor cores*, units that multiply small matrices at once; they want at least 16 rows and columns.
# `tl.constexpr` marks what is known when the kernel is compiled: shapes of tiles must be.

# %%
import triton
import triton.language as tl


@triton.jit
def logits_kernel(q, k, logits, T, S, scale, H: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # this program's queries
    s = tl.program_id(1) * KEYS + tl.arange(0, KEYS)  # and its keys
    h = tl.arange(0, H)
    q_tile = tl.load(q + t[:, None] * H + h[None, :], mask=(t < T)[:, None], other=0.0)  # ROWS H
    k_tile = tl.load(k + s[None, :] * H + h[:, None], mask=(s < S)[None, :], other=0.0)  # H KEYS: transposed
    tile = tl.dot(q_tile, k_tile, input_precision="ieee") * scale
    tl.store(logits + t[:, None] * S + s[None, :], tile, mask=(t < T)[:, None] & (s < S)[None, :])


launch = triton_kernels.runtime.launch  # kernel[grid](*arguments), without NumPy's warnings in the interpreter
half = [to_device(np.asarray(x, np.float16)) for x in (q, k, v)]
T = S = 104
ROWS = KEYS = 16
found = torch.empty(T, S)
grid = triton.cdiv(T, ROWS), triton.cdiv(S, KEYS)  # so many programs; cdiv rounds up
launch(logits_kernel, grid, *half[:2], found, T, S, H**-0.5, H=H, ROWS=ROWS, KEYS=KEYS)
exact = half[0].double() @ half[1].double().T * H**-0.5
print(grid, "programs; equal:", compare.relative(found, exact) <= compare.OUT["float16"])

# %% [markdown]
# T is no multiple of 16: the last programs have 8 rows too many. Without the masks they would read what lies behind
# the array.
#
# Where torch sees a GPU, Triton compiled this and the GPU ran it. Elsewhere, as for the outputs stored here, Triton's
# *interpreter* did: it calls the function once for each program, one after the other, with NumPy for the tiles. Results
# and masks can be tested so. Times mean nothing, programs that disturb each other go unnoticed, and bfloat16, the usual
# format of a model, is wrong in its `tl.dot`:

# %%
rough = [x.bfloat16() for x in half[:2]]
with np.errstate(all="ignore"):
    launch(logits_kernel, grid, *rough, found, T, S, H**-0.5, H=H, ROWS=ROWS, KEYS=KEYS)
print("bfloat16, equal:", compare.relative(found, exact) <= 10 * compare.OUT["bfloat16"])

# %% [markdown]
# (The interpreter of version 3.6 multiplies the bit patterns as if they were integers. A GPU gives True.)
#
# ## The core in one kernel
#
# Now the loop of `online`, with a block of ROWS queries in a program. q is loaded once; tiles of k and v come one after
# the other; the logits live in registers and are never stored. Two kinds of mask:
#
# * what *exists*: t < T and s < S, at the loads and stores;
# * what is *visible*: s <= t. Its logits become -inf, so the weight is 0.
#
# And a third saving: a block whose last query is t sees no key after t, so the loop ends there.


# %%
@triton.jit
def core_kernel(q, k, v, out, T, S, scale,
                H: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    first_t = tl.program_id(0) * ROWS
    t = first_t + tl.arange(0, ROWS)
    h, c = tl.arange(0, H), tl.arange(0, V)
    q_tile = tl.load(q + t[:, None] * H + h[None, :], mask=(t < T)[:, None], other=0.0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, V], tl.float32)
    for first in tl.range(0, tl.minimum(first_t + ROWS, S), KEYS):
        s = first + tl.arange(0, KEYS)
        k_tile = tl.load(k + s[None, :] * H + h[:, None], mask=(s < S)[None, :], other=0.0)
        logits = tl.dot(q_tile, k_tile, input_precision="ieee") * scale
        logits = tl.where(s[None, :] <= t[:, None], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shrink = tl.exp(top - new_top)
        weights = tl.exp(logits - new_top[:, None])
        total = total * shrink + tl.sum(weights, 1)
        v_tile = tl.load(v + s[:, None] * V + c[None, :], mask=(s < S)[:, None], other=0.0)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    tl.store(out + t[:, None] * V + c[None, :], acc / total[:, None], mask=(t < T)[:, None])


out = torch.empty(T, V)
sizes = dict(H=H, V=V, ROWS=ROWS, KEYS=KEYS)
launch(core_kernel, (triton.cdiv(T, ROWS),), *half, out, T, S, H**-0.5, **sizes)


def reference(q, k, v):
    """In float64, of the same rounded inputs."""
    q, k, v = (x.double().cpu().numpy() for x in (q, k, v))
    logits = np.where(np.tri(len(q), len(k)), q @ k.T * q.shape[1] ** -0.5, -np.inf)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ v


truth = reference(*half)
print("equal:", compare.relative(out, truth) <= compare.OUT["float16"])

# %% [markdown]
# The weights are rounded to 16 bits before the second `tl.dot`, since a tensor core multiplies numbers of one type; the
# sums stay in float32. The top of a row can not stay -inf here: every query sees key 0, in the first tile. With a
# window or a cut of the keys among programs that is no longer so, and -inf - (-inf) = NaN needs the guard of 01A.
#
# ## What the kernel reads
#
# The interpreter asks a method for every load. If that method writes down the addresses, we see what a kernel really
# reads, not what we believe it reads. `traffic` has it do so: kernels launched inside are interpreted, where there is a
# GPU too. It gives two lists, loads and stores; of each load and store we have the index of the program in the grid and
# the addresses that the mask lets through.


# %%
def trace_of(rows, keys):
    """(program, array 0 to 2 for q, k, v, [element numbers]) of each load of core_kernel."""
    with traffic() as (loads, _):
        launch(core_kernel, (triton.cdiv(T, rows),), *half, torch.empty(T, V), T, S, H**-0.5, H=H, V=V, ROWS=rows,
               KEYS=keys)  # fmt: skip
    spans = [(x.data_ptr(), x.data_ptr() + x.numel() * 2) for x in half]
    found = []
    for (program, *_), addresses in loads:
        array = next(i for i, (low, high) in enumerate(spans) if low <= addresses.min() < high)
        found.append((program, array, (addresses - spans[array][0]) // 2))
    return found


trace = trace_of(ROWS, KEYS)
print(trace[0][:2], "reads", len(trace[0][2]), "elements")
for array, name in enumerate("qkv"):
    total = sum(len(elements) for _, which, elements in trace if which == array)
    print(f"{name}: {total:>6} elements loaded, the array has {half[array].numel()}")

# %% [markdown]
# q is read once. k and v are read by several programs. From the keys that each program loaded follows which logits it
# made; in the picture a cell is one logit.

# %%
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

made = np.zeros((T, S), bool)
for program, array, elements in trace:
    if array == 1:
        made[program * ROWS : (program + 1) * ROWS, np.unique(elements // H)] = True
visible = np.tri(T, S, dtype=bool)
kinds = np.where(made & visible, 2, np.where(made, 1, 0))
colours = {0: ("#ffffff", "never made"), 1: ("#e69f00", "made, then masked"), 2: ("#56b4e9", "made and used")}

plt = plots()
figure, ax = plt.subplots(figsize=(10, 7))
ax.pcolormesh(kinds, cmap=ListedColormap([colour for colour, _ in colours.values()]), vmin=-0.5, vmax=2.5)
for edge in range(0, T + 1, ROWS):
    ax.axhline(edge, color="black", linewidth=1)
    ax.axvline(edge, color="#666666", linewidth=0.6)
ax.set(xlabel="key s (a tile of k: 16)", ylabel="query t (a program: 16)", xlim=(0, S), ylim=(T, 0), aspect="equal")
ax.set(xticks=range(0, T, ROWS), yticks=range(0, T, ROWS))
marks = [Patch(facecolor=colour, edgecolor="#666666", label=label) for colour, label in colours.values()]
figure.legend(handles=marks, loc="outside right upper", frameon=False)
plt.show()
print(f"made: {made.sum()}, of them used: {(made & visible).sum()}, visible: {visible.sum()}")

# %% [markdown]
# A row of tiles is a program. It reads the keys from 0 up to its own diagonal; only the tile on the diagonal is masked
# in part. All visible logits are made, and no tile to the right of the diagonal.
#
# ## Bytes and flops
#
# The package's `cost` says what a prefill must at least read: each slot of the cache once, and flops for visible pairs
# only. The kernel reads a key again in each block of queries that sees it, and computes whole tiles. Larger blocks of
# queries read less, and mask more:

# %%
att = jforge.get("single_head")
cfg = att.Config(hidden_size=H, head_dim=H, v_head_dim=V)
cost = att.cost(cfg, context=S, new=T, dtype=jnp.float16)
print(f"cost: {sum(cost.read.values()):,} bytes of k and v, {cost.flops:,} flops")
for rows in (16, 32, 64, 128):
    steps = trace_of(rows, KEYS)
    read = 2 * sum(len(elements) for _, array, elements in steps if array > 0)
    tiles = sum(array == 1 for _, array, _ in steps)
    flops = tiles * 2 * rows * KEYS * (H + V)
    print(f"{rows:>3} queries a program: {read / sum(cost.read.values()):.2f} of the bytes, "
          f"{flops / cost.flops:.2f} of the flops")  # fmt: skip

# %% [markdown]
# With all queries in one program each byte is read once, but then one SM works and the others wait. The repeated reads
# are cheaper than the first one: *L2*, a cache that all SMs share, answers most of them.
#
# ## The same in Mosaic GPU
#
# Triton decides by itself how a tile comes to the SM. *Mosaic GPU*, the part of JAX's Pallas for NVIDIA cards, leaves
# it to the author. The pieces:
#
# * `SMEM(shape, dtype)` is an array in shared memory, `ACC` the accumulator of a product, in registers.
# * *TMA* (tensor memory accelerator) is the unit that copies a tile between global and shared memory while the threads
#   do something else. `copy_gmem_to_smem` only orders the copy.
# * A *barrier* counts arrivals; the copy arrives on it when its bytes are there, and `barrier_wait` waits for that.
# * `wgmma` multiplies two matrices in shared memory, by a *warpgroup* of 4 warps (128 threads). It takes 64 rows at a
#   time, so a program has 64 queries.
# * *Swizzle*: shared memory is built of banks that give one word each at a time, and a column of a tile would lie in
#   one bank. Swizzled, the 16-byte pieces of row r are permuted by r, so that wgmma reads rows and columns equally
#   fast. The two transforms say so: pieces of 8 rows and 128 bytes, permuted.

# %%
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = 64
WGMMA = plgpu.Layout.WGMMA  # which thread holds which element of a product
BY_ROW = WGMMA.reduce(1)  # of a vector with one element a row of it


def across(vector, shape):
    """A vector with one element a row, repeated along the row."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, (0,)), WGMMA)


def product(a, b, shape):
    """a @ b of tiles in shared memory."""

    def run(accumulator):
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def core_body(q, k, v, out, q_s, k_s, v_s, p_s, out_s, arrived):
    block, tile = lax.axis_index("block"), (TILE, TILE)

    def fetch(source, number, target):
        plgpu.copy_gmem_to_smem(source.at[pl.ds(number * TILE, TILE)], target, arrived)
        plgpu.barrier_wait(arrived)

    def turn(i, state):
        acc, top, total = state
        fetch(k, i, k_s)
        logits = product(q_s, k_s.transpose((1, 0)), tile) * H**-0.5
        t = plgpu.broadcasted_iota(jnp.int32, tile, 0, layout=WGMMA) + block * TILE
        s = plgpu.broadcasted_iota(jnp.int32, tile, 1, layout=WGMMA) + i * TILE
        logits = jnp.where(s <= t, logits, -jnp.inf)
        new_top = jnp.maximum(top, logits.max(axis=1))
        shrink = jnp.exp(top - new_top)
        weights = jnp.exp(logits - across(new_top, tile))
        total = total * shrink + weights.sum(axis=1)
        p_s[...] = weights.astype(p_s.dtype)  # through shared memory, where wgmma reads it
        plgpu.commit_smem()  # what threads wrote is seen by wgmma and TMA only after this
        fetch(v, i, v_s)
        return acc * across(shrink, (TILE, V)) + product(p_s, v_s, (TILE, V)), new_top, total

    fetch(q, block, q_s)
    acc = plgpu.layout_cast(jnp.zeros((TILE, V), jnp.float32), WGMMA)
    top = plgpu.layout_cast(jnp.full((TILE,), -1e30, jnp.float32), BY_ROW)  # finite: no -inf - (-inf)
    total = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), BY_ROW)
    acc, top, total = lax.fori_loop(0, block + 1, turn, (acc, top, total))
    out_s[...] = acc * across(1 / total, (TILE, V))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_s, out.at[pl.ds(block * TILE, TILE)])
    plgpu.wait_smem_to_gmem(0)


swizzled = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)  # 64 numbers of 2 bytes are 128 bytes


def core_mosaic(q, k, v):
    T, operand = q.shape[0], plgpu.SMEM((TILE, TILE), q.dtype, transforms=swizzled)
    on_gpu = jax.default_backend() == "gpu"
    return plgpu.kernel(
        core_body, out_type=jax.ShapeDtypeStruct((T, V), jnp.float32), grid=(-(-T // TILE),), grid_names=("block",),
        scratch_types=[operand] * 4 + [plgpu.SMEM((TILE, V), jnp.float32), plgpu.Barrier()], kernel_name="core",
        interpret=None if on_gpu else plgpu.InterpretGPUParams(detect_races=True),
    )(q, k, v)  # fmt: skip


mosaic = core_mosaic(*(x.astype(jnp.float16) for x in (q, k, v)))
print("equal:", compare.relative(mosaic, truth) <= compare.OUT["float16"])

# %% [markdown]
# The last tile has 40 rows: TMA fills what is missing with zeros, and drops on the way out what lies past the end.
#
# Mosaic's interpreter plays the threads of warpgroups, the copies and the barriers, gives NaN for memory that nobody
# wrote, and looks for *races*: an access that no barrier orders against another one. What it does not play: time,
# the number of registers, how much shared memory there is, banks, and some of the rules of the hardware (it takes
# shapes that the compiler refuses).
#
# This kernel waits for each copy and then computes, so one of the two always idles. The package's kernel has two
# warpgroups: one orders copies for several tiles ahead, the other computes.
#
# ## Against the package
#
# `decode_attention` of both packages computes the last T tokens of a row over a cache; with T = S that is the causal
# core. It takes B T N H: B = 1 row, N = 1 head.

# %%
lengths = np.full(1, S, np.int32)
theirs, _ = triton_kernels.decode_attention(*(x[None, :, None] for x in half), to_device(lengths),
                                            scale=H**-0.5)  # fmt: skip
other, _ = pallas_kernels.decode_attention(*(x.astype(jnp.float16)[None, :, None] for x in (q, k, v)),
                                           jnp.asarray(lengths), scale=H**-0.5)  # fmt: skip
mine = {"core_kernel": out, "core_mosaic": mosaic, "triton_kernels": theirs[0, :, 0], "pallas_kernels": other[0, :, 0]}
for name, result in mine.items():
    error = compare.relative(result, truth)
    print(f"{name:15}", error <= compare.OUT["float16"])

# %% [markdown]
# ## Exercises
#
# Set the answer, run the two cells. A function is called by the second one.
#
# **1.** A query has seen logits up to 2 and has total = 3. The next tile holds the two logits 4 and 4. What is total
# after it?

# %%
answer_1 = None

# %% tags=["solution"]
answer_1 = float(3 * np.exp(2 - 4) + 2)

# %%
exercise(1, answer_1, "fe041f73d608")

# %% [markdown]
# **2.** T = S = 4,096, blocks of 128 queries, tiles of 64 keys, the causal mask. How many tiles of k are loaded by all
# programs together?

# %%
answer_2 = None

# %% tags=["solution"]
answer_2 = sum(-(-(block + 1) * 128 // 64) for block in range(4096 // 128))

# %%
exercise(2, answer_2, "c03963eab913")

# %% [markdown]
# **3.** A program keeps 64 queries of 128 channels, the weights of a tile (64 x 64) and, for tiles under way, *pairs*
# of a k and a v tile, 64 x 128 each, all in numbers of 2 bytes. How many pairs fit into the shared memory of an SM of
# the H100?

# %%
answer_3 = None

# %% tags=["solution"]
answer_3 = (h100.smem - 2 * (64 * 128 + 64 * 64)) // (2 * 2 * 64 * 128)

# %%
exercise(3, answer_3, "e7ddceb8fc30")

# %% [markdown]
# **4.** Write `answer_4(tiles)`: attention of one query over tiles, each a pair (logits, v), in one pass that forgets a
# tile when it goes to the next. Any logit may be -inf, those of a whole tile too; a query that sees nothing gives 0.

# %%
answer_4 = None


# %% tags=["solution"]
def answer_4(tiles):
    top, total, acc = -jnp.inf, 0.0, jnp.zeros(tiles[0][1].shape[1])
    for logits, v in tiles:
        new_top = jnp.maximum(top, logits.max())
        shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        shrink, weights = jnp.exp(top - shift), jnp.exp(logits - shift)
        top, total, acc = new_top, total * shrink + weights.sum(), acc * shrink + weights @ v
    return acc / jnp.where(total == 0, 1.0, total)


# %%
exercise(4, answer_4, "5e37a28d3459", [
    (jnp.array([-jnp.inf, -jnp.inf]), jnp.array([[1.0, 2.0], [3.0, -1.0]])),
    (jnp.array([0.5, -jnp.inf]), jnp.array([[5.0, 1.0], [0.0, 2.0]])),
    (jnp.array([2.0, 1.0]), jnp.array([[4.0, -2.0], [1.0, 1.0]])),
])  # fmt: skip

# %% [markdown]
# **5.** In a window of `window` tokens, query t sees the keys t - window < s <= t. Write
# `answer_5(T, rows, keys, window)`: how many tiles of `keys` keys must be loaded by all blocks of `rows` queries
# together? T is a multiple of rows and of keys.

# %%
answer_5 = None


# %% tags=["solution"]
def answer_5(T, rows, keys, window):
    spans = [(max(0, first - window + 1), first + rows - 1) for first in range(0, T, rows)]
    return sum(last // keys - first // keys + 1 for first, last in spans)


# %%
exercise(5, answer_5, "cdf92da5da67", 512, 64, 16, 100)
