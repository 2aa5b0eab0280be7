"""What every mechanism remembers, at equal parameters: trained at several rates, the best of each reported.

    results.jsonl     a line a run: what was trained, how, and how often it was right, by length and distance
    <unit>/           the checkpoint and the log of the runs of one model on one task, until its lines are written

A run that is broken off goes on where it was: units that have their lines are left out, the one in between goes on from
its checkpoint.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from jforge import stack
from jforge.experiments import measures, reach, store
from jforge.experiments.presets import Preset, Unit
from jforge.experiments.training import Diverged, Run

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
    runs, lines = preset.runs(seeds), read(folder / RESULTS)
    for unit in units:
        if any(line["unit"] == unit.name for line in lines):
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
        new = [{**where, **line} for line in new]
        with (folder / RESULTS).open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in new))
        lines += new
        if time.monotonic() > ends:
            raise OutOfTime
    return [line for line in lines if line["unit"] in {unit.name for unit in units}]


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
    best = {
        seed: _best([line for line in lines if line["seed"] == seed], preset.tokens) for seed in {r.seed for r in runs}
    }
    for line in lines:
        line["chosen"] = line["learning_rate"] == best[line["seed"]]
    return lines


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
        "accuracy": {}, "loss": {}, "by_distance": {}, "chosen": False,
    }  # fmt: skip


def where_run(commit: str | None, command: str) -> dict:
    """What every line says of where it came from."""
    return {"commit": commit, "command": command, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
