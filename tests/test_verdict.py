"""A failing law says where, which function it points at, and what was run; a correct mechanism gets one verdict."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from judges import recount
from own_alibi import alibi

import jforge
from jforge import laws

GQA, WINDOW = jforge.get("gqa"), jforge.get("sliding_window")
CFG = GQA.examples[0]


def check(changes, *names, att=GQA):
    report = jforge.check(att._replace(**changes), laws=names)
    return report, {row.law: row for row in report}


def decode_wrong_in(row: int, token: int):
    def decode(params, cfg, x, cache):
        y, after = GQA.decode(params, cfg, x, cache)
        return y.at[row, 0, 0].add(jnp.where(cache.length[row] >= token, 0.5, 0)), after

    return decode


def stores_wrong(buffer: str, slot: int):
    """decode, which puts one number wrong into a slot of row 1."""

    def decode(params, cfg, x, cache):
        y, after = GQA.decode(params, cfg, x, cache)
        wrong = getattr(after, buffer).at[1, slot].set(getattr(after, buffer)[1, slot] + 0.25, mode="drop")
        last = (after.length == slot + 1)[:, None, None, None]
        return y, replace(after, **{buffer: jnp.where(last, wrong, getattr(after, buffer))})

    return decode


def test_an_output_is_named_by_its_first_wrong_row_and_token():
    _, rows = check({"decode": decode_wrong_in(1, 3)}, "L2")
    where = rows["L2"].where
    assert (where.of, where.row, where.token) == ("decode", 1, 3)
    assert where.got - where.want == pytest.approx(0.5)
    assert f"decode, row 1, token 3: got {where.got:.6g}, want {where.want:.6g}" in rows["L2"].says


def test_a_cache_is_named_by_buffer_and_slot():
    _, rows = check({"decode": stores_wrong("v", 2)}, "L4")
    where = rows["L4"].where
    assert (where.of, where.buffer, where.row, where.slot) == ("after decode", "v", 1, 2)
    assert where.got - where.want == pytest.approx(0.25)


def test_a_mask_is_named_by_its_pairs_and_counted():
    report, rows = check({"visible": lambda cfg, q_pos, k_pos: (k_pos <= q_pos) & (k_pos != 2)}, "L7")
    T = laws.Bench(GQA, CFG, 0).T
    assert rows["L7"].where.pairs == tuple((t, 2) for t in range(2, T))
    assert rows["L7"].error == T - 2 and isinstance(rows["L7"].error, int)
    assert f"{T - 2} pairs not visible; (query, key) (2, 2), (3, 2)" in str(report)


def test_bytes_are_counted_and_named_by_buffer():
    att = recount(GQA, read=lambda cost: {"k": cost.read["k"]})(None)
    (row,) = jforge.check(att, laws=("L8",))
    assert row.where.buffer == "v" and row.error == 12  # three contexts, two dtypes, closing or not
    assert "read at context 3, float32: cost says 0 B, counted 240 B" in row.says


def test_an_exception_names_the_function_and_its_line():
    def decode(params, cfg, x, cache):
        raise KeyError("wq2")

    report, rows = check({"decode": decode}, "L1", "L2")
    assert rows["L2"].where.of == "decode" and rows["L2"].where.source.startswith("test_verdict.py:")
    assert report.points_at == "decode: it raises"


def scaled(name: str, att=GQA):
    """`name` gives outputs 1.01 times too large."""

    def wrong(*args, **options):
        out = getattr(att, name)(*args, **options)
        return out * 1.01 if name == "forward" else (out[0] * 1.01, out[1])

    return {name: wrong}


def turned(params, cfg, x, cache):
    """Right until the ring is full."""
    y, after = WINDOW.decode(params, cfg, x, cache)
    return jnp.where((after.length > cfg.sliding_window)[:, None, None], 1.01 * y, y), after


@pytest.mark.parametrize(
    "changes, names, function, att",
    [
        (scaled("decode"), ("L1", "L2"), "decode", GQA),
        (scaled("prefill"), ("L1", "L2"), "prefill", GQA),
        (scaled("forward"), ("L1", "L2", "L4"), "forward", GQA),
        ({"prefill": lambda p, cfg, x, c, lengths=None: GQA.prefill(p, cfg, x, c)}, ("L1", "L2", "L6"), "prefill", GQA),
        ({"decode": turned}, ("L1", "L2"), "the ring", WINDOW),
        ({"cost": recount(GQA, written=lambda cost: {})(None).cost}, ("L1", "L8"), "cost", GQA),
    ],
    ids=["decode", "prefill", "forward", "lengths", "ring", "cost"],
)
def test_the_failed_laws_point_at_a_function(changes, names, function, att):
    report, _ = check(changes, *names, att=att)
    assert report.points_at.startswith(function), report
    assert str(report).count("config: ") == 1 and f"this points at {function}" in str(report)


def test_a_correct_mechanism_whose_cheap_gradient_is_nan_holds():
    """XLA's level 0, which the process may have asked for as well, makes NaN of the gradient of a plain softmax."""
    report = jforge.check(alibi, laws=("L1", "L7", "L11"))
    assert report.ok, report
    again = [row for row in report if row.before]
    for row in again:
        assert row.compiled == "optimised" and row.before.compiled == "cheaply" and not row.before.ok
        assert "optimised; compiled cheaply the error was" in row.says


def test_what_fails_is_run_again_as_users_run(monkeypatch):
    """And only that: a law that holds, one that is not about numbers and one that raises are run once."""
    ran = []

    def law(name, error):
        def run(bench):
            ran.append((name, bench.options["xla_backend_optimization_level"]))
            return (error if bench.options is not None and ran[-1][1] == 0 else 0.0), "so"

        return run

    for name, error in (("L1", 0.0), ("L2", 1.0), ("L8", 1)):
        monkeypatch.setitem(laws.LAWS, name, law(name, error))
    rows = list(jforge.check(GQA, laws=("L1", "L2", "L8")))
    assert ran == [("L1", 0), ("L2", 0), ("L2", 3), ("L8", 0)]
    assert [row.ok for row in rows] == [True, True, False] and rows[1].before.error == 1.0


def test_the_laws_compile_as_they_say_whatever_the_process_asks(monkeypatch):
    """conftest.py turns XLA's optimisations off; the optimised run has them."""
    assert jax.config.read("jax_disable_most_optimizations")
    monkeypatch.setattr(laws, "CHEAPLY", laws.OPTIMISED)
    (row,) = jforge.check(alibi, laws=("L7",))
    assert row.ok and row.before is None
