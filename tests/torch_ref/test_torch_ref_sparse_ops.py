"""torch_ref's index_scores and decode_sparse_mla against loops over slots, and what must never reach a result."""

import math

import pytest
import torch
from dense_family import INF, NAN, int32, random

from torch_ref import ops

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
STORED = [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]
LENGTHS = int32(9, 6, 1, 0)
# out of order, with entries to ignore in the middle and at the end, and a query without any
INDICES = torch.tensor(
    [
        [[4, -1, 0, 7], [8, 3, 9, 1]],
        [[-1, -1, -1, -1], [2**31 - 1, 5, -(2**31), 2]],
        [[0, 1, 2, 3], [3, 2, 1, 0]],
        [[9, 10, 11, -1], [6, -2, -1, 8]],
    ],
    dtype=torch.int32,
)


def agree(actual, expected, tolerance=1e-12):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=tolerance, atol=tolerance)


# ---- index_scores


def score_inputs(new=2, heads=3, slots=9, dtype=torch.float64):
    """q_index, k_index, weights."""
    wide = torch.promote_types(dtype, torch.float32)
    shapes = (4, new, heads, 5), (4, slots, 5), (4, new, heads)
    return [
        random(*shape, dtype=d, seed=i) for i, (shape, d) in enumerate(zip(shapes, (dtype, dtype, wide), strict=True))
    ]


def slow_scores(q_index, k_index, weights, lengths):
    """scores B T S, and which slots any query reads."""
    scores = torch.full((*q_index.shape[:2], k_index.shape[1]), -INF, dtype=torch.float64)
    read = torch.zeros(k_index.shape[:2], dtype=torch.bool)
    for b, t in torch.cartesian_prod(*(torch.arange(size) for size in q_index.shape[:2])).tolist():
        for s in range(max(0, int(lengths[b]) - q_index.shape[1] + t + 1)):
            read[b, s], scores[b, t, s] = True, 0.0
            for i in range(q_index.shape[2]):
                dot = float(q_index[b, t, i].double() @ k_index[b, s].double())
                scores[b, t, s] += float(weights[b, t, i]) * max(dot, 0.0)
    return scores, read


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("new", [1, 2, 4])
@pytest.mark.parametrize("heads", [1, 8])
def test_scores_are_the_loop(dtype, new, heads):
    args = score_inputs(new, heads, dtype=dtype)
    scores = ops.index_scores(*args, LENGTHS)
    assert scores.dtype == torch.promote_types(dtype, torch.float32)
    agree([scores], [slow_scores(*args, LENGTHS)[0]], 1e-12 if dtype == torch.float64 else 1e-5)


def test_relu_comes_before_the_weights_and_the_sum():
    """Two heads that disagree: a relu after the sum, or after the weights, gives another number."""
    q_index, k_index = torch.tensor([[[[1.0], [-1.0]]]]), torch.tensor([[[2.0], [-3.0], [0.0]]])
    scores = ops.index_scores(q_index, k_index, torch.tensor([[[5.0, -7.0]]]), int32(3))
    assert scores.tolist() == [[[10.0, -21.0, 0.0]]]


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_unseen_slots_reach_no_score(poison):
    args = score_inputs()
    expected, read = slow_scores(*args, LENGTHS)
    args[1][~read] = poison
    for x in args:
        x.requires_grad_()
    scores = ops.index_scores(*args, LENGTHS)
    agree([scores.detach()], [expected])
    scores[scores > -INF].sum().backward()
    assert all(x.grad.isfinite().all() for x in args) and (args[1].grad[~read] == 0).all() and args[1].grad[0].any()


@pytest.mark.parametrize("stored", STORED)
def test_quantised_index_keys(stored):
    q_index, k_index, weights = score_inputs(dtype=torch.float32)
    k_index, k_scale = (10 * k_index).round().to(stored), random(4, 9, seed=5).float().exp() / 10
    expected, read = slow_scores(q_index, k_index.double() * k_scale.double()[..., None], weights, LENGTHS)
    k_scale[~read] = NAN
    agree([ops.index_scores(q_index, k_index, weights, LENGTHS, k_scale=k_scale)], [expected], 1e-5)


def test_an_empty_cache_has_no_scores():
    assert ops.index_scores(*score_inputs(slots=0), int32(0, 0, 0, 0)).shape == (4, 2, 0)


# ---- decode_sparse_mla


def mla_inputs(slots=9, dtype=torch.float64):
    """q_latent, q_rope, latent, k_rope."""
    shapes = (4, 2, 3, 5), (4, 2, 3, 4), (4, slots, 5), (4, slots, 4)
    return [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def slow_sparse_mla(q_latent, q_rope, latent, k_rope, indices, scale, sinks=None):
    """One query and one head at a time, in float64, over the slots that it names; and which slots any query reads."""
    q_latent, q_rope, latent, k_rope = (x.double() for x in (q_latent, q_rope, latent, k_rope))
    out, read = torch.zeros_like(q_latent), torch.zeros(latent.shape[:2], dtype=torch.bool)
    lse = torch.full(q_latent.shape[:3], -INF, dtype=torch.float64)
    for b, t, n in torch.cartesian_prod(*(torch.arange(size) for size in q_latent.shape[:3])).tolist():
        seen = [s for s in indices[b, t].tolist() if 0 <= s < latent.shape[1]]
        read[b, seen] = True
        logits = [scale * float(q_latent[b, t, n] @ latent[b, s] + q_rope[b, t, n] @ k_rope[b, s]) for s in seen]
        total = sum(math.exp(z) for z in logits) + (0.0 if sinks is None else math.exp(sinks[n]))
        if total > 0:
            lse[b, t, n] = math.log(total)
            for s, z in zip(seen, logits, strict=True):
                out[b, t, n] += math.exp(z) / total * latent[b, s]
    return out, lse, read


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sinks", [None, (0.5, -2.0, 3.0)])
def test_sparse_mla_is_the_loop(dtype, sinks):
    args = mla_inputs(dtype=dtype)
    sink_tensor = None if sinks is None else torch.tensor(sinks)
    out, lse = ops.decode_sparse_mla(*args, INDICES, scale=0.4, sinks=sink_tensor)
    assert out.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)
    expected = slow_sparse_mla(*args, INDICES, 0.4, sinks)
    agree((out, lse), expected[:2], TOLERANCE[dtype])
    assert (out[1, 0] == 0).all() and (lse[1, 0] == (-INF if sinks is None else torch.tensor(sinks))).all()


@pytest.mark.parametrize("poison", [NAN, INF])
def test_slots_that_are_not_named_reach_nothing(poison):
    args = mla_inputs()
    *expected, read = slow_sparse_mla(*args, INDICES, 0.4)
    for x in args[2:]:
        x[~read] = poison
        x.requires_grad_()
    assert not read.all() and not read[3, :6].any()
    out, lse = ops.decode_sparse_mla(*args, INDICES, scale=0.4)
    agree((out.detach(), lse.detach()), expected)
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() and (x.grad[~read] == 0).all() and x.grad[read].any() for x in args[2:])


def test_another_query_s_poison_reaches_nothing():
    """A gather is per query: what the first query names must not blank or reach the second."""
    args = mla_inputs()
    expected = slow_sparse_mla(*args, INDICES, 0.4)
    for x in args[2:]:
        x[0, 4] = NAN
    out, lse = ops.decode_sparse_mla(*args, INDICES, scale=0.4)
    assert out[0, 0].isnan().all()
    agree((out[0, 1], lse[0, 1], out[1:]), (expected[0][0, 1], expected[1][0, 1], expected[0][1:]))


def test_naming_every_seen_slot_is_decode_mla():
    args = mla_inputs()
    order = torch.arange(9, dtype=torch.int32).flip(0)
    indices = torch.where(order < (LENGTHS[:, None, None] - 1 + int32(0, 1)[:, None]), order, -1)
    agree(ops.decode_sparse_mla(*args, indices, scale=0.4), ops.decode_mla(*args, LENGTHS, scale=0.4))


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_latent(stored, dtype):
    q_latent, q_rope, latent, k_rope = mla_inputs(dtype=dtype)
    latent, latent_scale = (10 * latent).round().to(stored), random(4, 9, seed=5).float().exp() / 10
    values = latent.double() * latent_scale.double()[..., None]
    *expected, read = slow_sparse_mla(q_latent, q_rope, values, k_rope, INDICES, 0.4)
    latent_scale[~read] = NAN
    options = dict(scale=0.4, latent_scale=latent_scale)
    out, lse = ops.decode_sparse_mla(q_latent, q_rope, latent, k_rope, INDICES, **options)
    assert out.dtype == dtype and lse.dtype == torch.float32
    agree((out, lse), expected, TOLERANCE[dtype])


def test_a_cache_without_slots_and_out_dtype():
    out, lse = ops.decode_sparse_mla(*mla_inputs(slots=0), INDICES, scale=0.4)
    assert out.shape == (4, 2, 3, 5) and (out == 0).all() and (lse == -INF).all()
    args = mla_inputs(dtype=torch.bfloat16)
    wide, _ = ops.decode_sparse_mla(*args, INDICES, scale=0.4, out_dtype=torch.float32)
    narrow, _ = ops.decode_sparse_mla(*args, INDICES, scale=0.4)
    assert wide.dtype == torch.float32 and torch.equal(narrow, wide.to(torch.bfloat16))


# ---- bad arguments

SCORES = dict(zip(("q_index", "k_index", "weights"), score_inputs(dtype=torch.float32), strict=True))
SCORES |= {"lengths": LENGTHS}
SPARSE = dict(zip(("q_latent", "q_rope", "latent", "k_rope"), mla_inputs(dtype=torch.float32), strict=True))
SPARSE |= {"indices": INDICES, "scale": 0.4}
INT8_KEYS, INT8_LATENT = {"k_index": torch.ones(4, 9, 5).to(torch.int8)}, {"latent": torch.ones(4, 9, 5).to(torch.int8)}
BAD = [
    ({"q_index": None}, TypeError, r"^q_index is a NoneType; allowed: a torch.Tensor$"),
    ({"q_index": torch.ones(4, 3, 5)}, ValueError, r"^q_index has shape \[4, 3, 5\]; allowed: \[B T I J\]$"),
    ({"q_index": torch.ones(4, 2, 3, 5).to(torch.float8_e4m3fn)}, TypeError, r"^q_index has dtype torch.float8_e4m3fn"),
    ({"k_index": torch.ones(4, 9, 6)}, ValueError, r"^k_index has shape \[4, 9, 6\]; allowed: \[B=4 S J=5\]$"),
    ({"k_index": torch.ones(4, 9, 5).half()}, TypeError, r"^k_index has dtype torch.float16; allowed: float32, int8"),
    (INT8_KEYS, TypeError, r"^k_scale is None; allowed: a float32 tensor, because k_index has dtype torch.int8$"),
    ({"k_scale": torch.ones(4, 9)}, TypeError, r"^k_scale is given for k_index of dtype torch.float32; allowed: "),
    (INT8_KEYS | {"k_scale": torch.ones(4, 8)}, ValueError, r"^k_scale has shape \[4, 8\]; allowed: \[B=4 S=9\]$"),
    ({"weights": torch.ones(4, 2, 1)}, ValueError, r"^weights has shape \[4, 2, 1\]; allowed: \[B=4 T=2 I=3\]$"),
    ({"weights": torch.ones(4, 2, 3).half()}, TypeError, r"^weights has dtype torch.float16; allowed: float32, "),
    ({"lengths": torch.tensor([1, 2, 3, 4])}, TypeError, r"^lengths has dtype torch.int64; allowed: int32$"),
    ({"lengths": int32(1, 10, 3, 4)}, ValueError, r"^lengths\[1\] is 10; allowed: 0 to 9, the number of slots$"),
    ({"q_latent": torch.ones(4, 0, 3, 5)}, ValueError, r"^q_latent has shape \[4, 0, 3, 5\]; allowed: \[B T N C\]$"),
    ({"q_rope": torch.ones(4, 2, 2, 4)}, ValueError, r"^q_rope has shape \[4, 2, 2, 4\]; allowed: \[B=4 T=2 N=3 R\]$"),
    ({"latent": torch.ones(4, 9, 6)}, ValueError, r"^latent has shape \[4, 9, 6\]; allowed: \[B=4 S C=5\]$"),
    ({"latent": torch.ones(4, 9, 5).half()}, TypeError, r"^latent has dtype torch.float16; allowed: float32, int8"),
    (INT8_LATENT, TypeError, r"^latent_scale is None; allowed: a float32 tensor, because latent has dtype torch.int8$"),
    ({"latent_scale": torch.ones(4, 9)}, TypeError, r"^latent_scale is given for latent of dtype torch.float32"),
    ({"k_rope": torch.ones(4, 8, 4)}, ValueError, r"^k_rope has shape \[4, 8, 4\]; allowed: \[B=4 S=9 R=4\]$"),
    ({"indices": INDICES.long()}, TypeError, r"^indices has dtype torch.int64; allowed: int32$"),
    ({"indices": INDICES[:, :1]}, ValueError, r"^indices has shape \[4, 1, 4\]; allowed: \[B=4 T=2 L\]$"),
    ({"indices": INDICES.to("meta")}, ValueError, r"^indices is on device meta; allowed: cpu"),
    ({"sinks": torch.zeros(1)}, ValueError, r"^sinks has shape \[1\]; allowed: \[N=3\]$"),
    ({"scale": NAN}, ValueError, r"^scale is nan; allowed: a finite number$"),
    ({"out_dtype": torch.int8}, TypeError, r"^out_dtype is torch.int8; allowed: None, float16"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_arguments_are_named(change, error, message):
    good, op = (SCORES, ops.index_scores) if change.keys() <= {*SCORES, "k_scale"} else (SPARSE, ops.decode_sparse_mla)
    with pytest.raises(error, match=message):
        op(**(good | change))


def test_checks_need_no_values():
    for good, op, shape in ((SCORES, ops.index_scores, (4, 2, 9)), (SPARSE, ops.decode_sparse_mla, (4, 2, 3, 5))):
        meta = {name: value.to("meta") if torch.is_tensor(value) else value for name, value in good.items()}
        result = op(**meta)
        assert (result if op is ops.index_scores else result[0]).shape == shape
