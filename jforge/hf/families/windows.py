"""Families that mix full layers with windows or chunks, and layers with positions with others that have none."""

from jforge.core.config import natural
from jforge.hf.families.dense import SINKS, WINDOWS, gemma2, qwen_window
from jforge.hf.families.llamas import INTERLEAVED
from jforge.hf.families.parts import (
    bias,
    fields,
    full_without_rope,
    multiplier,
    projections,
    qkv_bias,
    split,
    window,
)
from jforge.hf.family import CHUNKED, FULL, SLIDING, Family, Layer, as_listed, every, first_of, listed
from jforge.hf.keys import integer, is_nested, section

_EPS5 = {"rms_norm_eps": 1e-5}
_HEAD = {"qk_norm": "head"}
_LAYER_EPS = {"layer_norm_eps": "rms_norm_eps"}
_LLAMA3 = {"rope_type": "llama3", "original_max_position_embeddings": 8192, "low_freq_factor": 1.0}
_CWM_ROPE = _LLAMA3 | {"rope_theta": 1e6, "factor": 16.0, "high_freq_factor": 4.0}


def _rope_by_kind(config: dict, kind: str, full: dict, sliding: dict) -> dict:
    """The config with RoPE of its own for each kind of layer, as its class has it where the file has none."""
    own = {FULL: full, SLIDING: sliding}
    given = section(config, "rope_parameters")
    if not is_nested(given):  # one for both
        own = {name: {**rope, **given} for name, rope in own.items()}
        given = {}
    return config | {"rope_parameters": {**own, **given}}


def _cwm(config: dict, kind: str) -> dict:
    if config.get("rope_parameters") is None and not section(config, "rope_scaling"):
        config = config | {"rope_parameters": _CWM_ROPE}
    return fields(window, theta=1e6, head_dim=128)(config, kind)


def _dots1_kind(config: dict, index: int) -> str:
    """Windows from layer max_window_layers on."""
    natural("max_window_layers", first := config["max_window_layers"])
    far = config["sliding_window"] is not None and index >= first
    return listed(config, index) or (SLIDING if far else FULL)


def _exaone(config: dict, kind: str) -> dict:
    """Full layers have no positions, unless the model has no window at all."""
    out = fields(window, **_HEAD)(config, kind)
    return out | (full_without_rope(config, kind) if config.get("sliding_window") is not None else {})


def _exaone_kind(config: dict, index: int) -> str:
    if config["sliding_window"] is None:
        return listed(config, index) or FULL
    return every(4, SLIDING, "sliding_window_pattern")(config, index)


def _flint_kind(config: dict, index: int) -> str:
    """The first two layers, every fourth and the last are full."""
    full = index < 2 or index % 4 == 1 or index == config["num_hidden_layers"] - 1
    return listed(config, index) or (FULL if full else SLIDING)


def _granite_swa(config: dict, kind: str) -> dict:
    """layer_rope_theta has a base for each layer, 0 where it has no positions."""
    out = fields(bias, window, multiplier)(config, kind)
    theta = listed(config, config["layer_index"], "layer_rope_theta")
    if theta is None or out["rope_parameters"] is None:
        return out
    return out | {"rope_parameters": out["rope_parameters"] | {"rope_theta": theta} if theta else None}


def _laguna(config: dict, kind: str) -> dict:
    """A gate of softplus, for each head or each channel; num_attention_heads_per_layer counts a layer's queries."""
    full, sliding = {"rope_theta": 5e5, "partial_rotary_factor": 0.5}, {"rope_theta": 1e4, "partial_rotary_factor": 1.0}
    heads = listed(config, config["layer_index"], "num_attention_heads_per_layer")
    config = _rope_by_kind(config, kind, full, sliding)
    if heads is not None:
        config = config | {"num_attention_heads": heads}
    gate = {"attn_output_gate": True, "output_gate_type": "softplus"}
    gate |= {"output_gate_per_head": config["gating"] in (True, "per-head")}
    return fields(bias, window, partial=1.0, head_dim=128, **_HEAD)(config, kind) | gate


def _mellum(config: dict, kind: str) -> dict:
    config = _rope_by_kind(config, kind, {"rope_theta": 5e5}, {"rope_theta": 1e4})
    return fields(bias, window, head_dim=128, **_HEAD)(config, kind)


def _ministral_kind(config: dict, index: int) -> str:
    return listed(config, index) or (FULL if config["sliding_window"] is None else SLIDING)


def _olmo3(config: dict, kind: str) -> dict:
    """A scaling of the old spelling is that of the full layers alone."""
    if kind == SLIDING and not is_nested(section(config, "rope_parameters")):
        given = {k: v for k, v in section(config, "rope_parameters").items() if k == "rope_theta"}
        config = config | {"rope_scaling": None, "rope_parameters": given}
    return fields(bias, window, theta=5e5, qk_norm="flat")(config, kind)


def _modernbert(config: dict, kind: str) -> dict:
    """Of local_attention tokens half lie before the query; the old spelling of RoPE has a base for each kind."""
    far, near = (config.get(key, theta) for key, theta in (("global_rope_theta", 16e4), ("local_rope_theta", 1e4)))
    config = _rope_by_kind(config, kind, {"rope_theta": far}, {"rope_theta": near})
    size = integer(config, "sliding_window", integer(config, "local_attention") // 2)  # the former in saved files
    return fields(bias)(config, kind) | ({"sliding_window": size} if kind == SLIDING else {})


def _smollm3_kind(config: dict, index: int) -> str:
    """With use_sliding_window the layers without positions have windows."""
    size = config.get("sliding_window") if config.get("use_sliding_window") else None
    return listed(config, index) or (SLIDING if size is not None and not _has_rope(config, index) else FULL)


def _has_rope(config: dict, index: int) -> bool:
    """no_rope_layers has a 1 for each layer with positions; without it all but the last of every few have them."""
    given = listed(config, index, "no_rope_layers")
    return bool((index + 1) % integer(config, "no_rope_layer_interval", 4) if given is None else given)


def _smollm3(config: dict, kind: str) -> dict:
    out = fields(bias, window, theta=2e6)(config, kind)
    return out | ({} if _has_rope(config, config["layer_index"]) else {"rope_parameters": None})


def _llama4(config: dict, kind: str) -> dict:
    """Layers with positions norm q and k after RoPE; queries of the others grow with their place."""
    out = fields(bias, theta=5e5, head_dim=128, **INTERLEAVED)(config, kind)
    if kind == CHUNKED:
        out |= {"attention_chunk_size": integer(config, "attention_chunk_size")}
    if _has_rope(config, config["layer_index"]):
        normed = {"qk_norm": "head", "qk_norm_weight": False, "qk_norm_after_rope": True}
        return out | (normed if config["use_qk_norm"] else {})
    if config["attn_temperature_tuning"]:
        out |= {name: config[name] for name in ("attn_scale", "floor_scale")}
    return out | {"rope_parameters": None}


def _llama4_kind(config: dict, index: int) -> str:
    return listed(config, index) or (CHUNKED if _has_rope(config, index) else FULL)


def _cohere2_moe(config: dict, kind: str) -> dict:
    """Full layers have no positions, but those before the experts where their pattern is 1."""
    out = fields(bias, window, head_dim=128, **INTERLEAVED)(config, kind)
    before = (listed(config, config["layer_index"], "mlp_layer_types") or _dense_first(config)) == "dense"
    forced = before and config["prefix_dense_sliding_window_pattern"] == 1
    return out if forced else out | full_without_rope(config, kind)


def _dense_first(config: dict) -> str:
    return "dense" if config["layer_index"] < (config.get("first_k_dense_replace") or 0) else "sparse"


def _cohere2_moe_kind(config: dict, index: int) -> str:
    first, key = config.get("first_k_dense_replace") or 0, "sliding_window_pattern"
    place, key = (index, f"prefix_dense_{key}") if index < first else (index - first, key)
    return listed(config, index) or (SLIDING if (place + 1) % integer(config, key) else FULL)


def _qwen2_moe_kind(config: dict, index: int) -> str:
    """Every second layer before max_window_layers has a window."""
    natural("max_window_layers", end := config["max_window_layers"])
    near = config.get("use_sliding_window") and index < end and index % 2 == 0
    return listed(config, index) or (SLIDING if near else FULL)


_GATED = {kind: layer._replace(split=split(gate="gate_proj")) for kind, layer in WINDOWS.items()}
_LAGUNA = {kind: layer._replace(split=split(gate="g_proj")) for kind, layer in WINDOWS.items()}
_MODERNBERT = {kind: layer._replace(split=split("Wo")) for kind, layer in WINDOWS.items()}
_LLAMA4 = {FULL: Layer(None, projections), CHUNKED: Layer("chunked_local", projections)}
_LLAMA4_DEFAULTS = _EPS5 | {
    "num_key_value_heads": 8,
    "use_qk_norm": True,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "attention_chunk_size": 8192,
}
_EXAONE = Family(
    _exaone, _exaone_kind, WINDOWS,
    _EPS5 | {"num_key_value_heads": 32, "sliding_window": 4096, "sliding_window_pattern": 4},
)  # fmt: skip
_GRANITE_SWA = Family(
    _granite_swa, first_of(4, SLIDING), SINKS,
    _EPS5 | {"num_key_value_heads": 4, "attention_multiplier": 1.0, "sliding_window": 128},
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "afmoe": Family(
        fields(window, full_without_rope, head_dim=128, attn_output_gate=True, **_HEAD),
        every(4, SLIDING, "global_attn_every_n_layers"), _GATED, _EPS5 | {"sliding_window": 1024},
    ),
    "cohere2": Family(
        fields(bias, window, full_without_rope, **INTERLEAVED), every(4, SLIDING, "sliding_window_pattern"), WINDOWS,
        _EPS5 | {"sliding_window": 4096}, _LAYER_EPS,
    ),
    "cohere2_moe": Family(
        _cohere2_moe, _cohere2_moe_kind, WINDOWS,
        _EPS5 | {"sliding_window": 4096, "sliding_window_pattern": 4, "prefix_dense_sliding_window_pattern": 1},
        _LAYER_EPS,
    ),
    "cwm": Family(_cwm, first_of(4, SLIDING), WINDOWS, _EPS5 | {"num_key_value_heads": 8, "sliding_window": 8192}),
    "dots1": Family(
        fields(bias, window, **_HEAD), _dots1_kind, WINDOWS,
        {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 62},
    ),
    "exaone4": _EXAONE,
    "exaone_moe": _EXAONE,
    "flint": Family(
        fields(bias, window, full_without_rope, head_dim=128, **_HEAD), _flint_kind, SINKS,
        {"num_key_value_heads": 4, "sliding_window": 513},
    ),
    "granite_swa": _GRANITE_SWA,
    "granitemoe_swa": _GRANITE_SWA._replace(
        defaults={"attention_multiplier": 1.0, "sliding_window": 128},
    ),
    "kolibri1": Family(
        fields(window, full_without_rope, head_dim=128, **_HEAD), every(5, SLIDING), WINDOWS,
        {"num_key_value_heads": 4, "sliding_window": 513},
    ),
    "laguna": Family(
        _laguna, as_listed, _LAGUNA, {"num_key_value_heads": 8, "sliding_window": 512, "gating": True}
    ),
    "llama4_text": Family(_llama4, _llama4_kind, _LLAMA4, _LLAMA4_DEFAULTS),
    "mellum": Family(_mellum, as_listed, WINDOWS, {"num_key_value_heads": 4, "sliding_window": 1024}),
    "ministral": Family(fields(window), _ministral_kind, WINDOWS, {"num_key_value_heads": 8, "sliding_window": 4096}),
    "modernbert-decoder": Family(
        _modernbert, first_of(3, SLIDING, "global_attn_every_n_layers"), _MODERNBERT, {"local_attention": 128}
    ),
    "olmo3": Family(_olmo3, every(4, SLIDING), WINDOWS, _EPS5 | {"sliding_window": 4096}),
    "qwen2_moe": Family(
        fields(qkv_bias, qwen_window), _qwen2_moe_kind, WINDOWS,
        {"num_key_value_heads": 16, "attention_bias": True, "max_window_layers": 28}, {"qkv_bias": "attention_bias"},
    ),
    "smollm3": Family(_smollm3, _smollm3_kind, WINDOWS, {"num_key_value_heads": 4}),
    "vaultgemma": Family(
        gemma2, every(2, SLIDING), WINDOWS,
        {"num_key_value_heads": 4, "sliding_window": 4096, "query_pre_attn_scalar": 256,
         "attn_logit_softcapping": 50.0},
    ),
}  # fmt: skip
