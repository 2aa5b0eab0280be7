"""How results are judged: one table of tolerances and the few metrics that go with it."""

import math
from typing import NamedTuple

import jax
import numpy as np

OUT = {"float64": 1e-10, "float32": 1e-5, "float16": 1e-3, "bfloat16": 4e-3}
"""Largest relative norm error of an output, by the dtype of its inputs."""
LSE = {"float64": 1e-10, "float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-3}
"""Largest error of a log-sum-exp: absolute up to |lse| = 1, relative beyond, where float32 runs out of digits."""

STOCK_STATES = 1e-4
"""Of an output of transformers' delta rules and state spaces in float32, whose own error is up to half of it."""


def relative(got, want) -> float:
    """max |got - want| / max |want|, inf where anything is not finite; absolute where want is all zero."""
    got, want = map(_float64, (got, want))
    if got.shape != want.shape or not finite((got, want)):
        return math.inf
    if want.size == 0:
        return 0.0
    return float(np.abs(got - want).max() / (np.abs(want).max() or 1.0))


def worst_vector(got, want) -> float:
    """max ||got - want|| / ||want|| over the vectors on the last axis: the worst token, and head in a cache."""
    got, want = map(_float64, (got, want))
    if got.shape != want.shape or not finite((got, want)):
        return math.inf
    return float(np.max(np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)))


def worst_head(got, want) -> float:
    """max over (b, n) of ||got - want|| / ||want|| for outs B T N V; a head whose reference is 0 must be exactly 0,
    and where either is not finite, the error is inf.
    """
    return _worst_norm(got, want, (1, 3))


def worst_row(got, want) -> float:
    """max ||got - want|| / ||want|| over the rows on the last axis, for scores and states.

    -inf must meet -inf and counts no further; a row whose reference is 0 must be exactly 0; NaN gives inf.
    """
    got, want = map(_float64, (got, want))
    if got.shape != want.shape or (np.isneginf(got) != np.isneginf(want)).any():
        return math.inf
    return _worst_norm(*(np.where(np.isneginf(a), 0, a) for a in (got, want)), -1)


def _worst_norm(got, want, axis) -> float:
    got, want = map(_float64, (got, want))
    if got.shape != want.shape or not finite((got, want)):
        return math.inf
    difference, norm = (np.linalg.norm(a, axis=axis) for a in (got - want, want))
    error = np.where(norm > 0, difference / np.where(norm > 0, norm, 1), np.where(difference > 0, math.inf, 0))
    return float(error.max(initial=0))


def different(got, want) -> float:
    """0 where the two are equal in every place, else inf."""
    got, want = np.asarray(got), np.asarray(want)
    return 0.0 if got.shape == want.shape and (got == want).all() else math.inf


def lse_error(got, want) -> float:
    """max |got - want| / max(1, |want|), where -inf must meet -inf; NaN and other infinities give inf."""
    got, want = map(_float64, (got, want))
    if got.shape != want.shape or (np.isneginf(got) != np.isneginf(want)).any():
        return math.inf
    seen = ~np.isneginf(want)
    got, want = got[seen], want[seen]
    if not finite((got, want)):
        return math.inf
    return float((np.abs(got - want) / np.maximum(1, np.abs(want))).max(initial=0))


def caches(spec, cfg, got, want) -> float:
    """The worst relative error over the valid slots of two caches of one spec; inf where the lengths differ."""
    if (np.asarray(got.length) != np.asarray(want.length)).any():
        return math.inf
    used = spec.used(cfg, want)

    def blank(cache, name: str) -> np.ndarray:
        return np.where(used[name], np.asarray(getattr(cache, name), np.float64), 0)

    return max((relative(blank(got, n), blank(want, n)) for n in spec), default=0.0)


def _float64(array) -> np.ndarray:
    """As NumPy, from a tensor on a GPU too."""
    return np.asarray(array.cpu() if hasattr(array, "cpu") else array, np.float64)


def finite(tree) -> bool:
    return all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(tree))


class Picks(NamedTuple):
    """How many rows of picks there were, how many of them a tie left open, and how many are wrong."""

    rows: int
    tied: int
    wrong: int


def picks(got, want, scores, k: int, epsilon: float) -> Picks:
    """Compare what two implementations pick as the k best of `scores`, where rounding may decide a tie either way.

    margin = (k-th largest score) - (the next one). Where it is at least `epsilon`, the sets must be equal; below it the
    row is tied, and the sets may differ. In every row the i-th largest score of each list must be within `epsilon` of
    the i-th largest of all. So lists made by scores within epsilon / 2 of these are right. Order never counts. A row is
    wrong too where a list has a token twice, one of score -inf, or not min(k, scores above -inf) tokens.

    got, want: int [..., L], entries outside 0..S-1 for none. scores: [..., S], the most exact there are; -inf where a
    query does not see, +inf for what is forced. Raises ValueError for shapes that do not fit, NaN in scores, k < 1 and
    epsilon < 0.
    """
    lists, scores = [np.asarray(a) for a in (got, want)], np.asarray(scores, np.float64)
    for name, array in zip(("got", "want"), lists, strict=True):
        if array.shape[:-1] != scores.shape[:-1]:
            raise ValueError(f"{name} has shape {array.shape}; the axes before its last must be {scores.shape[:-1]}")
    if np.isnan(scores).any():
        raise ValueError("scores holds NaN; it must hold numbers, -inf for what may not be picked")
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise ValueError(f"k is {k!r}; it must be a positive integer")
    if not epsilon >= 0:
        raise ValueError(f"epsilon is {epsilon!r}; it must be at least 0")
    best = _descending(scores, k + 1)
    tied = (_distance(best[..., k - 1], best[..., k]) < epsilon) & (best[..., k] > -math.inf)
    times = [(np.arange(scores.shape[-1]) == a[..., None]).sum(axis=-2) for a in lists]  # each token in each list
    right = tied | (times[0] == times[1]).all(axis=-1)
    for n in times:
        ranked = _descending(np.where(n > 0, scores, -math.inf), k)
        right &= (n <= (scores > -math.inf)).all(axis=-1) & (n.sum(axis=-1) == (best[..., :k] > -math.inf).sum(axis=-1))
        right &= (_distance(ranked, best[..., :k]) <= epsilon).all(axis=-1)
    return Picks(right.size, int(tied.sum()), int((~right).sum()))


def _descending(scores: np.ndarray, count: int) -> np.ndarray:
    """The `count` largest scores of each row, largest first; -inf where there are no more."""
    missing = [(0, 0)] * (scores.ndim - 1) + [(0, max(0, count - scores.shape[-1]))]
    return np.pad(np.sort(scores, axis=-1)[..., ::-1], missing, constant_values=-math.inf)[..., :count]


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b|, 0 where both are the same infinity."""
    gap = np.subtract(a, b, out=np.zeros_like(a), where=a != b)
    return np.abs(gap, out=gap)
