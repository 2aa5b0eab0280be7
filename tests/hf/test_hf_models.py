"""Every supported model against transformers' own attention module: outputs and cache, in one go and in steps."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_tiny import BATCH, MODELS, TOKENS, run

from jforge import hf
from jforge.attention import REGISTRY
from jforge.harness.compare import OUT

TOLERANCE = OUT["float32"]
SPLITS = {
    "prefill 1, decode": (1,) * TOKENS,
    "prefill 5, decode": (5,) + (1,) * (TOKENS - 5),
    "chunks": (3, 5, 1, 1),  # sizes of the other cases again: every new one is a compilation
}


def error(got, want) -> float:
    """The largest ||got - want|| / ||want|| over all vectors on the last axis: the worst token, in caches and head."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return float(np.max(np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)))


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """(Model, transformers model)."""
    spec = MODELS[request.param]
    return spec, spec.build()


@cache
def jitted(function):
    return jax.jit(function, static_argnames="cfg")


def test_mechanism(case):
    spec, model = case
    for layer in spec.layers:
        att, cfg, _ = hf.convert(model.config, model.state_dict(), layer)
        assert att is REGISTRY[spec.mechanism]
        assert isinstance(cfg, att.Config)


def test_forward(case):
    spec, model = case
    (seen,), _ = run(model, (TOKENS,), use_cache=False)
    for layer in spec.layers:
        att, cfg, params = hf.convert(model.config, model.state_dict(), layer)
        assert error(jitted(att.forward)(params, cfg, seen[layer].x), seen[layer].y) <= TOLERANCE


@pytest.mark.parametrize("split", SPLITS)
def test_steps(case, split, record_property):
    """Chunks of one token go through decode, except a first one: it is the prefill."""
    spec, model = case
    seen, theirs = run(model, SPLITS[split], use_cache=True)
    worst = 0.0
    for layer in spec.layers:
        att, cfg, params = hf.convert(model.config, model.state_dict(), layer)
        mine = att.init_cache(cfg, BATCH, TOKENS + 2, jnp.float32)
        for i, at in enumerate(seen):
            x, y = at[layer].x, at[layer].y
            step = att.decode if i > 0 and x.shape[1] == 1 else att.prefill
            got, mine = jitted(step)(params, cfg, x, mine)
            worst = max(worst, error(got, y))
        for leaf, stored in ((mine.k, theirs.layers[layer].keys), (mine.v, theirs.layers[layer].values)):
            stored = stored.numpy().swapaxes(1, 2)  # B K S H -> B S K H
            repeats = stored.shape[2] // leaf.shape[2]  # Falcon's new architecture caches each head G times
            worst = max(worst, error(np.repeat(leaf[:, :TOKENS], repeats, axis=2), stored))
        assert mine.length.tolist() == [TOKENS] * BATCH
    record_property("worst relative error", worst)
    assert worst <= TOLERANCE
