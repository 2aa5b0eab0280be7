"""Everything that only a GPU can prove: python -m jforge.harness.gpu_run OUT.jsonl [--commit C] [--only PART] [--op OP]

cases: every case in every dtype on every backend, twice (the second result must be bitwise the first).
invariance: with a fixed chunk a row's bits are those of the row alone, in 50 random batches.
memcheck: compute-sanitizer over one small case a kernel.
timing: the same kernel takes the same time through JAX and through torch.
bench: the shapes of jforge bench, both packages and their peers.
Appends JSON lines with the environment; exits 1 if something is wrong. Uninitialised torch memory is NaN.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch and JAX share the card

import numpy as np

from jforge.harness import bench, one_kernel, records
from jforge.harness.backends import BACKENDS, KERNELS, gpu, passes
from jforge.harness.op import Case, Inputs, Op
from jforge.harness.ops import BY_NAME, CASES, OPS, cases


def run_case(case: Case, backend, dtype: str) -> dict:
    row = {"what": "case", "case": case.name, "op": case.op, "implementation": backend.name, "dtype": dtype}
    op = BY_NAME[case.op]
    inputs = op.inputs(case, dtype)
    want = op.truth(inputs)
    try:
        with backend.planned(case.plan):
            got, again = backend.call(case.op, inputs), backend.call(case.op, inputs)
    except NotImplementedError as refusal:
        return {**row, "refused": str(refusal)}
    except Exception as failure:  # one broken kernel must not hide the others
        return {**row, "ok": False, "failure": f"{type(failure).__name__}: {failure}"[:300]}
    errors = op.errors(got, want)
    same = all(np.array_equal(a, b, equal_nan=True) for a, b in zip(got, again, strict=True))
    row |= {"out": errors[0], "lse": errors[1], "bitwise": same}
    return {**row, "ok": bool(passes(errors, dtype) and (same or backend.name in ("jforge", "torch_ref")))}


def run_cases(path: str, where: dict, chosen) -> bool:
    """Run and record all cases; True when one or more are right and none is wrong."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    rows = [run_case(c, b, d) for c, b in chosen for d in b.gpu_dtypes]
    torch.use_deterministic_algorithms(False)
    records.append(path, rows, where)
    bad = [row for row in rows if not row.get("ok", True)]
    for row in bad:
        print("WRONG", row)
    refused = sum("refused" in row for row in rows)
    right = len(rows) - len(bad) - refused
    print(f"cases: {right} right, {len(bad)} wrong, {refused} refused", flush=True)
    return right > 0 and not bad


def invariance(op: Op, backend, batches: int = 50) -> dict:
    """One row among random others: the same bits as alone, whatever the batch size, its place, their lengths, and how
    long the cache and the lists are; with sinks, and splits of 128 keys and of the whole cache (the row alone then has
    one split) in turn. A list names the whole cache.
    """
    rng, case = np.random.default_rng(0), op.invariant
    S, row = case.sizes["S"], op.inputs(case, "bfloat16")

    def call(chunk: int, arrays):
        return backend.call(op.name, Inputs(arrays, {**row.options, "chunk": chunk}))

    want = {chunk: call(chunk, row.arrays) for chunk in (128, S)}
    different = 0
    for i in range(batches):
        B = int(rng.choice((2, 3, 5, 8, 17)))  # few sizes: every new one is a compilation for Pallas
        slots, chunk, at = S << (i // 2) % 2, (128, S)[i % 2], int(rng.integers(B))
        lengths = rng.integers(0, slots + 1, B)
        lengths[at] = case.lengths[0]
        sizes = {**case.sizes, "B": B, "S": slots} | ({"L": case.sizes["L"] * slots // S} if op.lists else {})
        others = op.inputs(Case(f"batch {i}", op.name, sizes, tuple(lengths.tolist()), case.options), "bfloat16")
        for name, array in others.arrays.items():
            mine = row.arrays[name][0]
            if name == op.lists:
                array[at] = -1
                array[at, ..., : mine.shape[-1]] = mine
            else:
                array[(at, slice(len(mine))) if name in op.caches else at] = mine
        got = call(chunk, others.arrays)
        different += not all(np.array_equal(g[at], w[0]) for g, w in zip(got, want[chunk], strict=True))
    found = {"what": "invariance", "op": op.name, "implementation": backend.name, "batches": batches}
    return {**found, "different": different, "ok": different == 0}


def memcheck(backend, case: str) -> dict:
    """What compute-sanitizer finds in one case, in a process of its own, where each array is an allocation."""
    run = (sys.executable, "-m", "jforge.harness.gpu_run", os.devnull, "--only", "cases", "--case", case)
    result = subprocess.run(
        ["compute-sanitizer", "--tool", "memcheck", *run, "--backend", backend.name, "--commit", "-"],
        env=os.environ | {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    summary = re.search(r"ERROR SUMMARY: (\d+) error", result.stdout)
    row = {"what": "memcheck", "case": case, "implementation": backend.name}
    if result.returncode or summary is None:
        return {**row, "ok": False, "failure": (result.stdout + result.stderr)[-300:]}
    return {**row, "errors": int(summary[1]), "ok": summary[1] == "0"}


def memchecks(backends) -> list[dict]:
    if shutil.which("compute-sanitizer") is None:
        raise SystemExit("gpu_run: error: compute-sanitizer, of the CUDA toolkit, is not on the PATH")
    chosen = [(backend, case.name) for backend in backends for case in cases(tag="memcheck")]
    with ThreadPoolExecutor(os.cpu_count() // 2) as pool:  # a process spends most of its time on the CPU
        return list(pool.map(lambda pair: memcheck(*pair), chosen))


def timing() -> dict:
    """One kernel through both frameworks: medians in microseconds, which must differ by less than 3 %."""
    through_jax, through_torch = one_kernel.times()
    apart = abs(through_jax.median / through_torch.median - 1)
    row = {"what": "timing", "jax": through_jax.median, "torch": through_torch.median}
    return {**row, "ok": apart < 0.03 and through_jax.kernels == through_torch.kernels == 1}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="JSON lines are appended here")
    parser.add_argument("--commit", help="the commit under test, where there is no .git to ask")
    parser.add_argument("--only", choices=("cases", "invariance", "memcheck", "timing", "bench"))
    ops = tuple(dict.fromkeys((*bench.TIMED, *BY_NAME)))
    parser.add_argument(
        "--op", action="append", choices=ops, metavar="OP", help="of cases and bench, this alone (may be repeated)"
    )
    parser.add_argument("--case", help="one case by name")
    parser.add_argument("--backend", choices=tuple(BACKENDS))
    args = parser.parse_args()
    if args.case is not None and args.case not in {case.name for case in CASES}:
        parser.error(f"--case is {args.case!r}; no op has one of that name")
    try:
        records.writable("path", args.path)
    except ValueError as problem:
        parser.error(str(problem))
    if not gpu():
        parser.error("no GPU is visible to JAX")
    where, good = records.environment(args.commit), True
    backends = [b for b in BACKENDS.values() if args.backend in (None, b.name)]
    if args.only in (None, "cases"):
        named = [c for c in CASES if args.case in (None, c.name) and c.op in (args.op or (c.op,))]
        chosen = [(c, b) for c in named for b in backends]
        good &= run_cases(args.path, where, chosen)
    kernels = [b for b in backends if b.name in KERNELS]
    parts = {
        "invariance": lambda: [invariance(op, b) for op in OPS if op.invariant for b in kernels],
        "memcheck": lambda: memchecks(kernels),
        "timing": lambda: [timing()],
    }
    for part, rows_of in parts.items():
        if args.only in (None, part):
            rows = rows_of()
            records.append(args.path, rows, where)
            print(*rows, sep="\n", flush=True)
            good &= all(row["ok"] for row in rows)
    if args.only in (None, "bench"):
        for row in bench.run(args.op or bench.TIMED):
            records.append(args.path, [row], where)
            good &= row.get("implementation") not in KERNELS or "refused" not in row
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
