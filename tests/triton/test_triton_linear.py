"""decode_linear against float64 NumPy, in Triton's interpreter (on a GPU with TRITON_INTERPRET=0)."""

import numpy as np
import pytest
import torch
import triton_oracle as oracle

import triton_kernels as tk
from triton_kernels import offline, plan, runtime
from triton_kernels.decode_linear import LinearConfig, default_linear_config

OP = offline.RECORDS["decode_linear"]

F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16
LIMIT = {F16: 1e-3, BF16: 4e-3, F32: 1e-5}
DTYPES = [F16, F32] if runtime.INTERPRETED else [F16, F32, BF16]  # the interpreter cuts bfloat16 off, unrounded
DECAYS = {"head": "N", "token": "BN", "channel": "BNH"}
pytestmark = pytest.mark.usefixtures("device", "poisoned_memory")


def make(batch=2, heads=3, dim=20, value_dim=40, *, decay="head", dtype=F16, delta=False, seed=0):
    """q, k, v, state, decay of a call, and beta."""
    rng = np.random.default_rng(seed)
    sizes = {"B": batch, "N": heads, "H": dim, "V": value_dim}
    q, k, v = (rng.standard_normal([sizes[axis] for axis in axes]) for axes in ("BNH", "BNH", "BNV"))
    tensors = [torch.tensor(x, dtype=dtype) for x in (q, k / dim**0.5, v)]
    state = torch.tensor(rng.standard_normal((batch, heads, dim, value_dim)), dtype=F32)
    factors = torch.tensor(rng.uniform(0.1, 1.0, [sizes[axis] for axis in DECAYS[decay]]), dtype=F32)
    beta = torch.tensor(rng.uniform(0.0, 1.0, (batch, heads)), dtype=F32) if delta else None
    return [*tensors, state, factors], beta


def agree(got, expected, limit):
    """The worst (row, head) is within `limit`, and nothing is NaN."""
    got, expected = got.flatten(2)[:, None], expected.reshape(*expected.shape[:2], -1)[:, None]
    assert oracle.worst(got, expected) < limit


def check(args, beta=None, *, config=None):
    q, state = args[0], args[3]
    expected, expected_state = oracle.decode_linear(*args, beta=beta)
    out, new = OP.run(*args, beta=beta, config=config) if config else tk.decode_linear(*args, beta=beta)
    assert new is state and new.dtype == F32 and out.dtype == q.dtype
    agree(out, expected, LIMIT[q.dtype])
    agree(new, expected_state, LIMIT[F32])  # as exact from 16-bit inputs as from float32
    return out, new


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("delta", [False, True])
def test_decays(dtype, decay, delta):
    check(*make(decay=decay, dtype=dtype, delta=delta))


@pytest.mark.parametrize(
    "dim, value_dim", [(128, 128), (64, 64), (1, 1), (5, 3), (96, 80), (16, 200), (256, 256), (130, 33), (1024, 9)]
)
def test_widths(dim, value_dim):
    check(*make(1, 2, dim, value_dim, decay="channel", delta=True))
    check(*make(2, 1, dim, value_dim, dtype=F32))


def test_steps():
    """Forty tokens on one state: errors do not build up."""
    args, _ = make(2, 2, 16, 24, dtype=F32)
    state, wide = args[3], args[3].double().cpu().numpy()
    for step in range(40):
        (q, k, v, _, decay), beta = make(2, 2, 16, 24, decay="channel", dtype=F32, delta=True, seed=step)
        out, _ = tk.decode_linear(q, k, v, state, decay, beta=beta)
        expected, wide = oracle.decode_linear(q, k, v, torch.tensor(wide), decay, beta=beta)
        agree(out, expected, LIMIT[F32])
    agree(state, wide, LIMIT[F32])


def test_only_the_state_is_overwritten():
    """A state cut out of a larger buffer: what lies around it, and every other argument, keeps its bits."""
    (q, k, v, state, decay), beta = make(delta=True)
    buffer = torch.full((4, 3, 20, 48), 7.0)
    inside = (slice(1, 3), slice(None), slice(None), slice(4, 44))
    buffer[inside] = state
    before, others = buffer.clone(), [x.clone() for x in (q, k, v, decay, beta)]
    check([q, k, v, buffer[inside], decay], beta)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v, decay, beta), others, strict=True))
    changed = buffer != before
    assert changed[inside].any()
    changed[inside] = False
    assert not changed.any()


def test_strides():
    """q, k and v of one fused projection, a head-major state, decays and beta of other layouts."""
    (q, k, v, state, decay), beta = make(dim=20, value_dim=20, decay="channel", delta=True)
    fused = torch.stack([q, k, v], 2)
    head_major = state.transpose(0, 1).contiguous().transpose(0, 1)
    apart = decay.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    check([*fused.unbind(2), head_major, apart], beta.t().contiguous().t())
    every_second = decay[0, :, 0].repeat_interleave(2)[::2]
    check([q, k, v, state, every_second], beta)


def test_a_row_does_not_depend_on_its_batch():
    args, beta = make(5, 2, decay="token", delta=True)
    alone = [x[3:4].clone() for x in args]
    out, state = tk.decode_linear(*args, beta=beta)
    lone, lone_state = tk.decode_linear(*alone, beta=beta[3:4])
    assert torch.equal(out[3:4], lone) and torch.equal(state[3:4], lone_state)


def test_padding_never_counts():
    """An infinite value stays infinite: rows that only fill a tile up would make it NaN."""
    (q, k, v, state, decay), _ = make(1, 1, 5, 3, dtype=F32)
    q, k, v[0, 0, 1] = q.abs(), k.abs(), float("inf")
    out, state = tk.decode_linear(q, k, v, state, decay)
    assert out[0, 0].isinf().tolist() == [False, True, False] and not out.isnan().any()
    assert state[0, 0, :, 1].isinf().all() and state[0, 0, :, [0, 2]].isfinite().all()


def test_nan_stays_in_its_column():
    (q, k, v, state, decay), beta = make(1, 2, 20, 40, delta=True)
    state[0, 1, 3, 7] = float("nan")
    out, state = tk.decode_linear(q, k, v, state, decay, beta=beta)
    broken = torch.zeros(1, 2, 40, dtype=torch.bool)
    broken[0, 1, 7] = True
    assert torch.equal(out.isnan(), broken) and torch.equal(state.isnan().any(2), broken)


@pytest.mark.parametrize("columns, warps", [(8, 2), (16, 4), (64, 8)])
def test_configs(columns, warps):
    check(*make(value_dim=50, delta=True), config=LinearConfig(columns, warps))


def test_empty_batch():
    args, _ = make(2)
    empty = [x[:0] for x in args[:4]]
    out, state = tk.decode_linear(*empty, args[4])
    assert out.shape == (0, 3, 40) and state is empty[3]


def test_table_and_default(monkeypatch):
    key = dict(dtype="bfloat16", head_dim=128, value_dim=128, group=1, batch_heads=4096, length=1, device="cpu")
    monkeypatch.setattr(plan, "table", lambda op: [key | dict(config=dict(block_v=64, num_warps=8))])
    plan.nearest.cache_clear()
    for sizes, columns in ((dict(), 64), (dict(V=64), 32), (dict(dtype="float16"), 32)):
        ((_, _, _, constants),) = offline.launches(OP, sizes)
        assert constants["BLOCK_V"] == columns
    plan.nearest.cache_clear()
    for dim in (1, 5, 64, 128, 1000):
        default = default_linear_config(dim)
        assert default.block_v >= 8 and plan.pow2_ceil(dim) * default.block_v <= 32 * 32 * default.num_warps


@pytest.mark.parametrize(
    "changes, error, word",
    [
        (dict(k=torch.ones(2, 3, 21, dtype=F16)), ValueError, "k has shape"),
        (dict(v=torch.ones(2, 3, 40)), TypeError, "v has dtype"),
        (dict(state=torch.ones(2, 3, 40, 20)), ValueError, "state has shape"),
        (dict(state=torch.ones(2, 3, 20, 40, dtype=F16)), TypeError, "state"),
        (dict(state=torch.ones(2, 3, 20, 40).double()), TypeError, "state must be float32"),
        (dict(state=torch.ones(2, 3, 40, 20).mT), ValueError, "last dimension of state"),
        (dict(decay=torch.ones(2)), ValueError, "decay"),
        (dict(decay=torch.ones(2, 3, 20, 40)), ValueError, "decay"),
        (dict(decay=torch.ones(3).double()), TypeError, "decay must be float32"),
        (dict(decay=0.5), TypeError, "decay"),
        (dict(beta=torch.ones(3)), ValueError, "beta"),
        (dict(beta=torch.ones(2, 3).double()), TypeError, "beta must be float32"),
        ({name: torch.ones(2, 3, width).double() for name, width in (("q", 20), ("k", 20), ("v", 40))}, TypeError,
         "q must be"),
        (dict(q=torch.ones(2, 3, 1025).half(), k=torch.ones(2, 3, 1025).half(), state=torch.ones(2, 3, 1025, 40)),
         NotImplementedError, "H=1025"),
    ],
)  # fmt: skip
def test_wrong_arguments(changes, error, word, monkeypatch):
    monkeypatch.setattr(runtime, "launch", lambda *args, **kwargs: pytest.fail("launched"))
    args, _ = make()
    given = dict(zip(("q", "k", "v", "state", "decay"), args, strict=True))
    here = given["q"].device
    given |= {name: x.to(here) if isinstance(x, torch.Tensor) else x for name, x in changes.items()}
    with pytest.raises(error, match=word):
        tk.decode_linear(**given)


def test_a_state_that_overlaps_itself(monkeypatch):
    monkeypatch.setattr(runtime, "launch", lambda *args, **kwargs: pytest.fail("launched"))
    (q, k, v, state, decay), _ = make()
    with pytest.raises(ValueError, match="B=2 entries share memory"):
        tk.decode_linear(q, k, v, state[:1].expand(2, -1, -1, -1), decay)
