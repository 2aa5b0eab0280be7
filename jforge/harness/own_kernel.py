"""Somebody's own function under the cases of an op: `jforge.harness.judge(function, op)`.

    import jforge.harness
    verdict = jforge.harness.judge(attend, "decode_attention")    # attend(q, k, v, lengths, *, scale, window=None, ...)
    print(verdict)

The function takes torch tensors or JAX arrays as the op's signature in `jforge.ops` says, and returns what the op does;
of an (out, lse) it may return out alone. Every named case of the op is asked in every dtype, with NaN in each slot that
no query may read, and compared with the op in float64.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from types import CodeType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from jforge import ops, text
from jforge.core import compare
from jforge.harness.backends import results, to_numpy
from jforge.harness.equiv import number
from jforge.harness.op import Case, Inputs, Op
from jforge.harness.ops import BY_NAME
from jforge.harness.where import READS, Place, leak, place

DTYPES = ("float32", "bfloat16", "float16")
FRAMEWORKS = {
    "torch": ("torch", "triton", "torch_ref", "triton_kernels"),
    "jax": ("jax", "jaxlib", "pallas_kernels", "jforge"),
}


@dataclass(frozen=True)
class Answer:
    """How a case went in a dtype: the errors of the results by name, what is wrong and where, or why it was refused."""

    case: str
    dtype: str
    errors: Mapping[str, float] = field(default_factory=dict)
    wrong: str = ""
    refused: str = ""
    where: Place | None = None


@dataclass(frozen=True)
class Verdict:
    """`ok`: something was judged, and nothing was wrong. Prints as a table with a line for each case that failed."""

    function: str
    op: str
    framework: str
    answers: tuple[Answer, ...]

    @property
    def ok(self) -> bool:
        return bool(self.judged) and not self.failed

    @property
    def judged(self) -> list[Answer]:
        return [a for a in self.answers if not a.refused]

    @property
    def failed(self) -> list[Answer]:
        return [a for a in self.answers if a.wrong]

    @property
    def unjudged(self) -> list[str]:
        """Results of the op that the function never returned."""
        seen = {name for a in self.judged for name in a.errors}
        return [name for name in BY_NAME[self.op].results if seen and name not in seen]

    def __iter__(self) -> Iterator[Answer]:
        return iter(self.answers)

    def __str__(self) -> str:
        dtypes = list(dict.fromkeys(a.dtype for a in self.answers))
        cells = {(a.case, a.dtype): _cell(a) for a in self.answers}
        rows = [[case, *(cells[case, d] for d in dtypes)] for case in dict.fromkeys(a.case for a in self.answers)]
        rows.append(["allowed", *(f"{compare.OUT[d]:.0e}" for d in dtypes)])
        lines = [text.table(["case", *dtypes], rows, left=1), ""]
        for case in dict.fromkeys(a.case for a in self.failed):
            first, *others = (a for a in self.failed if a.case == case)
            also = f" (and in {', '.join(a.dtype for a in others)})" if others else ""
            lines.append(f"{case} in {first.dtype}{also}: {first.wrong}")
        refused = [a for a in self.answers if a.refused]
        for reason in dict.fromkeys(a.refused for a in refused):
            lines.append(f"refused {sum(a.refused == reason for a in refused)}: {reason}")
        counts = f"{len(self.judged)} judged, {len(self.failed)} wrong, {len(refused)} refused"
        lines.append(f"{self.function} as {self.op}, {self.framework}: {counts}")
        lines += [f"{name} is not judged: the function does not return it" for name in self.unjudged]
        if not self.judged:
            lines.append("no case was judged, which proves nothing")
        return "\n".join(lines)


def _cell(answer: Answer) -> str:
    if answer.refused:
        return "refused"
    worst = max(answer.errors.values(), default=np.inf)
    return ("! " if answer.wrong else "") + text.error(worst)


def judge(
    function: Callable,
    op: str | Op,
    *,
    framework: str | None = None,
    dtypes: Collection[str] = DTYPES,
    seed: int = 0,
    name: str | None = None,
    track: Callable = lambda items, description: items,
) -> Verdict:
    """Ask `function` every case of `op` in every dtype.

    framework: "torch" or "jax", whose arrays it takes; None: the one that it uses. A call that raises
    NotImplementedError, or whose options its signature does not have, is refused and counted. Raises ValueError for an
    op, a framework or a dtype that does not exist, or a framework that cannot be told, TypeError for no function.
    """
    op = _op(op)
    name = name or getattr(function, "__name__", repr(function))
    framework = framework_of(function, name) if framework is None else framework
    for what, value, known in [("framework", framework, FRAMEWORKS), *(("dtypes", d, DTYPES) for d in dtypes)]:
        if value not in known:
            raise ValueError(f"{what} is {value!r}; allowed: {', '.join(known)}")
    answers: list[Answer] = []
    for case in track(op.cases, f"asking {name}"):
        for dtype in dtypes:  # one search for what is read suffices for a case
            leaked = any(a.case == case.name and READS in a.wrong for a in answers)
            answers.append(_asked(function, framework, op, case, dtype, seed, search=not leaked))
    return Verdict(name, op.name, framework, tuple(answers))


def _op(op: str | Op) -> Op:
    if not isinstance(op, Op) and op not in BY_NAME:
        raise ValueError(f"op is {op!r}; it must be one of {', '.join(BY_NAME)}")
    return op if isinstance(op, Op) else BY_NAME[op]


def _asked(function: Callable, framework: str, op: Op, case: Case, dtype: str, seed: int, search: bool) -> Answer:
    inputs = op.inputs(case, dtype, seed)
    if reason := _not_taken(function, inputs):
        return Answer(case.name, dtype, refused=reason)
    try:
        got = results(function, framework, inputs)
        if wrong := _form(got, framework, op, inputs):
            return Answer(case.name, dtype, wrong=wrong)
        got = {name: to_numpy(r) for name, r in zip(op.results, got, strict=False) if r is not None}
    except NotImplementedError as refusal:
        return Answer(case.name, dtype, refused=" ".join(str(refusal).split()) or "NotImplementedError")
    except Exception as problem:  # of any kind: what somebody's function raises is a finding, not a crash
        return Answer(case.name, dtype, wrong=f"raises {type(problem).__name__}: {' '.join(str(problem).split())}")
    limits, want = (compare.OUT[dtype], compare.LSE[dtype]), dict(zip(op.results, op.truth(inputs), strict=True))
    metrics = dict(zip(op.results, zip(op.metrics, limits, strict=False), strict=True))
    errors = {n: metrics[n][0](a, want[n]) for n, a in got.items()}
    bad = next((n for n, error in errors.items() if not error <= metrics[n][1]), None)
    if bad is None:
        return Answer(case.name, dtype, errors)
    where, error = place(got[bad], want[bad], op.results[bad], metrics[bad][1]), errors[bad]
    off = f"is off by {text.error(error)}, allowed {metrics[bad][1]:.0e}" if np.isfinite(error) else "is wrong"
    row, off, read = where.at["row"], "holds NaN" if np.isnan(where.got) else off, ""
    if np.isnan(where.got) and search:
        at = list(op.results).index(bad)
        read = leak(op, inputs, row, lambda some: to_numpy(results(function, framework, some)[at]))
    length = f"row {row} has length {case.lengths[row]}; " if case.lengths else ""
    said = f"{bad} {off}; {where}; {length}{read}".removesuffix("; ")
    return Answer(case.name, dtype, errors, said, where=where)


def _not_taken(function: Callable, inputs: Inputs) -> str:
    """What of a call the function's signature does not have."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # built-in and compiled functions have none to look at
        return ""
    if all(p.kind != p.VAR_KEYWORD for p in signature.parameters.values()):
        if missing := sorted(inputs.options.keys() - signature.parameters.keys()):
            return f"the function takes no {', '.join(missing)}"
    try:
        signature.bind(*inputs.arrays.values(), **inputs.options)
    except TypeError as problem:
        return f"the function does not take {', '.join((*inputs.arrays, *inputs.options))}: {problem}"
    return ""


def _form(got: tuple, framework: str, op: Op, inputs: Inputs) -> str:
    """What is wrong with the number, types, shapes and dtypes of the results."""
    names = list(op.results)
    alone = len(names) == 2 and names[1] == "lse"
    if len(got) != len(names) and not (alone and len(got) == 1):
        return f"returns {len(got)} results; {op.name} returns {' and '.join(names)}"
    arrays = {n: jnp.asarray(a) if isinstance(a, np.ndarray) else a for n, a in inputs.options.items()}
    fixed = {n: a for n, a in arrays.items() if not isinstance(a, jax.Array)}
    traced = {n: a for n, a in arrays.items() if isinstance(a, jax.Array)}
    right = jax.eval_shape(
        lambda args, traced: getattr(ops, op.name)(*args, **traced, **fixed),
        [None if a is None else jnp.asarray(a) for a in inputs.arrays.values()], traced,
    )  # fmt: skip
    right = right if isinstance(right, tuple) else (right,)
    for name, mine, ours in zip(names, got, right, strict=False):
        if mine is None and alone and name == "lse":
            continue
        if not hasattr(mine, "shape") or type(mine).__module__.partition(".")[0] not in FRAMEWORKS[framework]:
            return f"{name} is a {type(mine).__name__}; it must be an array of {framework}"
        for what, a, b in (("shape", tuple(mine.shape), ours.shape), ("dtype", _dtype(mine), str(ours.dtype))):
            if a != b:
                return f"{name} has {what} {a}; it must be {b}"
    return ""


def _dtype(array) -> str:
    return str(array.dtype).removeprefix("torch.")


def framework_of(function: Callable, name: str) -> str:
    """The framework that a function and what it calls in its module use. Raises ValueError where that is not one."""
    if not callable(function):
        raise TypeError(f"{name} is a {type(function).__name__}; it must be a function")
    roots = _roots(function, set())
    used = [framework for framework, packages in FRAMEWORKS.items() if roots & set(packages)]
    if len(used) != 1:
        both = "both torch and jax" if used else "neither torch nor jax"
        raise ValueError(f"{name} uses {both}; say which of them its arrays are of: --framework torch or jax")
    return used[0]


def _roots(function, seen: set[int]) -> set[str]:
    """The packages of what a function is and names, followed through what it wraps and into its own file."""
    kinds = [function, *type(function).__mro__]
    found = {str(getattr(kind, "__module__", None)).partition(".")[0] for kind in kinds}
    if id(function) in seen:
        return found
    seen.add(id(function))
    inner = [getattr(function, name, None) for name in ("__wrapped__", "func", "__func__", "fn")]
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        call = vars(type(function)).get("__call__")
        inner += [call] if isinstance(getattr(call, "__code__", None), CodeType) else []
    else:
        names, space = _names(code), function.__globals__
        found |= (names - space.keys()) & {package for packages in FRAMEWORKS.values() for package in packages}
        for value in [
            *(space[n] for n in names & space.keys()),
            *filter(None, map(_content, function.__closure__ or ())),
        ]:
            if inspect.ismodule(value):
                found.add(value.__name__.partition(".")[0])
            elif getattr(value, "__module__", None) == function.__module__:
                inner.append(value)
            else:
                found.add(str(getattr(value, "__module__", None)).partition(".")[0])
    return found.union(*(_roots(value, seen) for value in inner if value is not None))


def _content(cell):
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None


def _names(code: CodeType) -> set[str]:
    nested = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*(_names(const) for const in nested))


@dataclass(frozen=True)
class Own:
    """A function, what it is called, and the framework whose arrays it takes."""

    name: str
    function: Callable
    framework: str

    def ops(self, op: str) -> SimpleNamespace:
        """A namespace with the function in the place of `op`; a result alone becomes (result, None)."""

        def call(*arrays, **options):
            found = self.function(*arrays, **options)
            return found if isinstance(found, tuple) or len(BY_NAME[op].results) == 1 else (found, None)

        return SimpleNamespace(**{op: call})


def plain(verdict: Verdict) -> dict:
    """A verdict as JSON."""
    counts = {"judged": len(verdict.judged), "wrong": len(verdict.failed), "not_judged": verdict.unjudged}
    cases = [_without_infinity(asdict(answer)) for answer in verdict]
    named = {"function": verdict.function, "op": verdict.op, "framework": verdict.framework, "ok": verdict.ok}
    return {**named, **counts, "refused": len(cases) - len(verdict.judged), "cases": cases}


def _without_infinity(value):
    if isinstance(value, dict):
        return {name: _without_infinity(v) for name, v in value.items()}
    return number(value) if isinstance(value, float) else value
