"""Write docs/experiments.md and the figures beside the results from docs/experiments/gpu/results.jsonl.

python docs/experiments.py            # write the page and draw the figures
python docs/experiments.py --check    # fail where the page would change
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from jforge import small, viz
from jforge.experiments import presets, retrieval, summary
from jforge.report import size
from jforge.viz import recall

HERE = Path(__file__).parent
PAGE, FOLDER = HERE / "experiments.md", HERE / "experiments" / "gpu"
PRESET = presets.PRESETS["gpu"]

HEAD = """# What mechanisms remember

Tiny decoders of {layers} layers, width {width}, one mechanism each, trained on tasks with exact answers; {least:,} to
{most:,} parameters, within 2 % of a `gqa` model with the same convolution. Positions: no rotary ones, a causal mask and
a gated convolution of {taps} taps before every layer of attention ("no convolution" says where there is none). Each is
trained at {rates} learning rates with {seeds} seeds; of each seed the rate whose held-out loss is least counts.
 Stages: {stages} of {rows} rows; {measured:,} held-out rows of every length.

    {command}

`experiments/gpu/results.jsonl` has a line a run ({lines} lines); each says its commit ({commit}), command and device
({device}, jax {jax}). `python docs/experiments.py` writes this page and its figures from it. Bytes are one row's, of
float32 caches of the layers of attention, from `cost()`.

**What these tasks do not show.** Recall of a few symbols by a model of two layers says what a cache can hold and a
reader can find, and how hard that is to learn in {steps:,} steps. It does not rank language models. A mechanism that
fails here has failed at these sizes, rates and steps.

**Not run yet:** {missing}.
"""
STATES = """## How large must a state be?

Mechanisms whose layer keeps a number of values that can be chosen, at half, usual and double. The published points are
of other models and rows (Zoology: 2 layers, vocabulary 8,192, up to 1,024 tokens, read off a plot), so places on the
axes do not compare; that a delta rule and a Mamba-2 rise with their state, and a delta rule sooner, does. What differs:
rows here are of 128 tokens with {pairs} pairs, so states ten times smaller suffice; Mamba-1 knows a row's
answers and not which at all three sizes; a large spread says that some seeds have found the way and others not.

![accuracy against state size](experiments/gpu/recall_states.svg)
"""
SWAPS = """## The dense model, read otherwise

The trained `gqa` models, nothing trained again: their own weights under windows, blocks and picks of the sizes of rows
of {tokens} tokens, and with keys and values rounded to 8 bits with a float32 scale a token and head. "own top-k" scores
all keys and reads the values of the {topk} best of each head; sinks that no training has set have a logit of 0.

| task | read as | bytes read | bytes kept | right, % | loss, nats |
|---|---|---|---|---|---|
"""


def page(lines: Sequence[dict]) -> str:
    """The whole text."""
    rows = summary.rows(lines)
    parts = [_head(lines, rows)]
    for task in dict.fromkeys(row["task"] for row in rows):
        parts.append(_task(task, [row for row in rows if row["task"] == task]))
    parts.append(STATES.format(pairs=PRESET.tasks["recall"]["pairs"]))
    parts.append(_swaps(rows))
    return "\n".join(parts)


def _head(lines: Sequence[dict], rows: Sequence[dict]) -> str:
    said = {what: ", ".join(sorted({str(line[what]) for line in lines})) for what in ("commit", "device", "jax")}
    counts = [row["parameters"] for row in rows if row["short_conv"]]
    stages = ", then ".join(f"{steps:,} steps at {tokens} tokens" for steps, tokens in PRESET.stages)
    return HEAD.format(
        layers=PRESET.layers, width=PRESET.hidden_size, least=min(counts), most=max(counts), lines=len(lines),
        taps=PRESET.short_conv[0], rates=len(PRESET.rates), seeds=PRESET.seeds, stages=stages, rows=PRESET.rows,
        measured=PRESET.measured, steps=sum(steps for steps, _ in PRESET.stages), missing=missing(lines),
        command=f"{lines[0]['command']} --out DIR", **said,
    )  # fmt: skip


def missing(lines: Sequence[dict]) -> str:
    """What the preset has and the lines have not, a count a task."""
    done, left = {line["unit"] for line in lines}, {}
    for unit in presets.units(PRESET):
        if unit.name not in done:
            kind = unit.task + (" without the convolution" if unit.short_conv is None else "")
            left.setdefault(kind, []).append(unit.mechanism)
    return "; ".join(f"{kind} ({len(names)} models)" for kind, names in left.items()) or "nothing"


def _task(task: str, rows: Sequence[dict]) -> str:
    first = rows[0]
    lengths = sorted({int(n) for row in rows for n in row.get("accuracy", {})})
    columns = ["mechanism", *(f"{n} tokens" for n in lengths), "read", "of dense", f"at {first['long']['tokens']:,}"]
    columns += ["kept", "rates chosen", "mean at each rate"]
    out = [
        f"## {task}",
        "",
        f"`{_fields(task)}`; chance is {_percent(first['chance'])} %. Right answers in percent, mean",
    ]
    out += [f"and standard deviation of {first.get('seeds', 0)} seeds; bytes at {first['trained']} tokens.", ""]
    out += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    dense = next((row for row in rows if row["mechanism"] == presets.NEUTRAL), None)
    for row in rows:
        cells = [_cell(row["accuracy"].get(str(n))) for n in lengths]
        share = f"{100 * row['share']:.0f} %" if row["share"] is not None else "-"
        far = f"{100 * row['long']['read'] / dense['long']['read']:.0f} %" if dense else "-"
        every = ", ".join(f"{rate:g}: {100 * one[0]:.0f}" for rate, one in row["rates"].items())
        chosen = ", ".join(f"{rate:g}" for rate in row["chosen"])
        moved = size(row["read"]), share, far, size(row["stored"])
        out.append("| " + " | ".join((recall.named(row), *cells, *moved, chosen, every)) + " |")
    out += ["", _holds(rows, lengths[-1]), "", "In words, from the same rows:", ""]
    out += [f"- {recall.named(row)}: {words}." for row in rows if (words := summary.in_words(row))]
    figures = [name for name in recall.figures(list(rows)) if not name.endswith(("_states", "_swaps"))]
    out += ["", *(f"![{name.replace('_', ' ')}](experiments/gpu/{name}.svg)\n" for name in figures)]
    return "\n".join(out)


def _holds(rows: Sequence[dict], far: int) -> str:
    """Which read little and remember like dense, and what the picks of those that do not have found."""
    names = [f"`{recall.named(row)}`" for row in rows if row["holds"]]
    who = ", ".join(names) if names else "no mechanism"
    said = f"Within {100 * summary.NEAR:.0f} points of dense at {100 * summary.FEWER:.0f} % of its bytes or fewer, at"
    said = f"{said} {rows[0]['trained']} tokens: {who}."
    dense = next((row for row in rows if row["mechanism"] == presets.NEUTRAL and row["short_conv"]), None)
    if dense:
        at = lambda row: row["accuracy"][str(far)][0]  # noqa: E731
        fewer = [
            row for row in rows
            if at(row) >= at(dense) - summary.NEAR and row["long"]["read"] <= summary.FEWER * dense["long"]["read"]
        ]  # fmt: skip
        names = ", ".join(f"`{recall.named(row)}`" for row in fewer) or "no mechanism"
        said += f" Right within {100 * summary.NEAR:.0f} points in rows of {far} tokens, and reading that little at"
        said += f" {dense['long']['tokens']:,}: {names}."
    picks = [row for row in rows if any(row.get("picks") or ())]
    for row in picks:
        found = ", ".join("-" if one is None else f"{100 * one[0]:.0f} ±{100 * one[1]:.0f} %" for one in row["picks"])
        said += f"\n\nPicks of `{recall.named(row)}` hold the needle's place, mixer by mixer: {found}."
    return said


def _swaps(rows: Sequence[dict]) -> str:
    tokens = PRESET.tokens
    out = SWAPS.format(tokens=tokens, topk=small.reaches(tokens)["index_topk"])
    tasks = [row for row in rows if "swaps" in row and row["short_conv"]]
    for row in tasks:
        for name, of in row["swaps"].items():
            cells = row["task"], name, size(of["read"]), size(of["stored"]), _cell(of["accuracy"]), _loss(of["loss"])
            out += "| " + " | ".join(cells) + " |\n"
    return out + "".join(
        f"\n![{row['task']} read otherwise](experiments/gpu/{row['task']}_swaps.svg)\n" for row in tasks
    )


def _fields(task: str) -> str:
    return str(PRESET.task(task))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _cell(found) -> str:
    return "-" if found is None else f"{_percent(found[0])} ±{_percent(found[1])}"


def _loss(found) -> str:
    return f"{found[0]:.3f} ±{found[1]:.3f}"


def figures(lines: Sequence[dict]) -> dict:
    """What draws each figure of the page."""
    return recall.figures(summary.rows(lines))


def main(check: bool) -> int:
    lines = retrieval.read(FOLDER / retrieval.RESULTS)
    text = page(lines)
    if check:
        return int(PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    for name, draw in figures(lines).items():
        viz.save(draw(), FOLDER / f"{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
