"""Gemma 3n and 4: layers at the end of the model read the keys and values of earlier ones."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jforge.hf.families.dense import gemma3_rope
from jforge.hf.families.parts import base, bias, projections, window
from jforge.hf.family import FULL, SLIDING, Family, Layer, every, listed
from jforge.hf.keys import integer, is_nested, lack, rope_of, section
from jforge.hf.weights import Weights

_UNREAD = ("k_proj.weight", "v_proj.weight", "k_norm.weight", "v_norm.weight")


def _first_shared(config: dict) -> int:
    """Layers from this one on have no keys of their own."""
    shared = config.get("num_kv_shared_layers") or 0
    return config["num_hidden_layers"] - (integer(config, "num_kv_shared_layers") if shared else 0)


def _source(config: dict, index: int) -> int | None:
    """The last layer of the same kind that has keys."""
    first = _first_shared(config)
    if index < first:
        return None
    kind = KINDS[config["model_type"]]
    return max((i for i in range(first) if kind(config, i) == kind(config, index)), default=None)


def _common(config: dict, kind: str, rope: dict | None, head_dim: int) -> dict:
    own = base(config, rope, head_dim=head_dim) | bias(config, kind) | window(config, kind)
    shared = config["layer_index"] >= _first_shared(config)
    return own | {"qk_norm": "head", "v_norm": True, "scaling": 1.0, "kv_shared": shared}


def _gemma3n(config: dict, kind: str) -> dict:
    return _common(config, kind, gemma3_rope(config, kind), 256)


def _gemma4(config: dict, kind: str) -> dict:
    """Full layers have wider heads, and with attention_k_eq_v fewer of them, whose values are their keys."""
    if config.get("use_bidirectional_attention") == "all":
        lack(config, "use_bidirectional_attention is 'all': attention that is not causal has no mechanism")
    rope = section(config, "rope_parameters")
    if not is_nested(rope):
        config = config | {"rope_parameters": _GEMMA4_ROPE}
    own = _common(config, kind, rope_of(config, kind, partial=1.0), 256)
    if kind == SLIDING:
        return own
    same = bool(config.get("attention_k_eq_v"))
    own |= {"attention_k_eq_v": same}
    if config.get("per_layer_config") is not None:  # it has the sizes of full layers
        return own
    heads = same and config.get("num_global_key_value_heads")
    return (
        own | {"head_dim": integer(config, "global_head_dim", 512)} | ({"num_key_value_heads": heads} if heads else {})
    )


def _gemma4_kind(config: dict, index: int) -> str:
    """The last layer is full whatever the list says."""
    last = index == config["num_hidden_layers"] - 1
    return FULL if last else listed(config, index) or (SLIDING if (index + 1) % 6 else FULL)


def _weights(w: Weights, cfg: Any) -> dict[str, np.ndarray]:
    """Checkpoints may have keys and values of layers that do not read them."""
    if cfg.kv_shared:
        w.pass_over(*_UNREAD)
    return projections(w, cfg)


_GEMMA4_ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
}
_LAYERS: Mapping[str, Layer] = {FULL: Layer(None, _weights), SLIDING: Layer("sliding_window", _weights)}
_3N = {"num_attention_heads": 8, "num_key_value_heads": 2, "sliding_window": 512, "num_kv_shared_layers": 15}
_4 = {"num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": 512, "num_kv_shared_layers": 0}
_GEMMA3N = Family(_gemma3n, every(5, SLIDING), _LAYERS, _3N, source=_source)
_GEMMA4 = Family(_gemma4, _gemma4_kind, _LAYERS, _4, source=_source)

FAMILIES: dict[str, Family] = {
    "gemma3n_text": _GEMMA3N,
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4._replace(defaults=_4 | {"sliding_window": 1024}),
}
KINDS = {name: family.kind for name, family in FAMILIES.items()}
