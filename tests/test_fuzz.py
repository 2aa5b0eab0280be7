"""The fuzz with fixed draws, and proof that it finds planted bugs."""

import math

import numpy as np
import pytest
import torch

from jforge.harness.backends import BACKENDS
from jforge.harness.cases import Case
from jforge.harness.fuzz import Tally, check, fuzz, main
from jforge.harness.fuzz_draws import OPS, VIEWS, Draw

# The type checker draws random numbers, which hypothesis forbids; and a planted bug need not satisfy it.
pytestmark = pytest.mark.usefixtures("untyped")
DENSE, BLOCKS = "decode_attention", "decode_block_sparse"
EXAMPLES = {"jforge": 200, "torch_ref": 200, "triton": 60, "pallas": 30}  # an op; `make fuzz` runs 500 a backend


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_fuzz(name, op):
    examples = EXAMPLES[name]
    tally = fuzz(BACKENDS[name], op, examples)
    assert tally.examples >= examples
    assert tally.judged.total() >= 0.5 * examples
    assert set(tally.refused) <= REFUSED.get((name, op), set())
    if name in ("jforge", "torch_ref"):  # enough examples to have met everything
        assert {dtype for dtype, _ in tally.judged} == set(BACKENDS[name].dtypes)
        views = {"plain", "permuted", "split"} if op == "merge_states" else set(VIEWS)
        assert {view for _, view in tally.judged} == views


def _dense(dtype="float16", view="plain", at=0, S=64):
    return Draw(Case("dense", DENSE, dict(B=1, T=1, N=1, K=1, S=S, H=64, V=64), (S,)), dtype, 0, view, at)


def _latent(dtype="float16", view="plain", at=0, S=64):
    return Draw(Case("latent", "decode_mla", dict(B=1, T=1, N=1, S=S, C=64, R=16), (S,)), dtype, 0, view, at)


def _parts(dtype="float16", view="plain", at=0, V=12):
    return Draw(Case("parts", "merge_states", dict(P=2, B=1, T=1, N=1, V=V), (2,)), dtype, 0, view, at)


def _blocks(dtype="float16", view="plain", at=0, S=64, V=64, **options):
    sizes = dict(B=1, T=1, N=1, K=1, S=S, H=64, V=V, X=1, L=2)
    return Draw(Case("blocks", BLOCKS, sizes, (S,), {"block_size": 16, **options}), dtype, 0, view, at)


TILES, TF32, ROWS = "TMA needs a positive multiple of 8", "only as tf32", "multiple of 16 bytes"
REFUSALS = (
    ("triton", _dense(view="paged", at=16), "page_table has no Triton kernel yet"),
    ("triton", _latent(view="paged", at=8), "the page size is"),
    ("pallas", _dense("float32"), TF32),
    ("pallas", _dense(S=67), TILES),
    ("pallas", _dense(S=68, view="paged", at=68), TILES),
    ("pallas", _latent("float32"), TF32),
    ("pallas", _latent(S=67), TILES),
    ("pallas", _blocks("float32"), TF32),
    ("pallas", _blocks(S=67), "TMA needs a multiple of 8"),
    ("pallas", _blocks(S=72, view="paged", at=72), "its multiple or divide it"),
    ("pallas", _blocks(V=0, softcap=5.0), "has no cap"),
    ("pallas", _parts(), ROWS),
    ("pallas", _parts(V=6, view="split", at=1), ROWS),
)
"""Every refusal that a drawn example may meet, written out again."""
REFUSED: dict[tuple[str, str], set[str]] = {}
for _name, _draw, _reason in REFUSALS:
    REFUSED.setdefault((_name, _draw.case.op), set()).add(_reason)


@pytest.mark.parametrize("name,draw,reason", REFUSALS)
def test_documented_refusals_happen_and_are_counted(name, draw, reason):
    tally = Tally()
    check(BACKENDS[name], draw, tally)
    assert tally == Tally(refused={reason: 1})


# Bugs as wrappers of a right op, in what JAX and torch share, so that one text serves all backends.


def _wide_window(right, *arrays, window=None, **options):
    return right(*arrays, window=window and window + 1, **options)


def _not_blanked(right, q, k, v, lengths, **options):
    out, lse = right(q, k, v, lengths, **options)
    if options.get("page_table") is not None:
        return out, lse
    return out + 0 * v.sum(1)[:, None, np.arange(q.shape[2]) // (q.shape[2] // k.shape[2])], lse


def _base_2(right, *arrays, **options):
    out, lse = right(*arrays, **options)
    return out, lse / math.log(2)


def _scaled_sinks(right, *arrays, scale, sinks=None, **options):
    return right(*arrays, scale=scale, sinks=None if sinks is None else sinks * scale, **options)


def _group_modulo(right, q, k, v, lengths, **options):
    heads = np.arange(q.shape[2]) % k.shape[2]
    return right(q, k[:, :, heads], v[:, :, heads], lengths, **options)


def _batch_dependent(right, *arrays, **options):
    """Below every tolerance: only the comparison of bits can see it."""
    out, lse = right(*arrays, **options)
    rows = (0 * lse[:, :1, :1] + 1).nan_to_num(nan=1.0).cumsum(0)
    return out, lse * (1 + 1e-6 * rows)


def _reversed_pages(right, *arrays, page_table=None, **options):
    if page_table is not None:
        page_table = page_table[:, np.arange(page_table.shape[1])[::-1].copy()]
    return right(*arrays, page_table=page_table, **options)


def _minus_1_is_block_0(right, q, k, v, lists, lengths, **options):
    return right(q, k, v, lists * (lists != -1), lengths, **options)


def _one_list_a_group(right, q, k, v, lists, lengths, **options):
    share = lists.shape[2] // k.shape[2]
    return right(q, k, v, lists[:, :, np.arange(lists.shape[2]) // share * share], lengths, **options)


def _newest_for_all(right, q, k, v, lists, lengths, **options):
    """Every query of a row sees what its last one does. In torch alone."""
    parts = [right(q[:, [t]], k, v, lists[:, [t]], lengths, **options) for t in range(q.shape[1])]
    return tuple(torch.cat(part, 1) for part in zip(*parts, strict=True))


def _base_2_parts(right, outs, lses):
    out, lse = right(outs, lses / math.log(2))
    return out, lse * math.log(2)


BUGS = {
    "a window of W + 1": (DENSE, _wide_window, ("jforge", "torch_ref")),
    "0 * NaN not blanked": (DENSE, _not_blanked, ("jforge", "torch_ref", "triton")),
    "base-2 lse": (DENSE, _base_2, ("jforge", "torch_ref", "triton", "pallas")),
    "scaled sinks": (DENSE, _scaled_sinks, ("jforge", "torch_ref")),
    "query head n on KV head n % K": (DENSE, _group_modulo, ("jforge", "torch_ref")),
    "bits that depend on the row's place": ("merge_states", _batch_dependent, ("triton",)),
    "pages in reverse": (DENSE, _reversed_pages, ("jforge",)),
    "-1 is block 0": (BLOCKS, _minus_1_is_block_0, ("jforge", "torch_ref")),
    "one list for the heads of a group": (BLOCKS, _one_list_a_group, ("torch_ref",)),
    "all queries see the newest token": (BLOCKS, _newest_for_all, ("torch_ref",)),
    "block sinks scaled": (BLOCKS, _scaled_sinks, ("torch_ref",)),
    "parts weighted in base 2": ("merge_states", _base_2_parts, ("jforge", "torch_ref", "triton")),
}
PLANTED = [(bug, name) for bug, (_, _, names) in BUGS.items() for name in names]


def plant(monkeypatch, name, bug):
    """Put the bug around the op of a backend; returns the op's name."""
    op, wrapper, _ = BUGS[bug]
    right = getattr(BACKENDS[name].ops, op)
    monkeypatch.setattr(BACKENDS[name].ops, op, lambda *arrays, **options: wrapper(right, *arrays, **options))
    return op


@pytest.mark.parametrize("bug,name", PLANTED, ids=[f"{name}-{bug}" for bug, name in PLANTED])
def test_the_fuzz_finds(bug, name, monkeypatch):
    op = plant(monkeypatch, name, bug)
    with pytest.raises(AssertionError, match=f"{name} is wrong"):
        fuzz(BACKENDS[name], op, EXAMPLES[name], shrink=False)


def test_a_chunk_asks_for_the_same_bits_in_any_batch(monkeypatch):
    """The comparison of bits by one example: the fuzz of the slow op would need most of its budget to meet it."""
    sizes = dict(B=2, T=1, N=1, K=1, S=64, H=64, V=64)
    draw = Draw(Case("chunk", DENSE, sizes, (64, 9), {"chunk": 64}), "float32", 0, "permuted")
    check(BACKENDS["triton"], draw)
    right = BACKENDS["triton"].ops.decode_attention
    monkeypatch.setattr(BACKENDS["triton"].ops, DENSE, lambda *a, **options: _batch_dependent(right, *a, **options))
    with pytest.raises(AssertionError, match="triton is wrong: other bits when the batch is permuted"):
        check(BACKENDS["triton"], draw)


def test_a_failure_prints_an_example_that_fails_again(monkeypatch):
    with monkeypatch.context() as patch:
        op = plant(patch, "torch_ref", "a window of W + 1")
        with pytest.raises(AssertionError) as caught:
            fuzz(BACKENDS["torch_ref"], op, 200)
        draw = eval(str(caught.value).split("fuzz.check(BACKENDS['torch_ref'], ")[1].splitlines()[0][:-1])
        assert isinstance(draw, Draw) and isinstance(draw.case, Case) and "window" in draw.case.options
        with pytest.raises(AssertionError, match="is wrong"):
            check(BACKENDS["torch_ref"], draw)
    check(BACKENDS["torch_ref"], draw)  # the bug is gone, the example passes


def test_a_refusal_is_a_failure_unless_documented(monkeypatch):
    def unwritten(*arrays, **options):
        raise NotImplementedError("another reason")

    for name in ("jforge", "pallas"):
        monkeypatch.setattr(BACKENDS[name].ops, DENSE, unwritten)
        with pytest.raises(AssertionError, match=f"{name} refuses: another reason"):
            check(BACKENDS[name], _dense("float32"))


def test_an_answer_where_a_refusal_is_documented_is_a_failure(monkeypatch):
    monkeypatch.setattr(BACKENDS["pallas"].ops, DENSE, BACKENDS["jforge"].ops.decode_attention)
    with pytest.raises(AssertionError, match="pallas answers what it documents as refused"):
        check(BACKENDS["pallas"], _dense("float32"))


def test_an_exception_in_a_backend_is_a_failure(monkeypatch):
    monkeypatch.setattr(BACKENDS["jforge"].ops, DENSE, lambda *arrays, **options: 1 / 0)
    with pytest.raises(AssertionError, match="jforge raises ZeroDivisionError"):
        check(BACKENDS["jforge"], _dense("float32"))


def test_the_command_fails_with_the_case_and_the_seed(monkeypatch, capsys):
    arguments = ["--backend", "torch_ref", "--op", "merge_states", "--examples", "60", "--seed", "3"]
    assert main(arguments) == 0
    assert "seed 3: all right" in capsys.readouterr().out
    plant(monkeypatch, "torch_ref", "parts weighted in base 2")
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert "Draw(case=Case(" in printed and f"python -m jforge.harness.fuzz {' '.join(arguments)}" in printed
    assert main(arguments) == 1
    first, again = (text.split("seconds")[0] for text in (printed, capsys.readouterr().out))
    assert first == again
