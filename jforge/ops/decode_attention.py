"""Attention of T new queries a row over a cache of keys and values: what the fast kernels must compute."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jforge.core import masks
from jforge.core.attend import attend
from jforge.core.softmax import accumulation_dtype
from jforge.ops import check


@masks.with_infinities
def decode_attention(
    q: Float[Array, "B T N H"],
    k: Array,
    v: Array,
    lengths: Int[Array, "B"],
    *,
    scale: float,
    window: int | None = None,
    sinks: Float[Array, "N"] | None = None,
    softcap: float | None = None,
    page_table: Int[Array, "B P"] | None = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    chunk: int | None = None,
    out_dtype=None,
    alibi: Float[Array, "N"] | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """out_t = sum_s softmax_s(cap(scale * q_t . k_s) + alibi_n (s - p)) v_s over s <= p, the last `window` of them.

    p = lengths[b] - T + t is the slot of query t itself. alibi: float32 or wider N, slopes in natural-log units, not
    scaled and not capped; None: no bias. With pages s is the token's place in its row.
    k: B S K H and v: B S K V in q's dtype; query head n reads KV head n // (N/K). With `page_table` they are pools
    `pages page K H` and slot s of row b lies in page page_table[b, s // page]; entries past ceil(length/page) may
    be anything. With k_scale and v_scale (float32, B S K or pages page K) they are int8 or fp8 and mean
    stored * scale. `sinks` are logits in natural-log units, not scaled. softcap: 1e-30 to 1e38, scale: a float32.
    `chunk` fixes how the kernels split the keys; the result here does not depend on it.

    Returns out in `out_dtype` (default q's) and lse, the natural log of the summed exponentials, sink included, in
    float32 or wider. A query that sees nothing gives 0 and -inf (or the sink). Slots that no query may read may hold
    NaN. Raises ValueError and TypeError from jforge.ops.check.
    """
    check.decode_attention(**locals())
    if page_table is not None:
        k, v, k_scale, v_scale = (x if x is None else pages(x, page_table) for x in (k, v, k_scale, v_scale))
    S = k.shape[1]
    check.length_values(lengths, S)
    if k_scale is not None:
        wide = accumulation_dtype(q)
        k = k.astype(wide) * k_scale[..., None]
        v = v.astype(wide) * v_scale[..., None]

    visible = masks.decode(lengths, q.shape[1], S, window)
    own = lengths[:, None] - q.shape[1] + jnp.arange(q.shape[1])
    bias = {} if alibi is None else {"alibi": alibi, "distance": jnp.arange(S) - own[..., None]}
    out, lse = attend(q, k, v, visible, scale=scale, softcap=softcap, sinks=sinks, **bias)
    return out.astype(out_dtype or q.dtype), lse


def pages(pool: Array, page_table: Int[Array, "B P"]) -> Array:
    """Lay the pages of each row end to end. Entries that no length reaches may be anything, so they are clipped."""
    B, P = page_table.shape
    rows = jnp.take(pool, jnp.clip(page_table, 0, pool.shape[0] - 1), axis=0)
    return rows.reshape(B, P * pool.shape[1], *pool.shape[2:])
