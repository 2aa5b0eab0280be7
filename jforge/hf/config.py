"""config.json -> (mechanism name, Config) per layer: the one parser of Hugging Face model configs.

    layers(load("config.json"))[0]  ->  ("gqa", Config(hidden_size=4096, ...))

What a model family's attention has is said in families. Neither transformers nor torch is imported.
"""

import json
import math
import sys
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from jforge.attention import REGISTRY
from jforge.core import rope
from jforge.core.config import positive_int, reject, shown
from jforge.hf.families import FAMILIES, MISSING
from jforge.hf.family import CHUNKED, FULL, SLIDING, Family, Layer
from jforge.hf.kept import KEPT, Kept, ring_of
from jforge.hf.keys import BYTES_ALONE, ENCODER, OWN_ENTRY, integer, lack, need, section

SECTIONS = ("text_config", "language_config", "llm_config", "thinker_config", "decoder")
"""Where models of several inputs have their language model's config."""

_DEFAULTS = json.loads(Path(__file__).with_name("defaults.json").read_text(encoding="utf-8"))
WRAPPERS: dict[str, str] = _DEFAULTS["wrappers"]
"""{model_type of a model of several inputs: that of its language model, where the file does not say}"""
SIZES: dict[str, dict[str, int]] = _DEFAULTS["sizes"]
"""{model_type of such a language model: the defaults of its class}"""
_FLAT = ("cohere_compass", "dots3_note", "glm5_next", "qwen2_5_vl", "qwen2_vl")  # published without a section


MOST_LAYERS = 4096


def load(path: str | Path) -> dict:
    """The parsed config.json at `path`, or of stdin for "-".

    Raises ValueError with one line that names the path and what is wrong.
    """
    name = "stdin" if str(path) == "-" else path
    try:
        text = sys.stdin.read() if name == "stdin" else Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not a text file in UTF-8") from None
    try:
        hooks = {"object_pairs_hook": _once, "parse_float": _float, "parse_constant": _float}
        config = json.loads(text.removeprefix("\ufeff"), **hooks)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON: line {error.lineno}: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{name} is not a config: its brackets are nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{name} holds a JSON {type(config).__name__}; it must hold an object")
    return config


def _once(pairs: list[tuple[str, Any]]) -> dict:
    """An object whose keys differ; which of two would count is not said anywhere."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return found


def _float(text: str) -> float:
    """The number that is written there; not one that only comes near."""
    value = float(text)
    lost = not math.isfinite(value)
    if not lost:
        exact = Decimal(text)
        whole = exact == exact.to_integral_value()
        lost = exact != Decimal(value) if whole else value == 0  # 0.1 has no exact float, and nobody counts with it
    if lost:
        raise ValueError(f"the number {shown(text)} cannot be kept exactly: it reads as {value!r}")
    return value


def layers(config: Any) -> list[tuple[str, Any] | tuple[str, Any, int]]:
    """(mechanism name, Config) of every attention, in order, as jforge.stack takes them.

    Of a layer with two mixers side by side (Falcon-H1) both, of a layer that is an MLP alone (Nemotron-H) nothing. One
    that reads the keys of an earlier one, or takes its picks, has that one's index here: (mechanism name, Config,
    source).

    config: a parsed config.json or a transformers config. Raises NotImplementedError at the first layer whose kind
    has no mechanism (`layer` raises for that layer alone), and for an unknown model_type; ValueError for a required
    key that is missing and for values that no Config accepts.
    """
    return [
        (place.mechanism, place.config) if place.source is None else (place.mechanism, place.config, place.source)
        for place in places(config)
    ]


def layer(config: Any, index: int, kind: str | None = None) -> tuple[str, Any]:
    """(mechanism name, Config) of layer `index`, of one with two kinds that of `kind` or the first.

    Errors as `layers`; ValueError for an index outside the model, a layer without attention, a kind that it has not.
    """
    return read(config, index, kind)[2:]


class Place(NamedTuple):
    """One cache of a model."""

    index: int  # of its layer
    kind: str
    mechanism: str
    config: Any
    source: int | None  # the place whose keys or picks it has
    lacks: str | None  # why its weights are not converted; None where they are


def places(config: Any, *, caches_alone: bool = False, encoder_tokens: int | None = None) -> list[Place]:
    """Everything that keeps a cache, in order; errors as `layers`.

    caches_alone: what is refused only because its weights or its arithmetic have no mechanism is there too, and says
    so in `lacks`.
    encoder_tokens: with the keys and values of an encoder of so many tokens, in models that keep them; None: without.
    """
    family, own = _family(config)
    if encoder_tokens is not None:
        positive_int("encoder_tokens", encoder_tokens)
        if not family.crosses(own):
            reject("encoder_tokens", encoder_tokens, f"None: {own['model_type']} keeps no keys of an encoder")
        own = own | {ENCODER: encoder_tokens}
    bytes_alone = own | {BYTES_ALONE: True}
    asked = bytes_alone if caches_alone else own
    found = [(index, kind) for index in range(_count(own)) for kind in _kinds(asked, family, index)]
    found = [(index, kind) for index, kind in found if kind not in family.without_cache]
    numbers = {index: number for number, (index, _) in reversed(list(enumerate(found)))}
    out = []
    for index, kind in found:
        lacks, source = None, family.source(own, index)
        try:
            if kind not in (kinds := _kinds(own, family, index)):
                raise NotImplementedError(f"layer {index} is {kind} in the cache and {' or '.join(kinds)} in the mask")
            name, cfg = _read(family, own, index, kind)[2:]
        except NotImplementedError as problem:
            if not caches_alone:
                raise
            name, cfg = _read(family, bytes_alone, index, kind)[2:]
            lacks = str(problem)
        out.append(Place(index, kind, name, cfg, None if source is None else numbers[source], lacks))
    return out


def read(config: Any, index: int, kind: str | None = None) -> tuple[Layer, Mapping[str, float], str, Any]:
    """What the family says of layers of that kind, the gains of its params, and what `layer` returns."""
    return _read(*_family(config), index, kind)


def _read(family: Family, config: dict, index: int, kind: str | None) -> tuple[Layer, Mapping[str, float], str, Any]:
    model, count = config["model_type"], _count(config)
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
        reject("layer", index, f"in 0..{count - 1}, the layers of this model")
    config = _own(family, config, index)
    kinds = _kinds(config, family, index)
    if not kinds:
        raise ValueError(f"layer {index} of {model} keeps no cache of the text")
    if kind not in (None, *kinds):
        reject("kind", kind, f"{' or '.join(kinds)} in layer {index} of {model}")
    kind = kind or kinds[0]
    if kind in family.without_cache:
        raise ValueError(f"layer {index} of {model} is {kind}; it has no attention and keeps no cache")
    if kind not in family.layers:
        known = " and ".join(family.layers)
        lack(config, f"layer {index} of {model} is {kind}; only its {known} layers have a mechanism")
        return _cut(family, config, index, kind)
    found = family.layers[kind]
    if found.lacks:
        lack(config, f"layer {index} of {model} is {kind}: {found.lacks}")
    fields = {name: value for name, value in family.fields(config, kind).items() if value is not None}
    turn = (fields.get("rope_parameters") or {}).get("rope_type")
    if turn == "dynamic":
        known = ", ".join(rope.TYPES)
        lack(
            config,
            "rope_type is 'dynamic': it scales the keys of old tokens again as a row grows, and a cache keeps them as"
            f" they are; {known} have a mechanism",
        )
    name = found.mechanism or _dense_name(fields["num_attention_heads"], fields["num_key_value_heads"])
    if name == KEPT:
        return found, {}, name, Kept(**fields)
    config_class = REGISTRY[name].Config
    if hasattr(config_class, "layer_index"):  # heads of lightning forget the slower the deeper their layer
        fields["layer_index"] = index
    return found, family.gains(config, kind), name, config_class(**fields)


def _cut(family: Family, config: dict, index: int, kind: str) -> tuple[Layer, Mapping[str, float], str, Any]:
    """The cache of a full layer cut to a window or a chunk that a file asks for and the family's masks do not know."""
    model, key = config["model_type"], {SLIDING: "sliding_window", CHUNKED: "attention_chunk_size"}.get(kind)
    if key is None or FULL not in family.layers or family.layers[FULL].mechanism == KEPT:
        raise NotImplementedError(f"layer {index} of {model} is {kind}, which is not known in this model family")
    limit, found = integer(config, key), family.layers[FULL]
    fields = {name: value for name, value in family.fields(config, FULL).items() if value is not None}
    if found.mechanism is not None:
        return found, {}, KEPT, ring_of(REGISTRY[found.mechanism].cache_spec(_config(found.mechanism, fields)), limit)
    name = "sliding_window" if kind == SLIDING else "chunked_local"
    return found, {}, name, _config(name, fields | {key: limit})


def _config(name: str, fields: Mapping) -> Any:
    return REGISTRY[name].Config(**fields)


def _count(config: dict) -> int:
    count = integer(config, "num_hidden_layers")
    if count > MOST_LAYERS:
        reject("num_hidden_layers", count, f"at most {MOST_LAYERS:,}, more than any model has")
    return count


def _own(family: Family, config: dict, index: int) -> dict:
    """The config of a layer: with its entry of per_layer_config, whose keys are numbers, padded or not."""
    entries = section(config, "per_layer_config")
    given = next((entry for key, entry in entries.items() if str(key).isdigit() and int(key) == index), {})
    if not isinstance(given, Mapping):
        reject(f"per_layer_config[{index}]", given, "an object")
    given = {family.names.get(key, key): value for key, value in given.items()}
    return {**config, **given, OWN_ENTRY: given, "layer_index": index}


def _kinds(config: dict, family: Family, index: int) -> tuple[str, ...]:
    own = _own(family, config, index)
    if own.get("skip"):
        raise NotImplementedError(f"per_layer_config skips parts of layer {index}: its caches are not known")
    kinds = family.kind(own, index)
    if not isinstance(kinds, (str, tuple)):
        reject(f"the kind of layer {index}", kinds, "a string")
    return (kinds,) if isinstance(kinds, str) else kinds


def _family(config: Any) -> tuple[Family, dict]:
    """The family of the model and its config as families read it."""
    config = text_config(config)
    model = config["model_type"]
    if model not in FAMILIES and model in MISSING:
        raise NotImplementedError(f"model_type {model!r} is not converted: {MISSING[model]}")
    if model not in FAMILIES:
        raise NotImplementedError(f"model_type {model!r} is not known; known are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model], FAMILIES[model].spelled(config)


def text_config(config: Any) -> dict:
    """The language model's part of `config`, a dict or an object with to_dict(); it always has a model_type.

    Sizes that its section leaves out are its class's. Raises TypeError for anything else, ValueError where the
    model_type or the language model is missing.
    """
    found = _text(config)
    return sizes_of_class(config) | found


def sizes_of_class(config: Any) -> dict[str, int]:
    """The sizes that the section of a language model leaves to its class; of a file without a section none."""
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    text = _text(config)
    if text["model_type"] in MISSING or not any(_section(config, key) for key in SECTIONS):
        return {}
    family = FAMILIES.get(text["model_type"])
    names = family.names if family else {}
    said = {names.get(key, key) for key in text}
    return {key: size for key, size in SIZES.get(text["model_type"], {}).items() if names.get(key, key) not in said}


def _text(config: Any) -> dict:
    """The section of the language model with its model_type, or the file where it has none."""
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise TypeError(f"config is a {type(config).__name__}; it must be a dict or a transformers config")
    if _type(config) in MISSING:
        return dict(config)
    while inner := next(filter(None, (_section(config, key) for key in SECTIONS)), None):
        outer = _type(config)
        config = {**inner, "model_type": inner.get("model_type") or WRAPPERS.get(outer) or outer}
    need(config, "model_type")
    model = _type(config)
    if model in WRAPPERS and model not in FAMILIES:
        if model not in _FLAT:
            raise ValueError(f"config has no text_config, where {model} files have their language model")
        config = {**config, "model_type": WRAPPERS[model]}
    for key, value in config.items():
        if isinstance(value, str) and value.lower() in ("true", "false"):
            reject(key, value, "true or false without quotes")
    return dict(config)


def _type(config: Mapping) -> str | None:
    model = config.get("model_type")
    if model is not None and not isinstance(model, str):
        reject("model_type", model, "a string")
    return model


def _section(config: Mapping, key: str) -> Mapping:
    """A section of the config; a `decoder` that is no object is something else."""
    return section(config, key) if key != "decoder" or isinstance(config.get(key), Mapping) else {}


def _dense_name(heads: int, kv_heads: int) -> str:
    if heads == kv_heads:
        return "single_head" if heads == 1 else "mha"
    return "mqa" if kv_heads == 1 else "gqa"
