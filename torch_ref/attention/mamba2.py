"""Mamba-2: a state per head that decays by a step size of each token.

    x', k, q = SiLU(conv([x wx | x wk | x wq] + biases) + b_conv)        k, q: the paper's B and C, one for each group
    delta = clip(softplus(x wdt + dt_bias), time_step_limit);   g = -e^{a_log} delta
    S_t = e^{g_t} S_{t-1} + k_t (delta_t x'_t)^T,   o_t = S_t^T q_t + skip x'_t
    y   = (o_norm * RMS_group(o * SiLU(z))) wo           norm "gate_first",   z = x wz
          ((o_norm * RMS_group(o)) * SiLU(z)) wo         norm "norm_first"
          (o * SiLU(z)) wo                               norm None

Head n belongs to group n // (N/K); RMS_group is over the N/K heads of a group together. Dao and Gu 2024 (2405.21060);
Mamba-2, Bamba, Granite 4, Nemotron-H and Zamba2 gate first, Falcon-H1 norms first or not at all.

cfg: any object with hidden_size (D), num_heads (N), head_dim (V), state_size (H), n_groups (K, divides N), conv_kernel
(L), use_bias, use_conv_bias, time_step_limit (low, high), norm ("gate_first", "norm_first" or None), rms_norm_eps,
block_size (tokens of a block in prefill; changes no result).
params: wz, wx D N V, wk, wq D K H, wdt D N; with use_bias bz, bx N V, bk, bq K H, bdt N, bo D; w_conv L X and, with
use_conv_bias, b_conv X over X = all x', all k, all q; a_log, skip (the paper's D), dt_bias N; with a norm o_norm N V;
wo N V D.
cache: {"state": B N H V, "conv": B (L-1) X, "length": int32 B}, see `recurrent`.
"""

import torch
from torch.nn.functional import silu

from .. import ops as reference_ops
from ..core.dtypes import einsum
from ..core.gates import softplus
from ..core.norm import rms_norm
from ..ops import check
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
    """B T X in x's dtype: all x', all k, all q before the convolution."""
    biases = ("bx", "bk", "bq") if cfg.use_bias else ()
    return recurrent.side_by_side(params, x, "wx", "wk", "wq", biases=biases)


def tokens(params, cfg, x, c):
    """q, k B T N H, v = delta x' B T N V and g B T N from the convolved c B T X; no delta rule, so no beta."""
    values, k, q = convolved_parts(cfg, c)
    q, k = (z.repeat_interleave(cfg.num_heads // cfg.n_groups, dim=2) for z in (q, k))
    delta = einsum("btd,dn->btn", x, params["wdt"])
    delta = softplus((delta + params["bdt"] if cfg.use_bias else delta) + params["dt_bias"])
    delta = delta.clamp(*cfg.time_step_limit)
    return q, k, delta[..., None] * values, -params["a_log"].to(delta.dtype).exp() * delta, None


def output(params, cfg, x, c, out):
    """y B T D in x's dtype from out B T N V: the skip of x', gate and norm in the config's order, wo."""
    z = einsum("btd,dnv->btnv", x, params["wz"])
    gate = silu(z + params["bz"] if cfg.use_bias else z)
    out = out + params["skip"][:, None] * convolved_parts(cfg, c)[0]
    if cfg.norm == "norm_first":
        out = group_norm(params, cfg, out) * gate
    else:
        out = group_norm(params, cfg, out * gate) if cfg.norm else out * gate
    y = einsum("btnv,nvd->btd", out, params["wo"])
    return (y + params["bo"] if cfg.use_bias else y).to(x.dtype)


def convolved_parts(cfg, c):
    """x' B T N V, k and q B T K H, the parts of c B T X."""
    keys = (cfg.n_groups, cfg.state_size)
    return recurrent.split(c, (cfg.num_heads, cfg.head_dim), keys, keys)


def group_norm(params, cfg, out):
    """out B T N V over the root mean square of its group of heads, times o_norm."""
    groups = (cfg.n_groups, -1)
    weight = params["o_norm"].unflatten(0, groups)
    return rms_norm(out.unflatten(2, groups), weight, cfg.rms_norm_eps, dims=2).flatten(2, 3)


def state(cfg):
    """(N, H, V)."""
    return cfg.num_heads, cfg.state_size, cfg.head_dim


def shapes(cfg):
    """{name: shape} of the parameters."""
    d, groups, (n, h, v) = cfg.hidden_size, cfg.n_groups, state(cfg)
    heads, channels = {"z": (n, v), "x": (n, v), "k": (groups, h), "q": (groups, h), "dt": (n,)}, n * v + 2 * groups * h
    named = {f"w{name}": (d, *shape) for name, shape in heads.items()}
    if cfg.use_bias:
        named |= {f"b{name}": shape for name, shape in heads.items()} | {"bo": (d,)}
    named |= {"w_conv": (cfg.conv_kernel, channels)} | ({"b_conv": (channels,)} if cfg.use_conv_bias else {})
    named |= dict.fromkeys(("a_log", "skip", "dt_bias"), (n,)) | {"wo": (n, v, d)}
    return named | ({"o_norm": (n, v)} if cfg.norm else {})


def check_fields(cfg):
    """Raise ValueError or TypeError for fields that do not fit together."""
    inputs.check_counts(cfg, 1, "hidden_size", "num_heads", "head_dim", "state_size", "n_groups", "conv_kernel")
    inputs.check_counts(cfg, 1, "block_size")
    inputs.check_choice(cfg, "norm", None, "gate_first", "norm_first")
    inputs.check_multiple(cfg, "num_heads", "n_groups")
    limit = cfg.time_step_limit
    if len(limit) != 2:
        raise ValueError(f"time_step_limit is {limit}; allowed: a pair (low, high)")
    for bound in limit:
        check.number("time_step_limit", bound, 0.0, float("inf"))
    if limit[0] > limit[1]:
        raise ValueError(f"time_step_limit is {limit}; allowed: low <= high")


MIXER = recurrent.Mixer(check_fields, shapes, state, raw, tokens, output)
