"""How single keys of a config.json are read: required or with a default, and RoPE in any of its spellings.

Every function raises ValueError naming the key and its value. Source: modeling_rope_utils.py of transformers 5.23.0.
"""

import math
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


def number(config: Mapping, key: str) -> float:
    """config[key], a positive number; it is required."""
    positive(key, value := need(config, key))
    return value


def indices(config: Mapping, key: str) -> list[int] | None:
    """config[key], a list of layers; None where it is missing or null."""
    value = config.get(key)
    if value is not None and not isinstance(value, (list, tuple)):
        reject(key, value, "a list of layers or null")
    return value


def section(config: Mapping, key: str) -> Mapping:
    """The object at config[key]; empty where it is missing or null."""
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        reject(key, value, "an object or null")
    return value or {}


BYTES_ALONE = "_bytes_alone"
"""Set in a config of which nothing but the cache is asked: what would be computed from it does not matter."""

OWN_ENTRY = "_own_entry"
"""What per_layer_config says of the layer that a config was made for."""

ENCODER = "_encoder_tokens"
"""Set where the caches of an encoder's keys are asked for: how many tokens the encoder has."""


def lack(config: Mapping, reason: str) -> None:
    """Refuse what has no mechanism. Its cache is known all the same, so where bytes alone are asked it passes."""
    if not config.get(BYTES_ALONE):
        raise NotImplementedError(reason)


def only(config: Mapping, part: Mapping | None = None, /, **values: Any) -> None:
    """`lack` for a config, or a part of it, with another value than the mechanism has; no key or null is fine."""
    given = config if part is None else part
    for key, value in values.items():
        if given.get(key) not in (None, value):
            lack(config, f"{key} is {given[key]!r}: only {value!r} has a mechanism in this model family")


def known(config: Mapping, **values: Any) -> None:
    """Refuse another value of a key that the cache depends on; no key or null is fine."""
    for key, value in values.items():
        if config.get(key) not in (None, value):
            raise NotImplementedError(f"{key} is {config[key]!r}: only {value!r} is known in this model family")


def rope_of(config: dict, kind: str, *, theta: float = 1e4, partial: float | None = None) -> dict | None:
    """`rope_parameters` of a layer of this kind, out of any spelling; None where the file says NoPE for the kind.

    The old spelling wins over the new one where both are given, and what stands inside the dict over what stands
    beside it. `partial` is the family's default share of rotated channels; None: the family always turns all.
    """
    given = section(config, "rope_scaling") or section(config, "rope_parameters")
    if config.get(BYTES_ALONE):
        return {"rope_type": "default", "rope_theta": theta}
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
    if out["rope_type"] in ("llama3", "yarn", "longrope"):
        _complete_scaled(out, given, config, nested)
    if out["rope_type"] == "longrope":
        return _longrope(out, config)
    if out["rope_type"] == "proportional":
        only(config, out, factor=1)
    return out


def _longrope(given: dict, config: dict) -> dict:
    """One of the two lists of factors, since a key that was stored does not turn again: the long one where the model is
    said to take longer rows than it was first trained on. For the other one replace `factors` of the Config.
    """
    trained, longest = given["original_max_position_embeddings"], need(config, "max_position_embeddings")
    name = "long_factor" if longest > trained else "short_factor"
    if name not in given:
        raise ValueError(f"rope_parameters has no {name}; rope_type 'longrope' needs it")
    stretch = given.get("factor", longest / trained)
    factor = given.get("attention_factor")
    if factor is None:
        factor = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(trained))
    kept = {key: given[key] for key in ("rope_type", "rope_theta", "partial_rotary_factor") if key in given}
    return kept | {"factors": given[name], "attention_factor": factor}


def is_nested(given: Mapping) -> bool:
    """Whether the keys are layer types."""
    return any(key.endswith("_attention") for key in given)


def _complete_scaled(out: dict, given: Mapping, config: dict, nested: bool) -> None:
    """The keys that transformers fills in for llama3, yarn and longrope."""
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
