"""Mamba: a state of H numbers per channel, each of which decays at a rate of its own.

    u = SiLU(conv(x wx + bx) + b_conv);   r, k, q = u w_dt_in, u wk, u wq        k, q: the paper's B and C
    r, k, q = norm(r), norm(k), norm(q)   by config;   delta = softplus(r w_dt + dt_bias)
    S_t,i = e^{g_t,i} S_{t-1,i} + k_t delta_t,i u_t,i,   g_t,i = -e^{a_log_i} delta_t,i
    o_t,i = S_t,i . q_t + skip_i u_t,i
    y   = (o * SiLU(x wz + bz)) wo + bo

S_i has H numbers for channel i; as a linear-attention state this is N = I heads with values of one channel. Gu and Dao
2023 (2312.00752); Falcon-Mamba norms r, k and q without weights, Jamba with them.

cfg: any object with hidden_size (D), intermediate_size (I), state_size (H), time_step_rank (R), conv_kernel (L),
use_bias, use_conv_bias, norm (None, "plain": RMS without weights, or "weighted"), rms_norm_eps (of these norms),
block_size (tokens of a block in prefill; changes no result).
params: wx, wz D I; with use_bias bx, bz I, bo D; w_conv L I and, with use_conv_bias, b_conv I; w_dt_in I R, wk, wq I H,
w_dt R I, dt_bias I, a_log I H, skip I (the paper's D), wo I D; for "weighted" dt_norm R, k_norm, q_norm H.
cache: {"state": B I H 1, "conv": B (L-1) I, "length": int32 B}, see `recurrent`.
"""

import torch
from torch.nn.functional import silu

from .. import ops as reference_ops
from ..core.dtypes import einsum
from ..core.gates import softplus
from ..core.norm import rms_norm
from . import inputs, recurrent
from .step import token_by_token


def init_cache(cfg, batch, capacity, dtype=torch.bfloat16):
    """An empty state in float32 or wider and raw rows of zeros in dtype; capacity has no part in it."""
    return recurrent.init_cache(MIXER, cfg, batch, dtype)


def forward(params, cfg, x, positions=None):
    """y: B T D from x: B T D without a cache; positions and errors as in `gated_deltanet.forward`."""
    return recurrent.forward(MIXER, params, cfg, x, positions)


def prefill(params, cfg, x, cache, lengths=None):
    """(y, cache) after the first lengths[b] of the T tokens of row b, as in `gated_deltanet.prefill`."""
    return recurrent.prefill(MIXER, params, cfg, x, cache, lengths)


@token_by_token
def decode(params, cfg, x, cache, ops=reference_ops):
    """(y, cache) after 1 to 16 tokens per row; x, y: B T D. ops: any namespace with `decode_linear`."""
    return recurrent.decode(MIXER, params, cfg, x, cache, ops)


def raw(params, cfg, x):
    """B T I in x's dtype: what the convolution reads."""
    return recurrent.side_by_side(params, x, "wx", biases=("bx",) if cfg.use_bias else ())


def tokens(params, cfg, x, c):
    """q, k, g B T I H and v = delta u B T I 1 from the convolved u = c B T I; no delta rule, so no beta."""
    rank = normalised(params, cfg, einsum("bti,ir->btr", c, params["w_dt_in"]), "dt_norm")
    k = normalised(params, cfg, einsum("bti,ih->bth", c, params["wk"]), "k_norm")
    q = normalised(params, cfg, einsum("bti,ih->bth", c, params["wq"]), "q_norm")
    delta = softplus(einsum("btr,ri->bti", rank, params["w_dt"]) + params["dt_bias"])
    g = -params["a_log"].to(delta.dtype).exp() * delta[..., None]
    q, k = (z[:, :, None].expand(g.shape) for z in (q, k))  # one for all channels
    return q, k, (delta * c)[..., None], g, None


def normalised(params, cfg, z, name):
    """z over its root mean square, times the weight of that name, or z itself, as cfg.norm says."""
    if cfg.norm is None:
        return z
    return rms_norm(z, params[name] if cfg.norm == "weighted" else None, cfg.rms_norm_eps)


def output(params, cfg, x, c, out):
    """y B T D in x's dtype from out B T I 1: the skip of u, the gate from x, wo."""
    z = einsum("btd,di->bti", x, params["wz"])
    gate = silu(z + params["bz"] if cfg.use_bias else z)
    y = einsum("bti,id->btd", (out[..., 0] + params["skip"] * c) * gate, params["wo"])
    return (y + params["bo"] if cfg.use_bias else y).to(x.dtype)


def state(cfg):
    """(I, H, 1)."""
    return cfg.intermediate_size, cfg.state_size, 1


def shapes(cfg):
    """{name: shape} of the parameters."""
    d, i, h, r = cfg.hidden_size, cfg.intermediate_size, cfg.state_size, cfg.time_step_rank
    named = {
        **dict.fromkeys(("wx", "wz"), (d, i)),
        "w_conv": (cfg.conv_kernel, i),
        "w_dt_in": (i, r),
        **dict.fromkeys(("wk", "wq", "a_log"), (i, h)),
        "w_dt": (r, i),
        **dict.fromkeys(("dt_bias", "skip"), (i,)),
        "wo": (i, d),
    }
    if cfg.use_bias:
        named |= {"bx": (i,), "bz": (i,), "bo": (d,)}
    if cfg.use_conv_bias:
        named["b_conv"] = (i,)
    if cfg.norm == "weighted":
        named |= {"dt_norm": (r,), "k_norm": (h,), "q_norm": (h,)}
    return named


def check_fields(cfg):
    """Raise ValueError or TypeError for fields that do not fit together."""
    inputs.check_counts(cfg, 1, "hidden_size", "intermediate_size", "state_size", "time_step_rank", "conv_kernel")
    inputs.check_counts(cfg, 1, "block_size")
    inputs.check_choice(cfg, "norm", None, "plain", "weighted")


MIXER = recurrent.Mixer(check_fields, shapes, state, raw, tokens, output)
