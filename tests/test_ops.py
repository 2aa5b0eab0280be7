"""Every named case on every backend against the float64 oracle, and the contract that the four packages share."""

import importlib
import inspect

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jforge
from jforge.harness.backends import BACKENDS, judge, passes
from jforge.harness.op import Inputs
from jforge.harness.ops import BY_NAME, CASES

PACKAGES = [b.package for b in BACKENDS.values()]
OPS = [name for name in jforge.ops.__all__ if name != "mix"]


def unwritten(package: str, op: str) -> bool:
    return getattr(importlib.import_module(package), op).__module__ == f"{package}.unwritten"


WRITTEN = [(case, b) for case in CASES for b in BACKENDS.values() if not unwritten(b.package, case.op)]
RUNS = [(case, b, dtype) for case, b in WRITTEN for dtype in b.dtypes]


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


def test_case_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)


def test_cases_poison_what_may_not_be_read():
    arrays = BY_NAME["decode_attention"].inputs(next(c for c in CASES if c.name == "window"), "float32").arrays
    assert np.isnan(arrays["k"][3, :64]).all() and np.isfinite(arrays["k"][3, 64:131]).all()
    assert np.isnan(arrays["v"][1]).all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("package", PACKAGES)
def test_every_op_exists_with_one_signature(package, op):
    def shape(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert shape(getattr(importlib.import_module(package), op)) == shape(getattr(jforge.ops, op))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("package", PACKAGES)
def test_every_op_is_written(package, op):
    assert not unwritten(package, op)


Q, K, V, N = (2, 1, 4, 64), (2, 128, 2, 64), (2, 128, 2, 64), np.array([5, 128], np.int32)
BAD = [
    ("q's rank", {"q": Q[1:]}, {}, ValueError, "q"),
    ("heads", {"q": (2, 1, 3, 64)}, {}, ValueError, "N=3"),
    ("head dim", {"k": (2, 128, 2, 32)}, {}, ValueError, "k"),
    ("slots of v", {"v": (2, 64, 2, 64)}, {}, ValueError, "v"),
    ("batch", {"lengths": np.array([1], np.int32)}, {}, ValueError, "lengths"),
    ("length dtype", {"lengths": N.astype(np.float32)}, {}, TypeError, "lengths"),
    ("mixed dtypes", {"k": np.zeros(K, np.float32)}, {}, TypeError, "k"),
    ("integers", {"q": np.zeros(Q, np.int32)}, {}, TypeError, "q"),
    ("window", {}, {"window": 0}, ValueError, "window"),
    ("softcap", {}, {"softcap": -1.0}, ValueError, "softcap"),
    ("endless softcap", {}, {"softcap": float("inf")}, ValueError, "softcap"),
    ("complex scale", {}, {"scale": np.complex64(1)}, TypeError, "scale"),
    ("chunk", {}, {"chunk": 0}, ValueError, "chunk"),
    ("sinks", {}, {"sinks": np.zeros(3, np.float32)}, ValueError, "sinks"),
    (
        "one scale",
        {"k": np.zeros(K, np.int8), "v": np.zeros(V, np.int8)},
        {"k_scale": np.ones((2, 128, 2), np.float32)},
        TypeError,
        "v_scale",
    ),
]


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("arrays,options,error,named", [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_named(untyped, package, arrays, options, error, named):
    convert = jnp.asarray if package in ("jforge.ops", "pallas_kernels") else torch.from_numpy
    values = {"q": Q, "k": K, "v": V, "lengths": N, **arrays}
    full = [a if isinstance(a, np.ndarray) else np.zeros(a, np.float16) for a in values.values()]
    options = {k: convert(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    with pytest.raises(error, match=named) as caught:
        importlib.import_module(package).decode_attention(*map(convert, full), scale=0.1, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length,row", [((-1, 3), 0), ((4, 129), 1)])
def test_lengths_outside_the_cache(length, row):
    q, k = jnp.zeros(Q), jnp.zeros(K)
    with pytest.raises(ValueError, match=rf"lengths\[{row}\] is {length[row]}; it must lie in 0..128"):
        jforge.ops.decode_attention(q, k, k, jnp.array(length, jnp.int32), scale=0.1)


def test_mix_takes_only_what_is_unwritten():
    """Every package has every op by now, so a package that lacks one is made up."""
    import types

    import pallas_kernels

    def missing(*arrays):
        raise NotImplementedError

    missing.__module__ = "partial.unwritten"
    partial = types.SimpleNamespace(**vars(pallas_kernels) | {"__name__": "partial", "decode_linear": missing})
    mixed = jforge.ops.mix(partial, fallback=jforge.ops)
    assert mixed.decode_attention is pallas_kernels.decode_attention
    assert mixed.decode_linear is jforge.ops.decode_linear
    assert "decode_linear" in repr(mixed) and "decode_attention" not in repr(mixed)
    whole = jforge.ops.mix(pallas_kernels, fallback=jforge.ops)
    assert whole.decode_linear is pallas_kernels.decode_linear
    assert hash(whole) == hash(jforge.ops.mix(pallas_kernels, fallback=jforge.ops))


def test_merge_states_refuses_no_parts():
    with pytest.raises(ValueError, match="P=0"):
        jforge.ops.merge_states(jnp.zeros((0, 1, 1, 2, 4)), jnp.zeros((0, 1, 1, 2)))


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
