"""Dense causal attention: single-head (N = K = 1), MHA (N = K), MQA (K = 1) and GQA (N a multiple of K).

    q, k, v = x wq + bq, x wk + bk, x wv + bv;   q, k = rope(norm(q)), rope(norm(k))
    o_t,n   = sum over s <= t of p_s v_s,   p = softmax(cap(scaling q_t,n . k_s)),   KV head n // (N/K)
    y       = (o * sigmoid(x wg)) wo + bo

Vaswani et al. 2017; MQA: Shazeer 2019; GQA: Ainslie et al. 2023. Norms, biases, cap and gate follow Llama, Qwen2,
Qwen3, MiniMax-M2, Gemma 2 and 3, gpt-oss and Qwen3-Next as the config says.

cfg: any object with hidden_size (D), num_attention_heads (N), num_key_value_heads (K), head_dim (H), v_head_dim (V),
attention_bias, attention_output_bias, qk_norm (None, "head" or "flat"), norm_offset, rms_norm_eps, rope_parameters
(None: no positions), rope_layout, attn_logit_softcapping, scaling (None: H^-0.5), attn_output_gate.
params: wq D N H, wk D K H, wv D K V, wo N V D; by config bq N H, bk K H, bv K V, bo D, wg D N V, q_norm and k_norm
(H and H per head, N H and K H flat). With `sinks` (N, the params of `sinks`) these join every softmax.
cache: {"k": B S K H, "v": B S K V, "length": int32 B}; slot s holds the token at position s, k after norm and RoPE.
"""

import torch

from .. import ops as reference_ops
from ..core.dtypes import einsum
from ..core.norm import rms_norm
from ..core.rope import apply_rope, frequencies
from ..core.softmax import grouped_attention
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
    q, k, v = project(params, cfg, x, positions)
    mask = order[:, None] <= order[..., None]
    out, _ = grouped_attention(q, k, v, mask, sinks=params.get("sinks"), **options(cfg))
    return project_out(params, cfg, x, out)


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
    more = options(cfg) | {"sinks": params.get("sinks")}
    out, _ = grouped_attention(q.to(k.dtype), k, v, step.causal(k.shape[1]), **more)
    return end(step, project_out(params, cfg, step.x, out)), cache


@token_by_token
def decode(params, cfg, x, cache, ops=reference_ops):
    """(y, cache) after appending 1 to 16 tokens per row; x, y: B T D. Dtypes and rows without room: as in `prefill`.

    ops: any namespace with `decode_attention`.
    """
    step = begin(x, cache, checked_room(cfg, x, cache, tokens=1))
    q, k, v = project(params, cfg, x, step.positions)
    cache = step.appended(cache, k=k, v=v)
    k, v = cache["k"], cache["v"]
    more = options(cfg) | {"sinks": params.get("sinks"), "out_dtype": x.dtype}
    out, _ = ops.decode_attention(q.to(k.dtype), k, v, cache["length"], **more)
    return end(step, project_out(params, cfg, x, out)), cache


def project(params, cfg, x, positions):
    """q B T N H, k B T K H and v B T K V of the new tokens, in x's dtype: bias, then norm, then RoPE."""
    q, k, v = qkv(params, cfg, x)
    return rotate(cfg, q, positions), rotate(cfg, k, positions), v


def qkv(params, cfg, x):
    """What `project` gives, before RoPE."""
    q, k, v = (einsum("btd,dnh->btnh", x, params[w]) for w in ("wq", "wk", "wv"))
    if cfg.attention_bias:
        q, k, v = q + params["bq"], k + params["bk"], v + params["bv"]
    q, k, v = q.to(x.dtype), k.to(x.dtype), v.to(x.dtype)
    if cfg.qk_norm is not None:
        q, k = normalise(cfg, q, "q_norm", params), normalise(cfg, k, "k_norm", params)
    return q, k, v


def rotate(cfg, x, positions):
    """x B T heads H turned by the config's RoPE, if it has one; positions: int B T."""
    if cfg.rope_parameters is None:
        return x
    theta, factor = frequencies(cfg.rope_parameters, cfg.head_dim)
    return apply_rope(x, positions, theta, factor, cfg.rope_layout)


def normalise(cfg, x, name, params):
    """RMSNorm of x B T N H over H (qk_norm "head", weight H) or over N and H together ("flat", weight N H)."""
    shapes = {"head": x.shape[-1:], "flat": x.shape[-2:]}
    if cfg.qk_norm not in shapes:
        raise ValueError(f"qk_norm is {cfg.qk_norm!r}; allowed: None, {', '.join(shapes)}")
    weight, shape = params[name], shapes[cfg.qk_norm]
    if weight.shape != shape:  # a weight H would broadcast in the flat norm and give something else
        raise ValueError(f'params["{name}"] has shape {list(weight.shape)}; allowed: {list(shape)}')
    return rms_norm(x, weight, cfg.rms_norm_eps, cfg.norm_offset)


def project_out(params, cfg, x, out):
    """y B T D in x's dtype from the heads' outputs B T N V, gated by sigmoid(x wg) when the config says so."""
    out = out.to(x.dtype)
    if cfg.attn_output_gate:
        out = out * torch.sigmoid(einsum("btd,dnv->btnv", x, params["wg"]))
    y = einsum("btnv,nvd->btd", out, params["wo"])
    return (y + params["bo"] if cfg.attention_output_bias else y).to(x.dtype)


def options(cfg):
    """The scale of the logits, cfg.scaling or H^-0.5, and their cap, as the ops take them."""
    scale = cfg.head_dim**-0.5 if cfg.scaling is None else cfg.scaling
    return dict(scale=scale, softcap=cfg.attn_logit_softcapping)


def checked_room(cfg, x, cache, tokens=None, **more):
    """The tokens that a row may have in all: the slots of the cache. Raises ValueError and TypeError for a wrong x (of
    T = tokens, when given) or cache; more: {name: shape of an entry} of buffers beside k and v."""
    inputs.check_tokens(x, cfg.hidden_size, tokens)
    heads = cfg.num_key_value_heads
    inputs.check_cache(cache, x, k=(heads, cfg.head_dim), v=(heads, cfg.v_head_dim), **more)
    return cache["k"].shape[1]
