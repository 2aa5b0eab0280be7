"""convert: array types, module prefixes, dtypes, and errors that name the key."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jforge.harness.tiny_configs import MODELS
from jforge.hf import convert

CONFIG = {
    "model_type": "llama",
    "hidden_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "num_hidden_layers": 2,
}
SHAPES = {"q_proj": (8, 12), "k_proj": (4, 12), "v_proj": (4, 12), "o_proj": (12, 8)}


def weights(layer=1, prefix="model.", seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    name = f"{prefix}layers.{layer}.self_attn."
    return {f"{name}{x}.weight": rng.normal(size=shape).astype(np.float32) for x, shape in SHAPES.items()}


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype
        np.testing.assert_array_equal(got[name], want[name])


@pytest.mark.parametrize("name", MODELS)
def test_params_have_the_shapes_of_the_mechanism(name):
    spec = MODELS[name]
    model = spec.build()
    att, cfg, params = convert(model.config, model.state_dict(), spec.layers[-1])
    own = jax.eval_shape(lambda key: att.init_params(key, cfg), jax.random.key(0))
    assert {n: p.shape for n, p in params.items()} == {n: p.shape for n, p in own.items()}
    assert all(isinstance(p, jax.Array) for p in params.values())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_array_types_and_dtypes(dtype):
    """torch, NumPy and JAX arrays of the same numbers give the same params, in their dtype."""
    state = {k: v.astype(dtype) for k, v in weights().items()}
    _, _, want = convert(CONFIG, state, 1)
    assert all(p.dtype == dtype for p in want.values())
    wide = {k: v.astype(np.float64) for k, v in state.items()}
    tensors = {k: torch.nn.Parameter(torch.tensor(v).to(getattr(torch, dtype))) for k, v in wide.items()}
    assert_equal(convert(CONFIG, tensors, 1)[2], want)
    with jax.enable_x64(dtype == "float64"):
        arrays = {k: jnp.asarray(v) for k, v in state.items()}
    assert_equal(convert(CONFIG, arrays, 1)[2], want)


def test_params_are_copies():
    state = {k: torch.tensor(v) for k, v in weights().items()}
    _, _, params = convert(CONFIG, state, 1)
    before = {k: np.array(v) for k, v in params.items()}
    for tensor in state.values():
        tensor.zero_()
    assert_equal({k: np.asarray(v) for k, v in params.items()}, before)


@pytest.mark.parametrize("prefix", ["", "model.", "model.language_model.", "language_model.model.", "a.b.c."])
def test_prefixes(prefix):
    state = weights(prefix=prefix) | weights(0, prefix, seed=1) | weights(11, prefix, seed=2)
    assert_equal(convert(CONFIG, state, 1)[2], convert(CONFIG, weights(), 1)[2])


@pytest.mark.parametrize("tower", ["vision_tower.vision_model.encoder.", "model.audio_tower.", "mtp."])
def test_other_towers_are_passed_over(tower):
    state = weights(prefix=tower, seed=1) | weights(prefix="model.language_model.")
    assert_equal(convert(CONFIG, state, 1)[2], convert(CONFIG, weights(), 1)[2])


def test_two_text_models_are_ambiguous():
    with pytest.raises(ValueError, match="several attention modules for layer 1: a.layers.1.self_attn., b.layers"):
        convert(CONFIG, weights(prefix="a.") | weights(prefix="b."), 1)


def test_missing_weight():
    state = weights()
    del state["model.layers.1.self_attn.k_proj.weight"]
    message = r"^model.layers.1.self_attn.k_proj.weight is missing .*; it must have shape \(4, 12\)$"
    with pytest.raises(ValueError, match=message):
        convert(CONFIG, state, 1)


def test_layer_without_weights():
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.weight is missing .* shape \(8, 12\)"):
        convert(CONFIG, weights(), 0)


def test_wrong_shape():
    state = weights()
    state["model.layers.1.self_attn.o_proj.weight"] = np.zeros((8, 12), np.float32)
    with pytest.raises(ValueError, match=r"o_proj.weight has shape \(8, 12\); it must be \(12, 8\)"):
        convert(CONFIG, state, 1)


@pytest.mark.parametrize("name", ["q_proj.bias", "q_norm.weight", "k_proj.weight_scale_inv"])
def test_weight_without_a_place(name):
    """A bias or a scale that the config does not announce would be dropped silently."""
    key = f"model.layers.1.self_attn.{name}"
    with pytest.raises(ValueError, match=f"^{key} is in the state dict, but the config has no place for it"):
        convert(CONFIG, weights() | {key: np.zeros(8, np.float32)}, 1)


def test_old_rotary_buffer_is_ignored():
    state = weights() | {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    assert_equal(convert(CONFIG, state, 1)[2], convert(CONFIG, weights(), 1)[2])


@pytest.mark.parametrize("layer", [-1, 2])
def test_layer_outside_the_model(layer):
    with pytest.raises(ValueError, match=f"layer is {layer}; it must be in 0..1"):
        convert(CONFIG, weights(), layer)


@pytest.mark.parametrize(
    "name, kind",
    [("qwen3_next", "linear_attention"), ("kimi_linear", "linear_attention")],
)
def test_layer_kind_without_a_mechanism(name, kind):
    spec = MODELS[name]
    with pytest.raises(NotImplementedError, match=f"layer 0 of {name} is {kind}"):
        convert(spec.config(), {}, 0)


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
