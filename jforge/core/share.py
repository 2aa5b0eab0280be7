"""Layers that read the cache of an earlier one: what the earlier one lends them of a call."""

from typing import Any, NamedTuple

import jax

from jforge.core.spec import cache_class
from jforge.core.step import Queries


@cache_class
class NoCache:
    """Of a layer that keeps nothing of its own: how many tokens its rows have seen."""

    length: jax.Array  # int32[B]


class Source(NamedTuple):
    """What a layer has of the tokens of a call. Its cache before the call is lent beside the new entries, as a ring has
    dropped after it what early queries of a long prompt still need.
    """

    rows: Queries  # the tokens, as that layer saw them
    before: Any  # its cache; None in forward, which has none
    after: Any
    new: Any  # what `lend` returned: of keys and values {leaf: B T ...}, as they are stored
