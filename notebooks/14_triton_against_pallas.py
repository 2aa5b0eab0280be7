# %% [markdown]
# # 14. Triton against Pallas
#
# The package has each of its kernels twice: in *Triton*, called with torch tensors, and in *Pallas Mosaic GPU*, called
# with JAX arrays. Both compute the same function on the same card. Which one is faster, where, and how would one know?
#
# This notebook first says how a fair timing is made, and checks the records against it. Then it shows the measured
# times, of both packages and of what others offer for the same work (the *peers*). Where there is a GPU it measures
# anew at the end; everything before it needs none.
#
# Letters: B rows, N query heads, K key heads, S tokens in each row, H channels of a query, key or value, I heads of an
# index, L entries of a list that a query reads (notebooks 08 to 11 have the last two).

# %%
import inspect
import json
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from jforge.harness import backends

backends.before_jax_starts()  # where there is a GPU: leave memory to torch

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from beartype import beartype
from jaxtyping import Float, jaxtyped

import jforge
from jforge.core import compare
from jforge.harness import bench, ops
from jforge.lessons import exercise, plots, reveal

records = [json.loads(line) for line in Path("../docs/gpu_runs.jsonl").read_text().splitlines()]
timed = [row for row in records if "median" in row and "H100" in row["device"]]
cards = {(row["device"], row["driver"], row["commit"], row["command"]) for row in timed}
print(len(timed), "timed rows;", *sorted(cards))
print(timed[0]["versions"])

# %% [markdown]
# ## A fair timing
#
# **Which clock.** A call returns before its work is done: the program only hands it to the device. A clock around the
# call measures the handing over. So one waits for the result, and the first calls do not count, as they compile. This
# holds on a CPU too:

# %% tags=["varies"]
x = jnp.ones((300, 300))


@jax.jit
def work(x):
    for _ in range(10):
        x = x @ x * 1e-3
    return x


def milliseconds(call):
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


print(f"first call: {milliseconds(lambda: jax.block_until_ready(work(x))):.1f} ms")
print(f"second call, not waited for: {milliseconds(lambda: work(x)):.2f} ms")
jax.block_until_ready(work(x))  # until the second one is done, too
print(f"another one, waited for: {milliseconds(lambda: jax.block_until_ready(work(x))):.1f} ms")

# %% [markdown]
# On a GPU a wait takes some microseconds itself, as much as a short kernel. The package therefore asks *CUPTI*,
# NVIDIA's own recorder, when each kernel began and ended, and adds these durations up: all kernels of one call, the
# merge of splits (05B) included. CUPTI sees the kernels of both frameworks in the same way. As a check, one and the
# same kernel was called through both on the same buffers:

# %%
check = next(row for row in records if row["what"] == "timing")
print(f"through JAX {check['jax']:.1f} us, through torch {check['torch']:.1f} us; {check['device']}, {check['commit']}")

# %% [markdown]
# **Cold buffers.** A card keeps what it read last in *L2*, a cache that all of its processors share. If a benchmark
# calls a kernel again on the same few MB, it measures L2 and not memory, while a model in between two calls of one
# layer reads all of its other layers. So a call is given several sets of buffers in turn, together four times as large
# as L2 (`bench.L2_BYTES`, that of the largest card here).
#
# Predict: how many sets does the smallest call need, B = 1, K = 8, S = 1,024, H = 128 in bfloat16?

# %% tags=["predict"]
guess = None


# %%
def moved(row):
    """Bytes of a dense decode that must move: keys and values, the query, the output."""
    return 2 * row["B"] * (2 * row["S"] * row["K"] * row["H"] + 2 * row["N"] * row["H"])


dense = [row for row in timed if row["what"] == "decode_attention" and not row.get("window")]
smallest = min(dense, key=moved)
print(f"L2: {bench.L2_BYTES:,} bytes")
reveal(-(-4 * bench.L2_BYTES // moved(smallest)), guess)
as_recorded = [min(64, -(-4 * bench.L2_BYTES // moved(row))) == row["sets"] for row in dense]
print(f"the records agree, with at most 64 sets: {all(as_recorded)}")

# %% [markdown]
# **Many samples, and the middle one.** A time is the median of its samples; p10 and p90 say that a tenth of them was
# shorter, a tenth longer. A difference that is smaller than this spread says nothing.


# %%
@jaxtyped(typechecker=beartype)
def spread(p10: Float[np.ndarray, "n"], p90: Float[np.ndarray, "n"], median: Float[np.ndarray, "n"]) -> dict[str, str]:
    width = (p90 - p10) / median
    return {"median": f"{np.median(width):.1%}", "largest": f"{width.max():.1%}"}


print({row["samples"] for row in timed}, "samples; (p90 - p10) / median:",
      spread(*(np.array([row[name] for row in timed]) for name in ("p10", "p90", "median"))))  # fmt: skip

# %% [markdown]
# **Right before fast.** A row has a time only if its output, on the timed inputs, was near that of the reference. And
# **the same bytes for everybody**: GB/s counts what the algorithm must move, not what a kernel does beside it (parts of
# splits, copies). Both can be checked:

# %%
gate = compare.OUT["bfloat16"]
print(f"largest error {max(row['error'] for row in timed):.1e}, allowed {gate}")
rates = [moved(row) / row["median"] / 1e3 / row["GB_per_s"] for row in dense]
print(f"our GB/s over the records': {min(rates):.4f} to {max(rates):.4f}")
cost = jforge.get("gqa").cost(jforge.get("gqa").models["Llama-3.1-8B"], context=4096)
row = next(row for row in dense if (row["B"], row["N"], row["K"], row["S"]) == (1, 32, 8, 4096))
print(f"of {moved(row):,} bytes, `cost` counts {sum(cost.read.values()):,} as read from the cache")

# %% [markdown]
# Last, a *ceiling*: what does a kernel reach that only reads and adds up? The data sheet's number is not it.

# %%
from pallas_kernels.device import DEVICES

ceilings = [row["GB_per_s"] for row in records if row["what"] == "ceiling" and "H100" in row["device"]]
sheet = next(device.bandwidth for device in DEVICES if device.name == "H100")
ceiling = max(ceilings)
print([f"{value:.0f}" for value in ceilings], f"GB/s measured, {sheet} on the data sheet: {ceiling / sheet:.0%}")

# %% [markdown]
# ## Dense decode, with the peers
#
# `decode_attention` over a full cache. The peers: cuDNN, NVIDIA's library, called through JAX and through torch;
# torch's FlashAttention; and FlexAttention, which compiles a Triton kernel from a description. Microseconds, and our
# time over that of the fastest peer:

# %%
PEERS = ("cudnn (JAX)", "sdpa cudnn", "sdpa flash", "flex")
calls = defaultdict(dict)
for row in dense:
    calls[row["B"], row["N"], row["K"], row["S"]][row["implementation"]] = row
calls = {sizes: found for sizes, found in calls.items() if set(PEERS) <= set(found)}
table = pd.DataFrame(
    {sizes: {name: found[name]["median"] for name in ("pallas", "triton", *PEERS)} for sizes, found in calls.items()}
).T
table.index = pd.MultiIndex.from_tuples(table.index, names=list("BNKS"))
best = table[list(PEERS)].min(axis=1)
for name in ("pallas", "triton"):
    table[f"{name} / best peer"] = table[name] / best
table.style.format("{:.1f}").format("{:.2f}", subset=[c for c in table if "/" in c]).set_uuid("dense")

# %%
plt = plots()
figure, ax = plt.subplots(figsize=(10, 5.4))
order = sorted(calls, key=lambda sizes: moved(calls[sizes]["pallas"]))
for name, marker in zip(("pallas", "triton", *PEERS), "osv^D*", strict=True):
    ax.plot([calls[sizes][name]["GB_per_s"] for sizes in order], marker, label=name, markersize=10, alpha=0.8)
ax.axhline(ceiling, color="black", linestyle=":", linewidth=1.5)
ax.text(0, ceiling * 1.02, "a kernel that only reads", fontsize=12)
labels = ["\n".join(f"{letter} {size:,}" for letter, size in zip("BNKS", sizes, strict=True)) for sizes in order]
ax.set_xticks(range(len(order)), labels, fontsize=11)
ax.set(ylabel="GB/s", ylim=(0, 3500), xlabel="calls, from few bytes to many")
figure.legend(frameon=False, ncols=6, loc="outside upper center", fontsize=12)
plt.show()

# %% [markdown]
# Calls that move much: nearly everybody is at the ceiling, so nobody can be much faster than anybody. Dense decode is
# bound by memory (05A), and a language cannot change that. (FlexAttention falls far behind where there are few programs
# with long rows, B K = 8 to 64; see 05B on splits.) Calls that move little: the times are a few microseconds, and what
# counts is how soon a kernel starts, how it is split, and whether a second one must merge.
#
# ## Both packages, all ops
#
# How much longer does Triton take than Pallas? 1 means equally long. Predict the geometric mean over all calls that
# were timed in both (the exponential of the mean logarithm, so that 2 and 1/2 cancel).

# %% tags=["predict"]
guess = None

# %%
AXES = ("what", "B", "N", "I", "K", "S", "L", "window", "block_size")
pairs = defaultdict(dict)
for row in timed:
    if row["implementation"] in ("pallas", "triton"):
        pairs[tuple(row.get(name) for name in AXES)][row["implementation"]] = row
ratios = {sizes: found["triton"]["median"] / found["pallas"]["median"] for sizes, found in pairs.items()}
reveal(float(np.exp(np.mean(np.log(list(ratios.values()))))), guess)
near = sum(0.95 < ratio < 1.05 for ratio in ratios.values())
print(f"{len(ratios)} calls; within 5 %: {near}; Triton faster: {sum(ratio < 1 for ratio in ratios.values())}")

# %%
figure, ax = plt.subplots(figsize=(10, 9.6))
order = sorted(ratios, key=ratios.get)
names = []
for what, *sizes in order:
    shown = [f"{letter}{size:,}" for letter, size in zip("BNIKSL", sizes[:6], strict=True) if size]
    names.append(" ".join([what.removeprefix("decode_"), *shown, *([f"window {sizes[6]:,}"] if sizes[6] else [])]))
values = [ratios[sizes] for sizes in order]
ax.barh(range(len(order)), np.array(values) - 1, left=1, color=["C1" if v > 1 else "C0" for v in values])
ax.axvline(1, color="black", linewidth=1.5)
ax.set_yticks(range(len(order)), names, fontsize=11)
ax.set(xlabel="time of Triton / time of Pallas", xlim=(0.75, 2), ylim=(-0.6, len(order) - 0.4))
plt.show()

# %% [markdown]
# Orange: Triton takes longer; blue: Pallas does. Most calls differ by a few percent. Look at the ends of the list:

# %%
for sizes in (*order[:3], *order[-7:]):
    found = pairs[sizes]
    shares = ", ".join(
        f"{name} {row['of_ceiling']:.0%} of the ceiling, kernels {row['kernels']}" for name, row in found.items()
    )
    print(f"{ratios[sizes]:.2f}  {sizes[0]:20} {shares}")

# %% [markdown]
# *Where Pallas is faster*: latent attention with 128 heads, dense (`decode_mla`) or over a list of tokens
# (`decode_sparse_mla`), and lists of single entries. These are the calls with much arithmetic for each byte (06A), or
# with bytes that lie scattered. There it counts how copies, products and the softmax overlap, and in Mosaic GPU the
# author says that: which warpgroup copies and which computes, what a barrier waits for, where the weights lie. In
# Triton the compiler decides; the comments at the top of `triton_kernels/decode_mla.py` tell how its author had to talk
# it into the right order.
#
# *Where Triton is faster*: by little, in the scores of an index; by more in the MSA step, which is made of such scores,
# a top-k and sparse attention. The records have the time of the whole step, not of its parts.
#
# ## What it costs to write them
#
# The length of the source is a rough measure, since both packages have code that several ops share. Lines that are not
# empty in the files of two ops:

# %%
import pallas_kernels
import triton_kernels


def lines(package, *stems):
    folder = Path(inspect.getfile(package)).parent
    return sum(bool(line.strip()) for stem in stems for line in (folder / f"{stem}.py").read_text().splitlines())


SPLIT = {"decode_mla": ("decode_mla", "decode_mla_few", "decode_mla_many")}
for op in ("decode_attention", "decode_mla"):
    files = SPLIT.get(op, (op,))
    print(f"{op:18} pallas {lines(pallas_kernels, *files):>4}, triton {lines(triton_kernels, op):>4}")

# %% [markdown]
# For `decode_mla` Pallas has two kernels where Triton has one: few query rows and many want different layouts (06B),
# and there the author writes both. What each author decides:
#
# | | Triton | Mosaic GPU |
# |---|---|---|
# | tiles, grid, splits | the author | the author |
# | how a tile comes to shared memory | the compiler, `num_stages` deep | the author: copies, ring, barriers |
# | which warps do what | the compiler, `num_warps` of them | the author: a role for each warpgroup |
# | layout of registers, swizzle | the compiler | the author names it |
# | masks of a load | any, element by element | boxes; what is outside must be blanked |
# | on a machine without a GPU | interpreter: values and masks | interpreter: also barriers and races |
#
# ## Live
#
# The rest is measured where the notebook runs, if there is a GPU: three calls of `decode_attention`, without the peers.

# %% tags=["varies"]
if jax.default_backend() == "gpu":
    op = next(op for op in ops.OPS if op.name == "decode_attention")
    few = replace(op, bench=tuple(replace(work, peers=None) for work in op.bench[:3]))
    print(jax.devices()[0].device_kind)
    for row in bench.bench_gpu(few, samples=20):
        if row["what"] == "ceiling":
            print(f"a kernel that only reads: {row['GB_per_s']:.0f} GB/s")
        elif "median" in row:
            sizes = ", ".join(f"{name} = {row[name]:,}" for name in "BNKS")
            print(f"{row['implementation']:7} {sizes}: {row['median']:7.1f} us, {row['of_ceiling']:.0%} of the ceiling")
else:
    print("There is no GPU here. On a machine with one, `jforge bench --plot rates.png` measures all calls.")

# %% [markdown]
# (The interpreters are of no use for this: they run on the CPU, program after program, and their times say nothing.)
#
# ## Exercises
#
# Set the answer, run the two cells. A function is called by the second one.
#
# **1.** A call has B = 32, N = 32, K = 8, S = 4,096, H = 128 in bfloat16. How many microseconds does it take at least
# on the measured card, at the rate `ceiling`? Count as `moved` does.

# %%
answer_1 = None

# %% tags=["solution"]
answer_1 = moved({"B": 32, "N": 32, "K": 8, "S": 4096, "H": 128}) / ceiling / 1e3

# %%
exercise(1, answer_1, "91b3e8d686fd")

# %% [markdown]
# **2.** Llama-3.1-8B has 32 layers. One row, 4,096 tokens: how many microseconds does attention take in one decode
# step, by the measured times of `pallas`? (`calls` has them.)

# %%
answer_2 = None

# %% tags=["solution"]
answer_2 = 32 * calls[1, 32, 8, 4096]["pallas"]["median"]

# %%
exercise(2, answer_2, "91ccb8145abe")

# %% [markdown]
# **3.** Write `answer_3(samples)`: (median, p90 - p10) of a NumPy array of times, as the records would have them; p10
# and p90 by `np.quantile`.

# %%
answer_3 = None


# %% tags=["solution"]
def answer_3(samples):
    p10, median, p90 = np.quantile(samples, [0.1, 0.5, 0.9])
    return [median, p90 - p10]


# %%
exercise(3, answer_3, "edf9c70a6ecc", np.array([10.0, 11.0, 10.5, 30.0, 10.2, 10.4, 10.1, 10.3, 10.6, 10.7, 10.8]))

# %% [markdown]
# **4.** A kernel is called again and again on one buffer of 30 MB, L2 answers 80 % of its reads at 3 times the rate of
# memory, and the rest comes at the memory's rate, one after the other. How many times too fast does the kernel look?

# %%
answer_4 = None

# %% tags=["solution"]
answer_4 = 1 / (0.8 / 3 + 0.2)

# %%
exercise(4, answer_4, "a163b5482049")
