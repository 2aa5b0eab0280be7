"""What the commands show: each show_ prints the tables of plain data, which is what --json gives."""

import sys
from collections.abc import Iterable, Iterator

import jax.numpy as jnp
from rich.console import Console
from rich.progress import track as _track
from rich.table import Table

import jforge
from jforge.core import compare
from jforge.harness.equiv import number

_MOVED = ("stored", "written", "read")
_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
OUT, _ERR = Console(soft_wrap=False), Console(stderr=True)
if not OUT.is_terminal:
    OUT = Console(width=120)


def track(items: Iterable, description: str) -> Iterator:
    """The items, with a progress bar on stderr where that is a terminal; a generator is drawn from as it goes."""
    return _track(items, description, console=_ERR, transient=True, disable=not _ERR.is_terminal)


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


def grid(*columns: str, right: int = 99) -> Table:
    """A table whose columns from number `right` on are numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i >= right else "left", no_wrap=True)
    return table


def width(table: Table) -> int:
    """Columns of text that the table takes where nothing is cut."""
    return table.__rich_measure__(OUT, OUT.options.update(max_width=1000)).maximum


def show(title: str, table: Table) -> None:
    """The title on lines of its own, so that a narrow table does not fold it. No digit is ever cut: the terminal wraps
    the lines of a table that is wider than it is.
    """
    OUT.print(title, style="bold", highlight=False)
    if (needed := width(table)) > OUT.width:
        table.width = needed
    OUT.print(table, crop=False)


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
    }


def scanned(spec, cost) -> int:
    """Bytes that a step reads of buffers that grow with the context and are read whole; capacity = context."""
    grows = (n for n, b in spec.items() if b.every is not None and b.limit is None)
    return sum(cost.read.get(n, 0) for n in grows if cost.read.get(n) == cost.stored[n])


_TABLE = {  # in the order in which a narrow terminal does without them, from the end
    "B/token": lambda row: exact(row["bytes_per_token"]),
    "fixed": lambda row: size(row["fixed_bytes"]),
    "reads": lambda row: size(row["read_bytes"]),
    "scans": lambda row: size(row["scanned_bytes"]),
    "stored": lambda row: size(row["stored_bytes"]),
    "writes": lambda row: size(row["written_bytes"]),
    "flop/B": lambda row: f"{row['flops_per_byte']:.1f}",
}


def show_table(data: dict) -> None:
    for count in range(len(_TABLE), 3, -1):
        out = _table_grid(data["rows"], list(_TABLE)[:count])
        if width(out) <= OUT.width:
            break
    else:  # the names of models fold
        model, names = out.columns[1], max(len(row["model"]) for row in data["rows"])
        model.no_wrap, model.overflow, model.width = False, "fold", max(12, names - width(out) + OUT.width)
    show(f"One layer, one row of {data['context']:,} tokens, {data['dtype']} cache", out)
    OUT.print("reads: by one decode step; scans: of these, growing buffers read whole\n", highlight=False)
    notes = Table.grid(padding=(0, 2))
    notes.add_column(no_wrap=True)
    for row in data["rows"]:
        cache = ", ".join(f"{n}:{dims.replace(' ', '')}" for n, dims in row["cache"].items())
        notes.add_row(row["mechanism"], f"{row['summary']}. Cache {cache}")
    OUT.print(notes)


def _table_grid(rows: list[dict], numbers: list[str]) -> Table:
    out = grid("mechanism", "model", *numbers, right=2)
    for row in rows:
        out.add_row(row["mechanism"], row["model"], *(_TABLE[name](row) for name in numbers))
    return out


# cost


def cost(
    name: str, source: str, costs: list, context: int, batch: int, dtype: str, mechanisms: list[str] | None = None
) -> dict:
    """Bytes by buffer of each kind of layer (one mechanism, one cost), of all layers of `name`, and of the model.

    costs: one a layer of the model. mechanisms: the layers' names, all `name` where not given.
    """
    mechanisms = mechanisms or [name] * len(costs)
    kinds: dict[int, list[int]] = {}
    for i in range(len(costs)):
        same = (j for j in kinds if mechanisms[j] == mechanisms[i] and costs[j] == costs[i])
        kinds.setdefault(next(same, i), []).append(i)
    mine = [c for mechanism, c in zip(mechanisms, costs, strict=True) if mechanism == name]
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
    out, model = grid("", "stored", "step writes", "step reads", right=1), data["model"]

    def row(label: str, cost: dict, layers: int = 1) -> None:
        out.add_row(label, *(f"{layers * cost[key]:,} B" for key in _MOVED))

    kinds = sorted(data["kinds"], key=lambda kind: kind["mechanism"] != data["mechanism"])
    for kind in kinds:
        first, count = f"layer {kind['layers'][0]}", len(kind["layers"])
        if kind["mechanism"] != data["mechanism"]:
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
    show(f"{data['mechanism']} in {data['source']}: {sizes}", out)
    for kind in kinds:
        if kind["mechanism"] == data["mechanism"]:
            adds = f"layer {kind['layers'][0]}: one more token a row adds {exact(kind['bytes_per_token'])} B"
            flops = f"an attend step takes {kind['flops']:,} flops, {kind['flops'] / kind['read']:.1f} a byte read"
            OUT.print(f"{adds}; {flops}", highlight=False)
    adds = f"one more token a row adds {exact(model['bytes_per_token'])} B"
    OUT.print(f"{_layers(model['layers'])}: {adds}", highlight=False)


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
    out = grid("mechanism", *names, right=1)
    for row in data:
        out.add_row(_label(row), *(cell(law["error"], law["ok"]) for law in row["laws"]))
    show("Errors of the laws in float64 (L7 to L9 count violations)", out)
    OUT.print("  ".join(f"{law['law']} {law['title']}" for law in data[0]["laws"]), highlight=False)
    for row in data:
        for law in row["laws"]:
            if law["ok"] and law["note"]:
                OUT.print(f"{_label(row)}, {law['law']}: {law['note']}", highlight=False)
        if row["ok"]:
            continue
        OUT.print(f"\n{_label(row)} breaks laws, with {row['config']}", style="red", highlight=False)
        for law in row["laws"]:
            if not law["ok"]:
                OUT.print(f"  {law['law']} {law['title']}: {law['note']}", highlight=False)
        OUT.print(f"  this points at {row['points_at']}", highlight=False)


def _label(row: dict) -> str:
    return row["mechanism"] if row["of"] < 2 else f"{row['mechanism']} {row['number']}/{row['of']}"


def cell(error: float | None, ok: bool) -> str:
    text = "inf" if error is None else "0" if error == 0 else str(error) if isinstance(error, int) else f"{error:.0e}"
    return text if ok else f"[red]{text}[/red]"


# equiv


def show_backends(rows: list[dict]) -> None:
    """Cases down, backend and dtype across: the worst relative error of the output."""
    columns = list(dict.fromkeys((row["backend"], row["dtype"]) for row in rows))
    out = grid("case", *(f"{backend}\n{_SHORT[dtype]}" for backend, dtype in columns), right=1)
    for case in dict.fromkeys(row["case"] for row in rows):
        found = {(r["backend"], r["dtype"]): r for r in rows if r["case"] == case}
        cells = [cell(r["out"], r["ok"]) if "ok" in r else "refused" for r in (found[c] for c in columns)]
        out.add_row(case, *cells)
    out.add_row("allowed", *(f"{compare.OUT[d]:.0e}" for _, d in columns), style="dim")
    show("Ops against the float64 oracle: worst relative error of the output; every slot not to be read is NaN", out)
    for row in rows:
        if "refused" in row:
            OUT.print(f"{row['backend']} refuses {row['case']} ({row['dtype']}): {row['refused']}", highlight=False)


def show_frameworks(rows: list[dict]) -> None:
    """One table a judge, since each has modes of its own."""
    for i, judge_name in enumerate(dict.fromkeys(row["judge"] for row in rows)):
        if i:
            OUT.print()
        mine = [row for row in rows if row["judge"] == judge_name]
        out = grid("mechanism", "of", *mine[0]["errors"], right=2)
        for row in mine:
            cells = (cell(e, e is not None and e <= compare.OUT["float32"]) for e in row["errors"].values())
            out.add_row(row["mechanism"], row["subject"], *cells)
        show(f"jforge against {judge_name}, float32: worst relative error (allowed {compare.OUT['float32']:.0e})", out)


def show_equiv(data: dict) -> None:
    if data["backends"]:
        show_backends(data["backends"])
        OUT.print()
    show_frameworks(data["frameworks"])
    OUT.print(f"on {data['device']}", highlight=False)
