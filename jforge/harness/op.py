"""The type of an op's record, and of the cases, inputs, questions and benchmarked calls that records are made of.

The records themselves, one file an op, are in jforge/harness/ops. What tests, benchmarks, the fuzz, GPU runs and tables
know of an op, they read there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from jforge.core import compare

DTYPES = {n: np.dtype(n) for n in ("float16", "float32", "float64")} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Case:
    """One call of an op. `sizes` by letter (DESIGN names); `lengths` one a row; `options` are keyword arguments.

    plan: what the kernels' own planning would choose otherwise, such as {"splits": 2}; other backends have no plan.
    """

    name: str
    op: str
    sizes: Mapping[str, int]
    lengths: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    tags: frozenset[str] = frozenset()
    plan: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call: arrays in the order of the op's signature, then keyword arguments (arrays included)."""

    arrays: Mapping[str, np.ndarray]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Draw:
    """One example of the fuzz: a case, the dtype and seed of its values, and how the question is put.

    view: "plain"; "permuted" (the batch in another order); "alone" (row `at`, all others emptied); "paged" (pages of
    `at` slots); "split" (keys before and after slot `at` in two calls, or entries of the lists, or parts, or scores, or
    two tokens); "shuffled" (the entries of a list, or the scores, in another order).
    values: "normal"; "coarse" (few bits: sums are exact and scores tie); "positive" (sums do not cancel); "huge"
        (logits to the ends of float32); "tiny" (denormals); "broken" (NaN).
    stored: the dtype of keys that come with a scale.
    """

    case: Case
    dtype: str
    seed: int
    view: str = "plain"
    at: int = 0
    values: str = "normal"
    stored: str | None = None


def _as_drawn(draw: Draw, inputs: Inputs, rng: np.random.Generator) -> Inputs:
    return inputs


@dataclass(frozen=True)
class Fuzz:
    """What the fuzz may ask of an op.

    question: (draw, st, sizes, dtypes, out) -> Draw, out of hypothesis' draw function and strategies.
    sizes, mosaic: the sizes to choose from, and fewer and smaller ones for Mosaic's interpreter, which takes a second
        to compile a new call.
    views: {view: (backend, draw, inputs) -> (what the oracle is to be asked, what the backend answers)}.
    change: (draw, inputs, rng) -> the inputs with edges that named cases do not have.
    judge: (draw, inputs, got) -> what is wrong or None, for results that the oracle's are no measure of.
    exact: whether results are float32 whatever the inputs' dtype, sums of which `change` keeps from rounding.
    same_bits: whether a kernel gives a row the same bits in any batch, with a `chunk` or without one.
    """

    question: Callable
    sizes: tuple
    mosaic: tuple
    views: Mapping[str, Callable]
    change: Callable = _as_drawn
    judge: Callable | None = None
    exact: bool = False
    same_bits: bool = False


@dataclass(frozen=True)
class Work:
    """One call that is benchmarked. Arguments in `absent` are None; `peers` yields the calls that ours are held to."""

    sizes: Mapping[str, int]
    options: Mapping[str, Any]
    absent: tuple[str, ...] = ()
    peers: Callable | None = None


@dataclass(frozen=True)
class Op:
    """All that is known of an op but its implementations.

    axes: {argument: its axis letters}, in the order of the signature; keyword arguments are not among them.
    draw: (case, dtype, rng) -> Inputs, NaN in every slot that no query may read: each case is also a poison test.
    oracle: the op in float64 NumPy, a plain loop; results as a tuple.
    results: {result: its axis letters}, one or two.
    metrics: how each of them is judged (compare.py).
    edges: {kernel package: examples at the edges of its plans: forced splits, more tiles than stages, pages ...}.
    refusals: {kernel package: (draw) -> the reason why it documents no answer (a pattern), or None: it must answer}.
    caches, lists, stored: arguments with slots on axis 1; the lists of what is read; the cache that may hold codes.
    attends: whether the first result is an attention's output, which may be asked for in float32.
    moved: (**sizes, **options) -> bytes that a call in bfloat16 must move over memory.
    bench, cpu: the calls that are benchmarked on a GPU, and on a machine without one.
    fill: {argument: (key, shape, sizes, options) -> jax.Array} of benchmarks; lengths are full, others are normal draws
        in bfloat16.
    keywords: {keyword argument that is an array: its axes}, which benchmarks give as well.
    carry: the argument that a call consumes and its second result replaces.
    reads: (row of a benchmark) -> what a call reads of a row's cache, in words.
    table: the table of docs/kernels.md that lists its benchmarks.
    invariant: a call of one row, whose bits must not depend on the batch once a `chunk` is given.
    """

    name: str
    axes: Mapping[str, str]
    draw: Callable[[Case, np.dtype, np.random.Generator], Inputs]
    oracle: Callable[..., tuple[np.ndarray, ...]]
    cases: tuple[Case, ...]
    fuzz: Fuzz
    results: Mapping[str, str] = field(default_factory=lambda: {"out": "BTNV", "lse": "BTN"})
    metrics: tuple[Callable, ...] = (compare.worst_head, compare.lse_error)
    edges: Mapping[str, tuple[Draw, ...]] = field(default_factory=dict)
    refusals: Mapping[str, Callable[[Draw], str | None]] = field(default_factory=dict)
    caches: tuple[str, ...] = ()
    lists: str | None = None
    stored: str | None = None
    attends: bool = True
    moved: Callable[..., int] | None = None
    fill: Mapping[str, Callable] = field(default_factory=dict)
    keywords: Mapping[str, str] = field(default_factory=dict)
    carry: str | None = None
    bench: tuple[Work, ...] = ()
    cpu: tuple[Work, ...] = ()
    reads: Callable[[Mapping], str] = lambda row: "all"
    table: str = "parts"
    invariant: Case | None = None

    @property
    def second(self) -> str | None:
        """What the second result is called."""
        return (*self.results, None)[1]

    def run(self, ops, options: Mapping, *arrays, **more):
        """What a benchmark judges of the op of a namespace: the out of an attention, all results of other ops."""
        given = zip(self.keywords, arrays[len(self.axes) :], strict=True)
        more |= {name: array for name, array in given if array is not None}
        result = getattr(ops, self.name)(*arrays[: len(self.axes)], **options, **more)
        return result[0] if self.attends else result

    def inputs(self, case: Case, dtype: str, seed: int = 0) -> Inputs:
        """The inputs of `case`, rounded to `dtype` ("float16", "bfloat16", "float32", "float64")."""
        return self.draw(case, DTYPES[dtype], np.random.default_rng([seed, *case.name.encode()]))

    def truth(self, inputs: Inputs) -> tuple[np.ndarray, ...]:
        """What a call must give, in float64."""
        return self.oracle(*inputs.arrays.values(), **inputs.options)

    def errors(self, got: tuple, want: tuple) -> tuple[float, float]:
        """The errors of both results; 0 for a second one that the op does not have."""
        found = tuple(metric(*pair) for metric, *pair in zip(self.metrics, got, want, strict=True))
        return (*found, 0.0)[:2]

    def refusal(self, backend: str, draw: Draw) -> str | None:
        """The reason (a pattern) that a backend documents for not answering an example; None: it must answer."""
        return self.refusals[backend](draw) if backend in self.refusals else None
