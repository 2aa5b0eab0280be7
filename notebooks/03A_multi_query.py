# %% [markdown]
# # 03A. Multi-query attention: one key head, and reads that are really fewer
#
# Multi-query attention is the end of the road of 04A: all N query heads share **one** key head. The cache is 1/N of
# that of multi-head attention, and a decode step *can* read 1/N. Whether it does is up to the program, and whether it
# helps is up to what else the step reads. This notebook counts both.
#
# Letters: B rows, T new tokens, S slots (one a token), D channels of a token, N query heads, H channels of a query or
# key, V of a value. There is one key head, so k has no axis for heads.

# %%
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from beartype import beartype
from jaxtyping import Array, Float, jaxtyped

import jforge
from jforge.core import compare
from jforge.lessons import exercise, picture, plots, questions, reveal, watch
from pallas_kernels.device import DEVICES

jax.config.update("jax_default_matmul_precision", "highest")  # a GPU may otherwise round products to fewer digits
jnp.set_printoptions(precision=3, suppress=True)

# %% [markdown]
# ## From scratch
#
# The heads' queries are rows that all meet the same matrix of keys. For one row and one new token, the whole of
# multi-query attention is two products of matrices, N H by H S and N S by S V:


# %%
@jaxtyped(typechecker=beartype)
def step(q: Float[Array, "N H"], k: Float[Array, "S H"], v: Float[Array, "S V"]) -> Float[Array, "N V"]:
    """One new token that sees all S slots."""
    return jax.nn.softmax(q @ k.T * q.shape[1] ** -0.5) @ v


att = jforge.get("mqa")
cfg = att.Config(hidden_size=32, num_attention_heads=4)
w = att.init_params(jax.random.key(0), cfg)
x = jax.random.normal(jax.random.key(1), (1, 12, 32))
k, v = x[0] @ w["wk"][:, 0], x[0] @ w["wv"][:, 0]  # D 1 H: the package keeps an axis of one head
last = step(jnp.einsum("d,dnh->nh", x[0, -1], w["wq"]), k, v)
theirs = att.forward(w, cfg, x)[0, -1]
ours = jnp.einsum("nv,nvd->d", last, w["wo"])
print({name: weight.shape for name, weight in w.items()})
print("the last token, equal to the package's mqa:", compare.relative(ours, theirs) <= compare.OUT["float32"])

# %% [markdown]
# In multi-head attention it would be N products of a *vector* with a matrix of its own. That is the difference for a
# machine: a matrix that is loaded once is used N times.
#
# ## What the heads lose
#
# Stack the logits of all heads: N T rows, S columns. In multi-head attention each head has keys of its own. Here all
# rows are combinations of the same H columns of k, so the rank of the stack (the number of independent rows) cannot
# pass H.
#
# Predict: N = 4 heads, H = 8, T = S = 64 random tokens of D = 32 channels. What is the rank of the 256 x 64 logits of
# **multi-head** attention? (That of multi-query is 8.)

# %% tags=["predict"]
guess = None

# %%
many = jax.random.normal(jax.random.key(2), (64, 32))


def rank(name):
    its = jforge.get(name).Config(hidden_size=32, num_attention_heads=4)
    p = jforge.get(name).init_params(jax.random.key(3), its)
    q, k = jnp.einsum("td,dnh->nth", many, p["wq"]), jnp.einsum("sd,dnh->nsh", many, p["wk"])
    logits = jnp.concatenate([q[n] @ k[n % len(k)].T for n in range(4)])  # len(k) is 4 or 1
    return int(jnp.linalg.matrix_rank(logits, rtol=1e-4))


reveal(rank("mha"), guess)
print("multi-query:", rank("mqa"))

# %% [markdown]
# N H = 32 is the most, and it is reached. So the heads of a multi-query layer look at the past through H numbers a
# token in place of N H. What a model loses by that is measured in training; what it saves can be counted here.
#
# ## The cache
#
# The package's table, for Falcon-7B, and a real cache over four decode steps:

# %%
questions("mqa")

# %%
_, prompt = att.prefill(w, cfg, x[:, :8], att.init_cache(cfg, 1, 14, jnp.float32))
picture(watch(att, w, cfg, x[:, 8:], prompt), "four decode steps after a prompt of 8 tokens", first=8)

# %% [markdown]
# Each cell is one key (or value) of H numbers, for all heads. Still one slot is written a step and every slot before it
# is read: the slots are the same, they are smaller.
#
# ## A program that reads it all again
#
# Falcon has N = 71. The cache is 1/71 of that of multi-head attention. But many programs first repeat the keys for
# every head, since their attention function wants N of them. JAX's compiler XLA tells how many bytes a compiled program
# reads and writes, step by step, and what memory it needs besides its arguments and results (`temp`).

# %%
falcon = att.models["Falcon-7B"]
N, H, S = falcon.num_attention_heads, falcon.head_dim, 4096
shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((N, H), (S, H), (S, H))]


def repeating(q, k, v):
    """`step` by N heads with a copy of the keys each. The barrier stands for a library function that wants them."""
    k, v = jax.lax.optimization_barrier([jnp.repeat(a[None], len(q), axis=0) for a in (k, v)])  # N S H
    weights = jax.nn.softmax(jnp.einsum("nh,nsh->ns", q, k) * q.shape[1] ** -0.5)
    return jnp.einsum("ns,nsv->nv", weights, v)


needed = sum(att.cost(falcon, context=S, dtype=jnp.float32).read.values())
print(f"k and v: {needed / 2**20:.1f} MiB")

# %% tags=["varies"]
for name, function in (("step", step), ("repeating", repeating)):
    compiled = jax.jit(function).lower(*shapes).compile()
    touched, temp = compiled.cost_analysis()["bytes accessed"], compiled.memory_analysis().temp_size_in_bytes
    print(f"{name:10}touches {touched / 2**20:6.1f} MiB, temp {temp / 2**20:6.1f} MiB")

# %% [markdown]
# The cache is small in both. What is *read* is small in the first only: the second writes N copies and reads them. So
# "multi-query" in a config says what is stored; the reads must be looked up in the program. (`step` touches more than k
# and v, as the N x S logits and weights go through memory in several passes. A kernel keeps them on the chip: 03B.)
#
# ## What else a step reads
#
# A decode step also reads the weights of the layer, once for all rows. The attention weights shrink as well (wk and wv
# have one head), and still they are most of it until the context is long. Per layer, in bfloat16, for a model of
# Falcon's sizes with N key heads and with one:

# %%
D = falcon.hidden_size


def read(name, S, B=1):
    """(bytes of the attention weights, bytes of the cache) that a step reads in a layer."""
    mechanism = jforge.get(name)
    its = mechanism.Config(hidden_size=D, num_attention_heads=N)
    weights = 2 * sum(int(np.prod(shape)) for shape in mechanism.shapes(its).values())
    return weights, sum(mechanism.cost(its, context=S, batch=B).read.values())


print("   B        S   multi-head: weights + cache      multi-query: weights + cache     times less")
for B, S in ((1, 1000), (1, 32_000), (64, 1000), (64, 32_000)):
    many, one = read("mha", S, B), read("mqa", S, B)
    parts = "".join(f"{a / 2**20:14.1f} + {b / 2**20:8.1f} MiB" for a, b in (many, one))
    print(f"{B:>4} {S:>8,}{parts}{sum(many) / sum(one):14.1f}")

# %% [markdown]
# With one short row the weights decide, and sharing the keys helps little more than by its smaller wk and wv. With many
# long rows the step reads nearly N times less. In the picture: how many bytes a *token* costs, weights included, for
# B rows of 2,000 tokens. (The MLP's weights, which a step reads too, are left out.)

# %%
plt = plots()
batches = [1, 2, 4, 8, 16, 32, 64, 128, 256]
for name, label in (("mha", "multi-head"), ("mqa", "multi-query")):
    plt.plot(batches, [sum(read(name, 2000, B)) / B / 2**20 for B in batches], marker="o", label=label)
    weights = [read(name, 2000, B)[0] / B / 2**20 for B in batches]
    plt.plot(batches, weights, label=f"{label}, of it weights")
plt.xscale("log", base=2)
plt.yscale("log")
plt.xticks(batches, batches)
plt.yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
plt.xlabel("rows B")
plt.ylabel("MiB read a new token")
plt.legend(fontsize=12, frameon=False)
plt.show()

# %% [markdown]
# A batch divides the weights, not the cache: the line of multi-head attention soon meets its floor, the cache of one
# row. Multi-query attention lowers that floor by N, so that large batches pay again.
#
# ## When the reads are gone
#
# N heads that use the same byte do N flops for it in a cache of 2-byte numbers: that is the arithmetic intensity of the
# attend step (05A). The card's balance is the intensity above which its arithmetic is the limit, not its memory:

# %%
h100 = next(device for device in DEVICES if device.name == "H100")
cost = att.cost(falcon, context=4096)
intensity = cost.flops / sum(cost.read.values())
balance = h100.tflops * 1e12 / (h100.bandwidth * 1e9)
print(f"{intensity:.0f} flops a byte; an H100 (data sheet) balances at {balance:.0f}")

# %% [markdown]
# Even with 71 heads a decode step is bound by the bytes, but there is not much left: a few tokens a step instead of one
# (exercise 5), and it no longer is.
#
# Measured, from the package's record: a call with one key head for 8 query heads reads its bytes as fast as a
# multi-head call. Fewer bytes are so much less time, nothing is lost by sharing:

# %%
runs = [json.loads(line) for line in Path("../docs/gpu_runs.jsonl").read_text().splitlines()]
kernel = {"what": "decode_attention", "implementation": "pallas"}
for run in runs:
    if kernel.items() <= run.items() and run["K"] in (1, 32):
        moved = run["B"] * run["S"] * run["K"] * 2 * run["H"] * 2
        print(f"{run['device']}, {run['commit']}: B = {run['B']}, N = {run['N']}, K = {run['K']}, S = {run['S']}: "
              f"{moved / 2**30:.0f} GiB in {run['median']:.0f} us, {moved / run['median'] / 1e6:.2f} TB/s")  # fmt: skip

# %% [markdown]
# ## Exercises
#
# Set the answer, run the two cells. A function is called by the second one.
#
# **1.** Falcon-7B has 32 layers. How many bytes does one token leave in the cache of all of them, in bfloat16?

# %%
answer_1 = None

# %% tags=["solution"]
answer_1 = 32 * att.cost(falcon, context=1).per_token

# %%
exercise(1, answer_1, "fd8d477a8cce")

# %% [markdown]
# **2.** How many parameters does a layer's attention have less if Falcon's N = 71, D = 4,544, H = V = 64 share one key
# head than if each query head has its own?

# %%
answer_2 = None

# %% tags=["solution"]
answer_2 = 2 * 4544 * 64 * (71 - 1)

# %%
exercise(2, answer_2, "b406d448f322")

# %% [markdown]
# **3.** Write `answer_3(q, k, v)` for several rows that *share their prompt*: q is B N H (a new token in each of B
# rows), k is S H and v S V, the keys and values of the common prompt, which all of them see. Give B N V. The keys must
# be read once: no copy of k with an axis for B or N.

# %%
answer_3 = None


# %% tags=["solution"]
def answer_3(q, k, v):
    flat = q.reshape(-1, q.shape[-1])
    return (jax.nn.softmax(flat @ k.T * q.shape[-1] ** -0.5) @ v).reshape(*q.shape[:2], -1)


# %%
exercise(3, answer_3, "332af5952fb8", jnp.sin(jnp.arange(8.0)).reshape(2, 2, 2), jnp.eye(2), jnp.eye(2))

# %% [markdown]
# **4.** B = 64 rows, a layer of Falcon-7B as it is (one key head). From which S on does a step read more bytes of cache
# than of attention weights?

# %%
answer_4 = None

# %% tags=["solution"]
answer_4 = next(S for S in range(1, 100_000) if read("mqa", S, 64)[1] > read("mqa", S, 64)[0])

# %%
exercise(4, answer_4, "f137735703ba")

# %% [markdown]
# **5.** Several new tokens can be checked in one step (a *draft* that a small model wrote). T = 4 new tokens a row,
# N = 71: how many flops are done for each byte of the cache that is read, at S = 4,096? (The package's `cost` takes
# `new=4`; count the visible pairs only.)

# %%
answer_5 = None

# %% tags=["solution"]
draft = att.cost(falcon, context=4096, new=4)
answer_5 = draft.flops / sum(draft.read.values())

# %%
exercise(5, answer_5, "091e3600ed15")
