"""What of the GPU script can be proved without one: mistakes end before it starts, and what proves nothing fails."""

import contextlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from jforge.harness import gpu_run
from jforge.harness.backends import BACKENDS
from jforge.harness.ops import BY_NAME, CASES, OPS, cases
from jforge.harness.timing import Timing


@pytest.mark.parametrize(
    "arguments, named",
    [
        (("rows.jsonl", "--op", "nope"), "--op: invalid choice: 'nope'"),
        (("rows.jsonl", "--case", "nope"), "--case is 'nope'"),
        (("nowhere/rows.jsonl",), "path is 'nowhere/rows.jsonl'"),
        (("rows.jsonl",), "no GPU is visible"),
    ],
)
def test_a_mistake_ends_before_anything_runs(capsys, monkeypatch, tmp_path, arguments, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu_run", *arguments])
    with pytest.raises(SystemExit) as stop:
        gpu_run.main()
    assert stop.value.code == 2 and named in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_every_op_is_memchecked():
    """But the one whose kernels are around torch's and XLA's own top-k."""
    assert {case.op for case in cases(tag="memcheck")} == set(BY_NAME) - {"topk_indices"}


def answering(call):
    return SimpleNamespace(name="pallas", gpu_dtypes=("float32",), call=call, planned=contextlib.nullcontext)


def test_only_right_cases_are_right(tmp_path):
    """A backend that answers, one that answers wrongly, one that refuses everything."""
    case = next(case for case in CASES if case.name == "merge_two")
    path, right = tmp_path / "rows.jsonl", BACKENDS["jforge"].call

    def wrong(op, inputs):
        return tuple(2 * result for result in right(op, inputs))

    def refuse(op, inputs):
        raise NotImplementedError("no kernel")

    for call, good in ((right, True), (wrong, False), (refuse, False)):
        assert gpu_run.run_cases(str(path), {}, [(case, answering(call))]) == good
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row.get("ok") for row in rows] == [True, False, None]


@pytest.mark.parametrize("op", [op for op in OPS if op.invariant], ids=lambda op: op.name)
@pytest.mark.parametrize("depends_on", ["the batch", "the slots", "nothing"])
def test_invariance_finds_bits_that_depend(depends_on, op):
    """Results made of a row's queries alone, and of what they must not depend on."""

    def call(name, inputs):
        q, slots = next(iter(inputs.arrays.values())).astype(np.float64), inputs.arrays[op.caches[0]].shape[1]
        more = {"the batch": len(q), "the slots": slots, "nothing": 0}[depends_on]
        return q + more, q

    row = gpu_run.invariance(op, answering(call), batches=6)
    assert row["ok"] == (row["different"] == 0) == (depends_on == "nothing")


@pytest.mark.parametrize(
    "median, kernels, good", [(101.0, 1, True), (104.0, 1, False), (96.0, 1, False), (101.0, 2, False)]
)
def test_timing_tells_frameworks_apart(monkeypatch, median, kernels, good):
    def of(us, count):
        return Timing(us, us, us, 50, count)

    monkeypatch.setattr(gpu_run.one_kernel, "times", lambda: (of(median, kernels), of(100.0, 1)))
    assert gpu_run.timing() == {"what": "timing", "jax": median, "torch": 100.0, "ok": good}
