"""Lightning attention as a loop over rows, tokens and heads, and its test configs."""

import math
from types import SimpleNamespace

import torch
from dense_family import random


def lightning_config(**fields):
    defaults = dict(hidden_size=10, num_attention_heads=4, head_dim=3, layer_index=1, num_hidden_layers=6)
    return SimpleNamespace(**(defaults | dict(block_size=4, rms_norm_eps=1e-6) | fields))


CONFIGS = {
    "plain": lightning_config(),
    "first_layer_one_block": lightning_config(layer_index=0, block_size=256),
    "last_layer_single_tokens": lightning_config(layer_index=5, block_size=1),
    "three_heads": lightning_config(num_attention_heads=3, head_dim=None, block_size=5, rms_norm_eps=0.1),
    "one_head_one_layer": lightning_config(
        num_attention_heads=1, head_dim=None, layer_index=0, num_hidden_layers=1, block_size=3
    ),
}
EXPONENTS = {1: [8], 2: [4, 8], 3: [4, 8, 2], 4: [2, 4, 6, 8], 6: [2, 4, 6, 8, 1, 3]}


def init_params(cfg, dtype=torch.float64):
    d, n = cfg.hidden_size, cfg.num_attention_heads
    h = cfg.head_dim or d // n
    shapes = {name: (d, n, h) for name in ("wq", "wk", "wv", "wg")} | {"o_norm": (n, h), "wo": (n, h, d)}
    return {name: random(*shape, seed=i, dtype=dtype) / 2 for i, (name, shape) in enumerate(shapes.items())}


def lightning_loop(params, cfg, x, positions=None):
    """(y, state): one row and one token at a time; nothing turns with the position."""
    n_heads, layers = cfg.num_attention_heads, cfg.num_hidden_layers
    factor = 1 - cfg.layer_index / (layers - 1 + 1e-5) + 1e-5
    ys, states = torch.zeros_like(x), []
    for b in range(len(x)):
        state = [0.0] * n_heads
        for t in range(x.shape[1]):
            outs = []
            for n in range(n_heads):
                z = [x[b, t] @ params[name][:, n] for name in ("wq", "wk", "wv")]
                q, k, v = (value / (1 + torch.exp(-value)) for value in z)
                decay = math.exp(-(2.0 ** -EXPONENTS[n_heads][n]) * factor)
                state[n] = decay * state[n] + torch.outer(k, v)
                outs.append(q @ state[n])
            out = torch.cat(outs)
            out = out / torch.sqrt((out * out).mean() + cfg.rms_norm_eps) * params["o_norm"].flatten()
            gate = 1 / (1 + torch.exp(-(x[b, t] @ params["wg"].flatten(1))))
            ys[b, t] = (gate * out) @ params["wo"].flatten(0, 1)
        states.append(torch.stack(state))
    return ys, torch.stack(states)
