"""Families with gated short convolutions: LFM2 and LFM3."""

from typing import Any

import numpy as np

from jforge.hf.families.parts import base, bias, split, window
from jforge.hf.family import CONV, FULL, SLIDING, Family, Layer, listed
from jforge.hf.keys import indices, integer, rope_of
from jforge.hf.weights import Weights


def _lfm2(config: dict, kind: str) -> dict:
    """Checkpoints list the layers with attention."""
    if kind == CONV:
        return {"hidden_size": integer(config, "hidden_size"), "conv_L_cache": integer(config, "conv_L_cache"),
                "conv_bias": bool(config["conv_bias"])}  # fmt: skip
    eps = {"rms_norm_eps": config["norm_eps"]}
    return base(config | eps, rope_of(config, kind, theta=1e6)) | {"qk_norm": "head"}


def _lfm2_kind(config: dict, index: int) -> str:
    if (kind := listed(config, index)) is not None:
        return kind
    full = indices(config, "full_attn_idxs")
    if full is None and config["model_type"] == "lfm2_moe":
        raise ValueError("config has neither layer_types nor full_attn_idxs; one must list the kinds of layers")
    return FULL if full is None or index in full else CONV


def _conv_weights(w: Weights, cfg: Any) -> dict[str, np.ndarray]:
    """in_proj has [B | C | x]."""
    D = cfg.hidden_size
    params = dict(zip(("wb", "wc", "wx"), np.split(w.linear("in_proj", D, 3 * D), 3, axis=1), strict=True))
    params |= w.conv("conv", cfg.conv_L_cache, D, cfg.conv_bias) | {"wo": w.linear("out_proj", D, D)}
    if cfg.conv_bias:
        params |= dict(zip(("bb", "bc", "bx"), np.split(w.take("in_proj.bias", 3 * D), 3), strict=True))
        params |= {"bo": w.take("out_proj.bias", D)}
    return params


def _lfm3(config: dict, kind: str) -> dict:
    """Without rope_parameters those of the released models: half of the channels turn in full layers, as if all did."""
    if kind == CONV:
        return _lfm2(config, kind)
    if config.get("rope_parameters") is None:
        config = config | {"rope_parameters": _LFM3_ROPE}
    own = base(
        config | {"rms_norm_eps": config["norm_eps"]}, rope_of(config, kind, theta=1e6, partial=1.0), head_dim=128
    )
    gate = {"attn_output_gate": bool(config["use_attention_gate"]), "output_gate_per_head": True}
    return own | bias(config, kind) | window(config, kind) | {"qk_norm": "head"} | gate


def _lfm3_kind(config: dict, index: int) -> str:
    if (kind := listed(config, index)) is not None:
        return kind
    return FULL if index % 4 == 2 else SLIDING if index % 4 == 0 and index > 0 else CONV


_LFM3_ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
}
_GATED = split(gate="g_proj")
_CONV = {CONV: Layer("short_conv", _conv_weights, "conv")}
_LFM2 = Family(
    _lfm2, _lfm2_kind, _CONV | {FULL: Layer(None, split("out_proj", "{}_layernorm"))},
    {"num_key_value_heads": 8, "conv_L_cache": 3, "conv_bias": False, "norm_eps": 1e-5},
)  # fmt: skip

_LFM3 = Family(
    _lfm3, _lfm3_kind, _CONV | {FULL: Layer(None, _GATED), SLIDING: Layer("sliding_window", _GATED)},
    {"num_key_value_heads": 4, "conv_L_cache": 7, "conv_bias": False, "norm_eps": 1e-5, "use_attention_gate": True,
     "sliding_window": 256},
)  # fmt: skip

FAMILIES: dict[str, Family] = {"lfm2": _LFM2, "lfm2_moe": _LFM2, "lfm3": _LFM3}
