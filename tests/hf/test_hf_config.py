"""config.json -> Config: spellings, defaults, layer kinds and error messages."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from jforge import hf_config
from jforge.attention import REGISTRY
from jforge.harness.tiny_configs import LLAMA3, MODELS
from jforge.hf_config import layer, layers, load

EXAMPLES = Path(hf_config.__file__).parent / "configs"
SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 6, "max_position_embeddings": 256}
TINY = {"model_type": "llama", "num_key_value_heads": 2, **SHAPE}


def config_of(config, index=0):
    return layer(config, index)[1]


def rope_of(config, index=0):
    return dict(config_of(config, index).rope_parameters)


# Examples


def test_llama_3_1_8b():
    got = layers(load(EXAMPLES / "llama-3.1-8b.json"))
    assert len(got) == 32 and set(got) == {got[0]}
    name, cfg = got[0]
    assert name == "gqa"
    assert (cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim) == (4096, 32, 8, 128)
    assert not cfg.attention_bias and not cfg.attention_output_bias and cfg.qk_norm is None
    assert dict(cfg.rope_parameters) == LLAMA3 | {"original_max_position_embeddings": 8192, "partial_rotary_factor": 1}


def test_qwen3_8b():
    got = layers(load(EXAMPLES / "qwen3-8b.json"))
    assert len(got) == 36
    name, cfg = got[0]
    assert (name, cfg.num_key_value_heads, cfg.head_dim, cfg.qk_norm) == ("gqa", 8, 128, "head")
    assert cfg.rope_parameters["rope_theta"] == 1e6


def test_minimax_m2():
    got = layers(load(EXAMPLES / "minimax-m2.json"))
    assert len(got) == 62
    name, cfg = got[0]
    assert (name, cfg.hidden_size, cfg.num_attention_heads, cfg.qk_norm) == ("gqa", 3072, 48, "flat")
    assert dict(cfg.rope_parameters) == {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.json")), ids=lambda path: path.stem)
def test_example_reads_the_same_through_transformers(path):
    config = load(path)
    names = {"kimi_k2": "deepseek_v3", "minimax_text_01": "minimax"}
    known_as = names.get(config["model_type"], config["model_type"])
    theirs = transformers.AutoConfig.for_model(**config | {"model_type": known_as})
    assert layers(theirs) == layers(config)


# Which mechanism


@pytest.mark.parametrize("heads, kv_heads, name", [(1, 1, "single_head"), (4, 4, "mha"), (4, 1, "mqa"), (4, 2, "gqa")])
def test_mechanism_follows_the_heads(heads, kv_heads, name):
    got, cfg = layer(TINY | {"num_attention_heads": heads, "num_key_value_heads": kv_heads}, 0)
    assert got == name and type(cfg) is REGISTRY[name].Config


@pytest.mark.parametrize("name", MODELS)
def test_dict_and_object_agree(name):
    spec = MODELS[name]
    config = spec.config()
    for index in spec.layers:
        assert layer(config, index) == layer(config.to_dict(), index)
        assert layer(config, index) == layer(json.loads(config.to_json_string(use_diff=True)), index)


# Rotary spellings


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_old_and_new_rope_spellings_are_equal(key):
    scaling = {k: v for k, v in LLAMA3.items() if k not in ("rope_type", "rope_theta")} | {key: "llama3"}
    old = config_of(TINY | {"rope_theta": 5e5, "rope_scaling": scaling})
    new = config_of(TINY | {"rope_parameters": LLAMA3})
    nested = config_of(TINY | {"rope_parameters": {"full_attention": LLAMA3, "sliding_attention": None}})
    assert old == new == nested
    assert hash(old) == hash(new)


def test_gemma3_rope_spellings_are_equal():
    base = {"model_type": "gemma3_text", **SHAPE}
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = config_of(base | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": scaling}, 5)
    new = {"full_attention": scaling | {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    assert old == config_of(base | {"rope_parameters": new}, 5)
    assert old == config_of(base | {"rope_scaling": scaling}, 5)
    assert old.rope_parameters["rope_theta"] == 1e6 and old.rope_parameters["factor"] == 8.0


def test_minimax_rotary_dim_is_the_factor():
    base = {"model_type": "minimax_m2", "num_key_value_heads": 2, "head_dim": 16, **SHAPE}
    factor = base | {"rope_theta": 5e6, "partial_rotary_factor": 0.5}
    assert config_of(base | {"rotary_dim": 8}) == config_of(factor)
    assert rope_of(base)["partial_rotary_factor"] == 1.0
    assert config_of(transformers.MiniMaxM2Config(**base, rotary_dim=8)) == config_of(factor)


def test_original_length_falls_back_to_max_position_embeddings():
    yarn = {"rope_type": "yarn", "factor": 4.0}
    assert rope_of(TINY | {"rope_scaling": yarn})["original_max_position_embeddings"] == 256
    given = rope_of(TINY | {"rope_scaling": yarn | {"original_max_position_embeddings": 64}})
    assert given["original_max_position_embeddings"] == 64
    beside = TINY | {"rope_scaling": yarn, "original_max_position_embeddings": 128}
    assert rope_of(beside)["original_max_position_embeddings"] == 128


def test_yarn_factor_null_is_the_ratio():
    yarn = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64}
    assert rope_of(TINY | {"rope_scaling": yarn})["factor"] == 4.0


@pytest.mark.parametrize("key", ["beta_fast", "beta_slow", "mscale", "mscale_all_dim"])
def test_yarn_numbers_of_0_are_not_given(key):
    yarn = {"rope_type": "yarn", "factor": 4.0}
    assert rope_of(TINY | {"rope_scaling": yarn | {key: 0}}) == rope_of(TINY | {"rope_scaling": yarn})


# Defaults of files that omit keys: what transformers reads in the same file


@pytest.mark.parametrize(
    "model_type, keys",
    [
        ("llama", {}),
        ("qwen2", {"num_key_value_heads": 2}),
        ("qwen3", {"num_key_value_heads": 2}),
        ("qwen3_moe", {}),
        ("mistral", {"num_attention_heads": 8}),
        ("mistral", {"sliding_window": None, "num_attention_heads": 8}),
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("gpt_oss", {"num_attention_heads": 8}),
        ("olmo2", {}),
        ("falcon", {}),
        ("minimax", {"num_attention_heads": 8, "layer_types": ["linear_attention", "full_attention"] * 3}),
        ("minimax_m2", {"num_attention_heads": 8}),
        ("minimax_m3_vl_text", {"layer_types": ["full_attention", "minimax_m3_sparse"] * 3}),
        ("qwen3_next", {}),
        ("deepseek_v2", {}),
        ("deepseek_v3", {"num_key_value_heads": 4}),
        ("deepseek_v32", {"num_key_value_heads": 4}),
        ("glm_moe_dsa", {"num_key_value_heads": 4}),
        ("glm_moe_dsa", {"num_key_value_heads": 4, "index_topk_freq": 2}),
        ("deepseek_v4", {"num_attention_heads": 8, "compress_ratios": [0, 4, 128] * 2}),
        ("kimi_linear", {"num_key_value_heads": 4, "layer_types": ["full_attention"] * 6}),
    ],
)
def test_omitted_keys_mean_the_class_defaults(model_type, keys):
    config = {"model_type": model_type, **SHAPE, **keys}
    theirs = transformers.AutoConfig.for_model(**config)
    for index in (3,) if model_type == "qwen3_next" else range(6):
        assert layer(config, index) == layer(theirs, index)


def test_gemma3_text_config_of_a_multimodal_model():
    """The published 4B file: no heads, no head_dim in text_config."""
    text = {
        "hidden_size": 2560,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    name, cfg = layer({"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}}, 5)
    assert (name, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim) == ("gqa", 8, 4, 256)
    assert (cfg.scaling, cfg.norm_offset, cfg.qk_norm) == (256**-0.5, 1.0, "head")
    assert layer(transformers.Gemma3Config(text_config=text), 5) == (name, cfg)


# Layer kinds


def kinds(config):
    """The mechanism of every layer; of a layer without one the kind that the error names."""
    out = []
    for index in range(config["num_hidden_layers"]):
        try:
            out.append(layer(config, index)[0])
        except NotImplementedError as error:
            named = rf"layer {index} of {config['model_type']} is (\w+); only its .* layers have a mechanism"
            out.append(re.fullmatch(named, str(error))[1])
    return out


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({"model_type": "gemma2"}, ["sliding_window", "gqa"] * 3),
        ({"model_type": "gemma2", "layer_types": ["chunked_attention"] * 6}, ["chunked_attention"] * 6),
        ({"model_type": "gemma3_text"}, ["sliding_window"] * 5 + ["gqa"]),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 2}, ["sliding_window", "gqa"] * 3),
        ({"model_type": "gpt_oss"}, ["sinks"] * 6),
        ({"model_type": "gpt_oss", "layer_types": ["linear_attention"] * 6}, ["linear_attention"] * 6),
        ({"model_type": "qwen3_next"}, ["linear_attention"] * 3 + ["gqa"] + ["linear_attention"] * 2),
        ({"model_type": "mistral"}, ["sliding_window"] * 6),
        ({"model_type": "mistral", "sliding_window": None}, ["gqa"] * 6),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 4},
            ["gqa"] * 4 + ["sliding_window"] * 2,
        ),
        ({"model_type": "qwen3", "sliding_window": 8}, ["gqa"] * 6),
        ({"model_type": "qwen3_moe", "use_sliding_window": True, "sliding_window": 8}, ["sliding_window"] * 6),
        ({"model_type": "minimax", "attn_type_list": [0, 0, 1] * 2}, ["lightning", "lightning", "gqa"] * 2),
        ({"model_type": "minimax", "layer_types": ["linear_attention", "attention"] * 3}, ["lightning", "gqa"] * 3),
        ({"model_type": "minimax", "layer_types": ["sliding_attention"] * 6}, ["sliding_attention"] * 6),
        ({"model_type": "minimax_m2", "attn_type_list": [1, 0] * 3}, ["gqa", "linear_attention"] * 3),
        ({"model_type": "llama", "layer_types": ["chunked_attention"] * 6}, ["chunked_attention"] * 6),
        ({"model_type": "llama", "layer_types": ["sliding_attention"] * 6}, ["sliding_attention"] * 6),
        ({"model_type": "llama", "layer_types": ["attention"] * 6}, ["gqa"] * 6),
        ({"model_type": "deepseek_v3", "num_key_value_heads": 4}, ["mla"] * 6),
        (
            {"model_type": "deepseek_v4", "num_key_value_heads": 1, "o_groups": 2, "compress_ratios": [0, 4, 128] * 2},
            ["v4_window", "csa", "hca"] * 2,
        ),
        ({"model_type": "deepseek_v3", "num_key_value_heads": 4, "index_topk": 2048}, ["dsa"] * 6),
        ({"model_type": "kimi_k2", "layer_types": ["indexed_attention"] * 6}, ["indexed_attention"] * 6),
    ],
)
def test_layer_kinds(keys, expected):
    assert kinds({**SHAPE, "num_key_value_heads": 2, **keys}) == expected


def test_layers_raises_at_the_first_layer_without_a_mechanism():
    config = {"model_type": "llama", **SHAPE, "layer_types": ["full_attention"] * 5 + ["sliding_attention"]}
    message = "^layer 5 of llama is sliding_attention; only its full_attention layers have a mechanism$"
    with pytest.raises(NotImplementedError, match=message):
        layers(config)


@pytest.mark.parametrize(
    "config, message",
    [
        (TINY | {"model_type": "bert"}, "model_type 'bert' is not known; known are deepseek_v2, .*qwen3_next"),
        (TINY | {"model_type": "falcon", "alibi": True}, "ALiBi"),
        (TINY | {"model_type": "gemma3_text", "use_bidirectional_attention": True}, "not causal"),
        (TINY | {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (TINY | {"model_type": "qwen3_next", "attention_bias": True}, "attention_bias"),
        (TINY | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_has_no_mechanism(config, message):
    index = {"gemma3_text": 5, "qwen3_next": 3}.get(config["model_type"], 0)
    with pytest.raises(NotImplementedError, match=message):
        layer(config, index)


# Errors


@pytest.mark.parametrize("key", ["model_type", "hidden_size", "num_attention_heads", "num_hidden_layers"])
def test_required_keys(key):
    with pytest.raises(ValueError, match=f"^config has no {key}$"):
        layers({k: v for k, v in TINY.items() if k != key})


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"num_key_value_heads": 3}, "num_attention_heads is 4; it must be a multiple of num_key_value_heads=3"),
        ({"hidden_size": "64"}, "hidden_size is '64'; it must be a positive integer"),
        ({"hidden_size": 66}, "head_dim is None.*hidden_size=66"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'; it must be one of default"),
        ({"rope_scaling": {"type": "linear"}}, "rope_parameters has no factor; rope_type 'linear' needs it"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 0}},
            "attention_factor is 0; it must be a",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be an object or null"),
        ({"rope_parameters": {"sliding_attention": {}}}, "rope_parameters has no entry for full_attention"),
        ({"rope_parameters": {"full_attention": 3}}, "full_attention is 3; it must be an object"),
        ({"layer_types": ["full_attention"]}, "layer_types is .*num_hidden_layers=6"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a positive integer"),
        ({"model_type": "minimax_m2", "rotary_dim": "64"}, "rotary_dim is '64'"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0, "layer_types": ["full_attention"] * 6}, "query_pre"),
    ],
)
def test_bad_values(keys, message):
    with pytest.raises(ValueError, match=message):
        layers(TINY | keys)


@pytest.mark.parametrize("index", [-1, 6, True])
def test_layer_outside_the_model(index):
    with pytest.raises(ValueError, match=r"layer is .*; it must be in 0..5"):
        layer(TINY, index)


def test_config_of_another_type():
    with pytest.raises(TypeError, match="config is a list"):
        layers([TINY])


def test_imports_neither_transformers_nor_torch():
    code = f"import sys; from jforge.hf_config import layers, load; layers(load({str(EXAMPLES / 'qwen3-8b.json')!r}))"
    code += "; import jforge.hf; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=EXAMPLES.parents[1])


def test_families_are_all_tested():
    tested = {spec.config().model_type for spec in MODELS.values()}
    others = {"gemma3", "kimi_k2", "minimax_m1", "minimax_m3_vl", "minimax_text_01"}  # in the files of their models
    assert tested | others == set(hf_config.FAMILIES)
