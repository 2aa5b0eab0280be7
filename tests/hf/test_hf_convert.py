"""convert: array types, module prefixes, dtypes, where every weight goes, and errors that name the key."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from families import (
    CSA_SHAPES,
    DSA,
    DSA_SHAPES,
    GLM,
    GPT_OSS,
    GPT_OSS_SHAPES,
    HCA_SHAPES,
    INDEXER,
    LIGHTNING_SHAPES,
    M3,
    MINIMAX,
    MLA,
    MLA_SHAPES,
    MSA_SHAPES,
    PERIODIC,
    V4,
    V4_SHAPES,
    weights,
)

from jforge import hf
from jforge.attention import REGISTRY
from jforge.harness import tiny_models
from jforge.harness.tiny_models import MODELS
from jforge.hf import convert
from jforge.hf.families.deepseek_v4 import RELEASED

LLAMA = {
    "model_type": "llama",
    "hidden_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "num_hidden_layers": 2,
}
LLAMA_SHAPES = {f"{x}_proj.weight": s for x, s in zip("qkvo", ((8, 12), (4, 12), (4, 12), (12, 8)), strict=True)}
V3 = DSA | {"model_type": "deepseek_v3"}
BIASES = {"q_a_proj.bias": (6,), "kv_a_proj_with_mqa.bias": (9,), "o_proj.bias": (10,)}
LAYERS = {  # config, layer, weights
    "llama": (LLAMA, 1, LLAMA_SHAPES),
    "sinks": (GPT_OSS, 0, GPT_OSS_SHAPES),
    "mla": (MLA, 1, MLA_SHAPES),
    "mla, biases": (MLA | {"attention_bias": True}, 1, MLA_SHAPES | BIASES),
    "dsa": (DSA, 1, DSA_SHAPES),
    "dsa, deepseek_v3": (V3, 1, DSA_SHAPES),
    "dsa, glm_moe_dsa": (PERIODIC, 1, DSA_SHAPES),
    "dsa, shared": (GLM, 1, MLA_SHAPES),
    "lightning": (MINIMAX, 0, LIGHTNING_SHAPES),
    "msa": (M3, 1, MSA_SHAPES),
    "v4_window": (V4, 0, V4_SHAPES),
    "csa": (V4, 1, CSA_SHAPES),
    "hca": (V4, 2, HCA_SHAPES),
}


def state_of(index: int, shapes: dict[str, tuple[int, ...]], released: bool = False) -> dict[str, np.ndarray]:
    """A state dict of one layer, in the released files of DeepSeek-V4 under names of their own."""
    state = weights(index, shapes)
    if not released:
        return state
    prefix = f"model.layers.{index}.self_attn."
    return {f"layers.{index}.attn.{RELEASED[key.removeprefix(prefix)]}": value for key, value in state.items()}


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype
        np.testing.assert_array_equal(got[name], want[name])


# Array types, dtypes and prefixes


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_array_types_and_dtypes(dtype):
    """torch, NumPy and JAX arrays of the same numbers give the same params, in their dtype."""
    state = weights(1, LLAMA_SHAPES, dtype=dtype)
    _, _, want = convert(LLAMA, state, 1)
    assert all(p.dtype == dtype for p in want.values())
    wide = {k: v.astype(np.float64) for k, v in state.items()}
    tensors = {k: torch.nn.Parameter(torch.tensor(v).to(getattr(torch, dtype))) for k, v in wide.items()}
    assert_equal(convert(LLAMA, tensors, 1)[2], want)
    with jax.enable_x64(dtype == "float64"):
        arrays = {k: jnp.asarray(v) for k, v in state.items()}
    assert_equal(convert(LLAMA, arrays, 1)[2], want)


def test_params_are_copies():
    state = {k: torch.tensor(v) for k, v in weights(1, LLAMA_SHAPES).items()}
    _, _, params = convert(LLAMA, state, 1)
    before = {k: np.array(v) for k, v in params.items()}
    for tensor in state.values():
        tensor.zero_()
    assert_equal({k: np.asarray(v) for k, v in params.items()}, before)


@pytest.mark.parametrize("config, shapes", [(LLAMA, LLAMA_SHAPES), (MLA, MLA_SHAPES)], ids=["llama", "deepseek_v3"])
@pytest.mark.parametrize("prefix", ["", "model.", "model.language_model.", "language_model.model.", "a.b.c."])
def test_prefixes(config, shapes, prefix):
    """Beside other layers; one beyond the model is its head for predicting more than one token."""
    state = weights(1, shapes, prefix) | weights(0, shapes, prefix, seed=1)
    state |= weights(2, shapes, prefix, seed=2) | weights(11, shapes, prefix, seed=3)
    assert_equal(convert(config, state, 1)[2], convert(config, weights(1, shapes), 1)[2])


@pytest.mark.parametrize("tower", ["vision_tower.vision_model.encoder.", "model.audio_tower.", "mtp."])
def test_other_towers_are_passed_over(tower):
    state = weights(1, LLAMA_SHAPES, tower, seed=1) | weights(1, LLAMA_SHAPES, "model.language_model.")
    assert_equal(convert(LLAMA, state, 1)[2], convert(LLAMA, weights(1, LLAMA_SHAPES), 1)[2])


def test_layers_of_prediction_heads_are_not_in_the_way():
    state = state_of(0, V4_SHAPES, released=True)
    heads = {key.replace("layers.0", "mtp.0"): value + 1 for key, value in state.items()}
    assert_equal(convert(V4, state | heads, 0)[2], convert(V4, state, 0)[2])


def test_two_text_models_are_ambiguous():
    state = weights(1, LLAMA_SHAPES, "a.") | weights(1, LLAMA_SHAPES, "b.")
    with pytest.raises(ValueError, match="several attention modules for layer 1: a.layers.1.self_attn., b.layers"):
        convert(LLAMA, state, 1)


def test_numpy_needs_no_torch():
    code = """
import sys, numpy as np
from jforge.hf import convert
config = {"model_type": "llama", "hidden_size": 4, "num_attention_heads": 1, "num_hidden_layers": 1}
state = {f"layers.0.self_attn.{x}_proj.weight": np.ones((4, 4), np.float32) for x in "qkvo"}
assert convert(config, state, 0)[2]["wq"].shape == (4, 1, 4)
assert not {"torch", "transformers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# Where the weights go

ALL = slice(None)


def compressors(**paths: str) -> list[tuple]:
    rows = []
    for ours, path in paths.items():
        names = {f"w{ours}_kv": "kv_proj", f"w{ours}_gate": "gate_proj", f"{ours}_norm": "kv_norm"}
        rows += [(leaf, ALL, f"{path}{name}.weight", ALL) for leaf, name in names.items()]
    return rows


V4_ROWS = [  # head 3 is the second of group 1; row 5 of o_a is the last channel that group 1 goes down to
    ("wq_a", ALL, "q_a_proj.weight", ALL),
    ("wkv", ALL, "kv_proj.weight", ALL),
    ("q_norm", ALL, "q_a_norm.weight", ALL),
    ("kv_norm", ALL, "kv_norm.weight", ALL),
    ("sinks", ALL, "sinks", ALL),
    ("wq_b", (ALL, 3), "q_b_proj.weight", slice(24, 32)),
    ("wo_a", (1, 1, ALL, 2), "o_a_proj.weight", (5, slice(8, 16))),
    ("wo_b", (1, 2), "o_b_proj.weight", (ALL, 5)),
]
MLA_ROWS = [
    ("wq_a", ALL, "q_a_proj.weight", ALL),
    ("q_norm", ALL, "q_a_layernorm.weight", ALL),
    ("wkv_a", ALL, "kv_a_proj_with_mqa.weight", ALL),
    ("kv_norm", ALL, "kv_a_layernorm.weight", ALL),
    *(("wk_b", (ALL, n), "kv_b_proj.weight", slice(5 * n, 5 * n + 3)) for n in (0, 1)),
    *(("wv_b", (ALL, n), "kv_b_proj.weight", slice(5 * n + 3, 5 * n + 5)) for n in (0, 1)),
    *(("wq_b", (ALL, n), "q_b_proj.weight", slice(7 * n, 7 * n + 7)) for n in (0, 1)),
    *(("wo", n, "o_proj.weight", (ALL, slice(2 * n, 2 * n + 2))) for n in (0, 1)),
]
DSA_ROWS = [
    *MLA_ROWS,
    *(("wq_index", (ALL, n), "indexer.wq_b.weight", slice(8 * n, 8 * n + 8)) for n in range(3)),
    ("wk_index", ALL, "indexer.wk.weight", ALL),
    ("ww_index", ALL, "indexer.weights_proj.weight", ALL),
    ("k_index_norm", ALL, "indexer.k_norm.weight", ALL),
    ("k_index_bias", ALL, "indexer.k_norm.bias", ALL),
]
ROWS = {  # our leaf and where in it, their weight and where in it: equal but for the order of axes
    "sinks": [
        ("sinks", ALL, "sinks", ALL),
        ("bo", ALL, "o_proj.bias", ALL),
        ("bq", 3, "q_proj.bias", slice(18, 24)),
        ("bk", 1, "k_proj.bias", slice(6, 12)),
        ("bv", 1, "v_proj.bias", slice(6, 12)),
    ],
    "mla": MLA_ROWS,
    "mla, biases": [(f"b{ours}", ALL, f"{x}.bias", ALL) for ours, x in
                    (("q_a", "q_a_proj"), ("kv_a", "kv_a_proj_with_mqa"), ("o", "o_proj"))],
    "dsa": DSA_ROWS,
    "dsa, deepseek_v3": DSA_ROWS,
    "dsa, glm_moe_dsa": DSA_ROWS,
    "dsa, shared": MLA_ROWS,
    "lightning": [
        ("wq", (ALL, 2), "qkv_proj.weight", slice(36, 42)),
        ("wk", (ALL, 2), "qkv_proj.weight", slice(42, 48)),
        ("wv", (ALL, 2), "qkv_proj.weight", slice(48, 54)),
        ("wg", (ALL, 2), "output_gate.weight", slice(12, 18)),
        ("o_norm", 2, "norm.weight", slice(12, 18)),
        ("wo", 2, "out_proj.weight", (ALL, slice(12, 18))),
    ],
    "msa": [
        ("wq_index", (ALL, 1), "indexer.q_proj.weight", slice(8, 16)),
        ("wk_index", ALL, "indexer.k_proj.weight", ALL),
        ("q_index_norm", ALL, "indexer.q_norm.weight", ALL),
        ("k_index_norm", ALL, "indexer.k_norm.weight", ALL),
    ],
    "v4_window": V4_ROWS,
    "csa": [
        *V4_ROWS,
        *compressors(c="compressor.", ic=INDEXER),
        *(("c_bias", m, "compressor.position_bias", m) for m in range(4)),
        *(("ic_bias", m, f"{INDEXER}position_bias", m) for m in range(4)),
        ("wq_index", (ALL, 1), f"{INDEXER}q_b_proj.weight", slice(6, 12)),
        ("ww_index", ALL, f"{INDEXER}scorer.weights_proj.weight", ALL),
    ],
    "hca": [
        *V4_ROWS,
        *compressors(c="compressor."),
        *(("c_bias", m, "compressor.position_bias", m) for m in range(128)),
    ],
}  # fmt: skip
SPELLINGS = [(name, "transformers") for name in ROWS]
SPELLINGS += [(name, "checkpoint") for name in ("msa", "v4_window", "csa", "hca")]


@pytest.mark.parametrize("name, spelling", SPELLINGS)
def test_where_the_weights_go(name, spelling):
    config, index, shapes = LAYERS[name]
    w = {key.removeprefix(f"model.layers.{index}.self_attn."): v for key, v in weights(index, shapes).items()}
    state = state_of(index, shapes, released=spelling == "checkpoint" and name != "msa")
    if spelling == "checkpoint" and name == "msa":
        state = {f"language_{key.replace('indexer.', 'index_')}": value for key, value in state.items()}
    att, cfg, params = convert(config, state, index)
    assert att is REGISTRY[name.split(",")[0]]
    own = jax.eval_shape(lambda key: att.init_params(key, cfg), jax.random.key(0))
    assert {n: p.shape for n, p in params.items()} == {n: p.shape for n, p in own.items()}
    for leaf, ours, weight, theirs in ROWS[name]:
        np.testing.assert_array_equal(params[leaf][ours], w[weight][theirs].T)


def test_the_weights_of_mla_are_those_of_dsa_without_an_indexer():
    latent = convert(V3 | {"index_topk": None}, weights(1, MLA_SHAPES), 1)[2]
    both = convert(DSA, weights(1, DSA_SHAPES), 1)[2]
    assert all((both[name] == value).all() for name, value in latent.items())


@pytest.mark.parametrize(
    "layer, names",
    [
        ("llama", ("rotary_emb.inv_freq",)),
        ("lightning", ("slope_rate", "query_decay", "key_decay", "diagonal_decay")),
    ],
)
def test_buffers_beside_the_weights_are_ignored(layer, names):
    config, index, shapes = LAYERS[layer]
    state = weights(index, shapes)
    more = weights(index, dict.fromkeys(names, (4, 1, 1)))
    assert_equal(convert(config, state | more, index)[2], convert(config, state, index)[2])


# Errors


@pytest.mark.parametrize(
    "layer, name, released",
    [(layer, name, False) for layer, (_, _, shapes) in LAYERS.items() for name in shapes]
    + [(layer, name, True) for layer in ("csa", "hca") for name in LAYERS[layer][2]],
)
def test_missing_weight(layer, name, released):
    config, index, shapes = LAYERS[layer]
    state = state_of(index, shapes, released)
    key = f"layers.{index}.attn.{RELEASED[name]}" if released else f"model.layers.{index}.self_attn.{name}"
    del state[key]
    with pytest.raises(ValueError) as error:
        convert(config, state, index)
    assert str(error.value) == f"{key} is missing from the state dict; it must have shape {shapes[name]}"


def test_layer_without_weights():
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.weight is missing .* shape \(8, 12\)"):
        convert(LLAMA, weights(1, LLAMA_SHAPES), 0)


def shape(name: str, given: tuple, wanted: tuple) -> str:
    return rf"{name} has shape \({str(given)[1:-1]}\); it must be \({str(wanted)[1:-1]}\)"


NO_PLACE = "is in the state dict, but the config has no place for it"
BAD_WEIGHTS = [  # layer, changed keys of its config, other weights, what the error says
    ("llama", {}, {"o_proj.weight": (8, 12)}, shape("o_proj.weight", (8, 12), (12, 8))),
    *(("llama", {}, {x: (8,)}, f"{x} {NO_PLACE}") for x in ("q_proj.bias", "q_norm.weight", "k_proj.weight_scale_inv")),
    ("sinks", {}, {"sinks": (2,)}, shape("self_attn.sinks", (2,), (4,))),
    ("sinks", {"attention_bias": False}, {}, f"q_proj.bias {NO_PLACE}"),
    ("sinks", {"model_type": "llama", "attention_bias": True}, {}, f"self_attn.sinks {NO_PLACE}"),
    ("mla", {}, {"kv_b_proj.weight": (5, 10)}, shape("kv_b_proj.weight", (5, 10), (10, 5))),
    ("mla", {}, {"q_proj.weight": (14, 10)}, f"q_proj.weight {NO_PLACE}"),  # whole queries beside low-rank ones
    *(("mla", {}, {name: s}, f"{name} {NO_PLACE}") for name, s in BIASES.items()),
    ("dsa", {"index_n_heads": 2}, {}, shape("wq_b.weight", (24, 6), (16, 6))),
    ("dsa", {"index_head_dim": 12}, {}, shape("wq_b.weight", (24, 6), (36, 6))),
    ("dsa", {"q_lora_rank": 5}, {}, shape("q_a_proj.weight", (6, 10), (5, 10))),
    ("dsa", {}, {"indexer.wk.bias": (8,)}, f"wk.bias {NO_PLACE}"),
    ("dsa, shared", {}, DSA_SHAPES, f"indexer.wq_b.weight {NO_PLACE}"),
    ("dsa, deepseek_v3", {"index_topk": None}, {}, f"indexer.wq_b.weight {NO_PLACE}"),
    ("lightning", {}, {"qkv_proj.weight": (60, 10)}, shape("qkv_proj.weight", (60, 10), (72, 10))),
    ("lightning", {}, {"out_proj.bias": (10,)}, f"out_proj.bias {NO_PLACE}"),
    ("msa", {}, {"index_o_proj.weight": (10, 12)}, f"index_o_proj.weight {NO_PLACE}"),
    ("msa", {"sparse_attention_config": {"sparse_attention_freq": [0, 0]}}, {}, f"indexer.q_proj.weight {NO_PLACE}"),
    ("v4_window", {}, {"compressor.kv_norm.weight": (8,)}, f"compressor.kv_norm.weight {NO_PLACE}"),
    ("hca", {}, {f"{INDEXER}kv_norm.weight": (6,)}, f"compressor.indexer.kv_norm.weight {NO_PLACE}"),
    ("v4_window", {}, {"o_a_proj.bias": (6,)}, f"o_a_proj.bias {NO_PLACE}"),
    ("csa", {}, {"compressor.position_bias": (8, 16)}, shape("position_bias", (8, 16), (4, 16))),
    ("csa", {}, {"o_a_proj.weight": (16, 6)}, shape("o_a_proj.weight", (16, 6), (6, 16))),
]


@pytest.mark.parametrize("layer, keys, more, message", BAD_WEIGHTS)
def test_bad_weights(layer, keys, more, message):
    """Also a bias or a scale that the config does not announce: it would be dropped silently."""
    config, index, shapes = LAYERS[layer]
    with pytest.raises(ValueError, match=message):
        convert(config | keys, weights(index, shapes | more), index)


@pytest.mark.parametrize("layer, name", [("mla", "kv_b_proj.weight"), ("v4_window", "wkv.weight")])
def test_quantised_weight(layer, name):
    """The released DeepSeek-V3 and V4 are float8 with block scales."""
    config, index, shapes = LAYERS[layer]
    state = {key: torch.tensor(value) for key, value in state_of(index, shapes, layer == "v4_window").items()}
    (key,) = [key for key in state if key.endswith(f".{name}")]
    state[key] = state[key].to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=f"^{key} has dtype float8_e4m3fn; it must be dequantised to one of float16"):
        convert(config, state, index)


@pytest.mark.parametrize("layer", [-1, 2])
def test_layer_outside_the_model(layer):
    with pytest.raises(ValueError, match=f"layer is {layer}; it must be in 0..1"):
        convert(LLAMA, weights(1, LLAMA_SHAPES), layer)


def test_layer_kind_without_a_mechanism():
    with pytest.raises(
        NotImplementedError, match="layer 1 of bailing_hybrid is full_attention: its latent layers have a gate"
    ):
        convert(MODELS["bailing_hybrid, delta"].config(), {}, 1)


def test_layers_that_have_two_mixers_or_none():
    falcon, nemotron = (MODELS[name].config() for name in ("falcon_h1", "nemotron_h"))
    assert [name for name, _ in hf.layers(falcon)] == ["mamba2", "gqa"] * 2
    assert [name for name, _ in hf.layers(nemotron)] == ["mamba2", "gqa", "mamba2"]
    assert hf.layer(falcon, 1)[0] == "mamba2" and hf.layer(falcon, 1, "full_attention")[0] == "gqa"
    with pytest.raises(ValueError, match="kind is 'conv'; it must be linear_attention or full_attention in layer 1"):
        convert(falcon, {}, 1, "conv")
    with pytest.raises(ValueError, match="layer 1 of nemotron_h is mlp; it has no attention and keeps no cache"):
        convert(nemotron, {}, 1)


def test_gains_keep_the_dtype_of_weights():
    spec = MODELS["falcon_h1"]
    state = {key: value.bfloat16() for key, value in tiny_models.built(spec).state_dict().items()}
    _, _, params = convert(spec.config(), state, 0, "full_attention")
    assert {str(a.dtype) for a in params.values()} == {"bfloat16"}


@pytest.mark.parametrize("name", ["kimi_linear, delta", "olmo_hybrid, delta", "bailing_hybrid, delta"])
def test_checkpoints_keep_three_convolutions_and_no_gate_module(name):
    spec = MODELS[name]
    config, state = spec.config(), dict(tiny_models.built(spec).state_dict())
    want = convert(config, state, 0)[2]
    (key,) = [key for key in state if ".layers.0." in key and key.endswith("conv1d.weight")]
    joined, mixer = state.pop(key), key.removesuffix("conv1d.weight")
    sizes = [want[w].shape[1] * want[w].shape[2] for w in ("wq", "wk", "wv")]
    state |= {f"{mixer}{x}_conv1d.weight": part for x, part in zip("qkv", joined.split(sizes), strict=True)}
    state = {key.replace("forget_gate.", ""): value for key, value in state.items()}
    if spec.name == "BailingHybrid":
        state[f"{mixer}dense.weight"] = state.pop(f"{mixer}o_proj.weight")
    got = convert(config, state, 0)[2]
    assert want.keys() == got.keys() and all((want[n] == got[n]).all() for n in want)
