"""How large an experiment is: sizes of the models, tasks and rows that they learn, and where they are measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jforge
from jforge import models
from jforge.experiments.training import Plan, Run
from jforge.models import ModelConfig
from jforge.tasks import Task, get

NEUTRAL = "gqa"
"""The mechanism whose parameters the others match, and whose accuracy they are set beside."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """tasks: {name: fields}; stages: as in Plan; lengths: of the rows that are measured, trained ones and longer.

    mechanisms: of the tasks after the first, all registered ones for the first; None: all for every task
    short_conv: taps of the convolution before each layer, for each of the variants that the first task trains; the
        others train the first of them
    rope: whether the layers that can have rotary positions have them; else the causal mask and convolutions are all
    scales: {label: factor of how much a layer keeps}: mechanisms with such a size are trained at each in the first task
    """

    hidden_size: int
    heads: int
    layers: int
    tasks: Mapping[str, Mapping[str, Any]]
    stages: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]
    rows: int
    every: int
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    seeds: int = 1
    measured: int = 512
    mechanisms: tuple[str, ...] | None = None
    short_conv: tuple[int | None, ...] = (3,)
    rope: bool = False
    scales: Mapping[str, float] = None

    @property
    def tokens(self) -> int:
        """Of the longest rows that are trained."""
        return max(tokens for _, tokens in self.stages)

    def task(self, name: str) -> Task:
        """One of the tasks, of this preset's fields."""
        return get(name)(**self.tasks[name])

    def runs(self, seeds: int | None = None) -> list[Run]:
        """Every rate with every seed."""
        return [Run(rate, seed) for seed in range(self.seeds if seeds is None else seeds) for rate in self.rates]


STATES = ("state_size", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim", "kv_lora_rank")
"""Fields that say how much a layer keeps of the past; compress_rate goes the other way."""
FEW = ("gqa", "mla", "sliding_window", "moba", "nsa", "dsa", "gated_deltanet", "mamba2")
_TASKS = {
    "recall": {"vocabulary": 128, "pairs": 8},
    "needle": {"vocabulary": 128},
    "copy": {"vocabulary": 64, "width": 8},
    "selective_copy": {"vocabulary": 64, "width": 8},
    "two_hop": {"vocabulary": 96, "chains": 3},
    "text": {},
}
PRESETS = {
    "smoke": Preset(
        hidden_size=32, heads=2, layers=2, tasks={"recall": {"vocabulary": 32, "pairs": 2}},
        stages=((800, 16),), lengths=(16, 32), rows=32, every=100, measured=256,
        mechanisms=("gqa", "sliding_window", "gated_deltanet"), rates=(2e-3, 5e-3, 1e-2, 2e-2),
    ),
    "cpu": Preset(
        hidden_size=32, heads=2, layers=2, tasks={"recall": {"vocabulary": 64, "pairs": 4}},
        stages=((800, 16), (600, 64)), lengths=(16, 64, 128), rows=32, every=100,
        rates=(2e-3, 4e-3, 8e-3, 1.6e-2),
    ),
    "gpu": Preset(
        hidden_size=64, heads=4, layers=2, tasks=_TASKS, stages=((1500, 32), (1500, 128)), lengths=(32, 128, 256, 512),
        rows=32, every=250, rates=(1e-3, 2.5e-3, 6e-3, 1.5e-2), seeds=3, measured=1024, mechanisms=FEW,
        short_conv=(3, None), scales={"half": 0.5, "double": 2.0},
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One model on one task: what is trained and measured at once, for all rates and seeds."""

    mechanism: str
    task: str
    short_conv: int | None
    scale: str
    plan: Plan

    @property
    def name(self) -> str:
        """Of its folder."""
        conv = "plain" if self.short_conv is None else f"conv{self.short_conv}"
        return "-".join((self.task, self.mechanism, conv, self.scale))


def units(preset: Preset, mechanisms=None, tasks=None) -> list[Unit]:
    """All that a preset trains, NEUTRAL first in every task. mechanisms, tasks: only these."""
    made = []
    for task in tasks or preset.tasks:
        first, alone = task == next(iter(preset.tasks)), len(preset.tasks) == 1
        some = jforge.names() if preset.mechanisms is None or (first and not alone) else preset.mechanisms
        wanted = tuple(mechanisms or some)
        for taps in preset.short_conv if first else preset.short_conv[:1]:
            for name in dict.fromkeys((*(m for m in wanted if m == NEUTRAL), *wanted)):
                sized = first and taps == preset.short_conv[0]
                made += [_unit(preset, name, task, taps, *one) for one in _scaled(preset, name, sized)]
    return made


def _unit(preset: Preset, name: str, task: str, taps: int | None, scale: str, layer) -> Unit:
    of = preset.task(task)
    sizes = {"vocab_size": of.vocab_size, "intermediate_size": 3 * preset.hidden_size, "short_conv": taps}
    neutral = ModelConfig(layers=(_layer(preset, NEUTRAL),) * preset.layers, **sizes)
    model = models.matched(ModelConfig(layers=(layer,) * preset.layers, **sizes), neutral.parameters)
    plan = Plan(model=model, task=of, stages=preset.stages, rows=preset.rows, every=preset.every)
    return Unit(mechanism=name, task=task, short_conv=taps, scale=scale, plan=plan)


def _layer(preset: Preset, name: str, **sizes):
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}} if preset.rope else {}
    return models.layer(name, preset.hidden_size, preset.heads, preset.tokens, **rope, **sizes)


def _scaled(preset: Preset, name: str, wanted: bool) -> list[tuple[str, Any]]:
    """(label, layer) of each size of what it keeps, the usual one first."""
    usual = _layer(preset, name)
    found = [("usual", usual)]
    for label, factor in (preset.scales or {}).items() if wanted else ():
        own = {f: max(2, round(getattr(usual[1], f) * factor)) for f in STATES if getattr(usual[1], f, None)}
        if rate := getattr(usual[1], "compress_rate", None):
            own["compress_rate"] = max(2, round(rate / factor))
        if own and (other := _layer(preset, name, **own)) != usual:
            found.append((label, other))
    return found
