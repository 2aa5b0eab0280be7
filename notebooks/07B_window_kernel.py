# %% [markdown]
# # 07B. The kernel of a window: what is skipped, what is masked, and the sink
#
# Notebook 07A: a window lets a token see the last W tokens, itself included. The keys may lie in a ring of W slots, or
# in a cache that keeps everything (because other layers, or another model, read the rest). This notebook writes one
# kernel for both, makes it read no more than it must, and puts the sink into its softmax.
#
# Words of 05B: a *kernel* runs in many copies, the *programs*. A program goes over the keys in *tiles* and keeps the
# *online softmax*: `top`, the largest logit so far, `total`, the sum of exp(l - top), `acc`, the sum of exp(l - top) v.
# When a tile raises `top`, both sums shrink by exp(old top - new top).
#
# Letters: T new tokens, S slots, W the window, N query heads (which share one key head here), H channels of a query, a
# key or a value. t, s are positions.

# %%
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
from beartype import beartype
from jaxtyping import Float, jaxtyped

from jforge.harness.backends import BACKENDS, for_programs_that_run_once

for_programs_that_run_once()  # before JAX starts: threads for Mosaic's interpreter, where there is no GPU
pallas_kernels, triton_kernels = BACKENDS["pallas"].ops, BACKENDS["triton"].ops
device = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU Triton's kernels run in its interpreter
torch.set_default_device(device)

import triton
import triton.language as tl

import jforge
from jforge.core import compare
from jforge.lessons import exercise, plots, reveal, traffic

launch = triton_kernels.runtime.launch  # kernel[grid](*arguments), without NumPy's warnings in the interpreter

# %% [markdown]
# ## The reference
#
# T tokens at the end of a row of `length` tokens. Token t has the position p = length - T + t and sees p - W < s <= p.
# A sink (one logit a head, without a value) makes the denominator larger. In float64, query after query:

# %%
N, H, S = 4, 64, 256
scale = H**-0.5
torch.manual_seed(0)


def drawn(*shape):
    return torch.randn(*shape, device="cpu").to(device)  # the same numbers on every device


k, v = drawn(S, H).half(), drawn(S, H).half()
queries = drawn(4, N, H).half()  # T N H, up to four tokens


@jaxtyped(typechecker=beartype)
def reference(
    q: Float[torch.Tensor, "T N H"], k: Float[torch.Tensor, "S H"], v: Float[torch.Tensor, "S H"], length: int,
    window: int, sinks: Float[torch.Tensor, "N"],
) -> Float[np.ndarray, "T N H"]:  # fmt: skip
    outs = torch.zeros(q.shape, dtype=torch.float64)
    for t in range(len(q)):
        p = length - len(q) + t
        seen = slice(max(p - window + 1, 0), p + 1)
        for n in range(q.shape[1]):
            logits = scale * k[seen].double() @ q[t, n].double()
            weights = torch.softmax(torch.cat([logits, sinks[n : n + 1].double()]), 0)
            outs[t, n] = weights[:-1] @ v[seen].double()
    return outs.cpu().numpy()


none = torch.full((N,), float("-inf"))  # exp(-inf) = 0: no sink


def close(a, b):
    return compare.relative(a, b) <= compare.OUT["float16"]


# %% [markdown]
# ## The kernel
#
# It is written in *Triton*: `tl.program_id` says which copy runs, `tl.constexpr` marks what is known when the kernel is
# compiled, `mask` says which addresses of a load are read, and `tl.dot` multiplies two tiles.
#
# The rows of a program are the T x N queries, padded to 16. What differs between the versions below is `START`, the
# first key of the loop, and `GUARD`, of which more in a moment. The number of splits (05B) is the size of the grid.


# %%
@triton.jit
def window_kernel(
    q, k, v, sinks, out, lse, length, window, scale,
    T: tl.constexpr, N: tl.constexpr, H: tl.constexpr, KEYS: tl.constexpr,
    START: tl.constexpr, GUARD: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    split, splits = tl.program_id(0), tl.num_programs(0)
    row, h = tl.arange(0, 16), tl.arange(0, H)
    real = row < T * N
    q_tile = tl.load(q + row[:, None] * H + h[None, :], mask=real[:, None], other=0.0)
    p = length - T + row // N  # the position of each row's token
    low = 0
    if START != "all":
        low = tl.maximum(length - T + 1 - window, 0)  # the first key that any row sees
        if START == "tile":
            low = low // KEYS * KEYS
    each = tl.cdiv(tl.cdiv(length - low, splits), KEYS) * KEYS
    first = low + split * each
    last = tl.minimum(first + each, length)
    top = tl.full([16], float("-inf"), tl.float32)
    total, acc = tl.zeros([16], tl.float32), tl.zeros([16, H], tl.float32)
    if SINK:
        top = tl.load(sinks + row % N)  # a logit that was seen already: its weight is 1, and it has no value
        total = tl.full([16], 1.0, tl.float32)
    for tile in tl.range(first, last, KEYS):
        s = tile + tl.arange(0, KEYS)
        at, inside = s[:, None] * H + h[None, :], (s < last)[:, None]
        k_tile = tl.load(k + at, mask=inside, other=0.0)
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        seen = (s[None, :] <= p[:, None]) & (s[None, :] > p[:, None] - window) & (s < last)[None, :]
        logits = tl.where(seen, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = new_top
        if GUARD:
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink, weights = tl.exp(top - shift), tl.exp(logits - shift[:, None])
        total = total * shrink + tl.sum(weights, 1)
        v_tile = tl.load(v + at, mask=inside, other=0.0)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    safe = tl.where(total == 0, 1.0, total)
    place = row * splits + split
    tl.store(out + place[:, None] * H + h[None, :], acc / safe[:, None], mask=real[:, None])
    tl.store(lse + place, tl.where(total == 0, float("-inf"), top + tl.log(safe)), mask=real)


def run(length, window, start="exact", T=1, guard=True, sinks=none, sink=False, splits=1, k=k, v=v):
    """(out T N splits H, lse T N splits)"""
    out, lse = torch.empty(T, N, splits, H), torch.empty(T, N, splits)
    tensors = queries[:T].contiguous(), k, v, sinks, out, lse
    launch(window_kernel, (splits,), *tensors, length, window, scale, T=T, N=N, H=H, KEYS=32, START=start, GUARD=guard,
           SINK=sink)  # fmt: skip
    return out, lse


length, W = 200, 56
want = reference(queries[:1], k, v, length, W, none)
for guard in (False, True):
    out, _ = run(length, W, start="all", guard=guard)
    print(
        f"all tiles, guard {guard!s:5}: equal {close(out[:, :, 0].nan_to_num(), want)}, NaN: {bool(out.isnan().any())}"
    )

# %% [markdown]
# Without the guard all is lost. The first tile holds keys 0 to 31, and none of them is in the window, so `top` stays
# -inf, and exp(-inf - (-inf)) is exp(NaN). With full attention this cannot happen, since every query sees key 0; with a
# window a whole tile can be masked. The guard subtracts 0 where nothing has been seen.
#
# (Where torch sees no GPU, Triton's interpreter ran this, in NumPy, one program after the other. Times mean nothing
# there.)
#
# ## What is skipped
#
# That version reads keys that it masks. Three starts: "all"; "tile", the first tile that holds a visible key; "exact",
# the first visible key itself. The interpreter shows, with a GPU too, which addresses a kernel loads from (`traffic`):


# %%
def asked(*args, k=k, v=v, **options):
    """bool[slots]: the slots of which a number of k or v is asked for; and how many bytes in all."""
    with traffic() as (loads, _):
        run(*args, k=k, v=v, **options)
    every = np.concatenate([addresses for _, addresses in loads])
    slots, count = np.zeros(len(k), bool), 0
    for tensor in (k, v):
        at = (every - tensor.data_ptr()) // 2
        at = at[(at >= 0) & (at < tensor.numel())]
        slots[np.unique(at // H)] = True
        count += 2 * len(at)
    return slots, count


att = jforge.get("sliding_window")
cfg = att.Config(hidden_size=64, num_attention_heads=N, num_key_value_heads=1, head_dim=H, sliding_window=W)
cost = sum(att.cost(cfg, context=length, dtype=jnp.float16).read.values())

# %% [markdown]
# Predict: the row has 200 tokens, the window 56, a tile 32. "tile" starts at the first tile that holds a visible key.
# How many bytes does it ask for, in units of what `cost` says?

# %% tags=["predict"]
guess = None

# %%
reveal(asked(length, W, "tile")[1] / cost, guess)
for start in ("all", "tile", "exact"):
    out, _ = run(length, W, start)
    print(f"{start:5}: equal {close(out[:, :, 0], want)}, {asked(length, W, start)[1] / cost:.2f} of the bytes of cost")

# %% [markdown]
# Key 144 is the first visible one; its tile begins at 128, so "tile" reads 16 keys that nobody sees. In the picture
# each line is a decode step at another length, and the window moves to the right with it:

# %%
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

lengths = range(40, 241, 10)
kinds = {"#ffffff": "not asked for", "#e69f00": "asked for, then masked", "#56b4e9": "asked for and seen"}
plt = plots()
figure, axes = plt.subplots(1, 3, figsize=(10, 4.8), sharey=True)
for ax, start in zip(axes, ("all", "tile", "exact"), strict=True):
    picture = []
    for n in lengths:
        visible = (np.arange(S) < n) & (np.arange(S) >= n - W)
        picture.append(np.where(asked(n, W, start)[0], 1 + visible, 0))
    ax.imshow(picture, cmap=ListedColormap(list(kinds)), vmin=0, vmax=2, aspect="auto", interpolation="nearest",
              extent=(0, S, lengths[-1] + 5, lengths[0] - 5))  # fmt: skip
    for edge in range(0, S, 32):
        ax.axvline(edge, color="#999999", linewidth=0.5)
    ax.set(title=start, xlabel="slot", xticks=(0, 64, 128, 192))
axes[0].set_ylabel("tokens in the row")
marks = [Patch(facecolor=colour, edgecolor="#666666", label=label) for colour, label in kinds.items()]
figure.legend(handles=marks, loc="outside lower center", ncols=3, frameon=False)
plt.show()

# %% [markdown]
# "all" pays for the whole row and throws most of it away; its cost grows with the context, which is just what a window
# was to prevent. "tile" is off by less than a tile. "exact" asks for what is seen and nothing else.
#
# Why would anybody choose "tile"? The copies of *TMA*, the unit that brings tiles into shared memory on newer cards,
# may start anywhere, but in a cache of *pages* (blocks of slots that lie anywhere in memory) a tile must lie in one
# page. `pallas_kernels` starts at a tile; `triton_kernels` starts at the key, or at a tile where the cache has pages
# (its `decode_mla`).
#
# ## Several tokens at once
#
# With T tokens the program covers the union of their windows, W + T - 1 keys, and the two ends are visible to some rows
# only. There the mask does what skipping cannot.

# %%
for T in (1, 2, 4):
    found, _ = run(length, W, T=T)
    slots, _ = asked(length, W, T=T)
    equal = close(found[:, :, 0], reference(queries[:T], k, v, length, W, none))
    print(f"T = {T}: equal {equal}, {slots.sum()} slots read for windows of {W}")

# %% [markdown]
# ## The ring has no order
#
# Now the same tokens in a ring: position s in slot s mod W. For one new token the kernel needs no window at all: all
# slots that hold a token are visible, and which is older does not matter to a sum. Call it with min(length, W) keys.

# %%
held = torch.arange(length - W, length)
ring_k, ring_v = torch.zeros(W, H).half(), torch.zeros(W, H).half()
ring_k[held % W], ring_v[held % W] = k[held], v[held]
ring, _ = run(min(length, W), W, k=ring_k, v=ring_v)
straight, _ = run(length, W)
print("ring equal:", close(ring[:, :, 0], want), "the same bits as in order:", torch.equal(ring, straight))
print(f"{asked(min(length, W), W, k=ring_k, v=ring_v)[1] / cost:.2f} of the bytes of cost")

# %% [markdown]
# Equal, but not the same bits: addition of rounded numbers does depend on the order. (So a test that compares a ring
# with a straight cache needs a tolerance.)
#
# With several tokens a ring breaks. The kernel would mask by *slot*, and a slot does not say how old its token is. And
# the last of the new tokens has written over what the first one still sees:

# %%
for T in (1, 2, 4):
    found, _ = run(W, W, T=T, k=ring_k, v=ring_v)
    wanted = reference(queries[:T], k, v, length, W, none)
    print(f"T = {T}: each token equal {[close(found[t, :, 0], wanted[t]) for t in range(T)]}")

# %% [markdown]
# Only the last token is right: its window is the ring. The mask cuts the slots at the end off the others, whatever
# tokens lie there. So a ring takes one token a call, and that is how the package decodes: `sliding_window.decode` goes
# token by token, writes and reads.
#
# ## The sink in the softmax
#
# The sink's logit joins the denominator and has no value. In an online softmax it is free: begin with `top` = sigma and
# `total` = 1, as if a key of that logit had been seen. (Then `top` is never -inf, either.)

# %%
sinks = torch.tensor([-2.0, 0.5, 2.0, 5.0])
with_sinks = reference(queries[:1], k, v, length, W, sinks)
found, lse = run(length, W, sinks=sinks, sink=True)
print("equal:", close(found[:, :, 0], with_sinks))
print(
    "each head's output with its sink, over that without:",
    (found / run(length, W)[0]).mean((0, 2, 3)).cpu().numpy().round(2),
)

# %% [markdown]
# Once the keys are split among programs, this is wrong: every split would begin with the sink, and the merge would add
# it up as often as there are splits. A part must not know of the sink. It joins after the merge, where lse is known:
# the output shrinks by exp(lse) / (exp(lse) + exp(sigma)).


# %%
def merged(parts, lses, sinks=none):
    """T N H of parts T N P H and lses T N P, without or with the sink folded in at the end."""
    total = torch.logsumexp(lses, -1)
    out = (torch.exp(lses - total[..., None])[..., None] * parts).sum(2)
    return out * torch.sigmoid(total - sinks)[..., None]


for splits in (1, 2, 3):
    each = merged(*run(length, W, sinks=sinks, sink=True, splits=splits))
    once = merged(*run(length, W, splits=splits), sinks)
    print(f"splits {splits}: in every split {close(each, with_sinks)}, once, after the merge {close(once, with_sinks)}")

# %% [markdown]
# The mistake does not show with one split. It appears with longer rows, where a plan takes more splits, and makes
# every head with a sink a little too quiet: a good reason to test a kernel with more splits than its sizes ask for.
#
# ## Against the package
#
# Both packages' `decode_attention`, with window and sinks, over the straight cache and (without a window) the ring. The
# slots that nobody may read hold NaN:

# %%
hidden = torch.ones(S, 1, dtype=torch.bool)
hidden[length - W : length] = False
poisoned = [x.masked_fill(hidden, float("nan"))[None, :, None] for x in (k, v)]
q = queries[:1][None]


def packages(k, v, length, **options):
    given = q, k, v, torch.tensor([length]).int()
    theirs, _ = triton_kernels.decode_attention(*given, scale=scale, sinks=sinks, **options)
    arrays = [jnp.asarray(x.cpu().numpy()) for x in (*given, sinks)]
    other, _ = pallas_kernels.decode_attention(*arrays[:4], scale=scale, sinks=arrays[4], **options)
    return {"triton_kernels": close(theirs[0], with_sinks), "pallas_kernels": close(other[0], with_sinks)}


print("straight:", packages(*poisoned, length, window=W))
print("ring:    ", packages(ring_k[None, :, None], ring_v[None, :, None], W))

# %% [markdown]
# Nothing outside of the window reaches the result. A kernel that starts at a tile and lets the mask do the rest must
# also blank the *values* of masked keys, since 0 x NaN is NaN (06B).
#
# ## On a card
#
# Does skipping work? `docs/gpu_runs.jsonl` has, from one run on an H100, a row of 32,768 tokens with a window of 1,024
# and a row of 1,024 tokens with none. If what is skipped costs nothing, they take the same time.

# %%
runs = [json.loads(line) for line in Path("../docs/gpu_runs.jsonl").read_text().splitlines()]
sizes = {"what": "decode_attention", "B": 64, "N": 32, "K": 8, "H": 128}
timed = [run for run in runs if sizes.items() <= run.items()]
print(timed[0]["device"], "commit", timed[0]["commit"])
for run in sorted(timed, key=lambda run: (run["S"], run["implementation"])):
    if run["implementation"] in ("pallas", "triton") and (run.get("window") or run["S"] == 1024):
        seen = f"a window of {run['window']:,}" if run.get("window") else "all"
        print(f"{run['implementation']:7} S = {run['S']:>6,}, sees {seen:18} {run['median']:6.1f} us")

# %% [markdown]
# ## Exercises
#
# Set the answer, run the two cells. A function is called by the second one.
#
# **1.** A row has 1,000 tokens, the window is 128, a tile 64. How many tiles does a kernel load that starts at the
# first tile with a visible key?

# %%
answer_1 = None

# %% tags=["solution"]
answer_1 = len({s // 64 for s in range(1000 - 128, 1000)})

# %%
exercise(1, answer_1, "d57af2154a34")

# %% [markdown]
# **2.** Write `answer_2(newest, W)`: the positions of the tokens in slots 0 to W - 1 of a ring into which the token at
# position `newest` was written last; negative where no token has come yet (newest - W < position <= newest holds for
# all).

# %%
answer_2 = None


# %% tags=["solution"]
def answer_2(newest, W):
    return newest - (newest - np.arange(W)) % W


# %%
exercise(2, answer_2, "92fa5f026067", 3, 7)

# %% [markdown]
# **3.** Prefill with a window: a program has the queries at positions 512 to 575, the window is 256, a tile has 64
# keys. How many tiles must it load?

# %%
answer_3 = None

# %% tags=["solution"]
answer_3 = len({s // 64 for t in range(512, 576) for s in range(t - 256 + 1, t + 1)})

# %%
exercise(3, answer_3, "a3ee66c6c8e8")

# %% [markdown]
# **4.** A head has the sink sigma = 1 and a query with lse = 3 over all keys. A kernel with 8 splits begins each of
# them with the sink. By which factor is its output too small? (Give its output over the right one.)

# %%
answer_4 = None

# %% tags=["solution"]
answer_4 = (np.exp(3) + np.exp(1)) / (np.exp(3) + 8 * np.exp(1))

# %%
exercise(4, answer_4, "f5c2f67a7b95")

# %% [markdown]
# **5.** Write `answer_5(tiles, sigma)`, the online softmax of one query with a sink: `tiles` is a list of pairs (logits
# n, values n V) of NumPy arrays. A logit may be -inf (masked), a whole tile too. Give out, V numbers.

# %%
answer_5 = None


# %% tags=["solution"]
def answer_5(tiles, sigma):
    top, total, acc = sigma, 1.0, 0.0
    for logits, values in tiles:
        new_top = max(top, logits.max())
        shrink, weights = np.exp(top - new_top), np.exp(logits - new_top)
        total, acc, top = total * shrink + weights.sum(), acc * shrink + weights @ values, new_top
    return acc / total


# %%
exercise(
    5, answer_5, "bf1a9c58340a",
    [(np.full(2, -np.inf), np.ones((2, 1))), (np.array([800.0, -np.inf]), np.array([[3.0], [9.0]]))], 801.0,
)  # fmt: skip
