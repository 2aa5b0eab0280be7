"""The decode kernel in Mosaic's interpreter, against float64, and its lowering for cuda."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pallas_oracle as oracle
import pytest
from pallas_oracle import Case

import pallas_kernels
from pallas_kernels import compat, plan

OUT_LIMIT = {"float16": 1e-3, "bfloat16": 4e-3}
LSE_LIMIT = 1e-3
EDGES = (0, 1, 63, 64, 65, 136)

CASES = [
    # Lengths around the tile, groups 1, 4 and 8, one split and several, both dtypes.
    Case(EDGES, S=136, N=4, H=64, splits=1),
    Case(EDGES, S=136, N=8, H=128, dtype="bfloat16", splits=2),
    Case((136, 70), S=136, N=2, K=2, H=128, splits=2),
    Case((0, 5), S=8, N=4, H=128, dtype="bfloat16"),
    # More tiles than the ring has stages, so that slots are reused.
    Case((500,), S=504, N=8, K=2, splits=1),
    # Sinks with one split (folded in the kernel), with several (folded in the merge), and with empty rows.
    Case((0, 100), S=136, N=4, sinks=True, splits=1),
    Case((0, 100), S=136, N=6, K=2, sinks=True, splits=2, options=dict(softcap=2.0, out_dtype="float32")),
    # Several queries: the first ones of a short row see nothing.
    Case((2, 67), S=72, N=4, T=3, splits=2),
    Case((70,), S=72, N=12, K=2, T=2, sinks=True, options=dict(window=5)),
    # Windows within a tile and across tiles; only their tiles are touched.
    Case((3, 250), S=264, N=4, options=dict(window=70), splits=2),
    Case((130,), S=136, N=4, options=dict(window=1)),
    # Groups above 8: whole boxes, divisors below 8, a prime, and more than one block of query rows.
    Case((70,), S=72, N=16),
    Case((70,), S=72, N=11),
    Case((66,), S=72, N=128, H=128, dtype="bfloat16"),
    # Head dims that are not multiples of 64, and values narrower or wider than keys.
    Case((70,), S=72, H=80),
    Case((70,), S=72, H=80, splits=2),
    Case((70,), S=72, H=96),
    Case((70,), S=72, H=192, V=128),
    Case((70,), S=72, H=256),
    Case((70,), S=72, H=16, V=32),
    # Pages that divide a tile, hold several tiles, or neither; the last tile has no page of its own.
    Case((0, 1, 130, 144), S=144, page=16, splits=2),
    Case((70,), S=72, page=8, options=dict(window=20)),
    Case((30, 200), S=256, N=8, K=2, page=128),
    Case((90, 25), S=96, page=24, options=dict(chunk=64)),
    # Fixed split size.
    Case((65, 250), S=264, N=8, options=dict(chunk=100)),
    Case((250,), S=264, N=4, options=dict(chunk=64, window=70)),
]


@pytest.fixture(params=CASES, ids=str)
def case(request, monkeypatch):
    if request.param.splits:
        module = importlib.import_module("pallas_kernels.decode_attention")  # the package's attribute is the op
        monkeypatch.setattr(module, "fill_splits", lambda *_, **__: request.param.splits)
    return request.param


def call(case):
    """(the op with the case's options bound, its arguments as the op takes them, the contiguous arguments, sinks)."""
    args, sinks = case.arrays()
    options = dict(scale=case.scale, sinks=sinks, **case.options)
    q, k, v, lengths = args
    if case.page:
        k, v, options["page_table"] = case.paged(k, v)
    return functools.partial(pallas_kernels.decode_attention, **options), (q, k, v, lengths), args, sinks


def expected(case, args, sinks):
    options = {name: case.options[name] for name in ("window", "softcap") if name in case.options}
    return oracle.decode_attention(*args, scale=case.scale, sinks=sinks, **options)


def test_matches_the_oracle(case, no_races):
    op, args, contiguous, sinks = call(case)
    out, lse = op(*args)
    want, want_lse = expected(case, contiguous, sinks)
    assert out.dtype == case.options.get("out_dtype", case.dtype) and lse.dtype == jnp.float32
    assert oracle.error(out, want) < OUT_LIMIT[case.dtype]
    assert oracle.lse_error(lse, want_lse) < LSE_LIMIT


def test_lowers_for_cuda(case):
    op, args, _, _ = call(case)
    with compat.lowering_for_cuda():
        text = jax.jit(op).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    alone = case.splits == 1 or text.count("mosaic_gpu_v2") == 1
    assert text.count("custom_call @mosaic_gpu_v2") == (1 if alone else 2)
    assert "stablehlo.pad" not in text and "stablehlo.slice" not in text and "stablehlo.transpose" not in text


@pytest.mark.parametrize("options", [dict(), dict(window=70), dict(softcap=3.0, out_dtype="float32")], ids=str)
def test_fixed_chunk_is_bitwise_batch_invariant(options, no_races):
    """A row alone, among rows of other lengths, and in caches of other sizes: the same bits, sinks included."""
    both = Case((130, 30), S=136, N=16, sinks=True, options=dict(chunk=64, **options))
    op, (q, k, v, lengths), _, _ = call(both)
    out, lse = (np.asarray(x) for x in op(q, k, v, lengths))
    for b, sizes in ((0, (136,)), (1, (32, 64, 136))):
        row = slice(b, b + 1)
        for S in sizes:
            one, one_lse = op(q[row], k[row, :S], v[row, :S], lengths[row])
            assert np.array_equal(out[row], np.asarray(one)) and np.array_equal(lse[row], np.asarray(one_lse)), S


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(q="float32", k="float32", v="float32"), "tf32"),
        (dict(S=12), "multiple of 8"),
        (dict(H=72), "multiples of 16"),
        (dict(V=320), "up to 256"),
        (dict(out_dtype="float64"), "float32"),
        (dict(page=12), "multiple of 8"),
        (dict(k_scale=True), "k_scale"),
    ],
)
def test_unsupported_calls_say_why(change, reason):
    S, H, V = change.get("S", 64), change.get("H", 64), change.get("V", 64)
    options = {}
    if "out_dtype" in change:
        options["out_dtype"] = change["out_dtype"]
    if "page" in change:
        S, options["page_table"] = change["page"], jnp.zeros((1, 1), jnp.int32)
    shapes = dict(q=(1, 1, 4, H), k=(1, S, 1, H), v=(1, S, 1, V))
    dtypes = {name: change.get(name, "float16") for name in shapes}
    if "k_scale" in change:
        dtypes |= dict(k="int8", v="int8")
        options |= dict(k_scale=jnp.ones((1, S, 1)), v_scale=jnp.ones((1, S, 1)))
    q, k, v = (jnp.zeros(shape, dtypes[name]) for name, shape in shapes.items())
    with pytest.raises(NotImplementedError, match=reason):
        pallas_kernels.decode_attention(q, k, v, jnp.ones(1, jnp.int32), scale=1.0, **options)


@pytest.mark.parametrize("softcap", [0.5, 30.0, 1e3, 1e5, 1e7])
def test_softcaps_from_small_to_none(softcap):
    case = Case((70,), S=72, N=8, options=dict(softcap=softcap, out_dtype="float32"))
    op, args, contiguous, sinks = call(case)
    out, lse = op(*args)
    want, want_lse = expected(case, contiguous, sinks)
    assert oracle.error(out, want) < OUT_LIMIT["float16"] / 2
    assert oracle.lse_error(lse, want_lse) < 1e-5


def test_options_may_be_numpy_integers_and_larger_than_the_cache():
    case = Case((70,), S=72, N=8, T=2)
    op, args, _, _ = call(case)
    for name, value in (("chunk", np.int64(64)), ("chunk", 2**62), ("window", np.int32(20)), ("window", 2**31 - 1)):
        out, _ = op(*args, **{name: value})
        same, _ = op(*args, **{name: min(int(value), 72)})
        assert np.array_equal(np.asarray(out), np.asarray(same)), name


def test_grids_that_cuda_has_not_say_so():
    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float16)

    call = functools.partial(pallas_kernels.decode_attention, scale=1.0)
    long, rows = 64 * 65536, 65536
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    with compat.lowering_for_cuda():
        with pytest.raises(NotImplementedError, match="65536 programs along split"):
            call = functools.partial(call, chunk=64)
            jax.eval_shape(call, shape(1, 1, 1, 16), shape(1, long, 1, 16), shape(1, long, 1, 16), lengths[0])
        with pytest.raises(NotImplementedError, match="B=65536"):
            jax.eval_shape(call, shape(rows, 1, 1, 16), shape(rows, 8, 1, 16), shape(rows, 8, 1, 16), lengths[1])


def test_wrong_arguments_name_the_argument():
    (q, k, v, lengths), _ = Case((5,), S=8).arrays()
    for n in (-1, 9):
        with pytest.raises(ValueError, match=rf"lengths\[0\] is {n}"):
            pallas_kernels.decode_attention(q, k, v, jnp.array([n], jnp.int32), scale=1.0)
    with pytest.raises(TypeError, match="k has dtype"):
        pallas_kernels.decode_attention(q, k.astype(jnp.bfloat16), v, lengths, scale=1.0)
    with pytest.raises(ValueError, match="window"):
        pallas_kernels.decode_attention(q, k, v, lengths, scale=1.0, window=0)


def test_plans():
    """One split where heads alone keep every SM busy, as many as do where they do not."""
    assert plan.fill_splits(programs=512, tiles=128, together=2) == 1
    assert plan.fill_splits(programs=128, tiles=16, together=2) == 1
    assert 128 <= 8 * plan.fill_splits(programs=8, tiles=64, together=2) <= 132
    assert plan.fill_splits(programs=136, tiles=64, together=2) > 1
    assert plan.fill_splits(programs=1, tiles=0) == 1
    for H, V, rows in [(64, 64, 8), (128, 128, 8), (128, 128, 64), (256, 256, 32), (256, 64, 8)]:
        assert plan.default_config(H, V, rows).stages >= 2


def test_table_lookup(monkeypatch):
    config = dict(block=128, stages=2, splits=7)
    key = dict(dtype="bfloat16", head_dim=128, value_dim=128, group=4, batch_heads=8, length=4096, device="H100")
    monkeypatch.setattr(plan, "_table", lambda op: ({**key, "config": config},))
    call = ("decode_attention", "bfloat16", 128, 128)
    assert plan.lookup(*call, 4, 12, 4096, "NVIDIA H100 80GB HBM3") == plan.Config(**config)
    assert plan.lookup(*call, 4, 8, 65536, "NVIDIA H100 80GB HBM3") is None
    assert plan.lookup(*call, 8, 8, 4096, "NVIDIA H100 80GB HBM3") is None
    assert plan.lookup(*call, 4, 8, 4096, "NVIDIA H200") is None
