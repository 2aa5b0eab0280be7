"""config.json -> (mechanism name, Config) per layer: the one parser of Hugging Face model configs.

    layers(load("config.json"))[0]  ->  ("gqa", Config(hidden_size=4096, ...))

One small function per model family says what its attention has; FAMILIES is the table. Keys that a file may omit take
the default of the transformers 5.23 config class, since that is what such a file means. Neither transformers nor
torch is imported. Source: configuration_*.py, modeling_*.py and modeling_rope_utils.py of transformers 5.23.0.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jforge.attention import REGISTRY
from jforge.core.config import positive, positive_int, reject

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
_LEGACY_KINDS = {"attention": FULL, "mamba": LINEAR}  # as transformers renames them


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


def text_config(config: Any) -> dict:
    """The language model's part of `config`, a dict or an object with to_dict(); it always has a model_type.

    Raises TypeError for anything else, ValueError where the model_type is missing.
    """
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise TypeError(f"config is a {type(config).__name__}; it must be a dict or a transformers config")
    inner = _object(config, "text_config")
    if inner and config.get("hidden_size") is None:
        config = {**inner, "model_type": inner.get("model_type") or config.get("model_type")}
    _need(config, "model_type")
    return dict(config)


def layers(config: Any) -> list[tuple[str, Any]]:
    """(mechanism name, Config) of every layer, in order.

    config: a parsed config.json or a transformers config. Raises NotImplementedError at the first layer whose kind
    has no mechanism (`layer` raises for that layer alone), and for an unknown model_type; ValueError for a required
    key that is missing and for values that no Config accepts.
    """
    config = text_config(config)
    return [layer(config, index) for index in range(num_layers(config))]


def layer(config: Any, index: int) -> tuple[str, Any]:
    """(mechanism name, Config) of layer `index`; errors as `layers`, and ValueError for an index outside the model."""
    config = text_config(config)
    family = _family(config)
    count = num_layers(config)
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
        reject("layer", index, f"in 0..{count - 1}, the layers of this model")
    kind = family.kind(config, index)
    if kind != FULL:
        raise NotImplementedError(f"layer {index} of {config['model_type']} is {kind}, which has no mechanism yet")
    fields = {name: value for name, value in family.fields(config, kind).items() if value is not None}
    name = _dense_name(fields["num_attention_heads"], fields["num_key_value_heads"])
    return name, REGISTRY[name].Config(**fields)


def num_layers(config: Any) -> int:
    """How many layers the language model has."""
    return _integer(text_config(config), "num_hidden_layers")


class Family(NamedTuple):
    """What differs from model to model: the fields of a layer's Config, and which kind of layer sits where."""

    fields: Callable[[dict, str], dict]  # (config, kind) -> keyword arguments of Config
    kind: Callable[[dict, int], str]  # (config, layer) -> one of transformers' layer types


def _family(config: dict) -> Family:
    kind = config["model_type"]
    if kind not in FAMILIES:
        raise NotImplementedError(f"model_type {kind!r} is not known; known are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind]


def _dense_name(heads: int, kv_heads: int) -> str:
    if heads == kv_heads:
        return "single_head" if heads == 1 else "mha"
    return "mqa" if kv_heads == 1 else "gqa"


def _need(config: Mapping, key: str) -> Any:
    if config.get(key) is None:
        raise ValueError(f"config has no {key}")
    return config[key]


def _integer(config: Mapping, key: str, *default: int | None) -> int | None:
    """config[key], positive; `default` where it is missing or null. Without one it is required."""
    value = config.get(key) if default else _need(config, key)
    if value is None:
        return default[0]
    positive_int(key, value)
    return value


def _object(config: Mapping, key: str) -> Mapping:
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        reject(key, value, "an object or null")
    return value or {}


# Rotary embedding


def _rope(config: dict, kind: str, *, theta: float = 1e4, partial: float | None = None) -> dict | None:
    """`rope_parameters` of a layer of this kind, out of any spelling; None where the file says NoPE for the kind.

    The old spelling wins over the new one where both are given, and what stands inside the dict over what stands
    beside it. `partial` is the family's default share of rotated channels; None: the family always turns all.
    """
    given = _object(config, "rope_scaling") or _object(config, "rope_parameters")
    nested = _is_nested(given)
    if nested:
        if kind not in given:
            raise ValueError(f"rope_parameters has no entry for {kind}")
        if given[kind] is None:
            return None
        given = _object(given, kind)
    out = {key: value for key, value in given.items() if value is not None and key != "type"}
    out.setdefault("rope_type", given.get("type") or "default")
    for key, default in (("rope_theta", theta), ("partial_rotary_factor", partial)):
        out.setdefault(key, default if config.get(key) is None else config[key])
    if partial is None and out.pop("partial_rotary_factor") not in (None, 1):
        # transformers turns all channels here, vLLM honours the key: no reading is safe
        model = config["model_type"]
        raise NotImplementedError(f"partial_rotary_factor is given, but {model} turns every channel in transformers")
    if out["rope_type"] in ("llama3", "yarn"):
        _complete_scaled(out, given, config, nested)
    return out


def _is_nested(given: Mapping) -> bool:
    """Whether the keys are layer types."""
    return any(key.endswith("_attention") for key in given)


def _complete_scaled(out: dict, given: Mapping, config: dict, nested: bool) -> None:
    """The keys that transformers fills in for llama3 and yarn."""
    trained = "original_max_position_embeddings"
    if config.get(trained) is not None and not nested:
        out[trained] = config[trained]  # beside the dict it has priority (Phi-3's spelling)
    if trained not in out:
        out[trained] = _need(config, "max_position_embeddings")
    if "factor" in given and given["factor"] is None:  # a null asks for the ratio; a missing key is an error
        positive(trained, out[trained])
        out["factor"] = _need(config, "max_position_embeddings") / out[trained]
    if nested:
        out.pop("truncate", None)  # transformers looks for it outside the nested dicts only


# Families: the fields of a layer's Config


def _base(
    config: dict, rope: dict | None, *, kv_heads: int | None = None, head_dim: int | None = None, eps: float = 1e-6
) -> dict:
    """What all families spell alike. `kv_heads` and `head_dim` are class defaults, None meaning heads, hidden / heads.

    An explicit null num_key_value_heads means "as many as heads" whatever the class default is.
    """
    heads = _integer(config, "num_attention_heads")
    eps = config.get("rms_norm_eps", eps)
    positive("rms_norm_eps", eps)
    return {
        "hidden_size": _integer(config, "hidden_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": _integer({"num_key_value_heads": kv_heads} | config, "num_key_value_heads", heads),
        "head_dim": _integer(config, "head_dim", head_dim),
        "rms_norm_eps": eps,
        "rope_parameters": rope,
    }


def _bias(config: dict) -> dict:
    """`attention_bias` puts a bias on q, k, v and on o alike."""
    bias = bool(config.get("attention_bias"))
    return {"attention_bias": bias, "attention_output_bias": bias}


def _llama(config: dict, kind: str) -> dict:
    return _base(config, _rope(config, kind)) | _bias(config)


def _mistral(config: dict, kind: str) -> dict:
    return _base(config, _rope(config, kind), kv_heads=8)


def _qwen2(config: dict, kind: str) -> dict:
    """Always biases on q, k, v and never on o; no key says so."""
    return _base(config, _rope(config, kind), kv_heads=32) | {"attention_bias": True}


def _qwen3(config: dict, kind: str) -> dict:
    return _base(config, _rope(config, kind), kv_heads=32, head_dim=128) | _bias(config) | {"qk_norm": "head"}


def _qwen3_moe(config: dict, kind: str) -> dict:
    return _base(config, _rope(config, kind), kv_heads=4) | _bias(config) | {"qk_norm": "head"}


def _qwen3_next(config: dict, kind: str) -> dict:
    if config.get("attention_bias"):
        raise NotImplementedError("attention_bias in qwen3_next puts a bias on the gate too, which no Config has")
    fields = _base(config, _rope(config, kind, partial=0.25), kv_heads=2, head_dim=256)
    return fields | {"qk_norm": "head", "norm_offset": 1.0, "attn_output_gate": True}


def _gemma(config: dict, rope: dict | None) -> dict:
    if config.get("use_bidirectional_attention"):
        raise NotImplementedError("use_bidirectional_attention is set: attention that is not causal has no mechanism")
    scalar = config.get("query_pre_attn_scalar", 256)
    positive("query_pre_attn_scalar", scalar)
    return _base(config, rope, kv_heads=4, head_dim=256) | _bias(config) | {"scaling": scalar**-0.5}


def _gemma2(config: dict, kind: str) -> dict:
    cap = config.get("attn_logit_softcapping", 50.0)
    return _gemma(config, _rope(config, kind)) | {"attn_logit_softcapping": cap}


def _gemma3(config: dict, kind: str) -> dict:
    if config.get("attn_logit_softcapping") is not None:
        raise NotImplementedError("attn_logit_softcapping is given, but transformers' gemma3 layers ignore it")
    config = {"num_attention_heads": 8, **config}  # published text_configs omit it
    fields = _gemma(config, _gemma3_rope(config, kind))
    return fields | {"qk_norm": "head", "norm_offset": 1.0}


def _gemma3_rope(config: dict, kind: str) -> dict | None:
    """Old spelling: rope_theta and rope_scaling are the global layers', rope_local_base_freq the local ones'."""
    given = _object(config, "rope_parameters")
    own = _object(given, kind) if _is_nested(given) else given if kind == FULL else {}
    if kind == FULL:
        own, old_theta, theta = {**own, **_object(config, "rope_scaling")}, config.get("rope_theta"), 1e6
    else:
        old_theta, theta = config.get("rope_local_base_freq"), 1e4
    config = config | {"rope_theta": old_theta, "rope_scaling": None, "rope_parameters": {kind: own}}
    return _rope(config, kind, theta=theta)


def _olmo2(config: dict, kind: str) -> dict:
    return _base(config, _rope(config, kind), eps=1e-5) | _bias(config) | {"qk_norm": "flat"}


def _minimax_m2(config: dict, kind: str) -> dict:
    """Checkpoints spell partial rotation as rotary_dim."""
    fields = _base(config, None, kv_heads=8, head_dim=128)
    partial = _integer(config, "rotary_dim", fields["head_dim"]) / fields["head_dim"]
    return fields | {"rope_parameters": _rope(config, kind, theta=5e6, partial=partial), "qk_norm": "flat"}


def _falcon(config: dict, kind: str) -> dict:
    """num_kv_heads counts only in the new architecture; without it multi_query (the default) means one head."""
    if config.get("alibi"):
        raise NotImplementedError("alibi is true: falcon with ALiBi biases has no mechanism")
    kv_heads = 1 if config.get("multi_query", True) else None
    if config.get("new_decoder_architecture"):
        kv_heads = config.get("num_kv_heads")
    own = config | {"num_key_value_heads": kv_heads, "head_dim": None, "attention_bias": config.get("bias")}
    return _base(own, _rope(config, kind)) | _bias(own)


# Families: which kind of layer sits where


def _listed(config: dict, index: int, key: str = "layer_types") -> Any:
    """The layer's entry in config[key], a list over all layers; None if the file has no such list."""
    entries = config.get(key)
    if entries is None:
        return None
    if not isinstance(entries, (list, tuple)) or len(entries) != config["num_hidden_layers"]:
        reject(key, entries, f"a list of num_hidden_layers={config['num_hidden_layers']} entries")
    return _LEGACY_KINDS.get(entries[index], entries[index])


def _all_full(config: dict, index: int) -> str:
    return _listed(config, index) or FULL


def _every(period: int, between: str, key: str | None = None) -> Callable[[dict, int], str]:
    """The last of every `period` layers is full, the others are of the kind `between`; config[key] sets the period."""

    def kind(config: dict, index: int) -> str:
        n = _integer(config, key, period) if key else period
        return _listed(config, index) or (between if (index + 1) % n else FULL)

    return kind


def _has_window(config: dict) -> bool:
    return bool(config.get("use_sliding_window")) and config.get("sliding_window", 4096) is not None


def _qwen_kind(config: dict, index: int) -> str:
    in_window = _has_window(config) and index >= config.get("max_window_layers", 28)
    return _listed(config, index) or (SLIDING if in_window else FULL)


def _qwen3_moe_kind(config: dict, index: int) -> str:
    return SLIDING if _has_window(config) else _all_full(config, index)


def _mistral_kind(config: dict, index: int) -> str:
    """One window for all layers unless sliding_window is an explicit null: the class default is 4096."""
    return SLIDING if config.get("sliding_window", 4096) is not None else _all_full(config, index)


def _minimax_m2_kind(config: dict, index: int) -> str:
    """Checkpoints list 1 for softmax attention; a 0 would be a lightning layer, as in MiniMax-Text-01."""
    return LINEAR if _listed(config, index, "attn_type_list") == 0 else _all_full(config, index)


FAMILIES: dict[str, Family] = {
    "falcon": Family(_falcon, _all_full),
    "gemma2": Family(_gemma2, _every(2, SLIDING)),
    "gemma3": Family(_gemma3, _every(6, SLIDING, "sliding_window_pattern")),
    "gemma3_text": Family(_gemma3, _every(6, SLIDING, "sliding_window_pattern")),
    "llama": Family(_llama, _all_full),
    "minimax_m2": Family(_minimax_m2, _minimax_m2_kind),
    "mistral": Family(_mistral, _mistral_kind),
    "olmo2": Family(_olmo2, _all_full),
    "qwen2": Family(_qwen2, _qwen_kind),
    "qwen3": Family(_qwen3, _qwen_kind),
    "qwen3_moe": Family(_qwen3_moe, _qwen3_moe_kind),
    "qwen3_next": Family(_qwen3_next, _every(4, LINEAR, "full_attention_interval")),
}
