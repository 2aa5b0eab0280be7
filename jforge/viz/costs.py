"""Costs side by side: what is kept against what a step reads, and which limit of a card a step meets."""

import math
from collections.abc import Mapping

from jforge.cost import Cost
from jforge.report import size
from jforge.roofline import Device, step_floor
from jforge.viz import style


@style.styled
def kept_and_read(costs: Mapping[str, Cost], of: str = ""):
    """How much of what a cache keeps one decode step reads: two dots a name, and the share in words.

    of: what the costs are of, under the title.
    """
    read, kept = ({n: sum(getattr(c, part).values()) for n, c in costs.items()} for part in ("read", "stored"))
    names = sorted(costs, key=lambda name: (-read[name], -kept[name]))
    figure = style.sheet("How much of what the cache keeps does one decode step read?", 0.23 * len(names) + 1.5, of)
    ax = figure.add_subplot()
    rows = range(len(names))
    ax.hlines(rows, [read[n] for n in names], [kept[n] for n in names], color=style.PALE, linewidth=3)
    marks = {"kept": (kept, style.INK, "none", 7.5), "read": (read, style.BLUE, style.BLUE, 5)}
    for label, (values, edge, face, width) in marks.items():
        ax.plot(
            [values[n] for n in names], rows, "o", label=label, markeredgecolor=edge, markerfacecolor=face,
            markersize=width, markeredgewidth=1.2,
        )  # fmt: skip
    for row, n in enumerate(names):
        ax.annotate(
            f"{size(read[n])}, {_share(read[n], kept[n])}", (1.01, row), xycoords=("axes fraction", "data"),
            va="center", fontsize=8.5, color=style.GREY if read[n] >= kept[n] else style.BLUE, annotation_clip=False,
        )  # fmt: skip
    ax.annotate("a step reads", (1.01, -1), xycoords=("axes fraction", "data"), va="center", fontsize=8.5,
                color=style.GREY, annotation_clip=False)  # fmt: skip
    ax.set_yticks(list(rows), names)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_ylim(len(names) - 0.4, -1.5)
    every = [n for n in (*read.values(), *kept.values()) if n]
    style.byte_axis(ax.xaxis, min(every) / 2, max(every) * 2, "bytes")
    ax.legend(loc="lower right", frameon=False, ncols=1, handletextpad=0.2)
    return figure


def _share(read: int, kept: int) -> str:
    """Of what is kept. A layer that reads another's cache, or a scratch twice, reads more than it keeps."""
    if read == kept:
        return "all"
    return f"{100 * read / kept:.2g} %" if read < kept else f"{read / kept:.3g} times that"


@style.styled
def roofline(costs: Mapping[str, Cost], cards: tuple[Device, ...], of: str = ""):
    """Whether the memory or the arithmetic of a card bounds a decode step: each cost at its flops a byte moved, on
    the roof of the first card. Up to three costs that lie within a tenth share a label.
    """
    figure = style.sheet("Does memory or arithmetic bound the attention of a decode step?", 4.9, of)
    ax = figure.add_subplot()
    moved = {n: sum(c.read.values()) + sum(c.written.values()) for n, c in costs.items()}
    dense = {n: c.flops / moved[n] for n, c in costs.items()}
    low, high = min(0.5, *dense.values()) / 1.3, 2.0 ** math.ceil(math.log2(max(2 * c.ridge for c in cards)))
    for card, look in zip(cards, style.looks(len(cards)), strict=True):
        xs = [low, card.ridge, high]
        ax.plot(xs, [min(x * card.bandwidth, card.flops) / 1e12 for x in xs], label=card.name, **look)
        ax.annotate(card.name, (high, card.flops / 1e12), (0, 3), textcoords="offset points", ha="right", va="bottom",
                    color=look["color"])  # fmt: skip
    first = cards[0]
    reached = {n: costs[n].flops / step_floor(first, moved[n], costs[n].flops) / 1e12 for n in costs}
    ax.scatter(
        list(dense.values()), list(reached.values()), s=26, color=style.BLUE, edgecolor="white", linewidth=0.6,
        zorder=3, label=f"on {first.name}",
    )  # fmt: skip
    _below_the_roof(ax, dense, reached, low, high, first)
    ax.vlines(first.ridge, ax.get_ylim()[0], first.flops / 1e12, color=style.GREY, linewidth=0.8, linestyle=(0, (1, 2)))
    for side, shift, words in (("right", -4, "bound by memory"), ("left", 4, "by arithmetic")):
        ax.annotate(
            words, (first.ridge, 0.02), (shift, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
            ha=side, va="bottom", color=style.GREY, fontsize=8.5,
        )  # fmt: skip
    return figure


def _below_the_roof(ax, dense, reached, low: float, high: float, first: Device) -> None:
    """Axes, and the names of the dots to the right of them, where there is room under the roof."""
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=10)
    bottom, top = low * first.bandwidth / 1e12 / 4, 2 * max(line.get_ydata()[-1] for line in ax.lines)
    ax.set(xlim=(low, high), ylim=(bottom, top))
    ax.set_xticks([2.0**n for n in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)])
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xlabel("flops a byte of cache moved")
    ax.set_ylabel("TFLOP/s at most")
    ax.minorticks_off()
    ax.grid(True)
    groups: list[list[str]] = []
    for name in sorted(dense, key=dense.__getitem__):
        near = groups and len(groups[-1]) < 3 and dense[name] <= 1.1 * dense[groups[-1][0]]
        groups[-1].append(name) if near else groups.append([name])
    scale = math.log10(top / bottom)
    at = [math.log10(reached[group[0]] / bottom) / scale for group in groups]
    roof = math.log10(first.flops / 1e12 / bottom) / scale
    places = style.spread([y - 0.02 for y in at], 0.04, 0.1, roof - 0.04)  # between the words below and the roof
    for group, place in zip(groups, places, strict=True):
        x = math.log2(dense[group[-1]] / low) / math.log2(high / low)
        y = math.log10(reached[group[0]] / bottom) / scale
        ax.annotate(
            ", ".join(group), (x, y), (x + 0.045, place), xycoords="axes fraction", textcoords="axes fraction",
            va="center", fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": style.GREY, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3,
                        "relpos": (0, 0.5)},
        )  # fmt: skip
