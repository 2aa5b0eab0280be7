"""Fuzz of the ops: hypothesis draws cases that the named list does not have, the float64 oracle judges them.

    python -m jforge.harness.fuzz --examples 500 [--backend NAME] [--op OP] [--seed N] [--out FILE]

Each example is a question of the op's record and a view of it (views.py), whose answer must not differ: the batch
permuted, one row among emptied ones, the cache in shuffled pages, lists or scores in another order, the keys in two
calls that are joined, two tokens of a state one after the other.

A failure prints the smallest case found and the command that brings it back, and exits with 1. hypothesis is in the
`dev` extra only, so nothing else of jforge imports this file.
"""

import argparse
import collections
import dataclasses
import random
import re
import sys
import time

import hypothesis
import numpy as np
from hypothesis import strategies as st

from jforge.core import compare
from jforge.harness import records
from jforge.harness.backends import BACKENDS, KERNELS, Backend, for_programs_that_run_once, gpu
from jforge.harness.op import DTYPES, Draw, Inputs, Op
from jforge.harness.ops import BY_NAME
from pallas_kernels import compat  # before JAX's first computation, or its interpreter has too few threads


@dataclasses.dataclass
class Tally:
    """What a run saw: examples judged, by (dtype, view); refusals, by reason; the worst error over its tolerance."""

    judged: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    refused: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    worst: float = 0.0

    @property
    def examples(self) -> int:
        return self.judged.total() + self.refused.total()


# --- how an example is judged


def check(backend: Backend, draw: Draw, tally: Tally | None = None) -> None:
    """Raise AssertionError, with the example in its message, unless the backend answers it right or refuses as told."""
    tally = Tally() if tally is None else tally
    reason = BY_NAME[draw.case.op].refusal(backend.name, draw)
    try:
        wrong, ratio = _judge(backend, draw)
    except NotImplementedError as refused:
        wrong, ratio = None if reason and re.search(reason, str(refused)) else f"refuses: {refused}", 0.0
        if wrong is None:
            tally.refused[reason] += 1
            return
    except Exception as error:  # of any kind: whatever a backend raises is what the fuzz looks for
        wrong, ratio = f"raises {type(error).__name__}: {error}", 0.0
        _forget_races(backend)
    else:
        wrong = f"answers what it documents as refused ({reason})" if reason else wrong
    if wrong:
        raise AssertionError(f"{backend.name} {wrong}\n    fuzz.check(BACKENDS[{backend.name!r}], {draw!r})")
    tally.judged[draw.dtype, draw.view] += 1
    tally.worst = max(tally.worst, ratio)


def inputs_of(draw: Draw) -> Inputs:
    """The arrays of an example, in the order of the op's signature, and its options."""
    op = BY_NAME[draw.case.op]
    inputs = op.inputs(draw.case, draw.dtype, draw.seed)
    return op.fuzz.change(draw, inputs, np.random.default_rng(draw.seed))


def _judge(backend: Backend, draw: Draw) -> tuple[str | None, float]:
    """(what is wrong, the worst error over its tolerance)."""
    op, inputs = BY_NAME[draw.case.op], inputs_of(draw)
    asked, got = op.fuzz.views[draw.view](backend, draw, inputs)
    if op.fuzz.judge is not None:
        return op.fuzz.judge(draw, inputs, got), 0.0
    with np.errstate(all="raise", under="ignore"):  # the oracle must not overflow unseen
        want = op.truth(asked)
    out_dtype = "float32" if op.fuzz.exact else draw.case.options.get("out_dtype", draw.dtype)
    limits, held = _limits(op, draw, out_dtype), got[0]
    if not op.fuzz.exact and "float16" in (draw.dtype, out_dtype):
        # where a sink outweighs all keys, an output may lie below its smallest step
        held = np.where(np.abs(got[0] - want[0]) <= 2.0**-24, want[0], got[0])
    errors = op.errors((held, *got[1:]), want)
    ratios = [error / limit for error, limit in zip(errors, limits, strict=True)]
    if max(ratios) > 1:
        found = f"out {errors[0]:.1e} of {limits[0]:.1e}, {op.second} {errors[1]:.1e} of {limits[1]:.1e}"
        return f"is wrong: {found}", max(ratios)
    merged = draw.view == "split" and op.second == "lse" and len(got) == 2  # parts are joined in float32
    if not merged and not np.array_equal(got[0], got[0].astype(DTYPES[out_dtype]).astype(np.float64)):
        return f"is wrong: out holds values that {out_dtype} does not have", max(ratios)
    fixed = "chunk" in draw.case.options or op.fuzz.same_bits
    if backend.name in KERNELS and fixed and draw.view in ("permuted", "alone"):
        plain = backend.call(op.name, inputs)
        rows = slice(None) if draw.view == "permuted" else slice(draw.at, draw.at + 1)
        if not all(np.array_equal(a[rows], b[rows]) for a, b in zip(got, plain, strict=True)):
            return f"is wrong: other bits when the batch is {draw.view}", max(ratios)
    if backend.name == "pallas" and not gpu() and compat.races_found():
        _forget_races(backend)
        return "races", max(ratios)
    return None, max(ratios)


def _limits(op: Op, draw: Draw, out_dtype: str) -> tuple[float, float]:
    """compare.py's for an example's dtypes."""
    if op.fuzz.exact:
        return compare.OUT[out_dtype], compare.LSE[out_dtype]
    return max(compare.OUT[draw.dtype], compare.OUT[out_dtype]), compare.LSE[draw.dtype]


def _forget_races(backend: Backend) -> None:
    """Mosaic's interpreter is unusable after an exception in a kernel, and remembers its races."""
    if backend.name == "pallas" and not gpu():
        compat.reset_interpreter()


# --- runs


def draws(backend: Backend, op: Op) -> st.SearchStrategy[Draw]:
    """Examples of `op` in the dtypes that the backend is judged in here, and for Pallas now and then in float32, which
    most of its ops must refuse, and on a GPU more of what it takes. float32 results are for all; Triton's interpreter
    truncates to bfloat16 where a GPU rounds.
    """
    judged = backend.gpu_dtypes if gpu() else backend.dtypes
    out, sizes = tuple(dict.fromkeys(("float32", *judged))), op.fuzz.sizes
    if backend.name == "pallas":
        sizes, judged = op.fuzz.mosaic + (sizes if gpu() else ()), judged * 4 + ("float32",)
    return st.composite(op.fuzz.question)(st, sizes, judged, out)


def fuzz(
    backend: Backend, op: str, examples: int, *, seed: int | None = None, shrink: bool = True, progress=None
) -> Tally:
    """Check `examples` draws; AssertionError with a bad one, the smallest found when `shrink`.

    seed None: the same draws every time. `progress` is called with the tally after every example. No deadlines and
    health checks, which are for fast tests, and no database, so that a run does not depend on the last one.
    """
    tally = Tally()
    phases = [p for p in (hypothesis.Phase.generate, hypothesis.Phase.shrink) if shrink or p.name == "generate"]

    @hypothesis.settings(
        max_examples=examples, derandomize=seed is None, phases=phases, deadline=None, database=None,
        suppress_health_check=list(hypothesis.HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip
    @hypothesis.given(draws(backend, BY_NAME[op]))
    def one(draw: Draw) -> None:
        check(backend, draw, tally)
        if progress is not None:
            progress(tally)

    if seed is not None:
        one = hypothesis.seed(seed)(one)
    one()
    return tally


COLUMNS = ("implementation", "op", "judged", "refused", "worst", "seconds", "ok")  # worst: error over its tolerance


def _run(backend: Backend, op: str, examples: int, seed: int) -> tuple[dict, str | None]:
    """(a record of the run, the report of a failure) of one backend and op, with progress on stderr."""
    start = time.perf_counter()

    def progress(tally: Tally) -> None:
        if tally.examples % 50 == 0:
            seconds = time.perf_counter() - start
            done = f"{tally.examples} of {examples}, {seconds:.0f} s"
            print(f"  {backend.name} {op}: {done}", file=sys.stderr, flush=True)

    record, report = {"what": "fuzz", "implementation": backend.name, "op": op, "seed": seed}, None
    try:
        tally = fuzz(backend, op, examples, seed=seed, progress=progress)
        record |= {"judged": tally.judged.total(), "refused": tally.refused.total(), "worst": round(tally.worst, 2)}
    except AssertionError as failure:
        command = f"python -m jforge.harness.fuzz --backend {backend.name} --op {op} --examples {examples}"
        report = f"{failure}\n    {command} --seed {seed}"
    return record | {"seconds": round(time.perf_counter() - start), "ok": report is None}, report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=500, help="cases a backend, shared among the ops")
    parser.add_argument("--backend", choices=tuple(BACKENDS))
    parser.add_argument("--op", choices=tuple(BY_NAME))
    parser.add_argument("--seed", type=int, help="default: a fresh one")
    parser.add_argument("--out", metavar="FILE", help="append a record of each backend and op to FILE as JSON lines")
    parser.add_argument("--commit", help="for these, where there is no .git to ask")
    args = parser.parse_args(argv)
    if args.examples < 1:
        parser.error(f"--examples is {args.examples}; it must be a positive integer")
    if args.out:
        try:
            records.writable("--out", args.out)
        except ValueError as problem:
            parser.error(str(problem))
    for_programs_that_run_once()
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    ops = [args.op] if args.op else list(BY_NAME)
    print(f"seed {seed}", flush=True)
    rows, where = [], records.environment(args.commit) if args.out else {}
    for backend in BACKENDS.values():
        if args.backend not in (None, backend.name):
            continue
        for op in ops:
            record, report = _run(backend, op, -(-args.examples // len(ops)), seed)
            rows.append(record)
            if args.out:
                records.append(args.out, [record], where)
            if report:
                print(report, flush=True)
    table = [COLUMNS, *([str(row.get(name, "-")) for name in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    failed = sum(not row["ok"] for row in rows)
    print(f"seed {seed}: {f'{failed} failed, see above' if failed else 'all right'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
