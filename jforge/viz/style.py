"""One look for all pictures: 700 px wide, white, Okabe and Ito's colours, labels at the lines and not in a legend."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path

from jforge.report import size

INK, GREY, PALE = "#222222", "#767676", "#d9d9d9"
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072b2", "#d55e00", "#00795a", "#a8528a", "#b87a00", "#2f8fc4"
COLOURS = BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY
"""Okabe and Ito's, the light ones darkened until words in them are readable on white: at least 3.4 : 1."""
DASHES = "-", (0, (5, 1.6)), (0, (1.2, 1.2))
WIDTH = 7.3  # inches: 700 px where an inch has 96

_RC = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK, "text.parse_math": False,
    "axes.labelcolor": INK, "axes.edgecolor": GREY,
    "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.8, "axes.axisbelow": True, "xtick.color": GREY, "ytick.color": GREY,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "xtick.minor.visible": False, "ytick.minor.visible": False,
    "grid.color": PALE, "grid.linewidth": 0.6, "lines.linewidth": 1.8, "figure.facecolor": "white",
    "savefig.facecolor": "white", "svg.fonttype": "path", "svg.hashsalt": "jforge", "figure.dpi": 96,
}  # fmt: skip


_FINE = re.compile(r"(?<![\w.])(-?\d*[1-9]\d*\.\d\d)\d+")
"""Numbers of 1 or more with more than two decimals, which no screen shows: a third of an svg's bytes."""


def styled(draw: Callable) -> Callable:
    """`draw` under this look, whatever the caller's settings of matplotlib are; they stay as they were."""

    @wraps(draw)
    def call(*args, **options):
        import matplotlib

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_RC)
            return draw(*args, **options)

    return call


def sheet(question: str, height: float, below: str = ""):
    """An empty figure with its question as title; `below` says of what it is, in grey under the title."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(f"{question}\n" if below else question, x=0.012, ha="left", fontsize=12, weight="bold")
    if below:
        figure.text(0.012, 1 - 0.36 / height, below, ha="left", va="center", color=GREY, fontsize=9.5)
    return figure


@styled
def save(figure, path: str | Path) -> None:
    """Write the figure in the format of the name's ending: svg, pdf or png (twice as many pixels as inches ask).

    The same figure gives the same bytes: no date, no name of a program. The hash of its data is the description.
    """
    from jforge.viz.data import digest, question

    said = {"Title": question(figure)}
    ending = Path(path).suffix
    if ending == ".svg":
        said |= {"Date": None, "Creator": None, "Description": f"data {digest(figure)}"}
    elif ending == ".png":
        said |= {"Software": None, "Description": f"data {digest(figure)}"}
    else:
        said |= {"CreationDate": None, "Creator": None, "Producer": None, "Subject": f"data {digest(figure)}"}
    figure.savefig(path, metadata=said, dpi=192)
    if ending == ".svg":
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        Path(path).write_text("".join(f"{_FINE.sub(r'\1', line.strip())}\n" for line in lines), encoding="utf-8")


def tokens(count: int) -> str:
    """1k, 128k, 1M: binary, as `jforge --context` takes them; others in full."""
    for unit, letter in ((2**20, "M"), (2**10, "k")):
        if count % unit == 0:
            return f"{count // unit}{letter}"
    return f"{count:,}"


def short(count: float) -> str:
    """Bytes in at most four characters and a unit: 512 B, 4 KiB, 1.5 GiB, 31 GiB."""
    if count < 10240:
        return f"{count:.0f} B" if count < 1024 or count % 1024 else f"{count / 1024:.0f} KiB"
    number, unit = size(count).split()
    return f"{number if len(number) < 4 and not number.endswith('.0') else number.split('.')[0]} {unit}"


def token_axis(ax, contexts: Sequence[int]) -> None:
    """x: tokens, in powers of two, every third of them named where there are more than six."""
    ax.set_xscale("log", base=2)
    low, high = math.ceil(math.log2(min(contexts))), math.floor(math.log2(max(contexts)))
    powers = range(high, low - 1, -1)
    shown = [2**n for n in powers][:: 1 if len(powers) <= 6 else 2]
    ax.set_xticks(shown, [tokens(n) for n in shown])
    ax.minorticks_off()
    ax.set_xlabel("tokens in the row")


def byte_axis(axis, low: float, high: float, label: str) -> None:
    """Bytes from `low` to `high` on a logarithmic axis, in powers of two."""
    ax, letter = axis.axes, axis.axis_name
    getattr(ax, f"set_{letter}scale")("log", base=2)
    getattr(ax, f"set_{letter}lim")(low, high)
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    step = next(n for n in (1, 2, 4, 5, 10) if (last - first) / n <= 8)
    axis.set_ticks([2.0**n for n in range(first, last + 1) if n % step == 0])
    axis.set_major_formatter(lambda value, _: short(value))
    axis.set_minor_locator(_none())
    axis.set_label_text(label)
    axis.grid(True)


def _none():
    from matplotlib.ticker import NullLocator

    return NullLocator()


def spread(places: Sequence[float], gap: float, low: float = -math.inf, high: float = math.inf) -> list[float]:
    """The places moved apart until no two are nearer than `gap`, in their order, each group about its own middle."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    groups: list[list] = []  # [sum of wishes for the first place, members]
    for i in order:
        groups.append([places[i], [i]])
        while len(groups) > 1 and _first(groups[-1], gap, low, high) < _first(groups[-2], gap, low, high) + gap * len(
            groups[-2][1]
        ):
            wish, members = groups.pop()
            groups[-1][0] += wish - gap * len(groups[-1][1]) * len(members)
            groups[-1][1] += members
    out = list(places)
    for group in groups:
        for n, i in enumerate(group[1]):
            out[i] = _first(group, gap, low, high) + gap * n
    return out


def _first(group, gap: float, low: float, high: float) -> float:
    """Where a group begins: at the mean of what its members wish, inside of low..high."""
    wish, members = group
    return max(low, min(wish / len(members), high - gap * (len(members) - 1)))


def end_labels(ax, ends: Mapping[str, float], colours: Iterable[str], points: float = 12.5) -> None:
    """Each name to the right of the axes, at the height at which its line ends, moved apart by `points`; y is log2.

    Call it once the limits of y are set.
    """
    low, high = (math.log2(n) for n in ax.get_ylim())
    gap = points / (ax.figure.get_figheight() * 72 * 0.74)  # of the height of the axes, about
    at = spread([(math.log2(y) - low) / (high - low) for y in ends.values()], gap, 0.0, 1.0)
    for (name, y), place, colour in zip(ends.items(), at, colours, strict=True):
        own = (math.log2(y) - low) / (high - low)
        ax.annotate(
            name, (1.0, own), (1.035, place), xycoords="axes fraction", textcoords="axes fraction", color=colour,
            va="center", ha="left", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 1,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def looks(count: int) -> list[dict]:
    """Colour and dash of so many lines; colours repeat with another dash."""
    return [{"color": COLOURS[i % 6], "linestyle": DASHES[i // 6 % 3]} for i in range(count)]
