"""Gated short convolution: no state but the last rows of a product that a few taps read.

    b, c, x' = x wb + bb, x wc + bc, x wx + bx;   y = (c * conv(b * x')) wo + bo

conv is causal and depthwise, with b_conv and without an activation. LFM2 and LFM3.

cfg: any object with hidden_size (D), conv_L_cache (L, the taps), conv_bias (biases of the projections and of conv).
params: wb, wc, wx, wo D D, w_conv L D; with conv_bias bb, bc, bx, b_conv, bo D.
cache: {"conv": B (L-1) D, the last rows of b * x' in the cache's dtype, the oldest first, zeros while the row is
shorter; "length": int32 B}. Of constant size: it never overflows. Rows are rounded to the dtype that stores them before
they are convolved, in `forward` to x's.
"""

import torch

from .. import ops as reference_ops
from ..core import conv
from ..core.dtypes import einsum
from . import inputs
from .recurrent import check_conv
from .step import begin, empty, end, in_order, token_by_token


def init_cache(cfg, batch, capacity, dtype=torch.bfloat16):
    """Rows of zeros in dtype; capacity has no part in it."""
    check_fields(cfg)
    return empty(batch, dtype, conv=(cfg.conv_L_cache - 1, cfg.hidden_size))


def forward(params, cfg, x, positions=None):
    """y: B T D from x: B T D without a cache, in x's dtype. positions: int B T, checked and without effect: there is no
    RoPE. Raises ValueError and TypeError for wrong inputs."""
    check_inputs(params, cfg, x)
    in_order(x, positions)
    return output(params, cfg, x, conv.from_the_start(products(params, cfg, x), cfg.conv_L_cache))


def prefill(params, cfg, x, cache, lengths=None):
    """(y, cache) after the first lengths[b] of the T tokens of row b; lengths: int32 B.

    x at pads may be anything, y there is 0, and pads leave no rows. A non-empty cache makes this a chunk of a longer
    prefill. y has x's dtype.
    """
    check_inputs(params, cfg, x, cache)
    step = begin(x, cache, None, lengths)
    rows = conv.joined(cache["conv"], products(params, cfg, step.x))
    y = end(step, output(params, cfg, step.x, rows))
    return y, {"conv": conv.newest(rows, step.new, cfg.conv_L_cache), "length": step.start + step.new}


@token_by_token
def decode(params, cfg, x, cache, ops=reference_ops):
    """(y, cache) after 1 to 16 tokens per row; x, y: B T D. ops: without use, a few taps need none."""
    check_inputs(params, cfg, x, cache, tokens=1)
    return prefill(params, cfg, x, cache)


def products(params, cfg, x):
    """b * x': B T D in x's dtype, the rows that are convolved and stored."""
    return (projected(params, cfg, x, "b") * projected(params, cfg, x, "x")).to(x.dtype)


def output(params, cfg, x, rows):
    """y: B T D in x's dtype from the rows B (L-1+T) D."""
    mixed = conv.depthwise(rows, params["w_conv"], params["b_conv"] if cfg.conv_bias else None)
    y = einsum("btd,de->bte", projected(params, cfg, x, "c") * mixed, params["wo"])
    return (y + params["bo"] if cfg.conv_bias else y).to(x.dtype)


def projected(params, cfg, x, name):
    """x through w{name}, with b{name} by config, in float32 or wider."""
    z = einsum("btd,de->bte", x, params[f"w{name}"])
    return z + params[f"b{name}"] if cfg.conv_bias else z


def shapes(cfg):
    """{name: shape} of the parameters."""
    d = cfg.hidden_size
    named = dict.fromkeys(("wb", "wc", "wx", "wo"), (d, d)) | {"w_conv": (cfg.conv_L_cache, d)}
    return named | (dict.fromkeys(("bb", "bc", "bx", "b_conv", "bo"), (d,)) if cfg.conv_bias else {})


def check_fields(cfg):
    """Raise ValueError or TypeError for fields that do not fit together."""
    inputs.check_counts(cfg, 1, "hidden_size", "conv_L_cache")


def check_inputs(params, cfg, x, cache=None, tokens=None):
    """Raise ValueError or TypeError for fields, x, parameters and a cache that do not fit together."""
    check_fields(cfg)
    inputs.check_tokens(x, cfg.hidden_size, tokens)
    inputs.check_parameters(params, shapes(cfg))
    if cache is not None:
        inputs.check_cache(cache, x)
        check_conv(cache, x, cfg.conv_L_cache, cfg.hidden_size)
