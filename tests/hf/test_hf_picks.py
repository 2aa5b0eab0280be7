"""What the indexers of DeepSeek-V3.2, GLM-5.2 and DeepSeek-V4 pick, against those of transformers."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jforge
from jforge.attention import dsa
from jforge.core import compare
from jforge.core.compare import OUT
from jforge.harness import tiny_models
from jforge.harness.tiny_configs import DEEPSEEK_V4, MODELS, Model
from jforge.hf import convert

V32, GLM = "deepseek_v32", "glm_moe_dsa, shared picks"
V4 = Model("DeepseekV4", DEEPSEEK_V4 | {"index_topk": 2}, layers=(1, 4))
V4_TOKENS = 25


@cache
@torch.no_grad()
def outputs(spec: Model, index: int, count: int) -> dict[str, np.ndarray]:
    """What the indexer of a layer and its scorer, if it has one, return over `count` tokens."""
    attention = tiny_models.attention_module(tiny_models.built(spec), index)
    indexer = attention.compressor.indexer if spec is V4 else attention.indexer
    found = {}
    parts = {"picks": indexer} | ({"scores": indexer.scorer} if spec is V4 else {})
    hooks = [
        part.register_forward_hook(lambda module, args, out, name=name: found.update({name: out.numpy()}))
        for name, part in parts.items()
    ]
    tiny_models.built(spec)(input_ids=tiny_models.tokens(count), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def masked(picks: np.ndarray) -> np.ndarray:
    """-1 for the tokens that come after the query: transformers fills up with them and masks them afterwards."""
    return np.where(picks > np.arange(picks.shape[1])[:, None], -1, picks)


def picks_of(name: str, index: int) -> np.ndarray:
    return masked(outputs(MODELS[name], index, tiny_models.TOKENS)["picks"])


def step_of(name: str, index: int) -> tiny_models.Step:
    return tiny_models.seen(MODELS[name], (tiny_models.TOKENS,), use_cache=False)[0][index]


# DSA


def exact_scores(cfg, params, x) -> np.ndarray:
    """Index scores in float64, B T T."""
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(p, jnp.float64) for name, p in params.items()}
        x = jnp.asarray(x, jnp.float64)
        B, T, _ = x.shape
        order = jnp.broadcast_to(jnp.arange(T), (B, T))
        q, w = dsa.index_queries(wide, cfg, x, order, x.dtype)
        k = dsa.index_keys(wide, cfg, x, order, x.dtype)["k_index"]
        return np.asarray(jforge.ops.index_scores(q, k, w, jnp.full(B, T, jnp.int32)))


def compared_picks(name: str, index: int, **changes) -> compare.Picks:
    """Ours, with these fields of the Config changed, against transformers'; scores within 1e-5 of each other tie."""
    _, cfg, params = tiny_models.layer(MODELS[name], index)
    x = step_of(name, index).x
    wrong = dataclasses.replace(cfg, **changes)
    got = jax.jit(dsa.index, static_argnums=1)(params, wrong, x, dsa.dsa.init_cache(wrong, *x.shape[:2], jnp.float32))
    scores = exact_scores(cfg, params, x)
    epsilon = OUT["float32"] * np.abs(scores[np.isfinite(scores)]).max()
    return compare.picks(got, picks_of(name, index), scores, cfg.index_topk, epsilon)


@pytest.mark.parametrize("name", [V32, GLM])
@pytest.mark.parametrize("index", [0, 1])
def test_picks(name, index):
    got = compared_picks(name, index)
    assert got.wrong == 0 and got.tied <= 1, got
    assert got.rows == tiny_models.BATCH * tiny_models.TOKENS


@pytest.mark.parametrize("name, layout", [(V32, "interleaved"), (GLM, "half")])
def test_picks_of_the_other_rope_layout_are_wrong(name, layout):
    assert compared_picks(name, 0, index_rope_layout=layout).wrong > 0


def test_shared_layers_take_the_picks_of_the_last_indexer():
    """Not those of the first, and the ones before a query is full are not attended."""
    spec, first, last = MODELS[GLM], picks_of(GLM, 0), picks_of(GLM, 1)
    assert (first != last).any()
    for index in (2, 3):
        assert tiny_models.attention_module(tiny_models.built(spec), index).indexer is None
        np.testing.assert_array_equal(masked(step_of(GLM, index).indices), last)
        own = tiny_models.layer(spec, index)
        assert tiny_models.forward_error(spec, index, own, indices=jnp.asarray(last)) <= OUT["float32"]
        assert tiny_models.forward_error(spec, index, own, indices=jnp.asarray(first)) > 1e-2


@pytest.mark.parametrize(
    "name, keys",
    [
        (V32, {"index_topk": 3}),
        (V32, {"index_topk": 5}),
        (V32, {"index_topk": None}),  # the default, more than there are tokens
        (V32, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e3}}),
        (V32, {"model_type": "glm_moe_dsa", "indexer_types": ["full"] * 2}),
        (GLM, {"model_type": "deepseek_v32", "indexer_types": None}),
    ],
)
def test_every_key_matters(name, keys):
    spec = MODELS[name]
    model = tiny_models.built(spec)
    wrong = convert(model.config.to_dict() | keys, model.state_dict(), 0)
    assert tiny_models.forward_error(spec, 0, tiny_models.layer(spec, 0)) <= OUT["float32"]
    assert tiny_models.forward_error(spec, 0, wrong) > 1e-2


@pytest.mark.parametrize("leaf", ["wq_index", "wk_index", "ww_index", "k_index_norm", "k_index_bias"])
def test_every_weight_of_the_indexer_matters(leaf):
    att, cfg, params = tiny_models.layer(MODELS[V32], 0)
    wrong = att, cfg, params | {leaf: params[leaf][..., ::-1]}
    assert tiny_models.forward_error(MODELS[V32], 0, wrong) > 1e-2


# DeepSeek-V4


@pytest.mark.parametrize("index", V4.layers)
def test_picks_of_every_token(index):
    """What decode would gather at each position, against the picks of one forward; ties may fall either way."""
    (step,) = tiny_models.seen(V4, (V4_TOKENS,), use_cache=False)
    att, cfg, params = tiny_models.layer(V4, index)
    held, got = att.init_cache(cfg, tiny_models.BATCH, V4_TOKENS + 9, jnp.float32), []
    for t in range(V4_TOKENS):
        x = step[index].x[:, t : t + 1]
        got.append(tiny_models.jitted(att.select)(params, cfg, x, held)[:, :, 0])
        _, held = tiny_models.jitted(att.decode)(params, cfg, x, held)
    want, scores = (outputs(V4, index, V4_TOKENS)[name] for name in ("picks", "scores"))
    complete, topk = (np.arange(V4_TOKENS) + 1) // cfg.compress_rate, cfg.index_topk
    scores = np.where(np.arange(scores.shape[-1]) < complete[:, None], scores, -np.inf)
    found = compare.picks(np.concatenate(got, axis=1), want, scores, topk, epsilon=1e-6)
    assert found.wrong == 0 and found.tied <= 0.05 * found.rows
    chosen = (complete > topk).sum() * tiny_models.BATCH
    latest = np.sort(want, axis=-1) == np.maximum(complete[:, None] - np.array([2, 1]), -1)
    assert chosen == 28 and not latest.all(axis=-1)[:, complete > topk].all()
