"""The fuzz with fixed draws, and proof that it finds planted bugs."""

import pytest
from fuzz_bugs import BLOCKS, BUGS, DENSE, LINEAR, LISTED, batch_dependent

from jforge.harness.backends import BACKENDS
from jforge.harness.fuzz import Tally, check, fuzz, main
from jforge.harness.op import Case, Draw
from jforge.harness.ops import BY_NAME

# The type checker draws random numbers, which hypothesis forbids; and a planted bug need not satisfy it.
pytestmark = pytest.mark.usefixtures("untyped")
EXAMPLES = {"jforge": 200, "torch_ref": 200, "triton": 60, "pallas": 30}  # an op; `make fuzz` runs 500 a backend


@pytest.mark.parametrize("op", BY_NAME)
@pytest.mark.parametrize("name", EXAMPLES)
def test_fuzz(name, op):
    examples = EXAMPLES[name]
    tally = fuzz(BACKENDS[name], op, examples)
    assert tally.examples >= examples
    judged = tally.judged.total()
    if judged < 0.5 * examples:  # most draws were refused: draw again
        judged += fuzz(BACKENDS[name], op, examples, seed=1).judged.total()
    assert judged >= 0.5 * examples
    assert set(tally.refused) <= REFUSED.get((name, op), set())
    if name in ("jforge", "torch_ref"):  # enough examples to have met everything
        assert {dtype for dtype, _ in tally.judged} == set(BACKENDS[name].dtypes)
        assert {view for _, view in tally.judged} == set(BY_NAME[op].fuzz.views)


def _dense(dtype="float16", view="plain", at=0, S=64):
    return Draw(Case("dense", DENSE, dict(B=1, T=1, N=1, K=1, S=S, H=64, V=64), (S,)), dtype, 0, view, at)


def _latent(dtype="float16", view="plain", at=0, S=64):
    return Draw(Case("latent", "decode_mla", dict(B=1, T=1, N=1, S=S, C=64, R=16), (S,)), dtype, 0, view, at)


def _parts(dtype="float16", view="plain", at=0, V=12):
    return Draw(Case("parts", "merge_states", dict(P=2, B=1, T=1, N=1, V=V), (2,)), dtype, 0, view, at)


def _blocks(dtype="float16", view="plain", at=0, S=64, V=64, **options):
    sizes = dict(B=1, T=1, N=1, K=1, S=S, H=64, V=V, X=1, L=2)
    return Draw(Case("blocks", BLOCKS, sizes, (S,), {"block_size": 16, **options}), dtype, 0, view, at)


def _index(op="index_scores", dtype="float16", stored=None, T=1, heads=4, S=64, J=64, **options):
    sizes = dict(B=1, T=T, I=heads, S=S, J=J)
    return Draw(Case("index", op, sizes, (S,), options), dtype, 0, values="coarse", stored=stored)


def _maxima(block_size=16, **changes):
    return _index("block_index_scores", block_size=block_size, **changes)


def _listed(dtype="float16", stored=None, T=1, S=64, C=64, R=16, L=8, **options):
    sizes = dict(B=1, T=T, N=4, S=S, C=C, R=R, L=L)
    return Draw(Case("listed", LISTED, sizes, (L,), options), dtype, 0, stored=stored)


def _state(dtype="float16", N=1, H=16, V=32):
    return Draw(Case("state", LINEAR, dict(B=1, N=N, H=H, V=V, decay=1, beta=1)), dtype, 0)


TILES, TF32, ROWS = "TMA needs a positive multiple of 8", "only as tf32", "multiple of 16 bytes"
REGISTERS, WIDTHS, GRID = "needs more registers", "the kernel takes multiples of", "the grid must not be empty"
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
    ("triton", _index(heads=264), REGISTERS),
    ("triton", _index("index_scores", "float32", heads=256, J=256), "need more shared memory"),
    ("triton", _maxima(J=272), REGISTERS),
    ("triton", _maxima(dtype="float32", heads=256, J=256), "need more shared memory"),
    ("triton", _listed(stored="int8"), "latent_scale. has no Triton kernel yet"),
    ("triton", _listed(C=520), REGISTERS),
    ("triton", _listed(R=72), REGISTERS),
    ("triton", _state(H=1032), REGISTERS),
    ("pallas", _index(dtype="float32"), TF32),
    ("pallas", _index(S=67), TILES),
    ("pallas", _index(S=0), TILES),
    ("pallas", _index(J=24), WIDTHS),
    ("pallas", _index(J=16, stored="int8"), WIDTHS),
    ("pallas", _index(J=272), WIDTHS),
    ("pallas", _index(T=0), GRID),
    ("pallas", _index(heads=264, J=256), "heads of one query must fit"),
    ("pallas", _maxima(dtype="float32"), TF32),
    ("pallas", _maxima(S=67), TILES),
    ("pallas", _maxima(J=24), WIDTHS),
    ("pallas", _maxima(T=0), GRID),
    ("pallas", _maxima(24), "block_size is"),
    ("pallas", _listed(stored="float8_e4m3fn"), "latent_scale is given"),
    ("pallas", _listed("float32"), TF32),
    ("pallas", _listed(out_dtype="float64"), "out_dtype is float64"),
    ("pallas", _listed(S=0), "needs at least one"),
    ("pallas", _listed(L=0), "needs at least one"),
    ("pallas", _listed(T=0), GRID),
    ("pallas", _listed(C=80), "must be multiples of 64"),
    ("pallas", _listed(R=12), "the kernel takes multiples of 8"),
    ("pallas", _state(H=12), "the kernel takes multiples of 8"),
    ("pallas", _state(H=264), "the kernel takes multiples of 8"),
    ("pallas", _state(V=40), "the kernel takes multiples of 16"),
    ("pallas", _state(N=0), "none may be 0"),
)
"""Every refusal that is documented, those among them that a drawn example may meet, written out again."""
REFUSED: dict[tuple[str, str], set[str]] = {}
for _name, _draw, _reason in REFUSALS:
    REFUSED.setdefault((_name, _draw.case.op), set()).add(_reason)


@pytest.mark.parametrize("name,draw,reason", REFUSALS)
def test_documented_refusals_happen_and_are_counted(name, draw, reason):
    tally = Tally()
    check(BACKENDS[name], draw, tally)
    assert tally == Tally(refused={reason: 1})


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
    monkeypatch.setattr(BACKENDS["triton"].ops, DENSE, lambda *a, **options: batch_dependent(right, *a, **options))
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
