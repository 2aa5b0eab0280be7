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
from jforge.hf.kept import KEPT, of_encoder
from jforge.hf.keys import BYTES_ALONE, ENCODER, OWN_ENTRY, integer
from jforge.hf.weights import ATTENTION, Weights

FULL, SLIDING, LINEAR, INDEXED = "full_attention", "sliding_attention", "linear_attention", "indexed_attention"
CHUNKED, CONV, CROSS = "chunked_attention", "conv", "cross_attention"
_LEGACY_KINDS = {"attention": FULL, "mamba": LINEAR, "deepseek_sparse_attention": INDEXED}
_LEGACY_KINDS |= {"qwen_sparse_attention": INDEXED}
"""As transformers renames them."""


class Layer(NamedTuple):
    """What a layer of one kind is in jforge."""

    mechanism: str | None  # None: the dense one that the numbers of heads say; "kept": a hf.kept.Kept is its Config
    split: Callable[[Weights, Any], dict[str, np.ndarray]] | None  # (weights, Config) -> params
    module: str = ATTENTION  # where they are within the layer, a regular expression
    lacks: str | None = None  # of a layer whose cache alone is known: what no mechanism has


def as_it_is(config: dict) -> dict:
    """`completed` of a family whose files list their layers."""
    return config


def no_gains(config: dict, kind: str) -> dict:
    """`gains` of a family that multiplies by weights alone."""
    return {}


def no_source(config: dict, index: int) -> None:
    """`source` of a family whose layers share nothing."""


def no_encoder(config: dict) -> bool:
    """`crosses` of a family without an encoder."""
    return False


class Family(NamedTuple):
    """What differs from model to model."""

    fields: Callable[[dict, str], dict]  # (config, kind) -> keyword arguments of Config; None where Config's default is
    kind: Callable[[dict, int], str | tuple[str, ...]]  # (config, layer) -> kind, or those that lie side by side in it
    layers: Mapping[str, Layer]  # by kind; others have no mechanism
    defaults: Mapping[str, Any] = {}  # of keys that a file lacks; its null is no lack
    names: Mapping[str, str] = {}  # {a key of its files: what others call it}
    completed: Callable[[dict], dict] = as_it_is  # the file with num_hidden_layers and layer_types where it has neither
    gains: Callable[[dict, str], Mapping[str, float]] = no_gains  # (config, kind) -> factors of params
    source: Callable[[dict, int], int | None] = (
        no_source  # (config, layer) -> the earlier one whose keys or picks it has
    )
    without_cache: tuple[str, ...] = ()  # kinds of layers that are no attention: an MLP alone
    crosses: Callable[[dict], bool] = no_encoder  # whether its layers keep keys of an encoder too

    def spelled(self, config: dict) -> dict:
        """The config with the keys that others have, and the family's defaults."""
        own = {ours: config[theirs] for theirs, ours in self.names.items() if config.get(theirs) is not None}
        return self.completed({**self.defaults, **config, **own})


def listed(config: dict, index: int, key: str = "layer_types") -> Any:
    """The layer's entry in config[key], a list over all layers; None if the file has no such list."""
    entries = config.get(key)
    if entries is None:
        return None
    if not isinstance(entries, (list, tuple)) or len(entries) != config["num_hidden_layers"]:
        reject(key, entries, f"a list of num_hidden_layers={config['num_hidden_layers']} entries")
    return _LEGACY_KINDS.get(entries[index], entries[index])


def no_window(config: dict, index: int) -> str:
    """Full layers of a class that blanks the window of a file; an entry of per_layer_config it does not blank."""
    return all_full(config | {"sliding_window": config.get(OWN_ENTRY, {}).get("sliding_window")}, index)


def window_of_all(config: dict, index: int) -> str:
    """One window for all layers unless sliding_window is null. transformers' mask obeys no list, its cache does."""
    if config["sliding_window"] is None or (config.get(BYTES_ALONE) and config.get("layer_types") is not None):
        return all_full(config, index)
    return SLIDING


def as_listed(config: dict, index: int) -> str:
    """By a list that the class fills in with full layers where a file has none."""
    return listed(config, index) or FULL


def all_full(config: dict, index: int) -> str:
    """Full layers. Where a class has no list, transformers' caches obey a window or a chunk that a file names, even if
    its masks do not.
    """
    if (kind := listed(config, index)) is not None:
        return kind
    if config.get("sliding_window") is not None:
        return SLIDING
    return FULL if config.get("attention_chunk_size") is None else CHUNKED


def every(period: int, between: str, key: str | None = None) -> Callable[[dict, int], str]:
    """The last of every `period` layers is full, the others are of the kind `between`; config[key] sets the period."""

    def kind(config: dict, index: int) -> str:
        if (given := listed(config, index)) is not None:
            return given
        return between if (index + 1) % (integer(config, key, period) if key else period) else FULL

    return kind


def first_of(period: int, between: str, key: str | None = None) -> Callable[[dict, int], str]:
    """As `every`, where the first of every `period` layers is full."""

    def kind(config: dict, index: int) -> str:
        if (given := listed(config, index)) is not None:
            return given
        return between if index % (integer(config, key, period) if key else period) else FULL

    return kind


def kept(why: str, *kinds: str) -> dict[str, Layer]:
    """Layers of these kinds whose cache has the layout of no mechanism: their fields are those of a Kept."""
    return dict.fromkeys(kinds, Layer(KEPT, None, lacks=why))


def caches_of(family: Family, why: str, **changes: Any) -> Family:
    """A family with the same caches, whose weights are not converted; changes: of its fields."""
    layers = {kind: layer._replace(split=None, lacks=why) for kind, layer in family.layers.items()}
    return family._replace(**{"layers": layers, **changes})


def reads_encoder(config: dict) -> bool:
    return bool(config.get("is_encoder_decoder") or config.get("add_cross_attention"))


def with_encoder(family: Family, crosses: Callable[[dict], bool] = reads_encoder) -> Family:
    """Beside their own every layer keeps the keys and values of an encoder, in as many heads of the same width."""

    def kind(config: dict, index: int) -> tuple[str, ...]:
        own = family.kind(config, index)
        own = (own,) if isinstance(own, str) else own
        return (*own, CROSS) if config.get(ENCODER) and crosses(config) else own

    def fields(config: dict, kind: str) -> dict:
        if kind != CROSS:
            return family.fields(config, kind)
        own = family.fields(config, FULL)
        width = own.get("head_dim") or own["hidden_size"] // own["num_attention_heads"]
        return of_encoder(config[ENCODER], own["num_key_value_heads"], width)

    cross = Layer(KEPT, None, lacks="attention over the keys of an encoder has no mechanism")
    return family._replace(kind=kind, fields=fields, layers={**family.layers, CROSS: cross}, crosses=crosses)
