"""DeepSeek-V4: windows, each alone or beside entries of compressed blocks.

What a layer compresses and how it turns is spelled in two ways, which may be mixed:

    released files                                          transformers
    compress_ratios: 0, 4 or 128 a layer                    layer_types, and compress_rates by layer type
    rope_theta of layers that do not compress,              rope_parameters.main,
    compress_rope_theta and rope_scaling of those that do   rope_parameters.compress
    qk_rope_head_dim                                        partial_rotary_factor

Hash layers, experts and hyper-connections are not attention, and prediction heads are no layers: none is looked at.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jforge.core.config import positive, reject
from jforge.hf.family import SLIDING, Family, Layer, listed
from jforge.hf.keys import integer, only, rope_of, section
from jforge.hf.weights import Weights

_SPARSE, _HEAVY = "compressed_sparse_attention", "heavily_compressed_attention"
_KINDS = {0: SLIDING, 4: _SPARSE, 128: _HEAVY}  # by ratio
_RATES = {_SPARSE: ("compress_rate_csa", 4), _HEAVY: ("compress_rate_hca", 128)}  # old key, default
_NESTED = ("main", "compress")
RELEASED = {  # names of weights in transformers: those of the released files
    "q_a_proj.weight": "wq_a.weight",
    "q_a_norm.weight": "q_norm.weight",
    "q_b_proj.weight": "wq_b.weight",
    "kv_proj.weight": "wkv.weight",
    "kv_norm.weight": "kv_norm.weight",
    "sinks": "attn_sink",
    "o_a_proj.weight": "wo_a.weight",
    "o_b_proj.weight": "wo_b.weight",
    "compressor.kv_proj.weight": "compressor.wkv.weight",
    "compressor.gate_proj.weight": "compressor.wgate.weight",
    "compressor.position_bias": "compressor.ape",
    "compressor.kv_norm.weight": "compressor.norm.weight",
    "compressor.indexer.q_b_proj.weight": "indexer.wq_b.weight",
    "compressor.indexer.scorer.weights_proj.weight": "indexer.weights_proj.weight",
    "compressor.indexer.kv_proj.weight": "indexer.compressor.wkv.weight",
    "compressor.indexer.gate_proj.weight": "indexer.compressor.wgate.weight",
    "compressor.indexer.position_bias": "indexer.compressor.ape",
    "compressor.indexer.kv_norm.weight": "indexer.compressor.norm.weight",
}


def _kind(config: dict, index: int) -> str:
    """The layer type; both spellings must agree. The order that the class of transformers makes up is no model's."""
    named, ratio = listed(config, index), _ratio(config, index)
    if ratio is None:
        if named is None:
            raise ValueError("config has neither layer_types nor compress_ratios; one must list the kinds of layers")
        return named
    found = _KINDS[ratio]
    if named not in (None, found):
        reject("layer_types", config["layer_types"], f"{found} in layer {index}, as compress_ratios says {ratio}")
    if found in _RATES and (rate := _rate(config, found)) != ratio:
        reject("compress_ratios", ratio, f"{rate} in layer {index}, as compress_rates says for {found}")
    return found


def _ratio(config: dict, index: int) -> int | None:
    """The layer's entry of compress_ratios, None without the list. Entries behind the last layer are of other heads."""
    entries = config.get("compress_ratios")
    if entries is None:
        return None
    count = config["num_hidden_layers"]
    if not isinstance(entries, (list, tuple)) or len(entries) < count:
        reject("compress_ratios", entries, f"a list of num_hidden_layers={count} entries or more")
    ratio = entries[index]
    if isinstance(ratio, bool) or not isinstance(ratio, int) or ratio not in _KINDS:
        allowed = "0 (window), 4 (compressed sparse) and 128 (heavily compressed)"
        raise NotImplementedError(f"compress_ratios has {ratio!r} for layer {index}; only {allowed} have a mechanism")
    return ratio


def _fields(config: dict, kind: str) -> dict:
    """Keyword arguments of the Config of a layer of this kind."""
    only(config, attention_bias=False)
    if (kv_heads := integer(config, "num_key_value_heads", 1)) != 1:
        reject("num_key_value_heads", kv_heads, "1, since all heads share one vector a token")
    head_dim, eps = integer(config, "head_dim", 512), config["rms_norm_eps"]
    positive("rms_norm_eps", eps)
    rope, turning = _rope(config, kind, head_dim)
    rope.pop("partial_rotary_factor", None)  # of head_dim; jforge counts the channels that turn
    out = {
        "hidden_size": integer(config, "hidden_size"),
        "num_attention_heads": integer(config, "num_attention_heads"),
        "head_dim": head_dim,
        "qk_rope_head_dim": turning,
        "q_lora_rank": integer(config, "q_lora_rank", 1024),
        "o_groups": integer(config, "o_groups", 8),
        "o_lora_rank": integer(config, "o_lora_rank", 1024),
        "sliding_window": integer(config, "sliding_window"),
        "rms_norm_eps": eps,
        "rope_parameters": rope,
    }
    if kind == SLIDING:
        return out
    out["compress_rate"] = _rate(config, kind)
    if kind == _HEAVY:
        return out
    index = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 512}
    return out | {key: integer(config, key, default) for key, default in index.items()}


def _rate(config: dict, kind: str) -> int:
    """m, the tokens of a block. The old key of a kind of layer wins over the entry of compress_rates, as there."""
    old, default = _RATES[kind]
    if config.get(old) is not None:
        return integer(config, old)
    if config.get("compress_rates") is None:
        return default
    rates = section(config, "compress_rates")
    if rates.get(kind) is None:
        raise ValueError(f"compress_rates has no entry for {kind}")
    return integer(rates, kind)


def _rope(config: dict, kind: str, head_dim: int) -> tuple[dict, int]:
    """(rope_parameters, how many channels turn) of a layer of this kind.

    A nested dict is read alone: transformers then sets a qk_rope_head_dim that it does not use. A flat one describes
    the scaling of layers that compress. YaRN leaves cos and sin as they are: transformers writes an attention_factor
    of 1 into a flat dict, and would compute another one for a nested dict that has none.
    """
    given = section(config, "rope_scaling") or section(config, "rope_parameters")
    label = "main" if kind == SLIDING else "compress"
    if not any(key in given for key in _NESTED):
        return _flat_rope(config, kind, given, head_dim)
    for key in _NESTED:
        if not section(given, key):
            raise ValueError(f"rope_parameters has no entry for {key}")
    own = section(given, label)
    partial = own.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial is None:
        raise ValueError(f"rope_parameters.{label} has no partial_rotary_factor: transformers would turn every channel")
    if label == "compress" and own.get("rope_theta") is None:
        raise ValueError("rope_parameters.compress has no rope_theta: transformers would take that of the other layers")
    rope = rope_of(config | {"rope_scaling": None, "rope_parameters": {kind: own}}, kind, partial=1.0)
    if rope["rope_type"] == "yarn" and "attention_factor" not in rope:
        raise ValueError(f"rope_parameters.{label} has no attention_factor: transformers would not take it as 1")
    return rope, _turning(head_dim, partial)


def _flat_rope(config: dict, kind: str, given: Mapping, head_dim: int) -> tuple[dict, int]:
    """A theta and a share of channels in the dict have no effect in transformers: they must repeat those beside it."""
    beside, default = ("rope_theta", 1e4) if kind == SLIDING else ("compress_rope_theta", 1.6e5)
    partial, width = config.get("partial_rotary_factor"), integer(config, "qk_rope_head_dim", None)
    if partial is None:
        partial = 64 / 512 if width is None else width / head_dim
    main = 1e4 if config.get("rope_theta") is None else config["rope_theta"]
    for key, used in (("rope_theta", main), ("partial_rotary_factor", partial)):
        if given.get(key) not in (None, used):
            reject(f"{key} in rope_parameters", given[key], f"{used}, as beside it: there alone transformers reads it")
    own = {} if kind == SLIDING else {k: v for k, v in given.items() if k not in ("rope_theta", "truncate")}
    alone = {"rope_theta": config.get(beside), "rope_scaling": None, "rope_parameters": own}
    rope = rope_of(config | alone, kind, theta=default, partial=1.0)
    positive(beside, rope["rope_theta"])
    turning = _turning(head_dim, partial)
    if width not in (None, turning):
        reject("qk_rope_head_dim", width, f"{turning}, partial_rotary_factor={partial} of head_dim={head_dim}")
    return rope, turning


def _turning(head_dim: int, partial: Any) -> int:
    """How many channels turn, as transformers rounds it."""
    positive("partial_rotary_factor", partial)
    return int(head_dim * partial)


def _window(w: Weights, cfg: Any) -> dict[str, np.ndarray]:
    """o_a holds, group by group, its [rank, heads * H]; released files have names of their own."""
    if not w.prefix.endswith("self_attn."):
        w.names = RELEASED
    D, N, H, L = cfg.hidden_size, cfg.num_attention_heads, cfg.head_dim, cfg.q_lora_rank
    g, rank = cfg.o_groups, cfg.o_lora_rank
    down = w.take("o_a_proj.weight", g * rank, N // g * H).reshape(g, rank, N // g, H)
    return {
        "wq_a": w.linear("q_a_proj", D, L),
        "q_norm": w.take("q_a_norm.weight", L),
        "wq_b": w.linear("q_b_proj", L, N, H),
        "wkv": w.linear("kv_proj", D, H),
        "kv_norm": w.take("kv_norm.weight", H),
        "sinks": w.take("sinks", N),
        "wo_a": down.transpose(0, 2, 3, 1),
        "wo_b": w.linear("o_b_proj", g * rank, D).reshape(g, rank, D),
    }


def _heavy(w: Weights, cfg: Any) -> dict[str, np.ndarray]:
    return _window(w, cfg) | _compressor(w, cfg, "compressor.", "c", cfg.head_dim, series=1)


def _sparse(w: Weights, cfg: Any) -> dict[str, np.ndarray]:
    """Channels of a compressor: the series for the next entry, then that for the entry of the token's own block."""
    D, L, heads, J = cfg.hidden_size, cfg.q_lora_rank, cfg.index_n_heads, cfg.index_head_dim
    branch = "compressor.indexer."
    return (
        _window(w, cfg)
        | _compressor(w, cfg, "compressor.", "c", cfg.head_dim, series=2)
        | _compressor(w, cfg, branch, "ic", J, series=2)
        | {
            "wq_index": w.linear(f"{branch}q_b_proj", L, heads, J),
            "ww_index": w.linear(f"{branch}scorer.weights_proj", D, heads),
        }
    )


def _compressor(w: Weights, cfg: Any, path: str, name: str, width: int, series: int) -> dict[str, np.ndarray]:
    D, X = cfg.hidden_size, series * width
    return {
        f"w{name}_kv": w.linear(f"{path}kv_proj", D, X),
        f"w{name}_gate": w.linear(f"{path}gate_proj", D, X),
        f"{name}_bias": w.take(f"{path}position_bias", cfg.compress_rate, X),
        f"{name}_norm": w.take(f"{path}kv_norm.weight", width),
    }


_LAYERS = {SLIDING: Layer("v4_window", _window), _SPARSE: Layer("csa", _sparse), _HEAVY: Layer("hca", _heavy)}

FAMILIES = {"deepseek_v4": Family(_fields, _kind, _LAYERS, {"sliding_window": 128, "rms_norm_eps": 1e-6})}
