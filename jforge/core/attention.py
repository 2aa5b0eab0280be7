"""The Attention tuple: one mechanism as a set of pure functions."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jforge.core.spec import CacheSpec


class Attention(NamedTuple):
    """A mechanism. Make a variant with `att._replace(...)`; every tool of jforge takes the result.

    B batch, T new tokens, S cache slots, D model dim. Caches are pytrees with `.length`, int32[B]: the tokens seen.
    """

    summary: str
    """One line: what it is and where it comes from."""
    Config: type
    """Frozen, hashable dataclass; rejects bad values with ValueError naming the field."""
    init_params: Callable
    """(key, cfg, dtype=float32) -> dict of arrays."""
    init_cache: Callable
    """(cfg, batch, capacity, dtype=bfloat16) -> empty cache."""
    forward: Callable
    """(params, cfg, x, positions=None) -> y. B T D -> B T D without a cache: the definition."""
    prefill: Callable
    """(params, cfg, x, cache, lengths=None) -> (y, cache). Appends T tokens, row b its first lengths[b]."""
    decode: Callable
    """(params, cfg, x, cache, ops=jforge.ops) -> (y, cache). One token a row, B 1 D."""
    visible: Callable
    """(cfg, q_pos, k_pos) -> bool, the data-independent mask, broadcast over both; the union over heads."""
    select: Callable
    """(params, cfg, x, cache) -> the indices that decode would hand to its op for x; None where nothing is chosen."""
    tokens_of: Callable
    """(cfg, selection, S) -> bool B T S: the tokens that those picks read, whole blocks; None where nothing is chosen.

    (cfg, None, S) -> bool 1 S S: the tokens that query t reads whatever is picked."""
    cache_spec: Callable
    """(cfg) -> CacheSpec."""
    cost: Callable
    """(cfg, *, context, batch=1, capacity=None, dtype=bfloat16, closing=False) -> Cost of one decode step."""
    models: Mapping[str, Any]
    """{model: Config} of shipped models, one layer each: what tables show. No array is ever made for them."""
    examples: tuple
    """Small Configs for tests, odd sizes included."""


def init_cache_from(cache_spec: Callable[[Any], CacheSpec]) -> Callable:
    """The `init_cache` that a spec implies."""

    def init_cache(cfg, batch: int, capacity: int, dtype=jnp.bfloat16):
        return cache_spec(cfg).init(batch, capacity, dtype)

    return init_cache


def no_selection(params, cfg, x, cache) -> None:
    """`select` of a mechanism that reads all that is visible."""


def no_tokens(cfg, selection, S: int) -> None:
    """`tokens_of` of a mechanism that selects nothing."""
