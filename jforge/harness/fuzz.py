"""Fuzz of the ops: hypothesis draws cases that the named list does not have, the float64 oracle judges them.

    python -m jforge.harness.fuzz --examples 500 [--backend NAME] [--op OP] [--seed N]

Sizes come from a few buckets, since Mosaic's interpreter compiles every new shape; lengths, options and values are
free. Each example also draws a view of the same question, whose answer must not differ: the batch permuted, one row
among emptied ones, the cache in shuffled pages, the keys in two calls that `merge_states` joins. A new op is one
strategy and one entry of OPS.

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
from collections.abc import Callable

import hypothesis
import numpy as np
from hypothesis import strategies as st

from jforge.harness import compare, oracle
from jforge.harness.backends import BACKENDS, Backend, gpu
from jforge.harness.cases import DTYPES, Case, Inputs, build

# B, T, N, K, S, H, V: groups of 1 to 8, 12 and 16; all head dims; 67 and 129 slots, which Pallas refuses
ATTENTION = (
    (2, 1, 8, 2, 128, 64, 64), (2, 1, 6, 2, 192, 128, 128), (2, 1, 5, 1, 64, 64, 64), (2, 2, 6, 1, 128, 64, 64),
    (2, 4, 4, 2, 136, 64, 64), (2, 1, 14, 2, 72, 80, 80), (2, 1, 4, 4, 136, 96, 96), (2, 1, 16, 1, 72, 192, 128),
    (2, 2, 12, 1, 64, 256, 256), (3, 1, 8, 1, 256, 64, 64), (2, 4, 6, 2, 67, 64, 64), (2, 1, 16, 2, 129, 128, 128),
)  # fmt: skip
# B, T, N, S, C, R
LATENT = (
    (2, 1, 4, 128, 64, 16), (2, 1, 16, 192, 128, 64), (2, 2, 8, 64, 64, 16), (2, 4, 16, 136, 64, 64),
    (1, 1, 64, 72, 128, 64), (2, 1, 5, 67, 64, 8), (3, 1, 8, 256, 64, 16),
)  # fmt: skip
# P, B, T, N, V: rows of 12 values are not a multiple of 16 bytes in 16 bits, 40 parts are more than one TMA copy
PARTS = ((1, 2, 1, 3, 64), (3, 2, 2, 1, 128), (7, 2, 1, 2, 64), (2, 3, 1, 2, 12), (4, 1, 2, 1, 256), (40, 2, 1, 1, 64))
CACHES = {"decode_attention": ("k", "v"), "decode_mla": ("latent", "k_rope")}
KERNELS = ("triton", "pallas")  # of which DESIGN asks the same bits in any batch
VIEWS = ("plain", "permuted", "alone", "paged", "split")


@dataclasses.dataclass(frozen=True)
class Draw:
    """One example: a case, the dtype and seed of its values, and how the question is put.

    view: "plain"; "permuted" (the batch in another order); "alone" (row `at`, all others emptied); "paged" (pages of
    `at` slots); "split" (keys before and after slot `at` in two calls, or parts before and after part `at`).
    """

    case: Case
    dtype: str
    seed: int
    view: str = "plain"
    at: int = 0


@dataclasses.dataclass
class Tally:
    """What a run saw: examples judged, by (dtype, view); refusals, by reason; the worst error over its tolerance."""

    judged: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    refused: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    worst: float = 0.0

    @property
    def examples(self) -> int:
        return self.judged.total() + self.refused.total()


# --- what is drawn


@st.composite
def _decode_attention(draw, dtypes: tuple[str, ...], out: tuple[str, ...]) -> Draw:
    sizes = dict(zip("BTNKSHV", draw(st.sampled_from(ATTENTION)), strict=True))
    options = _options(draw, sizes, out) | _optional(draw, softcap=st.floats(0.5, 50.0))
    return _over_a_cache(draw, "decode_attention", sizes, options, dtypes)


@st.composite
def _decode_mla(draw, dtypes: tuple[str, ...], out: tuple[str, ...]) -> Draw:
    sizes = dict(zip("BTNSCR", draw(st.sampled_from(LATENT)), strict=True))
    return _over_a_cache(draw, "decode_mla", sizes, _options(draw, sizes, out), dtypes)


@st.composite
def _merge_states(draw, dtypes: tuple[str, ...], out: tuple[str, ...]) -> Draw:
    sizes = dict(zip("PBTNV", draw(st.sampled_from(PARTS)), strict=True))
    lengths = tuple(draw(st.integers(0, sizes["P"])) for _ in range(sizes["B"]))
    view = draw(st.sampled_from(("plain", "permuted", "split")))
    at = draw(st.integers(0, sizes["P"])) if view == "split" else 0
    case = Case("fuzz", "merge_states", sizes, lengths)
    return Draw(case, draw(st.sampled_from(dtypes)), draw(_seeds()), view, at)


OPS: dict[str, Callable[..., st.SearchStrategy[Draw]]] = {
    "decode_attention": _decode_attention,
    "decode_mla": _decode_mla,
    "merge_states": _merge_states,
}


def _seeds():
    return st.integers(0, 2**16)


def _optional(draw, **strategies) -> dict:
    """Each keyword argument given or left out."""
    drawn = {name: draw(st.none() | strategy) for name, strategy in strategies.items()}
    return {name: value for name, value in drawn.items() if value is not None}


def _options(draw, sizes: dict[str, int], out: tuple[str, ...]) -> dict:
    """Logits of a spread from 0.1, nearly uniform weights, to 4; windows and chunks at the edges of tiles and cache.

    No larger ones: float32 holds a logit x to x * 2^-24, and exp makes that the relative error of a weight.
    """
    T, S = sizes["T"], sizes["S"]
    width = sizes["H"] if "H" in sizes else sizes["C"] + sizes["R"]
    return _optional(
        draw,
        window=st.sampled_from((1, T, 63, 64, 65, S - 1, S, S + 5)) | st.integers(1, S),
        chunk=st.sampled_from((16, 64, 100, 128, S + 1)),
        sinks=st.just(True),
        scale=st.floats(0.1, 4.0).map(lambda spread: spread * width**-0.5),
        out_dtype=st.sampled_from(out),
    )


def _over_a_cache(draw, op: str, sizes: dict[str, int], options: dict, dtypes: tuple[str, ...]) -> Draw:
    view = draw(st.sampled_from(VIEWS))
    if view == "split":  # with more queries or a window, the keys of a part end elsewhere for each query or row
        sizes = sizes | {"T": 1}
        options.pop("window", None)
    if view in ("permuted", "alone"):  # with a chunk the bits are compared too; "plain" goes without one
        options.setdefault("chunk", 64)
    B, T, S = (sizes[axis] for axis in "BTS")
    window, chunk = options.get("window", S), options.get("chunk", S)
    near = {n + d for n in (64, 128, window, chunk) for d in (-1, 0, 1)} | {0, 1, T - 1, T, S - 1, S}
    row = st.sampled_from(sorted(n for n in near if 0 <= n <= S)) | st.integers(0, S)
    lengths = tuple(draw(row) for _ in range(B))
    pages = [n for n in (8, 16, 32, 64, S) if S % n == 0]
    choices = {"alone": st.integers(0, B - 1), "paged": st.sampled_from(pages), "split": st.integers(0, S)}
    at = draw(choices.get(view, st.just(0)))
    return Draw(Case("fuzz", op, sizes, lengths, options), draw(st.sampled_from(dtypes)), draw(_seeds()), view, at)


def draws(backend: Backend, op: str) -> st.SearchStrategy[Draw]:
    """Examples of `op` in the dtypes that the backend is judged in here, and for Pallas now and then in the one that
    it must refuse. float32 results are for all; Triton's interpreter truncates to bfloat16 where a GPU rounds.
    """
    judged = backend.gpu_dtypes if gpu() else backend.dtypes
    out = tuple(dict.fromkeys(("float32", *judged)))
    return OPS[op](judged * 4 + ("float32",) if backend.name == "pallas" else judged, out)


# --- what a backend may refuse


def refusal(backend: Backend, draw: Draw) -> str | None:
    """The reason (a pattern) that the backend documents for not answering this example; None: it must answer."""
    op, sizes, paged = draw.case.op, draw.case.sizes, draw.view == "paged"
    if backend.name == "triton":
        if op == "decode_attention" and paged:
            return "page_table has no Triton kernel yet"
        if op == "decode_mla" and paged and (draw.at < 16 or draw.at & (draw.at - 1)):
            return "the page size is"
    if backend.name == "pallas":
        if op == "merge_states":
            itemsize = 4 if draw.view == "split" else DTYPES[draw.dtype].itemsize
            return "multiple of 16 bytes" if sizes["V"] * itemsize % 16 else None
        if draw.dtype == "float32":
            return "only as tf32"
        if (draw.at if paged else sizes["S"]) % 8:
            return "TMA needs a positive multiple of 8"
    return None


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
            moved = {name: np.take(array, order, axis) for name, array in arrays.items()}
            got = backend.call(op, Inputs(moved, inputs.options))
            return inputs, tuple(part[np.argsort(order)] for part in got)
        case "alone":
            lengths = np.zeros_like(arrays["lengths"])
            lengths[draw.at] = arrays["lengths"][draw.at]
            inputs = Inputs({**arrays, "lengths": lengths}, inputs.options)
        case "paged":
            return inputs, backend.call(op, _paged(inputs, CACHES[op], draw.at, rng))
        case "split":
            return inputs, _split(backend, draw, inputs)
    return inputs, backend.call(op, inputs)


def _paged(inputs: Inputs, caches: tuple[str, ...], page: int, rng: np.random.Generator) -> Inputs:
    """The caches as shuffled pools with one page of NaN; entries that no length reaches point outside the pool."""
    arrays, lengths = dict(inputs.arrays), inputs.arrays["lengths"]
    B, S = arrays[caches[0]].shape[:2]
    order = rng.permutation(B * S // page).astype(np.int32)
    for name in caches:
        pool = np.full((B * S // page + 1, page, *arrays[name].shape[2:]), np.nan, arrays[name].dtype)
        pool[order] = arrays[name].reshape(-1, *pool.shape[1:])
        arrays[name] = pool
    table = order.reshape(B, -1)
    table[np.arange(S // page) >= -(-lengths[:, None] // page)] = 10**6
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
