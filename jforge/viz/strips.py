"""Strips of slots: what each decode step does to each slot of a cache, found by experiment (`jforge.slots.watch`)."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import jax.numpy as jnp
import numpy as np

from jforge.slots import EMPTY, KINDS, watch
from jforge.viz import style
from jforge.viz.toys import TOKENS, sizes, toy

Codes = Mapping[str, np.ndarray]
WORDS = {
    1: "kept, skipped by this step", 2: "read", 3: "written", 4: "written over: a token evicted",
    5: "written: tokens compressed into one entry", 6: "state, changed as a whole",
}  # fmt: skip
"""What the pictures call the codes of `KINDS`."""
GAP, STATE_ROWS = 7, 4  # between two buffers; the height of one that has no slots; in slots


@lru_cache(maxsize=64)
def watched(name: str, tokens: int = TOKENS) -> dict[str, np.ndarray]:
    """{buffer: codes of KINDS, a row a decode step, a column a slot} of `tokens` steps from an empty cache."""
    small = toy(name, tokens)
    cache = small.att.init_cache(small.cfg, 1, tokens, jnp.float32)
    return watch(small.att, small.params, small.cfg, small.x, cache)


@style.styled
def slots(names: str | Sequence[str], found: Mapping[str, Codes] | None = None):
    """What each of 64 decode steps does to each slot: time to the right, slots downwards, a strip a buffer.

    names: mechanisms, a panel each, those with many slots below. Buffers with which every step does the same are one
    strip; a buffer without slots is a bar. found: what `watched` gives for each, if that is known already.
    """
    names = [names] if isinstance(names, str) else names
    found = {name: watched(name) for name in names} if found is None else found
    panels = {name: _alike(found[name]) for name in names}
    tall = {name: _height(panels[name]) for name in names}
    columns = min(4, len(names))
    order = sorted(names, key=tall.__getitem__)
    grid = [order[i : i + columns] for i in range(0, len(order), columns)]
    rows = [max(tall[name] for name in line) for line in grid]
    one = len(names) == 1
    scale = 5.4 / TOKENS if one else 1.6 / TOKENS  # inches a slot
    scale = min(scale, 7.0 / max(rows)) if one else scale
    question = "What does each decode step do to each slot of the cache?"
    of = "64 steps from an empty cache to the right, slots downwards; small layers, observed"
    if one:
        question, of = f"{names[0]}: {question[0].lower()}{question[1:]}", of.replace("small layers", "a small layer")
    figure = style.sheet(question, scale * sum(rows) + 0.42 * len(rows) + 1.35, of)
    axes = figure.subplots(len(grid), columns, height_ratios=rows, squeeze=False)
    for line, row in zip(grid, axes, strict=True):
        for ax in row[len(line) :]:
            ax.set_visible(False)
        for name, ax in zip(line, row, strict=False):
            _panel(ax, "" if one else name, panels[name], max(tall[n] for n in line))
    axes[-1, 0].set_xlabel(f"decode step; {sizes(toy(names[0], 1).cfg)}".removesuffix("; ") if one else "decode step")
    _legend(figure, {int(code) for codes in found.values() for array in codes.values() for code in np.unique(array)})
    return figure


def _alike(found: Codes) -> dict[str, np.ndarray]:
    """The buffers, those with equal codes under one name."""
    groups: list[tuple[list[str], np.ndarray]] = []
    for name, codes in found.items():
        same = next((names for names, other in groups if np.array_equal(other, codes)), None)
        same.append(name) if same else groups.append(([name], codes))
    return {", ".join(names): codes for names, codes in groups}


def _rows(codes: np.ndarray) -> int:
    return STATE_ROWS if codes.shape[1] == 1 else codes.shape[1]


def _height(panels: Codes) -> int:
    return sum(_rows(codes) + GAP for codes in panels.values())


def _panel(ax, title: str, panels: Codes, height: int) -> None:
    """The strips of one mechanism, from the top."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle

    colours, top = ListedColormap([colour for _, _, colour, _ in KINDS.values()]), 0
    steps = len(next(iter(panels.values())))
    for name, codes in panels.items():
        top += GAP
        extent = (0, steps, top + _rows(codes), top)
        ax.imshow(codes.T, cmap=colours, vmin=-0.5, vmax=len(KINDS) - 0.5, extent=extent, aspect="auto",
                  interpolation="none", label=name)  # fmt: skip
        ax.add_patch(Rectangle((0, top), steps, _rows(codes), fill=False, edgecolor=style.GREY, linewidth=0.6))
        first, *more = name.split(", ")
        label = name if len(more) < 2 else f"{first} and {len(more)} more"
        ax.annotate(label, (0, top), (0, 2), textcoords="offset points", fontsize=7.5, va="bottom", color=style.GREY)
        top += _rows(codes)
    ax.set(xlim=(0, steps), ylim=(height, 0), yticks=[], xticks=[0, steps // 2, steps])
    ax.spines["bottom"].set_position(("data", top))  # the ticks below the last strip
    ax.set_title(title, weight="bold", pad=2)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=2, labelsize=8)


def _legend(figure, present: set[int]) -> None:
    from matplotlib.patches import Patch

    codes = [code for code in KINDS if code in present]
    marks = [Patch(facecolor=KINDS[code][2], edgecolor=style.GREY, linewidth=0.6) for code in codes]
    words = [WORDS.get(code, KINDS[code][0]) if code != EMPTY else "empty" for code in codes]
    figure.legend(marks, words, loc="outside lower left", ncols=3, frameon=False, fontsize=8.5, handlelength=1.2)
