"""Bytes and flops of a decode step or a prefill, and their algebra."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import jax.numpy as jnp

from jforge.core.spec import CacheSpec


@dataclass(frozen=True)
class Cost:
    """What one call stores, writes, reads and computes; bytes by buffer name, over the whole batch.

    context tokens are in every row after the call, the new ones included. A slot counts once a call, however many
    queries read it. `flops` are those of the attend step (scores and weighted values of the keys that each query's mask
    lets through, multiply and add counted apart); projections are not counted, as weights are not in the bytes.
    At capacity = context, sum(stored) = fixed + per_token * context.
    """

    stored: Mapping[str, int]
    written: Mapping[str, int]
    read: Mapping[str, int]
    flops: int
    entries_read: int
    fixed: int | Fraction
    per_token: int | Fraction

    def __add__(self, other: "Cost") -> "Cost":
        """Two layers side by side: everything adds, buffer by buffer."""
        return Cost(
            *(_add(getattr(self, f), getattr(other, f)) for f in ("stored", "written", "read")),
            *(getattr(self, f) + getattr(other, f) for f in ("flops", "entries_read", "fixed", "per_token")),
        )

    def __mul__(self, layers: int) -> "Cost":
        """The same layer `layers` times."""
        return Cost(
            *({n: b * layers for n, b in getattr(self, f).items()} for f in ("stored", "written", "read")),
            *(getattr(self, f) * layers for f in ("flops", "entries_read", "fixed", "per_token")),
        )

    __rmul__ = __mul__


def _add(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {name: a.get(name, 0) + b.get(name, 0) for name in {**a, **b}}


@dataclass(frozen=True)
class Work:
    """What one call reads and writes in one row, in slots of each buffer, and computes; a buffer that has no slots
    counts as one, and a row of it as the Fraction that it is.
    """

    read: Mapping[str, int | Fraction]
    written: Mapping[str, int | Fraction]
    flops: int
    entries_read: int


def seen(context: int, new: int, limit: int | None = None, *, every: int = 1, first: int | None = None) -> int:
    """The slots that each of the `new` tokens up to `context` sees, summed over them: at most `limit` of them.

    A slot for every token, or one for `every` tokens, the first of them after `first`; a buffer has one at least.
    """
    first = every if first is None else first

    def up_to(n: int) -> int:
        if limit is not None and n > (full := first + (limit - 1) * every):  # from the token `full` on it is limit
            return up_to(full) + limit * (n - full)
        groups, rest = divmod(max(0, n - first + 1), every)
        return min(n, first - 1) + every * groups * (groups + 1) // 2 + rest * (groups + 1)

    return up_to(context) - up_to(context - new)


def call_cost(
    spec: CacheSpec, work: Callable[..., Work], context: int, batch: int, capacity: int | None, dtype, new: int,
    closing: bool,
) -> Cost:  # fmt: skip
    """The Cost of a call over `batch` rows, each of which does work(context, capacity, new, closing).

    Raises ValueError for sizes below 1, more new tokens than context, context above capacity, or closing with more
    than one new token.
    """
    capacity = context if capacity is None else capacity
    for name, size in (("context", context), ("batch", batch), ("capacity", capacity), ("new", new)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} is {size!r}; it must be a positive integer")
    if context > capacity:
        raise ValueError(f"context is {context}; the capacity of {capacity} holds no more")
    if new > context:
        raise ValueError(f"new is {new}; of a context of {context} no more tokens are new")
    if closing and new > 1:
        raise ValueError(f"closing is True; it is asked of one token, and of new={new} it follows from the context")
    dtype, row, every = jnp.dtype(dtype), work(context, capacity, new, closing), {**spec.borrowed, **spec}

    def count(slots: Mapping[str, int | Fraction]) -> dict[str, int]:
        return {name: int(batch * n * every[name].slot_bytes(dtype)) for name, n in slots.items()}

    stored = spec.stored(batch, capacity, dtype)
    per_token = spec.per_token(batch, capacity, dtype)
    return Cost(
        stored=stored,
        written=count(row.written),
        read=count(row.read),
        flops=batch * row.flops,
        entries_read=batch * row.entries_read,
        fixed=_plain(sum(stored.values()) - per_token * capacity),
        per_token=_plain(per_token),
    )


def _plain(value: int | Fraction) -> int | Fraction:
    """A whole Fraction as an int."""
    return int(value) if value == int(value) else value
