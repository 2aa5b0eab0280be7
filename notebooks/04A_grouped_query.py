# %% [markdown]
# # 04A. Grouped queries: who reads whose keys, and the cache math
#
# In multi-head attention (02A) each of N heads keeps keys and values of its own, and a decode step reads them all. But
# several heads can ask different questions of the *same* keys. In grouped-query attention there are only K key heads,
# and G = N / K query heads share one. The cache is 1/G of what it was, and so is what a step reads. Nearly every large
# model with a full cache does this.
#
# Letters: B rows, T new tokens, S slots (one a token), D channels of a token, N query heads, K key heads (each with its
# values), H channels of a query or key, V of a value.

# %%
import jax
import jax.numpy as jnp
import numpy as np
from beartype import beartype
from jaxtyping import Array, Float, jaxtyped

import jforge
from jforge.core import compare
from jforge.lessons import KEPT, READ, exercise, picture, plots, questions, reveal, watch

jax.config.update("jax_default_matmul_precision", "highest")  # a GPU may otherwise round products to fewer digits
jnp.set_printoptions(precision=3, suppress=True)


def close(a, b):
    return compare.relative(a, b) <= compare.OUT["float32"]


# %% [markdown]
# ## From scratch
#
# Query head n reads key head n // G: the first G query heads share key head 0, the next G key head 1. So a reshape cuts
# the N query heads into K groups of G, and the einsum has the letter k in both arguments and g only in q. Nothing is
# copied.


# %%
@jaxtyped(typechecker=beartype)
def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K V"]
) -> Float[Array, "B T N V"]:
    """The last T of S tokens, each of which sees all up to itself."""
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    grouped = q.reshape(B, T, K, N // K, H)
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, k) * H**-0.5
    visible = jnp.arange(S) <= S - T + jnp.arange(T)[:, None]
    weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf))
    return jnp.einsum("bkgts,bskv->btkgv", weights, v).reshape(B, T, N, -1)


def layer(w, x):
    q, k, v = (jnp.einsum("btd,dnh->btnh", x, w[name]) for name in ("wq", "wk", "wv"))
    return jnp.einsum("btnv,nvd->btd", attend(q, k, v), w["wo"])


x = jax.random.normal(jax.random.key(1), (1, 12, 32))
for name, K in (("mha", 8), ("gqa", 2), ("mqa", 1)):
    att = jforge.get(name)
    cfg = att.Config(hidden_size=32, num_attention_heads=8, num_key_value_heads=K)
    w = att.init_params(jax.random.key(0), cfg)
    print(f"{name}, K = {K}: wk {w['wk'].shape}, equal to the package:", close(layer(w, x), att.forward(w, cfg, x)))

# %% [markdown]
# One function: K = N is multi-head attention, K = 1 is multi-query attention (03A). Parameters shrink too, in wk and wv
# only: the number of queries stays.
#
# ## The mapping, and a trap
#
# Many programs first repeat the keys until there are N heads. `jnp.repeat` puts the copies of a head side by side
# (0 0 0 0 1 1 1 1), which is n // G. `jnp.tile` repeats the whole row (0 1 0 1 0 1 0 1), which is n % K: the shape is
# right and the result is another model.

# %%
N, K, H = 8, 2, 4
q, k, v = (jax.random.normal(jax.random.key(i), (1, 12, heads, H)) for i, heads in ((2, N), (3, K), (4, K)))
shared = attend(q, k, v)
repeated = attend(q, *(jnp.repeat(a, N // K, axis=2) for a in (k, v)))
tiled = attend(q, *(jnp.tile(a, (1, 1, N // K, 1)) for a in (k, v)))
print("repeat:", close(repeated, shared), " tile:", close(tiled, shared))

# %% [markdown]
# Libraries that take K heads use the same mapping:

# %%
import torch
import torch.nn.functional as F

tq, tk, tv = (torch.from_numpy(np.array(a)).transpose(1, 2) for a in (q, k, v))  # torch wants B N T H
sdpa = F.scaled_dot_product_attention(tq, tk, tv, is_causal=True, enable_gqa=True).transpose(1, 2)
print("torch SDPA:", close(sdpa.numpy(), shared))
print("jax.nn:    ", close(jax.nn.dot_product_attention(q, k, v, is_causal=True), shared))

# %% [markdown]
# Who reads whom can also be found by experiment: change key head j, and see which query heads give another output.

# %%


def readers(N, K):
    """codes of `picture`, N x K: which query head reads which key head."""
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 5, heads, H)) for i, heads in ((2, N), (3, K), (4, K)))
    before = attend(q, k, v)
    columns = [(attend(q, k.at[:, :, j].set(9.0), v) != before).any(axis=(0, 1, 3)) for j in range(K)]
    return np.where(np.stack(columns, axis=1), READ, KEPT)


picture(
    {f"K = {K}": readers(8, K).T for K in (8, 2, 1)}, "which key head is read by which query head (N = 8)",
    down="key head", across="query head",
)  # fmt: skip

# %% [markdown]
# Read a column: every query head reads one key head. Read a row: with K = 2 a key head has four readers. A program that
# loads a row's keys once and lets all readers use them reads 1/G; one that loads them for each reader saves nothing but
# memory (04B).
#
# ## The cache
#
# The package's table, and a real cache over four decode steps:

# %%
questions("gqa")

# %%
att = jforge.get("gqa")
small = att.Config(hidden_size=32, num_attention_heads=8, num_key_value_heads=2)
w = att.init_params(jax.random.key(0), small)
_, prompt = att.prefill(w, small, x[:, :8], att.init_cache(small, 1, 14, jnp.float32))
picture(watch(att, w, small, x[:, 8:], prompt), "four decode steps after a prompt of 8 tokens", first=8)

# %% [markdown]
# Slot by slot this is the picture of multi-head attention: one slot written, all slots before it read. What G changes
# is the size of a slot, K (H + V) numbers instead of N (H + V).
#
# ## Cache math
#
# The models below are shipped with the package as their config.json. What one token takes in all layers, had each
# query head its own keys, and as it is:

# %%
from pathlib import Path

folder = Path(jforge.__file__).parent / "configs"
print("model           layers   N   K   H   mha, B a token   as it is    1 / G")
for name in ("llama-3.1-8b", "qwen3-8b", "minimax-m2"):
    layers = jforge.hf.layers(jforge.hf.load(folder / f"{name}.json"))
    cfg = layers[0][1]
    N, K, H, V = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.v_head_dim
    as_mha = len(layers) * N * (H + V) * 2
    as_is = sum(jforge.get(kind).cost(its, context=1).per_token for kind, its in layers)
    print(f"{name:15}{len(layers):6} {N:4} {K:3} {H:4} {as_mha:15,} {as_is:10,}    1/{as_mha // as_is}")

# %% [markdown]
# Predict: how many GiB (2^30 bytes) would **one row** of 131,072 tokens take in Llama-3.1-8B if it were multi-head?

# %% tags=["predict"]
guess = None

# %%
layers = jforge.hf.layers(jforge.hf.load(folder / "llama-3.1-8b.json"))
cfg = layers[0][1]
S = 131072
as_is = len(layers) * sum(att.cost(cfg, context=S).stored.values())
reveal(as_is * cfg.num_attention_heads // cfg.num_key_value_heads // 2**30, guess)
print(f"as it is: {as_is / 2**30:.0f} GiB")

# %% [markdown]
# Reads fall alike, since a step reads all that is stored. Flops do not: each query head still meets every key. So a
# byte that is read is used by G heads, and the arithmetic intensity (the flops that are done for each byte that is
# read, 05A) is G in a cache of 2-byte numbers:

# %%
for K in (32, 8, 1):
    its = jforge.get("gqa").Config(hidden_size=4096, num_attention_heads=32, num_key_value_heads=K)
    cost = att.cost(its, context=8192)
    read = sum(cost.read.values())
    print(f"K = {K:>2}: {read / 2**20:6.1f} MiB read, {cost.flops:,} flops, {cost.flops / read:4.1f} a byte")

# %% [markdown]
# A measurement says the same. Two lines of the package's record of its kernel on one card: both calls read the same
# number of bytes; in one they are multi-head rows, in the other four times as many rows with K = N / 4.

# %%
import json

runs = [json.loads(line) for line in Path("../docs/gpu_runs.jsonl").read_text().splitlines()]
kernel = {"what": "decode_attention", "implementation": "pallas", "S": 8192}
for run in sorted((run for run in runs if kernel.items() <= run.items()), key=lambda run: run["B"]):
    read = run["B"] * run["S"] * run["K"] * 2 * run["H"] * 2
    print(f"{run['device']}, {run['commit']}: B = {run['B']:>2}, N = {run['N']}, K = {run['K']:>2}: "
          f"{read / 2**30:.0f} GiB in {run['median']:.0f} us")  # fmt: skip

# %% [markdown]
# ## Several cards
#
# A model on several cards gives each card some of the heads. As long as K is a multiple of the number of cards, the
# cache is split without rest. With more cards than key heads, cards that work for the same group need the same keys,
# and keep a copy each:


# %%
@jaxtyped(typechecker=beartype)
def held(N: int, K: int, cards: int) -> list[list[int]]:
    """The key heads that each card stores, if it has N / cards query heads."""
    mine = N // cards
    return [sorted({n // (N // K) for n in range(card * mine, (card + 1) * mine)}) for card in range(cards)]


print("N = 8, K = 2 on 4 cards:", held(8, 2, 4))
plt = plots()
cards = [1, 2, 4, 8, 16, 32]
for K in (32, 8, 1):
    slot = 2 * 2 * 128  # key and value of a head, 2 bytes a number
    plt.plot(cards, [len(held(32, K, n)[0]) * slot for n in cards], marker="o", label=f"K = {K}")
plt.xscale("log", base=2)
plt.yscale("log", base=2)
plt.xticks(cards, cards)
plt.yticks([512, 1024, 2048, 4096, 8192, 16384], ["512", "1,024", "2,048", "4,096", "8,192", "16,384"])
plt.xlabel("cards")
plt.ylabel("bytes a token, layer and card")
plt.title("N = 32, H = V = 128", loc="left", fontsize=14)
plt.legend()
plt.show()

# %% [markdown]
# The lines fall until a card has one key head, and stay there. With K = 8 eight cards share the cache evenly; with
# K = 1 every card has all of it, so more cards do not help. That is one reason why models stop at some K above 1.
#
# ## From a multi-head model
#
# A multi-head checkpoint becomes a grouped one by averaging the matrices wk and wv of each group (Ainslie et al. 2023).
# If the heads of a group had equal keys and values, nothing is lost; the more they differ, the more is, and the model
# must be trained on. Here the heads of a group are a common part plus `spread` times a part of their own:


# %%
def pooled(w, K):
    """Parameters of multi-head attention, with the keys and values of each group averaged."""
    means = {n: w[n].reshape(len(w[n]), K, -1, w[n].shape[-1]).mean(axis=2) for n in ("wk", "wv")}
    return {**w, **means}


mha = jforge.get("mha")
full = mha.Config(hidden_size=32, num_attention_heads=8)
drawn = mha.init_params(jax.random.key(0), full)
for spread in (0.0, 0.1, 1.0):
    w = dict(drawn)
    for name in ("wk", "wv"):
        common = jnp.repeat(w[name][:, ::4], 4, axis=1)
        w[name] = common + spread * w[name]
    y, grouped = layer(w, x), layer(pooled(w, 2), x)
    print(f"spread {spread}: the output moves by {jnp.linalg.norm(grouped - y) / jnp.linalg.norm(y):.1%}")

# %% [markdown]
# ## Exercises
#
# Set the answer, run the two cells. A function is called by the second one.
#
# **1.** A model has N = 64 query heads and K = 4. Which key head does query head 37 read (counted from 0)?

# %%
answer_1 = None

# %% tags=["solution"]
answer_1 = 37 // (64 // 4)

# %%
exercise(1, answer_1, "676458da48ae")

# %% [markdown]
# **2.** 64 GiB are left for the cache of Llama-3.1-8B, in bfloat16. How many rows of 8,192 tokens fit?

# %%
answer_2 = None

# %% tags=["solution"]
answer_2 = 64 * 2**30 // (len(layers) * sum(att.cost(cfg, context=8192).stored.values()))

# %%
exercise(2, answer_2, "14cb06acd9b5")

# %% [markdown]
# **3.** Backwards through `jnp.repeat`: write `answer_3(g, K)`. g, B S N H, is the derivative of the loss by the
# repeated keys; give that by the K shared ones, B S K H.

# %%
answer_3 = None


# %% tags=["solution"]
def answer_3(g, K):
    return g.reshape(*g.shape[:2], K, -1, g.shape[-1]).sum(axis=3)


# %%
exercise(3, answer_3, "7233ed70db9d", jnp.arange(16.0).reshape(1, 2, 4, 2), 2)

# %% [markdown]
# **4.** N = 64, K = 4, on 16 cards. How many times is each key stored, over all cards?

# %%
answer_4 = None

# %% tags=["solution"]
answer_4 = sum(0 in heads for heads in held(64, 4, 16))

# %%
exercise(4, answer_4, "c36406e9a25b")

# %% [markdown]
# **5.** A checkpoint was written by a program that maps query head n to key head n % K. Write `answer_5(wq, K)`, which
# reorders wq (D N H) so that a program with n // G computes the same from it (wo would have to follow).

# %%
answer_5 = None


# %% tags=["solution"]
def answer_5(wq, K):
    D, N, H = wq.shape
    return wq.reshape(D, N // K, K, H).swapaxes(1, 2).reshape(D, N, H)


# %%
exercise(5, answer_5, "665c0daa7b81", jnp.arange(12.0).reshape(1, 6, 2), 2)
