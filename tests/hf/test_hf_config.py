"""config.json -> Config: which layer has which mechanism, spellings, defaults."""

import json
import math
import re

import pytest
import transformers
from families import (
    BLOCKS,
    DSA,
    FULL,
    GLM,
    GPT_OSS,
    KIMI_LINEAR,
    LINEAR,
    LLAMA,
    M3,
    MINIMAX,
    MLA,
    SHAPE,
    SLIDING,
    sparse,
)

from jforge.attention import REGISTRY
from jforge.harness.tiny_configs import LLAMA3
from jforge.harness.tiny_models import MODELS
from jforge.harness.tiny_shared import SHARED
from jforge.hf import FAMILIES, layer, layers

BARE = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 6, "max_position_embeddings": 256}


def config_of(config, index=0):
    return layer(config, index)[1]


def rope_of(config, index=0):
    return dict(config_of(config, index).rope_parameters)


def default_rope(theta, partial=1):
    return {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": partial}


# Which mechanism


@pytest.mark.parametrize("heads, kv_heads, name", [(1, 1, "single_head"), (4, 4, "mha"), (4, 1, "mqa"), (4, 2, "gqa")])
def test_mechanism_follows_the_heads(heads, kv_heads, name):
    got, cfg = layer(LLAMA | {"num_attention_heads": heads, "num_key_value_heads": kv_heads}, 0)
    assert got == name and type(cfg) is REGISTRY[name].Config


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


WINDOW_KEYS = {"use_sliding_window": True, "sliding_window": 8}


@pytest.mark.parametrize(
    "model_type, keys, expected",
    [
        ("gemma2", {}, ["sliding_window", "gqa"] * 3),
        ("gemma2", {"layer_types": ["chunked_attention"] * 6}, ["chunked_attention"] * 6),
        ("gemma3_text", {}, ["sliding_window"] * 5 + ["gqa"]),
        ("gemma3_text", {"sliding_window_pattern": 2}, ["sliding_window", "gqa"] * 3),
        ("gpt_oss", {}, ["sinks"] * 6),
        ("gpt_oss", {"layer_types": [LINEAR] * 6}, [LINEAR] * 6),
        ("qwen3_next", {}, ["gated_deltanet"] * 3 + ["gqa"] + ["gated_deltanet"] * 2),
        ("mistral", {}, ["sliding_window"] * 6),
        ("mistral", {"sliding_window": None}, ["gqa"] * 6),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 4}, ["gqa"] * 4 + ["sliding_window"] * 2),
        ("qwen3", {"sliding_window": 8}, ["gqa"] * 6),
        ("qwen3_moe", WINDOW_KEYS, ["sliding_window"] * 6),
        ("minimax", {"attn_type_list": [0, 0, 1] * 2}, ["lightning", "lightning", "gqa"] * 2),
        ("minimax", {"layer_types": [LINEAR, "attention"] * 3}, ["lightning", "gqa"] * 3),
        ("minimax", {"layer_types": [SLIDING] * 6}, [SLIDING] * 6),
        ("minimax_m2", {"attn_type_list": [1, 0] * 3}, ["gqa", LINEAR] * 3),
        ("llama", {"layer_types": ["chunked_attention"] * 6}, ["chunked_attention"] * 6),
        ("llama", {"layer_types": [SLIDING] * 6}, [SLIDING] * 6),
        ("llama", {"layer_types": ["attention"] * 6}, ["gqa"] * 6),
        ("deepseek_v3", {"num_key_value_heads": 4}, ["mla"] * 6),
        (
            "deepseek_v4",
            {"num_key_value_heads": 1, "o_groups": 2, "compress_ratios": [0, 4, 128] * 2},
            ["v4_window", "csa", "hca"] * 2,
        ),
        ("deepseek_v3", {"num_key_value_heads": 4, "index_topk": 2048}, ["dsa"] * 6),
        ("kimi_k2", {"layer_types": ["indexed_attention"] * 6}, ["indexed_attention"] * 6),
    ],
)
def test_layer_kinds(model_type, keys, expected):
    assert kinds({"model_type": model_type, **BARE, "num_key_value_heads": 2, **keys}) == expected


def test_kimi_linear_layers_are_those_of_the_checkpoint():
    theirs = transformers.KimiLinearConfig(**{k: v for k, v in KIMI_LINEAR.items() if k != "rope_scaling"})
    assert [index for index, kind in enumerate(kinds(KIMI_LINEAR)) if kind == "mla"] == [3, 7, 11, 15, 19, 23, 26]
    assert set(kinds(KIMI_LINEAR)) == {"mla", "kda"}
    assert layers(KIMI_LINEAR) == layers(theirs)
    cfg = config_of(KIMI_LINEAR, 3)
    assert (cfg.rope_parameters, cfg.q_lora_rank, cfg.scaling) == (None, None, 192**-0.5)


def shared_of(config) -> str:
    """A letter a layer: S where it takes the picks of another."""
    return "".join("FS"[cfg.index_shared] for _, cfg, *_ in layers(config))


@pytest.mark.parametrize(
    "keys, pattern",
    [
        ({}, "FFFFFFFF"),
        ({"indexer_types": ["full", "shared"] * 4}, "FSFSFSFS"),
        ({"index_topk_pattern": "FFSSSFSS"}, "FFSSSFSS"),
        ({"index_topk_pattern": ["full", "shared"] * 4}, "FSFSFSFS"),
        ({"index_topk_freq": 3}, "FFSSFSSF"),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 3}, "FFFSSSFS"),
        ({"index_topk_pattern": "FSSSSSSS", "index_topk_freq": 2}, "FSSSSSSS"),
        ({"indexer_types": ["full"] * 8, "index_topk_pattern": "FSSSSSSS", "index_topk_freq": 2}, "FFFFFFFF"),
    ],
)
def test_which_layers_share_picks(keys, pattern):
    config = {key: value for key, value in DSA.items() if key != "model_type"} | {"num_hidden_layers": 8, **keys}
    assert shared_of(config | {"model_type": "glm_moe_dsa"}) == pattern
    assert shared_of(transformers.GlmMoeDsaConfig(num_key_value_heads=2, **config)) == pattern


def test_a_deepseek_v3_file_with_index_topk_is_v32():
    assert layers(DSA | {"model_type": "deepseek_v3"}) == layers(DSA)
    assert layer(DSA | {"model_type": "deepseek_v3", "index_topk": None}, 0)[0] == "mla"


def test_the_list_of_a_checkpoint_comes_before_that_of_the_class():
    """A transformers config made from a checkpoint's keys has an alternation in layer_types that is not the model's."""
    theirs = transformers.MiniMaxConfig(**{k: v for k, v in MINIMAX.items() if k != "model_type"})
    assert theirs.layer_types == [FULL, LINEAR]
    assert layers(theirs) == layers(MINIMAX)
    assert [name for name, _ in layers(theirs)] == ["lightning", "gqa"]


@pytest.mark.parametrize("listed", [[FULL] * 6, [SLIDING, FULL] * 3])
def test_a_window_of_mistral_holds_in_every_layer(listed):
    """transformers masks by sliding_window alone and warns of the list."""
    got = layers(SHAPE | {"model_type": "mistral", "sliding_window": 8, "layer_types": listed})
    assert [(name, cfg.sliding_window) for name, cfg in got] == [("sliding_window", 8)] * 6


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "qwen3_moe"])
def test_qwen_windows_read_as_transformers_does(model_type):
    config = SHAPE | {"model_type": model_type, "max_window_layers": 2, **WINDOW_KEYS}
    got = layers(config)
    assert got == layers(transformers.AutoConfig.for_model(**config))
    windows = [getattr(cfg, "sliding_window", None) for _, cfg in got]
    assert windows == ([8] * 6 if model_type == "qwen3_moe" else [None] * 2 + [8] * 4)


def test_heads_of_lightning_that_are_no_power_of_two():
    """MiniMax's own code has slopes for them; transformers has others, so a model of its type is refused."""
    six = MINIMAX | {"num_attention_heads": 6}
    name, cfg = layer(six | {"model_type": "minimax_text_01"}, 0)
    assert (name, cfg.num_attention_heads) == ("lightning", 6)
    assert layer(six, 1)[0] == "gqa"


def test_index_values_of_other_layers_do_not_matter():
    assert layer(sparse(sparse_disable_index_value=[0, 1]), 1)[0] == "msa"


# Spellings


@pytest.mark.parametrize("name", MODELS)
def test_dict_and_object_agree(name):
    spec = MODELS[name]
    config = spec.config()
    for index in spec.layers:
        assert layer(config, index) == layer(config.to_dict(), index)
        assert layer(config, index) == layer(json.loads(config.to_json_string(use_diff=True)), index)


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_old_and_new_rope_spellings_are_equal(key):
    scaling = {k: v for k, v in LLAMA3.items() if k not in ("rope_type", "rope_theta")} | {key: "llama3"}
    old = config_of(LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling})
    new = config_of(LLAMA | {"rope_parameters": LLAMA3})
    nested = config_of(LLAMA | {"rope_parameters": {"full_attention": LLAMA3, "sliding_attention": None}})
    assert old == new == nested
    assert hash(old) == hash(new)
    assert config_of(LLAMA | {"rope_parameters": {"full_attention": None}}).rope_parameters is None


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "kimi_k2"])
def test_old_and_new_rope_spellings_of_mla_are_equal(model_type):
    yarn = {"factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3, "original_max_position_embeddings": 64}
    config = MLA | {"model_type": model_type}
    old = config_of(config | {"rope_theta": 5e4, "rope_scaling": yarn | {"type": "yarn"}})
    new = config_of(config | {"rope_parameters": yarn | {"rope_type": "yarn", "rope_theta": 5e4}})
    assert old == new and hash(old) == hash(new)
    assert {k: old.rope_parameters[k] for k in yarn} == yarn
    assert old.scaling == 7**-0.5 * (0.13 * math.log(4) + 1) ** 2


@pytest.mark.parametrize("index, local", [(5, 1e4), (0, 2e4)])
def test_gemma3_rope_spellings_are_equal(index, local):
    """rope_theta and rope_scaling are the global layers', rope_local_base_freq the local ones'."""
    base = {"model_type": "gemma3_text", **BARE}
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = base | {"rope_theta": 1e6, "rope_local_base_freq": local, "rope_scaling": scaling}
    new = {"full_attention": scaling | {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": local}}
    assert layers(old) == layers(base | {"rope_parameters": new})
    assert config_of(old, 5) == config_of(base | {"rope_scaling": scaling}, 5)
    got = rope_of(old, index)
    assert got == default_rope(local) if index == 0 else (got["rope_theta"], got["factor"]) == (1e6, 8.0)


def test_minimax_rotary_dim_is_the_factor():
    base = {"model_type": "minimax_m2", "num_key_value_heads": 2, "head_dim": 16, **BARE}
    factor = base | {"rope_theta": 5e6, "partial_rotary_factor": 0.5}
    assert config_of(base | {"rotary_dim": 8}) == config_of(factor)
    assert rope_of(base)["partial_rotary_factor"] == 1.0
    assert config_of(transformers.MiniMaxM2Config(**base, rotary_dim=8)) == config_of(factor)


TURNING = [  # rotary_dim counts in MiniMax-01, where a partial_rotary_factor has no effect; in M3 it is the other way
    (MINIMAX, {}, 1),
    (MINIMAX, {"rotary_dim": 4}, 4 / 6),
    (MINIMAX, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, 1),
    (MINIMAX, {"rotary_dim": 4, "partial_rotary_factor": 0.5}, 4 / 6),
    (MINIMAX, {"rotary_dim": 2, "head_dim": None, "hidden_size": 16}, 0.5),
    (M3, {}, 1),
    (M3, {"rotary_dim": 2}, 1),
    (M3, {"partial_rotary_factor": 2 / 3}, 2 / 3),
]


@pytest.mark.parametrize("config, keys, share", TURNING)
def test_how_many_channels_turn_in_minimax(config, keys, share):
    for index in (1,) if config is MINIMAX else (0, 1):
        assert rope_of(config | keys, index)["partial_rotary_factor"] == share


def test_original_length_falls_back_to_max_position_embeddings():
    yarn = {"rope_type": "yarn", "factor": 4.0}
    assert rope_of(LLAMA | {"rope_scaling": yarn})["original_max_position_embeddings"] == 256
    given = rope_of(LLAMA | {"rope_scaling": yarn | {"original_max_position_embeddings": 64}})
    assert given["original_max_position_embeddings"] == 64
    beside = LLAMA | {"rope_scaling": yarn, "original_max_position_embeddings": 128}
    assert rope_of(beside)["original_max_position_embeddings"] == 128


def test_yarn_factor_null_is_the_ratio():
    yarn = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64}
    assert rope_of(LLAMA | {"rope_scaling": yarn})["factor"] == 4.0


@pytest.mark.parametrize("key", ["beta_fast", "beta_slow", "mscale", "mscale_all_dim"])
def test_yarn_numbers_of_0_are_not_given(key):
    yarn = {"rope_type": "yarn", "factor": 4.0}
    assert rope_of(LLAMA | {"rope_scaling": yarn | {key: 0}}) == rope_of(LLAMA | {"rope_scaling": yarn})


def test_spellings_of_the_index_branch_are_equal():
    flat = {
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_block_size": 4,
        "index_topk_blocks": 3,
        "index_local_blocks": 2,
        "layer_types": [FULL, BLOCKS],
    }
    alone = {key: value for key, value in M3.items() if key != "sparse_attention_config"}
    got = layer(alone | flat | {"model_type": "minimax_m3_vl_text"}, 1)
    assert got == layer(M3, 1) == layer(M3 | {key: 99 for key in flat if key.startswith("index_")}, 1)
    assert layer({"model_type": "minimax_m3_vl", "text_config": M3}, 1) == got
    theirs = transformers.MiniMaxM3VLConfig(text_config={k: v for k, v in M3.items() if k != "model_type"})
    assert layer(theirs, 1) == got


def test_first_blocks_that_are_always_picked():
    assert config_of(sparse(sparse_init_block=1), 1).index_init_blocks == 1
    assert config_of(M3, 1).index_init_blocks == 0


@pytest.mark.parametrize("value, layout", [(True, "interleaved"), (False, "half"), (None, "half")])
def test_rope_interleave(value, layout):
    assert config_of(MLA | {"rope_interleave": value}).rope_layout == layout


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
        ("minimax", {"num_attention_heads": 8, "layer_types": [LINEAR, FULL] * 3}),
        ("minimax_m2", {"num_attention_heads": 8}),
        ("minimax_m3_vl_text", {"layer_types": [FULL, BLOCKS] * 3}),
        ("qwen3_next", {}),
        ("deepseek_v2", {}),
        ("deepseek_v3", {"num_key_value_heads": 4}),
        ("deepseek_v32", {"num_key_value_heads": 4}),
        ("glm_moe_dsa", {"num_key_value_heads": 4}),
        ("glm_moe_dsa", {"num_key_value_heads": 4, "index_topk_freq": 2}),
        ("deepseek_v4", {"num_attention_heads": 8, "compress_ratios": [0, 4, 128] * 2}),
        ("kimi_linear", {"num_key_value_heads": 4, "layer_types": [FULL] * 6}),
    ],
)
def test_omitted_keys_mean_the_class_defaults(model_type, keys):
    config = {"model_type": model_type, **BARE, **keys}
    theirs = transformers.AutoConfig.for_model(**config)
    for index in (3,) if model_type == "qwen3_next" else range(6):
        assert layer(config, index) == layer(theirs, index)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"rope_theta": 1e4},
        {"rope_parameters": {"rope_type": "default"}},
        {"rope_parameters": {}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {}, "attention_bias": False},
    ],
)
def test_gpt_oss_reads_as_transformers_does(keys):
    """Its class has a RoPE dict of its own where a file has none, and biases where a file does not say."""
    assert layers(GPT_OSS | keys) == layers(transformers.GptOssConfig(**SHAPE | keys))


def test_gemma_2_caps_every_layer():
    config = SHAPE | {"model_type": "gemma2", "attn_logit_softcapping": 30.0}
    local, full = (config_of(config, index) for index in (0, 1))
    assert local.attn_logit_softcapping == full.attn_logit_softcapping == 30.0
    assert local.sliding_window == 4096 and local.scaling == 1 / 16


@pytest.mark.parametrize("config", [MLA, MLA | {"model_type": "deepseek_v2"}, KIMI_LINEAR, DSA, GLM])
def test_latent_norms_keep_their_own_eps(config):
    last = config["num_hidden_layers"] - 1
    assert config_of(config | {"rms_norm_eps": 0.01}, last).rms_norm_eps == 1e-6


def test_absent_and_null_q_lora_rank_differ():
    absent = {k: v for k, v in MLA.items() if k != "q_lora_rank"}
    assert config_of(absent).q_lora_rank == 1536
    assert config_of(absent | {"q_lora_rank": None}).q_lora_rank is None


def test_families_are_all_tested():
    tested = {spec.config().model_type for spec in (*MODELS.values(), *SHARED.values())}
    others = {"gemma3", "kimi_k2", "minimax_m1", "minimax_m3_vl", "minimax_text_01"}  # above
    convertible = {name for name, family in FAMILIES.items() if any(layer.split for layer in family.layers.values())}
    assert tested | others == convertible
