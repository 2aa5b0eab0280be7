"""Dense causal attention: single-head (N = K = 1), MHA (N = K), MQA (K = 1) and GQA (N a multiple of K).

    q, k, v = x wq + bq, x wk + bk, x wv + bv;   q, k = rope(clip(norm(q))), rope(clip(norm(k)));   v = clip(norm(v))
    o_t,n   = sum over s <= t of p_s v_s,  p = softmax(cap(scaling q_t,n . k_s) + slope_n (s - t)),  KV head n // (N/K)
    y       = (o * gate(x wg)) wo + bo

norm after RoPE instead, norm of v, clip, cap, slope and gate are there when the config says so; then, with attn_scale,
q_t = (1 + attn_scale ln(1 + floor((t + attn_scale_from) / floor_scale))) q_t. t and s count the row's tokens, whatever
`positions` are. With attention_k_eq_v v is x wk + bk itself, under its own norm and clip.
Vaswani et al. 2017; MQA: Shazeer 2019; GQA: Ainslie et al. 2023; slopes (ALiBi): Press et al. 2021. Norms, biases, cap
and gate follow Llama, Qwen2, Qwen3, MiniMax-M2, Gemma 2 to 4, gpt-oss, Qwen3-Next, Cohere, StableLM, Persimmon and
Hunyuan; clip: MPT, OLMo, DBRX; attn_scale: Llama 4; other gates: Laguna, LFM3.

cfg: any object with hidden_size (D), num_attention_heads (N), num_key_value_heads (K), head_dim (H), v_head_dim (V),
attention_bias, attention_output_bias, attention_k_eq_v (V = H), rope_parameters (None: no positions), rope_layout,
scaling (None: H^-0.5), attn_logit_softcapping (None or c), alibi, clip_qkv (None or c > 0), attn_scale (None or a
number), floor_scale, attn_scale_from; attn_output_gate, output_gate_type ("sigmoid", "softplus"), output_gate_per_head;
norms: rms_norm_eps, v_norm, norm_offset, qk_norm_after_rope, qk_norm_type ("rms", "layer"), qk_norm_weight,
qk_norm_bias (of "layer") and qk_norm: None, "head" (over H, one weight for all heads), "heads" (over H, a weight for
each) or "flat" (over N H). Without qk_norm_weight there is no bias either, and all kinds are over H.
params: wq D N H, wk D K H, wv D K V, wo N V D; by config bq N H, bk K H, bv K V (no wv and bv with attention_k_eq_v),
bo D, wg D N V or, per head, D N; q_norm, k_norm and q_norm_bias, k_norm_bias: H for "head", else N H and K H. With
`sinks` (N, the params of `sinks`) these join every softmax.
cache: {"k": B S K H, "v": B S K V, "length": int32 B}; slot s holds the token at position s, k after norm and RoPE.
"""

import torch

from .. import ops as reference_ops
from ..core import alibi
from ..core.dtypes import accumulator, einsum
from ..core.gates import GATES
from ..core.norm import layer_norm, rms_norm
from ..core.rope import apply_rope, frequencies
from ..core.softmax import grouped_attention
from ..ops import check
from . import inputs
from .step import begin, empty, end, in_order, token_by_token


def init_cache(cfg, batch, capacity, dtype=torch.bfloat16):
    """An empty cache with room for `capacity` tokens per row, k and v in dtype."""
    heads = (capacity, cfg.num_key_value_heads)
    return empty(batch, dtype, k=(*heads, cfg.head_dim), v=(*heads, cfg.v_head_dim))


def forward(params, cfg, x, positions=None):
    """y: B T D from x: B T D without a cache. positions: int B T, default 0..T-1, feed RoPE only; the mask is causal
    in the order of the tokens. y has x's dtype. Raises ValueError and TypeError for a wrong x or positions."""
    inputs.check_tokens(x, cfg.hidden_size)
    order, positions = in_order(x, positions)
    q, k, v = project(params, cfg, x, positions, order)
    return project_out(params, cfg, x, attend(params, cfg, q, k, v, order[:, None] <= order[..., None], order, order))


def prefill(params, cfg, x, cache, lengths=None):
    """(y, cache) after appending the first lengths[b] of the T tokens of row b; lengths: int32 B, default T.

    Token i of row b is at position cache["length"][b] + i and sees all that the row's cache holds up to itself, as
    stored (rounded to the cache's dtype); a non-empty cache makes this a chunk of a longer prefill. x at pads may be
    anything, y there is 0. A row without room raises ValueError on the CPU; on a device nothing of it is written, its
    length stays and all its y are NaN. y has x's dtype.
    """
    step = begin(x, cache, checked_room(cfg, x, cache), lengths)
    q, k, v = project(params, cfg, step.x, step.positions)
    cache = step.appended(cache, k=k, v=v)
    k, v = cache["k"], cache["v"]
    slots = torch.arange(k.shape[1], device=x.device).expand(len(x), -1)
    out = attend(params, cfg, q.to(k.dtype), k, v, step.causal(k.shape[1]), step.positions, slots)
    return end(step, project_out(params, cfg, step.x, out)), cache


@token_by_token
def decode(params, cfg, x, cache, ops=reference_ops):
    """(y, cache) after appending 1 to 16 tokens per row; x, y: B T D. Dtypes and rows without room: as in `prefill`.

    ops: any namespace with `decode_attention`.
    """
    step = begin(x, cache, checked_room(cfg, x, cache, tokens=1))
    q, k, v = project(params, cfg, x, step.positions)
    cache = step.appended(cache, k=k, v=v)
    out = attend_slots(params, cfg, x, q, cache["k"], cache["v"], cache["length"], ops)
    return end(step, project_out(params, cfg, x, out)), cache


def project(params, cfg, x, positions, order=None):
    """q B T N H, k B T K H and v B T K V of the new tokens, in x's dtype. positions, order: int B T, what RoPE turns by
    and the tokens' indices in their rows, by default the same."""
    q, k, v = qkv(params, cfg, x)
    q = rescaled(cfg, turned(params, cfg, q, "q_norm", positions), positions if order is None else order)
    return q, turned(params, cfg, k, "k_norm", positions), v


def qkv(params, cfg, x):
    """What `project` gives, before RoPE: bias, then norm, then clip."""
    check_fields(cfg)
    names = "qk" if cfg.attention_k_eq_v else "qkv"
    new = [einsum("btd,dnh->btnh", x, params[f"w{name}"]) for name in names]
    if cfg.attention_bias:
        new = [z + params[f"b{name}"] for z, name in zip(new, names, strict=True)]
    q, k, v = (z.to(x.dtype) for z in (new if len(new) == 3 else [*new, new[1]]))
    return settled(params, cfg, q, "q_norm"), settled(params, cfg, k, "k_norm"), values(cfg, v)


def settled(params, cfg, z, name):
    """z B T heads H, queries or keys, after a norm that comes before RoPE, and after the clip."""
    if cfg.qk_norm is not None and not cfg.qk_norm_after_rope:
        z = normalise(cfg, z, name, params)
    return clipped(cfg, z)


def values(cfg, v):
    """v B T K V after its norm, which has no weight, and the clip."""
    return clipped(cfg, rms_norm(v, None, cfg.rms_norm_eps) if cfg.v_norm else v)


def clipped(cfg, z):
    """z clamped to [-c, c] with a clip_qkv of c."""
    return z if cfg.clip_qkv is None else z.clamp(-cfg.clip_qkv, cfg.clip_qkv)


def turned(params, cfg, z, name, positions):
    """z B T heads H after RoPE, and after a norm that comes after it; positions: int B T."""
    z = rotate(cfg, z, positions)
    return normalise(cfg, z, name, params) if cfg.qk_norm is not None and cfg.qk_norm_after_rope else z


def rescaled(cfg, q, order):
    """q B T N H times a factor that grows with the token's index in its row, order int B T."""
    if cfg.attn_scale is None:
        return q
    steps = torch.floor((order.double() + cfg.attn_scale_from) / cfg.floor_scale)
    factor = 1 + cfg.attn_scale * torch.log1p(steps)
    return (q * factor[..., None, None].to(accumulator(q.dtype))).to(q.dtype)


def rotate(cfg, x, positions):
    """x B T heads H turned by the config's RoPE, if it has one; positions: int B T."""
    if cfg.rope_parameters is None:
        return x
    theta, factor = frequencies(cfg.rope_parameters, cfg.head_dim)
    return apply_rope(x, positions, theta, factor, cfg.rope_layout)


def normalise(cfg, x, name, params):
    """The config's norm of x B T N H, over H or (qk_norm "flat") over N and H together, under params[name]."""
    weight = bias = None
    if cfg.qk_norm_weight:
        shape = x.shape[-1:] if cfg.qk_norm == "head" else x.shape[-2:]
        named = (name, f"{name}_bias") if cfg.qk_norm_bias else (name,)
        inputs.check_parameters(params, dict.fromkeys(named, shape))  # a weight H would broadcast in the flat norm
        weight, bias = params[name], params[f"{name}_bias"] if cfg.qk_norm_bias else None
    dims, offset = 2 if cfg.qk_norm == "flat" and cfg.qk_norm_weight else 1, cfg.norm_offset
    if cfg.qk_norm_type == "layer":
        return layer_norm(x, weight, bias, cfg.rms_norm_eps, offset, dims)
    return rms_norm(x, weight, cfg.rms_norm_eps, offset, dims)


def attend(params, cfg, q, k, v, mask, query, key):
    """B T N V in float32 or wider: q over k and v, B S K .., under mask bool B T S. query int B T and key int B S: the
    tokens' indices in their rows, which the slopes count."""
    bias = alibi.bias(slopes(cfg, q), query, key) if cfg.alibi else None
    return grouped_attention(q, k, v, mask, sinks=params.get("sinks"), bias=bias, **options(cfg))[0]


def attend_slots(params, cfg, x, q, k, v, lengths, ops):
    """B 1 N V in x's dtype by the op: q over the first lengths[b] slots, in the order of their tokens if slopes count
    them."""
    q, more = q.to(k.dtype), options(cfg) | {"sinks": params.get("sinks"), "out_dtype": x.dtype}
    return ops.decode_attention(q, k, v, lengths, **more | ({"alibi": slopes(cfg, q)} if cfg.alibi else {}))[0]


def slopes(cfg, q):
    """The slopes N, in the dtype of q's logits."""
    return alibi.tensor(cfg.num_attention_heads, accumulator(q.dtype), q.device)


def project_out(params, cfg, x, out):
    """y B T D in x's dtype from the heads' outputs B T N V, gated by x wg when the config says so."""
    out = out.to(x.dtype)
    if cfg.attn_output_gate:
        channels = 1 if cfg.output_gate_per_head else out.shape[3]
        shape = (cfg.hidden_size, out.shape[2], channels)
        inputs.check_parameters(params, {"wg": shape[:2] if cfg.output_gate_per_head else shape})
        out = out * GATES[cfg.output_gate_type](einsum("btd,dnv->btnv", x, params["wg"].reshape(shape)))
    y = einsum("btnv,nvd->btd", out, params["wo"])
    return (y + params["bo"] if cfg.attention_output_bias else y).to(x.dtype)


def options(cfg):
    """The scale of the logits, cfg.scaling or H^-0.5, and their cap, as the ops take them."""
    scale = cfg.head_dim**-0.5 if cfg.scaling is None else cfg.scaling
    return dict(scale=scale, softcap=cfg.attn_logit_softcapping)


def check_fields(cfg):
    """Raise ValueError or TypeError for fields that do not fit together."""
    inputs.check_choice(cfg, "qk_norm", None, "head", "flat", "heads")
    inputs.check_choice(cfg, "qk_norm_type", "rms", "layer")
    inputs.check_choice(cfg, "output_gate_type", "sigmoid", "softplus")
    if cfg.qk_norm_bias and cfg.qk_norm_type != "layer":
        raise ValueError(f"qk_norm_bias is {cfg.qk_norm_bias}; allowed: True with qk_norm_type 'layer'")
    for name in ("clip_qkv", "attn_scale", "floor_scale", "attn_scale_from"):
        if getattr(cfg, name) is not None:
            check.number(name, getattr(cfg, name))
    for name in ("clip_qkv", "floor_scale"):
        if getattr(cfg, name) is not None and getattr(cfg, name) <= 0:
            raise ValueError(f"{name} is {getattr(cfg, name)}; allowed: a number > 0")
    if cfg.attention_k_eq_v and cfg.v_head_dim != cfg.head_dim:
        raise ValueError(f"v_head_dim is {cfg.v_head_dim}; allowed with attention_k_eq_v: head_dim {cfg.head_dim}")


def checked_room(cfg, x, cache, tokens=None, **more):
    """The tokens that a row may have in all: the slots of the cache. Raises ValueError and TypeError for a wrong x (of
    T = tokens, when given) or cache; more: {name: shape of an entry} of buffers beside k and v."""
    inputs.check_tokens(x, cfg.hidden_size, tokens)
    heads = cfg.num_key_value_heads
    inputs.check_cache(cache, x, k=(heads, cfg.head_dim), v=(heads, cfg.v_head_dim), **more)
    return cache["k"].shape[1]
