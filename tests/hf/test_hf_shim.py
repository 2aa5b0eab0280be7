"""The names of transformers' caches stand in jforge.harness.hf_shim, and nowhere else."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from jforge.harness import hf_shim, tiny_models

ROOT = Path(__file__).parents[2]
NAMES = re.compile(
    r"past_key_values|cache_params|use_cache=True|cache_utils|\w*(Static|Dynamic|MiniMax)Cache\b|DummyLayer|linear_cache"
    r"|conv_states|recurrent_states|idx_keys|indexer_keys|compressed_kv|buffer_(kv|gate)|overlap_(kv|gate)"
)


def naming(root: Path) -> set[str]:
    """The Python files under jforge, tests and docs that have such a name."""
    found = (path for part in ("jforge", "tests", "docs") for path in (root / part).rglob("*.py"))
    return {path.name for path in found if NAMES.search(path.read_text(encoding="utf-8"))}


def test_one_file_has_the_names():
    assert naming(ROOT) - {Path(__file__).name} == {"hf_shim.py"}


class Takes(torch.nn.Module):
    def __init__(self, names: str):
        super().__init__()
        space: dict = {}
        exec(f"def forward(input_ids=None, {names}): ...", space)
        self.forward = space["forward"]


@pytest.mark.parametrize(
    "names, one",
    [
        ("past_key_values=None", "past_key_values"),
        ("cache_params=None", "cache_params"),
        ("cache=None", "cache"),
        ("past_key_values=None, cache=None", "cache"),
    ],
)
def test_the_keyword_is_the_newest_that_a_model_takes(names, one):
    store = object()
    assert hf_shim.given(Takes(names), store) == {one: store, "use_cache": True}
    assert hf_shim.given(Takes(names), None) == {one: None, "use_cache": False}


def test_a_model_without_a_cache_is_named():
    with pytest.raises(TypeError, match="^Takes.forward takes a cache by none of the names cache, past_key_values, "):
        hf_shim.keyword(Takes("x=None"))


@pytest.mark.parametrize("name", ["llama, mqa", "mamba2", "mamba", "minimax", "deepseek_v4", "gemma3"])
def test_what_a_model_is_given_it_fills(name):
    """One that is given under a name that the model passes over stays empty."""
    spec = dataclasses.replace(tiny_models.MODELS[name], wide=False)
    model = spec.build()
    store = hf_shim.empty_cache(model)
    with torch.no_grad():
        model(input_ids=tiny_models.tokens(3), **hf_shim.given(model, store))
    index = spec.layers[0]
    held = tiny_models.contents(store, index, tiny_models.attention_module(model, index, spec.kind))
    assert held and all(leaf.shape[0] == tiny_models.BATCH and leaf.isfinite().any() for leaf in held)
