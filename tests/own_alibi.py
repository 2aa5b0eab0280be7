"""Somebody's own mechanism, correct: grouped queries whose scores lose slope * (t - s), ALiBi (arXiv 2108.12409).

XLA's level 0 makes NaN of its gradients, which an optimised program does not have.
"""

import jax.numpy as jnp

import jforge
from jforge.attention import dense
from jforge.core.softmax import masked_softmax
from jforge.core.step import append, begin, end, in_order

GQA = jforge.get("gqa")


def attend(params, cfg, q, k, v, q_pos, mask):
    (B, T, N, H), K = q.shape, k.shape[2]
    slopes = 2.0 ** (-8 * jnp.arange(1, N + 1) / N).reshape(K, N // K)
    v = jnp.where(mask.any(axis=1)[..., None, None], v, 0)
    k = jnp.where(mask.any(axis=1)[..., None, None], k, 0)
    scores = jnp.einsum("btkgh,bskh->btkgs", q.reshape(B, T, K, N // K, H), k) * cfg.scaling
    behind = q_pos[..., None] - jnp.arange(k.shape[1])
    weights, _ = masked_softmax(scores - slopes[:, :, None] * behind[:, :, None, None], mask[:, :, None, None])
    return jnp.einsum("btkgs,bskv->btkgv", weights, v).reshape(B, T, N, v.shape[-1])


def forward(params, cfg, x, positions=None):
    order, positions = in_order(cfg, x, positions)
    q, k, v = dense.project(params, cfg, x, positions)
    out = attend(params, cfg, q, k, v, order, dense.visible(cfg, order[..., None], order[:, None]))
    return dense.project_out(params, cfg, x, out).astype(x.dtype)


def prefill(params, cfg, x, cache, lengths=None):
    step = begin(cfg, dense.cache_spec(cfg), x, cache, lengths)
    q, k, v = dense.project(params, cfg, step.x, step.positions)
    cache = append(cache, step, k=k, v=v)
    mask = dense.visible(cfg, step.positions[..., None], jnp.arange(cache.k.shape[1])) & step.keep[..., None]
    out = attend(params, cfg, q.astype(cache.k.dtype), cache.k, cache.v, step.positions, mask)
    return end(step, dense.project_out(params, cfg, step.x, out), x.dtype), cache


def decode(params, cfg, x, cache):
    return prefill(params, cfg, x, cache)


alibi = GQA._replace(
    summary="GQA with ALiBi",
    forward=forward,
    prefill=prefill,
    decode=decode,
    examples=(GQA.Config(hidden_size=24, num_attention_heads=6, num_key_value_heads=2, head_dim=10),),
)
