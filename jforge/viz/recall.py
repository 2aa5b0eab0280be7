"""What a mechanism remembers against what it costs, from the lines of an experiment."""

from collections.abc import Sequence

from jforge.report import exact
from jforge.viz import style


@style.styled
def pareto(rows: Sequence[dict], task: str):
    """Accuracy at the trained length against the bytes a step reads, and against those that are kept: a dot a model,
    with the spread over seeds; the line joins what nothing beats at fewer bytes.
    """
    rows = [row for row in rows if row["task"] == task and "accuracy" in row]
    tokens = rows[0]["trained"]
    below = f"{task}, rows of {tokens} tokens; mean and spread over seeds; dashes: chance"
    figure = style.sheet("How much must a step read, and a cache keep, to remember?", 5.2, below)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, part, label in zip(axes, ("read", "stored"), ("bytes a step reads", "bytes kept"), strict=True):
        best, edge = -1.0, []
        for row in sorted(rows, key=lambda row: (row[part], -_accuracy(row)[0])):
            (middle, spread), x = _accuracy(row), row[part]
            ahead = middle > best
            colour = style.BLUE if ahead else style.GREY
            ax.errorbar(x, middle, spread, color=colour, linewidth=1)
            ax.plot([x], [middle], "o", color=colour, markersize=5, label=_label(row))
            if ahead:
                best = middle
                edge.append((x, middle))
                ax.annotate(_label(row), (x, middle), xytext=(5, -3), textcoords="offset points", fontsize=8, va="top")
        ax.plot(*zip(*edge, strict=True), color=style.BLUE, linewidth=1, drawstyle="steps-post")
        ax.axhline(rows[0]["chance"], color=style.GREY, linewidth=1, linestyle="--")
        every = [row[part] for row in rows]
        style.byte_axis(ax.xaxis, min(every) / 1.5, max(every) * 3, label)
    axes[0].set_ylabel("share of right answers")
    axes[0].set_ylim(-0.03, 1.05)
    return figure


@style.styled
def distances(rows: Sequence[dict], task: str, length: int):
    """The share of right answers by the distance of the answer, a row of cells a model, for rows of one length."""
    rows = [row for row in rows if row["task"] == task and row.get("by_distance", {}).get(str(length))]
    bins = sorted({int(d) for row in rows for d in row["by_distance"][str(length)]})
    figure = style.sheet(f"How far back are answers right? {task}, rows of {length} tokens", 0.25 * len(rows) + 1.6)
    ax = figure.add_subplot()
    found = [[_share(row["by_distance"][str(length)].get(str(d))) for d in bins] for row in rows]
    _cells(figure, ax, found, [_label(row) for row in rows], [f"{d}-{2 * d - 1}" if d > 1 else "1" for d in bins])
    ax.set_xlabel("tokens from the answer to the question")
    return figure


@style.styled
def lengths(rows: Sequence[dict], task: str):
    """The share of right answers by the length of the row, trained lengths and longer ones."""
    rows = [row for row in rows if row["task"] == task and "accuracy" in row]
    every = sorted({int(n) for row in rows for n in row["accuracy"]})
    trained = rows[0]["trained"]
    title = f"Does what was learned at {trained} tokens hold in longer rows? {task}"
    figure = style.sheet(title, 0.25 * len(rows) + 1.6)
    ax = figure.add_subplot()
    found = [[row["accuracy"].get(str(n), (float("nan"),))[0] for n in every] for row in rows]
    _cells(figure, ax, found, [_label(row) for row in rows], [exact(n).removesuffix(" B") for n in every])
    ax.set_xlabel("tokens in the row")
    return figure


def _cells(figure, ax, found, names, columns) -> None:
    ax.imshow(found, aspect="auto", cmap="Blues", vmin=0, vmax=1, label="share")
    for i, row in enumerate(found):
        for j, value in enumerate(row):
            if value == value:
                colour = "white" if value > 0.6 else style.INK
                ax.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    ax.set_yticks(range(len(names)), names)
    ax.set_xticks(range(len(columns)), columns)
    ax.tick_params(length=0)


def _share(pair) -> float:
    return pair[0] / pair[1] if pair and pair[1] else float("nan")


def _accuracy(row: dict) -> tuple[float, float]:
    return tuple(row["accuracy"][str(row["trained"])])


def _label(row: dict) -> str:
    """The mechanism, and what is other than usual of it."""
    more = [] if row["scale"] == "usual" else [row["scale"]]
    more += ["no convolution"] if row["short_conv"] is None else []
    return ", ".join([row["mechanism"], *more])
