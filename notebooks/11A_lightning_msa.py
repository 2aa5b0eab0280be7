# %% [markdown]
# # 11A. MiniMax: a matrix for a cache, and an index over blocks
#
# MiniMax took two roads in its models. MiniMax-Text-01 has *lightning attention* in seven of eight layers: linear
# attention, whose cache is one matrix that never grows. MiniMax-M3 has *MSA* (MiniMax sparse attention): it keeps every
# token and reads the blocks that an index picks. One forgets by a fixed rule, the other forgets nothing and reads a
# part.
#
# Letters: T tokens, N heads, H channels of a query or key, V of a value, lambda the decay of a head; M tokens of a
# block, E blocks, K key heads, J channels of an index key. t is the position of a query, s that of a key.

# %%
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from beartype import beartype
from jaxtyping import Array, Bool, Float, Int, jaxtyped

import jforge
from jforge.core import compare
from jforge.lessons import exercise, picture, plots, questions, reveal, watch

jax.config.update("jax_default_matmul_precision", "highest")  # a GPU may otherwise round products to fewer digits
jnp.set_printoptions(precision=3, suppress=True)

# %% [markdown]
# ## Attention without the softmax
#
# Take the softmax away, and the output of a query is the sum of (q . k_s) v_s over the tokens before it. That is a
# product of three, and it may be bracketed otherwise: first the sum of the H x V matrices k_s v_s^T, then q times that.
# The sum does not depend on the query, so it can be carried along. It is all that is kept: the *state*.
#
# Lightning attention lets old tokens fade: before each new one the state is multiplied by lambda, a number below 1,
# written as exp(-slope), which each head has for itself. A token s then counts lambda^(t - s) for the query at t.


# %%
@jaxtyped(typechecker=beartype)
def recurrent(
    q: Float[Array, "T H"], k: Float[Array, "T H"], v: Float[Array, "T V"], slope: float, state: Float[Array, "H V"]
) -> tuple[Float[Array, "T V"], Float[Array, "H V"]]:
    """One token after the other: (out, state). lambda = exp(-slope)."""
    out = []
    for t in range(len(q)):
        state = jnp.exp(-slope) * state + jnp.outer(k[t], v[t])
        out.append(q[t] @ state)
    return jnp.stack(out), state


@jaxtyped(typechecker=beartype)
def quadratic(
    q: Float[Array, "T H"], k: Float[Array, "T H"], v: Float[Array, "T V"], slope: float
) -> Float[Array, "T V"]:
    """All pairs at once."""
    distance = jnp.arange(len(q))[:, None] - jnp.arange(len(q))
    weights = jnp.where(distance >= 0, jnp.exp(-slope * jnp.maximum(distance, 0)), 0)
    return ((q @ k.T) * weights) @ v


T, H, V, slope = 40, 8, 6, 0.1
q, k = (jax.random.normal(jax.random.key(i), (T, H)) for i in (0, 1))
v, empty = jax.random.normal(jax.random.key(2), (T, V)), jnp.zeros((H, V))


def close(a, b):
    return compare.relative(a, b) <= compare.OUT["float32"]


one_by_one, last = recurrent(q, k, v, slope, empty)
print("all pairs = one by one:", close(quadratic(q, k, v, slope), one_by_one))

# %% [markdown]
# ## The third form
#
# Decode takes the first form: a step costs the same however long the text is. For a prompt neither is good. The first
# has T steps that wait for each other, the second has T^2 pairs. So a prompt goes in *blocks* of m tokens: all pairs
# inside a block, and one state from block to block.
#
# In a block, let i and j count its tokens from 1. The state from before the block has faded by lambda^i when token i
# reads it. Token j has faded by lambda^(m - j) at the block's end.


# %%
@jaxtyped(typechecker=beartype)
def in_blocks(
    q: Float[Array, "T H"], k: Float[Array, "T H"], v: Float[Array, "T V"], slope: float, m: int
) -> tuple[Float[Array, "T V"], Float[Array, "H V"]]:
    state, out = jnp.zeros((q.shape[1], v.shape[1])), []
    for first in range(0, len(q), m):
        a, b, c = (x[first : first + m] for x in (q, k, v))  # the last block may be shorter
        i = jnp.arange(1, len(a) + 1)[:, None]
        out.append(quadratic(a, b, c, slope) + jnp.exp(-slope * i) * (a @ state))
        state = jnp.exp(-slope * len(a)) * state + (jnp.exp(-slope * (len(a) - i)) * b).T @ c
    return jnp.concatenate(out), state


for m in (1, 7, 40):
    out, state = in_blocks(q, k, v, slope, m)
    print(f"m = {m:2}: equal to one by one: {close(out, one_by_one)}, the state: {close(state, last)}")

# %% [markdown]
# One trap. lambda^(t - s) is lambda^t times lambda^-s, so it looks as if q and k could be multiplied by one factor each
# before the product, which would save the table of weights. But lambda^-s grows without end:

# %%
far = jnp.arange(0, 1000, 300)
print("lambda^t :", jnp.exp(-0.3 * far))
print("lambda^-s:", jnp.exp(0.3 * far))
print("lambda^t lambda^-s for t = s:", jnp.exp(-0.3 * far) * jnp.exp(0.3 * far), " it should be 1")

# %% [markdown]
# Powers are taken of differences that are not negative, and nothing overflows.
#
# What do the forms cost? With H = V = 128, for each token and head, in products and sums:

# %%
att = jforge.get("lightning")
text01 = att.models["MiniMax-Text-01"]
for m in (1, 128, 256, 4096, 131_072):
    cost = att.cost(dataclasses.replace(text01, block_size=m), context=131_072, new=131_072)
    print(f"m = {m:>7,}: {cost.flops / 131_072 / text01.num_attention_heads:>12,.0f} flops")

# %% [markdown]
# m = 1 is the recurrence, m = T the form with all pairs. With m = 256, as MiniMax has it, the flops are 1.6 times those
# of the recurrence. They are worth it: these are products of matrices, for which a GPU is built, and 256 times fewer
# steps wait for each other.
#
# ## What is forgotten
#
# The slopes are no parameters: head n of N has 2^(-8 (n + 1) / N), and that shrinks from layer to layer to about 0 in
# the last one. Take the *first* layer of MiniMax-Text-01, N = 64, and its slowest head.
#
# Predict: after how many tokens has this head forgotten half of a token?

# %% tags=["predict"]
guess = None

# %%
from jforge.attention.lightning import slopes

half = np.log(2) / slopes(text01)  # lambda^x = 1/2
reveal(float(half.max()), guess)
print(f"the fastest head: {half.min():.1f} tokens")

# %%
plt = plots()
figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
distance = np.arange(1, 20_000)
for ax, layer in zip(axes, (0, 70), strict=True):
    for head in (0, 31, 63):
        slope = slopes(dataclasses.replace(text01, layer_index=layer))[head]
        ax.semilogx(distance, np.exp(-slope * distance), label=f"head {head}")
    ax.set(title=f"layer {layer} of 80", xlabel="tokens ago, t - s")
axes[0].set_ylabel("weight that is left")
axes[0].legend(frameon=False, loc="upper right")
plt.show()

# %% [markdown]
# The heads cover all distances, from a token to thousands of them. What no head can do is to keep one old token because
# it matters: the rate does not look at the data.
#
# There is a second limit. Without any decay, store n pairs of key and value in one state and ask for each value with
# its own key. Keys of length 1 that are not orthogonal answer for each other:

# %%
channels = 128
for n in (8, 32, 128, 512):
    keys, values = (jax.random.normal(jax.random.key(i), (n, channels)) for i in (3, 4))
    keys = keys / jnp.linalg.norm(keys, axis=1, keepdims=True)
    answers = keys @ (keys.T @ values)
    error = jnp.linalg.norm(answers - values) / jnp.linalg.norm(values)
    print(f"{n:>3} pairs in a state of {channels} x {channels}: relative error {error:.2f}")

# %% [markdown]
# With as many pairs as channels the error is as large as the values. Both limits speak for some layers that keep every
# token, and MiniMax-Text-01 has full attention in every eighth layer.
#
# ## Against the package
#
# In the layer, q, k and v go through *silu*, x / (1 + exp(-x)). The outputs of all heads are divided by their common
# root mean square, and a gate between 0 and 1 multiplies each channel. There are no positions, since the decay knows
# the order.

# %%
small = att.Config(hidden_size=24, num_attention_heads=4, head_dim=8, layer_index=1, num_hidden_layers=4, block_size=4)
p = att.init_params(jax.random.key(5), small)
x = jax.random.normal(jax.random.key(6), (1, 21, 24))  # one row of 21 tokens


def layer(p, x):
    q, k, v = (jax.nn.silu(jnp.einsum("td,dnh->nth", x, p[w])) for w in ("wq", "wk", "wv"))
    heads = range(small.num_attention_heads)
    slope = 2.0 ** (-8 * (np.arange(4) + 1) / 4) * (1 - 1 / (4 - 1 + 1e-5) + 1e-5)  # layer 1 of 4
    out = jnp.stack([in_blocks(q[n], k[n], v[n], float(slope[n]), 5)[0] for n in heads], axis=1)  # T N H
    normed = out / jnp.sqrt((out**2).mean(axis=(1, 2), keepdims=True) + 1e-6) * p["o_norm"]
    gate = jax.nn.sigmoid(jnp.einsum("td,dnh->tnh", x, p["wg"]))
    return jnp.einsum("tnh,nhd->td", gate * normed, p["wo"])


def both(att, cfg, p, x):
    """(forward, the same by a prefill of all but the last token and a decode step)"""
    start, cache = att.prefill(p, cfg, x[:, :-1], att.init_cache(cfg, 1, 32, jnp.float32))
    last, _ = att.decode(p, cfg, x[:, -1:], cache)
    return att.forward(p, cfg, x), jnp.concatenate([start, last], axis=1)


both = jax.jit(both, static_argnums=(0, 1))
want = jax.jit(layer)(p, x[0])
print("lightning:", *(close(y[0], want) for y in both(att, small, p, x)))

# %%
questions("lightning")

# %% [markdown]
# A step reads the whole state and writes the whole state. For a short text that is more than the cache of an ordinary
# layer; exercise 1 asks where they meet. The state is in float32, since it is added to thousands of times.
#
# ## MSA: the best key of a block
#
# Now the other road. Every token stays, with its keys and values in K heads, and leaves an *index key* of J channels.
# There is one index query for each key head. It is multiplied with all index keys; the score of a block of M tokens is
# the *largest* of the products. Each key head reads the blocks of the highest scores, the query's own always among
# them.


# %%
@jaxtyped(typechecker=beartype)
def block_scores(
    q_index: Float[Array, "T K J"], k_index: Float[Array, "S J"], visible: Bool[Array, "T S"], M: int
) -> Float[Array, "T K E"]:
    scores = jnp.where(visible[:, None], jnp.einsum("tkj,sj->tks", q_index, k_index), -jnp.inf)
    pad = -scores.shape[-1] % M  # the last block may be partial
    scores = jnp.pad(scores, ((0, 0), (0, 0), (0, pad)), constant_values=-jnp.inf)
    return scores.reshape(*scores.shape[:2], -1, M).max(axis=-1)


@jaxtyped(typechecker=beartype)
def pick_blocks(scores: Float[Array, "T K E"], M: int, count: int) -> Int[Array, "T K L"]:
    own = jnp.arange(len(scores))[:, None, None] // M
    scores = jnp.where(jnp.arange(scores.shape[-1]) == own, jnp.inf, scores)
    values, blocks = jax.lax.top_k(scores, min(count, scores.shape[-1]))
    return jnp.where(jnp.isneginf(values), -1, blocks)


# %% [markdown]
# Why the largest? Notebook 08A hid one key that fits the query among random ones, and a block's *mean* soon lost it.
# The same experiment with both, the right block among the best two of 63:

# %%


def found(M, reduce, trials=400, blocks=63, channels=64):
    def trial(key):
        one, two = jax.random.split(key)
        query = jax.random.normal(one, (channels,))
        logits = jax.random.normal(two, (blocks, M)) * jnp.linalg.norm(query)
        scores = reduce(logits.at[5, 0].set(query @ query), axis=1)
        return (jax.lax.top_k(scores, 2)[1] == 5).any()

    return float(jax.lax.map(trial, jax.random.split(jax.random.key(M), trials), batch_size=50).mean())


for M in (16, 128):
    print(f"M = {M:>3}: by the mean {found(M, jnp.mean):.2f}, by the largest {found(M, jnp.max):.2f}")

# %% [markdown]
# The price: which token of a block is the best depends on the query. A mean can be stored once; of a maximum nothing
# can be stored in place of the block's keys. So a step scans *all* index keys.
#
# The attention itself is that of notebook 04A under a mask of blocks. Index queries and keys are divided by their root
# mean square. Against the package's `msa`, without positions:

# %%
msa = jforge.get("msa")
cfg = msa.Config(
    hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8, index_head_dim=6, index_block_size=4,
    index_topk_blocks=2,
)  # fmt: skip
w = msa.init_params(jax.random.key(7), cfg)


def rms(x, weight):
    return x / jnp.sqrt((x**2).mean(axis=-1, keepdims=True) + cfg.rms_norm_eps) * weight


def msa_layer(w, x):
    T, M, G = len(x), cfg.index_block_size, cfg.num_attention_heads // cfg.num_key_value_heads
    q, k, v = (jnp.einsum("td,dnh->tnh", x, w[name]) for name in ("wq", "wk", "wv"))
    q_index = rms(jnp.einsum("td,dkj->tkj", x, w["wq_index"]), w["q_index_norm"])
    k_index = rms(x @ w["wk_index"], w["k_index_norm"])
    causal = jnp.tril(jnp.ones((T, T), bool))
    lists = pick_blocks(block_scores(q_index, k_index, causal, M), M, cfg.index_topk_blocks)
    seen = (lists[..., None] == jnp.arange(T) // M).any(axis=2) & causal[:, None]  # T K S
    logits = jnp.einsum("tnh,snh->tns", q, jnp.repeat(k, G, axis=1)) * cfg.scaling
    weights = jax.nn.softmax(jnp.where(jnp.repeat(seen, G, axis=1), logits, -jnp.inf))
    return jnp.einsum("tns,snv,nvd->td", weights, jnp.repeat(v, G, axis=1), w["wo"])


want = jax.jit(msa_layer)(w, x[0])
print("msa:", *(close(y[0], want) for y in both(msa, cfg, w, x)))

# %% [markdown]
# ## What a step touches
#
# MSA, five steps after 14 tokens, blocks of M = 4, two blocks for each of two key heads. `watch` found out by
# experiment what is read.

# %%
prefill = jax.jit(msa.prefill, static_argnums=1)
_, prompt = prefill(w, cfg, x[:, :14], msa.init_cache(cfg, 1, 24, jnp.float32))
picture(watch(msa, w, cfg, x[:, 14:19], prompt), "MSA: two blocks of 4 tokens for each of two key heads", first=14)

# %% [markdown]
# Above, the keys and values: the block of the new token, and one more for each key head, which may be the same one. A
# column stands for the slot in both heads; it is blue if either reads it. Below, the index keys: of these all are read.
# (Those of the new token's own block need no score, since the block is taken anyway. They are computed all the same,
# and the experiment sees that.)

# %%
questions("msa")

# %% [markdown]
# ## The two roads in bytes
#
# One layer and row, what a step reads, with grouped queries (`gqa`) of the same heads beside each. Lightning's state is
# float32, all else bfloat16.

# %%
m3 = msa.models["MiniMax-M3"]
gqa = jforge.get("gqa")


def of_gqa(cfg, K):
    heads = {"num_attention_heads": cfg.num_attention_heads, "num_key_value_heads": K, "head_dim": cfg.head_dim}
    return gqa.Config(hidden_size=cfg.hidden_size, **heads)


shown = {
    "gqa, 8 key heads": (gqa, of_gqa(text01, 8)), "lightning (Text-01)": (att, text01),
    "gqa, 4 key heads": (gqa, of_gqa(m3, 4)), "msa (M3)": (msa, m3),
}  # fmt: skip
tokens = np.geomspace(256, 2**20, 50).astype(int)
plt.figure(figsize=(10, 4.4))
for name, (mechanism, sizes) in shown.items():
    reads = [sum(mechanism.cost(sizes, context=int(S)).read.values()) / 2**20 for S in tokens]
    plt.loglog(tokens, reads, label=name)
plt.xlabel("tokens so far, S")
plt.ylabel("MiB read a step")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# Lightning's line is flat from the first token on. MSA's is that of its grouped queries, with the index on top, until
# there are more blocks than it reads (16 of 128 tokens); from then on only the scan grows.
#
# A whole model, with its layers as config.json has them, at 1,048,576 tokens:

# %%
folder = Path(jforge.__file__).parent / "configs"
for name in ("minimax-text-01", "minimax-m2", "minimax-m3"):
    layers = jforge.hf.layers(jforge.hf.load(folder / f"{name}.json"))
    kinds = {kind: sum(n == kind for n, _ in layers) for kind in sorted({n for n, _ in layers})}
    costs = [jforge.get(n).cost(c, context=2**20) for n, c in layers]
    stored, read = (sum(sum(getattr(c, what).values()) for c in costs) / 2**30 for what in ("stored", "read"))
    print(f"{name:16} stored {stored:5.1f} GiB, read a step {read:5.1f} GiB; layers: {kinds}")

# %% [markdown]
# In Text-01 nearly all bytes are those of its ten layers of full attention.
#
# ## Exercises
#
# Set the answer, run the two cells. A function is called by the second one.
#
# **1.** A layer of MiniMax-Text-01 has a state of 64 heads, 128 x 128 numbers each, in float32. How many tokens does a
# layer of grouped queries with K = 8 key heads, H = V = 128, in bfloat16 store in the same bytes?

# %%
answer_1 = None

# %% tags=["solution"]
answer_1 = 64 * 128 * 128 * 4 // (8 * (128 + 128) * 2)

# %%
exercise(1, answer_1, "131a01fc7edc")

# %% [markdown]
# **2.** N = 64, first layer: after how many tokens has head 31 forgotten half of a token? (Take the factor of the layer
# as 1.)

# %%
answer_2 = None

# %% tags=["solution"]
answer_2 = float(np.log(2) / 2 ** (-8 * 32 / 64))

# %%
exercise(2, answer_2, "6082a75779ad")

# %% [markdown]
# **3.** Write `answer_3(q, k, v, slope, state)`: the outputs, T x V, of T tokens that come after a text whose state is
# `state`, without a loop over the tokens.

# %%
answer_3 = None


# %% tags=["solution"]
def answer_3(q, k, v, slope, state):
    faded = jnp.exp(-slope * jnp.arange(1, len(q) + 1))[:, None]
    return quadratic(q, k, v, slope) + faded * (q @ state)


# %%
exercise(3, answer_3, "42a98f836c36", q[:3, :2], k[:3, :2], v[:3, :2], 0.25, jnp.array([[1.0, -2.0], [0.5, 3.0]]))

# %% [markdown]
# **4.** Up to how many tokens gives MiniMax-M3 exactly what attention to all tokens gives? (16 blocks of 128.)

# %%
answer_4 = None

# %% tags=["solution"]
answer_4 = m3.index_topk_blocks * m3.index_block_size

# %%
exercise(4, answer_4, "3a6d2e3c7e6f")

# %% [markdown]
# **5.** Two states, no text in common: `state_a` after the first part of a text, from an empty state, and `state_b`
# after its second part of n tokens, from an empty state too. Write `answer_5(state_a, state_b, n, slope)`: the state
# after both. (So a long prompt can be taken in by several cards at once.)

# %%
answer_5 = None


# %% tags=["solution"]
def answer_5(state_a, state_b, n, slope):
    return jnp.exp(-slope * n) * state_a + state_b


# %%
exercise(5, answer_5, "837c298a4b1f", jnp.array([[1.0, 2.0], [3.0, -4.0]]), jnp.array([[0.5, 0.0], [1.0, 1.0]]), 7, 0.1)
