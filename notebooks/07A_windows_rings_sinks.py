# %% [markdown]
# # 07A. Windows, rings and sinks
#
# A cache that keeps every token grows without end, and each step reads all of it (notebook 05A). A *window* keeps the
# last W tokens. This notebook builds the cache for that, a *ring*; shows what a head loses with the tokens that fall
# out; and then two answers to it: keeping the first tokens (StreamingLLM), and a *sink*, a number that the model learns
# (gpt-oss).
#
# Letters: t is the position of a query, s that of a key, both from 0. T new tokens, W slots of the ring, N heads (each
# with keys of its own here), H channels of a query or key, V of a value, D of a token. There is one row.

# %%
import jax
import jax.numpy as jnp
from beartype import beartype
from jaxtyping import Array, Bool, Float, Int, jaxtyped

import jforge
from jforge.core import compare
from jforge.lessons import exercise, picture, plots, questions, reveal, watch

jax.config.update("jax_default_matmul_precision", "highest")  # a GPU may otherwise round products to fewer digits
jnp.set_printoptions(precision=3, suppress=True)


@jaxtyped(typechecker=beartype)
def attend(
    q: Float[Array, "T N H"], k: Float[Array, "S N H"], v: Float[Array, "S N V"], seen: Bool[Array, "T S"]
) -> Float[Array, "T N V"]:
    logits = jnp.einsum("tnh,snh->nts", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("nts,snv->tnv", jax.nn.softmax(jnp.where(seen, logits, -jnp.inf)), v)


def close(a, b):
    return compare.relative(a, b) <= compare.OUT["float32"]


# %% [markdown]
# ## The window
#
#     out_t = attention over the s with t - W < s <= t
#
# A token sees the last W tokens, itself included. Without a cache it is a mask with a band:


# %%
def window(T, W):
    t, s = jnp.arange(T)[:, None], jnp.arange(T)
    return (s <= t) & (s > t - W)


T, W = 12, 4
key_q, key_k, key_v = jax.random.split(jax.random.key(0), 3)
q, k, v = (jax.random.normal(key, (T, 2, n)) for key, n in ((key_q, 8), (key_k, 8), (key_v, 3)))
want = attend(q, k, v, window(T, W))
print(window(8, W).astype(int))

# %% [markdown]
# ## The ring
#
# No later token sees a key that has left the window, so its slot can be used again. The token at position p goes into
# slot p mod W: that is where the token of position p - W lies, the one that has just fallen out. Once the new token is
# written, what lies in the ring *is* the window, and no mask is needed. Only before W tokens have come are there empty
# slots to hide.


# %%
@jaxtyped(typechecker=beartype)
def ring_step(
    k: Float[Array, "W N H"], v: Float[Array, "W N V"], p: Int[Array, ""],
    new_q: Float[Array, "N H"], new_k: Float[Array, "N H"], new_v: Float[Array, "N V"],
) -> tuple[Float[Array, "N V"], Float[Array, "W N H"], Float[Array, "W N V"]]:  # fmt: skip
    """Token p: write over the oldest, then attend over the whole ring."""
    W = len(k)
    k, v = k.at[p % W].set(new_k), v.at[p % W].set(new_v)
    filled = jnp.arange(W) <= p  # all of them from p = W - 1 on
    return attend(new_q[None], k, v, filled[None])[0], k, v


step = jax.jit(ring_step)
ring_k, ring_v = jnp.zeros((W, 2, 8)), jnp.zeros((W, 2, 3))
outs = []
for p in range(T):
    out, ring_k, ring_v = step(ring_k, ring_v, jnp.int32(p), q[p], k[p], v[p])
    outs.append(out)
print("the ring gives what the mask gives:", close(jnp.stack(outs), want))

# %% [markdown]
# The slots are out of order: which token lies where?

# %%
print("after token 9:", [int(jnp.arange(10)[jnp.arange(10) % W == slot][-1]) for slot in range(W)])

# %% [markdown]
# That does no harm. A softmax is a sum over keys, and a sum has no order. (Where position matters it is already in the
# key: with RoPE, notebook 06A, a key is rotated by its own position *before* it is stored.)
#
# A trap: a prompt must not be written first. If a chunk of new tokens is put into the ring at once, its late tokens
# replace keys that its early ones still need. Take tokens 6 to 9 as one chunk after 0 to 5:

# %%
chunk = jnp.arange(6, 10)
slots = chunk % W
all_written = k[chunk], v[chunk]  # four new tokens fill a ring of four: nothing old is left
too_late = attend(q[chunk], *all_written, jnp.tril(jnp.ones((4, 4), bool)))
old = jnp.arange(6 - W, 6)  # the ring before the chunk; the new tokens lie beside it
both = jnp.concatenate([old, chunk])
beside = attend(q[chunk], k[both], v[both], (both <= chunk[:, None]) & (both > chunk[:, None] - W))
print("slots of the chunk:", slots)
for name, got in (("written first", too_late), ("old ring beside the chunk", beside)):
    print(f"{name:27}", [close(a, b) for a, b in zip(got, want[chunk], strict=True)])

# %% [markdown]
# Only the last token of the chunk survives the mistake, since its window is the chunk. A test of single steps does not
# find this one.
#
# ## The package, and its slots
#
# `sliding_window` does the same behind projections: a prompt of 9 tokens, then five steps, against its `forward`,
# which has no cache, and against our band.

# %%
att = jforge.get("sliding_window")
small = att.Config(hidden_size=16, num_attention_heads=2, num_key_value_heads=2, sliding_window=6)
w = att.init_params(jax.random.key(0), small)
x = jax.random.normal(jax.random.key(1), (1, 14, 16))


def ours(w, x, seen):
    q, k, v = (jnp.einsum("td,dnh->tnh", x, w[name]) for name in ("wq", "wk", "wv"))
    return jnp.einsum("tnv,nvd->td", attend(q, k, v, seen), w["wo"])


y, prompt = att.prefill(w, small, x[:, :9], att.init_cache(small, 1, 16, jnp.float32))
y_rest, after = att.decode(w, small, x[:, 9:], prompt)
print("slots:", prompt.k.shape[1], "whatever capacity is asked for")
print(
    close(jnp.concatenate([y, y_rest], axis=1), att.forward(w, small, x)),
    close(y_rest[0], ours(w, x[0], window(14, 6))[9:]),
)

# %% [markdown]
# In the picture expect a diagonal that comes back on the left: each step writes over one slot, the oldest, and reads
# all the others. The rows do not get longer.

# %%
picture(watch(att, w, small, x[:, 9:], prompt), "five decode steps after a prompt of 9 tokens, W = 6", first=9)

# %% [markdown]
# ## How far a window sees
#
# A layer sees W tokens. But what it reads there are outputs of the layer below, which had seen tokens of its own.
#
# Predict: three layers with W = 4, one on top of the other. On how many tokens does the last output depend?

# %% tags=["predict"]
guess = None

# %%


def stack(x, layers):
    for _ in range(layers):
        x = x + ours(w, x, window(len(x), 4))
    return x[-1]


far = jax.random.normal(jax.random.key(2), (24, 16))
slope = jax.jacobian(stack)(far, 3)  # of each output channel for each channel of each token
depends = jnp.abs(slope).max(axis=(0, 2)) > 0
reveal(int(depends.sum()), guess)
print("tokens 12 to 23:", depends[12:].astype(int))

# %% [markdown]
# Each layer adds W - 1. What comes from far has passed through many mixtures, though, and not every layer has to be
# local: Gemma 3 has five layers with a window for each one without.
#
# ## Bytes
#
# A ring stops growing, and so do the reads. Mistral-7B-v0.1, W = 4,096, against the same sizes without a window:

# %%
cfg = att.models["Mistral-7B-v0.1"]
full = jforge.get("gqa")
dense = full.Config(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8)
for S in (1024, 4096, 131_072):
    ring, kept = att.cost(cfg, context=S), full.cost(dense, context=S)
    print(f"S = {S:>7,}: reads {sum(ring.read.values()):>11,} B a step and layer, without window", end=" ")
    print(f"{sum(kept.read.values()):>11,} B")

# %%
from pathlib import Path

import numpy as np

config = jforge.hf.load(Path(jforge.__file__).parent / "configs" / "gemma-3-27b.json")
layers = jforge.hf.layers(config)
print({name: sum(other == name for other, _ in layers) for name, _ in layers})

contexts = np.geomspace(256, 131_072, 40).astype(int)


def stored(which, S):
    return sum(sum(jforge.get(name).cost(c, context=int(S)).stored.values()) for name, c in which) / 2**30


globals_ = [layer for layer in layers if layer[0] != "sliding_window"]
locals_ = [layer for layer in layers if layer[0] == "sliding_window"]
plt = plots()
figure, ax = plt.subplots(figsize=(10, 4.4))
ax.loglog(contexts, [stored(globals_[:1], S) * len(layers) for S in contexts], label="if all layers kept everything")
ax.loglog(contexts, [stored(layers, S) for S in contexts], label="as it is: 52 layers with a window, 10 without")
ax.loglog(contexts, [stored(locals_, S) for S in contexts], label="its 52 layers with a window alone")
ax.set(xlabel="tokens in the row", ylabel="GiB of cache, Gemma-3-27B", xlim=(256, 131_072))
ax.legend(frameon=False)
plt.show()

# %%
questions("sliding_window")

# %% [markdown]
# ## What a head does with nothing to do
#
# The weights of a softmax are positive and have sum 1. So a head always adds *something*, also for a token for which it
# has nothing to say. Does that matter? Let one head learn a task in which it often has nothing to say.
#
# A sequence has a first token, six *facts*, each a letter with four random numbers (its *note*), and six *questions*.
# Half of the questions ask for a letter, and the head is to give the note of that fact. The others are *idle*: the
# answer is 0. Every token but the first carries a random note, so looking at any of them adds noise.

# %%
FACTS, NOTE = 6, 4
TOKENS = 1 + 2 * FACTS


def lesson(key):
    """(tokens T D, the answers that are wanted) of one sequence."""
    one, two, three, four = jax.random.split(key, 4)
    letters, asked = jax.random.permutation(one, FACTS), jax.random.randint(two, (FACTS,), 0, FACTS)
    idle = jax.random.bernoulli(three, 0.5, (FACTS,))
    notes = jax.random.normal(four, (2 * FACTS, NOTE))
    kind = jnp.concatenate([jnp.zeros(1), jnp.full(FACTS, 1), jnp.where(idle, 3, 2)])
    letter = jnp.concatenate([jnp.full(1, -1), letters, jnp.where(idle, -1, letters[asked])])  # one_hot(-1) is all 0
    note = jnp.concatenate([jnp.zeros((1, NOTE)), notes])
    tokens = jnp.concatenate([jax.nn.one_hot(kind, 4), jax.nn.one_hot(letter, FACTS), note], axis=-1)
    return tokens, jnp.where(idle[:, None], 0, notes[asked])


def head(p, x, seen):
    """(outputs, weights); with "sink" in the parameters the weights have a last column without a value."""
    logits = jnp.where(seen, (x @ p["wq"]) @ (x @ p["wk"]).T * 8**-0.5, -jnp.inf)
    if "sink" in p:
        logits = jnp.concatenate([logits, jnp.full((len(x), 1), p["sink"])], axis=-1)
    weights = jax.nn.softmax(logits)
    return weights[:, : len(x)] @ (x @ p["wv"]) @ p["wo"], weights


@jax.jit
def loss(p, key, seen):
    x, want = jax.vmap(lesson)(jax.random.split(key, 64))
    out, _ = jax.vmap(lambda x: head(p, x, seen))(x)
    return ((out[:, 1 + FACTS :] - want) ** 2).mean()


@jax.jit
def train(p, seen):
    def down(p, key):
        return jax.tree.map(lambda w, slope: w - 3.0 * slope, p, jax.grad(loss)(p, key, seen)), None

    return jax.lax.scan(down, p, jax.random.split(jax.random.key(9), 400))[0]


D = 4 + FACTS + NOTE
sizes = {"wq": (D, 8), "wk": (D, 8), "wv": (D, 8), "wo": (8, NOTE)}
start = {n: jax.random.normal(jax.random.key(i), s) * s[0] ** -0.5 for i, (n, s) in enumerate(sizes.items())}
causal = jnp.tril(jnp.ones((TOKENS, TOKENS), bool))
evicted = causal.at[1:, 0].set(False)  # the first token has fallen out of the window
with_first = train(start, causal)
test = jax.random.key(1)
wanted = jax.vmap(lesson)(jax.random.split(test, 64))[1]
print(f"mean square error of an answer that is always 0: {(wanted**2).mean():.2f}")
print(f"untrained {loss(start, test, causal):.2f}, trained {loss(with_first, test, causal):.2f}", end=", ")
print(f"then the first token is taken away: {loss(with_first, test, evicted):.2f}")

# %% [markdown]
# The head learnt the task, and taking away one token breaks it, a token that says nothing. It is not that the head
# misses something to read there. Look at the weights, in the left two panels below: an idle question puts its weight on
# the first token, whose value is 0; that is how it says nothing. With that token gone, the same weight has to go
# somewhere, and the output is whatever lies there. In large models the first tokens are used so too, whatever they are
# (Xiao et al. 2023, the StreamingLLM paper), since every later token sees them. A window throws them out when token W
# comes.
#
# ## Answer 1: a logit that is learnt
#
# Give the softmax one more logit, sigma, with no value behind it:
#
#     p_s = exp(l_s) / (exp(sigma) + sum over u of exp(l_u))
#
# The weights may now have a sum below 1; the rest goes to the sink. Train anew, the first token never in sight, once
# with such a sink and once without:

# %%
with_sink = train(start | {"sink": jnp.float32(0)}, evicted)
with_neither = train(start, evicted)
print(f"never a first token: {loss(with_neither, test, evicted):.2f}", end=", ")
print(f"and with a sink: {loss(with_sink, test, evicted):.2f} (it came to be {with_sink['sink']:.1f})")

# %%
x_one, _ = lesson(jax.random.key(6))
names = ["first", *(f"fact {'abcdef'[i]}" for i in x_one[1:7, 4:10].argmax(axis=-1))]
rows = ["idle" if x_one[t, 3] else f"asks {'abcdef'[int(x_one[t, 4:10].argmax())]}" for t in range(7, 13)]
panels = {
    "first token in sight": (with_first, causal), "taken away": (with_first, evicted), "a sink": (with_sink, evicted)
}  # fmt: skip
figure, axes = plt.subplots(1, 3, figsize=(10, 4.6))
for ax, (title, (p, seen)) in zip(axes, panels.items(), strict=True):
    columns = [*names, *rows]
    weights = np.array(head(p, x_one, seen)[1])[7:]
    weights[:, :TOKENS][~np.asarray(seen[7:])] = np.nan
    image = ax.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    ax.set_facecolor("#bbbbbb")  # shows through where the mask is
    columns += ["sink"] * (weights.shape[1] - TOKENS)
    ax.set_xticks(range(len(columns)), columns, rotation=90, fontsize=12)
    ax.set_yticks(range(6), rows if ax is axes[0] else [""] * 6, fontsize=12)
    ax.set_title(title, fontsize=14)
figure.colorbar(image, ax=axes, label="weight")
plt.show()

# %% [markdown]
# Left and right: idle questions put their weight on the first token, or on the sink. Middle: on notes that they have no
# use for. (Grey is masked.)
#
# A sink is one number a head and lies with the model's weights; the cache is that of the window or of the full
# attention below it. Nothing has to be attended to anew, either. If `out` and lse = log(sum of exp(l)) of a query are
# known, the sink shrinks the output by exp(lse) / (exp(lse) + exp(sigma)):

# %%
att_sinks = jforge.get("sinks")
with_sinks = att_sinks.Config(hidden_size=16, num_attention_heads=2, num_key_value_heads=2, sliding_window=6)
w_sinks = w | {"sinks": jnp.array([0.5, 3.0])}  # a logit for each of the two heads


def shrunk(w, x, seen):
    q, k, v = (jnp.einsum("td,dnh->tnh", x, w[name]) for name in ("wq", "wk", "wv"))
    logits = jnp.einsum("tnh,snh->nts", q, k) * q.shape[-1] ** -0.5
    lse = jax.nn.logsumexp(jnp.where(seen, logits, -jnp.inf), axis=-1).T  # T N
    out = attend(q, k, v, seen) * jax.nn.sigmoid(lse - w["sinks"])[..., None]
    return jnp.einsum("tnv,nvd->td", out, w["wo"])


print("as in the package:", close(shrunk(w_sinks, x[0], window(14, 6)), att_sinks.forward(w_sinks, with_sinks, x)[0]))
print("its cache costs what the ring costs:", att_sinks.cost(with_sinks, context=50) == att.cost(small, context=50))

# %%
questions("sinks", att_sinks.models["gpt-oss-120b window"])

# %% [markdown]
# ## Answer 2: keep the first tokens
#
# A model that was trained without a sink has made its own, the first tokens. *StreamingLLM* keeps them: the first s
# tokens stay, and a ring of R slots turns behind them. What is lost is the middle.
#
# One more question arises: how far away are the first tokens? With RoPE a logit depends on the distance of query and
# key, and a model that runs for a million tokens would meet distances that it has never seen. StreamingLLM counts
# positions *inside the cache*: the kept tokens have positions 0, 1, ..., as if the middle had never been there. As a
# definition, for one query after the other:


# %%
@jaxtyped(typechecker=beartype)
def rotate(x: Float[Array, "T N H"], p: Int[Array, "T"]) -> Float[Array, "T N H"]:
    """RoPE, with channels j and j + H / 2 as one pair."""
    half = x.shape[-1] // 2
    turn = jnp.exp(1j * p[:, None, None] * 1e4 ** (-jnp.arange(half) / half))
    pairs = (x[..., :half] + 1j * x[..., half:]) * turn
    return jnp.concatenate([pairs.real, pairs.imag], axis=-1)


def kept(T, start, recent):
    t, s = jnp.arange(T)[:, None], jnp.arange(T)
    return window(T, recent) | ((s <= t) & (s < start))


@jax.jit
def streaming(w, x, seen):
    q, k, v = (jnp.einsum("td,dnh->tnh", x, w[name]) for name in ("wq", "wk", "wv"))

    def one(q, seen):  # seen: S, the keys that this query finds in the cache
        inside = jnp.cumsum(seen) - 1  # the position of each of them inside the cache; the query's is the last one
        return attend(rotate(q[None], inside[-1:]), rotate(k, inside), v, seen[None])[0]

    return jnp.einsum("tnv,nvd->td", jax.vmap(one)(q, seen), w["wo"])


att_streaming = jforge.get("streaming")
rope = {"rope_type": "default", "rope_theta": 1e4}
stream = att_streaming.Config(
    hidden_size=16, num_attention_heads=2, num_key_value_heads=2, start_size=2, recent_size=4, rope_parameters=rope
)
y, prompt = att_streaming.prefill(w, stream, x[:, :9], att_streaming.init_cache(stream, 1, 16, jnp.float32))
y_rest, _ = att_streaming.decode(w, stream, x[:, 9:], prompt)
want = streaming(w, x[0], kept(14, 2, 4))
print("prefill and five steps:", close(jnp.concatenate([y, y_rest], axis=1)[0], want))

# %% [markdown]
# Our definition rotates every key anew in every step. The package does not. Distances among the recent tokens are the
# true ones anyway; only the first tokens come nearer, by the number of tokens that were evicted. So the keys stay as
# they are stored, and the first s of them meet a *second* copy of the query, rotated by that much less. Two attends,
# one softmax: their outputs are merged by their lse (01A, exercise 4).
#
# Expect two columns that are only read, and a ring of four that turns behind them:

# %%
picture(
    watch(att_streaming, w, stream, x[:, 9:], prompt), "five steps after 9 tokens: 2 first slots, 4 recent", first=9
)

# %%
questions("streaming")

# %% [markdown]
# ## Exercises
#
# Set the answer, run the two cells. A function is called by the second one.
#
# **1.** A ring has 8 slots, and tokens 0 to 20 have come. Which positions lie in slots 0 to 7? Give a list.

# %%
answer_1 = None

# %% tags=["solution"]
answer_1 = [max(p for p in range(21) if p % 8 == slot) for slot in range(8)]

# %%
exercise(1, answer_1, "4ee10c133caa")

# %% [markdown]
# **2.** Write `answer_2(p, start, recent)`: the slots of the tokens at positions p, an array, in a StreamingLLM cache.

# %%
answer_2 = None


# %% tags=["solution"]
def answer_2(p, start, recent):
    return jnp.where(p < start, p, start + (p - start) % recent)


# %%
exercise(2, answer_2, "04eea6278a58", jnp.array([1, 3, 7, 8, 100]), 3, 5)

# %% [markdown]
# **3.** Mistral-7B-v0.1 has 32 layers. How many bytes does the cache of one row take at most, in bfloat16?

# %%
answer_3 = None

# %% tags=["solution"]
answer_3 = 32 * sum(att.cost(cfg, context=100_000).stored.values())

# %%
exercise(3, answer_3, "d831f6ed85f9")

# %% [markdown]
# **4.** How many layers with W = 4,096 does it take at least, so that the last output can depend on 32,768 tokens?

# %%
answer_4 = None

# %% tags=["solution"]
answer_4 = next(n for n in range(1, 100) if n * (4096 - 1) + 1 >= 32_768)

# %%
exercise(4, answer_4, "d1601274d0be")

# %% [markdown]
# **5.** A query sees 8 keys, all with the logit 1. Its head has the sink sigma = 4. Which share of the weight goes to
# the sink?

# %%
answer_5 = None

# %% tags=["solution"]
answer_5 = float(jnp.exp(4) / (jnp.exp(4) + 8 * jnp.exp(1)))

# %%
exercise(5, answer_5, "eac210a7793a")
