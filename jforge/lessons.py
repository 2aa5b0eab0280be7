"""What the notebooks share beside their ideas: six answers, pictures of a cache, the traffic of kernels, exercises.

    questions("gqa")                                    # a table, from the cache spec and the registry
    picture(watch(att, params, cfg, x, cache))          # what each decode step does to each slot, found by experiment
    exercise(1, answer_1, "5d41402abc4b")               # not answered yet, right or wrong
    with traffic() as (loads, stores): ...              # which addresses the kernels inside ask for

pandas, matplotlib and triton are imported where they are needed.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction

import jax.numpy as jnp
import numpy as np

import jforge
from jforge.core.attention import Attention
from jforge.report import exact, layout, size
from jforge.slots import EMPTY, ENTRY, KEPT, KINDS, OVER, READ, STATE, WRITTEN, Lender, watch  # noqa: F401 - for notebooks

# six questions


def questions(name: str, cfg=None, context: int = 131_072, dtype: str = "bfloat16"):
    """The six answers of a mechanism, one row of `context` tokens, as a pandas Styler; `.data` is the DataFrame.

    cfg: a Config of the mechanism, or {heading: Config} for a column each; None: its first shipped model.
    """
    import pandas as pd

    att = jforge.get(name)
    if cfg is None:
        model, cfg = next(iter(att.models.items()))
        cfg = {f"{name}, {model}, a row of {context:,} tokens": cfg}
    columns = {}
    for heading, one in (cfg if isinstance(cfg, Mapping) else {name: cfg}).items():
        columns[heading] = {row[:2]: row[2] for row in answers(att, one, context, dtype)}
    rows = list(dict.fromkeys(row for column in columns.values() for row in column))
    index = pd.MultiIndex.from_tuples(rows)
    looks = [{"selector": "th, td", "props": "text-align: left; vertical-align: top"}]
    shown = pd.DataFrame({h: [column.get(row, "") for row in rows] for h, column in columns.items()}, index=index).style
    return shown.set_uuid(name).set_table_styles(looks)


def answers(att: Attention, cfg, context: int, dtype: str) -> Iterator[tuple[str, str, str]]:
    """(question, of what, answer), the questions in their order."""
    spec, cost = att.cache_spec(cfg), att.cost(cfg, context=context, dtype=jnp.dtype(dtype))
    usual, closing = (att.work(cfg, context, context, 1, closes) for closes in (False, True))
    shapes = att.shapes(cfg)
    of_x = [n for n, shape in shapes.items() if n.startswith("w") and shape[0] == cfg.hidden_size]
    yield "what is projected", "from x", _weights(shapes, of_x)
    yield "what is projected", "later", _weights(shapes, [n for n in shapes if n not in of_x])
    met = {**spec.borrowed, **spec}
    for n, buffer in met.items():
        whose = "" if n in spec else "nothing; another layer's "
        yield "what is stored", n, f"{whose}{layout(buffer)}, {buffer.dtype_in(dtype)}"
    for n, buffer in met.items():
        yield "its shape", f"{n} after prefill", _times(*buffer.full_shape(1, context))
        written, more = (_slots(buffer, work.written.get(n, 0)) for work in (usual, closing))
        block = f" ({more} where a block ends)" if more != written else ""
        read = _slots(buffer, usual.read.get(n, 0))
        yield "its shape", f"{n} at decode", f"writes {written}{block}, reads {read}"
    yield "bytes", "one more token", f"{exact(cost.per_token)} B"
    yield "bytes", "fixed", size(cost.fixed)
    yield "bytes", "stored now", size(sum(cost.stored.values()))
    yield "entries that a query reads", "", f"{cost.entries_read:,}"
    yield "what is traded", "", att.traded


def _weights(shapes: Mapping[str, tuple[int, ...]], names: Sequence[str]) -> str:
    return ", ".join(f"{n} {_times(*shapes[n])}" for n in names)


def _times(*sizes: int) -> str:
    return " x ".join(f"{n:,}" for n in sizes)


def _slots(buffer, count: int | Fraction) -> str:
    """So many slots of one row, or that part of a buffer without slots."""
    if count == 0:
        return "nothing"
    if buffer.has_slots:
        return _times(1, int(count), *buffer.shape)
    return f"{'' if count == 1 else f'{count} of '}{_times(1, *buffer.shape)}"


# slots


def plots():
    """matplotlib.pyplot, with figures of 1,000 px whose text and colours last on paper and without colour vision."""
    import matplotlib.pyplot as plt
    from cycler import cycler

    colours = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
    plt.rcParams.update({
        "figure.figsize": (10, 4), "figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 14,
        "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 2.5,
        "axes.prop_cycle": cycler(color=colours) + cycler(linestyle=["-", "--", "-.", ":", "-", "--"]),
    })  # fmt: skip
    return plt


def picture(
    kinds: Mapping[str, np.ndarray], title: str = "", down: str = "token", across: str = "slot", first: int = 0
):
    """A panel for each array of codes of KINDS, arrays that are equal in one, with the legend of those in it.

    down: what a row is, from number `first`; across: what a column is.
    """
    plt = plots()
    from matplotlib.patches import Patch

    panels: list[tuple[list[str], np.ndarray]] = []
    for name, codes in kinds.items():
        same = next((names for names, other in panels if np.array_equal(other, codes)), None)
        same.append(name) if same else panels.append(([name], codes))
    heights = [0.34 * len(codes) + 0.5 for _, codes in panels]
    figure, axes = plt.subplots(len(panels), figsize=(10, sum(heights) + 1.7), height_ratios=heights, squeeze=False)
    width = max(14, *(codes.shape[1] for _, codes in panels))
    for (names, codes), ax in zip(panels, axes[:, 0], strict=True):
        _grid(ax, codes, width, first)
        ax.set_title(", ".join(names), loc="left", fontsize=14)
        ax.set_ylabel(down)
    axes[-1, 0].set_xlabel(across, x=panels[-1][1].shape[1] / width / 2)  # below its slots, which may be few
    present = [code for code in KINDS if any((codes == code).any() for _, codes in panels)]
    marks = [Patch(facecolor=KINDS[code][2], edgecolor="#666666") for code in present]
    words = [f"{KINDS[code][1]}  {KINDS[code][0]}".strip() for code in present]
    figure.legend(marks, words, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title)


def _grid(ax, codes: np.ndarray, width: int, first: int) -> None:
    """Cells in the colours of their kinds, with letters where there is room."""
    from matplotlib.colors import ListedColormap

    colours = ListedColormap([colour for _, _, colour, _ in KINDS.values()])
    ax.pcolormesh(
        codes, cmap=colours, vmin=-0.5, vmax=len(KINDS) - 0.5, edgecolors="#666666", linewidth=0.6, clip_on=False
    )
    rows, columns = codes.shape
    every = -(-width // 24)
    ax.set(xlim=(0, width), ylim=(rows, 0))
    ax.set_xticks(np.arange(0, columns, every) + 0.5, [str(i) for i in range(0, columns, every)])
    ax.set_yticks(np.arange(rows) + 0.5, [str(first + i) for i in range(rows)])
    ax.spines[:].set_visible(False)
    for (i, j), code in np.ndenumerate(codes):
        _, letter, _, ink = KINDS[code]
        if width <= 48:
            ax.text(j + 0.5, i + 0.5, letter, ha="center", va="center", color=ink, fontsize=13)


# kernels


@contextmanager
def traffic():
    """(loads, stores) of the Triton kernels that are launched inside, two lists with an item for each.

    An item is (index of the program in the grid, addresses that the mask lets through, int64). Atomics are left out.
    The kernels are interpreted, on a GPU too.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    from jforge.harness.interpreters import interpreted

    loads, stores = [], []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def note(side, builder, pointers, mask):
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)]
        side.append((builder.grid_idx, home(addresses.astype(np.int64))))

    def noted_load(self, pointers, mask, *rest):
        note(loads, self, pointers, mask)
        return load(self, pointers, mask, *rest)

    def noted_store(self, pointers, value, mask, *rest):
        note(stores, self, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = noted_load, noted_store
    try:
        with interpreted() as home:
            yield loads, stores
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store


# predictions and exercises


def reveal(value, guess=None) -> None:
    """Print the number that a reader was to predict, and how far off the guess was."""
    said = "" if guess is None else f"; you said {_number(guess)}, {guess / value:.2g} times that"
    print(f"{_number(value)}{said}")


def _number(value) -> str:
    return f"{value:,}" if value == int(value) else f"{value:.3g}"


def exercise(number: int, answer, right: str, *given) -> None:
    """Print whether the answer is right: whether its digest is `right`. A function is called with `given` first.

    Integers must be exact; of other numbers three digits count, and 0.2 % to both sides is near enough.
    """
    if answer is None:
        return print(f"Exercise {number}: not answered yet")
    value = answer(*given) if callable(answer) else answer
    if not right:
        return print(f"Exercise {number}: no digest; that of {value!r} is {digest(number, value)}")
    near = {_plain(value), *(_plain(value, shift) for shift in (0.998, 1.0, 1.002))}
    print(f"Exercise {number}: {'right' if right in {_hash(number, form) for form in near} else 'wrong'}")


def digest(number: int, value) -> str:
    """What `exercise` compares: a hash, so that the answer does not stand in the notebook."""
    return _hash(number, _plain(value))


def _hash(number: int, form: str) -> str:
    return hashlib.sha256(f"jforge exercise {number}: {form}".encode()).hexdigest()[:12]


def _plain(value, shift: float | None = None) -> str:
    """One spelling for equal answers. shift: numbers times that, to three digits, integers too."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str):
        return value.strip().casefold()
    if isinstance(value, list | tuple):
        return f"[{', '.join(_plain(one, shift) for one in value)}]"
    if isinstance(value, bool) or not math.isfinite(value):
        return str(value)
    return str(int(value)) if shift is None and value == int(value) else f"{float(value) * (shift or 1.0):.3g}"
