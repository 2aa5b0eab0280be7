"""MiniMax-01 (lightning and softmax layers) and MiniMax-M3 (block-sparse and dense layers): configs and weights."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import transformers

from jforge import cli, hf_config
from jforge.attention import lightning, msa
from jforge.core.compare import OUT
from jforge.harness import tiny_models
from jforge.harness.tiny_configs import MINIMAX, MINIMAX_M3
from jforge.harness.tiny_models import against_transformers
from jforge.hf import convert
from jforge.hf_config import layer, layers, load

EXAMPLES = Path(hf_config.__file__).parent / "configs"
LINEAR, FULL, BLOCKS = "linear_attention", "full_attention", "minimax_m3_sparse"
SHAPE = {
    "hidden_size": 10,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
}
TEXT_01 = SHAPE | {"model_type": "minimax", "attn_type_list": [0, 1]}
SPARSE = {
    "sparse_attention_freq": [0, 1],
    "sparse_num_index_heads": 2,
    "sparse_index_dim": 8,
    "sparse_block_size": 4,
    "sparse_topk_blocks": 3,
    "sparse_local_block": 2,
}
M3 = SHAPE | {"model_type": "minimax_m3_vl", "sparse_attention_config": SPARSE}
RELEASED = load(EXAMPLES / "minimax-text-01.json")


def sparse(**keys):
    return M3 | {"sparse_attention_config": SPARSE | keys}


# Configs


def test_minimax_text_01():
    got = layers(RELEASED)
    assert [name for name, _ in got] == (["lightning"] * 7 + ["gqa"]) * 10
    assert [cfg.layer_index for name, cfg in got if name == "lightning"] == [i for i in range(80) if i % 8 != 7]
    first, full = got[0][1], got[7][1]
    assert first == lightning.Config(hidden_size=6144, num_attention_heads=64, head_dim=128, rms_norm_eps=1e-6)
    assert (full.num_attention_heads, full.num_key_value_heads, full.head_dim, full.qk_norm) == (64, 8, 128, None)
    assert dict(full.rope_parameters) == {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5}


def test_slopes_of_minimax_text_01():
    """Golden values of heads 0, 31 and 63 in layers 0 and 78."""
    got = np.array([lightning.slopes(layer(RELEASED, index)[1])[[0, 31, 63]] for index in (0, 78)])
    want = [[0.91701321, 0.06250063, 0.00390629], [0.01161693, 0.00079177, 0.00004949]]
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-9)


def test_minimax_m3():
    got = layers(load(EXAMPLES / "minimax-m3.json"))
    assert [name for name, _ in got] == ["gqa"] * 3 + ["msa"] * 57
    assert len(set(got)) == 2 and got[3][1] == msa.msa.models["MiniMax-M3"]
    shared = {f.name for f in dataclasses.fields(got[0][1])}
    assert all(getattr(got[0][1], name) == getattr(got[3][1], name) for name in shared)


@pytest.mark.parametrize("model_type", ["minimax", "minimax_m1"])
def test_names_of_the_same_model(model_type):
    assert layers(RELEASED | {"model_type": model_type}) == layers(RELEASED)


def test_the_list_of_a_checkpoint_comes_before_that_of_the_class():
    """A transformers config made from a checkpoint's keys has an alternation in layer_types that is not the model's."""
    theirs = transformers.MiniMaxConfig(**{k: v for k, v in TEXT_01.items() if k != "model_type"})
    assert theirs.layer_types == [FULL, LINEAR]
    assert layers(theirs) == layers(TEXT_01)
    assert [name for name, _ in layers(theirs)] == ["lightning", "gqa"]


@pytest.mark.parametrize(
    "keys, share",
    [
        ({}, 1),
        ({"rotary_dim": 4}, 4 / 6),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, 1),
        ({"rotary_dim": 4, "partial_rotary_factor": 0.5}, 4 / 6),
        ({"rotary_dim": 2, "head_dim": None, "hidden_size": 16}, 0.5),
    ],
)
def test_how_many_channels_turn_in_minimax_01(keys, share):
    """rotary_dim counts; a partial_rotary_factor is without effect in transformers' minimax."""
    assert layer(TEXT_01 | keys, 1)[1].rope_parameters["partial_rotary_factor"] == share


@pytest.mark.parametrize("keys, share", [({}, 1), ({"rotary_dim": 2}, 1), ({"partial_rotary_factor": 2 / 3}, 2 / 3)])
def test_how_many_channels_turn_in_minimax_m3(keys, share):
    """The factor counts; rotary_dim is without effect in transformers' minimax_m3_vl."""
    for index in (0, 1):
        assert layer(M3 | keys, index)[1].rope_parameters["partial_rotary_factor"] == share


def test_spellings_of_the_index_branch_are_equal():
    flat = {
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_block_size": 4,
        "index_topk_blocks": 3,
        "index_local_blocks": 2,
        "layer_types": [FULL, BLOCKS],
    }
    got = layer(SHAPE | flat | {"model_type": "minimax_m3_vl_text"}, 1)
    assert got == layer(M3, 1) == layer(M3 | {key: 99 for key in flat if key.startswith("index_")}, 1)
    assert layer({"model_type": "minimax_m3_vl", "text_config": M3}, 1) == got
    theirs = transformers.MiniMaxM3VLConfig(text_config={k: v for k, v in M3.items() if k != "model_type"})
    assert layer(theirs, 1) == got


def test_first_blocks_that_are_always_picked():
    assert layer(sparse(sparse_init_block=1), 1)[1].index_init_blocks == 1
    assert layer(M3, 1)[1].index_init_blocks == 0


def test_slopes_between_two_powers_of_two():
    """Of MiniMax's own code; transformers has others, so a model of its type is refused."""
    six = {"num_attention_heads": 6, "num_key_value_heads": 2}
    name, cfg = layer(TEXT_01 | six | {"model_type": "minimax_text_01"}, 0)
    assert (name, cfg.num_attention_heads) == ("lightning", 6)
    with pytest.raises(NotImplementedError, match="^num_attention_heads is 6: for a number that is no power of two"):
        layer(TEXT_01 | six, 0)
    assert layer(TEXT_01 | six, 1)[0] == "gqa"


@pytest.mark.parametrize(
    "config, index, error, message",
    [
        (SHAPE | {"model_type": "minimax"}, 0, ValueError, "config has neither attn_type_list nor layer_types; one"),
        (SHAPE | {"model_type": "minimax_m3_vl"}, 0, ValueError, "config has neither layer_types nor sparse_atten"),
        (TEXT_01 | {"attn_type_list": [0, 2]}, 1, ValueError, r"attn_type_list is \[0, 2\]; it must be a list of 0 "),
        (TEXT_01 | {"attn_type_list": [0]}, 0, ValueError, r"attn_type_list is \[0\]; it must be .*num_hidden_la"),
        (TEXT_01 | {"rotary_dim": "4"}, 1, ValueError, "rotary_dim is '4'; it must be a positive integer"),
        (TEXT_01 | {"rotary_dim": 8}, 1, ValueError, r"partial_rotary_factor is 1.333.*; it must be in \(0, 1\]"),
        (TEXT_01 | {"head_dim": None, "hidden_size": 3}, 1, ValueError, "head_dim is None; it must be given: hidden_"),
        (TEXT_01 | {"block_size": 0}, 0, ValueError, "block_size is 0; it must be a positive integer"),
        (TEXT_01 | {"sliding_window": 8}, 1, NotImplementedError, "sliding_window is 8: only None has a mechanism"),
        (TEXT_01 | {"hidden_act": "gelu"}, 0, NotImplementedError, "hidden_act is 'gelu': only 'silu' has a mech"),
        (sparse(sparse_attention_freq=[1]), 0, ValueError, r"sparse_attention_freq is \[1\]; it must be a list of"),
        (sparse(sparse_num_index_heads=4), 1, ValueError, "index_n_heads is 4; it must be num_key_value_heads=2"),
        (sparse(sparse_topk_blocks=1), 1, ValueError, "index_topk_blocks is 1; it must be at least index_init_bl"),
        (sparse(sparse_block_size=0), 1, ValueError, "sparse_block_size is 0; it must be a positive integer"),
        (sparse(sparse_score_type="mean"), 1, NotImplementedError, "sparse_score_type is 'mean': only 'max' has"),
        (sparse(sparse_disable_index_value=[0, 0]), 1, NotImplementedError, "layer 1 has index values, as sparse_dis"),
        (M3 | {"qk_norm_type": "flat"}, 0, NotImplementedError, "qk_norm_type is 'flat': only 'per_head' has a mech"),
        (M3 | {"use_gemma_norm": False}, 1, NotImplementedError, "use_gemma_norm is False: only True has a mechanism"),
        (M3 | {"sparse_attention_config": 3}, 1, ValueError, "sparse_attention_config is 3; it must be an object"),
    ],
)
def test_bad_values(config, index, error, message):
    with pytest.raises(error, match=f"^{message}") as caught:
        layer(config, index)
    assert "\n" not in str(caught.value)


def test_index_values_of_other_layers_do_not_matter():
    assert layer(sparse(sparse_disable_index_value=[0, 1]), 1)[0] == "msa"


@pytest.mark.parametrize(
    "name, model, count, stored",
    [
        ("lightning", "minimax-text-01", 70, 70 * 4 * 64 * 128 * 128),
        ("gqa", "minimax-text-01", 10, 10 * 8192 * 2 * 8 * 128 * 2),
        ("msa", "minimax-m3", 57, 57 * 8192 * 2304),
    ],
)
def test_cost(name, model, count, stored, capsys):
    path = str(EXAMPLES / f"{model}.json")
    assert cli.main(["cost", name, "--config", path, "--context", "8k", "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert (got["layers"], got["all_layers"]["stored"]) == (count, stored)


# Weights


def weights(index: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"model.layers.{index}.self_attn.{x}": rng.normal(size=s).astype("float32") for x, s in shapes.items()}


LIGHTNING_SHAPES = {
    "qkv_proj.weight": (72, 10),
    "output_gate.weight": (24, 10),
    "norm.weight": (24,),
    "out_proj.weight": (10, 24),
}
INDEX_SHAPES = {
    "q_proj.weight": (24, 10),
    "k_proj.weight": (12, 10),
    "v_proj.weight": (12, 10),
    "o_proj.weight": (10, 24),
    "q_norm.weight": (6,),
    "k_norm.weight": (6,),
    "indexer.q_proj.weight": (16, 10),
    "indexer.k_proj.weight": (8, 10),
    "indexer.q_norm.weight": (8,),
    "indexer.k_norm.weight": (8,),
}


def test_where_the_weights_of_lightning_go():
    """Rows of qkv_proj: head 2 has its query in 36..41, its key in 42..47, its value in 48..53."""
    state = weights(0, LIGHTNING_SHAPES)
    att, cfg, params = convert(TEXT_01, state, 0)
    assert att is lightning.lightning and cfg.layer_index == 0
    assert {n: p.shape for n, p in params.items()} == lightning.shapes(cfg)
    w = {key.removeprefix("model.layers.0.self_attn."): value for key, value in state.items()}
    for name, rows in (("wq", slice(36, 42)), ("wk", slice(42, 48)), ("wv", slice(48, 54))):
        np.testing.assert_array_equal(params[name][:, 2], w["qkv_proj.weight"][rows].T)
    np.testing.assert_array_equal(params["wg"][:, 2], w["output_gate.weight"][12:18].T)
    np.testing.assert_array_equal(params["o_norm"][2], w["norm.weight"][12:18])
    np.testing.assert_array_equal(params["wo"][2], w["out_proj.weight"][:, 12:18].T)


def test_buffers_of_lightning_are_ignored():
    names = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
    buffers = weights(0, dict.fromkeys(names, (4, 1, 1)))
    _, cfg, params = convert(TEXT_01, weights(0, LIGHTNING_SHAPES) | buffers, 0)
    assert params.keys() == lightning.shapes(cfg).keys()


@pytest.mark.parametrize("spelling", ["transformers", "checkpoint"])
def test_where_the_weights_of_the_index_branch_go(spelling):
    state = weights(1, INDEX_SHAPES)
    w = {key.removeprefix("model.layers.1.self_attn."): value for key, value in state.items()}
    if spelling == "checkpoint":
        state = {f"language_{k.replace('indexer.', 'index_')}": v for k, v in state.items()}
    att, cfg, params = convert(M3, state, 1)
    assert att is msa.msa and {n: p.shape for n, p in params.items()} == msa.shapes(cfg)
    np.testing.assert_array_equal(params["wq_index"][:, 1], w["indexer.q_proj.weight"][8:].T)
    np.testing.assert_array_equal(params["wk_index"], w["indexer.k_proj.weight"].T)
    np.testing.assert_array_equal(params["q_index_norm"], w["indexer.q_norm.weight"])
    np.testing.assert_array_equal(params["k_index_norm"], w["indexer.k_norm.weight"])


@pytest.mark.parametrize(
    "config, index, shapes, message",
    [
        (TEXT_01, 0, LIGHTNING_SHAPES | {"qkv_proj.weight": (60, 10)}, r"qkv_proj.weight has shape \(60, 10\); it m"),
        (TEXT_01, 0, INDEX_SHAPES, r"self_attn.qkv_proj.weight is missing .*; it must have shape \(72, 10\)"),
        (TEXT_01, 0, LIGHTNING_SHAPES | {"out_proj.bias": (10,)}, "out_proj.bias is in the state dict, but the config"),
        (M3, 1, {k: v for k, v in INDEX_SHAPES.items() if "indexer" not in k}, "indexer.q_proj.weight is missing"),
        (M3, 1, INDEX_SHAPES | {"index_o_proj.weight": (10, 12)}, "index_o_proj.weight is in the state dict, but the"),
        (M3, 0, INDEX_SHAPES, "indexer.q_proj.weight is in the state dict, but the config has no place for it"),
    ],
)
def test_bad_weights(config, index, shapes, message):
    with pytest.raises(ValueError, match=message):
        convert(config, weights(index, shapes), index)


# Against transformers at the edges of blocks: 4 tokens in lightning, 2 in MSA

EDGES = {"prefill 4, decode": (4,) + (1,) * 6, "prefill 8, decode": (8, 1, 1), "chunks": (4, 4, 1, 1)}


@pytest.mark.parametrize("name", ["minimax, lightning", "minimax_m3, block-sparse"])
def test_edges_of_blocks(name):
    _, errors = against_transformers(name, EDGES)
    assert set(errors) == {"forward", "cache", *EDGES}
    assert max(errors.values()) <= OUT["float32"], errors


# The comparison itself


def swap(params, a, b):
    return params | {a: params[b], b: params[a]}


@pytest.mark.parametrize(
    "name, fields, change",
    [
        ("minimax, lightning", {"layer_index": 3}, None),
        ("minimax, lightning", {"num_hidden_layers": 5}, None),
        ("minimax, lightning", {"rms_norm_eps": 0.01}, None),
        ("minimax, lightning", {}, lambda params: swap(params, "wq", "wk")),
        ("minimax, lightning", {}, lambda params: swap(params, "wk", "wv")),
        ("minimax", {"rope_parameters": MINIMAX["rope_parameters"]}, None),
        ("minimax_m3, block-sparse", {"index_topk_blocks": 3}, None),
        ("minimax_m3, block-sparse", {"index_block_size": 1}, None),
        ("minimax_m3, block-sparse", {"norm_offset": 0.0}, None),
        ("minimax_m3, block-sparse", {}, lambda params: params | {"wq_index": params["wq_index"][:, ::-1]}),
        ("minimax_m3", {"rope_parameters": MINIMAX_M3["rope_parameters"] | {"partial_rotary_factor": 1.0}}, None),
    ],
)
def test_it_sees_a_wrong_field_or_weight(name, fields, change, monkeypatch):
    def wrong(*args):
        att, cfg, params = convert(*args)
        return att, dataclasses.replace(cfg, **fields), change(params) if change else params

    monkeypatch.setattr(tiny_models.hf, "convert", wrong)
    _, errors = against_transformers(name, {"one chunk": (9,)})
    assert errors["forward"] > 10 * OUT["float32"]
    assert errors["one chunk"] > 10 * OUT["float32"]


@pytest.mark.parametrize("name, leaf", [("minimax, lightning", "state"), ("minimax_m3, block-sparse", "k_index")])
def test_it_compares_every_buffer(name, leaf, monkeypatch):
    """A cache with one buffer off by a factor, undone before each step: only the contents can tell."""

    def scaled(cache, by):
        return dataclasses.replace(cache, **{leaf: getattr(cache, leaf) * by})

    def around(function):
        def call(params, cfg, x, cache):
            y, cache = function(params, cfg, x, scaled(cache, 0.5))
            return y, scaled(cache, 2.0)

        return call

    def wrong(*args):
        att, cfg, params = convert(*args)
        return att._replace(prefill=around(att.prefill), decode=around(att.decode)), cfg, params

    monkeypatch.setattr(tiny_models.hf, "convert", wrong)
    _, errors = against_transformers(name, {"prefill 5, decode": (5, 1)})
    assert errors.pop("cache") > 0.1
    assert max(errors.values()) <= OUT["float32"]
