"""How NSA selects blocks: by the weights that the compressed branch gives to the entries that overlap them.

    weight_{t,g,e} = sum over the heads of group g of softmax_e(q_t . k_cmp_e)
    score_{t,g,j}  = sum over the entries e of weight_{t,g,e} |block j and entry e| / d

The first `init_blocks` blocks and the `local_blocks` up to the query's own are always selected and count in n.
Source: Yuan et al. 2025 (arXiv 2502.11089), equations 8 to 11, with the overlaps that its figure shows.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import jforge.ops as jax_ops
from jforge.core import blocks, masks
from jforge.core.attend import einsum
from jforge.core.softmax import accumulation_dtype, cap


@masks.with_infinities
def entry_weights(
    cfg, q: Float[Array, "B T N H"], k_cmp: Float[Array, "B E K H"], lse, seen: Bool[Array, "B T E"]
) -> Float[Array, "B T K E"]:
    """p_cmp summed over the heads of each group, from the log-sum-exp of the compressed branch."""
    (B, T, N, H), K, wide = q.shape, k_cmp.shape[2], accumulation_dtype(q)
    k_cmp = jnp.where(seen.any(axis=1)[..., None, None], k_cmp.astype(wide), 0)
    grouped = q.reshape(B, T, K, N // K, H).astype(wide)
    scores = cap(einsum("btkgh,bekh->btkge", grouped, k_cmp) * cfg.scaling, cfg.attn_logit_softcapping)
    total = jnp.where(jnp.isneginf(lse), 0, lse).reshape(B, T, K, N // K, 1)
    return jnp.exp(jnp.where(seen[:, :, None, None], scores - total, -jnp.inf)).sum(axis=3)


def choose(
    cfg, weights: Float[Array, "B T K E"], q_pos: Int[Array, "B T"], S: int, ops=jax_ops
) -> Int[Array, "B T K L"]:
    """The selected blocks of each group; -1 where there are fewer than n.

    Block j overlaps the entries a j' with j' in b j - (a-1) .. b j + b - 1 (a = l/d, b = l'/d), each by 1 to
    min(a, b) strides: for a = 2, b = 4 the weights are 1, 2, 2, 2, 1.
    """
    count = -(-S // cfg.block_size)
    a, b = cfg.kernel_size // cfg.kernel_stride, cfg.block_size // cfg.kernel_stride
    right = max(0, count * b - weights.shape[-1])
    padded = jnp.pad(weights, [(0, 0)] * 3 + [(a - 1, right)])
    score = sum((min(o + a, b) - max(o, 0)) * padded[..., o + a - 1 :: b][..., :count] for o in range(1 - a, b))
    forced = {"first": cfg.init_blocks, "local": cfg.local_blocks}
    return blocks.choose(score, q_pos // cfg.block_size, cfg.topk, **forced, ops=ops)
