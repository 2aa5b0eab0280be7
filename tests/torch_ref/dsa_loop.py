"""Latent attention, dense and sparse, as a loop over queries, heads and tokens, and its test configs."""

import math
from types import SimpleNamespace

import torch
from dense_family import random

from torch_ref.attention import mla
from torch_ref.core.rope import frequencies

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 40.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def dsa_config(**fields):
    defaults = dict(
        hidden_size=10,
        num_attention_heads=3,
        q_lora_rank=7,
        kv_lora_rank=8,
        qk_nope_head_dim=5,
        qk_rope_head_dim=4,
        v_head_dim=6,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        rope_layout="interleaved",
        scaling=None,
        attention_bias=False,
        index_n_heads=8,
        index_head_dim=6,
        index_topk=4,
        index_rope_layout="half",
        index_quantised=False,
        index_shared=False,
    )
    return SimpleNamespace(**(defaults | fields))


V2 = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}
# without an indexer, every query attends all that it sees
MLA = {
    "deepseek_v3": dsa_config(rope_parameters=YARN),
    "deepseek_v2_lite": dsa_config(q_lora_rank=None, rope_parameters=V2),
    "biases": dsa_config(attention_bias=True, rope_layout="half"),
    "biases_without_q_lora": dsa_config(attention_bias=True, q_lora_rank=None, num_attention_heads=1),
    "kimi_linear": dsa_config(q_lora_rank=None, rope_parameters=None),
    "scaled": dsa_config(scaling=0.7, rms_norm_eps=0.5, qk_rope_head_dim=6, rope_parameters=V2 | {"mscale": 1.0}),
}
CONFIGS = {
    "deepseek_v32": dsa_config(rope_parameters=YARN),
    "glm_5": dsa_config(index_rope_layout="interleaved", index_topk=3, attention_bias=True),
    "one_pick": dsa_config(index_topk=1, index_head_dim=4),
    # most scores are exactly 0 when the one head is clipped: the order of ties decides
    "one_index_head": dsa_config(index_n_heads=1, rope_layout="half", scaling=0.7),
    # 2 sqrt(2) / ln(40): the factor of cos and sin is not 1
    "magnitude": dsa_config(rope_parameters=YARN | {"mscale": 2.0}, index_head_dim=5),
    "no_rope": dsa_config(rope_parameters=None, index_head_dim=3, index_topk=5),
    "quantised": dsa_config(index_quantised=True, index_head_dim=8),
    "quantised_glm_5": dsa_config(index_quantised=True, index_head_dim=4, index_rope_layout="interleaved"),
}


def init_params(cfg, dtype=torch.float64, indexer=True):
    d, n, c, r = cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank, cfg.qk_rope_head_dim
    nope, v, rank, i, j = cfg.qk_nope_head_dim, cfg.v_head_dim, cfg.q_lora_rank, cfg.index_n_heads, cfg.index_head_dim
    shapes = {"wkv_a": (d, c + r), "kv_norm": (c,), "wk_b": (c, n, nope), "wv_b": (c, n, v), "wo": (n, v, d)}
    down = {"wq_a": (d, rank), "q_norm": (rank,), "wq_b": (rank, n, nope + r)}
    shapes |= {"wq": (d, n, nope + r)} if rank is None else down
    if cfg.attention_bias:
        shapes |= {"bkv_a": (c + r,), "bo": (d,)} | ({} if rank is None else {"bq_a": (rank,)})
    if indexer and not cfg.index_shared:
        shapes |= {"wq_index": (rank, i, j), "wk_index": (d, j), "ww_index": (d, i)}
        shapes |= {"k_index_norm": (j,), "k_index_bias": (j,)}
    return {name: random(*shape, seed=i, dtype=dtype) / 2 for i, (name, shape) in enumerate(shapes.items())}


def rms(z, weight, eps):
    return weight * z / math.sqrt(float(z @ z) / len(z) + eps)


def turn(cfg, z, position, layout):
    """The first R channels of z turned, a pair of channels at a time."""
    if cfg.rope_parameters is None:
        return z
    theta, factor = frequencies(cfg.rope_parameters, cfg.qk_rope_head_dim)
    z, half = z.clone(), len(theta)
    for j in range(half):
        a, b = (j, j + half) if layout == "half" else (2 * j, 2 * j + 1)
        cos, sin = (factor * f(float(position) * float(theta[j])) for f in (math.cos, math.sin))
        z[a], z[b] = z[a] * cos - z[b] * sin, z[b] * cos + z[a] * sin
    return z


def e4m3_values():
    """The finite values of float8_e4m3fn from 0 up: a sign, four exponent bits of bias 7, three mantissa bits."""
    subnormal = [m / 8 * 2.0**-6 for m in range(8)]
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    return (subnormal + normal)[:-1]  # the last code is NaN


E4M3 = e4m3_values()


def round_e4m3(value):
    """The nearest value; in the middle of two the one with an even mantissa, which has an even place in the list."""
    place = min(range(len(E4M3)), key=lambda i: (abs(E4M3[i] - abs(value)), i % 2))
    return math.copysign(E4M3[place], value)


def quantise(z):
    """(x8, scale) of one vector after its Hadamard rotation."""
    width = len(z)
    signs = [[(-1) ** (i & j).bit_count() for j in range(width)] for i in range(width)]
    z = torch.tensor(signs, dtype=z.dtype) @ z / math.sqrt(width)
    scale = 2.0 ** math.ceil(math.log2(max(float(z.abs().max()), 1e-4) / 448))
    return torch.tensor([round_e4m3(max(-448, min(448, value / scale))) for value in z.tolist()]).double(), scale


def index_score(cfg, q_heads, weights, k):
    """One token's score: q_heads and k are vectors, or with index_quantised (vector, scale) of each."""
    total, heads, width = 0.0, cfg.index_n_heads, cfg.index_head_dim
    for q, w in zip(q_heads, weights.tolist(), strict=True):
        if cfg.index_quantised:
            total += max(float(q[0] @ k[0]), 0.0) * w / math.sqrt(heads * width) * q[1]
        else:
            total += w / math.sqrt(heads * width) * max(float(q @ k), 0.0)
    return total * (k[1] if cfg.index_quantised else 1.0)


def index_row(params, cfg, x, where):
    """(scores, picks) of one row x T D at RoPE positions `where`: for each query a list over the tokens up to it."""
    layout, heads = cfg.index_rope_layout, range(cfg.index_n_heads)
    finish = quantise if cfg.index_quantised else lambda z: z
    keys, scores, picks = [], [], []
    for t, token in enumerate(x):
        c_q = rms(token @ params["wq_a"] + params.get("bq_a", 0.0), params["q_norm"], cfg.rms_norm_eps)
        q = [finish(turn(cfg, c_q @ params["wq_index"][:, i], where[t], layout)) for i in heads]
        k = token @ params["wk_index"]
        k = (k - k.mean()) / torch.sqrt(k.var(correction=0) + 1e-6) * params["k_index_norm"] + params["k_index_bias"]
        keys.append(finish(turn(cfg, k, where[t], layout)))
        scores.append([index_score(cfg, q, token @ params["ww_index"], key) for key in keys])
        order = sorted(range(t + 1), key=lambda s: (-scores[t][s], s))
        picks.append(order[: cfg.index_topk])
    return scores, picks


def attend_row(params, cfg, x, where, picks):
    """y T D of one row: multi-head latent attention of query t over the tokens picks[t]."""
    c, nope, layout, scale = cfg.kv_lora_rank, cfg.qk_nope_head_dim, cfg.rope_layout, mla.scaling(cfg)
    y, latents, ropes = torch.zeros_like(x), [], []
    for t, token in enumerate(x):
        kv = token @ params["wkv_a"] + params.get("bkv_a", 0.0)
        latents.append(rms(kv[:c], params["kv_norm"], cfg.rms_norm_eps))
        ropes.append(turn(cfg, kv[c:], where[t], layout))
        c_q, up = token, params.get("wq")
        if cfg.q_lora_rank is not None:
            down = token @ params["wq_a"] + params.get("bq_a", 0.0)
            c_q, up = rms(down, params["q_norm"], cfg.rms_norm_eps), params["wq_b"]
        for n in range(cfg.num_attention_heads):
            q = c_q @ up[:, n]
            q_nope, q_rope = q[:nope], turn(cfg, q[nope:], where[t], layout)
            logits = [scale * float(q_nope @ (latents[s] @ params["wk_b"][:, n]) + q_rope @ ropes[s]) for s in picks[t]]
            total = sum(math.exp(z) for z in logits)
            for s, z in zip(picks[t], logits, strict=True):
                y[t] += math.exp(z) / total * (latents[s] @ params["wv_b"][:, n]) @ params["wo"][n]
    return y + params.get("bo", 0.0)


def dsa_loop(params, cfg, x, positions, picks=None):
    """(y B T D, picks): picks of another layer, a list per query, or by default the row's own."""
    if picks is None:
        picks = [index_row(params, cfg, row, where)[1] for row, where in zip(x, positions.tolist(), strict=True)]
    rows = zip(x, positions.tolist(), picks, strict=True)
    return torch.stack([attend_row(params, cfg, row, where, chosen) for row, where, chosen in rows]), picks


def mla_loop(params, cfg, x, positions):
    """y B T D in which every query attends all tokens up to itself."""
    every = [[range(t + 1) for t in range(x.shape[1])]] * len(x)
    return dsa_loop(params, cfg, x, positions, every)[0]
