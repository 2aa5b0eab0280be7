"""The three layers of DeepSeek-V4 as a loop over queries, heads, entries and channels; test configs and caches."""

import math
from types import SimpleNamespace
from typing import NamedTuple

import torch
from dense_family import random

from torch_ref.attention import csa, hca, v4_window

YARN = {"rope_type": "yarn", "rope_theta": 1.6e3, "factor": 16.0, "original_max_position_embeddings": 32}


def v4_config(**fields):
    defaults = dict(
        hidden_size=10,
        num_attention_heads=4,
        head_dim=7,
        qk_rope_head_dim=4,
        q_lora_rank=6,
        o_groups=2,
        o_lora_rank=3,
        sliding_window=5,
        rms_norm_eps=1e-6,
        rope_parameters=YARN,
        compress_rate=4,
        index_n_heads=8,
        index_head_dim=5,
        index_topk=2,
    )
    return SimpleNamespace(**(defaults | fields))


# (mechanism, config); three entries and more in 14 tokens, of which csa may pick fewer
CASES = {
    "v4_window": (v4_window, v4_config()),
    "v4_window:one_group": (v4_window, v4_config(o_groups=1, sliding_window=1, rope_parameters={"rope_theta": 1e4})),
    "v4_window:no_rope": (v4_window, v4_config(o_groups=4, rope_parameters=None, rms_norm_eps=0.5)),
    "csa": (csa, v4_config()),
    "csa:one_pick": (csa, v4_config(index_topk=1, compress_rate=3, index_head_dim=4, sliding_window=1)),
    # most scores are exactly 0 when the one head is clipped: the order of ties decides
    "csa:one_head": (csa, v4_config(index_n_heads=1, num_attention_heads=1, o_groups=1, compress_rate=2)),
    "csa:all_turn": (csa, v4_config(qk_rope_head_dim=6, head_dim=6, index_head_dim=6, compress_rate=1, index_topk=5)),
    "hca": (hca, v4_config()),
    "hca:of_three": (hca, v4_config(compress_rate=3, sliding_window=1, rms_norm_eps=0.5)),
    "hca:of_one": (hca, v4_config(compress_rate=1, sliding_window=3, rope_parameters={"rope_theta": 1e4})),
}


def init_params(att, cfg, dtype=torch.float64):
    d, n, h, rank, m = cfg.hidden_size, cfg.num_attention_heads, cfg.head_dim, cfg.q_lora_rank, cfg.compress_rate
    g, low, i, j = cfg.o_groups, cfg.o_lora_rank, cfg.index_n_heads, cfg.index_head_dim
    shapes = {"wq_a": (d, rank), "q_norm": (rank,), "wq_b": (rank, n, h), "wkv": (d, h), "kv_norm": (h,)}
    shapes |= {"sinks": (n,), "wo_a": (g, n // g, h, low), "wo_b": (g, low, d)}
    if att is not v4_window:
        x = 2 * h if att is csa else h
        shapes |= {"wc_kv": (d, x), "wc_gate": (d, x), "c_bias": (m, x), "c_norm": (h,)}
    if att is csa:
        shapes |= {"wq_index": (rank, i, j), "ww_index": (d, i)}
        shapes |= {"wic_kv": (d, 2 * j), "wic_gate": (d, 2 * j), "ic_bias": (m, 2 * j), "ic_norm": (j,)}
    return {name: random(*shape, seed=i, dtype=dtype) / 2 for i, (name, shape) in enumerate(shapes.items())}


class Row(NamedTuple):
    """What the loop makes of one row: y T D; entries and index keys, each a list; picks: a list per query."""

    y: torch.Tensor
    entries: list
    index_keys: list
    picks: list


def rms(z, weight, eps):
    return weight * z / math.sqrt(float(z @ z) / len(z) + eps)


def angles(rope, r):
    """The r/2 angles per position: plain, or YaRN with beta_fast 32 and beta_slow 1."""
    theta = [rope["rope_theta"] ** (-2 * j / r) for j in range(r // 2)]
    if rope.get("rope_type") != "yarn":
        return theta

    def corrected(turns):
        length = rope["original_max_position_embeddings"]
        return r * math.log(length / (2 * math.pi * turns)) / (2 * math.log(rope["rope_theta"]))

    low, high = max(math.floor(corrected(32)), 0), min(math.ceil(corrected(1)), r - 1)
    high = high + 0.001 if low == high else high
    ramp = [min(max((j - low) / (high - low), 0.0), 1.0) for j in range(r // 2)]
    return [a * (1 - s) + a / rope["factor"] * s for a, s in zip(theta, ramp, strict=True)]


def turn(cfg, z, position):
    """The last R channels of z turned, a pair of neighbours at a time; a negative position turns back."""
    if cfg.rope_parameters is None:
        return z
    z, r = z.clone(), cfg.qk_rope_head_dim
    for j, theta in enumerate(angles(cfg.rope_parameters, r)):
        a = len(z) - r + 2 * j
        cos, sin = math.cos(position * theta), math.sin(position * theta)
        z[a], z[a + 1] = z[a] * cos - z[a + 1] * sin, z[a + 1] * cos + z[a] * sin
    return z


def gate_rows(params, cfg, x, prefix):
    """[(u, z)] of the tokens of one row, each vector X wide, z with its bias."""
    bias = params[f"{prefix}_bias"]
    return [
        (token @ params[f"w{prefix}_kv"], token @ params[f"w{prefix}_gate"] + bias[p % cfg.compress_rate])
        for p, token in enumerate(x)
    ]


def pooled_entry(cfg, rows, block, overlap):
    """One entry before its norm: every channel is a softmax average over its rows."""
    m, width = cfg.compress_rate, len(rows[0][0]) // (2 if overlap else 1)
    own = rows[block * m : (block + 1) * m]
    before = rows[(block - 1) * m : block * m] if overlap and block > 0 else []
    pooled = []
    for c in range(width):
        pairs = [(u[c], z[c]) for u, z in before]
        pairs += [(u[c + width], z[c + width]) for u, z in own] if overlap else [(u[c], z[c]) for u, z in own]
        total = sum(math.exp(z) for _, z in pairs)
        pooled.append(sum(math.exp(z) / total * u for u, z in pairs))
    return torch.stack(pooled)


def compressed(params, cfg, x, where, prefix, overlap):
    """The entries of one row; entry w turns at where[w m]."""
    if len(x) < cfg.compress_rate:
        return []
    rows, m, norm = gate_rows(params, cfg, x, prefix), cfg.compress_rate, params[f"{prefix}_norm"]
    entries = [rms(pooled_entry(cfg, rows, w, overlap), norm, cfg.rms_norm_eps) for w in range(len(x) // m)]
    return [turn(cfg, entry, where[w * m]) for w, entry in enumerate(entries)]


def picked_entries(params, cfg, token, c_q, position, keys):
    """The index_topk best of the complete entries, whose index keys are `keys`."""
    scores = []
    for key in keys:
        score = 0.0
        for i in range(cfg.index_n_heads):
            q = turn(cfg, c_q @ params["wq_index"][:, i], position)
            weight = float(token @ params["ww_index"][:, i]) / math.sqrt(cfg.index_head_dim * cfg.index_n_heads)
            score += weight * max(float(q @ key), 0.0)
        scores.append(score)
    return sorted(range(len(keys)), key=lambda w: (-scores[w], w))[: cfg.index_topk]


def v4_row(att, params, cfg, x, where):
    """Row of one row x T D whose tokens have the RoPE positions `where`."""
    kvs, picks, y = [], [], torch.zeros_like(x)
    entries = [] if att is v4_window else compressed(params, cfg, x, where, "c", att is csa)
    index_keys = compressed(params, cfg, x, where, "ic", True) if att is csa else []
    heads_per_group = cfg.num_attention_heads // cfg.o_groups
    for t, token in enumerate(x):
        c_q = rms(token @ params["wq_a"], params["q_norm"], cfg.rms_norm_eps)
        kvs.append(turn(cfg, rms(token @ params["wkv"], params["kv_norm"], cfg.rms_norm_eps), where[t]))
        complete = (t + 1) // cfg.compress_rate
        chosen = list(range(min(complete, len(entries))))
        if att is csa:
            chosen = picked_entries(params, cfg, token, c_q, where[t], index_keys[:complete])
        picks.append(chosen)
        keys = kvs[max(0, t + 1 - cfg.sliding_window) :] + [entries[w] for w in chosen]
        for n in range(cfg.num_attention_heads):
            q = turn(cfg, rms(c_q @ params["wq_b"][:, n], 1.0, cfg.rms_norm_eps), where[t])
            weights = [math.exp(float(q @ key) / math.sqrt(cfg.head_dim)) for key in keys]
            total = sum(weights) + math.exp(params["sinks"][n])
            out = turn(cfg, sum(w / total * key for w, key in zip(weights, keys, strict=True)), -where[t])
            group, place = n // heads_per_group, n % heads_per_group
            y[t] += out @ params["wo_a"][group, place] @ params["wo_b"][group]
    return Row(y, entries, index_keys, picks)


def v4_loop(att, params, cfg, x, positions):
    """y B T D."""
    rows = zip(x, positions.tolist(), strict=True)
    return torch.stack([v4_row(att, params, cfg, row, where).y for row, where in rows])
