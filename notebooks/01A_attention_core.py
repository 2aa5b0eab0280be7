# %% [markdown]
# # 01A. The core of attention, from scratch
#
# Attention is a soft lookup. Every token has a *key*, which says what it can be found by, and a *value*, which is what
# it gives. A token that looks for something has a *query*; it receives the average of all values, each weighted by how
# well its key fits the query.
#
# One *head*, that is one such lookup (a model has many), in letters: t is the position of a query, s that of a key,
# both from 0. q_t and k_s are vectors of H *channels* (numbers), v_s has V of them, and `scale` is a number.
#
#     out_t = sum over s <= t of p_t,s v_s        p_t,s = exp(l_t,s) / sum over u <= t of exp(l_t,u)
#     l_t,s = scale q_t . k_s
#
# l are the *logits*, p the *weights*: positive, with sum 1. The function that makes p of l is the *softmax*. s <= t is
# the *causal mask*: no token sees a later one.

# %%
import jax
import jax.numpy as jnp
from beartype import beartype
from jaxtyping import Array, Bool, Float, jaxtyped

from jforge.lessons import exercise, plots, reveal

jax.config.update("jax_default_matmul_precision", "highest")  # a GPU may otherwise round products to fewer digits
jnp.set_printoptions(precision=3, suppress=True)

# %% [markdown]
# ## From the equation
#
# Every step of the equation is a line of code. `jaxtyped` checks the shapes when the function is called: the letters
# stand for sizes, and a letter has one size in one call. T is the number of queries, S that of keys. (JAX draws random
# numbers from a *random key*, no key of attention; `split` makes several.)


# %%
@jaxtyped(typechecker=beartype)
def plain(
    q: Float[Array, "T H"], k: Float[Array, "S H"], v: Float[Array, "S V"], visible: Bool[Array, "T S"], scale: float
) -> Float[Array, "T V"]:
    logits = scale * jnp.einsum("th,sh->ts", q, k)
    logits = jnp.where(visible, logits, -jnp.inf)  # exp(-inf) is 0: such a key has no weight
    weights = jnp.exp(logits)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return jnp.einsum("ts,sv->tv", weights, v)


T, H, V = 6, 8, 3
key_q, key_k, key_v = jax.random.split(jax.random.key(0), 3)
q, k, v = (jax.random.normal(key, (T, n)) for key, n in ((key_q, H), (key_k, H), (key_v, V)))
causal = jnp.tril(jnp.ones((T, T), bool))  # row t, column s: s <= t
out = plain(q, k, v, causal, H**-0.5)

print(causal.astype(int))
print(out.shape, "first token:", out[0], "its own value:", v[0])

# %% [markdown]
# The first token sees itself alone, so its weight is 1 and its output is its own value. A value too many is refused:

# %%
try:
    plain(q, k, jnp.ones((T + 1, V)), causal, H**-0.5)
except Exception as error:
    print(type(error).__name__)

# %% [markdown]
# ## The scale
#
# q . k is a sum of H products. If the channels are independent with variance 1, the sum has variance H: logits grow
# like the root of H, and so do the differences between them. exp turns differences into ratios, so without a scale one
# key takes nearly everything. `scale` is H^-1/2, which brings the variance back to 1.
#
# Predict: H = 128 channels, 64 keys, random q and k, **no** scale. How large is the largest of the 64 weights, on
# average? (With equal weights it is 1/64, about 0.016. The largest logit leads the second by about 4 on average, in
# some rows by next to nothing.) Write your number in the place of None; `reveal` prints the right one beside it.

# %% tags=["predict"]
guess = None

# %%
many_q, many_k = jax.random.normal(key_q, (1000, 128)), jax.random.normal(key_k, (64, 128))
logits = jnp.einsum("th,sh->ts", many_q, many_k)
largest = jax.nn.softmax(logits).max(axis=-1)
reveal(float(largest.mean()), guess)
first, second = jax.lax.top_k(logits, 2)[0].T
print(f"the largest logit leads by {(first - second).mean():.1f} on average, {(first - second).min():.1g} at least")
print("a tenth of the weights is below, half are below:", jnp.quantile(largest, jnp.array([0.1, 0.5])))
print("with the scale:", round(float(jax.nn.softmax(128**-0.5 * logits).max(axis=-1).mean()), 2))

# %% [markdown]
# A weight near 1 has another cost: the derivative of weight i is p_i (1 - p_i) for its own logit, -p_i p_j for another
# one. Then all of these are near 0, and such a token teaches q and k hardly anything, only v ("The gradient" shows it).
#
# ## Numbers that do not fit
#
# float32 has a largest number, and exp gets there soon: beyond it there is only inf. Dividing inf by inf gives NaN
# ("not a number"):

# %%
print(f"the largest float32: {jnp.finfo(jnp.float32).max:.2g}")
print(f"exp of 88 and of 89: {jnp.exp(jnp.float32(88)):.2g}, {jnp.exp(jnp.float32(89)):.2g}")
print("logits of some hundreds:", plain(q, k, v, causal, 100.0)[3])

# %% [markdown]
# A softmax does not change when the same number is taken from all logits of a row: numerator and denominator shrink by
# the same factor. With the largest logit taken away, nothing overflows.
#
# One case remains: a query that sees *nothing* (say, one that only fills up a batch). Its largest logit is -inf, and
# -inf - (-inf) is NaN again. The equation does not say what the output is; here it is 0, as the sum has no terms. This
# is the whole core:


# %%
@jaxtyped(typechecker=beartype)
def core(
    q: Float[Array, "T H"], k: Float[Array, "S H"], v: Float[Array, "S V"], visible: Bool[Array, "T S"], scale: float
) -> tuple[Float[Array, "T V"], Float[Array, "T S"]]:
    """(out, weights)"""
    logits = jnp.where(visible, scale * jnp.einsum("th,sh->ts", q, k), -jnp.inf)
    top = logits.max(axis=-1, keepdims=True)
    top = jnp.where(jnp.isneginf(top), 0.0, top)  # of a query that sees nothing
    weights = jnp.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1.0, total)  # 0 / 1 in the place of 0 / 0
    return jnp.einsum("ts,sv->tv", weights, v), weights


print("logits of some hundreds:", core(q, k, v, causal, 100.0)[0][3])
print("the same as before, where that was a number:", bool(jnp.allclose(core(q, k, v, causal, H**-0.5)[0], out)))

# %% [markdown]
# Two libraries do not agree about the empty row, and neither raises an error or warns. Row 0 sees nothing here:

# %%
import numpy as np
import torch
import torch.nn.functional as F

import jforge


def to_torch(array):
    return torch.from_numpy(np.array(array))


nothing = causal.at[0].set(False)
print("core      ", core(q, k, v, nothing, H**-0.5)[0][0])
print("torch SDPA", F.scaled_dot_product_attention(*map(to_torch, (q, k, v)), attn_mask=to_torch(nothing))[0])
wide = jnp.pad(v, ((0, 0), (0, H - V)))  # it wants as many channels of v as of k
heads = [a[None, :, None] for a in (q, k, wide)]  # B T N H: one row, one head
print("jax.nn    ", jax.nn.dot_product_attention(*heads, mask=nothing[None, None])[0, 0, 0, :V])
lengths = jnp.array([T - 1])  # what the last query sees, the one before it one less, the first one nothing
print("jforge    ", jforge.ops.decode_attention(*heads, lengths, scale=H**-0.5)[0][0, 0, 0, :V])
print("the mean of v over all keys:", v.mean(axis=0))

# %% [markdown]
# `jax.nn.dot_product_attention` masks with a large negative number instead of -inf. In an empty row all logits are that
# number, all weights are equal, and the query reads every key that it must not see. torch and `jforge` give 0.
#
# ## The gradient
#
# g = d loss / d out is given. p = weights. Backwards through the last einsum, the softmax and the first einsum:

# %%


@jaxtyped(typechecker=beartype)
def backward(
    q: Float[Array, "T H"], k: Float[Array, "S H"], v: Float[Array, "S V"], visible: Bool[Array, "T S"], scale: float,
    g: Float[Array, "T V"],
) -> tuple[Float[Array, "T H"], Float[Array, "S H"], Float[Array, "S V"]]:  # fmt: skip
    """The derivatives of loss for q, k and v."""
    _, p = core(q, k, v, visible, scale)
    of_v = jnp.einsum("ts,tv->sv", p, g)
    of_p = jnp.einsum("tv,sv->ts", g, v)
    of_logits = p * (of_p - (p * of_p).sum(axis=-1, keepdims=True))  # a weight rises at the cost of the others
    return scale * jnp.einsum("ts,sh->th", of_logits, k), scale * jnp.einsum("ts,th->sh", of_logits, q), of_v


g = jax.random.normal(jax.random.key(1), (T, V))
automatic = jax.grad(lambda q, k, v: (core(q, k, v, nothing, H**-0.5)[0] * g).sum(), argnums=(0, 1, 2))(q, k, v)
by_hand = backward(q, k, v, nothing, H**-0.5, g)
print("equal to jax.grad:", [bool(jnp.allclose(a, b, atol=1e-6)) for a, b in zip(automatic, by_hand, strict=True)])
print("of q in the empty row:", by_hand[0][0])
for name, d in zip("qkv", backward(q, k, v, causal, 300.0, g), strict=True):
    print(f"scale 300, norm of each row of the gradient of {name}:", jnp.linalg.norm(d, axis=-1))

# %% [markdown]
# The gradient needs p again, T x S numbers. A fast *kernel* (a program for the GPU) does not keep them: it makes them
# anew from q, k and one number a row (notebook 01B).
#
# ## Against the package and two libraries
#
# In a model q, k and v are projections of the tokens x (D channels), and the output is projected back: four matrices
# wq, wk, wv, wo. `jforge` calls this mechanism `single_head`, and H^-1/2 is its `cfg.scaling`. The same numbers must
# come from all, forwards and backwards. An error is relative to the largest number; what float32 may be off by is a
# constant of the package.

# %%
from jforge.core import compare

att = jforge.get("single_head")
cfg = att.Config(hidden_size=32, head_dim=16)
params = att.init_params(jax.random.key(2), cfg)
x, g = (jax.random.normal(jax.random.key(i), (1, 40, cfg.hidden_size)) for i in (3, 4))  # B T D, one row
wq, wk, wv, wo = (params[name].reshape(-1, params[name].shape[-1]) for name in ("wq", "wk", "wv", "wo"))
before = jnp.tril(jnp.ones((40, 40), bool))


def ours(x):
    return core(x[0] @ wq, x[0] @ wk, x[0] @ wv, before, cfg.scaling)[0][None] @ wo


def jax_nn(x):
    heads = (x[:, :, None] @ w for w in (wq, wk, wv))
    return jax.nn.dot_product_attention(*heads, scale=cfg.scaling, is_causal=True)[:, :, 0] @ wo


def torch_sdpa(x):
    q, k, v = (x @ to_torch(w) for w in (wq, wk, wv))
    return F.scaled_dot_product_attention(q, k, v, scale=cfg.scaling, is_causal=True) @ to_torch(wo)


def both(function):
    """(y, d sum(y g) / d x)"""
    return jax.jit(lambda x: (function(x), jax.grad(lambda x: (function(x) * g).sum())(x)))(x)


tx = to_torch(x).requires_grad_()
ty = torch_sdpa(tx)
ty.backward(to_torch(g))
others = {
    "jforge single_head": both(lambda x: att.forward(params, cfg, x)),
    "jax.nn.dot_product_attention": both(jax_nn),
    "torch SDPA": (ty.detach(), tx.grad),
}
mine = both(ours)
errors = {name: [compare.relative(a, b) for a, b in zip(mine, pair, strict=True)] for name, pair in others.items()}
print({name: all(error <= compare.OUT["float32"] for error in pair) for name, pair in errors.items()})

# %% tags=["varies"]
for name, (forward, gradient) in errors.items():
    print(f"{name:30}forward {forward:.0e}, gradient {gradient:.0e}, allowed {compare.OUT['float32']:.0e}")

# %% [markdown]
# ## What a head learns
#
# Random weights look like noise. So let one head learn a task: a sequence has eight *facts*, a letter with a digit, and
# then eight *questions*, letters without one. In one sequence a letter always has the same digit, in the next one
# another. The answer is not in the parameters; the head has to look it up. A token is a vector of letter, digit (0 in a
# question) and "is a question", each channel 0 or 1. The head is `core` and its four matrices, the loss the mean of
# -log(probability of the right digit), and every step goes down the gradient.
#
# `vmap` turns a function of one sequence into one of many, `value_and_grad` gives a value and its derivatives,
# `tree.map` goes through the arrays of a dict, `jit` compiles, and `lax.scan` is a loop: it hands the first result of
# `step` to the next call and collects the second.

# %%
LETTERS, DIGITS, FACTS = 6, 4, 8


def lesson(key):
    """(tokens T D, letters T, digits T) of one sequence."""
    one, two, three = jax.random.split(key, 3)
    fact = jax.random.randint(one, (FACTS,), 0, LETTERS)
    letters = jnp.concatenate([fact, jax.random.choice(two, fact, (FACTS,))])  # only what a fact told is asked
    digits = jax.random.randint(three, (LETTERS,), 0, DIGITS)[letters]
    asks = jnp.arange(2 * FACTS) >= FACTS
    hidden = jnp.where(asks, -1, digits)  # one_hot(-1) is all 0
    tokens = [jax.nn.one_hot(letters, LETTERS), jax.nn.one_hot(hidden, DIGITS), asks[:, None]]
    return jnp.concatenate(tokens, axis=-1), letters, digits


def answers(w, x):
    """(a score for each digit, T x DIGITS; weights)"""
    out, weights = core(x @ w["wq"], x @ w["wk"], x @ w["wv"], jnp.tril(jnp.ones((len(x), len(x)), bool)), 8**-0.5)
    return out @ w["wo"], weights


def loss(w, key):
    x, _, digits = jax.vmap(lesson)(jax.random.split(key, 128))
    scores, _ = jax.vmap(lambda x: answers(w, x))(x)
    right = jnp.take_along_axis(jax.nn.log_softmax(scores), digits[..., None], axis=-1)
    return -right[:, FACTS:].mean()


@jax.jit
def step(w, key):
    value, slope = jax.value_and_grad(loss)(w, key)
    return jax.tree.map(lambda old, d: old - d, w, slope), value


D = LETTERS + DIGITS + 1
sizes = {"wq": (D, 8), "wk": (D, 8), "wv": (D, 8), "wo": (8, DIGITS)}
start = {n: jax.random.normal(jax.random.key(i), s) * s[0] ** -0.5 for i, (n, s) in enumerate(sizes.items())}
trained, losses = jax.lax.scan(step, start, jax.random.split(jax.random.key(9), 300))
print(f"loss {losses[0]:.1f} (a blind guess: {jnp.log(DIGITS):.1f}), after 300 steps {losses[-1]:.2f}")

# %%
x_one, letters, digits = lesson(jax.random.key(5))
names = [f"{'abcdef'[i]}{d if t < FACTS else '?'}" for t, (i, d) in enumerate(zip(letters, digits, strict=True))]
plt = plots()
figure, axes = plt.subplots(1, 2, figsize=(10, 5.6))
for ax, w, title in zip(axes, (start, trained), ("before", "after 300 steps"), strict=True):
    weights = np.where(np.tri(2 * FACTS), answers(w, x_one)[1], np.nan)
    image = ax.imshow(weights, cmap="Blues", vmin=0, vmax=1)
    ax.set_facecolor("#bbbbbb")  # shows through where the mask is
    ax.set(title=title, xlabel="key s", xticks=range(16), yticks=range(16), xticklabels=names, yticklabels=names)
    ax.tick_params(axis="x", rotation=90)
axes[0].set_ylabel("query t")
figure.colorbar(image, ax=axes, label="weight p", shrink=0.8)
plt.show()

scores, weights = answers(trained, x_one)
own = (weights * (letters[:, None] == letters))[FACTS:, :FACTS].sum(axis=-1)
right = jnp.take_along_axis(jax.nn.softmax(scores), digits[:, None], axis=-1)[FACTS:]
print(f"least of all questions: weight on its facts {own.min():.2f}, probability of its digit {right.min():.3f}")

# %% [markdown]
# Read a row: a question (lower half) puts its weight on the facts with its own letter, wherever they stand, and shares
# it among them if there are several. Some goes elsewhere, but wv and wo make the scores so large that the digit with
# most weight has nearly all of the probability. Nobody told the head to compare letters; wq and wk came to do it. What
# is grey is masked.
#
# ## What it costs
#
# For every pair of a query and a key that it sees: H products and sums for the logit, V for the weighted value, and a
# product and a sum count as two operations (*flops*). The exp and the projections are not counted. One new token that
# sees S keys:

# %%
S = 1000
print(2 * S * (cfg.head_dim + cfg.v_head_dim), "flops;", "the package says", att.cost(cfg, context=S).flops)

# %% [markdown]
# Where the keys and values of the S tokens are kept, and what reading them costs, is notebook 05A.
#
# ## Exercises
#
# Set the answer, run the two cells. A function is called by the second one. Whole numbers must be exact, of others
# three digits count.
#
# **1.** Two keys are visible. Their logits are equal, their values are 0 and 1 (V = 1). How much does the output change
# for a small change of the second logit: what is d out / d l?

# %%
answer_1 = None

# %% tags=["solution"]
answer_1 = float(jax.grad(lambda second: jax.nn.softmax(jnp.stack([1.0, second]))[1])(1.0))

# %%
exercise(1, answer_1, "5178540571d6")

# %% [markdown]
# **2.** What is the largest whole number whose exp is still finite in float16? (`jnp.finfo(jnp.float16).max` is the
# largest number of this smaller format.)

# %%
answer_2 = None

# %% tags=["solution"]
answer_2 = max(n for n in range(100) if jnp.isfinite(jnp.exp(jnp.float16(n))))

# %%
exercise(2, answer_2, "280c947f58ad")

# %% [markdown]
# **3.** Write the mask of a *window*: `answer_3(T, size)` gives bool T x T, in which each token sees the last `size`
# tokens up to itself, its own place included.

# %%
answer_3 = None


# %% tags=["solution"]
def answer_3(T, size):
    t, s = jnp.arange(T)[:, None], jnp.arange(T)
    return (s <= t) & (s > t - size)


# %%
exercise(3, answer_3, "7209c1cfa162", 5, 2)

# %% [markdown]
# **4.** Write `answer_4(out_a, lse_a, out_b, lse_b)`. One query saw half of the keys in call a and the other half in
# call b. An out has V numbers, an lse is one: log(sum of exp(logits)) of its call. Give the output over all keys. (A
# fast kernel splits the keys so.)

# %%
answer_4 = None


# %% tags=["solution"]
def answer_4(out_a, lse_a, out_b, lse_b):
    a, b = jnp.exp(lse_a), jnp.exp(lse_b)
    return (a * out_a + b * out_b) / (a + b)


# %%
exercise(4, answer_4, "a350c27602db", jnp.array([1.0, 2.0]), 0.5, jnp.array([3.0, -1.0]), 1.7)

# %% [markdown]
# **5.** A prompt of 1,000 tokens goes through one head with H = V = 128, under the causal mask, and no work is spent on
# masked pairs. How many flops is that?

# %%
answer_5 = None

# %% tags=["solution"]
answer_5 = 2 * (128 + 128) * sum(range(1, 1001))

# %%
exercise(5, answer_5, "fd6857cd2a8e")
