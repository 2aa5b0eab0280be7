"""What every prefill and decode does before and after the attention: positions, pads, capacity, and the append."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jforge.core.spec import CacheSpec

Tokens = Float[Array, "B T D"]
"""Activations: what goes into an attention and what comes out of it."""
Token = Float[Array, "B 1 D"]
"""The next one of every row."""
MOST_TOKENS = 16
"""Of a row in one decode step."""
X_DTYPES = ("float16", "bfloat16", "float32", "float64")


class Step(NamedTuple):
    """The new tokens of one call. T is x.shape[1]; row b brings its first lengths[b] tokens."""

    x: Tokens  # zero at pads: a pad may be NaN and must reach neither the cache nor a gradient
    positions: Int[Array, "B T"]
    keep: Bool[Array, "B T"]  # real tokens of rows that fit
    fits: Bool[Array, "B"]
    length: Int[Array, "B"]  # after the call; unchanged in a row that does not fit

    @property
    def queries(self) -> "Queries":
        return Queries(self.x, self.positions, self.positions, self.keep)


class Queries(NamedTuple):
    """Tokens that attend, all of a call or a block of it; consecutive in their rows."""

    x: Tokens
    order: Int[Array, "B T"]  # the index of each in its row
    positions: Int[Array, "B T"]  # what RoPE is given
    keep: Bool[Array, "B T"]  # the others see nothing


def check_input(x, hidden_size: int) -> None:
    if x.ndim != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; it needs 3 axes: B T D")
    if x.shape[-1] != hidden_size:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last axis must be hidden_size={hidden_size}")
    if str(x.dtype) not in X_DTYPES:
        raise TypeError(f"x has dtype {x.dtype}; allowed: {', '.join(X_DTYPES)}")


def one_token(x: Array) -> Array:
    """x itself, if it holds one token a row."""
    if x.ndim == 3 and x.shape[1] != 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be the next token of every row: B 1 D")
    return x


def few_tokens(x: Array) -> Array:
    """x itself, if it holds as many tokens a row as a decode step takes."""
    if x.ndim == 3 and not 1 <= x.shape[1] <= MOST_TOKENS:
        raise ValueError(f"x has shape {tuple(x.shape)}; decode takes 1 to {MOST_TOKENS} tokens a row: B T D")
    return x


def several(x: Array) -> bool:
    """Whether x holds more than one token a row."""
    return x.ndim == 3 and x.shape[1] > 1


def one_by_one(decode: Callable, spec: CacheSpec, params, cfg, x: Tokens, cache, ops) -> tuple[Tokens, Any]:
    """`decode` of one token a row over the T of x, where the next needs what the one before it leaves in the cache.

    A row without room for all of them takes none: inside, it is full from the start.
    """
    step, capacity = begin(cfg, spec, few_tokens(x), cache), spec.capacity(cache)
    if capacity is not None:
        cache = replace(cache, length=jnp.where(step.fits, cache.length, capacity))

    def next_token(cache, token):
        y, cache = decode(params, cfg, token[:, None], cache, ops)
        return cache, y[:, 0]

    cache, ys = jax.lax.scan(next_token, cache, jnp.moveaxis(x, 1, 0))
    return jnp.moveaxis(ys, 0, 1), replace(cache, length=step.length)


def in_order(cfg, x: Tokens, positions) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """(the index of each token in its row, the position RoPE gives it) of an x without a cache, checked."""
    check_input(x, cfg.hidden_size)
    order = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    return order, order if positions is None else positions


def all_of(cfg, x: Tokens, positions) -> Queries:
    """The tokens of an x without a cache."""
    order, positions = in_order(cfg, x, positions)
    return Queries(x, order, positions, jnp.ones(x.shape[:2], bool))


def begin(cfg, spec: CacheSpec, x: Tokens, cache, lengths=None) -> Step:
    """Check the cache against its spec and place the tokens of x (row b its first lengths[b]) after those it has."""
    spec.check(cache)
    return place(x, cache.length, lengths, cfg.hidden_size, spec.capacity(cache))


def place(x, length: Int[Array, "B"], lengths, hidden_size: int, capacity: int | None) -> Step:
    """Place the tokens of x after the `length` tokens already seen; capacity None never overflows.

    A row overflows as a whole: it writes nothing, keeps its length and gets NaN outputs. So does a row whose
    lengths[b] is not in 0..T. Where the lengths are concrete, both raise ValueError naming the row instead.
    """
    check_input(x, hidden_size)
    B, T, _ = x.shape
    if length.shape[0] != B:
        raise ValueError(f"x has {B} rows and the cache {length.shape[0]}; they must match")
    lengths = jnp.full((B,), T, jnp.int32) if lengths is None else _checked_lengths(lengths, B)
    _raise_if_concrete(length, lengths, T, capacity)
    fits = (lengths >= 0) & (lengths <= T)
    if capacity is not None:
        fits &= length + lengths <= capacity
    keep = (jnp.arange(T) < lengths[:, None]) & fits[:, None]
    positions = length[:, None] + jnp.arange(T, dtype=jnp.int32)
    return Step(jnp.where(keep[..., None], x, 0), positions, keep, fits, length + jnp.where(fits, lengths, 0))


def end(step: Step, y: Tokens, dtype) -> Tokens:
    """0 at pads, NaN in rows that did not fit, in x's dtype."""
    y = jnp.where(step.keep[..., None], y, 0)
    return jnp.where(step.fits[:, None, None], y, jnp.nan).astype(dtype)


def append(cache, step: Step, **new: Array):
    """The cache after the step: the kept tokens of each buffer's `new`, B T ..., in the slots of their positions."""
    return store(cache, step, lambda slots: jnp.where(step.keep, step.positions, slots), new)


def store(cache, step: Step, slot_in: Callable[[int], Int[Array, "B T"]], new: Mapping[str, Array]):
    """The cache after the step. slot_in(slots): where a buffer of so many has the new tokens, `slots` to drop one.

    Tokens are cast to their buffer's dtype.
    """
    rows, leaves = jnp.arange(len(step.keep))[:, None], {}
    for name, tokens in new.items():
        buffer = getattr(cache, name)
        leaves[name] = buffer.at[rows, slot_in(buffer.shape[1])].set(tokens.astype(buffer.dtype), mode="drop")
    return replace(cache, **leaves, length=step.length)


def _checked_lengths(lengths, batch: int):
    lengths = jnp.asarray(lengths)
    if lengths.shape != (batch,):
        raise ValueError(f"lengths has shape {lengths.shape}; it must be ({batch},), one for each row of x")
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"lengths has dtype {lengths.dtype}; it must be an integer dtype")
    return lengths.astype(jnp.int32)


def _raise_if_concrete(length, lengths, T: int, capacity: int | None) -> None:
    if not isinstance(lengths, jax.core.Tracer):
        new = np.asarray(lengths)
        for row in np.flatnonzero((new < 0) | (new > T)):
            raise ValueError(f"lengths[{row}] is {new[row]}; it must lie in 0..{T}, the tokens in x")
        if capacity is not None and not isinstance(length, jax.core.Tracer):
            total = np.asarray(length) + new
            for row in np.flatnonzero(total > capacity):
                raise ValueError(f"row {row} would hold {total[row]} tokens; the cache has capacity {capacity}")
