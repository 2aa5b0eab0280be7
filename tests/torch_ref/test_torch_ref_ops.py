"""torch_ref.ops against loops over single queries in float64, and what must never reach a result."""

import math

import pytest
import torch

from torch_ref import ops

NAN, INF = math.nan, math.inf
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(batch=3, new=2, n=4, kv=2, h=5, v=3, slots=9, dtype=torch.float64):
    q, k = random(batch, new, n, h, dtype=dtype, seed=1), random(batch, slots, kv, h, dtype=dtype, seed=2)
    return q, k, random(batch, slots, kv, v, dtype=dtype, seed=3)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def slow_attention(q, k, v, lengths, scale, window=None, sinks=None, softcap=None):
    """One query and one head at a time, in float64, over the list of keys it sees."""
    q, k, v = q.double(), k.double(), v.double()
    batch, new, n_heads, _ = q.shape
    out = torch.zeros(batch, new, n_heads, v.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, new, n_heads), -INF, dtype=torch.float64)
    for b in range(batch):
        for t in range(new):
            stop = int(lengths[b]) - new + t + 1
            seen = range(max(0, stop - (window or stop)), max(stop, 0))
            for n in range(n_heads):
                kv = n // (n_heads // k.shape[2])
                logits = [scale * float(q[b, t, n] @ k[b, s, kv]) for s in seen]
                if softcap is not None:
                    logits = [softcap * math.tanh(z / softcap) for z in logits]
                weights = [math.exp(z) for z in logits]
                total = sum(weights) + (0.0 if sinks is None else math.exp(sinks[n]))
                if total > 0:
                    lse[b, t, n] = math.log(total)
                    for s, weight in zip(seen, weights, strict=True):
                        out[b, t, n] += weight / total * v[b, s, kv]
    return out, lse


def agree(actual, expected, tolerance=1e-12):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"window": 3}, {"window": 1}, {"softcap": 1.5}, {"window": 99, "softcap": 30.0}]
)
@pytest.mark.parametrize("sinks", [None, (0.5, -2.0, 3.0, 0.0)])
def test_decode_attention_is_the_loop(dtype, options, sinks):
    q, k, v = inputs(dtype=dtype)
    lengths = int32(9, 2, 5)
    sink_tensor = None if sinks is None else torch.tensor(sinks, dtype=torch.float32)
    out, lse = ops.decode_attention(q, k, v, lengths, scale=0.4, sinks=sink_tensor, **options)
    assert out.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)
    agree((out, lse), slow_attention(q, k, v, lengths, 0.4, sinks=sinks, **options), TOLERANCE[dtype])


@pytest.mark.parametrize(("n", "kv"), [(1, 1), (4, 4), (4, 1), (6, 3)])
@pytest.mark.parametrize("new", [1, 4])
def test_every_grouping_and_number_of_queries(n, kv, new):
    q, k, v = inputs(new=new, n=n, kv=kv)
    lengths = int32(9, 4, 7)
    agree(ops.decode_attention(q, k, v, lengths, scale=0.3), slow_attention(q, k, v, lengths, 0.3))


def test_large_logits_do_not_overflow():
    q, k, v = inputs(dtype=torch.float32)
    out, lse = ops.decode_attention(q, k, v, int32(9, 9, 9), scale=1e4)
    assert out.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("poison", [NAN, INF])
def test_unseen_slots_reach_nothing(window, poison):
    q, k, v = inputs()
    lengths = int32(6, 0, 3)
    clean = ops.decode_attention(q, k, v, lengths, scale=0.4, window=window)
    for b, length in enumerate(lengths.tolist()):
        first = 0 if window is None else max(0, length - 1 - window)  # the earlier of the two queries' windows
        for x in (k, v):
            x[b, length:] = poison
            x[b, :first] = poison
    agree(ops.decode_attention(q, k, v, lengths, scale=0.4, window=window), clean, 0.0)


def test_queries_without_keys():
    q, k, v = inputs(new=3)
    out, lse = ops.decode_attention(q, k, v, int32(0, 1, 2), scale=0.4)
    for b, empty in enumerate((3, 2, 1)):
        assert (out[b, :empty] == 0).all() and (lse[b, :empty] == -INF).all()
        assert out[b, empty:].all() and lse[b, empty:].isfinite().all()
    sinks = random(4)
    out, lse = ops.decode_attention(q, k, v, int32(0, 1, 2), scale=0.4, sinks=sinks)
    for b, empty in enumerate((3, 2, 1)):
        assert (out[b, :empty] == 0).all()
        torch.testing.assert_close(lse[b, :empty], sinks.expand(empty, -1))


def test_a_cache_without_slots():
    q, k, v = inputs(slots=0)
    out, lse = ops.decode_attention(q, k, v, int32(0, 0, 0), scale=0.4)
    assert (out == 0).all() and (lse == -INF).all()
    table = torch.zeros(3, 0, dtype=torch.int32)
    out, lse = ops.decode_attention(
        q, k.new_ones(2, 4, 2, 5), v.new_ones(2, 4, 2, 3), int32(0, 0, 0), scale=0.4, page_table=table
    )
    assert out.shape == (3, 2, 4, 3) and (out == 0).all() and (lse == -INF).all()


def paged(x, page, garbage, lengths, fill):
    """The pool and table that hold x, pages in reverse order; table entries past the row's length hold garbage."""
    batch, slots = x.shape[:2]
    per_row = -(-slots // page)
    padded = torch.full((batch, per_row * page, *x.shape[2:]), fill, dtype=x.dtype)
    padded[:, :slots] = x
    pool = padded.reshape(batch * per_row, page, *x.shape[2:]).flip(0).contiguous()
    table = torch.arange(batch * per_row - 1, -1, -1).reshape(batch, per_row).to(torch.int32)
    used = torch.arange(per_row) * page < lengths[:, None]
    return pool, torch.where(used, table, garbage).to(torch.int32)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("garbage", [-1, 2**31 - 1])
@pytest.mark.parametrize("page", [1, 4, 16])
def test_pages(page, garbage, window):
    q, k, v = inputs()
    lengths = int32(9, 0, 4)
    pool_k, table = paged(k, page, garbage, lengths, NAN)
    pool_v, _ = paged(v, page, garbage, lengths, NAN)
    expected = ops.decode_attention(q, k, v, lengths, scale=0.4, window=window)
    agree(ops.decode_attention(q, pool_k, pool_v, lengths, scale=0.4, window=window, page_table=table), expected, 1e-12)


def test_pages_before_the_window_are_not_read():
    q, k, v = inputs(batch=1, new=1, slots=9)
    pool_k, table = paged(k, 2, -1, int32(9), NAN)
    pool_v, _ = paged(v, 2, -1, int32(9), NAN)
    table[0, :2] = -7  # slots 0..3; the window starts at slot 6
    expected = ops.decode_attention(q, k, v, int32(9), scale=0.4, window=3)
    agree(ops.decode_attention(q, pool_k, pool_v, int32(9), scale=0.4, window=3, page_table=table), expected)


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("page", [None, 4])
def test_quantised_keys_and_values(stored, page):
    q, k, v = inputs(dtype=torch.float32)
    lengths = int32(9, 2, 0)
    k, v = ((10 * x).round().to(stored) for x in (k, v))
    k_scale, v_scale = random(3, 9, 2, seed=4).float().exp() / 10, random(3, 9, 2, seed=5).float().exp() / 10
    wide = [x.double() * scale.double()[..., None] for x, scale in ((k, k_scale), (v, v_scale))]
    expected = slow_attention(q, *wide, lengths, 0.4)
    k_scale[1, 2:], v_scale[1, 2:] = NAN, NAN  # scales of unseen slots are unseen too
    table = None
    if page is not None:
        (k, table), (v, _) = (paged(x, page, -1, lengths, 0) for x in (k, v))
        (k_scale, _), (v_scale, _) = (paged(x, page, -1, lengths, NAN) for x in (k_scale, v_scale))
    out, lse = ops.decode_attention(q, k, v, lengths, scale=0.4, page_table=table, k_scale=k_scale, v_scale=v_scale)
    assert out.dtype == torch.float32
    agree((out, lse), expected, 1e-5)


def test_out_dtype_and_chunk():
    q, k, v = inputs(dtype=torch.bfloat16)
    lengths = int32(9, 2, 5)
    wide, lse = ops.decode_attention(q, k, v, lengths, scale=0.4, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    agree((wide, lse), slow_attention(q, k, v, lengths, 0.4), 1e-5)
    narrow, chunked_lse = ops.decode_attention(q, k, v, lengths, scale=0.4, chunk=4)
    assert torch.equal(narrow, wide.to(torch.bfloat16)) and torch.equal(lse, chunked_lse)


def test_gradients_are_finite_beside_poison_and_empty_rows():
    q, k, v = inputs(new=3)
    k[:, 5:], v[:, 5:] = NAN, INF
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = ops.decode_attention(*leaves, int32(5, 0, 2), scale=0.4)
    (out.sum() + lse[lse.isfinite()].sum()).backward()
    assert all(x.grad.isfinite().all() for x in leaves)


def test_merge_states_of_disjoint_keys_is_attention_over_all():
    q, k, v = inputs(new=1)
    whole = ops.decode_attention(q, k, v, int32(9, 9, 9), scale=0.4)
    cuts = [(0, 4), (4, 5), (5, 9)]
    parts = [ops.decode_attention(q, k[:, a:b], v[:, a:b], int32(*[b - a] * 3), scale=0.4) for a, b in cuts]
    agree(ops.merge_states(*(torch.stack(x) for x in zip(*parts, strict=True))), whole)


def test_merge_states_ignores_empty_parts():
    outs, lses = random(3, 2, 1, 2, 4, dtype=torch.float32), random(3, 2, 1, 2, dtype=torch.float32, seed=1)
    outs[1, 0], lses[1, 0] = NAN, -INF
    outs[:, 1, 0, 1], lses[:, 1, 0, 1] = NAN, -INF
    out, lse = ops.merge_states(outs, lses)
    assert out.dtype == torch.float32 and lse.dtype == torch.float32
    kept = ops.merge_states(outs[::2], lses[::2])
    torch.testing.assert_close((out[0], lse[0]), (kept[0][0], kept[1][0]))
    assert (out[1, 0, 1] == 0).all() and lse[1, 0, 1] == -INF and out.isfinite().all()


def test_merge_states_survives_large_lses():
    outs, lses = torch.stack([torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)]), torch.full((2, 1, 1, 1), 1000.0)
    out, lse = ops.merge_states(outs, lses)
    torch.testing.assert_close(out, torch.full((1, 1, 1, 2), 0.5))
    torch.testing.assert_close(lse, torch.full((1, 1, 1), 1000 + math.log(2)))


@pytest.mark.parametrize(
    ("scores", "k", "picks"),
    [
        ([1.0, 3.0, 2.0], 2, [1, 2]),
        ([0.0, 5.0, 0.0, 5.0], 3, [1, 3, 0]),
        ([-0.0, 0.0, -0.0], 3, [0, 1, 2]),
        ([-INF, 1.0, -INF], 2, [1, -1]),
        ([-INF, INF, 7.0, INF], 3, [1, 3, 2]),
        ([2.0, 4.0], 4, [1, 0, -1, -1]),
        ([], 2, [-1, -1]),
    ],
)
def test_topk_order_ties_and_missing_candidates(scores, k, picks):
    index = ops.topk_indices(torch.tensor(scores).expand(2, 3, -1), k)
    assert index.dtype == torch.int32 and index.shape == (2, 3, k)
    assert (index == int32(*picks)).all()


def test_topk_of_many_ties_is_stable():
    scores = torch.arange(3000.0) % 2
    assert ops.topk_indices(scores, 1500).tolist() == list(range(1, 3000, 2))


GOOD = dict(zip("qkv", inputs(dtype=torch.float32), strict=True)) | {"lengths": int32(9, 2, 5), "scale": 0.4}
F32 = torch.float32
BAD = [
    ({"q": 3}, TypeError, r"^q is a int; allowed: a torch.Tensor$"),
    ({"q": torch.zeros(3, 4, 5)}, ValueError, r"^q has shape \[3, 4, 5\]; allowed: \[B T N H\]$"),
    ({"q": torch.zeros(3, 0, 4, 5)}, ValueError, r"^q has shape \[3, 0, 4, 5\]"),
    ({"q": torch.zeros(3, 2, 5, 5)}, ValueError, r"^q has N=5 heads; allowed: a multiple of the K=2 heads of k$"),
    ({"q": torch.zeros(3, 2, 4, 5, dtype=torch.int32)}, TypeError, r"^q has dtype torch.int32; allowed: float16, "),
    ({"k": torch.zeros(3, 9, 2, 6)}, ValueError, r"^k has shape \[3, 9, 2, 6\]; allowed: \[B=3 S K H=5\]$"),
    ({"k": torch.zeros(3, 9, 2, 5).half()}, TypeError, r"^k has dtype torch.float16; allowed: torch.float32"),
    ({"v": torch.zeros(3, 9, 2, 3).half()}, TypeError, r"^v has dtype torch.float16; allowed: torch.float32"),
    ({"q": torch.zeros(3, 2, 4, 5).half()}, TypeError, r"^k has dtype torch.float32; allowed: torch.float16"),
    ({"v": torch.zeros(3, 8, 2, 3)}, ValueError, r"^v has shape \[3, 8, 2, 3\]; allowed: \[B=3 S=9 K=2 V\]$"),
    ({"v": torch.zeros(3, 9, 2, 3, device="meta")}, ValueError, r"^v is on device meta; allowed: cpu"),
    ({"lengths": torch.tensor([9, 2, 5])}, TypeError, r"^lengths has dtype torch.int64; allowed: int32$"),
    ({"lengths": int32(9, 2)}, ValueError, r"^lengths has shape \[2\]; allowed: \[B=3\]$"),
    ({"lengths": int32(9, -1, 5)}, ValueError, r"^lengths\[1\] is -1; allowed: 0 to 9"),
    ({"lengths": int32(9, 2, 10)}, ValueError, r"^lengths\[2\] is 10; allowed: 0 to 9"),
    ({"scale": NAN}, ValueError, r"^scale is nan; allowed: a finite number$"),
    ({"scale": torch.tensor(1.0)}, TypeError, r"^scale is a Tensor; allowed: a finite number$"),
    ({"window": 0}, ValueError, r"^window is 0; allowed: an int >= 1$"),
    ({"window": 2.0}, TypeError, r"^window is a float; allowed: an int >= 1$"),
    ({"chunk": -8}, ValueError, r"^chunk is -8; allowed: an int >= 1$"),
    ({"softcap": 0.0}, ValueError, r"^softcap is 0.0; allowed: a finite number > 0$"),
    ({"sinks": torch.zeros(2)}, ValueError, r"^sinks has shape \[2\]; allowed: \[N=4\]$"),
    ({"out_dtype": torch.int8}, TypeError, r"^out_dtype is torch.int8; allowed: None, float16"),
    ({"k_scale": torch.ones(3, 9, 2)}, TypeError, r"^k_scale is given for k and v of dtype torch.float32"),
    (
        {"k": torch.ones(3, 9, 2, 5).to(torch.int8), "v": torch.ones(3, 9, 2, 3).to(torch.int8)},
        TypeError,
        r"^k_scale is None",
    ),
    ({"page_table": torch.zeros(2, 3).int()}, ValueError, r"^page_table has shape \[2, 3\]; allowed: \[B=3 P\]$"),
    ({"page_table": int32(0, 3, 0)[:, None]}, ValueError, r"^page_table\[1, 0\] is 3; allowed: 0 to 2"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        ops.decode_attention(**(GOOD | change))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.merge_states(torch.zeros(2, 1, 1, 1, 3), torch.zeros(2, 1, 1)), ValueError, r"^lses has shape"),
        (
            lambda: ops.merge_states(torch.zeros(2, 1, 1, 1, 3), torch.zeros(2, 1, 1, 1).half()),
            TypeError,
            r"^lses has dtype",
        ),
        (lambda: ops.merge_states(torch.zeros(0, 1, 1, 1, 3), torch.zeros(0, 1, 1, 1)), ValueError, r"^outs has shape"),
        (lambda: ops.merge_states([], []), TypeError, r"^outs is a list"),
        (lambda: ops.topk_indices(torch.zeros(3), 0), ValueError, r"^k is 0; allowed: an int >= 1$"),
        (lambda: ops.topk_indices(torch.zeros(3).int(), 1), TypeError, r"^scores has dtype torch.int32"),
    ],
)
def test_bad_arguments_of_the_small_ops(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_checks_need_no_values():
    meta = {name: value.to("meta") if torch.is_tensor(value) else value for name, value in GOOD.items()}
    assert ops.decode_attention(**meta)[0].shape == (3, 2, 4, 3)
