"""Quantisation of index keys and queries as DeepSeek's indexer does it: Hadamard rotation, then e4m3 with one scale."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jforge.core.attend import einsum
from jforge.core.softmax import accumulation_dtype

E4M3_MAX = 448.0


def hadamard(x: Float[Array, "*b J"]) -> Float[Array, "*b J"]:
    """x H_J / sqrt(J) in Sylvester's order, J a power of two: orthonormal, so products of two such vectors stay."""
    J = x.shape[-1]
    matrix = np.ones((1, 1))
    while len(matrix) < J:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    wide = accumulation_dtype(x)
    return einsum("...j,ji->...i", x.astype(wide), jnp.asarray(matrix * J**-0.5, wide)).astype(x.dtype)


def e4m3(x: Float[Array, "*b J"]) -> tuple[Array, Float[Array, "*b"]]:
    """(x / s in float8_e4m3fn, s): one power of two s a vector, the smallest with max |x| / s <= 448 (ue8m0 scales).

    max |x| counts as at least 1e-4. s is float32 or wider.
    """
    wide = x.astype(accumulation_dtype(x))
    largest = jnp.maximum(jnp.abs(wide).max(axis=-1), 1e-4)
    mantissa, exponent = jnp.frexp(largest)  # exact, where a logarithm or a division by 448 = 0.875 * 2^9 would round
    scale = jnp.ldexp(jnp.ones_like(largest), jnp.where(mantissa > 0.875, exponent - 8, exponent - 9))
    return jnp.clip(wide / scale[..., None], -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn), scale
