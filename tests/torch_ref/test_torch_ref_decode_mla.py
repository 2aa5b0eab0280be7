"""torch_ref.ops.decode_mla against a loop over single queries in float64, and what must never reach its result."""

import math

import pytest
import torch

from torch_ref import ops

NAN, INF = math.nan, math.inf
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def op_inputs(batch=3, new=2, n=3, c=5, r=4, slots=9, dtype=torch.float64):
    """q_latent, q_rope, latent, k_rope."""
    shapes = (batch, new, n, c), (batch, new, n, r), (batch, slots, c), (batch, slots, r)
    return [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def slow_mla(q_latent, q_rope, latent, k_rope, lengths, scale, window=None, sinks=None):
    """One query and one head at a time, in float64, over the list of keys it sees."""
    q_latent, q_rope, latent, k_rope = (x.double() for x in (q_latent, q_rope, latent, k_rope))
    out = torch.zeros_like(q_latent)
    lse = torch.full(q_latent.shape[:3], -INF, dtype=torch.float64)
    for b, t, n in torch.cartesian_prod(*(torch.arange(size) for size in q_latent.shape[:3])).tolist():
        stop = int(lengths[b]) - q_latent.shape[1] + t + 1
        seen = range(max(0, stop - (window or stop)), max(stop, 0))
        logits = [scale * float(q_latent[b, t, n] @ latent[b, s] + q_rope[b, t, n] @ k_rope[b, s]) for s in seen]
        total = sum(math.exp(z) for z in logits) + (0.0 if sinks is None else math.exp(sinks[n]))
        if total > 0:
            lse[b, t, n] = math.log(total)
            for s, z in zip(seen, logits, strict=True):
                out[b, t, n] += math.exp(z) / total * latent[b, s]
    return out, lse


def agree(actual, expected, tolerance=1e-12):
    for a, e in zip(actual, expected, strict=True):
        close(a.double(), e.double(), tolerance)


def paged(x, page, garbage, lengths, fill):
    """The pool and table that hold x, pages in reverse order; table entries past the row's length hold garbage."""
    batch, slots = x.shape[:2]
    per_row = -(-slots // page)
    padded = torch.full((batch, per_row * page, *x.shape[2:]), fill, dtype=x.dtype)
    padded[:, :slots] = x
    pool = padded.reshape(batch * per_row, page, *x.shape[2:]).flip(0).contiguous()
    table = torch.arange(batch * per_row - 1, -1, -1).reshape(batch, per_row)
    used = torch.arange(per_row) * page < lengths[:, None]
    return pool, torch.where(used, table, garbage).to(torch.int32)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 1, 3, 99])
@pytest.mark.parametrize("sinks", [None, (0.5, -2.0, 3.0)])
@pytest.mark.parametrize("new", [1, 4])
def test_decode_mla_is_the_loop(dtype, window, sinks, new):
    args, lengths = op_inputs(new=new, dtype=dtype), int32(9, 2, 5)
    sink_tensor = None if sinks is None else torch.tensor(sinks)
    out, lse = ops.decode_mla(*args, lengths, scale=0.4, window=window, sinks=sink_tensor)
    assert out.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)
    agree((out, lse), slow_mla(*args, lengths, 0.4, window, sinks), TOLERANCE[dtype])


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("poison", [NAN, INF])
def test_unseen_slots_reach_nothing(window, poison):
    args, lengths = op_inputs(), int32(9, 2, 5)
    clean = ops.decode_mla(*args, lengths, scale=0.4, window=window)
    for b, length in enumerate(lengths.tolist()):
        first = 0 if window is None else max(0, length - 1 - window)  # the earlier of the two queries' windows
        for x in args[2:]:
            x[b, length:] = poison
            x[b, :first] = poison
    agree(ops.decode_mla(*args, lengths, scale=0.4, window=window), clean, 0.0)


def test_queries_without_keys():
    args, sinks = op_inputs(new=3), random(3, seed=9)
    for given, expected in ((None, torch.full((3,), -INF, dtype=torch.float64)), (sinks, sinks)):
        out, lse = ops.decode_mla(*args, int32(0, 1, 2), scale=0.4, sinks=given)
        for b, empty in enumerate((3, 2, 1)):
            assert (out[b, :empty] == 0).all() and out[b, empty:].all() and lse[b, empty:].isfinite().all()
            close(lse[b, :empty], expected.expand(empty, -1))


def test_a_cache_without_slots():
    args = op_inputs(slots=0)
    out, lse = ops.decode_mla(*args, int32(0, 0, 0), scale=0.4)
    assert (out == 0).all() and (lse == -INF).all()
    pools, table = (torch.ones(2, 4, 5).double(), torch.ones(2, 4, 4).double()), torch.zeros(3, 0, dtype=torch.int32)
    out, lse = ops.decode_mla(*args[:2], *pools, int32(0, 0, 0), scale=0.4, page_table=table)
    assert out.shape == (3, 2, 3, 5) and (out == 0).all() and (lse == -INF).all()


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("garbage", [-1, 2**31 - 1])
@pytest.mark.parametrize("page", [1, 4, 16])
def test_pages(page, garbage, window):
    args, lengths = op_inputs(), int32(9, 0, 4)
    expected = slow_mla(*args, lengths, 0.4, window)
    for x in args[2:]:
        for b, length in enumerate(lengths.tolist()):
            x[b, length:] = NAN
    (latent, table), (k_rope, _) = (paged(x, page, garbage, lengths, NAN) for x in args[2:])
    agree(ops.decode_mla(*args[:2], latent, k_rope, lengths, scale=0.4, window=window, page_table=table), expected)


def test_pages_before_the_window_are_not_read():
    args, lengths = op_inputs(batch=1, new=1), int32(9)
    (latent, table), (k_rope, _) = (paged(x, 2, -1, lengths, NAN) for x in args[2:])
    table[0, :2] = -7  # slots 0..3; the window starts at slot 6
    paged_out = ops.decode_mla(*args[:2], latent, k_rope, lengths, scale=0.4, window=3, page_table=table)
    agree(paged_out, slow_mla(*args, lengths, 0.4, 3))


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_latent(stored, page, dtype):
    q_latent, q_rope, latent, k_rope = op_inputs(dtype=dtype)
    lengths, latent_scale = int32(9, 2, 0), random(3, 9, seed=5).float().exp() / 10
    latent = (10 * latent).round().to(stored)
    expected = slow_mla(q_latent, q_rope, latent.double() * latent_scale.double()[..., None], k_rope, lengths, 0.4)
    latent_scale[1, 2:], table = NAN, None  # scales of unseen slots are unseen too
    if page is not None:
        latent, table = paged(latent, page, -1, lengths, 0)
        (k_rope, _), (latent_scale, _) = (paged(x, page, -1, lengths, NAN) for x in (k_rope, latent_scale))
    out, lse = ops.decode_mla(
        q_latent, q_rope, latent, k_rope, lengths, scale=0.4, page_table=table, latent_scale=latent_scale
    )
    assert out.dtype == dtype and lse.dtype == torch.float32
    agree((out, lse), expected, TOLERANCE[dtype])


def test_out_dtype_and_chunk():
    args, lengths = op_inputs(dtype=torch.bfloat16), int32(9, 2, 5)
    wide, lse = ops.decode_mla(*args, lengths, scale=0.4, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    agree((wide, lse), slow_mla(*args, lengths, 0.4), 1e-5)
    narrow, chunked_lse = ops.decode_mla(*args, lengths, scale=0.4, chunk=4)
    assert torch.equal(narrow, wide.to(torch.bfloat16)) and torch.equal(lse, chunked_lse)


GOOD = dict(zip(("q_latent", "q_rope", "latent", "k_rope"), op_inputs(dtype=torch.float32), strict=True))
GOOD |= {"lengths": int32(9, 2, 5), "scale": 0.4}
BAD = [
    ({"q_latent": None}, TypeError, r"^q_latent is a NoneType; allowed: a torch.Tensor$"),
    ({"q_latent": torch.zeros(3, 2, 3, 5).int()}, TypeError, r"^q_latent has dtype torch.int32; allowed: float16, "),
    ({"q_latent": torch.zeros(3, 0, 3, 5)}, ValueError, r"^q_latent has shape \[3, 0, 3, 5\]; allowed: \[B T N C\]$"),
    ({"q_rope": torch.zeros(3, 2, 4, 4)}, ValueError, r"^q_rope has shape \[3, 2, 4, 4\]; allowed: \[B=3 T=2 N=3 R\]$"),
    ({"q_rope": torch.zeros(3, 2, 3, 4).half()}, TypeError, r"^q_rope has dtype torch.float16; allowed: float32$"),
    ({"latent": torch.zeros(3, 9, 6)}, ValueError, r"^latent has shape \[3, 9, 6\]; allowed: \[B=3 S C=5\]$"),
    ({"latent": torch.zeros(3, 9, 1, 5)}, ValueError, r"^latent has shape \[3, 9, 1, 5\]; allowed: \[B=3 S C=5\]$"),
    ({"latent": torch.zeros(3, 9, 5).half()}, TypeError, r"^latent has dtype torch.float16; allowed: torch.float32"),
    ({"latent": torch.zeros(3, 9, 5).to(torch.int8)}, TypeError, r"^latent_scale is None; allowed: a float32 tensor"),
    ({"latent_scale": torch.ones(3, 9)}, TypeError, r"^latent_scale is given for a latent of dtype torch.float32"),
    (
        {"latent": torch.zeros(3, 9, 5).to(torch.int8), "latent_scale": torch.ones(3, 9, 1)},
        ValueError,
        r"^latent_scale has shape \[3, 9, 1\]; allowed: \[B=3 S=9\]$",
    ),
    (
        {"latent": torch.zeros(3, 9, 5).to(torch.int8), "latent_scale": torch.ones(3, 9).half()},
        TypeError,
        r"^latent_scale has dtype torch.float16; allowed: float32$",
    ),
    ({"k_rope": torch.zeros(3, 8, 4)}, ValueError, r"^k_rope has shape \[3, 8, 4\]; allowed: \[B=3 S=9 R=4\]$"),
    ({"k_rope": torch.zeros(3, 9, 4).to(torch.int8)}, TypeError, r"^k_rope has dtype torch.int8; allowed: float32$"),
    ({"k_rope": torch.zeros(3, 9, 4, device="meta")}, ValueError, r"^k_rope is on device meta; allowed: cpu"),
    ({"lengths": torch.tensor([9, 2, 5])}, TypeError, r"^lengths has dtype torch.int64; allowed: int32$"),
    ({"lengths": int32(9, 2, 10)}, ValueError, r"^lengths\[2\] is 10; allowed: 0 to 9"),
    ({"lengths": int32(9, -1, 5)}, ValueError, r"^lengths\[1\] is -1; allowed: 0 to 9"),
    ({"scale": INF}, ValueError, r"^scale is inf; allowed: a finite number$"),
    ({"window": 0}, ValueError, r"^window is 0; allowed: an int >= 1$"),
    ({"chunk": 1.5}, TypeError, r"^chunk is a float; allowed: an int >= 1$"),
    ({"sinks": torch.zeros(1)}, ValueError, r"^sinks has shape \[1\]; allowed: \[N=3\]$"),
    ({"out_dtype": torch.int8}, TypeError, r"^out_dtype is torch.int8; allowed: None, float16"),
    ({"page_table": torch.zeros(2, 3).int()}, ValueError, r"^page_table has shape \[2, 3\]; allowed: \[B=3 P\]$"),
    ({"page_table": int32(0, 3, 0)[:, None]}, ValueError, r"^page_table\[1, 0\] is 3; allowed: 0 to 2"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        ops.decode_mla(**(GOOD | change))


def test_checks_need_no_values():
    meta = {name: value.to("meta") if torch.is_tensor(value) else value for name, value in GOOD.items()}
    assert ops.decode_mla(**meta)[0].shape == (3, 2, 3, 5)
