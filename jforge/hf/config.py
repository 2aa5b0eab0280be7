"""config.json -> (mechanism name, Config) per layer: the one parser of Hugging Face model configs.

    layers(load("config.json"))[0]  ->  ("gqa", Config(hidden_size=4096, ...))

What a model family's attention has is said in families. Neither transformers nor torch is imported.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jforge.attention import REGISTRY
from jforge.core import rope
from jforge.core.config import reject
from jforge.hf.families import FAMILIES
from jforge.hf.family import Layer
from jforge.hf.keys import integer, need, section

UNWRITTEN = ("dynamic", "longrope", "proportional")
"""The other scalings of RoPE that transformers has."""


def load(path: str | Path) -> dict:
    """The parsed config.json at `path`. Raises ValueError with one line that names the path and what is wrong."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: line {error.lineno}: {error.msg}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a JSON {type(config).__name__}; it must hold an object")
    return config


def layers(config: Any) -> list[tuple[str, Any]]:
    """(mechanism name, Config) of every layer, in order.

    config: a parsed config.json or a transformers config. Raises NotImplementedError at the first layer whose kind
    has no mechanism (`layer` raises for that layer alone), and for an unknown model_type; ValueError for a required
    key that is missing and for values that no Config accepts.
    """
    config = text_config(config)
    return [layer(config, index) for index in range(integer(config, "num_hidden_layers"))]


def layer(config: Any, index: int) -> tuple[str, Any]:
    """(mechanism name, Config) of layer `index`; errors as `layers`, and ValueError for an index outside the model."""
    return read(config, index)[1:]


def read(config: Any, index: int) -> tuple[Layer, str, Any]:
    """What `layer` returns, and what its family says of layers of that kind."""
    config = text_config(config)
    model = config["model_type"]
    if model not in FAMILIES:
        raise NotImplementedError(f"model_type {model!r} is not known; known are {', '.join(sorted(FAMILIES))}")
    family, count = FAMILIES[model], integer(config, "num_hidden_layers")
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
        reject("layer", index, f"in 0..{count - 1}, the layers of this model")
    config = {**family.defaults, **config}
    kind = family.kind(config, index)
    if kind not in family.layers:
        known = " and ".join(family.layers)
        raise NotImplementedError(f"layer {index} of {model} is {kind}; only its {known} layers have a mechanism")
    fields = {name: value for name, value in family.fields(config, kind).items() if value is not None}
    scaling = (fields.get("rope_parameters") or {}).get("rope_type")
    if scaling in UNWRITTEN:
        known = ", ".join(rope.TYPES)
        raise NotImplementedError(f"rope_type is {scaling!r}: only {known} have a mechanism")
    found = family.layers[kind]
    name = found.mechanism or _dense_name(fields["num_attention_heads"], fields["num_key_value_heads"])
    config_class = REGISTRY[name].Config
    if hasattr(config_class, "layer_index"):  # heads of lightning forget the slower the deeper their layer
        fields["layer_index"] = index
    return found, name, config_class(**fields)


def text_config(config: Any) -> dict:
    """The language model's part of `config`, a dict or an object with to_dict(); it always has a model_type.

    Raises TypeError for anything else, ValueError where the model_type is missing.
    """
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise TypeError(f"config is a {type(config).__name__}; it must be a dict or a transformers config")
    while (inner := section(config, "text_config")) and config.get("hidden_size") is None:
        config = {**inner, "model_type": inner.get("model_type") or config.get("model_type")}
    need(config, "model_type")
    return dict(config)


def _dense_name(heads: int, kv_heads: int) -> str:
    if heads == kv_heads:
        return "single_head" if heads == 1 else "mha"
    return "mqa" if kv_heads == 1 else "gqa"
