"""torch_ref.ops.block_index_scores against a loop over the seen slots, and what must never reach a score."""

import pytest
import torch
from dense_family import INF, NAN, int32, random

from torch_ref import ops

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LENGTHS = int32(11, 6, 1, 0)


def inputs(new=2, heads=3, slots=11, dtype=torch.float64):
    q_index = random(4, new, heads, 5, dtype=dtype, seed=1)
    return q_index, random(4, slots, 5, dtype=dtype, seed=2)


def slow(q_index, k_index, lengths, block_size):
    """The largest of a list per block; and which slots any query reads."""
    batch, new, heads, _ = q_index.shape
    slots = k_index.shape[1]
    scores = torch.full((batch, new, heads, -(-slots // block_size)), -INF, dtype=torch.float64)
    read = torch.zeros(batch, slots, dtype=torch.bool)
    for b in range(batch):
        for t in range(new):
            for s in range(max(0, int(lengths[b]) - new + t + 1)):
                read[b, s] = True
                for i in range(heads):
                    score = float(q_index[b, t, i].double() @ k_index[b, s].double())
                    m = s // block_size
                    scores[b, t, i, m] = max(float(scores[b, t, i, m]), score)
    return scores, read


def agree(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 11, 16])
@pytest.mark.parametrize("new", [1, 2, 3])
def test_it_is_the_loop(dtype, block_size, new):
    q_index, k_index = inputs(new, dtype=dtype)
    scores = ops.block_index_scores(q_index, k_index, LENGTHS, block_size=block_size)
    assert scores.dtype == torch.promote_types(dtype, torch.float32)
    agree(scores, slow(q_index, k_index, LENGTHS, block_size)[0], 1e-12 if dtype == torch.float64 else 1e-5)


def test_nothing_is_clipped_scaled_or_summed():
    q_index = torch.tensor([[[[1.0, 0.0]], [[0.0, -3.0]]]]).transpose(1, 2)  # one query, two heads
    k_index = torch.tensor([[[-2.0, 1.0], [-5.0, 2.0], [-1.0, 4.0]]])
    scores = ops.block_index_scores(q_index, k_index, int32(3), block_size=2)
    assert scores.tolist() == [[[[-2.0, -1.0], [-3.0, -12.0]]]]


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_unseen_slots_reach_nothing(poison):
    q_index, k_index = inputs()
    expected, read = slow(q_index, k_index, LENGTHS, 4)
    assert not read.all()
    k_index[~read] = poison
    q_index.requires_grad_(), k_index.requires_grad_()
    scores = ops.block_index_scores(q_index, k_index, LENGTHS, block_size=4)
    agree(scores.detach(), expected)
    scores[scores > -INF].sum().backward()
    assert q_index.grad.isfinite().all() and (k_index.grad[~read] == 0).all() and k_index.grad[0].any()


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_quantised_keys(stored):
    q_index, k_index = inputs(dtype=torch.float32)
    k_index, k_scale = (10 * k_index).round().to(stored), random(4, 11, seed=3).float().exp() / 10
    expected, read = slow(q_index, k_index.double() * k_scale.double()[..., None], LENGTHS, 4)
    k_scale[~read] = NAN
    scores = ops.block_index_scores(q_index, k_index, LENGTHS, block_size=4, k_scale=k_scale)
    assert scores.dtype == torch.float32
    agree(scores, expected, 1e-5)


def test_a_cache_without_slots_has_no_block():
    q_index, k_index = inputs(slots=0)
    assert ops.block_index_scores(q_index, k_index, int32(0, 0, 0, 0), block_size=4).shape == (4, 2, 3, 0)


GOOD = dict(zip(("q_index", "k_index"), inputs(dtype=torch.float32), strict=True)) | {
    "lengths": LENGTHS,
    "block_size": 4,
}
INT8 = {"k_index": torch.ones(4, 11, 5, dtype=torch.int8)}
BAD = [
    ({"q_index": None}, TypeError, r"^q_index is a NoneType; allowed: a torch.Tensor$"),
    ({"q_index": torch.ones(4, 3, 5)}, ValueError, r"^q_index has shape \[4, 3, 5\]; allowed: \[B T I J\]$"),
    ({"k_index": torch.ones(4, 11, 1, 5)}, ValueError, r"^k_index has shape \[4, 11, 1, 5\]; allowed: \[B=4 S J=5\]$"),
    ({"k_index": torch.ones(4, 11, 6)}, ValueError, r"^k_index has shape \[4, 11, 6\]; allowed: \[B=4 S J=5\]$"),
    ({"k_index": torch.ones(4, 11, 5).half()}, TypeError, r"^k_index has dtype torch.float16; allowed: float32, int8"),
    (INT8, TypeError, r"^k_scale is None; allowed: a float32 tensor, because k_index has dtype torch.int8$"),
    ({"k_scale": torch.ones(4, 11)}, TypeError, r"^k_scale is given for a k_index of dtype torch.float32; allowed: "),
    (INT8 | {"k_scale": torch.ones(4, 11, 1)}, ValueError, r"^k_scale has shape \[4, 11, 1\]; allowed: \[B=4 S=11\]$"),
    (INT8 | {"k_scale": torch.ones(4, 11).half()}, TypeError, r"^k_scale has dtype torch.float16; allowed: float32$"),
    ({"lengths": torch.tensor([1, 2, 3, 4])}, TypeError, r"^lengths has dtype torch.int64; allowed: int32$"),
    ({"lengths": int32(1, 2, 3)}, ValueError, r"^lengths has shape \[3\]; allowed: \[B=4\]$"),
    ({"lengths": int32(1, 12, 3, 4)}, ValueError, r"^lengths\[1\] is 12; allowed: 0 to 11, the number of slots$"),
    ({"block_size": 0}, ValueError, r"^block_size is 0; allowed: an int >= 1$"),
    ({"block_size": 4.0}, TypeError, r"^block_size is a float; allowed: an int >= 1$"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        ops.block_index_scores(**(GOOD | change))


def test_checks_need_no_values():
    meta = {name: value.to("meta") if torch.is_tensor(value) else value for name, value in GOOD.items()}
    assert ops.block_index_scores(**meta).shape == (4, 2, 3, 3)
