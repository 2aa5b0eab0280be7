# %% [markdown]
# # 16A. Delta rules and state spaces
#
# Notebook 11A has a cache that never grows: one matrix, to which each token adds k v^T. This one asks what a sum cannot
# do and follows the answers: the *delta rule* (DeltaNet), a gate before it (Gated DeltaNet, in Qwen3-Next), a gate for
# each channel (KDA, in Kimi-Linear). Then the *state-space* layers Mamba-2 and Mamba-1, which come from differential
# equations and turn out to be the same recurrence. All of them begin with a short convolution, which has a state of its
# own. LFM2 has layers that are nothing else.
#
# Letters: T tokens, N heads, H channels of a query q or key k, V of a value v; the state S, of H x V numbers, as
# `state` in code. g at most 0 is the log of a decay, beta the share of an error that is written, u what is written; m
# tokens of a block; L taps of a convolution, over X channels. t and s count tokens.

# %%
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from beartype import beartype
from jaxtyping import Array, Float, jaxtyped

import jforge
from jforge.core import compare
from jforge.lessons import exercise, picture, plots, questions, reveal, watch

jax.config.update("jax_default_matmul_precision", "highest")  # a GPU may otherwise round products to fewer digits
jnp.set_printoptions(precision=3, suppress=True)

# %% [markdown]
# ## What a sum cannot do
#
# The state as a store: write adds k v^T, read asks for S^T k. With keys of length 1 that are orthogonal, each key gets
# its value back. Now the value of a key changes. Key a has the value (1, 0, 0), key b (0, 1, 0), then a gets
# (0, 0, 1):

# %%
a, b = jnp.eye(4)[0], jnp.eye(4)[1]
writes = (a, jnp.array([1.0, 0, 0])), (b, jnp.array([0, 1.0, 0])), (a, jnp.array([0, 0, 1.0]))


@jaxtyped(typechecker=beartype)
def add(state: Float[Array, "H V"], k: Float[Array, "H"], v: Float[Array, "V"], decay: float) -> Float[Array, "H V"]:
    return decay * state + jnp.outer(k, v)


for decay in (1.0, 0.5):
    state = jnp.zeros((4, 3))
    for k, v in writes:
        state = add(state, k, v, decay)
    print(f"decay {decay}: a has {state.T @ a}, b has {state.T @ b}")

# %% [markdown]
# Without decay a answers with the sum of both values. With decay the old value fades, but so does that of b, which
# nobody replaced. A fixed decay cannot tell what is out of date.
#
# ## The delta rule
#
# To *overwrite*, look before you write: the state would answer S^T k, the right answer is v, and the error is
#
#     E(S) = |S^T k - v|^2 / 2
#
# One step of gradient descent on this error, with a step of length beta, is a new rule for the state. The gradient is k
# (S^T k - v)^T, so the step adds k u^T with u = beta (v - S^T k): only what is missing.


# %%
def error(state, k, v):
    return jnp.sum((state.T @ k - v) ** 2) / 2


@jaxtyped(typechecker=beartype)
def delta(state: Float[Array, "H V"], k: Float[Array, "H"], v: Float[Array, "V"], beta: float) -> Float[Array, "H V"]:
    u = beta * (v - state.T @ k)
    return state + jnp.outer(k, u)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def unit(rows):
    return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)


def close(a, b):
    return compare.relative(a, b) <= compare.OUT["float32"]


state, k, v = normal(0, 8, 6), unit(normal(1, 8)), normal(2, 6)
down = state - 0.5 * jax.grad(error)(state, k, v)
print("the rule is a step down the error:", close(delta(state, k, v, 0.5), down))

before = jnp.linalg.norm(state.T @ k - v)
print("what is left of the error, as its length:")
for beta in (0.25, 0.5, 1.0, 1.75, 2.25):
    left = jnp.linalg.norm(delta(state, k, v, beta).T @ k - v) / before
    print(f"beta {beta:4}: {left:.2f} with |k|^2 = 1", end=", ")
    left = error(delta(state, 2 * k, v, beta), 2 * k, v) / error(state, 2 * k, v)
    print(f"{left**0.5:.2f} with |k|^2 = 4")

# %% [markdown]
# What is missing, v - S^T k, is multiplied by 1 - beta |k|^2. With |k| = 1 nothing is left at beta = 1, and above 2 it
# grows. A longer key overshoots much earlier, which is why these layers divide keys by their length. beta comes from
# the token through a sigmoid, so it is below 1. (Olmo-Hybrid takes twice the sigmoid. Then the factor may be negative:
# what stands at k changes its sign.)
#
# The rules at work. 12 random keys with values, then the first key gets a new value, then 12 more keys come. Values are
# at right angles to each other, so that each can be found again in what the state answers: its share, after each
# write:

# %%
H = V = 64
keys, values, new_value = unit(normal(3, 24, H)), jnp.eye(V)[:24], jnp.eye(V)[24]
steps = [*zip(keys[:12], values[:12], strict=True), (keys[0], new_value), *zip(keys[12:], values[12:], strict=True)]
rules = {
    "sum": lambda state, k, v: add(state, k, v, 1.0),
    "sum, decay 0.85": lambda state, k, v: add(state, k, v, 0.85),
    "delta rule, beta = 1": lambda state, k, v: delta(state, k, v, 1.0),
}
plt = plots()
figure, axes = plt.subplots(1, 3, figsize=(10, 4.6), sharey=True)
for ax, (name, rule) in zip(axes, rules.items(), strict=True):
    state, shares = jnp.zeros((H, V)), []
    for k, v in steps:
        state = rule(state, k, v)
        first, second = state.T @ keys[0], state.T @ keys[1]
        shares.append([first @ values[0], first @ new_value, second @ values[1]])
    lines = ax.plot(range(1, len(steps) + 1), np.array(shares))
    ax.axvline(13, color="#666666", linewidth=1)
    ax.set(title=name, xlabel="writes")
axes[0].set_ylabel("share of the value")
words = "first key, old value", "first key, new value (from write 13)", "second key, never replaced"
figure.legend(lines, words, loc="outside lower center", frameon=False, ncols=2)
plt.show()

# %% [markdown]
# The sum keeps old and new. The decay loses the old value, and the second key's with it. The delta rule replaces the
# one and keeps the other. What still changes on the right is that the keys are not quite orthogonal: writing at k moves
# the answer of k' by (k . k') u.
#
# ## A gate before it
#
# The delta rule changes the state along one key. When the subject changes, much should go at once. *Gated DeltaNet*
# multiplies the state by e^g first, one number for each token and head, made from the token. Then it looks and writes:
#
#     S <- e^g S        u = beta (v - S^T k)        S <- S + k u^T        o = S^T q


# %%
@jaxtyped(typechecker=beartype)
def step(
    state: Float[Array, "H V"],
    q: Float[Array, "H"],
    k: Float[Array, "H"],
    v: Float[Array, "V"],
    decay: Float[Array, "#H"],  # one number for all key channels, or one for each
    beta: Float[Array, ""] | None,
) -> tuple[Float[Array, "V"], Float[Array, "H V"]]:
    state = decay[:, None] * state
    u = v if beta is None else beta * (v - state.T @ k)
    state = state + jnp.outer(k, u)
    return state.T @ q, state


def looks_first(state, q, k, v, decay, beta):
    u = beta * (v - state.T @ k)
    state = decay[:, None] * state + jnp.outer(k, u)
    return state.T @ q, state


state, k, v, whole = normal(0, 8, 6), unit(normal(1, 8)), normal(2, 6), jnp.array(1.0)
half, one = jnp.array([0.5]), jnp.array([1.0])
for name, rule in (("decay, then look", step), ("look, then decay", looks_first)):
    out, _ = rule(state, k, k, v, half, whole)  # asks for k itself
    print(f"{name}: with beta = 1, k answers v: {close(out, v)}")
for name, decay, beta in (("delta rule", one, whole), ("gate", half, jnp.array(0.0))):
    changed = step(state, k, k, v, decay, beta)[1] - state
    print(f"{name}: the change of the state has rank {jnp.linalg.matrix_rank(changed)}")

# %% [markdown]
# The order is part of the rule: u must be what is missing in the state that it is added to. And a change of rank 1
# moves the answers along one key; to clear the whole state the delta rule would need as many tokens as there are
# directions.
#
# ## A gate for each channel
#
# `step` takes a decay of one number or of H. With H of them, each row of the state fades at a rate of its own: this is
# *KDA*, Kimi Delta Attention. A model can put what is of use for long into slow channels. Two keys, the first in
# channels 0 to 3, the second in 4 to 7, and ten tokens that write nothing:

# %%
low, high = (unit(jnp.where((jnp.arange(8) < 4) == side, normal(6, 8), 0)) for side in (True, False))
v_low, v_high = unit(normal(7, 2, 6))
for name, decay in (("one gate", jnp.full(1, 0.8)), ("a gate a channel", jnp.where(jnp.arange(8) < 4, 0.99, 0.5))):
    state = jnp.outer(low, v_low) + jnp.outer(high, v_high)
    for _ in range(10):
        _, state = step(state, low, low, v_low, decay, jnp.array(0.0))
    first, second = (state.T @ low) @ v_low, (state.T @ high) @ v_high
    print(f"{name}: of the first value {first:.2f} is left, of the second {second:.2f}")

# %% [markdown]
# In the layer the log decay is g = -e^A softplus(x W_f + dt) with softplus(y) = log(1 + e^y), so a token chooses the
# rates: x W_f is the token's part, the numbers dt and A are learnt. (GLM-5.3-Flash and Ling bound it: g = -5
# sigmoid(...), so that no token takes a channel below e^-5 of what it was.)
#
# What the package's two layers make of 40 tokens: how much of a channel is left of what stood in it before the first
# one. Weights are random; the biases dt are drawn so that softplus(dt) is between 0.001 and 0.1, evenly in its
# logarithm, as Mamba's code starts a training.

# %%
deltanet, kda = jforge.get("gated_deltanet"), jforge.get("kda")
one_gate = deltanet.Config(
    hidden_size=24, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=6,
    block_size=5,
)  # fmt: skip
by_channel = kda.Config(hidden_size=24, linear_num_heads=2, linear_head_dim=24, block_size=5)


def weights(att, cfg, seed):
    return {w: normal(seed + i, *shape) / shape[0] ** 0.5 for i, (w, shape) in enumerate(att.shapes(cfg).items())}


def started(att, cfg, seed):
    params = weights(att, cfg, seed)
    rate = 10 ** np.random.default_rng(seed).uniform(-3, -1, params["dt_bias"].shape)
    return params | {"dt_bias": jnp.asarray(np.log(np.expm1(rate)), jnp.float32)}  # softplus(dt) = rate


x = normal(8, 1, 40, 24)  # one row of 40 tokens
p_one, p_by = started(deltanet, one_gate, 100), started(kda, by_channel, 200)
from jforge.attention.gated_deltanet import log_decay as gate_of_token
from jforge.attention.kda import log_decay as gates_of_token

shown = {
    "Gated DeltaNet": np.repeat(gate_of_token(p_one, x)[0, :, :1], 24, axis=1),
    "KDA": gates_of_token(p_by, by_channel, x)[0, :, 0],
}  # of their first heads, T x H
figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True)
for ax, (name, g) in zip(axes, shown.items(), strict=True):
    drawn = ax.imshow(np.exp(np.cumsum(g, axis=0)), aspect="auto", cmap="cividis", vmin=0, vmax=1)
    ax.set(title=name, xlabel="key channel")
axes[0].set_ylabel("token")
figure.colorbar(drawn, ax=axes, label="what is left")
plt.show()

# %% [markdown]
# On the left all channels of a head fade alike, since there is one number a token (the package repeats nothing; the
# picture does). On the right some channels are nearly empty after twenty tokens, and others keep nearly all.
#
# ## State spaces
#
# *Mamba* comes from elsewhere. A system with the input x has a state that leaks at the rate A and is fed through B; it
# is read through C:
#
#     dS/dt = -A S + B x^T        o = S^T C
#
# A token is an input that lasts for the time delta, which the token chooses. Over that time the leak is e^(-A delta)
# exactly, and what is fed is about delta B x^T, good for short times:


# %%
@jaxtyped(typechecker=beartype)
def selective(
    state: Float[Array, "H V"],
    C: Float[Array, "H"],
    B: Float[Array, "H"],
    x: Float[Array, "V"],
    delta: Float[Array, ""],
    A: Float[Array, ""],
) -> tuple[Float[Array, "V"], Float[Array, "H V"]]:
    state = jnp.exp(-A * delta) * state + jnp.outer(B, delta * x)
    return state.T @ C, state


state, C, B, x_in, A = normal(0, 8, 6), normal(1, 8), normal(2, 8), normal(9, 6), jnp.array(1.0)
for length in (0.01, 0.1, 1.0):
    _, token = selective(state, C, B, x_in, jnp.array(length), A)
    exact, small = state, length / 1000
    for _ in range(1000):
        exact = exact + small * (jnp.outer(B, x_in) - A * exact)  # the equation in small steps
    print(f"delta {length}: off by {jnp.linalg.norm(token - exact) / jnp.linalg.norm(exact):.3f}")

# %% [markdown]
# Read the last lines of `selective` with other letters. C is a query, B a key, delta x a value, e^(-A delta) a decay:
# linear attention, whose decay each token chooses. So `step` without beta does it, and so does the package's op
# `decode_linear`, which does one step of all rows and heads:

# %%
length = jnp.array(0.3)
ours = selective(state, C, B, x_in, length, A)
same = step(state, C, B, length * x_in, jnp.exp(-A * length)[None], None)
print("Mamba-2 = step without beta:", *(close(a, b) for a, b in zip(ours, same, strict=True)))


def op(q, k, v, state, decay, beta=None):
    """One row; heads first."""
    beta = None if beta is None else beta[None]
    return [a[0] for a in jforge.ops.decode_linear(q[None], k[None], v[None], state[None], decay[None], beta=beta)]


given = C[None], B[None], length * x_in[None], state[None], jnp.exp(-A * length)[None]  # one head
print("decode_linear:", *(close(a[0], b) for a, b in zip(op(*given), ours, strict=True)))

# %% [markdown]
# There is no beta, so nothing is overwritten: Mamba-2 forgets by its decay alone. delta rules both sides: a token with
# a large delta is written strongly and wipes the state, one with delta near 0 passes by.
#
# *Mamba-1*, the older one, has a state of H numbers for each single channel of x, a rate A for each of these numbers,
# and one B and C for all channels. Seen as heads: as many heads as channels, I of them, with V = 1 and a decay for each
# key channel.


# %%
@jaxtyped(typechecker=beartype)
def narrow(
    state: Float[Array, "I H"],
    C: Float[Array, "H"],
    B: Float[Array, "H"],
    x: Float[Array, "I"],
    delta: Float[Array, "I"],
    A: Float[Array, "I H"],
) -> tuple[Float[Array, "I"], Float[Array, "I H"]]:
    state = jnp.exp(-A * delta[:, None]) * state + jnp.outer(delta * x, B)
    return state @ C, state


I = 6
state, C, B = normal(0, I, 8), normal(1, 8), normal(2, 8)
x_in, lengths, rates = normal(9, I), jax.nn.softplus(normal(10, I)), jnp.exp(normal(11, I, 8))
out, after = narrow(state, C, B, x_in, lengths, rates)
heads = jnp.broadcast_to(C, (I, 8)), jnp.broadcast_to(B, (I, 8)), (lengths * x_in)[:, None], state[..., None]
found, found_after = op(*heads, jnp.exp(-rates * lengths[:, None]))
print("Mamba-1 = I heads with V = 1:", close(found[:, 0], out), close(found_after[..., 0], after))

for name, model in (("mamba1", "Falcon-Mamba-7B"), ("mamba2", "Nemotron-H-8B")):
    cfg = jforge.get(name).models[model]
    N, H, V = jforge.get(name).cache_spec(cfg)["state"].shape
    bytes_ = jforge.get(name).cost(cfg, context=1).stored["state"]
    print(f"{model}: N = {N:,} heads, H = {H}, V = {V}: a state of {bytes_ / 2**20} MiB in float32")

# %% [markdown]
# Both have 8,192 channels. One decay a head in place of one for each number lets Mamba-2 take a prompt in blocks, as
# products of matrices (notebook 11A), and its state could grow from 16 numbers a channel to 128.
#
# ## The delta rule in blocks
#
# A prompt of T tokens one by one is T steps that wait for each other. Notebook 11A took blocks of m tokens for sums.
# With the delta rule that is harder: u_i depends on the state, so on u_1 to u_(i-1). Write it out. Let c_i be the sum
# of g over the block's tokens up to i, and S the state before the block. Token j has faded by e^(c_i - c_j) when token
# i looks:
#
#     u_i = beta_i (v_i - e^(c_i) S^T k_i - sum over j < i of e^(c_i - c_j) (k_i . k_j) u_j)
#
# These are m linear equations, and the unknown u_i stands only in those from i on: a *triangular* system, which is
# solved from the top down. Its matrix has the products of all pairs of keys, so it is made at once; then the outputs
# and the new state are products of matrices, as in 11A.


# %%
@jaxtyped(typechecker=beartype)
def in_block(
    q: Float[Array, "m H"],
    k: Float[Array, "m H"],
    v: Float[Array, "m V"],
    g: Float[Array, "m #H"],
    beta: Float[Array, "m"],
    state: Float[Array, "H V"],
) -> tuple[Float[Array, "m V"], Float[Array, "H V"]]:
    c = jnp.cumsum(g, axis=0)
    earlier = jnp.tril(jnp.ones((len(q), len(q)), bool))[..., None]
    faded = jnp.exp(jnp.where(earlier, c[:, None] - c, -jnp.inf))  # i j h; no power is positive

    def met(a, b):
        return (a[:, None] * b * faded).sum(axis=-1)

    system = jnp.eye(len(q)) + beta[:, None] * jnp.tril(met(k, k), -1)
    right = beta[:, None] * (v - (k * jnp.exp(c)) @ state)
    u = jax.scipy.linalg.solve_triangular(system, right, lower=True, unit_diagonal=True)
    out = (q * jnp.exp(c)) @ state + met(q, k) @ u
    return out, jnp.exp(c[-1])[:, None] * state + (k * jnp.exp(c[-1] - c)).T @ u


in_block = jax.jit(in_block)


@jax.jit
def one_by_one(q, k, v, g, beta, state):
    def token(state, given):
        q, k, v, g, beta = given
        out, state = step(state, q, k, v, jnp.exp(g), beta)
        return state, out

    state, out = jax.lax.scan(token, state, (q, k, v, g, beta))
    return out, state


def in_blocks(q, k, v, g, beta, state, m):
    outs = []
    for first in range(0, len(q), m):
        rows = (a[first : first + m] for a in (q, k, v, g, beta))
        out, state = in_block(*rows, state)
        outs.append(out)
    return jnp.concatenate(outs), state


# %% [markdown]
# Equal means equal up to rounding, and float64 leaves little of that. Here an error of 1e-13 is allowed:

# %%
with jax.enable_x64():
    rng = np.random.default_rng(0)
    T, H, V = 42, 8, 6
    q, k, v, start = (jnp.asarray(rng.standard_normal(shape)) for shape in ((T, H), (T, H), (T, V), (H, V)))
    beta = jnp.asarray(rng.uniform(0, 1, T))
    for name, width in (("one gate", 1), ("a gate a channel", H)):
        g = jnp.asarray(-rng.exponential(0.2, (T, width)))
        want = one_by_one(q, unit(k), v, g, beta, start)
        for m in (7, 42):
            found = in_blocks(q, unit(k), v, g, beta, start, m)
            errors = [compare.relative(a, b) for a, b in zip(found, want, strict=True)]
            print(f"{name}, m = {m:2}, {found[0].dtype}: {max(errors) <= 1e-13}")

# %% [markdown]
# What it costs, in products and sums of a token and head of Qwen3-Next, and how many steps of a prompt of 131,072
# tokens wait for each other:

# %%
qwen = deltanet.models["Qwen3-Next-80B-A3B"]
for m in (1, 16, 64, 256, 1024):
    cost = deltanet.cost(dataclasses.replace(qwen, block_size=m), context=131_072, new=131_072)
    print(f"m = {m:>5,}: {cost.flops / 131_072 / 32:>9,.0f} flops, {131_072 // m:>7,} blocks")

# %% [markdown]
# The package takes m = 64: 1.1 times the arithmetic of m = 1, nearly all of it in products of matrices, and 64 times
# fewer blocks that wait. (The convolution, next, is in these numbers too.)
#
# ## A short convolution, and its state
#
# All of these layers pass q, k and v (Mamba: x, B and C) through a *convolution* first: each channel becomes a weighted
# sum of its last L values, mostly L = 4. That gives a token a view of its neighbours before the state sees it.
#
#     y_t = w_0 r_(t-L+1) + ... + w_(L-1) r_t          channel by channel; rows before the first token are 0
#
# To continue, a decode step needs the last L - 1 rows r. They are the second part of the cache: rows as they came in,
# before the weights and before the activation silu(y) = y sigmoid(y).


# %%
@jaxtyped(typechecker=beartype)
def convolve(
    r: Float[Array, "T X"], w: Float[Array, "L X"], held: Float[Array, "P X"]
) -> tuple[Float[Array, "T X"], Float[Array, "P X"]]:
    """(sums, the rows to keep), P = L - 1."""
    rows = jnp.concatenate([held, r])
    sums = sum(w[j] * rows[j : j + len(r)] for j in range(len(w)))
    return sums, rows[len(r) :]


L, X = 4, 3
r, w, empty = normal(12, 9, X), normal(13, L, X), jnp.zeros((L - 1, X))
whole, _ = convolve(r, w, empty)


def continued(P, keep):
    """Sums of P rows, then of the others one by one."""
    sums, held = convolve(r[:P], w, empty)
    outs = [sums]
    for t in range(P, len(r)):
        sums, held = convolve(r[t : t + 1], w, keep(held))
        outs.append(sums)
    return jnp.concatenate(outs)


prompts = (1, 2, 3, 7)
print(f"prompts of {prompts} rows:", [close(continued(P, lambda held: held), whole) for P in prompts])
print("kept after silu instead:", [close(continued(P, jax.nn.silu), whole) for P in prompts])
print("held after a prompt of one row:\n", convolve(r[:1], w, empty)[1])

# %% [markdown]
# A prompt shorter than the kernel needs no special case, if rows of zeros stand before it. The second line is a bug
# that no test without decode can see: all prompts come out right.
#
# LFM2's layers are this convolution between two gates, and nothing else. Three projections B, C, x of a token:
#
#     y = (C * conv(B * x)) W_o
#
# It has no activation, and the rows that it holds are those of B * x. A token sees the last L = 3; what is older must
# come through LFM2's layers of attention.
#
# ## Against the package
#
# Four layers in full from the pieces above. In the DeltaNets q and k are divided by their lengths, q by sqrt(H) too,
# and the outputs of a head by their root mean square before a gate. Gated DeltaNet has K key heads for N value heads.
# Mamba-2 adds its input, times a learnt number (*skip*), to the output.

# %%
heads_of = jax.vmap(one_by_one, in_axes=(1, 1, 1, 1, 1, 0), out_axes=(1, 0))  # over the heads: T N ...


def rms(x, weight, eps):
    return x / jnp.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def length_1(x):
    return x / jnp.sqrt((x**2).sum(axis=-1, keepdims=True) + 1e-6)


def mixed(rows, w, bias=0.0):
    """silu of the convolution of [T ...] side by side, from an empty state, cut again."""
    flat = jnp.concatenate([r.reshape(len(r), -1) for r in rows], axis=1)
    sums, _ = convolve(flat, w, jnp.zeros((len(w) - 1, flat.shape[1])))
    parts = jnp.split(jax.nn.silu(sums + bias), np.cumsum([r[0].size for r in rows])[:-1], axis=1)
    return [part.reshape(r.shape) for part, r in zip(parts, rows, strict=True)]


def deltanet_layer(cfg, p, x):
    K, N, H, V = p["wk"].shape[1], *p["wv"].shape[1:2], p["wk"].shape[2], p["wv"].shape[2]
    q, k, v = mixed([jnp.einsum("td,dnh->tnh", x, p[w]) for w in ("wq", "wk", "wv")], p["w_conv"])
    q, k = (jnp.repeat(length_1(a), N // K, axis=1) for a in (q, k))
    g = -jnp.exp(p["a_log"]) * jax.nn.softplus(x @ p["wa"] + p["dt_bias"])
    beta = jax.nn.sigmoid(x @ p["wb"])
    out, _ = heads_of(q / H**0.5, k, v, g[..., None], beta, jnp.zeros((N, H, V)))
    gate = jax.nn.silu(jnp.einsum("td,dnv->tnv", x, p["wg"]))
    return jnp.einsum("tnv,nvd->td", rms(out, p["o_norm"], cfg.rms_norm_eps) * gate, p["wo"])


def kda_layer(cfg, p, x):
    N, H = p["wq"].shape[1:]
    q, k, v = mixed([jnp.einsum("td,dnh->tnh", x, p[w]) for w in ("wq", "wk", "wv")], p["w_conv"])
    f, gate = (jnp.einsum("td,dc,cnh->tnh", x, p[f"{w}_a"], p[f"{w}_b"]) for w in ("wf", "wg"))
    g = -jnp.exp(p["a_log"])[:, None] * jax.nn.softplus(f + p["dt_bias"])
    beta = jax.nn.sigmoid(x @ p["wb"])
    out, _ = heads_of(length_1(q) / H**0.5, length_1(k), v, g, beta, jnp.zeros((N, H, H)))
    return jnp.einsum("tnv,nvd->td", rms(out, p["o_norm"], cfg.rms_norm_eps) * jax.nn.sigmoid(gate), p["wo"])


def mamba2_layer(cfg, p, tokens):
    z, x, B, C = (jnp.einsum("td,dnv->tnv", tokens, p[w]) for w in ("wz", "wx", "wk", "wq"))
    x, B, C = mixed([x, B, C], p["w_conv"], p["b_conv"])
    delta = jax.nn.softplus(tokens @ p["wdt"] + p["dt_bias"])
    g = -jnp.exp(p["a_log"]) * delta
    B, C = (jnp.repeat(a, x.shape[1] // a.shape[1], axis=1) for a in (B, C))  # a group of heads shares them
    empty = jnp.zeros((x.shape[1], B.shape[2], x.shape[2]))
    out, _ = heads_of(C, B, delta[..., None] * x, g[..., None], None, empty)
    out = out + p["skip"][:, None] * x
    gated = (out * jax.nn.silu(z)).reshape(len(tokens), cfg.n_groups, -1)
    normed = rms(gated, p["o_norm"].reshape(cfg.n_groups, -1), cfg.rms_norm_eps).reshape(x.shape)
    return jnp.einsum("tnv,nvd->td", normed, p["wo"])


def short_layer(cfg, p, tokens):
    B, C, x = tokens @ p["wb"], tokens @ p["wc"], tokens @ p["wx"]
    sums, _ = convolve(B * x, p["w_conv"], jnp.zeros((cfg.conv_L_cache - 1, x.shape[1])))
    return (C * sums) @ p["wo"]


# %% [markdown]
# The package's `forward` and its prefill with a decode step at the end, against these:

# %%
mamba2, short = jforge.get("mamba2"), jforge.get("short_conv")
two_groups = mamba2.Config(
    hidden_size=24, num_heads=4, head_dim=6, state_size=5, n_groups=2, norm="gate_first", block_size=5
)
taps = short.Config(hidden_size=24)


def both(att, cfg, p, x):
    """(forward, the same by a prefill of all but the last token and a decode step)"""
    start, cache = att.prefill(p, cfg, x[:, :-1], att.init_cache(cfg, 1, 32, jnp.float32))
    last, _ = att.decode(p, cfg, x[:, -1:], cache)
    return att.forward(p, cfg, x), jnp.concatenate([start, last], axis=1)


both = jax.jit(both, static_argnums=(0, 1))
x = normal(14, 1, 13, 24)
p_mamba, p_short = started(mamba2, two_groups, 300), weights(short, taps, 400)
layers = {
    "gated_deltanet": (deltanet_layer, deltanet, one_gate, p_one), "kda": (kda_layer, kda, by_channel, p_by),
    "mamba2": (mamba2_layer, mamba2, two_groups, p_mamba), "short_conv": (short_layer, short, taps, p_short),
}  # fmt: skip
for name, (layer, att, cfg, p) in layers.items():
    want = jax.jit(layer, static_argnums=0)(cfg, p, x[0])
    print(f"{name}:", *(close(y[0], want) for y in both(att, cfg, p, x)))

# %% [markdown]
# ## The six questions
#
# The answers for a row of 131,072 tokens, side by side, each of the mechanism's first shipped model:
# Qwen3-Next-80B-A3B, Kimi-Linear-48B-A3B, Nemotron-H-8B, LFM2-1.2B.

# %%
answers = [questions(name).data.set_axis([name], axis=1) for name in layers]
together = pd.concat(answers, axis=1).reindex(answers[0].index).fillna("none")
looks = [{"selector": "th, td", "props": "text-align: left; vertical-align: top; min-width: 7em"}]
together.style.set_uuid("four").set_table_styles(looks)

# %% [markdown]
# Nothing grows in any of them, and "entries that a query reads" is one: the state. Whatever the context, a step reads
# all that is stored and writes all of it. That is the picture too: five decode steps after 8 tokens, of grouped queries
# (`gqa`, whose cache has a slot for each token) and of Gated DeltaNet, as `watch` finds them by experiment.

# %%
gqa = jforge.get("gqa")
grouped = gqa.Config(hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=6)
found = {}
for att, cfg, p in (
    (gqa, grouped, weights(gqa, grouped, 500)),
    (deltanet, one_gate, p_one),
):
    _, prompt = jax.jit(att.prefill, static_argnums=1)(p, cfg, x[:, :8], att.init_cache(cfg, 1, 13, jnp.float32))
    found |= watch(att, p, cfg, x[:, 8:13], prompt)
picture(found, "grouped queries have k and v, Gated DeltaNet has state and conv", first=8)

# %% [markdown]
# ## In bytes
#
# Qwen3-Next-80B-A3B has 48 layers. Every fourth one is full attention with two key heads of 256 channels, the other 36
# are Gated DeltaNet with 32 states of 128 x 128. The cache is bfloat16, the states float32. The 36 layers store
# this, at any context:

# %%
config = {
    "model_type": "qwen3_next", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 16,
    "num_key_value_heads": 2, "head_dim": 256, "rope_theta": 1e7, "full_attention_interval": 4,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
}  # fmt: skip
kinds = jforge.hf.layers(config)


def stored(mechanism, context):
    """Bytes of one row in all layers of that kind."""
    costs = [jforge.get(n).cost(cfg, context=context) for n, cfg in kinds if n == mechanism]
    return sum(sum(cost.stored.values()) for cost in costs)


count = sum(n == "gated_deltanet" for n, _ in kinds)
print(f"{count} layers of Gated DeltaNet: {stored('gated_deltanet', 131_072) / 2**20:.1f} MiB a row")

# %% [markdown]
# Predict: at 131,072 tokens, how many times that do the *twelve* full layers store?

# %% tags=["predict"]
guess = None

# %%
reveal(round(stored("gqa", 131_072) / stored("gated_deltanet", 131_072), 1), guess)
print(f"12 full layers: {stored('gqa', 131_072) / 2**20:,.0f} MiB")

# %%
tokens = np.geomspace(64, 2**18, 40).astype(int)
plt.figure(figsize=(10, 4.4))
for mechanism, label in (("gqa", "12 full layers"), ("gated_deltanet", "36 layers of Gated DeltaNet")):
    plt.loglog(tokens, [stored(mechanism, int(S)) / 2**20 for S in tokens], label=label)
if_full = [4 * stored("gqa", int(S)) / 2**20 for S in tokens]
plt.loglog(tokens, if_full, label="48 layers, were all of them full")
plt.xlabel("tokens so far, S")
plt.ylabel("MiB of a row")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# Up to some thousand tokens the states are the larger part; exercise 2 asks where a layer of each kind stores the same.
# In a long text nearly all bytes are those of the twelve, and the model needs a quarter of what 48 full layers would.
# The states have a price of their own: a step *writes* them too, as large as they are. Notebook 16B has the kernel.
#
# ## Exercises
#
# Set the answer, run the two cells. A function is called by the second one.
#
# **1.** The same pair of key and value, |k| = 1, is written again and again with beta = 0.5, without decay. After how
# many writes is less than 1 % of the first error left?

# %%
answer_1 = None

# %% tags=["solution"]
answer_1 = next(n for n in range(1, 100) if 0.5**n < 0.01)

# %%
exercise(1, answer_1, "cacb10e98cf4")

# %% [markdown]
# **2.** A full layer of Qwen3-Next stores 2 x 256 numbers of bfloat16 for keys and as many for values, for each token.
# How many tokens does it store in the bytes of one layer of Gated DeltaNet (2 MiB of states, 48 KiB of rows)?

# %%
answer_2 = None

# %% tags=["solution"]
answer_2 = (2 * 2**20 + 48 * 2**10) // (2 * 2 * 256 * 2)

# %%
exercise(2, answer_2, "f5e656686925")

# %% [markdown]
# **3.** Write `answer_3(k, decay, beta)`: the H x H matrix by which a step with the delta rule multiplies the old
# state, so that the new one is that product and beta k v^T. decay has H numbers.

# %%
answer_3 = None


# %% tags=["solution"]
def answer_3(k, decay, beta):
    return (jnp.eye(len(k)) - beta * jnp.outer(k, k)) @ jnp.diag(decay)


# %%
exercise(3, answer_3, "b8e9a221536b", jnp.array([0.6, 0.8, 0.0]), jnp.array([0.5, 0.25, 1.0]), 0.5)

# %% [markdown]
# **4.** Write `answer_4(k, v, beta)`: what each of T tokens writes, T x V, from an empty state and without decay, with
# one solve and no loop. (k is T x H, v T x V, beta has T numbers.)

# %%
answer_4 = None


# %% tags=["solution"]
def answer_4(k, v, beta):
    system = jnp.eye(len(k)) + beta[:, None] * jnp.tril(k @ k.T, -1)
    return jax.scipy.linalg.solve_triangular(system, beta[:, None] * v, lower=True)


# %%
given = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), jnp.array([[1.0], [2.0], [4.0]]), jnp.array([1.0, 0.5, 0.25])
exercise(4, answer_4, "02de7306cb1e", *given)

# %% [markdown]
# **5.** Write `answer_5(rows, P, L)`: what a convolution of L taps holds after the first P of these rows, an L - 1 x X
# array.

# %%
answer_5 = None


# %% tags=["solution"]
def answer_5(rows, P, L):
    return jnp.concatenate([jnp.zeros((L - 1, rows.shape[1])), rows[:P]])[P:]


# %%
exercise(5, answer_5, "d11ce31b3412", jnp.arange(1.0, 13.0).reshape(6, 2), 2, 5)

# %% [markdown]
# **6.** A head of Mamba-2 with the rate A = 1 gets tokens with delta = 0.01. After how many of them is half of a token
# forgotten?

# %%
answer_6 = None

# %% tags=["solution"]
answer_6 = float(np.log(2) / 0.01)

# %%
exercise(6, answer_6, "a06f3ac4b0a1")
