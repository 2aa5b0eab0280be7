"""Options of the dense family: golden numbers of shipped models, and what neither laws nor twins can see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jforge
from jforge.attention import chunked_local, dense, sliding_window
from jforge.attention.block_sparse import Config as BlockSparse
from jforge.attention.dense import Config
from jforge.attention.nsa import Config as NSA
from jforge.attention.streaming import Config as Streaming
from jforge.core import alibi, compare, rope
from jforge.core.step import Queries

SIZES = {"hidden_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
GQA = jforge.get("gqa")
PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factors": [1.0, 2.0, 4.0], "attention_factor": 1.19}


def test_slopes_of_alibi():
    np.testing.assert_allclose(alibi.slopes(6), [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125], rtol=0)
    np.testing.assert_allclose(alibi.slopes(12)[8:], [0.707107, 0.353553, 0.176777, 0.088388], atol=5e-7)
    np.testing.assert_allclose(alibi.slopes(8), 0.5 ** np.arange(1, 9), rtol=0)
    assert alibi.slopes(71).dtype == np.float32 and len(set(alibi.slopes(71).tolist())) == 71


def test_frequencies_of_gemma_4():
    """64 of 256 pairs turn; exponents are those of all 512 channels."""
    parameters = rope.freeze(PROPORTIONAL)
    assert rope.rotary_dim(parameters, 512) == 512
    theta, factor = rope.frequencies(parameters, 512)
    np.testing.assert_allclose(theta[[1, 63]], [0.9474635, 0.0333762], atol=5e-8)
    assert (theta > 0).sum() == 64 and (theta[64:] == 0).all() and factor == 1


def test_a_pair_of_proportional_rope_lies_in_both_halves():
    x = np.ones((1, 1, 1, 16), np.float32)
    turned = rope.apply_rope(jnp.asarray(x), jnp.array([[3]]), rope.freeze(PROPORTIONAL))
    assert np.flatnonzero(np.asarray(turned)[0, 0, 0] != 1).tolist() == [0, 1, 8, 9]


def test_longrope_divides_each_frequency_and_stretches_them_all():
    plain, _ = rope.frequencies(rope.freeze({"rope_theta": 1e4}), 6)
    theta, factor = rope.frequencies(rope.freeze(LONG), 6)
    np.testing.assert_allclose(theta, plain / [1, 2, 4])
    assert factor == 1.19 and hash(rope.freeze(LONG)) == hash(rope.freeze(LONG))


@pytest.mark.parametrize("place, factor", [(8190, 1), (8191, 1.0693147), (16383, 1.1098612)])
def test_temperature_of_llama_4(place, factor):
    """By the place of a token in its row, whatever position RoPE is given."""
    cfg = Config(**SIZES, attn_scale=0.1, rope_parameters=None)
    params = GQA.init_params(jax.random.key(0), cfg)
    x = jax.random.normal(jax.random.key(1), (1, 1, 12))
    rows = Queries(x, jnp.array([[place]]), jnp.array([[7]]), jnp.ones((1, 1), bool))
    plain = dense.project_queries(params, dataclasses.replace(cfg, attn_scale=None), rows)
    np.testing.assert_allclose(dense.project_queries(params, cfg, rows), plain * factor, rtol=2e-7)


@pytest.mark.parametrize("att", [GQA, jforge.get("sliding_window"), jforge.get("chunked_local")])
def test_alibi_and_temperature_count_tokens_not_positions(att):
    more = {"gqa": {}, "sliding_window": {"sliding_window": 3}, "chunked_local": {"attention_chunk_size": 3}}
    name = next(name for name in more if att is jforge.get(name))
    cfg = att.Config(**SIZES, **more[name], alibi=True, attn_scale=0.5, floor_scale=2.0, rope_parameters=None)
    params = att.init_params(jax.random.key(0), cfg)
    x = jax.random.normal(jax.random.key(1), (1, 7, 12))
    elsewhere = att.forward(params, cfg, x, positions=jnp.arange(7)[None] * 11 + 5)
    np.testing.assert_array_equal(elsewhere, att.forward(params, cfg, x))


def test_alibi_by_hand():
    """One head of one channel whose logits are the biases alone."""
    cfg = Config(hidden_size=1, num_attention_heads=1, alibi=True)
    params = {"wq": jnp.zeros((1, 1, 1)), **{name: jnp.ones((1, 1, 1)) for name in ("wk", "wv", "wo")}}
    x = jnp.array([[[1.0], [2.0], [4.0]]])
    weights = np.exp(np.array([-2.0, -1.0, 0.0]) * 2.0**-8)
    got = GQA.forward(params, cfg, x)[0, 2, 0]
    np.testing.assert_allclose(got, weights @ [1, 2, 4] / weights.sum(), rtol=1e-6)


@pytest.mark.parametrize(
    "att, more", [(sliding_window, {"sliding_window": 9}), (chunked_local, {"attention_chunk_size": 9})]
)
@pytest.mark.parametrize("option", [{"alibi": True}, {"attn_scale": 0.5, "floor_scale": 2.0}, {"clip_qkv": 0.5}])
def test_a_window_or_chunk_that_holds_all_is_dense(att, more, option):
    cfg = Config(**SIZES, **option)
    params = GQA.init_params(jax.random.key(0), cfg)
    x = jax.random.normal(jax.random.key(1), (2, 9, 12))
    got = att.forward(params, att.Config(**SIZES, **more, **option), x)
    assert compare.worst_vector(got, GQA.forward(params, cfg, x)) <= compare.OUT["float32"]


def test_the_first_token_of_a_chunk_sees_itself_alone():
    cfg = chunked_local.Config(**SIZES, attention_chunk_size=4)
    sees = np.asarray(chunked_local.visible(cfg, jnp.arange(9)[:, None], jnp.arange(9)))
    assert sees.sum(axis=1).tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 1]
    assert chunked_local.filled(cfg, jnp.arange(10)).tolist() == [0, 1, 2, 3, 4, 1, 2, 3, 4, 1]


def test_a_chunk_can_be_rewound_within_itself_alone():
    att = jforge.get("chunked_local")
    cfg = chunked_local.Config(**SIZES, attention_chunk_size=4)
    params, cache = att.init_params(jax.random.key(0), cfg), att.init_cache(cfg, 1, 4, jnp.float32)
    _, cache = att.prefill(params, cfg, jax.random.normal(jax.random.key(1), (1, 7, 12)), cache)
    assert jforge.caches.rewind(att, cfg, cache, np.array([5])).length.tolist() == [5]
    with pytest.raises(ValueError, match="k"):
        jforge.caches.rewind(att, cfg, cache, np.array([4]))


def test_a_scale_of_scout_costs_what_it_is_published_to():
    """12 full layers of 48 at 4 KiB a token and 36 chunks of 8192: 49,152 B a token and 1.125 GiB (K 8, H 128)."""
    att, context = jforge.get("chunked_local"), 131072
    cfg = att.models["Llama-4-Scout chunked"]
    chunk = att.cost(cfg, context=context)
    assert 36 * chunk.fixed == 1.125 * 2**30 and chunk.per_token == 0
    full = Config(hidden_size=5120, num_attention_heads=40, num_key_value_heads=8, head_dim=128)
    assert 12 * GQA.cost(full, context=context).per_token == 49152
    assert chunk.read["k"] == 8192 * 8 * 128 * 2 and att.cost(cfg, context=context + 1).read["k"] == 8 * 128 * 2


BAD = [
    ({"qk_norm": "each"}, "qk_norm is 'each'; it must be one of None, 'head', 'flat', 'heads'"),
    ({"qk_norm_type": "l2"}, "qk_norm_type is 'l2'; it must be one of 'rms', 'layer'"),
    ({"qk_norm": "flat", "qk_norm_weight": False}, "qk_norm_weight is False; it must be True where qk_norm is 'flat'"),
    ({"qk_norm": "head", "qk_norm_bias": True}, "qk_norm_bias is True; it must be False without the weight of a norm"),
    ({"attention_k_eq_v": True, "v_head_dim": 4}, "v_head_dim is 4; it must be head_dim=6 where attention_k_eq_v"),
    ({"clip_qkv": 0}, "clip_qkv is 0; it must be a positive number"),
    ({"attn_scale": -0.1}, "attn_scale is -0.1; it must be a positive number"),
    ({"floor_scale": 0}, "floor_scale is 0; it must be a positive number"),
    ({"attn_scale_from": -1}, "attn_scale_from is -1; it must be an integer of at least 0"),
    ({"output_gate_type": "relu"}, "output_gate_type is 'relu'; it must be one of 'sigmoid', 'softplus'"),
    ({"rope_parameters": LONG | {"factors": None}}, "factors is None; it must be a list of positive numbers"),
    ({"rope_parameters": LONG | {"factors": [1.0, 2.0]}}, r"factors is \(1.0, 2.0\); it must be 3 numbers"),
    ({"rope_parameters": LONG | {"factors": [1.0, 0, 1]}}, "factors is 0; it must be a positive number"),
    ({"rope_parameters": LONG | {"attention_factor": None}}, "rope_parameters has no attention_factor; .*'longrope'"),
]
OTHERS = [
    (BlockSparse, {"block_size": 2, "alibi": True}, "alibi is True; it must be False in block_sparse"),
    (Streaming, {"recent_size": 2, "attn_scale": 0.1}, "attn_scale is 0.1; it must be None in streaming"),
    (NSA, {"kernel_size": 2, "kernel_stride": 2, "block_size": 2, "topk": 3, "window_size": 2, "v_norm": True},
     "v_norm is True; it must be False in nsa"),
]  # fmt: skip


@pytest.mark.parametrize("config, fields, message", [*((Config, *bad) for bad in BAD), *OTHERS])
def test_bad_values(config, fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        config(**SIZES | fields)
