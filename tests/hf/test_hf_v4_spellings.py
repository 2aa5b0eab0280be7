"""DeepSeek-V4's config.json in both spellings, against the class of transformers and its rotary tables."""

import json
from pathlib import Path

import numpy as np
import pytest
import transformers
from families import HEAVY, SPARSE, V4, V4_COMPRESS, V4_FLAT, V4_MAIN, V4_NESTED, YARN, nested
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

import jforge
from jforge.attention import csa, hca, v4_window
from jforge.core import rope
from jforge.hf import layer, layers, load

FLASH, PRO = (load(Path(jforge.__file__).parent / f"configs/deepseek-v4-{size}.json") for size in ("flash", "pro"))


def theirs(config):
    return transformers.DeepseekV4Config(**{key: value for key, value in config.items() if key != "model_type"})


def test_order_of_the_class_default():
    """Without a list of kinds the class of transformers makes up an order in which Pro's first compressed layer is
    another: such a file is refused."""
    without = {key: value for key, value in PRO.items() if key != "compress_ratios"}
    assert theirs(without).layer_types[:4] == [HEAVY, HEAVY, HEAVY, SPARSE]
    assert theirs(PRO).layer_types[:4] == [HEAVY, HEAVY, SPARSE, HEAVY]
    with pytest.raises(ValueError, match="^config has neither layer_types nor compress_ratios; one must list"):
        layers(without)


def test_both_spellings_are_equal():
    got = layers(V4_FLAT)
    assert got == layers(V4_NESTED) == layers(theirs(V4_FLAT)) == layers(theirs(V4_NESTED))
    assert [name for name, _ in got] == ["v4_window", "csa", "hca"]
    assert [cfg.qk_rope_head_dim for _, cfg in got] == [4, 4, 4]
    window, sparse, heavy = (cfg for _, cfg in got)
    assert dict(window.rope_parameters) == V4_MAIN | {"partial_rotary_factor": 1.0}
    assert sparse.rope_parameters == heavy.rope_parameters
    assert dict(sparse.rope_parameters) == V4_COMPRESS | {"partial_rotary_factor": 1.0}


def test_class_defaults():
    sizes = ("hidden_size", "num_attention_heads", "num_hidden_layers")
    config = {"model_type": "deepseek_v4", "compress_ratios": [0, 4, 128], **{key: FLASH[key] for key in sizes}}
    config |= {"num_hidden_layers": 3}
    got = layers(config)
    assert got == layers(theirs(config))
    plain = {"rope_type": "default", "rope_theta": 1.6e5}
    picks = {**csa._INDEX, "index_topk": 512}
    assert got[1][1] == csa.Config(**v4_window.FLASH, **picks, rope_parameters=plain, compress_rate=4)
    assert got[2][1] == hca.Config(**v4_window.FLASH, rope_parameters=plain, compress_rate=128)


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
    config = V4_NESTED | keys
    assert [layer(config, index)[1].compress_rate for index in (1, 2)] == rates
    assert layers(theirs(json.loads(json.dumps(config)))) == layers(config)


@pytest.mark.parametrize(
    "config, R",
    [
        (V4, 4),
        (V4 | {"qk_rope_head_dim": None, "head_dim": 16}, 2),
        (V4 | {"qk_rope_head_dim": None, "partial_rotary_factor": 0.75}, 6),
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
        V4,
        V4_FLAT,
        V4_NESTED,
        V4_FLAT | {"rope_scaling": YARN | {"type": "yarn", "truncate": False}},
        V4_FLAT | {"rope_scaling": YARN | {"type": "yarn"}, "original_max_position_embeddings": 32},
        V4_FLAT | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 8, "mscale": 0.7}},
        V4_FLAT | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
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
    assert layer(config, 0) == layer(V4_NESTED, 0)


def test_what_is_not_attention_is_not_looked_at():
    """Hash layers, experts, hyper-connections and heads for more tokens; the window alone needs no index."""
    more = {"num_hash_layers": 2, "mlp_layer_types": ["hash_moe"] * 3, "hc_mult": 2, "num_nextn_predict_layers": 3}
    assert layers(V4 | more | {"compress_ratios": [0, 4, 128, 0, 0, 0]}) == layers(V4)
    assert layer(V4 | {"index_topk": -1, "compress_rates": 3}, 0) == layer(V4, 0)
