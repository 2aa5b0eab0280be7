"""The mechanisms with a convolution and a recurrent state as NumPy loops over rows, tokens and heads; their configs.

Each loop gives (y B T D, {"state": .., "conv": ..}), the latter as a cache of float64 holds them after the last token.
"""

from types import SimpleNamespace

import numpy as np
import torch
from dense_family import random


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def silu(z):
    return z * sigmoid(z)


def softplus(z):
    return np.log1p(np.exp(z))


def unit(z):
    return z / np.sqrt((z * z).sum() + 1e-6)


def rms(z, eps):
    return z / np.sqrt((z * z).mean() + eps)


def taps(weight, rows, t, bias=None):
    """The convolution at token t: weight[j] meets the row kernel-1-j tokens back, and before the first row zeros."""
    kernel = len(weight)
    y = np.zeros(weight.shape[1]) if bias is None else bias.copy()
    for j in range(kernel):
        if t - (kernel - 1 - j) >= 0:
            y += weight[j] * rows[t - (kernel - 1 - j)]
    return y


def last_rows(rows, kernel, width):
    """The newest kernel-1 of the rows, the oldest first, zero rows before those of a shorter list."""
    kept = [np.zeros(width)] * (kernel - 1) + list(rows)
    return np.array(kept[len(kept) - (kernel - 1) :]).reshape(kernel - 1, width)


def by_row(one):
    """The loop over the rows of a batch from one(p, cfg, x T D): (ys, state or None, raw rows, kernel)."""

    def loop(params, cfg, x, positions=None):
        p, ys, states, convs = {name: w.double().numpy() for name, w in params.items()}, [], [], []
        for row in x.double().numpy():
            y, state, rows, kernel = one(p, cfg, row)
            ys.append(y)
            states.append(state)
            convs.append(last_rows(rows, kernel, len(rows[0])))
        held = {"conv": torch.tensor(np.array(convs))}
        if states[0] is not None:
            held["state"] = torch.tensor(np.array(states))
        return torch.tensor(np.array(ys)), held

    return loop


@by_row
def gated_deltanet(p, cfg, x):
    K, N, kernel = cfg.linear_num_key_heads, cfg.linear_num_value_heads, cfg.linear_conv_kernel_dim
    H, V = cfg.linear_key_head_dim, cfg.linear_value_head_dim
    rows, ys, S = [], [], np.zeros((N, H, V))
    for t, z in enumerate(x):
        rows.append(np.concatenate([(z @ p[w].reshape(len(z), -1)) for w in ("wq", "wk", "wv")]))
        c = silu(taps(p["w_conv"], rows, t))
        y = np.zeros(len(z))
        for n in range(N):
            g = n // (N // K)
            q = unit(c[g * H : (g + 1) * H]) / np.sqrt(H)
            k = unit(c[(K + g) * H : (K + g + 1) * H])
            v = c[2 * K * H + n * V : 2 * K * H + (n + 1) * V]
            beta = sigmoid(z @ p["wb"][:, n]) * (2 if cfg.linear_allow_neg_eigval else 1)
            S[n] *= np.exp(-np.exp(p["a_log"][n]) * softplus(z @ p["wa"][:, n] + p["dt_bias"][n]))
            S[n] += np.outer(k, beta * (v - k @ S[n]))
            gate = (silu if cfg.output_gate_type == "silu" else sigmoid)(z @ p["wg"][:, n])
            y += (p["o_norm"] * rms(q @ S[n], cfg.rms_norm_eps) * gate) @ p["wo"][n]
        ys.append(y)
    return np.array(ys), S, rows, kernel


@by_row
def kda(p, cfg, x):
    N, H, kernel = cfg.linear_num_heads, cfg.linear_head_dim, cfg.linear_conv_kernel_dim
    rows, ys, S = [], [], np.zeros((N, H, H))

    def gate_input(z, name, n):
        return (z @ p[f"{name}_a"]) @ p[f"{name}_b"][:, n] if cfg.low_rank else z @ p[name][:, n]

    for t, z in enumerate(x):
        rows.append(np.concatenate([(z @ p[w].reshape(len(z), -1)) for w in ("wq", "wk", "wv")]))
        c = silu(taps(p["w_conv"], rows, t)).reshape(3, N, H)
        y = np.zeros(len(z))
        for n in range(N):
            q, k, v = unit(c[0, n]) / np.sqrt(H), unit(c[1, n]), c[2, n]
            f, rate = gate_input(z, "wf", n) + p["dt_bias"][n], np.exp(p["a_log"][n])
            bound = cfg.linear_lower_bound
            decay = np.exp(-rate * softplus(f) if bound is None else bound * sigmoid(rate * f))
            for h in range(H):  # the rows of the state are key channels
                S[n, h] *= decay[h]
            S[n] += np.outer(k, sigmoid(z @ p["wb"][:, n]) * (v - k @ S[n]))
            out = p["o_norm"] * rms(q @ S[n], cfg.rms_norm_eps)
            y += (out * sigmoid(gate_input(z, "wg", n))) @ p["wo"][n]
        ys.append(y)
    return np.array(ys), S, rows, kernel


@by_row
def mamba2(p, cfg, x):
    N, V, H, K, kernel = cfg.num_heads, cfg.head_dim, cfg.state_size, cfg.n_groups, cfg.conv_kernel
    rows, ys, S, group = [], [], np.zeros((N, V, H)), N // K  # the transpose of the cache's

    def projected(z, name):
        out = z @ p["w" + name].reshape(len(z), -1)
        return out + p["b" + name].reshape(-1) if cfg.use_bias else out

    for t, z in enumerate(x):
        rows.append(np.concatenate([projected(z, name) for name in ("x", "k", "q")]))
        c = silu(taps(p["w_conv"], rows, t, p["b_conv"] if cfg.use_conv_bias else None))
        steps = np.clip(softplus(projected(z, "dt") + p["dt_bias"]), *cfg.time_step_limit)
        out, gate = np.zeros((N, V)), silu(projected(z, "z")).reshape(N, V)
        for n in range(N):
            xs = c[n * V : (n + 1) * V]
            B = c[N * V + (n // group) * H :][:H]
            C = c[N * V + K * H + (n // group) * H :][:H]
            S[n] = np.exp(-np.exp(p["a_log"][n]) * steps[n]) * S[n] + np.outer(steps[n] * xs, B)
            out[n] = S[n] @ C + p["skip"][n] * xs
        if cfg.norm != "norm_first":
            out = out * gate
        if cfg.norm:
            for g in range(K):
                own = slice(g * group, (g + 1) * group)
                out[own] = p["o_norm"][own] * rms(out[own], cfg.rms_norm_eps)
        if cfg.norm == "norm_first":
            out = out * gate
        ys.append(out.reshape(-1) @ p["wo"].reshape(N * V, -1) + (p["bo"] if cfg.use_bias else 0))
    return np.array(ys), S.transpose(0, 2, 1), rows, kernel


@by_row
def mamba1(p, cfg, x):
    width, kernel = cfg.intermediate_size, cfg.conv_kernel
    rows, ys, h = [], [], np.zeros((width, cfg.state_size))

    def norm(z, name):
        if cfg.norm is None:
            return z
        return rms(z, cfg.rms_norm_eps) * (p[name] if cfg.norm == "weighted" else 1)

    for t, z in enumerate(x):
        rows.append(z @ p["wx"] + (p["bx"] if cfg.use_bias else 0))
        u = silu(taps(p["w_conv"], rows, t, p["b_conv"] if cfg.use_conv_bias else None))
        step, B, C = norm(u @ p["w_dt_in"], "dt_norm"), norm(u @ p["wk"], "k_norm"), norm(u @ p["wq"], "q_norm")
        out = np.zeros(width)
        for i in range(width):
            delta = softplus(step @ p["w_dt"][:, i] + p["dt_bias"][i])
            h[i] = np.exp(-np.exp(p["a_log"][i]) * delta) * h[i] + delta * u[i] * B
            out[i] = h[i] @ C + p["skip"][i] * u[i]
        gate = silu(z @ p["wz"] + (p["bz"] if cfg.use_bias else 0))
        ys.append((out * gate) @ p["wo"] + (p["bo"] if cfg.use_bias else 0))
    return np.array(ys), h[..., None], rows, kernel


@by_row
def short_conv(p, cfg, x):
    rows, ys = [], []

    def projected(z, name):
        return z @ p["w" + name] + (p["b" + name] if cfg.conv_bias else 0)

    for t, z in enumerate(x):
        rows.append(projected(z, "b") * projected(z, "x"))
        y = projected(z, "c") * taps(p["w_conv"], rows, t, p["b_conv"] if cfg.conv_bias else None)
        ys.append(y @ p["wo"] + (p["bo"] if cfg.conv_bias else 0))
    return np.array(ys), None, rows, cfg.conv_L_cache


LOOPS = dict(gated_deltanet=gated_deltanet, kda=kda, mamba2=mamba2, mamba1=mamba1, short_conv=short_conv)

# ---- configs: K >= 2 and r >= 2 unless that is what the config is about, H != V, odd sizes

DEFAULTS = {
    "gated_deltanet": dict(
        linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=3, linear_value_head_dim=5,
        linear_conv_kernel_dim=4, linear_allow_neg_eigval=False, output_gate_type="silu",
    ),
    "kda": dict(
        linear_num_heads=3, linear_head_dim=5, linear_conv_kernel_dim=4, linear_lower_bound=None, low_rank=True,
        rms_norm_eps=1e-3,  # a head whose outputs are small would make much of the weights' own rounding
    ),
    "mamba2": dict(
        num_heads=6, head_dim=3, state_size=5, n_groups=2, conv_kernel=4, use_bias=False, use_conv_bias=True,
        time_step_limit=(0.0, float("inf")), norm="gate_first",
    ),
    "mamba1": dict(
        intermediate_size=7, state_size=3, time_step_rank=2, conv_kernel=4, use_bias=False, use_conv_bias=True,
        norm=None,
    ),
    "short_conv": dict(conv_L_cache=3, conv_bias=False),
}  # fmt: skip
VARIANTS = {
    "gated_deltanet": {
        "plain": {},
        "olmo": dict(linear_allow_neg_eigval=True, linear_conv_kernel_dim=2, block_size=1, rms_norm_eps=0.1),
        "sigmoid": dict(output_gate_type="sigmoid", linear_num_key_heads=3, linear_conv_kernel_dim=7, block_size=64),
        "no_conv": dict(linear_num_value_heads=2, linear_conv_kernel_dim=1),
    },
    "kda": {
        "plain": {},
        "bounded": dict(linear_lower_bound=-5.0, linear_conv_kernel_dim=3, block_size=64),
        "one_matrix": dict(low_rank=False, linear_lower_bound=-2, rms_norm_eps=0.1, block_size=1),
        "one_matrix_softplus": dict(low_rank=False, linear_head_dim=1, linear_conv_kernel_dim=1),
    },
    "mamba2": {
        "plain": {},
        "norm_first": dict(norm="norm_first", n_groups=3, use_bias=True, rms_norm_eps=0.1, block_size=64),
        "no_norm": dict(norm=None, use_conv_bias=False, conv_kernel=2, block_size=1),
        "clamped": dict(time_step_limit=(0.4, 0.9), n_groups=1, num_heads=3, conv_kernel=6),
        "no_conv": dict(num_heads=2, conv_kernel=1),
    },
    "mamba1": {
        "plain": {},
        "falcon": dict(norm="plain", use_bias=True, rms_norm_eps=0.1, conv_kernel=2, block_size=64),
        "jamba": dict(norm="weighted", use_conv_bias=False, time_step_rank=5, block_size=1),
        "no_conv": dict(conv_kernel=1, state_size=1),
    },
    "short_conv": {"plain": {}, "biases": dict(conv_bias=True, conv_L_cache=7), "one_tap": dict(conv_L_cache=1)},
}


def config(name, **fields):
    return SimpleNamespace(**(dict(hidden_size=10, block_size=4, rms_norm_eps=1e-6) | DEFAULTS[name] | fields))


CONFIGS = {
    f"{name}:{kind}": config(name, **fields) for name, kinds in VARIANTS.items() for kind, fields in kinds.items()
}


def init_params(att, cfg, dtype=torch.float64):
    shapes = att.shapes(cfg)
    return {name: random(*shape, seed=i, dtype=dtype) / 2 for i, (name, shape) in enumerate(shapes.items())}
