"""How single keys of a config.json are read: required or with a default, and RoPE in any of its spellings.

Every function raises ValueError naming the key and its value. Source: modeling_rope_utils.py of transformers 5.23.0.
"""

from collections.abc import Mapping
from typing import Any

from jforge.core.config import positive, positive_int, reject

_YARN_NUMBERS = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def need(config: Mapping, key: str) -> Any:
    """config[key], which a null does not satisfy."""
    if config.get(key) is None:
        raise ValueError(f"config has no {key}")
    return config[key]


def integer(config: Mapping, key: str, *default: int | None) -> int | None:
    """config[key], positive; `default` where it is missing or null. Without one it is required."""
    value = config.get(key) if default else need(config, key)
    if value is None:
        return default[0]
    positive_int(key, value)
    return value


def section(config: Mapping, key: str) -> Mapping:
    """The object at config[key]; empty where it is missing or null."""
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        reject(key, value, "an object or null")
    return value or {}


def only(config: Mapping, **values: Any) -> None:
    """Refuse a file that gives a key another value than the one the mechanism has; a missing key or null is fine."""
    for key, value in values.items():
        if config.get(key) not in (None, value):
            raise NotImplementedError(f"{key} is {config[key]!r}: only {value!r} has a mechanism in this model family")


def rope_of(config: dict, kind: str, *, theta: float = 1e4, partial: float | None = None) -> dict | None:
    """`rope_parameters` of a layer of this kind, out of any spelling; None where the file says NoPE for the kind.

    The old spelling wins over the new one where both are given, and what stands inside the dict over what stands
    beside it. `partial` is the family's default share of rotated channels; None: the family always turns all.
    """
    given = section(config, "rope_scaling") or section(config, "rope_parameters")
    nested = is_nested(given)
    if nested:
        if kind not in given:
            raise ValueError(f"rope_parameters has no entry for {kind}")
        if given[kind] is None:
            return None
        given = section(given, kind)
    out = {key: value for key, value in given.items() if value is not None and key != "type"}
    out.setdefault("rope_type", given.get("type") or "default")
    for key, default in (("rope_theta", theta), ("partial_rotary_factor", partial)):
        out.setdefault(key, default if config.get(key) is None else config[key])
    if partial is None and out.pop("partial_rotary_factor") not in (None, 1):
        # transformers turns all channels here, vLLM honours the key: no reading is safe
        model = config["model_type"]
        raise NotImplementedError(f"partial_rotary_factor is given, but {model} turns every channel in transformers")
    for key in _YARN_NUMBERS:
        if out.get(key) == 0:  # "not given", as it is in transformers
            del out[key]
    for key in ("attention_factor", *_YARN_NUMBERS):
        if key in out:
            positive(key, out[key])
    if out["rope_type"] in ("llama3", "yarn"):
        _complete_scaled(out, given, config, nested)
    return out


def is_nested(given: Mapping) -> bool:
    """Whether the keys are layer types."""
    return any(key.endswith("_attention") for key in given)


def _complete_scaled(out: dict, given: Mapping, config: dict, nested: bool) -> None:
    """The keys that transformers fills in for llama3 and yarn."""
    trained = "original_max_position_embeddings"
    if config.get(trained) is not None and not nested:
        out[trained] = config[trained]  # beside the dict it has priority (Phi-3's spelling)
    if trained not in out:
        out[trained] = need(config, "max_position_embeddings")
    if "factor" in given and given["factor"] is None:  # a null asks for the ratio; a missing key is an error
        positive(trained, out[trained])
        out["factor"] = need(config, "max_position_embeddings") / out[trained]
    if nested:
        out.pop("truncate", None)  # transformers looks for it outside the nested dicts only
