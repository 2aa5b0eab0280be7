"""Families with state-space layers: Mamba 1 and 2, the hybrids Bamba, Granite 4, Nemotron-H, Falcon-H1 and Jamba."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jforge.core.config import reject
from jforge.hf.families.dense import DENSE
from jforge.hf.families.parts import base, bias, projections
from jforge.hf.family import FULL, LINEAR, Family, Layer, listed
from jforge.hf.keys import indices, integer, known, lack, need, number, only, rope_of
from jforge.hf.weights import Weights


def _limits(value: Any) -> tuple[float, float] | None:
    """Two numbers, of which JSON may spell the infinite one as an object."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple)):
        reject("time_step_limit", value, "a list of two numbers")
    return tuple(float(x["__float__"]) if isinstance(x, dict) and "__float__" in x else x for x in value)


def _ssm(config: dict, prefix: str, **fields: Any) -> dict:
    """Mamba-2's fields where the keys have this prefix: bamba and its kin."""
    only(config, hidden_act="silu")
    heads = integer(config, f"{prefix}n_heads")
    if config[f"{prefix}d_head"] == "auto":
        width = int(number(config, f"{prefix}expand") * integer(config, "hidden_size")) // heads
    else:
        width = integer(config, f"{prefix}d_head")
    return {
        "hidden_size": integer(config, "hidden_size"), "num_heads": heads, "head_dim": width,
        "state_size": integer(config, f"{prefix}d_state"), "n_groups": integer(config, f"{prefix}n_groups"),
        "conv_kernel": integer(config, f"{prefix}d_conv"), "use_bias": bool(config[f"{prefix}proj_bias"]),
        "use_conv_bias": bool(config[f"{prefix}conv_bias"]), "rms_norm_eps": config["rms_norm_eps"],
        "time_step_limit": _limits(config.get("time_step_limit")), "norm": "gate_first", **fields,
    }  # fmt: skip


def _mamba2(config: dict, kind: str) -> dict:
    only(config, hidden_act="silu")
    names = ("hidden_size", "num_heads", "head_dim", "state_size", "n_groups", "conv_kernel")
    return {
        **{name: integer(config, name) for name in names},
        **{name: bool(config[name]) for name in ("use_bias", "use_conv_bias")},
        "time_step_limit": _limits(config.get("time_step_limit")), "rms_norm_eps": config["layer_norm_epsilon"],
        "norm": "gate_first",
    }  # fmt: skip


def _bamba(config: dict, kind: str) -> dict:
    """Half of the channels turn, whatever the file says."""
    if kind == LINEAR:
        return _ssm(config, "mamba_")
    rope = rope_of(config, kind, partial=0.5) | {"partial_rotary_factor": 0.5}
    return base(config, rope) | bias(config, kind)


def _granite(config: dict, kind: str) -> dict:
    if kind == LINEAR:
        return _ssm(config, "mamba_")
    rope = rope_of(config, kind) if config.get("position_embedding_type") == "rope" else None
    return base(config, rope) | bias(config, kind) | {"scaling": config["attention_multiplier"]}


def _falcon_h1(config: dict, kind: str) -> dict:
    """The multipliers are in the weights (`_falcon_h1_gains`), those of a layer's input and output in its block."""
    if kind == FULL:
        return base(config, rope_of(config, kind)) | bias(config, kind)
    if config["mamba_d_ssm"] is not None:
        config = config | {"mamba_expand": integer(config, "mamba_d_ssm") / integer(config, "hidden_size")}
    if bool(config["projectors_bias"]) != bool(config["mamba_proj_bias"]):
        lack(config, "projectors_bias and mamba_proj_bias differ: the two projections share a bias or have none")
    norm = ("norm_first" if config["mamba_norm_before_gate"] else "gate_first") if config["mamba_rms_norm"] else None
    return _ssm(config, "mamba_") | {"norm": norm}


def _falcon_h1_gains(config: dict, kind: str) -> dict[str, float]:
    """Multipliers of z, x, B, C and delta, of all of them together, and of keys."""
    if kind == FULL:
        return dict.fromkeys(("wk", "bk"), number(config, "key_multiplier"))
    each = config.get("ssm_multipliers") or (1.0,) * 5
    if not isinstance(each, (list, tuple)) or len(each) != 5 or not all(isinstance(one, (int, float)) for one in each):
        reject("ssm_multipliers", each, "a list of five numbers")
    out = {f"b{name}": gain for name, gain in zip(("z", "x", "k", "q", "dt"), each, strict=True)}
    return out | {f"w{name[1:]}": gain * number(config, "ssm_in_multiplier") for name, gain in out.items()}


def _nemotron_h(config: dict, kind: str) -> dict:
    """No positions; transformers limits delta from below by time_step_min and reads no time_step_limit."""
    if kind == FULL:
        known(config, sliding_window=None)
        return base(config | {"rms_norm_eps": config["layer_norm_epsilon"]}, None, head_dim=128)
    only(config, mamba_hidden_act="silu")
    return {
        "hidden_size": integer(config, "hidden_size"), "num_heads": integer(config, "mamba_num_heads"),
        "head_dim": integer(config, "mamba_head_dim"), "state_size": integer(config, "ssm_state_size"),
        "n_groups": integer(config, "n_groups"), "conv_kernel": integer(config, "conv_kernel"),
        "use_bias": bool(config["use_bias"]), "use_conv_bias": bool(config["use_conv_bias"]),
        "time_step_limit": (number(config, "time_step_min"), math.inf), "rms_norm_eps": config["layer_norm_epsilon"],
        "norm": "gate_first",
    }  # fmt: skip


_PATTERN = {"M": LINEAR, "*": FULL, "-": "mlp", "E": "moe"}
_NEMOTRON_NAMES = {
    "mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel", "mamba_dt_min": "time_step_min",
    "mamba_conv_bias": "use_conv_bias",
    "attention_head_dim": "head_dim",
}  # fmt: skip


def _nemotron_spelled(config: dict) -> dict:
    """The list of layers under any of its names; its length is the number of layers."""
    config = config | {new: config[old] for old, new in _NEMOTRON_NAMES.items() if old in config}
    kinds = config.get("layers_block_type") or config.get("layer_types")
    if kinds is None and (pattern := config.get("hybrid_override_pattern")) is not None:
        if not isinstance(pattern, str) or set(pattern) - set(_PATTERN):
            reject("hybrid_override_pattern", pattern, f"letters of {''.join(_PATTERN)}")
        kinds = [_PATTERN[letter] for letter in pattern]
    if not isinstance(kinds, (list, tuple)):
        raise ValueError("config has neither layers_block_type nor hybrid_override_pattern; one must list the layers")
    return config | {"layer_types": list(kinds), "num_hidden_layers": len(kinds)}


def _mamba1(norm: str | None, prefix: str = "", eps: str | None = None) -> Callable[[dict, str], dict]:
    """Mamba, Falcon-Mamba and Jamba, which has a prefix before its keys."""

    def fields(config: dict, kind: str) -> dict:
        if kind == FULL:
            return base(config, None)
        only(config, hidden_act="silu")
        D = integer(config, "hidden_size")
        names = ("mamba_d_state", "mamba_d_conv", "mamba_dt_rank", "mamba_proj_bias", "mamba_conv_bias", "mamba_expand")
        if not prefix:
            names = ("state_size", "conv_kernel", "time_step_rank", "use_bias", "use_conv_bias", "expand")
        state, taps, rank, own_bias, conv_bias, _ = (need(config, name) for name in names)
        channels = int(number(config, names[-1]) * D)
        channels = channels if prefix else integer(config, "intermediate_size", channels)
        return {
            "hidden_size": D, "intermediate_size": channels, "state_size": state, "conv_kernel": taps,
            "time_step_rank": math.ceil(D / 16) if rank == "auto" else rank, "use_bias": bool(own_bias),
            "use_conv_bias": bool(conv_bias), "norm": norm, "rms_norm_eps": config[eps] if eps else None,
        }  # fmt: skip

    return fields


def _jamba_kind(config: dict, index: int) -> str:
    period, offset = integer(config, "attn_layer_period"), config["attn_layer_offset"]
    return FULL if index % period == offset else LINEAR


def _ssm_weights(w: Weights, cfg: Any) -> dict[str, np.ndarray]:
    """in_proj has [z | x | B | C | dt], the convolution [x | B | C]."""
    D, N, V, K, H = cfg.hidden_size, cfg.num_heads, cfg.head_dim, cfg.n_groups, cfg.state_size
    shapes = {"z": (N, V), "x": (N, V), "k": (K, H), "q": (K, H), "dt": (N,)}
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    parts = np.split(w.linear("in_proj", D, int(ends[-1])), ends[:-1], axis=1)
    params = {f"w{x}": part.reshape(D, *shape) for (x, shape), part in zip(shapes.items(), parts, strict=True)}
    if cfg.use_bias:
        parts = np.split(w.take("in_proj.bias", int(ends[-1])), ends[:-1])
        params |= {f"b{x}": part.reshape(shape) for (x, shape), part in zip(shapes.items(), parts, strict=True)}
    params |= w.conv("conv1d", cfg.conv_kernel, N * V + 2 * K * H, cfg.use_conv_bias)
    params |= {"a_log": w.take("A_log", N), "skip": w.take("D", N), "dt_bias": w.take("dt_bias", N)}
    if cfg.norm:
        params |= {"o_norm": w.vector("norm.weight", N, V)}
    return params | w.output("out_proj", N, V, D, cfg.use_bias)


def _selective_weights(w: Weights, cfg: Any) -> dict[str, np.ndarray]:
    """Mamba: in_proj has [x | z], x_proj [dt | B | C]."""
    D, X, H, R = cfg.hidden_size, cfg.intermediate_size, cfg.state_size, cfg.time_step_rank
    wx, wz = np.split(w.linear("in_proj", D, 2 * X), 2, axis=1)
    dt, k, q = np.split(w.linear("x_proj", X, R + 2 * H), [R, R + H], axis=1)
    params = {"wx": wx, "wz": wz, "w_dt_in": dt, "wk": k, "wq": q, "w_dt": w.linear("dt_proj", R, X)}
    params |= w.conv("conv1d", cfg.conv_kernel, X, cfg.use_conv_bias) | {"dt_bias": w.take("dt_proj.bias", X)}
    params |= {"a_log": w.take("A_log", X, H), "skip": w.take("D", X), "wo": w.linear("out_proj", X, D)}
    if cfg.use_bias:
        params["bx"], params["bz"] = np.split(w.take("in_proj.bias", 2 * X), 2)
        params["bo"] = w.take("out_proj.bias", D)
    if cfg.norm == "weighted":
        norms = {"dt_norm": ("dt", R), "k_norm": ("b", H), "q_norm": ("c", H)}
        params |= {name: w.take(f"{x}_layernorm.weight", size) for name, (x, size) in norms.items()}
    return params


def _all_linear(config: dict, index: int) -> str:
    return LINEAR


def _side_by_side(config: dict, index: int) -> tuple[str, str]:
    return LINEAR, FULL


def _bamba_kind(config: dict, index: int) -> str:
    return FULL if index in (indices(config, "attn_layer_indices") or ()) else LINEAR


def _listed_kind(config: dict, index: int) -> str:
    return listed(config, index) or LINEAR


_PARTS = {"mamba_expand": 2, "mamba_n_heads": 128, "mamba_d_head": "auto", "mamba_n_groups": 1, "mamba_d_state": 256,
          "mamba_d_conv": 4, "mamba_conv_bias": True, "mamba_proj_bias": False}  # fmt: skip
_MAMBA2 = {"num_heads": 128, "head_dim": 64, "state_size": 128, "n_groups": 8, "conv_kernel": 4, "use_bias": False,
           "use_conv_bias": True, "layer_norm_epsilon": 1e-5}  # fmt: skip
_NEMOTRON = {"mamba_num_heads": 128, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4,
             "use_bias": False, "use_conv_bias": True, "time_step_min": 0.001, "layer_norm_epsilon": 1e-5,
             "num_key_value_heads": 8}  # fmt: skip
_MAMBA1 = {"state_size": 16, "conv_kernel": 4, "time_step_rank": "auto", "use_bias": False, "use_conv_bias": True,
           "expand": 2, "mixer_rms_eps": 1e-6}  # fmt: skip
_JAMBA = {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_dt_rank": "auto", "mamba_proj_bias": False,
          "mamba_conv_bias": True, "mamba_expand": 2, "attn_layer_period": 8, "attn_layer_offset": 4,
          "rms_norm_eps": 1e-6, "num_key_value_heads": 8}  # fmt: skip
_FALCON_H1 = _PARTS | {"mamba_d_ssm": 1024, "mamba_rms_norm": False, "mamba_norm_before_gate": True,
                       "projectors_bias": False, "key_multiplier": 1.0, "ssm_in_multiplier": 1.0,
                       "rms_norm_eps": 1e-5, "num_key_value_heads": 8}  # fmt: skip
_BESIDE = DENSE | {LINEAR: Layer("mamba2", _ssm_weights, "mamba")}
_SELECTIVE = {LINEAR: Layer("mamba1", _selective_weights, "mixer")}

FAMILIES: dict[str, Family] = {
    "bamba": Family(_bamba, _bamba_kind, _BESIDE, _PARTS | {"rms_norm_eps": 1e-5, "num_key_value_heads": 8}),
    "falcon_h1": Family(
        _falcon_h1, _side_by_side, _BESIDE, _FALCON_H1, gains=_falcon_h1_gains
    ),
    "falcon_mamba": Family(_mamba1("plain", eps="mixer_rms_eps"), _all_linear, _SELECTIVE, _MAMBA1),
    "granitemoehybrid": Family(
        _granite, _listed_kind, _BESIDE, _PARTS | {"rms_norm_eps": 1e-6, "attention_multiplier": 1.0}
    ),
    "jamba": Family(
        _mamba1("weighted", "mamba_", "rms_norm_eps"), _jamba_kind,
        DENSE | {LINEAR: Layer("mamba1", _selective_weights, "mamba")}, _JAMBA,
    ),
    "mamba": Family(_mamba1(None), _all_linear, _SELECTIVE, _MAMBA1),
    "mamba2": Family(_mamba2, _all_linear, {LINEAR: Layer("mamba2", _ssm_weights, "mixer")}, _MAMBA2),
    "nemotron_h": Family(
        _nemotron_h, listed, {FULL: Layer(None, projections, "mixer"), LINEAR: Layer("mamba2", _ssm_weights, "mixer")},
        _NEMOTRON, completed=_nemotron_spelled, without_cache=("mlp", "moe"),
    ),
}  # fmt: skip
