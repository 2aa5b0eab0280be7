"""`jforge viz`: which pictures a mechanism and which a model has, and where they are written."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import jforge
from jforge import lens
from jforge.harness import records
from jforge.hf.kept import KEPT
from jforge.report import Grid, say, show
from jforge.roofline import DEVICES
from jforge.viz import costs, data, field, growth, steps, strips, style

FORMATS = ("svg", "png", "pdf")


def models(found: Mapping[str, lens.ModelLens]) -> dict[str, lens.ModelLens]:
    """{what the user called it: lens} by short names. Raises ValueError for a model without a cache."""
    for said, model in found.items():
        if not sum(model.stored(context=1).values()):
            raise ValueError(f"{said} keeps no cache; there is nothing to draw")
    return dict(zip(_names(list(found)), found.values(), strict=True))


def _names(said: Sequence[str]) -> list[str]:
    """The file's name without ending, its folder's for a config.json; as it was said where two would be the same."""
    short = [Path(s).parent.name or s if Path(s).stem == "config" else Path(s).name.removesuffix(".json") for s in said]
    return [s if short.count(name) > 1 else name for s, name in zip(said, short, strict=True)]


def plan(mechanisms: Iterable[str], models: Mapping[str, lens.ModelLens], context: int) -> dict[str, Callable]:
    """{name of the picture: what draws it}: three of each mechanism, and of the models one of each kind, side by side.

    context: of the pictures that are of one length. A model with a layer that no mechanism computes has no place on
    the roofline, since its flops are not known.
    """
    found = {}
    for name in mechanisms:
        found[f"{name}_slots"] = partial(strips.slots, name)
        found[f"{name}_field"] = partial(field.receptive_field, name)
        if jforge.get(name).models:
            found[f"{name}_context"] = partial(growth.context, name)
    if models:
        each = {name: model.cost(context=context) for name, model in models.items()}
        computed = {n: each[n] for n, model in models.items() if all(x.mechanism != KEPT for x in model.layers)}
        of = f"all layers, one row of {style.tokens(context)} tokens, cache in {growth.dtypes(models)}"
        found["memory"] = partial(growth.memory, models)
        found["read"] = partial(growth.read, models)
        found["kept_and_read"] = partial(costs.kept_and_read, each, of)
        if computed:
            found["roofline"] = partial(costs.roofline, computed, (DEVICES["h100"], DEVICES["b200"]), of)
        found["floor"] = partial(steps.floor, models, context)
    return found


def write(pictures: Mapping[str, Callable], out: str, ending: str, track: Callable = lambda items, _: items) -> list:
    """Draw the pictures into the folder `out`, which is made; [{"picture", "file", "question", "data"}].

    A picture of the same name is replaced; nothing else in the folder changes. Raises ValueError, before anything is
    drawn, if a file cannot be written.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ValueError(f"--out is {out!r}; it cannot be made a folder: {problem.strerror}") from None
    files = {name: folder / f"{name}.{ending}" for name in pictures}
    for file in files.values():
        records.writable("--out", str(file))
    written = []
    for name, draw in track(list(pictures.items()), "drawing"):
        figure = draw()
        style.save(figure, files[name])
        said = {"question": data.question(figure), "data": data.digest(figure)}
        written.append({"picture": name, "file": str(files[name]), **said})
    return written


def show_written(rows: Sequence[dict]) -> None:
    out = Grid("file", "what it answers")
    for row in rows:
        out.add_row(row["file"], row["question"])
    show(f"{len(rows)} picture{'s' * (len(rows) > 1)}", out)
    say("data: Attention.cost, jforge.lens, the traced step, and experiments on small caches")
