"""What all tasks share: the batch that they draw, the class that they extend, and how distinct numbers are drawn.

A task writes one row at a time; `draw` maps it over rows, each with a key of its own.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from jforge.core.config import one_of, positive_int, reject

BLANK, MARK, START = 0, 1, 2
"""Tokens that are no symbol: nothing, "say it now", "here it begins". A task has the first of them that it needs."""

FILLERS = ("noise", "blank")


class Batch(NamedTuple):
    """Rows of a task. What is not scored has target 0 and distance 0."""

    tokens: Int32[Array, "B T"]  # what the model reads
    targets: Int32[Array, "B T"]  # the token that it must say at this place
    scored: Bool[Array, "B T"]  # places that count in loss and accuracy
    distance: Int32[Array, "B T"]  # t - s at a scored place t whose answer stands at s; of several s the first


class Row(NamedTuple):
    """One row as a task writes it: its tokens, and for each of Q questions where it is asked and what is right."""

    tokens: Int32[Array, "T"]
    asked: Int32[Array, "Q"]  # places, distinct
    answers: Int32[Array, "Q"]
    evidence: Int32[Array, "Q"]  # where the answers stand


class Task(ABC):
    """A seeded generator with exact answers: a target follows from the tokens up to its place, its own included.

    Tasks are frozen dataclasses of numbers and strings: hashable, so static under jit. Wrong fields raise ValueError.
    """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Tokens are 0 .. vocab_size - 1."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """The accuracy of the best guess that ignores the tokens."""

    @property
    def among(self) -> float:
        """The accuracy of a guess among the answers that the row has, whatever is asked: `chance`, where it has one."""
        return self.chance

    @abstractmethod
    def check_length(self, length: int) -> None:
        """Raise ValueError for a length of row, in tokens, that the task does not fit."""

    @abstractmethod
    def _row(self, key: Array, length: int) -> Row:
        """One row; `length` has been checked."""

    def draw(self, key: Array, rows: int, length: int) -> Batch:
        """`rows` rows of `length` tokens, the same for the same key.

        Pure, for jit (self, rows and length are static) and for vmap over keys. Raises ValueError for a `rows` that is
        no positive integer and as `check_length`.
        """
        positive_int("rows", rows)
        self.check_length(length)
        return jax.vmap(lambda one: _laid_out(self._row(one, length)))(jax.random.split(key, rows))


class Symbols(Task):
    """A task whose tokens are first `special` ones, then `vocabulary` symbols in `kinds` ranges of the same size.

    Its answers are uniform over one range.
    """

    special: ClassVar[int]
    kinds: ClassVar[int]
    vocabulary: int

    @property
    def vocab_size(self) -> int:
        return self.special + self.vocabulary

    @property
    def chance(self) -> float:
        return self.kinds / self.vocabulary

    def _many(self) -> int:
        """Symbols of one kind."""
        return self.vocabulary // self.kinds

    def _first(self, kind: int) -> int:
        """The first token of a kind, from 0 on."""
        return self.special + kind * self._many()

    def _check_vocabulary(self) -> None:
        """Raise ValueError where a range would have fewer than 2 symbols or one more than the others."""
        least, kind = 2 * self.kinds, type(self.vocabulary)
        if kind is not int or self.vocabulary < least or self.vocabulary % self.kinds:
            number = "an integer" if self.kinds == 1 else f"a multiple of {self.kinds}"
            reject("vocabulary", self.vocabulary, f"{number}, at least {least}")


def _laid_out(row: Row) -> Batch:
    """The Batch of one row, without its axis B."""
    empty = jnp.zeros_like(row.tokens)
    return Batch(
        row.tokens,
        empty.at[row.asked].set(row.answers),
        empty.astype(bool).at[row.asked].set(True),
        empty.at[row.asked].set(row.asked - row.evidence),
    )


def check_int(name: str, value: int, least: int, most: int | None, why: str) -> None:
    """Raise ValueError for a value that is no integer from `least` to `most`, None: of at least `least`."""
    fits = isinstance(value, int) and not isinstance(value, bool) and least <= value
    if not fits or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        reject(name, value, f"an integer {limits}, {why}")


def check_filler(filler: str) -> None:
    one_of("filler", filler, FILLERS)


def below(key: Array, count: int, many: int | Int32[Array, "{count}"]) -> Int32[Array, "{count}"]:
    """`count` integers of 0 .. many - 1, uniform but for a share of many / 2^32.

    jax.random.randint, closer to uniform, hashes three times as much.
    """
    return (jax.random.bits(key, (count,), jnp.uint32) % jnp.asarray(many, jnp.uint32)).astype(jnp.int32)


def distinct(key: Array, count: int, many: int, power: float = 1.0) -> Int32[Array, "{count}"]:
    """`count` distinct integers of 0 .. many - 1, drawn one after the other, i with a weight of (i + 1)^(power - 1).

    The largest of log weight + Gumbel noise, in their order: the same law as such draws (arXiv 1903.06059).
    """
    weights = (power - 1) * jnp.log(jnp.arange(1, many + 1, dtype=jnp.float32))
    return jax.lax.top_k(weights + jax.random.gumbel(key, (many,), jnp.float32), count)[1]


def filled(filler: str, key: Array, length: int, first: int, many: int, taken: Array) -> Int32[Array, "{length}"]:
    """`length` tokens that ask nothing: BLANK, or noise, uniform over first .. first + many - 1 without those `taken`.

    taken: int32, distinct tokens of that range.
    """
    if filler == "blank":
        return jnp.full(length, BLANK, jnp.int32)
    rank = first + below(key, length, many - len(taken))
    # the free token of that rank lies behind each taken one that has no more free ones before it
    free_before = jnp.sort(taken) - jnp.arange(len(taken), dtype=jnp.int32)
    return rank + jnp.searchsorted(free_before, rank, side="right", method="compare_all").astype(jnp.int32)
