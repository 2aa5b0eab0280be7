"""Masked softmax with its log-sum-exp, and the merge of partial results.

Empty rows are legal everywhere: a row that sees nothing gives zeros and lse = -inf, never NaN. Masked scores and the
values behind them may be NaN or Inf; both are blanked before any arithmetic, in the gradient too.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jforge.core import masks

CAPS = 1e-30, 1e38  # the least and the largest limit of `cap`


def accumulation_dtype(*arrays):
    """float32 or wider: the dtype for softmax, norms, RoPE angles, states and sums over `arrays`."""
    return wider("float32", *(a.dtype for a in arrays))


def wider(*dtypes) -> jnp.dtype:
    """The one that holds them all. It is asked for in so many words, so strict promotion has nothing to object to."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*map(jnp.dtype, dtypes))


def common(*arrays: Array) -> list[Array]:
    """The arrays, each in the widest of their dtypes."""
    dtype = wider(*(a.dtype for a in arrays))
    return [a.astype(dtype) for a in arrays]


def cap(scores: Array, limit: float | None) -> Array:
    """limit * tanh(scores / limit), on scaled scores and before the mask (Gemma 2). None leaves them alone.

    limit: within CAPS. Where the quotient is so small that tanh changes nothing, it may be a denormal, which XLA
    flushes to 0: the scores stay. A large limit is divided by a power of two beforehand, as its reciprocal is one too;
    the clip, where tanh is 1, keeps XLA from folding the two factors.
    """
    if limit is None:
        return scores
    unit = 2.0**-64 if limit > 1 else 1.0
    ratio = jnp.clip(scores * unit, -20 * limit * unit, 20 * limit * unit) / (limit * unit)
    return jnp.where(jnp.abs(ratio) < 1e-9, scores, limit * jnp.tanh(ratio))


@masks.with_infinities
def masked_softmax(
    scores: Float[Array, "*b S"], mask: Bool[Array, "*#b S"], sinks: Float[Array, "*#b"] | None = None
) -> tuple[Float[Array, "*b S"], Float[Array, "*b"]]:
    """p_s = exp(l_s) / (exp(sink) + sum_u exp(l_u)) over the visible s; returns (p, lse), natural log, sink included.

    A sink is one more logit with no value behind it (gpt-oss): it only enlarges the denominator.
    """
    scores = jnp.where(mask, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, initial=-jnp.inf)
    if sinks is not None:
        top = jnp.maximum(top, sinks)
    shift = jnp.where(jnp.isneginf(top), 0.0, top)  # exp(-inf - -inf) would be NaN
    # The results do not depend on it, and the gradient of a maximum divides by how many scores equal it: none of them
    # where a compiler rounds scores another way when it computes them again.
    shift = jax.lax.stop_gradient(shift)
    weights = jnp.exp(scores - shift[..., None])
    total = jnp.sum(weights, axis=-1)
    if sinks is not None:
        total = total + jnp.exp(sinks - shift)
    empty = total == 0
    safe = jnp.where(empty, 1.0, total)  # keeps 0/0 and log(0) out of the gradient as well
    return weights / safe[..., None], jnp.where(empty, -jnp.inf, jnp.log(safe) + shift)
