"""torch_ref.ops.decode_block_sparse against a loop over the listed slots, and what must never reach a result."""

import math

import pytest
import torch
from dense_family import INF, NAN, int32, random

from torch_ref import ops

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
FAR = 2**31 - 1
# T = 2 queries, 2 lists each, of a cache of 11 slots: out of order, ignored entries anywhere, and a list of nothing
LISTS = torch.tensor(
    [
        [[[2, -1, 0], [FAR, 1, 0]], [[0, 2, 1], [-1, -1, 2]]],
        [[[1, 0, 6], [-9, 0, 1]], [[0, -1, 1], [-1, -1, -1]]],
        [[[-1, 0, 2], [2, 1, 0]], [[2, 0, -(2**31)], [0, -1, 99]]],
    ],
    dtype=torch.int32,
)
WITHOUT_BLOCK_0 = LISTS.masked_fill(LISTS == 0, -1)  # then nothing may stand in for an ignored entry, not even slot 0
both_lists = pytest.mark.parametrize("lists", [LISTS, WITHOUT_BLOCK_0], ids=["all", "without_block_0"])


def inputs(batch=3, new=2, n=4, kv=2, h=5, v=3, slots=11, dtype=torch.float64):
    q, k = random(batch, new, n, h, dtype=dtype, seed=1), random(batch, slots, kv, h, dtype=dtype, seed=2)
    return q, k, random(batch, slots, kv, v, dtype=dtype, seed=3)


def slow(q, k, v, lists, lengths, block_size, scale, sinks=None, softcap=None):
    """One query and one head at a time, in float64, over the slots that it reads; those are returned too."""
    q, k = q.double(), k.double()
    v = k if v is None else v.double()
    batch, new, n_heads, _ = q.shape
    out = torch.zeros(batch, new, n_heads, v.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, new, n_heads), -INF, dtype=torch.float64)
    read = torch.zeros(k.shape[:3], dtype=torch.bool)
    for b in range(batch):
        for t in range(new):
            stop = k.shape[1] if lengths is None else int(lengths[b]) - new + t + 1
            for n in range(n_heads):
                kv = n // (n_heads // k.shape[2])
                named = lists[b, t, n // (n_heads // lists.shape[2])].tolist()
                seen = [s for s in range(max(stop, 0)) if s // block_size in named]
                read[b, seen, kv] = True
                logits = [scale * float(q[b, t, n] @ k[b, s, kv]) for s in seen]
                if softcap is not None:
                    logits = [softcap * math.tanh(z / softcap) for z in logits]
                weights = [math.exp(z) for z in logits]
                total = sum(weights) + (0.0 if sinks is None else math.exp(sinks[n]))
                if total > 0:
                    lse[b, t, n] = math.log(total)
                    for s, weight in zip(seen, weights, strict=True):
                        out[b, t, n] += weight / total * v[b, s, kv]
    return out, lse, read


def agree(actual, expected, tolerance=1e-12):
    for a, e in zip(actual, expected[:2], strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [None, (11, 6, 1)])
@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"sinks": (0.5, -2.0, 3.0, -INF)}])
def test_it_is_the_loop(dtype, lengths, options):
    q, k, v = inputs(dtype=dtype)
    lengths = None if lengths is None else int32(*lengths)
    expected = slow(q, k, v, LISTS, lengths, 4, 0.4, **options)
    if "sinks" in options:
        options = {"sinks": torch.tensor(options["sinks"])}
    out, lse = ops.decode_block_sparse(q, k, v, LISTS, lengths, block_size=4, scale=0.4, **options)
    assert out.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)
    agree((out, lse), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("block_size", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("lists", [2, 4])
@pytest.mark.parametrize("new", [1, 3])
def test_block_sizes_and_lists_per_head(block_size, lists, new):
    q, k, v = inputs(new=new)
    blocks = -(-11 // block_size)
    order = random(3, new, lists, blocks + 2, seed=7).argsort(-1) - 1  # -1 and one past the end among them
    picks = order[..., : max(2, blocks // 2)].to(torch.int32)
    for lengths in (None, int32(11, 5, new)):
        expected = slow(q, k, v, picks, lengths, block_size, 0.3)
        agree(ops.decode_block_sparse(q, k, v, picks, lengths, block_size=block_size, scale=0.3), expected)


@pytest.mark.parametrize(("n", "kv"), [(1, 1), (4, 4), (4, 1), (6, 3)])
def test_every_grouping(n, kv):
    q, k, v = inputs(n=n, kv=kv)
    for lists in {n, kv}:
        picks = random(3, 2, lists, 6, seed=8).argsort(-1)[..., :3].to(torch.int32)
        expected = slow(q, k, v, picks, int32(11, 7, 3), 2, 0.3)
        agree(ops.decode_block_sparse(q, k, v, picks, int32(11, 7, 3), block_size=2, scale=0.3), expected)


def test_all_blocks_are_decode_attention():
    q, k, v = inputs()
    lengths, sinks = int32(11, 6, 1), random(4)
    every = torch.arange(3, dtype=torch.int32).flip(0).expand(3, 2, 2, 3)
    options = dict(scale=0.4, sinks=sinks, softcap=2.0)
    expected = ops.decode_attention(q, k, v, lengths, **options)
    agree(ops.decode_block_sparse(q, k, v, every, lengths, block_size=4, **options), expected)


@both_lists
@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("lengths", [None, (11, 6, 3)])
def test_unread_slots_reach_nothing(lists, lengths, poison):
    q, k, v = inputs()
    lengths = None if lengths is None else int32(*lengths)
    *expected, read = slow(q, k, v, lists, lengths, 4, 0.4)
    assert not read.all()
    k[~read], v[~read] = poison, poison
    agree(ops.decode_block_sparse(q, k, v, lists, lengths, block_size=4, scale=0.4), expected)


def test_values_that_are_keys():
    q, k, _ = inputs()
    expected = slow(q, k, None, LISTS, int32(11, 6, 3), 4, 0.4)
    agree(ops.decode_block_sparse(q, k, None, LISTS, int32(11, 6, 3), block_size=4, scale=0.4), expected)


def test_queries_without_keys():
    q, k, v = inputs()
    nothing, sinks = torch.full_like(LISTS, -1), random(4)
    out, lse = ops.decode_block_sparse(q, k, v, nothing, int32(11, 6, 3), block_size=4, scale=0.4)
    assert (out == 0).all() and (lse == -INF).all()
    out, lse = ops.decode_block_sparse(q, k, v, nothing, None, block_size=4, scale=0.4, sinks=sinks)
    assert (out == 0).all()
    torch.testing.assert_close(lse, sinks.expand(3, 2, 4))
    out, lse = ops.decode_block_sparse(
        q, k, v, torch.zeros_like(LISTS[..., :1]), int32(0, 1, 2), block_size=4, scale=0.4
    )
    assert (out[0] == 0).all() and (out[1, 0] == 0).all() and out[1, 1].all() and out[2].all()


@pytest.mark.parametrize("lengths", [None, int32(0, 0, 0)])
def test_a_cache_without_slots(lengths):
    q, k, v = inputs(slots=0)
    out, lse = ops.decode_block_sparse(q, k, v, LISTS, lengths, block_size=4, scale=0.4)
    assert out.shape == (3, 2, 4, 3) and (out == 0).all() and (lse == -INF).all()
    table = torch.zeros(3, 0, dtype=torch.int32)
    pools = k.new_ones(2, 4, 2, 5), v.new_ones(2, 4, 2, 3)
    out, lse = ops.decode_block_sparse(q, *pools, LISTS, lengths, block_size=4, scale=0.4, page_table=table)
    assert (out == 0).all() and (lse == -INF).all()


def paged(x, page, read, garbage, fill):
    """The pool and table of x, pages in reverse order; entries of pages of which no slot is read hold garbage."""
    batch, slots = x.shape[:2]
    per_row = -(-slots // page)
    padded = torch.full((batch, per_row * page, *x.shape[2:]), fill, dtype=x.dtype)
    padded[:, :slots] = x
    pool = padded.reshape(batch * per_row, page, *x.shape[2:]).flip(0).contiguous()
    table = torch.arange(batch * per_row - 1, -1, -1).reshape(batch, per_row)
    used = torch.zeros(batch, per_row * page, dtype=torch.bool)
    used[:, :slots] = read.any(-1)
    return pool, torch.where(used.unflatten(1, (per_row, page)).any(-1), table, garbage).to(torch.int32)


@both_lists
@pytest.mark.parametrize("garbage", [-1, FAR])
@pytest.mark.parametrize("page", [1, 3, 4, 16])
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_pages_and_blocks_of_any_size(lists, block_size, page, garbage):
    q, k, v = inputs()
    *expected, read = slow(q, k, v, lists, int32(11, 6, 3), block_size, 0.4)
    pool_k, table = paged(k, page, read, garbage, NAN)
    pool_v, _ = paged(v, page, read, garbage, NAN)
    actual = ops.decode_block_sparse(
        q, pool_k, pool_v, lists, int32(11, 6, 3), block_size=block_size, scale=0.4, page_table=table
    )
    agree(actual, expected)


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize("shared", [False, True])
def test_quantised_keys_and_values(stored, page, shared):
    q, k, v = inputs(dtype=torch.float32)
    lengths = int32(11, 6, 3)
    k, v = ((10 * x).round().to(stored) for x in (k, v))
    k_scale, v_scale = random(3, 11, 2, seed=4).float().exp() / 10, random(3, 11, 2, seed=5).float().exp() / 10
    wide = [x.double() * scale.double()[..., None] for x, scale in ((k, k_scale), (v, v_scale))]
    *expected, read = slow(q, wide[0], None if shared else wide[1], LISTS, lengths, 4, 0.4)
    k_scale[~read], v_scale[~read] = NAN, NAN
    table = None
    if page is not None:
        (k, table), (v, _) = (paged(x, page, read, -1, 0) for x in (k, v))
        (k_scale, _), (v_scale, _) = (paged(x, page, read, -1, NAN) for x in (k_scale, v_scale))
    if shared:
        v = v_scale = None
    out, lse = ops.decode_block_sparse(
        q, k, v, LISTS, lengths, block_size=4, scale=0.4, page_table=table, k_scale=k_scale, v_scale=v_scale
    )
    assert out.dtype == torch.float32
    agree((out, lse), expected, 1e-5)


def test_out_dtype_and_large_logits():
    q, k, v = inputs(dtype=torch.bfloat16)
    wide, lse = ops.decode_block_sparse(q, k, v, LISTS, None, block_size=4, scale=0.4, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    agree((wide, lse), slow(q, k, v, LISTS, None, 4, 0.4), 1e-5)
    out, lse = ops.decode_block_sparse(q, k, v, LISTS, None, block_size=4, scale=1e4)
    assert out.isfinite().all() and not lse.isnan().any()


def test_gradients_are_finite_beside_poison():
    q, k, v = inputs()
    *_, read = slow(q, k, v, LISTS, int32(11, 6, 3), 4, 0.4)
    k[~read], v[~read] = NAN, INF
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = ops.decode_block_sparse(*leaves, LISTS, int32(11, 6, 3), block_size=4, scale=0.4)
    (out.sum() + lse[lse.isfinite()].sum()).backward()
    assert all(x.grad.isfinite().all() for x in leaves)
    assert (k.grad[~read] == 0).all()


GOOD = dict(zip("qkv", inputs(dtype=torch.float32), strict=True)) | {
    "block_indices": LISTS,
    "lengths": int32(11, 6, 3),
    "block_size": 4,
    "scale": 0.4,
}
INT8 = {name: torch.ones_like(GOOD[name], dtype=torch.int8) for name in "kv"}
BAD = [
    ({"q": 3}, TypeError, r"^q is a int; allowed: a torch.Tensor$"),
    ({"q": torch.zeros(3, 2, 5, 5)}, ValueError, r"^q has N=5 heads; allowed: a multiple of the K=2 heads of k$"),
    ({"k": torch.zeros(3, 11, 2, 6)}, ValueError, r"^k has shape \[3, 11, 2, 6\]; allowed: \[B=3 S K H=5\]$"),
    ({"v": torch.zeros(3, 9, 2, 3)}, ValueError, r"^v has shape \[3, 9, 2, 3\]; allowed: \[B=3 S=11 K=2 V\]$"),
    ({"k": torch.zeros(3, 11, 2, 5).half()}, TypeError, r"^k has dtype torch.float16; allowed: torch.float32"),
    ({"block_indices": LISTS.long()}, TypeError, r"^block_indices has dtype torch.int64; allowed: int32$"),
    (
        {"block_indices": LISTS[:2]},
        ValueError,
        r"^block_indices has shape \[2, 2, 2, 3\]; allowed: \[B=3 T=2 lists L\]$",
    ),
    ({"block_indices": LISTS[..., :0]}, ValueError, r"^block_indices has shape \[3, 2, 2, 0\]"),
    (
        {"block_indices": LISTS.repeat(1, 1, 2, 1)[:, :, :3]},
        ValueError,
        r"^block_indices has 3 lists per query; allowed: K=2",
    ),
    ({"lengths": torch.tensor([9, 2, 5])}, TypeError, r"^lengths has dtype torch.int64; allowed: int32$"),
    ({"lengths": int32(12, 0, 0)}, ValueError, r"^lengths\[0\] is 12; allowed: 0 to 11, the number of slots$"),
    ({"block_size": 0}, ValueError, r"^block_size is 0; allowed: an int >= 1$"),
    ({"block_size": 4.0}, TypeError, r"^block_size is a float; allowed: an int >= 1$"),
    ({"scale": NAN}, ValueError, r"^scale is nan; allowed: a finite number$"),
    ({"softcap": -1.0}, ValueError, r"^softcap is -1.0; allowed: a finite number > 0$"),
    ({"sinks": torch.zeros(2)}, ValueError, r"^sinks has shape \[2\]; allowed: \[N=4\]$"),
    ({"out_dtype": torch.int8}, TypeError, r"^out_dtype is torch.int8; allowed: None, float16"),
    ({"k_scale": torch.ones(3, 11, 2)}, TypeError, r"^k_scale is given for k and v of dtype torch.float32"),
    (INT8, TypeError, r"^k_scale is None"),
    (INT8 | {"k_scale": torch.ones(3, 11, 2)}, TypeError, r"^v_scale is None"),
    (INT8 | {"v": None}, TypeError, r"^k_scale is None"),
    ({"v": None, "v_scale": torch.ones(3, 11, 2)}, TypeError, r"^v_scale is given with v=None; allowed: None"),
    ({"page_table": torch.zeros(2, 3).int()}, ValueError, r"^page_table has shape \[2, 3\]; allowed: \[B=3 P\]$"),
    ({"page_table": int32(0, 3, 0)[:, None]}, ValueError, r"^page_table\[1, 0\] is 3; allowed: 0 to 2"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        ops.decode_block_sparse(**(GOOD | change))


def test_checks_need_no_values():
    meta = {name: value.to("meta") if torch.is_tensor(value) else value for name, value in GOOD.items()}
    assert ops.decode_block_sparse(**meta)[0].shape == (3, 2, 4, 3)


@pytest.mark.parametrize(
    ("scores", "k", "picks"),
    [
        ([NAN, INF, 1.0], 2, [0, 1]),
        ([3.0, -NAN, INF, NAN, -INF], 4, [1, 3, 2, 0]),
        ([-INF, NAN], 2, [1, -1]),
    ],
)
def test_topk_picks_nan_first(scores, k, picks):
    for dtype in DTYPES:
        assert ops.topk_indices(torch.tensor(scores, dtype=dtype), k).tolist() == picks
