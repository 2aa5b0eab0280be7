"""What the commands show: each show_ prints the tables of plain data, which is what --json gives."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator

import jax.numpy as jnp

import jforge
from jforge import text
from jforge.core import compare
from jforge.harness.equiv import number

_MOVED = ("stored", "written", "read")
_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_EVERY = 5  # seconds between lines of progress where no terminal can overwrite one


def track(items: Iterable, description: str, label: Callable[[object], str] = lambda item: "") -> Iterator:
    """The items, with progress on stderr: in one line of a terminal, elsewhere a line at the start, now and then, and
    at the end. A generator is drawn from as it goes. label: what is at work, from an item.
    """
    total, start, said, count = f" of {len(items)}" if hasattr(items, "__len__") else "", time.monotonic(), -_EVERY, 0
    terminal = sys.stderr.isatty()

    def tell(line: str) -> None:
        print(f"\r\x1b[K{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    for count, item in enumerate(items, 1):
        now = time.monotonic() - start
        if terminal or label(item) or now - said >= _EVERY:
            said = now
            tell(f"{description}{label(item) and ' '}{label(item)}: {count}{total}, {now:.0f} s")
        yield item
    if count:
        tell("" if terminal else f"{description}: {count}{total} done in {time.monotonic() - start:.0f} s")


def size(count: float) -> str:
    """Bytes in binary units: 4,096 B, 16.0 KiB, 4.0 GiB. Below 10 KiB every byte shows."""
    if count < 10240:
        return f"{count:,.0f} B"
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1024:
            return f"{count:,.1f} {unit}"
    return f"{count / 1024:,.1f} GiB"


def exact(count: float) -> str:
    """A number of bytes with all its digits; two decimals where tokens share an entry unevenly."""
    return f"{count:,.0f}" if count == int(count) else f"{count:,.2f}"


def layout(buffer) -> str:
    """B, the slots, then letters with their sizes: B S K=8 H=128, B W=4096 K=8 H=128, B E=S/16 K=4 H=192."""
    letters = list(buffer.dims)
    if buffer.has_slots:
        sizes = f"{letters[1]}={buffer.limit}" if buffer.limit else letters[1]
        slots = [f"E=S/{buffer.every}" if buffer.every not in (None, 1) else sizes]
    else:
        slots = []
    rest = letters[len(letters) - len(buffer.shape) :]
    return " ".join(["B", *slots, *(f"{letter}={n}" for letter, n in zip(rest, buffer.shape, strict=True))])


def kept_by(buffer) -> str:
    """What one more token leaves in it, bfloat16 where the cache's dtype decides."""
    if buffer.every is None or buffer.limit is not None:
        return "fixed"
    return f"{exact(buffer.slot_bytes('bfloat16') / buffer.every)} B a token"


class Grid:
    """A table whose columns from number `right` on are numbers. A cell that starts with "! " is shown in red."""

    def __init__(self, *columns: str, right: int = 99):
        self.columns, self.right, self.rows = columns, right, []

    def add_row(self, *cells: str) -> None:
        self.rows.append(cells)


def say(line: str = "", style: str = "", indent: int = 0) -> None:
    """A line, folded to the width of the terminal, in a style of text.COLOURS."""
    print(text.styled(text.wrapped(line, indent), style))


def show(title: str, table: Grid) -> None:
    """The title and the table. No digit is ever cut: columns without room beside the others come below them."""
    say(title, "bold")
    print(text.table(table.columns, table.rows, table.right))


# table


def table(context: int, dtype: str) -> dict:
    """Every mechanism on its first shipped model (its first example where it has none), one layer, one row."""
    return {"context": context, "dtype": dtype, "rows": [_table_row(name, context, dtype) for name in jforge.names()]}


def _table_row(name: str, context: int, dtype: str) -> dict:
    att = jforge.get(name)
    model, cfg = next(iter(att.models.items()), ("example", att.examples[0]))
    cost, spec = att.cost(cfg, context=context, dtype=jnp.dtype(dtype)), att.cache_spec(cfg)
    return {
        "mechanism": name,
        "model": model,
        "cache": {n: " ".join(b.dims) for n, b in spec.items()},
        "bytes_per_token": float(cost.per_token),
        "fixed_bytes": float(cost.fixed),
        **{f"{what}_bytes": sum(getattr(cost, what).values()) for what in _MOVED},
        "scanned_bytes": scanned(spec, cost),
        "flops_per_byte": cost.flops / sum(cost.read.values()),
        "summary": att.summary,
        "traded": att.traded,
    }


def scanned(spec, cost) -> int:
    """Bytes that a step reads of buffers that grow with the context and are read whole; capacity = context."""
    grows = (n for n, b in spec.items() if b.every is not None and b.limit is None)
    return sum(cost.read.get(n, 0) for n in grows if cost.read.get(n) == cost.stored[n])


_TABLE = {
    "B/token": lambda row: exact(row["bytes_per_token"]),
    "fixed": lambda row: size(row["fixed_bytes"]),
    "reads": lambda row: size(row["read_bytes"]),
    "scans": lambda row: size(row["scanned_bytes"]),
    "stored": lambda row: size(row["stored_bytes"]),
    "writes": lambda row: size(row["written_bytes"]),
    "flop/B": lambda row: f"{row['flops_per_byte']:.1f}",
}


def show_table(data: dict) -> None:
    out = Grid("mechanism", "model", *_TABLE, right=2)
    for row in data["rows"]:
        out.add_row(row["mechanism"], row["model"], *(column(row) for column in _TABLE.values()))
    show(f"One layer, one row of {data['context']:,} tokens, {data['dtype']} cache", out)
    say("reads: by one decode step; scans: of these, growing buffers read whole")
    say()
    wide = max(len(row["mechanism"]) for row in data["rows"]) + 2
    for row in data["rows"]:
        cache = ", ".join(f"{n}:{dims.replace(' ', '')}" for n, dims in row["cache"].items())
        say(f"{row['mechanism']:{wide}}{row['summary']}. Cache {cache}", indent=wide)


# cost


def cost(
    name: str | None, source: str, costs: list, context: int, batch: int, dtype: str,
    mechanisms: list[str] | None = None,
) -> dict:  # fmt: skip
    """Bytes by buffer of each kind of layer (one mechanism, one cost), of all layers of `name`, and of the model.

    name: None for every mechanism of the model. costs: one a layer. mechanisms: the layers' names, all `name` where not
    given.
    """
    mechanisms = mechanisms or [name] * len(costs)
    kinds: dict[int, list[int]] = {}
    for i in range(len(costs)):
        same = (j for j in kinds if mechanisms[j] == mechanisms[i] and costs[j] == costs[i])
        kinds.setdefault(next(same, i), []).append(i)
    mine = [c for mechanism, c in zip(mechanisms, costs, strict=True) if name in (None, mechanism)]
    return {
        **{"mechanism": name, "source": source, "context": context, "batch": batch, "dtype": dtype},
        "layer": _plain(mine[0]),
        "layers_of_mechanism": {"layers": len(mine), **_plain(sum(mine[1:], mine[0]))},
        "kinds": [{"mechanism": mechanisms[i], "layers": at, **_plain(costs[i])} for i, at in kinds.items()],
        "model": {"layers": len(costs), **_plain(sum(costs[1:], costs[0]))},
    }


def _plain(c) -> dict:
    """A Cost as JSON."""
    buffers = {n: {what: getattr(c, what).get(n, 0) for what in _MOVED} for n in c.stored}
    sums = {what: sum(getattr(c, what).values()) for what in _MOVED}
    line = {"bytes_per_token": float(c.per_token), "fixed": float(c.fixed)}
    return {"buffers": buffers, **sums, **line, "flops": c.flops, "entries_read": c.entries_read}


def show_cost(data: dict) -> None:
    """Every kind of layer of the mechanism by buffer, other mechanisms in a row each, and the model."""
    out, model = Grid("", "stored", "step writes", "step reads", right=1), data["model"]

    def row(label: str, cost: dict, layers: int = 1) -> None:
        out.add_row(label, *(f"{layers * cost[key]:,} B" for key in _MOVED))

    every = data["mechanism"] is None
    kinds = sorted(data["kinds"], key=lambda kind: not every and kind["mechanism"] != data["mechanism"])
    for kind in kinds:
        first, count = f"layer {kind['layers'][0]}", len(kind["layers"])
        if not every and kind["mechanism"] != data["mechanism"]:
            row(f"{_layers(count)}, {kind['mechanism']}", kind, count)
            continue
        for name, buffer in kind["buffers"].items():
            row(f"{first}, {name}", buffer)
        row(first, kind)
        if len(kinds) > 1:
            row(f"{count} like {first}", kind, count)
    row(_layers(model["layers"]), model)
    out.add_row("", *(size(model[key]) for key in _MOVED))
    sizes = f"{data['batch']} x {data['context']:,} tokens, {data['dtype']} cache"
    show(f"{data['mechanism'] or 'All layers'} in {data['source']}: {sizes}", out)
    for kind in kinds:
        if every or kind["mechanism"] == data["mechanism"]:
            adds = f"layer {kind['layers'][0]}: one more token a row adds {exact(kind['bytes_per_token'])} B"
            flops = f"an attend step takes {kind['flops']:,} flops, {kind['flops'] / kind['read']:.1f} a byte read"
            say(f"{adds}; {flops}")
    adds = f"one more token a row adds {exact(model['bytes_per_token'])} B"
    say(f"{_layers(model['layers'])}: {adds}")


def _layers(count: int) -> str:
    return f"{count} layer{'s' if count > 1 else ''}"


# check


def progress(line: str) -> None:
    """One line on stderr, where it is read while the work goes on, also through a pipe."""
    print(line, file=sys.stderr, flush=True)


def laws(result) -> dict:
    """A Report as JSON. An error is None where it is no number, and a count of violations is an int."""

    def row(r) -> dict:
        out = {"law": r.law, "title": r.title, "error": number(r.error), "tolerance": r.tolerance, "ok": r.ok}
        out |= {"compiled": r.compiled, "note": r.says, "where": r.where.plain() if r.where else {}}
        return out | ({"before": row(r.before)} if r.before else {})

    return {"ok": result.ok, "points_at": result.points_at, "laws": [row(r) for r in result]}


def show_laws(data: list[dict]) -> None:
    """A line a Config; below, what its failed laws say and point at, with the Config once."""
    names = [row["law"] for row in data[0]["laws"]]
    out = Grid("mechanism", *names, right=1)
    for row in data:
        out.add_row(_label(row), *(cell(law["error"], law["ok"]) for law in row["laws"]))
    show("Errors of the laws in float64 (L7 to L9 count violations)", out)
    say("  ".join(f"{law['law']} {law['title']}" for law in data[0]["laws"]))
    for row in data:
        for law in row["laws"]:
            if law["ok"] and law["note"]:
                say(f"{_label(row)}, {law['law']}: {law['note']}")
        if row["ok"]:
            continue
        say(f"\n{_label(row)} breaks laws, with {row['config']}", "red")
        for law in row["laws"]:
            if not law["ok"]:
                say(f"  {law['law']} {law['title']}: {law['note']}")
        say(f"  this points at {row['points_at']}")


def _label(row: dict) -> str:
    return row["mechanism"] if row["of"] < 2 else f"{row['mechanism']} {row['number']}/{row['of']}"


def cell(error: float | None, ok: bool) -> str:
    return ("" if ok else "! ") + text.error(error)


# equiv


def show_backends(rows: list[dict]) -> None:
    """Cases down, backend and dtype across: the worst relative error of the output."""
    columns = list(dict.fromkeys((row["backend"], row["dtype"]) for row in rows))
    out = Grid("case", *(f"{backend}\n{_SHORT[dtype]}" for backend, dtype in columns), right=1)
    for case in dict.fromkeys(row["case"] for row in rows):
        found = {(r["backend"], r["dtype"]): r for r in rows if r["case"] == case}
        cells = [cell(r["out"], r["ok"]) if "ok" in r else "refused" for r in (found[c] for c in columns)]
        out.add_row(case, *cells)
    out.add_row("allowed", *(f"{compare.OUT[d]:.0e}" for _, d in columns))
    show("Ops against the float64 oracle: worst relative error of the output; every slot not to be read is NaN", out)
    for row in rows:
        if "refused" in row:
            say(f"{row['backend']} refuses {row['case']} ({row['dtype']}): {row['refused']}")


def show_frameworks(rows: list[dict]) -> None:
    """One table a judge, since each has modes of its own."""
    for i, judge_name in enumerate(dict.fromkeys(row["judge"] for row in rows)):
        if i:
            say()
        mine = [row for row in rows if row["judge"] == judge_name]
        out = Grid("mechanism", "of", *mine[0]["errors"], right=2)
        for row in mine:
            cells = (cell(e, e is not None and e <= compare.OUT["float32"]) for e in row["errors"].values())
            out.add_row(row["mechanism"], row["subject"], *cells)
        show(f"jforge against {judge_name}, float32: worst relative error (allowed {compare.OUT['float32']:.0e})", out)


def show_equiv(data: dict) -> None:
    if data["backends"]:
        show_backends(data["backends"])
        say()
    show_frameworks(data["frameworks"])
    say(f"on {data['device']}")


# explorer


def show_explorer(data: dict) -> None:
    kinds = f"{data['mechanisms']} mechanisms in {data['settings']} sizes, {data['models']} models"
    say(f"{data['out']}: {kinds}, {size(data['bytes'])}; open it in a browser")
