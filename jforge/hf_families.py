"""What the attention of each model family has: the fields of a layer's Config. Which layer is of which kind: hf_kinds.

One small function per family; FAMILIES is the table. Keys that a file may omit take the default of the transformers
5.23 config class, since that is what such a file means.
Source: configuration_*.py and modeling_*.py of transformers 5.23.0.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from jforge import hf_deepseek as latent
from jforge import hf_deepseek_v4
from jforge import hf_kinds as kinds
from jforge.core.config import positive, reject
from jforge.hf_keys import integer, is_nested, only, rope_of, section
from jforge.hf_kinds import BLOCKS, FULL, INDEXED, LINEAR, SHARED, SLIDING

_DENSE = {FULL: None}
_WINDOWS = {FULL: None, SLIDING: "sliding_window"}
_SINKS = {FULL: "sinks", SLIDING: "sinks"}
_LATENT = {FULL: "mla"}
_INDEXED = {INDEXED: "dsa"}
_LIGHTNING = {FULL: None, LINEAR: "lightning"}
_BLOCK_SPARSE = {FULL: None, BLOCKS: "msa"}
_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_MINIMAX_M3_ALWAYS = {
    "use_gemma_norm": True,
    "use_qk_norm": True,
    "qk_norm_type": "per_head",
    "attention_output_gate": False,
}
_INDEX_KEYS = {  # transformers' key: the checkpoint's, the default of the class
    "index_n_heads": ("sparse_num_index_heads", 4),
    "index_head_dim": ("sparse_index_dim", 128),
    "index_block_size": ("sparse_block_size", 128),
    "index_topk_blocks": ("sparse_topk_blocks", 16),
    "index_local_blocks": ("sparse_local_block", 1),
}


class Family(NamedTuple):
    """What differs from model to model."""

    fields: Callable[[dict, str], dict]  # (config, kind) -> keyword arguments of Config
    kind: Callable[[dict, int], str]  # (config, layer) -> one of transformers' layer types
    mechanisms: Mapping[str, str | None] = _DENSE  # by kind; None: the dense one that the numbers of heads say


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


def _minimax(config: dict, kind: str) -> dict:
    """MiniMax-01. rms_norm_eps is not lightning's: all code builds that norm with 1e-6 whatever the file says."""
    only(config, "sliding_window", None)
    fields = _base(config, None, kv_heads=8, eps=1e-5)
    if kind == LINEAR:
        only(config, "hidden_act", "silu")
        heads = fields["num_attention_heads"]
        if config["model_type"] == "minimax" and heads & (heads - 1):
            raise NotImplementedError(
                f"num_attention_heads is {heads}: for a number that is no power of two the slopes of transformers are "
                "not those of MiniMax's code"
            )
        own = {name: fields[name] for name in ("hidden_size", "num_attention_heads", "head_dim")}
        sizes = {"num_hidden_layers": config["num_hidden_layers"], "block_size": integer(config, "block_size", 256)}
        return own | sizes
    return fields | {"rope_parameters": _minimax_rope(config, kind, fields)}


def _minimax_rope(config: dict, kind: str, fields: dict) -> dict:
    """rotary_dim, a checkpoint's key, counts the channels that turn. Without it all do: transformers' minimax obeys no
    partial_rotary_factor.
    """
    head_dim = fields["head_dim"] or max(1, fields["hidden_size"] // fields["num_attention_heads"])  # Config refuses 0
    turning = integer(config, "rotary_dim", head_dim)
    return rope_of(config, kind, theta=1e6, partial=1.0) | {"partial_rotary_factor": turning / head_dim}


def _minimax_m3(config: dict, kind: str) -> dict:
    """Keys that the checkpoint has and transformers does not read must say what transformers does."""
    for key, value in _MINIMAX_M3_ALWAYS.items():
        only(config, key, value)
    fields = _base(config, rope_of(config, kind, theta=5e6, partial=1.0), kv_heads=4, head_dim=128)
    fields |= {"qk_norm": "head", "norm_offset": 1.0}
    return fields if kind == FULL else fields | _index_branch(config, fields["num_key_value_heads"])


def _index_branch(config: dict, kv_heads: int) -> dict:
    """The checkpoint's section wins over the flat keys of transformers, as there; sparse_init_block only it has."""
    sparse = section(config, "sparse_attention_config")
    for key, value in (("use_sparse_attention", True), ("sparse_score_type", "max")):
        only(sparse, key, value)
    given = {flat: integer(sparse, key, integer(config, flat, default)) for flat, (key, default) in _INDEX_KEYS.items()}
    if given["index_n_heads"] != kv_heads:
        reject("index_n_heads", given["index_n_heads"], f"num_key_value_heads={kv_heads}: one for each")
    del given["index_n_heads"]
    return given | {"index_init_blocks": sparse.get("sparse_init_block")}


def _falcon(config: dict, kind: str) -> dict:
    """num_kv_heads counts only in the new architecture; without it multi_query (the default) means one head."""
    if config.get("alibi"):
        raise NotImplementedError("alibi is true: falcon with ALiBi biases has no mechanism")
    kv_heads = 1 if config.get("multi_query", True) else None
    if config.get("new_decoder_architecture"):
        kv_heads = config.get("num_kv_heads")
    own = config | {"num_key_value_heads": kv_heads, "head_dim": None, "attention_bias": config.get("bias")}
    return _base(own, rope_of(config, kind)) | _bias(own)


FAMILIES: dict[str, Family] = {
    "deepseek_v2": Family(latent.deepseek_v2, kinds.deepseek, _LATENT),
    "deepseek_v3": Family(latent.deepseek_v3, kinds.deepseek, _LATENT | _INDEXED),
    "deepseek_v32": Family(latent.deepseek_v32, kinds.all_indexed, _INDEXED),
    "deepseek_v4": Family(hf_deepseek_v4.fields, hf_deepseek_v4.kind, hf_deepseek_v4.MECHANISMS),
    "falcon": Family(_falcon, kinds.all_full),
    "gemma2": Family(_gemma2, kinds.every(2, SLIDING), _WINDOWS),
    "gemma3": Family(_gemma3, kinds.every(6, SLIDING, "sliding_window_pattern"), _WINDOWS),
    "gemma3_text": Family(_gemma3, kinds.every(6, SLIDING, "sliding_window_pattern"), _WINDOWS),
    "glm_moe_dsa": Family(latent.glm_moe_dsa, kinds.glm_moe_dsa, _INDEXED | {SHARED: "dsa"}),
    "gpt_oss": Family(_gpt_oss, kinds.every(2, SLIDING), _SINKS),
    "kimi_k2": Family(latent.deepseek_v3, kinds.deepseek, _LATENT),
    "kimi_linear": Family(latent.kimi_linear, kinds.kimi_linear, _LATENT),
    "llama": Family(_llama, kinds.all_full),
    "minimax": Family(_minimax, kinds.minimax, _LIGHTNING),
    "minimax_m1": Family(_minimax, kinds.minimax, _LIGHTNING),
    "minimax_m2": Family(_minimax_m2, kinds.minimax_m2),
    "minimax_m3_vl": Family(_minimax_m3, kinds.minimax_m3, _BLOCK_SPARSE),
    "minimax_m3_vl_text": Family(_minimax_m3, kinds.minimax_m3, _BLOCK_SPARSE),
    "minimax_text_01": Family(_minimax, kinds.minimax, _LIGHTNING),
    "mistral": Family(_mistral, kinds.mistral, _WINDOWS),
    "olmo2": Family(_olmo2, kinds.all_full),
    "qwen2": Family(_qwen2, kinds.qwen, _WINDOWS),
    "qwen3": Family(_qwen3, kinds.qwen, _WINDOWS),
    "qwen3_moe": Family(_qwen3_moe, kinds.qwen3_moe, _WINDOWS),
    "qwen3_next": Family(_qwen3_next, kinds.every(4, LINEAR, "full_attention_interval")),
}
