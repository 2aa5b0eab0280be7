"""What `jforge lens` shows: plain data of one or several models, which is what --json gives, and its tables."""

import csv
import sys
from collections.abc import Mapping, Sequence

from jforge import roofline
from jforge.lens import KEPT, LensLayer, ModelLens
from jforge.report import Grid, exact, layout, say, show, size

_COLUMNS = (
    "model", "context", "batch", "dtype", "stored", "written", "read", "bytes_per_token", "fixed", "floor_seconds",
)  # fmt: skip


def lens(
    name: str, model: ModelLens, contexts: Sequence[int], batches: Sequence[int], *, dtype: str | None = None,
    card: roofline.Device, memory: int | None = None, page: int | None = None, mesh: Mapping[str, int] | None = None,
) -> dict:  # fmt: skip
    """All that is known of a model's caches at these sizes. memory: bytes that caches may take, the card's if None."""
    memory = memory or card.memory
    longest = max(contexts)
    cost = model.cost(context=longest, dtype=dtype)
    kinds = []
    for layer, count in model.kinds.items():
        one = layer.cost(context=longest, dtype=dtype)
        kinds.append(
            {
                **{"layers": count, "kind": layer.kind, "mechanism": layer.mechanism},
                **{"cache": cache_of(layer), "shares": layer.shares, "lacks": layer.lacks},
                **{"bytes_per_token": float(one.per_token), "fixed": float(one.fixed)},
            }
        )
    rows = [_row(model, context, batch, dtype, card, page, mesh or {}) for context in contexts for batch in batches]
    limits = {
        "memory": memory,
        "max_context": {b: model.max_context(memory=memory, batch=b, dtype=dtype, page=page) for b in batches},
        "max_batch": {c: model.max_batch(memory=memory, context=c, dtype=dtype, page=page) for c in contexts},
        "compute_bound_from": {c: model.compute_bound_from(card, context=c, dtype=dtype) for c in contexts},
    }
    return {
        **{"model": name, "model_type": model.model_type, "dtype": dtype or model.dtype, "device": card.name},
        **{"bytes_per_token": float(cost.per_token), "fixed": float(cost.fixed), "layers": len(model.layers)},
        **{"kinds": kinds, "rows": rows, "limits": limits, "page": page, "mesh": dict(mesh or {})},
        "notes": [note for note in model.notes if dtype is None or not note.startswith("cache in ")],
    }


def _row(model: ModelLens, context, batch, dtype, card, page, mesh) -> dict:
    cost = model.cost(context=context, batch=batch, dtype=dtype, page=page)
    row = {"context": context, "batch": batch}
    row |= {what: sum(getattr(cost, what).values()) for what in ("stored", "written", "read")}
    row["buffers"] = {
        n: {what: getattr(cost, what).get(n, 0) for what in ("stored", "written", "read")}
        for n in {**cost.stored, **cost.read}
    }
    row["floor_seconds"] = model.floor(card, context=context, batch=batch, dtype=dtype)
    if mesh:
        row["stored_per_device"] = model.stored_per_device(mesh, context=context, batch=batch, dtype=dtype, page=page)
    return row


def cache_of(layer: LensLayer) -> str:
    """Its buffers with their sizes: "k: B S K=8 H=128"."""
    if layer.shares is not None:
        return "none of its own"
    return ", ".join(f"{name}: {layout(buffer)}" for name, buffer in layer.spec.items())


def first_line(data: dict) -> str:
    """Bytes a token and fixed bytes."""
    fixed = size(data["fixed"]) if data["fixed"] else "nothing"
    return f"{data['model']}: {exact(data['bytes_per_token'])} B a token, {fixed} fixed, {data['dtype']} cache"


def show_lens(models: list[dict]) -> None:
    """One model in full, several side by side."""
    for data in models:
        say(first_line(data), "bold")
    say()
    if len(models) == 1:
        _show_one(models[0])
    else:
        _show_beside(models)


def _show_one(data: dict) -> None:
    out = Grid("layers", "kind", "mechanism", "B a token", "fixed", right=3)
    for kind in data["kinds"]:
        each = exact(kind["bytes_per_token"]), size(kind["fixed"])
        out.add_row(str(kind["layers"]), kind["kind"], mechanism_of(kind), *each)
    show(counted(data), out)
    for kind in data["kinds"]:
        say(f"{kind['kind']}: {kind['cache']}{source_of(kind)}", indent=2)
    say()
    sharded = bool(data["mesh"])
    columns = ["context", "batch", "stored", "step reads", "step writes", "at least"]
    out = Grid(*columns[:2], *(["a device"] if sharded else []), *columns[2:], right=0)
    for row in data["rows"]:
        own = [size(row["stored_per_device"])] if sharded else []
        moved = [size(row[what]) for what in ("stored", "read", "written")]
        out.add_row(f"{row['context']:,}", f"{row['batch']:,}", *own, *moved, seconds(row["floor_seconds"]))
    beside = f", in pages of {data['page']} tokens" if data["page"] else ""
    sharded_as = ", ".join(f"{axis}={n}" for axis, n in data["mesh"].items())
    show(f"All layers on {data['device']}{beside}{f', mesh {sharded_as}' if sharded else ''}", out)
    for line in limits(data):
        say(line)
    for line in remarks(data):
        say(line, indent=2)


def counted(data: dict) -> str:
    """How many caches, of how many kinds."""
    return f"{_count(data['layers'], 'cache')} of {_count(len(data['kinds']), 'kind')}"


def mechanism_of(kind: dict) -> str:
    return "no mechanism" if kind["mechanism"] == KEPT else kind["mechanism"]


def source_of(kind: dict) -> str:
    """Of layers that keep nothing: whose cache they read."""
    return "" if kind["shares"] is None else f"; reads that of place {kind['shares']}"


def remarks(data: dict) -> list[str]:
    """What is not converted, and the notes."""
    lacking = [f"not convertible, {kind['kind']}: {kind['lacks']}" for kind in data["kinds"] if kind["lacks"]]
    return lacking + [f"note: {note}" for note in data["notes"]]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def limits(data: dict) -> list[str]:
    """What the memory holds at most, and when a step is bound by arithmetic."""
    found, room, lines = data["limits"], size(data["limits"]["memory"]), []
    for batch, tokens in found["max_context"].items():
        many = "any length" if tokens is None else f"{tokens:,} tokens"
        lines.append(f"{room} hold {'a row' if batch == 1 else f'{batch:,} rows'} of {many}")
    for context, rows in found["max_batch"].items():
        lines.append(f"{room} hold {_count(rows, 'row')} of {context:,} tokens; {_bound(data, context)}")
    return lines


def _bound(data: dict, context: int) -> str:
    if any(kind["mechanism"] == KEPT for kind in data["kinds"]):
        return "when a step is bound by arithmetic is not known"
    since = data["limits"]["compute_bound_from"][context]
    bound = "memory-bound at every batch" if since is None else f"compute-bound from batch {since:,} on"
    return f"attention with its projections is {bound}"


def _show_beside(models: list[dict]) -> None:
    """Quantities down, models across."""
    out = Grid("", *(data["model"] for data in models), right=1)
    out.add_row("caches", *(str(data["layers"]) for data in models))
    out.add_row("B a token", *(exact(data["bytes_per_token"]) for data in models))
    out.add_row("fixed", *(size(data["fixed"]) for data in models))
    for at, row in enumerate(models[0]["rows"]):
        where = f"{row['batch']:,} x {row['context']:,}"
        for what, text in (("stored", "stored"), ("read", "step reads"), ("written", "step writes")):
            out.add_row(f"{text}, {where}", *(size(data["rows"][at][what]) for data in models))
        out.add_row(f"at least, {where}", *(seconds(data["rows"][at]["floor_seconds"]) for data in models))
    room = size(models[0]["limits"]["memory"])
    for batch in models[0]["limits"]["max_context"]:
        found = [data["limits"]["max_context"][batch] for data in models]
        out.add_row(f"longest in {room}, batch {batch:,}", *("any" if n is None else f"{n:,}" for n in found))
    for context in models[0]["limits"]["max_batch"]:
        found = [data["limits"]["max_batch"][context] for data in models]
        out.add_row(f"rows in {room}, {context:,}", *(f"{n:,}" for n in found))
    show(f"Side by side; times on {models[0]['device']}", out)
    for data in models:
        for note in data["notes"]:
            say(f"{data['model']}: {note}", indent=2)


def seconds(value: float) -> str:
    """Three digits, in microseconds or milliseconds."""
    return f"{value * 1e6:.3g} us" if value < 1e-3 else f"{value * 1e3:.3g} ms"


def write_csv(models: list[dict]) -> None:
    """A line for each model, context and batch."""
    out = csv.DictWriter(sys.stdout, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    out.writeheader()
    for data in models:
        out.writerows({**data, **row} for row in data["rows"])
