# %% [markdown]
# # 08A. Blocks: a fixed pattern, MoBA, NSA
#
# A query needs few of the tokens before it. To read few, it must know which ones without reading all. Three answers,
# all of which take tokens in *blocks*, M neighbours at a time, because it is less work to find and to bring in a block
# than its tokens one by one:
#
# - a **fixed pattern**: which blocks a query reads follows from its position alone;
# - **MoBA** (mixture of block attention): the mean of a block's keys stands for the block, and each query reads the
#   blocks whose means fit it best;
# - **NSA** (native sparse attention): short pieces of the past are compressed to one entry each; a query attends to the
#   entries, reads the blocks whose entries got most of its weight, and the newest tokens, and mixes the three.
#
# Letters: T queries, S tokens in the cache, M tokens of a block, E blocks or entries, N query heads, G of which share a
# key head, L blocks in the list of a query; H channels of a key, V of a value, D of a token. t is the position of a
# query, s that of a key.

# %%
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
# ## Attention over a list of blocks
#
# Whoever makes the lists, they are used in the same way. `attend` is the core of notebook 01A for N heads that share
# one key head; a query that sees nothing gives 0. `in_blocks` turns lists into a mask, with -1 for "no block".
# `gathered` gives the same result and reads the listed blocks alone.


# %%
@jaxtyped(typechecker=beartype)
def attend(
    q: Float[Array, "N T H"], k: Float[Array, "S H"], v: Float[Array, "S V"], visible: Bool[Array, "N T S"]
) -> tuple[Float[Array, "N T V"], Float[Array, "N T S"]]:
    """(out, weights)"""
    logits = jnp.einsum("nth,sh->nts", q, k) * q.shape[-1] ** -0.5
    some = visible.any(axis=-1, keepdims=True)
    weights = jnp.where(some, jax.nn.softmax(jnp.where(visible | ~some, logits, -jnp.inf)), 0)
    return jnp.einsum("nts,sv->ntv", weights, v), weights


@jaxtyped(typechecker=beartype)
def in_blocks(lists: Int[Array, "N T L"], M: int, S: int) -> Bool[Array, "N T S"]:
    s, t = jnp.arange(S), jnp.arange(lists.shape[1])[:, None]
    return (lists[..., None] == s // M).any(axis=2) & (s <= t)  # the query's own block is seen up to the query


@jaxtyped(typechecker=beartype)
def gathered(
    q: Float[Array, "N T H"], k: Float[Array, "S H"], v: Float[Array, "S V"], lists: Int[Array, "N T L"], M: int
) -> Float[Array, "N T V"]:
    slots = (jnp.maximum(lists, 0)[..., None] * M + jnp.arange(M)).reshape(*lists.shape[:2], -1)  # N T LM
    visible = (jnp.repeat(lists, M, axis=-1) >= 0) & (slots <= jnp.arange(q.shape[1])[:, None])
    logits = jnp.einsum("nth,ntlh->ntl", q, k[slots]) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf))
    return jnp.einsum("ntl,ntlv->ntv", weights, v[slots])


def close(a, b):
    return compare.relative(a, b) <= compare.OUT["float32"]


# %% [markdown]
# ## A fixed pattern
#
# A query in block i reads the first g blocks, since everybody may need the beginning; the last w up to its own; and r
# of those between, drawn once. Which blocks these are is settled before there is any data. (So do BigBird and, without
# the drawn ones, Longformer.)


# %%
def fixed(T, M, g, w, r):
    """The list of each query: int T L, -1 where there are fewer blocks."""
    lists = []
    for i in range(-(-T // M)):
        near = range(max(0, i - w + 1), i + 1)
        between = range(g, max(g, i - w + 1))
        drawn = np.random.default_rng([0, 0, i]).permutation(between)[:r]  # the same at every call
        blocks = sorted({*range(min(g, i + 1)), *near, *drawn.tolist()})
        lists.append(blocks + [-1] * (g + w + r - len(blocks)))
    return jnp.repeat(jnp.array(lists), M, axis=0)[:T]


T, M, N, H = 64, 4, 2, 16
q = jax.random.normal(jax.random.key(0), (N, T, H))
k, v = (jax.random.normal(jax.random.key(i), (T, H)) for i in (1, 2))
lists = jnp.stack([fixed(T, M, g=1, w=2, r=2)] * N)  # the same for both heads
print("the list of token 40:", lists[0, 40])
print("gathered = masked:", close(gathered(q, k, v, lists, M), attend(q, k, v, in_blocks(lists, M, T))[0]))

# %% [markdown]
# ## Chosen by means: MoBA
#
# The gate of a block is the query times the mean of its keys, the average logit of its tokens. Each head takes the
# `top` best blocks. Two rules come with that. The query's own block is always taken. And a past block counts only when
# it is complete: the mean of a block that holds later tokens would tell of the future.


# %%
def best(scores, count):
    """The `count` best of the last axis, best first; -1 where there are fewer that are not -inf."""
    values, blocks = jax.lax.top_k(scores, min(count, scores.shape[-1]))
    return jnp.where(jnp.isneginf(values), -1, blocks)


@jaxtyped(typechecker=beartype)
def moba(q: Float[Array, "N T H"], k: Float[Array, "S H"], M: int, top: int) -> Int[Array, "N T L"]:
    k = jnp.pad(k, ((0, -len(k) % M), (0, 0)))  # the last block may be partial; nobody asks for its mean
    E = len(k) // M
    means = k.reshape(E, M, -1).mean(axis=1)
    gates = jnp.einsum("nth,eh->nte", q, means)
    block, own = jnp.arange(E), jnp.arange(q.shape[1])[:, None] // M
    return best(jnp.where(block < own, gates, jnp.where(block == own, jnp.inf, -jnp.inf)), top)


by_means = moba(q, k, M, 5)
print("the lists of token 40:", *by_means[:, 40])
print("gathered = masked:", close(gathered(q, k, v, by_means, M), attend(q, k, v, in_blocks(by_means, M, T))[0]))

# %% [markdown]
# What can be lost? Hide one key that fits the query exactly, k = q, among random keys of H = 64 channels. Its logit is
# about 8, the others are about 0, give or take 1. Dense attention finds it. In the mean of M keys it is worth 8 / M,
# while the mean of M random logits is 0, give or take M^-1/2. There are 63 past blocks, and the best two are taken.
#
# Predict: with M = 64, in which share of the trials is the right block one of the two?

# %% tags=["predict"]
guess = None

# %%


def found(M, trials=400, blocks=63, channels=64):
    """The share of trials in which the block with the hidden key is among the best two."""

    def trial(key):
        one, two = jax.random.split(key)
        query = jax.random.normal(one, (channels,))
        logits = jax.random.normal(two, (blocks, M)) * jnp.linalg.norm(query)  # of random keys: normal numbers
        gates = logits.at[5, 0].set(query @ query).mean(axis=1)  # the mean of products is the product with the mean
        return (jax.lax.top_k(gates, 2)[1] == 5).any()

    return float(jax.lax.map(trial, jax.random.split(jax.random.key(M), trials), batch_size=100).mean())


shares = {M: found(M) for M in (1, 4, 16, 64)}
reveal(shares[64], guess)
print({M: round(share, 2) for M, share in shares.items()})

# %% [markdown]
# A guess without looking would be right in 2 of 63 trials, 3 %. The larger the block, the less one key can be seen in
# its mean. Real keys help: neighbours resemble each other, and a model that was trained with the means learns to place
# its keys so that means tell something. But a mean has no way to show one token that differs from the rest of its
# block. (MSA, in notebook 11A, takes a maximum.)
#
# ## Three branches: NSA
#
# NSA does not choose by an average of logits but by attention weights. Every d tokens a new entry begins; it is made
# from l tokens, so neighbours overlap. What makes an entry of l keys is learned; here it is a mean, after adding to
# each key a learned vector of its place in the entry (`pe`). The same is done with the values.
#
# - The *compressed* branch attends to the entries, each of which is visible from its last token on.
# - The *selected* branch reads blocks. The score of a block is the weight that the entries got, summed over all heads,
#   each entry counted by what it shares with the block. The first block and the two last ones are always among them.
# - The *window* reads the last w tokens.
#
# Three gates between 0 and 1 for each head and token, made from the token, mix the three outputs.


# %%
@jaxtyped(typechecker=beartype)
def compress(rows: Float[Array, "S H"], pe: Float[Array, "l H"], d: int) -> Float[Array, "E H"]:
    l = pe.shape[0]
    at = jnp.arange(max(0, (rows.shape[0] - l) // d + 1))[:, None] * d + jnp.arange(l)  # E l
    return (rows[at] + pe).mean(axis=1)


def shared(S, E, l, d, M):
    """float32 E x blocks: the tokens that an entry and a block have in common, divided by d."""
    first, s = jnp.arange(E)[:, None] * d, jnp.arange(S)
    entry = (s >= first) & (s < first + l)  # E S
    block = s[:, None] // M == jnp.arange(-(-S // M))  # S blocks
    return entry.astype(jnp.float32) @ block.astype(jnp.float32) / d


@jaxtyped(typechecker=beartype)
def nsa(
    q: Float[Array, "N T H"], k: Float[Array, "S H"], v: Float[Array, "S V"], pe_k: Float[Array, "l H"],
    pe_v: Float[Array, "l V"], gates: Float[Array, "N T 3"], d: int, M: int, top: int, w: int,
) -> tuple[Float[Array, "N T V"], Int[Array, "1 T L"]]:  # fmt: skip
    """(out, lists)"""
    N, (T, S), l = q.shape[0], (q.shape[1], k.shape[0]), pe_k.shape[0]
    t, s = jnp.arange(T)[:, None], jnp.arange(S)

    k_cmp, v_cmp = compress(k, pe_k, d), compress(v, pe_v, d)
    E = k_cmp.shape[0]
    visible = jnp.arange(E) * d + l - 1 <= t
    compressed, weights = attend(q, k_cmp, v_cmp, jnp.broadcast_to(visible, (N, T, E)))

    scores = weights.sum(axis=0) @ shared(S, E, l, d, M)  # T blocks: one list for all heads
    block, own = jnp.arange(scores.shape[1]), t // M
    scores = jnp.where((block == 0) | (block > own - 2), jnp.inf, scores)
    lists = best(jnp.where(block > own, -jnp.inf, scores), top)[None]
    selected, _ = attend(q, k, v, in_blocks(jnp.repeat(lists, N, axis=0), M, S))

    window, _ = attend(q, k, v, jnp.broadcast_to((s <= t) & (s > t - w), (N, T, S)))
    return gates[..., :1] * compressed + gates[..., 1:2] * selected + gates[..., 2:] * window, lists


print("what 9 entries of 4 tokens, every 2, share with 3 blocks of 8 tokens:")
print(shared(24, 9, 4, 2, 8).T)
zero = jnp.zeros((4, H))
_, by_entries = nsa(q, k, v, zero, zero, jnp.full((N, T, 3), 0.5), 2, M, 5, 6)
print("the list of token 40:", by_entries[0, 40])

# %% [markdown]
# Read the middle row: an entry that lies in the block counts twice as much as one that lies there by half. Side by
# side, for the same q and k, which tokens the first head reads:

# %%
plt = plots()
figure, axes = plt.subplots(1, 3, figsize=(10, 4.4), sharey=True)
near = jnp.tril(jnp.ones((T, T), bool)) & ~jnp.tril(jnp.ones((T, T), bool), -6)
panels = {
    "fixed pattern": in_blocks(lists, M, T)[0], "MoBA": in_blocks(by_means, M, T)[0],
    "NSA, blocks and window": in_blocks(by_entries, M, T)[0] + 2 * near,
}  # fmt: skip
for ax, (title, read) in zip(axes, panels.items(), strict=True):
    ax.imshow(np.minimum(read.astype(int), 2), cmap=plt.matplotlib.colors.ListedColormap(["white", "C0", "C1"]), vmax=2)
    ax.set(title=title, xlabel="token s", xticks=range(0, T + 1, 16), yticks=range(0, T + 1, 16))
    ax.plot([-0.5, 63.5], [-0.5, 63.5], color="#888888", linestyle=":", linewidth=1)
axes[0].set_ylabel("query t")
plt.show()

# %% [markdown]
# A block is four columns wide. On the left, all queries of a block read the same; in the middle, each query chooses
# alone. On the right, orange is the window, and what it covers is read by that branch as well; the first block and the
# last two are always blue or orange. The entries, which are no tokens, are not drawn.
#
# ## Against the package
#
# The three are `block_sparse`, `moba` and `nsa`. Each layer projects x to q, k and v and the heads' outputs back. No
# rotary positions here, and one key head (K = 1).

# %%
sizes = {"hidden_size": 24, "num_attention_heads": N, "num_key_value_heads": 1, "head_dim": H}
layers = {
    "block_sparse": {"block_size": M, "num_global_blocks": 1, "num_local_blocks": 2, "num_random_blocks": 2},
    "moba": {"moba_chunk_size": M, "moba_topk": 5},
    "nsa": {"kernel_size": 4, "kernel_stride": 2, "block_size": M, "topk": 5, "window_size": 6, "compress": "mean"},
}
x = jax.random.normal(jax.random.key(4), (1, 30, 24))  # one row of 30 tokens


def ours(name, w, x):
    q = jnp.einsum("td,dnh->nth", x, w["wq"])
    k, v = (x @ w[n][:, 0] for n in ("wk", "wv"))
    if name == "block_sparse":
        from jforge.attention.block_sparse import pattern  # its draws, from its own seeds

        lists = jnp.repeat(jnp.asarray(pattern(configs[name], -(-len(x) // M))), M, axis=1)[:, : len(x)]
        out, _ = attend(q, k, v, in_blocks(jnp.repeat(lists, N, axis=0), M, len(x)))
    elif name == "moba":
        out, _ = attend(q, k, v, in_blocks(moba(q, k, M, 5), M, len(x)))
    else:
        gates = jax.nn.sigmoid(jnp.einsum("td,dnc->ntc", x, w["wgate"]))
        out, _ = nsa(q, k, v, w["k_pe"][:, 0], w["v_pe"][:, 0], gates, 2, M, 5, 6)
    return jnp.einsum("ntv,nvd->td", out, w["wo"])


def theirs(name, w, x):
    """(forward, the same by a prefill of all but the last token and a decode step)"""
    att, cfg = jforge.get(name), configs[name]
    start, cache = att.prefill(w, cfg, x[:, :-1], att.init_cache(cfg, 1, 32, jnp.float32))
    last, _ = att.decode(w, cfg, x[:, -1:], cache)
    return att.forward(w, cfg, x), jnp.concatenate([start, last], axis=1)


configs = {name: jforge.get(name).Config(**sizes, **fields) for name, fields in layers.items()}
params = {name: jforge.get(name).init_params(jax.random.key(3), cfg) for name, cfg in configs.items()}
for name, w in params.items():
    want = jax.jit(ours, static_argnums=0)(name, w, x[0])
    got = jax.jit(theirs, static_argnums=0)(name, w, x)
    print(f"{name:13}", *(close(y[0], want) for y in got))

# %% [markdown]
# ## What a step touches
#
# MoBA, six decode steps after 16 tokens, with lists of two blocks. `watch` found out by experiment what was read.

# %%
att = jforge.get("moba")
cfg = att.Config(**sizes, moba_chunk_size=M, moba_topk=2)
prefill = jax.jit(att.prefill, static_argnums=1)
_, prompt = prefill(params["moba"], cfg, x[:, :16], att.init_cache(cfg, 1, 24, jnp.float32))
picture(watch(att, params["moba"], cfg, x[:, 16:22], prompt), "MoBA: two blocks for each of two heads", first=16)

# %% [markdown]
# The two heads read the new token's own block and one more each. In the step of token 16 they like different blocks, 0
# and 1; in that of token 17 both like block 2, which is read once. `k_mean` has an entry for each complete block: all
# of them are read, at every step. The step of token 19 completes block 4 and writes its mean; until then the sum of the
# open block waits in `k_sum`.
#
# NSA, with the window in the cache of the blocks and an entry of l = 4 tokens every d = 2:

# %%
att = jforge.get("nsa")
cfg = att.Config(**sizes, **{**layers["nsa"], "topk": 4, "window_size": 3})
prefill = jax.jit(att.prefill, static_argnums=1)
_, prompt = prefill(params["nsa"], cfg, x[:, :16], att.init_cache(cfg, 1, 24, jnp.float32))
picture(watch(att, params["nsa"], cfg, x[:, 16:21], prompt), "NSA: four blocks, a window of 3, all entries", first=16)

# %% [markdown]
# Of k and v four blocks are read: the first, the two last ones, and one that the entries chose. `k_cmp`, the entries:
# all are read, and every second step writes one. The tail holds the last l raw keys in a ring: each step writes over
# the oldest one, and a step that completes an entry reads them.
#
# No token was lost in either picture: a grey one may be read by a later query. All three save reads, not memory.

# %%
questions("nsa")

# %% [markdown]
# ## Reads
#
# The three on the heads of Llama-3.1-8B (N = 32, K = 8, H = V = 128), a step of one layer and row, in bfloat16. MoBA's
# and the pattern's sizes are those of the package's models, NSA's those of its paper.

# %%
import dataclasses

gqa = jforge.get("gqa")
llama = gqa.models["Llama-3.1-8B"]
fields = {f.name: getattr(llama, f.name) for f in dataclasses.fields(llama)}
paper = {"kernel_size": 32, "kernel_stride": 16, "block_size": 64, "topk": 16, "window_size": 512}
on_llama = {
    "gqa": llama, "block_sparse": next(iter(jforge.get("block_sparse").models.values())),
    "moba": next(iter(jforge.get("moba").models.values())), "nsa": jforge.get("nsa").Config(**fields, **paper),
}  # fmt: skip


def mib(name, S):
    cost = jforge.get(name).cost(on_llama[name], context=S)
    return sum(cost.stored.values()) / 2**20, sum(cost.read.values()) / 2**20


for name in on_llama:
    print(
        f"{name:13}",
        *(
            f"{S:>9,} tokens: stored {mib(name, S)[0]:7.1f}, read {mib(name, S)[1]:7.1f} MiB"
            for S in (131_072, 1_048_576)
        ),
    )

# %%
tokens = [int(S) for S in 4096 * np.arange(1, 257)[::3]]
plt.figure(figsize=(10, 4.4))
for name in on_llama:
    plt.loglog(tokens, [mib(name, S)[1] for S in tokens], label=name)
plt.xlabel("tokens in the cache, S")
plt.ylabel("MiB read a step")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# The pattern is flat: its price does not depend on S, nor does its choice on the data. NSA rises slowly with its
# entries, one for every 16 tokens. MoBA stays on the dense line for long: its blocks have 4,096 tokens, each of G = 4
# heads on a key head may choose others, and 4 x 12 blocks are more than there are. Beyond them it is flat but for its
# means.
#
# ## Exercises
#
# Set the answer, run the two cells. A function is called by the second one.
#
# **1.** From how many tokens on can a step of this MoBA (G = 4, 12 blocks of 4,096 tokens) be sure to read fewer keys
# and values than dense attention? Give the number of tokens at which all lists together are as long as the cache.

# %%
answer_1 = None

# %% tags=["solution"]
answer_1 = 4 * 12 * 4096

# %%
exercise(1, answer_1, "752b81e45afb")

# %% [markdown]
# **2.** How many entries does NSA have after 131,072 tokens, with l = 32 and d = 16?

# %%
answer_2 = None

# %% tags=["solution"]
answer_2 = (131_072 - 32) // 16 + 1

# %%
exercise(2, answer_2, "c72cb01232ba")

# %% [markdown]
# **3.** Write `answer_3(k, new, M)`: k is S x H, the keys of a cache, new is H, the key of the token after them. Give
# the means that MoBA may use for the query of the *new* token: the complete blocks before its own, E x H.

# %%
answer_3 = None


# %% tags=["solution"]
def answer_3(k, new, M):
    E = len(k) // M  # the new token is in block len(k) // M
    return k[: E * M].reshape(E, M, -1).mean(axis=1)


# %%
exercise(3, answer_3, "3345eef6720c", jnp.arange(14.0).reshape(7, 2) ** 2, jnp.array([3.0, 1.0]), 4)

# %% [markdown]
# **4.** In a strided pattern a query in block i reads its own block and every block j with (j + 1) mod 8 = 0, j <= i.
# Write `answer_4(i)`: its list, ascending.

# %%
answer_4 = None


# %% tags=["solution"]
def answer_4(i):
    return sorted({i, *(j for j in range(i + 1) if (j + 1) % 8 == 0)})


# %%
exercise(4, answer_4, "1778194cd917", 21)

# %% [markdown]
# **5.** A token can also reach a query through tokens between them, one layer after the other. Say each query reads its
# own block of M = 4 tokens and nothing else (w = 1, g = r = 0). After how many layers does the first of 64 tokens
# influence the last one? Answer 0 if it never does.

# %%
answer_5 = None

# %% tags=["solution"]
answer_5 = 0  # blocks do not overlap, so nothing leaves its own

# %%
exercise(5, answer_5, "c945a16e8a77")
