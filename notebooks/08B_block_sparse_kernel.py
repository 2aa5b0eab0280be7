# %% [markdown]
# # 08B. The kernel over lists of blocks
#
# A fixed pattern, MoBA, NSA and MSA (notebooks 08A and 11A) differ in who makes the list. What follows is one kernel
# for all: attention of a query over the blocks on its list. It is the decode kernel of notebook 02B with one more step,
# from a position in the list to a place in the cache. Here are that step, what it does to the reads, and how a list is
# shared out among many programs.
#
# Letters: B rows, S slots of the cache, of which a row uses `lengths`; N query heads, K key heads, G = N / K query
# heads that share a key head; H channels of a key, V of a value; M slots of a block, L blocks of a list, X lists of a
# query: K, one for each key head, or N.
#
# Words of 01B and 05B: a kernel runs in many copies, the *programs*, each on an *SM*, one of the card's processors. A
# program copies *tiles* from global memory to the SM. `top`, `total` and `acc` are the online softmax: the largest
# logit so far, the sum of exp(l - top), and the sum of exp(l - top) v.

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
# For each row and head: the slots of its list that are used, in a loop, in float64. A -1 stands for no block, wherever
# it stands; the last block may be used in part.

# %%
B, S, N, K, H, V, M, L = 2, 640, 16, 2, 64, 64, 64, 4
G, scale = N // K, H**-0.5
lengths = torch.tensor([600, 330], dtype=torch.int32)
torch.manual_seed(0)


def drawn(*shape):
    return torch.randn(*shape, device="cpu").to(device)  # the same numbers on every device


q, k, v = drawn(B, N, H).half(), drawn(B, S, K, H).half(), drawn(B, S, K, V).half()
lists = torch.tensor([[[0, 4, 7, 9], [9, 2, 3, 8]], [[5, -1, 0, 1], [3, 5, -1, -1]]], dtype=torch.int32)  # B K L


@jaxtyped(typechecker=beartype)
def reference(
    q: Float[torch.Tensor, "B N H"], k: Float[torch.Tensor, "B S K H"], v: Float[torch.Tensor, "B S K V"],
    lists: Int[torch.Tensor, "B X L"], lengths: Int[torch.Tensor, "B"], M: int,
) -> Float[np.ndarray, "B N V"]:  # fmt: skip
    out = torch.zeros((*q.shape[:2], v.shape[-1]), dtype=torch.float64)
    for b in range(len(q)):
        for n in range(q.shape[1]):
            blocks = lists[b, n * lists.shape[1] // q.shape[1]].tolist()
            slots = [s for j in blocks if j >= 0 for s in range(j * M, min((j + 1) * M, int(lengths[b])))]
            keys, values = (x[b, slots, n * x.shape[2] // q.shape[1]].double() for x in (k, v))
            out[b, n] = torch.softmax(keys @ q[b, n].double() * q.shape[-1] ** -0.5, 0) @ values
    return out.cpu().numpy()


want = reference(q, k, v, lists, lengths, M)


def close(a, b=want):
    return compare.relative(a, b) <= compare.OUT["float16"]


# %% [markdown]
# ## From a position to a slot
#
# Think of a list as a cache of its own, of L M *positions*: position i is slot i mod M of the list's block i // M. The
# loop runs over positions, KEYS at a time, as if that cache were dense. Before a tile is loaded, positions become
# slots.
#
# Where M is a multiple of KEYS, a whole tile lies in one block: one entry of the list is loaded, and the slots of the
# tile are neighbours. That is WHOLE. Otherwise each position loads its own entry, which serves any M, down to M = 1, a
# list of tokens.
#
# One program has one list and the G heads that share it; they are the rows of `tl.dot`, which wants 16, so some rows
# may be empty. `split` is a share of the positions.


# %%
@triton.jit
def list_kernel(q, k, v, lists, lengths, out, lse, S, scale, share,
                N: tl.constexpr, K: tl.constexpr, X: tl.constexpr, H: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
                L: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    x, split, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads: tl.constexpr = N // X
    g = tl.arange(0, ROWS)
    n = x * heads + g
    h, c, j = tl.arange(0, H), tl.arange(0, V), tl.arange(0, KEYS)
    queries = tl.load(q + (b * N + n)[:, None] * H + h[None, :], mask=(g < heads)[:, None], other=0.0)
    length = tl.load(lengths + b)
    entries = lists + (b * X + x) * L
    keys_of, values_of = k + (x * K // X) * H, v + (x * K // X) * V
    top = tl.full([ROWS], -1e30, tl.float32)  # finite: no -inf - (-inf) where a tile has no slot
    total, acc = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, V], tl.float32)
    for first in tl.range(split * share, tl.minimum((split + 1) * share, L * M), KEYS):
        if WHOLE:
            block = tl.load(entries + first // M)  # one number
            slot = block * M + first % M + j
        else:
            block = tl.load(entries + (first + j) // M, mask=first + j < L * M, other=-1)  # KEYS numbers
            slot = block * M + (first + j) % M
        seen = (block >= 0) & (slot < length)
        row = (b * S + slot)[:, None] * K
        keys = tl.load(keys_of + row * H + h[None, :], mask=seen[:, None], other=0.0)
        logits = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        logits = tl.where(seen[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shrink, weights = tl.exp(top - new_top), tl.exp(logits - new_top[:, None])
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(values_of + row * V + c[None, :], mask=seen[:, None], other=0.0)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    index = (split * tl.num_programs(2) + b) * N + n
    empty = total == 0.0
    tl.store(
        out + index[:, None] * V + c[None, :], acc / tl.where(empty, 1.0, total)[:, None], mask=(g < heads)[:, None]
    )
    tl.store(lse + index, tl.where(empty, float("-inf"), top + tl.log(tl.where(empty, 1.0, total))), mask=g < heads)


def attend(lists, splits=1, M=M, keys=32):
    """(out, lse) of each split."""
    X, L = lists.shape[1:]
    out, lse = torch.empty(splits, B, N, V), torch.empty(splits, B, N)
    share = triton.cdiv(triton.cdiv(L * M, splits), keys) * keys
    launch(list_kernel, (X, splits, B), q, k, v, lists, lengths, out, lse, S, scale, share, N=N, K=K, X=X, H=H, V=V,
           M=M, L=L, KEYS=keys, ROWS=max(16, N // X), WHOLE=M % keys == 0)  # fmt: skip
    return out, lse


print("equal:", close(attend(lists)[0][0]))
small = torch.stack([torch.randperm(75, device="cpu")[:21] for _ in range(B * K)])  # of 8 slots each
small = small.reshape(B, K, 21).int().to(device)
print("blocks of 8:", close(attend(small, M=8)[0][0], reference(q, k, v, small, lengths, 8)))

# %% [markdown]
# Where torch sees no GPU, Triton's interpreter ran this: program after program, in NumPy. Its results can be trusted
# for float16 (its bfloat16 products are wrong), its times mean nothing.
#
# ## What is read
#
# In the interpreter every load can be written down (`traffic`, which interprets with a GPU too).


# %%
def elements(addresses, tensor):
    """The numbers of a tensor that lie at these addresses."""
    at = (addresses - tensor.data_ptr()) // tensor.element_size()
    return at[(at >= 0) & (at < tensor.numel())]


def asked(lists, **options):
    """(bytes of k and v, times that each slot of k was asked for: B S K)"""
    with traffic() as (loads, _):
        attend(lists, **options)
    every = np.concatenate([addresses for _, addresses in loads])
    count = np.bincount(elements(every, k), minlength=k.numel()).reshape(k.shape)
    return 2 * (len(elements(every, k)) + len(elements(every, v))), count.max(axis=-1)


def cost_of(name, n, **fields):
    att = jforge.get(name)
    cfg = att.Config(hidden_size=32, num_attention_heads=N, num_key_value_heads=K, head_dim=H, **fields)
    read = att.cost(cfg, context=n, dtype=jnp.float16).read
    return read["k"] + read["v"]


full = torch.full((B,), S, dtype=torch.int32)
used, lengths = lengths, full  # for the count: rows that are full, lists without -1
shared = torch.stack([torch.randperm(S // M, device="cpu")[:L] for _ in range(B * K)]).reshape(B, K, L).int().to(device)
by_group, slots_by_group = asked(shared)
budget = {"index_head_dim": 8, "index_block_size": M, "index_topk_blocks": L}
print(f"one list a key head: {by_group:,} bytes; cost of msa: {B * cost_of('msa', S, **budget):,}")

# %% [markdown]
# The kernel asks for exactly the listed blocks, and for each of them once for all G heads of a key head.
#
# MoBA's heads choose alone: X = N lists. Each program then has one head, and a block that several heads of a group like
# is read by each of them. `cost` counts what is sure to be enough, G lists for each key head, but no more than the
# cache.
#
# Predict: G = 8 heads share a key head, and each of them has a random list of its own, of 4 of the 10 blocks. The bytes
# that the kernel asks for are how many times all keys and values of the cache?

# %% tags=["predict"]
guess = None

# %%
alone = torch.stack([torch.randperm(S // M, device="cpu")[:L] for _ in range(B * N)]).reshape(B, N, L).int().to(device)
by_head, slots_by_head = asked(alone)
reveal(by_head / (2 * (k.numel() + v.numel())), guess)
print(f"all of k and v: {2 * (k.numel() + v.numel()):,} bytes; asked for with a list a head: {by_head:,}")
print(f"cost of moba: {B * cost_of('moba', S, moba_chunk_size=M, moba_topk=L):,} bytes")
lengths = used

# %%
plt = plots()
figure, axes = plt.subplots(2, 1, figsize=(10, 3.6), sharex=True)
for ax, counts, title in zip(
    axes, (slots_by_group, slots_by_head), ("one list for a key head", "a list for each of 8 heads"), strict=True
):
    image = ax.pcolormesh(counts[0].T, cmap="Blues", vmin=0, vmax=8)
    ax.set_title(title, loc="left", fontsize=14)
    ax.set(yticks=(0.5, 1.5), yticklabels=("head 0", "head 1"), ylim=(2, 0), xticks=range(0, S + 1, M))
axes[-1].set_xlabel("slot of row 0; a mark each M = 64 slots")
figure.colorbar(image, ax=axes, label="times asked for", ticks=(0, 4, 8))
plt.show()

# %% [markdown]
# With a list for each head, nearly all of the cache is asked for, most blocks several times: more bytes in all than
# dense attention would read. (Only the first read of a block comes from global memory, if *L2*, the cache that all SMs
# share, still has it. `cost` counts a slot once.) So lists of their own pay off when the context is much longer than G
# lists. There is a second loss: of the 16 rows of `tl.dot` one is used.
#
# ## Neighbours
#
# Memory is read in *sectors* of 32 bytes, and a *warp*, 32 threads that load together, is served best if their
# addresses lie side by side. How do the bytes of a block lie? The cache is B S K H: the next slot of the same head is K
# H numbers further.

# %%
with traffic() as (loads, _):
    attend(lists)
tiles = [elements(addresses, k) for _, addresses in loads]
tile = next(np.sort(t) for t in tiles if len(t) == 32 * H)  # the first full tile of keys
breaks = np.flatnonzero(np.diff(tile) > 1) + 1
print(f"a tile of 32 keys: {len(breaks) + 1} pieces of {2 * len(tile) // (len(breaks) + 1)} bytes, "
      f"{2 * (tile[breaks[0]] - tile[0])} bytes from one to the next")  # fmt: skip

# %% [markdown]
# Each key is a piece of its own, of 2 H bytes: whole sectors, so a list of single tokens would not read one byte more.
# What a block saves is not bytes but *work for addresses*: one entry of the list for a tile instead of one for each
# key, and rows at equal distances. That is what TMA needs, the unit of the card which copies a box while the threads do
# something else. For a box, one order is enough; without it, each thread issues copies of 16 bytes:

# %%
for M_, what in ((64, "blocks of 64"), (8, "blocks of 8"), (1, "tokens")):
    tokens = torch.arange(256 // M_).int().expand(B, K, -1).contiguous()
    with traffic() as (loads, _):
        attend(tokens, M=M_)
    read = sum(len(elements(addresses, tokens)) for _, addresses in loads) // (B * K)
    copies, boxes = 256 * 2 * H // 16, 256 // min(M_, 64)
    print(f"256 slots as {what:12}: {read:>3} entries loaded; copies of 16 bytes: {copies}, of a box: {boxes}")

# %% [markdown]
# (A box is at most a tile here. The package's Mosaic kernel uses TMA from M = 8 on, and threads for single tokens.)
#
# ## Splits
#
# A row of MiniMax-M3 has K = 4 lists of 16 blocks of 128. One program a list would leave an H100 idle but for a few
# SMs, so a list is cut: every split takes an equal share of its *positions*. That is fair whatever the list holds,
# unless entries are -1. Each split writes its output and *lse*, the log of its sum of exp(logit), and a second kernel
# merges.


# %%
@jaxtyped(typechecker=beartype)
def merge(outs: Float[torch.Tensor, "P B N V"], lses: Float[torch.Tensor, "P B N"]) -> Float[torch.Tensor, "B N V"]:
    """A part with lse = -inf has seen nothing and counts nothing."""
    return (torch.softmax(lses, 0)[..., None] * outs).sum(0)


for splits in (2, 4, 8):
    outs, lses = attend(lists, splits)
    nothing = (lses == -torch.inf).float().mean()
    print(f"{splits} splits, equal: {close(merge(outs, lses))}; parts that saw nothing: {nothing:.0%}")

# %% [markdown]
# The lists of row 1 have entries of -1, and block 5 of row 1 is used in part: these parts have little or nothing to do.
# Which slots each program of 4 splits reads, of the lists of head 0:

# %%
with traffic() as (loads, _):
    attend(lists, 4)
figure, axes = plt.subplots(2, 1, figsize=(10, 3.6), sharex=True)
for b, ax in enumerate(axes):
    for split in range(4):
        of_it = [elements(a, k) for program, a in loads if program == (0, split, b)]
        slots = np.unique(np.concatenate(of_it) // (K * H)) - b * S
        ax.bar(slots + 0.5, 1, width=1.0, bottom=split, color=f"C{split}")
        ax.axhline(split, color="#aaaaaa", linewidth=0.6)
    ax.axvline(int(lengths[b]), color="black", linestyle=":", linewidth=1.5)
    ax.set(ylim=(4, 0), yticks=np.arange(4) + 0.5, yticklabels=range(4), ylabel="split", xlim=(0, S))
    ax.set_title(f"row {b}, list {lists[b, 0].tolist()}", loc="left", fontsize=14)
    ax.set_xticks(range(0, S + 1, M))
axes[-1].set_xlabel("slot; dotted: the row's length")
plt.show()

# %% [markdown]
# A split is a block here. Row 0: four blocks, the last one in part. Row 1: split 1 has the -1 and reads nothing, and
# split 0 has block 5, of which ten slots are used.
#
# ## In Mosaic GPU
#
# TMA takes the block: the list's entry says which box to copy. The keys of a block are the rows of the matrix unit,
# which wants 64, and the G heads its columns. *Barriers* say when a copy is there; `wgmma` multiplies tiles in shared
# memory; *swizzle* permutes the 16-byte pieces of a tile's rows so that wgmma does not wait for one memory bank. An
# entry of -1 must not become an address, so block 0 is copied in its place, and masked.

# %%
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

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


def list_body(q, k, v, lists, lengths, out, q_s, k_s, v_s, p_s, out_s, q_full, full):
    b, head = lax.axis_index("row"), lax.axis_index("head")

    def fetch(i):
        slot, block = lax.rem(i, 2), jnp.maximum(lists[b, head, i], 0)
        for source, target in ((k, k_s), (v, v_s)):
            plgpu.copy_gmem_to_smem(source.at[b, pl.ds(block * M, M), head], target.at[slot], full.at[slot])

    def turn(i, state):
        acc, top, total = state
        slot, block = lax.rem(i, 2), lists[b, head, i]
        end = jnp.where(block >= 0, lengths[b] - block * M, 0)  # so many slots of this block are seen
        plgpu.barrier_wait(full.at[slot])
        logits = product(k_s.at[slot], q_s.transpose((1, 0)), (M, G)) * scale
        s = plgpu.broadcasted_iota(jnp.int32, (M, G), 0, layout=WGMMA)
        logits = jnp.where(s < end, logits, -jnp.inf)
        new_top = jnp.maximum(top, logits.max(axis=0))
        shrink, weights = jnp.exp(top - new_top), jnp.exp(logits - down(new_top, (M, G)))
        p_s.transpose((1, 0))[...] = weights.astype(p_s.dtype)
        plgpu.commit_smem()  # what threads wrote is seen by wgmma only after this
        more = product(v_s.at[slot].transpose((1, 0)), p_s.transpose((1, 0)), (V, G))
        plgpu.commit_smem()  # all threads are here, so nobody reads these tiles any more
        pl.when(i + 2 < L)(lambda: fetch(i + 2))
        return acc * down(shrink, (V, G)) + more, new_top, total * shrink + weights.sum(axis=0)

    plgpu.copy_gmem_to_smem(q.at[b, head], q_s, q_full)
    for i in range(2):
        fetch(jnp.int32(i))
    plgpu.barrier_wait(q_full)
    acc = plgpu.layout_cast(jnp.zeros((V, G), jnp.float32), WGMMA)
    top = plgpu.layout_cast(jnp.full((G,), -1e30, jnp.float32), BY_COLUMN)
    total = plgpu.layout_cast(jnp.zeros((G,), jnp.float32), BY_COLUMN)
    acc, top, total = lax.fori_loop(0, L, turn, (acc, top, total))
    out_s.transpose((1, 0))[...] = plgpu.layout_cast(acc * down(1 / total, (V, G)), plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_s, out.at[b, head])
    plgpu.wait_smem_to_gmem(0)


def operand(*shape):
    return plgpu.SMEM(shape, jnp.float16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


on_gpu = jax.default_backend() == "gpu"
given = [jnp.asarray(x.cpu().numpy()) for x in (q.reshape(B, K, G, H), k, v, lists, lengths)]
mosaic = plgpu.kernel(
    list_body, out_type=jax.ShapeDtypeStruct((B, K, G, V), jnp.float32), grid=(B, K), grid_names=("row", "head"),
    kernel_name="lists",
    scratch_types=[
        operand(G, H), operand(2, M, H), operand(2, M, V), operand(G, M), plgpu.SMEM((G, V), jnp.float32),
        plgpu.Barrier(), plgpu.Barrier(num_arrivals=2, num_barriers=2),
    ],
    interpret=None if on_gpu else plgpu.InterpretGPUParams(detect_races=True),
)(*given)  # fmt: skip
print("equal:", close(mosaic.reshape(B, N, V)), " a race was seen:", compat.races_found())

# %% [markdown]
# Mosaic's interpreter plays threads, copies and barriers, and looks for *races*, accesses that no barrier orders. It
# does not play time, nor the number of registers. Where JAX has a GPU, the cell compiles this kernel for it instead.
# (It runs on an NVIDIA H200 as well.)
#
# What is masked here is read all the same, and its values meet weights of 0. If an unused slot held NaN, the output
# would be NaN (notebook 06B). The package blanks such slots in shared memory.
#
# ## Against the package

# %%
options = {"block_size": M, "scale": scale}
theirs, _ = triton_kernels.decode_block_sparse(q[:, None], k, v, lists[:, None], lengths, **options)
others = [jnp.asarray(x.cpu().numpy()) for x in (q[:, None], k, v, lists[:, None], lengths)]
other, _ = pallas_kernels.decode_block_sparse(*others, **options)
print("triton_kernels:", close(theirs[:, 0]), "pallas_kernels:", close(other[:, 0]))
theirs, _ = triton_kernels.decode_block_sparse(q[:, None], k, v, alone[:, None], lengths, **options)
right = reference(q, k, v, alone, lengths, M)
print("a list a head: triton_kernels:", close(theirs[:, 0], right), "ours:", close(attend(alone)[0][0], right))

# %% [markdown]
# ## Measured
#
# From `docs/gpu_runs.jsonl`: MiniMax-M3's heads (N = 64, K = 4), 16 blocks of 128 on each list, in bfloat16. Beside
# each, the least time in which all keys and values of the cache could be read, at the rate of a kernel that only reads.

# %%
runs = [json.loads(line) for line in Path("../docs/gpu_runs.jsonl").read_text().splitlines()]
timed = [run for run in runs if run["what"] == "decode_block_sparse" and run["block_size"] == 128]
ceiling = max(run["GB_per_s"] for run in runs if run["what"] == "ceiling" and run["commit"] == timed[0]["commit"])
print(f"{timed[0]['device']}, commit {timed[0]['commit']}; the reading kernel: {ceiling:.0f} GB/s")
for run in timed:
    dense = run["B"] * run["S"] * run["K"] * 2 * run["H"] * 2 / ceiling / 1e3
    print(f"B={run['B']:>2} S={run['S']:,} {run['implementation']}: {run['median']:5.1f} us, "
          f"{run['GB_per_s'] / ceiling:.0%} of the ceiling; all of the cache: {dense:,.0f} us")  # fmt: skip

# %% [markdown]
# Blocks of 128 are read nearly as fast as a whole cache is. With 16 rows a call moves a quarter of the bytes, and what
# does not shrink (the start, the last tiles, the merge) weighs more.
#
# ## Exercises
#
# Set the answer, run the two cells. A function is called by the second one.
#
# **1.** Write `answer_1(blocks, M, length)`: the slots that a list (of numbers, -1 for none) names, ascending, without
# those that are not used.

# %%
answer_1 = None


# %% tags=["solution"]
def answer_1(blocks, M, length):
    return sorted(s for j in blocks if j >= 0 for s in range(j * M, min((j + 1) * M, length)))


# %%
exercise(1, answer_1, "649405591120", [5, -1, 2], 4, 22)

# %% [markdown]
# **2.** Write `answer_2(lists, K)`: lists is N x L, a list for each query head, -1 for none. How many different blocks
# does each of K key heads read? A list of K numbers.

# %%
answer_2 = None


# %% tags=["solution"]
def answer_2(lists, K):
    groups = np.asarray(lists).reshape(K, -1)
    return [len(set(group.tolist()) - {-1}) for group in groups]


# %%
exercise(2, answer_2, "91d537cf4687", np.array([[0, 3, 5], [3, 5, 9], [1, 2, -1], [1, -1, -1]]), 2)

# %% [markdown]
# **3.** One row of MiniMax-M3: K = 4 lists of 16 blocks of 128 slots, tiles of 64 slots, at most one split a tile. What
# share of the SMs of an H100 (`h100.sms`) can get a program? (Each SM gets one at most.)

# %%
answer_3 = None

# %% tags=["solution"]
answer_3 = min(1.0, 4 * 16 * 128 / 64 / h100.sms)

# %%
exercise(3, answer_3, "ee3fd728b126")

# %% [markdown]
# **4.** With random lists of 12 of 32 blocks for each of G = 4 heads, how many different blocks does a key head read,
# on average? (A block is missed by one head with probability 1 - 12/32.)

# %%
answer_4 = None

# %% tags=["solution"]
answer_4 = 32 * (1 - (1 - 12 / 32) ** 4)

# %%
exercise(4, answer_4, "5cf2ba9d717c")
