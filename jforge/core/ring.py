"""Ring buffers: a cache that keeps the last tokens of a row and writes over the oldest.

The token at position p lies in slot p mod W. Keys are rotated by absolute position before they are stored, so the
order of slots does not matter to a softmax: after the newest token is written, a full ring is exactly its window.

`fixed` leading slots may hold the first tokens for ever (StreamingLLM); the ring turns in the slots behind them.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from jforge.core.step import Step


def capacity(slots: int, limit: int) -> int | None:
    """Tokens that fit: a ring of its full size never overflows, a shorter one holds what it has slots for."""
    return None if slots == limit else slots


def slot_of(positions: Int[Array, "..."], slots: int, fixed: int = 0) -> Int[Array, "..."]:
    """The slot of each position in a buffer of `slots`, the first `fixed` of which do not turn."""
    turning = fixed + (positions - fixed) % max(1, slots - fixed)
    return jnp.where(positions < min(fixed, slots), positions, turning)


def held(length: Int[Array, "B"], slots: int, fixed: int = 0) -> Int[Array, "B W"]:
    """The position of the token in each slot after `length` tokens; -1 in an empty slot."""
    slot, last = jnp.arange(slots), length[:, None] - 1
    newest = last - (last - slot) % max(1, slots - fixed)  # the latest position that falls into this slot
    position = jnp.where(slot < fixed, slot, newest)
    return jnp.where((slot < length[:, None]) & (position >= 0), position, -1)


def write(buffer: Array, new: Array, step: Step, fixed: int = 0) -> Array:
    """Store the kept tokens; of more than a ring holds only those that stay, since a slot is written once."""
    slots = buffer.shape[1]
    stays = (step.positions >= step.length[:, None] - (slots - fixed)) | (step.positions < fixed)
    slot = jnp.where(step.keep & stays, slot_of(step.positions, slots, fixed), slots)
    rows = jnp.arange(buffer.shape[0])[:, None]
    return buffer.at[rows, slot].set(new.astype(buffer.dtype), mode="drop")
