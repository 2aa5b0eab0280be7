"""Every supported model against transformers' own attention module: outputs and cache, in one go and in steps.

Then the comparison itself: that it sees a wrong field, a wrong weight, another order of a buffer.
"""

import dataclasses
import math
from functools import cache

import jax
import jax.numpy as jnp
import pytest

from jforge import hf
from jforge.attention import REGISTRY
from jforge.core.compare import OUT, STOCK_STATES
from jforge.harness import tiny_models
from jforge.harness.tiny_configs import DEEPSEEK_V4, LINEAR, MINIMAX, MINIMAX_M3, WINDOW, Model
from jforge.harness.tiny_models import MODELS, SPLITS, against_transformers
from jforge.harness.tiny_states import NEMOTRON_H

V4 = Model("DeepseekV4", DEEPSEEK_V4 | {"index_topk": 2}, layers=tuple(range(6)))
V4_LAYERS = {"v4_window": (0, 3), "csa": (1, 4), "hca": (2, 5)}
GLM = "glm_moe_dsa, shared picks"


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_caches(name):
    spec = MODELS[name]
    for index in spec.layers:
        att, cfg, params = tiny_models.layer(spec, index)
        assert att is REGISTRY[spec.mechanism] and isinstance(cfg, att.Config)
        own = jax.eval_shape(lambda key, att=att, cfg=cfg: att.init_params(key, cfg), jax.random.key(0))
        assert spec.kind is None or hf.layer(tiny_models.built(spec).config, index, spec.kind) == (spec.mechanism, cfg)
        assert {n: p.shape for n, p in params.items()} == {n: p.shape for n, p in own.items()}
        assert all(isinstance(p, jax.Array) for p in params.values())
    splits = dict(SPLITS)
    if spec.mechanism == "mamba1":  # of a chunk after another transformers forgets the state
        del splits["chunks"]
    mechanism, errors = against_transformers(name, splits)
    assert mechanism == spec.mechanism and set(errors) == {"forward", "cache", *splits}
    assert max(errors.values()) <= OUT["float64" if spec.wide else "float32"], errors


STOCK = ("qwen3_next, delta", "kimi_linear, delta", "mamba2", "jamba, ssm", "lfm2, conv")


@pytest.mark.parametrize("name", STOCK)
def test_stock_float32(name):
    """transformers as it is, with its casts."""
    stock = dataclasses.replace(MODELS[name], wide=False)
    splits = {"short prompt": (2, 1, 1, 1)}
    _, errors = against_transformers(stock, splits, stock.layers[:1])
    assert max(errors.values()) <= STOCK_STATES, errors


def test_delta_is_limited_in_every_step():
    """transformers limits it where there are several tokens, and there alone; jforge in all."""
    spec = dataclasses.replace(MODELS["nemotron_h, ssm"], kwargs=NEMOTRON_H | {"time_step_min": 0.6})
    _, errors = against_transformers(spec, {"chunks": (5, 5), "steps": (5, 1, 1)}, (0,))
    assert max(errors["forward"], errors["chunks"]) <= OUT["float64"]
    assert errors["steps"] > 0.01


# Edges: of windows (4 tokens), of blocks (lightning's 4, MSA's 2, DeepSeek-V4's 4 and 8), of index_topk (4)


def prefill(size: int, total: int) -> tuple[int, ...]:
    """A prefill of `size` tokens, then one at a time."""
    return (size, *(1,) * (total - size))


AROUND_WINDOW = [prefill(n, 3 * WINDOW + 2) for n in (WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 2 * WINDOW + 1)]
AROUND_WINDOW += [(WINDOW - 1, 1, WINDOW, 1, WINDOW + 1), (1, WINDOW, 2 * WINDOW + 1)]  # the last exceeds the ring
BLOCKS = [prefill(4, 10), prefill(8, 10), (4, 4, 1, 1)]
TOPK = [prefill(4, 10), (4, 4, 1, 1)]
V4_SPLITS = [*((*prefill(p, p + 9), 5, 3) for p in range(1, 9)), (13, 1, 10, 1, 7), (16, 16)]
EDGES = {
    **dict.fromkeys(("mistral, window", "gemma2, window", "gemma3, window", "gpt_oss"), AROUND_WINDOW),
    **dict.fromkeys(("minimax, lightning", "minimax_m3, block-sparse"), BLOCKS),
    **dict.fromkeys(("deepseek_v32", GLM), TOPK),
    **dict.fromkeys(V4_LAYERS, V4_SPLITS),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(name):
    """Chunks that end before, at and behind an edge, and decode over it."""
    splits = {str(sizes): sizes for sizes in EDGES[name]}
    spec, layers = (V4, V4_LAYERS[name]) if name in V4_LAYERS else (name, ())
    _, errors = against_transformers(spec, splits, layers)
    assert set(errors) == {"forward", "cache", *splits}
    assert max(errors.values()) <= OUT["float32"], errors


@pytest.mark.parametrize("m", [4, 8])
def test_splits_of_v4_have_every_length_mod_m(m):
    assert m in {tiny_models.layer(V4, index)[1].compress_rate for index in (1, 2)}
    assert {sizes[0] % m for sizes in V4_SPLITS[:8]} == set(range(m))
    assert all(sizes[0] // m < (sizes[0] + 9) // m for sizes in V4_SPLITS[:8])


# The comparison itself


def swapped(a: str, b: str):
    return lambda params: params | {a: params[b], b: params[a]}


def changed(change, leaf: str):
    return lambda params: params | {leaf: change(params[leaf])}


def halves(array):
    """Two series of channels, each in the other's place."""
    return jnp.roll(array, array.shape[-1] // 2, axis=-1)


LIGHTNING, MSA = "minimax, lightning", "minimax_m3, block-sparse"
M3_ROPE = MINIMAX_M3["rope_parameters"] | {"partial_rotary_factor": 1.0}
WRONG = [  # model, fields of its Config, weights
    ("gemma2, window", {"attn_logit_softcapping": None}, None),
    ("gemma3, window", {"norm_offset": 0.0}, None),
    ("gemma3, window", {"rope_parameters": LINEAR}, None),
    ("gpt_oss", {"rope_parameters": {"truncate": True}}, None),
    ("gpt_oss", {"rope_parameters": {"attention_factor": 1.0}}, None),
    ("gpt_oss", {}, changed(jnp.zeros_like, "sinks")),
    ("deepseek_v3, yarn, biases", {"rope_layout": "half"}, None),
    ("deepseek_v3, yarn, biases", {"rms_norm_eps": 0.01}, None),
    ("deepseek_v3, yarn, biases", {"scaling": 24**-0.5}, None),
    (LIGHTNING, {"layer_index": 3}, None),
    (LIGHTNING, {"num_hidden_layers": 5}, None),
    (LIGHTNING, {"rms_norm_eps": 0.01}, None),
    (LIGHTNING, {}, swapped("wq", "wk")),
    (LIGHTNING, {}, swapped("wk", "wv")),
    ("minimax", {"rope_parameters": MINIMAX["rope_parameters"]}, None),
    (MSA, {"index_topk_blocks": 3}, None),
    (MSA, {"index_block_size": 1}, None),
    (MSA, {"norm_offset": 0.0}, None),
    (MSA, {}, changed(lambda w: w[:, ::-1], "wq_index")),
    ("minimax_m3", {"rope_parameters": M3_ROPE}, None),
    ("v4_window", {"sliding_window": 5}, None),
    ("v4_window", {"qk_rope_head_dim": 6}, None),
    ("v4_window", {"rms_norm_eps": 1e-6}, None),
    ("v4_window", {"rope_parameters": {"rope_theta": 1.6e5}}, None),
    ("csa", {"index_topk": 3}, None),
    ("csa", {"rope_parameters": {"rope_type": "default"}}, None),
    ("hca", {"rope_parameters": {"rope_theta": 1e4}}, None),
    ("v4_window", {}, changed(jnp.zeros_like, "sinks")),
    ("v4_window", {}, changed(lambda w: w[::-1], "wo_a")),
    ("v4_window", {}, changed(lambda w: w[:, ::-1], "wo_a")),
    ("v4_window", {}, changed(lambda w: w[::-1], "wo_b")),
    *(("csa", {}, changed(halves, w)) for w in ("wc_kv", "wc_gate", "c_bias", "wic_kv", "wic_gate", "ic_bias")),
    *(("csa", {}, changed(jnp.zeros_like, w)) for w in ("wq_index", "ww_index")),
    ("csa", {}, changed(lambda w: w[:, ::-1], "ww_index")),
    ("hca", {}, changed(lambda w: w[::-1], "c_bias")),
    ("hca", {}, changed(jnp.ones_like, "c_norm")),
]


@pytest.mark.parametrize("name, fields, weights", WRONG)
def test_it_sees_a_wrong_field_or_weight(name, fields, weights):
    spec = V4 if name in V4_LAYERS else MODELS[name]
    index, count = (V4_LAYERS[name][0], 25) if spec is V4 else (spec.layers[-1], tiny_models.TOKENS)
    att, cfg, params = own = tiny_models.layer(spec, index)
    assert tiny_models.forward_error(spec, index, own, count) <= OUT["float32"]
    if rope := fields.get("rope_parameters"):
        fields = {"rope_parameters": {**cfg.rope_parameters, **rope}}
    wrong = att, dataclasses.replace(cfg, **fields), weights(params) if weights else params
    assert tiny_models.forward_error(spec, index, wrong, count) > 100 * OUT["float32"]


@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("name", ["mistral, window", "gpt_oss"])
def test_it_sees_a_window_wrong_by_one(name, by):
    def wrong(att, cfg, params):
        return att, dataclasses.replace(cfg, sliding_window=cfg.sliding_window + by), params

    _, errors = against_transformers(name, layers=(0,), change=wrong)
    assert min(errors[mode] for mode in ("forward", *SPLITS)) > 1000 * OUT["float32"]
    assert errors["cache"] == math.inf


def turned(array):
    """Another slot or row first."""
    return jnp.roll(array, 1, axis=1)


def oldest_first(array):
    return jnp.roll(array, -tiny_models.TOKENS % WINDOW, axis=1)


def nudged(array):
    """The last row, which belongs to no token."""
    return array.at[:, -1].add(1.0)


CSA_STATES = ("state_kv", "state_score", "index_state_kv", "index_state_score")


@cache
def held(name: str):
    """(layer, buffers, our cache, that of transformers, pairs_apart) after the last token."""
    if name in V4_LAYERS:  # 23 tokens leave blocks open, of 3 (of 4) and 7 (of 8)
        spec, index, sizes, room = V4, V4_LAYERS[name][0], V4_SPLITS[5], (16, 34)
    else:
        spec, index, sizes, room = MODELS[name], MODELS[name].layers[0], SPLITS["prefill 5, decode"], (5, 12)
    att, cfg, _ = own = tiny_models.layer(spec, index)
    step, _, cache = list(tiny_models.follow(own, [s[index] for s in tiny_models.seen(spec, sizes)], *room))[-1]
    return own, att.cache_spec(cfg), cache, step.stored, spec.pairs_apart


@pytest.mark.parametrize(
    "name, leaf, change",
    [
        *(("mistral, window", leaf, change) for leaf in "kv" for change in (turned, oldest_first)),
        (LIGHTNING, "state", lambda array: 2 * array),
        (MSA, "k_index", lambda array: 2 * array),
        *((name, "kv", turned) for name in V4_LAYERS),
        *((name, "c_kv", turned) for name in ("csa", "hca")),
        ("csa", "k_index", turned),
        *(("csa", leaf, change) for leaf in CSA_STATES for change in (turned, halves, nudged)),
        *(("hca", leaf, change) for leaf in ("state_kv", "state_score") for change in (turned, nudged)),
    ],
)
def test_it_compares_every_buffer(name, leaf, change):
    """Slots, rows and series of channels in another order, rows where no token is, and values off by a factor."""
    _, buffers, ours, theirs, apart = held(name)
    assert tiny_models.cache_error(buffers, ours, theirs, apart) <= OUT["float32"]
    other = dataclasses.replace(ours, **{leaf: change(getattr(ours, leaf))})
    assert tiny_models.cache_error(buffers, other, theirs, apart) > 0.1


@pytest.mark.parametrize(
    "name, apart",
    [
        ("deepseek_v2", {"k_rope": 8}),
        ("deepseek_v3", {}),
        ("deepseek_v3, halves, yarn in one step", {"k_rope": 8}),
        (GLM, {"k_rope": 8}),
        (GLM, {"k_index": 8}),
    ],
)
def test_the_order_of_cached_rope_channels_matters(name, apart):
    _, buffers, ours, theirs, given = held(name)
    assert apart != given and tiny_models.cache_error(buffers, ours, theirs, given) <= OUT["float32"]
    assert tiny_models.cache_error(buffers, ours, theirs, apart) > 0.1


@pytest.mark.parametrize("name, prefix", [("csa", ""), ("csa", "index_"), ("hca", "")])
def test_gates_of_an_open_block_have_their_bias(name, prefix):
    """transformers keeps them without; were they compared so, ours would be off by it."""
    (_, cfg, params), buffers, ours, theirs, _ = held(name)
    state, bias = getattr(ours, f"{prefix}state_score"), params["ic_bias" if prefix else "c_bias"]
    count = int(ours.length[0]) % cfg.compress_rate
    start = state.shape[1] - cfg.compress_rate
    without = state.at[:, start : start + count].add(-bias[:count])
    other = dataclasses.replace(ours, **{f"{prefix}state_score": without})
    assert tiny_models.cache_error(buffers, other, theirs) > 0.01
