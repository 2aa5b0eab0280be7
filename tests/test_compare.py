"""The comparison of picks: planted ties pass, planted wrong picks do not."""

import numpy as np
import pytest

from jforge.core import compare

SCORES = np.array(
    [[9.0, 5.0, 4.0, 1.0, -np.inf], [9.0, 5.0, 5.0 + 1e-7, 1.0, 0.0], [3.0, -np.inf, -np.inf, -np.inf, -np.inf]]
)
WANT = np.array([[0, 1], [0, 2], [0, -1]])


@pytest.mark.parametrize("row,got", [(0, [1, 0]), (1, [2, 0]), (1, [1, 0]), (2, [-1, 0]), (2, [0, 7])], ids=str)
def test_picks_that_are_right(row, got):
    """In any order; token 1 for token 2, which scores the same but for rounding; none where there is no more."""
    picks = WANT.copy()
    picks[row] = got
    assert compare.picks(picks, WANT, SCORES, 2, 1e-6) == (3, 1, 0)
    assert compare.picks(WANT, picks, SCORES, 2, 1e-6) == (3, 1, 0)


WRONG = [(0, [0, 2]), (0, [0, 3]), (0, [0, 0]), (0, [0, -1]), (0, [0, 4]), (1, [1, 2]), (1, [0, 3]), (1, [0, 0]),
         (2, [0, 1]), (2, [-1, -1])]  # fmt: skip


@pytest.mark.parametrize("row,got", WRONG, ids=str)
def test_planted_wrong_picks(row, got):
    """The next best, a worse one, one twice, too few, one unseen; and the same in a tied row. Even if both agree."""
    picks = WANT.copy()
    picks[row] = got
    for ours, theirs in ((picks, WANT), (WANT, picks), (picks, picks)):
        assert compare.picks(ours, theirs, SCORES, 2, 1e-6) == (3, 1, 1)


def test_epsilon_and_forced_picks():
    """Without epsilon the scores decide; of more forced picks than places any will do."""
    assert compare.picks(np.array([[1, 0]]), WANT[1:2], SCORES[1:2], 2, 0) == (1, 0, 1)
    forced = np.array([np.inf, 1.0, np.inf, np.inf])
    assert compare.picks(np.array([3, 0]), np.array([0, 2]), forced, 2, 1e-6) == (1, 1, 0)
    assert compare.picks(np.array([3, 1]), np.array([0, 2]), forced, 2, 1e-6) == (1, 1, 1)
    assert compare.picks(np.array([3, 2, 0]), np.array([0, 2, 3]), forced, 3, 1e-6) == (1, 0, 0)


@pytest.mark.parametrize("change,message", [
    ({"got": WANT[:2]}, r"got has shape \(2, 2\)"), ({"want": WANT[0]}, r"want has shape \(2,\)"),
    ({"scores": SCORES * np.nan}, "scores holds NaN"), ({"k": 0}, "k is 0"), ({"epsilon": -1e-6}, "epsilon is -1e-06"),
])  # fmt: skip
def test_picks_names_bad_arguments(change, message):
    with pytest.raises(ValueError, match=f"^{message}; "):
        compare.picks(**({"got": WANT, "want": WANT, "scores": SCORES, "k": 2, "epsilon": 1e-6} | change))


@pytest.mark.parametrize("metric", [compare.relative, compare.worst_vector, compare.worst_head, compare.worst_row])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_never_right(metric, bad):
    """Neither in a result nor in what it is held against: an oracle that reads a poisoned slot must not agree."""
    good = np.ones((1, 2, 3, 4))
    broken = good.copy()
    broken[0, 0, 0, 0] = bad
    assert metric(good, good) == 0
    for got, want in ((broken, good), (good, broken), (broken, broken)):
        assert metric(got, want) == np.inf


def test_an_lse_may_be_minus_infinity_alone():
    lse = np.array([1.0, -np.inf])
    assert compare.lse_error(lse, lse) == 0
    for bad in (np.nan, np.inf):
        broken = np.array([bad, -np.inf])
        for got, want in ((broken, lse), (lse, broken), (broken, broken)):
            assert compare.lse_error(got, want) == np.inf
