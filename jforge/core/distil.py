"""How an indexer learns what attention reads: no gradient of the output passes through the choice of the top scores.

    p_t = mean over heads of softmax_s(l_{t,n,s}) over all s that t sees
    L   = mean over t of KL(p_t || softmax_s(score_t))

p, the input and all parameters but the indexer's are held fixed, so L moves the indexer alone. This is the loss of the
dense warm-up of DeepSeek-V3.2 (its equation 3); the sparse stage that follows there sums over the picks only.
"""

from collections.abc import Collection

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jforge.core.attend import einsum
from jforge.core.params import Params
from jforge.core.softmax import accumulation_dtype, cap, masked_softmax


def apart(params: Params, x: Array, own: Collection[str]) -> tuple[Params, Array]:
    """(params, x) of which only the parameters in `own` have a gradient."""
    fixed = {name: value if name in own else jax.lax.stop_gradient(value) for name, value in params.items()}
    return fixed, jax.lax.stop_gradient(x)


def mean_weights(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], seen: Bool[Array, "B T S"], *, scale: float,
    softcap: float | None = None,
) -> Float[Array, "B T S"]:  # fmt: skip
    """What attention gives each token, in the mean over heads, one head at a time; K divides N. Without gradient."""
    q, k = jax.lax.stop_gradient((q.astype(accumulation_dtype(q)), k.astype(accumulation_dtype(k))))
    group = q.shape[2] // k.shape[2]

    def head(total, n):
        logits = scale * einsum("bth,bsh->bts", q[:, :, n], k[:, :, n // group])
        return total + masked_softmax(cap(logits, softcap), seen)[0], None

    total, _ = jax.lax.scan(head, jnp.zeros(seen.shape, q.dtype), jnp.arange(q.shape[2]))
    return total / q.shape[2]


def divergence(target: Float[Array, "*b S"], scores: Float[Array, "*b S"], seen: Bool[Array, "*#b S"]) -> Array:
    """KL(target || softmax(scores)) in nats, the mean over the rows that see anything; 0 where none does."""
    scores = jnp.where(seen, scores, 0)
    _, lse = masked_softmax(scores, seen)
    said = jnp.where(target > 0, scores - lse[..., None], 0)
    each = (jax.scipy.special.xlogy(target, target) - target * said).sum(axis=-1)
    some = jnp.broadcast_to(seen.any(axis=-1), each.shape)
    return jnp.where(some, each, 0).sum() / jnp.maximum(some.sum(), 1)
