"""Examples at the edges of the kernels' plans against float64, in Triton's interpreter (on a GPU with
TRITON_INTERPRET=0): tiles, blocks of rows, widths, windows, pages, splits.

bfloat16 is judged on a GPU only: the interpreter multiplies its bit patterns.
"""

from dataclasses import replace

import pytest

from jforge.harness import fuzz
from jforge.harness.backends import BACKENDS
from jforge.harness.op import Draw
from jforge.harness.ops import OPS
from triton_kernels import plan, runtime

TRITON = BACKENDS["triton"]
EDGES = [draw for op in OPS for draw in op.edges["triton"]]
HALVES = [replace(draw, dtype="bfloat16") for draw in EDGES if draw.dtype == "float16"]
DRAWS = EDGES if runtime.INTERPRETED else EDGES + HALVES


def name_of(draw: Draw) -> str:
    case = draw.case
    options = {"page": draw.at, "stored": draw.stored, **case.plan, **case.options}
    parts = [*case.sizes.items(), *((name, value) for name, value in options.items() if value)]
    return "-".join([case.op, draw.dtype, draw.values, *(f"{name}{value}" for name, value in parts)])


@pytest.mark.parametrize("draw", DRAWS, ids=name_of)
def test_matches_the_oracle(draw, monkeypatch, poisoned_memory):
    """A case's plan: fields of a configuration that calls take in the place of their own."""
    if fields := draw.case.plan:
        monkeypatch.setattr(plan.Record, "config", lambda self, tensor, key, default: replace(default, **fields))
    fuzz.check(TRITON, draw)
