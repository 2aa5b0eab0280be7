"""Which causal-LM types of transformers convert: docs/families.md, and how the weights of fused projections lie."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import transformers

from jforge import hf
from jforge.harness.tiny_models import MODELS
from jforge.harness.tiny_shared import SHARED
from jforge.hf.config import text_config
from jforge.hf.families import MISSING
from jforge.hf.families.parts import PACKINGS

_SPEC = importlib.util.spec_from_file_location("docs_families", Path(__file__).parents[2] / "docs" / "families.py")
families = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(families)
ROWS = families.rows()


@pytest.mark.pinned
def test_the_list_is_up_to_date():
    text = families.DOCUMENT.read_text(encoding="utf-8")
    assert families.render(text) == text, "python docs/families.py makes it anew"


def test_every_type_converts_or_says_what_is_missing():
    assert all(bool(names) != bool(missing) for _, names, missing in ROWS)
    assert sum(bool(names) for _, names, _ in ROWS) >= 90


def test_every_type_that_converts_is_compared_with_transformers():
    tested = {spec.config().model_type for spec in (*MODELS.values(), *SHARED.values())}
    texts = {name: text_config(transformers.CONFIG_MAPPING[name]())["model_type"] for name, found, _ in ROWS if found}
    assert {name for name, text in texts.items() if text not in tested} == set()


def test_what_is_missing_is_said():
    for name, piece in MISSING.items():
        if name not in hf.FAMILIES:
            with pytest.raises(NotImplementedError, match=f"^model_type '{name}' is not converted: "):
                hf.layers({"model_type": name})
        assert piece


class Heads:
    """4 query heads and 2 key/value heads of 3 channels."""

    num_attention_heads, num_key_value_heads, head_dim = 4, 2, 3


class Each(Heads):
    num_key_value_heads = 4


@pytest.mark.parametrize(
    "packing, cfg, q, k, v",
    [
        ("seq", Heads, [0, 3, 6, 9], [12, 15], [18, 21]),
        ("group", Heads, [0, 3, 12, 15], [6, 18], [9, 21]),
        ("head", Each, [0, 9, 18, 27], [3, 12, 21, 30], [6, 15, 24, 33]),
        ("codegen", Each, [0, 9, 18, 27], [6, 15, 24, 33], [3, 12, 21, 30]),
    ],
)
def test_packings(packing, cfg, q, k, v):
    """The first row of each head."""
    parts = PACKINGS[packing](np.arange(3 * (cfg.num_attention_heads + 2 * cfg.num_key_value_heads)), cfg)
    assert [part[:, 0].tolist() for part in parts] == [q, k, v]
    assert all((part == part[:, :1] + np.arange(3)).all() for part in parts)


LONG = {"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}
PHI3 = {"model_type": "phi3", "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1, "rope_scaling": LONG}


@pytest.mark.parametrize("longest, factors", [(4096, (1.0, 2.0)), (131072, (3.0, 4.0))])
def test_longrope_is_chosen_once(longest, factors):
    """By the longest rows that the model is said to take; the attention factor is that of Phi-3-128k."""
    config = PHI3 | {"max_position_embeddings": longest, "original_max_position_embeddings": 4096}
    rope = hf.layer(config, 0)[1].rope_parameters
    assert rope["factors"] == factors
    assert rope["attention_factor"] == pytest.approx(1.1902381 if longest > 4096 else 1, abs=5e-8)


def test_the_base_of_hunyuan_is_stretched_once():
    config = {"model_type": "hunyuan_v1_dense", "hidden_size": 512, "num_attention_heads": 4, "num_hidden_layers": 1}
    config |= {"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}}
    rope = hf.layer(config, 0)[1].rope_parameters
    assert rope["rope_theta"] == pytest.approx(1e4 * 1000 ** (128 / 126)) and rope["rope_type"] == "default"


def test_layers_of_one_model_differ_by_their_number():
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 8, "hidden_size": 64}
    gpt2 = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 3, "scale_attn_by_inverse_layer_idx": True}
    assert [cfg.scaling for _, cfg in hf.layers(gpt2)] == [0.25, 0.125, pytest.approx(0.25 / 3)]
    llama4 = hf.layers(sizes | {"model_type": "llama4_text"})
    assert [name for name, _ in llama4] == (["chunked_local"] * 3 + ["gqa"]) * 2
    assert [cfg.rope_parameters is None for _, cfg in llama4] == ([False] * 3 + [True]) * 2
    smollm3 = hf.layers(sizes | {"model_type": "smollm3"})
    assert [cfg.rope_parameters is None for _, cfg in smollm3] == ([False] * 3 + [True]) * 2
    neo = {"model_type": "gpt_neo", "num_heads": 4, "num_layers": 4, "hidden_size": 64}
    assert [name for name, _ in hf.layers(neo)] == ["mha", "sliding_window"] * 2
    flint = hf.layers(sizes | {"model_type": "flint"})
    assert [cfg.sliding_window for _, cfg in flint] == [None, None, 513, 513, 513, None, 513, None]
