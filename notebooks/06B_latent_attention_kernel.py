# %% [markdown]
# # 06B. The kernel of latent attention: read once, use twice, for all heads
#
# Notebook 06A: in the absorbed form all N heads meet the same cache, one latent (C numbers) and one rotary key (R
# numbers) a token.
#
#     l_n,s = scale (q_latent_n . latent_s + q_rope_n . k_rope_s)        out_n = sum_s softmax_s(l_n) latent_s
#
# The latent is key *and* value, of *every* head. A kernel that is written like one for keys and values reads it again
# for each of these uses. This notebook removes one read after the other.
#
# Words of 05B: a *kernel* runs in many copies, the *programs*, each on an *SM*, one of the card's processors. A program
# copies *tiles* from global memory into the *shared memory* of its SM and keeps sums in *registers*, which belong to a
# thread. `top`, `total` and `acc` are the online softmax: the largest logit so far, the sum of exp(l - top), and the
# sum of exp(l - top) times the value.

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
# ## The reference
#
# One row of the batch, a cache of S slots of which `length` are used. The loop that every kernel below must equal, in
# float64:

# %%
N, C, R, S, length = 32, 128, 64, 256, 200
scale = 0.1
torch.manual_seed(0)


def drawn(*shape):
    return torch.randn(*shape, device="cpu").to(device)  # the same numbers on every device


q_latent, q_rope = drawn(N, C).half(), drawn(N, R).half()
latent, k_rope = drawn(S, C).half(), drawn(S, R).half()


@jaxtyped(typechecker=beartype)
def reference(
    q_latent: Float[torch.Tensor, "N C"], q_rope: Float[torch.Tensor, "N R"],
    latent: Float[torch.Tensor, "S C"], k_rope: Float[torch.Tensor, "S R"],
) -> Float[np.ndarray, "N C"]:  # fmt: skip
    outs = []
    for n in range(len(q_latent)):
        logits = scale * (latent.double() @ q_latent[n].double() + k_rope.double() @ q_rope[n].double())
        outs.append(torch.softmax(logits, 0) @ latent.double())
    return torch.stack(outs).cpu().numpy()


want = reference(q_latent, q_rope, latent[:length], k_rope[:length])


def close(a):
    return compare.relative(a, want) <= compare.OUT["float16"]


# %% [markdown]
# ## Keys and values apart
#
# First the kernel of 05B, told that the key is [latent | k_rope] and the value is the latent. It does what a kernel for
# grouped queries does: load a tile of keys, make the logits, load a tile of values, add. ROWS heads make one program.
# TWICE decides whether the tile is loaded again as values. (It is written in *Triton*: `tl.program_id` says which copy
# runs, `tl.constexpr` marks numbers that are known when the kernel is compiled, `tl.dot` multiplies two tiles.)


# %%
@triton.jit
def latent_kernel(
    q_latent, q_rope, latent, k_rope, out, length, scale,
    C: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, TWICE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c, r = tl.arange(0, C), tl.arange(0, R)
    ql = tl.load(q_latent + n[:, None] * C + c[None, :])
    qr = tl.load(q_rope + n[:, None] * R + r[None, :])
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total, acc = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, C], tl.float32)
    for tile in tl.range(0, length, KEYS):
        s = tile + tl.arange(0, KEYS)
        used = (s < length)[:, None]
        keys = tl.load(latent + s[:, None] * C + c[None, :], mask=used, other=0.0)
        rope = tl.load(k_rope + s[:, None] * R + r[None, :], mask=used, other=0.0)
        logits = tl.dot(ql, tl.trans(keys), input_precision="ieee")
        logits = tl.dot(qr, tl.trans(rope), logits, input_precision="ieee") * scale
        logits = tl.where((s < length)[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shrink, weights = tl.exp(top - new_top), tl.exp(logits - new_top[:, None])
        total = total * shrink + tl.sum(weights, 1)
        values = keys
        if TWICE:
            values = tl.load(latent + s[:, None] * C + c[None, :], mask=used, other=0.0)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    tl.store(out + n[:, None] * C + c[None, :], acc / total[:, None])


def run(rows, twice):
    out = torch.empty(N, C)
    tensors = q_latent, q_rope, latent, k_rope, out
    launch(latent_kernel, (N // rows,), *tensors, length, scale, C=C, R=R, ROWS=rows, KEYS=32, TWICE=twice)
    return out


print("equal:", close(run(32, twice=True)), close(run(32, twice=False)))

# %% [markdown]
# Where torch sees no GPU, Triton's interpreter ran this, program after program, in NumPy. Its results can be trusted
# for float16, its times mean nothing. What it can show, with a GPU too, is each address that the kernel loads from
# (`traffic` has it write them down):


# %%
def asked(rows, twice):
    """How often each number of [latent | k_rope] is asked for, S x (C + R)."""
    with traffic() as (loads, _):
        run(rows, twice)
    every, counts = np.concatenate([addresses for _, addresses in loads]), []
    for tensor in (latent, k_rope):
        at = (every - tensor.data_ptr()) // 2
        inside = at[(at >= 0) & (at < tensor.numel())]
        counts.append(np.bincount(inside, minlength=tensor.numel()).reshape(tensor.shape))
    return np.concatenate(counts, axis=1)


att = jforge.get("mla")
sizes = dict(kv_lora_rank=C, qk_rope_head_dim=R, qk_nope_head_dim=32, v_head_dim=32)
cfg = att.Config(hidden_size=64, num_attention_heads=N, **sizes)
cost = sum(att.cost(cfg, context=length, dtype=jnp.float16).read.values())
kinds = {
    "latent loaded as key and as value, 16 heads a program": (16, True),
    "loaded once, 16 heads a program": (16, False),
    "loaded once, 32 heads a program: all": (32, False),
}
counts = {title: asked(*kind) for title, kind in kinds.items()}
for title, count in counts.items():
    print(f"{title:54} {2 * count.sum():>7,} bytes, {2 * count.sum() / cost:.2f} of cost")

# %%
plt = plots()
figure, axes = plt.subplots(3, 1, figsize=(10, 6.2), sharex=True)
for ax, (title, count) in zip(axes, counts.items(), strict=True):
    image = ax.pcolormesh(count, cmap="Blues", vmin=0, vmax=4)
    ax.axvline(C, color="black", linewidth=1.5)
    ax.set_title(title, loc="left", fontsize=14)
    ax.set(ylim=(S, 0), ylabel="slot", yticks=(0, length))
axes[-1].set_xlabel(f"channel: latent up to {C}, then k_rope")
figure.colorbar(image, ax=axes, label="times asked for", ticks=range(5))
plt.show()

# %% [markdown]
# White, below slot 200: never asked for. Only the last kernel asks once for each number, which is what the package's
# `cost` counts.
#
# On a GPU the second load of a tile is not always a second read of global memory: it may be answered by *L2*, the cache
# that all SMs share. But it passes through the wires between L2 and the SM again. Loaded once, the tile lies in shared
# memory, and the *matrix unit*, which multiplies tiles, reads it there twice: transposed as keys, and as it lies as
# values. This is the "one read".
#
# ## Why not all heads in one program
#
# With 128 heads in one program the latent would be read once for all. What stands against it is where `acc` lies:
# ROWS x C numbers in float32, in registers. The sizes of DeepSeek-V3:

# %%
v3 = att.models["DeepSeek-V3"]
WIDE, ROPE = v3.kv_lora_rank, v3.qk_rope_head_dim
WARPGROUP, MOST = 128, 255  # threads that share a product; registers that a thread can have
for rows in (16, 32, 64, 128):
    each = rows * WIDE // WARPGROUP
    print(f"{rows:>3} heads: acc takes {each:>3} registers a thread in one warpgroup, {each // 2:>3} in each of two "
          f"(at most {MOST}); of all registers of an SM {rows * WIDE / h100.registers:.0%}")  # fmt: skip

# %% [markdown]
# A *warpgroup* is 128 threads that do a product together. 64 heads do not fit one warpgroup, since there must be room
# for logits and addresses too. They do fit two, if each takes half of the *channels*: 64 x 256 of acc. That is the
# layout of the package's `decode_mla_many` (and of FlashMLA, where it comes from). Both halves need all weights; the
# scores of a tile are computed by one of the two and handed to the other through shared memory, since computing
# them in both would cost this many flops more:

# %%
scores, values = WIDE + ROPE, WIDE  # products a head and slot
print(f"shared memory of an SM: {h100.smem:,} bytes")
print(f"scores computed twice: {(2 * scores + values) / (scores + values):.2f} times the flops")

# %% [markdown]
# So N = 128 takes two programs for each tile, with 64 heads each. They stand side by side in the grid, run at the same
# time and read the same tile; the second one finds it in L2.
#
# Then shared memory. It holds the queries, a ring of tiles (05B: several tiles have to be under way), and the weights.
#
# Predict: how many tiles of 64 slots fit beside the queries of 64 heads, in 16-bit numbers?

# %% tags=["predict"]
guess = None

# %%
tile = 64 * (WIDE + ROPE) * 2
queries = 64 * (WIDE + ROPE) * 2
reveal((h100.smem - queries) // tile, guess)
left = h100.smem - queries - 2 * tile
print(f"a tile {tile:,} bytes, the queries {queries:,}, of {h100.smem:,}; left after two tiles: {left:,}")
print(f"weights of a tile: {64 * 64 * 2:,} bytes; with two tiles under way, {2 * 64 * 64 * 2:,}")

# %% [markdown]
# The weights of one tile fit, those of two do not. So the package puts the weights of a tile where its rotary keys
# were, which nobody reads any more once the logits are made.
#
# ## The kernel in Mosaic GPU
#
# For up to 32 heads the package turns everything round (`decode_mla_few`): the 64 *slots* of a tile are the rows of the
# matrix unit, which wants 64 rows, and the heads its columns, which may be few. We write that one. Its parts (05B):
# *TMA* copies tiles from global to shared memory and reports to a *barrier*; `wgmma` multiplies tiles in shared memory
# into the accumulator `ACC`.

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


def product(shape, *pairs):
    """The sum of a @ b over pairs of tiles in shared memory."""

    def run(accumulator):
        for a, b in pairs:
            plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def latent_body(clean, ql, qr, latent, k_rope, out, ql_s, qr_s, c_s, r_s, p_s, out_s, q_full, full):
    steps = -(-length // KEYS)

    def fetch(i):
        slot, rows = lax.rem(i, STAGES), pl.ds(i * KEYS, KEYS)
        plgpu.copy_gmem_to_smem(latent.at[rows], c_s.at[slot], full.at[slot])
        plgpu.copy_gmem_to_smem(k_rope.at[rows], r_s.at[slot], full.at[slot])

    def blank(i, slot):
        """Zeros in the place of slots that are not used."""
        for column in range(0, C, 64):
            part = c_s.at[slot, :, pl.ds(column, 64)]
            s = plgpu.broadcasted_iota(jnp.int32, (KEYS, 64), 0, layout=WGMMA) + i * KEYS
            x = plgpu.load(part, layout=WGMMA)
            part[...] = jnp.where(s < length, x, jnp.zeros_like(x))

    def turn(i, state):
        acc, top, total = state
        slot = lax.rem(i, STAGES)
        plgpu.barrier_wait(full.at[slot])
        keys = (c_s.at[slot], ql_s.transpose((1, 0))), (r_s.at[slot], qr_s.transpose((1, 0)))
        logits = product((KEYS, N), *keys) * scale
        s = plgpu.broadcasted_iota(jnp.int32, (KEYS, N), 0, layout=WGMMA) + i * KEYS
        logits = jnp.where(s < length, logits, -jnp.inf)
        new_top = jnp.maximum(top, logits.max(axis=0))
        shrink, weights = jnp.exp(top - new_top), jnp.exp(logits - down(new_top, (KEYS, N)))
        p_s.transpose((1, 0))[...] = weights.astype(p_s.dtype)
        if clean:
            pl.when((i + 1) * KEYS > length)(lambda: blank(i, slot))
        plgpu.commit_smem()  # all threads are here, so nobody reads the tile before this one any more
        pl.when((i > 0) & (i - 1 + STAGES < steps))(lambda: fetch(i - 1 + STAGES))
        more = product((C, N), (c_s.at[slot].transpose((1, 0)), p_s.transpose((1, 0))))  # the same tile, as values
        return acc * down(shrink, (C, N)) + more, new_top, total * shrink + weights.sum(axis=0)

    plgpu.copy_gmem_to_smem(ql, ql_s, q_full)
    plgpu.copy_gmem_to_smem(qr, qr_s, q_full)
    for i in range(min(STAGES, steps)):
        fetch(jnp.int32(i))
    plgpu.barrier_wait(q_full)
    acc = plgpu.layout_cast(jnp.zeros((C, N), jnp.float32), WGMMA)
    top = plgpu.layout_cast(jnp.full((N,), -1e30, jnp.float32), BY_COLUMN)  # finite: no -inf - (-inf)
    total = plgpu.layout_cast(jnp.zeros((N,), jnp.float32), BY_COLUMN)
    acc, top, total = lax.fori_loop(0, steps, turn, (acc, top, total))
    out_s.transpose((1, 0))[...] = plgpu.layout_cast(acc * down(1 / total, (C, N)), plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_s, out)
    plgpu.wait_smem_to_gmem(0)


def operand(*shape):
    return plgpu.SMEM(shape, jnp.float16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


on_gpu = jax.default_backend() == "gpu"


def mosaic(latent, clean=True):
    return plgpu.kernel(
        lambda *refs: latent_body(clean, *refs), out_type=jax.ShapeDtypeStruct((N, C), jnp.float32), grid=(1,),
        grid_names=("one",), kernel_name="latent",
        scratch_types=[
            operand(N, C), operand(N, R), operand(STAGES, KEYS, C), operand(STAGES, KEYS, R), operand(N, KEYS),
            plgpu.SMEM((N, C), jnp.float32), plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ],
        interpret=None if on_gpu else plgpu.InterpretGPUParams(detect_races=True),
    )(*(jnp.asarray(x.cpu().numpy()) for x in (q_latent, q_rope, latent, k_rope)))  # fmt: skip


print("equal:", close(mosaic(latent)), "a race was seen:", compat.races_found())

# %% [markdown]
# `c_s.at[slot]` stands in two products: first as it is, against the queries, then transposed, against the weights.
# There is one copy of it, and one barrier. Mosaic's interpreter shows that this is right and free of races. It does not
# know how long anything takes, nor how many registers there are. (With a GPU this kernel is compiled and runs there.)
#
# ## A trap: what is masked is read
#
# `clean` blanks the slots past the length. Why, when their weight is 0? A buffer that was allocated and not filled may
# hold anything, NaN too:

# %%
poisoned = latent.clone()
poisoned[length:] = float("nan")
for clean in (False, True):
    found = np.asarray(mosaic(poisoned, clean))
    print(
        f"clean = {clean!s:5}: {np.isnan(found).mean():.0%} of the output is NaN; equal: {close(np.nan_to_num(found))}"
    )

# %% [markdown]
# 0 x NaN is NaN. As a *key* the slot did no harm, since its logit was replaced; as a *value* it meets a weight of 0 in
# the product. TMA copies whole boxes and has no mask; a Triton load has one and gave 0. It takes this only in a tile
# that is not full, the last one.
#
# ## Against the package

# %%
given = [x[None] for x in (q_latent[None], q_rope[None], poisoned, k_rope)] + [torch.tensor([length]).int()]
theirs, _ = triton_kernels.decode_mla(*given, scale=scale)
other, _ = pallas_kernels.decode_mla(*(jnp.asarray(x.cpu().numpy()) for x in given), scale=scale)
print("triton_kernels:", close(theirs[0, 0]), "pallas_kernels:", close(other[0, 0]))

# %% [markdown]
# Both have what ours lacks: splits of the keys and their merge (05B), pages, windows, several tokens at once. In Pallas
# a second warpgroup orders the copies.
#
# ## Two ceilings
#
# 06A: with 128 heads the absorbed step has nearly as many flops for each byte as the card balances at. So two times
# bound it, that of the bytes and that of the flops, and the kernel can at best take the longer one. Measured times come
# from `docs/gpu_runs.jsonl`; the bytes are divided by the rate of a kernel that only reads, in the same run, and the
# flops by the data sheet's rate:

# %%
runs = [json.loads(line) for line in Path("../docs/gpu_runs.jsonl").read_text().splitlines()]
timed = [run for run in runs if run["what"] == "decode_mla"]
ceiling = max(run["GB_per_s"] for run in runs if run["what"] == "ceiling" and run["commit"] == timed[0]["commit"])
print(timed[0]["device"], "commit", timed[0]["commit"], f"reads {ceiling:.0f} GB/s, {h100.tflops} TFLOP/s")


def least(run):
    """(us for the bytes, us for the flops)"""
    slots = run["B"] * run["S"]
    flops = 2 * run["N"] * (2 * run["C"] + run["R"]) * slots
    return slots * (run["C"] + run["R"]) * 2 / ceiling / 1e3, flops / h100.tflops / 1e6


rows = {}
for run in timed:
    rows.setdefault((run["B"], run["N"], run["S"]), {})[run["implementation"]] = run
for (B, heads, slots), found in rows.items():
    by_bytes, by_flops = least(found["pallas"])
    print(f"B={B:>3} N={heads:>3} S={slots:>7,}: bytes {by_bytes:6.1f} us, flops {by_flops:6.1f} us,", end=" ")
    print(", ".join(f"{name} {found[name]['median']:6.1f}" for name in ("pallas", "triton")))

# %%
labels = [f"B = {B}\nN = {heads}\nS = {slots:,}" for B, heads, slots in rows]
at = np.arange(len(rows))
figure, ax = plt.subplots(figsize=(10, 5))
floors = [least(found["pallas"]) for found in rows.values()]
for i, (name, times) in enumerate({
    "bytes, at least": [a for a, _ in floors], "flops, at least": [b for _, b in floors],
    **{name: [found[name]["median"] for found in rows.values()] for name in ("pallas", "triton")},
}.items()):  # fmt: skip
    ax.bar(at + 0.2 * (i - 1.5), times, width=0.2, label=name, color=("#bbbbbb", "#777777", "C0", "C1")[i])
ax.set_xticks(at, labels, fontsize=12)
ax.set(ylabel="us")
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# With 16 and 64 heads the bytes take far longer than the flops, and both kernels come near their time. With 128 heads
# the two times are of one size, and to reach the longer one, copies, products and the softmax between them have to
# overlap without a gap. Here the layout of a kernel counts, and the two packages differ most.
#
# ## Exercises
#
# Set the answer, run the two cells. A function is called by the second one.
#
# **1.** DeepSeek-V3, one layer, a row of 4,096 tokens in bfloat16. How many bytes does a kernel ask for that loads the
# latents as keys and again as values, with 64 of the 128 heads in a program?

# %%
answer_1 = None

# %% tags=["solution"]
answer_1 = 4096 * (2 * WIDE + ROPE) * 2 * (128 // 64)

# %%
exercise(1, answer_1, "cb2a7c7e25ac")

# %% [markdown]
# **2.** A model checks several guessed tokens in one step (speculative decoding): T new tokens with N = 16 heads each
# share one read of the latents. From which T on do the flops take longer than the bytes on the H100 (`h100.tflops`,
# `h100.bandwidth`), in bfloat16?

# %%
answer_2 = None

# %% tags=["solution"]
one = 2 * 16 * (2 * WIDE + ROPE) / ((WIDE + ROPE) * 2)  # flops a byte of one token
answer_2 = next(T for T in range(1, 100) if T * one > h100.tflops * 1e12 / (h100.bandwidth * 1e9))

# %%
exercise(2, answer_2, "0a48f91c3eee")

# %% [markdown]
# **3.** Write `answer_3(q_latent, q_rope, tiles)` for one head: `tiles` is an iterator of pairs (latents n C, rotary
# keys n R), each of which comes once and cannot be kept. NumPy arrays; the logits are not scaled. Give out, C numbers.

# %%
answer_3 = None


# %% tags=["solution"]
def answer_3(q_latent, q_rope, tiles):
    top, total, acc = -np.inf, 0.0, 0.0
    for latents, ropes in tiles:
        logits = latents @ q_latent + ropes @ q_rope
        new_top = max(top, logits.max())
        shrink, weights = np.exp(top - new_top), np.exp(logits - new_top)
        total, acc, top = total * shrink + weights.sum(), acc * shrink + weights @ latents, new_top
    return acc / total


# %%
exercise(
    3, answer_3, "3e7f670d0595", np.array([1.0, -1.0]), np.array([0.5]),
    iter([(np.array([[100.0, 3.0], [2.0, 1.0]]), np.ones((2, 1))), (np.array([[101.0, 4.0]]), np.ones((1, 1)))]),
)  # fmt: skip

# %% [markdown]
# **4.** A cache in 8-bit numbers: a tile of 64 slots takes half the bytes, the queries stay 16-bit. How many tiles fit
# beside the queries of 64 heads then?

# %%
answer_4 = None

# %% tags=["solution"]
answer_4 = (h100.smem - queries) // (tile // 2)

# %%
exercise(4, answer_4, "c36406e9a25b")
