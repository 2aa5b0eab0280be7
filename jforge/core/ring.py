"""Ring buffers: a cache that keeps the last tokens of a row and writes over the oldest.

The token at position p lies in slot p mod W. Keys are rotated by absolute position before they are stored, so the
order of slots does not matter to a softmax: after the newest token is written, a full ring is exactly its window.

`fixed` leading slots may hold the first tokens for ever (StreamingLLM); the ring turns in the slots behind them.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from jforge.core import attend
from jforge.core.step import Queries, Step, store

NEVER = jnp.iinfo(jnp.int32).max


def slot_of(positions: Int[Array, "..."], slots: int, fixed: int = 0) -> Int[Array, "..."]:
    """The slot of each position in a buffer of `slots`, the first `fixed` of which do not turn."""
    turning = fixed + (positions - fixed) % max(1, slots - fixed)
    return jnp.where(positions < min(fixed, slots), positions, turning)


class Recent(NamedTuple):
    """Tokens in the order of their rows: place j of row b has the one at position first[b] + j, or none."""

    first: Int[Array, "B"]
    positions: Int[Array, "B U"]  # `NEVER`, which no causal mask shows to a query, where there is none
    arrays: tuple[Array, ...]  # B U ...

    def around(self, order: Int[Array, "B t"], window: int) -> tuple[Int[Array, "B u"], *tuple[Array, ...]]:
        """(positions, *arrays) of no more than the windows of consecutive queries at `order` can hold."""
        first = order.min(axis=1, initial=NEVER) - self.first - window  # order may be empty
        return attend.nearby((self.positions, *self.arrays), first, window + order.shape[1])

    def numbers(self, heads: int, window: int) -> int:
        """Scores a query has, over the batch, in the longest block whose window and own tokens make SCORES of them."""
        rows = heads * len(self.first)
        block = (math.isqrt(window**2 + 4 * attend.SCORES // rows) - window) // 2
        return rows * min(self.positions.shape[1], window + block)


def in_order(order: Int[Array, "B T"], *arrays: Array) -> Recent:
    """Of tokens without a cache."""
    return Recent(jnp.zeros(len(order), jnp.int32), order, arrays)


def beside(step: Step | Queries, length: Int[Array, "B"], *pairs: tuple[Array, Array], fixed: int = 0) -> Recent:
    """For each (buffer, new): what the ring holds after `length` tokens, its fixed slots left out, and the new tokens.

    A chunk cannot write first: its early queries still need what its late tokens replace.
    """
    slots = pairs[0][0].shape[1]
    turning = max(0, slots - fixed)
    old = length[:, None] - turning + jnp.arange(turning)
    at = jnp.arange(len(old))[:, None], slot_of(old, slots, fixed)
    old, new = jnp.where(old < fixed, NEVER, old), jnp.where(step.keep, step.positions, NEVER)
    arrays = (jnp.concatenate([buffer[at], new.astype(buffer.dtype)], axis=1) for buffer, new in pairs)
    return Recent(length - turning, jnp.concatenate([old, new], axis=1), tuple(arrays))


def write(cache, step: Step, fixed: int = 0, **new: Array):
    """The cache after the step: of more tokens than a ring holds only those that stay, since a slot is written once."""

    def slot_in(slots: int) -> Int[Array, "B T"]:
        stays = (step.positions >= step.length[:, None] - (slots - fixed)) | (step.positions < fixed)
        return jnp.where(step.keep & stays, slot_of(step.positions, slots, fixed), slots)

    return store(cache, step, slot_in, new)
