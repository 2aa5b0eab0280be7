"""MiniMax: 01 with lightning and softmax layers, M2 with softmax alone, M3 with dense and block-sparse layers."""

from typing import Any

import numpy as np

from jforge.core.config import reject
from jforge.hf.families.dense import DENSE, base, projections
from jforge.hf.family import FULL, LINEAR, Family, Layer, all_full, listed
from jforge.hf.keys import integer, known, lack, only, rope_of, section
from jforge.hf.weights import Weights

_BLOCKS = "minimax_m3_sparse"  # MSA
_INDEX_KEYS = {  # transformers' key: the checkpoint's, the default of the class
    "index_n_heads": ("sparse_num_index_heads", 4),
    "index_head_dim": ("sparse_index_dim", 128),
    "index_block_size": ("sparse_block_size", 128),
    "index_topk_blocks": ("sparse_topk_blocks", 16),
    "index_local_blocks": ("sparse_local_block", 1),
}


def _minimax(config: dict, kind: str) -> dict:
    """rms_norm_eps is not lightning's: all code builds that norm with 1e-6 whatever the file says."""
    known(config, sliding_window=None)
    fields = base(config, None)
    if kind != LINEAR:
        return fields | {"rope_parameters": _rope(config, kind, fields)}
    only(config, hidden_act="silu")
    heads = fields["num_attention_heads"]
    if config["model_type"] == "minimax" and heads & (heads - 1):
        slopes = "for a number that is no power of two the slopes of transformers are not those of MiniMax's code"
        lack(config, f"num_attention_heads is {heads}: {slopes}")
    own = {name: fields[name] for name in ("hidden_size", "num_attention_heads", "head_dim")}
    return own | {"num_hidden_layers": config["num_hidden_layers"], "block_size": integer(config, "block_size", 256)}


def _rope(config: dict, kind: str, fields: dict) -> dict:
    """rotary_dim, a checkpoint's key, counts the channels that turn. Without it all do: transformers' minimax obeys no
    partial_rotary_factor.
    """
    head_dim = fields["head_dim"] or max(1, fields["hidden_size"] // fields["num_attention_heads"])  # Config refuses 0
    turning = integer(config, "rotary_dim", head_dim)
    return rope_of(config, kind, theta=1e6, partial=1.0) | {"partial_rotary_factor": turning / head_dim}


def _minimax_kind(config: dict, index: int) -> str:
    """Checkpoints list 0 for lightning and 1 for softmax. Their list comes first: where layer_types is missing, the
    class of transformers fills in an alternation that no checkpoint has.
    """
    if (entry := listed(config, index, "attn_type_list")) is not None:
        if entry not in (0, 1):
            reject("attn_type_list", config["attn_type_list"], "a list of 0 (lightning) and 1 (softmax)")
        return LINEAR if entry == 0 else FULL
    if (kind := listed(config, index)) is None:
        raise ValueError("config has neither attn_type_list nor layer_types; one must list the kinds of layers")
    return kind


def _lightning(w: Weights, cfg: Any) -> dict[str, np.ndarray]:
    """qkv_proj holds, head by head, [query | key | value]; one norm over all heads."""
    D, N, H = cfg.hidden_size, cfg.num_attention_heads, cfg.head_dim
    fused = w.linear("qkv_proj", D, N, 3, H)
    params = {f"w{x}": fused[:, :, i] for i, x in enumerate("qkv")}
    params |= {"wg": w.linear("output_gate", D, N, H), "o_norm": w.vector("norm.weight", N, H)}
    return params | w.output("out_proj", N, H, D)


def _minimax_m2(config: dict, kind: str) -> dict:
    """Checkpoints spell partial rotation as rotary_dim."""
    fields = base(config, None, head_dim=128)
    partial = integer(config, "rotary_dim", fields["head_dim"]) / fields["head_dim"]
    return fields | {"rope_parameters": rope_of(config, kind, theta=5e6, partial=partial), "qk_norm": "flat"}


def _minimax_m2_kind(config: dict, index: int) -> str:
    """Checkpoints list 1 for softmax attention; a 0 would be a lightning layer, as in MiniMax-Text-01."""
    return LINEAR if listed(config, index, "attn_type_list") == 0 else all_full(config, index)


def _minimax_m3(config: dict, kind: str) -> dict:
    """Keys that the checkpoint has and transformers does not read must say what transformers does."""
    only(config, use_gemma_norm=True, use_qk_norm=True, qk_norm_type="per_head", attention_output_gate=False)
    fields = base(config, rope_of(config, kind, theta=5e6, partial=1.0), head_dim=128)
    fields |= {"qk_norm": "head", "norm_offset": 1.0}
    return fields if kind == FULL else fields | _index_branch(config, fields["num_key_value_heads"])


def _index_branch(config: dict, kv_heads: int) -> dict:
    """The checkpoint's section wins over the flat keys of transformers, as there; sparse_init_block only it has."""
    sparse = section(config, "sparse_attention_config")
    known(sparse, use_sparse_attention=True)
    only(config, sparse, sparse_score_type="max")
    given = {flat: integer(sparse, key, integer(config, flat, default)) for flat, (key, default) in _INDEX_KEYS.items()}
    if (heads := given.pop("index_n_heads")) != kv_heads:
        reject("index_n_heads", heads, f"num_key_value_heads={kv_heads}: one for each")
    return given | {"index_init_blocks": sparse.get("sparse_init_block")}


def _minimax_m3_kind(config: dict, index: int) -> str:
    """Checkpoints list 1 for block-sparse layers, in a section of their own. It could also ask for layers whose index
    branch adds values to the output; no released model has them, nor has MSA.
    """
    flat = {**config, **section(config, "sparse_attention_config")}
    if (kind := listed(config, index)) is None:
        if (entry := listed(flat, index, "sparse_attention_freq")) is None:
            names = "neither layer_types nor sparse_attention_config.sparse_attention_freq"
            raise ValueError(f"config has {names}; one must list the kinds of layers")
        kind = _BLOCKS if entry else FULL
    if kind == _BLOCKS and listed(flat, index, "sparse_disable_index_value") == 0:
        raise NotImplementedError(f"layer {index} has index values, as sparse_disable_index_value says; MSA has none")
    return kind


def _with_index(w: Weights, cfg: Any) -> dict[str, np.ndarray]:
    """An index branch beside the projections, `indexer.q_proj` in transformers, `index_q_proj` in checkpoints."""
    D, K, J = cfg.hidden_size, cfg.num_key_value_heads, cfg.index_head_dim
    branch = "index_" if "index_q_proj.weight" in w.found else "indexer."
    return projections(w, cfg) | {
        "wq_index": w.linear(f"{branch}q_proj", D, K, J),
        "wk_index": w.linear(f"{branch}k_proj", D, J),
        "q_index_norm": w.take(f"{branch}q_norm.weight", J),
        "k_index_norm": w.take(f"{branch}k_norm.weight", J),
    }


_01_DEFAULTS = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5}
_01 = Family(_minimax, _minimax_kind, DENSE | {LINEAR: Layer("lightning", _lightning)}, _01_DEFAULTS)
_M3 = Family(_minimax_m3, _minimax_m3_kind, DENSE | {_BLOCKS: Layer("msa", _with_index)}, {"num_key_value_heads": 4})

FAMILIES: dict[str, Family] = {
    "minimax": _01,
    "minimax_m1": _01,
    "minimax_m2": Family(_minimax_m2, _minimax_m2_kind, DENSE, {"num_key_value_heads": 8}),
    "minimax_m3_vl": _M3,
    "minimax_m3_vl_text": _M3,
    "minimax_text_01": _01,
}
