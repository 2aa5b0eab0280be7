"""Families of latent attention, with and without an indexer: DeepSeek-V2 to V3.2, Kimi, GLM-5, MiniCPM3 and others."""

from typing import Any

import numpy as np

from jforge.core.config import reject
from jforge.hf.family import FULL, INDEXED, LINEAR, Family, Layer, all_full, listed
from jforge.hf.keys import integer, known, lack, need, only, rope_of, section
from jforge.hf.weights import Weights

_SHARED = "shared_indexed_attention"  # transformers has no name for it: a layer whose indexer_types entry is "shared"


def _deepseek_v2(config: dict, kind: str) -> dict:
    return _mla(config, rope_of(config, kind))


def _deepseek_v3(config: dict, kind: str) -> dict:
    """Kimi-K2 is the same under another name. A checkpoint may have its rope rows sorted into halves."""
    if kind == INDEXED:
        need(config, "index_topk")
        return _deepseek_v32(config, kind)
    layout = "interleaved" if config["rope_interleave"] else "half"
    return _mla(config, rope_of(config, kind)) | {"rope_layout": layout}


def _deepseek_v32(config: dict, kind: str) -> dict:
    """Its index heads turn in halves. It shares no picks: files that ask for it are GLM-5.2's."""
    known(config, indexer_types=None, index_topk_pattern=None, index_topk_freq=1)
    return _mla(config, rope_of(config, INDEXED)) | _indexer(config, kind, heads=64, interleaved=False)


def _glm_moe_dsa(config: dict, kind: str) -> dict:
    """GLM-5, whose index heads turn in pairs, and GLM-5.2, where most layers take the picks of one before them."""
    fields = _mla(config, rope_of(config, INDEXED), qk_nope_head_dim=192, v_head_dim=256)
    return fields | _indexer(config, kind, heads=32, interleaved=True)


def kimi_latent(config: dict, kind: str) -> dict:
    """NoPE: the rope slice exists and is not rotated, whatever rope_theta says."""
    if not config["mla_use_nope"]:
        lack(config, "mla_use_nope is false, but the kimi_linear of transformers never rotates")
    if config.get("mla_use_output_gate"):
        lack(config, "mla_use_output_gate is true: a gate on the output of MLA is in no Config")
    return _mla(config, None)


def _mla(config: dict, rope: dict | None, *, qk_nope_head_dim: int = 128, v_head_dim: int = 128) -> dict:
    """Latent attention. rms_norm_eps is left out: transformers builds the latent norms with 1e-6 whatever it says."""
    heads = integer(config, "num_attention_heads")
    kv_heads = integer(config, "num_key_value_heads", heads)
    if kv_heads != heads:
        reject("num_key_value_heads", kv_heads, f"num_attention_heads={heads}, since all heads share one latent")
    return {
        "hidden_size": integer(config, "hidden_size"),
        "num_attention_heads": heads,
        "q_lora_rank": integer(config, "q_lora_rank", None),
        "kv_lora_rank": integer(config, "kv_lora_rank", 512),
        "qk_nope_head_dim": integer(config, "qk_nope_head_dim", qk_nope_head_dim),
        "qk_rope_head_dim": integer(config, "qk_rope_head_dim", 64),
        "v_head_dim": integer(config, "v_head_dim", v_head_dim),
        "attention_bias": bool(config.get("attention_bias")),
        "rope_parameters": rope,
    }


def _indexer(config: dict, kind: str, *, heads: int, interleaved: bool) -> dict[str, Any]:
    """The layouts of RoPE are the family's. Some files name them, though transformers reads neither key."""
    only(config, rope_interleave=True, indexer_rope_interleave=interleaved)
    return {
        "index_n_heads": integer(config, "index_n_heads", heads),
        "index_head_dim": integer(config, "index_head_dim", 128),
        "index_topk": integer(config, "index_topk", 2048),
        "index_rope_layout": "interleaved" if interleaved else "half",
        "index_shared": kind == _SHARED,
    }


def _deepseek_kind(config: dict, index: int) -> str:
    """An indexer makes it DSA (DeepSeek-V3.2), also where a file keeps the model_type of V3."""
    return INDEXED if config.get("index_topk") is not None else all_full(config, index)


def _all_indexed(config: dict, index: int) -> str:
    return listed(config, index) or INDEXED


def _glm_moe_dsa_kind(config: dict, index: int) -> str:
    """Which layers have an indexer is said by a list (GLM-5.2), by a string of letters, or as one in so many."""
    kind = _all_indexed(config, index)
    return _SHARED if kind == INDEXED and indexer_types(config)[index] == "shared" else kind


def indexer_types(config: dict) -> list[str]:
    """The first of the keys that is there counts. index_skip_topk_offset layers come before the first shared one."""
    count = config["num_hidden_layers"]
    for key in ("indexer_types", "index_topk_pattern"):
        if (given := config.get(key)) is None:
            continue
        types = [{"F": "full", "S": "shared"}.get(x) for x in given] if isinstance(given, str) else given
        fits = isinstance(types, (list, tuple)) and len(types) == count and all(x in ("full", "shared") for x in types)
        if not fits or types[0] != "full":
            reject(key, given, f"num_hidden_layers={count} times 'full' or 'shared' (F, S in a string), 'full' first")
        return list(types)
    period, offset = integer(config, "index_topk_freq", 1), integer(config, "index_skip_topk_offset", 2)
    return ["shared" if max(i - offset + 1, 0) % period else "full" for i in range(count)]


def kimi_kind(config: dict, index: int) -> str:
    """Checkpoints list their layers, counted from 1. Without a list there is no telling: see docs/divergences.md."""
    if (kind := listed(config, index)) is not None:
        return kind
    lists = section(config, "linear_attn_config")
    if not lists:
        raise ValueError("config has neither layer_types nor linear_attn_config; one must list the kinds of layers")
    kinds, number = [], index + 1
    for key, kind in (("full_attn_layers", FULL), ("kda_layers", LINEAR)):
        entries = need(lists, key)
        if not isinstance(entries, (list, tuple)):
            reject(key, entries, "a list of layers, counted from 1")
        kinds += [kind] * (number in entries)
    if len(kinds) != 1:
        where = "both" if kinds else "neither"
        found = f"in {where} of full_attn_layers and kda_layers, as {number}"
        raise ValueError(f"layer {index} is {found}; one must have it")
    return kinds[0]


def _latent(w: Weights, cfg: Any) -> dict[str, np.ndarray]:
    """q holds, head by head, [nope | rope]; kv_a [latent | rope]; kv_b, head by head, [key | value]."""
    D, N, L = cfg.hidden_size, cfg.num_attention_heads, cfg.q_lora_rank
    C, nope, R, V = cfg.kv_lora_rank, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    if L is None:
        params = {"wq": w.linear("q_proj", D, N, nope + R)}
    else:
        params = {
            "wq_a": w.linear("q_a_proj", D, L),
            "q_norm": w.take("q_a_layernorm.weight", L),
            "wq_b": w.linear("q_b_proj", L, N, nope + R),
        }
    params |= {"wkv_a": w.linear("kv_a_proj_with_mqa", D, C + R), "kv_norm": w.take("kv_a_layernorm.weight", C)}
    both = w.linear("kv_b_proj", C, N, nope + V)
    params |= {"wk_b": both[..., :nope], "wv_b": both[..., nope:]}
    if cfg.attention_bias:
        params["bkv_a"] = w.take("kv_a_proj_with_mqa.bias", C + R)
        if L is not None:
            params["bq_a"] = w.take("q_a_proj.bias", L)
    return params | w.output("o_proj", N, V, D, cfg.attention_bias)


def _with_indexer(w: Weights, cfg: Any) -> dict[str, np.ndarray]:
    """MLA's weights and the indexer's; a layer that takes the picks of another has none."""
    params = _latent(w, cfg)
    if cfg.index_shared:
        return params
    D, L, heads, J = cfg.hidden_size, cfg.q_lora_rank, cfg.index_n_heads, cfg.index_head_dim
    return params | {
        "wq_index": w.linear("indexer.wq_b", L, heads, J),
        "wk_index": w.linear("indexer.wk", D, J),
        "ww_index": w.linear("indexer.weights_proj", D, heads),
        "k_index_norm": w.take("indexer.k_norm.weight", J),
        "k_index_bias": w.take("indexer.k_norm.bias", J),
    }


LATENT, _DSA = {FULL: Layer("mla", _latent)}, {INDEXED: Layer("dsa", _with_indexer)}
_V2 = {"q_lora_rank": 1536}
_V3 = _V2 | {"rope_interleave": True}


def _picker(config: dict, index: int) -> int | None:
    """The layer whose picks a layer without an indexer takes: the last one that has one."""
    if _glm_moe_dsa_kind(config, index) != _SHARED:
        return None
    return max(i for i in range(index) if _glm_moe_dsa_kind(config, i) == INDEXED)


_GLM4 = {"q_lora_rank": 768, "qk_nope_head_dim": 192, "v_head_dim": 256, "rope_interleave": True}
_MINICPM3 = {"q_lora_rank": 768, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}

FAMILIES: dict[str, Family] = {
    "axk1": Family(_deepseek_v3, all_full, LATENT, _V3),
    "deepseek_v2": Family(_deepseek_v2, _deepseek_kind, LATENT, _V2),
    "deepseek_v3": Family(_deepseek_v3, _deepseek_kind, LATENT | _DSA, _V3),
    "deepseek_v32": Family(_deepseek_v32, _all_indexed, _DSA, _V2),
    "glm4_moe_lite": Family(_deepseek_v3, all_full, LATENT, _GLM4),
    "glm_moe_dsa": Family(
        _glm_moe_dsa, _glm_moe_dsa_kind, _DSA | {_SHARED: _DSA[INDEXED]}, {"q_lora_rank": 2048}, source=_picker
    ),
    "kimi_k2": Family(_deepseek_v3, _deepseek_kind, LATENT, _V3),
    "minicpm3": Family(_deepseek_v3, all_full, LATENT, _MINICPM3 | {"rope_interleave": False}),
    "youtu": Family(_deepseek_v3, all_full, LATENT, _V3),
}
