"""Tasks that ask for the value of a key: recall of many pairs, a needle in filler, and recall through two pairs."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from jforge.core.config import positive, reject, within
from jforge.tasks.task import Row, Symbols, below, check_filler, check_int, distinct, filled


@dataclass(frozen=True)
class Recall(Symbols):
    """Multi-query associative recall: k_1 v_1 ... k_P v_P, then filler in which each key comes once more.

    The target at a key's second appearance is its value. Keys are distinct and of the lower half of the vocabulary,
    values are drawn from the upper half, noise is any symbol but the row's keys. After Arora et al. (MQAR, "Zoology",
    arXiv 2312.04927), where questions stand at even places only and noise may repeat a key.

    vocabulary: symbols, keys and values together
    pairs: P
    power: places of the questions are drawn without repeats, the i-th after the pairs with a weight of i^(power - 1):
        1 is uniform, Zoology has 0.01, short distances
    distance: (least, most) tokens from a value to its question, for every question, and then without `power`: each
        remainder of the place by P is as likely, and within it each place that the key may have. A key must have at
        least P of them. None: as `power` gives
    filler: "noise" or "blank"
    """

    special, kinds = 1, 2
    vocabulary: int = 256
    pairs: int = 8
    power: float = 1.0
    distance: tuple[int, int] | None = None
    filler: str = "noise"

    def __post_init__(self):
        self._check_vocabulary()
        check_int("pairs", self.pairs, 1, self._many(), "half of the vocabulary")
        positive("power", self.power)
        check_filler(self.filler)
        if self.distance is not None:
            _check_distance(self.distance)
            if self.power != 1:
                reject("power", self.power, "1 where distance is given")

    def check_length(self, length: int) -> None:
        check_int("length", length, 3 * self.pairs, None, "3 for each of the pairs")
        if self.distance is not None:
            first, last = _windows(self.pairs, self.distance, length)
            if (last - first + 1).min() < self.pairs:
                allowed = f"such that each of {self.pairs} keys has {self.pairs} places in a row of {length} tokens"
                reject("distance", self.distance, allowed)

    @property
    def among(self) -> float:
        return max(self.chance, 1 / self.pairs)

    def _places(self, key: Array, length: int) -> Int32[Array, "P"]:
        """Where each key is asked for, distinct."""
        pairs = self.pairs
        if self.distance is None:
            return 2 * pairs + distinct(key, pairs, length - 2 * pairs, self.power)
        of_order, of_place = jax.random.split(key)
        first, last = (jnp.asarray(end, jnp.int32) for end in _windows(pairs, self.distance, length))
        # places of different remainders by P are distinct; a window of P places has each remainder
        first += (distinct(of_order, pairs, pairs) - first) % pairs
        return first + pairs * below(of_place, pairs, (last - first) // pairs + 1)

    def _row(self, key: Array, length: int) -> Row:
        of_keys, of_values, of_places, of_filler = jax.random.split(key, 4)
        keys = self._first(0) + distinct(of_keys, self.pairs, self._many())
        values = self._first(1) + below(of_values, self.pairs, self._many())
        asked = self._places(of_places, length)
        slots = 2 * jnp.arange(self.pairs, dtype=jnp.int32)
        tokens = filled(self.filler, of_filler, length, self._first(0), self.vocabulary, keys)
        tokens = tokens.at[slots].set(keys).at[slots + 1].set(values).at[asked].set(keys)
        return Row(tokens, asked, values, slots + 1)


def _check_distance(distance: tuple[int, int]) -> None:
    """Raise ValueError for a range of distances that is no tuple of two integers, 1 <= least <= most."""
    two = isinstance(distance, tuple) and [type(end) for end in distance] == [int, int]
    if not two or not 1 <= distance[0] <= distance[1]:
        reject("distance", distance, "None or a tuple of two integers, 1 <= least <= most")


def _windows(pairs: int, distance: tuple[int, int], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(first, last) place behind all pairs and in the row at which each key may be asked for. int64 [P]"""
    value = 2 * np.arange(pairs) + 1
    return np.maximum(value + distance[0], 2 * pairs), np.minimum(value + distance[1], length - 1)


@dataclass(frozen=True)
class Needle(Symbols):
    """One pair of a key and a value somewhere in filler; the last token is the key again, its target the value.

    The place of the key is round(depth * (T - 3)): at depth 0 the pair comes first, at depth 1 just before the
    question. Noise is any symbol but the key, so values stand elsewhere too. Accuracy by depth and length is the usual
    picture ("needle in a haystack", Kamradt 2023; keys and values as in `Recall`).

    vocabulary: symbols, keys and values together
    depth: 0 to 1; None: uniform over all places
    filler: "noise" or "blank"
    """

    special, kinds = 1, 2
    vocabulary: int = 256
    depth: float | None = None
    filler: str = "noise"

    def __post_init__(self):
        self._check_vocabulary()
        if self.depth is not None:
            within("depth", self.depth, 0, 1)
        check_filler(self.filler)

    def check_length(self, length: int) -> None:
        check_int("length", length, 3, None, "a key, its value and the question")

    def _row(self, key: Array, length: int) -> Row:
        of_key, of_value, of_place, of_filler = jax.random.split(key, 4)
        asked_key = self._first(0) + below(of_key, 1, self._many())
        value = self._first(1) + below(of_value, 1, self._many())
        if self.depth is None:
            place = below(of_place, 1, length - 2)
        else:
            place = jnp.full(1, round(self.depth * (length - 3)), jnp.int32)
        tokens = filled(self.filler, of_filler, length, self._first(0), self.vocabulary, asked_key)
        tokens = tokens.at[place].set(asked_key).at[place + 1].set(value).at[-1:].set(asked_key)
        return Row(tokens, jnp.full(1, length - 1, jnp.int32), value, place + 1)


@dataclass(frozen=True)
class TwoHop(Symbols):
    """Pairs a_i b_i and b_i c_i of n chains, shuffled in any order, then filler in which each a_i comes once more.

    The target there is c_i: the value of the value. The a, b and c are of three disjoint thirds of the vocabulary; the
    a and the b of a row are distinct, noise is any symbol but these. Which c belongs to an a, only a_i b_i tells. The
    distance is that of the farther of b_i and c_i.

    vocabulary: symbols, of all three kinds together
    chains: n, at least 2, so that there are wrong ones to be told apart
    filler: "noise" or "blank"
    """

    special, kinds = 1, 3
    vocabulary: int = 192
    chains: int = 4
    filler: str = "noise"

    def __post_init__(self):
        self._check_vocabulary()
        check_int("chains", self.chains, 2, self._many(), "a third of the vocabulary")
        check_filler(self.filler)

    def check_length(self, length: int) -> None:
        check_int("length", length, 5 * self.chains, None, "5 for each of the chains")

    @property
    def among(self) -> float:
        return max(self.chance, 1 / self.chains)

    def _row(self, key: Array, length: int) -> Row:
        of_a, of_b, of_c, of_order, of_places, of_filler = jax.random.split(key, 6)
        many, chains = self._many(), self.chains
        a = self._first(0) + distinct(of_a, chains, many)
        b = self._first(1) + distinct(of_b, chains, many)
        c = self._first(2) + below(of_c, chains, many)
        slots = 2 * distinct(of_order, 2 * chains, 2 * chains)
        asked = 4 * chains + distinct(of_places, chains, length - 4 * chains)
        left, right = jnp.concatenate([a, b]), jnp.concatenate([b, c])
        tokens = filled(self.filler, of_filler, length, self._first(0), self.vocabulary, left)
        tokens = tokens.at[slots].set(left).at[slots + 1].set(right).at[asked].set(a)
        return Row(tokens, asked, c, 1 + jnp.minimum(slots[:chains], slots[chains:]))
