"""Results in rows and in words: the mean and spread over seeds at the best rate, and what explains a failure."""

import math
from collections.abc import Sequence
from itertools import groupby
from statistics import mean, stdev

import jforge
from jforge.experiments.presets import NEUTRAL

KEY = ("task", "mechanism", "short_conv", "scale")
NEAR, FEWER = 0.02, 0.25
"""A mechanism holds dense accuracy within the first while it reads at most the second of the bytes."""


def rows(lines: Sequence[dict], neutral: str = NEUTRAL) -> list[dict]:
    """One row a unit, `neutral` first, then as registered: accuracy {length: (mean, spread)} over seeds at the chosen
    rate, that of the other rates at the trained length, bytes at the longest trained length and at a longer one, and
    `holds` beside `neutral`; the same means of `picks` and `swaps` where the lines have them.
    """
    made = []
    for _, group in groupby(_ordered(lines, neutral), key=lambda line: line["unit"]):
        group = list(group)
        first, trained = group[0], str(max(tokens for _, tokens in group[0]["stages"]))
        row = {name: first[name] for name in (*KEY, "parameters", "chance", "among", "reach", "layer", "unit")}
        row |= {what: first["cost"][trained][what] for what in ("stored", "read")} | {"trained": int(trained)}
        row["long"] = {"tokens": max(map(int, first["cost"]))}
        row["long"]["read"] = first["cost"][str(row["long"]["tokens"])]["read"]
        if any("diverged" in line for line in group):
            made.append(row | {"diverged": first["diverged"]})
            continue
        best = [line for line in group if line["chosen"]]
        row["accuracy"] = {n: over_seeds([line["accuracy"][n] for line in best]) for n in first["accuracy"]}
        row["rate"], row["seeds"] = best[0]["learning_rate"], len(best)
        row["chosen"] = sorted({line["learning_rate"] for line in best})
        rates = sorted({line["learning_rate"] for line in group})
        row["rates"] = {
            r: over_seeds([line["accuracy"][trained] for line in group if line["learning_rate"] == r]) for r in rates
        }
        row["by_distance"] = {n: _summed([line["by_distance"][n] for line in best]) for n in first["by_distance"]}
        row["by_depth"] = {n: _added([line["by_depth"][n] for line in best]) for n in first["by_depth"]}
        if best[0].get("picks"):
            layers = zip(*(line["picks"] for line in best), strict=True)
            row["picks"] = [None if None in layer else over_seeds(layer) for layer in layers]
        if best[0].get("swaps"):
            row["swaps"] = {name: _swapped([line["swaps"][name] for line in best]) for name in best[0]["swaps"]}
        made.append(row)
    for row in made:
        dense = next((r for r in made if _same(r, row) and r["mechanism"] == neutral and "accuracy" in r), None)
        row["share"] = row["read"] / dense["read"] if dense else None
        row["holds"] = bool(dense and "accuracy" in row and _at(row) >= _at(dense) - NEAR and row["share"] <= FEWER)
    return made


def _ordered(lines: Sequence[dict], neutral: str) -> list[dict]:
    """Tasks as they come, with the convolution before without, mechanisms as registered, the usual size first."""
    tasks, names = list(dict.fromkeys(line["task"] for line in lines)), [neutral, *jforge.names()]

    def place(line):
        name, scale = line["mechanism"], line["scale"]
        known = names.index(name) if name in names else len(names)
        return tasks.index(line["task"]), line["short_conv"] is None, known, scale != "usual", scale == "double"

    return sorted(lines, key=place)


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """(mean, standard deviation; 0 of one)."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def _same(one: dict, other: dict) -> bool:
    return (one["task"], one["short_conv"]) == (other["task"], other["short_conv"]) and one["scale"] == "usual"


def _at(row: dict) -> float:
    return row["accuracy"][str(row["trained"])][0]


def _summed(bins: Sequence[dict]) -> dict[str, list[int]]:
    return {d: [sum(one[d][0] for one in bins), sum(one[d][1] for one in bins)] for d in bins[0]}


def _added(depths: Sequence[list]) -> list[list[int]]:
    return [[sum(right), sum(asked)] for right, asked in (zip(*one, strict=True) for one in zip(*depths, strict=True))]


def _swapped(of: Sequence[dict]) -> dict:
    moved = {what: of[0][what] for what in ("stored", "read")}
    return moved | {what: over_seeds([one[what] for one in of]) for what in ("accuracy", "loss")}


def in_words(row: dict) -> str:
    """What the numbers of a row say about where the mechanism fails, in one sentence; "" where nothing stands out."""
    if "diverged" in row:
        return "no rate gave a loss that is a number"
    accuracy, chance = _at(row), row["chance"]
    bins = row["by_distance"][str(row["trained"])]
    if row["reach"] is not None:
        every = [pair for one in row["by_distance"].values() for d, pair in one.items() if int(d) > row["reach"]]
        if asked := sum(n for _, n in every):
            right = sum(r for r, _ in every)
            at_chance = abs(right / asked - chance) <= 4 * math.sqrt(chance * (1 - chance) / asked)
            level = "at chance" if at_chance else f"chance is {chance:.1%}"
            found = f"of {asked} answers further away {right / asked:.1%} are right, {level}"
            return f"sees {row['reach']} tokens back at most; {found}"
    if accuracy >= 0.99:
        return "remembers at every distance of the trained rows"
    if abs(accuracy - row["among"]) <= 0.05 and row["among"] > 2 * chance:
        return (
            f"{accuracy:.0%} right, about one in {round(1 / row['among'])}: it knows the row's answers, but not which"
        )
    if accuracy <= 2 * chance:
        return "has not learned the task at any of these rates"
    shares = {int(d): right / asked for d, (right, asked) in bins.items() if asked >= 20}
    near, far = min(shares), max(shares)
    if shares[near] - shares[far] > 0.1:
        return f"{shares[near]:.0%} right at a distance of {near}, {shares[far]:.0%} at {far} and more"
    return f"{min(shares.values()):.0%} to {max(shares.values()):.0%} right at every distance: not a matter of how far"
