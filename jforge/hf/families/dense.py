"""Families whose layers keep keys and values a head: full attention, windows and sinks."""

from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any

import numpy as np

from jforge.core.config import positive, positive_int, reject
from jforge.hf.family import FULL, LINEAR, SLIDING, Family, Layer, all_full, every, listed
from jforge.hf.keys import integer, is_nested, rope_of, section
from jforge.hf.weights import Weights

_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def base(config: dict, rope: dict | None, *, head_dim: int | None = None) -> dict:
    """What all families spell alike. A null num_key_value_heads means as many as heads; without a head_dim in the
    file and in `head_dim`, the class's default, it is hidden / heads. A null head_dim is refused where there is a
    default, as in transformers.
    """
    if head_dim is not None and "head_dim" in config:
        positive_int("head_dim", config["head_dim"])
    heads, eps = integer(config, "num_attention_heads"), config.get("rms_norm_eps", 1e-6)
    positive("rms_norm_eps", eps)
    return {
        "hidden_size": integer(config, "hidden_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": integer(config, "num_key_value_heads", heads),
        "head_dim": integer(config, "head_dim", head_dim),
        "rms_norm_eps": eps,
        "rope_parameters": rope,
    }


def _fields(
    *parts: Callable[[dict, str], dict], theta: float = 1e4, head_dim: int | None = None, **fixed: Any
) -> Callable[[dict, str], dict]:
    """`fields` of a family that has `base`, these parts, and these values, which no key says."""

    def fields(config: dict, kind: str) -> dict:
        out = base(config, rope_of(config, kind, theta=theta), head_dim=head_dim) | fixed
        return reduce(or_, (part(config, kind) for part in parts), out)

    return fields


def _bias(config: dict, kind: str) -> dict:
    """`attention_bias` puts a bias on q, k, v and on o alike."""
    bias = bool(config.get("attention_bias"))
    return {"attention_bias": bias, "attention_output_bias": bias}


def _window(config: dict, kind: str) -> dict:
    """The window of a layer that has one; a null is an error there, not the class default."""
    return {"sliding_window": integer(config, "sliding_window")} if kind == SLIDING else {}


def _qwen_window(config: dict, kind: str) -> dict:
    """Without use_sliding_window transformers blanks the window, and then fails where layer_types asks for one."""
    if kind == SLIDING and not config.get("use_sliding_window"):
        reject("use_sliding_window", config.get("use_sliding_window"), f"true in a model with layers of kind {kind}")
    return _window(config, kind)


def _qwen3_next(config: dict, kind: str) -> dict:
    if config.get("attention_bias"):
        raise NotImplementedError("attention_bias in qwen3_next puts a bias on the gate too, which no Config has")
    fields = base(config, rope_of(config, kind, partial=0.25), head_dim=256)
    return fields | {"qk_norm": "head", "norm_offset": 1.0, "attn_output_gate": True}


def _gemma(config: dict, kind: str, rope: dict | None) -> dict:
    if config.get("use_bidirectional_attention"):
        raise NotImplementedError("use_bidirectional_attention is set: attention that is not causal has no mechanism")
    scalar = config["query_pre_attn_scalar"]
    positive("query_pre_attn_scalar", scalar)
    fields = base(config, rope, head_dim=256)
    return fields | _bias(config, kind) | {"scaling": scalar**-0.5} | _window(config, kind)


def _gemma2(config: dict, kind: str) -> dict:
    cap = config["attn_logit_softcapping"]
    return _gemma(config, kind, rope_of(config, kind)) | {"attn_logit_softcapping": cap}


def _gemma3(config: dict, kind: str) -> dict:
    if config.get("attn_logit_softcapping") is not None:
        raise NotImplementedError("attn_logit_softcapping is given, but transformers' gemma3 layers ignore it")
    return _gemma(config, kind, _gemma3_rope(config, kind)) | {"qk_norm": "head", "norm_offset": 1.0}


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
    """Without any RoPE dict the scaling of the released models."""
    if config.get("rope_parameters") is None and not section(config, "rope_scaling"):
        config = config | {"rope_parameters": _GPT_OSS_ROPE}
    return _fields(_bias, _window, theta=1.5e5, head_dim=64)(config, kind)


def _falcon(config: dict, kind: str) -> dict:
    """num_kv_heads counts only in the new architecture; without it multi_query (the default) means one head."""
    if config.get("alibi"):
        raise NotImplementedError("alibi is true: falcon with ALiBi biases has no mechanism")
    kv_heads = 1 if config["multi_query"] else None
    if config.get("new_decoder_architecture"):
        kv_heads = config.get("num_kv_heads")
    own = config | {"num_key_value_heads": kv_heads, "head_dim": None, "attention_bias": config.get("bias")}
    return _fields(_bias)(own, kind)


def _mistral_kind(config: dict, index: int) -> str:
    """One window for all layers unless sliding_window is a null: the class default is 4096."""
    return SLIDING if config["sliding_window"] is not None else all_full(config, index)


def _qwen_kind(config: dict, index: int) -> str:
    """As transformers reads it, max_window_layers counts the full layers that come before those with a window."""
    if (kind := listed(config, index)) is not None or not _has_window(config):
        return kind or FULL
    first = config["max_window_layers"]
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        reject("max_window_layers", first, "an integer, 0 or more")
    return SLIDING if index >= first else FULL


def _qwen3_moe_kind(config: dict, index: int) -> str:
    return SLIDING if _has_window(config) else all_full(config, index)


def _has_window(config: dict) -> bool:
    return bool(config.get("use_sliding_window")) and config["sliding_window"] is not None


def projections(w: Weights, cfg: Any) -> dict[str, np.ndarray]:
    """q_proj, k_proj, v_proj, o_proj, and q_norm, k_norm: every family but Falcon.

    With an output gate (Qwen3-Next) q_proj holds, head by head, [query | gate].
    """
    D, N, K, H, V = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.v_head_dim
    if cfg.attn_output_gate:
        both = w.linear("q_proj", D, N, H + V)
        params = {"wq": both[..., :H], "wg": both[..., H:]}
    else:
        params = {"wq": w.linear("q_proj", D, N, H)}
    params |= {"wk": w.linear("k_proj", D, K, H), "wv": w.linear("v_proj", D, K, V)}
    if cfg.attention_bias:
        for x, shape in (("q", (N, H)), ("k", (K, H)), ("v", (K, V))):
            params[f"b{x}"] = w.vector(f"{x}_proj.bias", *shape)
    if cfg.qk_norm:
        for x, heads in (("q", N), ("k", K)):
            shape = (heads, H) if cfg.qk_norm == "flat" else (H,)
            params[f"{x}_norm"] = w.vector(f"{x}_norm.weight", *shape)
    return params | w.output("o_proj", N, V, D, cfg.attention_output_bias)


def _with_sinks(w: Weights, cfg: Any) -> dict[str, np.ndarray]:
    """gpt-oss: one sink logit a query head beside the projections."""
    return projections(w, cfg) | {"sinks": w.take("sinks", cfg.num_attention_heads)}


def _fused(w: Weights, cfg: Any) -> dict[str, np.ndarray]:
    """Falcon's query_key_value: for each key/value head its G queries, then its key, then its value.

    With K = 1 that is [all queries | key | value], with K = N it is [query | key | value] head by head: the three
    layouts of the model are one.
    """
    D, N, K, H = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    G = N // K
    both = w.linear("query_key_value", D, K, G + 2, H)
    params = {"wq": both[:, :, :G].reshape(D, N, H), "wk": both[:, :, G], "wv": both[:, :, G + 1]}
    if cfg.attention_bias:
        bias = w.vector("query_key_value.bias", K, G + 2, H)
        params |= {"bq": bias[:, :G].reshape(N, H), "bk": bias[:, G], "bv": bias[:, G + 1]}
    return params | w.output("dense", N, H, D, cfg.attention_output_bias)


DENSE = {FULL: Layer(None, projections)}
_WINDOWS = DENSE | {SLIDING: Layer("sliding_window", projections)}
_SINKS = dict.fromkeys((FULL, SLIDING), Layer("sinks", _with_sinks))
_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA = {"num_key_value_heads": 4, "sliding_window": 4096, "query_pre_attn_scalar": 256}
_GEMMA3_DEFAULTS = _GEMMA | {"num_attention_heads": 8}  # published text_configs omit the heads
_GEMMA3 = Family(_gemma3, every(6, SLIDING, "sliding_window_pattern"), _WINDOWS, _GEMMA3_DEFAULTS)
_GPT_OSS = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "attention_bias": True, "sliding_window": 128}

FAMILIES: dict[str, Family] = {
    "falcon": Family(_falcon, all_full, {FULL: Layer(None, _fused)}, {"multi_query": True}),
    "gemma2": Family(_gemma2, every(2, SLIDING), _WINDOWS, _GEMMA | {"attn_logit_softcapping": 50.0}),
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "gpt_oss": Family(_gpt_oss, every(2, SLIDING), _SINKS, _GPT_OSS),
    "llama": Family(_fields(_bias), all_full, DENSE),
    "mistral": Family(_fields(_window), _mistral_kind, _WINDOWS, {"num_key_value_heads": 8, "sliding_window": 4096}),
    "olmo2": Family(_fields(_bias, qk_norm="flat"), all_full, DENSE, {"rms_norm_eps": 1e-5}),
    "qwen2": Family(_fields(_qwen_window, attention_bias=True), _qwen_kind, _WINDOWS, _QWEN),
    "qwen3": Family(_fields(_bias, _qwen_window, head_dim=128, qk_norm="head"), _qwen_kind, _WINDOWS, _QWEN),
    "qwen3_moe": Family(
        _fields(_bias, _qwen_window, qk_norm="head"), _qwen3_moe_kind, _WINDOWS, _QWEN | {"num_key_value_heads": 4}
    ),
    "qwen3_next": Family(_qwen3_next, every(4, LINEAR, "full_attention_interval"), DENSE, {"num_key_value_heads": 2}),
}
