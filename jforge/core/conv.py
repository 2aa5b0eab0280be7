"""Short depthwise convolutions and what they keep of a row: its last tokens' inputs, as they came.

    y_t = b + sum over j < L of w_j * r_(t - L + 1 + j)        * channel by channel; rows before the first are zero

The state is the last L - 1 rows r, before weights, bias and activation, the oldest first; a row of fewer tokens has
zeros before them. What is convolved is what is stored, so after its rounding to the cache's dtype. Source: the causal
convolutions of Mamba, Gated DeltaNet, Kimi-Linear and LFM2; transformers keeps a column more than is needed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jforge.core.config import positive_int, reject
from jforge.core.softmax import accumulation_dtype
from jforge.core.spec import Buffer


def kernel(name: str, value) -> None:
    """Check a Config's kernel size: with one tap there is no state."""
    positive_int(name, value)
    if value < 2:
        reject(name, value, "an integer of at least 2")


def buffer(L: int, channels: int) -> Buffer:
    """The rows that the next token's convolution needs."""
    return Buffer(("B", "P", "X"), (L - 1, channels), every=None)


def held(L: int, x: Float[Array, "B T D"], channels: int) -> Float[Array, "B P X"]:
    """The state of rows without tokens."""
    return jnp.zeros((len(x), L - 1, channels), x.dtype)


def beside(state: Float[Array, "B P X"], rows: Float[Array, "B T X"]) -> Float[Array, "B U X"]:
    """The rows before the tokens and theirs, as they are stored."""
    return jnp.concatenate([state, rows.astype(state.dtype)], axis=1)


def convolve(rows: Float[Array, "B U X"], weight: Float[Array, "L X"], bias=None) -> Float[Array, "B T X"]:
    """The convolution at all rows but the first L - 1, in float32 or wider."""
    L, wide = len(weight), accumulation_dtype(rows, weight)
    rows, weight = rows.astype(wide), weight.astype(wide)
    T = rows.shape[1] - L + 1
    out = sum(weight[j] * rows[:, j : j + T] for j in range(L))
    return out if bias is None else out + bias.astype(wide)


def keep_last(rows: Float[Array, "B U X"], keep: Bool[Array, "B T"]) -> Float[Array, "B P X"]:
    """The state after the tokens that are kept, which come first in their rows."""
    T = keep.shape[1]
    P = rows.shape[1] - T
    if T == 1:  # a decode step: no gather
        return jnp.where(keep[:, :, None], rows[:, 1:], rows[:, :P])
    cut = jax.vmap(lambda row, count: jax.lax.dynamic_slice_in_dim(row, count, P))
    return cut(rows, keep.sum(axis=1))
