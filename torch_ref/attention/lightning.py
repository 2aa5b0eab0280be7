"""Lightning attention: linear attention whose state decays by a fixed factor of its own in every head.

    q, k, v = SiLU(x wq), SiLU(x wk), SiLU(x wv);   no RoPE, no scale
    S_t = lambda_n S_{t-1} + k_t^T v_t;   o_t = q_t S_t;   lambda_n = exp(-slope_n)
    slope_n = a_n (1 - l / (L - 1 + 1e-5) + 1e-5),   a_n = 2^(-8 (n+1) / N)   for N a power of two
    y = (sigmoid(x wg) * RMS(o)) wo,   the mean of RMS over all N H channels

Any other N takes ALiBi's rule (2108.12409): a of the largest power of two p below N, then the first, third, .. entry
of a of 2p. MiniMax-Text-01, VL-01 (2501.08313) and M1; slopes, gate and norm are in their code, not in the paper.

cfg: any object with hidden_size (D), num_attention_heads (N), head_dim (H; None: D // N), layer_index (l, from 0, among
all layers of the model), num_hidden_layers (L), block_size, rms_norm_eps.
params: wq, wk, wv, wg D N H, o_norm N H, wo N H D.
cache: {"state": B N H H, key channel before value channel, float32 or wider; "length": int32 B}. Of constant size: it
never overflows.
"""

import torch

from .. import ops as reference_ops
from ..core import alibi
from ..core.dtypes import accumulator, einsum
from ..core.norm import rms_norm
from ..ops import check
from . import inputs
from .step import begin, empty, end, in_order, token_by_token


def init_cache(cfg, batch, capacity, dtype=torch.bfloat16):
    """An empty state per row, in float32 or wider whatever dtype is; capacity has no part in it."""
    check_fields(cfg)
    return empty(batch, accumulator(dtype), state=(cfg.num_attention_heads, head_dim(cfg), head_dim(cfg)))


def forward(params, cfg, x, positions=None):
    """y: B T D from x: B T D without a cache, in x's dtype, by the quadratic form. positions: int B T, checked and
    without effect: there is no RoPE. Raises ValueError and TypeError for wrong inputs."""
    check_inputs(params, cfg, x)
    in_order(x, positions)
    q, k, v = project(params, x)
    out = quadratic(q, k, v, decay_of(cfg, accumulator(x.dtype), x.device))
    return project_out(params, cfg, x, out)


def prefill(params, cfg, x, cache, lengths=None):
    """(y, cache) after the first lengths[b] of the T tokens of row b, by the blockwise form; lengths: int32 B.

    x at pads may be anything, y there is 0, and pads do not decay the state. A non-empty cache makes this a chunk of a
    longer prefill. y has x's dtype.
    """
    check_inputs(params, cfg, x, cache)
    step, state = begin(x, cache, None, lengths), cache["state"]
    q, k, v = project(params, step.x)
    decay = decay_of(cfg, state.dtype, x.device)
    out, new_state = blockwise(q, k, v, decay, state, cfg.block_size, step.new)
    y = end(step, project_out(params, cfg, step.x, out))
    return y, {"state": new_state.to(state.dtype), "length": step.start + step.new}


@token_by_token
def decode(params, cfg, x, cache, ops=reference_ops):
    """(y, cache) after 1 to 16 tokens per row; x, y: B T D. ops: any namespace with `decode_linear`."""
    check_inputs(params, cfg, x, cache, tokens=1)
    q, k, v = (z[:, 0] for z in project(params, x))
    state = cache["state"].clone()  # the op may overwrite what it is given
    out, state = ops.decode_linear(q, k, v, state, decay_of(cfg, state.dtype, x.device))
    return project_out(params, cfg, x, out[:, None]), {"state": state, "length": cache["length"] + 1}


def recurrent(q, k, v, decay, state):
    """(out, state) by S_t = decay S_{t-1} + k_t^T v_t, o_t = q_t S_t, one token after the other.

    q, k: B T N H. v: B T N V. decay: N. state: B N H V, the state before. out: B T N V. All in float32 or wider.
    """
    outs = []
    for t in range(q.shape[1]):
        state = decay[:, None, None] * state + einsum("bnh,bnv->bnhv", k[:, t], v[:, t])
        outs.append(einsum("bnh,bnhv->bnv", q[:, t], state))
    return torch.stack(outs, dim=1), state


def blockwise(q, k, v, decay, state, block_size, lengths=None):
    """(out, state) of `recurrent`, a block of tokens after the other; with i = 1..m inside a block of m tokens

        o_i = sum over j <= i of decay^(i-j) (q_i . k_j) v_j + decay^i q_i S
        S <- decay^m S + sum over i of decay^(m-i) k_i^T v_i

    The last block may be short. lengths: int B, the tokens of the row that count; what stands after them (finite)
    changes neither the state nor an out before it.
    """
    check.integer("block_size", block_size)
    if lengths is None:
        lengths = torch.full((len(q),), q.shape[1], device=q.device)
    wide, outs = accumulator(q.dtype, k.dtype, v.dtype, state.dtype), []
    for first in range(0, q.shape[1], block_size):
        q_i, k_i, v_i = (z[:, first : first + block_size] for z in (q, k, v))
        size = q_i.shape[1]
        order = torch.arange(1, size + 1, device=q.device)
        carried = einsum("tn,btnh,bnhv->btnv", powers(decay, order, wide), q_i, state)
        outs.append(quadratic(q_i, k_i, v_i, decay) + carried)
        real = (lengths - first).clamp(0, size)
        after = real[:, None] - order
        kept = powers(decay, after.clamp(min=0), wide).masked_fill((after < 0)[..., None], 0.0)
        added = einsum("btn,btnh,btnv->bnhv", kept, k_i, v_i)
        state = powers(decay, real, wide)[..., None, None] * state + added
    return torch.cat(outs, dim=1), state


def quadratic(q, k, v, decay):
    """out: B T N V = sum over j <= i of decay^(i-j) (q_i . k_j) v_j, the form without a state. Shapes: `recurrent`."""
    order = torch.arange(q.shape[1], device=q.device)
    behind = order[:, None] - order
    weights = powers(decay, behind.clamp(min=0), accumulator(q.dtype, k.dtype, v.dtype))
    weights = weights.masked_fill((behind < 0)[..., None], 0.0)
    return einsum("btsn,bsnv->btnv", weights * einsum("btnh,bsnh->btsn", q, k), v)


def powers(decay, exponent, dtype):
    """[..., N]: decay^exponent in dtype, exponent int [...] >= 0, so that no power overflows."""
    return decay.to(dtype) ** exponent[..., None]


def slopes(cfg):
    """float64 [N] on the CPU: -ln of the factor by which each head's state decays per token."""
    layer = 1 - cfg.layer_index / (cfg.num_hidden_layers - 1 + 1e-5) + 1e-5
    return torch.tensor(alibi.slopes(cfg.num_attention_heads), dtype=torch.float64) * layer


def decay_of(cfg, dtype, device):
    """[N]: exp(-slope), rounded once to dtype."""
    return torch.exp(-slopes(cfg)).to(device, dtype)


def project(params, x):
    """q, k, v: B T N H of x B T D, in x's dtype."""
    return tuple(
        torch.nn.functional.silu(einsum("btd,dnh->btnh", x, params[w])).to(x.dtype) for w in ("wq", "wk", "wv")
    )


def project_out(params, cfg, x, out):
    """y B T D in x's dtype from the heads' outputs B T N H: norm over all heads together, gate from x, wo."""
    out = rms_norm(out.to(x.dtype), params["o_norm"], cfg.rms_norm_eps)
    gate = torch.sigmoid(einsum("btd,dnh->btnh", x, params["wg"]))
    return einsum("btnh,nhd->btd", gate * out, params["wo"], out_dtype=x.dtype)


def head_dim(cfg):
    """H: cfg.head_dim, or D // N."""
    return cfg.hidden_size // cfg.num_attention_heads if cfg.head_dim is None else cfg.head_dim


def check_fields(cfg):
    """Raise ValueError or TypeError for fields that do not fit together."""
    inputs.check_counts(cfg, 1, "num_attention_heads", "num_hidden_layers", "block_size")
    inputs.check_counts(cfg, 0, "layer_index")
    check.integer("head_dim", head_dim(cfg))
    if cfg.layer_index >= cfg.num_hidden_layers:
        raise ValueError(
            f"layer_index is {cfg.layer_index}; allowed: 0 to {cfg.num_hidden_layers - 1}, one of the "
            f"{cfg.num_hidden_layers} layers of num_hidden_layers"
        )


def check_inputs(params, cfg, x, cache=None, tokens=None):
    """Raise ValueError or TypeError for fields, x, parameters and a cache that do not fit together."""
    check_fields(cfg)
    inputs.check_tokens(x, cfg.hidden_size, tokens)
    heads = (cfg.num_attention_heads, head_dim(cfg))
    shapes = dict.fromkeys(("wq", "wk", "wv", "wg"), (cfg.hidden_size, *heads))
    inputs.check_parameters(params, shapes | {"o_norm": heads, "wo": (*heads, cfg.hidden_size)})
    if cache is not None:
        inputs.check_cache(cache, x)
        inputs.check_buffer(cache, x, "state", "B N H V", {"N": heads[0], "H": heads[1], "V": heads[1]}, check.WIDE)
