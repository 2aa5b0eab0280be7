"""Every named case on every backend against the float64 oracle, and the contract that the four packages share."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jforge
import pallas_kernels
from jforge.core import compare
from jforge.harness.backends import BACKENDS, judge, passes
from jforge.harness.op import Inputs
from jforge.harness.ops import BY_NAME, CASES

RUNS = [(case, b, dtype) for case in CASES for b in BACKENDS.values() for dtype in b.dtypes]


@pytest.mark.parametrize("case,backend,dtype", RUNS, ids=[f"{c.name}-{b.name}-{d}" for c, b, d in RUNS])
def test_case(case, backend, dtype):
    errors = judge(backend, BY_NAME[case.op], case, dtype)
    assert passes(errors, dtype), f"out {errors[0]:.1e}, lse {errors[1]:.1e}"


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("name", ["four_queries", "mla_two_queries"])
def test_a_window_longer_than_the_cache_is_none(backend, name):
    case = next(case for case in CASES if case.name == name)
    inputs = BY_NAME[case.op].inputs(case, "float16")
    none = backend.call(case.op, inputs)
    for window in (case.sizes["S"], 2**31 - 1, 2**31, 2**40):
        some = backend.call(case.op, Inputs(inputs.arrays, {**inputs.options, "window": window}))
        for got, want in zip(some, none, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", {case.op: case for case in CASES}.values(), ids=lambda case: case.op)
def test_strict_promotion_and_debug_infs_do_not_mind(case):
    """Eager and with a case of every op: infinities stand for what is not seen, and dtypes meet by intent."""
    inputs = BY_NAME[case.op].inputs(case, "bfloat16")
    arrays, options = (
        {n: jnp.asarray(a) if isinstance(a, np.ndarray) else a for n, a in given.items()}
        for given in (inputs.arrays, inputs.options)
    )
    with jax.numpy_dtype_promotion("strict"), jax.debug_infs(True):
        getattr(jforge.ops, case.op)(**arrays, **options)


def test_case_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)


def test_cases_poison_what_may_not_be_read():
    arrays = BY_NAME["decode_attention"].inputs(next(c for c in CASES if c.name == "window"), "float32").arrays
    assert np.isnan(arrays["k"][3, :64]).all() and np.isfinite(arrays["k"][3, 64:131]).all()
    assert np.isnan(arrays["v"][1]).all()


Q, K, V, N = (2, 1, 4, 64), (2, 128, 2, 64), (2, 128, 2, 64), np.array([5, 128], np.int32)


@pytest.mark.parametrize("length,row", [((-1, 3), 0), ((4, 129), 1)])
def test_lengths_outside_the_cache(length, row):
    q, k = jnp.zeros(Q), jnp.zeros(K)
    with pytest.raises(ValueError, match=rf"lengths\[{row}\] is {length[row]}; it must lie in 0..128"):
        jforge.ops.decode_attention(q, k, k, jnp.array(length, jnp.int32), scale=0.1)


def test_mix_falls_back_where_the_first_refuses(caplog):
    """At trace time, with the reason logged once and kept; other errors are raised, other calls stay with the first."""
    att = jforge.get("gqa")
    cfg = att.Config(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    params = att.init_params(jax.random.key(0), cfg, jnp.bfloat16)
    x = jnp.ones((1, 1, 32), jnp.bfloat16)
    mixed = jforge.ops.mix(pallas_kernels, fallback=jforge.ops)
    assert mixed is jforge.ops.mix(pallas_kernels, fallback=jforge.ops) and hash(mixed) and not mixed.fallen
    step = jax.jit(att.decode, static_argnames=("cfg", "ops"))
    with caplog.at_level(logging.WARNING, "jforge.ops"):
        for capacity in (67, 67, 64):  # Pallas takes slots in multiples of 8
            y, _ = step(params, cfg, x, att.init_cache(cfg, 1, capacity), ops=mixed)
    want, _ = step(params, cfg, x, att.init_cache(cfg, 1, 67))
    assert compare.relative(y, want) <= compare.OUT["bfloat16"]
    (reason,) = mixed.fallen["decode_attention"]
    assert "multiple of 8" in reason and [reason in line for line in caplog.messages] == [True]
    assert "decode_attention" in repr(mixed) and list(mixed.fallen) == ["decode_attention"]
    with pytest.raises(ValueError, match="window is 0"):
        mixed.decode_attention(*(jnp.zeros(s, jnp.bfloat16) for s in (Q, K, V)), jnp.asarray(N), scale=0.1, window=0)
    with pytest.raises(AttributeError, match="no op called 'decode'"):
        mixed.decode()


@pytest.mark.parametrize("shape", [(1030,), (2, 1030)])
def test_no_row_goes_to_a_kernel_that_never_picks_nan(shape):
    """XLA for CUDA has one for up to 16 picks: topk_of_nan is its case, on a GPU."""
    traced = jax.jit(jforge.ops.topk_indices, static_argnums=1).trace(jnp.zeros(shape), 4)
    (k,) = re.findall(r"chlo.top_k.*k = (\d+)", traced.lower(lowering_platforms=("cuda",)).as_text())
    assert int(k) > 16


def test_topk_order_ties_and_sentinels():
    scores = jnp.array([[1.0, 3.0, 3.0, -jnp.inf], [-jnp.inf] * 4])
    np.testing.assert_array_equal(jforge.ops.topk_indices(scores, 3), [[1, 2, 0], [-1, -1, -1]])
    np.testing.assert_array_equal(jforge.ops.topk_indices(scores, 6)[0], [1, 2, 0, -1, -1, -1])
    with pytest.raises(ValueError, match="k is 0"):
        jforge.ops.topk_indices(scores, 0)


def paged(k, page: int, seed: int):
    """`k` (B S K H) as a shuffled pool of pages with a NaN page, and the table that finds it."""
    B, S, *rest = k.shape
    order = np.random.default_rng(seed).permutation(B * S // page)
    pool = np.full((B * S // page + 1, page, *rest), np.nan, k.dtype)
    pool[order] = k.reshape(-1, page, *rest)
    return pool, order.reshape(B, -1).astype(np.int32)


def test_paged_equals_contiguous_and_skips_unread_pages():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in (Q, K, V))
    q, lengths = jnp.asarray(q), jnp.array([17, 33], jnp.int32)
    want = jforge.ops.decode_attention(q, jnp.asarray(k), jnp.asarray(v), lengths, scale=0.1)
    (k_pool, table), (v_pool, _) = paged(k, 16, 1), paged(v, 16, 1)
    table[0, 2:], table[1, 3:] = -7, 10**6  # past ceil(length / page): never followed
    pools = jnp.asarray(k_pool), jnp.asarray(v_pool)
    got = jforge.ops.decode_attention(q, *pools, lengths, scale=0.1, page_table=jnp.asarray(table))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6)


@pytest.mark.parametrize("stored", ["int8", "float8_e4m3fn"])
def test_quantised_values_mean_stored_times_scale(stored):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal(Q), jnp.float32)
    k, v = (jnp.asarray(4 * rng.standard_normal(s)).astype(stored) for s in (K, V))
    scales = [jnp.asarray(rng.uniform(0.5, 2, K[:3]), jnp.float32) for _ in "kv"]
    lengths = jnp.array([128, 9], jnp.int32)
    wide = [x.astype(jnp.float32) * s[..., None] for x, s in zip((k, v), scales, strict=True)]
    want = jforge.ops.decode_attention(q, *wide, lengths, scale=0.1)
    got = jforge.ops.decode_attention(q, k, v, lengths, scale=0.1, k_scale=scales[0], v_scale=scales[1])
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
