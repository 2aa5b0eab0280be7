"""Caches of layers that no mechanism of jforge computes: what they keep, and what a decode step touches of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jforge.core.config import FrozenDict
from jforge.core.spec import Buffer, CacheSpec
from jforge.cost import Cost, Work, call_cost

KEPT = "kept"
"""The `mechanism` of such a layer; its Config is a Kept."""


@dataclass(frozen=True)
class Kept:
    """The buffers of one layer's cache, by name.

    A step reads all that the slots hold and writes one; a state it reads and writes whole.

    given:    buffers made from another input before the first step (the keys of an encoder), which are only read.
    picked:   {buffer: (most, block)} where an indexer picks whole blocks, `most` slots in all, beside the open block.
    borrowed: buffers of another layer's cache, which this one reads.
    """

    buffers: Mapping[str, Buffer]
    given: tuple[str, ...] = ()
    picked: Mapping[str, tuple[int, int]] = FrozenDict()
    borrowed: Mapping[str, Buffer] = FrozenDict()

    def __post_init__(self):
        for name in ("buffers", "picked", "borrowed"):
            object.__setattr__(self, name, FrozenDict(getattr(self, name)))

    @property
    def spec(self) -> CacheSpec:
        return CacheSpec(Kept, self.buffers, self.borrowed)

    def cost(self, *, context: int, batch: int = 1, capacity: int | None = None, dtype="bfloat16") -> Cost:
        """Bytes of one more token, as `Attention.cost` counts them; flops are not known and 0."""
        return call_cost(self.spec, self._work, context, batch, capacity, dtype, 1, False)

    def _work(self, context: int, capacity: int, new: int, closing: bool) -> Work:
        read, written = {}, {}
        for name, buffer in {**self.borrowed, **self.buffers}.items():
            held = buffer.slots(context)
            most, block = self.picked.get(name, (held, 1))
            closed = held // block * block
            read[name] = min(closed, most) + held - closed
            if name not in self.given and name in self.buffers:
                ends = not buffer.has_slots or closing or buffer.every in (None, 1) or context % buffer.every == 0
                written[name] = int(ends)
        return Work(read=read, written=written, flops=0, entries_read=max(map(int, read.values()), default=0))


def fixed(*shape: int, dims: str | None = None, dtype: str | None = None) -> Buffer:
    """A state of this shape in every row; dtype None: the cache's."""
    letters = dims.split() if dims else [f"X{n}" for n in range(len(shape))]
    return Buffer(("B", *letters), shape, every=None, dtype=dtype)


def slots(*shape: int, limit: int | None = None, dtype: str | None = None, more: int = 0) -> Buffer:
    """A slot a token, or a ring of `limit` of them; more: slots that are there before the first token."""
    letters = ("K", "H") if len(shape) == 2 else ("C",)
    return Buffer(("B", "W" if limit else "S", *letters), shape, limit=limit, dtype=dtype, first=1 - more)


def keys_and_values(count: int, width: int, limit: int | None = None, more: int = 0) -> dict[str, Buffer]:
    """K heads of H channels a slot."""
    return {name: slots(count, width, limit=limit, more=more) for name in ("k", "v")}


def of_encoder(tokens: int, heads: int, width: int) -> dict[str, Any]:
    """Fields of a Kept: keys and values of so many tokens of an encoder, the same in every step."""
    names = ("k_cross", "v_cross")
    return {"buffers": {name: fixed(tokens, heads, width, dims="E K H") for name in names}, "given": names}


def ring_of(spec: CacheSpec, window: int) -> Kept:
    """A cache with one slot a token, cut to the last `window` tokens."""
    cut = {
        name: replace(buffer, limit=window, dims=tuple("W" if x == "S" else x for x in buffer.dims))
        for name, buffer in spec.items()
    }
    return Kept(cut)
