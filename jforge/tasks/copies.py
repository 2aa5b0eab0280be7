"""Tasks that ask for tokens again in their order: a block after a distance, and tokens scattered among blanks."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jforge.core.config import natural, positive_int
from jforge.tasks.task import MARK, START, Row, Symbols, below, check_filler, check_int, distinct, filled


@dataclass(frozen=True)
class Copy(Symbols):
    """[filler] START x_1 ... x_w filler MARK x_1 ... x_(w-1): from MARK on the target is the next x.

    x are symbols, each drawn alone; noise is drawn from the same symbols. All targets are w + `distance` tokens behind
    their evidence. A row longer than 2 w + distance + 1 begins with filler.

    vocabulary: symbols
    width: w, tokens to copy
    distance: tokens of filler between the block and MARK; None: as many as the row has room for
    filler: "noise" or "blank"
    """

    special, kinds = START + 1, 1
    vocabulary: int = 64
    width: int = 8
    distance: int | None = None
    filler: str = "noise"

    def __post_init__(self):
        self._check_vocabulary()
        positive_int("width", self.width)
        if self.distance is not None:
            natural("distance", self.distance)
        check_filler(self.filler)

    def check_length(self, length: int) -> None:
        least = 2 * self.width + 1 + (self.distance or 0)
        check_int("length", length, least, None, "the block twice, the filler between and a mark")

    def _row(self, key: Array, length: int) -> Row:
        of_block, of_filler = jax.random.split(key)
        room = length - 2 * self.width - 1
        lead = 0 if self.distance is None else room - self.distance
        block = self._first(0) + below(of_block, self.width, self.vocabulary)
        around = filled(self.filler, of_filler, room, self._first(0), self.vocabulary, taken=block[:0])
        start, mark = (jnp.full(1, token, jnp.int32) for token in (START, MARK))
        tokens = jnp.concatenate([around[:lead], start, block, around[lead:], mark, block[:-1]])
        steps = jnp.arange(self.width, dtype=jnp.int32)
        return Row(tokens, length - self.width + steps, block, lead + 1 + steps)


@dataclass(frozen=True)
class SelectiveCopy(Symbols):
    """x_1 ... x_w at random places among blanks, then MARK x_1 ... x_(w-1): from MARK on the target is the next x.

    x are symbols, each drawn alone; their places are a uniform subset of the first T - w. After Gu and Dao ("Mamba",
    arXiv 2312.00752), where the tokens that were said are not read again.

    vocabulary: symbols
    width: w, tokens to say
    """

    special, kinds = MARK + 1, 1
    vocabulary: int = 64
    width: int = 8

    def __post_init__(self):
        self._check_vocabulary()
        positive_int("width", self.width)

    def check_length(self, length: int) -> None:
        check_int("length", length, 2 * self.width, None, "2 for each token to say")

    def _row(self, key: Array, length: int) -> Row:
        of_block, of_places = jax.random.split(key)
        mark = length - self.width
        block = self._first(0) + below(of_block, self.width, self.vocabulary)
        places = jnp.sort(distinct(of_places, self.width, mark))
        tokens = jnp.zeros(length, jnp.int32).at[places].set(block).at[mark].set(MARK).at[mark + 1 :].set(block[:-1])
        return Row(tokens, mark + jnp.arange(self.width, dtype=jnp.int32), block, places)
