"""Windows and sinks: configs and weights of Mistral, Gemma 2 and 3, gpt-oss and Qwen's window layers."""

import dataclasses
import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jforge import cli, hf_config
from jforge.core.compare import OUT
from jforge.harness import tiny_models
from jforge.harness.tiny_configs import LINEAR, WINDOW
from jforge.harness.tiny_models import SPLITS, against_transformers
from jforge.hf import convert
from jforge.hf_config import layer, layers, load

EXAMPLES = Path(hf_config.__file__).parent / "configs"
SHAPE = {
    "hidden_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "num_hidden_layers": 6,
    "max_position_embeddings": 256,
}
GPT_OSS = SHAPE | {"model_type": "gpt_oss"}
SLIDING, FULL = "sliding_attention", "full_attention"


def config(model_type, **keys):
    return {"model_type": model_type, **SHAPE, **keys}


# Configs


def test_mistral_7b():
    got = layers(load(EXAMPLES / "mistral-7b-v0.1.json"))
    assert len(got) == 32 and set(got) == {got[0]}
    name, cfg = got[0]
    assert (name, cfg.sliding_window) == ("sliding_window", 4096)
    assert (cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim) == (4096, 32, 8, 128)
    assert cfg.rope_parameters["rope_theta"] == 1e4 and not cfg.attention_bias


def test_gemma_3_27b():
    got = layers(load(EXAMPLES / "gemma-3-27b.json"))
    assert [name for name, _ in got] == ["gqa" if i % 6 == 5 else "sliding_window" for i in range(62)]
    local, full = got[0][1], got[5][1]
    assert local.sliding_window == 1024
    for cfg in (local, full):
        assert (cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim) == (5376, 32, 16, 128)
        assert (cfg.scaling, cfg.qk_norm, cfg.norm_offset) == (168**-0.5, "head", 1.0)
        assert cfg.attn_logit_softcapping is None
    assert dict(local.rope_parameters) == {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1}
    assert full.rope_parameters["rope_theta"] == 1e6 and full.rope_parameters["factor"] == 8.0


def test_gpt_oss_120b():
    got = layers(load(EXAMPLES / "gpt-oss-120b.json"))
    assert [name for name, _ in got] == ["sinks"] * 36
    assert [cfg.sliding_window for _, cfg in got] == [128, None] * 18
    cfg = got[0][1]
    assert dataclasses.replace(cfg, sliding_window=None) == got[1][1]
    assert (cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim) == (2880, 64, 8, 64)
    assert cfg.attention_bias and cfg.attention_output_bias and cfg.scaling == 64**-0.5
    assert cfg.rope_parameters["rope_theta"] == 1.5e5 and cfg.rope_parameters["truncate"] is False


def test_gemma_2_caps_every_layer():
    local, full = (layer(config("gemma2", attn_logit_softcapping=30.0), index)[1] for index in (0, 1))
    assert local.attn_logit_softcapping == full.attn_logit_softcapping == 30.0
    assert local.sliding_window == 4096 and local.scaling == 1 / 16


def test_local_rope_spellings_of_gemma3_are_equal():
    old = config("gemma3_text", rope_theta=5e5, rope_local_base_freq=2e4, rope_scaling={"type": "linear", "factor": 4})
    new = {FULL: {"rope_type": "linear", "factor": 4, "rope_theta": 5e5}, SLIDING: {"rope_theta": 2e4}}
    assert layers(old) == layers(config("gemma3_text", rope_parameters=new))
    assert dict(layer(old, 0)[1].rope_parameters) == {
        "rope_type": "default",
        "rope_theta": 2e4,
        "partial_rotary_factor": 1,
    }


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


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "qwen3_moe"])
def test_qwen_windows_read_as_transformers_does(model_type):
    keys = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    got = layers(config(model_type, **keys))
    assert got == layers(transformers.AutoConfig.for_model(**config(model_type, **keys)))
    windows = [getattr(cfg, "sliding_window", None) for _, cfg in got]
    assert windows == ([8] * 6 if model_type == "qwen3_moe" else [None] * 2 + [8] * 4)


@pytest.mark.parametrize("listed", [[FULL] * 6, [SLIDING, FULL] * 3])
def test_a_window_of_mistral_holds_in_every_layer(listed):
    """transformers masks by sliding_window alone and warns of the list."""
    got = layers(config("mistral", sliding_window=8, layer_types=listed))
    assert [(name, cfg.sliding_window) for name, cfg in got] == [("sliding_window", 8)] * 6


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0; it must be a positive integer"),
        (
            {"model_type": "mistral", "sliding_window": "4096"},
            "sliding_window is '4096'; it must be a positive integer",
        ),
        ({"model_type": "mistral", "sliding_window": True}, "sliding_window is True; it must be a positive integer"),
        (
            {"model_type": "mistral", "sliding_window": None, "layer_types": [SLIDING] * 6},
            "config has no sliding_window$",
        ),
        ({"model_type": "gemma2", "sliding_window": None}, "config has no sliding_window$"),
        ({"model_type": "gemma2", "sliding_window": -1}, "sliding_window is -1; it must be a positive integer"),
        ({"model_type": "gemma3_text", "sliding_window": 4.0}, "sliding_window is 4.0; it must be a positive integer"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "sliding_window_pattern is 0; it must be a pos"),
        ({"model_type": "gpt_oss", "sliding_window": None}, "config has no sliding_window$"),
        ({"model_type": "gpt_oss", "sliding_window": 0}, "sliding_window is 0; it must be a positive integer"),
        ({"model_type": "gpt_oss", "layer_types": [FULL]}, "layer_types is .*num_hidden_layers=6"),
        ({"model_type": "gpt_oss", "num_key_value_heads": 3}, "num_attention_heads is 4; it must be a multiple of"),
        ({"model_type": "qwen3", "layer_types": [FULL, SLIDING] * 3}, "use_sliding_window is None; it must be true in"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0},
            "sliding_window is 0; it must be a positive integer",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "4"},
            "max_window_layers is '4'; it must be an integer, 0 or more",
        ),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": -1},
            "max_window_layers is -1; it must be an integer, 0 or more",
        ),
    ],
)
def test_bad_values(keys, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        layers(SHAPE | keys)
    assert "\n" not in str(error.value)


def cost(name, model, capsys):
    path = str(EXAMPLES / f"{model}.json")
    assert cli.main(["cost", name, "--config", path, "--context", "8k", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_cost_of_gpt_oss(capsys):
    got = cost("sinks", "gpt-oss-120b", capsys)
    token = 2 * 8 * 64 * 2
    assert got["layers"] == 36
    assert got["all_layers"]["read"] == got["all_layers"]["stored"] == 18 * token * (128 + 8192)
    assert got["all_layers"]["bytes_per_token"] == 18 * token


def test_cost_of_gemma_3(capsys):
    token = 2 * 16 * 128 * 2
    for name, count, read in (("sliding_window", 52, 1024), ("gqa", 10, 8192)):
        got = cost(name, "gemma-3-27b", capsys)
        assert got["layers"] == count and got["all_layers"]["read"] == count * token * read


# Weights


def weights(**extra) -> dict[str, np.ndarray]:
    """Layer 0 of a GPT_OSS model."""
    shapes = {"q_proj": (24, 12), "k_proj": (12, 12), "v_proj": (12, 12), "o_proj": (12, 24)}
    rng = np.random.default_rng(0)
    state = {f"{x}.weight": rng.normal(size=shape) for x, shape in shapes.items()}
    state |= {f"{x}.bias": rng.normal(size=shape[0]) for x, shape in shapes.items()}
    state |= {"sinks": rng.normal(size=4)} | extra
    return {f"model.layers.0.self_attn.{x}": w.astype(np.float32) for x, w in state.items() if w is not None}


def test_where_sinks_and_biases_go():
    state = weights()
    att, cfg, params = convert(GPT_OSS, state, 0)
    w = {key.removeprefix("model.layers.0.self_attn."): value for key, value in state.items()}
    assert {n: p.shape for n, p in params.items()} == {
        "wq": (12, 4, 6), "wk": (12, 2, 6), "wv": (12, 2, 6), "wo": (4, 6, 12),
        "bq": (4, 6), "bk": (2, 6), "bv": (2, 6), "bo": (12,), "sinks": (4,),
    }  # fmt: skip
    np.testing.assert_array_equal(params["sinks"], w["sinks"])
    np.testing.assert_array_equal(params["bo"], w["o_proj.bias"])
    np.testing.assert_array_equal(params["bq"][3], w["q_proj.bias"][18:])
    np.testing.assert_array_equal(params["bk"][1], w["k_proj.bias"][6:])
    np.testing.assert_array_equal(params["bv"][1], w["v_proj.bias"][6:])


@pytest.mark.parametrize(
    "keys, extra, message",
    [
        ({}, {"sinks": None}, r"self_attn.sinks is missing .*; it must have shape \(4,\)$"),
        ({}, {"sinks": np.zeros(2)}, r"self_attn.sinks has shape \(2,\); it must be \(4,\)"),
        ({}, {"o_proj.bias": None}, r"o_proj.bias is missing .*; it must have shape \(12,\)$"),
        ({"attention_bias": False}, {}, "q_proj.bias is in the state dict, but the config has no place for it"),
        ({"model_type": "llama", "attention_bias": True}, {}, "self_attn.sinks is in the state dict, but the config"),
    ],
)
def test_bad_weights(keys, extra, message):
    with pytest.raises(ValueError, match=message):
        convert(GPT_OSS | keys, weights(**extra), 0)


# Against transformers at the edges of the window

LENGTH = 3 * WINDOW + 2
EDGES = {
    f"prefill {size}, decode": (size,) + (1,) * (LENGTH - size)
    for size in (WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 2 * WINDOW + 1)
} | {
    "chunks": (WINDOW - 1, 1, WINDOW, 1, WINDOW + 1),
    "chunks, the last too long for the ring": (1, WINDOW, 2 * WINDOW + 1),
}


@pytest.mark.parametrize("name", ["mistral, window", "gemma2, window", "gemma3, window", "gpt_oss"])
def test_edges_of_the_window(name):
    _, errors = against_transformers(name, EDGES)
    assert set(errors) == {"forward", "cache", *EDGES}
    assert max(errors.values()) <= OUT["float32"], errors


# The comparison itself


def with_layer(monkeypatch, change):
    """Let the comparison convert every layer to change(att, cfg, params)."""
    monkeypatch.setattr(tiny_models.hf, "convert", lambda *args: change(*convert(*args)))


@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("name", ["mistral, window", "gpt_oss"])
def test_it_sees_a_window_wrong_by_one(name, by, monkeypatch):
    def wrong(att, cfg, params):
        size = cfg.sliding_window and cfg.sliding_window + by
        return att, dataclasses.replace(cfg, sliding_window=size), params

    with_layer(monkeypatch, wrong)
    _, errors = against_transformers(name)
    assert min(errors[mode] for mode in ("forward", *SPLITS)) > 1000 * OUT["float32"]
    assert errors["cache"] == math.inf


@pytest.mark.parametrize("order", ["one slot on", "oldest first"])
def test_it_sees_another_order_of_the_ring(order, monkeypatch):
    """The outputs do not depend on the order that a consistent implementation chooses; the cache does."""

    def moved(cache, sign):
        full = jnp.where(cache.length[0] > WINDOW, -cache.length[0] % WINDOW, 0)
        by = sign * (1 if order == "one slot on" else full)
        return type(cache)(jnp.roll(cache.k, by, axis=1), jnp.roll(cache.v, by, axis=1), cache.length)

    def change(att, cfg, params):
        def around(function):
            def call(params, cfg, x, cache):
                y, cache = function(params, cfg, x, moved(cache, -1))
                return y, moved(cache, 1)

            return call

        return att._replace(prefill=around(att.prefill), decode=around(att.decode)), cfg, params

    with_layer(monkeypatch, change)
    _, errors = against_transformers("mistral, window")
    assert errors.pop("cache") > 0.1
    assert max(errors.values()) <= OUT["float32"]


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("gemma2, window", "attn_logit_softcapping", None),
        ("gemma3, window", "norm_offset", 0.0),
        ("gemma3, window", "rope_parameters", LINEAR),
        ("gpt_oss", "rope_parameters", {"truncate": True}),
        ("gpt_oss", "rope_parameters", {"attention_factor": 1.0}),
        ("gpt_oss", "sinks", 0.0),
    ],
)
def test_it_sees_a_wrong_field(name, field, value, monkeypatch):
    def wrong(att, cfg, params):
        if field == "sinks":
            return att, cfg, params | {"sinks": params["sinks"] * value}
        new = {**cfg.rope_parameters, **value} if field == "rope_parameters" else value
        return att, dataclasses.replace(cfg, **{field: new}), params

    with_layer(monkeypatch, wrong)
    _, errors = against_transformers(name, {"one chunk": (2 * WINDOW,)})
    assert errors["forward"] > 10 * OUT["float32"]
    assert errors["one chunk"] > 10 * OUT["float32"]
