"""Where a result is wrong, and which slots it must have read for that."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from jforge.harness.op import Inputs, Op

AXES = {"B": "row", "T": "token", "N": "head", "I": "head", "H": "key channel", "V": "channel", "S": "slot",
        "L": "entry"}  # fmt: skip
READS = "it reads "
VECTORS = "VS"  # last axes whose entries are judged together


@dataclass(frozen=True)
class Place:
    """Where a result is worst, what stands there and what should, and how many of its vectors or numbers are wrong."""

    at: dict[str, int]
    got: float
    wanted: float
    wrong: str

    def __str__(self) -> str:
        at = ", ".join(f"{axis} {i}" for axis, i in self.at.items())
        return f"{at}: got {self.got:.6g}, wanted {self.wanted:.6g}; {self.wrong}"


def place(got: np.ndarray, want: np.ndarray, axes: str, limit: float) -> Place:
    """The first NaN where there should be none, or else the largest error against the norm of its vector."""
    together = axes[-1] in VECTORS
    nan = np.isnan(got) & ~np.isnan(want)
    with np.errstate(all="ignore"):
        gap = np.where((got == want) | (np.isnan(got) & np.isnan(want)), 0, np.abs(got - want))
        gap = np.nan_to_num(gap, nan=np.inf, posinf=np.inf)
        finite = np.where(np.isfinite(want), want, 0)
        norm = np.linalg.norm(finite, axis=-1, keepdims=True) if together else np.maximum(1, np.abs(finite))
        each = np.where(gap > 0, gap / norm, 0)
        wrong = (np.linalg.norm(each, axis=-1) if together else each) > limit
    index = tuple(int(i) for i in np.unravel_index(np.argmax(nan if nan.any() else each), each.shape))
    at = dict(zip((AXES[letter] for letter in axes), index, strict=False))
    kind = "vectors" if together else "numbers"
    return Place(at, float(got[index]), float(want[index]), f"{int(wrong.sum())} of {wrong.size} {kind} are wrong")


def leak(op: Op, inputs: Inputs, row: int, run: Callable[[Inputs], np.ndarray]) -> str:
    """Which slots of a row hold NaN that reaches its result, though no query may read them.

    run: Inputs -> the result. Each buffer's NaN is tried alone, then by bisection the first and the last slot that
    matter: 2 log2(slots) calls a buffer.
    """
    given = {**inputs.arrays, **inputs.options}
    poison = {n: np.isnan(a.astype(np.float64)) for n, a in given.items() if isinstance(a, np.ndarray)}
    poison = {name: mask for name, mask in poison.items() if mask.any()}

    def leaks(name: str | None, slots: Sequence[int] = ()) -> bool:
        clean = {n: np.where(mask, np.zeros((), given[n].dtype), given[n]) for n, mask in poison.items()}
        if name is not None:
            here = np.zeros(poison[name].shape, bool)
            _line(op, name, here, row)[list(slots)] = True
            clean[name] = np.where(here & poison[name], given[name], clean[name])
        arrays, options = ({n: clean.get(n, a) for n, a in part.items()} for part in (inputs.arrays, inputs.options))
        return bool(np.isnan(run(Inputs(arrays, options))[row]).any())

    if leaks(None):
        return "it makes NaN where no input holds any"
    found = []
    for name in poison:
        mask = _line(op, name, poison[name], row)
        slots = np.flatnonzero(mask.reshape(len(mask), -1).any(axis=1)).tolist()
        if not slots or not leaks(name, slots):
            continue
        first, last = _ends(slots, partial(leaks, name))
        kind, count = "slot" if "S" in _axes(op, name) else "part", sum(first <= slot <= last for slot in slots)
        several = f"{first} to {last}" if count == last - first + 1 else f"between {first} and {last}"
        found.append(f"{kind} {first} of {name}" if first == last else f"{kind}s {several} of {name}")
    return f"{READS}{' and '.join(found)}, which it must not" if found else "NaN of several rows or buffers together"


def _axes(op: Op, name: str) -> str:
    return op.axes.get(name, "BS")  # a scale, one a slot


def _line(op: Op, name: str, array: np.ndarray, row: int) -> np.ndarray:
    """A view of a row of a buffer with its slots, or parts, on the first axis."""
    axes = _axes(op, name)
    return np.moveaxis(array, axes.index("B"), 0)[row] if "S" not in axes[:2] else array[row]


def _ends(slots: list[int], leaks: Callable[[Sequence[int]], bool]) -> tuple[int, int]:
    """The first and the last slot that matter: `leaks` of all up to the one, and of all from the other on."""
    first = _least(len(slots), lambda n: leaks(slots[: n + 1]))
    last = _least(len(slots), lambda n: leaks(slots[len(slots) - 1 - n :]))
    return slots[first], slots[-1 - last]


def _least(count: int, holds: Callable[[int], bool]) -> int:
    """The least of 0 .. count - 1 from which on it holds; it holds for the last."""
    low, high = 0, count - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
