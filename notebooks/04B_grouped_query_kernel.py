# %% [markdown]
# # 04B. The group as rows of a tile: read a key head once for G query heads
#
# In grouped-query attention G query heads share a key head (04A), so the cache is 1/G of that of multi-head attention.
# A decode step *reads* 1/G only if the kernel loads a key once and lets all G heads use it. Here one kernel is written
# so that the number of heads in a program is a parameter, and its loads are counted. Then the same in Mosaic GPU, with
# one half of a program loading while the other computes.
#
# Words of 01B: a kernel runs in many copies, *programs*, each on one *SM* of the GPU; a *tile* is the piece of an array
# that a program works on. Letters: B rows, S slots, N query heads, K key heads, G = N / K, H channels of a query, key
# or value; query head n reads key head n // G.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import torch
from beartype import beartype
from jaxtyping import Float, Int, jaxtyped

from jforge.harness.backends import BACKENDS, for_programs_that_run_once, to_device

for_programs_that_run_once()  # before JAX starts: threads for Mosaic's interpreter, where there is no GPU
pallas_kernels, triton_kernels = BACKENDS["pallas"].ops, BACKENDS["triton"].ops
device = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU Triton's kernels run in its interpreter
torch.set_default_device(device)

import jforge
from jforge.core import compare
from jforge.lessons import exercise, plots, reveal, traffic

# %% [markdown]
# ## The reference
#
# A loop over rows and key heads. The G queries of a group are the rows of a matrix, so what is inside are two products
# of matrices: G H by H S, and G S by S H.


# %%
@jaxtyped(typechecker=beartype)
def reference(
    q: Float[np.ndarray, "B N H"], k: Float[np.ndarray, "B S K H"], v: Float[np.ndarray, "B S K H"],
    lengths: Int[np.ndarray, "B"], scale: float,
) -> Float[np.ndarray, "B N H"]:  # fmt: skip
    (B, N, H), K = q.shape, k.shape[2]
    groups, out = q.reshape(B, K, N // K, H).astype(float), np.zeros((B, K, N // K, H))
    for b, length in enumerate(lengths):
        for kv in range(K):
            weights = np.exp(scale * groups[b, kv] @ k[b, :length, kv].astype(float).T)  # G S
            out[b, kv] = weights / weights.sum(axis=1, keepdims=True) @ v[b, :length, kv].astype(float)
    return out.reshape(B, N, H)


B, S, N, K, H = 2, 96, 8, 2, 64
G = N // K
lengths = np.array([75, 20], np.int32)
draw = np.random.default_rng(0)
q, k, v = (draw.standard_normal(shape).astype(np.float16) for shape in ((B, N, H), (B, S, K, H), (B, S, K, H)))
for array in (k, v):
    array[np.arange(S) >= lengths[:, None]] = np.nan  # slots that nobody may read
truth = reference(q, k, v, lengths, H**-0.5)

# %% [markdown]
# ## One kernel, HEADS query heads in a program
#
# The kernel of 02B had one query in a program. This one has HEADS of them, as rows of a tile, so that the logits are a
# `tl.dot`, a product on the *tensor cores* (units that multiply small matrices). These want 16 rows at least; rows past
# HEADS are loaded as zeros and not stored. All heads of a program must read the same key head, so HEADS divides G.

# %%
import triton
import triton.language as tl


@triton.jit
def group_kernel(q, k, v, lengths, out, S, scale, N: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr,
                 H: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    b = tl.program_id(1)
    row, h = tl.arange(0, ROWS), tl.arange(0, H)
    n = tl.program_id(0) * HEADS + row  # query heads of this program
    real = (row < HEADS)[:, None]
    kv = tl.program_id(0) * HEADS // (N // K)  # its key head
    at_q = (b * N + n[:, None]) * H + h[None, :]
    query = tl.load(q + at_q, mask=real, other=0.0)
    length = tl.load(lengths + b)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, H], tl.float32)
    for first in tl.range(0, length, KEYS):
        s = first + tl.arange(0, KEYS)
        at = ((b * S + s[:, None]) * K + kv) * H + h[None, :]
        there = (s < length)[:, None]
        key = tl.load(k + at, mask=there, other=0.0)
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        logits = tl.where((s < length)[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shrink = tl.exp(top - new_top)
        weights = tl.exp(logits - new_top[:, None])
        value = tl.load(v + at, mask=there, other=0.0)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    tl.store(out + at_q, (acc / total[:, None]).to(out.dtype.element_ty), mask=real)


launch = triton_kernels.runtime.launch  # kernel[grid](*arguments), without NumPy's warnings in the interpreter
tensors = [to_device(a) for a in (q, k, v, lengths)]


def decode(heads):
    """Attention with `heads` query heads in a program."""
    out = torch.empty(B, N, H, dtype=torch.float16)
    launch(group_kernel, (N // heads, B), *tensors, out, S, H**-0.5, N=N, K=K, HEADS=heads, H=H, ROWS=16, KEYS=32)
    return out


def right(out):
    return compare.relative(out.reshape(truth.shape), truth) <= compare.OUT["float16"]


for heads in (1, 2, G):
    print(f"{heads} heads in a program, {N // heads * B:>2} programs: equal", right(decode(heads)))

# %% [markdown]
# ## What it loads
#
# As in 02B, the interpreter's method for loads writes down the addresses (`traffic`).


# %%
def times_loaded(loads, tensor):
    """How often each number of a tensor was loaded, in the tensor's shape."""
    start, size = tensor.data_ptr(), tensor.element_size()
    places = np.concatenate([(addresses - start) // size for _, addresses in loads])
    places = places[(places >= 0) & (places < tensor.numel())]
    return np.bincount(places, minlength=tensor.numel()).reshape(tensor.shape)


# %% [markdown]
# `cost` says what a step must read of k and v. Predict: with **one** query head in a program, N = 8 and K = 2, how many
# times that does the kernel load?

# %% tags=["predict"]
guess = None

# %%
att = jforge.get("gqa")
cfg = att.Config(hidden_size=N * H, num_attention_heads=N, num_key_value_heads=K)
needed = sum(sum(att.cost(cfg, context=int(n), dtype=jnp.float16).read.values()) for n in lengths)
counts, moved = {}, {}
for heads in (1, 2, G):
    with traffic() as (loads, _):
        decode(heads)
    counts[heads] = times_loaded(loads, tensors[1])  # of k
    moved[heads] = 2 * int(sum(times_loaded(loads, tensors[i]).sum() for i in (1, 2)))
reveal(moved[1] // needed, guess)
print(f"cost: {needed:,} bytes; loaded, by heads in a program:", {heads: f"{n:,}" for heads, n in moved.items()})

# %% [markdown]
# With the whole group in a program every byte is loaded once. Each cell of the picture is a key of row 0 (75 of 96
# slots are used); its colour says how often it was loaded.

# %%
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

plt = plots()
colours = {0: "#ffffff", 1: "#56b4e9", 2: "#e69f00", 4: "#d55e00"}
figure, axes = plt.subplots(len(counts), figsize=(10, 5.2), sharex=True)
for ax, (heads, count) in zip(axes, counts.items(), strict=True):
    ranks = np.searchsorted(list(colours), count[0, :, :, 0].T)  # K S
    ax.pcolormesh(ranks, cmap=ListedColormap(list(colours.values())), vmin=-0.5, vmax=3.5, edgecolors="#666666",
                  linewidth=0.3)  # fmt: skip
    ax.set(yticks=[0.5, 1.5], yticklabels=[0, 1], ylabel="key head", ylim=(K, 0))
    ax.set_title(
        f"{heads} query heads in a program" if heads > 1 else "1 query head in a program", loc="left", fontsize=14
    )
axes[-1].set_xlabel("slot")
words = zip(("never", "once", "twice", "4 times"), colours.values(), strict=True)
marks = [Patch(facecolor=colour, edgecolor="#666666", label=label) for label, colour in words]
figure.legend(handles=marks, loc="outside lower center", ncols=4, frameon=False, title="loaded")
plt.show()

# %% [markdown]
# Not every one of those loads goes to global memory. L2, a cache that all SMs share, may still hold what another
# program has just read. But it is a hope and not a plan: the programs of a group need not run at the same time, and
# each of them pays for the way from L2 to its SM again.
#
# ## Rows for nothing, and rows for free
#
# Of the 16 rows of a `tl.dot` G are real. In shipped models:

# %%
from pathlib import Path

folder = Path(jforge.__file__).parent / "configs"
for name in ("llama-3.1-8b", "minimax-m2", "gpt-oss-120b", "minimax-m3"):
    its = jforge.hf.layers(jforge.hf.load(folder / f"{name}.json"))[0][1]
    group = its.num_attention_heads // its.num_key_value_heads
    print(f"{name:13} N = {its.num_attention_heads:>2}, K = {its.num_key_value_heads}: {group:>2} of 16 rows")

# %% [markdown]
# The empty rows cost nothing that matters while the bytes decide (05A). And they can be filled: if a step takes T
# tokens of a row at once (a draft to be checked), their T G queries share the keys too. The package's kernel packs them
# so. Its loads for one token and for four, G = 4:

# %%
for T in (1, 4):
    wide = torch.randn(B, T, N, H, device="cpu").half().to(device)
    with traffic() as (loads, _):
        triton_kernels.decode_attention(wide, *tensors[1:], scale=H**-0.5)
    total = 2 * int(sum(times_loaded(loads, tensors[i]).sum() for i in (1, 2)))
    print(f"T = {T}: {T * G:>2} rows, {total:,} bytes of k and v, {total / needed:.0f} times cost")

# %% [markdown]
# The mask differs by row then: token t of the step sees one slot more than the token before it.
#
# ## In Mosaic GPU: one half loads, the other computes
#
# As in 02B the keys are the 64 rows of the product and the queries its 8 columns, of which now G = 4 are real. What is
# new: the kernel of 02B waited for each copy before it computed. Here a program has two *warpgroups* (128 threads
# each). The second orders copies by *TMA* (the unit that moves tiles) into a *ring* of STAGES places in *shared
# memory*; the first computes on what has come. Two barriers a place keep them in step:
#
# * `full`: the copies of k and v arrive on it; the computing half waits for it.
# * `free`: the computing half arrives on it when it is done with the place; the loading half waits for it before it
#   fills the place again.
#
# So up to STAGES tiles are on their way while one is worked on. That is what makes a kernel reach the bandwidth of the
# memory.

# %%
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE, COLUMNS, STAGES = 64, 8, 2
WGMMA = plgpu.Layout.WGMMA  # which thread holds which element of a product


def down(vector, shape):
    """A vector with one element a column, repeated down the column."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, (1,)), WGMMA)


def product(a, b, shape):
    """a @ b of tiles in shared memory."""

    def run(accumulator):
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def load_tiles(b, kv, tiles, k, v, k_s, v_s, full, free):
    def wait_for(i):
        plgpu.barrier_wait(free.at[lax.rem(i, STAGES)])

    @pl.loop(0, tiles)
    def _(i):
        place = lax.rem(i, STAGES)
        pl.when(i >= STAGES)(lambda: wait_for(i))
        for source, target in ((k, k_s), (v, v_s)):
            plgpu.copy_gmem_to_smem(source.at[b, pl.ds(i * TILE, TILE), kv], target.at[place], full.at[place])

    pl.loop(jnp.maximum(tiles - STAGES, 0), tiles)(wait_for)  # no barrier may be left with an arrival unseen


def compute(b, kv, tiles, length, q, out, q_s, k_s, v_s, p_s, out_s, q_full, full, free):
    scores = (TILE, COLUMNS)

    def slots(i, shape):
        return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA) + i * TILE

    def turn(i, state):
        acc, top, total = state
        place = lax.rem(i, STAGES)
        plgpu.barrier_wait(full.at[place])
        logits = product(k_s.at[place], q_s.transpose((1, 0)), scores) * H**-0.5
        logits = jnp.where(slots(i, scores) < length, logits, -jnp.inf)
        new_top = jnp.maximum(top, logits.max(axis=0))
        shrink = jnp.exp(top - new_top)
        weights = jnp.exp(logits - down(new_top, scores))
        p_s.transpose((1, 0))[...] = weights.astype(p_s.dtype)
        value = plgpu.load(v_s.at[place], layout=WGMMA)
        v_s.at[place][...] = jnp.where(slots(i, (TILE, H)) < length, value, jnp.zeros_like(value))  # 0 * NaN is NaN
        plgpu.commit_smem()
        more = product(v_s.at[place].transpose((1, 0)), p_s.transpose((1, 0)), (H, COLUMNS))
        plgpu.barrier_arrive(free.at[place])
        return acc * down(shrink, (H, COLUMNS)) + more, new_top, total * shrink + weights.sum(axis=0)

    plgpu.copy_gmem_to_smem(q.at[b, kv, pl.ds(0, COLUMNS)], q_s, q_full)  # G rows; TMA fills the rest with zeros
    plgpu.barrier_wait(q_full)
    acc = plgpu.layout_cast(jnp.zeros((H, COLUMNS), jnp.float32), WGMMA)
    top = plgpu.layout_cast(jnp.full((COLUMNS,), -1e30, jnp.float32), WGMMA.reduce(0))
    total = plgpu.layout_cast(jnp.zeros((COLUMNS,), jnp.float32), WGMMA.reduce(0))
    acc, top, total = lax.fori_loop(0, tiles, turn, (acc, top, total))
    out_s.transpose((1, 0))[...] = plgpu.layout_cast(acc * down(1 / total, (H, COLUMNS)), plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_s, out.at[b, kv, pl.ds(0, COLUMNS)])
    plgpu.wait_smem_to_gmem(0)


def group_body(q, k, v, lengths, out, q_s, k_s, v_s, p_s, out_s, q_full, full, free):
    b, kv, computes = lax.axis_index("row"), lax.axis_index("key_head"), lax.axis_index("warpgroup") == 0
    tiles = lax.div(lengths[b] + TILE - 1, TILE)
    first = (b, kv, tiles, lengths[b], q, out, q_s, k_s, v_s, p_s, out_s, q_full, full, free)
    pl.when(computes)(lambda: compute(*first))
    pl.when(jnp.logical_not(computes))(lambda: load_tiles(b, kv, tiles, k, v, k_s, v_s, full, free))


def group_mosaic(q, k, v, lengths):
    swizzled = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)  # the order that wgmma wants (01B)

    def tile(*shape):
        return plgpu.SMEM((*shape, H), q.dtype, transforms=swizzled)

    on_gpu = jax.default_backend() == "gpu"
    out = plgpu.kernel(
        group_body, out_type=jax.ShapeDtypeStruct((B, K, G, H), jnp.float32), grid=(K, B),
        grid_names=("key_head", "row"), num_threads=2, thread_name="warpgroup", kernel_name="group",
        scratch_types=[
            tile(COLUMNS), tile(STAGES, TILE), tile(STAGES, TILE), tile(COLUMNS), plgpu.SMEM((COLUMNS, H), jnp.float32),
            plgpu.Barrier(), plgpu.Barrier(num_arrivals=2, num_barriers=STAGES), plgpu.Barrier(num_barriers=STAGES),
        ],
        interpret=None if on_gpu else plgpu.InterpretGPUParams(detect_races=True),
    )(q.reshape(B, K, G, H), k, v, lengths)  # fmt: skip
    return out.reshape(B, N, H)


arrays = [jnp.asarray(a) for a in (q, k, v, lengths)]
print("group_mosaic: equal", right(group_mosaic(*arrays)))

# %% [markdown]
# Mosaic's interpreter runs the two warpgroups as threads and looks for races, accesses that no barrier orders. (Where
# JAX has a GPU the kernel was compiled for it, and nobody looked.) It saw:

# %%
from pallas_kernels import compat

print("races:", compat.races_found())

# %% [markdown]
# It does not see all: in tests of this version it did not notice a missing wait whose only reader was a `wgmma`. And it
# tells no time, so whether two places are enough is a question for a GPU.
#
# ## Against the package
#
# Both packages' kernels on the same inputs (they take B T N H), with what Triton's loads:

# %%
theirs, _ = triton_kernels.decode_attention(tensors[0][:, None], *tensors[1:], scale=H**-0.5)
with traffic() as (loads, _):
    triton_kernels.decode_attention(tensors[0][:, None], *tensors[1:], scale=H**-0.5)
other, _ = pallas_kernels.decode_attention(arrays[0][:, None], *arrays[1:], scale=H**-0.5)
print("triton_kernels:", right(theirs), " pallas_kernels:", right(other))
total = 2 * int(sum(times_loaded(loads, tensors[i]).sum() for i in (1, 2)))
print(f"triton_kernels loads {total:,} bytes of k and v; cost {needed:,}")

# %% [markdown]
# And does sharing cost time on a card? In the package's record of the Mosaic kernel, rows of multi-head attention and
# four times as many rows with G = 4 read the same bytes:

# %%
import json

runs = [json.loads(line) for line in Path("../docs/gpu_runs.jsonl").read_text().splitlines()]
kernel = {"what": "decode_attention", "implementation": "pallas", "S": 8192}
for run in sorted((run for run in runs if kernel.items() <= run.items()), key=lambda run: run["B"]):
    print(
        f"{run['device']}, {run['commit']}: B = {run['B']}, N = {run['N']}, K = {run['K']:>2}: {run['median']:.0f} us"
    )

# %% [markdown]
# ## Exercises
#
# Set the answer, run the two cells. A function is called by the second one.
#
# **1.** Qwen3-235B has N = 64, K = 4, H = 128. A kernel has one query head in a program. How many MiB (2^20 bytes) of k
# and v does it load for one row of 8,192 tokens, in one layer and in bfloat16?

# %%
answer_1 = None

# %% tags=["solution"]
answer_1 = 64 * 8192 * 2 * 128 * 2 // 2**20

# %%
exercise(1, answer_1, "6cf77d3991ee")

# %% [markdown]
# **2.** A program has the T G queries of a key head as rows, those of token 0 first. Write `answer_2(row, kv, G)`: the
# pair [token, query head] of a row of the program of key head kv.

# %%
answer_2 = None


# %% tags=["solution"]
def answer_2(row, kv, G):
    return [row // G, kv * G + row % G]


# %%
exercise(2, answer_2, "0c65dd417540", 13, 2, 6)

# %% [markdown]
# **3.** Write `answer_3(q, K)`: q is B T N H; give the rows of the programs, B K (T G) H, in the order of exercise 2.

# %%
answer_3 = None


# %% tags=["solution"]
def answer_3(q, K):
    B, T, N, H = q.shape
    return q.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B, K, -1, H)


# %%
exercise(3, answer_3, "81ad927270fb", jnp.arange(16.0).reshape(1, 2, 4, 2), 2)

# %% [markdown]
# **4.** A ring of 3 places, 16 tiles. How many times does the loading half wait for `free`, after the loop included?

# %%
answer_4 = None

# %% tags=["solution"]
answer_4 = (16 - 3) + 3

# %%
exercise(4, answer_4, "1241b7d46c50")

# %% [markdown]
# **5.** G = 6, and the products have 8 columns of queries. The step takes T tokens of a row, whose queries fill columns
# without a gap. What is the smallest T at which no column is left empty?

# %%
answer_5 = None

# %% tags=["solution"]
answer_5 = next(T for T in range(1, 100) if T * 6 % 8 == 0)

# %%
exercise(5, answer_5, "b34c9bb0ede6")
