"""The decode kernels over listed latents in Mosaic's interpreter, against float64, and their lowering for cuda."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pallas_oracle as oracle
import pytest
from pallas_oracle import SparseMlaCase

import pallas_kernels
from pallas_kernels import compat

module = importlib.import_module("pallas_kernels.decode_sparse_mla")  # the package's attribute is the op

OUT_LIMIT = {"float16": 1e-3, "bfloat16": 4e-3}
LSE_LIMIT = 1e-3
TWO, THREE = (0,) * 2, (0,) * 3

FEW = [
    # Lists of less than a tile, around one and of several, longer than the cache, odd numbers of slots, both dtypes.
    SparseMlaCase(THREE, S=150, N=16, L=150, dtype="bfloat16", splits=1),
    SparseMlaCase(THREE, S=150, N=8, L=129, splits=2),
    SparseMlaCase(TWO, S=37, N=1, L=70),
    SparseMlaCase(TWO, S=300, N=4, L=1),
    # More tiles than the ring has stages, at the model's widths.
    SparseMlaCase((0,), S=330, N=16, C=512, L=320, dtype="bfloat16", splits=1),
    # Sinks with one split and with several, several queries, heads that are no whole boxes of 8.
    SparseMlaCase(TWO, S=136, N=4, T=2, L=64, sinks=True, splits=1, options=dict(out_dtype="float32")),
    SparseMlaCase(TWO, S=136, N=12, T=2, L=65, sinks=True, splits=2),
    SparseMlaCase(TWO, S=70, N=11, L=63),
    # Narrow latents and rope keys; too many rows for one program of this kernel, and not the other's shape.
    SparseMlaCase((0,), S=264, N=4, C=64, R=16, L=200, splits=3),
    SparseMlaCase((0,), S=70, N=40, C=64, R=8, L=70),
]
MANY = [
    # Odd and even numbers of tiles, one and more than there are stages, one split and several, both dtypes.
    SparseMlaCase(TWO, S=150, N=64, L=60, splits=1),
    SparseMlaCase(THREE, S=150, N=64, L=150, dtype="bfloat16", splits=1),
    SparseMlaCase((0,), S=400, N=64, L=400, splits=1),
    SparseMlaCase(TWO, S=250, N=40, L=250, splits=2),
    SparseMlaCase((0,), S=72, N=128, L=70, dtype="bfloat16", sinks=True, splits=1),
    # At the model's widths.
    SparseMlaCase((0,), S=330, N=128, C=512, L=256, dtype="bfloat16", splits=1),
    # Blocks of 64 rows that are not full: final in 16 bits, final in float32, partial; several queries.
    SparseMlaCase(TWO, S=70, N=48, L=64, sinks=True),
    SparseMlaCase((0,), S=70, N=40, C=256, R=32, L=70, options=dict(out_dtype="float32")),
    SparseMlaCase((0,), S=150, N=40, T=2, L=140, sinks=True, splits=3),
    SparseMlaCase((0,), S=70, N=64, T=2, L=70, splits=1, options=dict(out_dtype="float32")),
]


@pytest.fixture(params=FEW + MANY, ids=str)
def case(request, monkeypatch):
    if request.param.splits:
        monkeypatch.setattr(module, "fill_splits", lambda *_, **__: request.param.splits)
    return request.param


def call(case):
    """(the op with the case's options bound, its arguments, sinks)."""
    args, sinks = case.arrays()
    options = dict(scale=case.scale, sinks=sinks, **case.options)
    return functools.partial(pallas_kernels.decode_sparse_mla, **options), args, sinks


def test_matches_the_oracle(case, no_races):
    op, args, sinks = call(case)
    out, lse = op(*args)
    want, want_lse = oracle.decode_sparse_mla(*args, scale=case.scale, sinks=sinks)
    assert out.dtype == case.options.get("out_dtype", case.dtype) and lse.dtype == jnp.float32
    assert oracle.error(out, want) < OUT_LIMIT[case.dtype]
    assert oracle.lse_error(lse, want_lse) < LSE_LIMIT


def test_lowers_for_cuda(case):
    op, args, _ = call(case)
    with compat.lowering_for_cuda():
        text = jax.jit(op).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert ("decode_sparse_mla_many" in text) == (case in MANY)
    assert text.count("custom_call @mosaic_gpu_v2") in (1, 2)
    assert "stablehlo.pad" not in text and "stablehlo.slice" not in text and "stablehlo.transpose" not in text


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("N, T", [(1, 1), (8, 2), (12, 1), (64, 2), (128, 1)])
def test_model_shapes_lower(N, T, splits, monkeypatch):
    """C = 512 and R = 64 fit shared memory for every number of rows of a program, as final and as partial results."""
    B, S, L = 2, 32768, 2048
    shapes = (B, T, N, 512), (B, T, N, 64), (B, S, 512), (B, S, 64)
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    monkeypatch.setattr(module, "fill_splits", lambda *_, **__: splits)
    with compat.lowering_for_cuda():
        call = functools.partial(pallas_kernels.decode_sparse_mla, scale=1.0)
        jax.jit(call).trace(*args, jax.ShapeDtypeStruct((B, T, L), jnp.int32)).lower(lowering_platforms=("cuda",))


def test_order_and_padding_of_a_list_do_not_matter(no_races):
    """The same tokens in another order, among ignored entries, give the same result up to rounding."""
    args, _ = SparseMlaCase((0,), S=100, N=8, L=60).arrays()
    entries = np.full((1, 1, 130), -1, np.int32)
    entries[0, 0, 129:9:-2] = np.asarray(args[4])[0, 0]
    out, lse = pallas_kernels.decode_sparse_mla(*args, scale=0.1)
    other, other_lse = pallas_kernels.decode_sparse_mla(*args[:4], jnp.asarray(entries), scale=0.1)
    assert oracle.error(other, np.asarray(out, np.float64)) < OUT_LIMIT["float16"]
    assert oracle.lse_error(other_lse, np.asarray(lse, np.float64)) < LSE_LIMIT


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(dtype="float32"), "tf32"),
        (dict(out_dtype="float64"), "float32"),
        (dict(C=96), "multiples of 64"),
        (dict(C=576), "up to 512"),
        (dict(R=12), "multiples of 8"),
        (dict(R=128), "up to 64"),
        (dict(S=0), "S=0"),
        (dict(L=0), "L=0"),
        (dict(N=0), "N=0"),
        (dict(latent_scale=True), "latent_scale"),
    ],
)
def test_unsupported_calls_say_why(change, reason):
    S, C, R, L, N = (change.get(x, default) for x, default in zip("SCRLN", (64, 64, 64, 64, 4), strict=True))
    shapes = (1, 1, N, C), (1, 1, N, R), (1, S, C), (1, S, R)
    arrays = [jnp.zeros(shape, change.get("dtype", "float16")) for shape in shapes]
    options = dict(out_dtype=change.get("out_dtype"))
    if "latent_scale" in change:
        arrays[2], options["latent_scale"] = arrays[2].astype(jnp.int8), jnp.ones((1, S))
    with pytest.raises(NotImplementedError, match=reason):
        pallas_kernels.decode_sparse_mla(*arrays, jnp.zeros((1, 1, L), jnp.int32), scale=1.0, **options)


def test_wrong_arguments_name_the_argument():
    args, _ = SparseMlaCase((0,), S=8, N=4, L=8).arrays()
    with pytest.raises(TypeError, match="indices has dtype"):
        pallas_kernels.decode_sparse_mla(*args[:4], args[4].astype(jnp.float16), scale=1.0)
    with pytest.raises(ValueError, match="indices has shape"):
        pallas_kernels.decode_sparse_mla(*args[:4], args[4][0], scale=1.0)
    with pytest.raises(TypeError, match="latent has dtype"):
        pallas_kernels.decode_sparse_mla(*args[:2], args[2].astype(jnp.bfloat16), *args[3:], scale=1.0)
