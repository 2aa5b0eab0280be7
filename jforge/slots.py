"""What a decode step does to each slot of a cache, found by experiment: written, read, written over, kept.

    watch(att, params, cfg, x, cache)          # {buffer: a code of KINDS for each step and slot}

Nothing here asks the mechanism what it reads: a slot is spoiled, and whatever then comes out otherwise has read it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jforge import ops
from jforge.core.attention import Attention
from jforge.core.params import drawn
from jforge.core.share import Source
from jforge.core.step import Queries
from jforge.ops.watch import watching

EMPTY, KEPT, READ, WRITTEN, OVER, ENTRY, STATE = range(7)
KINDS = {  # code: (what the legend says, letter in the cell, colour, colour of the letter); Okabe and Ito's palette
    EMPTY: ("empty", "", "#ffffff", "black"),
    KEPT: ("kept, not read", "-", "#dddddd", "black"),
    READ: ("read", "r", "#56b4e9", "black"),
    WRITTEN: ("written: a new token", "w", "#e69f00", "black"),
    OVER: ("written over: the old token is lost", "x", "#d55e00", "white"),
    ENTRY: ("written: several tokens in one entry", "e", "#00664b", "white"),
    STATE: ("state, changed", "s", "#0072b2", "white"),
}
FILLS = (math.nan, 0.0, 1e4, -1e4)
"""What a slot is spoiled with. Any sum shows NaN. A maximum may not (XLA's on a CPU, of many rows), nor what is picked
by it: those show the others, which are too large to hide below another's score."""


class Lender(NamedTuple):
    """The layer whose cache a layer without keys of its own reads."""

    att: Attention
    params: Mapping[str, jax.Array]
    cfg: Any


def random_layer(att: Attention, cfg, tokens: int) -> tuple[dict[str, jax.Array], np.ndarray]:
    """(params, x) in float32 to experiment with, x: 1 T D; the same at every call."""
    rng = np.random.default_rng(0)  # NumPy's: drawing with JAX would compile a program for each shape
    params = drawn(lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32), att.shapes(cfg))
    x = np.random.default_rng(1).standard_normal((1, tokens, cfg.hidden_size)).astype(np.float32)
    return params, x


def watch(att: Attention, params, cfg, x, cache, lender: Lender | None = None) -> dict[str, np.ndarray]:
    """{buffer: a code of KINDS for each step and slot} of decode steps over the tokens of x, 1 T D, by experiment.

    A slot was written if it is another one after the step. It was read if the output, or what an op of the step
    picks or returns, is another one once the slot holds something else before the step. cache: one row. A buffer
    without slots counts as one. lender: whose cache this is, where cfg has kv_shared; what is watched then is each
    step of the reader, after the lender has written its own.
    """
    spec, found = (att.cache_spec(cfg) if lender is None else lender.att.cache_spec(lender.cfg)), {}
    step = jax.jit(partial(_step if lender is None else _read, att, cfg))
    lend = lender and jax.jit(lambda params, x, cache: lender.att.decode(params, lender.cfg, x, cache)[1])
    x = np.asarray(x)  # and all that is spoiled and compared: only the step itself is compiled
    for t in range(x.shape[1]):
        cache = lend(lender.params, x[:, t : t + 1], cache) if lender else cache
        spoiled, of = _spoiled(spec, cache)
        after, shown = step(params, np.repeat(x[:, t : t + 1], len(spoiled.length), axis=0), spoiled)
        other = np.any([_other(array) for array in shown], axis=0)
        after = jax.tree.map(lambda a: np.asarray(a)[:1], after)
        for n, used in spec.used(cfg, replace(cache, length=jnp.asarray(cache.length))).items():
            buffer, read = spec[n], other[of[n]].reshape(len(FILLS), -1).any(axis=0)
            old, new = (np.asarray(getattr(c, n), np.float64).reshape(len(read), -1) for c in (cache, after))
            held = np.broadcast_to(np.asarray(used).reshape(-1), len(read))
            fresh = WRITTEN if buffer.every in (None, 1) else ENTRY
            write = np.where(held, OVER if buffer.has_slots else STATE, fresh)
            kept = np.where(read, READ, np.where(held, KEPT, EMPTY))
            found.setdefault(n, []).append(np.where((old != new).any(axis=-1), write, kept))
        cache = after
    return {n: np.stack(rows) for n, rows in found.items()}


def _step(att: Attention, cfg, params, x, cache):
    """(the cache after a decode step, [the output, and all that its ops were told to read and returned])."""
    return _shown(lambda: att.decode(params, cfg, x, cache))


def _read(att: Attention, cfg, params, x, cache):
    """The same of a layer that reads this cache, which has its lender's entry of x already."""
    last = cache.length[:, None] - 1
    rows = Queries(x, last, last, jnp.ones(last.shape, bool))
    source = Source(rows, None, cache, dict.fromkeys(att.cache_spec(cfg).borrowed))
    return _shown(lambda: (att.read(params, cfg, x, source, ops), cache))


def _shown(call: Callable):
    """(the cache, [y, and what its ops were told and returned]) of a call that returns (y, cache)."""
    shown = []

    def keep(op, *arrays, **options):
        picks = [a for a in (*arrays, *options.values()) if getattr(a, "dtype", None) == jnp.int32]
        result = op(*arrays, **options)
        shown.extend([*picks, result])
        return result

    with watching(keep):
        y, after = call()
    return after, jax.tree.leaves([y, shown])


def _other(array) -> np.ndarray:
    """bool[rows]: which rows are not as the first one. NaN is another value, and -inf, of what is not seen, is one."""
    rows = np.asarray(array, np.float64).reshape(len(array), -1)
    near = 1e-6 * np.abs(rows[0], where=np.isfinite(rows[0]), out=np.zeros_like(rows[0])).max()
    with np.errstate(invalid="ignore"):  # -inf less -inf
        return ~((rows == rows[0]) | (np.abs(rows - rows[0]) <= near)).all(axis=-1)


def _spoiled(spec, cache):
    """(row 0 as it is, then one row for each fill and slot in which that slot is spoiled; {buffer: the rows of its}).

    Rows do not see each other, so one call asks all slots.
    """
    counts = {n: getattr(cache, n).shape[1] if buffer.has_slots else 1 for n, buffer in spec.items()}
    rows, of, leaves = 1 + len(FILLS) * sum(counts.values()), {}, {}
    start = 1
    for n, count in counts.items():
        leaf = np.repeat(np.asarray(getattr(cache, n)), rows, axis=0)
        of[n] = slice(start, start + len(FILLS) * count)
        for i, fill in enumerate(FILLS):
            at = start + i * count + np.arange(count)
            leaf[(at, np.arange(count)) if spec[n].has_slots else at] = fill
        leaves[n], start = leaf, of[n].stop
    return replace(cache, **leaves, length=np.repeat(cache.length, rows)), of
