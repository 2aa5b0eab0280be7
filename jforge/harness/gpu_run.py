"""Everything that only a GPU can prove: python -m jforge.harness.gpu_run OUT.jsonl [--commit C] [--only cases|bench]

cases: every case in every dtype on every backend, twice (the second result must be bitwise the first). bench: the ten
dense shapes. Appends JSON lines with the environment; exits 1 if a case is wrong. Uninitialised torch memory is NaN.
"""

import argparse
import os
import sys

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch and JAX share the card

import numpy as np

from jforge.harness import bench, compare, oracle
from jforge.harness.backends import BACKENDS, gpu, passes
from jforge.harness.cases import CASES, build


def run_case(case, backend, dtype: str) -> dict:
    row = {"what": "case", "case": case.name, "op": case.op, "implementation": backend.name, "dtype": dtype}
    inputs = build(case, dtype)
    want = getattr(oracle, case.op)(*inputs.arrays.values(), **inputs.options)
    try:
        got, again = backend.call(case.op, inputs), backend.call(case.op, inputs)
    except NotImplementedError as refusal:
        return {**row, "refused": str(refusal)}
    except Exception as failure:  # one broken kernel must not hide the others
        return {**row, "ok": False, "failure": f"{type(failure).__name__}: {failure}"[:300]}
    errors = compare.worst_head(got[0], want[0]), compare.lse_error(got[1], want[1])
    same = all(np.array_equal(a, b, equal_nan=True) for a, b in zip(got, again, strict=True))
    row |= {"out": errors[0], "lse": errors[1], "bitwise": same}
    return {**row, "ok": bool(passes(errors, dtype) and (same or backend.name in ("jforge", "torch_ref")))}


def run_cases(path: str, where: dict) -> bool:
    """Run and record all cases; True when none is wrong."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    rows = [run_case(c, b, d) for c in CASES for b in BACKENDS.values() for d in b.gpu_dtypes]
    torch.use_deterministic_algorithms(False)
    bench.append(path, rows, where)
    bad = [row for row in rows if not row.get("ok", True)]
    for row in bad:
        print("WRONG", row)
    refused = sum("refused" in row for row in rows)
    print(f"cases: {len(rows) - len(bad) - refused} right, {len(bad)} wrong, {refused} refused", flush=True)
    return not bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="JSON lines are appended here")
    parser.add_argument("--commit", help="the commit under test, where there is no .git to ask")
    parser.add_argument("--only", choices=("cases", "bench"))
    args = parser.parse_args()
    if not gpu():
        parser.error("no GPU is visible to JAX")
    where = bench.environment(args.commit)
    good = args.only == "bench" or run_cases(args.path, where)
    if args.only != "cases":
        for row in bench.bench_dense():
            bench.append(args.path, [row], where)
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
