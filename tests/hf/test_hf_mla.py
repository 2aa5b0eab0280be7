"""MLA: configs and weights of DeepSeek-V2/V3, Kimi-K2 and the full layers of Kimi-Linear."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from jforge import cli, hf_config
from jforge.attention.mla import Config
from jforge.core.compare import OUT
from jforge.harness import tiny_models
from jforge.hf import convert
from jforge.hf_config import layer, layers, load

EXAMPLES = Path(hf_config.__file__).parent / "configs"
YARN = {"factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3, "original_max_position_embeddings": 64}
TINY = {
    "model_type": "deepseek_v3",
    "hidden_size": 10,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "q_lora_rank": 6,
    "kv_lora_rank": 5,
    "qk_nope_head_dim": 3,
    "qk_rope_head_dim": 4,
    "v_head_dim": 2,
}
SHAPES = {
    "q_a_proj": (6, 10),
    "q_a_layernorm": (6,),
    "q_b_proj": (14, 6),
    "kv_a_proj_with_mqa": (9, 10),
    "kv_a_layernorm": (5,),
    "kv_b_proj": (10, 5),
    "o_proj": (10, 4),
}
KIMI_LINEAR = {
    "model_type": "kimi_linear",
    "hidden_size": 2304,
    "num_attention_heads": 32,
    "num_hidden_layers": 27,
    "num_key_value_heads": 32,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "head_dim": 72,
    "mla_use_nope": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "kda_layers": [n for n in range(1, 27) if n % 4],
        "head_dim": 128,
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
}


def config_of(config, index=0) -> Config:
    name, cfg = layer(config, index)
    assert name == "mla"
    return cfg


def kimi(**linear):
    """Two layers of Kimi-Linear whose linear_attn_config has these lists."""
    return KIMI_LINEAR | {"num_hidden_layers": 2, "linear_attn_config": linear}


def weights(prefix="model.", index=1, dtype=np.float32, seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    name = f"{prefix}layers.{index}.self_attn."
    return {f"{name}{x}.weight": rng.normal(size=shape).astype(dtype) for x, shape in SHAPES.items()}


# Configs


def test_deepseek_v3():
    got = layers(load(EXAMPLES / "deepseek-v3.json"))
    assert len(got) == 61 and set(got) == {got[0]}
    name, cfg = got[0]
    assert name == "mla"
    assert (cfg.hidden_size, cfg.num_attention_heads, cfg.q_lora_rank, cfg.kv_lora_rank) == (7168, 128, 1536, 512)
    assert (cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim) == (128, 64, 128)
    assert (cfg.rope_layout, cfg.attention_bias) == ("interleaved", False)
    assert cfg.scaling == 192**-0.5 * (0.1 * math.log(40) + 1) ** 2
    assert cfg.rope_parameters["rope_type"] == "yarn" and cfg.rope_parameters["rope_theta"] == 10000


def test_deepseek_v2_lite():
    got = layers(load(EXAMPLES / "deepseek-v2-lite.json"))
    assert len(got) == 27 and set(got) == {got[0]}
    cfg = got[0][1]
    assert (cfg.num_attention_heads, cfg.q_lora_rank) == (16, None)
    assert cfg.scaling == 192**-0.5 * (0.1 * 0.707 * math.log(40) + 1) ** 2


def test_kimi_k2_is_deepseek_v3():
    config = load(EXAMPLES / "kimi-k2.json")
    assert config["model_type"] == "kimi_k2"
    assert layers(config) == layers(config | {"model_type": "deepseek_v3"})
    assert config_of(config).num_attention_heads == 64
    multimodal = {"model_type": "kimi_k25", "text_config": config, "vision_config": {"hidden_size": 1152}}
    assert layers(multimodal) == layers(config)


def test_kimi_linear_layers_are_those_of_the_checkpoint():
    theirs = transformers.KimiLinearConfig(**{k: v for k, v in KIMI_LINEAR.items() if k != "rope_scaling"})
    full = []
    for index in range(27):
        try:
            assert layer(KIMI_LINEAR, index) == layer(theirs, index)
            full.append(index)
        except NotImplementedError as error:
            assert str(error).startswith(f"layer {index} of kimi_linear is linear_attention")
    assert full == [3, 7, 11, 15, 19, 23, 26]


def test_kimi_linear_has_no_positions():
    cfg = config_of(KIMI_LINEAR, 3)
    assert cfg.rope_parameters is None and cfg.q_lora_rank is None
    assert cfg.scaling == 192**-0.5


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "kimi_k2"])
def test_old_and_new_rope_spellings_are_equal(model_type):
    config = TINY | {"model_type": model_type}
    old = config_of(config | {"rope_theta": 5e4, "rope_scaling": YARN | {"type": "yarn"}})
    new = config_of(config | {"rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 5e4}})
    assert old == new and hash(old) == hash(new)
    assert {k: old.rope_parameters[k] for k in YARN} == YARN
    assert old.scaling == 7**-0.5 * (0.13 * math.log(4) + 1) ** 2


@pytest.mark.parametrize("config", [TINY, TINY | {"model_type": "deepseek_v2"}, KIMI_LINEAR])
def test_latent_norms_keep_their_own_eps(config):
    last = config["num_hidden_layers"] - 1
    assert config_of(config | {"rms_norm_eps": 0.01}, last).rms_norm_eps == 1e-6


@pytest.mark.parametrize("value, layout", [(True, "interleaved"), (False, "half"), (None, "half")])
def test_rope_interleave(value, layout):
    assert config_of(TINY | {"rope_interleave": value}).rope_layout == layout


def test_absent_and_null_q_lora_rank_differ():
    absent = {k: v for k, v in TINY.items() if k != "q_lora_rank"}
    assert config_of(absent).q_lora_rank == 1536
    assert config_of(absent | {"q_lora_rank": None}).q_lora_rank is None


@pytest.mark.parametrize(
    "config, message",
    [
        (TINY | {"model_type": "deepseek_v2", "index_topk": 2048}, "layer 0 of deepseek_v2 is indexed_attention"),
        (TINY | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is given"),
        (kimi(full_attn_layers=[2], kda_layers=[1]), "layer 0 of kimi_linear is linear_attention"),
        (kimi(full_attn_layers=[1], kda_layers=[2]) | {"mla_use_nope": False}, "mla_use_nope is false"),
        (kimi(full_attn_layers=[1], kda_layers=[2]) | {"mla_use_output_gate": True}, "mla_use_output_gate is true"),
    ],
)
def test_what_has_no_mechanism(config, message):
    with pytest.raises(NotImplementedError, match=f"^{message}"):
        layers(config)


@pytest.mark.parametrize(
    "config, message",
    [
        (TINY | {"num_key_value_heads": 1}, "num_key_value_heads is 1; it must be num_attention_heads=2"),
        (TINY | {"q_lora_rank": 0}, "q_lora_rank is 0; it must be a positive integer"),
        (TINY | {"kv_lora_rank": "512"}, "kv_lora_rank is '512'; it must be a positive integer"),
        (TINY | {"v_head_dim": -1}, "v_head_dim is -1; it must be a positive integer"),
        (TINY | {"qk_rope_head_dim": 3}, "partial_rotary_factor is 1.0; .* of the 3 channels"),
        (
            TINY | {"rope_scaling": YARN | {"type": "yarn", "mscale": "1"}},
            "mscale is '1'; it must be a positive number",
        ),
        (TINY | {"rope_scaling": YARN | {"type": "yarn", "mscale_all_dim": -1.0}}, "mscale_all_dim is -1.0"),
        (TINY | {"rope_scaling": {"type": "yarn"}}, "rope_parameters has no factor; rope_type 'yarn' needs it"),
        (kimi(), "config has neither layer_types nor linear_attn_config"),
        (kimi(full_attn_layers=[1, 2]), "config has no kda_layers"),
        (kimi(full_attn_layers=2, kda_layers=[1]), "full_attn_layers is 2; it must be a list of layers"),
        (kimi(full_attn_layers=[1], kda_layers=[3]), "layer 1 is in neither of full_attn_layers and kda_layers, as 2"),
        (kimi(full_attn_layers=[1], kda_layers=[1, 2]), "layer 0 is in both of full_attn_layers and kda_layers, as 1"),
        (kimi() | {"layer_types": ["full_attention"]}, "layer_types is .*num_hidden_layers=2"),
    ],
)
def test_bad_values(config, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        layers(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "num_hidden_layers"])
def test_required_keys(key):
    with pytest.raises(ValueError, match=f"^config has no {key}$"):
        layers({k: v for k, v in TINY.items() if k != key})


def test_cost_of_deepseek_v3(capsys):
    path = str(EXAMPLES / "deepseek-v3.json")
    assert cli.main(["cost", "mla", "--config", path, "--context", "4k", "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)
    assert cost["layers"] == 61
    assert cost["layer"]["written"] == cost["layer"]["bytes_per_token"] == 1152
    assert cost["all_layers"]["written"] == cost["all_layers"]["bytes_per_token"] == 70272


# Weights


def test_where_the_rows_go():
    state = weights()
    _, _, params = convert(TINY, state, 1)
    w = {name: state[f"model.layers.1.self_attn.{name}.weight"] for name in SHAPES}
    expected = {
        "wq_a": w["q_a_proj"].T,
        "q_norm": w["q_a_layernorm"],
        "wkv_a": w["kv_a_proj_with_mqa"].T,
        "kv_norm": w["kv_a_layernorm"],
    }
    for name, value in expected.items():
        np.testing.assert_array_equal(params[name], value)
    for head in (0, 1):
        rows = w["kv_b_proj"][5 * head : 5 * head + 5]
        np.testing.assert_array_equal(params["wk_b"][:, head], rows[:3].T)
        np.testing.assert_array_equal(params["wv_b"][:, head], rows[3:].T)
        np.testing.assert_array_equal(params["wq_b"][:, head], w["q_b_proj"][7 * head : 7 * head + 7].T)
        np.testing.assert_array_equal(params["wo"][head], w["o_proj"][:, 2 * head : 2 * head + 2].T)


@pytest.mark.parametrize("prefix", ["", "model.", "language_model.model."])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_prefixes_and_dtypes(prefix, dtype):
    """Layer 2, beyond the model, is its head for predicting more than one token."""
    state = weights(prefix, dtype=dtype) | weights(prefix, index=2, dtype=dtype, seed=1)
    _, _, params = convert(TINY, state, 1)
    assert all(value.dtype == dtype for value in params.values())
    want = convert(TINY, weights(dtype=dtype), 1)[2]
    for name, value in params.items():
        np.testing.assert_array_equal(value, want[name])


@pytest.mark.parametrize("name", SHAPES)
def test_missing_weight(name):
    state = weights()
    del state[f"model.layers.1.self_attn.{name}.weight"]
    with pytest.raises(ValueError, match=rf"{name}.weight is missing .* shape \({str(SHAPES[name])[1:-1]}\)$"):
        convert(TINY, state, 1)


def test_wrong_shape():
    state = weights() | {"model.layers.1.self_attn.kv_b_proj.weight": np.zeros((5, 10), np.float32)}
    with pytest.raises(ValueError, match=r"kv_b_proj.weight has shape \(5, 10\); it must be \(10, 5\)"):
        convert(TINY, state, 1)


def test_whole_queries_where_the_config_announces_low_rank_ones():
    state = weights() | {"model.layers.1.self_attn.q_proj.weight": np.zeros((14, 10), np.float32)}
    with pytest.raises(ValueError, match="q_proj.weight is in the state dict, but the config has no place for it"):
        convert(TINY, state, 1)


@pytest.mark.parametrize("name, size", [("q_a_proj", 6), ("kv_a_proj_with_mqa", 9), ("o_proj", 10)])
def test_biases(name, size):
    biases = {"q_a_proj": 6, "kv_a_proj_with_mqa": 9, "o_proj": 10}
    keys = {x: f"model.layers.1.self_attn.{x}.bias" for x in biases}
    state = weights() | {keys[x]: np.full(n, n, np.float32) for x, n in biases.items()}
    _, _, params = convert(TINY | {"attention_bias": True}, state, 1)
    assert all((params[x] == n).all() for x, n in (("bq_a", 6), ("bkv_a", 9), ("bo", 10)))
    without = {key: value for key, value in state.items() if key != keys[name]}
    with pytest.raises(ValueError, match=rf"{name}.bias is missing .* shape \({size},\)"):
        convert(TINY | {"attention_bias": True}, without, 1)
    with pytest.raises(ValueError, match=f"{name}.bias is in the state dict, but the config has no place for it"):
        convert(TINY, weights() | {keys[name]: state[keys[name]]}, 1)


def test_quantised_weight():
    """The released DeepSeek-V3 is float8 with block scales."""
    state = {key: torch.tensor(value) for key, value in weights().items()}
    key = "model.layers.1.self_attn.kv_b_proj.weight"
    state[key] = state[key].to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=f"^{key} has dtype float8_e4m3fn; it must be dequantised to one of float16"):
        convert(TINY, state, 1)


# The comparison itself


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "deepseek_v3, halves, yarn in one step"])
def test_the_order_of_cached_rope_channels_matters(name, monkeypatch):
    """The comparison must not pass with the channels of the rotary key in another order."""
    spec = tiny_models.MODELS[name]
    swapped = dataclasses.replace(spec, pairs_apart={} if spec.pairs_apart else {"k_rope": 8})
    monkeypatch.setitem(tiny_models.MODELS, name, swapped)
    _, errors = tiny_models.against_transformers(name)
    assert errors.pop("cache") > 0.1
    assert max(errors.values()) <= OUT["float32"]


@pytest.mark.parametrize("key, value", [("rope_layout", "half"), ("rms_norm_eps", 0.01), ("scaling", 24**-0.5)])
def test_the_comparison_sees_a_wrong_config(key, value, monkeypatch):
    def wrong(config, weights, index):
        att, cfg, params = convert(config, weights, index)
        return att, dataclasses.replace(cfg, **{key: value}), params

    monkeypatch.setattr(tiny_models.hf, "convert", wrong)
    _, errors = tiny_models.against_transformers("deepseek_v3, yarn, biases")
    assert errors["forward"] > 10 * OUT["float32"]
