"""Fuzz of the ops: hypothesis draws cases that the named list does not have, the float64 oracle judges them.

    python -m jforge.harness.fuzz --examples 500 [--backend NAME] [--op OP] [--seed N]

Each example is a question from fuzz_draws.py and a view of it, whose answer must not differ: the batch permuted, one
row among emptied ones, the cache in shuffled pages, the keys in two calls that `merge_states` joins.

A failure prints the smallest case found and the command that brings it back, and exits with 1. hypothesis is in the
`dev` extra only, so nothing else of jforge imports this file.
"""

import argparse
import collections
import dataclasses
import importlib
import random
import re
import sys
import time

import hypothesis
import numpy as np

from jforge.harness import compare, oracle
from jforge.harness.backends import BACKENDS, Backend, gpu
from jforge.harness.cases import DTYPES, Inputs, build
from jforge.harness.fuzz_draws import OPS, Draw, draws, refusal

CACHES = {
    "decode_attention": ("k", "v"),
    "decode_block_sparse": ("k", "v"),
    "decode_mla": ("latent", "k_rope"),
}
KERNELS = ("triton", "pallas")  # of which DESIGN asks the same bits in any batch


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
    reason = refusal(backend, draw)
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


def _judge(backend: Backend, draw: Draw) -> tuple[str | None, float]:
    """(what is wrong, the worst error over its tolerance)."""
    case = draw.case
    inputs = build(case, draw.dtype, draw.seed)
    if case.op == "decode_block_sparse":
        inputs = _with_garbage(inputs, draw)
    asked, got = _ask(backend, draw, inputs)
    with np.errstate(all="raise", under="ignore"):  # the oracle must not overflow unseen
        want = getattr(oracle, case.op)(*asked.arrays.values(), **asked.options)
    out_dtype = case.options.get("out_dtype", draw.dtype)
    limits = max(compare.OUT[draw.dtype], compare.OUT[out_dtype]), compare.LSE[draw.dtype]
    held = got[0]
    if "float16" in (
        draw.dtype,
        out_dtype,
    ):  # where a sink outweighs all keys, an output may lie below its smallest step
        held = np.where(np.abs(got[0] - want[0]) <= 2.0**-24, want[0], got[0])
    errors = compare.worst_head(held, want[0]), compare.lse_error(got[1], want[1])
    ratios = [error / limit for error, limit in zip(errors, limits, strict=True)]
    if max(ratios) > 1:
        return f"is wrong: out {errors[0]:.1e} of {limits[0]:.1e}, lse {errors[1]:.1e} of {limits[1]:.1e}", max(ratios)
    if draw.view != "split" and not np.array_equal(got[0], got[0].astype(DTYPES[out_dtype]).astype(np.float64)):
        return f"is wrong: out holds values that {out_dtype} does not have", max(ratios)
    fixed = "chunk" in case.options or case.op == "merge_states"
    if backend.name in KERNELS and fixed and draw.view in ("permuted", "alone"):
        plain = backend.call(case.op, inputs)
        rows = slice(None) if draw.view == "permuted" else slice(draw.at, draw.at + 1)
        if not all(np.array_equal(a[rows], b[rows]) for a, b in zip(got, plain, strict=True)):
            return f"is wrong: other bits when the batch is {draw.view}", max(ratios)
    if backend.name == "pallas" and not gpu() and _compat().races_found():
        _forget_races(backend)
        return "races", max(ratios)
    return None, max(ratios)


def _ask(backend: Backend, draw: Draw, inputs: Inputs) -> tuple[Inputs, tuple[np.ndarray, ...]]:
    """(what the oracle is to be asked, what the backend answers to the drawn view of it)."""
    op, arrays = draw.case.op, inputs.arrays
    rng = np.random.default_rng(draw.seed)
    match draw.view:
        case "permuted":
            order = np.roll(np.arange(draw.case.sizes["B"]), 1)  # a random order of two rows is often the old one
            axis = 1 if op == "merge_states" else 0
            moved = {n: array if array is None else np.take(array, order, axis) for n, array in arrays.items()}
            got = backend.call(op, Inputs(moved, inputs.options))
            return inputs, tuple(part[np.argsort(order)] for part in got)
        case "alone":
            others = np.arange(draw.case.sizes["B"]) != draw.at
            arrays = dict(arrays)
            for name, nothing in (("lengths", 0), ("block_indices", -1)):
                if arrays.get(name) is not None:
                    arrays[name] = np.where(others.reshape(-1, *[1] * (arrays[name].ndim - 1)), nothing, arrays[name])
            inputs = Inputs(arrays, inputs.options)
        case "paged":
            return inputs, backend.call(op, _paged(inputs, op, draw.at, rng))
        case "split":
            return inputs, _split(backend, draw, inputs)
    return inputs, backend.call(op, inputs)


def _with_garbage(inputs: Inputs, draw: Draw) -> Inputs:
    """Every -1 of the lists as it is, or as another index that a call must ignore."""
    lists, S = inputs.arrays["block_indices"], draw.case.sizes["S"]
    past = -(-S // draw.case.options["block_size"])
    ignored = np.array([-1, -1, -2, past, 2**31 - 1, -(2**31)], np.int64).astype(np.int32)
    other = np.random.default_rng(draw.seed).choice(ignored, lists.shape)
    return Inputs({**inputs.arrays, "block_indices": np.where(lists < 0, other, lists)}, inputs.options)


def _paged(inputs: Inputs, op: str, page: int, rng: np.random.Generator) -> Inputs:
    """The caches as shuffled pools with one page of NaN; entries that nobody may follow point outside the pool: past
    the lengths, or where heads pick their blocks those of pages that nobody picked.
    """
    arrays = dict(inputs.arrays)
    caches = [name for name in CACHES[op] if arrays[name] is not None]
    first = arrays[caches[0]]
    B, S = first.shape[:2]
    if op == "decode_block_sparse":
        unread = np.isnan(first.astype(np.float32)).reshape(B, S // page, -1).all(axis=2)
    else:
        unread = np.arange(S // page) >= -(-arrays["lengths"][:, None] // page)
    order = rng.permutation(B * S // page).astype(np.int32)
    for name in caches:
        pool = np.full((B * S // page + 1, page, *arrays[name].shape[2:]), np.nan, arrays[name].dtype)
        pool[order] = arrays[name].reshape(-1, *pool.shape[1:])
        arrays[name] = pool
    table = np.where(unread, np.int32(10**6), order.reshape(B, -1))
    return Inputs(arrays, {**inputs.options, "page_table": table})


def _split(backend: Backend, draw: Draw, inputs: Inputs) -> tuple[np.ndarray, ...]:
    """Two partial results, joined by the backend's own merge_states. Shapes stay, so that nothing compiles again."""
    at, arrays = draw.at, inputs.arrays
    if draw.case.op == "merge_states":
        outs = arrays["outs"].astype(np.float32)  # parts are not rounded twice
        first = np.arange(len(outs)) < at
        parts = []
        for mine in (first, ~first):
            kept = np.where(mine[:, None, None, None], arrays["lses"], -np.inf).astype(arrays["lses"].dtype)
            parts.append(backend.call("merge_states", Inputs({"outs": outs, "lses": kept}, {})))
    elif draw.case.op == "decode_block_sparse":
        lists, options = arrays["block_indices"], {**inputs.options, "out_dtype": "float32"}
        first = np.arange(lists.shape[-1]) < at
        parts = []
        for mine in (first, ~first):
            some = {**arrays, "block_indices": np.where(mine, lists, -1)}
            parts.append(backend.call(draw.case.op, Inputs(some, options)))
            options = {name: value for name, value in options.items() if name != "sinks"}  # one call carries the sink
    else:
        lengths = arrays["lengths"]
        before = {**arrays, "lengths": np.minimum(lengths, at)}
        after = {**arrays, "lengths": np.maximum(lengths - at, 0)}
        for name in CACHES[draw.case.op]:
            array = arrays[name]
            after[name] = np.concatenate([array[:, at:], np.full_like(array[:, :at], np.nan)], axis=1)
        options = {**inputs.options, "out_dtype": "float32"}
        unsunk = {name: value for name, value in options.items() if name != "sinks"}  # one call carries the sink
        calls = Inputs(before, options), Inputs(after, unsunk)
        parts = [backend.call(draw.case.op, call) for call in calls]
    outs, lses = (np.stack(both).astype(np.float32) for both in zip(*parts, strict=True))
    return backend.call("merge_states", Inputs({"outs": outs, "lses": lses}, {}))


def _compat():
    return importlib.import_module("pallas_kernels.compat")


def _forget_races(backend: Backend) -> None:
    """Mosaic's interpreter is unusable after an exception in a kernel, and remembers its races."""
    if backend.name == "pallas" and not gpu():
        _compat().reset_interpreter()


# --- runs


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
    @hypothesis.given(draws(backend, op))
    def one(draw: Draw) -> None:
        check(backend, draw, tally)
        if progress is not None:
            progress(tally)

    if seed is not None:
        one = hypothesis.seed(seed)(one)
    one()
    return tally


def _run(backend: Backend, op: str, examples: int, seed: int) -> tuple[list[str], str | None]:
    """(a row of the summary, the report of a failure) of one backend and op, with progress on stderr."""
    start = time.perf_counter()

    def progress(tally: Tally) -> None:
        if tally.examples % 50 == 0:
            seconds = time.perf_counter() - start
            done = f"{tally.examples} of {examples}, {seconds:.0f} s"
            print(f"  {backend.name} {op}: {done}", file=sys.stderr, flush=True)

    report, counts, worst = None, ("-", "-"), "FAILS"
    try:
        tally = fuzz(backend, op, examples, seed=seed, progress=progress)
        counts, worst = (str(tally.judged.total()), str(tally.refused.total())), f"{tally.worst:.2f}"
    except AssertionError as failure:
        command = f"python -m jforge.harness.fuzz --backend {backend.name} --op {op} --examples {examples}"
        report = f"{failure}\n    {command} --seed {seed}"
    return [backend.name, op, *counts, worst, f"{time.perf_counter() - start:.0f}"], report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=500, help="cases a backend, shared among the ops")
    parser.add_argument("--backend", choices=tuple(BACKENDS))
    parser.add_argument("--op", choices=tuple(OPS))
    parser.add_argument("--seed", type=int, help="default: a fresh one")
    args = parser.parse_args(argv)
    if args.examples < 1:
        parser.error(f"--examples is {args.examples}; it must be a positive integer")
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    ops = [args.op] if args.op else list(OPS)
    print(f"seed {seed}", flush=True)
    rows = [["backend", "op", "judged", "refused", "error/limit", "seconds"]]
    failed = 0
    for backend in BACKENDS.values():
        if args.backend not in (None, backend.name):
            continue
        for op in ops:
            row, report = _run(backend, op, -(-args.examples // len(ops)), seed)
            rows.append(row)
            if report:
                failed += 1
                print(report, flush=True)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"seed {seed}: {f'{failed} failed, see above' if failed else 'all right'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
