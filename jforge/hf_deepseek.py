"""What latent attention has in each model family, with and without an indexer: DeepSeek, Kimi and GLM-5.

Functions of (config, kind) for the table of hf_families.
Source: configuration_*.py and modeling_*.py of transformers 5.23.0.
"""

from typing import Any

from jforge.core.config import reject
from jforge.hf_keys import integer, need, only, rope_of
from jforge.hf_kinds import INDEXED, SHARED


def deepseek_v2(config: dict, kind: str) -> dict:
    return _mla(config, rope_of(config, kind))


def deepseek_v3(config: dict, kind: str) -> dict:
    """Kimi-K2 is the same under another name. A checkpoint may have its rope rows sorted into halves."""
    if kind == INDEXED:
        need(config, "index_topk")
        return deepseek_v32(config, kind)
    layout = "interleaved" if config.get("rope_interleave", True) else "half"
    return _mla(config, rope_of(config, kind)) | {"rope_layout": layout}


def deepseek_v32(config: dict, kind: str) -> dict:
    """Its index heads turn in halves. It shares no picks: files that ask for it are GLM-5.2's."""
    for key, value in (("indexer_types", None), ("index_topk_pattern", None), ("index_topk_freq", 1)):
        only(config, key, value)
    return _mla(config, rope_of(config, INDEXED)) | _indexer(config, kind, heads=64, interleaved=False)


def glm_moe_dsa(config: dict, kind: str) -> dict:
    """GLM-5, whose index heads turn in pairs, and GLM-5.2, where most layers take the picks of one before them."""
    fields = _mla(config, rope_of(config, INDEXED), q_lora_rank=2048, qk_nope_head_dim=192, v_head_dim=256)
    return fields | _indexer(config, kind, heads=32, interleaved=True)


def kimi_linear(config: dict, kind: str) -> dict:
    """NoPE: the rope slice exists and is not rotated, whatever rope_theta says."""
    if not config.get("mla_use_nope", True):
        raise NotImplementedError("mla_use_nope is false, but the kimi_linear of transformers never rotates")
    if config.get("mla_use_output_gate"):
        raise NotImplementedError("mla_use_output_gate is true: a gate on the output of MLA is in no Config")
    return _mla(config, None, q_lora_rank=None)


def _mla(
    config: dict,
    rope: dict | None,
    *,
    q_lora_rank: int | None = 1536,
    qk_nope_head_dim: int = 128,
    v_head_dim: int = 128,
) -> dict:
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
        "qk_nope_head_dim": integer(config, "qk_nope_head_dim", qk_nope_head_dim),
        "qk_rope_head_dim": integer(config, "qk_rope_head_dim", 64),
        "v_head_dim": integer(config, "v_head_dim", v_head_dim),
        "attention_bias": bool(config.get("attention_bias")),
        "rope_parameters": rope,
    }


def _indexer(config: dict, kind: str, *, heads: int, interleaved: bool) -> dict[str, Any]:
    """The layouts of RoPE are the family's. Some files name them, though transformers reads neither key."""
    only(config, "rope_interleave", True)
    only(config, "indexer_rope_interleave", interleaved)
    return {
        "index_n_heads": integer(config, "index_n_heads", heads),
        "index_head_dim": integer(config, "index_head_dim", 128),
        "index_topk": integer(config, "index_topk", 2048),
        "index_rope_layout": "interleaved" if interleaved else "half",
        "index_shared": kind == SHARED,
    }
