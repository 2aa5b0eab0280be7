"""Tiny decoders: what the caches say is what the model says without them, for every mechanism and for hybrids."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jforge
from jforge import models, small
from jforge.core import compare
from jforge.models import start
from jforge.models.generate import _run

VOCAB, TOKENS, NEW = 23, 16, 6
LENGTHS = np.array([TOKENS, 1, 7])


def decoder(*layers, short_conv=None, dtype=jnp.float32) -> models.Decoder:
    cfg = models.ModelConfig(vocab_size=VOCAB, layers=layers, intermediate_size=20, short_conv=short_conv)
    return models.Decoder(cfg, rngs=nnx.Rngs(0), dtype=dtype)


def prompts() -> np.ndarray:
    """Ragged rows: past its length a row holds ids that there are not."""
    drawn = np.random.default_rng(0).integers(0, VOCAB, (len(LENGTHS), TOKENS))
    return np.where(np.arange(TOKENS) < LENGTHS[:, None], drawn, VOCAB + 5)


def uncached(model: models.Decoder, got: models.Generated) -> np.ndarray:
    """The logits from which each token of `got` was taken, each row alone and without a cache."""
    forward = jax.jit(lambda tokens: model(tokens))
    rows = []
    for row, n, said in zip(prompts(), LENGTHS, np.asarray(got.tokens), strict=True):
        tokens = np.zeros(TOKENS + NEW, int)  # of one length, so that one program serves all; nothing looks ahead
        tokens[: n + NEW] = np.concatenate([row[:n], said])
        rows.append(forward(jnp.asarray(tokens)[None])[0, n - 1 : n + NEW - 1])
    return np.stack(rows)


def layer(name: str, **sizes):
    return models.layer(name, 16, heads=2, tokens=TOKENS, **sizes)


ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
SHARED = (layer("gqa"), layer("sliding_window"), (*layer("gqa", kv_shared=True), 0))
MODELS = {name: ((layer(name, **ROPE),), 3) for name in jforge.names()} | {
    "hybrid": ((layer("gated_deltanet"), layer("gqa", **ROPE), layer("sinks", **ROPE)), None),
    "keys shared across layers": (SHARED, 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_generate_says_what_forward_says(name):
    layers, taps = MODELS[name]
    with jax.enable_x64(True):
        model = decoder(*layers, short_conv=taps, dtype=jnp.float64)
        got = models.generate(model, prompts(), LENGTHS, new=NEW)
        want = uncached(model, got)
    assert compare.worst_vector(got.logits, want) <= compare.OUT["float64"]
    np.testing.assert_array_equal(got.tokens, want.argmax(axis=-1))
    for cache in got.cache:
        np.testing.assert_array_equal(cache.length, LENGTHS + NEW - 1)


def test_a_model_holds_the_parameters_that_its_config_counts():
    for layers, taps in MODELS.values():
        cfg = models.ModelConfig(vocab_size=VOCAB, layers=layers, intermediate_size=20, short_conv=taps)
        state = nnx.state(nnx.eval_shape(lambda cfg=cfg: models.Decoder(cfg, rngs=nnx.Rngs(0))), nnx.Param)
        assert sum(leaf.size for leaf in jax.tree.leaves(state)) == cfg.parameters


def test_parameters_match_within_two_percent():
    counts = {}
    for name in jforge.names():
        own = models.layer(name, 64, heads=4)
        cfg = models.ModelConfig(vocab_size=256, layers=(own, own), intermediate_size=1)
        counts[name] = models.matched(cfg, 130_000).parameters
    assert len(counts) == len(jforge.names())
    assert all(abs(count - 130_000) <= 0.02 * 130_000 for count in counts.values()), counts
    with pytest.raises(ValueError, match="^parameters is 1000; it must be within 2% of "):
        models.matched(cfg, 1000)


def test_draws_follow_the_key_and_the_temperature():
    model = decoder(layer("gqa"))
    say = lambda **how: np.asarray(models.generate(model, prompts(), LENGTHS, new=40, **how).tokens)  # noqa: E731
    hot = say(temperature=1.0, key=jax.random.key(1))
    np.testing.assert_array_equal(hot, say(temperature=1.0, key=jax.random.key(1)))
    assert (hot != say(temperature=1.0, key=jax.random.key(2))).mean() > 0.5
    np.testing.assert_array_equal(say(temperature=1e-6, key=jax.random.key(1)), say())
    assert len(np.unique(hot)) > 15  # an untrained model finds all tokens about alike


def test_one_program_serves_calls_of_one_shape_and_its_cache_is_its_own():
    model = decoder(layer("mla"))
    before = _run._cache_size()
    for seed in range(3):
        tokens = np.random.default_rng(seed).integers(0, VOCAB, (2, 5))
        got = models.generate(model, tokens, np.array([5 - seed, 2]), new=4, dtype=jnp.bfloat16)
    assert _run._cache_size() == before + 1
    assert got.cache[0].latent.dtype == jnp.bfloat16 and got.cache[0].latent.shape[1] == 9


def test_one_token_needs_no_step():
    model = decoder(layer("gqa"))
    got = models.generate(model, prompts(), LENGTHS, new=1)
    assert got.tokens.shape == (3, 1) and got.logits.shape == (3, 1, VOCAB)
    np.testing.assert_array_equal(got.tokens, models.generate(model, prompts(), LENGTHS, new=3).tokens[:, :1])


def test_bytes_of_a_model_are_those_of_its_caches():
    model = decoder(layer("gqa"), layer("mamba2"), short_conv=3)
    cache = model.init_cache(2, 32, jnp.bfloat16)
    stored = sum(leaf.nbytes for one in cache for leaf in jax.tree.leaves(replace(one, length=None)))
    assert sum(model.cost(context=32, batch=2).stored.values()) == stored


def test_training_starts_from_the_papers_values():
    mamba = models.layer("mamba2", 32, heads=4)[1]
    att = jforge.get("mamba2")
    got = start.layer_params(att, mamba, jax.random.key(0))
    steps, rates = jax.nn.softplus(got["dt_bias"]), jnp.exp(got["a_log"])
    assert 1e-3 <= steps.min() < 0.02 < steps.max() <= 0.1 and 1 <= rates.min() < 6 < rates.max() <= 16
    assert (got["skip"] == 1).all() and (got["b_conv"] == 0).all()
    np.testing.assert_array_equal(
        got["wx"], att.init_params(jax.random.split(jax.random.key(0), 1 + len(got))[0], mamba)["wx"]
    )
    offset = replace(layer("gqa")[1], qk_norm="head", norm_offset=1.0)
    assert (start.layer_params(jforge.get("gqa"), offset, jax.random.key(0))["q_norm"] == 0).all()


@pytest.mark.parametrize("wrong, said", [
    (lambda m: models.generate(m, prompts(), np.array([3, 0, 2]), new=2), r"lengths is \[3, 0, 2\]; it must be 3 "),
    (lambda m: models.generate(m, prompts(), np.array([3, 2]), new=2), r"lengths is \[3, 2\]; it must be 3 numbers"),
    (lambda m: models.generate(m, prompts(), new=0), "new is 0; it must be a positive integer"),
    (lambda m: models.generate(m, prompts(), new=2, temperature=1.0), "temperature is 1.0; it must be 0, or"),
    (lambda m: models.layer("gqa", 30, heads=4), "hidden_size is 30; it must be a multiple of heads=4"),
    (lambda m: replace(m.cfg, layers=()), r"layers is \(\); it must be one layer or more"),
    (lambda m: replace(m.cfg, layers=(layer("gqa"), models.layer("gqa", 32))), r"layers is \[16, 32\]; it must be"),
    (lambda m: replace(m.cfg, short_conv=0), "short_conv is 0; it must be a positive integer"),
    (lambda m: small.fitted(jforge.get("nsa").Config, {"hidden_size": 8}), "sizes lack num_attention_heads, .*topk"),
])  # fmt: skip
def test_bad_input_is_one_line(untyped, wrong, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        wrong(decoder(layer("gqa")))
