"""The Attention tuple: one mechanism as a set of pure functions, three of which follow from the others."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from jforge.core import masks
from jforge.core.params import random_params
from jforge.cost import step_cost


def causal(cfg, q_pos, k_pos):
    """`visible` of a mechanism in which any token up to the query's own may be read."""
    return masks.causal(q_pos, k_pos)


def no_selection(params, cfg, x, cache) -> None:
    """`select` of a mechanism that reads all that is visible."""


def no_tokens(cfg, selection, S: int) -> None:
    """`tokens_of` of a mechanism that selects nothing."""


class _Fields(NamedTuple):
    """B batch, T new tokens, S cache slots, D model dim. Caches are pytrees with `.length`, int32[B]: tokens seen."""

    summary: str
    """One line: what it is and where it comes from."""
    Config: type
    """Frozen, hashable dataclass; rejects bad values with ValueError naming the field."""
    forward: Callable
    """(params, cfg, x, positions=None) -> y. B T D -> B T D without a cache: the definition."""
    prefill: Callable
    """(params, cfg, x, cache, lengths=None) -> (y, cache). Appends T tokens, row b its first lengths[b]."""
    decode: Callable
    """(params, cfg, x, cache, ops=jforge.ops) -> (y, cache). Appends T = 1 to 16 tokens a row, as T single steps do."""
    cache_spec: Callable
    """(cfg) -> CacheSpec."""
    models: Mapping[str, Any]
    """{model: Config} of shipped models, one layer each: what tables show. No array is ever made for them."""
    examples: tuple
    """Small Configs for tests, odd sizes included."""
    shapes: Callable | None = None
    """(cfg) -> {parameter: shape}, a `Drawn` shape where the name does not say how random values are drawn."""
    work: Callable | None = None
    """(cfg, context, capacity, closing) -> Work of one row in one decode step."""
    visible: Callable = causal
    """(cfg, q_pos, k_pos) -> bool, the data-independent mask, broadcast over both; the union over heads."""
    select: Callable = no_selection
    """(params, cfg, x, cache) -> the indices that decode would hand to its op for x; None where nothing is chosen."""
    tokens_of: Callable = no_tokens
    """(cfg, selection, S) -> bool B T S: the tokens that those picks read, whole blocks; None where nothing is chosen.

    (cfg, None, S) -> bool 1 S S: the tokens that query t reads whatever is picked."""
    init_params: Callable | None = None
    init_cache: Callable | None = None
    cost: Callable | None = None


class Attention(_Fields):
    """A mechanism. Make a variant with `att._replace(...)`; every tool of jforge takes the result.

    `init_params`, `init_cache` and `cost` follow from `shapes`, `cache_spec` and `work`, those of a variant as well,
    unless they are given; given as None, they follow again. `prefill` and `decode` do not follow: they refuse a cache
    that is not laid out as their own, so a variant with another layout replaces them too.
    """

    __slots__ = ()

    @property
    def init_params(self) -> Callable:
        """(key, cfg, dtype=float32) -> dict of arrays."""
        return super().init_params or self._init_params

    @property
    def init_cache(self) -> Callable:
        """(cfg, batch, capacity, dtype=bfloat16) -> empty cache."""
        return super().init_cache or self._init_cache

    @property
    def cost(self) -> Callable:
        """(cfg, *, context, batch=1, capacity=None, dtype=bfloat16, closing=False) -> Cost of one decode step."""
        return super().cost or self._cost

    def _init_params(self, key, cfg, dtype=jnp.float32):
        return random_params(key, self._given("shapes", "init_params")(cfg), dtype)

    def _init_cache(self, cfg, batch: int, capacity: int, dtype=jnp.bfloat16):
        return self.cache_spec(cfg).init(batch, capacity, dtype)

    def _cost(self, cfg, *, context: int, batch=1, capacity=None, dtype=jnp.bfloat16, closing=False):
        work = partial(self._given("work", "cost"), cfg)
        return step_cost(self.cache_spec(cfg), work, context, batch, capacity, dtype, closing)

    def _given(self, source: str, follows: str) -> Callable:
        if (function := getattr(self, source)) is None:
            raise ValueError(f"{source} is None; {follows} follows from it, so one of the two must be given")
        return function
