"""RMSNorm and LayerNorm, in float32 or wider, weight applied before the cast back.

Llama's code casts back first and then multiplies; in float32 the two are equal, in bfloat16 they differ by a rounding
(docs/divergences.md).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jforge.core.softmax import accumulation_dtype


def norm(
    x: Float[Array, "..."],
    weight: Float[Array, "..."] | None,
    bias: Float[Array, "..."] | None = None,
    *,
    axes: int = 1,
    eps: float,
    offset: float = 0.0,
    centred: bool = False,
) -> Array:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) + bias, the mean over the last `axes` axes.

    centred: of x less its mean, which makes it a LayerNorm. weight, bias: broadcast against x; None: there is none.
    """
    over = tuple(range(-axes, 0))
    wide = x.astype(accumulation_dtype(x))
    if centred:
        wide = wide - wide.mean(axis=over, keepdims=True)
    wide = wide * jnp.reciprocal(jnp.sqrt(jnp.mean(wide * wide, axis=over, keepdims=True) + eps))
    if weight is not None:
        wide = wide * (offset + weight.astype(wide.dtype))
    return (wide if bias is None else wide + bias.astype(wide.dtype)).astype(x.dtype)


def rms_norm(x: Float[Array, "..."], weight: Float[Array, "..."], *, eps: float, offset: float = 0.0) -> Array:
    """x / sqrt(mean(x^2) + eps) * (offset + weight), the mean over as many trailing axes as `weight` has.

    offset = 1 is Gemma's (1 + w) form. A weight of shape (N, H) norms the flattened heads (MiniMax-M2, OLMo-2),
    one of shape (H,) each head by itself (Qwen3).
    """
    return norm(x, weight, axes=weight.ndim, eps=eps, offset=offset)


def layer_norm(x: Float[Array, "*b H"], weight: Float[Array, "H"], bias: Float[Array, "H"], *, eps: float) -> Array:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis; float32 or wider inside, x's dtype outside."""
    return norm(x, weight, bias, eps=eps, centred=True)


def l2_norm(x: Float[Array, "*b H"], *, eps: float = 1e-6) -> Array:
    """x / sqrt(sum(x^2) + eps) over the last axis; float32 or wider inside, x's dtype outside."""
    wide = x.astype(accumulation_dtype(x))
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + eps)).astype(x.dtype)
