"""The tables of docs/mechanisms.md. `python docs/mechanisms.py` makes them from the code.

A table stands between `<!-- table NAME, ... -->` (or `<!-- overview -->`, `<!-- traded -->`) and `<!-- end -->`.
"""

import re
from pathlib import Path

import jforge
from jforge.report import exact, kept_by, layout, scanned, size

DOCUMENT = Path(__file__).with_suffix(".md")
CONTEXT, LONG = 131072, 1048576
ALSO = {"sinks": ("gpt-oss-120b window",), "dsa": ("DeepSeek-V3.2, e4m3 index",)}  # beside the first shipped model
_BLOCK = re.compile(
    r"(?P<head><!-- (?:(?P<all>overview|traded)|table (?P<names>[\w, ]+)) -->\n).*?(?P<end><!-- end -->)", re.DOTALL
)


def render(text: str) -> str:
    """The document with its tables as the code has them now."""

    def table(match: re.Match) -> str:
        lines = _WHOLE[match["all"]]() if match["all"] else buffers(match["names"].split(", "))
        return match["head"] + "\n".join(["", *lines, ""]) + "\n" + match["end"]

    return _BLOCK.sub(table, text)


def mechanisms(text: str) -> list[str]:
    """The mechanisms that the document has tables of."""
    return [name for match in _BLOCK.finditer(text) if match["names"] for name in match["names"].split(", ")]


def _models(name: str) -> list[tuple]:
    """(Attention, model, Config) of the shipped models that the document shows."""
    att = jforge.get(name)
    return [(att, model, att.models[model]) for model in (next(iter(att.models)), *ALSO.get(name, ()))]


def _markdown(columns: tuple[str, ...], rows: list[tuple[str, ...]], left: int) -> list[str]:
    """A table whose columns from number `left` on are numbers."""
    rule = ["---"] * left + ["---:"] * (len(columns) - left)
    return [f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)]


def overview() -> list[str]:
    columns = ("mechanism", "model", "B a token", "fixed", "stored", "read", "of it scanned", f"read at {LONG:,}")
    rows = []
    for name in jforge.names():
        for att, model, cfg in _models(name):
            cost, longer = (att.cost(cfg, context=context) for context in (CONTEXT, LONG))
            read, scans = sum(cost.read.values()), scanned(att.cache_spec(cfg), cost)
            sizes = (cost.fixed, sum(cost.stored.values()), read, scans, sum(longer.read.values()))
            rows.append((name, model, exact(cost.per_token), *map(size, sizes)))
    return _markdown(columns, rows, 2)


def traded() -> list[str]:
    rows = [(name, jforge.get(name).summary, jforge.get(name).traded) for name in jforge.names()]
    return _markdown(("mechanism", "what it is", "what it trades"), rows, 3)


_WHOLE = {"overview": overview, "traded": traded}


def buffers(names: list[str]) -> list[str]:
    """Every buffer of the models of these mechanisms, and the sum of each model."""
    columns = ("model", "buffer", "shape", "dtype", "kept", "stored", "written", "read")
    rows, notes = [], []
    for name in names:
        for att, model, cfg in _models(name):
            spec, cost = att.cache_spec(cfg), att.cost(cfg, context=CONTEXT)
            label = model if len(names) == 1 else f"{model} ({name})"
            parts = cost.stored, cost.written, cost.read
            for i, (n, b) in enumerate(spec.items()):
                kind = f"`{n}`", layout(b), str(b.dtype_in("bfloat16")), kept_by(b)
                rows.append(("" if i else label, *kind, *(size(part.get(n, 0)) for part in parts)))
            kept = [f"{exact(cost.per_token)} B a token"] * bool(cost.per_token) + [size(cost.fixed)] * bool(cost.fixed)
            rows.append(("", "all", "", "", " + ".join(kept), *(size(sum(part.values())) for part in parts)))
            notes += _closing(label, cost, att.cost(cfg, context=CONTEXT, closing=True))
    return _markdown(columns, rows, 5) + notes


def _closing(label: str, cost, closing) -> list[str]:
    """What a step that completes a block does beside the usual."""
    read, written = (sum(getattr(closing, w).values()) - sum(getattr(cost, w).values()) for w in ("read", "written"))
    if not read and not written:
        return []
    return ["", f"{label}: a step that completes a block reads {size(read)} and writes {size(written)} more."]


if __name__ == "__main__":
    DOCUMENT.write_text(render(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
