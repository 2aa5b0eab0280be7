"""The index kernels in Mosaic's interpreter, against float64, their lowering for cuda, and top-k."""

import functools
import importlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pallas_oracle as oracle
import pytest
from pallas_oracle import IndexCase

import pallas_kernels
from jforge.core import compare
from pallas_kernels import compat

module = importlib.import_module("pallas_kernels.index_scores")  # the package's attribute is the op

LIMIT = compare.OUT["float32"]  # products of 16-bit numbers are exact in float32
EDGES = (0, 1, 63, 64, 65, 136)

SCORES = [
    # Lengths around the tile, heads that fill boxes and that do not, one split and several, both dtypes.
    IndexCase(EDGES, 136, 8, splits=1),
    IndexCase((136, 70, 0), 136, 64, 128, dtype="bfloat16", splits=2),
    IndexCase((136, 0, 75), 136, 5, splits=3),
    IndexCase((136, 75), 136, 4, 128),
    IndexCase((70,), 72, 12, 80, dtype="bfloat16"),
    IndexCase((70,), 128, 1, 16),
    # More tiles than the ring has, a cache of less than one tile, heads that need two accumulators.
    IndexCase((840, 100), 840, 8, splits=1),
    IndexCase((5, 0), 8, 4),
    IndexCase((70,), 72, 136),
    # Several queries: some see nothing, in one program and in several.
    IndexCase((1, 64, 136), 136, 5, T=2, splits=2),
    IndexCase((2, 67), 72, 8, T=8),
    IndexCase((70,), 72, 64, 128, T=4, dtype="bfloat16"),
    # Keys of 8 bits.
    IndexCase((136, 75), 136, 8, 128, dtype="bfloat16", k_dtype="float8_e4m3fn"),
    IndexCase((136, 0), 136, 5, k_dtype="float8_e5m2", T=2),
    IndexCase((600,), 840, 4, dtype="bfloat16", k_dtype="int8", splits=1),
    IndexCase((70,), 72, 4, 96, k_dtype="int8"),
]
BLOCKS = [
    # Every size, rows of any length, a partial last block, whole groups of 8 blocks and not, both dtypes.
    IndexCase(EDGES, 136, 4, size=8, splits=1),
    IndexCase((136, 0, 75), 136, 4, 128, size=16, dtype="bfloat16", splits=2),
    IndexCase((512, 300), 512, 5, size=32, splits=2),
    IndexCase((512, 0, 129), 512, 8, size=64, splits=1),
    IndexCase((1000, 300), 1000, 4, 128, size=128, dtype="bfloat16", splits=1),
    IndexCase((1100, 2048), 2048, 4, size=128, splits=2),
    IndexCase((300,), 400, 2, size=192),
    IndexCase((5,), 8, 1, size=64),
    # Several queries, some of which see nothing; more rows than a program has, in whole boxes and with boxes to spare.
    IndexCase((2, 67), 72, 5, size=8, T=3),
    IndexCase((70, 9), 128, 64, size=16, T=2),
    IndexCase((70,), 72, 36, size=32, T=2),
    # Keys of 8 bits.
    IndexCase((136, 75), 136, 4, 128, size=16, dtype="bfloat16", k_dtype="float8_e4m3fn"),
    IndexCase((136, 0), 136, 4, size=64, k_dtype="float8_e5m2"),
    IndexCase((300,), 512, 4, size=128, k_dtype="int8", T=2),
]


@pytest.fixture(params=SCORES + BLOCKS, ids=str)
def case(request, monkeypatch):
    if request.param.splits:
        monkeypatch.setattr(module, "_splits", lambda *_: request.param.splits)
    return request.param


def call(case):
    """(the op with the case's block size bound, its arguments)."""
    q, k, weights, lengths, scale = case.arrays()
    if case.size:
        op = functools.partial(pallas_kernels.block_index_scores, block_size=case.size)
        return lambda q, k, lengths, k_scale: op(q, k, lengths, k_scale=k_scale), (q, k, lengths, scale)
    op = pallas_kernels.index_scores
    return lambda q, k, w, lengths, k_scale: op(q, k, w, lengths, k_scale=k_scale), (q, k, weights, lengths, scale)


def test_matches_the_oracle(case, no_races):
    op, args = call(case)
    scores = op(*args)
    q, k, weights, lengths, scale = case.arrays()
    k = np.asarray(k.astype(jnp.float32), np.float64) * (1 if scale is None else np.asarray(scale)[..., None])
    if case.size:
        want = oracle.block_index_scores(q, k, lengths, block_size=case.size)
    else:
        want = oracle.index_scores(q, k, weights, lengths)
    assert scores.dtype == jnp.float32
    assert compare.worst_row(scores, want) < LIMIT


def test_lowers_for_cuda(case):
    op, args = call(case)
    with compat.lowering_for_cuda():
        text = jax.jit(op).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu_v2") == 1
    assert "stablehlo.pad" not in text and "stablehlo.transpose" not in text
    blocks = -(-case.S // case.size) if case.size else 0
    assert ("stablehlo.slice" in text) == (blocks % 8 > 0)


@pytest.mark.parametrize("size", [None, 16])
def test_a_score_depends_on_nothing_but_its_key(size, monkeypatch, no_races):
    """A row alone and among others, by one program and by three: the same bits."""
    results = []
    for rows, splits in ((2, 3), (1, 1)):
        monkeypatch.setattr(module, "_splits", lambda *_, splits=splits: splits)
        op, (*args, _) = call(IndexCase((250, 100), 256, 5, size=size))
        results.append(np.asarray(op(*(x[:rows] for x in args), None))[0])
    assert np.array_equal(*results)


@pytest.mark.parametrize("k_dtype", [None, "float8_e4m3fn", "int8"])
@pytest.mark.parametrize("heads, T, J, size", [(64, 1, 128, None), (64, 4, 128, None), (256, 1, 256, None),
                                               (4, 1, 128, 128), (4, 8, 256, 128)])  # fmt: skip
def test_model_shapes_lower(heads, T, J, size, k_dtype):
    """Queries and a ring of at least 3 tiles fit shared memory."""
    op, args = call(IndexCase((0, 0), 4096, heads, J, T, "bfloat16", k_dtype, size))
    abstract = [None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
    with compat.lowering_for_cuda():
        jax.jit(op).trace(*abstract).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("B, T, S", [(1, 1, 131072), (16, 1, 65536), (16, 4, 65536), (300, 1, 1024), (1, 1, 64)])
def test_plans_fill_the_card(B, T, S):
    """More than half of what the card holds at a time has work, unless there are fewer tiles."""
    plan = module.make_facts((B, T, 64, 128), S, jnp.dtype("bfloat16"))
    programs, slots, tiles = B * plan.row_blocks * plan.splits, module.PROGRAMS * module.SMS, -(-S // module.TILE)
    assert plan.stages >= 3 and plan.splits <= tiles
    assert programs > slots // 2 or plan.splits == tiles
    assert programs <= max(module.WAVES * slots, B * plan.row_blocks)


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(dtype="float32"), "tf32"),
        (dict(S=12), "multiple of 8"),
        (dict(J=24), "multiples of 16"),
        (dict(J=16, k_dtype="int8"), "multiples of 32"),
        (dict(J=272), "up to 256"),
        (dict(heads=264, J=256), "must fit"),
        (dict(size=24), "block_size is 24"),
    ],
)
def test_unsupported_calls_say_why(change, reason):
    op, args = call(replace(IndexCase((8,), 64), **change))
    with pytest.raises(NotImplementedError, match=reason):
        op(*args)


def test_wrong_arguments_name_the_argument():
    q, k, weights, lengths, _ = IndexCase((8,), 64).arrays()
    with pytest.raises(TypeError, match="k_index has dtype"):
        pallas_kernels.index_scores(q, k.astype(jnp.bfloat16), weights, lengths)
    with pytest.raises(ValueError, match="weights has shape"):
        pallas_kernels.index_scores(q, k, weights[:, :, :2], lengths)
    with pytest.raises(ValueError, match="block_size"):
        pallas_kernels.block_index_scores(q, k, lengths, block_size=0)


@pytest.mark.parametrize("k", [1, 3, 8, 11])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_topk_order(k, dtype):
    """Score descending, index ascending, against a sort of (-score, index); -inf and what is missing are -1."""
    rows = [[1, 2, 2, -np.inf, 0, 2, -1, 1], [-0.0, 0, -0.0, 0, -1, -np.inf, -np.inf, 5], [-np.inf] * 8]
    rows += [[np.nan, np.inf, -np.nan, 1, 2, np.inf, 0, np.nan]]
    scores = jnp.asarray(rows, dtype).reshape(2, 2, 8)
    picks = pallas_kernels.topk_indices(scores, k)
    for row, got in zip(rows, picks.reshape(4, k).tolist(), strict=True):
        rank = [(not np.isnan(x), -x if x == x else 0, i) for i, x in enumerate(row)]
        want = [i if row[i] != -np.inf else -1 for *_, i in sorted(rank)]
        assert got == (want + [-1] * k)[:k]
    assert picks.shape == (2, 2, k) and picks.dtype == jnp.int32


@pytest.mark.parametrize("k", [0, -1, True, 2.0, None])
def test_topk_refuses(untyped, k):
    with pytest.raises(ValueError, match="k is"):
        pallas_kernels.topk_indices(jnp.zeros((2, 3)), k)


def test_topk_refuses_scores(untyped):
    with pytest.raises(TypeError, match="scores has dtype int32"):
        pallas_kernels.topk_indices(jnp.zeros((2, 3), jnp.int32), 1)
    with pytest.raises(ValueError, match="at least one axis"):
        pallas_kernels.topk_indices(jnp.float32(1), 1)
