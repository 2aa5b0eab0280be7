"""Kimi delta attention: the delta rule on a state whose key channels each decay by a gate of their own.

    q, k, v = SiLU(conv([x wq | x wk | x wv]));   q = q / sqrt(|q|^2 + 1e-6) H^-0.5,   k = k / sqrt(|k|^2 + 1e-6)
    beta = sigmoid(x wb);   f = x wf_a wf_b, or x wf;   z = x wg_a wg_b, or x wg
    g    = -e^{a_log} softplus(f + dt_bias),   or with a bound b < 0   b sigmoid(e^{a_log} (f + dt_bias))
    S_t = diag(e^{g_t}) S_{t-1} + k_t u_t^T,   u_t = beta_t (v_t - (diag(e^{g_t}) S_{t-1})^T k_t),   o_t = S_t^T q_t
    y   = (o_norm * RMS_H(o) * sigmoid(z)) wo

Kimi Linear (2510.26692); GLM-5.3-Flash has the bound, Ling hybrid the bound and no low rank.

cfg: any object with hidden_size (D), linear_num_heads (N), linear_head_dim (H, of keys and values),
linear_conv_kernel_dim (L), linear_lower_bound (b, a number < 0, or None: softplus), low_rank, rms_norm_eps, block_size
(tokens of a block in prefill; changes no result).
params: wq, wk, wv D N H, wb D N; with low_rank wf_a, wg_a D H and wf_b, wg_b H N H, else wf, wg D N H; w_conv L X over
X = all q, all k, all v, a_log N, dt_bias N H, o_norm H, wo N H D.
cache: {"state": B N H H, "conv": B (L-1) X, "length": int32 B}, see `recurrent`.
"""

import torch

from .. import ops as reference_ops
from ..core.dtypes import einsum
from ..core.gates import softplus
from ..core.norm import l2_norm, rms_norm
from ..ops import check
from . import inputs, recurrent
from .gated_deltanet import L2_EPS
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
    """B T X in x's dtype: all q, all k, all v before the convolution."""
    return recurrent.side_by_side(params, x, "wq", "wk", "wv")


def tokens(params, cfg, x, c):
    """q, k, v, g B T N H and beta B T N from the convolved c B T X."""
    h = cfg.linear_head_dim
    q, k, v = recurrent.split(c, *[(cfg.linear_num_heads, h)] * 3)
    q, k = l2_norm(q, L2_EPS) * h**-0.5, l2_norm(k, L2_EPS)
    beta = torch.sigmoid(einsum("btd,dn->btn", x, params["wb"]))
    f = per_channel(params, cfg, x, "wf") + params["dt_bias"]
    rate = params["a_log"].to(f.dtype).exp()[:, None]
    bound = cfg.linear_lower_bound
    g = -rate * softplus(f) if bound is None else bound * torch.sigmoid(rate * f)
    return q, k, v, g, beta


def output(params, cfg, x, c, out):
    """y B T D in x's dtype from out B T N H: a norm of each head, the gate from x, wo."""
    gate = torch.sigmoid(per_channel(params, cfg, x, "wg"))
    return einsum("btnh,nhd->btd", rms_norm(out, params["o_norm"], cfg.rms_norm_eps) * gate, params["wo"]).to(x.dtype)


def per_channel(params, cfg, x, name):
    """B T N H in float32 or wider: x through params[name], with low_rank through head_dim channels."""
    if not cfg.low_rank:
        return einsum("btd,dnh->btnh", x, params[name])
    return einsum("btr,rnh->btnh", einsum("btd,dr->btr", x, params[f"{name}_a"]), params[f"{name}_b"])


def state(cfg):
    """(N, H, H)."""
    return cfg.linear_num_heads, cfg.linear_head_dim, cfg.linear_head_dim


def shapes(cfg):
    """{name: shape} of the parameters."""
    d, n, h = cfg.hidden_size, cfg.linear_num_heads, cfg.linear_head_dim
    if cfg.low_rank:
        gates = dict.fromkeys(("wf_a", "wg_a"), (d, h)) | dict.fromkeys(("wf_b", "wg_b"), (h, n, h))
    else:
        gates = dict.fromkeys(("wf", "wg"), (d, n, h))
    return {
        **dict.fromkeys(("wq", "wk", "wv"), (d, n, h)),
        **gates,
        "wb": (d, n),
        "w_conv": (cfg.linear_conv_kernel_dim, 3 * n * h),
        "a_log": (n,),
        "dt_bias": (n, h),
        "o_norm": (h,),
        "wo": (n, h, d),
    }


def check_fields(cfg):
    """Raise ValueError or TypeError for fields that do not fit together."""
    inputs.check_counts(cfg, 1, "hidden_size", "linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim")
    inputs.check_counts(cfg, 1, "block_size")
    bound = cfg.linear_lower_bound
    if bound is not None:
        check.number("linear_lower_bound", bound)
        if bound >= 0:
            raise ValueError(f"linear_lower_bound is {bound}; allowed: None, or a number < 0")


MIXER = recurrent.Mixer(check_fields, shapes, state, raw, tokens, output)
