"""What a mechanism remembers against what it costs, from the lines of an experiment."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from jforge.report import exact
from jforge.viz import style

PUBLISHED = {
    "window": ((9.7e3, 0.08), (3.4e4, 0.31), (1.3e5, 0.65), (5.2e5, 0.94)),
    "Mamba-2": ((8e3, 0.52), (9.8e4, 0.84)),
    "GLA": ((4.8e3, 0.53), (6.8e4, 0.95)),
    "gated delta net": ((1.7e4, 0.89), (6.6e4, 0.99)),
    "DeltaNet": ((9e3, 0.79), (3.4e4, 0.96)),
    "attention": ((5e5, 1.0),),
}
"""(numbers of state, recall), read off the plot of HazyResearch/zoology at d88d6f5, so about: 2 layers, vocabulary
8,192, rows of up to 1,024 tokens."""


def figures(rows: Sequence[dict]) -> dict[str, Callable]:
    """{name: what draws it} of all that these rows can show."""
    made = {}
    for task in dict.fromkeys(row["task"] for row in rows if "accuracy" in row):
        own = [row for row in rows if row["task"] == task and "accuracy" in row]
        made |= {f"{task}_pareto": partial(pareto, own, task), f"{task}_lengths": partial(lengths, own, task)}
        made[f"{task}_distances"] = partial(distances, own, task, own[0]["trained"])
        if task == "needle":
            made[f"{task}_depths"] = partial(depths, own, task)
        if any(row["scale"] != "usual" for row in own):
            made[f"{task}_states"] = partial(states, own, task, PUBLISHED)
        if swapped := next((row for row in own if "swaps" in row), None):
            made[f"{task}_swaps"] = partial(swaps, swapped)
    return made


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
            ax.plot([x], [middle], "o", color=colour, markersize=5, label=named(row))
            if ahead:
                best = middle
                edge.append((x, middle))
                ax.annotate(named(row), (x, middle), xytext=(5, -3), textcoords="offset points", fontsize=8, va="top")
        ax.plot(*zip(*edge, strict=True), color=style.BLUE, linewidth=1, drawstyle="steps-post")
        ax.axhline(rows[0]["chance"], color=style.GREY, linewidth=1, linestyle="--")
        every = [row[part] for row in rows]
        style.byte_axis(ax.xaxis, min(every) / 1.5, max(every) * 3, label)
        ax.set_xticks(ax.get_xticks()[::2])  # half a sheet has room for half of them
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
    _cells(figure, ax, found, [named(row) for row in rows], [f"{d}-{2 * d - 1}" if d > 1 else "1" for d in bins])
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
    _cells(figure, ax, found, [named(row) for row in rows], [exact(n).removesuffix(" B") for n in every])
    ax.set_xlabel("tokens in the row")
    return figure


@style.styled
def depths(rows: Sequence[dict], task: str):
    """The share of right answers by the place of the answer and the length of the row: a map a model."""
    rows = [row for row in rows if row["task"] == task and "by_depth" in row]
    every = sorted({int(n) for row in rows for n in row["by_depth"]})
    across = min(4, len(rows))
    below = "right answers in percent; left: the answer stands at the row's beginning, right: at its end"
    figure = style.sheet(f"Where in a row is it found? {task}", 1.5 * -(-len(rows) // across) + 1, below)
    axes = figure.subplots(-(-len(rows) // across), across, squeeze=False, sharey=True).ravel()
    for ax in axes[len(rows) :]:
        ax.set_axis_off()
    for ax, row in zip(axes, rows, strict=False):
        found = [[_share(pair) for pair in row["by_depth"][str(n)]] for n in every]
        columns = [str(i + 1) for i in range(len(found[0]))]
        _cells(figure, ax, found, [exact(n).removesuffix(" B") for n in every], columns, size=6.5)
        ax.set_title(named(row), fontsize=9)
    figure.supxlabel("eighth of the row", fontsize=9)
    figure.supylabel("tokens in the row", fontsize=9)
    return figure


@style.styled
def states(rows: Sequence[dict], task: str, published: Mapping[str, Sequence[tuple[float, float]]]):
    """Accuracy against how many numbers a row's cache holds, of the models that were trained at several sizes, beside
    published points {name: [(numbers, accuracy)]}.
    """
    rows = [row for row in rows if row["task"] == task and "accuracy" in row and row["short_conv"] is not None]
    sized = {row["mechanism"] for row in rows if row["scale"] != "usual"}
    figure = style.sheet("How large must a state be to remember?", 4.4, f"{task}; hollow and dashed: published points")
    ax = figure.add_subplot()
    lines = {
        name: [row for row in rows if row["mechanism"] == name] for name in dict.fromkeys(r["mechanism"] for r in rows)
    }
    for (name, of), look in zip(((n, r) for n, r in lines.items() if n in sized), style.looks(len(sized)), strict=True):
        of = sorted(of, key=lambda row: row["stored"])
        x, y = [row["stored"] / 4 for row in of], [_accuracy(row)[0] for row in of]
        ax.errorbar(x, y, [_accuracy(row)[1] for row in of], marker="o", markersize=4, label=name, **look)
    for (name, of), mark in zip(published.items(), "s^vDP*X", strict=False):
        x, y = zip(*of, strict=True)
        ax.plot(
            x,
            y,
            linestyle=":",
            color=style.GREY,
            marker=mark,
            markersize=5,
            fillstyle="none",
            label=f"{name} (published)",
        )
    ax.set_xscale("log")
    ax.set_xticks([1e3, 1e4, 1e5, 1e6], ["1,000", "10,000", "100,000", "1,000,000"])
    ax.set_xlabel("numbers in the caches of one row, all layers")
    ax.set_ylabel("share of right answers")
    ax.set_ylim(-0.03, 1.05)
    ax.legend(fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


@style.styled
def swaps(row: dict):
    """A dense model read otherwise with its own weights: accuracy against the bytes that a step reads."""
    below = f"{row['task']}, rows of {row['trained']} tokens, the dense model's own weights; spread over seeds"
    figure = style.sheet("What does a trained dense model lose where it is read otherwise?", 4, below)
    ax = figure.add_subplot()
    every = list(row["swaps"].items())
    for (name, of), look in zip(every, style.looks(len(every)), strict=True):
        middle, spread = of["accuracy"]
        ax.errorbar(of["read"], middle, spread, marker="o", markersize=5, linewidth=1, color=look["color"], label=name)
    places = style.spread([0.9 * of["accuracy"][0] for _, of in every], 0.055, 0, 1)
    for (name, of), place in zip(every, places, strict=True):
        ax.annotate(f"{name}  {100 * of['accuracy'][0]:.0f} %", (of["read"], of["accuracy"][0]), (1.02, place),
                    textcoords="axes fraction", fontsize=8, va="center",
                    arrowprops={"arrowstyle": "-", "color": style.PALE, "linewidth": 0.7})  # fmt: skip
    style.byte_axis(ax.xaxis, min(of["read"] for _, of in every) / 1.5, max(of["read"] for _, of in every) * 1.5,
                    "bytes a step reads")  # fmt: skip
    ax.set_ylabel("share of right answers")
    ax.set_ylim(-0.03, 1.05)
    return figure


def _cells(figure, ax, found, names, columns, size=8) -> None:
    ax.imshow(found, aspect="auto", cmap="Blues", vmin=0, vmax=1, label="share")
    for i, row in enumerate(found):
        for j, value in enumerate(row):
            if value == value:
                colour = "white" if value > 0.6 else style.INK
                ax.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=size, color=colour)
    ax.set_yticks(range(len(names)), names)
    ax.set_xticks(range(len(columns)), columns)
    ax.tick_params(length=0)


def _share(pair) -> float:
    return pair[0] / pair[1] if pair and pair[1] else float("nan")


def _accuracy(row: dict) -> tuple[float, float]:
    return tuple(row["accuracy"][str(row["trained"])])


def named(row: dict) -> str:
    """The mechanism, and what is other than usual of it."""
    more = [] if row["scale"] == "usual" else [row["scale"]]
    more += ["no convolution"] if row["short_conv"] is None else []
    return ", ".join([row["mechanism"], *more])
