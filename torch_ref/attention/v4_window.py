"""The window layer of DeepSeek-V4, and the projections that its CSA and HCA layers share.

    c_q = norm(x wq_a),   q_n = rope_t(q'_n / rms(q'_n)) with q'_n = c_q wq_b_n,   kv = rope_t(norm(x wkv))
    o_t,n = rope_-t(sum over t - W < s <= t of p_s kv_s),   p_s = exp(z_s) / (exp(sink_n) + sum_u exp(z_u))
    z_s = H^-1/2 q_t,n . kv_s,   y = sum over groups of (o_group wo_a_group) wo_b_group

kv is key and value of all heads at once, so a value carries the rotation of its position; the output is turned back by
the query's, which leaves the distance. rope turns the last R channels, interleaved, without a magnitude factor. The
norm of q has no weight. Head n belongs to group n // (N/g).
DeepSeek-V4 (2606.19348) and its inference code; HF `deepseek_v4`.

cfg: any object with hidden_size (D), num_attention_heads (N), head_dim (H), qk_rope_head_dim (R), q_lora_rank (Lq),
o_groups (g, divides N), o_lora_rank (O), sliding_window (W), rms_norm_eps, rope_parameters (None: nothing is turned).
params: wq_a D Lq, q_norm Lq, wq_b Lq N H, wkv D H, kv_norm H, sinks N, wo_a g (N/g) H O, wo_b g O D.
cache: {"kv": B W' H, "length": int32 B} with W' = min(W, capacity); the token at position p lies in slot p mod W',
after norm and RoPE. With W' = W it never overflows, with W' < W it holds W' tokens in all.
"""

import torch

from .. import ops as reference_ops
from ..core import ring
from ..core.dtypes import accumulator, einsum
from ..core.norm import rms_norm
from ..core.rope import apply_rope, frequencies
from ..core.softmax import grouped_attention
from . import inputs
from .sliding_window import in_window
from .step import begin, empty, end, in_order, token_by_token


def init_cache(cfg, batch, capacity, dtype=torch.bfloat16):
    """An empty ring of min(W, capacity) slots per row in dtype."""
    check_fields(cfg)
    return empty(batch, dtype, kv=(min(cfg.sliding_window, capacity), cfg.head_dim))


def forward(params, cfg, x, positions=None):
    """y: B T D from x: B T D without a cache; positions and errors as in `dense.forward`; the window counts tokens."""
    check(params, cfg, x)
    order, positions = in_order(x, positions)
    _, q, kv = project(params, cfg, x, positions)
    out = attend_shared(params, cfg, q, kv, in_window(order, order, cfg.sliding_window))
    return project_out(params, cfg, x, out, positions)


def prefill(params, cfg, x, cache, lengths=None):
    """(y, cache) after appending the first lengths[b] of the T tokens of row b, as in `sliding_window.prefill`."""
    check(params, cfg, x)
    step = begin(x, cache, checked_room(cfg, x, cache), lengths)
    _, q, kv = project(params, cfg, step.x, step.positions)
    keys, near = recent(cfg, cache["kv"], kv, step)
    out = attend_shared(params, cfg, q.to(keys.dtype), keys, near)
    return end(step, project_out(params, cfg, step.x, out, step.positions)), step.appended(cache, ring.write, kv=kv)


@token_by_token
def decode(params, cfg, x, cache, ops=reference_ops):
    """(y, cache) after appending 1 to 16 tokens per row; x, y: B T D. ops: any namespace with `decode_attention`."""
    check(params, cfg, x, tokens=1)
    step = begin(x, cache, checked_room(cfg, x, cache))
    _, q, kv = project(params, cfg, x, step.positions)
    cache = step.appended(cache, ring.write, kv=kv)
    out, _ = attend_ring(params, cfg, q.to(cache["kv"].dtype), cache, ops)
    return end(step, project_out(params, cfg, x, out, step.positions)), cache


def project(params, cfg, x, positions):
    """c_q B T Lq, q B T N H and kv B T H of the new tokens, in x's dtype: norm, then RoPE."""
    c_q = einsum("btd,dl->btl", x, params["wq_a"], out_dtype=x.dtype)
    c_q = rms_norm(c_q, params["q_norm"], cfg.rms_norm_eps)
    q = einsum("btl,lnh->btnh", c_q, params["wq_b"], out_dtype=x.dtype)
    q = rms_norm(q, q.new_ones(cfg.head_dim), cfg.rms_norm_eps)
    kv = rms_norm(einsum("btd,dh->bth", x, params["wkv"], out_dtype=x.dtype), params["kv_norm"], cfg.rms_norm_eps)
    return c_q, rotate(cfg, q, positions), rotate(cfg, kv[:, :, None], positions)[:, :, 0]


def rotate(cfg, x, positions):
    """x B T heads H, its last R channels turned by the angles of positions int B T, which may be negative."""
    if cfg.rope_parameters is None:
        return x
    # R counts the channels that turn, so a partial_rotary_factor beside it says nothing more
    theta, _ = frequencies({**cfg.rope_parameters, "partial_rotary_factor": 1.0}, cfg.qk_rope_head_dim)
    rest, turned = x.split([x.shape[-1] - cfg.qk_rope_head_dim, cfg.qk_rope_head_dim], dim=-1)
    return torch.cat([rest, apply_rope(turned, positions, theta, layout="interleaved")], dim=-1)


def attend_shared(params, cfg, q, kv, mask):
    """B T N H in float32 or wider: attention with sinks over kv B S H, key and value at once, under mask bool B T S."""
    shared = kv[:, :, None]
    return grouped_attention(q, shared, shared, mask, cfg.head_dim**-0.5, params["sinks"])[0]


def recent(cfg, buffer, kv, step):
    """(keys, near): B (W' + T) H, the ring before the call and the new tokens as it stores them; bool B T (W' + T).

    The ring is written after: the new tokens would destroy keys that earlier queries of the same call still see.
    """
    held = torch.cat([ring.held(step.start, buffer.shape[1]), step.positions], dim=1)
    near = in_window(step.positions, held, cfg.sliding_window) & (held >= 0)[:, None] & step.keep[..., None]
    return torch.cat([buffer, kv.to(buffer.dtype)], dim=1), near


def attend_ring(params, cfg, q, cache, ops):
    """(out, lse) of q B 1 N H over the ring, B 1 N H and B 1 N in float32 or wider; the sinks are in this part."""
    kv = cache["kv"][:, :, None]
    filled, options = cache["length"].clamp(max=kv.shape[1]), dict(scale=cfg.head_dim**-0.5, sinks=params["sinks"])
    return ops.decode_attention(q, kv, kv, filled, out_dtype=accumulator(q.dtype), **options)


def project_out(params, cfg, x, out, positions):
    """y B T D in x's dtype from the heads' outputs B T N H: turned back, then down and up by groups of heads."""
    out = rotate(cfg, out, -positions).to(x.dtype).unflatten(2, (cfg.o_groups, -1))
    low = einsum("btgnh,gnho->btgo", out, params["wo_a"], out_dtype=x.dtype)
    return einsum("btgo,god->btd", low, params["wo_b"], out_dtype=x.dtype)


def shapes(cfg):
    """{name: shape} of the parameters."""
    d, n, h, g = cfg.hidden_size, cfg.num_attention_heads, cfg.head_dim, cfg.o_groups
    return {
        "wq_a": (d, cfg.q_lora_rank),
        "q_norm": (cfg.q_lora_rank,),
        "wq_b": (cfg.q_lora_rank, n, h),
        "wkv": (d, h),
        "kv_norm": (h,),
        "sinks": (n,),
        "wo_a": (g, n // g, h, cfg.o_lora_rank),
        "wo_b": (g, cfg.o_lora_rank, d),
    }


def check(params, cfg, x, tokens=None):
    """Raise ValueError or TypeError for fields, parameters and tokens that do not fit together."""
    check_fields(cfg)
    inputs.check_tokens(x, cfg.hidden_size, tokens)
    inputs.check_parameters(params, shapes(cfg))


def check_fields(cfg):
    """Raise ValueError or TypeError for fields that do not fit together."""
    inputs.check_counts(cfg, 1, "num_attention_heads", "head_dim", "q_lora_rank", "o_groups", "o_lora_rank")
    inputs.check_counts(cfg, 1, "sliding_window")
    inputs.check_counts(cfg, 2, "qk_rope_head_dim")
    if cfg.num_attention_heads % cfg.o_groups:
        raise ValueError(
            f"o_groups is {cfg.o_groups}; allowed: a divisor of num_attention_heads {cfg.num_attention_heads}"
        )
    if cfg.qk_rope_head_dim % 2 or cfg.qk_rope_head_dim > cfg.head_dim:
        raise ValueError(
            f"qk_rope_head_dim is {cfg.qk_rope_head_dim}; allowed: an even number up to head_dim {cfg.head_dim}"
        )


def checked_room(cfg, x, cache):
    """The tokens that a row may have in all: the slots of the ring, or None when it has the window's W of them."""
    inputs.check_cache(cache, x, kv=(cfg.head_dim,))
    return inputs.ring_room("kv", cache["kv"].shape[1], cfg.sliding_window)
