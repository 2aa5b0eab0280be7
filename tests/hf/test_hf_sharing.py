"""Layers that share with earlier ones, through jforge.stack, against transformers: outputs and caches of every one."""

import jax
import jax.numpy as jnp
import pytest

import jforge
from jforge import hf, stack
from jforge.core import compare
from jforge.harness import tiny_models
from jforge.harness.tiny_configs import Model
from jforge.harness.tiny_shared import SHARED as MODELS

SPLITS = {"one go": (10,), "prefill 5, decode": (5, 1, 1, 1, 1, 1), "chunks": (3, 6, 1, 2)}


def layers_of(model: Model) -> tuple[tuple, list]:
    """(the layers of its config, their params)."""
    config, state = tiny_models.built(model).config, tiny_models.built(model).state_dict()
    return tuple(hf.layers(config)), [hf.convert(config, state, i)[2] for i in model.layers]


def replayed(function, layers):
    """A stack whose layers are given what transformers' saw, and all that they make of it."""

    def call(params, xs, *rest):
        seen = []

        def block(x, index, attend):
            seen.append(attend(xs[index]))
            return x

        out = function(params, layers, xs[0], *rest, block)
        return seen, out[1] if isinstance(out, tuple) else None

    return jax.jit(call)


@pytest.mark.parametrize("name", MODELS)
def test_layers_that_share(name):
    model = MODELS[name]
    layers, params = layers_of(model)
    forward, prefill, decode = (replayed(f, layers) for f in (stack.forward, stack.prefill, stack.decode))
    step = tiny_models.seen(model, (10,), use_cache=False)[0]
    ys, _ = forward(params, [step[i].x for i in model.layers])
    assert (
        max(compare.worst_vector(y, step[i].y) for y, i in zip(ys, model.layers, strict=True)) <= compare.OUT["float32"]
    )
    for sizes in SPLITS.values():
        cache = stack.init_cache(layers, 2, 14, jnp.float32)
        for at, step in enumerate(tiny_models.seen(model, sizes)):
            xs = [step[i].x for i in model.layers]
            ys, cache = (decode if at and xs[0].shape[1] <= 2 else prefill)(params, xs, cache)
            for i, (y, own) in enumerate(zip(ys, cache, strict=True)):
                assert compare.worst_vector(y, step[i].y) <= compare.OUT["float32"], (sizes, at, i)
                spec = jforge.get(layers[i][0]).cache_spec(layers[i][1])
                if spec:
                    error = tiny_models.cache_error(spec, own, step[i].stored, model.pairs_apart)
                    assert error <= compare.OUT["float32"], (sizes, at, i)


def test_what_shares_with_what():
    sources = {name: [source for *_, source in map(lambda layer: (*layer, None)[:3], layers_of(model)[0])]
               for name, model in MODELS.items()}  # fmt: skip
    assert sources["gemma3n"] == [None] * 3 + [1, 2, 1]
    assert sources["gemma4"] == [None] * 4 + [2, 3]
    assert sources["gemma4_unified"] == [None] * 6
    assert sources["glm_moe_dsa"] == [None, None, 1, 1]
    assert sources["gemma4, keys as values"] == [None] * 6


def test_unread_keys_of_a_checkpoint_are_passed_over():
    model = MODELS["gemma3n"]
    config, state = model.config(), dict(tiny_models.built(model).state_dict())
    (own,) = [key for key in state if key.endswith("layers.3.self_attn.q_proj.weight")]
    state[own.replace("q_proj", "k_proj")] = state[own.replace("q_proj", "o_proj")]
    assert set(hf.convert(config, state, 3)[2]) == {"wq", "q_norm", "wo"}
    state[own.replace("q_proj", "x_proj")] = state[own]
    with pytest.raises(ValueError, match="x_proj.weight is in the state dict, but the config has no place for it"):
        hf.convert(config, state, 3)


@pytest.mark.parametrize(
    "name,layers,bytes_a_token,window,fixed",
    [
        ("gemma3n_text", {"num_hidden_layers": 35}, 8192, 512, 16),
        ("gemma3n_text", {"num_hidden_layers": 30, "num_kv_shared_layers": 10}, 8192, 512, 16),
        ("gemma4_text", {"num_hidden_layers": 35, "num_kv_shared_layers": 20, "num_key_value_heads": 1,
                         "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7}, 6144, 512, 6),
        ("gemma4_text", {"num_hidden_layers": 42, "num_kv_shared_layers": 18, "num_key_value_heads": 2},
         16384, 512, 20),
        ("gemma4_text", {"num_hidden_layers": 30, "num_key_value_heads": 8, "attention_k_eq_v": True,
                         "num_global_key_value_heads": 2, "sliding_window": 1024}, 20480, 1024, 200),
        ("gemma4_text", {"num_hidden_layers": 60, "num_key_value_heads": 16, "num_attention_heads": 32,
                         "attention_k_eq_v": True, "num_global_key_value_heads": 4, "sliding_window": 1024},
         81920, 1024, 800),
    ],
)  # fmt: skip
def test_golden_bytes(name, layers, bytes_a_token, window, fixed):
    """mechanisms2.md F: of all layers that own their keys, the full ones a token, the others a window; MiB."""
    config = {"model_type": name, "hidden_size": 2048, "num_attention_heads": 8} | layers
    found = hf.layers(config)
    cost = stack.cost(found, context=131072)
    assert sum(cost.stored.values()) == bytes_a_token * 131072 + fixed * 2**20
    assert cost.per_token == bytes_a_token and cost.fixed == fixed * 2**20
    readers = [layer for layer in found if len(layer) == 3]
    alone = [jforge.get(mechanism).cost(cfg, context=131072) for mechanism, cfg, _ in readers]
    assert len(readers) == layers.get("num_kv_shared_layers", 15 if name == "gemma3n_text" else 0)
    assert all(not own.stored and not own.written and min(own.read.values()) > 0 for own in alone)
