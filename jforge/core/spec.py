"""Cache specs: the one description from which zeros, bytes, checks, poison and tables are derived."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jforge.core.config import FrozenDict
from jforge.core.softmax import wider

Lengths = Int[Array, "B"] | Int[np.ndarray, "B"]
CACHE_DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Buffer:
    """One leaf of a cache: batch, then slots, then `shape`. At least one slot, even if it never holds data.

    dims:  the axis letters, e.g. ("B", "S", "K", "H"); a buffer without a slot axis has no second letter "S" or "W".
    shape: sizes of the axes after the slots (after the batch when there are none).
    every: tokens per slot, 1 for one slot a token, m for one entry a block of m; None for a size that never grows.
    first: tokens that the first slot needs, if not `every` (blocks that overlap).
    limit: most slots a row can use (a ring's window); None for no limit. every=None and limit=None: no slot axis.
    dtype: None follows the cache's dtype; "float32" means float32 or wider (states, sums); "float8_..." is itself.
    filled: how many leading slots hold data, from (cfg, length); None derives it from the fields above.
    steady: of a ring or a state, (cfg, length) -> int: a rewind that leaves it as it is, is exact; None: no rewind is.
    remade: of a state, (cfg, cache, length) -> its content, made from the other buffers: any rewind is exact.
    """

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    every: int | None = 1
    first: int | None = None
    limit: int | None = None
    dtype: str | None = None
    filled: Callable[[Any, Array], Array] | None = None
    steady: Callable[[Any, Array], Array] | None = None
    remade: Callable[[Any, Any, Array], Array] | None = None

    @property
    def has_slots(self) -> bool:
        return self.every is not None or self.limit is not None

    def slots(self, capacity: int) -> int:
        """Slots of a row in a cache for `capacity` tokens."""
        if not self.has_slots:
            return 1
        grown = capacity if self.every is None else self.entries(capacity)
        return max(1, grown if self.limit is None else min(grown, self.limit))

    def entries(self, tokens):
        """Slots that `tokens` tokens (int or array) fill in a buffer that grows: 0 before the first is complete."""
        first = self.every if self.first is None else self.first
        count = (tokens - first) // self.every + 1
        return max(0, count) if isinstance(count, int) else jnp.maximum(0, count)

    def capacity(self, slots: int) -> int | None:
        """Tokens that a buffer of so many slots has room for, the last one before the next slot; None without an end.

        A ring of its full size never overflows, a shorter one holds what it has slots for.
        """
        if self.limit is not None:
            return None if slots == self.limit else slots
        return (self.every if self.first is None else self.first) + slots * self.every - 1

    def valid(self, cfg, length: Int[Array, "B"]) -> Int[Array, "B"]:
        """How many leading slots of each row hold data after `length` tokens (before any cap by the capacity)."""
        if self.filled is not None:
            return self.filled(cfg, length)
        count = length if self.every is None else self.entries(length)
        return count if self.limit is None else jnp.minimum(count, self.limit)

    @property
    def always_rewinds(self) -> bool:
        """Whether nothing in it is ever written over, or all of it can be made anew."""
        return self.remade is not None or (self.has_slots and self.limit is None)

    def rewinds(self, cfg, leaf, old: Lengths, new: Lengths) -> Array | np.ndarray:
        """bool[B]: whether a row that has seen `old` tokens can become one that has seen the first `new` of them.

        A ring has lost what it wrote over, a state what it summed. To nothing at all every buffer goes back.
        """
        if self.always_rewinds:
            return new == new
        exact = (new == old) | (new == 0)
        if self.steady is not None:
            exact |= self.steady(cfg, new) == self.steady(cfg, old)
        return exact | (old <= leaf.shape[1]) if self.has_slots else exact

    def dtype_in(self, dtype) -> jnp.dtype:
        """The dtype of this buffer in a cache of `dtype`. 8 bits are for slots: states beside them stay bfloat16."""
        dtype = jnp.dtype(dtype)
        if dtype.itemsize == 1 and not self.has_slots:
            dtype = jnp.dtype("bfloat16")
        if self.dtype is None:
            return dtype
        return jnp.dtype(self.dtype) if self.dtype.startswith("float8") else wider(self.dtype, dtype)

    def slot_bytes(self, dtype) -> int:
        return math.prod(self.shape) * self.dtype_in(dtype).itemsize

    def full_shape(self, batch: int, capacity: int) -> tuple[int, ...]:
        return (batch, self.slots(capacity), *self.shape) if self.has_slots else (batch, *self.shape)


@dataclass(frozen=True)
class CacheSpec(Mapping):
    """{name: Buffer} plus the cache class that they are the leaves of; every cache also has `length: int32[B]`.

    borrowed: {name: Buffer} of another layer's cache, which a layer without keys of its own reads (jforge.stack).
    """

    cls: type
    buffers: Mapping[str, Buffer]
    borrowed: Mapping[str, Buffer] = FrozenDict()

    def __getitem__(self, name: str) -> Buffer:
        return self.buffers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.buffers)

    def __len__(self) -> int:
        return len(self.buffers)

    def init(self, batch: int, capacity: int, dtype=jnp.bfloat16):
        """An empty cache of zeros. Raises ValueError for sizes below 1, TypeError for a dtype no cache has."""
        for name, size in (("batch", batch), ("capacity", capacity)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} is {size!r}; it must be a positive integer")
        if str(jnp.dtype(dtype)) not in CACHE_DTYPES:
            raise TypeError(f"dtype is {jnp.dtype(dtype)}; a cache may have {', '.join(CACHE_DTYPES)}")
        leaves = {n: jnp.zeros(b.full_shape(batch, capacity), b.dtype_in(dtype)) for n, b in self.items()}
        return self.cls(**leaves, length=jnp.zeros(batch, jnp.int32))

    def check(self, cache) -> None:
        """Raise ValueError or TypeError unless `cache` has this spec's leaves, in some batch, capacity and dtype."""
        if type(cache) is not self.cls:  # a cache with more leaves would lose them
            raise TypeError(f"cache is a {type(cache).__name__}; it must be a {self.cls.__name__}")
        if cache.length.ndim != 1 or cache.length.dtype != jnp.int32:
            raise TypeError(f"cache.length is {cache.length.dtype}{list(cache.length.shape)}; it must be int32[B]")
        capacity = None
        for name, buffer in self.items():
            leaf = getattr(cache, name)
            shape = leaf.shape
            if buffer.has_slots and buffer.every == 1 and buffer.limit is None and len(shape) > 1:
                capacity = shape[1] if capacity is None else capacity
            rest = shape[2:] if buffer.has_slots else shape[1:]
            good = len(shape) == len(buffer.dims) and shape[0] == cache.length.shape[0] and rest == buffer.shape
            if good and buffer.has_slots:
                known = capacity is not None
                good = shape[1] == buffer.slots(capacity) if known else 1 <= shape[1] <= (buffer.limit or shape[1])
            if not good:
                want = f"{' '.join(buffer.dims)} with {buffer.shape} after the slots and capacity {capacity}"
                raise ValueError(f"cache.{name} has shape {shape}; it must be {want}")

    def capacity(self, cache) -> int | None:
        """Tokens that a row of `cache` has room for, None without an end: the least that one of its buffers holds."""
        held = (buffer.capacity(getattr(cache, name).shape[1]) for name, buffer in self.items() if buffer.has_slots)
        return min((tokens for tokens in held if tokens is not None), default=None)

    def stored(self, batch: int, capacity: int, dtype) -> dict[str, int]:
        """Bytes of every buffer, by name."""
        return {n: batch * b.slots(capacity) * b.slot_bytes(dtype) for n, b in self.items()}

    def per_token(self, batch: int, capacity: int, dtype) -> Fraction:
        """Bytes that one more token of capacity adds, over all buffers that still grow at `capacity`."""
        total = Fraction(0)
        for buffer in self.values():
            if buffer.every is not None and (buffer.limit is None or capacity // buffer.every <= buffer.limit):
                total += Fraction(batch * buffer.slot_bytes(dtype), buffer.every)
        return total

    def used(self, cfg, cache) -> dict[str, Bool[Array, "B ..."]]:
        """Which elements of each leaf hold data, as masks that broadcast against the leaf."""
        masks = {}
        for name, buffer in self.items():
            leaf = getattr(cache, name)
            if buffer.has_slots:
                mask = jnp.arange(leaf.shape[1]) < buffer.valid(cfg, cache.length)[:, None]
            else:
                mask = jnp.ones(leaf.shape[0], bool)
            masks[name] = mask.reshape(mask.shape + (1,) * (leaf.ndim - mask.ndim))
        return masks

    def poison(self, cfg, cache, value: float = jnp.nan):
        """The cache with `value` in every slot that holds no data: no output may ever show it."""
        used = self.used(cfg, cache)
        filled = {n: jnp.where(used[n], getattr(cache, n), value).astype(getattr(cache, n).dtype) for n in self}
        return self.cls(**filled, length=cache.length)


def cache_class(cls: type) -> type:
    """Make a frozen dataclass of arrays a pytree; CacheSpec checks its leaves.

    Run-time type checkers must leave its constructor alone: JAX rebuilds caches from shapes and other stand-ins.
    """
    cls.__no_type_check__ = True
    return jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))
