"""Training that goes on to the same bits, measures that count what they say, and results in words from the data."""

import errno
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jforge
from jforge import cli, models, tasks, viz
from jforge.core import compare
from jforge.experiments import measures, presets, reach, retrieval, store, summary, swap, training
from jforge.experiments.training import Diverged, Plan, Run
from jforge.viz import recall
from jforge.viz.data import drawn

TASK = tasks.Recall(vocabulary=16, pairs=2)
RUNS = [Run(1e-3, 0), Run(1e-2, 0), Run(1e-2, 1)]


def model(*names: str, task=TASK, short_conv=None, **sizes) -> models.ModelConfig:
    layers = tuple(models.layer(name, 16, heads=2, tokens=16, **sizes) for name in names)
    return models.ModelConfig(vocab_size=task.vocab_size, layers=layers, intermediate_size=16, short_conv=short_conv)


def plan(**changes) -> Plan:
    given = {"model": model("gqa"), "task": TASK, "stages": ((4, 8), (4, 12)), "rows": 4, "every": 2}
    return Plan(**given | changes)


def params(cfg: models.ModelConfig, seed: int = 0) -> nnx.State:
    """Of one untrained run."""
    return nnx.state(models.Decoder(cfg, rngs=nnx.Rngs(seed)), nnx.Param)


def same(one, other) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


class Killed(BaseException):
    """What nothing on the way may catch."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, state) of the plan in one go."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, store.kept(plan(), RUNS, folder)


def logged(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / store.LOG).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.parametrize("when", ["after a chunk", "after the log, before the checkpoint", "in the checkpoint"])
def test_a_killed_training_goes_on_to_the_same_bits(whole, tmp_path, monkeypatch, when):
    """In the first stage and in the second; the log has each step once."""
    save, savez = store.save, np.savez
    for at in (2, 6):

        def killed_before(of, runs, state, folder, at=at):
            _kill(state.step == at)
            save(of, runs, state, folder)

        def killed_within(file, at=at, **arrays):
            file.write(b"half of it")
            _kill(arrays[".step"] == at)
            file.seek(0)
            savez(file, **arrays)

        with monkeypatch.context() as patched, pytest.raises(Killed):
            if when == "after the log, before the checkpoint":
                patched.setattr(store, "save", killed_before)
            elif when == "in the checkpoint":
                patched.setattr(np, "savez", killed_within)
            store.kept(
                plan(), RUNS, tmp_path, lambda step, losses, at=at: _kill(when == "after a chunk" and step == at)
            )
    state = store.kept(plan(), RUNS, tmp_path)
    assert int(state.step) == 8 and same(state, whole[1]) and logged(tmp_path) == logged(whole[0])
    assert [line["step"] for line in logged(tmp_path)] == [2, 4, 6, 8]


def _kill(now) -> None:
    if now:
        raise Killed


def test_a_process_that_is_killed_loses_no_more_than_a_chunk(tmp_path):
    """SIGKILL after the first line of the log; the same command goes on to the bits of one that was left alone."""
    given = ["--task", "recall", "--steps", "300", "--length", "24", "--rows", "2", "--width", "8", "--heads", "1",
             "--layers", "1", "--json"]  # fmt: skip
    command = [sys.executable, "-m", "jforge", "train", "gqa", *given, "--out"]
    killed = subprocess.Popen([*command, str(tmp_path / "killed")], stderr=subprocess.PIPE, text=True)
    assert "step 100" in killed.stderr.readline()
    killed.kill()
    killed.communicate()
    ends = [
        subprocess.run([*command, str(tmp_path / name)], capture_output=True, text=True) for name in ("killed", "left")
    ]
    assert [end.returncode for end in ends] == [0, 0], ends[0].stderr
    assert "step 100 of" not in ends[0].stderr and "step 100 of" in ends[1].stderr
    with np.load(tmp_path / "killed" / store.CHECKPOINT) as one, np.load(tmp_path / "left" / store.CHECKPOINT) as other:
        assert set(one) == set(other) and all(np.array_equal(one[name], other[name]) for name in one)
    said = [json.loads(end.stdout) for end in ends]
    assert said[0]["accuracy"] == said[1]["accuracy"] and said[0]["steps"] == 300


def test_a_run_is_the_same_alone_and_beside_others(whole):
    for i, run in enumerate(RUNS):
        alone = training.train(plan(), [run])
        pairs = zip(jax.tree.leaves(alone.params), jax.tree.leaves(whole[1].params), strict=True)
        assert max(compare.relative(a[0], b[i]) for a, b in pairs) <= compare.OUT["float32"]


def test_rates_of_a_seed_share_their_rows_and_seeds_do_not():
    losses = []
    training.train(plan(stages=((2, 8),)), RUNS, each=lambda state, of: losses.append(of))
    assert losses[0][0, 0] == losses[0][0, 1] != losses[0][0, 2]


def test_a_loss_that_is_no_number_stops_with_its_step_and_config(capsys, tmp_path):
    """One run that is lost does not stop the others; all of them do."""
    seen = []
    training.train(plan(), [Run(1e30, 0), Run(1e-3, 0)], each=lambda state, losses: seen.append(losses[-1]))
    assert len(seen) == 4 and not np.isfinite(seen[-1][0]) and np.isfinite(seen[-1][1])
    with pytest.raises(Diverged, match=r"Run\(learning_rate=1e\+30, seed=0\) at step \d; model .*'gqa', Config\("):
        training.train(plan(), [Run(1e30, 0)])
    given = ["--steps", "100", "--length", "24", "--rows", "2", "--width", "8", "--heads", "1", "--layers", "1"]
    assert cli.main(["train", "gqa", *given, "--rate", "1e30", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("jforge train: the loss is no number in any run: Run(learning_rate=1e+30, seed=0) at step ")


def test_a_full_disk_is_one_line_and_loses_no_checkpoint(whole, tmp_path, monkeypatch):
    store.kept(plan(stages=((4, 8), (4, 12))), RUNS, tmp_path)
    before = (tmp_path / store.CHECKPOINT).read_bytes()

    def full(file, **arrays):
        file.write(b"PK half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    state = store.load(plan(), RUNS, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(np, "savez", full)
        with pytest.raises(OSError, match="No space left"):
            store.save(plan(), RUNS, state, tmp_path)
        (tmp_path / store.CHECKPOINT).unlink()
        with pytest.raises(ValueError, match=r"^folder is '.*'; it cannot be written: No space left on device$"):
            store.kept(plan(), RUNS, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [store.LOG]
    (tmp_path / store.CHECKPOINT).write_bytes(before)
    assert same(store.load(plan(), RUNS, tmp_path), whole[1])


def test_a_checkpoint_is_of_one_plan(whole, tmp_path):
    for other, runs in ((plan(rows=5), RUNS), (plan(), RUNS[:2])):
        with pytest.raises(ValueError, match="^folder is .* without the checkpoint of another training: Plan"):
            store.kept(other, runs, whole[0])
    (tmp_path / store.CHECKPOINT).write_bytes(b"no zip")
    with pytest.raises(ValueError, match="is no checkpoint of jforge"):
        store.load(plan(), RUNS, tmp_path)


@pytest.mark.parametrize("task, length", [(TASK, 16), (tasks.Copy(vocabulary=8, width=3), 20)])
def test_scores_are_those_that_numpy_counts(task, length):
    cfg = model("gqa", task=task)
    two = jax.tree.map(lambda *leaves: jnp.stack(leaves), params(cfg), params(cfg, 1))
    score = measures.score(cfg, two, task, length, rows=64, at_once=32)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(length), training.HELD_OUT), 2)
    batches = [task.draw(key, 32, length) for key in keys]
    for run in range(2):
        right, asked, nats = np.zeros(measures.BINS, int), np.zeros(measures.BINS, int), []
        deep = np.zeros((2, measures.DEPTHS), int)
        for batch in batches:
            logits = np.asarray(training.merged(cfg, measures.one_run(two, run))(batch.tokens))
            for b, t in zip(*np.nonzero(batch.scored), strict=True):
                of = int(batch.distance[b, t]).bit_length() - 1
                asked[of] += 1
                right[of] += logits[b, t].argmax() == batch.targets[b, t]
                part = int((t - batch.distance[b, t]) / length * measures.DEPTHS)
                deep[:, part] += logits[b, t].argmax() == batch.targets[b, t], 1
                nats.append(np.log(np.exp(logits[b, t]).sum()) - logits[b, t, batch.targets[b, t]])
        np.testing.assert_array_equal(score.right[run], right)
        np.testing.assert_array_equal(score.asked, asked)
        np.testing.assert_array_equal([score.right_by_depth[run], score.asked_by_depth], deep)
        assert score.accuracy[run] == right.sum() / asked.sum() and abs(score.loss[run] - np.mean(nats)) < 1e-4
    assert (score.right[0] != score.right[1]).any()


def test_picks_that_hold_the_answer():
    """All blocks hold it; the query's own block does where the answer is near; a dense layer picks nothing."""
    task = tasks.Needle(vocabulary=16)
    every = model("moba", task=task, moba_chunk_size=4, moba_topk=4)
    own = model("gqa", "moba", task=task, short_conv=3, moba_chunk_size=4, moba_topk=1)
    assert measures.reads_the_answer(every, params(every), task, 16, 32) == [1.0]
    batch = task.draw(jax.random.fold_in(jax.random.key(16), training.HELD_OUT), 32, 16)
    near = float((np.asarray(batch.distance[:, -1]) < 4).mean())
    assert 0 < near < 1 and measures.reads_the_answer(own, params(own), task, 16, 32) == [None, near]
    with pytest.raises(ValueError, match="its last token must be a question"):
        measures.reads_the_answer(model("gqa"), params(model("gqa")), TASK, 16, 32)


@pytest.mark.parametrize("names, taps, far", [
    (("sliding_window",), None, 3), (("sliding_window", "sliding_window"), 3, 10), (("chunked_local",), 2, 4),
    (("gqa", "sliding_window"), None, None), (("gated_deltanet",), None, None),
])  # fmt: skip
def test_the_bound_is_the_farthest_gradient(names, taps, far):
    """layers x (W - 1), and what the convolutions add."""
    cfg = model(*names, short_conv=taps)
    assert reach.bound(cfg, 24) == far
    assert reach.measured(cfg, params(cfg), 24) == (23 if far is None else far)


def test_models_of_an_experiment_match_in_parameters_and_start_with_dense():
    for name, preset in presets.PRESETS.items():
        chosen = presets.units(preset)
        assert len({unit.name for unit in chosen}) == len(chosen)
        for task in preset.tasks:
            of_task = [unit for unit in chosen if unit.task == task]
            assert of_task[0].mechanism == presets.NEUTRAL, name
            for taps in {unit.short_conv for unit in of_task}:
                counts = [unit.plan.model.parameters for unit in of_task if unit.short_conv == taps]
                assert max(counts) <= 1.04 * min(counts)
    every = {unit.mechanism for unit in presets.units(presets.PRESETS["gpu"], tasks=["recall"])}
    assert every == set(jforge.names())
    of = {(unit.short_conv, unit.scale) for unit in presets.units(presets.PRESETS["gpu"], ["csa"], ["recall"])}
    assert of == {(3, "usual"), (3, "half"), (3, "double"), (None, "usual")}
    (alone,) = presets.units(presets.PRESETS["gpu"], ["csa"], ["needle"])  # whichever tasks are left out
    assert (alone.short_conv, alone.scale) == (3, "usual")
    assert len(presets.PRESETS["gpu"].rates) >= 4 <= len(presets.PRESETS["smoke"].rates)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(preset, folder, its lines) of an experiment of seconds."""
    preset = replace(presets.PRESETS["smoke"], hidden_size=16, stages=((4, 8),), every=2, rows=2, lengths=(8, 16),
                     measured=32, mechanisms=("gqa", "sliding_window"), rates=(1e-3, 1e-2), seeds=2)  # fmt: skip
    folder = tmp_path_factory.mktemp("small")
    return preset, folder, retrieval.run(preset, presets.units(preset), folder, {"commit": "abc"})


def test_an_experiment_writes_a_line_a_run_and_does_nothing_twice(small, monkeypatch):
    preset, folder, lines = small
    assert lines == retrieval.read(folder / retrieval.RESULTS) and len(lines) == 2 * 2 * 2
    for line in lines:
        assert line["commit"] == "abc" and set(line["accuracy"]) == {"8", "16"}
        assert sum(n for _, n in line["by_distance"]["16"].values()) == 2 * 32
    for name in ("gqa", "sliding_window"):
        of = [line for line in lines if line["mechanism"] == name]
        mean = {
            rate: np.mean([line["loss"]["8"] for line in of if line["learning_rate"] == rate]) for rate in preset.rates
        }
        assert {line["learning_rate"] for line in of if line["chosen"]} == {min(mean, key=mean.get)}
        att, cfg = models.layer(name, 16, 2, 8)
        cost = jforge.get(att).cost(cfg, context=8, dtype="float32")
        assert of[0]["cost"]["8"]["read"] == 2 * sum(cost.read.values())
    monkeypatch.setattr(store, "kept", None)
    assert retrieval.run(preset, presets.units(preset), folder, {}) == lines


def test_processes_share_the_units_of_a_folder(small, tmp_path):
    """What one process has taken, another leaves out; a process that ends leaves its unit to the next."""
    preset, _, lines = small
    first, second = presets.units(preset)
    holder = (
        f"from jforge.experiments import retrieval as r; from pathlib import Path; import sys, time\n"
        f"with r._taken(Path({str(tmp_path / first.name)!r})) as mine: print(mine, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", holder], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "True\n"
        got = retrieval.run(preset, [first, second], tmp_path, {"commit": "abc"})
        assert {line["unit"] for line in got} == {second.name}
        other.communicate()
    assert retrieval.run(preset, [first, second], tmp_path, {"commit": "abc"}) == lines


def test_the_dense_model_is_read_otherwise_with_its_own_weights(small):
    """Where every token is read nothing changes; rounding changes little; fewer tokens read change more."""
    cfg = model("gqa", "gqa", short_conv=3)
    own = jax.tree.map(lambda *leaves: jnp.stack(leaves), params(cfg), params(cfg, 1))
    ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 16))
    logits = {}
    for name, (other, moved) in swap.swaps(cfg, 16).items():
        fitted = swap.fitted_params(cfg, other, own, 2)
        logits[name] = np.asarray(training.merged(other, measures.one_run(fitted, 1))(ids))
        assert 0 < moved["read"] and 0 < moved["stored"], name
    off = {name: compare.relative(jnp.asarray(one), jnp.asarray(logits["gqa"])) for name, one in logits.items()}
    assert off.pop("gqa") == 0 and set(off) >= {*swap.OTHERS, "own top-k", "int8", "fp8 e4m3"}
    assert 0 < off["int8"] < 0.02 and off["int8"] < off["fp8 e4m3"] < 0.1
    assert all(off[name] > 0.01 for name in ("sliding_window", "sinks", "streaming", "own top-k"))
    np.testing.assert_array_equal(logits["own top-k"][:, :2], logits["gqa"][:, :2])  # index_topk is 2
    for name in ("sliding_window", "moba", "block_sparse"):
        every = model(name, name, short_conv=3, sliding_window=16, moba_chunk_size=2, moba_topk=8,
                      block_size=2, num_local_blocks=8)  # fmt: skip
        same_as = training.merged(every, measures.one_run(swap.fitted_params(cfg, every, own, 2), 1))(ids)
        np.testing.assert_allclose(same_as, logits["gqa"], atol=1e-5)
    line = next(one for one in small[2] if one["chosen"] and one["mechanism"] == "gqa")
    assert line["swaps"]["gqa"]["accuracy"] == line["accuracy"]["8"]
    assert line["swaps"]["sliding_window"]["read"] < line["swaps"]["gqa"]["read"]
    assert line["swaps"]["int8"]["read"] < line["swaps"]["gqa"]["read"] / 2


def test_an_experiment_that_is_out_of_time_goes_on(small, tmp_path):
    preset, _, lines = small
    for done in (0, 1, 1):
        with pytest.raises(retrieval.OutOfTime):
            retrieval.run(preset, presets.units(preset), tmp_path, {"commit": "abc"}, seconds=0)
        assert len({line["unit"] for line in retrieval.read(tmp_path / retrieval.RESULTS)}) == done
    assert retrieval.run(preset, presets.units(preset), tmp_path, {"commit": "abc"}) == lines


def row(**changes) -> dict:
    given = {"trained": 32, "accuracy": {"32": (0.5, 0.0)}, "chance": 0.02, "among": 0.25, "reach": None,
             "by_distance": {"32": {"8": [50, 100], "16": [50, 100]}}}  # fmt: skip
    return given | changes


@pytest.mark.parametrize("changes, said", [
    ({"accuracy": {"32": (0.995, 0.0)}}, "remembers at every distance of the trained rows"),
    ({"accuracy": {"32": (0.03, 0.0)}}, "has not learned the task at any of these rates"),
    ({"accuracy": {"32": (0.27, 0.0)}}, "27% right, about one in 4: it knows the row's answers, but not which"),
    ({"by_distance": {"32": {"1": [90, 100], "16": [40, 100]}}}, "90% right at a distance of 1, 40% at 16 and more"),
    ({}, "50% to 50% right at every distance: not a matter of how far"),
    ({"reach": 9, "by_distance": {"32": {"8": [90, 100], "16": [2, 100]}}},
     "sees 9 tokens back at most; of 100 answers further away 2.0% are right, at chance"),
    ({"reach": 9, "by_distance": {"32": {"16": [30, 100]}}},
     "sees 9 tokens back at most; of 100 answers further away 30.0% are right, chance is 2.0%"),
    ({"diverged": "at step 3"}, "no rate gave a loss that is a number"),
])  # fmt: skip
def test_words_follow_from_the_numbers(changes, said):
    assert summary.in_words(row(**changes)) == said


def test_a_mechanism_holds_beside_dense_at_a_quarter_of_the_bytes(small):
    lines = [{**line, "accuracy": {"8": 0.9, "16": 0.8}} for line in small[2]]
    dense, window = summary.rows(lines)
    assert dense["accuracy"]["8"] == (0.9, 0.0) and dense["seeds"] == 2 and not dense["holds"]
    assert window["share"] == 0.25 and window["holds"]
    worse = [{**line, "accuracy": {"8": 0.85, "16": 0.8}} if line["mechanism"] != "gqa" else line for line in lines]
    assert not summary.rows(worse)[1]["holds"]


def test_the_command_shows_and_draws_what_is_in_the_lines(small, capsys, monkeypatch):
    preset, folder, lines = small
    monkeypatch.setitem(presets.PRESETS, "smoke", preset)
    assert cli.main(["experiment", "retrieval", "--out", str(folder), "--figures"]) == 0
    shown = capsys.readouterr().out
    rows = summary.rows(lines)
    for one in rows:
        middle, spread = one["accuracy"]["16"]
        assert f"{100 * middle:.1f} ±{100 * spread:.1f}" in shown and summary.in_words(one).split(";")[0] in shown
    drawn_files = {f"recall_{name}.svg" for name in ("pareto", "lengths", "distances", "swaps")}
    assert drawn_files == {name for name in os.listdir(folder) if name.endswith(".svg")}
    (cells,) = recall.lengths(rows, "recall").axes[0].images
    np.testing.assert_allclose(cells.get_array(), [[one["accuracy"][n][0] for n in ("8", "16")] for one in rows])
    for panel, part in zip(drawn(recall.pareto(rows, "recall"))["axes"], ("read", "stored"), strict=True):
        want = {one["mechanism"]: [[one[part]], [float(f"{one['accuracy']['8'][0]:.6g}")]] for one in rows}
        assert {name: panel["lines"][name] for name in want} == want


@pytest.mark.parametrize("argv, said", [
    (["train", "nope", "--out", "x"], "no mechanism is called 'nope'"),
    (["train", "gqa", "--out", "x", "--steps", "150"], "stages is ((150, 64),); it must be (steps, tokens) of each"),
    (["train", "gqa", "--out", "x", "--length", "5"], "length is 5; it must be an integer of at least 24"),
    (["train", "gqa", "--out", "FILE/x"], "folder is 'FILE/x'; it cannot be written: Not a directory"),
    (["experiment", "retrieval", "--out", "FILE/x"], "--out is 'FILE/x'; it cannot be made: Not a directory"),
    (["experiment", "retrieval", "--out", "EMPTY", "--figures"], "--out is 'EMPTY'; it holds no results.jsonl"),
    (["experiment", "retrieval", "--out", "x", "--mechanisms", "nope"], "no mechanism is called 'nope'"),
    (["experiment", "retrieval", "--out", "x", "--tasks", "copy"], "--tasks has 'copy'; the preset smoke has recall"),
])  # fmt: skip
def test_mistakes_end_with_one_line(capsys, tmp_path, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("not a folder")
    assert cli.main(argv) == 2
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1 and os.listdir(tmp_path) == ["FILE"]


def test_smoke_finds_what_a_window_cannot_see(tmp_path):
    """The preset of two minutes as users run it: dense attention remembers, a window's reach is a wall."""
    light = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "OMP_NUM_THREADS", "NPROC")}
    command = [sys.executable, "-m", "jforge", "experiment", "retrieval", "--out", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=light)
    assert done.returncode == 0, done.stderr
    rows = {one["mechanism"]: one for one in json.loads(done.stdout)["rows"]}
    assert list(rows) == ["gqa", "sliding_window", "gated_deltanet"]
    assert rows["gqa"]["accuracy"]["16"][0] >= 0.99 and rows["gqa"]["accuracy"]["32"][0] >= 0.99
    window = rows["sliding_window"]
    assert window["reach"] == 10 and summary.in_words(window).endswith(" are right, at chance")
    assert rows["gated_deltanet"]["accuracy"]["16"][0] > 3 * rows["gated_deltanet"]["chance"]


PAGE = Path(__file__).parents[1] / "docs" / "experiments.py"


@pytest.fixture(scope="module")
def published():
    """(the script of the page, the published lines)."""
    spec = importlib.util.spec_from_file_location("experiments_page", PAGE)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script, retrieval.read(script.FOLDER / retrieval.RESULTS)


def test_the_page_is_what_its_lines_say(published):
    script, lines = published
    assert script.PAGE.read_text(encoding="utf-8") == script.page(lines), "run python docs/experiments.py"
    changed = [{**line, "accuracy": dict.fromkeys(line["accuracy"], 0.5)} for line in lines]
    assert script.page(changed) != script.page(lines)


def test_the_figures_are_of_the_published_lines(published):
    """The svg of each holds the hash of what it draws; no other svg lies beside them."""
    script, lines = published
    drawn_now = {name: viz.digest(draw()) for name, draw in script.figures(lines).items()}
    files = {path.stem: path.read_text(encoding="utf-8") for path in script.FOLDER.glob("*.svg")}
    assert set(files) == set(drawn_now)
    stale = [name for name, data in drawn_now.items() if f"data {data}" not in files[name]]
    assert not stale, f"{stale} are of other lines; run python docs/experiments.py"
    text = script.PAGE.read_text(encoding="utf-8")
    assert all(f"(experiments/gpu/{name}.svg)" in text for name in files)


def test_the_published_lines_are_of_the_preset(published):
    """Their models are today's, every run is there, and where they came from is said."""
    script, lines = published
    units = {unit.name: unit for unit in presets.units(script.PRESET)}
    for line in lines:
        unit = units[line["unit"]]
        about = retrieval._about(unit, Run(line["learning_rate"], line["seed"]))
        same_as = {name: line[name] for name in ("layer", "parameters", "stages", "rows", "cost", "reach", "of_task")}
        assert same_as == {name: about[name] for name in same_as}, line["unit"]
        assert line["commit"] and line["device"] and line["command"]
    counts = {name: sum(line["unit"] == name for line in lines) for name in {line["unit"] for line in lines}}
    assert set(counts.values()) == {len(script.PRESET.runs())}
    done = {units[name].mechanism for name in counts if units[name].task == "recall"}
    assert done == set(jforge.names())


def test_what_was_promised_of_the_published_lines_holds(published):
    """Dense attention remembers at every trained length and seed; beyond the bound of a window there is chance."""
    _, lines = published
    dense = [line for line in lines if line["unit"] == "recall-gqa-conv3-usual" and line["chosen"]]
    assert len(dense) == 3 and all(line["accuracy"][n] >= 0.99 for line in dense for n in ("32", "128"))
    bounded = [row for row in summary.rows(lines) if row["reach"] is not None]
    assert {"sliding_window", "chunked_local", "sinks", "v4_window"} <= {row["mechanism"] for row in bounded}
    for row in bounded:
        assert "at chance" in summary.in_words(row), row["unit"]
