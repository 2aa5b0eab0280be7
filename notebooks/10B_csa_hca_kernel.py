# %% [markdown]
# # 10B. Two parts, one softmax
#
# A layer of DeepSeek-V4 (notebook 10A) reads from two places in one step: the *window*, a ring with a vector for each
# of the last W tokens, and the *entries*, one for m tokens each: all of them in HCA, those that an indexer picks in
# CSA. One softmax runs over both. A vector is key and value of all heads, and a *sink*, one more logit without a value,
# joins the denominator:
#
#     out_n = sum_r exp(l_n,r) x_r / (exp(sink_n) + sum_r exp(l_n,r))      r over window and entries
#     l_n,r = scale q_n . x_r
#
# A kernel is written for one array. This notebook has both ways out: two kernels and a *merge*, or one kernel with two
# loops.
#
# Letters: B rows, N heads of H channels, W slots of the ring, E entries, L picks. Words of 01B and 05B: a kernel runs
# in many copies, the *programs*, each on an *SM*, one of the card's processors. A program copies *tiles* from global
# memory to the SM. `top`, `total` and `acc` are the online softmax: the largest logit so far, the sum of exp(l - top),
# and the sum of exp(l - top) x.

# %%
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from beartype import beartype
from jaxtyping import Float, Int, jaxtyped

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
# ## The reference
#
# For each row and head, in float64. Row 0 has a full ring; row 1 has 20 tokens so far, and fewer picks than L (-1
# stands for none). To a softmax the order of keys is all the same, so nobody has to know where the ring begins.

# %%
B, N, H, W, E, L = 2, 16, 64, 64, 192, 48
scale = H**-0.5
torch.manual_seed(0)


def drawn(*shape):
    return torch.randn(*shape, device="cpu").to(device)  # the same numbers on every device


q, ring, entries = drawn(B, N, H).half(), drawn(B, W, H).half(), drawn(B, E, H).half()
sinks = drawn(N)
filled = torch.tensor([64, 20], dtype=torch.int32)  # slots of the ring that are used
picks = torch.stack([torch.randperm(150, device="cpu")[:L] for _ in range(2)]).int().to(device)
picks[1, 5:] = -1


@jaxtyped(typechecker=beartype)
def reference(
    q: Float[torch.Tensor, "B N H"], ring: Float[torch.Tensor, "B W H"], entries: Float[torch.Tensor, "B E H"],
    sinks: Float[torch.Tensor, "N"], filled: Int[torch.Tensor, "B"], picks: Int[torch.Tensor, "B L"],
) -> Float[np.ndarray, "B N H"]:  # fmt: skip
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(len(q)):
        x = torch.cat([ring[b, : int(filled[b])], entries[b, picks[b][picks[b] >= 0].long()]]).double()
        for n in range(q.shape[1]):
            logits = torch.cat([scale * x @ q[b, n].double(), sinks[n : n + 1].double()])
            out[b, n] = torch.softmax(logits, 0)[:-1] @ x
    return out.cpu().numpy()


want = reference(q, ring, entries, sinks, filled, picks)


def close(a, b=want):
    return compare.relative(a, b) <= compare.OUT["float16"]


# %% [markdown]
# ## Two kernels
#
# One kernel for both parts: slots come from a list, or are counted if there is none. (A list of all slots of the ring
# would do too, but it would have to be loaded.) A tile of vectors is loaded once and used as keys and as values
# (notebook 06B). Beside its output a part gives *lse*, the log of its sum of exp(l).


# %%
@triton.jit
def absorb(queries, x, there, scale, top, total, acc):
    """The online softmax after one more tile x of vectors, of which those that are `there` count."""
    logits = tl.dot(queries, tl.trans(x), input_precision="ieee") * scale
    logits = tl.where(there[None, :], logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    shrink, weights = tl.exp(top - new_top), tl.exp(logits - new_top[:, None])
    total = total * shrink + tl.sum(weights, 1)
    return new_top, total, tl.dot(weights.to(x.dtype), x, acc * shrink[:, None], input_precision="ieee")


@triton.jit
def part_kernel(q, x, slots, counts, out, lse, S, LENGTH, scale,
                N: tl.constexpr, H: tl.constexpr, KEYS: tl.constexpr, LISTED: tl.constexpr):  # fmt: skip
    b = tl.program_id(0)
    n, h = tl.arange(0, N), tl.arange(0, H)
    place = (b * N + n)[:, None] * H + h[None, :]
    queries = tl.load(q + place)
    top = tl.full([N], -1e30, tl.float32)  # finite: no -inf - (-inf) where a tile has nothing
    total, acc = tl.zeros([N], tl.float32), tl.zeros([N, H], tl.float32)
    end = LENGTH
    if not LISTED:
        end = tl.load(counts + b)
    for first in tl.range(0, end, KEYS):
        slot = first + tl.arange(0, KEYS)
        there = slot < end
        if LISTED:
            slot = tl.load(slots + b * LENGTH + slot, mask=there, other=-1)
            there = slot >= 0
        tile = tl.load(x + (b * S + slot)[:, None] * H + h[None, :], mask=there[:, None], other=0.0)
        top, total, acc = absorb(queries, tile, there, scale, top, total, acc)
    empty = total == 0.0
    tl.store(out + place, acc / tl.where(empty, 1.0, total)[:, None])
    tl.store(lse + b * N + n, tl.where(empty, float("-inf"), top + tl.log(tl.where(empty, 1.0, total))))


def parts(picks=picks):
    """(outs: 2 B N H, lses: 2 B N) of the window and of the entries."""
    outs, lses = torch.empty(2, B, N, H), torch.empty(2, B, N)
    sizes = {"N": N, "H": H, "KEYS": 16}
    launch(part_kernel, (B,), q, ring, picks, filled, outs[0], lses[0], W, W, scale, **sizes, LISTED=False)
    launch(part_kernel, (B,), q, entries, picks, filled, outs[1], lses[1], E, L, scale, **sizes, LISTED=True)
    return outs, lses


outs, lses = parts()
print(
    "one head of each row, lse of window and entries:",
    lses[:, 0, 0].cpu().numpy().round(2),
    lses[:, 1, 0].cpu().numpy().round(2),
)

# %% [markdown]
# ## The merge
#
# exp(lse) is the sum of a part's exp(l), its share of the denominator. So the output over both is the mean of the two
# outputs with these weights. As in any softmax the largest is taken off first. The sink is a part without an output: it
# only makes the denominator larger, once.


# %%
@triton.jit
def merge_kernel(outs, lses, sinks, out, ROWS, PARTS: tl.constexpr, N: tl.constexpr, H: tl.constexpr):
    row = tl.program_id(0)  # of B N
    h = tl.arange(0, H)
    top = tl.load(sinks + row % N)
    for p in tl.static_range(PARTS):
        top = tl.maximum(top, tl.load(lses + p * ROWS + row))
    total, acc = tl.exp(tl.load(sinks + row % N) - top), tl.zeros([H], tl.float32)
    for p in tl.static_range(PARTS):
        weight = tl.exp(tl.load(lses + p * ROWS + row) - top)
        total += weight
        acc += weight * tl.load(outs + (p * ROWS + row) * H + h)
    tl.store(out + row * H + h, acc / total)


def merge(outs, lses, sinks=sinks):
    out = torch.empty(B, N, H)
    launch(merge_kernel, (B * N,), outs, lses, sinks, out, B * N, PARTS=len(outs), N=N, H=H)
    return out


print("equal:", close(merge(outs, lses)))
none = torch.full_like(picks, -1)
print("no entry yet:", close(merge(*parts(none)), reference(q, ring, entries, sinks, filled, none)))

# %% [markdown]
# A part that saw nothing has lse = -inf, so the weight 0. (What it wrote as output must then be a number: 0 x NaN is
# NaN. The package's merge does not read such a part.)
#
# The trap is the sink. A kernel of attention with sinks, as the window's in other models, adds the sink itself. If both
# parts do, it counts twice, and nothing fails:

# %%
with_sink = torch.logaddexp(lses, sinks)  # what the parts give if each has the sink in its denominator
shrunk = outs * torch.exp(lses - with_sink)[..., None]
no_sink = torch.full_like(sinks, -1e30)  # of the merge
once = torch.stack([shrunk[0], outs[1]]), torch.stack([with_sink[0], lses[1]])
print("the sink in one part: equal", close(merge(*once, no_sink)))
print("the sink in both parts: equal", close(merge(shrunk, with_sink, no_sink)))

# %% [markdown]
# ## What the merge moves
#
# The parts are written in float32 and read again, N (H + 1) numbers each. Is that much? The sizes of DeepSeek-V4-Flash:
# a CSA layer reads the ring of W = 128 and L = 512 entries of 512 channels, in bfloat16, once for all 64 heads.
#
# Predict: the bytes of the two parts, written and read, are how many times the bytes of ring and picked entries?

# %% tags=["predict"]
guess = None

# %%
flash = jforge.get("csa").models["DeepSeek-V4-Flash"]
heads, width = flash.num_attention_heads, flash.head_dim
read = (flash.sliding_window + flash.index_topk) * width * 2
moved = 2 * 2 * heads * (width + 1) * 4  # two parts, written and read
reveal(moved / read, guess)
print(f"read: {read:,} bytes; the parts: {moved // 2:,} written and as many read")

# %% [markdown]
# 64 heads share one read of a vector, but each has an output of its own, as wide as a vector and in float32. (If it is
# still in *L2*, the cache that all SMs share, reading it back is cheaper than from memory.)
#
# ## One kernel
#
# The other way: one program goes over the ring, and then over the list, with the same `top`, `total` and `acc`. The
# sink is added at the end. Nothing is written but the result.


# %%
@triton.jit
def both_kernel(q, ring, entries, picks, filled, sinks, out, W, E, L, scale,
                N: tl.constexpr, H: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    b = tl.program_id(0)
    n, h, j = tl.arange(0, N), tl.arange(0, H), tl.arange(0, KEYS)
    place = (b * N + n)[:, None] * H + h[None, :]
    queries = tl.load(q + place)
    top = tl.full([N], -1e30, tl.float32)
    total, acc = tl.zeros([N], tl.float32), tl.zeros([N, H], tl.float32)
    used = tl.load(filled + b)
    for first in tl.range(0, used, KEYS):
        there = first + j < used
        tile = tl.load(ring + (b * W + first + j)[:, None] * H + h[None, :], mask=there[:, None], other=0.0)
        top, total, acc = absorb(queries, tile, there, scale, top, total, acc)
    for first in tl.range(0, L, KEYS):
        slot = tl.load(picks + b * L + first + j, mask=first + j < L, other=-1)
        there = slot >= 0
        tile = tl.load(entries + (b * E + slot)[:, None] * H + h[None, :], mask=there[:, None], other=0.0)
        top, total, acc = absorb(queries, tile, there, scale, top, total, acc)
    total += tl.exp(tl.load(sinks + n) - top)
    tl.store(out + place, acc / total[:, None])


def both(picks=picks):
    out = torch.empty(B, N, H)
    launch(both_kernel, (B,), q, ring, entries, picks, filled, sinks, out, W, E, L, scale, N=N, H=H, KEYS=16)
    return out


print("equal:", close(both()))

# %% [markdown]
# (The sink is added with the top of the vectors. If a sink were larger than all logits by more than 88, exp would
# overflow; a careful kernel takes the sink into the top.)
#
# ## Loads and stores
#
# Where torch sees no GPU, all this ran in Triton's *interpreter*: one program after the other, in NumPy. Results can be
# trusted for float16, times mean nothing. But each load and store can be written down (`traffic`, which interprets with
# a GPU too):


# %%
def times(found, tensor):
    """How often each number of a tensor is among the addresses of these loads or stores."""
    every = np.concatenate([addresses for _, addresses in found])
    at = (every - tensor.data_ptr()) // tensor.element_size()
    at = at[(at >= 0) & (at < tensor.numel())]
    return np.bincount(at, minlength=tensor.numel()).reshape(tensor.shape)


with traffic() as (loads, stores):
    both()
fused = {"ring": times(loads, ring), "entries": times(loads, entries)}
fused_stored = 4 * sum(len(addresses) for _, addresses in stores)
with traffic() as (loads, stores):
    outs, lses = parts()
    merge(outs, lses)
apart = {"ring": times(loads, ring), "entries": times(loads, entries)}
apart_stored = 4 * sum(len(addresses) for _, addresses in stores)

att = jforge.get("csa")
sizes = {
    "hidden_size": 32, "num_attention_heads": N, "head_dim": H, "qk_rope_head_dim": 16, "q_lora_rank": 16,
    "o_groups": 2, "o_lora_rank": 8, "sliding_window": W, "compress_rate": 4, "index_n_heads": 8, "index_head_dim": 16,
    "index_topk": L,
}  # fmt: skip
cost = att.cost(att.Config(**sizes), context=4 * E, dtype=jnp.float16).read
for name, buffer in (("ring", "kv"), ("entries", "c_kv")):
    row = [2 * counts[name][0].sum() for counts in (apart, fused)]
    print(f"{name:8} row 0: two kernels {row[0]:,}, one kernel {row[1]:,}, cost {cost[buffer]:,} bytes")
print(f"stored: two kernels and merge {apart_stored:,}, one kernel {fused_stored:,} bytes")

# %%
plt = plots()
figure, axes = plt.subplots(2, 1, figsize=(10, 3.8))
for ax, name, size in zip(axes, ("ring", "entries"), (W, E), strict=True):
    shown = np.stack([fused[name][b].max(axis=1) for b in range(B)])  # each vector is read whole
    image = ax.pcolormesh(shown, cmap="Blues", vmin=0, vmax=2)
    ax.axhline(1, color="#666666", linewidth=1)
    ax.set(yticks=(0.5, 1.5), yticklabels=("row 0", "row 1"), ylim=(2, 0), xlim=(0, size))
    ax.set_title(f"{name}: slot", loc="left", fontsize=14)
figure.colorbar(image, ax=axes, label="times read", ticks=range(3))
plt.show()

# %% [markdown]
# Both ways read the same, each vector once. Row 0 has its whole ring and 48 picked entries, row 1 twenty tokens and
# five entries. The difference is what is stored on the way.
#
# So why does anybody merge? Because of *programs*. One program for a row and all its heads uses one SM, and an H100 has
# many (the cell below counts). With few rows the work of a row must be cut among programs, then there are parts anyway,
# and the merge joins the window's with them for one part more. And one kernel for each kind of read can be used by all
# mechanisms. The package does it so: `decode_attention` for the ring, `decode_block_sparse` for the picks,
# `merge_states`.

# %%
for rows in (1, 16, 64):
    programs = rows * heads // 64
    print(f"{rows:>2} rows, 64 heads a program: {programs:>2} programs, {min(1, programs / h100.sms):.0%} of the SMs")

# %% [markdown]
# ## HCA in Mosaic GPU
#
# HCA reads all complete entries, so both parts are arrays without a list, and *TMA*, the unit that copies boxes while
# threads do something else, can bring tiles from either. The tile's number says from which: the first tiles are the
# ring's, the others are entries. A *barrier* says when a tile is there; `wgmma` multiplies tiles in shared memory, with
# the 64 vectors of a tile as its rows and the heads as its columns; *swizzle* is how a tile lies in shared memory so
# that its rows and columns can be read equally fast.

# %%
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

KEYS, STAGES = 64, 2
WGMMA = plgpu.Layout.WGMMA  # which thread holds which element of a product
BY_COLUMN = WGMMA.reduce(0)  # of a vector with one element a column


def down(vector, shape):
    """A vector with one element a column, repeated down the column."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, (1,)), WGMMA)


def product(a, b, shape):
    def run(accumulator):
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def hca_body(q, ring, entries, sinks, filled, complete, out, q_s, x_s, p_s, out_s, q_full, full):
    b = lax.axis_index("row")
    near = W // KEYS  # tiles of the ring
    steps = near + E // KEYS

    def fetch(i):
        slot = lax.rem(i, STAGES)

        def copy(source, tile):
            plgpu.copy_gmem_to_smem(source.at[b, pl.ds(tile * KEYS, KEYS)], x_s.at[slot], full.at[slot])

        pl.when(i < near)(lambda: copy(ring, i))
        pl.when(i >= near)(lambda: copy(entries, i - near))

    def turn(i, state):
        acc, top, total = state
        slot = lax.rem(i, STAGES)
        end = jnp.where(i < near, filled[b] - i * KEYS, complete[b] - (i - near) * KEYS)  # so many vectors count
        plgpu.barrier_wait(full.at[slot])
        logits = product(x_s.at[slot], q_s.transpose((1, 0)), (KEYS, N)) * scale
        s = plgpu.broadcasted_iota(jnp.int32, (KEYS, N), 0, layout=WGMMA)
        logits = jnp.where(s < end, logits, -jnp.inf)
        new_top = jnp.maximum(top, logits.max(axis=0))
        shrink, weights = jnp.exp(top - new_top), jnp.exp(logits - down(new_top, (KEYS, N)))
        p_s.transpose((1, 0))[...] = weights.astype(p_s.dtype)
        plgpu.commit_smem()  # what threads wrote is seen by wgmma only after this
        more = product(x_s.at[slot].transpose((1, 0)), p_s.transpose((1, 0)), (H, N))  # the same tile, as values
        plgpu.commit_smem()  # all threads are here, so nobody reads this tile any more
        pl.when(i + STAGES < steps)(lambda: fetch(i + STAGES))
        return acc * down(shrink, (H, N)) + more, new_top, total * shrink + weights.sum(axis=0)

    plgpu.copy_gmem_to_smem(q.at[b], q_s, q_full)
    for i in range(STAGES):
        fetch(jnp.int32(i))
    plgpu.barrier_wait(q_full)
    acc = plgpu.layout_cast(jnp.zeros((H, N), jnp.float32), WGMMA)
    top = plgpu.load(sinks, layout=BY_COLUMN, optimized=False)  # the sink comes first: it is the first top ...
    total = plgpu.layout_cast(jnp.ones((N,), jnp.float32), BY_COLUMN)  # ... and exp(sink - top) = 1
    acc, top, total = lax.fori_loop(0, steps, turn, (acc, top, total))
    out_s.transpose((1, 0))[...] = plgpu.layout_cast(acc * down(1 / total, (H, N)), plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_s, out.at[b])
    plgpu.wait_smem_to_gmem(0)


def operand(*shape):
    return plgpu.SMEM(shape, jnp.float16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


complete = torch.tensor([150, 3], dtype=torch.int32)
on_gpu = jax.default_backend() == "gpu"
mosaic = plgpu.kernel(
    hca_body, out_type=jax.ShapeDtypeStruct((B, N, H), jnp.float32), grid=(B,), grid_names=("row",), kernel_name="hca",
    scratch_types=[
        operand(N, H), operand(STAGES, KEYS, H), operand(N, KEYS), plgpu.SMEM((N, H), jnp.float32), plgpu.Barrier(),
        plgpu.Barrier(num_barriers=STAGES),
    ],
    interpret=None if on_gpu else plgpu.InterpretGPUParams(detect_races=True),
)(*(jnp.asarray(x.cpu().numpy()) for x in (q, ring, entries, sinks, filled, complete)))  # fmt: skip
every = torch.arange(E).expand(B, E)
every = torch.where(every < complete[:, None], every, -1).int()
print("equal:", close(mosaic, reference(q, ring, entries, sinks, filled, every)), end=" ")
print("a race was seen:", compat.races_found())

# %% [markdown]
# The sink needs no step at the end if it comes *first*: `top` starts as the sink, `total` as 1. Then a row that sees
# nothing at all is right as well, with the output 0, and nothing overflows.
#
# Mosaic's interpreter plays threads, copies and barriers, and looks for *races*, accesses that no barrier orders. It
# does not play time, nor the number of registers. Where JAX has a GPU, the cell compiles this kernel for it instead.
# (It runs on an NVIDIA H200 as well.)
#
# ## Against the package
#
# Its three calls, in both packages:

# %%


def three_calls(ops, q, ring, entries, sinks, filled, picks, **types):
    """As `csa` decodes: B 1 N H queries, one key head, values that are the keys."""
    near = ops.decode_attention(
        q[:, None], ring[:, :, None], ring[:, :, None], filled, scale=scale, sinks=sinks, **types
    )
    far = ops.decode_block_sparse(
        q[:, None], entries[:, :, None], None, picks[:, None, None], None, block_size=1, scale=scale, **types
    )
    stack = torch.stack if isinstance(q, torch.Tensor) else jnp.stack
    out, _ = ops.merge_states(*(stack(pair) for pair in zip(near, far, strict=True)))
    return out[:, 0]


given = q, ring, entries, sinks.half(), filled, picks
theirs = three_calls(triton_kernels, *given, out_dtype=torch.float32)
other = three_calls(pallas_kernels, *(jnp.asarray(x.cpu().numpy()) for x in given), out_dtype=jnp.float32)
print("triton_kernels:", close(theirs), "pallas_kernels:", close(other), "one kernel:", close(both()))

# %% [markdown]
# ## Measured
#
# From `docs/gpu_runs.jsonl`: the second call with V4-Flash's sizes, 64 rows, 512 picks of 512 channels for 64 heads.
# Below it the least times of what the two ways move besides, at the rate of a kernel that only reads:

# %%
runs = [json.loads(line) for line in Path("../docs/gpu_runs.jsonl").read_text().splitlines()]
timed = [run for run in runs if run["what"] == "decode_block_sparse" and run["block_size"] == 1]
ceiling = max(run["GB_per_s"] for run in runs if run["what"] == "ceiling" and run["commit"] == timed[0]["commit"])
print(f"{timed[0]['device']}, commit {timed[0]['commit']}; a kernel that only reads: {ceiling:.0f} GB/s")
for run in timed:
    print(f"B={run['B']} N={run['N']} H={run['H']} L={run['L']} {run['implementation']}: {run['median']:.1f} us")
rows = timed[0]["B"]
print(f"picks of {rows} rows: at least {rows * flash.index_topk * width * 2 / ceiling / 1e3:.1f} us")
print(f"rings of {rows} rows: at least {rows * flash.sliding_window * width * 2 / ceiling / 1e3:.1f} us")
print(f"parts of {rows} rows, written and read: at least {rows * moved / ceiling / 1e3:.1f} us from memory")

# %% [markdown]
# So at 64 rows the parts would take a good part of the time of the gather, if they went to memory. That is the case in
# which one kernel is worth writing. Nothing of the kind has been measured here yet.
#
# ## Exercises
#
# Set the answer, run the two cells. A function is called by the second one.
#
# **1.** Write `answer_1(outs, lses, sink)` in NumPy for one head: outs is P x H, lses is P, sink a number. The merged
# output, H numbers, also where an lse is -inf and its row of outs is NaN.

# %%
answer_1 = None


# %% tags=["solution"]
def answer_1(outs, lses, sink):
    top = max(sink, lses.max())
    weights = np.exp(lses - top)
    return weights @ np.where(weights[:, None] > 0, outs, 0) / (weights.sum() + np.exp(sink - top))


# %%
exercise(
    1,
    answer_1,
    "584d5239c113",
    np.array([[1.0, 2.0], [np.nan, np.nan], [-3.0, 0.5]]),
    np.array([2.0, -np.inf, 3.0]),
    1.5,
)

# %% [markdown]
# **2.** DeepSeek-V4-Pro has 128 heads of 512 channels. How many bytes are the two parts of one row, outputs and lses in
# float32, each counted once?

# %%
answer_2 = None

# %% tags=["solution"]
answer_2 = 2 * 128 * (512 + 1) * 4

# %%
exercise(2, answer_2, "47246e6ea761")

# %% [markdown]
# **3.** HCA, m = 128, W = 128. At how many tokens does a step read as many entries as it reads slots of the ring?

# %%
answer_3 = None

# %% tags=["solution"]
answer_3 = 128 * 128

# %%
exercise(3, answer_3, "d2f78abbf623")

# %% [markdown]
# **4.** In one kernel for CSA the tiles of the ring and of the list are cut among P programs. Write `answer_4(W, L,
# KEYS, P)`: a list with the number of tiles that each program gets, as even as can be, the first programs one more.
# (KEYS divides neither W nor L in general; no tile has vectors of both.)

# %%
answer_4 = None


# %% tags=["solution"]
def answer_4(W, L, KEYS, P):
    tiles = -(-W // KEYS) + -(-L // KEYS)
    return [tiles // P + (p < tiles % P) for p in range(P)]


# %%
exercise(4, answer_4, "e4af17587d87", 100, 500, 64, 4)
