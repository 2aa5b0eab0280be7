# %% [markdown]
# # 06A. Latent attention: keys and values that are made anew
#
# Notebook 05A ends with a cache that takes too long to read. Grouped queries make it smaller by having fewer key heads.
# *Multi-head latent attention* (MLA, DeepSeek-V2) keeps all heads and stores something else: one vector a token, the
# *latent*, from which the keys and values of every head can be computed.
#
# Letters: T new tokens, S slots of the cache, D channels of a token, N query heads, C channels of the latent, V of a
# value. A query and a key have two parts: `nope` channels made from the latent, and R *rotary* channels, which carry
# the position. There is one row, so no B.
#
#     [a_s | b_s] = x_s Wkv_a     latent_s = norm(a_s)    k_rope_s = rotate(b_s)       what is stored: C + R numbers
#     k_s,n = [latent_s Wk_n | k_rope_s]    v_s,n = latent_s Wv_n      what attention needs: N (nope + R + V) numbers
#
# In the code Wkv_a is `wkv_a`; Wk and Wv of all heads are `wk_b` and `wv_b`. (DeepSeek makes the queries from a latent
# too. It is not stored, so it is left out here.)

# %%
import jax
import jax.numpy as jnp
from beartype import beartype
from jaxtyping import Array, Float, jaxtyped

import jforge
from jforge.core import compare
from jforge.lessons import exercise, picture, plots, questions, reveal, watch

jax.config.update("jax_default_matmul_precision", "highest")  # a GPU may otherwise round products to fewer digits
jnp.set_printoptions(precision=3, suppress=True)

att = jforge.get("mla")
small = att.Config(  # with the names of Hugging Face: D, N, C (its "lora rank" is the width of a latent), nope, R, V
    hidden_size=32, num_attention_heads=4, kv_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)  # fmt: skip
w = att.init_params(jax.random.key(0), small)
x = jax.random.normal(jax.random.key(1), (12, 32))  # T D
print({name: matrix.shape for name, matrix in w.items()})

# %% [markdown]
# ## The latent
#
# `rotate` is RoPE, the usual way to tell a model about positions: each pair of channels is turned by an angle that
# grows with the position p, fast for the first pair, slower for the later ones. (`*n`: any axes, such as the heads, or
# none.) `norm` divides a vector by its root mean square and multiplies it by a *gain* a channel, a parameter
# (`kv_norm`). `store` makes what the cache holds, the rotary key rotated at its own position, and `ask` the queries.


# %%
@jaxtyped(typechecker=beartype)
def rotate(x: Float[Array, "T *n R"], p: Array) -> Float[Array, "T *n R"]:
    """Channels 2j and 2j + 1, as one complex number, times exp(i p theta^(-2j / R))."""
    R = x.shape[-1]
    angle = p[:, None] * small.rope_parameters["rope_theta"] ** (-jnp.arange(0, R, 2) / R)
    turn = jnp.exp(1j * angle).reshape(len(p), *[1] * (x.ndim - 2), R // 2)
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    return jnp.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


def norm(x, gain):
    return gain * x / jnp.sqrt((x * x).mean(axis=-1, keepdims=True) + small.rms_norm_eps)


@jaxtyped(typechecker=beartype)
def store(w: dict[str, Array], x: Float[Array, "T D"], p: Array) -> tuple[Float[Array, "T C"], Float[Array, "T R"]]:
    latent, k_rope = jnp.split(x @ w["wkv_a"], [small.kv_lora_rank], axis=-1)
    return norm(latent, w["kv_norm"]), rotate(k_rope, p)


@jaxtyped(typechecker=beartype)
def ask(
    w: dict[str, Array], x: Float[Array, "T D"], p: Array
) -> tuple[Float[Array, "T N nope"], Float[Array, "T N R"]]:
    q_nope, q_rope = jnp.split(jnp.einsum("td,dnh->tnh", x, w["wq"]), [small.qk_nope_head_dim], axis=-1)
    return q_nope, rotate(q_rope, p)


p = jnp.arange(len(x))
latent, k_rope = store(w, x, p)
print("latent", latent.shape, "k_rope", k_rope.shape)

# %% [markdown]
# ## The naive form
#
# Expand the latents into the keys and values of all heads, then attend as in notebook 01A. The rotary key is the same
# for all heads, so it is repeated. `small.scaling` is (nope + R)^-1/2, the scale of 01A.


# %%
def softmax_over(logits, T):
    """logits N T S of the last T tokens; each sees the slots up to its own."""
    S = logits.shape[-1]
    seen = jnp.arange(S) <= (S - T + jnp.arange(T))[:, None]
    return jax.nn.softmax(jnp.where(seen, logits, -jnp.inf))


@jaxtyped(typechecker=beartype)
def naive(
    w: dict[str, Array], q_nope: Float[Array, "T N nope"], q_rope: Float[Array, "T N R"],
    latent: Float[Array, "S C"], k_rope: Float[Array, "S R"],
) -> Float[Array, "T N V"]:  # fmt: skip
    k_nope = jnp.einsum("sc,cnh->snh", latent, w["wk_b"])
    v = jnp.einsum("sc,cnv->snv", latent, w["wv_b"])
    k = jnp.concatenate([k_nope, jnp.broadcast_to(k_rope[:, None], (*k_nope.shape[:2], k_rope.shape[-1]))], axis=-1)
    q = jnp.concatenate([q_nope, q_rope], axis=-1)
    weights = softmax_over(small.scaling * jnp.einsum("tnh,snh->nts", q, k), len(q))
    return jnp.einsum("nts,snv->tnv", weights, v)


q_nope, q_rope = ask(w, x, p)
out = naive(w, q_nope, q_rope, latent, k_rope)

many = jax.random.normal(jax.random.key(2), (100, 32))  # T D
from_latent = store(w, many, jnp.arange(100))[0] @ jnp.concatenate([w["wk_b"], w["wv_b"]], axis=-1).reshape(10, -1)
from_x = many @ jax.random.normal(jax.random.key(3), (32, from_latent.shape[1]))  # as in multi-head attention
for name, table in (("the latent", from_latent), ("x", from_x)):
    print(f"k_nope and v from {name}: {table.shape}, rank {jnp.linalg.matrix_rank(table)}")

# %% [markdown]
# The rank says what is given up. 100 tokens have N (nope + V) = 56 numbers each, without the rotary part. Made from x
# directly, a row of that table is a mixture of D = 32 patterns; made from the latent, of C = 10. Each head still has a
# key of its own, but all heads together know of a token only what C numbers say.
#
# The naive form saves memory and nothing else. Each step would expand the whole cache again.
#
# ## The absorbed form
#
# A logit is a product of three things, and such a product may be taken in either order:
#
#     q_n . (latent_s Wk_n) = (Wk_n^T q_n) . latent_s
#
# On the left every *slot* goes through Wk, on the right every *query* does, and then meets the latent as it lies in the
# cache. The values in the same way: the weighted sum of latent_s Wv_n is Wv_n applied to the weighted sum of latents.
# The matrix is *absorbed* by the query and by the output.


# %%
@jaxtyped(typechecker=beartype)
def absorbed(
    w: dict[str, Array], q_nope: Float[Array, "T N nope"], q_rope: Float[Array, "T N R"],
    latent: Float[Array, "S C"], k_rope: Float[Array, "S R"],
) -> Float[Array, "T N V"]:  # fmt: skip
    q_latent = jnp.einsum("tnh,cnh->tnc", q_nope, w["wk_b"])
    logits = jnp.einsum("tnc,sc->nts", q_latent, latent) + jnp.einsum("tnr,sr->nts", q_rope, k_rope)
    weights = softmax_over(small.scaling * logits, len(q_nope))
    return jnp.einsum("tnc,cnv->tnv", jnp.einsum("nts,sc->tnc", weights, latent), w["wv_b"])


def close(a, b):
    return compare.relative(a, b) <= compare.OUT["float32"]


print("naive and absorbed agree:", close(out, absorbed(w, q_nope, q_rope, latent, k_rope)))

# %% [markdown]
# Look at the shapes inside: all heads meet *the same* `latent`, no head index on it. The absorbed form is multi-query
# attention (one key head), whose key has C + R channels, and whose value is the first C channels of that same key.
#
# ## Why the rotary key lies apart
#
# Write rot_p for a rotation at position p. Angles add, and two vectors that are turned alike keep their product, so
# rot_t(q) . rot_s(k) = q . rot_(s-t)(k): only the distance counts. If the nope part were rotated too, k = latent_s Wk
# would put rot_(s-t) between q and Wk. The matrix that the query has to absorb would be another one for every slot:

# %%
W_k, q_0, t = w["wk_b"][:, 0], q_nope[11:, 0], 11  # C nope and 1 nope, of head 0
for s in (11, 10, 6):
    rotated = rotate(q_0, jnp.array([t])) @ rotate(latent[s : s + 1] @ W_k, jnp.array([s])).T
    q_latent = rotate(W_k, jnp.full(len(W_k), s - t)) @ q_0[0]  # each of the C rows of Wk is turned
    print(f"s = {s:>2}: the query would be {q_latent[:4]}..., same logit:", close(rotated[0, 0], q_latent @ latent[s]))

# %% [markdown]
# So position goes into R channels of its own, made from x directly and shared by all heads: their logit is q_rope .
# k_rope, with nothing in between. This costs R more numbers a token.
#
# ## The package
#
# Its `prefill` and `forward` take the naive form, its `decode` the absorbed one. Seven tokens of prompt, five steps:

# %%
y, cache = att.prefill(w, small, x[None, :7], att.init_cache(small, 1, 16, jnp.float32))
y_rest, after = att.decode(w, small, x[None, 7:], cache)
package = jnp.concatenate([y, y_rest], axis=1)[0]
print("the output:", close(package, jnp.einsum("tnv,nvd->td", out, w["wo"])))
print("the cache:", close(after.latent[0, :12], latent), close(after.k_rope[0, :12], k_rope))

# %% [markdown]
# What the steps touch, found by experiment as in 05A. The two buffers share a panel, as they have the same picture:
# each step writes one slot in both and reads every slot up to its own (the new one too, where "w" hides the "r").
# Nothing is skipped and nothing is lost; the compression is in what a slot holds.

# %%
picture(watch(att, w, small, x[None, 7:], cache), "five decode steps after a prompt of 7 tokens", first=7)

# %% [markdown]
# ## Bytes
#
# DeepSeek-V3, one layer. A cache of keys and values for its N heads would have N (nope + R + V) numbers a token; the
# latent cache has C + R.

# %%
cfg = att.models["DeepSeek-V3"]
N, C, R, nope, V = (
    cfg.num_attention_heads, cfg.kv_lora_rank, cfg.qk_rope_head_dim, cfg.qk_nope_head_dim, cfg.v_head_dim
)  # fmt: skip
ELEMENT = jnp.dtype("bfloat16").itemsize
print(f"N={N} C={C} R={R} nope={nope} V={V}")

# %% [markdown]
# Predict: how many times smaller is the latent cache?

# %% tags=["predict"]
guess = None

# %%
slot, expanded = (C + R) * ELEMENT, N * (nope + R + V) * ELEMENT
reveal(expanded / slot, guess)
print(f"{expanded:,} bytes a token against {slot:,}; the package says {att.cost(cfg, context=1000).per_token:,}")

# %% [markdown]
# For comparison, a model of each of these mechanisms, the first in the package. They differ in size:

# %%
for name in ("mha", "gqa", "mqa", "mla"):
    other = jforge.get(name)
    model, its = next(iter(other.models.items()))
    held = f"{other.cost(its, context=1000).per_token:>7,} bytes a token in a layer of {model}"
    print(f"{name}: {held}, N = {its.num_attention_heads}")

# %% [markdown]
# One key head (mqa) takes less still. But there all heads have the same key and the same value (notebook 03A); here
# each head makes its own from what is shared.

# %%
questions("mla")

# %% [markdown]
# ## Flops
#
# Count a product and a sum as two. For one query and one slot, all heads:

# %%
naive_pair = 2 * N * (nope + R + V)  # the logit, and the weighted value
absorbed_pair = 2 * N * (C + R + C)  # the same with longer vectors
expansion = 2 * C * N * (nope + V)  # of one slot into keys and values, once for all queries
S = 8192
print(f"naive {naive_pair:,}, absorbed {absorbed_pair:,}: {absorbed_pair / naive_pair:.1f} times")
print("decode:", S * absorbed_pair, "flops; the package says", att.cost(cfg, context=S).flops)
T = 512
pairs = sum(range(S - T + 1, S + 1))  # the i-th new token sees the slots up to its own
print("prefill:", pairs * naive_pair, "flops; the package says", att.cost(cfg, context=S, new=T).flops)

# %% [markdown]
# A pair costs more in the absorbed form. But the naive form has to expand each slot first (the package's `cost` does
# not count that, since it counts a projection nowhere). With few queries, the expansion is the larger part. With many
# queries, it is shared by all of them. (The absorbed form pays for its T new tokens what the naive one pays for their
# slots: to absorb q and the output is `expansion` flops a query, too.)
#
# Predict: from how many new tokens T on does the naive form do fewer flops for an old slot, which all T queries see?

# %% tags=["predict"]
guess = None

# %%
crossing = expansion / (absorbed_pair - naive_pair)
reveal(crossing, guess)
for T in (1, 16, 128, 1024):
    a, b = expansion + T * naive_pair, T * absorbed_pair
    print(f"T = {T:>5,}: naive {a:>13,}, absorbed {b:>13,} flops a slot: {'naive' if a < b else 'absorbed'}")
print("C (nope + V) / (2 C - nope - V) =", round(C * (nope + V) / (2 * C - nope - V), 1))

# %%
import numpy as np

plt = plots()
across = np.geomspace(1, 4096, 100)
figure, ax = plt.subplots(figsize=(10, 4.4))
ax.loglog(across, (expansion + across * naive_pair) / across, label="naive, the expansion included")
ax.loglog(across, np.full_like(across, absorbed_pair), label="absorbed")
ax.axvline(crossing, color="#888888", linestyle=":", linewidth=1.5)
ax.text(crossing * 1.1, 3e7, f"T = {crossing:.0f}", color="#444444")
ax.set(xlabel="new tokens T that share an old slot", ylabel="flops a query and slot", ylim=(5e4, 1e8))
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# So both forms are in use: the absorbed one for decode, the naive one for prefill. (A prompt from scratch has no old
# slots, and naive does fewer flops at any length.) N and R cancel, as the formula shows, and S never came in.
#
# ## Flops for bytes
#
# Now the second half of the trade. In 05A the intensity of a decode step, its flops for each byte that it reads, was G,
# the query heads that share a key head: far below what a card balances at. Here all N heads share one key, and its
# first C channels are used twice, as key and as value:

# %%
from pallas_kernels.device import DEVICES

h100 = next(device for device in DEVICES if device.name == "H100")
bandwidth, peak = h100.bandwidth * 1e9, h100.tflops * 1e12  # bytes and flops a second, of its data sheet
cost = att.cost(cfg, context=S)
intensity = cost.flops / sum(cost.read.values())
weights = C * N * (nope + V) * ELEMENT  # bytes of wk_b and wv_b
print(f"absorbed: {intensity:.0f} flops a byte; the card balances at {peak / bandwidth:.0f}")

rows = {
    "keys and values of all heads": (S * expanded, S * naive_pair),
    "latent, expanded in each step": (S * slot + 2 * S * expanded, S * (naive_pair + expansion)),
    "latent, absorbed": (S * slot, S * absorbed_pair),
}
for form, (read, flops) in rows.items():
    print(f"{form:30} {read / bandwidth * 1e6:7.1f} us for the bytes, {flops / peak * 1e6:7.1f} us for the flops")
print(f"wk_b and wv_b, {weights / 1e6:.1f} MB: {weights / bandwidth * 1e6:.1f} us")

# %% [markdown]
# The last line comes to each of the three. Weights are read once for all rows of a batch (05A), but for a single one
# they take longer than its latents.
#
# (The second form writes the expanded keys and values to memory and reads them back, as a program of plain matrix
# products would.) The absorbed step reads the fewest bytes, and its flops take nearly as long as they do. That is the
# trade: more flops, on a card whose arithmetic would have waited. It also means that a step of MLA has little
# arithmetic left to give away, and that its kernel has to read and to multiply at the same time. That is notebook 06B.
#
# One more cost. When each of several cards computes some of the N heads, it needs the *whole* latent cache, as there is
# only one key head: the bytes do not shrink with the number of cards, only the flops do.
#
# ## Exercises
#
# Set the answer, run the two cells. A function is called by the second one.
#
# **1.** DeepSeek-V3 has 61 layers. How many bytes does one token take in all of them, in bfloat16?

# %%
answer_1 = None

# %% tags=["solution"]
answer_1 = 61 * slot

# %%
exercise(1, answer_1, "7a63bfc09972")

# %% [markdown]
# **2.** A model with grouped queries has H = V = 128 and the same bytes a token and layer. How many key heads has it?
# (The answer is not a whole number.)

# %%
answer_2 = None

# %% tags=["solution"]
answer_2 = (C + R) / (128 + 128)

# %%
exercise(2, answer_2, "d9fcfef46705")

# %% [markdown]
# **3.** The heads of DeepSeek-V3 are spread over 8 cards, 16 on each. What is the intensity of the absorbed step on one
# card?

# %%
answer_3 = None

# %% tags=["solution"]
answer_3 = 2 * (N // 8) * (2 * C + R) / slot

# %%
exercise(3, answer_3, "18ddc4e1f758")

# %% [markdown]
# **4.** wv_b (C, N, V) and wo (N, V, D) follow each other, so they could be multiplied into one matrix (N, C, D) before
# the model is served. How many times as many weights would that be as the two have together? (D of DeepSeek-V3 is
# `cfg.hidden_size`.)

# %%
answer_4 = None

# %% tags=["solution"]
answer_4 = N * C * cfg.hidden_size / (C * N * V + N * V * cfg.hidden_size)

# %%
exercise(4, answer_4, "2436eceea8fd")

# %% [markdown]
# **5.** Write `answer_5(latent, k_rope, new_latent, new_k_rope, q_latent, q_rope)`, the inside of a decode step of one
# token: append the new slot (`new_latent` has C channels) to the cache and give N x C, the weighted latents. q_latent
# is N C and already absorbed; logits are not scaled.

# %%
answer_5 = None


# %% tags=["solution"]
def answer_5(latent, k_rope, new_latent, new_k_rope, q_latent, q_rope):
    latent, k_rope = jnp.vstack([latent, new_latent]), jnp.vstack([k_rope, new_k_rope])
    return jax.nn.softmax(q_latent @ latent.T + q_rope @ k_rope.T) @ latent


# %%
exercise(
    5, answer_5, "dd16b35aff01",
    *(jax.random.normal(jax.random.key(i), n) for i, n in enumerate([(3, 2), (3, 1), (2,), (1,), (2, 2), (2, 1)])),
)  # fmt: skip
