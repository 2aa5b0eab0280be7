"""Gated DeltaNet: the delta rule on a state that decays by a gate of each token.

    q, k, v = SiLU(conv([x wq | x wk | x wv]));   q = q / sqrt(|q|^2 + 1e-6) H^-0.5,   k = k / sqrt(|k|^2 + 1e-6)
    beta    = sigmoid(x wb), twice that with linear_allow_neg_eigval;   g = -e^{a_log} softplus(x wa + dt_bias)
    S_t = e^{g_t} S_{t-1} + k_t u_t^T,   u_t = beta_t (v_t - (e^{g_t} S_{t-1})^T k_t),   o_t = S_t^T q_t
    y   = (o_norm * RMS_V(o) * gate(x wg)) wo,   gate = SiLU or sigmoid

Value head n reads key head n // (N/K). beta scales what is written and what is erased, so with the factor 2 the
eigenvalue e^g (1 - beta) along k can be negative. Yang et al. 2024 (2412.06464); Qwen3-Next, Qwen3.5, OLMo hybrid.

cfg: any object with hidden_size (D), linear_num_key_heads (K), linear_num_value_heads (N, a multiple of K),
linear_key_head_dim (H), linear_value_head_dim (V), linear_conv_kernel_dim (L), linear_allow_neg_eigval,
output_gate_type ("silu" or "sigmoid"), rms_norm_eps, block_size (tokens of a block in prefill; changes no result).
params: wq, wk D K H, wv, wg D N V, wb, wa D N, w_conv L X over X = all q, all k, all v, a_log N, dt_bias N, o_norm V,
wo N V D.
cache: {"state": B N H V, "conv": B (L-1) X, "length": int32 B}, see `recurrent`.
"""

import torch

from .. import ops as reference_ops
from ..core.dtypes import einsum
from ..core.gates import GATES, softplus
from ..core.norm import l2_norm, rms_norm
from . import inputs, recurrent
from .step import token_by_token

L2_EPS = 1e-6


def init_cache(cfg, batch, capacity, dtype=torch.bfloat16):
    """An empty state in float32 or wider and raw rows of zeros in dtype; capacity has no part in it."""
    return recurrent.init_cache(MIXER, cfg, batch, dtype)


def forward(params, cfg, x, positions=None):
    """y: B T D from x: B T D without a cache, in x's dtype, one token after the other. positions: int B T, checked and
    without effect: there is no RoPE. Raises ValueError and TypeError for wrong inputs."""
    return recurrent.forward(MIXER, params, cfg, x, positions)


def prefill(params, cfg, x, cache, lengths=None):
    """(y, cache) after the first lengths[b] of the T tokens of row b, by blocks; lengths: int32 B.

    x at pads may be anything, y there is 0, and pads change neither state nor raw rows. A non-empty cache makes this a
    chunk of a longer prefill. y has x's dtype.
    """
    return recurrent.prefill(MIXER, params, cfg, x, cache, lengths)


@token_by_token
def decode(params, cfg, x, cache, ops=reference_ops):
    """(y, cache) after 1 to 16 tokens per row; x, y: B T D. ops: any namespace with `decode_linear`."""
    return recurrent.decode(MIXER, params, cfg, x, cache, ops)


def raw(params, cfg, x):
    """B T X in x's dtype: all q, all k, all v before the convolution."""
    return recurrent.side_by_side(params, x, "wq", "wk", "wv")


def tokens(params, cfg, x, c):
    """q, k B T N H, v B T N V, g B T N and beta B T N from the convolved c B T X."""
    n, v_dim, group = cfg.linear_num_value_heads, cfg.linear_value_head_dim, _group(cfg)
    keys = (cfg.linear_num_key_heads, cfg.linear_key_head_dim)
    q, k, v = recurrent.split(c, keys, keys, (n, v_dim))
    q, k = (l2_norm(z, L2_EPS).repeat_interleave(group, dim=2) for z in (q, k))
    beta = torch.sigmoid(einsum("btd,dn->btn", x, params["wb"]))
    if cfg.linear_allow_neg_eigval:
        beta = 2 * beta
    g = -params["a_log"].to(beta.dtype).exp() * softplus(einsum("btd,dn->btn", x, params["wa"]) + params["dt_bias"])
    return q * cfg.linear_key_head_dim**-0.5, k, v, g, beta


def output(params, cfg, x, c, out):
    """y B T D in x's dtype from out B T N V: a norm of each head, the gate from x, wo."""
    gate = GATES[cfg.output_gate_type](einsum("btd,dnv->btnv", x, params["wg"]))
    return einsum("btnv,nvd->btd", rms_norm(out, params["o_norm"], cfg.rms_norm_eps) * gate, params["wo"]).to(x.dtype)


def state(cfg):
    """(N, H, V)."""
    return cfg.linear_num_value_heads, cfg.linear_key_head_dim, cfg.linear_value_head_dim


def shapes(cfg):
    """{name: shape} of the parameters."""
    d, heads, (n, h, v) = cfg.hidden_size, cfg.linear_num_key_heads, state(cfg)
    return {
        **dict.fromkeys(("wq", "wk"), (d, heads, h)),
        **dict.fromkeys(("wv", "wg"), (d, n, v)),
        **dict.fromkeys(("wb", "wa"), (d, n)),
        "w_conv": (cfg.linear_conv_kernel_dim, 2 * heads * h + n * v),
        **dict.fromkeys(("a_log", "dt_bias"), (n,)),
        "o_norm": (v,),
        "wo": (n, v, d),
    }


def check_fields(cfg):
    """Raise ValueError or TypeError for fields that do not fit together."""
    inputs.check_counts(cfg, 1, "hidden_size", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim")
    inputs.check_counts(cfg, 1, "linear_value_head_dim", "linear_conv_kernel_dim", "block_size")
    inputs.check_choice(cfg, "output_gate_type", "silu", "sigmoid")
    inputs.check_multiple(cfg, "linear_num_value_heads", "linear_num_key_heads")


def _group(cfg):
    return cfg.linear_num_value_heads // cfg.linear_num_key_heads


MIXER = recurrent.Mixer(check_fields, shapes, state, raw, tokens, output)
