"""Absorbed multi-head latent attention of T new queries a row over a cache of latents and rotary keys."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jforge.core import masks
from jforge.core.attend import attend
from jforge.core.softmax import accumulation_dtype
from jforge.ops import check
from jforge.ops.decode_attention import pages


@masks.with_infinities
def decode_mla(
    q_latent: Float[Array, "B T N C"],
    q_rope: Float[Array, "B T N R"],
    latent: Array,
    k_rope: Array,
    lengths: Int[Array, "B"],
    *,
    scale: float,
    window: int | None = None,
    sinks: Float[Array, "N"] | None = None,
    page_table: Int[Array, "B P"] | None = None,
    latent_scale: Array | None = None,
    chunk: int | None = None,
    out_dtype=None,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B T N"]]:
    """out_t = sum_s softmax_s(scale * (q_latent_t . latent_s + q_rope_t . k_rope_s)) latent_s over the visible s.

    One key for all heads, [latent | k_rope], whose first C channels are the value too: a kernel loads each latent row
    once. latent: B S C, k_rope: B S R, or with `page_table` pools `pages page C` and `pages page R`. latent_scale
    (float32 B S or pages page): the latent is int8 or fp8 and means stored * scale. Visibility, window, sinks, chunk,
    results and errors as in decode_attention. Source: DeepSeek-V2 (arXiv 2405.04434), FlashMLA.
    """
    check.decode_mla(**locals())
    if page_table is not None:
        latent, k_rope, latent_scale = (
            x if x is None else pages(x, page_table) for x in (latent, k_rope, latent_scale)
        )
    S = latent.shape[1]
    check.length_values(lengths, S)
    if latent_scale is not None:
        latent = latent.astype(accumulation_dtype(q_latent)) * latent_scale[..., None]
    visible = masks.decode(lengths, q_latent.shape[1], S, window)
    wide = accumulation_dtype(latent, k_rope)
    q = jnp.concatenate([q_latent, q_rope], axis=-1)
    k = jnp.concatenate([latent.astype(wide), k_rope.astype(wide)], axis=-1)[:, :, None]
    out, lse = attend(q, k, latent[:, :, None], visible, scale=scale, sinks=sinks)
    return out.astype(out_dtype or q_latent.dtype), lse
