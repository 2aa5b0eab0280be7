"""Bytes against the length of the row: what models keep, what their steps read, and one mechanism by buffer."""

from collections.abc import Mapping, Sequence

import jforge
from jforge import traffic
from jforge.lens import ModelLens
from jforge.roofline import DEVICES
from jforge.viz import style

CONTEXTS = tuple(2**n for n in range(10, 21))
"""1k to 1M tokens."""


@style.styled
def memory(models: Mapping[str, ModelLens], contexts: Sequence[int] = CONTEXTS):
    """How much memory one row's cache takes: bytes of all layers against tokens, and what cards have."""
    figure = _models(models, contexts, "stored", "How much memory does the cache of one row take?", "kept")
    ax = figure.axes[0]
    low, high = ax.get_ylim()
    for name in ("h100", "b200"):
        card = DEVICES[name]
        if low < card.memory < high:
            ax.axhline(card.memory, color=style.GREY, linewidth=0.8, linestyle=(0, (1, 2)))
            ax.annotate(
                f"all memory of one {card.name}", (0.01, card.memory), (0, 2), xycoords=("axes fraction", "data"),
                textcoords="offset points", color=style.GREY, fontsize=8.5, va="bottom",
            )  # fmt: skip
    return figure


@style.styled
def read(models: Mapping[str, ModelLens], contexts: Sequence[int] = CONTEXTS):
    """How much of the caches one decode step reads: bytes of all layers against tokens."""
    return _models(models, contexts, "read", "How many bytes of cache does one decode step read?", "read")


def dtypes(models: Mapping[str, ModelLens]) -> str:
    """The cache dtypes that the models declare, in words."""
    return " or ".join(dict.fromkeys(lens.dtype for lens in models.values()))


def _models(models: Mapping[str, ModelLens], contexts: Sequence[int], part: str, question: str, verb: str):
    height = max(4.4, 0.185 * len(models) + 1.2)
    figure = style.sheet(question, height, f"all layers, one row, cache in {dtypes(models)}")
    found = {name: [sum(getattr(lens, part)(context=n).values()) for n in contexts] for name, lens in models.items()}
    _lines(figure.add_subplot(), contexts, found, f"bytes {verb}", style.looks(len(found)))
    return figure


def _lines(ax, contexts: Sequence[int], found: Mapping[str, Sequence[int]], label: str, looks: Sequence[dict]) -> None:
    """A line for each name, which stands at its end; a line of zeros is left out, since log 0 has no place."""
    shown = {name: (values, look) for (name, values), look in zip(found.items(), looks, strict=True) if any(values)}
    for name, (values, look) in shown.items():
        ax.plot(contexts, values, label=name, **look)
    every = [value for values, _ in shown.values() for value in values if value]
    style.token_axis(ax, contexts)
    ax.set_xlim(min(contexts), max(contexts))
    style.byte_axis(ax.yaxis, min(every) / 1.5, max(every) * 1.5, label)
    ends = {name: values[-1] for name, (values, _) in shown.items()}
    style.end_labels(ax, ends, [look["color"] for _, look in shown.values()])


@style.styled
def context(name: str, contexts: Sequence[int] = CONTEXTS, model: str | None = None):
    """What one layer of a mechanism keeps and a step reads, in all and by buffer, as the row grows.

    Lines are `Attention.cost`; crosses are the reads of the decode step itself, traced at that size. model: one of
    the mechanism's `models`, the first by default.
    """
    att = jforge.get(name)
    model = next(iter(att.models)) if model is None else model
    cfg = att.models[model]
    costs = [att.cost(cfg, context=n) for n in contexts]
    figure = style.sheet(
        f"{name}: what does a layer keep and a step read as the row grows?", 4.4,
        f"one layer of {model}, bfloat16; crosses: what the decode step reads, traced at that size",
    )  # fmt: skip
    kept = [sum(cost.stored.values()) for cost in costs]
    total = [sum(cost.read.values()) for cost in costs]
    parts = {f"reads {n}": [cost.read.get(n, 0) for cost in costs] for n in costs[0].read}
    same: dict[tuple, list[str]] = {}  # buffers that are read alike, k and v, are one line
    for label, values in parts.items():
        same.setdefault(tuple(values), []).append(label.removeprefix("reads "))
    lines = {"kept": kept, "read": total}
    looks = [
        {"color": style.INK, "linestyle": style.DASHES[1]},
        {"color": style.BLUE, "linewidth": 2.6},
    ]
    if len(parts) > 1:
        for i, (values, names) in enumerate(same.items()):
            each = ", each" if len(names) > 1 else ""
            lines[f"{', '.join(names)}{each}"] = list(values)
            looks.append({"color": style.COLOURS[1 + i % 5], "linewidth": 1.1})
    ax = figure.add_subplot()
    _lines(ax, contexts, lines, "bytes", looks)
    at = dict.fromkeys((contexts[0], contexts[len(contexts) // 2], contexts[-1]))
    traced = [sum(traffic.decode_traffic(att, cfg, n).read.values()) for n in at]
    ax.plot(list(at), traced, "x", color=style.BLUE, markersize=8, markeredgewidth=2, label="read, traced",
            clip_on=False, zorder=3)  # fmt: skip
    return figure
