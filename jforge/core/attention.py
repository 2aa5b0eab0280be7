"""The Attention tuple: one mechanism as a set of pure functions, three of which follow from the others."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from jforge.core import guard, masks, protocols
from jforge.core.params import random_params
from jforge.cost import call_cost


def causal(cfg, q_pos, k_pos):
    """`visible` of a mechanism in which any token up to the query's own may be read."""
    return masks.causal(q_pos, k_pos)


def no_selection(params, cfg, x, cache) -> None:
    """`select` of a mechanism that reads all that is visible."""


def no_tokens(cfg, selection, S: int) -> None:
    """`tokens_of` of a mechanism that selects nothing."""


_DEFAULT: Any = None
"""Of a field that follows from others, or that another makes needless."""


class _Fields(NamedTuple):
    summary: str
    Config: type
    forward: protocols.Forward
    prefill: protocols.Prefill
    decode: protocols.Decode
    cache_spec: protocols.Spec
    models: Mapping[str, Any]
    examples: tuple
    shapes: protocols.Shapes = _DEFAULT
    work: protocols.WorkOf = _DEFAULT
    visible: protocols.Visible = causal
    select: protocols.Select = no_selection
    tokens_of: protocols.TokensOf = no_tokens
    init_params: protocols.InitParams = _DEFAULT
    init_cache: protocols.InitCache = _DEFAULT
    cost: protocols.CostOf = _DEFAULT
    traded: str = ""
    lend: protocols.Lend = _DEFAULT
    read: protocols.Read = _DEFAULT
    index_loss: protocols.IndexLoss = _DEFAULT


_Fields.summary.__doc__ = "One line: what it is and where it comes from."
_Fields.traded.__doc__ = "One line: what it gives up, and for what."
_Fields.Config.__doc__ = "Frozen, hashable dataclass; rejects bad values with ValueError naming the field."
_Fields.models.__doc__ = (
    "{model: Config} of shipped models, one layer each: what tables show. No array is ever made for them."
)
_Fields.examples.__doc__ = "Small Configs for tests, odd sizes included."


class Attention(_Fields):
    """A mechanism as a tuple of pure functions, on parameters and caches that are pytrees.

    Every tool of jforge takes a variant made with `att._replace(...)`. `init_params`, `init_cache` and `cost` follow
    from `shapes`, `cache_spec` and `work`, those of a variant as well, unless they are given; given as None, they
    follow again. `prefill` and `decode` do not follow: they refuse a cache that is not laid out as their own, so a
    variant with another layout replaces them too.

    Each function refuses a Config of another mechanism with TypeError. A subclass of its own Config is taken as long
    as no Attention has it as its `Config`; a variant with more fields says `att._replace(Config=Mine, ...)`. Those with
    `params` also refuse arrays of other frameworks (TypeError) and parameters that are missing or have another shape
    than in `shapes` (ValueError), unless `init_params` is given. Their signatures are Protocols: jforge.core.protocols.
    """

    __slots__ = ()

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls, *args, **kwargs)._claimed()

    @classmethod
    def _make(cls, iterable):
        return super()._make(iterable)._claimed()

    def _claimed(self):
        guard.claim(self.Config)
        return self

    @property
    def init_params(self) -> protocols.InitParams:
        return super().init_params or self._init_params

    @property
    def init_cache(self) -> protocols.InitCache:
        return super().init_cache or self._init_cache

    @property
    def cost(self) -> protocols.CostOf:
        return super().cost or self._cost

    def _init_params(self, key, cfg, dtype=jnp.float32):
        return random_params(key, self._given("shapes", "init_params")(cfg), dtype)

    def _init_cache(self, cfg, batch: int, capacity: int, dtype=jnp.bfloat16):
        return self.cache_spec(cfg).init(batch, capacity, dtype)

    def _cost(self, cfg, *, context: int, batch=1, capacity=None, dtype=jnp.bfloat16, new=1, closing=False):
        work = partial(self._given("work", "cost"), cfg)
        return call_cost(self.cache_spec(cfg), work, context, batch, capacity, dtype, new, closing)

    def _given(self, source: str, follows: str) -> Callable:
        if (function := getattr(self, source)) is None:
            raise ValueError(f"{source} is None; {follows} follows from it, so one of the two must be given")
        return function


def _checked(name: str) -> property:
    """The field of that name with the checks of `guard` in front of its function."""
    field, protocol = getattr(_Fields, name), _Fields.__annotations__[name]
    taken = tuple(inspect.signature(protocol.__call__).parameters)[1:]

    def read(att: Attention):
        if (given := field.__get__(att)) is None:
            return None
        function = guard.unchecked(given)
        if taken[0] != "params":
            return guard.of_config(function, att.Config)
        shapes = None if _Fields.init_params.__get__(att) else _Fields.shapes.__get__(att)
        return guard.of_params(function, att.Config, shapes and guard.unchecked(shapes), taken[3:])

    return property(read, doc=protocol.__doc__)


_CHECKED = (
    "forward", "prefill", "decode", "select", "read", "index_loss", "cache_spec", "shapes", "work", "visible",
    "tokens_of",
)  # fmt: skip
for _name in _CHECKED:
    setattr(Attention, _name, _checked(_name))
for _name in ("init_params", "init_cache", "cost"):
    _property = vars(Attention)[_name]
    setattr(Attention, _name, property(_property.fget, doc=_Fields.__annotations__[_name].__doc__))
Attention.lend = property(lambda att: _Fields.lend.__get__(att), doc=protocols.Lend.__doc__)
