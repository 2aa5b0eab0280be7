"""The next byte of a text that comes with the package: state_papers.txt, whose sources state_papers.md has."""

from dataclasses import dataclass
from functools import cache
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from jforge.core.config import one_of
from jforge.tasks.task import Row, Task, below, check_int

TRAINED = 7 / 8
"""The share of the text, from its beginning, that is for training; the rest is held out."""


@cache
def part(held_out: bool) -> UInt8[np.ndarray, "N"]:
    """The bytes for training, or those held out."""
    data = np.frombuffer(resources.files("jforge.tasks").joinpath("state_papers.txt").read_bytes(), np.uint8)
    split = int(TRAINED * len(data))
    return data[split:] if held_out else data[:split]


@dataclass(frozen=True)
class Text(Task):
    """Windows of a small text of the public domain, by bytes; at every place the target is the next byte.

    A window begins anywhere in its part. What a byte depends on has no place, so every distance is 0.

    held_out: windows from the last eighth of the text instead of what is before it
    """

    held_out: bool = False

    def __post_init__(self):
        one_of("held_out", self.held_out, (False, True))

    @property
    def vocab_size(self) -> int:
        return 256

    @property
    def chance(self) -> float:
        """The share of the part's most frequent byte, the space."""
        data = part(self.held_out)
        return float(np.bincount(data).max() / len(data))

    def check_length(self, length: int) -> None:
        check_int("length", length, 1, len(part(self.held_out)) - 1, "one less than the part has bytes")

    def _row(self, key: Array, length: int) -> Row:
        data = jnp.asarray(part(self.held_out))
        start = below(key, 1, len(data) - length)
        window = jax.lax.dynamic_slice(data, start, (length + 1,)).astype(jnp.int32)
        places = jnp.arange(length, dtype=jnp.int32)
        return Row(window[:-1], places, window[1:], places)
