"""Learned sink logits: `dense` or `sliding_window` with one number per query head in the denominator of the softmax.

    o_t,n = sum_s p_s v_s,   p_s = exp(z_s) / (exp(sink_n) + sum_u exp(z_u)),   z_s = cap(scaling q_t,n . k_s)

s, u: all tokens up to t, or the last W of them. The sink is neither scaled nor capped; -inf switches it off.
gpt-oss (a window on every other layer, sinks on all of them).

cfg: the fields of `dense`, and sliding_window (W >= 1, or None: no window).
params: those of `dense`, and sinks N.
cache: that of `dense` without a window, that of `sliding_window` with one.
"""

import torch

from .. import ops as reference_ops
from . import dense, inputs, sliding_window


def init_cache(cfg, batch, capacity, dtype=torch.bfloat16):
    """An empty cache with room for `capacity` tokens per row, or a ring of min(W, capacity) slots."""
    return _keys(cfg).init_cache(cfg, batch, capacity, dtype)


def forward(params, cfg, x, positions=None):
    """y: B T D from x: B T D without a cache; positions and errors as in `dense.forward`."""
    check(params, cfg)
    return _keys(cfg).forward(params, cfg, x, positions)


def prefill(params, cfg, x, cache, lengths=None):
    """(y, cache) after appending the first lengths[b] of the T tokens of row b, as in `dense.prefill`."""
    check(params, cfg)
    return _keys(cfg).prefill(params, cfg, x, cache, lengths)


def decode(params, cfg, x, cache, ops=reference_ops):
    """(y, cache) after appending 1 to 16 tokens per row; x, y: B T D. ops: any namespace with `decode_attention`."""
    check(params, cfg)
    return _keys(cfg).decode(params, cfg, x, cache, ops)


def _keys(cfg):
    """Which tokens are seen and kept is the business of the mechanism without sinks."""
    return dense if cfg.sliding_window is None else sliding_window


def check(params, cfg):
    """Raise ValueError or TypeError for sinks that are not the config's."""
    inputs.check_parameters(params, {"sinks": (cfg.num_attention_heads,)})
