"""Masked multi-head attention over given keys and values, and the blocks of queries that keep its memory linear.

Scores are as many numbers as there are queries times keys. A long prompt takes its queries in blocks, of which one at
a time is projected, scored and projected out again; of the keys a block reads those that its mask can reach, up to a
quarter of them more. Nothing is approximated: a query's softmax is over all of its keys at once.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jforge.core import masks
from jforge.core.softmax import accumulation_dtype, cap, masked_softmax

SCORES = 2**25
"""Numbers of one array of scores that a prompt may take at once: 128 MiB in float32."""
_PARTS = 4
"""Into which the keys are cut for `reach`."""


def einsum(equation: str, *operands: Array) -> Array:
    """jnp.einsum in full precision (a float32 reference must not run in TF32 on a GPU), in the widest dtype given.

    Weights and activations of different dtypes meet here by intent, whatever jax_numpy_dtype_promotion says.
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.einsum(equation, *operands, precision="highest")


@masks.with_infinities
def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    visible: Bool[Array, "#B T S"] | Bool[Array, "#B T N S"],
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    alibi: Float[Array, "N"] | Float[np.ndarray, "N"] | None = None,
    distance: Int[Array, "#B T S"] | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """out_t = sum_s softmax_s(cap(scale * q_t . k_s)) v_s over the visible s; returns (out, lse), float32 or wider.

    Query head n reads KV head n // (N/K). A key that no query sees may be NaN; a query that sees nothing gives 0.
    `visible` may differ from head to head. alibi: slopes; alibi_n * distance, the key's place less the query's, joins
    the capped logits.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    wide = accumulation_dtype(q, k, v)
    mask = visible[:, :, None, None] if visible.ndim == 3 else visible.reshape(len(visible), T, K, N // K, k.shape[1])
    readable = jnp.moveaxis(mask.any(axis=(1, 3)), 1, 2)[..., None]  # 0 * NaN is NaN: blank what no query reads,
    # for the gradient too
    k = jnp.where(readable, k.astype(wide), 0)
    v = jnp.where(readable, v.astype(wide), 0)
    grouped = q.reshape(B, T, K, N // K, H).astype(wide)
    scores = cap(einsum("btkgh,bskh->btkgs", grouped, k) * scale, softcap)
    if alibi is not None:
        slopes = jnp.asarray(alibi).reshape(K, N // K, 1).astype(wide)
        scores = scores + slopes * distance[:, :, None, None].astype(wide)
    sink = None if sinks is None else sinks.reshape(K, N // K).astype(wide)
    weights, lse = masked_softmax(scores, mask, sink)
    out = einsum("btkgs,bskv->btkgv", weights, v)
    return out.reshape(B, T, N, v.shape[-1]), lse.reshape(B, T, N)


@masks.with_infinities
def merge(ops, *parts: tuple[Array, Array]) -> Float[Array, "B T N V"]:
    """The softmax over all keys from the (out, lse) of each part."""
    return ops.merge_states(*(jnp.stack(values) for values in zip(*parts, strict=True)))[0]


def at_a_time(numbers: int) -> int:
    """How many things of so many numbers each are computed at once."""
    return max(1, SCORES // max(1, numbers))


def over_queries(block: Callable, rows: tuple, numbers: int, keys: tuple = (), reach: Int[Array, "B T"] | None = None):
    """block(rows, keys), whose results are B T ..., over blocks of the T queries that score at most SCORES numbers.

    rows: arrays B T ..., of which a block gets its queries'. numbers: how many one query scores, over the batch.
    keys: arrays B S ..., of which it gets the leading slots, up to the last that `reach` has for one of its queries or
    more. A gradient computes a block again: of its scores nothing is kept.
    """
    T = rows[0].shape[1]
    size = min(T, at_a_time(numbers))
    if size == T:
        return block(rows, keys)
    block = jax.checkpoint(block)
    within = rows if reach is None else (*rows, reach)

    def one(first):
        mine = _queries(within, first, size)
        return block(mine, keys) if reach is None else _reaching(block, mine[:-1], keys, mine[-1])

    def step(joined, first):
        write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=1)
        return jax.tree.map(write, joined, one(first)), None

    outs = jax.eval_shape(one, jnp.int32(0))
    joined = jax.tree.map(lambda out: jnp.zeros((out.shape[0], T, *out.shape[2:]), out.dtype), outs)
    starts = jnp.minimum(jnp.arange(-(-T // size), dtype=jnp.int32) * size, T - size)  # the last may begin earlier
    return jax.lax.scan(step, joined, starts)[0]


def _queries(rows: tuple, first: Int[Array, ""], size: int) -> tuple:
    return tuple(jax.lax.dynamic_slice_in_dim(row, first, size, axis=1) for row in rows)


def _reaching(block: Callable, rows: tuple, keys: tuple, reach: Int[Array, "B t"]):
    """block(rows, keys) with the leading slots alone, of as few parts as hold the slot `reach` of every query."""
    S = keys[0].shape[1]
    ends = sorted({-(-S * part // _PARTS) for part in range(1, _PARTS + 1)})
    chosen = jnp.searchsorted(jnp.asarray(ends), jnp.minimum(reach.max(), S - 1), side="right")
    cut = [lambda rows, keys, end=end: block(rows, tuple(key[:, :end] for key in keys)) for end in ends]
    return jax.lax.switch(chosen, cut, rows, keys)


def nearby(arrays: tuple, first: Int[Array, "B"], count: int) -> tuple:
    """Of each array B U ... the `count` slots of row b from first[b] on, or those at the end that are as many."""
    if count >= arrays[0].shape[1]:
        return arrays
    cut = jax.vmap(partial(jax.lax.dynamic_slice_in_dim, slice_size=count))
    return tuple(cut(array, jnp.maximum(first, 0)) for array in arrays)
