# %% [markdown]
# # 17. Layers that share a cache
#
# Every layer of a model has a cache of its own, and the notebooks before this one make it smaller: fewer key heads,
# latents, windows, states. Here a layer has none. It makes queries from what it is given, as any layer does, and
# attends with them to the keys and values that an *earlier layer* has stored. Gemma 3n and the small models of Gemma 4
# are built so. What that saves and what it does not, one mistake that hides well, and two relatives: values that are
# keys (Gemma 4), and layers that share what an index has picked (GLM-5.2).
#
# A layer that stores is an *owner* here, a layer that attends to an owner's cache is a *reader* of it.
#
# Letters: T new tokens, S tokens in the cache, t the position of a query and s that of a key, both from 0; N query
# heads, K key heads, G = N / K, H channels of a query, key or value, D of a token, W slots of a window's ring. There is
# one row.

# %%
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from beartype import beartype
from jaxtyping import Array, Bool, Float, jaxtyped

import jforge
from jforge import hf, stack
from jforge.attention.dsa import index as picks_of
from jforge.core import compare
from jforge.lessons import Lender, exercise, picture, plots, questions, reveal, watch

jax.config.update("jax_default_matmul_precision", "highest")  # a GPU may otherwise round products to fewer digits
jnp.set_printoptions(precision=3, suppress=True)


def close(a, b):
    return compare.relative(a, b) <= compare.OUT["float32"]


# %% [markdown]
# ## Two layers, one cache
#
#     owner    h = x + attend(x Wq, k, v) Wo        k = x Wk, v = x Wv, stored
#     reader   y = h + attend(h Wq', k, v) Wo'      the same k and v
#
# The reader has weights for its queries and its output. Keys and values are made of x, what went *into* the owner; the
# queries are made of h, what came out of it. (What else a layer has, norms and an MLP, changes nothing here and is left
# out.)


# %%
@jax.jit
@jaxtyped(typechecker=beartype)
def attend(
    q: Float[Array, "T N H"], k: Float[Array, "S K H"], v: Float[Array, "S K H"], seen: Bool[Array, "T S"]
) -> Float[Array, "T N H"]:
    """Query head n reads key head n // G."""
    T, N, H = q.shape
    logits = jnp.einsum("tkgh,skh->kgts", q.reshape(T, k.shape[1], -1, H), k) * H**-0.5
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf))
    return jnp.einsum("kgts,skh->tkgh", weights, v).reshape(T, N, H)


def heads(w, x):
    return jnp.einsum("td,dnh->tnh", x, w)


def out(w, heads):
    return jnp.einsum("tnh,nhd->td", heads, w)


@jax.jit
def two_layers(owner, reader, x):
    seen = jnp.tril(jnp.ones((len(x), len(x)), bool))
    k, v = heads(owner["wk"], x), heads(owner["wv"], x)
    h = x + out(owner["wo"], attend(heads(owner["wq"], x), k, v, seen))
    return h + out(reader["wo"], attend(heads(reader["wq"], h), k, v, seen))


# %% [markdown]
# With a cache: one pair of arrays for both layers. The owner writes the new tokens, and then both attend.


# %%
def extend(owner, reader, x, k, v, length):
    """Tokens length, length + 1, ... of a row, a prompt or a step; k and v are S K H."""
    k = jax.lax.dynamic_update_slice(k, heads(owner["wk"], x), (length, 0, 0))
    v = jax.lax.dynamic_update_slice(v, heads(owner["wv"], x), (length, 0, 0))
    seen = jnp.arange(len(k)) <= length + jnp.arange(len(x))[:, None]
    h = x + out(owner["wo"], attend(heads(owner["wq"], x), k, v, seen))
    y = h + out(reader["wo"], attend(heads(reader["wq"], h), k, v, seen))
    return y, k, v, length + len(x)


att = jforge.get("gqa")
own = att.Config(hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=6)
borrows = replace(own, kv_shared=True)
owner, reader = (att.init_params(jax.random.key(i), cfg) for i, cfg in enumerate((own, borrows)))
print("owner: ", {name: weight.shape for name, weight in owner.items()})
print("reader:", {name: weight.shape for name, weight in reader.items()})

x = jax.random.normal(jax.random.key(2), (12, 16))
state = jnp.zeros((12, 2, 6)), jnp.zeros((12, 2, 6)), jnp.int32(0)
ys, extend_jit = [], jax.jit(extend)
for chunk in (x[:8], *(x[t : t + 1] for t in range(8, 12))):  # a prompt of 8 tokens, then four steps
    y, *state = extend_jit(owner, reader, chunk, *state)
    ys.append(y)
want = two_layers(owner, reader, x)
print("with the cache as without:", close(jnp.concatenate(ys), want))

# %% [markdown]
# In the package `jforge.stack` runs layers one after the other. A layer that reads names its source, by its index:
# (mechanism, Config, source), with `kv_shared` in its Config. What stands around the attention is a function, `block`;
# here it adds the input.

# %%
layers = (("gqa", own), ("gqa", borrows, 0))


def block(x, layer, attend):
    return x + attend(x)


prefill, decode = (jax.jit(f, static_argnames=("layers", "block")) for f in (stack.prefill, stack.decode))


def in_chunks(params, layers, x, sizes):
    """Outputs of a row that comes in chunks of these sizes, and the caches at the end."""
    cache, ys, at = stack.init_cache(layers, 1, len(x), jnp.float32), [], 0
    for size in sizes:
        call = decode if size == 1 else prefill
        y, cache = call(params, layers=layers, x=x[None, at : at + size], cache=cache, block=block)
        ys.append(y[0])
        at += size
    return jnp.concatenate(ys), cache


y, caches = in_chunks([owner, reader], layers, x, (8, 1, 1, 1, 1))
print("stack, a prompt and steps:", close(y, want))
forward = jax.jit(lambda x: stack.forward([owner, reader], layers, x, block))
print("stack.forward, no cache:  ", close(forward(x[None])[0], want))
print("the owner's k and ours:   ", close(caches[0].k[0], state[0]))
print("the reader's cache:       ", caches[1])

# %% [markdown]
# All that the reader keeps is how many tokens it has seen.
#
# Order matters: the new token is one of those that it attends to, so the reader must come after the owner's write.
# Were it to read the cache as it was before the step, it would miss one token:

# %%
seen = jnp.tril(jnp.ones((12, 12), bool))
k, v = heads(owner["wk"], x), heads(owner["wv"], x)
h = x + out(owner["wo"], attend(heads(owner["wq"], x), k, v, seen))
early = h[11:] + out(reader["wo"], attend(heads(reader["wq"], h[11:]), k, v, seen[10:11]))  # without token 11
print("read before the write:", close(early, want[11:]))

# %% [markdown]
# ## What is saved, and what is not
#
# `watch` finds out by experiment what a step does to each slot (notebook 05A). The owner first, then the reader, which
# is watched after the owner has written. Expect a row that gets longer twice, and writes once.

# %%
prefill_one = jax.jit(att.prefill, static_argnums=1)
_, prompt = prefill_one(owner, own, x[None, :7], att.init_cache(own, 1, 12, jnp.float32))
by_owner = watch(att, owner, own, x[None, 7:], prompt)
by_reader = watch(att, reader, borrows, x[None, 7:], prompt, Lender(att, owner, own))
panels = {f"owner: {name}": codes for name, codes in by_owner.items()}
panels |= {f"reader: the owner's {name}": codes for name, codes in by_reader.items()}
picture(panels, "five decode steps after a prompt of 7 tokens", first=7)

# %% [markdown]
# The reader writes nothing and reads every slot, those of the new tokens too. In bytes, two layers with the sizes of
# Llama-3.1-8B at 8,192 tokens, once each with a cache of its own and once with one for both:

# %%
S = 8192
llama = att.models["Llama-3.1-8B"]
apart = (("gqa", llama), ("gqa", llama))
shared = (("gqa", llama), ("gqa", replace(llama, kv_shared=True), 0))


def weights(layers):
    return sum(int(np.prod(shape)) for name, cfg, *_ in layers for shape in jforge.get(name).shapes(cfg).values())


costs = [stack.cost(which, context=S) for which in (apart, shared)]
print("                 apart       shared")
for what in ("stored", "written", "read"):
    print(f"{what:8}", *(f"{sum(getattr(cost, what).values()):>12,} B" for cost in costs))
print("flops   ", *(f"{cost.flops:>12,}  " for cost in costs))
print("weights ", *(f"{weights(which):>12,}  " for which in (apart, shared)))

# %% [markdown]
# Half is stored, half is written, and the reader's Wk and Wv are gone. What a step *reads* has not changed: the reader
# goes through all slots again. Could both layers attend while the slots are being read once? No: the reader's queries
# are made of h, and h is not there before the owner has read its last slot. So a decode step, which takes as long as
# its reads take (05A), gets faster only by the weights that are gone. What is gained is room: for more rows, or for
# longer ones.
#
# ## A prompt that stops half-way
#
# A prompt gains more. Which outputs of a reader does anyone need? The tokens of a prompt pass all layers so that they
# leave keys and values there. In a reader they leave none. So where all readers come after all owners, as in Gemma, and
# only the output of the last token is asked for, which says how the text goes on, the others need not pass the readers
# at all:


# %%
@jax.jit
def last_output(owner, reader, x):
    seen = jnp.tril(jnp.ones((len(x), len(x)), bool))
    k, v = heads(owner["wk"], x), heads(owner["wv"], x)
    h = x + out(owner["wo"], attend(heads(owner["wq"], x), k, v, seen))
    h = h[-1:]  # one token goes on
    return h + out(reader["wo"], attend(heads(reader["wq"], h), k, v, seen[-1:]))


print("the last output:", close(last_output(owner, reader, x), want[-1:]))

# %% [markdown]
# (`stack.prefill` gives the outputs of all tokens, so there all tokens pass all layers.)
#
# ## A window and its reader
#
# Now both layers have a window of W tokens. The owner's cache is a ring of W slots (07A), and the reader sees the last
# W tokens too, so the ring looks like all that it needs. In a decode step it is: after the write, what lies in the ring
# is the window. Try it with a prompt of 10 tokens and W = 4:

# %%
W, P = 4, 10
k, v, q = heads(owner["wk"], x[:P]), heads(owner["wv"], x[:P]), heads(reader["wq"], x[:P])
t = np.arange(P)


def window(t, s):
    return (s <= t[:, None]) & (s > t[:, None] - W)


right = attend(q, k, v, window(t, t))
left = np.arange(P - W, P)  # what the ring still has after the prompt: tokens 6 to 9
wrong = attend(q, k[left], v[left], window(t, left))
print("first number of each output, from all keys:    ", right[:, 0, 0])
print("from what is left in the ring after the prompt:", wrong[:, 0, 0])
print("right:", [close(a, b) for a, b in zip(wrong, right, strict=True)])

# %% [markdown]
# One of ten. The owner attended before the late tokens of the prompt took the slots of the early ones; the reader comes
# when that has happened. Below, each mark is a key that the query of its row has to see.

# %%
plt = plots()
figure, ax = plt.subplots(figsize=(10, 4.6))
for query, key in np.argwhere(window(t, t)):
    gone = key not in left
    ax.plot(key, query, "X" if gone else "s", color="C1" if gone else "C0", markersize=17)
ax.plot([], [], "sC0", markersize=13, linestyle="none", label="still in the ring")
ax.plot([], [], "XC1", markersize=13, linestyle="none", label="its slot was taken")
ax.set(xticks=t, yticks=t, xlim=(-0.6, 14), ylim=(9.6, -0.6), xlabel="key of token", ylabel="query of token")
ax.legend(frameon=False, loc="upper right")
plt.show()

# %% [markdown]
# The mistake hides well. The last token of the prompt is right. And other calls that read what is in the ring after
# them?


# %%
def from_the_ring(first, end):
    """Whether the queries of a call with tokens first to end - 1 are right, from the ring after it."""
    new, left = np.arange(first, end), np.arange(max(0, end - W), end)
    return close(attend(q[new], k[left], v[left], window(new, left)), right[new])


print("a prompt of 4 tokens:", from_the_ring(0, 4))
print("single steps:        ", all(from_the_ring(t, t + 1) for t in range(W, P)))
print("two tokens at once:  ", from_the_ring(8, 10))

# %% [markdown]
# So no test with a short prompt and single steps finds it. Where no owner comes after a reader, as in Gemma, even the
# text that follows a long prompt is right, since nothing of the other outputs is kept. Wrong is what asks for these:
# the score of a given text, say, or a check of several guessed tokens in one call.
#
# So what has to be lent is not the ring after the call but what the owner itself attended to: the ring *before* the
# call, beside all entries that are new in it. A prompt in two chunks, 6 tokens and 4:

# %%
new = np.arange(6, 10)
before = np.arange(6 - W, 6)  # the ring before the second chunk
both = np.concatenate([before, new])
second = attend(q[new], k[both], v[both], window(new, both))
print("before + new:", close(second, right[new]))

# %% [markdown]
# The package lends a reader these parts (`jforge.core.share.Source`): `before`, `after`, and `new`. A step of one token
# reads `after`; everything longer reads `before` and `new`. Against our mask, in one go, in
# chunks and token by token:

# %%
ring = jforge.get("sliding_window")
ring_own = ring.Config(hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=6, sliding_window=W)
ring_borrows = replace(ring_own, kv_shared=True)


@jax.jit
def two_windows(owner, reader, x):
    t = jnp.arange(len(x))
    k, v = heads(owner["wk"], x), heads(owner["wv"], x)
    h = x + out(owner["wo"], attend(heads(owner["wq"], x), k, v, window(t, t)))
    return h + out(reader["wo"], attend(heads(reader["wq"], h), k, v, window(t, t)))


want = two_windows(owner, reader, x)
good = ((ring, ring_own), (ring, ring_borrows, 0))
for sizes in ((12,), (6, 4, 1, 1), (1,) * 12):
    y, _ = in_chunks([owner, reader], good, x, sizes)
    print(f"chunks {sizes}:", close(y, want))

# %% [markdown]
# ## Gemma 3n
#
# Which layers own, and which read whose cache? Gemma 3n E4B has 35 layers. Every fifth attends to all tokens (*full*),
# the others have a window of 512 (*sliding*), and its config.json says `num_kv_shared_layers = 15`: the last 15 own
# nothing. Each of them reads the last owner *of its own kind*, since a full layer has no use for a ring. `hf.layers`
# makes the layers of a config, with their sources.

# %%
E4B = {"model_type": "gemma3n_text", "hidden_size": 2048, "num_hidden_layers": 35, "num_attention_heads": 8,
       "num_key_value_heads": 2, "head_dim": 256, "sliding_window": 512, "num_kv_shared_layers": 15}  # fmt: skip
gemma = hf.layers(E4B)
source_of = {i: layer[2] for i, layer in enumerate(gemma) if len(layer) == 3}
for source in sorted(set(source_of.values())):
    print(f"layer {source} ({gemma[source][0]}) is read by", [i for i, at in source_of.items() if at == source])

# %%
from matplotlib.patches import FancyArrowPatch

figure, ax = plt.subplots(figsize=(10, 4.6))
lanes = {"gqa": (1, "C0", "full"), "sliding_window": (0, "C1", "sliding, W = 512")}
for i, (name, *_) in enumerate(gemma):
    height, color, _ = lanes[name]
    ax.plot(i, height, "s", color=color, markersize=14, fillstyle="none" if i in source_of else "full")
    if i in source_of:
        bend = -0.4 if name == "gqa" else 0.4
        ax.add_patch(FancyArrowPatch(
            (i, height), (source_of[i], height), connectionstyle=f"arc3,rad={-bend}", arrowstyle="-|>",
            mutation_scale=14, color=color, shrinkA=9, shrinkB=9, linewidth=1.5,
        ))  # fmt: skip
for height, color, text in lanes.values():
    ax.text(0, height + 0.22, text, color=color)
ax.plot([], [], "s", color="#444444", markersize=12, label="owns keys and values")
ax.plot([], [], "s", color="#444444", markersize=12, fillstyle="none", label="reads those of the layer at the arrow")
ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, -0.04), fontsize=13)
ax.set(xlabel="layer of Gemma-3n E4B", ylim=(-1.3, 2), xlim=(-1, 35), yticks=[], xticks=range(0, 35, 5))
ax.spines["left"].set_visible(False)
plt.show()

# %% [markdown]
# One ring has twelve readers. The other owners are read by themselves alone.
#
# ## Bytes
#
# Four models, each as it is and as it would be if every layer owned its keys (`num_kv_shared_layers = 0`). A full owner
# stores 2 K H ELEMENT bytes a token (keys and values, ELEMENT bytes a number, 2 in bfloat16), a sliding owner that for
# W tokens at most, and a reader nothing.
#
# Predict: Gemma-4 E2B has 35 layers, every fifth full, and the last 20 read. It has one key head, with 256 channels in
# sliding layers, whose W is 512, and 512 channels in full ones. How many MiB (2^20 bytes) does the cache of a row of
# 131,072 tokens take, in bfloat16?

# %% tags=["predict"]
guess = None

# %%
S = 131_072
GEMMA4 = E4B | {"model_type": "gemma4_text"}  # its hidden_size is another one, which has no part in these bytes
FIFTH = (["sliding_attention"] * 4 + ["full_attention"]) * 7
MODELS = {
    "Gemma-3n E4B": E4B,
    "Gemma-3n E2B": E4B | {"num_hidden_layers": 30, "num_kv_shared_layers": 10},
    "Gemma-4 E2B": GEMMA4 | {"num_key_value_heads": 1, "num_kv_shared_layers": 20, "layer_types": FIFTH},
    "Gemma-4 E4B": GEMMA4 | {"num_hidden_layers": 42, "num_kv_shared_layers": 18},
}


def cost_of(config, context=S):
    return stack.cost(hf.layers(config), context=context)


def mib(buffers):
    return sum(buffers.values()) / 2**20


reveal(int(mib(cost_of(MODELS["Gemma-4 E2B"]).stored)), guess)

# %% [markdown]
# Three full owners with 2 x 512 numbers a token, and twelve rings. All four models; "owners" are full + sliding:

# %%
print("                owners  readers  B a token      fixed  stored at 131,072    without sharing")
for model, config in MODELS.items():
    which = hf.layers(config)
    owners = [name for name, cfg, *source in which if not source]
    sliding = owners.count("sliding_window")
    cost, alone = cost_of(config), cost_of(config | {"num_kv_shared_layers": 0})
    print(f"{model:13}  {len(owners) - sliding:>2} + {sliding:<2}  {len(which) - len(owners):>7}", end="")
    print(f"  {cost.per_token:>9,}  {cost.fixed // 2**20:>5} MiB", end="")
    print(f"  {int(mib(cost.stored)):>13,} MiB  {int(mib(alone.stored)):>13,} MiB")

# %% [markdown]
# (Gemma 3n was made for rows of up to 32,768 tokens; the length here is the same for all, so that they compare.)
#
# Without sharing a step reads each stored byte once: every slot belongs to one layer, and that layer reads it.
#
# Predict: how many times does a step of Gemma-4 E2B read as many bytes as are stored?

# %% tags=["predict"]
guess = None

# %%
cost = cost_of(MODELS["Gemma-4 E2B"])
reveal(mib(cost.read) / mib(cost.stored), guess)
figure, ax = plt.subplots(figsize=(10, 4.8))
for row, config in enumerate(MODELS.values()):
    alone, cost = cost_of(config | {"num_kv_shared_layers": 0}), cost_of(config)
    bars = (
        (alone.stored, "#aaaaaa", "stored, if every layer owned"),
        (cost.stored, "C0", "stored"),
        (cost.read, "C1", "read in a step"),
    )
    for line, (buffers, color, label) in enumerate(bars):
        ax.barh(row + 0.27 * (line - 1), mib(buffers) / 1024, 0.25, color=color, label=label if row == 0 else None)
ax.set_yticks(range(len(MODELS)), list(MODELS))
ax.invert_yaxis()
ax.set_xlabel("GiB, a row of 131,072 tokens, bfloat16")
figure.legend(frameon=False, loc="outside upper center", ncols=3)
plt.show()

# %% [markdown]
# 35 layers read what 15 store. The bar of the reads is as long as the grey one in each model.
#
# ## Six questions
#
# An owner and its reader side by side: layers 19 and 34 of Gemma 3n E4B.

# %%
questions("gqa", {"layer 19, an owner": gemma[19][1], "layer 34, its reader": gemma[34][1]})

# %% [markdown]
# (The last row is what grouped queries trade, in both layers. What the reader trades stands in the other rows: no keys
# of its own, which could have been made of h.)
#
# ## Values that are keys
#
# Two larger models of Gemma 4 share nothing between layers. Their full layers save in another way: `attention_k_eq_v`.
# One projection p serves as key and as value:
#
#     p = x Wk        k = RoPE(rms(p) w)        v = rms(p)
#
# rms divides a vector by its root mean square, w is a weight for each channel, and RoPE turns pairs of channels by
# angles that grow with the token's position. So does the cache need only one tensor now?

# %%
rope = {"rope_type": "default", "rope_theta": 1e4}
equal = replace(own, attention_k_eq_v=True, v_norm=True, qk_norm="head", rope_parameters=rope)
w_equal = att.init_params(jax.random.key(3), equal)


def rms(p):
    return p / jnp.sqrt((p**2).mean(axis=-1, keepdims=True) + equal.rms_norm_eps)


def turn(k, positions):
    """RoPE, with channels j and j + H / 2 as one pair."""
    half = k.shape[-1] // 2
    angles = positions[:, None, None] * 1e4 ** (-jnp.arange(half) / half)
    a, b = k[..., :half], k[..., half:]
    return jnp.concatenate([a * jnp.cos(angles) - b * jnp.sin(angles), b * jnp.cos(angles) + a * jnp.sin(angles)], -1)


at = jnp.arange(12)
p = heads(w_equal["wk"], x)
k, v = turn(rms(p) * w_equal["k_norm"], at), rms(p)
_, cache = prefill_one(w_equal, equal, x[None], att.init_cache(equal, 1, 12, jnp.float32))
print("weights:", list(w_equal))
print("cache:  ", list(att.cache_spec(equal)), "as ours:", close(cache.k[0], k), close(cache.v[0], v))
print("k is v:", close(k, v), " k, turned back and divided by w, is v:", close(turn(k, -at) / w_equal["k_norm"], v))
print("the bytes of a step change:", att.cost(equal, context=100) != att.cost(own, context=100))

# %% [markdown]
# The cache still holds two tensors, and a step reads both. v could be made from k, as the last but one line shows, but
# then a step would have to turn back every key that it reads. What is gone is Wv. Bytes are saved by another key of the
# same config, `num_global_key_value_heads`: the full layers of Gemma-4 31B have 4 key heads instead of 16.

# %%
BIG = GEMMA4 | {
    "num_hidden_layers": 60, "num_attention_heads": 32, "num_key_value_heads": 16, "sliding_window": 1024,
    "num_kv_shared_layers": 0,
}  # fmt: skip
for keys in ({}, {"attention_k_eq_v": True}, {"attention_k_eq_v": True, "num_global_key_value_heads": 4}):
    print(f"{cost_of(BIG | keys).per_token:>8,} B a token", keys)

# %% [markdown]
# ## Picks that are shared
#
# GLM-5.2 attends as DeepSeek-V3.2 does (`dsa`, 09A): a layer scans an index, one small key of each token, picks the
# L = 2,048 tokens of the highest score, and gathers the latents of these. Each layer keeps latents of its own, but not
# an index: most take the *picks* of an earlier layer (`index_shared`). By hand, with the package's function for the
# picks, and through the stack:

# %%
dsa = jforge.get("dsa")
indexed = dsa.Config(
    hidden_size=16, num_attention_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4,
    v_head_dim=4, index_n_heads=4, index_head_dim=4, index_topk=3, rope_parameters=None,
)  # fmt: skip
taking = replace(indexed, index_shared=True)
first, second = (dsa.init_params(jax.random.key(i), cfg) for i, cfg in enumerate((indexed, taking)))
print("only the first has", sorted(set(first) - set(second)))

layers = (("dsa", indexed), ("dsa", taking, 0))


@jax.jit
def both_ways(x):
    picks = picks_of(first, indexed, x, dsa.init_cache(indexed, 1, 12, jnp.float32))
    h = x + dsa.forward(first, indexed, x)
    y = h + dsa.forward(second, taking, h, indices=picks)
    return y, stack.forward([first, second], layers, x, block), picks


by_hand, by_stack, picks = both_ways(x[None])
print("by hand and by the stack:", close(by_hand, by_stack))
print("picks of the last token, in both layers:", picks[0, -1])

# %% [markdown]
# What goes from layer to layer are L numbers for each query (which `cost` does not count), and the cache of the source
# is not looked at. So here *reads* get smaller too: an index that is not there is not scanned. GLM-5.2 has 78 layers:

# %%
glm = hf.layers(hf.load(Path(jforge.__file__).parent / "configs" / "glm-5.2.json"))
every = [(name, replace(cfg, index_shared=False)) for name, cfg, *_ in glm]
print("indexers in layers", [i for i, (_, cfg, *_) in enumerate(glm) if not cfg.index_shared])
now, then = stack.cost(glm, context=S), stack.cost(every, context=S)
print("                              as it is   an index in each layer")
for what in ("stored", "written", "read"):
    for part, names in (("index", {"k_index"}), ("latents", {"latent", "k_rope"})):
        sums = (sum(size for n, size in getattr(cost, what).items() if n in names) for cost in (now, then))
        print(f"{what:8} {part:8}", *(f"{size:>18,} B" for size in sums))

# %%
tokens = np.geomspace(2048, 2**20, 40).astype(int)


def read(layers, names):
    costs = (stack.cost(layers, context=int(S)).read for S in tokens)
    return [sum(size for n, size in cost.items() if n in names) / 1e9 for cost in costs]


names = {"k_index", "latent", "k_rope"}
figure, ax = plt.subplots(figsize=(10, 4.4))
ax.loglog(tokens, read(every, names), label="if each of 78 layers had an index")
ax.loglog(tokens, read(glm, names), label="as it is: 21 indices")
ax.loglog(tokens, read(glm, names - {"k_index"}), color="#777777", label="of both: gathered latents")
ax.set(xlabel="tokens in the cache, S", ylabel="GB read in a step, GLM-5.2", xlim=(2048, 2**20))
ax.legend(frameon=False)
plt.show()
print(f"{sum(then.read.values()) / sum(now.read.values()):.2f} times fewer bytes at {S:,} tokens;", end=" ")
print(f"the limit is 78 / 21 = {78 / 21:.2f}")

# %% [markdown]
# The two kinds of sharing, as parts of what there would be without:

# %%
print("                        stored  written   read")
gemma_cost, gemma_alone = cost_of(E4B), cost_of(E4B | {"num_kv_shared_layers": 0})
for model, one, other in (("Gemma-3n E4B, keys", gemma_cost, gemma_alone), ("GLM-5.2, picks", now, then)):
    parts = [sum(getattr(one, w).values()) / sum(getattr(other, w).values()) for w in ("stored", "written", "read")]
    print(f"{model:22}", *(f"{part:>7.0%}" for part in parts))

# %% [markdown]
# Shared keys save room and leave the reads as they are. Shared picks save little room, since each layer keeps its
# latents, but at this length two thirds of the reads.
#
# ## Exercises
#
# Set the answer, run the two cells. A function is called by the second one. Whole numbers must be exact, of others
# three digits count.
#
# **1.** Write `answer_1(kinds, shared)`: kinds is a string with a letter for each layer, "s" for sliding and "f" for
# full; the last `shared` layers read. Give the list of the sources by the rule of Gemma 3n, -1 for an owner.

# %%
answer_1 = None


# %% tags=["solution"]
def answer_1(kinds, shared):
    first = len(kinds) - shared
    return [-1 if i < first else kinds.rindex(kind, 0, first) for i, kind in enumerate(kinds)]


# %%
exercise(1, answer_1, "438ff30e04ce", "sfssfsfsfs", 4)

# %% [markdown]
# **2.** Suppose that in Llama-3.1-8B, with 32 layers, each odd layer read the cache of the layer before it. Give a list
# of two numbers: the bytes that one more token takes in the cache of all layers, and the bytes that a step reads which
# brings the row to 8,192 tokens (bfloat16).

# %%
answer_2 = None

# %% tags=["solution"]
pairs = [("gqa", replace(llama, kv_shared=True), i - 1) if i % 2 else ("gqa", llama) for i in range(32)]
pairs_cost = stack.cost(pairs, context=8192)
answer_2 = [pairs_cost.per_token, sum(pairs_cost.read.values())]

# %%
exercise(2, answer_2, "ae1dbe39418b")

# %% [markdown]
# **3.** A card has 16 GiB left for caches. How many rows of 32,768 tokens of Gemma-4 E4B fit, and how many would fit
# without sharing? Give a list of both.

# %%
answer_3 = None

# %% tags=["solution"]
answer_3 = [
    int(16 * 2**10 // mib(cost_of(MODELS["Gemma-4 E4B"] | keys, 32_768).stored))
    for keys in ({}, {"num_kv_shared_layers": 0})
]

# %%
exercise(3, answer_3, "2fe1f01f53ca")

# %% [markdown]
# **4.** A sliding layer with W = 512 reads the ring of another. A row has had thousands of tokens, and now 300 more
# come in one call. How many different keys do the queries of this call see, all together?

# %%
answer_4 = None

# %% tags=["solution"]
answer_4 = len({s for t in range(5000, 5300) for s in range(t - 512 + 1, t + 1)})

# %%
exercise(4, answer_4, "20a9a1014723")

# %% [markdown]
# **5.** A prompt of 10,000 tokens for Gemma-3n E4B, of which only the last token's output is asked for. Each token
# passes the owners, and the readers only if it must. Through how many layers do all tokens pass, counted together?

# %%
answer_5 = None

# %% tags=["solution"]
answer_5 = 10_000 * (len(gemma) - len(source_of)) + len(source_of)

# %%
exercise(5, answer_5, "81c4a7738572")

# %% [markdown]
# **6.** From which number of tokens on does GLM-5.2 read at most half of what it would read in a step if each of its
# layers had an index? (C = 512, R = 64, L = 2,048, and J = 128 channels of an index key.)

# %%
answer_6 = None

# %% tags=["solution"]
gathered = 78 * 2048 * (512 + 64)
answer_6 = next(S for S in range(2048, 100_000) if 2 * (gathered + 21 * S * 128) <= gathered + 78 * S * 128)

# %%
exercise(6, answer_6, "3a0198eabc4d")
