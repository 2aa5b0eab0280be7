"""RMSNorm, in float32 or wider, weight applied before the cast back.

Llama's code casts back first and then multiplies; in float32 the two are equal, in bfloat16 they differ by a rounding
(docs/divergences.md).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jforge.core.softmax import accumulation_dtype


def rms_norm(x: Float[Array, "..."], weight: Float[Array, "..."], *, eps: float, offset: float = 0.0) -> Array:
    """x / sqrt(mean(x^2) + eps) * (offset + weight), the mean over as many trailing axes as `weight` has.

    offset = 1 is Gemma's (1 + w) form. A weight of shape (N, H) norms the flattened heads (MiniMax-M2, OLMo-2),
    one of shape (H,) each head by itself (Qwen3).
    """
    axes = tuple(range(-weight.ndim, 0))
    wide = x.astype(accumulation_dtype(x))
    scale = jnp.reciprocal(jnp.sqrt(jnp.mean(wide * wide, axis=axes, keepdims=True) + eps))
    return (wide * scale * (offset + weight.astype(wide.dtype))).astype(x.dtype)


def layer_norm(x: Float[Array, "*b H"], weight: Float[Array, "H"], bias: Float[Array, "H"], *, eps: float) -> Array:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis; float32 or wider inside, x's dtype outside."""
    wide = x.astype(accumulation_dtype(x))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    scaled = centred / jnp.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    return (scaled * weight.astype(wide.dtype) + bias.astype(wide.dtype)).astype(x.dtype)
