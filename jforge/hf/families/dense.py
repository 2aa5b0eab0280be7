"""Families whose layers keep keys and values a head: full attention, windows and sinks."""

from typing import Any

from jforge.core.config import natural, positive, reject
from jforge.hf.families.parts import Part, base, bias, causal, fields, fused, projections, window, with_sinks
from jforge.hf.family import FULL, SLIDING, Family, Layer, all_full, every, listed, no_window, window_of_all
from jforge.hf.keys import is_nested, lack, rope_of, section

_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def qwen_window(config: dict, kind: str) -> dict:
    """Without use_sliding_window transformers blanks the window, and then fails where layer_types asks for one."""
    if kind == SLIDING and not config.get("use_sliding_window"):
        reject("use_sliding_window", config.get("use_sliding_window"), f"true in a model with layers of kind {kind}")
    return window(config, kind)


def _gemma(config: dict, kind: str, rope: dict | None) -> dict:
    scalar = config["query_pre_attn_scalar"]
    positive("query_pre_attn_scalar", scalar)
    own = base(config, rope, head_dim=256) | causal(config, kind)
    return own | bias(config, kind) | {"scaling": scalar**-0.5} | window(config, kind)


def gemma2(config: dict, kind: str) -> dict:
    cap = config["attn_logit_softcapping"]
    return _gemma(config, kind, rope_of(config, kind)) | {"attn_logit_softcapping": cap}


def _gemma3(config: dict, kind: str) -> dict:
    if config.get("attn_logit_softcapping") is not None:
        lack(config, "attn_logit_softcapping is given, but transformers' gemma3 layers ignore it")
    return _gemma(config, kind, gemma3_rope(config, kind)) | {"qk_norm": "head", "norm_offset": 1.0}


def gemma3_rope(config: dict, kind: str) -> dict | None:
    """Old spelling: rope_theta and rope_scaling are the global layers', rope_local_base_freq the local ones'."""
    given = section(config, "rope_parameters")
    own = section(given, kind) if is_nested(given) else given if kind == FULL else {}
    if kind == FULL:
        own, old_theta, theta = {**own, **section(config, "rope_scaling")}, config.get("rope_theta"), 1e6
    else:
        old_theta, theta = config.get("rope_local_base_freq"), 1e4
    config = config | {"rope_theta": old_theta, "rope_scaling": None, "rope_parameters": {kind: own}}
    return rope_of(config, kind, theta=theta)


def _gpt_oss(config: dict, kind: str) -> dict:
    """Without any RoPE dict the scaling of the released models."""
    if config.get("rope_parameters") is None and not section(config, "rope_scaling"):
        config = config | {"rope_parameters": _GPT_OSS_ROPE}
    return fields(bias, window, theta=1.5e5, head_dim=64)(config, kind)


def _falcon(config: dict, kind: str) -> dict:
    """num_kv_heads counts only in the new architecture; without it multi_query (the default) means one head."""
    if config.get("alibi"):
        lack(config, "alibi is true: falcon with ALiBi biases has no mechanism")
    kv_heads = 1 if config["multi_query"] else None
    if config.get("new_decoder_architecture"):
        kv_heads = config.get("num_kv_heads")
    own = config | {"num_key_value_heads": kv_heads, "head_dim": None, "attention_bias": config.get("bias")}
    return fields(bias)(own, kind)


def qwen_kind(config: dict, index: int) -> str:
    """As transformers reads it, max_window_layers counts the full layers that come before those with a window."""
    if (kind := listed(config, index)) is not None or not _has_window(config):
        return kind or FULL
    natural("max_window_layers", first := config["max_window_layers"])
    return SLIDING if index >= first else FULL


def _qwen3_moe_kind(config: dict, index: int) -> str:
    """transformers' mask obeys no list, its cache does."""
    return window_of_all(config, index) if _has_window(config) else no_window(config, index)


def _has_window(config: dict) -> bool:
    return bool(config.get("use_sliding_window")) and config["sliding_window"] is not None


FUSED = fused("group", "query_key_value", "dense")
DENSE = {FULL: Layer(None, projections)}
WINDOWS = DENSE | {SLIDING: Layer("sliding_window", projections)}


def plain(why: str, *parts: Part, kind=all_full, head_dim: int | None = None, **changes: Any) -> Family:
    """Caches alone: heads of keys and values in full layers, or in windows where the file asks for them.

    why: what no mechanism has; changes: of the Family's fields.
    """
    layers = {name: layer._replace(split=None, lacks=why) for name, layer in WINDOWS.items()}
    return Family(fields(bias, window, *parts, head_dim=head_dim), kind, layers, **changes)


SINKS = dict.fromkeys((FULL, SLIDING), Layer("sinks", with_sinks))
_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA = {"num_key_value_heads": 4, "sliding_window": 4096, "query_pre_attn_scalar": 256}
_GEMMA3_DEFAULTS = _GEMMA | {"num_attention_heads": 8}  # published text_configs omit the heads
_GEMMA3 = Family(_gemma3, every(6, SLIDING, "sliding_window_pattern"), WINDOWS, _GEMMA3_DEFAULTS)
_GPT_OSS = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "attention_bias": True, "sliding_window": 128}

FAMILIES: dict[str, Family] = {
    "falcon": Family(
        _falcon, all_full, {FULL: Layer(None, fused("group", "query_key_value", "dense"))}, {"multi_query": True}
    ),
    "gemma2": Family(gemma2, every(2, SLIDING), WINDOWS, _GEMMA | {"attn_logit_softcapping": 50.0}),
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "gpt_oss": Family(_gpt_oss, every(2, SLIDING), SINKS, _GPT_OSS),
    "llama": Family(fields(bias), all_full, DENSE),
    "mistral": Family(fields(window), window_of_all, WINDOWS, {"num_key_value_heads": 8, "sliding_window": 4096}),
    "olmo2": Family(fields(bias, qk_norm="flat"), all_full, DENSE, {"rms_norm_eps": 1e-5}),
    "qwen2": Family(fields(qwen_window, attention_bias=True), qwen_kind, WINDOWS, _QWEN),
    "qwen3": Family(fields(bias, qwen_window, head_dim=128, qk_norm="head"), qwen_kind, WINDOWS, _QWEN),
    "qwen3_moe": Family(
        fields(bias, qwen_window, qk_norm="head"), _qwen3_moe_kind, WINDOWS, _QWEN | {"num_key_value_heads": 4}
    ),
}
