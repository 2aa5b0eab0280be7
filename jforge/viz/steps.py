"""How long a decode step's attention takes at least, of models side by side on several cards."""

import math
from collections.abc import Mapping

from jforge.lens import ModelLens
from jforge.roofline import DEVICES, Device
from jforge.viz import style

CARDS = tuple(DEVICES[name] for name in ("a100", "h100", "h200", "b200"))


@style.styled
def floor(models: Mapping[str, ModelLens], context: int, cards: tuple[Device, ...] = CARDS):
    """Milliseconds of one step of one row at least: caches read and written once, or the flops of the attend steps."""
    figure = style.sheet(
        "How long does the attention of one decode step take at least?", 0.27 * len(models) + 1.75,
        f"one row of {style.tokens(context)} tokens; weights and the rest of the model come on top",
    )  # fmt: skip
    found = {name: [1e3 * lens.floor(card, context=context) for card in cards] for name, lens in models.items()}
    names = sorted(found, key=lambda name: -found[name][0])
    ax = figure.add_subplot()
    for row, name in enumerate(names):
        ax.plot(found[name], [row] * len(cards), color=style.PALE, linewidth=3, zorder=1)
    every = [ms for row in found.values() for ms in row]
    low, high = min(every) / 1.4, max(every) * 1.4
    scale = math.log(high / low)
    heads = style.spread([math.log(ms / low) / scale for ms in found[names[0]]], 0.065)
    for i, (card, look) in enumerate(zip(cards, style.looks(len(cards)), strict=True)):
        ax.plot([found[n][i] for n in names], range(len(names)), "osD^v"[i % 5], color=look["color"], markersize=6,
                label=card.name)  # fmt: skip
        ax.annotate(card.name.split()[0], (heads[i], -0.5), xycoords=("axes fraction", "data"), ha="center",
                    va="bottom", color=look["color"], fontsize=8.5)  # fmt: skip
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_ylim(len(names) - 0.4, -1.3)
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ticks = (digit * 10.0**power for power in range(-6, 7) for digit in (1, 3))
    ax.set_xticks([tick for tick in ticks if low <= tick <= high])
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xlabel("milliseconds")
    ax.grid(True, axis="x")
    ax.minorticks_off()
    return figure
