"""DeepSeek-V4's config.json in both spellings, and what it may not say."""

import json
from pathlib import Path

import numpy as np
import pytest
import transformers
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

from jforge import cli, hf_config
from jforge.attention import REGISTRY, csa, hca, v4
from jforge.core import rope
from jforge.hf_config import layer, layers, load

EXAMPLES = Path(hf_config.__file__).parent / "configs"
FLASH, PRO = (load(EXAMPLES / f"deepseek-v4-{size}.json") for size in ("flash", "pro"))
WINDOW, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
SHAPE = {
    "model_type": "deepseek_v4",
    "hidden_size": 10,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "head_dim": 8,
    "q_lora_rank": 6,
    "o_groups": 2,
    "o_lora_rank": 3,
    "sliding_window": 4,
    "index_n_heads": 2,
    "index_head_dim": 6,
    "index_topk": 2,
    "max_position_embeddings": 256,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
TINY = SHAPE | {"compress_ratios": [0, 4, 128], "qk_rope_head_dim": 4}
MAIN = {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}
COMPRESS = YARN | {"rope_type": "yarn", "rope_theta": 3e5, "partial_rotary_factor": 0.5, "attention_factor": 1.0}
FLAT = TINY | {"rope_theta": 2e4, "compress_rope_theta": 3e5, "rope_scaling": YARN | {"type": "yarn"}}
NESTED = SHAPE | {"layer_types": [WINDOW, SPARSE, HEAVY], "rope_parameters": {"main": MAIN, "compress": COMPRESS}}


def theirs(config):
    return transformers.DeepseekV4Config(**{key: value for key, value in config.items() if key != "model_type"})


def nested(**changes):
    """NESTED with other entries; {} changes nothing, None takes a key away."""
    parts = {"main": MAIN, "compress": COMPRESS}
    for name, change in changes.items():
        parts[name] = {key: value for key, value in (parts[name] | change).items() if value is not None}
    return NESTED | {"rope_parameters": parts}


# Released models


@pytest.mark.parametrize(
    "config, kinds, size",
    [
        (FLASH, ["v4_window"] * 2 + ["csa", "hca"] * 20 + ["csa"], "Flash"),
        (PRO, ["hca"] * 2 + ["csa", "hca"] * 29 + ["csa"], "Pro"),
    ],
)
def test_released_models(config, kinds, size):
    """The last entry of compress_ratios is that of the head for predicting more than one token."""
    got = layers(config)
    assert [name for name, _ in got] == kinds and len(config["compress_ratios"]) == len(kinds) + 1
    for name, cfg in set(got):
        assert cfg == REGISTRY[name].models[f"DeepSeek-V4-{size}"]


def test_order_of_the_class_default():
    """Without a list of kinds the class of transformers makes up an order in which Pro's first compressed layer is
    another: such a file is refused."""
    without = {key: value for key, value in PRO.items() if key != "compress_ratios"}
    assert theirs(without).layer_types[:4] == [HEAVY, HEAVY, HEAVY, SPARSE]
    assert theirs(PRO).layer_types[:4] == [HEAVY, HEAVY, SPARSE, HEAVY]
    with pytest.raises(ValueError, match="^config has neither layer_types nor compress_ratios; one must list"):
        layers(without)


@pytest.mark.parametrize(
    "name, config, count, stored",
    [  # 8192 tokens in bfloat16: a ring of 128, entries of 1024 B, index keys of 256 B, float32 rows
        ("v4_window", FLASH, 2, 2 * 128 * 1024),
        ("csa", FLASH, 21, 21 * (128 * 1024 + 2048 * (1024 + 256) + 65536 + 16384)),
        ("hca", PRO, 31, 31 * (128 * 1024 + 64 * 1024 + 524288)),
    ],
)
def test_cost(name, config, count, stored, capsys):
    path = str(EXAMPLES / f"deepseek-v4-{'flash' if config is FLASH else 'pro'}.json")
    assert cli.main(["cost", name, "--config", path, "--context", "8k", "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert (got["layers"], got["all_layers"]["stored"]) == (count, stored)


# Spellings


def test_both_spellings_are_equal():
    got = layers(FLAT)
    assert got == layers(NESTED) == layers(theirs(FLAT)) == layers(theirs(NESTED))
    assert [name for name, _ in got] == ["v4_window", "csa", "hca"]
    assert [cfg.qk_rope_head_dim for _, cfg in got] == [4, 4, 4]
    window, sparse, heavy = (cfg for _, cfg in got)
    assert dict(window.rope_parameters) == MAIN | {"partial_rotary_factor": 1.0}
    assert sparse.rope_parameters == heavy.rope_parameters
    assert dict(sparse.rope_parameters) == COMPRESS | {"partial_rotary_factor": 1.0}


def test_class_defaults():
    sizes = ("hidden_size", "num_attention_heads", "num_hidden_layers")
    config = {"model_type": "deepseek_v4", "compress_ratios": [0, 4, 128], **{key: FLASH[key] for key in sizes}}
    config |= {"num_hidden_layers": 3}
    got = layers(config)
    assert got == layers(theirs(config))
    plain = {"rope_type": "default", "rope_theta": 1.6e5}
    assert got[1][1] == csa.Config(**v4.FLASH, **csa._INDEX, rope_parameters=plain, compress_rate=4, index_topk=512)
    assert got[2][1] == hca.Config(**v4.FLASH, rope_parameters=plain, compress_rate=128)


@pytest.mark.parametrize(
    "keys, rates",
    [
        ({}, [4, 128]),
        ({"compress_rates": {SPARSE: 2, HEAVY: 6}}, [2, 6]),
        ({"compress_rate_csa": 3, "compress_rate_hca": 5}, [3, 5]),
        ({"compress_rates": {SPARSE: 2, HEAVY: 6}, "compress_rate_hca": 7}, [2, 7]),
    ],
)
def test_tokens_of_a_block(keys, rates):
    config = NESTED | keys
    assert [layer(config, index)[1].compress_rate for index in (1, 2)] == rates
    assert layers(theirs(json.loads(json.dumps(config)))) == layers(config)


@pytest.mark.parametrize(
    "config, R",
    [
        (TINY, 4),
        (TINY | {"qk_rope_head_dim": None, "head_dim": 16}, 2),
        (TINY | {"qk_rope_head_dim": None, "partial_rotary_factor": 0.75}, 6),
        (nested(main={"partial_rotary_factor": 0.25}, compress={"partial_rotary_factor": 0.25}), 2),
        (nested(main={"partial_rotary_factor": None}, compress={"partial_rotary_factor": None})
         | {"partial_rotary_factor": 0.75}, 6),
    ],
)  # fmt: skip
def test_channels_that_turn(config, R):
    assert [cfg.qk_rope_head_dim for _, cfg in layers(config)] == [R] * 3
    given = {key: value for key, value in json.loads(json.dumps(config)).items() if value is not None}
    assert 2 * len(DeepseekV4RotaryEmbedding(theirs(given)).compress_inv_freq) == R


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        FLAT,
        NESTED,
        FLAT | {"rope_scaling": YARN | {"type": "yarn", "truncate": False}},
        FLAT | {"rope_scaling": YARN | {"type": "yarn"}, "original_max_position_embeddings": 32},
        FLAT | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 8, "mscale": 0.7}},
        FLAT | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        nested(compress={"truncate": False, "beta_fast": 4, "beta_slow": 0.5}),
        nested(compress={"original_max_position_embeddings": None}),
        PRO,
    ],
)
def test_frequencies_are_those_of_transformers(config):
    """Of window layers and of those that compress; the factor on cos and sin is 1."""
    table = DeepseekV4RotaryEmbedding(theirs(json.loads(json.dumps(config))))
    found = {name: cfg for name, cfg in layers(config)}
    for name, label in (("v4_window", "main"), ("csa", "compress"), ("hca", "compress")):
        if (cfg := found.get(name)) is not None:
            theta, factor = rope.frequencies(cfg.rope_parameters, cfg.qk_rope_head_dim)
            np.testing.assert_allclose(theta, getattr(table, f"{label}_inv_freq"), rtol=1e-6)
            assert factor == getattr(table, f"{label}_attention_scaling") == 1


def test_a_nested_yarn_without_a_factor_would_scale_in_transformers():
    config = nested(compress={"attention_factor": None})
    table = DeepseekV4RotaryEmbedding(theirs(json.loads(json.dumps(config))))
    assert table.compress_attention_scaling == pytest.approx(1 + 0.1 * np.log(4))
    assert layer(config, 0) == layer(NESTED, 0)
    with pytest.raises(ValueError, match="^rope_parameters.compress has no attention_factor: transformers would not"):
        layer(config, 1)


# What a file may not say


@pytest.mark.parametrize(
    "config, index, message",
    [
        (TINY | {"compress_ratios": [0, 4]}, 0, r"compress_ratios is \[0, 4\]; it must be .*num_hidden_layers=3"),
        (TINY | {"compress_ratios": 4}, 0, "compress_ratios is 4; it must be a list of num_hidden_layers=3 entries"),
        (TINY | {"layer_types": [SPARSE, SPARSE, HEAVY]}, 0, f"layer_types is .*; it must be {WINDOW} in layer 0, as"),
        (TINY | {"layer_types": [WINDOW]}, 0, "layer_types is .*num_hidden_layers=3"),
        (TINY | {"compress_rates": {SPARSE: 2}}, 1, f"compress_ratios is 4; it must be 2 in layer 1, as .* {SPARSE}"),
        (TINY | {"compress_rate_hca": 64}, 2, "compress_ratios is 128; it must be 64 in layer 2"),
        (NESTED | {"compress_rates": {SPARSE: 2}}, 2, f"compress_rates has no entry for {HEAVY}"),
        (NESTED | {"compress_rates": {SPARSE: 0}}, 1, f"{SPARSE} is 0; it must be a positive integer"),
        (NESTED | {"compress_rates": 4}, 1, "compress_rates is 4; it must be an object or null"),
        (NESTED | {"compress_rate_csa": "4"}, 1, "compress_rate_csa is '4'; it must be a positive integer"),
        (TINY | {"num_key_value_heads": 4}, 0, "num_key_value_heads is 4; it must be 1, since all heads share one"),
        (TINY | {"sliding_window": None}, 0, "config has no sliding_window"),
        (TINY | {"q_lora_rank": 0}, 0, "q_lora_rank is 0; it must be a positive integer"),
        (TINY | {"o_groups": 3}, 0, "num_attention_heads is 4; it must be a multiple of o_groups=3"),
        (TINY | {"index_head_dim": 2}, 1, "index_head_dim is 2; it must be at least qk_rope_head_dim=4"),
        (TINY | {"index_topk": -1}, 1, "index_topk is -1; it must be a positive integer"),
        (TINY | {"rms_norm_eps": 0}, 0, "rms_norm_eps is 0; it must be a positive number"),
        (TINY | {"qk_rope_head_dim": 3}, 0, "qk_rope_head_dim is 3; it must be even and at most head_dim=8"),
        (TINY | {"qk_rope_head_dim": 10}, 0, "qk_rope_head_dim is 10; it must be even and at most head_dim=8"),
        (TINY | {"partial_rotary_factor": 0.75}, 0, "qk_rope_head_dim is 4; it must be 6, partial_rotary_factor=0.75"),
        (TINY | {"partial_rotary_factor": "1"}, 0, "partial_rotary_factor is '1'; it must be a positive number"),
        (TINY | {"rope_theta": 0}, 0, "rope_theta is 0; it must be a positive number"),
        (TINY | {"compress_rope_theta": "1e5"}, 1, "compress_rope_theta is '1e5'; it must be a positive number"),
        (FLAT | {"rope_scaling": {"type": "yarn"}}, 1, "rope_parameters has no factor; rope_type 'yarn' needs it"),
        (FLAT | {"rope_scaling": {"type": "dynamic"}}, 1, "rope_type is 'dynamic'; it must be one of default"),
        (FLAT | {"rope_scaling": YARN | {"type": "yarn", "attention_factor": 1.2}}, 1, "attention_factor is 1.2; it"),
        (FLAT | {"rope_scaling": 4}, 1, "rope_scaling is 4; it must be an object or null"),
        (TINY | {"rope_parameters": {"rope_theta": 5e4}}, 0, "rope_theta in rope_parameters is 50000.0; it must be 1"),
        (TINY | {"rope_parameters": {"partial_rotary_factor": 1.0}}, 1, "partial_rotary_factor in rope_parameters is"),
        (NESTED | {"rope_parameters": {"main": MAIN}}, 0, "rope_parameters has no entry for compress"),
        (NESTED | {"rope_parameters": {"main": 3, "compress": COMPRESS}}, 0, "main is 3; it must be an object or null"),
        (nested(main={"partial_rotary_factor": None}), 0, "rope_parameters.main has no partial_rotary_factor: transf"),
        (nested(compress={"rope_theta": None}), 1, "rope_parameters.compress has no rope_theta: transformers would"),
        (nested(compress={"factor": "4"}), 1, "factor is '4'; it must be a positive number"),
    ],
)
def test_bad_values(config, index, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        layer(config, index)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config, message",
    [
        (TINY | {"compress_ratios": [0, 2, 1]}, "compress_ratios has 2 for layer 1; only 0 .* have a mechanism"),
        (TINY | {"compress_ratios": [0, True, 4]}, "compress_ratios has True for layer 1; only 0 "),
        (TINY | {"compress_ratios": [0, [4], 4]}, r"compress_ratios has \[4\] for layer 1; only 0 "),
        (TINY | {"attention_bias": True}, "attention_bias is True: only False has a mechanism"),
        (NESTED | {"layer_types": [WINDOW, "full_attention", HEAVY]}, "layer 1 of deepseek_v4 is full_attention; only"),
        (TINY | {"model_type": "deepseek_v41"}, "model_type 'deepseek_v41' is not known"),
    ],
)
def test_what_has_no_mechanism(config, message):
    with pytest.raises(NotImplementedError, match=f"^{message}") as error:
        layers(config)
    assert "\n" not in str(error.value)


def test_what_is_not_attention_is_not_looked_at():
    """Hash layers, experts, hyper-connections and heads for more tokens; the window alone needs no index."""
    more = {"num_hash_layers": 2, "mlp_layer_types": ["hash_moe"] * 3, "hc_mult": 2, "num_nextn_predict_layers": 3}
    assert layers(TINY | more | {"compress_ratios": [0, 4, 128, 0, 0, 0]}) == layers(TINY)
    assert layer(TINY | {"index_topk": -1, "compress_rates": 3}, 0) == layer(TINY, 0)
