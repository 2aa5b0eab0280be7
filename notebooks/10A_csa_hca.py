# %% [markdown]
# # 10A. CSA and HCA: several tokens in one entry
#
# The sparse methods of notebooks 08A and 09A read little and keep everything. DeepSeek-V4 keeps less: m neighbouring
# tokens are pooled into *one entry*, and the tokens themselves go. What is lost is detail, and detail matters most for
# the newest tokens. So a layer has two parts: a *window* with each of the last W tokens, and the entries of all
# complete blocks of m tokens. One softmax runs over both.
#
# There are two kinds of such layers. HCA, heavily compressed attention, has m = 128 and reads all entries. CSA,
# compressed sparse attention, has m = 4, which leaves many entries; an indexer picks some of them.
#
# Letters: S tokens, N query heads of H channels, W tokens of the window, m tokens of a block, E complete blocks, u and
# z two vectors of X channels that a token leaves for the entry; t is the position of a query, s that of a token, w that
# of an entry.

# %%
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from beartype import beartype
from jaxtyping import Array, Bool, Float, jaxtyped

import jforge
from jforge.core import compare
from jforge.lessons import exercise, picture, plots, questions, reveal, watch

jax.config.update("jax_default_matmul_precision", "highest")  # a GPU may otherwise round products to fewer digits
jnp.set_printoptions(precision=3, suppress=True)

# %% [markdown]
# ## An entry of m tokens
#
# Each token gives a value u and a score z, both with X channels. An entry is the average of the m values, weighted by a
# softmax of the scores, *channel by channel*: in one channel the first token may count, in another one the last.


# %%
@jaxtyped(typechecker=beartype)
def pool(u: Float[Array, "E M X"], z: Float[Array, "E M X"]) -> Float[Array, "E X"]:
    return (jax.nn.softmax(z, axis=1) * u).sum(axis=1)


u = jnp.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0]])[None]  # one block of four tokens, two channels
z = jnp.array([[0.0, 9.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])[None]
print("equal scores give the mean, a high one gives its token:", pool(u, z)[0])

# %% [markdown]
# HCA does this with blocks that do not overlap. CSA's blocks are small, and a cut every four tokens would tear apart
# what belongs together. So an entry of CSA pools 2m tokens: those of its own block and those of the block before. Each
# token therefore has two series of channels: the first one is for the entry of the *next* block, the second for its
# own.


# %%
@jaxtyped(typechecker=beartype)
def hca_entries(u: Float[Array, "S X"], z: Float[Array, "S X"], m: int) -> Float[Array, "E X"]:
    E = len(u) // m  # what is left over waits until its block is complete
    return pool(u[: E * m].reshape(E, m, -1), z[: E * m].reshape(E, m, -1))


@jaxtyped(typechecker=beartype)
def csa_entries(u: Float[Array, "S XX"], z: Float[Array, "S XX"], m: int) -> Float[Array, "E X"]:
    E, X = len(u) // m, u.shape[1] // 2

    def rows(a, nothing):
        a = a[: E * m].reshape(E, m, 2 * X)
        before = jnp.concatenate([jnp.full((1, m, X), nothing), a[:-1, :, :X]])  # block 0 has none before it
        return jnp.concatenate([before, a[:, :, X:]], axis=1)

    return pool(rows(u, 0.0), rows(z, -jnp.inf))


m, X = 4, 3
u, z = (jax.random.normal(jax.random.key(i), (22, 2 * X)) for i in (0, 1))
print("22 tokens make", hca_entries(u, z, m).shape[0], "entries of HCA and", csa_entries(u, z, m).shape[0], "of CSA")

# %% [markdown]
# ## The state between steps
#
# In decode the tokens come one at a time, and an entry can only be made when its block is complete. Until then the rows
# u and z of the open block have to be kept, and in CSA those of the block before as well. That is the *state*: 2m rows
# in CSA. Row m + t mod m is written by token t. When the block is complete, an entry is made, and the lower half moves
# up.


# %%
@jaxtyped(typechecker=beartype)
def csa_step(
    state: Float[Array, "2 rows XX"], u: Float[Array, "XX"], z: Float[Array, "XX"], t: int, m: int
) -> tuple[Float[Array, "2 rows XX"], Float[Array, "X"] | None]:
    """(state, the entry that token t completes or None)"""
    X = u.shape[0] // 2
    state = state.at[:, m + t % m].set(jnp.stack([u, z]))
    if (t + 1) % m:
        return state, None
    rows = jnp.concatenate([state[:, :m, :X], state[:, m:, X:]], axis=1)
    return state.at[:, :m].set(state[:, m:]), pool(*rows[:, None])[0]


def close(a, b):
    return compare.relative(a, b) <= compare.OUT["float32"]


state = jnp.stack([jnp.zeros((2 * m, 2 * X)), jnp.full((2 * m, 2 * X), -jnp.inf)])  # -inf: no token there yet
made = []
for t in range(22):
    state, entry = csa_step(state, u[t], z[t], t, m)
    if entry is not None:
        made.append(entry)
print("one token at a time, and all at once:", close(jnp.stack(made), csa_entries(u, z, m)))

# %% [markdown]
# The state does not grow, but a step writes to it, and every m-th step reads all of it. It is kept in float32: what is
# rounded here would be in the entry for good.
#
# ## One vector for key and value
#
# A token of the window is *one* vector, key and value of all heads; so is an entry. Its last R channels are turned by
# an angle in proportion to its position (*rotary positions*: turned by s and by t, a product of two vectors depends on
# s - t alone). That is right for a key. But now the value is turned too, by s, and the output would depend on where in
# the text all this happens. DeepSeek turns the *output* back by the query's position: what is left of a value's turn is
# s - t.


# %%
def turn(x, positions, R):
    """Turn the last R channels of x (T ... H), in pairs of neighbours; negative positions turn back."""
    theta = 1e4 ** (-jnp.arange(0, R, 2) / R)
    angle = (positions[:, None] * theta).reshape(len(x), *(1,) * (x.ndim - 2), -1)
    a, b = x[..., -R::2], x[..., 1 - R :: 2]
    pairs = jnp.stack([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], axis=-1)
    return jnp.concatenate([x[..., :-R], pairs.reshape(*a.shape[:-1], R)], axis=-1)


@jaxtyped(typechecker=beartype)
def attend(
    q: Float[Array, "T N H"], rows: Float[Array, "S H"], visible: Bool[Array, "T S"], sinks: Float[Array, "N"]
) -> Float[Array, "T N H"]:
    """One softmax over rows that are keys and values; a sink is one more logit, whose value is 0."""
    logits = jnp.einsum("tnh,sh->tns", q, rows) * q.shape[-1] ** -0.5
    logits = jnp.where(visible[:, None], logits, -jnp.inf)
    sinks = jnp.broadcast_to(sinks[:, None], (*logits.shape[:2], 1))
    weights = jax.nn.softmax(jnp.concatenate([logits, sinks], axis=-1))[..., :-1]
    return jnp.einsum("tns,sh->tnh", weights, rows)


T, N, H, R = 6, 2, 8, 4
q, rows = jax.random.normal(jax.random.key(2), (T, N, H)), jax.random.normal(jax.random.key(3), (T, H))
causal, sinks = jnp.tril(jnp.ones((T, T), bool)), jnp.zeros(N)


def at(first):
    """(as it comes, turned back) of the same tokens at positions first, first + 1, ..."""
    t = first + jnp.arange(T)
    out = attend(turn(q, t, R), turn(rows, t, R), causal, sinks)
    return out, turn(out, -t, R)


for name, here, there in zip(("as it comes", "turned back"), at(0), at(100), strict=True):
    print(f"{name}: the same 100 tokens later: {close(here, there)}")

# %% [markdown]
# (A sink lets a head attend to nothing; notebook 07A.)
#
# ## Who sees what
#
# The token at t sees the W last tokens, itself among them, and the entries of all blocks that are complete, its own
# block if it is the last token of it. So tokens of the open block are seen only if they are in the window. Here W = 6
# and m = 4, on 24 tokens:

# %%
W, T = 6, 24
t, s, w = jnp.arange(T)[:, None], jnp.arange(T), jnp.arange(T // m)
near = (s <= t) & (s > t - W)
far = (w + 1) * m <= t + 1
plt = plots()
figure, axes = plt.subplots(1, 2, figsize=(10, 5.2), width_ratios=[24, 7], sharey=True)
shades = plt.matplotlib.colors.ListedColormap(["white", "#56b4e9", "#009e73"])
edges = {"cmap": shades, "vmin": 0, "vmax": 2, "edgecolors": "#bbbbbb", "linewidth": 0.5}
axes[0].pcolormesh(near.astype(int), **edges)
axes[1].pcolormesh(2 * far.astype(int), **edges)
for ax, name, count in ((axes[0], "token s", T), (axes[1], "entry w", T // m)):
    ax.set(xlabel=name, xticks=np.arange(0, count, 4 if count > 6 else 1) + 0.5, ylim=(T, 0))
    ax.set_xticklabels(range(0, count, 4 if count > 6 else 1))
axes[0].set(ylabel="query t", yticks=np.arange(0, T, 4) + 0.5, yticklabels=range(0, T, 4), title="window")
axes[1].set_title("entries")
plt.show()

# %% [markdown]
# Row t is all that query t sees. (HCA reads all of it, CSA picks among the entries.) The newest tokens are there twice,
# in the window and in an entry: that is allowed, they are different vectors. Reading on, every fourth row has one entry
# more; in row 3 the first one is there, since token 3 completes block 0.
#
# ## Against the package
#
# The whole layer, `hca` and `csa`. Beside what stands above: the query comes from a small latent c_q and each head of
# it is divided by its root mean square (`rms`), as are tokens and entries; an entry is turned at the position of its
# first token; the score z has a learned bias for each of the m places; the heads' outputs go down in g groups. CSA's
# indexer is that of notebook 09A, with one index key for each entry, pooled in the same way with parameters of its own
# (`ic`).


# %%
def rms(x, weight=1.0):
    return x / jnp.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * weight


def entries_of(p, prefix, x, m, R, make):
    z = x @ p[f"w{prefix}_gate"] + p[f"{prefix}_bias"][jnp.arange(len(x)) % m]
    made = rms(make(x @ p[f"w{prefix}_kv"], z, m), p[f"{prefix}_norm"])
    return turn(made, jnp.arange(len(made)) * m, R)


def layer(p, cfg, x, sparse):
    """One row, T D."""
    T, R, m = len(x), cfg.qk_rope_head_dim, cfg.compress_rate
    t, s = jnp.arange(T), jnp.arange(T)
    c_q = rms(x @ p["wq_a"], p["q_norm"])
    q = turn(rms(jnp.einsum("tl,lnh->tnh", c_q, p["wq_b"])), t, R)
    window = turn(rms(x @ p["wkv"], p["kv_norm"]), t, R)
    near = (s <= t[:, None]) & (s > t[:, None] - cfg.sliding_window)

    entries = entries_of(p, "c", x, m, R, csa_entries if sparse else hca_entries)
    far = (jnp.arange(len(entries)) + 1) * m <= t[:, None] + 1
    if sparse:
        k_index = entries_of(p, "ic", x, m, R, csa_entries)
        q_index = turn(jnp.einsum("tl,lij->tij", c_q, p["wq_index"]), t, R)
        a = x @ p["ww_index"]
        scores = jnp.einsum("ti,tiw->tw", a, jnp.maximum(jnp.einsum("tij,wj->tiw", q_index, k_index), 0))
        picks = jax.lax.top_k(jnp.where(far, scores, -jnp.inf), cfg.index_topk)[1]
        far = far & (picks[..., None] == jnp.arange(len(entries))).any(axis=1)

    rows, visible = jnp.concatenate([window, entries]), jnp.concatenate([near, far], axis=1)
    out = turn(attend(q, rows, visible, p["sinks"]), -t, R)
    grouped = out.reshape(T, cfg.o_groups, -1, out.shape[-1])
    return jnp.einsum("tgnh,gnho,god->td", grouped, p["wo_a"], p["wo_b"])


sizes = {
    "hidden_size": 24, "num_attention_heads": 4, "head_dim": 12, "qk_rope_head_dim": 4, "q_lora_rank": 10,
    "o_groups": 2, "o_lora_rank": 6, "sliding_window": W, "compress_rate": m, "rope_parameters": {"rope_theta": 1e4},
}  # fmt: skip
indexer = {"index_n_heads": 8, "index_head_dim": 6, "index_topk": 2}
configs = {"hca": jforge.get("hca").Config(**sizes), "csa": jforge.get("csa").Config(**sizes, **indexer)}
params = {name: jforge.get(name).init_params(jax.random.key(4), cfg) for name, cfg in configs.items()}
x = jax.random.normal(jax.random.key(5), (1, 24, 24))  # one row of 24 tokens


def both(name, p, x):
    """(forward, the same by a prefill of all but the last token and a decode step)"""
    att, cfg = jforge.get(name), configs[name]
    start, cache = att.prefill(p, cfg, x[:, :-1], att.init_cache(cfg, 1, 24, jnp.float32))
    last, _ = att.decode(p, cfg, x[:, -1:], cache)
    return att.forward(p, cfg, x), jnp.concatenate([start, last], axis=1)


for name, p in params.items():
    want = jax.jit(layer, static_argnums=(1, 3))(p, configs[name], x[0], name == "csa")
    got = jax.jit(both, static_argnums=0)(name, p, x)
    print(name, *(close(y[0], want) for y in got))

# %% [markdown]
# ## What a step touches
#
# CSA, five decode steps after 13 tokens, with two picks. `watch` found out by experiment what is read.

# %%
att, cfg = jforge.get("csa"), configs["csa"]
prefill = jax.jit(att.prefill, static_argnums=1)
_, prompt = prefill(params["csa"], cfg, x[:, :13], att.init_cache(cfg, 1, 24, jnp.float32))
picture(watch(att, params["csa"], cfg, x[:, 13:18], prompt), "CSA: W = 6, m = 4, two entries are picked", first=13)

# %% [markdown]
# `kv` is the ring of the window: each step writes over the oldest token, which is lost, and reads all of the ring.
# `c_kv` are the entries: two are read, and the step of token 15 writes one. Of `k_index`, one for each entry, all are
# read. The states change in every step. With HCA the panel of `c_kv` would look like that of `k_index`: all are read,
# and there is no index.

# %%
questions("csa")

# %% [markdown]
# ## Bytes
#
# DeepSeek-V4-Flash has 43 layers: two with a window alone, and then CSA and HCA in turn. Its config.json is in the
# package, as is that of Llama-3.1-8B, whose 32 layers keep 4,096 bytes a token each.
#
# Predict: how many times more than V4-Flash does Llama-3.1-8B keep for one row of 1,048,576 tokens, in all layers?

# %% tags=["predict"]
guess = None

# %%
configs_folder = Path(jforge.__file__).parent / "configs"


def layers(name):
    return jforge.hf.layers(jforge.hf.load(configs_folder / f"{name}.json"))


def gib(name, S, what):
    costs = [jforge.get(mechanism).cost(cfg, context=S) for mechanism, cfg in layers(name)]
    return sum(sum(getattr(cost, what).values()) for cost in costs) / 2**30


S = 1_048_576
reveal(gib("llama-3.1-8b", S, "stored") / gib("deepseek-v4-flash", S, "stored"), guess)
for name in ("llama-3.1-8b", "deepseek-v4-flash"):
    kinds = [mechanism for mechanism, _ in layers(name)]
    print(name, {kind: kinds.count(kind) for kind in sorted(set(kinds))})
    print(f"    stored {gib(name, S, 'stored'):6.1f} GiB, read a step {gib(name, S, 'read'):6.2f} GiB")

# %% [markdown]
# Which layers does it come from? One layer of each kind (bfloat16; the states are float32):

# %%
flash = {name: jforge.get(name).models["DeepSeek-V4-Flash"] for name in ("v4_window", "csa", "hca")}
for name, cfg in flash.items():
    cost = jforge.get(name).cost(cfg, context=S)
    parts = ", ".join(f"{n} {b / 2**20:.2f}" for n, b in cost.read.items())
    print(f"{name:9} stored {sum(cost.stored.values()) / 2**20:7.1f} MiB; read, in MiB: {parts}")

# %%
tokens = np.geomspace(1024, 2**20, 50).astype(int)
plt.figure(figsize=(10, 4.6))
shown = {"mla": jforge.get("mla").models["DeepSeek-V3"], "dsa": jforge.get("dsa").models["DeepSeek-V3.2"], **flash}
for name, cfg in shown.items():
    reads = [sum(jforge.get(name).cost(cfg, context=int(S)).read.values()) / 2**20 for S in tokens]
    plt.loglog(tokens, reads, label=name)
plt.xlabel("tokens so far, S")
plt.ylabel("MiB read a step and layer")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# Up to some ten thousand tokens HCA costs little more than its window; then it follows its entries, one for every 128
# tokens. CSA follows its index, one key of 128 channels for every m = 4 tokens: a quarter of what DSA scans. Both lines
# still rise in proportion to S in the end; nothing here is free of S but the window.
#
# ## Exercises
#
# Set the answer, run the two cells. A function is called by the second one.
#
# **1.** Positions begin with 0, m = 4. How many entries does the query at t = 1,002 see?

# %%
answer_1 = None

# %% tags=["solution"]
answer_1 = (1002 + 1) // 4

# %%
exercise(1, answer_1, "d7f7f7392f97")

# %% [markdown]
# **2.** HCA has m = 128. How many tokens must the window have at least, so that at every t each token up to t is seen,
# by itself or in an entry?

# %%
answer_2 = None

# %% tags=["solution"]
answer_2 = max(t + 1 - (t + 1) // 128 * 128 for t in range(1000))

# %%
exercise(2, answer_2, "f72108c079e6")

# %% [markdown]
# **3.** Which tokens are pooled in entry w of CSA? Write `answer_3(w, m)`: their positions, ascending.

# %%
answer_3 = None


# %% tags=["solution"]
def answer_3(w, m):
    return list(range(max(0, (w - 1) * m), (w + 1) * m))


# %%
exercise(3, answer_3, "49b52afd6b74", 5, 3)

# %% [markdown]
# **4.** Write `answer_4(q, window, entries, sink)` for one query and one head: q is H, window is W x H, entries is E x
# H, all of them visible, sink a number. Compute the output over the window and the one over the entries each with a
# softmax of its own, and join them so that the result is that of one softmax with the sink. Give the output, H.

# %%
answer_4 = None


# %% tags=["solution"]
def answer_4(q, window, entries, sink):
    def part(rows):
        logits = rows @ q * len(q) ** -0.5
        return jax.nn.softmax(logits) @ rows, jnp.exp(logits).sum()

    (near, a), (far, b) = part(window), part(entries)
    return (a * near + b * far) / (a + b + jnp.exp(sink))


# %%
exercise(
    4,
    answer_4,
    "cab3a128894f",
    jnp.array([1.0, -1.0, 0.5, 2.0]),
    jnp.eye(4)[:3] * 2,
    jnp.arange(8.0).reshape(2, 4) / 4,
    0.3,
)

# %% [markdown]
# **5.** A CSA layer of V4-Flash: from how many tokens on does a step read more bytes of index keys than of everything
# else together? (Take a step that completes no block, and only lengths S that are multiples of 4.)

# %%
answer_5 = None

# %% tags=["solution"]
csa = jforge.get("csa")


def scanned_and_rest(S):
    read = csa.cost(csa.models["DeepSeek-V4-Flash"], context=S).read
    return read["k_index"], sum(read.values()) - read["k_index"]


answer_5 = next(S for S in range(4, 10**6, 4) if scanned_and_rest(S)[0] > scanned_and_rest(S)[1])

# %%
exercise(5, answer_5, "b035a707a38b")
