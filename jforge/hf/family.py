"""What a model family is, and the layer kinds that families share.

A new family is one entry of FAMILIES in the file of its kin in `families/`: how its config.json reads and what it may
not say, which layer is of which kind, what each kind is in jforge and where its weights go. Keys that a file may omit
mean the defaults of the transformers class. Kinds have the names of transformers' `layer_types`.
Source: configuration_*.py and modeling_*.py of transformers 5.23.0, and the keys of the checkpoints.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jforge.core.config import reject
from jforge.hf.keys import integer
from jforge.hf.weights import Weights

FULL, SLIDING, LINEAR, INDEXED = "full_attention", "sliding_attention", "linear_attention", "indexed_attention"
_LEGACY_KINDS = {"attention": FULL, "mamba": LINEAR}  # as transformers renames them


class Layer(NamedTuple):
    """What a layer of one kind is in jforge."""

    mechanism: str | None  # None: the dense one that the numbers of heads say
    split: Callable[[Weights, Any], dict[str, np.ndarray]]  # (weights, Config) -> params


class Family(NamedTuple):
    """What differs from model to model."""

    fields: Callable[[dict, str], dict]  # (config, kind) -> keyword arguments of Config; None where Config's default is
    kind: Callable[[dict, int], str]  # (config, layer) -> kind
    layers: Mapping[str, Layer]  # by kind; others have no mechanism
    defaults: Mapping[str, Any] = {}  # of keys that a file lacks; its null is no lack


def listed(config: dict, index: int, key: str = "layer_types") -> Any:
    """The layer's entry in config[key], a list over all layers; None if the file has no such list."""
    entries = config.get(key)
    if entries is None:
        return None
    if not isinstance(entries, (list, tuple)) or len(entries) != config["num_hidden_layers"]:
        reject(key, entries, f"a list of num_hidden_layers={config['num_hidden_layers']} entries")
    return _LEGACY_KINDS.get(entries[index], entries[index])


def all_full(config: dict, index: int) -> str:
    return listed(config, index) or FULL


def every(period: int, between: str, key: str | None = None) -> Callable[[dict, int], str]:
    """The last of every `period` layers is full, the others are of the kind `between`; config[key] sets the period."""

    def kind(config: dict, index: int) -> str:
        n = integer(config, key, period) if key else period
        return listed(config, index) or (between if (index + 1) % n else FULL)

    return kind
