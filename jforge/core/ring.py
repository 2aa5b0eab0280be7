"""Ring buffers: a cache that keeps the last tokens of a row and writes over the oldest.

The token at position p lies in slot p mod W. Keys are rotated by absolute position before they are stored, so the
order of slots does not matter to a softmax: after the newest token is written, a full ring is exactly its window.

`fixed` leading slots may hold the first tokens for ever (StreamingLLM); the ring turns in the slots behind them.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from jforge.core.step import Step, store

NEVER = jnp.iinfo(jnp.int32).max


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


def beside(step: Step, length: Int[Array, "B"], *pairs: tuple[Array, Array], fixed: int = 0) -> list[Array]:
    """[positions B U, then B U ... for each (buffer, new)]: the slots as they were, and behind them the new tokens.

    A chunk cannot write first: its early queries still need what its late tokens replace. A slot without a token, and a
    pad, have the position `NEVER`, which no causal mask shows to a query.
    """
    old, new = held(length, pairs[0][0].shape[1], fixed), jnp.where(step.keep, step.positions, -1)
    positions = jnp.concatenate([old, new], axis=1)
    slots = [jnp.concatenate([buffer, new.astype(buffer.dtype)], axis=1) for buffer, new in pairs]
    return [jnp.where(positions < 0, NEVER, positions), *slots]


def write(cache, step: Step, fixed: int = 0, **new: Array):
    """The cache after the step: of more tokens than a ring holds only those that stay, since a slot is written once."""

    def slot_in(slots: int) -> Int[Array, "B T"]:
        stays = (step.positions >= step.length[:, None] - (slots - fixed)) | (step.positions < fixed)
        return jnp.where(step.keep & stays, slot_of(step.positions, slots, fixed), slots)

    return store(cache, step, slot_in, new)
