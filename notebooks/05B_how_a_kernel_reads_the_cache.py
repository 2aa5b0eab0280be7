# %% [markdown]
# # 05B. How a kernel reads the cache
#
# Notebook 05A: a decode step takes as long as it takes to read the cache. This notebook writes the kernel that reads
# it, and asks what stands between a kernel and the speed of the memory.
#
# A *kernel* is a function that a GPU runs in many copies, each on a part of the data; a copy is a *program*. The card
# has many *SMs* (streaming multiprocessors), small processors on which programs run. All arrays lie in *global memory*.
# An SM has *shared memory*, some hundred KiB that all threads of a program see, and *registers*, which belong to one
# thread. Threads run in *warps*: 32 threads that do the same instruction at the same time.
#
# Letters: B rows, S slots of the cache, N query heads, K key heads, G = N / K, H channels of a query or key, V of a
# value.

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
print(f"{h100.sms} SMs with {h100.smem // 1024} KiB of shared memory each, {h100.bandwidth} GB/s from global memory")

# %% [markdown]
# ## The kernel
#
# One program takes one key head: its G query heads all meet the same keys, so every key is read once for all of them.
# It goes over the keys in *tiles* and keeps three things of each query: `top`, the largest logit so far; `total`, the
# sum of exp(l - top); `acc`, the sum of exp(l - top) v. When a tile raises `top` from m to m', the two sums are
# multiplied by exp(m - m'). This is the *online softmax* (01B), and after the last tile acc / total is the output.
#
# *Triton* is a language for such kernels: a program is written as if it were one thread that handles whole tiles. A
# tile is loaded by an array of addresses, counted in elements; `mask` says which of them are read. `tl.program_id` says
# which copy runs; `tl.constexpr` marks numbers that are known when the kernel is compiled. `tl.dot` multiplies tiles of
# at least 16 rows, so the G queries are padded to 16; "ieee" asks for products in full precision. The keys first ..
# last - 1 of the program depend on `split`; with one split they are all keys.


# %%
@triton.jit
def decode_kernel(
    q, k, v, out, lse, length, scale, step_s, step_k, step_h, G: tl.constexpr, H: tl.constexpr, KEYS: tl.constexpr
):
    head, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    each = tl.cdiv(tl.cdiv(length, splits), KEYS) * KEYS  # keys of a split, in whole tiles
    first, last = split * each, tl.minimum((split + 1) * each, length)
    g, h = tl.arange(0, 16), tl.arange(0, H)
    real = (g < G)[:, None]
    q_tile = tl.load(q + (head * G + g)[:, None] * H + h[None, :], mask=real, other=0.0)
    top = tl.full([16], -1e30, tl.float32)  # finite, so that no difference is inf - inf
    total, acc = tl.zeros([16], tl.float32), tl.zeros([16, H], tl.float32)
    for tile in tl.range(first, last, KEYS):
        s = tile + tl.arange(0, KEYS)
        at = head * step_k + s[:, None] * step_s + h[None, :] * step_h
        inside = (s < last)[:, None]
        k_tile = tl.load(k + at, mask=inside, other=0.0)  # KEYS H
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        logits = tl.where((s < last)[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shrink, weights = tl.exp(top - new_top), tl.exp(logits - new_top[:, None])
        total = total * shrink + tl.sum(weights, 1)
        v_tile = tl.load(v + at, mask=inside, other=0.0)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    row = (head * G + g) * splits + split
    total = tl.maximum(total, 1e-30)  # of a split without keys
    tl.store(out + row[:, None] * H + h[None, :], acc / total[:, None], mask=real)
    tl.store(lse + row, top + tl.log(total), mask=g < G)


launch = triton_kernels.runtime.launch  # kernel[grid](*arguments), without NumPy's warnings in the interpreter
N, K, H, S, length = 8, 2, 64, 256, 200
G, scale = N // K, H**-0.5
torch.manual_seed(0)


def drawn(*shape):
    return torch.randn(*shape, device="cpu").to(device)  # the same numbers on every device


q, k, v = drawn(N, H).half(), drawn(S, K, H).half(), drawn(S, K, H).half()


def decode(splits, k=k, v=v, strides=(K * H, H, 1), length=length):
    """(out N splits H, lse N splits); strides: elements from slot to slot, head to head, channel to channel."""
    out, lse = torch.empty(N, splits, H), torch.empty(N, splits)
    launch(decode_kernel, (K, splits), q, k, v, out, lse, length, scale, *strides, G=G, H=H, KEYS=32)
    return out, lse


def reference(length):
    """In float64, of the same rounded numbers: the loop over heads that every line above stands for."""
    outs, lses = [], []
    for n in range(N):
        keys, values = k[:length, n // G].double(), v[:length, n // G].double()
        logits = keys @ q[n].double() * scale
        outs.append(torch.softmax(logits, 0) @ values)
        lses.append(torch.logsumexp(logits, 0))
    return torch.stack(outs).cpu().numpy(), torch.stack(lses).cpu().numpy()


def close(a, b):
    return compare.relative(a, b) <= compare.OUT["float16"]


want, want_lse = reference(length)
out, lse = decode(splits=1)
print("equal:", close(out[:, 0], want), close(lse[:, 0], want_lse))

# %% [markdown]
# Where torch sees no GPU, Triton's *interpreter* ran this: NumPy in the place of tiles, one program after the other.
# Results and masks can be tested with it. Times mean nothing there, programs that disturb each other go unnoticed, and
# products of bfloat16 come out wrong, which is why this notebook has float16.
#
# ## The bytes it asks for
#
# The interpreter calls one method for every load and one for every store. We let them write down the addresses
# (`traffic`, which interprets the kernels inside it on a machine with a GPU too).


# %%
def of(tensor, loads):
    """The addresses of each load that goes to this tensor."""
    low, high = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
    return [addresses for _, addresses in loads if len(addresses) and low <= addresses[0] < high]


att = jforge.get("gqa")
cfg = att.Config(hidden_size=64, num_attention_heads=N, num_key_value_heads=K, head_dim=H)
cost = att.cost(cfg, context=length, capacity=S, dtype=jnp.float16)
with traffic() as (loads, _):
    decode(splits=1)
read = sum(2 * len(addresses) for tensor in (k, v) for addresses in of(tensor, loads))
print(f"k and v: {read:,} bytes in {len(of(k, loads) + of(v, loads))} loads", end="; ")
print(f"the package's cost says {sum(cost.read.values()):,}")

# %% [markdown]
# Each byte is asked for once, and nothing past the length. That is what 05A counted. But asking is not getting.
#
# ## Coalescing
#
# Memory does not deliver single numbers. A warp's load is cut into *sectors* of 32 bytes, and each sector that holds
# one wanted byte is delivered whole. If the 32 threads want neighbouring numbers, every delivered byte is used: the
# load is *coalesced*. If not, the card moves bytes that nobody asked for.
#
# Above, the channels of a head are neighbours. Suppose that the heads were: the last axis of the cache is K, the
# one before it the channel. Nothing else changes; the kernel gets other strides.
#
# Predict: a cache with K = 8 heads laid out so, in numbers of 2 bytes. One program reads its head. How many bytes are
# delivered for each byte that is used?

# %% tags=["predict"]
guess = None


# %%
def delivered(loads):
    """Bytes of the sectors that loads touch, given the addresses of each."""
    return sum(32 * len(np.unique(addresses // 32)) for addresses in loads)


def deliveries(K, last):
    """Delivered bytes for each used one, of the loads of k by one program; last: the axis of neighbours."""
    keys = torch.zeros(S, K, H).half() if last == "channel" else torch.zeros(S, H, K).half()
    strides = (K * H, H, 1) if last == "channel" else (K * H, 1, K)
    with traffic() as (loads, _):
        out, lse = torch.empty(N, 1, H), torch.empty(N, 1)
        launch(decode_kernel, (1, 1), q, keys, keys, out, lse, length, scale, *strides, G=G, H=H, KEYS=32)
    of_keys = of(keys, loads)
    return delivered(of_keys) / sum(2 * len(addresses) for addresses in of_keys)


reveal(deliveries(8, "head"), guess)
for heads in (1, 2, 4, 8, 16, 32):
    print(
        f"K = {heads:>2}: channels last {deliveries(heads, 'channel'):.0f}, heads last {deliveries(heads, 'head'):.0f}"
    )

# %% [markdown]
# A sector has 16 such numbers, so it is never worse than 16. (A program for another head may find the sector in *L2*,
# the cache that all SMs share, if it comes soon enough.) The package's caches are B S K H, channels last.
#
# ## Too few programs
#
# For B rows the grid above has B K programs, and a program runs on one SM. One row of Llama-3.1-8B has K = 8: 8 SMs
# read, and the other SMs of the card wait. So the keys are split too: each program takes one part of them and leaves a
# partial result, and a second kernel merges the parts. This is *split-KV*, or flash-decoding.
#
# A part is an output and lse = log(sum of exp(l)), which says how much the part weighs in the softmax over all keys:
#
#     lse = log sum_p exp(lse_p)        out = sum_p exp(lse_p - lse) out_p


# %%
@triton.jit
def merge_kernel(parts, lses, out, splits, SPLITS: tl.constexpr, H: tl.constexpr):
    n, p, h = tl.program_id(0), tl.arange(0, SPLITS), tl.arange(0, H)
    lse = tl.load(lses + n * splits + p, mask=p < splits, other=float("-inf"))
    weights = tl.exp(lse - tl.max(lse, 0))
    part = tl.load(parts + (n * splits + p)[:, None] * H + h[None, :], mask=(p < splits)[:, None], other=0.0)
    tl.store(out + n * H + h, tl.sum(part * weights[:, None], 0) / tl.sum(weights, 0))


@jaxtyped(typechecker=beartype)
def merge(parts: Float[torch.Tensor, "N P H"], lses: Float[torch.Tensor, "N P"]) -> Float[torch.Tensor, "N H"]:
    out = torch.empty(len(parts), parts.shape[2])
    launch(merge_kernel, (N,), parts, lses, out, parts.shape[1], SPLITS=8, H=H)
    return out


for splits in (1, 2, 4, 6):
    with traffic() as (_, stores):
        found = merge(*decode(splits))
    more = sum(4 * len(addresses) for _, addresses in stores) - 4 * N * H  # 4 N H: the result itself
    print(f"splits {splits}: equal {close(found, want)}, {more:>6,} bytes of parts written and read again")

# %% [markdown]
# (Of 6 splits two are empty, since every split has whole tiles: their lse is far below the others', so their weight
# is 0.) The price of a split is its part, N (H + 1) numbers of 4 bytes, which do not depend on S. The gain:


# %%
@jaxtyped(typechecker=beartype)
def busiest(programs: int, tiles: int, splits: int) -> int:
    """Tiles that the busiest SM reads, if programs are dealt out to the SMs evenly."""
    return -(-programs * splits // h100.sms) * -(-tiles // splits)


tiles = 4096 // 64
for splits in (1, 4, 8, 16, 33, 64):
    print(f"B K = 8, {tiles} tiles, {splits:>2} splits: {min(8 * splits, h100.sms):>3} SMs at work, "
          f"the busiest reads {busiest(8, tiles, splits)} tiles")  # fmt: skip

# %%
plt = plots()
figure, ax = plt.subplots(figsize=(10, 4.4))
across = range(1, 65)
for programs in (8, 64, 512):
    even = programs * tiles / h100.sms  # if every SM read the same
    ax.plot(across, [busiest(programs, tiles, splits) / even for splits in across], label=f"B K = {programs}")
ax.axhline(1, color="#888888", linestyle=":", linewidth=1.5)
ax.set(xlabel="splits", ylabel="tiles of the busiest SM,\nover an even share", ylim=(0, 6), xlim=(1, 64))
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# At 1 all SMs read equally much; at 4 the step takes four times as long as it must. Few programs (solid) need many
# splits. Many programs need none, and more splits only cost parts. The steps come from programs that do not divide
# evenly among the SMs. The package counts in this way, and adds the start of a program and the merge (`fill_splits`):

# %%
from pallas_kernels.plan import fill_splits

print({programs: fill_splits(programs, tiles) for programs in (8, 64, 512)})

# %% [markdown]
# ## Many bytes under way
#
# One more thing keeps a kernel from the full speed: a load takes long to answer. A program that loads a tile, waits,
# computes and only then loads the next one leaves the memory idle in between. So several tiles have to be under way at
# once. Model: a tile arrives 6 units of time after it was asked for, computing on it takes 1, and a ring in shared
# memory has room for so many tiles:


# %%
def duration(tiles, stages, latency=6, work=1):
    """When the last tile is done, if a tile is asked for as soon as its slot of the ring is free."""
    done = []
    for i in range(tiles):
        asked = done[i - stages] if i >= stages else 0
        done.append(max(asked + latency, done[-1] if done else 0) + work)
    return done[-1]


print({stages: duration(64, stages) for stages in (1, 2, 4, 8)}, "against", 64, "units of work")

# %% [markdown]
# On NVIDIA cards since Hopper the copies are done by a unit of their own, *TMA* (tensor memory accelerator). One thread
# says "the box at slot 128, head 3, of 64 x 128 numbers, to this place in shared memory". The unit makes the addresses,
# coalesced, fills what lies outside of the array with zeros, and reports to a *barrier*, a counter in shared memory on
# which the program waits. No register holds data that is under way, and no thread is busy with it.
#
# ## Swizzle
#
# Shared memory is made of 32 *banks*, each 4 bytes wide, and in one turn each bank gives one word. A matrix unit reads
# pieces of 16 bytes (8 numbers, four banks), eight at a time. In a tile with rows of 128 bytes, the pieces of one row
# lie in different banks, but the same piece of eight rows lies in the same ones. Since a tile is read both ways (as
# keys along the channels, as values along the slots), one of the two would take eight turns.
#
# The way out: piece c of row r is put where piece c XOR (r mod 8) would lie.

# %%
row, piece = np.arange(8)[:, None], np.arange(8)[None, :]
plain = np.broadcast_to(piece, (8, 8))  # the group of four banks that each piece of 16 bytes lies in
swizzled = piece ^ row % 8


def turns(groups):
    """Turns to read eight pieces: as many as want the same banks."""
    return max(np.bincount(np.asarray(groups).ravel()))


for name, groups in (("plain", plain), ("swizzled", swizzled)):
    print(f"{name:8} a row takes {turns(groups[3])} turns, a column {turns(groups[:, 3])}")

figure, axes = plt.subplots(1, 2, figsize=(10, 4.8))
for ax, groups, title in zip(axes, (plain, swizzled), ("plain", "swizzled"), strict=True):
    ax.imshow(groups, cmap="tab10", vmin=0, vmax=9)
    for (r, c), group in np.ndenumerate(groups):
        ax.text(c, r, group, ha="center", va="center", color="white", fontsize=14)
    ax.add_patch(plt.Rectangle((2.5, -0.5), 1, 8, fill=False, edgecolor="black", linewidth=4))
    ax.set(title=title, xlabel="piece of 16 bytes", ylabel="row of the tile", xticks=range(8), yticks=range(8))
plt.show()

# %% [markdown]
# Number and colour: the group of banks. The framed column is one read. TMA swizzles on the way in and the matrix unit
# undoes it, so the program only says that it wants it.
#
# ## The kernel with TMA
#
# *Mosaic GPU*, the part of JAX's Pallas for NVIDIA cards, leaves these things to the author. `SMEM` is an array in
# shared memory, `copy_gmem_to_smem` orders a copy, `wgmma` multiplies two tiles in shared memory by a *warpgroup* of 4
# warps into an accumulator. It wants 64 rows of its first operand, so here the 64 *keys* of a tile are the rows and the
# queries, padded to 8, the columns: everything is transposed against the Triton kernel.

# %%
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

KEYS, BOX, STAGES = 64, 8, 2
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


def decode_body(q, k, v, out, q_s, k_s, v_s, p_s, out_s, q_full, full):
    head, steps = lax.axis_index("head"), -(-length // KEYS)

    def fetch(i):
        for source, ring in ((k, k_s), (v, v_s)):
            box = source.at[pl.ds(i * KEYS, KEYS), head]
            plgpu.copy_gmem_to_smem(box, ring.at[lax.rem(i, STAGES)], full.at[lax.rem(i, STAGES)])

    def turn(i, state):
        acc, top, total = state
        slot = lax.rem(i, STAGES)
        plgpu.barrier_wait(full.at[slot])
        logits = product(k_s.at[slot], q_s.transpose((1, 0)), (KEYS, BOX)) * scale
        s = plgpu.broadcasted_iota(jnp.int32, (KEYS, BOX), 0, layout=WGMMA) + i * KEYS
        logits = jnp.where(s < length, logits, -jnp.inf)
        new_top = jnp.maximum(top, logits.max(axis=0))
        shrink, weights = jnp.exp(top - new_top), jnp.exp(logits - down(new_top, (KEYS, BOX)))
        p_s.transpose((1, 0))[...] = weights.astype(p_s.dtype)
        plgpu.commit_smem()  # all threads are here, so nobody reads the tile before this one any more
        pl.when((i > 0) & (i - 1 + STAGES < steps))(lambda: fetch(i - 1 + STAGES))
        more = product(v_s.at[slot].transpose((1, 0)), p_s.transpose((1, 0)), (H, BOX))
        return acc * down(shrink, (H, BOX)) + more, new_top, total * shrink + weights.sum(axis=0)

    plgpu.copy_gmem_to_smem(q.at[head], q_s, q_full)
    for i in range(min(STAGES, steps)):
        fetch(jnp.int32(i))
    plgpu.barrier_wait(q_full)
    acc = plgpu.layout_cast(jnp.zeros((H, BOX), jnp.float32), WGMMA)
    top = plgpu.layout_cast(jnp.full((BOX,), -1e30, jnp.float32), BY_COLUMN)
    total = plgpu.layout_cast(jnp.zeros((BOX,), jnp.float32), BY_COLUMN)
    acc, top, total = lax.fori_loop(0, steps, turn, (acc, top, total))
    out_s.transpose((1, 0))[...] = plgpu.layout_cast(acc * down(1 / total, (H, BOX)), plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_s, out.at[head])
    plgpu.wait_smem_to_gmem(0)


def tile(*shape):
    return plgpu.SMEM(shape, jnp.float16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


on_gpu = jax.default_backend() == "gpu"
mosaic = plgpu.kernel(
    decode_body, out_type=jax.ShapeDtypeStruct((K, BOX, H), jnp.float32), grid=(K,), grid_names=("head",),
    scratch_types=[
        tile(BOX, H), tile(STAGES, KEYS, H), tile(STAGES, KEYS, H), tile(BOX, KEYS), plgpu.SMEM((BOX, H), jnp.float32),
        plgpu.Barrier(), plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    ],
    kernel_name="decode", interpret=None if on_gpu else plgpu.InterpretGPUParams(detect_races=True),
)  # fmt: skip
boxes = jnp.pad(jnp.asarray(q.cpu().numpy()).reshape(K, G, H), ((0, 0), (0, BOX - G), (0, 0)))
got = mosaic(boxes, jnp.asarray(k.cpu().numpy()), jnp.asarray(v.cpu().numpy()))[:, :G].reshape(N, H)
print("equal:", close(got, want))

# %% [markdown]
# Mosaic's interpreter plays threads, copies and barriers, gives NaN for memory that nobody wrote, and looks for
# *races*: an access that no barrier orders against another one. It knows nothing of time, of banks, or of how many
# registers and how much shared memory there are. (On a machine with a GPU this kernel is compiled and runs there.)

# %%
print("a race was seen:", compat.races_found())

# %% [markdown]
# Two tiles are under way in the ring. The turn of tile i orders the copy that replaces tile i - 1, and does so only
# after `commit_smem`, where all threads meet: a thread that is behind might still read the old tile.
#
# ## Against the package
#
# `decode_attention` of both packages, on the same numbers. What both have beside ours: a plan for the splits, windows,
# and care for NaN in slots that nobody may read. In Pallas a second warpgroup orders the copies.

# %%
given = [q[None, None], k[None], v[None], torch.tensor([length], dtype=torch.int32)]
theirs = triton_kernels.decode_attention(*given, scale=scale)
other = pallas_kernels.decode_attention(*(jnp.asarray(x.cpu().numpy()) for x in given), scale=scale)
for name, (out, lse) in (("triton_kernels", theirs), ("pallas_kernels", other)):
    print(name, close(out[0, 0], want), close(lse[0, 0], want_lse))

# %% [markdown]
# ## On a card
#
# `docs/gpu_runs.jsonl` has measured times of both packages on an H100, and in the same run the rate of a kernel that
# only reads: the *ceiling*, which no kernel that reads the cache can pass. This is the roofline of 05A from the side:
# decode lies on the slope, and what is left to see is how far below it.

# %%
runs = [json.loads(line) for line in Path("../docs/gpu_runs.jsonl").read_text().splitlines()]
timed = [run for run in runs if run["what"] == "decode_attention" and "window" not in run and run["H"] == 128]
ceiling = max(run["GB_per_s"] for run in runs if run["what"] == "ceiling" and run["commit"] == timed[0]["commit"])
ours = {name: [run for run in timed if run["implementation"] == name] for name in ("pallas", "triton")}
print(ours["pallas"][0]["device"], "commit", ours["pallas"][0]["commit"], f"ceiling {ceiling:.0f} GB/s")
for run in sorted(ours["pallas"], key=lambda run: run["GB_per_s"] * run["median"]):
    B, heads, slots = run["B"], run["K"], run["S"]
    print(f"B = {B:>3}, K = {heads:>2}, S = {slots:>7,}: {run['median']:6.1f} us, {run['GB_per_s'] / ceiling:4.0%} "
          f"of the ceiling, splits by the model: {fill_splits(B * heads, slots // 64)}")  # fmt: skip

# %%
figure, ax = plt.subplots(figsize=(10, 4.4))
for (name, rows), marker in zip(ours.items(), "os", strict=True):
    ax.semilogx([run["GB_per_s"] * run["median"] / 1e3 for run in rows], [run["GB_per_s"] for run in rows], marker,
                label=name, markersize=10)  # fmt: skip
ax.axhline(ceiling, color="black", linestyle=":", linewidth=1.5)
ax.text(5, ceiling * 1.02, "a kernel that only reads")
ax.set(xlabel="MB that the call reads and writes", ylabel="GB/s", ylim=(0, 3600))
ax.legend(frameon=False, loc="lower right")
plt.show()

# %% [markdown]
# A call that reads some hundred MB runs at the ceiling. For a call that reads a few MB, other things take as long as
# its bytes: the start of the kernels, the first answer of the memory, the merge.
#
# ## Exercises
#
# Set the answer, run the two cells. A function is called by the second one.
#
# **1.** Each of the 32 threads of a warp loads one float32. Thread i takes element 3 i of an array that begins at a
# sector. How many sectors are delivered?

# %%
answer_1 = None

# %% tags=["solution"]
answer_1 = len({4 * 3 * i // 32 for i in range(32)})

# %%
exercise(1, answer_1, "e272409bd4bb")

# %% [markdown]
# **2.** Write `answer_2(row, column)`: the byte, counted from the start of a tile, at which a number of 2 bytes lies.
# The tile has rows of 128 bytes, one after the other, and is swizzled.

# %%
answer_2 = None


# %% tags=["solution"]
def answer_2(row, column):
    piece, rest = divmod(2 * column, 16)
    return 128 * row + 16 * (piece ^ row % 8) + rest


# %%
exercise(2, answer_2, "4ab497f435be", 13, 21)

# %% [markdown]
# **3.** B = 1, K = 8: how many splits does it take at least, so that each SM of the H100 has a program?

# %%
answer_3 = None

# %% tags=["solution"]
answer_3 = -(-h100.sms // 8)

# %%
exercise(3, answer_3, "a11fa588e32e")

# %% [markdown]
# **4.** Llama-3.1-8B (N = 32, K = 8, H = V = 128), one row of 4,096 tokens in bfloat16, 16 splits. Parts are float32
# and have an lse each. How many bytes of parts are written, as a share of the bytes that are read from the cache?

# %%
answer_4 = None

# %% tags=["solution"]
answer_4 = 16 * 32 * (128 + 1) * 4 / sum(att.cost(att.models["Llama-3.1-8B"], context=4096).read.values())

# %%
exercise(4, answer_4, "acf67aa5c7f1")

# %% [markdown]
# **5.** Write `answer_5(outs, lses)`: parts P V and P as NumPy arrays; give the merged output. A part without keys has
# lse = -inf, and its output may be NaN. (At least one part has keys.)

# %%
answer_5 = None


# %% tags=["solution"]
def answer_5(outs, lses):
    real = lses > -np.inf
    weights = np.exp(lses[real] - lses.max())
    return weights @ outs[real] / weights.sum()


# %%
exercise(
    5, answer_5, "1488fe7b4858", np.array([[1.0, 2.0], [np.nan, np.nan], [4.0, 0.0]]), np.array([900.0, -np.inf, 901.0])
)
