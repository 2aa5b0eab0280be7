# %% [markdown]
# # 05A. The KV cache: its bytes, and the price of a decode step
#
# A language model writes one token at a time, and each new token attends to all tokens before it. Their keys and values
# never change: token s is projected once, and a causal mask keeps it from seeing anything that comes later. So they are
# kept. That store is the *KV cache*. Taking in the prompt, all of its tokens at once, is *prefill*; each token after it
# is a *decode step*.
#
# Letters: B rows (sequences side by side), T new tokens, S slots of the cache (one a token; from "Bytes" on all of them
# hold one), D channels of a token, N query heads, K key heads, G = N / K query heads that share a key head, H channels
# of a query or key, V of a value. The mechanism is called `gqa` (grouped-query); K = N is `mha`, K = 1 is `mqa`.

# %%
from typing import NamedTuple

import jax
import jax.numpy as jnp
from beartype import beartype
from jaxtyping import Array, Float, Int, jaxtyped

import jforge
from jforge.core import compare
from jforge.lessons import exercise, picture, plots, questions, reveal, watch

jax.config.update("jax_default_matmul_precision", "highest")  # a GPU may otherwise round products to fewer digits
jnp.set_printoptions(precision=3, suppress=True)

# %% [markdown]
# ## A cache from scratch
#
# Two arrays of a fixed size and a number: how many slots hold a token. The arrays do not grow, since a compiled program
# has fixed shapes. `extend` projects the new tokens, writes their keys and values into the next slots and attends over
# the cache. Token t sees the slots 0 to t; the mask also hides the slots that are not used yet.


# %%
class Cache(NamedTuple):
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K V"]
    length: Int[Array, ""]


@jaxtyped(typechecker=beartype)
def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K V"], length: Int[Array, ""]
) -> Float[Array, "B T N V"]:
    """The last T of `length` tokens over the slots that they see; query head n reads key head n // G."""
    B, T, N, H = q.shape
    K = k.shape[2]
    t = length - T + jnp.arange(T)
    visible = jnp.arange(k.shape[1]) <= t[:, None]  # T S
    logits = jnp.einsum("btkgh,bskh->bkgts", q.reshape(B, T, K, N // K, H), k) * H**-0.5
    weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf))
    return jnp.einsum("bkgts,bskv->btkgv", weights, v).reshape(B, T, N, v.shape[-1])


def project(w, x):
    return [jnp.einsum("btd,dnh->btnh", x, w[name]) for name in ("wq", "wk", "wv")]


@jaxtyped(typechecker=beartype)
def extend(w: dict[str, Array], x: Float[Array, "B T D"], cache: Cache) -> tuple[Float[Array, "B T D"], Cache]:
    q, k, v = project(w, x)
    at = (0, cache.length, 0, 0)  # B S K H: the next slot
    k = jax.lax.dynamic_update_slice(cache.k, k, at)
    v = jax.lax.dynamic_update_slice(cache.v, v, at)
    cache = Cache(k, v, cache.length + x.shape[1])
    return jnp.einsum("btnv,nvd->btd", attend(q, *cache), w["wo"]), cache


att = jforge.get("gqa")
small = att.Config(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
w = att.init_params(jax.random.key(0), small)
x = jax.random.normal(jax.random.key(1), (1, 12, 32))  # one row of 12 tokens
empty = Cache(jnp.zeros((1, 16, 2, 8)), jnp.zeros((1, 16, 2, 8)), jnp.int32(0))

# %% [markdown]
# One function does both: prefill is `extend` with many tokens, decode is `extend` with one. They have to agree with
# attention without a cache, for which all tokens must come at once, and with the package:


# %%
@jax.jit
def uncached(w, x):
    return jnp.einsum("btnv,nvd->btd", attend(*project(w, x), jnp.int32(x.shape[1])), w["wo"])


extend_jit = jax.jit(extend)
y, cache = extend_jit(w, x[:, :7], empty)
steps = [y]
for t in range(7, 12):
    y, cache = extend_jit(w, x[:, t : t + 1], cache)
    steps.append(y)
cached = jnp.concatenate(steps, axis=1)

y_prompt, theirs = att.prefill(w, small, x[:, :7], att.init_cache(small, 1, 16, jnp.float32))
y_rest, theirs = att.decode(w, small, x[:, 7:], theirs)  # 1 to 16 tokens at once, with the results of so many steps
package = jnp.concatenate([y_prompt, y_rest], axis=1)


def close(a, b):
    return compare.relative(a, b) <= compare.OUT["float32"]


want = uncached(w, x)
print("prefill and 5 steps:", close(cached, want))
print("jforge, with a cache and without:", close(package, want), close(att.forward(w, small, x), want))
print("the two caches:", close(cache.k, theirs.k), close(cache.v, theirs.v))
print("length:", cache.length, "and, one for each row,", theirs.length)

# %% [markdown]
# Two traps. A slot that is not used yet holds zeros, and a key of zeros has the logit 0, so the weight exp(0), which is
# not nothing: the mask is needed also where "nothing is there". And the new token is written *before* it attends, since
# it sees itself.

# %%
q, _, _ = project(w, x[:, 11:])
right = attend(q, *cache)
wrong = attend(q, cache.k, cache.v, jnp.int32(16))  # as if all 16 slots were used; 4 of them are not
print(
    f"norm of the output: {jnp.linalg.norm(right):.2f}; with unused slots in the softmax: {jnp.linalg.norm(wrong):.2f}"
)

# %% [markdown]
# ## What a step touches
#
# Nothing below is drawn from a formula. `watch` runs five decode steps of the package. A slot counts as written if its
# content changed, and as read if the output changes once the slot is filled with something else before the step.

# %%
_, prompt = att.prefill(w, small, x[:, :7], att.init_cache(small, 1, 16, jnp.float32))
picture(watch(att, w, small, x[:, 7:], prompt), "five decode steps after a prompt of 7 tokens", first=7)

# %% [markdown]
# A step writes one slot of k and v, and reads every slot that holds a token: the row gets longer by one cell a step.
# (The new slot is read too, as the token sees itself. But that is after the write: what it held before the step makes
# no difference, so the picture has w alone.)
#
# "Writes one slot" holds if the program writes in place. JAX arrays are values that nobody changes, so without being
# told otherwise a step copies the whole cache. `donate_argnames` gives the old cache away, and its memory is reused:

# %%
for donated in ((), ("cache",)):
    step = jax.jit(extend, donate_argnames=donated)
    old = jax.tree.map(jnp.copy, cache)
    address = old.k.unsafe_buffer_pointer()
    _, new = step(w, x[:, :1], old)
    print(f"donated {donated}: the new k lies where the old one lay: {new.k.unsafe_buffer_pointer() == address}")

# %% [markdown]
# ## Bytes
#
# A token leaves H channels of a key and V of a value, in each of K key heads. ELEMENT is the bytes of one number. The
# sizes are those of a real model, Llama-3.1-8B, whose config.json the package has.

# %%
from pathlib import Path

config = jforge.hf.load(Path(jforge.__file__).parent / "configs" / "llama-3.1-8b.json")
layers = jforge.hf.layers(config)  # (name of the mechanism, its Config) of each layer
name, cfg = layers[0]
N, K, H, V = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.v_head_dim
ELEMENT = jnp.dtype("bfloat16").itemsize
slot = K * (H + V) * ELEMENT

print(f"{len(layers)} layers of {name}: N={N} K={K} H={H} V={V}")
print(slot, "bytes a token in a layer; the package says", att.cost(cfg, context=1000).per_token)

# %% [markdown]
# What a step stores, writes and reads in one layer and one row, against the package's `cost` of a step that brings the
# row to S tokens. (Slots that hold nothing are not counted. `attend` above masks them, a kernel does not load them.)

# %%
token = slot * len(layers)
print(f"{token:,} bytes a token in all layers")
S = 8192
stored, written, read = S * slot, slot, S * slot
cost = att.cost(cfg, context=S)
print(f"stored  {stored:>12,} {sum(cost.stored.values()):>12,}")
print(f"written {written:>12,} {sum(cost.written.values()):>12,}")
print(f"read    {read:>12,} {sum(cost.read.values()):>12,}")

# %% [markdown]
# A step reads S times what it writes, and one step later the same again. The package's table for this mechanism:

# %%
questions("gqa", context=8192)

# %% [markdown]
# How much is that for a card? Take NVIDIA's H100 (its server form, SXM): two numbers of its data sheet are the
# bytes that its memory gives in a second and the flops that it does in a second in bfloat16. (The sheet says 1,979
# TFLOP/s "with sparsity", that is for matrices half of which is zero; others get half of it.) `pallas_kernels`, the
# package's kernels in Pallas, JAX's language for them, keeps both. TB is 10^12 bytes, TFLOP 10^12 flops.

# %%
from pallas_kernels.device import DEVICES

h100 = next(device for device in DEVICES if device.name == "H100")
BANDWIDTH, PEAK = h100.bandwidth * 1e9, h100.tflops * 1e12  # bytes and flops a second
print(f"{BANDWIDTH / 1e12:.2f} TB/s, {PEAK / 1e12:.0f} TFLOP/s")

for S in (1_000, 8_000, 128_000):
    print(f"{S:>7,} tokens: {S * token / 1e9:5.2f} GB, read once in {S * token / BANDWIDTH * 1e3:5.2f} ms")

# %% [markdown]
# ## Bound by memory
#
# A processor that reads and computes at the same time is done when the slower of the two is done. Which one is slower
# depends on the flops that the program does for each byte that it moves: its *arithmetic intensity*. At
# PEAK / BANDWIDTH flops a byte the two take equally long. Below that the program is *memory-bound*: it takes as long as
# its bytes take, and the arithmetic waits.
#
# The attend step of a decode, of one token: each of N heads takes 2 (H + V) flops for each slot (notebook 01A). The
# slots are read once, for all heads; beside them q and out are so few that they are left out.
#
# Predict: if such a step takes as long as its bytes take, how many percent of the card's flops does it use?

# %% tags=["predict"]
guess = None

# %%
S = 8192
flops = 2 * N * (H + V) * S
balance, intensity = PEAK / BANDWIDTH, flops / (S * slot)
print(flops, "flops; the package says", cost.flops)
print(f"{intensity:.1f} flops a byte; the card balances at {balance:.1f}")
reveal(100 * intensity / balance, guess)

# %% [markdown]
# S cancels, and so do H + V: what is left is 2 G / ELEMENT, which is G in bfloat16. The batch cancels too, because
# every row has a cache of its own. So no context and no batch makes this attend step faster than its bytes. (Several
# tokens in one step would share the read, but they would have to be guessed: each follows from the one before.) It only
# helps to read less (fewer key heads, fewer slots, smaller numbers), and that is what notebooks 03 to 11 are about.
#
# Prefill is another world: T queries meet the keys that are read once. Under the causal mask they are T (T + 1) / 2
# pairs. q is read and out written too, N (H + V) numbers a token:


# %%
def prefill_intensity(T):
    moved = T * (slot + N * (H + V) * ELEMENT)  # k and v, q and out, each once
    return 2 * N * (H + V) * T * (T + 1) / 2 / moved


for T in (1, 16, 128, 1024, 8192):
    print(f"T = {T:>5,}: {prefill_intensity(T):8.1f} flops a byte")

# %% [markdown]
# (That is what a kernel can reach which never writes the T x T weights to memory.)
#
# The *roofline* puts it into one picture. Across: intensity. Up: what the card can do at best. On the slope memory is
# the limit, on the roof the arithmetic. Each mark is the attend step of a shipped model, from its `cost`, with its
# flops a byte. (2 G / ELEMENT does not hold for `mla`, notebook 06A: it keeps one vector a token, which all of its 128
# heads read and most of which is key and value at once. That makes nearly 4 N / ELEMENT.)

# %%
import numpy as np

plt = plots()
figure, ax = plt.subplots(figsize=(10, 5))
across = np.geomspace(0.5, 5000, 200)
ax.loglog(across, np.minimum(across * BANDWIDTH, PEAK) / 1e12, color="black", label="H100, bfloat16")
ax.axvline(balance, color="#888888", linestyle=":", linewidth=1.5)
ax.text(balance * 1.1, 1.3, f"{balance:.0f} flops a byte", color="#444444")


def mark(i, marker, color, label):
    ax.plot(i, min(i * BANDWIDTH, PEAK) / 1e12, marker, color=color, markersize=12, label=f"{i:.0f}: {label}")


for at, (mechanism, marker) in enumerate([("mha", "o"), ("gqa", "s"), ("mqa", "^"), ("mla", "D")]):
    other = jforge.get(mechanism)
    model, its = next(iter(other.models.items()))
    step = other.cost(its, context=8192)
    mark(step.flops / sum(step.read.values()), marker, f"C{at}", f"decode, {mechanism}, {model}")
for T, marker in ((128, "v"), (1024, "P")):
    mark(prefill_intensity(T), marker, "#777777", f"prefill, gqa, T = {T:,}")
ax.set(xlabel="flops a byte", ylabel="TFLOP/s at best", xlim=(0.5, 5000), ylim=(1, 30000))
ax.legend(fontsize=12, loc="upper left", frameon=False)
plt.show()

# %% [markdown]
# Is it so on a real card? `docs/gpu_runs.jsonl` (of the clone in whose folder `notebooks` this runs) has measured times
# of `decode_attention`, the attend step as a kernel, on an H100: the median of many calls. The bytes of k and v divided
# by BANDWIDTH are the least time in which they can be read.

# %%
import json

runs = [json.loads(line) for line in Path("../docs/gpu_runs.jsonl").read_text().splitlines()]
wanted = {"what": "decode_attention", "implementation": "pallas", "device": "NVIDIA H100 80GB HBM3", "N": N, "K": K}
for run in [run for run in runs if wanted.items() <= run.items() and not run.get("window")]:
    least = run["B"] * run["S"] * slot / BANDWIDTH * 1e6
    print(f"B = {run['B']:>3}, S = {run['S']:>7,}: measured {run['median']:6.1f} us", end=", ")
    print(f"at least {least:6.1f} us: {least / run['median']:.0%}")

# %% [markdown]
# A call that reads much takes about as long as its bytes take, whatever B and S are. (No memory quite reaches the
# number of its data sheet. A call that reads little takes longer than its bytes; notebook 05B looks inside.)
#
# ## The whole layer, and the batch
#
# A decode step also reads the weights of the model: they are the same for all rows, so B rows share one read. That is
# why servers batch. W weights take W ELEMENT bytes and 2 W flops a row (a product and a sum each). A layer of Llama has
# the four matrices of attention and three of its MLP (what works on each token alone), between D and F channels.

# %%
D, F = cfg.hidden_size, config["intermediate_size"]
W = sum(int(np.prod(shape)) for shape in att.shapes(cfg).values()) + 3 * D * F


def times(B, S):
    """Seconds that a step of one layer takes for its bytes, and for its flops."""
    moved = W * ELEMENT + B * S * slot
    done = B * (2 * W + 2 * N * (H + V) * S)
    return moved / BANDWIDTH, done / PEAK


print(f"{W:,} weights a layer")
for B in (1, 64, 512):
    memory, arithmetic = times(B, S=4096)
    print(f"B = {B:>3}, S = 4096: {memory * 1e6:7.1f} us for the bytes, {arithmetic * 1e6:7.1f} us for the flops")

# %% [markdown]
# From which batch on is the step no longer memory-bound? Both times are straight lines in B, weights + B row_bytes and
# B row_flops, all in seconds. They cross at the B that `crossing` returns. If a row's cache takes longer to read than
# the row takes to compute, they never cross.


# %%
def crossing(S):
    """The batch from which on the flops take longer than the bytes; inf if none does."""
    weights, _ = times(0, S)
    row_bytes, row_flops = times(1, S)[0] - weights, times(1, S)[1]
    return weights / (row_flops - row_bytes) if row_flops > row_bytes else float("inf")


for S in (0, 128, 256, 320, 384):
    print(f"S = {S:>4}: B = {crossing(S):.0f}")

# %%
contexts = np.arange(0, 600, 2)
last = next(S for S in range(10_000) if crossing(S) == float("inf"))
plt.figure(figsize=(10, 4))
plt.semilogy(contexts, [crossing(S) for S in contexts], label="as long to read as to compute")
plt.fill_between(contexts, [min(crossing(S), 1e5) for S in contexts], 1e5, alpha=0.15)
plt.axvline(last, color="#888888", linestyle=":", linewidth=1.5)
plt.text(60, 1e4, "bound by arithmetic")
plt.text(190, 150, "bound by memory")
plt.text(last + 8, 800, f"from {last} tokens on:\nbound by memory\nat any batch")
plt.xlabel("tokens in each row, S")
plt.ylabel("batch B")
plt.xlim(0, 600)
plt.ylim(100, 1e5)
plt.legend(fontsize=12, loc="upper right", frameon=False)
plt.show()

# %% [markdown]
# From some hundred tokens on, the cache of a row takes longer to read than all of the row's arithmetic takes, so a
# larger batch only adds bytes. Such a decode of this model is memory-bound at any batch: a step takes the bytes of
# weights and cache, divided by the bandwidth.
#
# What is left out here: the weights share the memory and so limit B; starting a kernel takes time; and several cards
# talk to each other.
#
# ## Exercises
#
# Set the answer, run the two cells. A function is called by the second one. Whole numbers must be exact, of others
# three digits count.
#
# **1.** Llama-2-7B has 32 layers of `mha` (K = N = 32, H = V = 128). How many bytes does one token take in its cache,
# in bfloat16?

# %%
answer_1 = None

# %% tags=["solution"]
llama2 = jforge.get("mha").models["Llama-2-7B"]
answer_1 = 32 * jforge.get("mha").cost(llama2, context=1).per_token

# %%
exercise(1, answer_1, "e8ac3fded1b1")

# %% [markdown]
# **2.** A card has 64 GiB (2^30 bytes each) left beside the weights of Llama-3.1-8B. It is to serve 32 rows at a time.
# How many tokens may each row have at most?

# %%
answer_2 = None

# %% tags=["solution"]
answer_2 = 64 * 2**30 // (32 * token)

# %%
exercise(2, answer_2, "f4db571833e5")

# %% [markdown]
# **3.** A prompt of 1,000 tokens, then 1,000 decode steps; one row, one layer of Llama-3.1-8B. How many bytes do all
# steps together read from the cache? (The first step brings the row to 1,001 tokens and reads them all.)

# %%
answer_3 = None

# %% tags=["solution"]
answer_3 = sum(sum(att.cost(cfg, context=S).read.values()) for S in range(1001, 2001))

# %%
exercise(3, answer_3, "50de77b493ac")

# %% [markdown]
# **4.** How many query heads must share a key head at least, so that the attend step of a decode is not memory-bound?
# Write `answer_4(balance, element)`, for any card's balance in flops a byte and any bytes of a number.

# %%
answer_4 = None


# %% tags=["solution"]
def answer_4(balance, element):
    return int(np.ceil(balance * element / 2))


# %%
exercise(4, answer_4, "f0f67feebc57", 20.5, 4)

# %% [markdown]
# **5.** The cache is stored in 8-bit numbers (1 byte each), and each key head and slot keeps one float32 beside its key
# and one beside its value to scale them by. What is the intensity of the attend step of Llama-3.1-8B then, in flops a
# byte? (The multiplications by the scales are not counted.)

# %%
answer_5 = None

# %% tags=["solution"]
answer_5 = 2 * N * (H + V) / (K * (H + V + 2 * 4))

# %%
exercise(5, answer_5, "e2598c6f01bd")

# %% [markdown]
# **6.** `extend` has one length for all rows. Write `answer_6(k, new, lengths)`: k is B S K H, new is B K H (a key a
# row), lengths is B; the new key of row b goes into slot lengths[b]. Give the new k.

# %%
answer_6 = None


# %% tags=["solution"]
def answer_6(k, new, lengths):
    return k.at[jnp.arange(len(lengths)), lengths].set(new)


# %%
exercise(
    6, answer_6, "35aafcf12d74", jnp.zeros((2, 3, 1, 2)), jnp.array([[[1.0, 2.0]], [[3.0, 4.0]]]), jnp.array([2, 0])
)
