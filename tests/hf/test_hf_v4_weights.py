"""Where the attention weights of DeepSeek-V4 go, under transformers' names and under those of the released files."""

import jax
import numpy as np
import pytest
import torch
from test_hf_v4_config import TINY

from jforge.hf import convert
from jforge.hf_deepseek_v4 import RELEASED

BASE = {
    "q_a_proj.weight": (6, 10),
    "q_a_norm.weight": (6,),
    "q_b_proj.weight": (32, 6),
    "kv_proj.weight": (8, 10),
    "kv_norm.weight": (8,),
    "sinks": (4,),
    "o_a_proj.weight": (6, 16),
    "o_b_proj.weight": (10, 6),
}


def compressor(prefix: str, m: int, X: int, width: int) -> dict[str, tuple[int, ...]]:
    names = ("kv_proj.weight", "gate_proj.weight", "position_bias", "kv_norm.weight")
    return {prefix + name: shape for name, shape in zip(names, ((X, 10), (X, 10), (m, X), (width,)), strict=True)}


INDEX = "compressor.indexer."
SHAPES = [
    BASE,
    BASE
    | compressor("compressor.", 4, 16, 8)
    | compressor(INDEX, 4, 12, 6)
    | {f"{INDEX}q_b_proj.weight": (12, 6), f"{INDEX}scorer.weights_proj.weight": (2, 10)},
    BASE | compressor("compressor.", 128, 8, 8),
]


def weights(index: int, released: bool = False) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(state dict, {name in transformers: array}) of one layer of TINY."""
    rng = np.random.default_rng(index)
    w = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES[index].items()}
    prefix = f"layers.{index}.attn." if released else f"model.layers.{index}.self_attn."
    return {prefix + (RELEASED[name] if released else name): value for name, value in w.items()}, w


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_where_the_weights_go(index, released):
    """Head 3 is the second of group 1; row 5 of o_a is the last channel that group 1 goes down to."""
    state, w = weights(index, released)
    att, cfg, params = convert(TINY, state, index)
    assert {n: p.shape for n, p in params.items()} == {
        n: p.shape for n, p in att.init_params(jax.random.key(0), cfg).items()
    }
    flat = {"wq_a": "q_a_proj", "wkv": "kv_proj", "q_norm": "q_a_norm", "kv_norm": "kv_norm"}
    prefixes = {1: {"c": "compressor.", "ic": INDEX}, 2: {"c": "compressor."}}.get(index, {})
    for short, path in prefixes.items():
        flat |= {f"w{short}_kv": f"{path}kv_proj", f"w{short}_gate": f"{path}gate_proj"}
        flat |= {f"{short}_norm": f"{path}kv_norm"}
        np.testing.assert_array_equal(params[f"{short}_bias"], w[f"{path}position_bias"])
    for ours, name in flat.items():
        np.testing.assert_array_equal(params[ours], w[f"{name}.weight"].T)
    np.testing.assert_array_equal(params["sinks"], w["sinks"])
    np.testing.assert_array_equal(params["wq_b"][:, 3], w["q_b_proj.weight"][24:].T)
    np.testing.assert_array_equal(params["wo_a"][1, 1, :, 2], w["o_a_proj.weight"][5, 8:])
    np.testing.assert_array_equal(params["wo_b"][1, 2], w["o_b_proj.weight"][:, 5])
    if index == 1:
        np.testing.assert_array_equal(params["wq_index"][:, 1], w[f"{INDEX}q_b_proj.weight"][6:].T)
        np.testing.assert_array_equal(params["ww_index"], w[f"{INDEX}scorer.weights_proj.weight"].T)


@pytest.mark.parametrize("index, name", [(index, name) for index in (1, 2) for name in SHAPES[index]])
def test_missing_weight(index, name):
    state, _ = weights(index, released=True)
    del state[f"layers.{index}.attn.{RELEASED[name]}"]
    shape = str(SHAPES[index][name])[1:-1]
    with pytest.raises(ValueError, match=rf"layers.{index}.attn.{RELEASED[name]} is missing .* shape \({shape}\)$"):
        convert(TINY, state, index)


@pytest.mark.parametrize(
    "index, change, message",
    [
        (
            0,
            {"compressor.kv_norm.weight": (8,)},
            "compressor.kv_norm.weight is in the state dict, but the config has no",
        ),
        (2, {f"{INDEX}kv_norm.weight": (6,)}, "compressor.indexer.kv_norm.weight is in the state dict, but the config"),
        (0, {"o_a_proj.bias": (6,)}, "o_a_proj.bias is in the state dict, but the config has no place for it"),
        (1, {"compressor.position_bias": (8, 16)}, r"position_bias has shape \(8, 16\); it must be \(4, 16\)"),
        (1, {"o_a_proj.weight": (16, 6)}, r"o_a_proj.weight has shape \(16, 6\); it must be \(6, 16\)"),
    ],
)
def test_bad_weights(index, change, message):
    state, _ = weights(index)
    more = {f"model.layers.{index}.self_attn.{name}": np.zeros(shape, np.float32) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        convert(TINY, state | more, index)


def test_quantised_weight():
    """The released files are float8 with block scales."""
    state, _ = weights(0, released=True)
    state = {key: torch.tensor(value) for key, value in state.items()}
    state["layers.0.attn.wkv.weight"] = state["layers.0.attn.wkv.weight"].to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"^layers.0.attn.wkv.weight has dtype float8_e4m3fn; it must be dequantised"):
        convert(TINY, state, 0)


def test_layers_of_prediction_heads_are_not_in_the_way():
    state, _ = weights(0, released=True)
    heads = {key.replace("layers.0", "mtp.0"): value + 1 for key, value in state.items()}
    params, alone = (convert(TINY, given, 0)[2] for given in (state | heads, state))
    for name, value in alone.items():
        np.testing.assert_array_equal(params[name], value)
