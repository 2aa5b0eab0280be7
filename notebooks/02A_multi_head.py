# %% [markdown]
# # 02A. Multi-head attention: layout, projections, cache, and where the time goes
#
# One head (01A) gives a token one average over the tokens before it. A layer has N of them side by side, each with
# matrices of its own; their outputs are projected back and added. That is all that "multi-head" means. What is worth
# knowing lies around it: how N heads lie in memory, what they leave in the cache, and which part of a step takes the
# time.
#
# Letters: B rows, T new tokens, S slots of the cache (one a token), D channels of a token, N heads, H channels of a
# query or key in a head, V of a value. Usually N H = N V = D.

# %%
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from beartype import beartype
from jaxtyping import Array, Bool, Float, jaxtyped

import jforge
from jforge.core import compare
from jforge.lessons import KEPT, READ, WRITTEN, exercise, picture, questions, reveal, watch

jax.config.update("jax_default_matmul_precision", "highest")  # a GPU may otherwise round products to fewer digits
jnp.set_printoptions(precision=3, suppress=True)


def close(a, b):
    return compare.relative(a, b) <= compare.OUT["float32"]


# %% [markdown]
# ## What one head cannot say
#
# Two tokens, a and b, stand in two places, and a later token must know which stands where. One head gives it a weighted
# sum; with equal weights the sum is the same if a and b change places. Two heads, each looking at one of the places,
# tell them apart: the output matrix `wo` gives each head channels of its own to write to.

# %%
a, b = jnp.array([1.0, 2.0]), jnp.array([3.0, -1.0])
for first, second in ((a, b), (b, a)):
    values = jnp.stack([first, second])
    one_head = jnp.array([0.5, 0.5]) @ values
    two_heads = jnp.eye(2) @ values  # weights: head 0 on place 0, head 1 on place 1
    print("one head:", one_head, " two heads, side by side:", two_heads.ravel())

# %% [markdown]
# ## From scratch
#
# The matrices of all heads lie in one array: wq is D N H. The einsum has the letter n on both sides, which says that
# heads do not meet until the last line. In that line n is summed: the layer's output is the *sum* of what each head
# writes.


# %%
@jaxtyped(typechecker=beartype)
def project(w: dict[str, Array], x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T N H"], ...]:
    return tuple(jnp.einsum("btd,dnh->btnh", x, w[name]) for name in ("wq", "wk", "wv"))


@jaxtyped(typechecker=beartype)
def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B S N H"], v: Float[Array, "B S N V"], visible: Bool[Array, "T S"]
) -> Float[Array, "B T N V"]:
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf))
    return jnp.einsum("bnts,bsnv->btnv", weights, v)


@jaxtyped(typechecker=beartype)
def layer(w: dict[str, Array], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    q, k, v = project(w, x)
    out = attend(q, k, v, jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool)))
    return jnp.einsum("btnv,nvd->btd", out, w["wo"])


att = jforge.get("mha")
small = att.Config(hidden_size=32, num_attention_heads=4)
w = att.init_params(jax.random.key(0), small)
x = jax.random.normal(jax.random.key(1), (1, 12, 32))
y = layer(w, x)
print({name: weight.shape for name, weight in w.items()})
q, k, v = project(w, x)
out = attend(q, k, v, jnp.tril(jnp.ones((12, 12), bool)))
print("the sum of what each head writes:", close(sum(out[:, :, n] @ w["wo"][n] for n in range(4)), y))
print("equal to the package's mha:", close(y, att.forward(w, small, x)))

# %% [markdown]
# The number of heads changes no parameter count as long as N H = D: more heads are narrower ones.

# %%
for heads in (1, 8, 32):
    its = att.Config(hidden_size=4096, num_attention_heads=heads)
    print(f"N = {heads:>2}, H = {its.head_dim:>4}: {sum(np.prod(s) for s in att.shapes(its).values()):,} parameters")

# %% [markdown]
# ## One matrix, and a trap
#
# Checkpoints store wq as one matrix of D rows and N H columns. Its product with x has N H channels, and a reshape cuts
# them into heads. The order matters: channels first into N pieces (B T N H), then, if a library wants the heads in
# front, a transpose (B N T H). A reshape straight to B N T H has the right shape and mixes tokens with heads.

# %%
flat = x @ w["wq"].reshape(32, 4 * 8)  # B T (N H)
right = flat.reshape(1, 12, 4, 8)
wrong = flat.reshape(1, 4, 12, 8)
print("B T N H by a reshape:", close(right, q))
print("B N T H by a reshape and a transpose:", close(right.transpose(0, 2, 1, 3), jnp.einsum("btnh->bnth", q)))
print("B N T H by a reshape alone:", close(wrong, jnp.einsum("btnh->bnth", q)), wrong.shape)

# %% [markdown]
# ## Where a head lies in memory
#
# An array's last axis lies together; a step along an axis before it is a jump, its *stride*. The cache B S N H holds
# all heads of a token together, the cache B N S H all tokens of a head. For the first 6 tokens, 3 heads of 2 channels:
# which places in memory does a step write (token 5), and which of the others does head 1 read?

# %%
S, N, H = 6, 3, 2
token, head, _ = np.indices((S, N, H))
codes = np.where(token == S - 1, WRITTEN, np.where(head == 1, READ, KEPT))  # S N H
picture(
    {"B S N H": codes.reshape(1, -1), "B N S H": codes.transpose(1, 0, 2).reshape(1, -1)},
    "one row of memory: the step writes token 5 (w), head 1 reads its older keys (r)",
    down="", across="place in memory",
)  # fmt: skip

# %% [markdown]
# B S N H is written in one piece and read by a head in many; B N S H the other way round. (Head 1 reads its new key
# too, the w in the middle.) In the sizes of Llama-2-7B, in bytes:

# %%
cfg = att.models["Llama-2-7B"]
N, H, D = cfg.num_attention_heads, cfg.head_dim, cfg.hidden_size
strides = np.empty((1, 4096, N, H), np.float16).strides  # of 2 bytes, as bfloat16
print(f"B S N H: a key of one head is {H * 2} bytes in one piece; from one key to the next {strides[1]:,}")
print(f"B S N H: a token of all heads is {N * H * 2:,} bytes in one piece; B N S H: {N} pieces of {H * 2}")

# %% [markdown]
# A GPU reads memory in sectors of 32 bytes, so a piece of 256 is whole sectors: a kernel loses nothing by either
# layout. The package keeps B S K H (K = N here), in which a new token is one write.
#
# ## The cache
#
# Every head keeps its own keys and values. The package's table for this mechanism:

# %%
questions("mha")

# %% [markdown]
# And a real cache: `watch` runs four decode steps, and finds out by experiment which slots changed and which, when
# spoiled, change the output.

# %%
_, prompt = att.prefill(w, small, x[:, :8], att.init_cache(small, 1, 14, jnp.float32))
picture(watch(att, w, small, x[:, 8:], prompt), "four decode steps after a prompt of 8 tokens", first=8)

# %% [markdown]
# A row is a step: it writes one slot (w) and reads all slots before it (r); nothing is ever skipped or lost. Each slot
# holds N keys, one a head.
#
# ## Projections or attention?
#
# A decode step of one row multiplies a token with four D x D matrices, and meets S keys and values in each head. A
# product and a sum are two flops:

# %%
projections = 2 * 4 * D * D
for S in (512, 4096, 32768):
    attention = att.cost(cfg, context=S).flops
    print(f"S = {S:>6,}: projections {projections:>11,} flops, attend {attention:>13,}")

# %% [markdown]
# Predict: from which S on does the attend step of Llama-2-7B (D = 4,096) take more flops than the four projections?

# %% tags=["predict"]
guess = None

# %%
crossing = next(S for S in range(1, 100_000) if att.cost(cfg, context=S).flops >= projections)
reveal(crossing, guess)

# %% [markdown]
# 8 D^2 against 4 D S: S = 2 D, whatever N is. With the bytes it is the same. The weights are 4 D^2 numbers, the cache
# 2 D S; both are read once a step. But B rows share the weights and each has a cache of its own, so with a batch the
# cache wins earlier:

# %%
weights = 2 * sum(int(np.prod(shape)) for shape in att.shapes(cfg).values())  # 2 bytes each
for B in (1, 8, 64):
    S = next(S for S in range(1, 100_000) if sum(att.cost(cfg, context=S, batch=B).read.values()) >= weights)
    print(f"B = {B:>2}: the cache is more bytes than the weights from S = {S:,} on")

# %% [markdown]
# On a real card the bytes are what counts (05A). The package's record of a measured kernel, and beside it the time that
# the weights would take at the bandwidth of the card's data sheet:

# %%
import json
from pathlib import Path

from pallas_kernels.device import DEVICES

runs = [json.loads(line) for line in Path("../docs/gpu_runs.jsonl").read_text().splitlines()]
run = next(r for r in runs if r["what"] == "decode_attention" and r["implementation"] == "pallas" and r["K"] == 32)
card = next(device for device in DEVICES if device.kind == run["device"])
print(f"{run['device']}, commit {run['commit']}: B = {run['B']}, N = K = {run['K']}, S = {run['S']}")
print(f"attend, measured: {run['median']:.0f} us; weights, computed: {weights / card.bandwidth / 1e3:.0f} us")

# %% [markdown]
# At this batch and context the cache is nearly all that a step reads.
#
# ## Profiling
#
# A count says what must be done; a *profile* says what is done. Two instruments: a clock around each part, and the
# bytes that the compiled program touches, which JAX's compiler XLA can tell. `block_until_ready` is needed, since a
# call returns before its result is there. The first call compiles, so it is not timed, and of several the fastest is
# taken. N = 8 heads of 128, S = 2,048 = 2 D, float32.

# %% tags=["varies"]
N, H, S = 8, 128, 2048
D = N * H
keys = jax.random.split(jax.random.key(2), 6)
big = {name: jax.random.normal(key, (D, N, H)) * D**-0.5 for name, key in zip(("wq", "wk", "wv"), keys, strict=False)}
token = jax.random.normal(keys[3], (1, 1, D))
k, v = (jax.random.normal(key, (1, S, N, H)) for key in keys[4:])
q = project(big, token)[0]


def heads_first(q, k, v):
    """`attend` for B N S H, where all keys are visible."""
    weights = jax.nn.softmax(jnp.einsum("bnth,bnsh->bnts", q, k) * H**-0.5)
    return jnp.einsum("bnts,bnsv->bntv", weights, v)


def profile(function, *arrays):
    """(milliseconds, million bytes that the compiled program reads and writes)"""
    compiled = jax.jit(function).lower(*arrays).compile()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        times.append(time.perf_counter() - start)
    return min(times) * 1e3, (compiled.cost_analysis() or {}).get("bytes accessed", np.nan) / 1e6


seen = jnp.ones((1, S), bool)
flip = [x.transpose(0, 2, 1, 3) for x in (q, k, v)]
print("                     ms   MB touched   MB needed")
for name, found, needed in (
    ("three projections", profile(project, big, token), 3 * D * D * 4),
    ("attend, B S N H", profile(lambda *a: attend(*a, seen), q, k, v), 2 * S * D * 4),
    ("attend, B N S H", profile(heads_first, *flip), 2 * S * D * 4),
):
    print(f"{name:18}{found[0]:6.1f} {found[1]:12.0f} {needed / 1e6:11.0f}")

# %% [markdown]
# Read the line "attend, B S N H" if you are on a CPU: the program touches far more than it needs, and takes far longer
# than the line below it, which does the same sums. The text of the compiled program tells why. Its copies, by shape:

# %% tags=["varies"]
text = jax.jit(lambda *a: attend(*a, seen)).lower(q, k, v).compile().as_text()
print(re.findall(r"= (f32\[[\d,]*\])\S* copy\(", text))

# %% [markdown]
# On a CPU the shape 1, 8, 128, 2048 (B N H S) is there twice: k and v, copied into another order in every step, since
# the compiler's product wants the heads in front. No count of flops shows this; the bytes do. Neither layout is wrong,
# but a step must read the cache *as it lies*. A kernel of our own does that (02B); with einsum it depends on the
# compiler.
#
# ## Exercises
#
# Set the answer, run the two cells. A function is called by the second one.
#
# **1.** How many bytes does one token of Llama-2-7B leave in the cache of one layer, in float32?

# %%
answer_1 = None

# %% tags=["solution"]
answer_1 = att.cost(cfg, context=1, dtype=jnp.float32).per_token

# %%
exercise(1, answer_1, "e08023d3ac43")

# %% [markdown]
# **2.** Write `answer_2(flat, N)`: flat is B T (N H), the result B N T H.

# %%
answer_2 = None


# %% tags=["solution"]
def answer_2(flat, N):
    return flat.reshape(*flat.shape[:2], N, -1).transpose(0, 2, 1, 3)


# %%
exercise(2, answer_2, "9dc478075649", jnp.arange(24.0).reshape(1, 3, 8), 2)

# %% [markdown]
# **3.** A prompt of T tokens goes through one layer at once; no work is spent on masked pairs. From which T on does
# attention take at least as many flops as the four projections of all T tokens? (D = N H = N V = 4,096.)

# %%
answer_3 = None

# %% tags=["solution"]
answer_3 = next(T for T in range(1, 100_000) if att.cost(cfg, context=T, new=T).flops >= 2 * 4 * 4096**2 * T)

# %%
exercise(3, answer_3, "71b2e99b27b2")

# %% [markdown]
# **4.** Which head matters? Write `answer_4(out, wo)`: out is B T N V, wo is N V D. Give, for each head, the norm
# (`jnp.linalg.norm` over all numbers) of what the layer's output loses if that head is left out: an array of N numbers.

# %%
answer_4 = None


# %% tags=["solution"]
def answer_4(out, wo):
    return jnp.stack([jnp.linalg.norm(jnp.einsum("btv,vd->btd", out[:, :, n], wo[n])) for n in range(len(wo))])


# %%
exercise(4, answer_4, "4ef828234e1a", jnp.arange(12.0).reshape(1, 2, 3, 2), jnp.cos(jnp.arange(24.0)).reshape(3, 2, 4))

# %% [markdown]
# **5.** The cache of Llama-2-7B lies as B N S H with S = 4,096 slots, 2 bytes a number. How many bytes are there from
# the start of head 3's key of token 10 to the start of head 4's key of the same token?

# %%
answer_5 = None

# %% tags=["solution"]
answer_5 = np.empty((1, 32, 4096, 128), np.float16).strides[1]

# %%
exercise(5, answer_5, "c129fde486c5")
