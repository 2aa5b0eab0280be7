"""The latent decode kernels in Mosaic's interpreter, against float64, and their lowering for cuda."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pallas_oracle as oracle
import pytest
from pallas_oracle import MlaCase

import pallas_kernels
from pallas_kernels import compat
from pallas_kernels.plan import Config

module = importlib.import_module("pallas_kernels.decode_mla")  # the package's attribute is the op

OUT_LIMIT = {"float16": 1e-3, "bfloat16": 4e-3}
LSE_LIMIT = 1e-3
EDGES = (0, 1, 63, 64, 65, 136)

FEW = [
    # Lengths around the tile, one split and several, both dtypes.
    MlaCase(EDGES, S=136, N=16, dtype="bfloat16", splits=1),
    MlaCase(EDGES, S=136, N=8, splits=2),
    MlaCase((0, 70), S=72, N=1, splits=1),
    # More tiles than the ring has stages, at the model's widths, in pages of one tile.
    MlaCase((330, 100), S=384, N=16, C=512, dtype="bfloat16", page=64, splits=1),
    # Sinks with one split and with several, empty rows, several queries, heads that are no whole boxes of 8.
    MlaCase((0, 100), S=136, N=4, T=2, sinks=True, splits=1, options=dict(out_dtype="float32")),
    MlaCase((2, 100), S=136, N=12, T=2, sinks=True, splits=2),
    MlaCase((70,), S=72, N=11),
    MlaCase((70,), S=72, N=16, T=2, options=dict(window=5)),
    # Narrow latents and rope keys, windows across tiles, pages smaller than a tile, fixed split size.
    MlaCase((3, 250), S=264, N=4, C=64, R=16, splits=2, options=dict(window=70)),
    MlaCase((90, 25), S=96, N=4, R=32, page=24, options=dict(chunk=64)),
    # Too many rows for one program of this kernel, and not the other's shape.
    MlaCase((70,), S=72, N=20, T=2, C=64),
]
MANY = [
    # Odd and even numbers of tiles, more of them than stages, one split and several, both dtypes.
    MlaCase(EDGES, S=136, N=64, dtype="bfloat16", splits=1),
    MlaCase((330,), S=336, N=64, splits=1),
    MlaCase((250, 64), S=256, N=40, splits=2),
    MlaCase((70,), S=72, N=128, dtype="bfloat16", sinks=True, splits=1),
    # At the model's widths, in pages of one tile.
    MlaCase((330,), S=384, N=64, C=512, dtype="bfloat16", page=64, splits=1),
    # Blocks of 64 rows that are not full: final in 16 bits, final in float32, partial.
    MlaCase((70,), S=72, N=48, sinks=True),
    MlaCase((70,), S=72, N=40, C=256, R=32, options=dict(out_dtype="float32")),
    MlaCase((150,), S=152, N=40, sinks=True, splits=2),
    MlaCase((70,), S=72, N=64, splits=1, options=dict(out_dtype="float32")),
    # Several queries, windows within a tile and across tiles, pages that are no tile, fixed split size.
    MlaCase((1, 250), S=264, N=64, T=2, splits=1, options=dict(window=70)),
    MlaCase((130,), S=136, N=64, splits=1, options=dict(window=1)),
    MlaCase((30, 200), S=256, N=64, page=128, splits=1),
    MlaCase((70,), S=72, N=40, page=8, options=dict(window=20)),
    MlaCase((250,), S=264, N=40, options=dict(chunk=100)),
]


@pytest.fixture(params=FEW + MANY, ids=str)
def case(request, monkeypatch):
    if request.param.splits:
        monkeypatch.setattr(module, "fill_splits", lambda *_, **__: request.param.splits)
    return request.param


def call(case):
    """(the op with the case's options bound, its arguments as the op takes them, the contiguous arguments, sinks)."""
    args, sinks = case.arrays()
    options = dict(scale=case.scale, sinks=sinks, **case.options)
    *queries, latent, k_rope, lengths = args
    if case.page:
        latent, k_rope, options["page_table"] = case.paged(latent, k_rope)
    return functools.partial(pallas_kernels.decode_mla, **options), (*queries, latent, k_rope, lengths), args, sinks


def test_matches_the_oracle(case, no_races):
    op, args, contiguous, sinks = call(case)
    out, lse = op(*args)
    want, want_lse = oracle.decode_mla(*contiguous, scale=case.scale, sinks=sinks, window=case.options.get("window"))
    assert out.dtype == case.options.get("out_dtype", case.dtype) and lse.dtype == jnp.float32
    assert oracle.error(out, want) < OUT_LIMIT[case.dtype]
    assert oracle.lse_error(lse, want_lse) < LSE_LIMIT


def test_lowers_for_cuda(case):
    op, args, _, _ = call(case)
    with compat.lowering_for_cuda():
        text = jax.jit(op).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert ("decode_mla_many" in text) == (case in MANY)
    assert text.count("custom_call @mosaic_gpu_v2") in (1, 2)
    assert "stablehlo.pad" not in text and "stablehlo.slice" not in text and "stablehlo.transpose" not in text


@pytest.mark.parametrize("N, T", [(1, 1), (8, 2), (12, 2), (16, 2), (128, 1)])
def test_model_shapes_lower(N, T):
    """C = 512 and R = 64 fit shared memory for every number of rows of a program, as final and as partial results."""
    B, S = 2, 256
    shapes = (B, T, N, 512), (B, T, N, 64), (B, S, 512), (B, S, 64)
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes] + [jax.ShapeDtypeStruct((B,), jnp.int32)]
    for options in (dict(chunk=S), dict(chunk=64)):
        with compat.lowering_for_cuda():
            call = functools.partial(pallas_kernels.decode_mla, scale=1.0, **options)
            jax.jit(call).trace(*args).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("N", [8, 40])
def test_fixed_chunk_is_bitwise_batch_invariant(N, no_races):
    """A row alone, among rows of other lengths, and in caches of other sizes: the same bits, sinks included."""
    op, (*queries, latent, k_rope, lengths), _, _ = call(
        MlaCase((100, 30), S=104, N=N, sinks=True, options=dict(chunk=64, out_dtype="float32"))
    )
    out, lse = (np.asarray(x) for x in op(*queries, latent, k_rope, lengths))
    for b, S in ((0, 104), (1, 64), (1, 104)):
        row = slice(b, b + 1)
        one, one_lse = op(*(q[row] for q in queries), latent[row, :S], k_rope[row, :S], lengths[row])
        assert np.array_equal(out[row], np.asarray(one)) and np.array_equal(lse[row], np.asarray(one_lse)), S


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(dtype="float32"), "tf32"),
        (dict(S=12), "multiple of 8"),
        (dict(C=96), "multiples of 64"),
        (dict(C=576), "up to 512"),
        (dict(R=12), "multiples of 8"),
        (dict(R=128), "up to 64"),
        (dict(page=12), "multiple of 8"),
        (dict(latent_scale=True), "latent_scale"),
    ],
)
def test_unsupported_calls_say_why(change, reason):
    S, C, R = change.get("S", 64), change.get("C", 64), change.get("R", 64)
    options = {}
    if "page" in change:
        S, options["page_table"] = change["page"], jnp.zeros((1, 1), jnp.int32)
    shapes = (1, 1, 4, C), (1, 1, 4, R), (1, S, C), (1, S, R)
    arrays = [jnp.zeros(shape, change.get("dtype", "float16")) for shape in shapes]
    if "latent_scale" in change:
        arrays[2], options["latent_scale"] = arrays[2].astype(jnp.int8), jnp.ones((1, S))
    with pytest.raises(NotImplementedError, match=reason):
        pallas_kernels.decode_mla(*arrays, jnp.ones(1, jnp.int32), scale=1.0, **options)


def test_wrong_arguments_name_the_argument():
    args, _ = MlaCase((5,), S=8, N=4).arrays()
    wrong = (*args[:2], args[2].astype(jnp.bfloat16), *args[3:])
    with pytest.raises(TypeError, match="latent has dtype"):
        pallas_kernels.decode_mla(*wrong, scale=1.0)
    with pytest.raises(ValueError, match="window"):
        pallas_kernels.decode_mla(*args, scale=1.0, window=0)


def test_few_and_many_rows():
    """Rings come in pairs of tiles, which the kernel of many rows needs."""
    for C in (64, 128, 256, 512):
        for rows in (8, 32, 64):
            assert module.default_config(C, rows).stages in (2, 4)
    assert module.default_config(512, 64) == Config(64, 2)
