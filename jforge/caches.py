"""Rows of a cache: taken, put, and set back to an earlier length.

A cache is a value: every function returns a new one and leaves its argument as it was, so the old one, kept, is a
snapshot. Caches are pytrees whose leaves have the rows first, those of `jforge.stack` (tuples of caches) too. `take`
and `put` run under jit; there, given a donated cache, `put` writes in place.

    drafts = caches.take(cache, [0, 0, 0])             # three futures of row 0
    cache = caches.put(cache, [2], fresh)              # row 2 has finished; another request takes its place
    cache = caches.rewind(att, cfg, cache, accepted)   # of four drafted tokens some are refused
"""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jforge.core.attention import Attention

Rows = Int[Array, "R"] | Int[np.ndarray, "R"] | Sequence[int]
Lengths = Int[Array, "B"] | Int[np.ndarray, "B"] | Sequence[int]


def take(cache, rows: Rows):
    """The cache of the given rows, in their order; one may come several times (a fork) or not at all.

    rows: integers of 0..B-1, one axis. Raises TypeError for other dtypes, ValueError for other shapes and, where they
    are concrete, for rows that there are not.
    """
    rows = _rows("rows", rows, _batch(cache))
    return jax.tree.map(lambda leaf: leaf[rows], cache)


def put(cache, rows: Rows, other):
    """The cache with the rows of `other`, a cache of the same kind, capacity and dtype, in the place of `rows`.

    rows: distinct integers of 0..B-1, as many as `other` has rows. Raises ValueError and TypeError as `take`, and for
    an `other` that does not fit.
    """
    batch = _batch(cache)
    rows = _rows("rows", rows, batch)
    if len(rows) != _batch(other):
        raise ValueError(f"rows has {len(rows)} entries; it must have {_batch(other)}, one for each row of other")
    if not isinstance(rows, jax.core.Tracer) and len(set(np.asarray(rows).tolist())) < len(rows):
        raise ValueError(f"rows is {np.asarray(rows).tolist()}; a row must not be put twice")
    if jax.tree.structure(cache) != jax.tree.structure(other):
        raise TypeError(f"other is a {type(other).__name__}; it must be laid out as cache, a {type(cache).__name__}")

    def write(path, leaf, new):
        if leaf.shape[1:] != new.shape[1:] or leaf.dtype != new.dtype:
            name, want = jax.tree_util.keystr(path), f"{leaf.dtype}{list(leaf.shape[1:])}"
            raise ValueError(
                f"other{name} has rows of {new.dtype}{list(new.shape[1:])}; they must be {want}, as cache's"
            )
        return leaf.at[rows].set(new)

    return jax.tree_util.tree_map_with_path(write, cache, other)


def rewind(att: Attention, cfg, cache, lengths: Lengths):
    """The cache as if row b had only seen its first lengths[b] tokens, as after drafted tokens that were refused.

    lengths: int, 0..cache.length of every row. Exact, or refused: a ring that has written over its oldest tokens and a
    state that has summed the new ones cannot go back, and nor can an open block whose rows are gone; a ValueError names
    that buffer and the row. Keep the cache from before the draft there: it is a value. To 0 tokens every row goes back.

    Under jit only caches without such buffers can be rewound, since a traced length has no value to look at (a
    ValueError says so); lengths above the row's are then the row's. Raises TypeError for other dtypes.
    """
    spec = att.cache_spec(cfg)
    spec.check(cache)
    new, traced = _lengths(lengths, cache.length)
    for name, buffer in spec.items():
        if not traced:
            old = np.asarray(cache.length)
            for row in np.flatnonzero(~np.asarray(buffer.rewinds(cfg, getattr(cache, name), old, new))):
                raise ValueError(
                    f"lengths[{row}] is {new[row]}; cache.{name} of row {row} cannot go back from {old[row]} tokens to "
                    "that: keep the cache from before, it is a value"
                )
        elif not buffer.always_rewinds:
            raise ValueError(f"lengths is traced; whether cache.{name} can go back to it is known outside of jit alone")
    length = jnp.asarray(new, jnp.int32)
    states = {name: _rewound(cfg, cache, name, buffer, length) for name, buffer in spec.items() if not buffer.has_slots}
    return replace(cache, **states, length=length)


def _rewound(cfg, cache, name: str, buffer, length):
    """A state of rows that have seen `length` tokens: made anew where it can be, else zero in an empty row."""
    leaf = getattr(cache, name)
    if buffer.remade is not None:
        return buffer.remade(cfg, cache, length).astype(leaf.dtype)
    return jnp.where((length == 0).reshape(-1, *[1] * (leaf.ndim - 1)), 0, leaf)


def _lengths(lengths, held):
    """(the lengths of every row, 0..held; whether they or those of the cache are traced); a NumPy array if not."""
    traced = any(isinstance(a, jax.core.Tracer) for a in (lengths, held))
    lengths = jnp.asarray(lengths) if traced else np.asarray(lengths)
    if lengths.shape != held.shape:
        raise ValueError(f"lengths has shape {lengths.shape}; it must be {held.shape}, one for each row of the cache")
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"lengths has dtype {lengths.dtype}; it must be an integer dtype")
    if traced:
        return jnp.clip(lengths, 0, held), True
    for row in np.flatnonzero((lengths < 0) | (lengths > np.asarray(held))):
        raise ValueError(f"lengths[{row}] is {lengths[row]}; it must lie in 0..{held[row]}, what the row has seen")
    return lengths, False


def _rows(name: str, rows, batch: int) -> Int[Array, "R"]:
    rows = jnp.asarray(rows)
    if rows.ndim != 1:
        raise ValueError(f"{name} has shape {rows.shape}; it needs one axis")
    if rows.size and not jnp.issubdtype(rows.dtype, jnp.integer):
        raise TypeError(f"{name} has dtype {rows.dtype}; it must be an integer dtype")
    if not isinstance(rows, jax.core.Tracer):
        for at in np.flatnonzero((np.asarray(rows) < 0) | (np.asarray(rows) >= batch)):
            raise ValueError(f"{name}[{at}] is {rows[at]}; it must lie in 0..{batch - 1}, the rows of the cache")
    return rows.astype(jnp.int32)


def _batch(cache) -> int:
    leaves = jax.tree.leaves(cache)
    if not leaves or any(getattr(leaf, "ndim", 0) == 0 or len(leaf) != len(leaves[0]) for leaf in leaves):
        raise TypeError(f"cache is a {type(cache).__name__}; it must be a cache, whose leaves have one row each first")
    return len(leaves[0])
