# %% [markdown]
# # 09B. The kernels of sparse attention: scan, pick, gather
#
# A decode step of DeepSeek sparse attention (notebook 09A) is three kernels: one scores every token by its index key,
# one picks the L best, one attends to the picked latents alone. The first reads a lot and hardly computes, the second
# has to be exact, the third reads rows that lie anywhere. Each is a small kernel with one point to it.
#
#     score_s = sum_i w_i relu(q_i . k_s)                      picks = the L best
#     out_n = sum over j in picks of softmax_j(scale q_n . row_j) latent_j
#
# Letters: B rows of the batch, S slots of the cache of which a row uses `lengths`; I index heads of J channels; L
# picks; N query heads; a row of the latent cache is [latent | rotary key], C + R numbers, key of all heads; the latent
# is the value too.
#
# Words of 01B and 05B: a kernel runs in many copies, the *programs*, each on an *SM*, one of the card's processors. A
# program copies *tiles* from global memory to the SM and writes only its result back.

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
# ## The scan: the reference
#
# The loop that the first kernel must equal, in float64. -inf stands for a slot that is not used.

# %%
B, S, I, J = 2, 320, 16, 64
lengths = torch.tensor([300, 77], dtype=torch.int32)
torch.manual_seed(0)


def drawn(*shape):
    return torch.randn(*shape, device="cpu").to(device)  # the same numbers on every device


q_index, k_index = drawn(B, I, J).half(), drawn(B, S, J).half()
w = drawn(B, I)


@jaxtyped(typechecker=beartype)
def score_reference(
    q: Float[torch.Tensor, "B I J"], k: Float[torch.Tensor, "B S J"], w: Float[torch.Tensor, "B I"],
    lengths: Int[torch.Tensor, "B"],
) -> Float[np.ndarray, "B S"]:  # fmt: skip
    scores = torch.full((len(q), k.shape[1]), -torch.inf, dtype=torch.float64)
    for b in range(len(q)):
        for s in range(int(lengths[b])):
            scores[b, s] = w[b].double() @ torch.relu(q[b].double() @ k[b, s].double())
    return scores.cpu().numpy()


want = score_reference(q_index, k_index, w, lengths)
print(want.shape, "seen:", np.isfinite(want).sum(axis=1))

# %% [markdown]
# The plain way in a framework is three operations: all products (B x I x S), the relu, the weighted sum. Each writes
# its result to global memory and the next one reads it. For DeepSeek-V3.2, in bytes for each token of the cache:

# %%
v32 = jforge.get("dsa").models["DeepSeek-V3.2"]
heads, channels = v32.index_n_heads, v32.index_head_dim
print(f"an index key in bfloat16: {channels * 2} B")
print(f"its {heads} products in float32, written and read once: {2 * heads * 4} B; with relu apart, twice that")

# %% [markdown]
# ## The scan: one kernel
#
# So the products must not leave the SM. A program takes one row and a *split*, a share of its keys. The queries of all
# heads are loaded once. A tile of keys times the queries gives KEYS x I products, by `tl.dot`; relu, weights and the
# sum over heads follow in registers; KEYS scores are written. There is no softmax and no running maximum, so splits
# need no merge. Each program also writes -inf into its share of the unused slots.


# %%
@triton.jit
def score_kernel(q, k, w, lengths, out, S, I: tl.constexpr, J: tl.constexpr, KEYS: tl.constexpr):
    split, b = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + b)
    i, j = tl.arange(0, I), tl.arange(0, J)
    queries = tl.load(q + (b * I + i)[None, :] * J + j[:, None])  # J I
    weights = tl.load(w + b * I + i)
    share = tl.cdiv(tl.cdiv(S, tl.num_programs(0)), KEYS) * KEYS
    for first in tl.range(split * share, tl.minimum((split + 1) * share, S), KEYS):
        s = first + tl.arange(0, KEYS)
        keys = tl.load(k + (b * S + s)[:, None] * J + j[None, :], mask=(s < length)[:, None], other=0.0)
        x = tl.maximum(tl.dot(keys, queries, input_precision="ieee"), 0.0)
        scores = tl.where(s < length, tl.sum(x * weights[None, :], 1), float("-inf"))
        tl.store(out + b * S + s, scores, mask=s < S)


def score(splits, keys=32):
    out = torch.empty(B, S)
    launch(score_kernel, (splits, B), q_index, k_index, w, lengths, out, S, I=I, J=J, KEYS=keys)
    return out


print("equal:", compare.worst_row(score(splits=3), want) <= compare.OUT["float16"])
same = torch.equal(score(splits=1), score(splits=5))
print("the same bits, however many splits:", same)

# %% [markdown]
# That the bits do not depend on the splits is worth something: the pick that follows compares scores, and a score that
# changed in its last bit might change a pick.
#
# Where torch sees no GPU, this ran in Triton's *interpreter*: one program after the other, in NumPy. Results can be
# trusted (for float16; its bfloat16 products are wrong), times mean nothing. But every load can be written down
# (`traffic`, which interprets with a GPU too):


# %%
def times_asked(loads, tensor):
    """How often each number of a tensor was asked for."""
    every = np.concatenate([addresses for _, addresses in loads])
    at = (every - tensor.data_ptr()) // tensor.element_size()
    inside = at[(at >= 0) & (at < tensor.numel())]
    return np.bincount(inside, minlength=tensor.numel()).reshape(tensor.shape)


att = jforge.get("dsa")
sizes = {
    "hidden_size": 64, "num_attention_heads": 16, "q_lora_rank": 32, "kv_lora_rank": 64, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16, "v_head_dim": 16, "index_n_heads": I, "index_head_dim": J, "index_topk": 48,
}  # fmt: skip
cfg = att.Config(**sizes)
costs = [att.cost(cfg, context=int(n), dtype=jnp.float16).read for n in lengths]
with traffic() as (loads, _):
    score(splits=3)
asked = times_asked(loads, k_index)
print(f"index keys: {2 * asked.sum():,} bytes asked for; cost: {sum(cost['k_index'] for cost in costs):,}")
print("each number of a used slot once:", all((asked[b, :n] == 1).all() for b, n in enumerate(lengths)))
print(f"queries: {times_asked(loads, q_index).sum() // q_index.numel()} times, once a split")

# %% [markdown]
# A key is read once for all heads. Its flops for each byte follow: 2 I J products and sums on 2 J bytes.

# %%
balance = h100.tflops * 1e12 / (h100.bandwidth * 1e9)
print(f"{2 * heads * channels / (2 * channels):.0f} flops a byte; an H100 balances at {balance:.0f}")

# %% [markdown]
# So the scan is bound by memory, and halving the bytes of a key (8-bit keys, 09A) is worth nearly a factor of two.
#
# ## The same in Mosaic GPU
#
# The keys of a tile are the rows of the matrix unit, which wants 64 of them, the heads are its columns, which may be
# few. *TMA*, the unit that copies tiles while the threads do something else, brings two tiles ahead of time; a
# *barrier* says when a tile is there; `wgmma` multiplies tiles in shared memory. *Swizzle* permutes the 16-byte pieces
# of a tile's rows, so that wgmma reads them without waiting for one memory bank.

# %%
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

KEYS, STAGES = 64, 2
WGMMA = plgpu.Layout.WGMMA  # which thread holds which element of a product
BY_ROW, BY_COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)  # of a vector with one element a row, or a column


def score_body(q, k, w, lengths, out, q_s, k_s, out_s, q_full, full):
    b = lax.axis_index("row")
    steps = -(-S // KEYS)

    def fetch(i):
        slot = lax.rem(i, STAGES)
        plgpu.copy_gmem_to_smem(k.at[b, pl.ds(i * KEYS, KEYS)], k_s.at[slot], full.at[slot])

    def turn(i, _):
        slot = lax.rem(i, STAGES)
        plgpu.barrier_wait(full.at[slot])

        def product(accumulator):
            plgpu.wgmma(accumulator, k_s.at[slot], q_s.transpose((1, 0)))
            return accumulator[...]

        x = jnp.maximum(pl.run_scoped(product, plgpu.ACC((KEYS, I), jnp.float32)), 0)
        weights = plgpu.load(w.at[b], layout=BY_COLUMN, optimized=False)
        weights = plgpu.layout_cast(lax.broadcast_in_dim(weights, (KEYS, I), (1,)), WGMMA)
        s = plgpu.broadcasted_iota(jnp.int32, (KEYS,), 0, layout=BY_ROW) + i * KEYS
        plgpu.wait_smem_to_gmem(0)  # the scores before these have left out_s
        out_s[...] = jnp.where(s < lengths[b], (x * weights).sum(axis=1), -jnp.inf)
        plgpu.commit_smem()  # all threads are here, so nobody reads this tile of keys any more
        plgpu.copy_smem_to_gmem(out_s, out.at[b, pl.ds(i * KEYS, KEYS)])
        pl.when(i + STAGES < steps)(lambda: fetch(i + STAGES))

    plgpu.copy_gmem_to_smem(q.at[b], q_s, q_full)
    for i in range(STAGES):
        fetch(jnp.int32(i))
    plgpu.barrier_wait(q_full)
    lax.fori_loop(0, steps, turn, None)
    plgpu.wait_smem_to_gmem(0)


def operand(*shape):
    return plgpu.SMEM(shape, jnp.float16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


on_gpu = jax.default_backend() == "gpu"
mosaic = plgpu.kernel(
    score_body, out_type=jax.ShapeDtypeStruct((B, S), jnp.float32), grid=(B,), grid_names=("row",),
    kernel_name="scores",
    scratch_types=[
        operand(I, J), operand(STAGES, KEYS, J), plgpu.SMEM((KEYS,), jnp.float32), plgpu.Barrier(),
        plgpu.Barrier(num_barriers=STAGES),
    ],
    interpret=None if on_gpu else plgpu.InterpretGPUParams(detect_races=True),
)(*(jnp.asarray(x.cpu().numpy()) for x in (q_index, k_index, w, lengths)))  # fmt: skip
print("equal:", compare.worst_row(mosaic, want) <= compare.OUT["float16"], " a race was seen:", compat.races_found())

# %% [markdown]
# Mosaic's interpreter plays threads, copies and barriers, and looks for *races*, accesses that no barrier orders. It
# does not play time, nor the number of registers. Where JAX has a GPU, the cell compiles this kernel for it instead.
# (It runs on an NVIDIA H200 as well.)
#
# This one reads the unused slots too, and throws the scores away. The package's kernel stops at a row's length, and
# gives a row several programs.
#
# ## The pick
#
# The rule: score descending, then index ascending; -inf is never picked. `torch.topk` promises no order among equal
# scores. The way out is to have none: join each score and its index to *one* whole number. Numbers of 64 bits, the
# score in the upper half, the index, counted down, in the lower half. All of them differ, so any correct top-k gives
# the same.
#
# The upper half must be ordered like the scores. The bits of a float, taken as an integer, are: sign, exponent,
# fraction, so positive floats are ordered already. Negative ones run the other way; flipping all bits but the sign
# turns them.


# %%
@triton.jit
def pack_kernel(scores, keys, S, BLOCK: tl.constexpr):
    row = tl.program_id(0) * S
    s = tl.arange(0, BLOCK)
    x = tl.load(scores + row + s, mask=s < S, other=0.0)
    x = tl.where(x == 0.0, 0.0, x)  # -0 and 0 are equal and have different bits
    bits = x.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    tl.store(keys + row + s, (order.to(tl.int64) << 32) | (0xFFFFFFFF - s.to(tl.int64)), mask=s < S)


def pick(scores, count):
    keys = torch.empty(scores.shape, dtype=torch.int64)
    launch(pack_kernel, (len(scores),), scores, keys, scores.shape[1], BLOCK=triton.next_power_of_2(scores.shape[1]))
    best = torch.topk(keys, count).values
    index = (0xFFFFFFFF - (best & 0xFFFFFFFF)).int()
    return torch.where(torch.gather(scores, 1, index.long()) == -torch.inf, -1, index)


some = torch.tensor([[-0.0, 2.0, -1.5, 0.0, 2.0, -torch.inf, -3.0, -0.0]])
print("scores:", some[0].tolist())
print("ours   ", pick(some, 8)[0].tolist())
print("jforge ", np.asarray(jforge.ops.topk_indices(jnp.asarray(some.cpu().numpy()), 8)[0]).tolist())
picks = pick(score(splits=3), 48)
print("of the scan, equal:", torch.equal(picks, triton_kernels.topk_indices(score(splits=3), 48)))

# %% [markdown]
# Row 1 has 77 tokens, so its 48 picks exist; a row with fewer than L would end in -1.
#
# ## The gather
#
# The third kernel is the one of notebook 06B, with one change: a tile is not KEYS neighbours but KEYS entries of the
# list. First the entries are loaded, then the rows that they name. What is -1 has a mask, so no address: nothing is
# read for it. All N heads share the list, so a row is read once for all heads of a program.
#
# A list can be split too. Each split has its own `top` and `total`; it writes its output and the log of its sum, *lse*,
# and a merge joins the splits (01A, exercise 4).


# %%
@triton.jit
def gather_kernel(q, rows, picks, out, lse, S, L, scale, share,
                  N: tl.constexpr, C: tl.constexpr, R: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    split, b = tl.program_id(0), tl.program_id(1)
    n, c, r = tl.arange(0, N), tl.arange(0, C), tl.arange(0, R)
    q_latent = tl.load(q + (b * N + n)[:, None] * (C + R) + c[None, :])
    q_rope = tl.load(q + (b * N + n)[:, None] * (C + R) + C + r[None, :])
    top = tl.full([N], -1e30, tl.float32)  # finite: no -inf - (-inf) where a tile has no entry
    total, acc = tl.zeros([N], tl.float32), tl.zeros([N, C], tl.float32)
    for first in tl.range(split * share, tl.minimum((split + 1) * share, L), KEYS):
        place = first + tl.arange(0, KEYS)
        slot = tl.load(picks + b * L + place, mask=place < L, other=-1)
        row = rows + (b * S + slot)[:, None] * (C + R)
        there = (slot >= 0)[:, None]
        latent = tl.load(row + c[None, :], mask=there, other=0.0)
        rope = tl.load(row + C + r[None, :], mask=there, other=0.0)
        logits = tl.dot(q_latent, tl.trans(latent), input_precision="ieee")
        logits = tl.dot(q_rope, tl.trans(rope), logits, input_precision="ieee") * scale
        logits = tl.where((slot >= 0)[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shrink, weights = tl.exp(top - new_top), tl.exp(logits - new_top[:, None])
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(latent.dtype), latent, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    index = (split * tl.num_programs(1) + b) * N + n
    tl.store(out + index[:, None] * C + c[None, :], acc / tl.where(total == 0.0, 1.0, total)[:, None])
    tl.store(lse + index, tl.where(total == 0.0, float("-inf"), top + tl.log(total)))


N, C, R, L = 16, 64, 16, 48
scale = (C + R) ** -0.5
q, rows = drawn(B, N, C + R).half(), drawn(B, S, C + R).half()


def gather(picks, splits, keys=16):
    out, lse = torch.empty(splits, B, N, C), torch.empty(splits, B, N)
    share = triton.cdiv(triton.cdiv(picks.shape[1], splits), keys) * keys
    launch(gather_kernel, (splits, B), q, rows, picks, out, lse, S, picks.shape[1], scale, share,
           N=N, C=C, R=R, KEYS=keys)  # fmt: skip
    return (out * torch.softmax(lse, 0)[..., None]).sum(0)  # the merge


def gather_reference(picks):
    out = torch.zeros((B, N, C), dtype=torch.float64)
    for b in range(B):
        taken = rows[b, picks[b][picks[b] >= 0].long()].double()
        out[b] = torch.softmax(scale * q[b].double() @ taken.T, -1) @ taken[:, :C]
    return out.cpu().numpy()


right = gather_reference(picks)
short = picks.clone()
short[:, ::3] = -1  # holes anywhere in the list
print("equal:", *(compare.relative(gather(picks, n), right) <= compare.OUT["float16"] for n in (1, 3)))
print("with holes:", compare.relative(gather(short, 2), gather_reference(short)) <= compare.OUT["float16"])

# %% [markdown]
# ## What is scanned and what is gathered
#
# All loads of a step: the index keys on the left, the latent cache on the right, of row 0.

# %%
with traffic() as (loads, _):
    gather(pick(score(splits=3), L), splits=3)
of_keys, of_rows = times_asked(loads, k_index), times_asked(loads, rows)
print(f"index keys: {2 * of_keys.sum():>7,} bytes, cost {sum(cost['k_index'] for cost in costs):>7,}")
both = sum(cost["latent"] + cost["k_rope"] for cost in costs)
print(f"latents:    {2 * of_rows.sum():>7,} bytes, cost {both:>7,}")

plt = plots()
figure, axes = plt.subplots(1, 2, figsize=(10, 5), sharey=True, width_ratios=[J, C + R])
for ax, counts, name in zip(
    axes, (of_keys, of_rows), ("index keys, scanned", "[latent | rotary key], gathered"), strict=True
):
    image = ax.pcolormesh(counts[0], cmap="Blues", vmin=0, vmax=2)
    ax.axhline(int(lengths[0]), color="#d55e00", linewidth=1.5)
    ax.set(title=name, xlabel="channel", ylim=(S, 0))
axes[0].set_ylabel("slot")
axes[1].text(2, int(lengths[0]) + 14, "slots below the line are not used", color="#d55e00", fontsize=12)
figure.colorbar(image, ax=axes, label="times asked for", ticks=range(3))
plt.show()

# %% [markdown]
# Both reads are what `cost` counts, and the gather's do not depend on S. Memory is read in *sectors* of 32 bytes. A
# latent and a rotary key fill whole ones, so no byte is read for nothing, though the rows lie apart:

# %%
for name, count in (("latent", v32.kv_lora_rank), ("rotary key", v32.qk_rope_head_dim)):
    print(f"DeepSeek-V3.2, {name}: {2 * count} B, {2 * count // 32} sectors")

# %% [markdown]
# What a gather cannot use on an H100 is TMA: there it copies boxes of neighbouring rows. The package's kernels let
# threads copy their rows straight to shared memory (`cp.async`, an instruction that copies 16 bytes for a thread, which
# does not wait for them).
#
# ## Against the package

# %%
theirs = triton_kernels.index_scores(q_index[:, None], k_index, w[:, None], lengths)[:, 0]
other = pallas_kernels.index_scores(
    *(jnp.asarray(x.cpu().numpy()) for x in (q_index[:, None], k_index, w[:, None], lengths))
)[:, 0]
print("scores:", *(compare.worst_row(x, want) <= compare.OUT["float16"] for x in (theirs, other)))
given = (
    q[:, None, :, :C].contiguous(),
    q[:, None, :, C:].contiguous(),
    rows[..., :C].contiguous(),
    rows[..., C:].contiguous(),
)
out, _ = triton_kernels.decode_sparse_mla(*given, picks[:, None], scale=scale)
more, _ = pallas_kernels.decode_sparse_mla(
    *(jnp.asarray(x.cpu().numpy()) for x in (*given, picks[:, None])), scale=scale
)
print("attention:", *(compare.relative(x[:, 0], right) <= compare.OUT["float16"] for x in (out, more)))

# %% [markdown]
# ## Measured
#
# From `docs/gpu_runs.jsonl`. Predict: with 64 rows, 128 heads and L = 2,048, the attention over the picks takes 89.0
# microseconds when a row holds S = 16,384 tokens. How many when it holds 131,072?

# %% tags=["predict"]
guess = None

# %%
runs = [json.loads(line) for line in Path("../docs/gpu_runs.jsonl").read_text().splitlines()]


def timed(what, implementation):
    return [run for run in runs if (run["what"], run.get("implementation")) == (what, implementation)]


reveal(next(run["median"] for run in timed("decode_sparse_mla", "pallas") if run["S"] == 131_072), guess)
ours = timed("index_scores", "pallas")[0]
ceiling = max(run["GB_per_s"] for run in runs if run["what"] == "ceiling" and run["commit"] == ours["commit"])
print(f"{ours['device']}, commit {ours['commit']}; a kernel that only reads: {ceiling:.0f} GB/s")
for what in ("index_scores", "decode_sparse_mla"):
    for name in ("pallas", "triton"):
        for run in timed(what, name):
            print(f"{what:17} {name}: B={run['B']:>2} S={run['S']:>7,} {run['median']:6.1f} us, "
                  f"{run['GB_per_s'] / ceiling:.0%} of the ceiling")  # fmt: skip

# %% [markdown]
# The scan comes near the rate of the memory: neighbouring rows, little arithmetic. The attention over the picks does
# not. It takes the same time for any S, but it has 64 or 128 heads, which do many flops for each byte of a latent
# (notebook 06B has the two ceilings), and its rows come by many small copies.
#
# ## Exercises
#
# Set the answer, run the two cells. A function is called by the second one.
#
# **1.** Index keys in e4m3, J = 128, one byte a channel and a float32 scale a key; I = 64. How many flops does the scan
# do for each byte that it reads of the keys? Count 2 I J for the products and 2 I for the weighted sum.

# %%
answer_1 = None

# %% tags=["solution"]
answer_1 = (2 * 64 * 128 + 2 * 64) / (128 + 4)

# %%
exercise(1, answer_1, "6fcf4ff3430e")

# %% [markdown]
# **2.** Write `answer_2(x)`: a NumPy array of float32 to an array of int32 of the same order, as in `pack_kernel` (no
# NaN, and -0 gives what 0 gives).

# %%
answer_2 = None


# %% tags=["solution"]
def answer_2(x):
    bits = np.where(x == 0, np.float32(0), x).astype(np.float32).view(np.int32)
    return np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


# %%
exercise(2, answer_2, "4b20c811a3b3", np.array([1.0, -0.0, -2.5, 3.0, -np.inf], np.float32))

# %% [markdown]
# **3.** B = 1, N = 128 heads of which 64 make a program, L = 2,048 entries in splits of 512. What share of an H100's
# SMs gets a program of the gather? (`h100.sms`)

# %%
answer_3 = None

# %% tags=["solution"]
answer_3 = (128 // 64) * (2048 // 512) / h100.sms

# %%
exercise(3, answer_3, "41b89169b420")

# %% [markdown]
# **4.** A server keeps the cache in *pages* of P slots; slot s of a row lies in page `table[s // P]`, at place s mod P.
# Write `answer_4(picks, table, P)` for NumPy arrays: the physical slot, page x P + place, of each pick; -1 stays -1.

# %%
answer_4 = None


# %% tags=["solution"]
def answer_4(picks, table, P):
    s = np.maximum(picks, 0)
    return np.where(picks >= 0, table[s // P] * P + s % P, -1)


# %%
exercise(4, answer_4, "3b3f705cef78", np.array([5, -1, 0, 11, 6]), np.array([7, 2, 4]), 4)
