"""DeepSeek-V4's three kinds of layers against transformers: every length mod m, block edges, chunks, caches, picks.

What self_attn is given, inside the hyper-connections around it, is what jforge is given.
"""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jforge.core import compare
from jforge.core.compare import OUT
from jforge.harness import tiny_models
from jforge.harness.tiny_configs import DEEPSEEK_V4, MODELS
from jforge.harness.tiny_models import BATCH, Step
from jforge.hf import convert

LAYERS = {"v4_window": (0, 3), "csa": (1, 4), "hca": (2, 5)}
TOPK, PAD, CAPACITY, WHOLE = 2, 16, 34, (25,)
SPLITS = [  # of blocks of 4 and of 8 tokens: a prefill of every length mod m, decode over an edge, then chunks
    *((p, *(1,) * 9, 5, 3) for p in range(1, 9)),
    (13, 1, 10, 1, 7),
    (16, 16),
]
PARTIAL = SPLITS[5]  # 23 tokens: open blocks of 3 (of 4) and 7 (of 8)


@cache
def model():
    return dataclasses.replace(MODELS["deepseek_v4"], kwargs=DEEPSEEK_V4 | {"index_topk": TOPK}).build()


@cache
def seen(sizes: tuple[int, ...], use_cache: bool = True) -> list[dict[int, Step]]:
    return tiny_models.run(model(), tuple(range(6)), sizes, use_cache)


@cache
def layer(index: int):
    return convert(model().config, model().state_dict(), index)


@cache
def jitted(function):
    return jax.jit(function, static_argnames="cfg")


@cache
def followed(index: int, sizes: tuple[int, ...]) -> list[tuple]:
    """(transformers' Step, our y, our cache) of every chunk; pads are NaN, so that all prefills are one program."""
    att, cfg, params = layer(index)
    held, out = att.init_cache(cfg, BATCH, CAPACITY, jnp.float32), []
    for i, step in enumerate(chunk[index] for chunk in seen(sizes)):
        count = step.x.shape[1]
        if i > 0 and count == 1:
            y, held = jitted(att.decode)(params, cfg, step.x, held)
        else:
            x = np.pad(step.x, [(0, 0), (0, PAD - count), (0, 0)], constant_values=np.nan)
            y, held = jitted(att.prefill)(params, cfg, x, held, np.full(BATCH, count, np.int32))
        out.append((step, y[:, :count], held))
    return out


def cache_error(index: int, held, step: Step) -> float:
    att, cfg, _ = layer(index)
    return tiny_models.cache_error(att.cache_spec(cfg), held, step.stored)


def test_lengths_mod_m():
    """What the list of splits is for."""
    rates = {layer(index)[1].compress_rate for index in (*LAYERS["csa"], *LAYERS["hca"])}
    assert rates == {4, 8}
    for m in rates:
        assert {sizes[0] % m for sizes in SPLITS[:8]} == set(range(m))
        assert all(sizes[0] // m < (sizes[0] + 9) // m for sizes in SPLITS[:8])


@pytest.mark.parametrize("name", LAYERS)
def test_forward(name):
    (step,) = seen(WHOLE, use_cache=False)
    for index in LAYERS[name]:
        att, cfg, params = layer(index)
        got = jitted(att.forward)(params, cfg, step[index].x)
        assert compare.worst_vector(got, step[index].y) <= OUT["float32"]


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_cache_after_every_chunk(name, sizes):
    for index in LAYERS[name]:
        steps = followed(index, sizes)
        assert [int(held.length[0]) for _, _, held in steps] == list(np.cumsum(sizes))
        for step, y, held in steps:
            assert compare.worst_vector(y, step.y) <= OUT["float32"]
            assert cache_error(index, held, step) <= OUT["float32"]


# Picks


@torch.no_grad()
def indexer(index: int) -> tuple[np.ndarray, np.ndarray]:
    """(picks, scores) of transformers over the whole text, before its mask: B T L and B T E."""
    found = {}
    module = model().model.layers[index].self_attn.compressor.indexer
    hooks = [
        part.register_forward_hook(lambda module, args, out, name=name: found.update({name: out.numpy()}))
        for name, part in (("picks", module), ("scores", module.scorer))
    ]
    model()(input_ids=tiny_models.tokens(WHOLE[0]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found["picks"], found["scores"]


@pytest.mark.parametrize("index", LAYERS["csa"])
def test_picks_of_every_token(index):
    """What decode would gather at each position, against the picks of one forward; ties may fall either way."""
    (step,) = seen(WHOLE, use_cache=False)
    att, cfg, params = layer(index)
    held, got = att.init_cache(cfg, BATCH, CAPACITY, jnp.float32), []
    for t in range(WHOLE[0]):
        x = step[index].x[:, t : t + 1]
        got.append(jitted(att.select)(params, cfg, x, held)[:, :, 0])
        _, held = jitted(att.decode)(params, cfg, x, held)
    want, scores = indexer(index)
    complete = (np.arange(WHOLE[0]) + 1) // cfg.compress_rate
    scores = np.where(np.arange(scores.shape[-1]) < complete[:, None], scores, -np.inf)
    found = compare.picks(np.concatenate(got, axis=1), want, scores, TOPK, epsilon=1e-6)
    assert found.wrong == 0 and found.tied <= 0.05 * found.rows
    chosen = (complete > TOPK).sum() * BATCH
    latest = np.sort(want, axis=-1) == np.maximum(complete[:, None] - np.array([2, 1]), -1)
    assert chosen == 28 and not latest.all(axis=-1)[:, complete > TOPK].all()


# The comparison itself


def swapped(array):
    """The two series of channels, each in the other's place."""
    return jnp.roll(array, array.shape[-1] // 2, axis=-1)


def nudged(array):
    """The last row, which belongs to no token."""
    return array.at[:, -1].add(1.0)


def turned(array):
    return jnp.roll(array, 1, axis=1)


CSA_STATES = ("state_kv", "state_score", "index_state_kv", "index_state_score")


@pytest.mark.parametrize(
    "name, leaf, change",
    [
        ("v4_window", "kv", turned),
        ("csa", "kv", turned),
        ("hca", "kv", turned),
        *((name, "c_kv", turned) for name in ("csa", "hca")),
        ("csa", "k_index", turned),
        *(("csa", leaf, change) for leaf in CSA_STATES for change in (turned, swapped, nudged)),
        *(("hca", leaf, change) for leaf in ("state_kv", "state_score") for change in (turned, nudged)),
    ],
)
def test_it_compares_every_buffer(name, leaf, change):
    """Slots, rows and series of channels in another order, and rows where no token is."""
    index = LAYERS[name][0]
    step, _, held = followed(index, PARTIAL)[-1]
    assert cache_error(index, held, step) <= OUT["float32"]
    other = dataclasses.replace(held, **{leaf: change(getattr(held, leaf))})
    assert cache_error(index, other, step) > 0.1


@pytest.mark.parametrize("name, prefix", [("csa", ""), ("csa", "index_"), ("hca", "")])
def test_gates_of_an_open_block_have_their_bias(name, prefix):
    """transformers keeps them without; were they compared so, ours would be off by it."""
    index = LAYERS[name][0]
    _, cfg, params = layer(index)
    step, _, held = followed(index, PARTIAL)[-1]
    state, bias = getattr(held, f"{prefix}state_score"), params["ic_bias" if prefix else "c_bias"]
    count = int(held.length[0]) % cfg.compress_rate
    start = state.shape[1] - cfg.compress_rate
    without = state.at[:, start : start + count].add(-bias[:count])
    assert cache_error(index, dataclasses.replace(held, **{f"{prefix}state_score": without}), step) > 0.01


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("v4_window", "sliding_window", 5),
        ("v4_window", "qk_rope_head_dim", 6),
        ("v4_window", "rms_norm_eps", 1e-6),
        ("v4_window", "rope_parameters", {"rope_theta": 1.6e5}),
        ("csa", "index_topk", 3),
        ("csa", "rope_parameters", {"rope_theta": 1.6e5}),
        ("hca", "rope_parameters", {"rope_theta": 1e4}),
    ],
)
def test_it_sees_a_wrong_field(name, field, value):
    _forward_differs(name, lambda cfg, params: (dataclasses.replace(cfg, **{field: value}), params))


@pytest.mark.parametrize(
    "name, weight, change",
    [
        ("v4_window", "sinks", jnp.zeros_like),
        ("v4_window", "wo_a", lambda w: w[::-1]),
        ("v4_window", "wo_a", lambda w: w[:, ::-1]),
        ("v4_window", "wo_b", lambda w: w[::-1]),
        *(("csa", weight, swapped) for weight in ("wc_kv", "wc_gate", "c_bias", "wic_kv", "wic_gate", "ic_bias")),
        *(("csa", weight, jnp.zeros_like) for weight in ("wq_index", "ww_index")),
        ("csa", "ww_index", lambda w: w[:, ::-1]),
        ("hca", "c_bias", lambda w: w[::-1]),
        ("hca", "c_norm", jnp.ones_like),
    ],
)
def test_it_sees_a_wrong_weight(name, weight, change):
    _forward_differs(name, lambda cfg, params: (cfg, params | {weight: change(params[weight])}))


def _forward_differs(name: str, change) -> None:
    (step,) = seen(WHOLE, use_cache=False)
    index = LAYERS[name][0]
    att, cfg, params = layer(index)
    cfg, params = change(cfg, params)
    assert compare.worst_vector(jitted(att.forward)(params, cfg, step[index].x), step[index].y) > 10 * OUT["float32"]
