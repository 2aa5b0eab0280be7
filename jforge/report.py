"""What the commands show: each function returns plain data (so --json is complete), each show_ prints its tables."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track as _track
from rich.table import Table

import jforge
from jforge import hf_config
from jforge.harness import compare
from jforge.harness.backends import BACKENDS, gpu, judge, passes
from jforge.harness.cases import cases
from jforge.harness.timing import time_cpu

CONFIG = Path(__file__).parent / "configs" / "llama-3.1-8b.json"
DEMO_CONTEXT = 4096
_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_OUT, _ERR = Console(soft_wrap=False), Console(stderr=True)
if not _OUT.is_terminal:
    _OUT = Console(width=120)


def track(items: Iterable, description: str) -> Iterator:
    """The items, with a progress bar on stderr where that is a terminal."""
    return _track(list(items), description, console=_ERR, transient=True, disable=not _ERR.is_terminal)


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
    _OUT.print(title, style="bold", highlight=False)
    _OUT.print(table)


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
        _OUT.print(f"{row['mechanism']}: {row['summary']}", highlight=False)


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
    _OUT.print(
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
        cells = [_cell(law["error"], law["ok"]) for law in row["laws"]]
        out.add_row(row["mechanism"], *cells)
    show("Errors of the laws in float64 (L7 to L9 count violations)", out)
    _OUT.print("  ".join(f"{law} {title}" for law, title in jforge.laws.TITLES.items()), highlight=False)
    for row in data:
        for law in row["laws"]:
            if not law["ok"]:
                _OUT.print(f"{row['mechanism']} breaks {law['law']}: {law['note']}", style="red", highlight=False)
                _OUT.print(f"  config: {row['config']}", highlight=False)


def _number(error: float) -> float | None:
    """JSON has no infinity: None stands for an error that is not a number."""
    return error if math.isfinite(error) else None


def _cell(error: float | None, ok: bool) -> str:
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
        cells = [_cell(r["out"], r["ok"]) if "ok" in r else "refused" for r in (found[c] for c in columns)]
        out.add_row(case, *cells)
    out.add_row("allowed", *(f"{compare.OUT[d]:.0e}" for _, d in columns), style="dim")
    show("Ops against the float64 oracle: worst relative error of the output; every slot not to be read is NaN", out)
    for row in rows:
        if "refused" in row:
            _OUT.print(f"{row['backend']} refuses {row['case']} ({row['dtype']}): {row['refused']}", highlight=False)


def show_frameworks(rows: list[dict]) -> None:
    """One table a judge, since each has modes of its own."""
    for judge_name in dict.fromkeys(row["judge"] for row in rows):
        mine = [row for row in rows if row["judge"] == judge_name]
        out = grid("mechanism", "of", *mine[0]["errors"], right=2)
        for row in mine:
            cells = (_cell(e, e is not None and e <= compare.OUT["float32"]) for e in row["errors"].values())
            out.add_row(row["mechanism"], row["subject"], *cells)
        show(f"jforge against {judge_name}, float32: worst relative error (allowed {compare.OUT['float32']:.0e})", out)


def show_equiv(data: dict) -> None:
    show_backends(data["backends"])
    _OUT.print()
    show_frameworks(data["frameworks"])
    _OUT.print(f"on {data['device']}", highlight=False)


# demo


def demo() -> dict:
    """Llama-3.1-8B from its config.json: bytes, laws, the four backends, decode times of one layer on this machine."""
    layers = hf_config.layers(hf_config.load(CONFIG))
    name, cfg = layers[0]
    att = jforge.get(name)
    context = 131072
    costs = [jforge.get(n).cost(c, context=context) for n, c in layers]
    steps = track(("laws", "backends", "times"), "demo")
    results = {}
    for step in steps:
        match step:
            case "laws":
                results["laws"] = laws(jforge.check(att, att.examples[0]))
            case "backends":
                results["backends"] = backends("demo")
            case "times":
                results["times"] = decode_times(att, name, cfg)
    return {"cost": cost(name, "Llama-3.1-8B", costs, context, 1, "bfloat16"), **results}


def decode_times(att, name: str, cfg) -> list[dict]:
    """One layer, one row of DEMO_CONTEXT tokens, float32: jforge jitted with a donated cache, and torch_ref."""
    import torch

    import torch_ref
    from jforge.harness.backends import to_torch

    params = att.init_params(jax.random.key(0), cfg)
    x = jax.random.normal(jax.random.key(1), (1, 1, cfg.hidden_size))
    tokens = jnp.array([DEMO_CONTEXT - 1], jnp.int32)
    fill = lambda shape: jax.random.normal(jax.random.key(2), shape)  # noqa: E731
    spec = att.cache_spec(cfg)
    leaves = {n: fill(b.full_shape(1, DEMO_CONTEXT)) for n, b in spec.items()}
    twin, torch_params = torch_ref.get(name), {k: to_torch(np.asarray(v)) for k, v in params.items()}
    torch_cache = {k: to_torch(np.asarray(v)) for k, v in leaves.items()} | {"length": to_torch(np.asarray(tokens))}
    torch_x = to_torch(np.asarray(x))
    step = jax.jit(lambda p, x, c: att.decode(p, cfg, x, c), donate_argnums=2)
    state = {"cache": spec.cls(**leaves, length=tokens)}

    def ours() -> None:
        y, cache = step(params, x, state["cache"])
        state["cache"] = type(cache)(
            **{n: getattr(cache, n) for n in spec}, length=jnp.full((1,), DEMO_CONTEXT - 1, jnp.int32)
        )
        y.block_until_ready()

    def theirs() -> None:
        with torch.no_grad():
            twin.decode(torch_params, cfg, torch_x, torch_cache)

    rows = []
    for label, call in (("jforge, jitted", ours), ("torch_ref", theirs)):
        timing = time_cpu(call, samples=10)
        row = {"backend": label, "context": DEMO_CONTEXT, "us": timing.median, "p10": timing.p10, "p90": timing.p90}
        rows.append(row)
    return rows


def show_demo(data: dict) -> None:
    show_cost(data["cost"])
    _OUT.print()
    out = grid("law", "", "error", right=2)
    for law in data["laws"]["laws"]:
        out.add_row(law["law"], jforge.laws.TITLES[law["law"]], _cell(law["error"], law["ok"]))
    show("The laws on a small gqa, float64", out)
    _OUT.print()
    show_backends(data["backends"])
    _OUT.print()
    out = grid("backend", "median ms", "p10", "p90", right=1)
    for row in data["times"]:
        out.add_row(row["backend"], *(f"{row[k] / 1e3:.1f}" for k in ("us", "p10", "p90")))
    context = data["times"][0]["context"]
    show(f"Decode step of one Llama-3.1-8B attention layer, {context:,} tokens, float32, on this machine's CPU", out)
