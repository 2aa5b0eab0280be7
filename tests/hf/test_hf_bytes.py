"""Bytes of whole hybrids against transformers: its cache objects hold, after 13 tokens, what cost says."""

import pytest
import torch

from jforge import hf, stack
from jforge.harness import hf_shim, tiny_models, tiny_states
from jforge.harness.tiny_models import MODELS
from jforge.harness.tiny_shared import SHARED

TOKENS = 13
TWINS = {
    "Qwen3-Next": MODELS["qwen3_next, delta"],
    "Kimi-Linear": MODELS["kimi_linear, delta"],
    "Nemotron-H": MODELS["nemotron_h"],
    "Falcon-H1": MODELS["falcon_h1"],
    "LFM2": MODELS["lfm2"],
    "Gemma 3n": SHARED["gemma3n"],
    "Gemma 4": SHARED["gemma4"],
    "Llama 4": MODELS["llama4, chunk"],
    "Jamba": MODELS["jamba"],
    "Bamba": MODELS["bamba"],
    "Granite 4": MODELS["granitemoehybrid"],
    "Olmo-Hybrid": MODELS["olmo_hybrid"],
}


def held(store) -> int:
    """Numbers that the cache holds, with two differences undone: of a window of W tokens transformers keeps W - 1, and
    of a convolution a column that it never reads.
    """
    total = 0
    for own in hf_shim.layers_of(store):
        if hf_shim.has_states(own):
            inputs, state = hf_shim.convolution_and_state(own)
            total += inputs[..., 1:].numel() + (0 if state is None else state.numel())
        for a in hf_shim.keys_and_values(own):
            total += a.numel() * (a.shape[2] + hf_shim.has_window(own)) // a.shape[2]
    return total


@pytest.mark.parametrize("name", TWINS)
@torch.no_grad()
def test_a_tiny_twin_holds_what_cost_says(name):
    spec = TWINS[name]
    with tiny_states.in_float64() if spec.wide else torch.inference_mode():
        model = tiny_models.built(spec)
        store = hf_shim.empty_cache(model)
        more = {"position_ids": torch.arange(TOKENS)[None]} if spec.positions else {}
        model(input_ids=tiny_models.tokens(TOKENS)[:1], **hf_shim.given(model, store), **more)
    cost = stack.cost(hf.layers(model.config), context=TOKENS, dtype="float32")
    assert sum(cost.stored.values()) == 4 * held(store)
