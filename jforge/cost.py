"""Bytes and flops of one decode step, and their algebra."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import jax.numpy as jnp

from jforge.core.spec import CacheSpec


@dataclass(frozen=True)
class Cost:
    """What one decode step stores, writes, reads and computes; bytes by buffer name, over the whole batch.

    context tokens are in every row after the step, the new one included. `flops` are those of the attend step (scores
    and weighted values, multiply and add counted apart); projections are not counted, as weights are not in the bytes.
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


def step_cost(
    spec: CacheSpec,
    *,
    context: int,
    batch: int,
    capacity: int | None,
    dtype,
    read: Mapping[str, int],
    written: Mapping[str, int],
    flops: int,
    entries_read: int,
) -> Cost:
    """The Cost of a step that reads `read` and writes `written` slots of each buffer in every row.

    flops and entries_read are those of one row. Raises ValueError for sizes below 1 or context above capacity.
    """
    capacity = context if capacity is None else capacity
    for name, size in (("context", context), ("batch", batch), ("capacity", capacity)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} is {size!r}; it must be a positive integer")
    if context > capacity:
        raise ValueError(f"context is {context}; the capacity of {capacity} holds no more")
    dtype = jnp.dtype(dtype)
    stored = spec.stored(batch, capacity, dtype)
    per_token = spec.per_token(batch, capacity, dtype)
    return Cost(
        stored=stored,
        written=_bytes(spec, written, batch, dtype),
        read=_bytes(spec, read, batch, dtype),
        flops=batch * flops,
        entries_read=batch * entries_read,
        fixed=_plain(sum(stored.values()) - per_token * capacity),
        per_token=_plain(per_token),
    )


def _bytes(spec: CacheSpec, slots: Mapping[str, int], batch: int, dtype) -> dict[str, int]:
    return {name: batch * count * spec[name].slot_bytes(dtype) for name, count in slots.items()}


def _plain(value: int | Fraction) -> int | Fraction:
    """A whole Fraction as an int."""
    return int(value) if value == int(value) else value
