"""Python that test_translate.py runs here and, translated, in Chromium. Every function of no parameters returns what is
compared: what the language does with numbers, texts, containers, classes and statements.
"""

import math
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from functools import cached_property, partial, reduce
from operator import or_
from typing import Any, NamedTuple

from jforge.core.config import FrozenDict


def integers() -> list:
    big = 10**30
    return [
        [-7 // 2, 7 // -2, -7 % 3, 7 % -3, -(-7 // 2), divmod(-7, 3), 0 // 5, True + True, 3 * True, 5 & 6, 5 | 8],
        [2**100, big + 1, big // 7, big * big, -big, 7 / 2, 6 / 2, 2**-1, 2**0.5, big > 1e29],
        [int(2.7), int(-2.7), int(True), int(7.0), math.ceil(2.1), math.ceil(-2.1), math.prod([2, 3]), math.prod([])],
    ]


def floats() -> list:
    return [
        [0.1 + 0.2, -7.5 // 2, -7.5 % 2, 7.5 % -2, 1.5 * 2, 3 - 0.5, -2.5, float(3), math.sqrt(16), math.log(1)],
        [1.0, 1e16, 1e15, 1e-5, 1e-4, -0.0, 1e22, 123456789.5, 2.5e-10, math.inf, -math.inf, math.isfinite(1e300)],
    ]


def fractions() -> list:
    third = Fraction(1, 3)
    return [
        [third + 1 == Fraction(4, 3), third * 3 == 1, Fraction(6, 3) == 2, third - 1 < 0, third / 2 == Fraction(1, 6)],
        [
            float(third),
            int(Fraction(-7, 2)),
            third * 0.5,
            max(third, 0.3) == third,
            sum([third, third]) == Fraction(2, 3),
        ],
    ]


def order() -> list:
    one, half = 1, 0.5
    return [
        [one == 1.0, one == True, one == "1", 0 == False, one < 1.5 <= 2 < 3, 3 > 2 > 2, "a" < "b", "B" < "a"],  # noqa: E712
        [min(3, half), max([1, 4, 2]), max([], default=7), sorted([3, half, 2]), sum([1, 2.5]), sum([[1], [2]], [])],
        [[1, 2] == [1, 2.0], (1, 2) == (1, 2), [1] == (1,), ["a,b"] == ["a", "b"], [["a"], "b"] == [["a", "b"]]],
        [{"a": 1, "b": 2} == {"b": 2, "a": 1}, {"a": 1} == {"a": 2}, {1, 2} == {2, 1}, None == 0],  # noqa: E711
    ]


def formats() -> list:
    return [
        f"{1234567:,} {12:,} {0.5:,.0f} {1.5:.0f} {2.5:,.0f} {1234.25:,.1f} {0.35:.1f} {2.675:,.2f} {1e6:,.0f}",
        f"{1e-30:g} {1e38:g} {0.25:g} {3.14159:.3g} {0.000123456:.3g} {123456.0:.3g} {12.0:.3g} {1e-9:.3g} {999.9:.3g}",
        f"{None} {True!r} {'x'!r} {'x'} {[1, 'a']} {1.0}",
    ]


def texts() -> list:
    name = "abcdef"
    return [
        [name[1], name[-1], name[:2], name[-2:], name[1:3], "cd" in name, "x" not in name, len(name), list("ab")],
        ["AbC".lower(), name.startswith("ab"), name.endswith("x"), "12".isdigit(), "".isdigit(), "a b  c".split()],
        ["a.b.c".rpartition(".")[2], "-".join(["a", "b"]), "aXbX".replace("X", ""), "ab" * 2, "a" + "b", str(3)],
        ["it's", 'say "x"', "a'b\"c\n\t\\", "\u00e9", repr("x"), str(name)],
    ]


def truth() -> list:
    things = (
        {},
        [],
        (),
        "",
        0,
        0.0,
        None,
        set(),
        FrozenDict({}),
        {"a": 0},
        [0],
        (0,),
        "0",
        1,
        -1,
        0.5,
        {0},
        Pair(0, 0),
    )
    return [
        [bool(thing) for thing in things],
        [0 or "x", 0 and "x", [] or {} or 3, 1 and 2 and 3, not 0, not [0], 1 if [] else 2, None or False, "" or 0],
        [things[6] is None, things[0] is not None, any(x > 1 for x in [1, 2]), all([]), any([])],
    ]


def containers() -> list:
    one = {"a": 1}
    return [
        [one | {"b": 2, "a": 3}, {**one, "b": 2, **{"a": 3}}, {1: "x"}.get(1.0), {"a": None}.get("a", 5), one.get("b")],
        [dict([("a", 1)]), dict.fromkeys(["a", "b"], 0), dict(zip(["a"], [1], strict=True)), list(one), len(one)],
        [[*range(3), *[7]], list(range(2, 5)), tuple([1, 2]), [1, 2] + [3], [0] * 3, (1, 2) + (3,), [1, 2, 3][1:]],
        [2 in [1, 2.0], 2 not in (1, 3), "a" in one, True in [1], [1] in [[1]], (1,) in [[1]], 1.0 in {1, 2}],
        [len({*[1, 1.0, True]}), sorted({1, 2} - {2}), sorted({1} | {2}), {(1, "a"): 2}[1, "a"], Counter()["x"]],
        [list(one.items())[0][1], list(one.values()), [1, 2, 2].count(2), (1,), (), [[]], FrozenDict({"a": [1]})["a"]],
        [
            FrozenDict({"a": 1}) == one,
            dict(FrozenDict({"b": 2})),
            one.setdefault("z", 4),
            one.pop("z"),
            one.pop("z", 9),
        ],
    ]


def loops() -> list:
    pairs = [[1, 2], [3]]
    return [
        [
            [x for xs in pairs for x in xs if x > 1],
            {x: x * x for x in (1, 2)},
            [x for x, *_ in pairs],
            [*reversed([1, 2])],
        ],
        [[f"{i}{x}" for i, x in enumerate("ab")], next(filter(None, [0, 2])), next((x for x in []), 4)],
        [list(map(lambda a: a + 1, [1])), list(map(lambda a, b: a * b, [1, 2], [3, 4])), list(filter(None, [0, 1]))],
        [reduce(or_, [{"a": 1}, {"b": 2}], {"c": 3}), reduce(or_, [1, 2]), [y for x in (1, 2) if (y := x * 2) > 2]],
        [[pairs for pairs in pairs][0], sorted(x for x in {"b", "a"}), list(counted(4)), first_of([0, 0, 7])],
    ]


def calls() -> list:
    def several(*a, k=1, **more):
        return [list(a), k, more]

    def usual(a, b=2):
        return a - b

    return [
        [
            several(1, 2, z=3),
            several(k=5),
            several(*[1, 2], **{"k": 3, "y": 4}),
            usual(5),
            usual(b=5, a=1),
            usual(1, b=1),
        ],
        [partial(several, 1)(2), partial(max, 4)(3), closure(2)(3), broken(None), broken(1), (lambda x, y=2: x + y)(1)],
    ]


def types() -> list:
    things = [1, True, 1.5, "x", None, [], (), {}, {1}]
    return [
        [
            [isinstance(thing, kind) for thing in things]
            for kind in (int, float, str, bool, list, tuple, dict, (int, str))
        ],
        [type(thing).__name__ for thing in things],
        [isinstance(None, type(None)), isinstance(ValueError("x"), Exception), isinstance(Sub(1), Point)],
    ]


@dataclass(frozen=True)
class Point:
    x: int
    y: int = 2

    @property
    def doubled(self) -> int:
        return 2 * self.x

    @cached_property
    def held(self) -> list:
        return []

    def said(self) -> str:
        return f"point {self.x}"


@dataclass(frozen=True)
class Sub(Point):
    z: int = 3

    def __post_init__(self):
        object.__setattr__(self, "z", self.z + 1)

    def said(self) -> str:
        return super().said() + f" and {self.z}"


@dataclass(frozen=True)
class Same:
    x: int
    note: int = field(default=0, compare=False)


class Pair(NamedTuple):
    a: int
    b: int = 2

    @property
    def total(self) -> int:
        return self.a + self.b

    def plus(self, more: int) -> int:
        return self.total + more


def classes() -> list:
    point, name = Point(1), "x"
    point.held.append(5)
    return [
        [
            point == Point(1, 2),
            point == Point(2),
            Point(1, y=3).y,
            replace(point, x=5).x,
            point == Same(1, 2),
            point.doubled,
        ],
        [point.held, point.said(), [f.name for f in fields(Sub)], hasattr(Point, "y"), hasattr(Point, "x"), point.y],
        [
            Sub(1, z=4).z,
            Sub(1).said(),
            Sub(1).doubled,
            isinstance(point, Sub),
            getattr(point, name),
            hasattr(point, "q"),
        ],
        [Same(1, 2) == Same(1, 3), Same(2, 2) == Same(1, 2), {Same(1, 5): "a"}.get(Same(1, 6)), {point: 1}[Point(1)]],
        [Pair(1, 2)._replace(b=3).b, list(Pair(1, 2)), Pair(1).total, Pair(1, 2).plus(3), Pair(1)[1:] == (2,)],
    ]


def changes() -> list:
    """What is changed in place shows under its other name."""
    items, known, whole = [1], {"a": 1}, (1,)
    same, alike, other = items, known, whole
    items += [2]
    known |= {"b": 2}
    whole += (2,)
    known["c"] = 3
    known["c"] *= 5
    del known["a"]
    items[0] = 7
    n = m = 1
    n += 2
    (first, second), third = (n, m), 4
    return [same, alike, other, n, m, first, second, third]


def errors() -> list:
    return [caught(key) for key in ("z", "missing", "raised", "text", "again")]


def caught(key: str) -> Any:
    try:
        if key == "raised":
            raise ValueError(f"no {key}")
        if key == "again":
            return caught_again(key)
        return int("x") if key == "text" else {"z": 1}[key]
    except (KeyError, TypeError):
        return "missing"
    except ValueError as problem:
        return str(problem)


def caught_again(key: str) -> None:
    try:
        raise NotImplementedError(key)
    except NotImplementedError:
        try:
            raise
        except Exception as problem:
            raise ValueError(f"{problem}, then second") from None


def counted(n: int):
    i = 0
    while i < n:
        i += 1
        if i == 2:
            continue
        yield i


def closure(factor: int):
    def times(x: int) -> int:
        return x * factor

    return times


def broken(new: Any) -> Any:
    """A parameter that is a word of JavaScript, and an end without a return."""
    if new is not None:
        return 1


def first_of(items: list) -> Any:
    found = None
    for item in items:
        if item:
            found = item
    return found
