"""What an indexer learns from: the divergence of the attention from its scores, and nothing else moves."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jforge
from jforge import models
from jforge.core import distil

WITH = [name for name in jforge.names() if jforge.get(name).index_loss]
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}


def layer(name: str):
    """(att, cfg, params, x), x long enough that there is something to choose."""
    att, (_, cfg) = jforge.get(name), models.layer(name, 16, heads=2, tokens=24, **ROPE)
    params = att.init_params(jax.random.key(0), cfg, jnp.asarray(0.0).dtype)
    return att, cfg, params, jnp.asarray(np.random.default_rng(0).standard_normal((2, 24, 16)))


def test_mechanisms_whose_picks_have_parameters_of_their_own_have_a_loss():
    """Those with a `wq_index`: NSA and MoBA choose by what attention itself is made of, so they learn without."""
    for name in jforge.names():
        att = jforge.get(name)
        assert (name in WITH) == any("wq_index" in att.shapes(cfg) for cfg in att.examples)
    assert WITH == ["msa", "dsa", "csa"]


@pytest.mark.parametrize("name", WITH)
def test_only_the_indexer_learns_from_it_and_only_from_it(name):
    with jax.enable_x64(True):
        att, cfg, params, x = layer(name)
        slopes, of_x = jax.jit(jax.grad(lambda p, x: att.index_loss(p, cfg, x), argnums=(0, 1)))(params, x)
        output = jax.jit(jax.grad(lambda p: (att.forward(p, cfg, x) ** 2).sum()))(params)
    moved = {n for n, slope in slopes.items() if (np.asarray(slope) != 0).any()}
    still = {n for n, slope in output.items() if not (np.asarray(slope) != 0).any()}
    assert moved == still and "wq_index" in moved and not np.asarray(of_x).any()


@pytest.mark.parametrize("name", WITH)
def test_an_indexer_that_follows_it_picks_what_attention_reads(name):
    """Of the mass that attention gives its top picks, an indexer that has learned finds more than a random one."""
    att, cfg, params, x = layer(name)
    loss = jax.jit(jax.value_and_grad(lambda p: att.index_loss(p, cfg, x)))
    first, _ = loss(params)
    for _ in range(150):
        now, slopes = loss(params)
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, slopes)
    assert 0 <= now < 0.6 * first


def test_the_divergence_is_that_of_numpy():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        seen = np.tril(np.ones((5, 5), bool), -1)  # the first row sees nothing
        target = rng.random((5, 5)) * seen
        target /= np.maximum(target.sum(axis=1, keepdims=True), 1e-300)
        scores = np.where(seen, rng.standard_normal((5, 5)), -np.inf)
        got = distil.divergence(jnp.asarray(target), jnp.asarray(scores), jnp.asarray(seen))
        rows = []
        for t in range(1, 5):
            p, q = target[t, :t], np.exp(scores[t, :t])
            rows.append((p * np.log(p / (q / q.sum()))).sum())
        want = np.mean(rows)
        assert abs(got - want) < 1e-12
        exact = np.where(seen, np.log(np.where(seen, target, 1)) + 3, -np.inf)
        assert abs(distil.divergence(jnp.asarray(target), jnp.asarray(exact), jnp.asarray(seen))) < 1e-12
        assert distil.divergence(jnp.zeros((2, 0)), jnp.zeros((2, 0)), jnp.zeros((2, 0), bool)) == 0


def test_weights_are_those_of_attention():
    """dsa with all tokens picked: the mean over heads of what `visible` tokens get, from an output that shows them."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        q, k = rng.standard_normal((1, 4, 6, 3)), rng.standard_normal((1, 4, 2, 3))
        seen = np.tril(np.ones((4, 4), bool))[None]
        got = distil.mean_weights(jnp.asarray(q), jnp.asarray(k), jnp.asarray(seen), scale=0.7, softcap=2.0)
        each = [jforge.ops.decode_attention(
            jnp.asarray(q[:, t : t + 1]), jnp.asarray(k[:, : t + 1]), jnp.eye(4)[None, : t + 1, None].repeat(2, axis=2),
            jnp.array([t + 1], jnp.int32), scale=0.7, softcap=2.0)[0].mean(axis=2) for t in range(4)]  # fmt: skip
        np.testing.assert_allclose(got, jnp.concatenate(each, axis=1), atol=1e-12)


def test_a_layer_that_shares_picks_has_none_to_learn():
    att, cfg, params, x = layer("dsa")
    with pytest.raises(ValueError, match="index_shared is True; such a layer has no indexer"):
        att.index_loss({n: p for n, p in params.items() if "index" not in n}, replace(cfg, index_shared=True), x)
