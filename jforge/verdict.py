"""What a law found: how wrong, where first, and which function of the mechanism that points at.

Laws compare arrays through `outputs` and `caches`, which measure as `jforge.core.compare` does and name the first
place that is off; `Report` puts the rows together.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from jforge.core import compare

SHOWN = 8  # pairs of a wrong mask that a note spells out


@dataclass(frozen=True)
class Where:
    """The first place where a law is broken; what does not apply is None.

    of: what was computed (decode, prefill, chunks of ...). row: of the batch. token: position in the row.
    buffer, slot: of the cache, for a buffer without slots slot 0. got, want: the numbers that differ most there.
    pairs: the (query, key) tokens that `visible`, or what is read, has wrong. source: file:line of an exception.
    """

    of: str = ""
    row: int | None = None
    token: int | None = None
    buffer: str | None = None
    slot: int | None = None
    got: float | None = None
    want: float | None = None
    pairs: tuple[tuple[int, int], ...] | None = None
    source: str | None = None

    def __str__(self) -> str:
        names = ("row", "token", "buffer", "slot")
        place = ", ".join(f"{n} {getattr(self, n)}" for n in names if getattr(self, n) is not None)
        text = ", ".join(part for part in (self.of, place) if part)
        if self.got is not None:
            text += f": got {self.got:.6g}, want {self.want:.6g}"
        if self.pairs:
            more = ", ..." if len(self.pairs) > SHOWN else ""
            text += f"(query, key) {', '.join(map(str, self.pairs[:SHOWN]))}{more}"
        return text + (f" at {self.source}" if self.source else "")

    def plain(self) -> dict[str, Any]:
        """As JSON: what applies. Numbers that are not finite are words."""
        kept = {name: value for name, value in asdict(self).items() if value not in (None, "")}
        return {n: str(v) if isinstance(v, float) and not math.isfinite(v) else v for n, v in kept.items()}


class Found(NamedTuple):
    """What a law measured; the note says what `where` does not."""

    error: float
    note: str = ""
    where: Where | None = None


def worst(*found: Found) -> Found:
    """The one of the largest error, the first among equals."""
    return max(found, key=lambda f: f.error)


def outputs(of: str, got, want, dtype: str = "float64") -> Found:
    """compare.relative of B T D, and the first token that is off by more than compare.OUT[dtype], in the row order."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    error = compare.relative(got, want)
    if got.shape != want.shape:
        return Found(error, f"shape {got.shape} for {want.shape}", Where(of))
    row, token, channel = _first(got, want, compare.OUT[dtype], (1, 0, 2))
    if row is None:
        return Found(error)
    at = row, token, channel
    return Found(error, "", Where(of, row=row, token=token, got=float(got[at]), want=float(want[at])))


def caches(of: str, used: dict[str, np.ndarray], got, want) -> Found:
    """compare.caches, and the first slot that is off. used: masks by buffer of what holds data in `want`."""
    lengths = np.asarray(got.length), np.asarray(want.length)
    for row in np.flatnonzero(lengths[0] != lengths[1]):
        values = (float(a[row]) for a in lengths)
        return Found(math.inf, "", Where(of, int(row), None, "length", None, *values))
    found = [Found(0.0)]
    for name, mask in used.items():
        a, b = (np.where(mask, np.asarray(getattr(cache, name), np.float64), 0) for cache in (got, want))
        found.append(_buffer(of, name, a, b))
    return worst(*found)


def _buffer(of: str, name: str, got: np.ndarray, want: np.ndarray) -> Found:
    error = compare.relative(got, want)
    if got.shape != want.shape:
        return Found(error, f"shape {got.shape} for {want.shape}", Where(of, buffer=name))
    flat = [a.reshape(*a.shape[:2], -1) for a in (got, want)]
    row, slot, channel = _first(*flat, compare.OUT["float64"], (1, 0, 2))
    if row is None:
        return Found(error)
    values = (float(a[row, slot, channel]) for a in flat)
    return Found(error, "", Where(of, row, None, name, slot, *values))


def _first(got: np.ndarray, want: np.ndarray, allowed: float, order) -> tuple[int | None, ...]:
    """(row, token or slot, channel): the earliest token or slot that is off, its first row, and there the worst."""
    scale = np.abs(want[np.isfinite(want)]).max(initial=0) or 1.0
    gap = np.abs(got - want) / scale
    gap = np.where(np.isfinite(got) & np.isfinite(want), gap, math.inf)
    wrong = (gap > allowed).any(axis=2)
    if not wrong.any():
        return None, None, None
    place, row = np.argwhere(wrong.T)[0]
    return int(row), int(place), int(gap[row, place].argmax())


@dataclass(frozen=True)
class Row:
    """One law: the error against its tolerance, what went wrong if anything did, and where first.

    The error of L7, L8 and L9 is a count of violations, an int, or inf where an exception came. `compiled` says which
    run this is: "cheaply" (few of XLA's optimisations) or "optimised", as users compile. A law that fails the first
    way is run the second way, and this is that row; `before` is then what the first run said.
    """

    law: str
    error: float
    tolerance: float
    note: str = ""
    title: str = ""
    where: Where | None = None
    compiled: str = "optimised"
    before: "Row | None" = None

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance

    @property
    def says(self) -> str:
        """What went wrong, or of a law that holds, whether it was run twice."""
        if self.ok:
            return f"optimised; compiled cheaply the error was {number(self.before.error)}" if self.before else ""
        twice = "also optimised" if self.before else ""
        return "; ".join(part for part in (self.note, str(self.where or ""), twice) if part)


def number(error: float) -> str:
    """An error, or a count as a count."""
    return str(error) if isinstance(error, int) else f"{error:.2g}"


@dataclass(frozen=True)
class Report:
    """The outcome of `check`. `ok` is True when every law holds; prints as a table, and where one fails, why.

    rings: the buffers of the cache that turn, and the fewest slots that one of them has.
    """

    rows: tuple[Row, ...]
    config: str = ""
    rings: tuple[frozenset[str], int] = (frozenset(), 0)

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def points_at(self) -> str:
        """The function of the mechanism that the failed laws point at, and why; "" where all hold."""
        return suspect({row.law: row for row in self.rows}, *self.rings)

    def __str__(self) -> str:
        wide = max((len(row.title) for row in self.rows), default=0)
        lines = [f"{'law':4} {'':{wide}} {'error':>9} {'allowed':>9}"]
        for row in self.rows:
            verdict = f"{'ok' if row.ok else 'FAILS'} {row.says}".rstrip()
            allowed = f"{row.tolerance:9.2g}"
            lines.append(f"{row.law:4} {row.title:{wide}} {number(row.error):>9} {allowed}  {verdict}")
        if not self.ok:
            lines += [f"config: {self.config}", f"this points at {self.points_at}"]
        return "\n".join(lines)


def suspect(rows: dict[str, Row], rings: frozenset[str] = frozenset(), turn: int = 0) -> str:
    """The function that the pattern of failed laws points at, with the reason: `decode: L2 fails, L1 holds`."""
    failed, held = {law for law, row in rows.items() if not row.ok}, {law for law, row in rows.items() if row.ok}
    if not failed:
        return ""
    sources = {row.where.of for law, row in rows.items() if law in failed and row.where and row.where.source}
    if len(sources) == 1:
        return f"{sources.pop()}: it raises"
    places = [row.where for law, row in rows.items() if law in failed and row.where and law in ("L2", "L3", "L4", "L6")]
    late = [p for p in places if p.buffer in rings or (turn and p.token is not None and p.token >= turn)]
    if late and len(late) == len(places):
        return f"the ring: all is right up to the {turn} tokens that it holds"
    for function, broken, whole, why in _PATTERNS:
        if broken <= failed and whole <= held:
            return f"{function}: {why}"
    first = next(law for law in rows if law in failed)
    return f"{_ALONE[first]}: {first} fails"


_PATTERNS = (
    ("forward", {"L1", "L2"}, {"L4"}, "prefill and decode differ from it, and store the same"),
    ("forward", {"L1", "L2", "L7"}, set(), "it differs from prefill and decode, and from visible"),
    ("decode", {"L2"}, {"L1"}, "L2 fails, L1 holds"),
    ("prefill", {"L1"}, {"L2"}, "L1 fails, L2 holds"),
    ("prefill", {"L3"}, {"L1", "L2"}, "into a cache that holds tokens: L3 fails, L1 and L2 hold"),
    ("prefill", {"L6"}, {"L1", "L2", "L3"}, "its `lengths`: L6 fails, L1, L2 and L3 hold"),
)
"""(function, laws that fail, laws that hold, why), the first that fits."""

_ALONE = {
    "L1": "prefill", "L2": "decode", "L3": "prefill", "L4": "what prefill and decode store",
    "L5": "what decode and prefill read", "L6": "prefill and its lengths", "L7": "visible", "L8": "cost",
    "L9": "decode", "L10": "forward and its positions", "L11": "the gradient of forward and prefill",
    "L12": "what the cache spec says of a rewind",
}  # fmt: skip
