"""Dense attention beyond the laws: bad input, overflow, dtypes, compiled decode, RoPE against its golden values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jforge
from jforge.core import compare, rope

ATT = jforge.get("gqa")
CFG = ATT.examples[0]
BASE = {"hidden_size": 16, "num_attention_heads": 4}


def params(dtype=jnp.float32):
    return ATT.init_params(jax.random.key(0), CFG, dtype)


def x(batch: int = 2, tokens: int = 6, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(1), (batch, tokens, CFG.hidden_size), dtype)


def cache(batch: int = 2, capacity: int = 8, dtype=jnp.float32):
    return ATT.init_cache(CFG, batch, capacity, dtype)


def test_variants_fix_their_heads():
    assert jforge.get("mqa").Config(**BASE).num_key_value_heads == 1
    assert jforge.get("mha").Config(**BASE).num_key_value_heads == 4
    assert jforge.get("single_head").Config(hidden_size=16).num_attention_heads == 1


def test_config_is_hashable_with_its_rope_dict():
    make = lambda: ATT.Config(**BASE, rope_parameters={"rope_theta": 1e4})  # noqa: E731
    assert hash(make()) == hash(make()) and make() == make()
    assert make().rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize(
    "bad,error,named",
    [
        (lambda: x()[0], ValueError, "x has shape .*; it needs 3 axes: B T D"),
        (lambda: x()[..., 1:], ValueError, "its last axis must be hidden_size=24"),
        (lambda: x().astype(jnp.int32), TypeError, "x has dtype int32"),
        (lambda: x(3), ValueError, "x has 3 rows and the cache 2"),
    ],
)
def test_bad_x_is_named(bad, error, named, untyped):
    with pytest.raises(error, match=named):
        ATT.prefill(params(), CFG, bad(), cache())


@pytest.mark.parametrize("name", jforge.names())
@pytest.mark.parametrize("tokens", [0, 17])
def test_decode_takes_1_to_16_tokens(name, tokens, untyped):
    att = jforge.get(name)
    cfg = att.examples[0]
    x = jnp.zeros((2, tokens, cfg.hidden_size))
    with pytest.raises(ValueError, match=rf"x has shape \(2, {tokens}, \d+\); decode takes 1 to 16 tokens a row"):
        att.decode({}, cfg, x, att.init_cache(cfg, 2, 20))


@pytest.mark.parametrize(
    "lengths,named",
    [
        ((-1, 2), r"lengths\[0\] is -1; it must lie in 0..6"),
        ((6, 7), r"lengths\[1\] is 7"),
        ((1, 2, 3), "lengths has shape"),
    ],
)
def test_bad_lengths_are_named(lengths, named, untyped):
    with pytest.raises(ValueError, match=named):
        ATT.prefill(params(), CFG, x(), cache(), lengths=jnp.array(lengths))
    with pytest.raises(TypeError, match="lengths has dtype float32"):
        ATT.prefill(params(), CFG, x(), cache(), lengths=jnp.array([1.0, 2.0]))


def test_bad_sizes_of_a_cache_are_named(untyped):
    for bad in ({"batch": 0, "capacity": 8}, {"batch": 2, "capacity": -1}):
        with pytest.raises(ValueError, match="must be a positive integer"):
            ATT.init_cache(CFG, **bad)
    with pytest.raises(TypeError, match="dtype is int8"):
        ATT.init_cache(CFG, 2, 8, jnp.int8)


@pytest.mark.parametrize("lengths", [(4, 4), (-1, 4), (9, 4)], ids=["overflow", "negative", "more than T"])
def test_jitted_overflow_is_atomic_and_per_row(lengths):
    """Row 0 cannot be served: its y is NaN, its slots and length stay; row 1 is as if it were alone."""
    _, full = ATT.prefill(params(), CFG, x(), cache(), lengths=jnp.array([6, 3]))
    new = x(tokens=4)
    run = jax.jit(lambda p, x, c, n: ATT.prefill(p, CFG, x, c, lengths=n))
    y, after = run(params(), new, full, jnp.array(lengths))
    assert np.isnan(y[0]).all() and np.isfinite(y[1]).all()
    np.testing.assert_array_equal(after.length, [6, 7])
    np.testing.assert_array_equal(after.k[0], full.k[0])
    alone, _ = ATT.prefill(params(), CFG, new[1:], jax.tree.map(lambda a: a[1:], full))
    assert compare.relative(y[1:], alone) <= compare.OUT["float32"]


@pytest.mark.parametrize("x_dtype,cache_dtype", [(jnp.bfloat16, jnp.bfloat16), (jnp.float32, jnp.bfloat16),
                                                 (jnp.float16, jnp.float32)])  # fmt: skip
def test_y_has_the_dtype_of_x_and_the_cache_keeps_its_own(x_dtype, cache_dtype):
    y, after = ATT.prefill(params(x_dtype), CFG, x(dtype=x_dtype), cache(dtype=cache_dtype))
    assert y.dtype == x_dtype and after.k.dtype == after.v.dtype == cache_dtype
    y, after = ATT.decode(params(x_dtype), CFG, x(tokens=1, dtype=x_dtype), after)
    assert y.dtype == x_dtype and after.k.dtype == after.v.dtype == cache_dtype


def test_prefill_attends_over_what_it_stored():
    """With a bfloat16 cache a prefill of one token and a decode of it see the same rounded keys and values."""
    p, tokens = params(), x(tokens=1)
    one, _ = ATT.prefill(p, CFG, tokens, cache(dtype=jnp.bfloat16))
    other, _ = ATT.decode(p, CFG, tokens, cache(dtype=jnp.bfloat16))
    exact = ATT.forward(p, CFG, tokens)
    assert compare.relative(one, other) <= compare.OUT["float32"]
    assert compare.relative(one, exact) > 10 * compare.OUT["float32"]


def test_positions_feed_rope_only():
    """A shift changes nothing; other distances do."""
    order = jnp.broadcast_to(jnp.arange(6), (2, 6))
    y = ATT.forward(params(), CFG, x())
    assert compare.relative(ATT.forward(params(), CFG, x(), positions=order + 5), y) <= compare.OUT["float32"]
    assert compare.relative(ATT.forward(params(), CFG, x(), positions=2 * order), y) > 1e-2


# RoPE golden values, mechanisms.md 0.3 and 13


def yarn(theta: float, length: int, **extra):
    return rope.freeze({"rope_type": "yarn", "rope_theta": theta, "factor": 40.0,
                        "original_max_position_embeddings": length, **extra})  # fmt: skip


def test_yarn_ranges():
    assert rope.yarn_range(yarn(1e4, 4096), 64) == (10, 23)  # DeepSeek-V3
    low, high = rope.yarn_range(yarn(1e4, 4096, truncate=False), 64)
    assert (low, high) == pytest.approx((10.4722, 22.5134), abs=1e-4)
    low, high = rope.yarn_range(yarn(150000.0, 4096, truncate=False), 64)
    assert (low, high) == pytest.approx((8.0928, 17.3980), abs=1e-4)  # gpt-oss
    assert rope.yarn_range(yarn(5e4, 4096, beta_fast=1, beta_slow=1), 64) == (19, 20)  # Kimi-K2


def test_yarn_magnitudes():
    assert rope.yarn_magnitude(32.0) == pytest.approx(1.34657, abs=1e-5)  # gpt-oss, on cos and sin
    assert rope.yarn_magnitude(40.0) ** 2 == pytest.approx(1.87385, abs=1e-5)  # DeepSeek-V3, on the softmax scale
    assert rope.yarn_magnitude(40.0, 0.707) ** 2 == pytest.approx(1.58962, abs=1e-5)  # DeepSeek-V2
    assert rope.frequencies(yarn(1e4, 4096), 64)[1] == pytest.approx(1.368888, abs=1e-6)
    assert rope.frequencies(yarn(1e4, 4096, mscale=1.0, mscale_all_dim=1.0), 64)[1] == 1.0
    assert rope.frequencies(yarn(1e4, 4096, attention_factor=1.5), 64)[1] == 1.5


def test_llama3_keeps_short_waves_and_slows_long_ones():
    parameters = rope.freeze({"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                              "high_freq_factor": 4.0, "original_max_position_embeddings": 8192})  # fmt: skip
    plain = 5e5 ** (-np.arange(0, 128, 2) / 128)
    scaled, factor = rope.frequencies(parameters, 128)
    wavelength = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wavelength < 2048], plain[wavelength < 2048])
    np.testing.assert_allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-15)
    between = (wavelength > 2048) & (wavelength < 8192)
    assert between.any() and ((scaled < plain) & (scaled > plain / 8))[between].all()
    assert factor == 1.0


def test_the_two_layouts_are_one_map_up_to_the_channel_order():
    parameters = rope.freeze({"rope_theta": 1e4})
    heads = jax.random.normal(jax.random.key(0), (1, 5, 2, 8))
    positions = jnp.arange(5)[None]
    order = np.r_[0:8:2, 1:8:2]
    interleaved = rope.apply_rope(heads, positions, parameters, "interleaved")
    half = rope.apply_rope(heads[..., order], positions, parameters, "half")
    np.testing.assert_allclose(interleaved[..., order], half, rtol=1e-6)


def test_partial_rope_leaves_the_last_channels():
    heads = jax.random.normal(jax.random.key(0), (1, 5, 2, 8))
    turned = rope.apply_rope(heads, jnp.arange(5)[None], rope.freeze({"rope_theta": 1e4, "partial_rotary_factor": 0.5}))
    np.testing.assert_array_equal(turned[..., 4:], heads[..., 4:])
    assert np.abs(turned[:, 1:, :, :4] - heads[:, 1:, :, :4]).min() > 1e-6
