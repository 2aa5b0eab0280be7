"""Absorbed multi-head latent attention over picked tokens of a cache of latents and rotary keys."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jforge.core import masks
from jforge.core.softmax import accumulation_dtype
from jforge.ops import check
from jforge.ops.decode_block_sparse import attend_gathered, listed_slots


@masks.with_infinities
def decode_sparse_mla(
    q_latent: Float[Array, "B T N C"],
    q_rope: Float[Array, "B T N R"],
    latent: Array,
    k_rope: Array,
    indices: Int[Array, "B T L"],
    *,
    scale: float,
    sinks: Float[Array, "N"] | None = None,
    latent_scale: Float[Array, "B S"] | None = None,
    chunk: int | None = None,
    out_dtype=None,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B T N"]]:
    """decode_mla over the tokens that `indices` names, the same for all heads; they alone decide what is seen.

    latent: B S C, k_rope: B S R. Indices are distinct within a query (the caller's duty); -1 and indices past the cache
    are ignored wherever they stand. Only the picked rows are gathered, each once: the latent is the value too.
    chunk: entries of one split, a plan that kernels follow; no effect here. latent_scale, sinks, results and errors as
    in decode_mla. Source: DeepSeek-V3.2, FlashMLA's sparse decode.
    """
    check.decode_sparse_mla(**locals())
    slots, seen = listed_slots(indices[:, :, None], 1, latent.shape[1], None)
    rows, wide = jnp.arange(len(slots))[:, None, None, None], accumulation_dtype(q_latent, k_rope)
    values, rope = (jnp.where(seen[..., None], a[rows, slots].astype(wide), 0) for a in (latent, k_rope))
    if latent_scale is not None:
        values = values * jnp.where(seen, latent_scale[rows, slots], 0)[..., None]
    q, keys = jnp.concatenate([q_latent, q_rope], axis=-1), jnp.concatenate([values, rope], axis=-1)
    out, lse = attend_gathered(q, keys, values, seen, scale=scale, sinks=sinks)
    return out.astype(out_dtype or q_latent.dtype), lse
