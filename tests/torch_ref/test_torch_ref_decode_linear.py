"""torch_ref.ops.decode_linear against a loop over single numbers."""

import pytest
import torch
from dense_family import int32, random

from torch_ref import ops

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
DECAYS = {"head": (2,), "token": (3, 2), "channel": (3, 2, 5)}


def inputs(dtype=torch.float64, decay="head", seed=0):
    """q, k, v, state, decay of 3 rows, 2 heads, key width 5, value width 4; the last two float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = (random(3, 2, width, dtype=dtype, seed=seed + i) for i, width in enumerate((5, 5, 4)))
    state = random(3, 2, 5, 4, dtype=wide, seed=seed + 3)
    return q, k, v, state, torch.sigmoid(random(*DECAYS[decay], dtype=wide, seed=seed + 4))


def slow(q, k, v, state, decay, beta=None):
    """The contract, a number at a time, in Python floats."""
    rows, heads, width = q.shape
    out, new = torch.zeros(v.shape, dtype=torch.float64), torch.zeros(state.shape, dtype=torch.float64)
    factor = (decay if decay.ndim == 3 else decay[..., None]).expand(q.shape)
    for b in range(rows):
        for n in range(heads):
            for c in range(v.shape[2]):
                column = [float(factor[b, n, h]) * float(state[b, n, h, c]) for h in range(width)]
                u = float(v[b, n, c])
                if beta is not None:
                    u = float(beta[b, n]) * (u - sum(column[h] * float(k[b, n, h]) for h in range(width)))
                column = [column[h] + float(k[b, n, h]) * u for h in range(width)]
                new[b, n, :, c] = torch.tensor(column, dtype=torch.float64)
                out[b, n, c] = sum(column[h] * float(q[b, n, h]) for h in range(width))
    return out, new


def agree(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        assert (a.double() - e).norm() <= tolerance * e.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("delta", [False, True])
def test_it_is_the_loop(dtype, decay, delta):
    given = inputs(dtype, decay)
    beta = torch.sigmoid(random(3, 2, dtype=given[3].dtype, seed=9)) if delta else None
    out, state = ops.decode_linear(*given, beta=beta)
    assert out.dtype == dtype and state.dtype == given[3].dtype
    expected = slow(*given, beta)
    agree([out], expected[:1], TOLERANCE[dtype])
    agree([state], expected[1:], TOLERANCE[state.dtype])  # the state is as exact in bfloat16 as in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float64_state_stays_float64(dtype):
    q, k, v, state, decay = inputs(dtype)
    state, decay = state.double(), decay.double()
    out, new = ops.decode_linear(q, k, v, state, decay)
    assert out.dtype == dtype and new.dtype == torch.float64
    agree([new], slow(q, k, v, state, decay)[1:], TOLERANCE[torch.float64])


def test_the_delta_rule_stores_and_replaces():
    """With a unit key and beta 1 the state answers that key with the last value, whatever it held before."""
    q, k, v, state, decay = inputs()
    k = k / k.norm(dim=-1, keepdim=True)
    out, state = ops.decode_linear(k, k, v, state, decay, beta=torch.ones(3, 2))
    torch.testing.assert_close(out, v)
    out, _ = ops.decode_linear(k, k, 2 * v, state, decay, beta=torch.ones(3, 2))
    torch.testing.assert_close(out, 2 * v)
    _, kept = ops.decode_linear(q, k, v, state, torch.ones(2), beta=torch.zeros(3, 2))
    torch.testing.assert_close(kept, state)


@pytest.mark.parametrize("delta", [False, True])
def test_inputs_are_not_changed_and_gradients_are_finite(delta):
    given = [x.requires_grad_() for x in inputs()]
    before = [x.detach().clone() for x in given]
    out, state = ops.decode_linear(*given, beta=torch.ones(3, 2) / 2 if delta else None)
    (out.square().sum() + state.square().sum()).backward()
    assert all(
        torch.equal(x, kept) and x.grad.isfinite().all() and x.grad.any() for x, kept in zip(given, before, strict=True)
    )


def test_a_batch_of_no_rows():
    q, k, v, state, decay = inputs()
    out, new = ops.decode_linear(q[:0], k[:0], v[:0], state[:0], decay)
    assert out.shape == (0, 2, 4) and new.shape == (0, 2, 5, 4)


GOOD = dict(zip(("q", "k", "v", "state", "decay"), inputs(torch.float32), strict=True))
BAD = [
    ({"q": 3}, TypeError, r"^q is a int; allowed: a torch.Tensor$"),
    ({"q": int32(1)}, TypeError, r"^q has dtype torch.int32; allowed: float16, bfloat16, float32, float64$"),
    ({"k": torch.zeros(3, 2, 4)}, ValueError, r"^k has shape \[3, 2, 4\]; allowed: \[B=3 N=2 H=5\]$"),
    ({"k": torch.zeros(3, 2, 5).half()}, TypeError, r"^k has dtype torch.float16; allowed: float32$"),
    ({"v": torch.zeros(3, 1, 4)}, ValueError, r"^v has shape \[3, 1, 4\]; allowed: \[B=3 N=2 V\]$"),
    ({"v": torch.zeros(3, 2, 4).bfloat16()}, TypeError, r"^v has dtype torch.bfloat16; allowed: float32$"),
    ({"state": torch.zeros(3, 2, 4, 5)}, ValueError, r"^state has shape \[3, 2, 4, 5\]; allowed: \[B=3 N=2 H=5 V=4\]$"),
    (
        {"state": torch.zeros(3, 2, 5, 4).half()},
        TypeError,
        r"^state has dtype torch.float16; allowed: float32, float64",
    ),
    ({"decay": 0.5}, TypeError, r"^decay is a float; allowed: a torch.Tensor$"),
    ({"decay": torch.tensor(0.5)}, ValueError, r"^decay has shape \[\]; allowed: \[N\], \[B N\], \[B N H\]$"),
    ({"decay": torch.ones(3, 2, 5, 4)}, ValueError, r"^decay has shape \[3, 2, 5, 4\]; allowed: \[N\], \[B N\], "),
    ({"decay": torch.ones(3)}, ValueError, r"^decay has shape \[3\]; allowed: \[N=2\]$"),
    ({"decay": torch.ones(2, 2)}, ValueError, r"^decay has shape \[2, 2\]; allowed: \[B=3 N=2\]$"),
    ({"decay": torch.ones(3, 2, 4)}, ValueError, r"^decay has shape \[3, 2, 4\]; allowed: \[B=3 N=2 H=5\]$"),
    ({"decay": torch.ones(2).half()}, TypeError, r"^decay has dtype torch.float16; allowed: float32, float64$"),
    ({"beta": torch.ones(2)}, ValueError, r"^beta has shape \[2\]; allowed: \[B=3 N=2\]$"),
    ({"beta": torch.ones(3, 2).bfloat16()}, TypeError, r"^beta has dtype torch.bfloat16; allowed: float32, float64$"),
    ({"decay": torch.ones(2, device="meta")}, ValueError, r"^decay is on device meta; allowed: cpu"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        ops.decode_linear(**(GOOD | change))


def test_checks_need_no_values():
    out, state = ops.decode_linear(**{name: value.to("meta") for name, value in GOOD.items()})
    assert out.shape == (3, 2, 4) and state.shape == (3, 2, 5, 4)
