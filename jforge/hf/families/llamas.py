"""Families that are Llama but for a norm, a bias, a clip, a scale or the channels that turn: full attention in every
layer, or one window for all.
"""

from typing import Any

import numpy as np

from jforge.core.config import positive
from jforge.hf.families.dense import DENSE, WINDOWS
from jforge.hf.families.parts import (
    Params,
    Part,
    base,
    bias,
    causal,
    clip,
    fields,
    fused,
    multiplier,
    projections,
    qkv_bias,
    split,
    window,
)
from jforge.hf.family import FULL, SLIDING, Family, Layer, all_full, window_of_all
from jforge.hf.keys import known, lack, rope_of, section
from jforge.hf.weights import Weights

INTERLEAVED = {"rope_layout": "interleaved"}
_EPS5 = {"rms_norm_eps": 1e-5}
_LAYER_EPS = {"layer_norm_eps": "rms_norm_eps"}
_LAYER_NORM = {"qk_norm_type": "layer"}
_BIASES = {"attention_bias": True, "attention_output_bias": True}
_APERTUS_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 12e6,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def _qk_norm(key: str, **kind: Any) -> Part:
    """The norm of q and k, where `key` asks for it."""
    return lambda config, _: {"qk_norm": "head", **kind} if config.get(key) else {}


def _hunyuan(w: Weights, cfg: Any) -> Params:
    """query_layernorm and key_layernorm."""
    w.names = {"q_norm.weight": "query_layernorm.weight", "k_norm.weight": "key_layernorm.weight"}
    return projections(w, cfg)


def _hunyuan_rope(config: dict, kind: str) -> dict:
    """Files say "dynamic" with an alpha, which stretches the base once and for all: base alpha^(H / (H - 2))."""
    known(config, use_cla=False)  # layers that share keys and values, in HunYuan-Large
    given = section(config, "rope_scaling") or section(config, "rope_parameters")
    alpha = given.get("alpha")
    if not alpha or (given.get("rope_type") or given.get("type")) != "dynamic":
        return {}
    positive("alpha", alpha)
    plain = {key: value for key, value in given.items() if key == "rope_theta"}
    rope = rope_of(config | {"rope_scaling": None, "rope_parameters": plain}, kind)
    H = base(config, None)["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    return {"rope_parameters": rope | {"rope_theta": rope["rope_theta"] * alpha ** (H / (H - 2))}}


def _ministral3(config: dict, kind: str) -> dict:
    """Queries grow from position original_max_position_embeddings on, by rope_parameters' llama_4_scaling_beta."""
    given = section(config, "rope_parameters") or section(config, "rope_scaling")
    rest = {k: v for k, v in given.items() if k not in ("llama_4_scaling_beta", "max_position_embeddings", "type")}
    config = config | {"rope_parameters": rest | {"rope_type": given.get("rope_type", given.get("type"))}}
    scale = {"attn_scale": given.get("llama_4_scaling_beta"), "attn_scale_from": 0}
    if scale["attn_scale"] is not None:
        scale["floor_scale"] = given["original_max_position_embeddings"]
    return fields(window, theta=1e6, head_dim=128)(config, kind) | scale


def _apertus(config: dict, kind: str) -> dict:
    """Without any RoPE dict that of the released models."""
    if config.get("rope_parameters") is None and not section(config, "rope_scaling"):
        config = config | {"rope_parameters": _APERTUS_ROPE}
    return fields(bias, theta=12e6, qk_norm="head")(config, kind)


def _cohere(config: dict, kind: str) -> dict:
    norm = _qk_norm("use_qk_norm", **_LAYER_NORM | {"qk_norm": "heads"})
    return fields(bias, norm, theta=5e5, **INTERLEAVED)(config, kind)


def _seed_oss(config: dict, kind: str) -> dict:
    out = fields(qkv_bias, head_dim=128)(config, kind)
    return out | {"attention_output_bias": bool(config.get("attention_out_bias"))}


def _phi3_rope(config: dict) -> dict:
    """longrope has the names su and yarn in the first files."""
    given = dict(section(config, "rope_scaling") or section(config, "rope_parameters"))
    if (given.get("rope_type") or given.get("type")) in ("su", "yarn"):
        given |= {"rope_type": "longrope", "type": "longrope"}
    return config | {"rope_scaling": None, "rope_parameters": given}


def _phi3(config: dict, kind: str) -> dict:
    return fields(window, partial=1.0)(_phi3_rope(config), kind)


def _phimoe(config: dict, kind: str) -> dict:
    out = fields(bias, window, theta=1e6)(config, kind)
    if (out["rope_parameters"] or {}).get("rope_type") == "longrope":
        lack(config, "rope_type is 'longrope': transformers' phimoe never takes its long factors")
    return out


def _nanochat(w: Weights, cfg: Any) -> Params:
    """Its pairs turn the other way, (a, b) -> (a cos + b sin, b cos - a sin): the halves of a head change places."""
    params = projections(w, cfg)
    return params | {x: np.roll(params[x], cfg.head_dim // 2, -1) for x in ("wq", "wk", "bq", "bk") if x in params}


_QUERY_LAYERNORM = {FULL: Layer(None, _hunyuan)}
_LAYERNORMED = "{}_layernorm"
_PHI = {FULL: Layer(None, split("dense", _LAYERNORMED))}
_PHI3 = fused("seq", "qkv_proj", "o_proj")
_GRANITE = Family(fields(bias, multiplier), all_full, DENSE, {"attention_multiplier": 1.0})
_USE_BIAS = {"use_bias": "attention_bias"}
_ERNIE = Family(fields(bias, theta=5e5, **INTERLEAVED), all_full, DENSE, _EPS5 | {"num_key_value_heads": 4}, _USE_BIAS)
_GLM = Family(
    fields(qkv_bias, partial=0.5, head_dim=128, **INTERLEAVED), all_full, DENSE,
    {"num_key_value_heads": 2, "attention_bias": True},
)  # fmt: skip
_HUNYUAN = Family(
    fields(bias, _hunyuan_rope, qk_norm="head", qk_norm_after_rope=True), all_full, _QUERY_LAYERNORM, _EPS5
)
_PHI3_FAMILY = Family(
    _phi3, window_of_all, {FULL: Layer(None, _PHI3), SLIDING: Layer("sliding_window", _PHI3)},
    _EPS5 | {"sliding_window": None},
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "apertus": Family(_apertus, all_full, DENSE, _EPS5),
    "arcee": Family(fields(bias), all_full, DENSE, _EPS5),
    "aria_text": Family(fields(bias), all_full, DENSE),
    "cohere": Family(_cohere, all_full, DENSE, _EPS5, _LAYER_EPS),
    "emu3_text_model": Family(fields(bias, theta=1e6), all_full, DENSE, _EPS5 | {"num_key_value_heads": 8}),
    "ernie4_5": _ERNIE._replace(
        fields=fields(bias, theta=5e5, head_dim=128, **INTERLEAVED), defaults=_EPS5 | {"num_key_value_heads": 2}
    ),
    "ernie4_5_moe": _ERNIE,
    "flex_olmo": Family(fields(bias, theta=5e5, qk_norm="flat"), all_full, DENSE),
    "gemma": Family(fields(causal, bias, head_dim=256), all_full, DENSE, {"num_key_value_heads": 16}),
    "glm": _GLM,
    "glm4": _GLM,
    "glm4_moe": Family(
        fields(qkv_bias, _qk_norm("use_qk_norm"), partial=0.5), all_full, DENSE, _EPS5 | {"num_key_value_heads": 8}
    ),
    "granite": _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "helium": Family(
        fields(qkv_bias, theta=1e5, head_dim=128, **INTERLEAVED), all_full, DENSE, {"num_key_value_heads": 20}
    ),
    "hunyuan_v1_dense": _HUNYUAN,
    "hunyuan_v1_moe": _HUNYUAN,
    "hy_v3": Family(
        fields(bias, theta=11158840.0, head_dim=128, qk_norm="head"), all_full, DENSE,
        _EPS5 | {"num_key_value_heads": 8},
    ),
    "hyperclovax": Family(fields(bias, multiplier), all_full, DENSE),
    "internlm3": Family(
        fields(bias, head_dim=128), all_full, DENSE, _EPS5 | {"num_key_value_heads": 2}, {"qkv_bias": "attention_bias"}
    ),
    "iquestcoder": Family(fields(bias, head_dim=128), all_full, DENSE, _EPS5 | {"num_key_value_heads": 8}),
    "jais2": Family(fields(bias), all_full, DENSE, {"attention_bias": True}),
    "ministral3": Family(
        _ministral3, window_of_all, WINDOWS, {"num_key_value_heads": 8, "sliding_window": None}
    ),
    "mixtral": Family(
        fields(window, theta=1e6), window_of_all, WINDOWS, _EPS5 | {"num_key_value_heads": 8, "sliding_window": None}
    ),
    "nanochat": Family(
        fields(bias, qk_norm="head", qk_norm_weight=False, qk_norm_after_rope=True), all_full,
        {FULL: Layer(None, _nanochat)},
    ),
    "nemotron": Family(fields(bias, partial=0.5), all_full, DENSE),
    "olmo": Family(fields(bias, clip), all_full, DENSE),
    "olmoe": Family(fields(bias, clip, qk_norm="flat"), all_full, DENSE, _EPS5),
    "persimmon": Family(
        fields(_qk_norm("qk_layernorm", qk_norm_bias=True, **_LAYER_NORM), partial=0.5, **_BIASES), all_full,
        {FULL: Layer(None, fused("head", "query_key_value", "dense", _LAYERNORMED))},
        _EPS5 | {"qk_layernorm": True}, _LAYER_EPS,
    ),
    "phi": Family(
        fields(_qk_norm("qk_layernorm", qk_norm_bias=True, **_LAYER_NORM), partial=0.5, **_BIASES), all_full, _PHI,
        _EPS5, _LAYER_EPS,
    ),
    "phi3": _PHI3_FAMILY,
    "phi4_multimodal": _PHI3_FAMILY._replace(defaults=_PHI3_FAMILY.defaults | {"num_key_value_heads": 8}),
    "phimoe": Family(_phimoe, window_of_all, WINDOWS, _EPS5 | {"num_key_value_heads": 8, "sliding_window": None}),
    "seed_oss": Family(_seed_oss, all_full, DENSE, {"num_key_value_heads": 8, "attention_bias": True}),
    "solar_open": Family(
        fields(qkv_bias, theta=1e6, head_dim=128), all_full, DENSE, _EPS5 | {"num_key_value_heads": 8}
    ),
    "stablelm": Family(
        fields(qkv_bias, _qk_norm("qk_layernorm", **_LAYER_NORM | {"qk_norm": "heads"}), partial=0.25), all_full,
        {FULL: Layer(None, split(names=_LAYERNORMED))}, _EPS5 | {"num_key_value_heads": 32},
        _LAYER_EPS | {"use_qkv_bias": "attention_bias"},
    ),
    "starcoder2": Family(
        fields(bias, window), window_of_all, WINDOWS,
        {"num_key_value_heads": 2, "attention_bias": True, "sliding_window": None}, _USE_BIAS,
    ),
}  # fmt: skip
