"""Families with delta rules: Qwen3-Next and 3.5, Olmo-Hybrid, Kimi-Linear, Ling and GLM-5.3-Flash."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jforge.hf.families.dense import DENSE
from jforge.hf.families.latent import LATENT, kimi_kind, kimi_latent
from jforge.hf.families.parts import base, bias
from jforge.hf.family import FULL, LINEAR, Family, Layer, every
from jforge.hf.keys import integer, lack, only, rope_of, section
from jforge.hf.weights import Weights


def _delta(config: dict, **fields: Any) -> dict:
    """A gated delta net's fields."""
    only(config, hidden_act="silu")
    names = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
    sizes = {name: integer(config, name) for name in ("hidden_size", *names, "linear_conv_kernel_dim")}
    return sizes | {"rms_norm_eps": config["rms_norm_eps"]} | fields


def _qwen3(config: dict, kind: str) -> dict:
    """Qwen3-Next and 3.5; the keys of a multimodal RoPE change nothing for text alone."""
    if kind == LINEAR:
        return _delta(config, output_gate_type=config.get("output_gate_type"))
    return _gated(config, kind)


def _gated(config: dict, kind: str) -> dict:
    """The full layers: a quarter of the channels turn, and the output has a gate."""
    if config.get("attention_bias"):
        lack(config, "attention_bias puts a bias on the gate too, which no Config has")
    fields = base(config, rope_of(config, kind, partial=0.25), head_dim=256)
    fields["rope_parameters"] = {k: v for k, v in fields["rope_parameters"].items() if not k.startswith("mrope_")}
    return fields | {"qk_norm": "head", "norm_offset": 1.0, "attn_output_gate": True}


def _olmo_hybrid(config: dict, kind: str) -> dict:
    """Without rope_parameters there are no positions; the norm of a linear layer has an eps of its own."""
    if kind == LINEAR:
        heads = integer(config, "num_attention_heads")
        keys = integer(config, "linear_num_key_heads", heads)
        width = integer(config, "linear_key_head_dim", int(0.75 * integer(config, "hidden_size") / keys))
        filled = {"linear_num_key_heads": keys, "linear_key_head_dim": width}
        filled["linear_num_value_heads"] = integer(config, "linear_num_value_heads", heads)
        filled["linear_value_head_dim"] = integer(config, "linear_value_head_dim", 2 * width)
        negative = bool(config["linear_allow_neg_eigval"])
        return _delta(config | filled, linear_allow_neg_eigval=negative, rms_norm_eps=1e-5)
    turns = section(config, "rope_parameters") or config.get("rope_theta") is not None
    return base(config, rope_of(config, kind) if turns else None) | bias(config, kind) | {"qk_norm": "flat"}


def _kda(config: dict, heads: str, width: str, taps: str, **fields: Any) -> dict:
    only(config, hidden_act="silu")
    sizes = {"linear_num_heads": heads, "linear_head_dim": width, "linear_conv_kernel_dim": taps}
    return {
        "hidden_size": integer(config, "hidden_size"), "rms_norm_eps": config["rms_norm_eps"],
        **{name: integer(config, key) for name, key in sizes.items()}, **fields,
    }  # fmt: skip


def _kimi(config: dict, kind: str) -> dict:
    """Checkpoints have the linear layers' sizes in a section of their own, which wins."""
    if kind != LINEAR:
        return kimi_latent(config, kind)
    own = section(config, "linear_attn_config")
    names = {"head_dim": "linear_head_dim", "num_heads": "linear_num_heads",
             "short_conv_kernel_size": "linear_conv_kernel_dim"}  # fmt: skip
    filled = config | {name: own[key] for key, name in names.items() if own.get(key) is not None}
    bound = own.get("gate_lower_bound", config.get("linear_lower_bound"))
    return _kda(filled, "linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim", linear_lower_bound=bound)


def _bailing(config: dict, kind: str) -> dict:
    """After transformers has read it, head_dim is that of the rotated slice."""
    if kind != LINEAR:
        return kimi_latent(config | {"mla_use_nope": True}, kind)
    bound = config["kda_lower_bound"] if config["kda_safe_gate"] else None
    saved = {"linear_num_heads": "num_attention_heads", "linear_head_dim": "head_dim",
             "linear_conv_kernel_dim": "short_conv_kernel_size"}  # fmt: skip
    keys = (new if config.get(new) is not None else old for new, old in saved.items())
    return _kda(config, *keys, low_rank=False, linear_lower_bound=bound)


def _grouped_delta(w: Weights, cfg: Any) -> dict[str, np.ndarray]:
    """Qwen3-Next: for each key head its [query | key | values | gates], and its [betas | decays]."""
    D, K, N, H, V = _delta_sizes(cfg)
    r = N // K
    both, small = w.linear("in_proj_qkvz", D, K, 2 * (H + r * V)), w.linear("in_proj_ba", D, K, 2 * r)
    params = {"wq": both[..., :H], "wk": both[..., H : 2 * H]}
    params |= {
        x: part.reshape(D, N, V) for x, part in zip(("wv", "wg"), np.split(both[..., 2 * H :], 2, -1), strict=True)
    }
    params |= {x: part.reshape(D, N) for x, part in zip(("wb", "wa"), np.split(small, 2, -1), strict=True)}
    return params | _delta_rest(w, cfg, "norm", "out_proj")


def _flat_delta(w: Weights, cfg: Any) -> dict[str, np.ndarray]:
    """Qwen3.5: all queries, all keys, all values; everything else apart."""
    D, K, N, H, V = _delta_sizes(cfg)
    q, k, v = np.split(w.linear("in_proj_qkv", D, 2 * K * H + N * V), [K * H, 2 * K * H], axis=1)
    params = {"wq": q.reshape(D, K, H), "wk": k.reshape(D, K, H), "wv": v.reshape(D, N, V)}
    params |= {
        "wg": w.linear("in_proj_z", D, N, V),
        "wb": w.linear("in_proj_b", D, N),
        "wa": w.linear("in_proj_a", D, N),
    }
    return params | _delta_rest(w, cfg, "norm", "out_proj")


def _single_delta(w: Weights, cfg: Any) -> dict[str, np.ndarray]:
    """Olmo-Hybrid: every projection apart."""
    D, K, N, H, V = _delta_sizes(cfg)
    shapes = {"q": (K, H), "k": (K, H), "v": (N, V), "g": (N, V), "b": (N,), "a": (N,)}
    params = {f"w{x}": w.linear(f"{x}_proj", D, *shape) for x, shape in shapes.items()}
    return params | _delta_rest(w, cfg, "o_norm", "o_proj")


def _delta_sizes(cfg: Any) -> tuple[int, ...]:
    heads = cfg.linear_num_key_heads, cfg.linear_num_value_heads
    return cfg.hidden_size, *heads, cfg.linear_key_head_dim, cfg.linear_value_head_dim


def _delta_rest(w: Weights, cfg: Any, norm: str, out: str) -> dict[str, np.ndarray]:
    D, K, N, H, V = _delta_sizes(cfg)
    params = _joined_conv(w, cfg.linear_conv_kernel_dim, (K * H, K * H, N * V))
    params |= {"a_log": w.take("A_log", N), "dt_bias": w.take("dt_bias", N), "o_norm": w.take(f"{norm}.weight", V)}
    return params | w.output(out, N, V, D)


def _joined_conv(w: Weights, L: int, channels: tuple[int, ...]) -> dict[str, np.ndarray]:
    """One convolution over queries, keys and values; three in checkpoints."""
    if "q_conv1d.weight" not in w.found:
        return w.conv("conv1d", L, sum(channels))
    parts = [w.conv(f"{x}_conv1d", L, X)["w_conv"] for x, X in zip("qkv", channels, strict=True)]
    return {"w_conv": np.concatenate(parts, axis=1)}


def _kda_weights(*a_log: int) -> Callable[[Weights, Any], dict[str, np.ndarray]]:
    """The decay's parts are in a module of their own, which checkpoints have not. a_log: axes of length 1 of A_log,
    before and after its heads.
    """

    def split(w: Weights, cfg: Any) -> dict[str, np.ndarray]:
        D, N, H = cfg.hidden_size, cfg.linear_num_heads, cfg.linear_head_dim
        gate = "" if "A_log" in w.found else "forget_gate."
        shape = (1,) * a_log[0] + (N,) + (1,) * a_log[1] if a_log else (N,)
        params = {f"w{x}": w.linear(f"{x}_proj", D, N, H) for x in "qkv"} | {"wb": w.linear("b_proj", D, N)}
        for x, where in (("f", gate), ("g", "")):
            if cfg.low_rank:
                params |= {f"w{x}_a": w.linear(f"{where}{x}_a_proj", D, H)}
                params |= {f"w{x}_b": w.linear(f"{where}{x}_b_proj", H, N, H)}
            else:
                params |= {f"w{x}": w.linear(f"{where}{x}_proj", D, N, H)}
        params |= {"a_log": w.take(f"{gate}A_log", *shape).reshape(N), "dt_bias": w.vector(f"{gate}dt_bias", N, H)}
        params |= _joined_conv(w, cfg.linear_conv_kernel_dim, (N * H,) * 3) | {"o_norm": w.take("o_norm.weight", H)}
        return params | w.output("o_proj", N, H, D)

    return split


def _bailing_weights(w: Weights, cfg: Any) -> dict[str, np.ndarray]:
    w.names = {"o_proj.weight": "dense.weight"} if "dense.weight" in w.found else {}
    return _kda_weights()(w, cfg)


_EVERY_FOURTH = every(4, LINEAR, "full_attention_interval")
_SIZES = {"linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
          "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6}  # fmt: skip
_QWEN3_5 = Family(
    _qwen3, _EVERY_FOURTH, DENSE | {LINEAR: Layer("gated_deltanet", _flat_delta, "linear_attn")},
    _SIZES | {"num_key_value_heads": 4},
)  # fmt: skip
_QWEN3_5_MOE = _QWEN3_5._replace(defaults=_SIZES | {"num_key_value_heads": 2})
_KIMI = {"linear_num_heads": 32, "linear_head_dim": 128, "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-5}
_LING = Layer("mla", None, lacks="its latent layers have a gate for each head")
_BAILING = {"head_dim": 128, "short_conv_kernel_size": 4, "kda_safe_gate": True, "kda_lower_bound": -5.0,
            "rms_norm_eps": 1e-6}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "bailing_hybrid": Family(
        _bailing, every(6, LINEAR, "layer_group_size"), {LINEAR: Layer("kda", _bailing_weights), FULL: _LING}, _BAILING
    ),
    "glm5_next_text": Family(
        _kimi, every(4, LINEAR), {LINEAR: Layer("kda", _kda_weights())},
        _KIMI | {"linear_num_heads": 64, "linear_lower_bound": -5.0},
    ),
    "kimi_linear": Family(
        _kimi, kimi_kind, LATENT | {LINEAR: Layer("kda", _kda_weights(2, 1))}, _KIMI | {"mla_use_nope": True}
    ),
    "olmo_hybrid": Family(
        _olmo_hybrid, every(4, LINEAR), DENSE | {LINEAR: Layer("gated_deltanet", _single_delta, "linear_attn")},
        {"linear_conv_kernel_dim": 4, "linear_allow_neg_eigval": True, "rms_norm_eps": 1e-6},
    ),
    "qwen3_5_moe_text": _QWEN3_5_MOE,
    "qwen3_5_text": _QWEN3_5,
    "qwen3_next": Family(
        _qwen3, _EVERY_FOURTH, DENSE | {LINEAR: Layer("gated_deltanet", _grouped_delta, "linear_attn")},
        _SIZES | {"num_key_value_heads": 2},
    ),
}  # fmt: skip
