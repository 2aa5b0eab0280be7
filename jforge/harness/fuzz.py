"""Fuzz of the ops: hypothesis draws cases that the named list does not have, the float64 oracle judges them.

    python -m jforge.harness.fuzz --examples 500 [--backend NAME] [--op OP] [--seed N]

Sizes come from a few buckets, since Mosaic's interpreter compiles every new shape; lengths, options and values are
free. A failure prints the smallest case found and the seed that brings it back, and exits with 1.
"""

import argparse
import collections
import random
import sys
import time

import hypothesis
import numpy as np
from hypothesis import strategies as st

from jforge.harness.backends import BACKENDS, Backend, judge, passes
from jforge.harness.cases import Case

OPS = ("decode_attention", "decode_mla", "merge_states")

# B, T, N, K, S, H, V: groups of 1, 3, 4, 5, 6, 7, 8, 12 and 16, all head dims
ATTENTION = (
    (2, 1, 8, 2, 128, 64, 64), (3, 1, 6, 2, 192, 128, 128), (2, 1, 5, 1, 64, 64, 64), (2, 2, 6, 1, 128, 64, 64),
    (1, 4, 4, 2, 256, 64, 64), (2, 1, 7, 1, 72, 80, 80), (2, 1, 4, 4, 136, 96, 96), (1, 1, 16, 1, 128, 192, 128),
    (1, 1, 12, 1, 64, 256, 256), (4, 1, 8, 1, 320, 64, 64),
)  # fmt: skip
LATENT = ((2, 1, 4, 128, 64, 16), (3, 1, 16, 192, 128, 64), (2, 2, 8, 64, 64, 16), (1, 1, 64, 128, 128, 64))
PARTS = ((1, 2, 1, 4, 64), (3, 1, 2, 5, 128), (7, 2, 1, 8, 64))


def _lengths(draw, batch: int, tokens: int, slots: int) -> tuple[int, ...]:
    """Rows of any length, the edges of tiles and of the cache more often."""
    edges = [n for n in (0, 1, tokens - 1, tokens, 63, 64, 65, 127, 128, 129, slots - 1, slots) if 0 <= n <= slots]
    return tuple(draw(st.one_of(st.sampled_from(edges), st.integers(0, slots))) for _ in range(batch))


def _options(draw, slots: int, cap: bool) -> dict:
    options = {
        "window": draw(st.none() | st.integers(1, slots)),
        "chunk": draw(st.none() | st.sampled_from((64, 128))),
        "sinks": draw(st.booleans()),
        "scale": draw(st.none() | st.floats(0.01, 8.0)),
        "softcap": draw(st.none() | st.floats(0.5, 50.0)) if cap else None,
    }
    return {name: value for name, value in options.items() if value}


@st.composite
def drawn(draw, op: str) -> Case:
    """A case of `op`."""
    if op == "merge_states":
        P, B, T, N, V = draw(st.sampled_from(PARTS))
        lengths = tuple(draw(st.integers(0, P)) for _ in range(B))
        return Case("fuzz", op, {"P": P, "B": B, "T": T, "N": N, "V": V}, lengths)
    letters, buckets = ("BTNKSHV", ATTENTION) if op == "decode_attention" else ("BTNSCR", LATENT)
    sizes = dict(zip(letters, draw(st.sampled_from(buckets)), strict=True))
    lengths = _lengths(draw, sizes["B"], sizes["T"], sizes["S"])
    return Case("fuzz", op, sizes, lengths, _options(draw, sizes["S"], cap=op == "decode_attention"))


def settings(examples: int, **more):
    """Deadlines and health checks are for fast tests; no database, so that runs do not depend on the last one."""
    return hypothesis.settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck), **more
    )


def fuzz(
    backend: Backend, op: str, examples: int, *, seed: int | None = None, shrink: bool = True
) -> collections.Counter:
    """Judge `examples` drawn cases; AssertionError with a bad one, the smallest found when `shrink`.

    seed None: the same draws every time. Returns how many were judged, by dtype. A refusal is an error: every drawn
    case is one that all backends accept.
    """
    judged: collections.Counter = collections.Counter()

    phases = [p for p in hypothesis.Phase if shrink or p is not hypothesis.Phase.shrink]

    @settings(examples, derandomize=seed is None, phases=phases)
    @hypothesis.given(drawn(op), st.sampled_from(backend.dtypes), st.integers(0, 2**16))
    def one(case: Case, dtype: str, values: int) -> None:
        errors = judge(backend, case, dtype, seed=values)
        judged[dtype] += 1
        assert passes(errors, dtype), f"{backend.name}, {dtype}: out {errors[0]:.1e}, lse {errors[1]:.1e}"

    if seed is not None:
        one = hypothesis.seed(seed)(one)
    one()
    return judged


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=500, help="cases a backend, shared among the ops")
    parser.add_argument("--backend", choices=tuple(BACKENDS))
    parser.add_argument("--op", choices=OPS)
    parser.add_argument("--seed", type=int, help="default: a fresh one")
    args = parser.parse_args()
    if args.examples < 1:
        parser.error(f"--examples is {args.examples}; it must be a positive integer")
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    ops = [args.op] if args.op else OPS
    good = True
    for backend in BACKENDS.values():
        if args.backend not in (None, backend.name):
            continue
        for op in ops:
            start = time.perf_counter()
            try:
                judged = fuzz(backend, op, -(-args.examples // len(ops)), seed=seed)
                outcome = ", ".join(f"{n} {dtype}" for dtype, n in sorted(judged.items()))
            except AssertionError as failure:
                good, outcome = False, f"FAILS: {failure}\n{getattr(failure, '__notes__', '')}"
            print(f"seed {seed} {backend.name} {op}: {outcome} ({time.perf_counter() - start:.0f} s)", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")  # the oracle must not overflow unseen
    sys.exit(main())
