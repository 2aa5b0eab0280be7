# %% [markdown]
# # 02B. A decode kernel for multi-head attention: shape, blocks, masks, loads and stores
#
# In a decode step each row has one new token, and each of its N heads meets the keys and values that this head has in
# the cache (02A). Little is computed, much is read. So a kernel for it is judged by its loads: does it read each needed
# byte once, no other byte, and in pieces that the memory likes? Here all three are measured.
#
# Words of 01B: a kernel runs in many copies, *programs*, each on one *SM* of the GPU; a *tile* is the piece of an array
# that a program works on; *global memory* holds the arrays.
#
# Letters: B rows, S slots of the cache (one a token), N heads, H channels of a query or key, V of a value (here V = H).

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
from jforge.lessons import EMPTY, KEPT, READ, exercise, picture, reveal, traffic

# %% [markdown]
# ## The reference: three loops
#
# Rows have different lengths, and the cache has room for more. Slots past a row's length hold anything; here NaN, so
# that reading one shows.


# %%
@jaxtyped(typechecker=beartype)
def reference(
    q: Float[np.ndarray, "B N H"], k: Float[np.ndarray, "B S N H"], v: Float[np.ndarray, "B S N H"],
    lengths: Int[np.ndarray, "B"], scale: float,
) -> Float[np.ndarray, "B N H"]:  # fmt: skip
    out = np.zeros(q.shape)
    for b, length in enumerate(lengths):
        for n in range(q.shape[1]):
            weights = np.zeros(length)
            for s in range(length):
                weights[s] = np.exp(scale * q[b, n].astype(float) @ k[b, s, n].astype(float))
            out[b, n] = weights / weights.sum() @ v[b, :length, n].astype(float)
    return out


B, S, N, H = 2, 96, 3, 64
lengths = np.array([75, 9], np.int32)
draw = np.random.default_rng(0)
q, k, v = (draw.standard_normal(shape).astype(np.float16) for shape in ((B, N, H), (B, S, N, H), (B, S, N, H)))
for array in (k, v):
    array[np.arange(S) >= lengths[:, None]] = np.nan
truth = reference(q, k, v, lengths, H**-0.5)
print(truth.shape, "no NaN:", bool(np.isfinite(truth).all()))

# %% [markdown]
# ## Shape: who does what
#
# The outer loops are independent, so they become programs: one for each row and head, a *grid* of N x B. The loop over
# slots stays in the program, but takes a tile of KEYS slots a turn, with the online softmax of 01B.
#
# With one query a head there is no product of matrices: a tile of KEYS x H numbers times one vector. The kernel writes
# it as a product element by element and a sum. Where an array's elements lie it is told by *strides*: how many elements
# lie between neighbours of an axis.

# %%
import triton
import triton.language as tl


@triton.jit
def decode_kernel(q, k, v, lengths, out, scale, b_stride, s_stride, n_stride, h_stride, N: tl.constexpr,
                  H: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    n, b = tl.program_id(0), tl.program_id(1)
    h = tl.arange(0, H)
    length = tl.load(lengths + b)
    query = tl.load(q + (b * N + n) * H + h).to(tl.float32)
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([H], tl.float32)
    for first in tl.range(0, length, KEYS):
        s = first + tl.arange(0, KEYS)
        there = (s < length)[:, None]
        at = b * b_stride + s[:, None] * s_stride + n * n_stride + h[None, :] * h_stride  # KEYS H
        key = tl.load(k + at, mask=there, other=0.0).to(tl.float32)
        logits = tl.where(s < length, tl.sum(key * query[None, :], 1) * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 0))
        shrink = tl.exp(top - new_top)
        weights = tl.exp(logits - new_top)
        value = tl.load(v + at, mask=there, other=0.0).to(tl.float32)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(value * weights[:, None], 0)
        top = new_top
    tl.store(out + (b * N + n) * H + h, (acc / total).to(out.dtype.element_ty))


launch = triton_kernels.runtime.launch  # kernel[grid](*arguments), without NumPy's warnings in the interpreter
tensors = dict(zip(("q", "k", "v", "lengths"), map(to_device, (q, k, v, lengths)), strict=True))


def decode(q, k, v, lengths, keys=32):
    """k and v: B S N H in any order in memory, both in the same."""
    out = torch.empty_like(q)
    launch(decode_kernel, (N, B), q, k, v, lengths, out, H**-0.5, *k.stride(), N=N, H=H, KEYS=keys)
    return out


def right(out):
    return compare.relative(out.reshape(truth.shape), truth) <= compare.OUT["float16"]


for keys in (16, 32, 128):
    print(f"tiles of {keys:>3}: equal", right(decode(**tensors, keys=keys)))

# %% [markdown]
# Two masks are at work. `mask=there` keeps the loads from slots past the length: no NaN comes in, and no byte is spent.
# `tl.where(..., -inf)` takes those slots out of the softmax; without it they would be keys of zeros, whose weight is
# exp(0) before the division, not 0 (05A). `tl.range(0, length, KEYS)` leaves out whole tiles.
# (A row of length 0 would divide 0 by 0 at the end. The package's kernels give 0 there.)
#
# ## Loads and stores, counted
#
# The interpreter (01B) asks one method for each load and one for each store. If they write down the addresses, as
# with `traffic`, we see what was moved.


# %%
def inside(addresses, tensor):
    """Which of the addresses lie in a tensor."""
    start = tensor.untyped_storage().data_ptr()
    return addresses[(addresses >= start) & (addresses < start + tensor.untyped_storage().nbytes())]


def loaded(loads, tensor):
    """Bytes of a tensor that were loaded, each as often as it was."""
    return tensor.element_size() * sum(len(inside(places, tensor)) for _, places in loads)


# %% [markdown]
# Predict: lengths 75 and 9, N = 3 heads of H = 64 channels, 2 bytes a number, tiles of 32 slots. How many bytes of
# **k** does the kernel load?

# %% tags=["predict"]
guess = None

# %%
with traffic() as (loads, stores):
    decode(**tensors)
reveal(loaded(loads, tensors["k"]), guess)

# %% [markdown]
# The number of tiles does not show in it, as the mask cuts the last one. Against the package's `cost` of the two rows
# (it knows what a step must read, not how):

# %%
att = jforge.get("mha")
cfg = att.Config(hidden_size=N * H, num_attention_heads=N)
costs = [att.cost(cfg, context=int(length), dtype=jnp.float16) for length in lengths]
for name in ("k", "v"):
    print(name, "loaded", loaded(loads, tensors[name]), " cost", sum(cost.read[name] for cost in costs))
print("q loaded", loaded(loads, tensors["q"]), " of", q.nbytes)
print(len(stores), "stores of", {len(places) * 2 for _, places in stores}, "bytes: out has", truth.size * 2)

# %% [markdown]
# Which program read which slots of k? Rows of the picture are the programs, in each panel those of one row of the
# batch.

# %%
codes = {}
for b, length in enumerate(lengths):
    used = np.where(np.arange(S) < length, KEPT, EMPTY)
    codes[f"row {b}, {length} tokens"] = np.tile(used, (N, 1))
for (n, b, _), places in loads:
    places = inside(places, tensors["k"])
    if len(places):
        slots = np.unique((places - tensors["k"].data_ptr()) // 2 // (N * H) % S)
        codes[f"row {b}, {lengths[b]} tokens"][n, slots] = READ
picture(codes, "slots of k that the program of each head reads", down="head")

# %% [markdown]
# Every program reads its row up to the length, and nothing behind it. The programs of row 0 have eight times the work
# of those of row 1; a short row is done early and its SM takes the next program. What if there is only one long row?
# Then N programs run, and a card with more SMs than heads has idle ones. The cure is to split the slots of a row among
# programs, and to merge (05B).
#
# ## In pieces that the memory likes
#
# A GPU's memory gives *sectors* of 32 bytes: who wants 2 bytes of one gets, and pays for, all 32. The threads of a warp
# load together, and if their addresses lie side by side, they share sectors. That is called *coalescing*. The layout of
# the cache decides it: the same kernel, told other strides, on the same numbers in another order. Count the sectors
# that each load touches.


# %%
def sectors(loads, tensor):
    """Bytes of the sectors that the loads of a tensor touch, those of each load counted apart.

    The tensor's start counts as that of a sector, which it is on a GPU.
    """
    start = tensor.untyped_storage().data_ptr()
    places = [inside(places, tensor) - start for _, places in loads]
    return 32 * sum(len(np.unique(some // 32)) for some in places)


orders = {"B S N H": (0, 1, 2, 3), "B N S H": (0, 2, 1, 3), "B S H N": (0, 1, 3, 2)}
for name, order in orders.items():
    back = np.argsort(order).tolist()
    moved = {n: tensors[n].permute(order).contiguous().permute(back) for n in ("k", "v")}  # B S N H again, as a view
    with traffic() as (loads_here, _):
        out = decode(**{**tensors, **moved})
    used, touched = loaded(loads_here, moved["k"]), sectors(loads_here, moved["k"])
    print(f"{name}: equal {right(out)}, {used} bytes used, {touched} bytes of sectors: {touched / used:.2f}")

# %% [markdown]
# (N = 3 is few: with 32 heads in the last axis each number would have a sector of its own.) As long as the channels of
# a head lie together, the order of the other axes does not matter for the sectors.
#
# ## With tensor cores, in Mosaic GPU
#
# A fast kernel multiplies with the *tensor cores*, units for products of small matrices. `wgmma` on the H100 multiplies
# a tile of 64 rows with one of at least 8 columns. Our query is one row. So the roles are turned: the 64 rows are
# *keys*, the 8 columns are queries, of which one is real: S^T = K Q^T. Seven of eight products are for nothing, which
# does not matter while the bytes are what takes the time.
#
# Words of 01B: *TMA* copies tiles to the *shared memory* of the SM, a *barrier* says when they are there, *swizzle* is
# the order in which wgmma wants them.
#
# TMA knows no mask by length. It brings whole tiles, with the slots that no one may read. For keys that is harmless:
# their logits are replaced by -inf. For values it is not: their weight is 0, but 0 times NaN is NaN, and the product
# adds it. They must be overwritten with zeros.

# %%
from functools import partial

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE, COLUMNS = 64, 8
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


def decode_body(q, k, v, lengths, out, q_s, k_s, v_s, p_s, out_s, arrived, *, blank):
    n, b = lax.axis_index("head"), lax.axis_index("row")
    length, keys_by_queries = lengths[b], (TILE, COLUMNS)

    def fetch(source, target):
        plgpu.copy_gmem_to_smem(source, target, arrived)
        plgpu.barrier_wait(arrived)

    def slots(i, shape):
        return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA) + i * TILE

    def turn(i, state):
        acc, top, total = state
        fetch(k.at[b, pl.ds(i * TILE, TILE), n], k_s)
        logits = product(k_s, q_s.transpose((1, 0)), keys_by_queries) * H**-0.5
        logits = jnp.where(slots(i, keys_by_queries) < length, logits, -jnp.inf)
        new_top = jnp.maximum(top, logits.max(axis=0))
        shrink = jnp.exp(top - new_top)
        weights = jnp.exp(logits - down(new_top, keys_by_queries))
        p_s.transpose((1, 0))[...] = weights.astype(p_s.dtype)  # through shared memory, where wgmma reads it
        fetch(v.at[b, pl.ds(i * TILE, TILE), n], v_s)
        if blank:
            value = plgpu.load(v_s, layout=WGMMA)
            v_s[...] = jnp.where(slots(i, (TILE, H)) < length, value, jnp.zeros_like(value))
        plgpu.commit_smem()  # what threads wrote is seen by wgmma and TMA only after this
        more = product(v_s.transpose((1, 0)), p_s.transpose((1, 0)), (H, COLUMNS))
        return acc * down(shrink, (H, COLUMNS)) + more, new_top, total * shrink + weights.sum(axis=0)

    fetch(q.at[b, n, pl.ds(0, COLUMNS)], q_s)  # one row is there; TMA fills the others with zeros
    acc = plgpu.layout_cast(jnp.zeros((H, COLUMNS), jnp.float32), WGMMA)
    top = plgpu.layout_cast(jnp.full((COLUMNS,), -1e30, jnp.float32), WGMMA.reduce(0))
    total = plgpu.layout_cast(jnp.zeros((COLUMNS,), jnp.float32), WGMMA.reduce(0))
    acc, top, total = lax.fori_loop(0, lax.div(length + TILE - 1, TILE), turn, (acc, top, total))
    acc = acc * down(1 / total, (H, COLUMNS))
    out_s.transpose((1, 0))[...] = plgpu.layout_cast(acc, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_s, out.at[b, n, pl.ds(0, COLUMNS)])  # and drops them again
    plgpu.wait_smem_to_gmem(0)


swizzled = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)  # 64 numbers of 2 bytes are 128 bytes


def decode_mosaic(q, k, v, lengths, blank=True):
    def tile(rows):
        return plgpu.SMEM((rows, H), q.dtype, transforms=swizzled)

    on_gpu = jax.default_backend() == "gpu"
    out = plgpu.kernel(
        partial(decode_body, blank=blank), out_type=jax.ShapeDtypeStruct((B, N, 1, H), jnp.float32),
        grid=(N, B), grid_names=("head", "row"), kernel_name="decode",
        scratch_types=[tile(COLUMNS), tile(TILE), tile(TILE), tile(COLUMNS), plgpu.SMEM((COLUMNS, H), jnp.float32),
                       plgpu.Barrier()],
        interpret=None if on_gpu else plgpu.InterpretGPUParams(detect_races=True),
    )(q[:, :, None], k, v, lengths)  # fmt: skip
    return out[:, :, 0]


arrays = [jnp.asarray(a) for a in (q, k, v, lengths)]
for blank in (False, True):
    found = decode_mosaic(*arrays, blank=blank)
    print(f"values past the length zeroed: {blank!s:5}  NaN: {bool(jnp.isnan(found).any())!s:5}  equal:", right(found))

# %% [markdown]
# A real cache seldom holds NaN, but memory that was never written may hold any bits, and some of them are NaN.
#
# So this kernel reads more than `cost` says, up to one tile less one slot a row. In long rows that is little:

# %%
for length in (9, 75, 1000, 8191):
    tiles = -(-length // TILE)
    print(f"{length:>5} tokens: {tiles:>3} tiles, {tiles * TILE / length - 1:7.1%} more slots than tokens")

# %% [markdown]
# ## Against the package
#
# The package's kernels on the same inputs (they take a T axis: B T N H), and what Triton's one loads:

# %%
as_op = tensors["q"][:, None], *(tensors[n] for n in ("k", "v", "lengths"))
theirs, _ = triton_kernels.decode_attention(*as_op, scale=H**-0.5)
with traffic() as (of_theirs, _):
    triton_kernels.decode_attention(*as_op, scale=H**-0.5)
other, _ = pallas_kernels.decode_attention(arrays[0][:, None], *arrays[1:], scale=H**-0.5)
print("triton_kernels:", right(theirs), " pallas_kernels:", right(other))
for name in ("k", "v"):
    print(name, "loaded by triton_kernels", loaded(of_theirs, tensors[name]), " by ours", loaded(loads, tensors[name]))
programs = {program for program, places in of_theirs if len(inside(places, tensors["k"]))}
print("programs that load keys:", len(programs), " ours:", N * B)

# %% [markdown]
# Same bytes. The package's kernel uses `tl.dot` with 16 rows of queries, 1 of them real, for the same reason as above.
#
# What the interpreters do not tell: time; whether loads are coalesced in fact (we counted sectors, the compiler decides
# which thread loads what); how well loads and arithmetic overlap. Measured times of the package's kernels are in
# docs/gpu_runs.jsonl: for multi-head rows see 02A.
#
# ## Exercises
#
# Set the answer, run the two cells. A function is called by the second one.
#
# **1.** One program for each row and head, N = 32. How many rows must a batch have, so that each of the 132 SMs of an
# H100 has a program at least?

# %%
answer_1 = None

# %% tags=["solution"]
answer_1 = -(-132 // 32)

# %%
exercise(1, answer_1, "fd481a25fbd9")

# %% [markdown]
# **2.** B S N H, N = 2, H = 24, 2 bytes a number, the array starts at a sector. How many bytes of sectors does the load
# of one key of head 1 (token 0) touch?

# %%
answer_2 = None

# %% tags=["solution"]
answer_2 = 32 * len({(2 * 24 * 1 + byte) // 32 for byte in range(48)})

# %%
exercise(2, answer_2, "14cb06acd9b5")

# %% [markdown]
# **3.** Write `answer_3(lengths, keys)`: of all slots that TMA loads for these rows, in tiles of `keys` slots, the
# share that it loads for nothing.

# %%
answer_3 = None


# %% tags=["solution"]
def answer_3(lengths, keys):
    slots = [-(-length // keys) * keys for length in lengths]
    return 1 - sum(lengths) / sum(slots)


# %%
exercise(3, answer_3, "2463645d4a01", [9, 75, 1000, 130], 64)

# %% [markdown]
# **4.** A row of 1,000 tokens is split among 4 programs in whole tiles of 64 slots, as evenly as that goes: each takes
# the same number of tiles but perhaps the last. How many tokens does the last one get?

# %%
answer_4 = None

# %% tags=["solution"]
tiles_each = np.ceil(np.ceil(1000 / 64) / 4)
answer_4 = int(1000 - 3 * tiles_each * 64)

# %%
exercise(4, answer_4, "afa3006a5b3a")

# %% [markdown]
# **5.** Write `answer_5(length, window, keys)`: the first and the last tile (numbers from 0) that a program must visit,
# if its query, the last token of the row, sees the last `window` tokens only.

# %%
answer_5 = None


# %% tags=["solution"]
def answer_5(length, window, keys):
    return [max(0, length - window) // keys, (length - 1) // keys]


# %%
exercise(5, answer_5, "558f47da90bf", 1000, 300, 64)
