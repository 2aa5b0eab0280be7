"""Masked multi-head attention over given keys and values: the inner loop of every dense reference."""

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jforge.core.softmax import accumulation_dtype, cap, masked_softmax

einsum = partial(jnp.einsum, precision="highest")  # a float32 reference must not run in TF32 on a GPU


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    visible: Bool[Array, "#B T S"] | Bool[Array, "#B T N S"],
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """out_t = sum_s softmax_s(cap(scale * q_t . k_s)) v_s over the visible s; returns (out, lse), float32 or wider.

    Query head n reads KV head n // (N/K). A key that no query sees may be NaN; a query that sees nothing gives 0.
    `visible` may differ from head to head.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    wide = accumulation_dtype(q, k, v)
    mask = visible[:, :, None, None] if visible.ndim == 3 else visible.reshape(len(visible), T, K, N // K, k.shape[1])
    readable = jnp.moveaxis(mask.any(axis=(1, 3)), 1, 2)[..., None]  # 0 * NaN is NaN: blank what no query reads,
    # for the gradient too
    k = jnp.where(readable, k.astype(wide), 0)
    v = jnp.where(readable, v.astype(wide), 0)
    grouped = q.reshape(B, T, K, N // K, H).astype(wide)
    scores = cap(einsum("btkgh,bskh->btkgs", grouped, k) * scale, softcap)
    sink = None if sinks is None else sinks.reshape(K, N // K).astype(wide)
    weights, lse = masked_softmax(scores, mask, sink)
    out = einsum("btkgs,bskv->btkgv", weights, v)
    return out.reshape(B, T, N, v.shape[-1]), lse.reshape(B, T, N)


def merge(ops, *parts: tuple[Array, Array]) -> Float[Array, "B T N V"]:
    """The softmax over all keys from the (out, lse) of each part."""
    return ops.merge_states(*(jnp.stack(both) for both in zip(*parts, strict=True)))[0]
