"""What the attention of each model family has: the fields of a layer's Config, and which kind of layer sits where.

One small function per family; FAMILIES is the table. Keys that a file may omit take the default of the transformers
5.23 config class, since that is what such a file means.
Source: configuration_*.py and modeling_*.py of transformers 5.23.0.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jforge.core.config import positive, reject
from jforge.hf_keys import integer, is_nested, need, rope_of, section

FULL, SLIDING, LINEAR, INDEXED = "full_attention", "sliding_attention", "linear_attention", "indexed_attention"
_LEGACY_KINDS = {"attention": FULL, "mamba": LINEAR}  # as transformers renames them
_DENSE = {FULL: None}
_WINDOWS = {FULL: None, SLIDING: "sliding_window"}
_SINKS = {FULL: "sinks", SLIDING: "sinks"}
_LATENT = {FULL: "mla"}
_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


class Family(NamedTuple):
    """What differs from model to model."""

    fields: Callable[[dict, str], dict]  # (config, kind) -> keyword arguments of Config
    kind: Callable[[dict, int], str]  # (config, layer) -> one of transformers' layer types
    mechanisms: Mapping[str, str | None] = _DENSE  # by kind; None: the dense one that the numbers of heads say


# Families: the fields of a layer's Config


def _base(
    config: dict, rope: dict | None, *, kv_heads: int | None = None, head_dim: int | None = None, eps: float = 1e-6
) -> dict:
    """What all families spell alike. `kv_heads` and `head_dim` are class defaults, None meaning heads, hidden / heads.

    An explicit null num_key_value_heads means "as many as heads" whatever the class default is.
    """
    heads = integer(config, "num_attention_heads")
    eps = config.get("rms_norm_eps", eps)
    positive("rms_norm_eps", eps)
    return {
        "hidden_size": integer(config, "hidden_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": integer({"num_key_value_heads": kv_heads} | config, "num_key_value_heads", heads),
        "head_dim": integer(config, "head_dim", head_dim),
        "rms_norm_eps": eps,
        "rope_parameters": rope,
    }


def _bias(config: dict) -> dict:
    """`attention_bias` puts a bias on q, k, v and on o alike."""
    bias = bool(config.get("attention_bias"))
    return {"attention_bias": bias, "attention_output_bias": bias}


def _window(config: dict, kind: str, default: int = 4096) -> dict:
    """The window of a layer that has one; an explicit null is an error there, not the class default."""
    if kind != SLIDING:
        return {}
    return {"sliding_window": integer({"sliding_window": default} | config, "sliding_window")}


def _qwen_window(config: dict, kind: str) -> dict:
    """Without use_sliding_window transformers blanks the window, and then fails where layer_types asks for one."""
    if kind == SLIDING and not config.get("use_sliding_window"):
        reject("use_sliding_window", config.get("use_sliding_window"), f"true in a model with layers of kind {kind}")
    return _window(config, kind)


def _llama(config: dict, kind: str) -> dict:
    return _base(config, rope_of(config, kind)) | _bias(config)


def _mistral(config: dict, kind: str) -> dict:
    return _base(config, rope_of(config, kind), kv_heads=8) | _window(config, kind)


def _qwen2(config: dict, kind: str) -> dict:
    """Always biases on q, k, v and never on o; no key says so."""
    return _base(config, rope_of(config, kind), kv_heads=32) | {"attention_bias": True} | _qwen_window(config, kind)


def _qwen3(config: dict, kind: str) -> dict:
    fields = _base(config, rope_of(config, kind), kv_heads=32, head_dim=128)
    return fields | _bias(config) | {"qk_norm": "head"} | _qwen_window(config, kind)


def _qwen3_moe(config: dict, kind: str) -> dict:
    fields = _base(config, rope_of(config, kind), kv_heads=4)
    return fields | _bias(config) | {"qk_norm": "head"} | _qwen_window(config, kind)


def _qwen3_next(config: dict, kind: str) -> dict:
    if config.get("attention_bias"):
        raise NotImplementedError("attention_bias in qwen3_next puts a bias on the gate too, which no Config has")
    fields = _base(config, rope_of(config, kind, partial=0.25), kv_heads=2, head_dim=256)
    return fields | {"qk_norm": "head", "norm_offset": 1.0, "attn_output_gate": True}


def _gemma(config: dict, kind: str, rope: dict | None) -> dict:
    if config.get("use_bidirectional_attention"):
        raise NotImplementedError("use_bidirectional_attention is set: attention that is not causal has no mechanism")
    scalar = config.get("query_pre_attn_scalar", 256)
    positive("query_pre_attn_scalar", scalar)
    fields = _base(config, rope, kv_heads=4, head_dim=256)
    return fields | _bias(config) | {"scaling": scalar**-0.5} | _window(config, kind)


def _gemma2(config: dict, kind: str) -> dict:
    cap = config.get("attn_logit_softcapping", 50.0)
    return _gemma(config, kind, rope_of(config, kind)) | {"attn_logit_softcapping": cap}


def _gemma3(config: dict, kind: str) -> dict:
    if config.get("attn_logit_softcapping") is not None:
        raise NotImplementedError("attn_logit_softcapping is given, but transformers' gemma3 layers ignore it")
    config = {"num_attention_heads": 8, **config}  # published text_configs omit it
    fields = _gemma(config, kind, _gemma3_rope(config, kind))
    return fields | {"qk_norm": "head", "norm_offset": 1.0}


def _gemma3_rope(config: dict, kind: str) -> dict | None:
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
    """Biases unless the file says no; without any RoPE dict the scaling of the released models."""
    if config.get("rope_parameters") is None and not section(config, "rope_scaling"):
        config = config | {"rope_parameters": _GPT_OSS_ROPE}
    fields = _base(config, rope_of(config, kind, theta=1.5e5), kv_heads=8, head_dim=64, eps=1e-5)
    return fields | _bias({"attention_bias": True} | config) | _window(config, kind, default=128)


def _olmo2(config: dict, kind: str) -> dict:
    return _base(config, rope_of(config, kind), eps=1e-5) | _bias(config) | {"qk_norm": "flat"}


def _minimax_m2(config: dict, kind: str) -> dict:
    """Checkpoints spell partial rotation as rotary_dim."""
    fields = _base(config, None, kv_heads=8, head_dim=128)
    partial = integer(config, "rotary_dim", fields["head_dim"]) / fields["head_dim"]
    return fields | {"rope_parameters": rope_of(config, kind, theta=5e6, partial=partial), "qk_norm": "flat"}


def _falcon(config: dict, kind: str) -> dict:
    """num_kv_heads counts only in the new architecture; without it multi_query (the default) means one head."""
    if config.get("alibi"):
        raise NotImplementedError("alibi is true: falcon with ALiBi biases has no mechanism")
    kv_heads = 1 if config.get("multi_query", True) else None
    if config.get("new_decoder_architecture"):
        kv_heads = config.get("num_kv_heads")
    own = config | {"num_key_value_heads": kv_heads, "head_dim": None, "attention_bias": config.get("bias")}
    return _base(own, rope_of(config, kind)) | _bias(own)


def _mla(config: dict, rope: dict | None, *, q_lora_rank: int | None = 1536) -> dict:
    """Latent attention. rms_norm_eps is left out: transformers builds the latent norms with 1e-6 whatever it says."""
    heads = integer(config, "num_attention_heads")
    kv_heads = integer(config, "num_key_value_heads", heads)
    if kv_heads != heads:
        reject("num_key_value_heads", kv_heads, f"num_attention_heads={heads}, since all heads share one latent")
    return {
        "hidden_size": integer(config, "hidden_size"),
        "num_attention_heads": heads,
        "q_lora_rank": integer({"q_lora_rank": q_lora_rank} | config, "q_lora_rank", None),
        "kv_lora_rank": integer(config, "kv_lora_rank", 512),
        "qk_nope_head_dim": integer(config, "qk_nope_head_dim", 128),
        "qk_rope_head_dim": integer(config, "qk_rope_head_dim", 64),
        "v_head_dim": integer(config, "v_head_dim", 128),
        "attention_bias": bool(config.get("attention_bias")),
        "rope_parameters": rope,
    }


def _deepseek_v2(config: dict, kind: str) -> dict:
    return _mla(config, rope_of(config, kind))


def _deepseek_v3(config: dict, kind: str) -> dict:
    """Kimi-K2 is the same under another name. A checkpoint may have its rope rows sorted into halves."""
    layout = "interleaved" if config.get("rope_interleave", True) else "half"
    return _mla(config, rope_of(config, kind)) | {"rope_layout": layout}


def _kimi_linear(config: dict, kind: str) -> dict:
    """NoPE: the rope slice exists and is not rotated, whatever rope_theta says."""
    if not config.get("mla_use_nope", True):
        raise NotImplementedError("mla_use_nope is false, but the kimi_linear of transformers never rotates")
    if config.get("mla_use_output_gate"):
        raise NotImplementedError("mla_use_output_gate is true: a gate on the output of MLA is in no Config")
    return _mla(config, None, q_lora_rank=None)


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
        n = integer(config, key, period) if key else period
        return _listed(config, index) or (between if (index + 1) % n else FULL)

    return kind


def _has_window(config: dict) -> bool:
    return bool(config.get("use_sliding_window")) and config.get("sliding_window", 4096) is not None


def _qwen_kind(config: dict, index: int) -> str:
    """As transformers reads it, max_window_layers counts the full layers that come before those with a window."""
    if (kind := _listed(config, index)) is not None or not _has_window(config):
        return kind or FULL
    first = config.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        reject("max_window_layers", first, "an integer, 0 or more")
    return SLIDING if index >= first else FULL


def _qwen3_moe_kind(config: dict, index: int) -> str:
    return SLIDING if _has_window(config) else _all_full(config, index)


def _mistral_kind(config: dict, index: int) -> str:
    """One window for all layers unless sliding_window is an explicit null: the class default is 4096."""
    return SLIDING if config.get("sliding_window", 4096) is not None else _all_full(config, index)


def _minimax_m2_kind(config: dict, index: int) -> str:
    """Checkpoints list 1 for softmax attention; a 0 would be a lightning layer, as in MiniMax-Text-01."""
    return LINEAR if _listed(config, index, "attn_type_list") == 0 else _all_full(config, index)


def _deepseek_kind(config: dict, index: int) -> str:
    """An indexer makes it DSA (DeepSeek-V3.2), also where a file keeps the model_type of V3."""
    return INDEXED if config.get("index_topk") is not None else _all_full(config, index)


def _kimi_linear_kind(config: dict, index: int) -> str:
    """Checkpoints list their layers, counted from 1. Without a list there is no telling: see docs/divergences.md."""
    if (kind := _listed(config, index)) is not None:
        return kind
    lists = section(config, "linear_attn_config")
    if not lists:
        raise ValueError("config has neither layer_types nor linear_attn_config; one must list the kinds of layers")
    kinds = []
    for key, kind in (("full_attn_layers", FULL), ("kda_layers", LINEAR)):
        entries = need(lists, key)
        if not isinstance(entries, (list, tuple)):
            reject(key, entries, "a list of layers, counted from 1")
        kinds += [kind] * (index + 1 in entries)
    if len(kinds) != 1:
        where = "both" if kinds else "neither"
        raise ValueError(
            f"layer {index} is in {where} of full_attn_layers and kda_layers, as {index + 1}; one must have it"
        )
    return kinds[0]


FAMILIES: dict[str, Family] = {
    "deepseek_v2": Family(_deepseek_v2, _deepseek_kind, _LATENT),
    "deepseek_v3": Family(_deepseek_v3, _deepseek_kind, _LATENT),
    "falcon": Family(_falcon, _all_full),
    "gemma2": Family(_gemma2, _every(2, SLIDING), _WINDOWS),
    "gemma3": Family(_gemma3, _every(6, SLIDING, "sliding_window_pattern"), _WINDOWS),
    "gemma3_text": Family(_gemma3, _every(6, SLIDING, "sliding_window_pattern"), _WINDOWS),
    "gpt_oss": Family(_gpt_oss, _every(2, SLIDING), _SINKS),
    "kimi_k2": Family(_deepseek_v3, _deepseek_kind, _LATENT),
    "kimi_linear": Family(_kimi_linear, _kimi_linear_kind, _LATENT),
    "llama": Family(_llama, _all_full),
    "minimax_m2": Family(_minimax_m2, _minimax_m2_kind),
    "mistral": Family(_mistral, _mistral_kind, _WINDOWS),
    "olmo2": Family(_olmo2, _all_full),
    "qwen2": Family(_qwen2, _qwen_kind, _WINDOWS),
    "qwen3": Family(_qwen3, _qwen_kind, _WINDOWS),
    "qwen3_moe": Family(_qwen3_moe, _qwen3_moe_kind, _WINDOWS),
    "qwen3_next": Family(_qwen3_next, _every(4, LINEAR, "full_attention_interval")),
}
