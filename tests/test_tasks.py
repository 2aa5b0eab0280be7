"""jforge.tasks: solvers that read tokens alone find every target; places, chances and refusals are as described."""

from functools import lru_cache, partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from task_solvers import BLANK, MARK, START, faults

from jforge import tasks
from jforge.tasks.task import distinct, filled

DATA = Path(tasks.__file__).parent
PAPERS = (DATA / "state_papers.txt").read_bytes()
ROWS, LENGTH = 2000, 40
SIGMA = 4.5  # of a measured share; by chance one in 150,000 is farther off, and seeds are fixed
SMALL = {  # vocabularies so small that accidents, such as noise that is a key, would be frequent; questions in a row
    tasks.Recall(vocabulary=12, pairs=3): 3,
    tasks.Needle(vocabulary=12): 1,
    tasks.Copy(vocabulary=8, width=4): 4,
    tasks.SelectiveCopy(vocabulary=8, width=3): 3,
    tasks.TwoHop(vocabulary=18, chains=3): 3,
}
OTHERS = [  # and at other lengths: (task, length, questions)
    (tasks.Recall(), 160, 8),
    (tasks.Recall(vocabulary=8, pairs=4, power=0.01), 12, 4),  # every key is asked for, and no place is left
    (tasks.Recall(vocabulary=20, pairs=6, distance=(7, 30)), 50, 6),
    (tasks.Recall(vocabulary=8, pairs=2, distance=(1, 500), filler="blank"), 9, 2),
    (tasks.Needle(vocabulary=4, depth=0.3), 90, 1),
    (tasks.Needle(depth=1, filler="blank"), 3, 1),
    (tasks.Copy(vocabulary=2, width=5, distance=0), 11, 5),
    (tasks.Copy(width=1, distance=4, filler="blank"), 30, 1),
    (tasks.SelectiveCopy(vocabulary=2), 16, 8),
    (tasks.TwoHop(vocabulary=6, chains=2, filler="blank"), 10, 2),
]
EVERY = pytest.mark.parametrize("task", [*SMALL, tasks.Text()], ids=lambda task: type(task).__name__)
traced: list[tasks.Task] = []


@partial(jax.jit, static_argnums=(0, 2))
def draw(task, keys, length):
    traced.append(task)
    return jax.vmap(lambda key: task.draw(key, ROWS, length))(keys)


def keys_of(seed):
    return jax.random.split(jax.random.key(seed), 2)


@lru_cache
def drawn(task, seed=0, length=LENGTH) -> tasks.Batch:
    """Two keys' batches as NumPy arrays, one after the other."""
    batch = draw(task, keys_of(seed), length)
    return tasks.Batch(*(np.asarray(leaf).reshape(-1, length) for leaf in batch))


def near(share: float, want: float, of: int) -> bool:
    return abs(share - want) <= SIGMA * np.sqrt(want * (1 - want) / of)


def first(rows: int, batch) -> tasks.Batch:
    return tasks.Batch(*(leaf[:rows] for leaf in batch))


@pytest.mark.parametrize("task, length, questions", [*((task, LENGTH, n) for task, n in SMALL.items()), *OTHERS])
def test_a_solver_finds_every_target_and_distance(task, length, questions):
    for seed in range(2):
        assert faults(task, first(150, drawn(task, seed, length)), questions) == []


def shifted(batch):
    """The target of the place before."""
    return batch._replace(targets=np.roll(batch.targets, 1, axis=1))


def one_value_twice(batch):
    """The first key of a row has a second value."""
    tokens = batch.tokens.copy()
    tokens[0, 2] = tokens[0, 0]
    return batch._replace(tokens=tokens)


def key_as_noise(batch):
    """The asked key once more before its question."""
    tokens, (row, at) = batch.tokens.copy(), np.argwhere(batch.scored)[-1]
    tokens[row, np.flatnonzero(~batch.scored[row, :at])[-1]] = tokens[row, at]
    return batch._replace(tokens=tokens)


def wrong_distance(batch):
    return batch._replace(distance=batch.distance + batch.scored)


def unasked(batch):
    """A question that does not count."""
    scored = batch.scored.copy()
    scored[tuple(np.argwhere(scored)[0])] = False
    return batch._replace(scored=scored, **{n: getattr(batch, n) * scored for n in ("targets", "distance")})


def scored_too_much(batch):
    return batch._replace(scored=np.ones_like(batch.scored))


@pytest.mark.parametrize("fault", [shifted, wrong_distance, unasked, scored_too_much])
@pytest.mark.parametrize("task", SMALL)
def test_a_planted_fault_is_found(task, fault):
    assert faults(task, fault(first(2, drawn(task))), SMALL[task])


@pytest.mark.parametrize("fault", [one_value_twice, key_as_noise])
@pytest.mark.parametrize("task", [t for t in SMALL if isinstance(t, tasks.Recall | tasks.TwoHop)])
def test_a_planted_ambiguity_is_found(task, fault):
    assert any("could answer" in line for line in faults(task, fault(first(2, drawn(task))), SMALL[task]))


def test_recall_has_keys_and_values_of_its_halves():
    task = tasks.Recall(vocabulary=12, pairs=3)
    batch = drawn(task)
    keys, values = batch.tokens[:, 0:6:2], batch.tokens[:, 1:6:2]
    assert set(keys.ravel()) == set(range(1, 7)) and set(values.ravel()) == set(range(7, 13))
    assert all(len(set(row)) == 3 for row in keys.tolist())
    assert all(near(share, 3 / 34, 2 * ROWS) for share in batch.scored[:, 6:].mean(axis=0))


@pytest.mark.parametrize("task, places", [
    (tasks.Recall(vocabulary=12, pairs=3), range(6, 40)), (tasks.Needle(vocabulary=12), range(39)),
    (tasks.Copy(vocabulary=8, width=4), range(5, 36)), (tasks.TwoHop(vocabulary=18, chains=3), range(12, 40)),
])  # fmt: skip
def test_noise_is_any_symbol_at_any_place(task, places):
    found = [set(column) for column in drawn(task).tokens[:, places].T]
    assert all(one == set(range(task.special, task.vocab_size)) for one in found)


def test_recall_asks_soon_where_power_is_small():
    """Four keys are asked for at four places: the i-th place draws the key with a weight of i^-0.99."""
    batch = drawn(tasks.Recall(vocabulary=8, pairs=4, power=0.01), length=12)
    asked = (batch.tokens[:, 8:] == batch.tokens[:, :1]).argmax(axis=1)
    weights = np.arange(1, 5) ** -0.99
    assert all(near(np.mean(asked == i), weights[i] / weights.sum(), 2 * ROWS) for i in range(4))


def test_recall_fills_every_distance_of_a_range():
    close = drawn(tasks.Recall(vocabulary=8, pairs=2, distance=(1, 500), filler="blank"), length=9)
    assert set(close.distance[close.scored]) == set(range(1, 8))
    batch = drawn(tasks.Recall(vocabulary=20, pairs=6, distance=(7, 30)), length=50)
    assert set(batch.distance[batch.scored]) == set(range(7, 31))
    place = (batch.tokens[:, 12:] == batch.tokens[:, :1]).argmax(axis=1) + 12
    of_remainder = [len(range(12 + r, 32, 6)) for r in range(6)]  # the first key has the places 12 to 31
    assert all(near(np.mean(place == p), 1 / 6 / of_remainder[p % 6], 2 * ROWS) for p in range(12, 32))


def test_needle_stands_where_depth_says():
    late, least = drawn(tasks.Needle(vocabulary=4, depth=0.3), length=90), drawn(OTHERS[5][0], length=3)
    assert set(late.distance[:, -1]) == {89 - 27} and set(least.distance[:, -1]) == {1}
    distances, counts = np.unique(drawn(tasks.Needle(vocabulary=12)).distance[:, -1], return_counts=True)
    assert distances.tolist() == list(range(1, 39)) and all(near(n / (2 * ROWS), 1 / 38, 2 * ROWS) for n in counts)


def test_copy_comes_after_the_distance():
    blank = drawn(tasks.Copy(width=1, distance=4, filler="blank"), length=30)
    row = [BLANK] * 23 + [START, -1] + [BLANK] * 4 + [MARK]
    assert (np.where(np.arange(30) == 24, -1, blank.tokens) == row).all()
    assert set(blank.distance[blank.scored]) == {5} and set(blank.tokens[:, 24]) == set(range(3, 67))
    full = drawn(tasks.Copy(vocabulary=8, width=4))
    assert (full.tokens[:, [0, 36]] == [START, MARK]).all() and set(full.distance[full.scored]) == {35}


def test_selective_copy_scatters_over_all_places():
    there = drawn(tasks.SelectiveCopy(vocabulary=8, width=3)).tokens[:, :37] != BLANK
    assert (there.sum(axis=1) == 3).all() and all(near(share, 3 / 37, 2 * ROWS) for share in there.mean(axis=0))


def test_two_hop_pairs_stand_in_any_order():
    batch = drawn(tasks.TwoHop(vocabulary=18, chains=3))
    left, right = batch.tokens[:, 0:12:2], batch.tokens[:, 1:12:2]
    kind = (left - 1) // 6
    assert (np.sort(kind) == [0, 0, 0, 1, 1, 1]).all() and ((right - 1) // 6 == kind + 1).all()
    assert all(len(set(row)) == 6 for row in left.tolist())
    assert all(near(share, 1 / 2, 2 * ROWS) for share in kind.mean(axis=0))
    leads_on = [set(r[k == 0]) == set(x[k == 1]) for x, r, k in zip(left, right, kind, strict=True)]
    assert all(leads_on)
    later = [x.tolist().index(r[x.argmin()]) > x.argmin() for x, r in zip(left, right, strict=True)]
    assert near(np.mean(later), 1 / 2, 2 * ROWS)  # of the chain with the least a


@pytest.mark.parametrize("held_out", [False, True])
def test_text_windows_are_all_those_of_their_part(held_out):
    """So long that there are three places to begin at."""
    split = len(PAPERS) * 7 // 8
    part, task = PAPERS[split:] if held_out else PAPERS[:split], tasks.Text(held_out=held_out)
    length = len(part) - 3
    batch = jax.jit(lambda key: task.draw(key, 40, length))(jax.random.key(0))
    for leaf, begin in [(batch.tokens, 0), (batch.targets, 1)]:
        windows = {part[i:][:length] for i in range(begin, begin + 3)}
        assert {bytes(row) for row in np.asarray(leaf, np.uint8)} == windows
    assert (batch.tokens[:, 1:] == batch.targets[:, :-1]).all()
    assert batch.scored.all() and not batch.distance.any()


def test_text_is_ascii_and_its_source_stands_beside_it():
    said = (DATA / "state_papers.md").read_text(encoding="utf-8")
    assert f"{len(PAPERS):,} bytes" in said and "public domain" in said
    assert PAPERS.isascii() and 20_000 < len(PAPERS) < 60_000
    assert PAPERS[len(PAPERS) * 7 // 8 :].decode().count("Amendment XX.") == 0 and b"Amendment XX." in PAPERS


@EVERY
def test_a_key_gives_one_batch_and_steps_do_not_retrace(task):
    """A task that is made anew is the same static argument."""
    one, again = drawn(task), type(task)(**vars(task))
    before = len(traced)
    same, other = (draw(again, keys_of(seed), LENGTH) for seed in (0, 1))
    assert again is not task and len(traced) == before
    assert all((np.asarray(leaf).reshape(want.shape) == want).all() for leaf, want in zip(same, one, strict=True))
    some = [one.tokens[:20], one.tokens[ROWS : ROWS + 20], *np.asarray(other.tokens[:, :20])]
    assert len({bytes(row) for rows in some for row in rows}) == 80  # other rows, other keys


@EVERY
def test_jit_and_vmap_give_the_bits_of_a_plain_call(task):
    plain = task.draw(keys_of(0)[1], ROWS, LENGTH)
    chex.assert_trees_all_equal(plain, tasks.Batch(*(leaf[ROWS:] for leaf in drawn(task))))


@EVERY
def test_shapes_and_dtypes_inside_a_scan_also_of_wide_integers(task):
    def steps(keys):
        return jax.lax.scan(lambda carry, key: (carry, task.draw(key, 4, 32)), None, keys)[1]

    for wide in (False, True):
        with jax.enable_x64(wide):
            keys = jax.random.split(jax.random.key(0), 3)
            shapes = jax.eval_shape(steps, keys)
            assert "callback" not in str(jax.make_jaxpr(steps)(keys))
        assert [leaf.dtype for leaf in shapes] == [jnp.int32, jnp.int32, bool, jnp.int32]
        assert {leaf.shape for leaf in shapes} == {(3, 4, 32)}


@EVERY
def test_chance_is_what_the_best_fixed_guess_gets(task):
    """Measured on one question a row, as those of a row are not independent."""
    batch = drawn(task)
    answers = batch.targets[np.arange(2 * ROWS), batch.scored.argmax(axis=1)]
    guesses, counts = np.unique(answers, return_counts=True)
    assert near(counts.max() / (2 * ROWS), task.chance, 2 * ROWS)
    if task != tasks.Text():  # there one answer is more frequent than all others
        assert len(guesses) == round(1 / task.chance) and near(counts.min() / (2 * ROWS), task.chance, 2 * ROWS)


def test_chance_of_the_held_out_text_is_its_own():
    shares = [tasks.Text(held_out=held_out).chance for held_out in (False, True)]
    split = len(PAPERS) * 7 // 8
    assert shares == [part.count(b" ") / len(part) for part in (PAPERS[:split], PAPERS[split:])]


@pytest.mark.parametrize("power", [1.0, 0.01])
def test_distinct_draws_have_their_weights(power):
    """The first of three, and the second given the first, against the law of draws one after the other."""
    draws = jax.jit(jax.vmap(lambda key: distinct(key, 3, 5, power)))
    got = np.asarray(draws(jax.random.split(jax.random.key(1), 20_000)))
    assert (np.diff(np.sort(got)) > 0).all() and got.min() >= 0 and got.max() <= 4
    weights = np.arange(1, 6) ** (power - 1)
    weights /= weights.sum()
    second = got[got[:, 0] == 0, 1]
    assert all(near(np.mean(got[:, 0] == i), weights[i], len(got)) for i in range(5))
    assert all(near(np.mean(second == i), weights[i] / (1 - weights[0]), len(second)) for i in range(1, 5))


def test_noise_is_uniform_over_what_is_free():
    taken = jnp.array([9, 3, 4, 8], jnp.int32)
    found, counts = np.unique(filled("noise", jax.random.key(0), 12_000, 3, 7, taken), return_counts=True)
    assert found.tolist() == [5, 6, 7] and all(near(n / 12_000, 1 / 3, 12_000) for n in counts)
    assert not filled("blank", jax.random.key(0), 5, 3, 7, taken).any()


def test_names():
    assert tasks.names() == ("recall", "needle", "copy", "selective_copy", "two_hop", "text")
    assert all(issubclass(tasks.get(name), tasks.Task) for name in tasks.names())
    assert hash(tasks.Recall(pairs=3)) == hash(tasks.Recall(pairs=3)) != hash(tasks.Recall(pairs=4))


PLACES = "such that each of 4 keys has 4 places in a row of 64 tokens"
TUPLE = "None or a tuple of two integers, 1 <= least <= most"
NEEDLE = "an integer of at least 3, a key, its value and the question"


@pytest.mark.parametrize("make, name, value, allowed", [
    (lambda: tasks.get("recal"), "name", "'recal'",
     "one of 'recall', 'needle', 'copy', 'selective_copy', 'two_hop', 'text'"),
    (lambda: tasks.Recall(vocabulary=7), "vocabulary", 7, "a multiple of 2, at least 4"),
    (lambda: tasks.Recall(vocabulary=2), "vocabulary", 2, "a multiple of 2, at least 4"),
    (lambda: tasks.Recall(vocabulary=8, pairs=5), "pairs", 5, "an integer from 1 to 4, half of the vocabulary"),
    (lambda: tasks.Recall(power=0), "power", 0, "a positive number"),
    (lambda: tasks.Recall(power=0.5, distance=(9, 40)), "power", 0.5, "1 where distance is given"),
    (lambda: tasks.Recall(distance=(5, 4)), "distance", (5, 4), TUPLE),
    (lambda: tasks.Recall(distance=(0, 4)), "distance", (0, 4), TUPLE),
    (lambda: tasks.Recall(distance=[5, 9]), "distance", [5, 9], TUPLE),
    (lambda: tasks.Recall(filler="random"), "filler", "'random'", "one of 'noise', 'blank'"),
    (lambda: tasks.Recall().check_length(23), "length", 23, "an integer of at least 24, 3 for each of the pairs"),
    (lambda: tasks.Recall(pairs=4, distance=(9, 11)).check_length(64), "distance", (9, 11), PLACES),
    (lambda: tasks.Recall(pairs=4, distance=(54, 80)).check_length(64), "distance", (54, 80), PLACES),
    (lambda: tasks.Needle(vocabulary=5), "vocabulary", 5, "a multiple of 2, at least 4"),
    (lambda: tasks.Needle(depth=1.5), "depth", 1.5, "a number from 0 to 1"),
    (lambda: tasks.Needle(filler=None), "filler", None, "one of 'noise', 'blank'"),
    (lambda: tasks.Needle().check_length(2), "length", 2, NEEDLE),
    (lambda: tasks.Needle().draw(jax.random.key(0), 1, 8.0), "length", 8.0, NEEDLE),
    (lambda: tasks.Copy(width=0), "width", 0, "a positive integer"),
    (lambda: tasks.Copy(vocabulary=1), "vocabulary", 1, "an integer, at least 2"),
    (lambda: tasks.Copy(distance=-1), "distance", -1, "an integer of at least 0"),
    (lambda: tasks.Copy(filler="zero"), "filler", "'zero'", "one of 'noise', 'blank'"),
    (lambda: tasks.Copy(width=3, distance=5).check_length(11), "length", 11,
     "an integer of at least 12, the block twice, the filler between and a mark"),
    (lambda: tasks.SelectiveCopy(width=-2), "width", -2, "a positive integer"),
    (lambda: tasks.SelectiveCopy(width=3).check_length(5), "length", 5,
     "an integer of at least 6, 2 for each token to say"),
    (lambda: tasks.TwoHop(vocabulary=10), "vocabulary", 10, "a multiple of 3, at least 6"),
    (lambda: tasks.TwoHop(chains=1), "chains", 1, "an integer from 2 to 64, a third of the vocabulary"),
    (lambda: tasks.TwoHop(filler=""), "filler", "''", "one of 'noise', 'blank'"),
    (lambda: tasks.TwoHop(chains=3).check_length(14), "length", 14,
     "an integer of at least 15, 5 for each of the chains"),
    (lambda: tasks.Text(held_out="yes"), "held_out", "'yes'", "one of False, True"),
    (lambda: tasks.Text(held_out=True).check_length(7207), "length", 7207,
     "an integer from 1 to 7206, one less than the part has bytes"),
    (lambda: tasks.Text().draw(jax.random.key(0), 0, 8), "rows", 0, "a positive integer"),
])  # fmt: skip
def test_bad_input_is_named_in_one_line(make, name, value, allowed, untyped):
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == f"{name} is {value}; it must be {allowed}"
