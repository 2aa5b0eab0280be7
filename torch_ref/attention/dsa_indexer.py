"""The lightning indexer of DSA: queries, keys and head weights whose scores pick the tokens that a query attends.

    q_i = c_q wq_index_i,   k = LayerNorm(x wk_index),   w = x ww_index I^-1/2 J^-1/2,   c_q = norm(x wq_a + bq_a)
    the first R channels of every q_i and of k are turned by `mla`'s angles in the layout index_rope_layout
    score_t,s = sum_i w_t,i relu(q_t,i . k_s)

With index_quantised q_i and k are rotated by Hadamard / sqrt(J) and rounded to float8_e4m3fn under one power-of-two
scale each (`e4m3`); then score_t,s = s_k,s sum_i w_t,i s_q,t,i relu(q8_t,i . k8_s).

DeepSeek-V3.2 and its inference code; HF `deepseek_v32` and `glm_moe_dsa` (neither quantises). cfg and params: `dsa`.
"""

from typing import NamedTuple

import torch

from ..core.dtypes import einsum
from ..core.norm import layer_norm, rms_norm
from ..core.quant import e4m3, hadamard
from ..core.rope import LAYOUTS, apply_rope, frequencies
from . import inputs, mla

LAYER_NORM_EPS = 1e-6


class Indexed(NamedTuple):
    """q: B T I J. k: B T J. weights: B T I, float32 or wider. k_scale: float32 B T, or None without quantisation."""

    q: torch.Tensor
    k: torch.Tensor
    weights: torch.Tensor
    k_scale: torch.Tensor | None


def init_cache(cfg, batch, capacity, dtype):
    """The empty buffers of the index keys: k_index and, when quantised, k_index_scale."""
    if not cfg.index_quantised:
        return {"k_index": torch.zeros(batch, capacity, cfg.index_head_dim, dtype=dtype)}
    return {
        "k_index": torch.zeros(batch, capacity, cfg.index_head_dim, dtype=torch.float8_e4m3fn),
        "k_index_scale": torch.zeros(batch, capacity, dtype=torch.float32),
    }


def project(params, cfg, x, positions, dtype):
    """Indexed of the new tokens x B T D at positions int B T.

    q is rounded to dtype, that of the cache it meets (every float8 value fits in each of them); an unquantised k keeps
    x's dtype.
    """
    c_q = rms_norm(mla.compress(params, cfg, x, "q"), params["q_norm"], cfg.rms_norm_eps)
    q = einsum("btl,lij->btij", c_q, params["wq_index"], out_dtype=x.dtype)
    k = einsum("btd,dj->btj", x, params["wk_index"], out_dtype=x.dtype)
    k = layer_norm(k, params["k_index_norm"], params["k_index_bias"], LAYER_NORM_EPS)
    if cfg.rope_parameters is not None:
        theta, factor = frequencies(cfg.rope_parameters, cfg.qk_rope_head_dim)
        q = apply_rope(q, positions, theta, factor, cfg.index_rope_layout)
        k = apply_rope(k[:, :, None], positions, theta, factor, cfg.index_rope_layout)[:, :, 0]
    weights = einsum("btd,di->bti", x, params["ww_index"]) * (cfg.index_n_heads * cfg.index_head_dim) ** -0.5
    if not cfg.index_quantised:
        return Indexed(q.to(dtype), k, weights, None)
    (q, q_scale), (k, k_scale) = e4m3(hadamard(q)), e4m3(hadamard(k))
    return Indexed(q.to(dtype), k, weights * q_scale, k_scale)


def appended(cache, indexed, step):
    """The length and the buffers of the index keys after the step's new tokens; the given cache is not changed."""
    fresh = {"k_index": indexed.k} | ({} if indexed.k_scale is None else {"k_index_scale": indexed.k_scale})
    return step.appended(cache, **fresh)


def check(params, cfg):
    """Raise ValueError or TypeError for fields of the indexer, and for parameters that are not the config's."""
    inputs.check_counts(cfg, 1, "index_n_heads", "index_head_dim")
    heads, width, turned = cfg.index_n_heads, cfg.index_head_dim, cfg.qk_rope_head_dim
    if cfg.index_rope_layout not in LAYOUTS:
        raise ValueError(f"index_rope_layout is {cfg.index_rope_layout!r}; allowed: {', '.join(LAYOUTS)}")
    if cfg.rope_parameters is not None and width < turned:
        raise ValueError(f"index_head_dim is {width}; allowed: at least qk_rope_head_dim {turned}")
    if cfg.index_quantised and width & (width - 1):
        raise ValueError(f"index_head_dim is {width}; allowed with index_quantised: a power of two")
    shapes = {"wq_index": (cfg.q_lora_rank, heads, width), "wk_index": (cfg.hidden_size, width)}
    shapes |= {"ww_index": (cfg.hidden_size, heads), "k_index_norm": (width,), "k_index_bias": (width,)}
    inputs.check_parameters(params, shapes)


def check_buffers(cfg, x, cache, slots):
    """Raise ValueError or TypeError unless cache holds the index keys of `slots` tokens per row."""
    sizes = {"S": slots, "J": cfg.index_head_dim}
    dtype = torch.float8_e4m3fn if cfg.index_quantised else cache["latent"].dtype
    inputs.check_buffer(cache, x, "k_index", "B S J", sizes, (dtype,))
    if cfg.index_quantised:
        inputs.check_buffer(cache, x, "k_index_scale", "B S", sizes, (torch.float32,))
