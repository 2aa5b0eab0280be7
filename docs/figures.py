"""The figures of the pages on kernels: `python docs/figures.py [FOLDER]` writes FIGURES as png (default docs/figures).

Sizes of tiles, splits, stages and grids are those of the packages' plans without a GPU. Durations in
`mosaic_pipeline` are drawn, not measured: what the picture says is who waits for whom.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
from matplotlib.patches import Patch, Rectangle

from jforge.lessons import plots
from pallas_kernels.decode_attention import make_facts
from triton_kernels.decode_attention import OP
from triton_kernels.offline import launches

FOLDER = Path(__file__).parent / "figures"
BLUE, ORANGE, GREEN, SKY, PALE, GREY = "#0072b2", "#e69f00", "#009e73", "#9fd3f0", "#eef3f7", "#c8c8c8"
INK = "#222222"
SHOWN = 2, 20  # the key head and the split of the program that is orange

# --- Triton: rows, key heads, splits


def triton_grid():
    """Which program takes what of the cache, what it multiplies, and what is merged."""
    plt = plots()
    sizes = dict(B=1, T=2, N=32, K=8, S=4096)
    ((_, grid, _, plan),) = launches(OP, sizes)
    figure = plt.figure(figsize=(12, 9.2))
    axes = figure.subplot_mosaic([["cache"] * 2, ["program", "merge"]], height_ratios=[1, 1.05])
    _cache(axes["cache"], sizes, grid, plan)
    _program(axes["program"], plan, tiles=sizes["S"] // plan["BLOCK_N"] // grid[1])
    _merge(axes["merge"], grid, plan)
    shown = ", ".join(f"{axis} = {size:,}" for axis, size in sizes.items())
    figure.suptitle(f"decode_kernel, {shown}: a grid of {' x '.join(map(str, grid))} programs", fontsize=15)
    return figure


def _cache(ax, sizes, grid, plan):
    """A row of the cache: key heads down, keys across, one cell a program, a tick line a tile."""
    heads, splits, keys = grid[0] // plan["BLOCKS"], grid[1], sizes["S"] // grid[1]
    for k in range(heads):
        for s in range(splits):
            colour = ORANGE if (k, s) == SHOWN else (SKY, PALE)[(s + k) % 2]
            ax.add_patch(Rectangle((s * keys, k), keys, 1, facecolor=colour, edgecolor=INK, linewidth=0.8))
            for tile in range(plan["BLOCK_N"], keys, plan["BLOCK_N"]):
                ax.plot([s * keys + tile] * 2, [k + 0.25, k + 0.75], color=INK, linewidth=0.7, linestyle="-")
    ax.set(xlim=(0, sizes["S"]), ylim=(heads, 0), xlabel="key", ylabel="key head (its query heads)")
    ax.set_xticks(range(0, sizes["S"] + 1, 512))
    names = [f"{k}  ({k * plan['G']}-{k * plan['G'] + plan['G'] - 1})" for k in range(heads)]
    ax.set_yticks([k + 0.5 for k in range(heads)], names)
    ax.set_title(f"k and v of one row: {splits} splits of {keys} keys, {keys // plan['BLOCK_N']} tiles each; "
                 f"orange: program ({SHOWN[0]}, {SHOWN[1]}, 0)", loc="left", fontsize=14)  # fmt: skip


def _program(ax, plan, tiles):
    """The orange program: its rows, and its tiles as it takes them."""
    rows, group, block, (head, split) = plan["ROWS"], plan["G"], plan["BLOCK_N"], SHOWN
    for r in range(rows):
        t, real = r // group, r < plan["T"] * group
        colour = (BLUE, GREEN)[t % 2] if real else GREY
        ax.add_patch(Rectangle((0, r), 16, 1, facecolor=colour, edgecolor="white"))
        text = f"t = {t}, head {head * group + r % group}" if real else ""
        ax.text(8, r + 0.5, text, ha="center", va="center_baseline", color="white", fontsize=12)
    ax.text(8, (rows + plan["T"] * group) / 2, "no row:\nread as 0,\nnot stored", ha="center", va="center", fontsize=12,
            bbox=dict(facecolor=GREY, edgecolor="none"))  # fmt: skip
    for tile in range(tiles):
        x, first = 21 + 17 * tile, (split * tiles + tile) * block
        ax.add_patch(Rectangle((x, 0), 15, rows, facecolor=ORANGE, alpha=0.75, edgecolor=INK))
        words = (f"tile {tile}\nkeys {first:,}\nto {first + block - 1:,}\n\nx = q kᵀ\n{rows} x {block}\n\n"
                 "p = exp(x - m)\n\nacc =\nacc a + p v")  # fmt: skip
        ax.text(x + 7.5, rows / 2, words, ha="center", va="center", fontsize=11.5)
        ax.annotate("", (x - 0.2, rows / 2), (x - (4.8 if tile == 0 else 1.8), rows / 2), arrowprops=_arrow())
    ax.set(xlim=(0, 21 + 17 * tiles), ylim=(rows, 0))
    ax.axis("off")
    ax.set_title(f"what that program multiplies: {rows} rows", loc="left", fontsize=14)


def _merge(ax, grid, plan):
    """The parts of one query row."""
    splits = grid[1]
    for s in range(splits):
        colour = ORANGE if s == SHOWN[1] else (SKY, PALE)[s % 2]
        ax.add_patch(Rectangle((s, 2), 1, 3, facecolor=colour, edgecolor=INK, linewidth=0.8))
        ax.add_patch(Rectangle((s, 5.2), 1, 0.9, facecolor=colour, edgecolor=INK, linewidth=0.8))
        if s % 4 == 0:
            ax.annotate("", (splits / 2 + (s - splits / 2) / 8, 8.9), (s + 0.5, 6.3), arrowprops=_arrow())
    ax.text(0, 1.6, f"{splits} parts of one query row: out [{plan['V']}] and, below, lse, float32", fontsize=12)
    ax.add_patch(Rectangle((4, 9), splits - 8, 2.4, facecolor=PALE, edgecolor=INK))
    ax.text(splits / 2, 10.2, "merge_kernel: weights exp(lse - max),\nin the order of the splits", ha="center",
            va="center", fontsize=12)  # fmt: skip
    ax.annotate("", (splits / 2, 13.1), (splits / 2, 11.5), arrowprops=_arrow())
    ax.add_patch(Rectangle((8, 13.2), splits - 16, 1.4, facecolor=BLUE, edgecolor=INK))
    ax.text(splits / 2, 13.9, "out and lse of the row", ha="center", va="center", color="white", fontsize=12)
    ax.set(xlim=(-0.5, splits + 0.5), ylim=(16, 0))
    ax.axis("off")
    ax.set_title("what a second kernel merges", loc="left", fontsize=14)


def _arrow() -> dict:
    return dict(arrowstyle="-|>", color=INK, linewidth=1.3, shrinkA=0, shrinkB=0)


# --- Mosaic GPU: the ring in time


@dataclass(frozen=True)
class Span:
    """Something that lasts: `lane` is producer, consumer, or a slot such as k0."""

    lane: str
    kind: str
    tile: int
    start: float
    end: float


COPY, LATENCY, ISSUE, SCORES, SOFTMAX, VALUES = 1.0, 1.2, 0.12, 0.4, 0.9, 0.4  # of no unit: copies are the slow part


def timeline(stages: int, tiles: int) -> list[Span]:
    """Who does what when, from the waits of `ring.fill` and `consume` alone; copies arrive one after the other."""
    spans, done, full = [], {}, {}
    producer = consumer = arrived = 0.0
    for i in range(tiles):
        slot = i % stages
        for lane in "kv":
            begin, producer = producer, max(producer, done.get((lane, i - stages), 0.0))
            spans.append(Span("producer", "wait", i, begin, producer))
            arrived = full[lane] = max(producer + LATENCY, arrived) + COPY
            spans.append(Span(f"{lane}{slot}", "copy", i, producer, arrived))
            spans.append(Span("producer", "issue", i, producer, producer + ISSUE))
            producer += ISSUE
        for lane, kind, length in (("k", "scores", SCORES), ("", "softmax", SOFTMAX), ("v", "values", VALUES)):
            begin, consumer = consumer, max(consumer, full.get(lane, 0.0))
            end = consumer + length
            spans += [Span("consumer", "wait", i, begin, consumer), Span("consumer", kind, i, consumer, end)]
            if lane:
                spans.append(Span(f"{lane}{slot}", "full", i, full[lane], consumer))
                spans.append(Span(f"{lane}{slot}", "read", i, consumer, end))
                done[lane, i] = end
            consumer = end
    return [span for span in spans if span.end > span.start]


LOOKS = {
    "copy": (SKY, "///", "TMA copy under way"), "full": (PALE, "", "full, not yet read"),
    "read": (ORANGE, "", "an operand of wgmma"), "issue": (BLUE, "", "copy issued"),
    "wait": ("white", "...", "waits at a barrier"), "scores": (ORANGE, "", ""),
    "softmax": (GREEN, "", "softmax in registers"), "values": (ORANGE, "", ""),
}  # fmt: skip


def mosaic_pipeline(tiles=6):
    """The producer, the slots of both rings and the consumer in time."""
    plt = plots()
    sizes = dict(B=64, T=1, N=32, K=8, S=8192, H=128, V=128)
    f = make_facts(sizes, jnp.dtype("bfloat16"), None, scale=sizes["H"] ** -0.5)
    lanes = ["producer", *(f"{kind}{slot}" for kind in "kv" for slot in range(f.stages)), "consumer"]
    figure, ax = plt.subplots(figsize=(12.6, 7.6))
    spans = timeline(f.stages, tiles + f.stages)
    end = max(span.end for span in spans if (span.lane, span.tile) == ("consumer", tiles - 1))
    for span in spans:
        _span(ax, span, lanes.index(span.lane))
    _signals(ax, spans, lanes)
    names = ["producer\nwarpgroup 1", *(f"{kind}.tiles[{s}]" for kind in "kv" for s in range(f.stages))]
    ax.set_yticks([i + 0.5 for i in range(len(lanes))], [*names, "consumer\nwarpgroup 0"])
    ax.set(xlim=(0, end), ylim=(len(lanes), 0), xticks=[])
    ax.set_xlabel("time, not to scale.  S: Sᵀ = K Qᵀ,  O: Oᵀ = Oᵀ a + Vᵀ Pᵀ, a = exp(old max - new max)")
    ax.set_title(f"{f.stages} stages; a K tile is {f.block} x {f.H}, {2 * f.block * f.H // 1024} KiB, a V tile "
                 f"{f.block} x {f.width}, {2 * f.block * f.width // 1024} KiB; the first {tiles} of "
                 f"{sizes['S'] // f.block // f.splits} tiles", fontsize=14, loc="left")  # fmt: skip
    marks = [Patch(facecolor=c, hatch=h, edgecolor=INK) for c, h, words in LOOKS.values() if words]
    figure.legend(marks, [w for *_, w in LOOKS.values() if w], loc="outside lower center", ncols=3, frameon=False)
    return figure


def _span(ax, span, lane):
    colour, hatch, _ = LOOKS[span.kind]
    high = 0.56 if span.lane in ("producer", "consumer") else 0.7
    box = Rectangle((span.start, lane + 0.5 - high / 2), span.end - span.start, high, facecolor=colour, hatch=hatch,
                    edgecolor=INK, linewidth=0.8)  # fmt: skip
    ax.add_patch(box)
    words = {"copy": f"{span.lane[0].upper()}{span.tile}", "scores": "S", "values": "O"}.get(span.kind, "")
    if words:
        middle = span.start + 0.5 if span.kind == "copy" else (span.start + span.end) / 2
        ax.text(middle, lane + 0.5, words, ha="center", va="center", fontsize=12, clip_on=True,
                bbox=dict(facecolor=colour, edgecolor="none", pad=0.8))  # fmt: skip


def _signals(ax, spans, lanes):
    """Arrows of two barriers: the first tile is there, and its slot is free for the next."""
    find = {(s.lane, s.kind, s.tile): s for s in spans}
    there, read, last = find["k0", "copy", 0].end, find["k0", "read", 0].end, len(lanes) - 1
    box = dict(facecolor="white", edgecolor="none", pad=1)
    for x, begin, end, at, words in ((there, 1.85, last + 0.2, last - 0.06, "k.full[0]"),
                                     (read, 1.15, 0.8, 0.98, "k.free[0]")):  # fmt: skip
        ax.annotate("", (x, end), (x, begin), arrowprops=_arrow() | dict(linewidth=2), zorder=5)
        ax.text(x + 0.1, at, words, fontsize=13, weight="bold", va="center", bbox=box)


FIGURES = {"triton_grid": triton_grid, "mosaic_pipeline": mosaic_pipeline}


def titles(figure) -> str:
    """What its titles say of the plan; the png carries it, so that a test sees when a plan has changed."""
    return " | ".join([figure.get_suptitle(), *(ax.get_title(loc="left") for ax in figure.axes)])


def main(folder: Path = FOLDER) -> None:
    folder.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        figure = draw()
        figure.savefig(folder / f"{name}.png", metadata={"Software": None, "Description": titles(figure)})
        plots().close(figure)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
