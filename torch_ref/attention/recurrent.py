"""What gated_deltanet, kda, mamba2 and mamba1 share: a convolution of raw rows, then a recurrent state.

    c_t = SiLU(conv(raw)_t),   raw_t from x_t;   q_t, k_t, v_t, g_t, beta_t from c_t and x_t
    S_t = e^{g_t} S_{t-1} + k_t u_t^T,   o_t = S_t^T q_t   (`core.delta`);   y_t from o_t, c_t and x_t

cache: {"state": B N H V, float32 or wider, key channel before value channel; "conv": B (L-1) X, the last raw rows of
`core.conv` in the cache's dtype; "length": int32 B}. Of constant size: it never overflows. Raw rows are rounded to the
dtype that stores them before they are convolved, in `forward` to x's; from there to the output everything is float32
or wider.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..core import conv, delta
from ..core.dtypes import accumulator, einsum
from ..ops import check
from . import inputs
from .step import begin, empty, end, in_order


class Mixer(NamedTuple):
    """What a mechanism adds.

    check_fields(cfg). shapes(cfg): {name: shape} of the parameters, w_conv L X and perhaps b_conv X among them.
    state(cfg): (N, H, V). raw(params, cfg, x): B T X in x's dtype. tokens(params, cfg, x, c): q, k, v, g and beta, as
    `core.delta` takes them, from c B T X. output(params, cfg, x, c, out): y B T D in x's dtype from out B T N V.
    """

    check_fields: Callable
    shapes: Callable
    state: Callable
    raw: Callable
    tokens: Callable
    output: Callable


def init_cache(mixer, cfg, batch, dtype):
    """A state and raw rows of zeros."""
    mixer.check_fields(cfg)
    kernel, channels = mixer.shapes(cfg)["w_conv"]
    state = empty(batch, accumulator(dtype), state=mixer.state(cfg))
    return state | empty(batch, dtype, conv=(kernel - 1, channels))


def forward(mixer, params, cfg, x, positions=None):
    """y: B T D without a cache, by the recurrence one token after the other."""
    check_inputs(mixer, params, cfg, x)
    in_order(x, positions)
    rows = conv.from_the_start(mixer.raw(params, cfg, x), len(params["w_conv"]))
    c = convolved(mixer, params, cfg, rows)
    q, k, v, g, beta = mixer.tokens(params, cfg, x, c)
    start = q.new_zeros(len(x), *mixer.state(cfg))
    out, _ = delta.recurrent(q, k, v, g, beta, start)
    return mixer.output(params, cfg, x, c, out)


def prefill(mixer, params, cfg, x, cache, lengths=None):
    """(y, cache) after the first lengths[b] of the T tokens of row b, in blocks of cfg.block_size."""
    check_inputs(mixer, params, cfg, x, cache)
    step, state = begin(x, cache, None, lengths), cache["state"]
    rows = conv.joined(cache["conv"], mixer.raw(params, cfg, step.x))
    c = convolved(mixer, params, cfg, rows)
    q, k, v, g, beta = mixer.tokens(params, cfg, step.x, c)
    out, new_state = delta.blockwise(q, k, v, g, beta, state, cfg.block_size, step.token)
    y = end(step, mixer.output(params, cfg, step.x, c, out))
    return y, after(cache, new_state, rows, step.new)


def decode(mixer, params, cfg, x, cache, ops):
    """(y, cache) after a single token per row; ops: any namespace with `decode_linear`."""
    check_inputs(mixer, params, cfg, x, cache, tokens=1)
    rows = conv.joined(cache["conv"], mixer.raw(params, cfg, x))
    c = convolved(mixer, params, cfg, rows)
    q, k, v, g, beta = (z if z is None else z[:, 0] for z in mixer.tokens(params, cfg, x, c))
    wide = accumulator(q.dtype, k.dtype, v.dtype)
    state = cache["state"].clone()  # the op may overwrite what it is given
    decay, beta = g.exp().to(state.dtype), None if beta is None else beta.to(state.dtype)
    out, state = ops.decode_linear(q.to(wide), k.to(wide), v.to(wide), state, decay, beta=beta)
    return mixer.output(params, cfg, x, c, out[:, None]), after(cache, state, rows, torch.ones_like(cache["length"]))


def convolved(mixer, params, cfg, rows):
    """c: B T X in float32 or wider from the raw rows B (L-1+T) X."""
    bias = params["b_conv"] if "b_conv" in mixer.shapes(cfg) else None
    return torch.nn.functional.silu(conv.depthwise(rows, params["w_conv"], bias))


def side_by_side(params, x, *weights, biases=()):
    """raw: B T X in x's dtype, x times the weights D .. of these names, side by side; biases, if any, for each."""
    parts = [einsum("btd,dx->btx", x, params[name].flatten(1)) for name in weights]
    parts = [z + params[name].flatten() for z, name in zip(parts, biases, strict=True)] if biases else parts
    return torch.cat(parts, dim=-1).to(x.dtype)


def split(c, *heads):
    """The parts B T N H of c B T X, whose sizes (N, H) stand in heads."""
    parts = c.split([n * h for n, h in heads], dim=-1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, heads, strict=True)]


def after(cache, state, rows, new):
    """The cache with the new state, and the newest of the raw rows once row b has taken new[b] of them."""
    kept = conv.newest(rows, new, cache["conv"].shape[1] + 1)
    return {"state": state.to(cache["state"].dtype), "conv": kept, "length": cache["length"] + new}


def check_inputs(mixer, params, cfg, x, cache=None, tokens=None):
    """Raise ValueError or TypeError for fields, x, parameters and a cache that do not fit together."""
    mixer.check_fields(cfg)
    inputs.check_tokens(x, cfg.hidden_size, tokens)
    shapes = mixer.shapes(cfg)
    inputs.check_parameters(params, shapes)
    if cache is not None:
        inputs.check_cache(cache, x)
        heads = dict(zip("NHV", mixer.state(cfg), strict=True))
        inputs.check_buffer(cache, x, "state", "B N H V", heads, check.WIDE)
        check_conv(cache, x, *shapes["w_conv"])


def check_conv(cache, x, kernel, channels):
    """cache["conv"]: float B (L-1) X, which has no rows for a kernel of one token."""
    inputs.check_buffer(cache, x, "conv", "B S X", {"S": kernel - 1, "X": channels}, check.FLOATS)
