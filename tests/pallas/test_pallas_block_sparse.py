"""The decode kernels over listed blocks and tokens in Mosaic's interpreter, against float64, and their lowering."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pallas_oracle as oracle
import pytest
from pallas_oracle import ListCase

import pallas_kernels
from pallas_kernels import compat
from pallas_kernels.decode_listed import Lists

OUT_LIMIT = {"float16": 1e-3, "bfloat16": 4e-3}
LSE_LIMIT = 1e-3
PLANNERS = [importlib.import_module(f"pallas_kernels.{name}") for name in ("decode_attention", "decode_sparse_mla")]

BLOCKS = [
    # Every size, blocks smaller than a tile and larger, a partial last block, rows of any length, both dtypes.
    ListCase((136, 0, 75), S=136, size=8, L=13, splits=1),
    ListCase((136, 1, 75), S=136, size=16, L=5, K=2, dtype="bfloat16", splits=2),
    ListCase((120, 96), S=136, size=32, L=3, N=8, H=128),
    ListCase((200, 70), S=200, size=64, L=4, N=8, dtype="bfloat16"),
    ListCase((1000, 321), S=1000, size=128, L=8, N=16, K=2, H=128, splits=1),
    # A list that is longer than the cache has blocks, and a cache of less than one block.
    ListCase((72, 60), S=72, size=16, L=9, splits=2),
    ListCase((5,), S=8, size=64, L=2),
    # The list alone decides; heads choose alone; several queries, the first of which see less or nothing.
    ListCase((1, 1), S=136, size=32, L=3, N=8, by_length=False),
    ListCase((100, 136), S=136, size=16, L=4, N=8, K=2, by_head=True, sinks=True),
    ListCase((2, 67), S=72, size=8, L=6, N=4, K=2, T=3, splits=1),
    ListCase((70,), S=72, size=16, L=4, N=4, T=2, by_head=True, options=dict(softcap=2.0, out_dtype="float32")),
    # Sinks in the kernel and in the merge, groups above 8, a prime one, more rows than a program has, odd widths.
    ListCase((70, 0), S=72, size=16, L=4, N=6, K=2, sinks=True, splits=1),
    ListCase((70, 0), S=72, size=16, L=5, N=6, K=2, sinks=True, splits=2),
    ListCase((70,), S=72, size=64, L=2, N=11),
    ListCase((70,), S=72, size=64, L=2, N=128, H=128, dtype="bfloat16"),
    ListCase((70,), S=72, size=32, L=3, H=80, V=96, splits=1),
    ListCase((70,), S=72, size=32, L=3, H=80, V=80, splits=2),
    ListCase((70,), S=72, size=32, L=3, H=256),
    # Pages that are made of blocks, are blocks, and divide them.
    ListCase((140, 30), S=144, size=8, L=9, page=24, splits=2),
    ListCase((140, 1), S=144, size=16, L=5, page=16),
    ListCase((140, 130), S=144, size=64, L=3, N=8, page=8),
    ListCase((250, 130), S=256, size=128, L=2, page=64),
]
TOKENS = [
    # More tiles than the ring has stages, K and V heads, odd numbers of slots, tokens at all lengths, both dtypes.
    ListCase((150, 0, 64), S=150, size=1, L=100, K=2, H=128, splits=1),
    ListCase((401,), S=401, size=1, L=390, N=8, H=128, V=64, dtype="bfloat16", splits=1),
    ListCase((70, 1), S=77, size=1, L=130, N=12, K=2, T=2, sinks=True, splits=2),
    ListCase((70, 35), S=70, size=1, L=64, by_head=True, options=dict(softcap=2.0)),
    ListCase((84, 84), S=84, size=1, L=70, page=12, by_length=False),
]
SHARED = [
    # Keys that are the values: the kernel of few rows, by tokens and by blocks, and the kernel of many rows.
    ListCase((150, 70), S=150, size=1, L=150, N=16, H=128, values=False, by_length=False, splits=1),
    ListCase((70, 35), S=77, size=8, L=9, N=12, K=2, T=2, values=False, sinks=True, splits=2),
    ListCase((70, 35), S=80, size=16, L=5, H=64, values=False, by_head=True, page=8),
    ListCase((150, 70), S=150, size=1, L=330, N=64, H=128, values=False, dtype="bfloat16", sinks=True, splits=1),
    ListCase((77,), S=77, size=1, L=70, N=128, H=512, values=False, by_length=False, sinks=True, splits=2),
    ListCase((150, 70), S=152, size=32, L=5, N=80, H=128, T=2, values=False, sinks=True, splits=3),
    # Many rows in several lists, whole blocks of 64 and not.
    ListCase((70,), S=72, size=8, L=9, N=128, K=2, H=128, values=False, sinks=True, splits=2),
    ListCase((70,), S=72, size=8, L=9, N=80, K=2, H=128, values=False, sinks=True, splits=2),
    ListCase((70,), S=77, size=1, L=77, N=64, H=256, values=False, splits=1, options=dict(out_dtype="float32")),
]


@pytest.fixture(params=BLOCKS + TOKENS + SHARED, ids=str)
def case(request, monkeypatch):
    if request.param.splits:
        for module in PLANNERS:
            monkeypatch.setattr(module, "fill_splits", lambda *_, **__: request.param.splits)
    return request.param


def call(case):
    """(the op with the case's options bound, its arguments as the op takes them, the contiguous arguments, sinks)."""
    args, sinks = case.arrays()
    options = dict(scale=case.scale, sinks=sinks, block_size=case.size, **case.options)
    q, k, v, *more = args
    if case.page:
        k, v, options["page_table"] = case.paged(k, v)
    return functools.partial(pallas_kernels.decode_block_sparse, **options), (q, k, v, *more), args, sinks


def test_matches_the_oracle(case, no_races):
    op, args, contiguous, sinks = call(case)
    out, lse = op(*args)
    options = dict(block_size=case.size, scale=case.scale, sinks=sinks, softcap=case.options.get("softcap"))
    want, want_lse = oracle.decode_block_sparse(*contiguous, **options)
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


@pytest.mark.parametrize(
    "N, K, H, L, size, values, by_head",
    [
        (64, 4, 128, 16, 128, True, False),  # MiniMax-M3
        (64, 4, 192, 16, 64, True, False),  # NSA
        (32, 8, 128, 12, 128, True, True),  # MoBA's lists of heads
        (128, 1, 512, 640, 1, False, False),  # DeepSeek-V4's CSA
        (64, 1, 512, 1152, 1, False, False),
        (32, 8, 128, 2048, 1, True, False),
    ],
)
def test_model_shapes_lower(N, K, H, L, size, values, by_head):
    """The rings fit shared memory at the models' widths."""
    B, S = 64, 32768
    shapes = (B, 1, N, H), (B, S, K, H), (B, S, K, H)
    q, k, v = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    lists = jax.ShapeDtypeStruct((B, 1, N if by_head else K, L), jnp.int32)
    op = functools.partial(pallas_kernels.decode_block_sparse, block_size=size, scale=1.0)
    with compat.lowering_for_cuda():
        jax.jit(op).trace(q, k, v if values else None, lists, None).lower(lowering_platforms=("cuda",))


def test_blocks_of_one_token_are_tokens(no_races):
    """The gather of tokens and the copy of blocks give the same result where the lists name the same slots."""
    (q, k, v, lists, lengths), _ = ListCase((130, 77), S=136, size=8, L=17, N=8, K=2, H=64).arrays()
    tokens = jnp.where(lists[..., None] >= 0, lists[..., None] * 8 + jnp.arange(8), -1).reshape(*lists.shape[:3], -1)
    both = [
        pallas_kernels.decode_block_sparse(q, k, v, entries, lengths, block_size=size, scale=0.1)
        for entries, size in ((jnp.where(lists < 17, lists, -1), 8), (jnp.where(tokens < 136, tokens, -1), 1))
    ]
    (out, lse), (other, other_lse) = ([np.asarray(x, np.float64) for x in pair] for pair in both)
    assert oracle.error(other, out) < OUT_LIMIT["float16"] and oracle.lse_error(other_lse, lse) < LSE_LIMIT


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(dtype="float32"), "tf32"),
        (dict(out_dtype="float64"), "float32"),
        (dict(size=4), "block_size is 4"),
        (dict(size=256), "block_size is 256"),
        (dict(S=12), "multiple of 8"),
        (dict(S=0), "S=0"),
        (dict(L=0), "L=0"),
        (dict(T=0), "T=0"),
        (dict(H=72), "multiples of 16"),
        (dict(V=320), "up to 256"),
        (dict(size=1, H=80), "multiples of 64"),
        (dict(page=12), "multiple of 8"),
        (dict(page=24, size=16), "divide it"),
        (dict(values=False, H=96), "multiples of 64"),
        (dict(values=False, softcap=3.0), "softcap is 3.0"),
        (dict(k_scale=True), "k_scale"),
    ],
)
def test_unsupported_calls_say_why(change, reason):
    T, S, H, V, L = (change.get(x, default) for x, default in zip("TSHVL", (1, 64, 64, 64, 2), strict=True))
    options = dict(block_size=change.get("size", 8), out_dtype=change.get("out_dtype"), softcap=change.get("softcap"))
    if "page" in change:
        S, options["page_table"] = change["page"], jnp.zeros((1, 1), jnp.int32)
    shapes = (1, T, 4, H), (1, S, 1, H), (1, S, 1, V)
    q, k, v = (jnp.zeros(shape, change.get("dtype", "float16")) for shape in shapes)
    if "k_scale" in change:
        k, v = k.astype(jnp.int8), v.astype(jnp.int8)
        options |= dict(k_scale=jnp.ones((1, S, 1)), v_scale=jnp.ones((1, S, 1)))
    v = v if change.get("values", True) else None
    with pytest.raises(NotImplementedError, match=reason):
        pallas_kernels.decode_block_sparse(q, k, v, jnp.zeros((1, T, 1, L), jnp.int32), None, scale=1.0, **options)


@pytest.mark.parametrize(
    "sizes", [dict(size=16, L=5), dict(size=1, L=70, H=64), dict(size=1, L=70, H=64, values=False)]
)
def test_options_may_be_numpy_numbers(sizes):
    case = ListCase((70,), S=80, N=8, **sizes)
    op, args, _, _ = call(case)
    more = dict(softcap=np.float16(30)) if sizes.get("values", True) else {}
    out, lse = op(*args, block_size=np.int64(case.size), **more)
    same, same_lse = op(*args, **({"softcap": 30.0} if more else {}))
    assert np.array_equal(np.asarray(out), np.asarray(same)) and np.array_equal(np.asarray(lse), np.asarray(same_lse))


def test_wrong_arguments_name_the_argument():
    (q, k, v, lists, lengths), _ = ListCase((5,), S=8, size=8, L=1).arrays()
    options = dict(block_size=8, scale=1.0)
    with pytest.raises(TypeError, match="k has dtype"):
        pallas_kernels.decode_block_sparse(q, k.astype(jnp.bfloat16), v, lists, lengths, **options)
    with pytest.raises(ValueError, match="block_indices has 2 lists"):
        pallas_kernels.decode_block_sparse(q, k, v, jnp.zeros((1, 1, 2, 1), jnp.int32), lengths, **options)
    with pytest.raises(ValueError, match="block_size"):
        pallas_kernels.decode_block_sparse(q, k, v, lists, lengths, block_size=0, scale=1.0)


def test_splits_are_even():
    """No split is without tiles, and tiles of one split are as many as the plan asked for."""
    for L, size, splits in [(16, 128, 5), (9, 8, 64), (640, 1, 4), (1, 8, 8)]:
        lists = Lists(T=1, count=1, K=1, L=L, size=size, S=4096, page=None)
        tiles, even = lists.tiles(64), lists.even_splits(splits, 64)
        per = -(-tiles // even)
        assert (even - 1) * per < tiles <= even * per and per == -(-tiles // min(splits, tiles))
