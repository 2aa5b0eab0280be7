"""What the commands show: each function returns plain data (so --json is complete), each show_ prints its tables."""

import math
from collections.abc import Iterable, Iterator

import jax.numpy as jnp
from rich.console import Console
from rich.progress import track as _track
from rich.table import Table

import jforge
from jforge.harness import compare
from jforge.harness.backends import BACKENDS, gpu, judge, passes
from jforge.harness.cases import cases

_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
OUT, _ERR = Console(soft_wrap=False), Console(stderr=True)
if not OUT.is_terminal:
    OUT = Console(width=120)


def track(items: Iterable, description: str) -> Iterator:
    """The items, with a progress bar on stderr where that is a terminal; a generator is drawn from as it goes."""
    return _track(items, description, console=_ERR, transient=True, disable=not _ERR.is_terminal)


def size(count: float) -> str:
    """Bytes in binary units: 4096 B, 16.0 KiB, 4.00 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 10240 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError


def grid(*columns: str, right: int = 99) -> Table:
    """A table whose columns from number `right` on are numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i >= right else "left", no_wrap=True)
    return table


def show(title: str, table: Table) -> None:
    """The title on lines of its own, so that a narrow table does not fold it."""
    OUT.print(title, style="bold", highlight=False)
    OUT.print(table)


# table


def table(context: int, dtype: str) -> dict:
    """Every mechanism on its first shipped model (its first example where it has none), one layer, one row."""
    rows = []
    for name in jforge.names():
        att = jforge.get(name)
        model, cfg = next(iter(att.models.items()), ("example", att.examples[0]))
        cost = att.cost(cfg, context=context, dtype=jnp.dtype(dtype))
        rows.append(
            {
                "mechanism": name,
                "model": model,
                "cache": {n: " ".join(b.dims) for n, b in att.cache_spec(cfg).items()},
                "bytes_per_token": float(cost.per_token),
                "fixed_bytes": float(cost.fixed),
                "stored_bytes": sum(cost.stored.values()),
                "written_bytes": sum(cost.written.values()),
                "read_bytes": sum(cost.read.values()),
                "flops_per_byte": cost.flops / sum(cost.read.values()),
                "summary": att.summary,
            }
        )
    return {"context": context, "dtype": dtype, "rows": rows}


def show_table(data: dict) -> None:
    title = f"One layer, one row of {data['context']:,} tokens, {data['dtype']} cache"
    columns = ("mechanism", "model", "cache", "B/token", "fixed", "stored", "step writes", "step reads", "flop/B")
    out = grid(*columns, right=3)
    for row in data["rows"]:
        out.add_row(
            row["mechanism"],
            row["model"],
            ", ".join(f"{n} {dims.replace(' ', '')}" for n, dims in row["cache"].items()),
            f"{row['bytes_per_token']:,.0f}",
            size(row["fixed_bytes"]),
            *(size(row[f"{what}_bytes"]) for what in ("stored", "written", "read")),
            f"{row['flops_per_byte']:.1f}",
        )
    show(title, out)
    for row in data["rows"]:
        OUT.print(f"{row['mechanism']}: {row['summary']}", highlight=False)


# cost


def cost(name: str, source: str, costs: list, context: int, batch: int, dtype: str) -> dict:
    """One layer's and all layers' bytes by buffer; the layers may differ, so the first is shown as the example."""

    def plain(c) -> dict:
        return {
            "buffers": {
                n: {"stored": c.stored[n], "written": c.written.get(n, 0), "read": c.read.get(n, 0)} for n in c.stored
            },
            "stored": sum(c.stored.values()),
            "written": sum(c.written.values()),
            "read": sum(c.read.values()),
            "bytes_per_token": float(c.per_token),
            "fixed": float(c.fixed),
            "flops": c.flops,
            "entries_read": c.entries_read,
        }  # fmt: skip

    head = {
        "mechanism": name,
        "source": source,
        "layers": len(costs),
        "context": context,
        "batch": batch,
        "dtype": dtype,
    }
    return {**head, "layer": plain(costs[0]), "all_layers": plain(sum(costs[1:], costs[0]))}


def show_cost(data: dict) -> None:
    layers, one, everything = data["layers"], data["layer"], data["all_layers"]
    title = (
        f"{data['mechanism']} in {data['source']}: {data['batch']} x {data['context']:,} tokens, {data['dtype']} cache"
    )
    out = grid("", "stored", "step writes", "step reads", right=1)
    for name, buffer in one["buffers"].items():
        out.add_row(f"layer 0, {name}", *(f"{buffer[what]:,} B" for what in ("stored", "written", "read")))
    for label, cost in (("layer 0", one), (f"{layers} layer{'s' if layers > 1 else ''}", everything)):
        out.add_row(label, *(f"{cost[what]:,} B" for what in ("stored", "written", "read")))
    out.add_row("", *(size(everything[what]) for what in ("stored", "written", "read")))
    show(title, out)
    OUT.print(
        f"A token adds {one['bytes_per_token']:,.0f} B to a layer and {everything['bytes_per_token']:,.0f} B to all; "
        f"an attend step of a layer takes {one['flops']:,} flops, {one['flops'] / one['read']:.1f} a byte read.",
        highlight=False,
    )


# check


def laws(result) -> dict:
    rows = [
        {"law": r.law, "error": r.error, "tolerance": r.tolerance, "ok": r.ok, "note": r.note if not r.ok else ""}
        for r in result
    ]
    return {"ok": result.ok, "laws": [{**row, "error": _number(row["error"])} for row in rows]}


def show_laws(data: list[dict]) -> None:
    names = [row["law"] for row in data[0]["laws"]]
    out = grid("mechanism", *names, right=1)
    for row in data:
        cells = [cell(law["error"], law["ok"]) for law in row["laws"]]
        out.add_row(row["mechanism"], *cells)
    show("Errors of the laws in float64 (L7 to L9 count violations)", out)
    OUT.print("  ".join(f"{law} {title}" for law, title in jforge.laws.TITLES.items()), highlight=False)
    for row in data:
        for law in row["laws"]:
            if not law["ok"]:
                OUT.print(f"{row['mechanism']} breaks {law['law']}: {law['note']}", style="red", highlight=False)
                OUT.print(f"  config: {row['config']}", highlight=False)


def _number(error: float) -> float | None:
    """JSON has no infinity: None stands for an error that is not a number."""
    return error if math.isfinite(error) else None


def cell(error: float | None, ok: bool) -> str:
    text = "inf" if error is None else "0" if error == 0 else f"{error:.0e}"
    return text if ok else f"[red]{text}[/red]"


# equiv


def backends(tag: str | None = None) -> list[dict]:
    """Every case in every dtype that a backend is judged in here: error against float64, or why it was refused."""
    rows = []
    work = [(c, b) for c in cases(tag=tag) for b in BACKENDS.values()]
    for case, backend in track(work, "comparing backends"):
        for dtype in backend.gpu_dtypes if gpu() else backend.dtypes:
            row = {"case": case.name, "op": case.op, "backend": backend.name, "dtype": dtype}
            try:
                errors = judge(backend, case, dtype)
                row |= {"out": _number(errors[0]), "lse": _number(errors[1]), "ok": passes(errors, dtype)}
            except NotImplementedError as refusal:
                row |= {"refused": str(refusal)}
            rows.append(row)
    return rows


def frameworks() -> list[dict]:
    """jforge against torch_ref on every example, and against transformers on tiny random models, in float32."""
    import torch_ref
    from jforge.harness import frameworks, tiny_models

    rows = []
    work = [(n, cfg) for n in jforge.names() if n in torch_ref.names() for cfg in jforge.get(n).examples]
    for name, cfg in track(work, "comparing with torch_ref"):
        errors = frameworks.against_torch(jforge.get(name), torch_ref.get(name), cfg)
        rows.append(
            {"mechanism": name, "judge": "torch_ref", "subject": f"N={cfg.num_attention_heads}", **_judged(errors)}
        )
    for name in track(tiny_models.MODELS, "comparing with transformers"):
        mechanism, errors = tiny_models.against_transformers(name)
        rows.append({"mechanism": mechanism, "judge": "transformers", "subject": name, **_judged(errors)})
    return rows


def _judged(errors: dict[str, float]) -> dict:
    worst = max(errors.values())
    return {"errors": {mode: _number(e) for mode, e in errors.items()}, "ok": worst <= compare.OUT["float32"]}


def agrees(data: dict) -> bool:
    """Nothing that was compared is outside its tolerance; a refusal is not a disagreement."""
    return all(row.get("ok", True) for part in ("backends", "frameworks") for row in data.get(part, []))


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
    for judge_name in dict.fromkeys(row["judge"] for row in rows):
        mine = [row for row in rows if row["judge"] == judge_name]
        out = grid("mechanism", "of", *mine[0]["errors"], right=2)
        for row in mine:
            cells = (cell(e, e is not None and e <= compare.OUT["float32"]) for e in row["errors"].values())
            out.add_row(row["mechanism"], row["subject"], *cells)
        show(f"jforge against {judge_name}, float32: worst relative error (allowed {compare.OUT['float32']:.0e})", out)


def show_equiv(data: dict) -> None:
    show_backends(data["backends"])
    OUT.print()
    show_frameworks(data["frameworks"])
    OUT.print(f"on {data['device']}", highlight=False)


# bench


def show_bench(data: dict) -> None:
    out = grid(
        "op", "B", "N", "K", "S", "implementation", "us", "p10", "p90", "GB/s", "% of ceiling", "kernels", right=1
    )
    for row in data["rows"]:
        if row["what"] == "ceiling":
            OUT.print(f"read ceiling {row['GB_per_s']:,.0f} GB/s", highlight=False)
            continue
        head = (row["what"], *(f"{row.get(axis, 1):,}" for axis in "BNKS"), row["implementation"])
        if "refused" in row:
            out.add_row(*head, "refused", "", "", "", "", "")
            continue
        share = f"{100 * row['of_ceiling']:.0f}" if "of_ceiling" in row else ""
        times = (f"{row[k]:,.1f}" for k in ("median", "p10", "p90"))
        out.add_row(*head, *times, f"{row['GB_per_s']:,.0f}", share, str(row["kernels"] or ""))
    where = f"{data['device']}, commit {data['commit']}"
    dtype = next((row["dtype"] for row in data["rows"] if "dtype" in row), "")
    show(f"Whole calls, merge included, {dtype}, on {where}", out)
    for row in data["rows"]:
        if "refused" in row:
            OUT.print(f"{row['implementation']}: {row['refused']}", highlight=False)


def plot_bench(data: dict, path: str) -> None:
    """Achieved GB/s by shape, one marker an implementation, and the read ceiling as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in data["rows"] if "median" in row]
    shapes = list(dict.fromkeys((row["what"], *(row.get(axis, 1) for axis in "BNKS")) for row in rows))
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for i, name in enumerate(dict.fromkeys(row["implementation"] for row in rows)):
        mine = [row for row in rows if row["implementation"] == name]
        x = [shapes.index((row["what"], *(row.get(axis, 1) for axis in "BNKS"))) for row in mine]
        axes.plot(x, [row["GB_per_s"] for row in mine], "osD^vP*X"[i % 8], label=name, markersize=7, alpha=0.8)
    for row in data["rows"]:
        if row["what"] == "ceiling":
            axes.axhline(row["GB_per_s"], color="grey", linestyle="--", label="read ceiling")
    axes.set_xticks(range(len(shapes)), [f"{op[7:]}\nB{b} N{n}\nK{k}\nS{s:,}" for op, b, n, k, s in shapes], fontsize=8)
    axes.set_ylabel("GB/s of q, keys, values and out")
    axes.set_ylim(bottom=0)
    axes.set_title(f"decode ops, whole call, {data['device']}")
    axes.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=120)
    plt.close(figure)
