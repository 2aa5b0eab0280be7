# %% [markdown]
# # 12. Reading any config.json
#
# How much memory does a row of 131,072 tokens take? The answer stands in a model's `config.json`, if one knows which of
# its keys the cache depends on. A formula that is right for Llama is wrong for most models of today: some layers keep a
# window, some one latent for all heads, some a state that never grows, some nothing, as they read an earlier layer's.
#
# This notebook reads such files by hand, kind by kind, until the simple formula is off by a factor of thirty. Then it
# lets the package do it (`jforge.lens`), which answers exactly or says what it does not know.
#
# Letters: K key heads, H channels of a key or value, W tokens of a window, C and R channels of a latent and of its
# rotated part, N heads of a state of H x V numbers.

# %%
import json
from pathlib import Path

import numpy as np
import pandas as pd
from beartype import beartype
from jaxtyping import Float, Int, jaxtyped

import jforge
from jforge.lessons import exercise, plots, reveal

FILES = Path(jforge.__file__).parent / "configs"  # real files, as their makers wrote them


def read(name):
    return json.loads((FILES / f"{name}.json").read_text())


llama = read("llama-3.1-8b")
print({key: llama[key] for key in ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")})

# %% [markdown]
# ## The formula that everybody knows
#
# Every layer keeps a key and a value for each token and each key head, two bytes a number in bfloat16. Files that have
# no `head_dim` mean hidden size / heads; files without `num_key_value_heads` mean as many as there are heads.


# %%
def simple(config):
    """Bytes that one more token adds, if all layers keep all keys and values."""
    config = config.get("text_config", config)  # of a model that also reads images
    heads = config["num_attention_heads"]
    K = config.get("num_key_value_heads") or heads
    H = config.get("head_dim") or config["hidden_size"] // heads
    return config["num_hidden_layers"] * 2 * K * H * 2


print(f"Llama-3.1-8B: {simple(llama):,} bytes a token, {simple(llama) * 131_072 / 2**30:.1f} GiB for 131,072")

# %% [markdown]
# ## Windows
#
# Gemma 3 has a window in five of six layers: keys that are older than W tokens are never read again, and their slots
# are written over (07A). Such a layer stops growing at W tokens. So bytes a token are no constant any more, and the
# function needs the context.

# %%
gemma = read("gemma-3-27b")["text_config"]
print({key: gemma[key] for key in ("num_hidden_layers", "num_key_value_heads", "head_dim", "sliding_window")})


@jaxtyped(typechecker=beartype)
def kept(contexts: Int[np.ndarray, "c"], full: int, windows: int, W: int, entry: int) -> Int[np.ndarray, "c"]:
    """Bytes of `full` layers without a window and `windows` layers with one, `entry` bytes a token in each."""
    return (full * contexts + windows * np.minimum(contexts, W)) * entry


layers, W = gemma["num_hidden_layers"], gemma["sliding_window"]
full = layers // 6
entry = 2 * gemma["num_key_value_heads"] * gemma["head_dim"] * 2
contexts = 2 ** np.arange(10, 21)
by_hand = kept(contexts, full, layers - full, W, entry)
print(f"{full} full layers, {layers - full} with a window of {W:,}")

# %% [markdown]
# Predict: by which factor is the simple formula too large at 131,072 tokens?

# %% tags=["predict"]
guess = None

# %%
at = contexts.tolist().index(131_072)
reveal(float(simple(gemma) * 131_072 / by_hand[at]), guess)

# %% [markdown]
# ## One latent for all heads
#
# DeepSeek-V3 has 128 heads, and its file says `num_key_value_heads: 128`, though nothing of that size is ever kept. A
# layer keeps one latent of C + R channels a token, from which all keys and values are made (06A).

# %%
deepseek = read("deepseek-v3")
C, R = deepseek["kv_lora_rank"], deepseek["qk_rope_head_dim"]
latent = deepseek["num_hidden_layers"] * (C + R) * 2
print(f"simple formula {simple(deepseek):,} bytes a token, latents {latent:,}: {simple(deepseek) / latent:.1f} times")

# %% [markdown]
# ## States, and layers that keep nothing
#
# Qwen3-Next has full attention in every fourth layer. The others keep a *state*, N matrices of H x V numbers in
# float32, however long the row is (16A), and the last 3 rows of a convolution. The last 18 layers of Gemma 4 E4B read
# the keys and values of earlier ones and keep none (17).

# %%
qwen = read("qwen3-next-80b-a3b")
print({key: qwen[key] for key in qwen if key.startswith("linear_") or key == "full_attention_interval"})
N, H, V = qwen["linear_num_value_heads"], qwen["linear_key_head_dim"], qwen["linear_value_head_dim"]
channels = 2 * qwen["linear_num_key_heads"] * H + N * V
state = N * H * V * 4 + (qwen["linear_conv_kernel_dim"] - 1) * channels * 2
growing = qwen["num_hidden_layers"] // qwen["full_attention_interval"]
grows = growing * 2 * qwen["num_key_value_heads"] * qwen["head_dim"] * 2
fixed = (qwen["num_hidden_layers"] - growing) * state
print(f"{grows:,} bytes a token and {fixed:,} fixed; the simple formula: {simple(qwen):,} a token")

# %% [markdown]
# ## All of that at once
#
# `jforge.lens.from_config` takes a path, a parsed file or a transformers config. It says of every layer what it keeps,
# writes and reads, from the same description that makes the arrays of the real cache (`Attention.cache_spec`), so that
# its bytes are theirs. By hand we have four models; are they the same?

# %%
lens = {name: jforge.lens.from_config(FILES / f"{name}.json") for name in sorted(f.stem for f in FILES.glob("*.json"))}


def total(name, context):
    return sum(lens[name].stored(context=context).values())


print("Llama 3.1 8B ", total("llama-3.1-8b", 131_072) == 131_072 * simple(llama))
print("Gemma 3 27B  ", [total("gemma-3-27b", int(c)) for c in contexts] == by_hand.tolist())
print("DeepSeek-V3  ", total("deepseek-v3", 131_072) == 131_072 * latent)
print("Qwen3-Next   ", total("qwen3-next-80b-a3b", 131_072) == 131_072 * grows + fixed)

# %% [markdown]
# Its layers, one of each kind, with how many there are; `shares` is the place of the layer whose cache is read instead:

# %%
gemma4 = lens["gemma-4-e4b"]
rows = [
    {"layers": count, "kind": one.kind, "mechanism": one.mechanism, "keeps": dict(one.stored(context=4096)),
     "reads": sum(one.read(context=4096).values()), "shares": "" if one.shares is None else one.shares}
    for one, count in gemma4.kinds.items()
]  # fmt: skip
pd.DataFrame(rows).style.hide(axis="index").set_uuid("gemma4")

# %% [markdown]
# How wrong is the simple formula for every shipped file, at 131,072 tokens?


# %%
@jaxtyped(typechecker=beartype)
def factors(simple_bytes: Float[np.ndarray, "m"], exact: Float[np.ndarray, "m"]) -> Float[np.ndarray, "m"]:
    return simple_bytes / exact


def known(name):
    config = read(name)
    config = config.get("text_config", config)
    return "num_attention_heads" in config and config.get("num_hidden_layers") is not None


names = [name for name in lens if known(name)]
simple_bytes = np.array([simple(read(name)) * 131_072 for name in names], float)
off = factors(simple_bytes, np.array([total(name, 131_072) for name in names], float))
order = np.argsort(off)
plt = plots()
figure, ax = plt.subplots(figsize=(10, 8))
ax.barh(range(len(names)), off[order], color=["C0" if abs(value - 1) < 0.005 else "C1" for value in off[order]])
ax.axvline(1, color="black", linewidth=1)
ax.set_yticks(range(len(names)), [names[i] for i in order], fontsize=11)
ax.set(xscale="log", xlabel="simple formula / bytes of the cache, 131,072 tokens")
ax.bar_label(ax.containers[0], [f"{value:.3g}" for value in off[order]], padding=3, fontsize=11)
ax.set_xlim(0.5, 1.6 * off.max())
ax.set_xticks([1, 2, 5, 10, 20], [1, 2, 5, 10, 20])
plt.show()

# %%
right = sum(abs(value - 1) < 0.005 for value in off)
print(f"right for {right} of {len(names)} files; at worst {off.max():.0f} times too large ({names[order[-1]]})")

# %% [markdown]
# ## What is not in the file, and what is not known
#
# A cache depends on more than sizes. `notes` says what was taken for granted: the dtype (a file seldom says what the
# cache is to be kept in), class defaults of keys that are missing, parts that are left out. A layer whose bytes are
# known, though the package cannot compute it, is answered and says so; what of a cache is not known is refused by name.

# %%
print(*lens["deepseek-v3"].notes, sep="\n")
stretched = jforge.lens.from_config({**llama, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}})
print(stretched.layers[0].convertible, "-", stretched.layers[0].lacks)
print(sum(stretched.stored(context=4096).values()) == total("llama-3.1-8b", 4096))
for change in ({"attention_bias": "false"}, {"num_key_value_heads": 3}, {"model_type": "llama-9"}):
    try:
        jforge.lens.from_config({**llama, **change})
    except (ValueError, NotImplementedError) as problem:
        print(str(problem)[:90])

# %% [markdown]
# ## From bytes to rows and microseconds
#
# Three questions follow from the bytes. How long may a row be? How many rows fit? How long does a step take at least,
# if every byte of the cache is read once at the rate of the data sheet?

# %%
card = jforge.roofline.device("h100")
memory = 64 * 2**30
table = {}
for name in ("llama-3.1-8b", "gemma-3-27b", "deepseek-v3", "qwen3-next-80b-a3b", "deepseek-v4-flash"):
    one = lens[name]
    table[name] = {
        "longest row in 64 GiB": f"{one.max_context(memory=memory):,}",
        "rows of 131,072 tokens": one.max_batch(memory=memory, context=131_072),
        "a step, one row, us": round(1e6 * one.floor(card, context=131_072)),
    }
pd.DataFrame(table).T.style.set_uuid("fits")

# %% [markdown]
# On the command line the same is `jforge lens FILE...`, with `--context 8k,1m --batch 1,64 --device h200 --json`.
#
# ## Exercises
#
# Set the answer, run the two cells. A function is called by the second one.
#
# **1.** Mistral-7B-v0.1 has a window of 4,096 tokens in each of its 32 layers, K = 8 and H = 128. How many bytes do
# 100,000 tokens take, in bfloat16?

# %%
answer_1 = None

# %% tags=["solution"]
answer_1 = 32 * 4096 * 2 * 8 * 128 * 2

# %%
exercise(1, answer_1, "acc166aab1b6")

# %% [markdown]
# **2.** In short rows Llama-3.1-8B keeps fewer bytes than Gemma 3 27B, in long ones more. Which is the largest of
# `contexts` at which it still keeps fewer?

# %%
answer_2 = None

# %% tags=["solution"]
answer_2 = max(int(c) for c in contexts if total("llama-3.1-8b", int(c)) < total("gemma-3-27b", int(c)))

# %%
exercise(2, answer_2, "bcd472a05688")

# %% [markdown]
# **3.** Write `answer_3(config)`: bytes a token of a file with latents, as DeepSeek-V3's.

# %%
answer_3 = None


# %% tags=["solution"]
def answer_3(config):
    return config["num_hidden_layers"] * (config["kv_lora_rank"] + config["qk_rope_head_dim"]) * 2


# %%
exercise(3, answer_3, "c2a6b6a547b3", {"num_hidden_layers": 27, "kv_lora_rank": 256, "qk_rope_head_dim": 32})

# %% [markdown]
# **4.** An engine hands out memory in pages of 64 tokens. How many bytes of a 70-token row of Llama-3.1-8B hold
# nothing?

# %%
answer_4 = None

# %% tags=["solution"]
answer_4 = (128 - 70) * simple(llama)

# %%
exercise(4, answer_4, "481681943ce2")
