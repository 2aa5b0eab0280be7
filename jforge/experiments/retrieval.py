"""What every mechanism remembers, at equal parameters: trained at several rates, the best of each reported.

    results.jsonl     a line a run: what was trained, how, and how often it was right, by length and distance
    <unit>/           the checkpoint and the log of the runs of one model on one task, until its lines are written

A run that is broken off goes on where it was: units that have their lines are left out, the one in between goes on from
its checkpoint. Several processes may run the same command in one folder: each takes units that no other has taken.
"""

import fcntl
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np

from jforge import stack
from jforge.experiments import measures, reach, store, swap
from jforge.experiments.presets import NEUTRAL, Preset, Unit
from jforge.experiments.training import Diverged, Plan, Run
from jforge.tasks import Needle

RESULTS = "results.jsonl"
MOVED = ("stored", "read", "written")
LONG = 1024
"""Tokens of a row at which bytes are given as well, longer than any that is trained."""


class OutOfTime(Exception):
    """The time given is over; what is done is on disk."""


def run(
    preset: Preset,
    units: Sequence[Unit],
    folder: str | Path,
    where: dict,
    *,
    seeds: int | None = None,
    seconds: float = float("inf"),
    said: Callable[[Unit, int, np.ndarray], None] = lambda unit, step, losses: None,
) -> list[dict]:
    """Train and measure the units that have no lines yet; all lines of these units.

    where: what every new line says of where it came from. seconds: after so many a checkpoint is the last thing that
    is done, and OutOfTime is raised. said: called with the losses of every chunk.
    """
    folder, ends = Path(folder), time.monotonic() + seconds
    runs = preset.runs(seeds)
    for unit in units:
        with _taken(folder / unit.name) as mine:
            if not mine or any(line["unit"] == unit.name for line in read(folder / RESULTS)):
                continue

            def each(step, losses, unit=unit):
                said(unit, step, losses)
                if time.monotonic() > ends and step < unit.plan.steps:
                    raise OutOfTime

            try:
                state = store.kept(unit.plan, runs, folder / unit.name, each)
                new = results(preset, unit, runs, state.params)
            except Diverged as problem:
                new = [{**_about(unit, one), "diverged": str(problem)} for one in runs]
            with (folder / RESULTS).open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps({**where, **line}) + "\n" for line in new))
        if time.monotonic() > ends:
            raise OutOfTime
    wanted = {unit.name: place for place, unit in enumerate(units)}
    return sorted((line for line in read(folder / RESULTS) if line["unit"] in wanted), key=lambda n: wanted[n["unit"]])


@contextmanager
def _taken(folder: Path) -> Iterator[bool]:
    """Whether the unit of this folder is ours: no other process has it. A process that ends gives up what it has."""
    store.made(folder)
    with (folder / "taken").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def read(path: str | Path) -> list[dict]:
    """The lines of a file of results; none where there is no file."""
    path = Path(path)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def results(preset: Preset, unit: Unit, runs: Sequence[Run], params) -> list[dict]:
    """A line for each run: how often it is right at every length of the preset, and where."""
    plan, lines = unit.plan, [_about(unit, one) for one in runs]
    for length in preset.lengths:
        try:
            plan.task.check_length(length)
        except ValueError:
            continue
        score = measures.score(plan.model, params, plan.task, length, preset.measured)
        for i, line in enumerate(lines):
            line["accuracy"][str(length)] = round(float(score.accuracy[i]), 4)
            line["loss"][str(length)] = round(float(score.loss[i]), 4)
            bins = {str(2**b): [int(score.right[i, b]), int(n)] for b, n in enumerate(score.asked) if n}
            line["by_distance"][str(length)] = bins
            depths = zip(score.right_by_depth[i].tolist(), score.asked_by_depth.tolist(), strict=True)
            line["by_depth"][str(length)] = [list(pair) for pair in depths]
    best = {
        seed: _best([line for line in lines if line["seed"] == seed], preset.tokens) for seed in {r.seed for r in runs}
    }
    for line in lines:
        line["chosen"] = line["learning_rate"] == best[line["seed"]]
    chosen = [i for i, line in enumerate(lines) if line["chosen"]]
    for i, picks, swaps in zip(
        chosen, _picks(preset, plan, params, chosen), _swaps(preset, unit, params, chosen), strict=True
    ):
        lines[i] |= {"picks": picks, "swaps": swaps}
    return lines


def _picks(preset: Preset, plan: Plan, params, chosen: Sequence[int]) -> list:
    """For each chosen run the share of rows in which each layer's picks hold the answer; None of a task that does not
    ask at the last place.
    """
    if not isinstance(plan.task, Needle):
        return [None] * len(chosen)
    length, rows = preset.tokens, min(preset.measured, 256)
    return [measures.reads_the_answer(plan.model, measures.one_run(params, i), plan.task, length, rows) for i in chosen]


def _swaps(preset: Preset, unit: Unit, params, chosen: Sequence[int]) -> list:
    """For each chosen run of the dense model {name: how right it is when it is read otherwise}; None of any other."""
    if unit.mechanism != NEUTRAL or unit.scale != "usual":
        return [None] * len(chosen)
    params, length = jax.tree.map(lambda leaf: leaf[np.asarray(chosen)], params), preset.tokens
    found = [{} for _ in chosen]
    for name, (model, moved) in swap.swaps(unit.plan.model, length).items():
        own = swap.fitted_params(unit.plan.model, model, params, len(chosen))
        score = measures.score(model, own, unit.plan.task, length, preset.measured)
        for i, one in enumerate(found):
            right = {"accuracy": round(float(score.accuracy[i]), 4), "loss": round(float(score.loss[i]), 4)}
            one[name] = {**moved, **right}
    return found


def _best(lines: list[dict], length: int) -> float:
    """The rate whose loss on held-out rows of the trained length is least."""
    losses = {line["learning_rate"]: line["loss"][str(length)] for line in lines}
    return min(losses, key=lambda rate: losses[rate] if np.isfinite(losses[rate]) else float("inf"))


def _about(unit: Unit, one: Run) -> dict:
    """What a line says before anything is measured. Bytes are one row's, of float32 caches of the layers of attention:
    the convolutions between them are the same in every model.
    """
    plan = unit.plan
    lengths = [tokens for _, tokens in plan.stages]
    costs = {length: stack.cost(plan.model.layers, context=length, dtype="float32") for length in {*lengths, LONG}}
    moved = {str(n): {what: int(sum(getattr(c, what).values())) for what in MOVED} for n, c in sorted(costs.items())}
    return {
        "unit": unit.name, "mechanism": unit.mechanism, "task": unit.task, "of_task": str(plan.task),
        "short_conv": unit.short_conv, "scale": unit.scale, "layer": str(plan.model.layers[0][1]),
        "parameters": plan.model.parameters, "stages": [list(stage) for stage in plan.stages],
        "rows": plan.rows, "chance": plan.task.chance, "among": plan.task.among,
        "learning_rate": one.learning_rate, "seed": one.seed, "cost": moved,
        "reach": reach.bound(plan.model, max(lengths)),
        "accuracy": {}, "loss": {}, "by_distance": {}, "by_depth": {}, "chosen": False,
    }  # fmt: skip


def where_run(commit: str | None, command: str) -> dict:
    """What every line says of where it came from."""
    return {"commit": commit, "command": command, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
