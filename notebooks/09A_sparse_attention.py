# %% [markdown]
# # 09A. DeepSeek sparse attention: index, pick, gather
#
# A decode step reads the whole cache (notebook 05A has the price), also what gets a weight near 0. If few tokens have
# most of the weight, it would be enough to read these. But which ones they are depends on the query, and who wants to
# know must look at all tokens first.
#
# DeepSeek-V3.2 looks twice. Every token leaves, beside its entry in the cache, a second, much smaller key: the *index
# key*. A step first *scans* all index keys and gives every token a score. It picks the L tokens of the highest score.
# Then it *gathers* the entries of these L alone and attends to them. The part that scores is called the *indexer*.
#
# Letters: T queries, S tokens in the cache, N query heads; I index heads of J channels; L tokens picked. t is the
# position of a query, s that of a key, i an index head.

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
# ## The indexer
#
# An index head scores a key by a product, as attention does, and throws away what is negative (*relu*: max(x, 0)). The
# query says with a weight w how much it trusts each head; a weight may be negative. No softmax, and no values: the
# result is one number for each pair of a query and a token, the same for all N heads of the attention that follows.


# %%
@jaxtyped(typechecker=beartype)
def index_scores(
    q: Float[Array, "T I J"], k: Float[Array, "S J"], w: Float[Array, "T I"], visible: Bool[Array, "T S"]
) -> Float[Array, "T S"]:
    products = jnp.maximum(jnp.einsum("tij,sj->tis", q, k), 0)
    scores = jnp.einsum("ti,tis->ts", w, products)
    return jnp.where(visible, scores, -jnp.inf)  # what is not seen must not be picked


T = S = 12
key_q, key_k, key_w = jax.random.split(jax.random.key(0), 3)
causal = jnp.tril(jnp.ones((T, S), bool))
q_index = jax.random.normal(key_q, (T, 8, 4))  # I = 8, J = 4
k_index = jax.random.normal(key_k, (S, 4))
w = jax.random.normal(key_w, (T, 8))
scores = index_scores(q_index, k_index, w, causal)
print("scores of query 3:", scores[3])

# %% [markdown]
# ## Top-k, and what a tie does
#
# Now the L best. Two things are easy to get wrong.
#
# The first tokens see fewer than L tokens. A top-k gives L picks all the same, the last of them with the score -inf.
# These must not be read: they become -1.
#
# And scores may be equal. Relu makes exactly 0 of everything negative, so a token which no head likes has the score 0,
# and there may be many of these. Their share, for random numbers:

# %%
for heads in (1, 2, 4, 8):
    many = jax.random.split(jax.random.key(heads), 3)
    q, k, weight = (
        jax.random.normal(a, s) for a, s in zip(many, ((500, heads, 4), (500, 4), (500, heads)), strict=True)
    )
    tied = index_scores(q, k, weight, jnp.ones((500, 500), bool)) == 0
    print(f"I = {heads}: {tied.mean():.1%} of the scores are exactly 0")

# %% [markdown]
# If the cut between picked and not picked runs through equal scores, any choice is as good, but two programs that
# choose differently give different outputs. A rule ends that: *score descending, then index ascending*. `jnp.argsort`
# keeps equal numbers in their order if it is asked for a stable sort. 0 and -0 are equal numbers with different bits,
# and a negative weight times relu's 0 is -0; so they are made one first.


# %%
@jaxtyped(typechecker=beartype)
def pick(scores: Float[Array, "T S"], count: int) -> Int[Array, "T L"]:
    """The `count` best of each row, best first, the lower index first on a tie; -1 where a query sees fewer."""
    scores = jnp.where(scores == 0, 0.0, scores)
    order = jnp.argsort(scores, axis=-1, descending=True, stable=True)[:, :count]
    return jnp.where(jnp.isneginf(jnp.take_along_axis(scores, order, axis=-1)), -1, order)


picks = pick(scores, 4)
print(picks[:6])
for zeros in ((0.0, 0.0, 0.0), (-0.0, 0.0, -0.0)):
    equal = jnp.array([[1.0, zeros[0], 2.0, *zeros[1:]]])
    ours, jforges = pick(equal, 3)[0], jforge.ops.topk_indices(equal, 3)[0]
    print(f"{equal[0]}: ours {ours}, jforge {jforges}, jax.lax.top_k {jax.lax.top_k(equal, 3)[1][0]}")

# %% [markdown]
# Rows 0 to 2 see fewer than four tokens, and say so. In the rows with ties the tokens 1, 3 and 4 are equal, so the
# lowest of them, 1, is the third pick. `jax.lax.top_k` took the lower index too, but it takes 0 for more than -0.
#
# ## The gather
#
# The attention is the one of DeepSeek's MLA (notebook 06A), of which one fact matters here: a token leaves *one* vector
# for all heads, C channels of a *latent* and R of a rotary key. All C + R are the key of every head, the C are its
# value. A query is taken in the absorbed form of 06A, with C + R channels too.
#
# There are two ways to attend to the picks alone. One computes all logits and masks those of the other tokens: simple,
# and it reads everything. The other copies the picked rows out first. Only this one reads less.


# %%
@jaxtyped(typechecker=beartype)
def masked(
    q: Float[Array, "T N Z"], rows: Float[Array, "S Z"], visible: Bool[Array, "T S"], C: int, scale: float
) -> Float[Array, "T N C"]:
    """Attention over the visible rows of a cache; Z = C + R."""
    logits = jnp.where(visible[:, None], scale * jnp.einsum("tnz,sz->tns", q, rows), -jnp.inf)
    return jnp.einsum("tns,sc->tnc", jax.nn.softmax(logits), rows[:, :C])


@jaxtyped(typechecker=beartype)
def gathered(
    q: Float[Array, "T N Z"], rows: Float[Array, "S Z"], picks: Int[Array, "T L"], C: int, scale: float
) -> Float[Array, "T N C"]:
    """The same over the picked rows, of which alone anything is read."""
    taken = rows[jnp.maximum(picks, 0)]  # T L Z; a -1 reads row 0 and is masked
    logits = scale * jnp.einsum("tnz,tlz->tnl", q, taken)
    weights = jax.nn.softmax(jnp.where(picks[:, None] >= 0, logits, -jnp.inf))
    return jnp.einsum("tnl,tlc->tnc", weights, taken[..., :C])


N, C, R = 3, 10, 2
q = jax.random.normal(jax.random.key(1), (T, N, C + R))
rows = jax.random.normal(jax.random.key(2), (S, C + R))
scale = (C + R) ** -0.5
is_picked = (picks[..., None] == jnp.arange(S)).any(axis=1)  # T S


def close(a, b):
    return compare.relative(a, b) <= compare.OUT["float32"]


sparse = gathered(q, rows, picks, C, scale)
print("gathered = masked:", close(sparse, masked(q, rows, is_picked, C, scale)))
print("L = 4, equal to attention over all:", close(sparse, masked(q, rows, causal, C, scale)))
all_of_them = gathered(q, rows, pick(scores, S), C, scale)
print("L = S, equal to attention over all:", close(all_of_them, masked(q, rows, causal, C, scale)))

# %% [markdown]
# As long as there are at most L tokens, all are picked and nothing is lost. The order of the picks does not matter to a
# softmax. That the set is the same for all heads does: the rows are gathered once, not N times.
#
# ## Does the indexer find them?
#
# Top-k has no derivative: a score that changes a little changes no pick. So the loss of the model cannot teach the
# indexer. DeepSeek teaches it apart: a softmax over its scores is brought near the weights of the attention itself,
# averaged over the heads. How far apart two distributions p and g are is measured by the *KL divergence*, the sum of p
# log(p / g).
#
# Here is that for one fixed attention with random weights (four heads, one key of 16 channels for all of them), on
# random tokens. The index key has 4 channels. What counts in the end is how much of the attention's weight falls on the
# picks.

# %%
D, TOKENS, HEADS, H = 16, 64, 4, 16  # of the attention
I, J, L = 8, 4, 8
before = jnp.tril(jnp.ones((TOKENS, TOKENS), bool))
keys = jax.random.split(jax.random.key(0), 8)
main_q = 1.7 * D**-0.5 * jax.random.normal(keys[0], (D, HEADS, H))
main_k = 1.7 * D**-0.5 * jax.random.normal(keys[1], (D, H))  # with more than 1.7, fewer tokens have most of the weight


def sample(key):
    return jax.random.normal(key, (TOKENS, D)).at[:, 0].set(1.0)  # always 1, so w may have a constant part


def attention_weights(x):
    """The attention that the indexer has to foresee, the mean over its heads: T S."""
    logits = jnp.einsum("tnh,sh->nts", jnp.einsum("td,dnh->tnh", x, main_q), x @ main_k) * H**-0.5
    return jax.nn.softmax(jnp.where(before, logits, -jnp.inf)).mean(axis=0)


def its_scores(p, x):
    w = x @ p["w"] * (I * J) ** -0.5  # J for the length of the products, I for that of their sum
    return index_scores(jnp.einsum("td,dij->tij", x, p["q"]), x @ p["k"], w, before)


def divergence(p, x):
    attended, log_index = attention_weights(x), jax.nn.log_softmax(its_scores(p, x))
    terms = attended * (jnp.log(jnp.where(before, attended, 1)) - jnp.where(before, log_index, 0))
    return terms.sum(axis=-1).mean()


def step(p, key):
    x = jax.vmap(sample)(jax.random.split(key, 8))
    value, slope = jax.value_and_grad(lambda p: jax.vmap(lambda x: divergence(p, x))(x).mean())(p)
    return jax.tree.map(lambda a, d: a - 3.0 * d, p, slope), value  # 3.0: the size of a step


shapes = {"q": (D, I, J), "k": (D, J), "w": (D, I)}
start = {n: D**-0.5 * jax.random.normal(a, shapes[n]) for n, a in zip(shapes, keys[2:5], strict=True)}
trained, losses = jax.jit(lambda: jax.lax.scan(step, start, jax.random.split(jax.random.key(5), 250)))()
print(f"divergence {losses[0]:.2f}, after 250 steps {losses[-20:].mean():.2f}")

# %% [markdown]
# The share of the weight that the picks catch, over the queries which see more than L tokens, and how many of the picks
# are among the L of the highest weights, which are the best possible ones. Picks at random would catch L of t + 1
# tokens.

# %%
x = sample(jax.random.key(99))
attended = attention_weights(x)


best = pick(jnp.where(before, attended, -jnp.inf), L)


def caught(chosen):
    weight = jnp.take_along_axis(attended, chosen, axis=-1)[L:].sum(axis=-1).mean()
    among = (chosen[L:, :, None] == best[L:, None]).any(axis=-1).mean()
    return f"{weight:.2f} of the weight, {among:.0%} of the best"


print(f"at random        {float((L / jnp.arange(L + 1, TOKENS + 1)).mean()):.2f}")
for name, chosen in (("before training", pick(its_scores(start, x), L)), ("trained", pick(its_scores(trained, x), L))):
    print(f"{name:17}{caught(chosen)}")
print(f"the best L       {caught(best)}")

# %%
plt = plots()
figure, axes = plt.subplots(2, figsize=(10, 6), sharex=True)
for ax, p, title in zip(axes, (start, trained), ("picks before training", "picks after 250 steps"), strict=True):
    image = ax.imshow(np.where(before, attended, np.nan), cmap="Blues", vmin=0, vmax=0.3)
    ax.set_facecolor("#dddddd")  # shows through where the mask is
    chosen = np.asarray(pick(its_scores(p, x), L))
    t, place = np.nonzero((chosen >= 0) & (np.arange(TOKENS)[:, None] >= 48))
    ax.plot(chosen[t, place], t, "s", color="#d55e00", fillstyle="none", markersize=8, markeredgewidth=1.5)
    ax.set(title=title, ylabel="query t", xlim=(-0.5, 63.5), ylim=(63.5, 47.5))
axes[1].set_xlabel("token s")
figure.colorbar(image, ax=axes, label="weight of the attention")
plt.show()

# %% [markdown]
# The last 16 queries. Blue is the weight of the attention, the same above and below; an orange frame is a pick. Above,
# the frames lie anywhere. Below, most of the dark cells are framed, but so are many pale ones: after the few large
# weights come many small ones that differ little. (Random weights are so spread out that even the best 8 picks leave
# more than a quarter of the weight. The method lives from weights that are more uneven.)
#
# ## Against the package
#
# `jforge` calls the mechanism `dsa`. The whole layer, from its parameters: the queries of the attention and those of
# the indexer come from one small vector of the token, the query latent. Index keys are normed by their mean and
# deviation (*layer norm*), the latents by their root mean square. Rotary positions are left out
# (`rope_parameters=None`). `att.select` gives the picks of a step without taking it.

# %%
att = jforge.get("dsa")
small = att.Config(
    hidden_size=32, num_attention_heads=4, q_lora_rank=16, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4,
    v_head_dim=8, index_n_heads=8, index_head_dim=8, index_topk=4, rope_parameters=None,
)  # fmt: skip
p = att.init_params(jax.random.key(3), small)
x = jax.random.normal(jax.random.key(4), (1, 16, 32))  # one row of 16 tokens


def rms(x, weight):
    return x / jnp.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * weight


def layer_norm(x, weight, bias):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6) * weight + bias


@jax.jit
def layer(x):
    """(output, picks) of one row, T D, without a cache."""
    visible = jnp.tril(jnp.ones((len(x), len(x)), bool))
    q_latent = rms(x @ p["wq_a"], p["q_norm"])
    k_index = layer_norm(x @ p["wk_index"], p["k_index_norm"], p["k_index_bias"])
    w = x @ p["ww_index"] * (small.index_n_heads * small.index_head_dim) ** -0.5
    q_index = jnp.einsum("tl,lij->tij", q_latent, p["wq_index"])
    picks = pick(index_scores(q_index, k_index, w, visible), small.index_topk)

    C, nope = small.kv_lora_rank, small.qk_nope_head_dim
    rows = x @ p["wkv_a"]
    rows = jnp.concatenate([rms(rows[:, :C], p["kv_norm"]), rows[:, C:]], axis=-1)
    q = jnp.einsum("tl,lnh->tnh", q_latent, p["wq_b"])
    q = jnp.concatenate([jnp.einsum("tnh,cnh->tnc", q[..., :nope], p["wk_b"]), q[..., nope:]], axis=-1)
    out = jnp.einsum("tnc,cnv->tnv", gathered(q, rows, picks, C, small.scaling), p["wv_b"])
    return jnp.einsum("tnv,nvd->td", out, p["wo"]), picks


y, picks = layer(x[0])


@jax.jit
def package(x):
    """(forward, a prefill of all but the last token and a step, the picks of that step)"""
    y_prompt, cache = att.prefill(p, small, x[:, :-1], att.init_cache(small, 1, 16, jnp.float32))
    y_last, _ = att.decode(p, small, x[:, -1:], cache)
    chosen = att.select(p, small, x[:, -1:], cache)
    return att.forward(p, small, x), jnp.concatenate([y_prompt, y_last], axis=1), chosen


y_forward, y_cached, chosen = package(x)
print("forward:", close(y_forward[0], y), " prefill and a step:", close(y_cached[0], y))
print("picks of the last token:", picks[-1], "jforge:", chosen[0, 0])

# %% [markdown]
# ## What a step touches
#
# Five decode steps after a prompt of nine tokens; `watch` finds out by experiment what each of them reads. It compares
# the outputs and also the scores: another index key shows there even where it changes no pick.

# %%
_, prompt = att.prefill(p, small, x[:, :9], att.init_cache(small, 1, 16, jnp.float32))
picture(watch(att, p, small, x[:, 9:14], prompt), "L = 4 of 9 tokens and more", first=9)
print("picks of tokens 9 to 13:", *jnp.sort(picks[9:14]))

# %% [markdown]
# Above are the entries. Each step reads four of them: in rows 9, 10 and 13 four old ones, in rows 11 and 12 three old
# ones and the new one, where the mark "written" hides that. (So a token need not pick itself.) The others are kept,
# since a later query may pick them. Below are the index keys, and of these every step reads every one, its own too. So
# the cache did not get smaller: it got an index on top.
#
# The package's table counts a scanned index key as an entry that is read.

# %%
questions("dsa")

# %% [markdown]
# ## Scanned and gathered
#
# A step reads J channels of every token, and C + R channels of L tokens. MLA reads C + R channels of every token. For
# DeepSeek-V3.2, in bytes (bfloat16 has two a number):

# %%
cfg, dense = att.models["DeepSeek-V3.2"], jforge.get("mla")
C, R, J, L = cfg.kv_lora_rank, cfg.qk_rope_head_dim, cfg.index_head_dim, cfg.index_topk
ELEMENT = jnp.dtype("bfloat16").itemsize
S = 131_072
scanned, taken = S * J * ELEMENT, min(L, S) * (C + R) * ELEMENT
cost = att.cost(cfg, context=S)
print(f"C={C} R={R} I={cfg.index_n_heads} J={J} L={L}; the table's entries: {L} + {S} = {L + S:,}")
print(f"scanned  {scanned:>11,} {cost.read['k_index']:>11,}")
print(f"gathered {taken:>11,} {cost.read['latent'] + cost.read['k_rope']:>11,}")

# %% [markdown]
# At this length the attention reads one token in S / L = 64. Predict: how many times fewer bytes does the whole step
# read than one of MLA?

# %% tags=["predict"]
guess = None

# %%
of_mla = sum(dense.cost(dense.models["DeepSeek-V3"], context=S).read.values())
reveal(of_mla / sum(cost.read.values()), guess)

# %% [markdown]
# Most of what is left is the scan. It grows with S as MLA's reads do, only with J channels a token instead of C + R:
# the factor can never be more than (C + R) / J, however long the context is. A smaller index helps, so DeepSeek stores
# index keys in 8 bits (*e4m3*: a sign, 4 bits of exponent, 3 of mantissa), and one scale a token, a float32 of 4 bytes.

# %%
tokens = np.geomspace(512, 2**20, 60).astype(int)
cfg_8bit = att.models["DeepSeek-V3.2, e4m3 index"]


def read(mechanism, config, names=None):
    found = (mechanism.cost(config, context=int(S)).read for S in tokens)
    return [sum(b for n, b in buffers.items() if names is None or n.startswith(names)) / 2**20 for buffers in found]


plt.figure(figsize=(10, 4.6))
plt.loglog(tokens, read(dense, dense.models["DeepSeek-V3"]), label="MLA reads all entries", zorder=3)
plt.loglog(tokens, read(att, cfg), label="DSA, all that it reads")
plt.loglog(tokens, read(att, cfg_8bit), label="DSA with an index in e4m3")
plt.loglog(tokens, read(att, cfg, "k_index"), label="of DSA: scanned", color="#777777")
plt.loglog(tokens, read(att, cfg, ("latent", "k_rope")), label="of DSA: gathered", color="#aaaaaa", linewidth=6)
plt.xlabel("tokens in the cache, S")
plt.ylabel("MiB a step, one layer and row")
plt.legend(fontsize=12, frameon=False)
plt.show()
print(f"the limit of the factor: {(C + R) / J:.1f}, with e4m3: {(C + R) * ELEMENT / (J + 4):.1f}")

# %% [markdown]
# On the left, DSA reads more than MLA: everything is picked (grey and blue are one) and the index comes on top. The
# gathered part stops growing at L tokens; from there on the lines of DSA follow the scan.
#
# And arithmetic? Every index head multiplies J channels of every token. In a decode step that comes cheap, since the
# bytes decide. In a prefill of T tokens it is a number for each of T (T + 1) / 2 pairs:

# %%
pairs, heads = S * (S + 1) // 2, cfg.index_n_heads
scoring = 2 * heads * (J + 1) * pairs  # + 1: the sum over heads
whole = att.cost(cfg, context=S, new=S).flops
print(f"MLA {dense.cost(dense.models['DeepSeek-V3'], context=S, new=S).flops:.2g} flops, DSA {whole:.2g}")
print(f"of DSA's, the indexer's: {scoring / whole:.0%}")
attended = sum(min(L, t + 1) for t in range(S))
print(f"DSA, gathered in the absorbed form: {scoring + 2 * cfg.num_attention_heads * (C + R + C) * attended:.2g}")

# %% [markdown]
# The indexer is as quadratic as the attention that it replaces, with a smaller factor. It is made cheap by 8-bit
# products, by few channels, and by the absence of a softmax.
#
# (In a prefill `cost` counts the picked pairs at the price of MLA's naive form. A kernel that gathers has to take the
# absorbed one, the last line. The package's prefill does more than both: it computes all of MLA and masks what is not
# picked.)
#
# ## Exercises
#
# Set the answer, run the two cells. A function is called by the second one.
#
# **1.** From which number of tokens on does a decode step of DeepSeek-V3.2, with its index in bfloat16, read fewer
# bytes than one of MLA?

# %%
answer_1 = None

# %% tags=["solution"]
mla_cfg = dense.models["DeepSeek-V3"]


def total(mechanism, config, S):
    return sum(mechanism.cost(config, context=S).read.values())


answer_1 = next(S for S in range(2048, 4096) if total(att, cfg, S) < total(dense, mla_cfg, S))

# %%
exercise(1, answer_1, "accbb90a9e49")

# %% [markdown]
# **2.** A query weighs all of its index heads positively, and each product q_i . k_s is negative with probability 1/2,
# independent of the others. A program wants less than one score in 10,000 to be exactly 0. How many index heads does it
# need at least?

# %%
answer_2 = None

# %% tags=["solution"]
answer_2 = next(heads for heads in range(1, 100) if 0.5**heads < 1e-4)

# %%
exercise(2, answer_2, "09b9146e629e")

# %% [markdown]
# **3.** Write `answer_3(scores, count, last)`: the picks of one query, scores is S, as in `pick` and by its rule, but
# the `last` newest tokens, those of the highest index, are always among them: `count` picks in all, the `last`
# included. Give the picked tokens in ascending order. All S tokens are visible.

# %%
answer_3 = None


# %% tags=["solution"]
def answer_3(scores, count, last):
    forced = jnp.where(jnp.arange(len(scores)) >= len(scores) - last, jnp.inf, scores)
    return jnp.sort(pick(forced[None], count)[0])


# %%
exercise(3, answer_3, "0acd0b13144d", jnp.array([0.5, 2.0, 0.5, -1.0, 0.5, 0.0, -3.0, -2.0]), 5, 2)

# %% [markdown]
# **4.** GLM-5.2 has an indexer in one of four layers; the three others take its picks and keep no index keys
# (`index_shared=True` in the package). With the sizes of DeepSeek-V3.2, all in bfloat16, and 131,072 tokens: how many
# bytes of their caches do four such layers read in a step? (The picks themselves are not counted.)

# %%
answer_4 = None

# %% tags=["solution"]
import dataclasses

shared = dataclasses.replace(cfg, index_shared=True)
answer_4 = total(att, cfg, 131_072) + 3 * total(att, shared, 131_072)

# %%
exercise(4, answer_4, "465d54c1c143")

# %% [markdown]
# **5.** Write `answer_5(weights, scores, count)`: weights and scores are T x S, unseen tokens have the score -inf. Give
# the share of each query's weight that its `count` picks catch, a vector of T. (-1 picks nothing.)

# %%
answer_5 = None


# %% tags=["solution"]
def answer_5(weights, scores, count):
    picks = pick(scores, count)
    return jnp.where(picks >= 0, jnp.take_along_axis(weights, jnp.maximum(picks, 0), axis=-1), 0).sum(axis=-1)


# %%
some = jnp.where(jnp.tril(jnp.ones((4, 4), bool)), jnp.array([0.3, 0.1, 0.4, 0.2]), -jnp.inf)
exercise(5, answer_5, "0b9a36bc542a", jax.nn.softmax(3 * some), some, 2)
