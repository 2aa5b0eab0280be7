"""What a model's cache costs, from its config.json alone: exact bytes a layer, or a refusal, never a guess.

    lens = from_config("config.json")            # a path, a parsed dict or a transformers config
    lens.stored(context=131_072, batch=1)        # {buffer: bytes} of the model
    lens.layers[0].read(context=131_072)         # what one decode step reads in the first layer
    lens.floor("h100", context=131_072, batch=8) # seconds

Bytes need no weights: a layer is answered where its cache is known, also if nothing in jforge computes it
(`convertible` is False then, and `lacks` says what is missing). What is not known of a cache is refused by name.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jforge.attention import REGISTRY
from jforge.core.config import positive_int, reject
from jforge.core.spec import CacheSpec
from jforge.cost import Cost
from jforge.hf import config as hf_config
from jforge.hf.family import CROSS
from jforge.hf.kept import KEPT
from jforge.hf.keys import section
from jforge.roofline import Device, device, padded, step_floor

DTYPES = {
    "bfloat16": "bfloat16", "float16": "float16", "float32": "float32", "int8": "int8", "fp8": "float8_e4m3fn",
    "bf16": "bfloat16", "fp16": "float16", "f16": "float16", "f32": "float32", "fp32": "float32",
    "float8_e4m3fn": "float8_e4m3fn", "float8_e5m2": "float8_e5m2", "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}  # fmt: skip
"""Names of cache dtypes, and what numpy calls them."""

AXES = ("data", "heads", "slots")
"""Of a mesh of devices."""

Bytes = Mapping[str, int]
_LONGEST = 2**50  # tokens: no memory holds more


class _Counted:
    """The bytes, by buffer, of whatever has a `cost`."""

    def stored(self, *, context: int, batch: int = 1, dtype=None, page: int | None = None) -> Bytes:
        """What holds `context` tokens in `batch` rows.

        page: tokens that an engine hands out memory for at once; None for none.
        """
        return self.cost(context=context, batch=batch, dtype=dtype, page=page).stored

    def written(self, *, context: int, batch: int = 1, dtype=None) -> Bytes:
        """What the step that brings every row to `context` tokens writes."""
        return self.cost(context=context, batch=batch, dtype=dtype).written

    def read(self, *, context: int, batch: int = 1, dtype=None) -> Bytes:
        """What this step reads; of a layer that shares a cache the source's."""
        return self.cost(context=context, batch=batch, dtype=dtype).read


@dataclass(frozen=True)
class LensLayer(_Counted):
    """One cache of the model.

    index, kind: the model's layer and what its family calls it (two caches of one layer have one index).
    mechanism, config: as jforge.hf.layers gives them; "kept" and its buffers where no mechanism is known.
    shares: the place in `ModelLens.layers` of the cache that it reads instead of one of its own, or None.
    convertible: whether jforge.hf.convert takes its weights; `lacks` says why not.
    dtype: of the cache, where a call names none.
    """

    index: int
    kind: str
    mechanism: str
    config: Any
    shares: int | None
    lacks: str | None
    dtype: str

    @property
    def convertible(self) -> bool:
        return self.lacks is None

    @property
    def spec(self) -> CacheSpec:
        return self.config.spec if self.mechanism == KEPT else REGISTRY[self.mechanism].cache_spec(self.config)

    def cost(self, *, context: int, batch: int = 1, dtype=None, page: int | None = None) -> Cost:
        """Of one decode step over rows of `context` tokens, the new one included; as `Attention.cost`."""
        positive_int("context", context)
        sizes = {"context": context, "batch": batch, "capacity": padded(context, page)}
        sizes["dtype"] = dtype_of(dtype or self.dtype)
        if self.mechanism == KEPT:
            return self.config.cost(**sizes)
        return REGISTRY[self.mechanism].cost(self.config, **sizes)


@dataclass(frozen=True)
class ModelLens(_Counted):
    """The caches of a model: `layers` in order, `notes` on what was taken or left out, the model's own type."""

    layers: tuple[LensLayer, ...]
    notes: tuple[str, ...]
    model_type: str
    dtype: str

    @cached_property
    def kinds(self) -> dict[LensLayer, int]:
        """One layer of each kind, {layer: how many are like it}, in the order in which they come."""
        first: dict[Any, LensLayer] = {}
        alike = Counter()
        for layer in self.layers:
            cfg = layer.config
            if hasattr(cfg, "layer_index"):  # which heads of lightning forget how soon: of no weight here
                cfg = replace(cfg, layer_index=0)
            key = (layer.kind, layer.mechanism, cfg, layer.shares is None, layer.convertible)
            alike[key] += 1
            first.setdefault(key, layer)
        return {first[key]: count for key, count in alike.items()}

    def cost(self, *, context: int, batch: int = 1, dtype=None, page: int | None = None) -> Cost:
        """Of one decode step through all layers; buffers of the same name add up."""
        costs = [
            layer.cost(context=context, batch=batch, dtype=dtype, page=page) * count
            for layer, count in self.kinds.items()
        ]
        return sum(costs[1:], costs[0]) if costs else Cost({}, {}, {}, 0, 0, 0, 0)

    def stored_per_device(
        self, mesh: Mapping[str, int], *, context: int, batch: int = 1, dtype=None, page: int | None = None
    ) -> int:
        """Bytes that each device of a mesh keeps, the fullest where they differ.

        mesh: {"data": rows, "heads": key and value heads (replicated where the axis does not divide them, as latents
        always are), "slots": the slots of buffers that grow, padded to the axis}. Raises ValueError for other axes, and
        where `data` does not divide the batch.
        """
        for axis, n in mesh.items():
            if axis not in AXES:
                reject("mesh", axis, f"axes of {', '.join(AXES)}")
            positive_int(f"mesh {axis}", n)
        if batch % mesh.get("data", 1):
            reject("mesh data", mesh["data"], f"a divisor of batch={batch}")
        return sum(count * _on_device(layer, mesh, context, batch, dtype, page) for layer, count in self.kinds.items())

    def floor(self, card: str | Device, *, context: int, batch: int = 1, dtype=None) -> float:
        """Seconds that the attention of one decode step takes at least on a card: its cache read and written once, or
        its flops. Weights, and what else the model computes, come on top.
        """
        cost = self.cost(context=context, batch=batch, dtype=dtype)
        card = device(card) if isinstance(card, str) else card
        return step_floor(card, sum(cost.read.values()) + sum(cost.written.values()), cost.flops)

    def max_context(self, *, memory: int, batch: int = 1, dtype=None, page: int | None = None) -> int | None:
        """The longest rows whose caches fit `memory` bytes, 0 if none do; None where length costs nothing."""
        positive_int("memory", memory)
        return _largest(lambda n: sum(self.stored(context=n, batch=batch, dtype=dtype, page=page).values()) <= memory)

    def max_batch(self, *, memory: int, context: int, dtype=None, page: int | None = None) -> int:
        """The most rows of `context` tokens whose caches fit `memory` bytes."""
        positive_int("memory", memory)
        each = sum(self.stored(context=context, dtype=dtype, page=page).values())
        return memory // each if each else 0

    def compute_bound_from(self, card: str | Device, *, context: int, dtype=None) -> int | None:
        """The batch from which on the attention layers of a step are bound by arithmetic, None if none is.

        Their weights are read once a step, in bfloat16, and multiplied by every row; every row reads its own cache.
        None too where a layer has no mechanism, so that its weights are not known.
        """
        if any(layer.mechanism == KEPT for layer in self.layers):
            return None
        card = device(card) if isinstance(card, str) else card
        cost = self.cost(context=context, dtype=dtype)
        weights = sum(count * _weights(layer.mechanism, layer.config) for layer, count in self.kinds.items())
        moved = sum(cost.read.values()) + sum(cost.written.values())
        gained = (2 * weights + cost.flops) / card.flops - moved / card.bandwidth  # seconds a row
        return None if gained <= 0 else max(1, -int(-(2 * weights / card.bandwidth) // gained))


def from_config(config: str | Path | Mapping | Any, *, encoder_tokens: int | None = None) -> ModelLens:
    """The caches of the model that `config` describes: a path, a parsed config.json or a transformers config.

    encoder_tokens: of a model whose layers keep keys and values of an encoder too (BART, Whisper, Llama 3.2 Vision),
    with those of so many tokens; None: without them, which a note says.

    Raises ValueError for a file or a key that is wrong, NotImplementedError naming what of the cache is not known,
    TypeError for anything else than the three.
    """
    if isinstance(config, (str, Path)):
        config = hf_config.load(config)
    whole = config.to_dict() if hasattr(config, "to_dict") else config
    found = hf_config.places(whole, caches_alone=True, encoder_tokens=encoder_tokens)
    dtype, notes = _declared_dtype(whole)
    layers = []
    for place in found:
        layer = LensLayer(place.index, place.kind, place.mechanism, place.config, None, place.lacks, dtype)
        layers.append(replace(layer, shares=place.source if layer.spec.borrowed else None))
    text = hf_config.text_config(whole)
    notes += _notes(text, found, hf_config.sizes_of_class(whole), encoder_tokens)
    return ModelLens(tuple(layers), tuple(notes), text["model_type"], dtype)


def dtype_of(name: Any) -> jnp.dtype:
    """A cache dtype by any of its names. Raises ValueError that lists them."""
    key = DTYPES.get(name) if isinstance(name, str) else str(jnp.dtype(name))
    if key not in DTYPES.values():
        reject("dtype", name, f"one of {', '.join(DTYPES)}")
    return jnp.dtype(key)


def _declared_dtype(whole: Mapping) -> tuple[str, list[str]]:
    """What the file says of its cache: quantization_config.kv_cache_scheme; else bfloat16. And a note that says so."""
    scheme = section(section(whole, "quantization_config"), "kv_cache_scheme")
    if scheme:
        kind, bits = scheme.get("type"), scheme.get("num_bits")
        known = {("float", 8): "fp8", ("int", 8): "int8"}
        if (kind, bits) not in known:
            reject("kv_cache_scheme", dict(scheme), "8 bits of float or int")
        name = known[kind, bits]
        return name, [f"cache in {name}, as quantization_config.kv_cache_scheme says; its scales are not counted"]
    weights = whole.get("dtype") or whole.get("torch_dtype") or section(whole, "text_config").get("dtype")
    also = f" (its weights are {weights})" if weights not in (None, "bfloat16", "auto") else ""
    return "bfloat16", [f"cache in bfloat16: the file declares no other{also}"]


_BESIDE = {
    "num_nextn_predict_layers": "layers that predict more tokens (num_nextn_predict_layers) are not counted",
    "quantization_config": "quantization_config is of weights and does not touch the cache",
    "rope_scaling": "positions (rope_scaling) do not touch the cache",
}


def _notes(
    text: Mapping, found: list[hf_config.Place], of_class: Mapping[str, int], encoder_tokens: int | None
) -> list[str]:
    notes = [
        line
        for key, line in _BESIDE.items()
        if text.get(key) and not (key == "quantization_config" and section(text[key], "kv_cache_scheme"))
    ]
    family = hf_config.FAMILIES[text["model_type"]]
    spelled = {ours for theirs, ours in family.names.items() if theirs in text}
    if family.crosses(family.spelled(dict(text))) and not any(place.kind == CROSS for place in found):
        notes.append("cross-attention caches are left out: give encoder_tokens")
    missing = {key: value for key, value in family.defaults.items() if key not in text and key not in spelled}
    missing = of_class | missing
    counted = [name for name, value in missing.items() if _matters(text, found, name, value, encoder_tokens)]
    if counted:
        shown = ", ".join(f"{name}={missing[name]}" for name in counted)
        notes.append(f"not in the file, so as the class has it: {shown}")
    return notes


def _matters(text: Mapping, found: list[hf_config.Place], key: str, value: Any, encoder_tokens: int | None) -> bool:
    """Whether the caches would be others if the file had twice as much for the key."""
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    try:
        other = {**text, key: 2 * value}
        return hf_config.places(other, caches_alone=True, encoder_tokens=encoder_tokens) != found
    except ValueError:
        return True


def _on_device(layer: LensLayer, mesh: Mapping[str, int], context: int, batch: int, dtype, page: int | None) -> int:
    total, dtype = 0, dtype_of(dtype or layer.dtype)
    for buffer in layer.spec.values():
        slots = buffer.slots(padded(context, page))
        if buffer.has_slots and buffer.limit is None:
            slots = -(-slots // mesh.get("slots", 1))
        shared, heads = 1, dict(zip(buffer.dims[-len(buffer.shape) :], buffer.shape, strict=True))
        for letter in ("K", "N"):
            if letter in heads and heads[letter] % mesh.get("heads", 1) == 0:
                shared = mesh.get("heads", 1)
        total += batch // mesh.get("data", 1) * slots * buffer.slot_bytes(dtype) // shared
    return total


@lru_cache(maxsize=256)
def _weights(mechanism: str, cfg: Any) -> int:
    """Parameters of one attention layer."""
    return sum(math.prod(shape) for shape in REGISTRY[mechanism].shapes(cfg).values())


def _largest(fits) -> int | None:
    """The largest n from 1 on that fits, 0 if none does, None if all do."""
    if not fits(1):
        return 0
    if fits(_LONGEST):
        return None
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
