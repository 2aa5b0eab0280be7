"""GPT-2, its heirs, and families whose positions are learned, ALiBi's, or turn as GPT-J's: many with q, k and v in one
projection. What is added to embeddings is outside the layer.
"""

from typing import Any

from jforge.core.config import positive, reject
from jforge.hf.families.dense import FUSED
from jforge.hf.families.parts import (
    Params,
    clip,
    fields,
    fused,
    split,
    without_rope,
)
from jforge.hf.family import FULL, SLIDING, Family, Layer, all_full, listed
from jforge.hf.keys import integer, known, lack, only, rope_of, section
from jforge.hf.weights import Weights

N_EMBD = {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
D_MODEL = {"d_model": "hidden_size", "n_heads": "num_attention_heads", "n_layers": "num_hidden_layers"}
BIASES = {"attention_bias": True, "attention_output_bias": True}
OUT_PROJ = split("out_proj")
GPT2 = fused("seq", "c_attn", "c_proj", conv=True)


def every_head(config: dict, kind: str) -> dict:
    """Of old models as many key/value heads as query heads, of hidden / heads channels."""
    return {"num_key_value_heads": integer(config, "num_attention_heads"), "head_dim": None}


def _mha(*parts, **fixed):
    return without_rope(every_head, *parts, **fixed)


def _head_dim(config: dict) -> int:
    D, N = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    if D < N:
        reject("hidden_size", D, f"at least num_attention_heads={N}")
    return D // N


def _gpt2_scale(config: dict, kind: str) -> dict:
    """scale_attn_weights, and in Mistral's GPT-2 a division by the layer's number."""
    H = _head_dim(config)
    scale = H**-0.5 if config.get("scale_attn_weights", True) else 1.0
    return {"scaling": scale / (config["layer_index"] + 1 if config.get("scale_attn_by_inverse_layer_idx") else 1)}


def _bigcode(config: dict, kind: str) -> dict:
    kv_heads = 1 if config["multi_query"] else integer(config, "num_attention_heads")
    return without_rope(_gpt2_scale, **BIASES)(config | {"head_dim": None, "num_key_value_heads": kv_heads}, kind)


def _opt_bias(config: dict, kind: str) -> dict:
    return dict.fromkeys(BIASES, bool(config.get("attention_bias")))


def _gpt_neo_kind(config: dict, index: int) -> str:
    """attention_layers says global or local; attention_types says how often each run of such words is repeated."""
    known(config, layer_types=None, sliding_window=None, attention_chunk_size=None)  # transformers' cache obeys them
    words = listed(config, index, "attention_layers")
    if words is None:
        runs = config.get("attention_types") or [[["global", "local"], config["num_hidden_layers"] // 2]]
        words = [word for run, times in runs for _ in range(times) for word in run][index]
    return {"global": FULL, "local": SLIDING}[words]


def _gpt_neo_window(config: dict, kind: str) -> dict:
    return {"sliding_window": integer(config, "window_size")} if kind == SLIDING else {}


def _gpt_neo(w: Weights, cfg: Any) -> Params:
    """One module further in; only the output has a bias."""
    w.names = {name: f"attention.{name}" for name in (*(f"{x}_proj.weight" for x in "qkv"), "out_proj.weight")}
    w.names |= {"out_proj.bias": "attention.out_proj.bias"}
    return OUT_PROJ(w, cfg)


def _gptj(config: dict, kind: str) -> dict:
    """The first rotary_dim channels turn, in neighbouring pairs; of a null all of them."""
    H = _head_dim(config)
    share = integer(config, "rotary_dim", H) / H
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": share}
    return _mha(rope_layout="interleaved")(config, kind) | {"rope_parameters": rope}


def _neox(config: dict, kind: str) -> dict:
    """rotary_pct and rotary_emb_base in the files of Pythia."""
    rope = rope_of(config, kind, partial=config["partial_default"])
    return _mha(_opt_bias)(config, kind) | {"rope_parameters": rope}


def _mpt(config: dict, kind: str) -> dict:
    """attn_config has the attention's keys. transformers adds ALiBi whatever they say."""
    own = section(config, "attn_config")
    only(config, own, alibi=True, qk_ln=False, prefix_lm=False, attn_type="multihead_attention", alibi_bias_max=8)
    if own.get("softmax_scale") is not None:
        positive("softmax_scale", own["softmax_scale"])
    return _mha(alibi=True)(config, kind) | {"scaling": own.get("softmax_scale"), "clip_qkv": own.get("clip_qkv")}


def _dbrx(config: dict, kind: str) -> dict:
    """transformers turns by rope_theta beside attn_config, which the released files do not have."""
    own = section(config, "attn_config")
    base = section(config, "rope_parameters").get("rope_theta", config.get("rope_theta", 1e4))
    if own.get("rope_theta") not in (None, base):
        lack(config, f"rope_theta is {own['rope_theta']!r} in attn_config and {base!r} in transformers")
    config = config | {"num_key_value_heads": integer(own, "kv_n_heads", 1), "head_dim": None}
    return fields(clip)(config | {"clip_qkv": own.get("clip_qkv")}, kind)


def _bigcode_split(w: Weights, cfg: Any) -> Params:
    """With one key/value head the rows are in order; with as many as heads they are head by head."""
    return fused("seq" if cfg.num_key_value_heads == 1 else "head", "c_attn", "c_proj")(w, cfg)


def _ctrl(w: Weights, cfg: Any) -> Params:
    w.names = {f"{x}_proj.{part}": f"W{x}.{part}" for x in "qkv" for part in ("weight", "bias")}
    return split("dense")(w, cfg)


_WQKV = {FULL: Layer(None, fused("seq", "Wqkv", "out_proj"))}
_CODEGEN = {FULL: Layer(None, fused("codegen", "qkv_proj", "out_proj"))}
_NEO = {FULL: Layer(None, _gpt_neo), SLIDING: Layer("sliding_window", _gpt_neo)}
_NEOX_NAMES = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}

FAMILIES: dict[str, Family] = {
    "biogpt": Family(_mha(**BIASES), all_full, {FULL: Layer(None, OUT_PROJ)}),
    "bloom": Family(_mha(alibi=True, **BIASES), all_full, {FULL: Layer(None, FUSED)}, names=N_EMBD),
    "codegen": Family(_gptj, all_full, _CODEGEN, {"rotary_dim": 64}, N_EMBD),
    "ctrl": Family(_mha(**BIASES), all_full, {FULL: Layer(None, _ctrl)}, names=N_EMBD),
    "dbrx": Family(_dbrx, all_full, _WQKV, names=D_MODEL),
    "gpt2": Family(_mha(_gpt2_scale, **BIASES), all_full, {FULL: Layer(None, GPT2)}, names=N_EMBD),
    "gpt_bigcode": Family(_bigcode, all_full, {FULL: Layer(None, _bigcode_split)}, {"multi_query": True}, N_EMBD),
    "gpt_neo": Family(
        _mha(_gpt_neo_window, scaling=1.0, attention_output_bias=True), _gpt_neo_kind, _NEO, {"window_size": 256},
        {"num_heads": "num_attention_heads", "num_layers": "num_hidden_layers"},
    ),
    "gpt_neox": Family(
        _neox, all_full, {FULL: Layer(None, FUSED)}, {"attention_bias": True, "partial_default": 0.25}, _NEOX_NAMES
    ),
    "gpt_neox_japanese": Family(
        _neox, all_full, {FULL: Layer(None, FUSED)}, {"partial_default": 1.0}, _NEOX_NAMES
    ),
    "gptj": Family(_gptj, all_full, {FULL: Layer(None, OUT_PROJ)}, {"rotary_dim": 64}, N_EMBD),
    "mpt": Family(_mpt, all_full, _WQKV, names=D_MODEL),
    "opt": Family(
        _mha(_opt_bias), all_full, {FULL: Layer(None, OUT_PROJ)}, {"attention_bias": True},
        {"enable_bias": "attention_bias"},
    ),
    "xglm": Family(
        _mha(**BIASES), all_full, {FULL: Layer(None, OUT_PROJ)},
        names={"d_model": "hidden_size", "attention_heads": "num_attention_heads", "num_layers": "num_hidden_layers"},
    ),
}  # fmt: skip
