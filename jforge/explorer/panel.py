"""The panel that reads a pasted config.json: what it says, and the rules by which the page computes it.

    answer({"model_type": "llama", ...}, context=131_072, batch=1)    # in Python
    rules()                                                             # the same function in JavaScript

`answer` and all that it calls (jforge.lens, jforge.hf, the cache_spec and work of every mechanism) are translated when
the page is made, so no rule is written twice: jforge.explorer.translate.
"""

from functools import partial
from importlib.resources import files
from typing import Any, NamedTuple

from jforge import report_lens, roofline
from jforge.attention import REGISTRY
from jforge.core import guard
from jforge.core.attention import Attention
from jforge.cost import Cost, call_cost
from jforge.explorer.data import MOVED, described, moved
from jforge.explorer.translate import Program, literal
from jforge.hf import config as hf_config
from jforge.hf.families import FAMILIES
from jforge.lens import DTYPES, LensLayer, dtype_of, from_config
from jforge.report import exact, size

CARD = "h100"
"""Whose least times are shown, and whose memory the caches may fill."""
FIRST = "gemma-3-27b"
"""The example that is shown before anything is pasted."""


def answer(
    config: Any, context: int, batch: int, dtype: str | None = None, encoder_tokens: int | None = None
) -> dict[str, Any]:
    """What the panel says of a parsed config.json, and `data`, all that `jforge lens --json` says of it.

    dtype: of the cache; None: what the file says. Errors as jforge.lens.from_config.
    """
    model = from_config(config, encoder_tokens=encoder_tokens)
    card = roofline.device(CARD)
    data = report_lens.lens(model.model_type, model, [context], [batch], dtype=dtype, card=card)
    layers = zip(model.kinds.items(), data["kinds"], strict=True)
    return {
        "first": report_lens.first_line(data),
        "step": _step(data),
        "counted": report_lens.counted(data),
        "kinds": [_kind(layer, count, words, context, batch, dtype) for (layer, count), words in layers],
        "lines": report_lens.limits(data) + report_lens.remarks(data),
        "data": data,
    }


def _step(data: dict) -> str:
    (row,) = data["rows"]
    many = "1 row" if row["batch"] == 1 else f"{row['batch']:,} rows"
    stored, written, read = (size(row[what]) for what in MOVED)
    least = report_lens.seconds(row["floor_seconds"])
    return (
        f"{many} of {row['context']:,} tokens: stored {stored}; a step reads {read}, writes {written}, and takes at "
        f"least {least} on {data['device']}."
    )


def _kind(layer: LensLayer, count: int, words: dict, context: int, batch: int, dtype: str | None) -> dict[str, Any]:
    """The bytes of all layers of a kind together, buffer by buffer as explorer.data has them."""
    cost = layer.cost(context=context, batch=batch, dtype=dtype) * count
    each = f"{exact(words['bytes_per_token'])} B a token, {size(words['fixed'])} fixed in each"
    named = f"{count:,} {words['kind']}, {report_lens.mechanism_of(words)}"
    return {
        "title": f"{named}: {each}{report_lens.source_of(words)}",
        "buffers": described(layer.spec, dtype_of(dtype or layer.dtype)),
        "bytes": {what: row for what, (row,) in moved(layer.spec, [cost]).items()},
    }


class Mechanism(NamedTuple):
    """What the lens asks of an Attention, without the functions that compute it."""

    Config: type
    shapes: Any
    cache_spec: Any
    work: Any

    def cost(self, cfg, *, context: int, batch: int = 1, capacity: int | None = None, dtype="bfloat16") -> Cost:
        """Of one decode step, as `Attention.cost`."""
        return call_cost(self.cache_spec(cfg), partial(self.work, cfg), context, batch, capacity, dtype, 1, False)


def mechanisms() -> dict[str, Attention]:
    """Those that some family names, or means by its numbers of heads."""
    named = {layer.mechanism for family in FAMILIES.values() for layer in family.layers.values()}
    named |= {hf_config._dense_name(*heads) for heads in ((1, 1), (2, 2), (2, 1), (4, 2))}
    return {name: att for name, att in REGISTRY.items() if name in named}


def rules() -> str:
    """JavaScript of `lens`, which is `answer`, and of `size`; `std` of explorer.translate must come before it."""
    program = Program({
        "jforge.attention.REGISTRY": "registry",
        "jforge.core.config.Described": "null",  # says what is wrong in calls that users write
        "jforge.core.params.Drawn": "((...sizes) => std.tuple(sizes.filter((n) => !(n instanceof std.Named))))",
        "jforge.core.softmax.wider": "std.wider",
        "jforge.hf.config._DEFAULTS": "defaults",
        "jforge.hf.config.load": "null",  # the page reads no path
    })  # fmt: skip
    called, made, sized = (program.resolve(__name__, name) for name in ("answer", "Mechanism", "size"))
    entries = []
    for name, att in mechanisms().items():
        functions = (guard.unchecked(getattr(att, part)) for part in Mechanism._fields[1:])
        parts = (program.resolve(part.__module__, part.__qualname__) for part in (att.Config, *functions))
        entries.append(f"[{literal(name)}, {made}({', '.join(parts)})]")
    lines = [
        f"const defaults = {literal(hf_config._DEFAULTS)};",
        program.written(),
        f"const registry = std.dict([\n{',\n'.join(entries)},\n]);",
        f"return {{ lens: {called}, size: {sized} }};",
    ]
    return f"const {{ lens, size }} = (() => {{\n{'\n'.join(lines)}\n}})();"


def data() -> dict[str, Any]:
    """What the panel offers: the shipped files and the names of dtypes."""
    shipped = sorted(files("jforge").joinpath("configs").iterdir(), key=lambda path: path.name)
    texts = {path.name: path.read_text(encoding="utf-8") for path in shipped if path.name.endswith(".json")}
    short: dict[str, str] = {}  # the first name of each
    for name, known in DTYPES.items():
        short.setdefault(known, name)
    return {
        "examples": {name.removesuffix(".json"): text for name, text in texts.items()},
        "first": FIRST,
        "dtypes": list(short.values()),
    }
