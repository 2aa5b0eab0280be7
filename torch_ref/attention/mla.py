"""Multi-head latent attention: one latent and one rotary key per token, shared by all heads, are all the cache holds.

    q_n               = norm(x wq_a + bq_a) wq_b_n, or x wq_n            laid out [q_nope | q_rope]
    [latent | k_rope] = x wkv_a + bkv_a;   latent = norm(latent);   q_rope, k_rope = rope(q_rope), rope(k_rope)
    naive:    k_s,n = [latent_s wk_b_n | k_rope_s],  v_s,n = latent_s wv_b_n
              o_t,n = sum over s <= t of p_s v_s,n,  p = softmax(scaling q_t,n . k_s,n)
    absorbed: o_t,n = (sum over s <= t of p_s latent_s) wv_b_n,
              p = softmax(scaling ((q_nope_t,n wk_b_n^T) . latent_s + q_rope_t,n . k_rope_s))
    y = o wo + bo

The two forms are equal in exact arithmetic. The naive one costs fewer flops per pair of query and key and serves
forward and prefill; the absorbed one reads the cache as it is and serves decode. k_rope is not normalised.
DeepSeek-V2 (2405.04434), V3 (2412.19437), Kimi-K2; without RoPE: the full layers of Kimi-Linear.

cfg: any object with hidden_size (D), num_attention_heads (N), q_lora_rank (L; None: q = x wq), kv_lora_rank (C),
qk_nope_head_dim, qk_rope_head_dim (R), v_head_dim (V), rms_norm_eps, rope_parameters (None: nothing is rotated),
rope_layout ("interleaved" in DeepSeek, or "half"), scaling (None: see `scaling`), attention_bias.
params: wq D N Q with Q = nope + R, or wq_a D L, q_norm L and wq_b L N Q; wkv_a D (C+R), kv_norm C, wk_b C N nope,
wv_b C N V, wo N V D; with attention_bias bkv_a (C+R), bo D and, next to wq_a, bq_a L.
cache: {"latent": B S C, "k_rope": B S R, "length": int32 B}; slot s holds the token at position s, latent after its
norm, k_rope after RoPE, its channels in the order of wkv_a.
"""

import math

import torch

from .. import ops as reference_ops
from ..core.dtypes import einsum
from ..core.norm import rms_norm
from ..core.rope import apply_rope, frequencies
from ..core.softmax import grouped_attention
from . import inputs
from .step import begin, empty, end, in_order, token_by_token


def init_cache(cfg, batch, capacity, dtype=torch.bfloat16):
    """An empty cache with room for `capacity` tokens per row, latent and k_rope in dtype."""
    return empty(batch, dtype, latent=(capacity, cfg.kv_lora_rank), k_rope=(capacity, cfg.qk_rope_head_dim))


def forward(params, cfg, x, positions=None):
    """y: B T D from x: B T D without a cache, in the naive form; positions and errors as in `dense.forward`."""
    inputs.check_tokens(x, cfg.hidden_size)
    order, positions = in_order(x, positions)
    projected = project(params, cfg, x, positions)
    out = attend_naive(params, cfg, *projected, order[:, None] <= order[..., None])
    return project_out(params, cfg, x, out)


def prefill(params, cfg, x, cache, lengths=None):
    """(y, cache) after appending the first lengths[b] of the T tokens of row b, as in `dense.prefill`.

    The naive form, over the latents as stored.
    """
    step = begin(x, cache, checked_room(cfg, x, cache), lengths)
    q_nope, q_rope, latent, k_rope = project(params, cfg, step.x, step.positions)
    cache, stored = step.appended(cache, latent=latent, k_rope=k_rope), cache["latent"].dtype
    latent, k_rope = cache["latent"], cache["k_rope"]
    mask = step.causal(latent.shape[1])
    out = attend_naive(params, cfg, q_nope.to(stored), q_rope.to(stored), latent, k_rope, mask)
    return end(step, project_out(params, cfg, step.x, out)), cache


@token_by_token
def decode(params, cfg, x, cache, ops=reference_ops):
    """(y, cache) after appending 1 to 16 tokens per row; x, y: B T D. Dtypes and rows without room: as in `prefill`.

    ops: any namespace with `decode_mla`.
    """
    step = begin(x, cache, checked_room(cfg, x, cache, tokens=1))
    q_nope, q_rope, latent, k_rope = project(params, cfg, x, step.positions)
    cache = step.appended(cache, latent=latent, k_rope=k_rope)
    latent, k_rope = cache["latent"], cache["k_rope"]
    out = attend_absorbed(params, cfg, q_nope, q_rope, latent, k_rope, cache["length"], ops.decode_mla)
    return end(step, project_out(params, cfg, x, out)), cache


def project(params, cfg, x, positions):
    """q_nope B T N nope, q_rope B T N R, latent B T C and k_rope B T R of the new tokens, in x's dtype.

    Bias, then norm (both latents only), then RoPE (both rope slices only).
    """
    down = x
    if cfg.q_lora_rank is not None:
        down = compress(params, cfg, x, "q")
        down = rms_norm(down, params["q_norm"], cfg.rms_norm_eps)
    q = einsum("btl,lnq->btnq", down, params["wq" if cfg.q_lora_rank is None else "wq_b"], out_dtype=x.dtype)
    q_nope, q_rope = q.split([cfg.qk_nope_head_dim, cfg.qk_rope_head_dim], dim=-1)
    latent, k_rope = compress(params, cfg, x, "kv").split([cfg.kv_lora_rank, cfg.qk_rope_head_dim], dim=-1)
    latent = rms_norm(latent, params["kv_norm"], cfg.rms_norm_eps)
    if cfg.rope_parameters is not None:
        theta, factor = frequencies(cfg.rope_parameters, cfg.qk_rope_head_dim)
        q_rope = apply_rope(q_rope, positions, theta, factor, cfg.rope_layout)
        k_rope = apply_rope(k_rope[:, :, None], positions, theta, factor, cfg.rope_layout)[:, :, 0]
    return q_nope, q_rope, latent, k_rope


def compress(params, cfg, x, name):
    """x w + b with the weight w{name}_a and, with attention_bias, the bias b{name}_a; in x's dtype."""
    down = einsum("btd,dl->btl", x, params[f"w{name}_a"])
    return (down + params[f"b{name}_a"] if cfg.attention_bias else down).to(x.dtype)


def attend_naive(params, cfg, q_nope, q_rope, latent, k_rope, mask):
    """B T N V: attention over the keys and values of every head, expanded from latent B S C and k_rope B S R.

    q_nope: B T N nope. q_rope: B T N R. mask: bool B T S. Expanded keys and values stay in float32 or wider; so does
    the result. Slots that no query sees may hold NaN or Inf.
    """
    # blank before expanding: the gradient of the weights is a sum over all slots, and 0 * NaN is NaN
    unseen = ~mask.any(dim=1)[..., None]
    latent, k_rope = latent.masked_fill(unseen, 0.0), k_rope.masked_fill(unseen, 0.0)
    k_nope = einsum("bsc,cnh->bsnh", latent, params["wk_b"])
    shared = k_rope[:, :, None].to(k_nope.dtype).expand(-1, -1, cfg.num_attention_heads, -1)
    k, v = torch.cat([k_nope, shared], dim=-1), einsum("bsc,cnv->bsnv", latent, params["wv_b"])
    out, _ = grouped_attention(torch.cat([q_nope, q_rope], dim=-1), k, v, mask, scaling(cfg))
    return out


def attend_absorbed(params, cfg, q_nope, q_rope, latent, k_rope, which, op=reference_ops.decode_mla):
    """B T N V: attention over latent B S C and k_rope B S R as stored, by an op and what tells it the slots.

    q_nope: B T N nope. q_rope: B T N R. which: lengths, int32 B, for `decode_mla`; indices, int32 B T L, for
    `decode_sparse_mla`. The query is rounded to the cache's dtype after the absorption, the op's result to q_nope's;
    the result is float32 or wider.
    """
    stored, options = latent.dtype, dict(scale=scaling(cfg), out_dtype=q_nope.dtype)
    q_latent = einsum("btnh,cnh->btnc", q_nope, params["wk_b"], out_dtype=stored)
    out, _ = op(q_latent, q_rope.to(stored), latent, k_rope, which, **options)
    return einsum("btnc,cnv->btnv", out, params["wv_b"])


def project_out(params, cfg, x, out):
    """y B T D in x's dtype from the heads' outputs B T N V."""
    y = einsum("btnv,nvd->btd", out.to(x.dtype), params["wo"])
    return (y + params["bo"] if cfg.attention_bias else y).to(x.dtype)


def scaling(cfg):
    """The factor of the logits: cfg.scaling, or (nope + R)^-0.5 m^2.

    m = 0.1 mscale_all_dim ln(factor) + 1 when the rope_type is not "default", mscale_all_dim is given and not 0, and
    factor > 1; otherwise m = 1. It stands beside the factor of cos and sin (`frequencies`), which is
    m(mscale) / m(mscale_all_dim): 1 in DeepSeek-V2 and V3, where the two are equal.
    """
    if cfg.scaling is not None:
        return cfg.scaling
    rope = cfg.rope_parameters or {}
    mscale = rope.get("mscale_all_dim") if rope.get("rope_type", "default") != "default" else None
    m = 0.1 * mscale * math.log(rope["factor"]) + 1.0 if mscale and rope["factor"] > 1 else 1.0
    return (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim) ** -0.5 * m**2


def checked_room(cfg, x, cache, tokens=None):
    """The tokens that a row may have in all: the slots of the cache. Raises ValueError and TypeError for a wrong x (of
    T = tokens, when given) or cache."""
    inputs.check_tokens(x, cfg.hidden_size, tokens)
    inputs.check_cache(cache, x, latent=(cfg.kv_lora_rank,), k_rope=(cfg.qk_rope_head_dim,))
    return cache["latent"].shape[1]
