"""A function of one's own under the cases of an op: `jforge.harness.judge`, `jforge equiv` and `jforge bench`."""

import functools
import json
from dataclasses import replace

import jax
import numpy as np
import own_kernels
import pytest
from test_cli import SMALL, run

import jforge.harness
import torch_ref
from jforge.harness import bench, own_kernel
from jforge.harness.ops import BY_NAME
from jforge.harness.where import place

DENSE = BY_NAME["decode_attention"]
FEW = replace(DENSE, cases=tuple(c for c in DENSE.cases if c.name in ("llama", "empty_rows", "window", "four_queries")))


def judged(function, **options):
    return own_kernel.judge(function, FEW, **options)


@pytest.mark.parametrize("name,framework", [("in_torch", "torch"), ("in_jax", "jax")])
def test_the_example_passes(capsys, name, framework):
    """In every dtype; what its signature does not have is refused and counted, and LSE is judged where it comes."""
    verdict = jforge.harness.judge(getattr(own_kernels, name), "decode_attention")
    refused = sum(bool(case.options) and set(case.options) != {"scale"} for case in DENSE.cases)
    assert verdict.ok and verdict.framework == framework
    assert len(verdict.judged) == 3 * (len(DENSE.cases) - refused) and len(list(verdict)) == 3 * len(DENSE.cases)
    assert verdict.unjudged == (["lse"] if framework == "torch" else [])
    shown = str(verdict)
    assert f"{len(verdict.judged)} judged, 0 wrong, {3 * refused} refused" in shown and "takes no window" in shown
    assert ("lse is not judged" in shown) == (framework == "torch")


def test_a_leak_is_named_with_its_slots():
    """Row 1 of `llama` has 77 tokens in 192 slots."""
    verdict = judged(own_kernels.forgets_the_mask_of_values)
    wrong = {(a.case, a.dtype): a.wrong for a in verdict.failed}
    assert not verdict.ok and "row 1, token 0, head 0, channel 0: got nan" in wrong["llama", "float32"]
    assert wrong["llama", "float32"].endswith("row 1 has length 77; it reads slots 77 to 191 of v, which it must not")
    assert "slots 0 to 127 of v" in wrong["empty_rows", "float32"]
    assert "llama in float32 (and in bfloat16, float16): out holds NaN" in str(verdict)


def test_a_wrong_head_is_named_with_its_values():
    (answer, *_) = judged(own_kernels.off_in_head_two, dtypes=["float32"])
    assert "token 0, head 2, channel" in answer.wrong and "2 of 16 vectors are wrong" in answer.wrong
    got, wanted = (float(answer.wrong.split(word)[1].split(",")[0].split(";")[0]) for word in ("got ", "wanted "))
    np.testing.assert_allclose(got, 1.5 * wanted, rtol=1e-3)


def test_an_lse_that_is_returned_is_judged():
    (answer, *_) = judged(own_kernels.base_two, dtypes=["float32"])
    assert answer.wrong.startswith("lse is off by") and answer.errors["out"] < 1e-5 < answer.errors["lse"]


@pytest.mark.parametrize(
    "function,said",
    [
        (own_kernels.in_float32, "out has dtype float32; it must be bfloat16"),
        (own_kernels.transposed, "out has shape (2, 8, 1, 128); it must be (2, 1, 8, 128)"),
        (own_kernels.raises, "raises IndexError"),
        (own_kernels.three, "returns 3 results; decode_attention returns out and lse"),
        (lambda *a, scale: jax.numpy.asarray(1) and "text", "out is a str; it must be an array of jax"),
    ],
)
def test_results_of_another_form_are_wrong(function, said):
    verdict = judged(function, dtypes=["bfloat16"])
    assert not verdict.ok and said in next(a.wrong for a in verdict)


def test_nothing_judged_is_no_pass():
    verdict = judged(own_kernels.refuses, framework="jax")
    assert not verdict.ok and not verdict.judged and "no case was judged" in str(verdict)
    assert "refused 12: no kernel for this card" in str(verdict)


@pytest.mark.parametrize("op", [name for name in BY_NAME if name != DENSE.name])
def test_every_op_can_be_asked(op):
    """Of torch_ref and jforge, with one result and two, states and lists."""
    for package in (torch_ref.ops, jforge.ops):
        verdict = own_kernel.judge(getattr(package, op), op, dtypes=["float32"])
        assert verdict.ok and not verdict.unjudged and len(verdict.judged) == len(BY_NAME[op].cases), str(verdict)


def test_the_framework_is_seen_through_wrappers():
    told = functools.partial(own_kernel.framework_of, name="mine")
    assert told(functools.partial(own_kernels.in_torch, scale=1.0)) == "torch"
    assert told(jax.jit(own_kernels.in_jax, static_argnames="scale")) == "jax"
    assert told(own_kernels.off_in_head_two) == "jax"  # through another function of its file
    with pytest.raises(ValueError, match="neither torch nor jax.*--framework"):
        told(own_kernels.in_neither)


@pytest.mark.parametrize(
    "options,named",
    [({"op": "decode"}, "'decode'"), ({"framework": "numpy"}, "'numpy'"), ({"dtypes": ["int8"]}, "'int8'")],
)
def test_bad_arguments_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        own_kernel.judge(own_kernels.in_jax, **{"op": "topk_indices", **options})


def test_the_worst_place_comes_first():
    """NaN before an infinity before a large error before a small one."""
    want = np.ones((2, 1, 2, 3))
    for value, at in ((1.1, (0, 0, 0, 1)), (9.0, (0, 0, 1, 2)), (np.inf, (1, 0, 0, 0)), (np.nan, (1, 0, 1, 1))):
        got = want.copy() if value == 1.1 else got
        got[at] = value
        found = place(got, want, "BTNV", 0.01)
        assert tuple(found.at.values()) == at and str(found).startswith(f"row {at[0]}, token 0, head {at[2]}, channel")
        np.testing.assert_equal(found.got, value)
    assert found.wrong == "4 of 4 vectors are wrong"


@pytest.mark.parametrize(
    "op,function,case,said",
    [
        ("merge_states", own_kernels.merges_what_is_empty, "merge_two", "reads part 1 of outs, which"),
        ("merge_states", own_kernels.merges_what_is_empty, "merge_many", "makes NaN where no input holds any"),
        ("index_scores", own_kernels.scores_all, "index_int8_keys", "slots 70 to 135 of k_scale"),
        ("index_scores", own_kernels.scores_all, "index_two_queries", "row 1, token 0, slot 1: got nan"),
        ("decode_block_sparse", own_kernels.touches_every_value, "blocks_of_64", "slots between 0 and 511 of v"),
        ("topk_indices", own_kernels.picks_what_is_unseen, "topk_of_many", "row 1, entry 63: got"),
        (
            "topk_indices",
            own_kernels.picks_what_is_unseen,
            "topk_more_than_there_are",
            "shape (3, 7); it must be (3, 9)",
        ),
        ("decode_linear", own_kernels.forgets_the_delta_rule, "linear_delta_rule", "row 1, head 1, channel"),
    ],
)
def test_what_is_read_is_named_in_every_op(op, function, case, said):
    verdict = own_kernel.judge(function, op, framework="jax", dtypes=["float32"])
    assert said in next(a.wrong for a in verdict if a.case == case)


@pytest.fixture
def elsewhere(monkeypatch):
    monkeypatch.syspath_prepend(str(own_kernels.__file__).rpartition("/")[0])
    monkeypatch.setitem(BY_NAME, DENSE.name, FEW)


def test_equiv_of_a_function(capsys, elsewhere):
    code, out, _ = run(capsys, "equiv", DENSE.name, "--backend", "own_kernels:in_torch", "--json")
    data = json.loads(out)
    assert code == 0 and data["ok"] and data["not_judged"] == ["lse"] and (data["judged"], data["refused"]) == (9, 3)
    bad = "own_kernels:forgets_the_mask_of_values"
    code, out, err = run(capsys, "equiv", DENSE.name, "--backend", bad, "--dtype", "float16")
    assert code == 1 and "it reads slots 77 to 191 of v" in out and f"asking {bad}: 1 of 4" in err
    out = run(capsys, "equiv", DENSE.name, "--backend", bad, "--dtype", "float16", "--json")[1]
    (llama, *_) = json.loads(out, parse_constant=pytest.fail)["cases"]
    assert llama["where"]["at"] == {"row": 1, "token": 0, "head": 0, "channel": 0} and llama["where"]["got"] is None
    code, out, _ = run(capsys, "equiv", DENSE.name, "--backend", "own_kernels:refuses", "--framework", "torch")
    assert code == 1 and "0 judged, 0 wrong, 12 refused" in out


@pytest.mark.parametrize(
    "argv,named",
    [
        (("equiv", "--backend", "own_kernels:in_jax"), "one op"),
        (("equiv", "gqa", "--backend", "own_kernels:in_jax"), "gqa"),
        (("equiv", "decode_mla", "topk_indices", "--backend", "own_kernels:in_jax"), "one op"),
        (("equiv", "decode_mla", "--framework", "jax"), "--backend"),
        (("equiv", "decode_mla", "--dtype", "float16"), "--backend"),
        (("equiv", "decode_mla", "--backend", "own_kernels"), "'own_kernels'"),
        (("equiv", "decode_mla", "--backend", "own_kernels:nothing"), "'nothing'"),
        (("equiv", "decode_mla", "--backend", "own_kernels:torch"), "module"),
        (("equiv", "decode_mla", "--backend", "own_kernels:in_neither"), "--framework"),
        (("bench", "--backend", "own_kernels:in_jax"), "one op"),
    ],
)
def test_a_mistake_is_one_line(capsys, elsewhere, argv, named):
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == "" and err.count("\n") == 1 and named in err


@pytest.mark.parametrize("name", ["in_torch", "in_jax"])
def test_bench_of_a_function(capsys, monkeypatch, elsewhere, name):
    """Timed beside the others on the same inputs; a wrong one gets no time."""
    monkeypatch.setitem(bench.TIMED, DENSE.name, replace(DENSE, cpu=(SMALL,)))
    argv = "bench", DENSE.name, "--samples", "2", "--json", "--backend"
    code, out, _ = run(capsys, *argv, f"own_kernels:{name}")
    rows = {row["implementation"]: row for row in json.loads(out)["rows"]}
    assert code == 0 and set(rows) == {"jforge (XLA)", "torch_ref", f"own_kernels:{name}"}
    assert all(row["median"] > 0 for row in rows.values())


@pytest.mark.parametrize("name,said", [("off_in_head_two", bench.WRONG), ("refuses", "no kernel for this card")])
def test_bench_times_no_function_that_is_wrong_or_refuses(capsys, monkeypatch, elsewhere, name, said):
    monkeypatch.setitem(bench.TIMED, DENSE.name, replace(DENSE, cpu=(SMALL,)))
    backend = "--backend", f"own_kernels:{name}", "--framework", "jax"
    code, out, _ = run(capsys, "bench", DENSE.name, "--samples", "2", "--json", *backend)
    (*others, row) = json.loads(out)["rows"]
    assert code == 1 and row["refused"] == said and "median" not in row
    assert len(others) == 2 and all(other["median"] > 0 for other in others)
