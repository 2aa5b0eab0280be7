# %% [markdown]
# # 03B. Multi-query attention in a kernel: where the reduced reads go
#
# One key head for all N query heads: a decode step *can* read 1/N of what multi-head attention reads (03A). The kernel
# of 04B reads a key once if all query heads that share it are in one program. With N = 71 they hardly fit, and with one
# program a row most of the GPU idles. What is done about it costs reads and writes again. This notebook counts them.
#
# Words of 01B: a kernel runs in many copies, *programs*, each on one *SM* of the GPU; a *tile* is the piece of an array
# that a program works on; *registers* are the small memory of an SM in which a program's numbers live while it
# computes. Letters: B rows, S slots (one a token), N query heads, one key head, H channels of a query, key or value.

# %%
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
from jforge.lessons import EMPTY, KEPT, READ, exercise, picture, plots, reveal, traffic
from pallas_kernels.device import DEVICES

# %% [markdown]
# ## The reference
#
# For each row two products of matrices, N H by H S and N S by S H. The sizes of heads are those of Falcon-7B.


# %%
@jaxtyped(typechecker=beartype)
def reference(
    q: Float[np.ndarray, "B N H"], k: Float[np.ndarray, "B S H"], v: Float[np.ndarray, "B S H"],
    lengths: Int[np.ndarray, "B"], scale: float,
) -> Float[np.ndarray, "B N H"]:  # fmt: skip
    out = np.zeros(q.shape)
    for b, length in enumerate(lengths):
        weights = np.exp(scale * q[b].astype(float) @ k[b, :length].astype(float).T)  # N S
        out[b] = weights / weights.sum(axis=1, keepdims=True) @ v[b, :length].astype(float)
    return out


att = jforge.get("mqa")
falcon = att.models["Falcon-7B"]
N, H = falcon.num_attention_heads, falcon.head_dim
B, S = 2, 208
lengths = np.array([200, 70], np.int32)
draw = np.random.default_rng(0)
q, k, v = (draw.standard_normal(shape).astype(np.float16) for shape in ((B, N, H), (B, S, H), (B, S, H)))
for array in (k, v):
    array[np.arange(S) >= lengths[:, None]] = np.nan  # slots that nobody may read
truth = reference(q, k, v, lengths, H**-0.5)
needed = sum(sum(att.cost(falcon, context=int(n), dtype=jnp.float16).read.values()) for n in lengths)
print(f"N = {N}, H = {H}; cost: a step reads {needed:,} bytes of k and v")

# %% [markdown]
# ## Blocks of query heads, splits of slots
#
# The kernel of 04B with two parameters. ROWS: a program takes that many query heads, a power of two, and cdiv(N, ROWS)
# programs (cdiv rounds up) take them all. SPLITS: the slots of a row are cut into that many parts, for as many
# programs. A part's result is no result yet, as its softmax knows its own slots only. So it writes its output, divided
# by its own sum, and `lse`, the logarithm of that sum (exercise 4 of 01A). A second kernel merges:
#
#     out = sum over parts of exp(lse - m) out_part / sum over parts of exp(lse - m)        m = the largest lse
#
# Parts are kept in float32, so that a split changes no digit of the result.

# %%
import triton
import triton.language as tl


@triton.jit
def part_kernel(q, k, v, lengths, parts, lses, S, scale, N: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr,
                KEYS: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split, b = tl.program_id(1), tl.program_id(2)
    h = tl.arange(0, H)
    real = n < N
    query = tl.load(q + (b * N + n[:, None]) * H + h[None, :], mask=real[:, None], other=0.0)
    length = tl.load(lengths + b)
    size = tl.cdiv(tl.cdiv(length, KEYS), SPLITS) * KEYS  # slots of a split, in whole tiles
    end = tl.minimum(split * size + size, length)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, H], tl.float32)
    for first in tl.range(split * size, end, KEYS):
        s = first + tl.arange(0, KEYS)
        at = (b * S + s[:, None]) * H + h[None, :]
        key = tl.load(k + at, mask=(s < end)[:, None], other=0.0)
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        logits = tl.where((s < end)[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shrink = tl.exp(top - new_top)
        weights = tl.exp(logits - new_top[:, None])
        value = tl.load(v + at, mask=(s < end)[:, None], other=0.0)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    total_or_1 = tl.where(total == 0.0, 1.0, total)  # a split without slots: its part is 0, its lse -inf
    row = (b * N + n) * SPLITS + split
    tl.store(lses + row, top + tl.log(total_or_1), mask=real)
    tl.store(parts + row[:, None] * H + h[None, :], acc / total_or_1[:, None], mask=real[:, None])


@triton.jit
def merge_kernel(parts, lses, out, H: tl.constexpr, SPLITS: tl.constexpr):
    row = tl.program_id(0)  # one query head of one row
    p, h = tl.arange(0, SPLITS), tl.arange(0, H)
    lse = tl.load(lses + row * SPLITS + p)
    weight = tl.exp(lse - tl.max(lse, 0))
    part = tl.load(parts + (row * SPLITS + p[:, None]) * H + h[None, :])
    mean = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + row * H + h, mean.to(out.dtype.element_ty))


launch = triton_kernels.runtime.launch  # kernel[grid](*arguments), without NumPy's warnings in the interpreter
tensors = [to_device(a) for a in (q, k, v, lengths)]


def decode(rows, splits):
    """(out, parts, lses) with `rows` query heads in a program and each row's slots in `splits` parts (2^n)."""
    parts, lses, out = torch.empty(B, N, splits, H), torch.empty(B, N, splits), torch.empty_like(tensors[0])
    grid = triton.cdiv(N, rows), splits, B
    launch(part_kernel, grid, *tensors, parts, lses, S, H**-0.5, N=N, H=H, ROWS=rows, KEYS=32, SPLITS=splits)
    launch(merge_kernel, (B * N,), parts, lses, out, H=H, SPLITS=splits)
    return out, parts, lses


def right(out):
    return compare.relative(out.reshape(truth.shape), truth) <= compare.OUT["float16"]


for rows, splits in ((16, 1), (128, 1), (64, 4), (64, 8)):
    print(f"{rows:>3} heads a program, {splits} splits: equal", right(decode(rows, splits)[0]))

# %% [markdown]
# Row 1 has 70 tokens, 3 tiles of 32: with 4 splits one has nothing to do, with 8 there are five. Their lse is -inf, and
# the merge gives them the weight 0.
#
# ## Counted: loads by blocks of heads
#
# The interpreter (01B) asks one method for each load and one for each store; they write down the addresses
# (`traffic`).


# %%
def inside(addresses, tensor):
    """Which of the addresses lie in a tensor."""
    return addresses[(addresses >= tensor.data_ptr()) & (addresses < tensor.data_ptr() + tensor.nbytes)]


def moved(side, *those):
    """Bytes of these tensors that were loaded (or stored), each as often as it was."""
    return sum(t.element_size() * len(inside(places, t)) for t in those for _, places in side)


# %% [markdown]
# Predict: 71 heads in programs of 16, no split. How many times `cost` does the kernel load of k and v?

# %% tags=["predict"]
guess = None

# %%
counts = {}
for rows in (16, 32, 64, 128):
    with traffic() as (loads, _):
        decode(rows, 1)
    counts[rows] = moved(loads, *tensors[1:3])
reveal(counts[16] // needed, guess)
print("heads a program   programs a row   loaded / cost   rows that are real   accumulator")
for rows, n in counts.items():
    blocks = -(-N // rows)
    print(f"{rows:>15}{blocks:>17}{n / needed:>16.0f}{N / (blocks * rows):>20.0%}{rows * H * 4 / 1024:>12.0f} KiB")

# %% [markdown]
# One block of 128 loads once, but nearly half of its rows are padding. Its accumulator (rows x H numbers of 4 bytes)
# and the logits of as many rows lie in registers, and the more of them a program takes, the fewer programs run on an
# SM:

# %%
h100 = next(device for device in DEVICES if device.name == "H100")
print(f"registers of an SM of the H100: {h100.registers * 4 // 1024} KiB, for all programs that run on it")

# %% [markdown]
# With several blocks the reads come back. Those of the second block mostly end in *L2*, the cache that all SMs share,
# if both blocks run at the same time; the package's kernel numbers its programs so that they are neighbours.
#
# ## Counted: what splits cost
#
# One row, one block: one program. To use all SMs the slots are split. k and v are still loaded once, but now parts are
# written and read again:

# %%
print("splits    k and v   parts stored   parts loaded   out   all / cost")
for splits in (1, 2, 4, 8):
    with traffic() as (loads, stores):
        _, *both = decode(128, splits)
    kv, stored, again = moved(loads, *tensors[1:3]), moved(stores, *both), moved(loads, *both)
    written = 2 * truth.size
    print(f"{splits:>6}{kv:>11,}{stored:>15,}{again:>15,}{written:>8,}{(kv + stored + again) / needed:>10.1f}")

# %% [markdown]
# (Rows of 200 and 70 tokens are so short that nobody would split them, but the bytes of parts do not depend on S. And
# with one split a kernel would write the result itself, without a part.)
#
# Which slots each program loads, with two blocks of 64 heads and 4 splits:

# %%
with traffic() as (loads, stores):
    _, *both = decode(64, 4)
used = np.where(np.arange(S) < lengths[:, None], KEPT, EMPTY)
codes = {f"row {b}, {length} tokens": np.tile(used[b], (8, 1)) for b, length in enumerate(lengths)}
for (block, split, b), places in loads:
    places = inside(places, tensors[1])
    if len(places):
        slots = np.unique((places - tensors[1].data_ptr()) // 2 // H % S)
        codes[f"row {b}, {lengths[b]} tokens"][block * 4 + split, slots] = READ
shown = {name: rows[:, ::4] for name, rows in codes.items()}
picture(shown, "k: programs 0 to 3 are the splits of block 0, 4 to 7 of block 1", down="program", across="slot / 4")

# %% [markdown]
# The splits of a block share the slots; the blocks repeat each other. Program 3 of row 1 has nothing to load.
#
# ## Parts weigh more when reads are few
#
# A split costs N (H + 1) numbers of 4 bytes, once written and once read. In multi-head attention it is the same, as
# there are as many query heads. But there k and v are N times as large. For one row of 4,096 tokens:


# %%
def parts_bytes(splits):
    """Of one row, written and read again."""
    return 2 * splits * N * (H + 1) * 4


counted = moved(stores, *both) + moved(loads, *both)
print("the formula is what was counted, for 4 splits and 2 rows:", B * parts_bytes(4) == counted)
context, splits = 4096, np.array([2, 4, 8, 16, 32, 64])
mha = jforge.get("mha")
wide = mha.Config(hidden_size=N * H, num_attention_heads=N)
plt = plots()
for name, cost in (("multi-head", mha.cost(wide, context=context)), ("multi-query", att.cost(falcon, context=context))):
    kv = sum(cost.read.values())
    plt.plot(
        splits, [100 * parts_bytes(n) / kv for n in splits], marker="o", label=f"{name}: k and v {kv / 2**20:.0f} MiB"
    )
plt.xscale("log", base=2)
plt.yscale("log")
plt.xticks(splits, splits)
plt.yticks([0.1, 1, 10, 100], ["0.1 %", "1 %", "10 %", "100 %"])
plt.xlabel("splits")
plt.ylabel("parts / (k and v)")
plt.title(f"one row of {context:,} tokens, N = {N}, H = {H}, bfloat16", loc="left", fontsize=14)
plt.legend()
plt.show()
print(f"one split is as many bytes as {parts_bytes(1) / (2 * H * 2):.0f} slots of the multi-query cache")

# %% [markdown]
# So the reads that multi-query attention saves are not the end of the story: a split is worth it only if it is long
# against its part. (That the parts go through L2 makes them cheaper than reads of memory, but not free.)
#
# ## The packages
#
# Right on the same inputs (B T N H and B S K H), and what Triton's kernel loads:

# %%
as_op = [tensors[0][:, None], tensors[1][:, :, None], tensors[2][:, :, None], tensors[3]]
theirs, _ = triton_kernels.decode_attention(*as_op, scale=H**-0.5)
with traffic() as (loads, _):
    triton_kernels.decode_attention(*as_op, scale=H**-0.5)
last = [jnp.asarray(x[1:].cpu().numpy()) for x in as_op]  # row 1 alone: its interpreter is slow
other, _ = pallas_kernels.decode_attention(*last, scale=H**-0.5)
both_rows = torch.cat([theirs[:1, 0], to_device(np.asarray(other[:, 0]))])
print("triton_kernels:", right(theirs), " pallas_kernels:", right(both_rows))
programs = {program for program, places in loads if len(inside(places, tensors[1]))}
print(f"triton_kernels loads {moved(loads, *tensors[1:3]) / needed:.0f} times cost,", len(programs), "programs")

# %% [markdown]
# Two blocks of at most 64 rows. The Mosaic kernel takes its queries by *TMA*, the unit that copies boxes of an array;
# its boxes have 8 rows, which must be heads of one group, so it cuts the N heads into equal boxes of at most 8. What
# its plan says for several N (rows of 32,768 tokens, B = 8):

# %%
from pallas_kernels.decode_attention import make_facts

print("  N   heads in a box   boxes in a program   programs a split, which is loads / cost")
for heads in (8, 16, 32, 64, 71, 72, 128):
    sizes = dict(B=8, T=1, S=32768, N=heads, K=1, H=H, V=H)
    plan = make_facts(sizes, jnp.dtype("bfloat16"), None, scale=H**-0.5)
    print(f"{heads:>3}{plan.heads:>17}{plan.boxes:>21}{plan.row_blocks:>20}")

# %% [markdown]
# 71 is a prime number, so each box holds one head and seven rows of zeros, and a key is loaded nine times for what 72
# heads would get with two. Falcon's N is unlucky for this kernel. The counts of a config decide what a kernel can save.
#
# ## On a card
#
# The package's record has one multi-query shape, N = 8, for its own kernels and for those of others. Does each of them
# read k and v once? The time says how fast it must have read them, if so:

# %%
import json
from pathlib import Path

runs = [json.loads(line) for line in Path("../docs/gpu_runs.jsonl").read_text().splitlines()]
for run in [run for run in runs if run["what"] == "decode_attention" and run["K"] == 1]:
    gb = run["B"] * run["S"] * 2 * run["H"] * 2 / 1e9
    print(f"{run['device']}, {run['commit']}, {run['implementation']:11}: {run['median']:6.0f} us, "
          f"{gb / run['median'] * 1e6:5.0f} GB/s")  # fmt: skip
print(f"bandwidth in the data sheet: {h100.bandwidth} GB/s")

# %% [markdown]
# Those near the bandwidth cannot have read k and v twice from memory. Of the slow one the time does not tell the
# reason.
#
# The interpreter counts what a program asks for, not what reaches memory, and it tells no time. So how much L2 takes
# off the second block's reads is a question for a card.
#
# ## Exercises
#
# Set the answer, run the two cells. A function is called by the second one.
#
# **1.** One key head, N = 48, H = 128, bfloat16, one row of 8,192 tokens. A kernel takes 32 heads a program and 8
# splits. How many bytes of k and v do its programs load?

# %%
answer_1 = None

# %% tags=["solution"]
answer_1 = -(-48 // 32) * 8192 * 2 * 128 * 2

# %%
exercise(1, answer_1, "3d198506f5da")

# %% [markdown]
# **2.** The same call: how many bytes are the parts and their lse, written and read again, in float32?

# %%
answer_2 = None

# %% tags=["solution"]
answer_2 = 2 * 8 * 48 * (128 + 1) * 4

# %%
exercise(2, answer_2, "396b0d724fde")

# %% [markdown]
# **3.** Write `answer_3(outs, lses)`: outs is P N H and lses P N, of P parts, one of which may be empty (lse = -inf,
# and then its out may hold anything, even NaN). Give the merged output, N H.

# %%
answer_3 = None


# %% tags=["solution"]
def answer_3(outs, lses):
    weights = jnp.exp(lses - lses.max(axis=0))[..., None]
    return jnp.where(weights > 0, weights * outs, 0.0).sum(axis=0) / weights.sum(axis=0)


# %%
exercise(3, answer_3, "1ce4517bee7a", jnp.array([[[1.0]], [[jnp.nan]], [[3.0]]]), jnp.array([[1.0], [-jnp.inf], [2.0]]))

# %% [markdown]
# **4.** N = 71, H = 64, bfloat16, 16 splits. From how many tokens a row on are the parts (written and read) at most 5 %
# of the bytes of k and v, each read once?

# %%
answer_4 = None

# %% tags=["solution"]
answer_4 = int(np.ceil(parts_bytes(16) / (0.05 * att.cost(falcon, context=1).per_token)))

# %%
exercise(4, answer_4, "08563c56e75f")

# %% [markdown]
# **5.** Write `answer_5(heads, most)`: into how many equal boxes of at most `most` heads do the heads of a group fit
# without a gap? (The Mosaic kernel's rule, with most = 8.)

# %%
answer_5 = None


# %% tags=["solution"]
def answer_5(heads, most):
    return heads // max(n for n in range(1, most + 1) if heads % n == 0)


# %%
exercise(5, answer_5, "5a18058bea31", 60, 8)
