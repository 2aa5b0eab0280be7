"""decode_sparse_mla against float64 NumPy, in Triton's interpreter (on a GPU with TRITON_INTERPRET=0)."""

import numpy as np
import pytest
import torch
import triton_oracle as oracle

import triton_kernels as tk
from triton_kernels import offline, plan, runtime

OP = offline.RECORDS["decode_sparse_mla"]

F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16
OUT_LIMIT = {F16: 1e-3, BF16: 4e-3, F32: 1e-5}
LSE_LIMIT = {F16: 1e-3, BF16: 1e-3, F32: 1e-5}
DTYPES = [F16, F32] if runtime.INTERPRETED else [F16, F32, BF16]
pytestmark = pytest.mark.usefixtures("device", "poisoned_memory")


def make(counts, *, slots, entries, heads=4, latent=32, rope=8, tokens=1, dtype=F16, seed=0):
    """The tensors of a call whose rows list so many distinct slots, in any order among entries to be ignored.

    Slots that no list names hold NaN and Inf.
    """
    rng = np.random.default_rng(seed)
    batch = len(counts)
    indices = rng.choice([-1, slots, -(2**31), 2**31 - 1], (batch, tokens, entries))
    for b, t in np.ndindex(batch, tokens):
        where = rng.choice(entries, counts[b], replace=False)
        indices[b, t, where] = rng.choice(slots, counts[b], replace=False)
    shapes = [
        (batch, tokens, heads, latent),
        (batch, tokens, heads, rope),
        (batch, slots, latent),
        (batch, slots, rope),
    ]
    q_latent, q_rope, c, r = (torch.tensor(rng.standard_normal(shape), dtype=dtype) for shape in shapes)
    for b in range(batch):
        unread = np.setdiff1d(np.arange(slots), indices[b])
        c[b, unread], r[b, unread] = float("nan"), float("inf")
        c[b, unread, ::2] = float("inf")
    return q_latent, q_rope, c, r, torch.tensor(indices, dtype=torch.int32)


def check(case, *, config=None, out_dtype=None, **options):
    q_latent, q_rope, c, r, indices = case
    options |= dict(scale=(q_latent.shape[-1] + q_rope.shape[-1]) ** -0.5)
    if config is None:
        out, lse = tk.decode_sparse_mla(*case, out_dtype=out_dtype, **options)
    else:
        out, lse = OP.run(q_latent, q_rope, c, r, indices, config=config, **options)
    expected, expected_lse = oracle.decode_sparse_mla(*case, **options)
    assert out.dtype == (out_dtype or q_latent.dtype) and lse.dtype == F32
    assert oracle.worst(out, expected) < max(OUT_LIMIT[q_latent.dtype], OUT_LIMIT[out.dtype])
    assert oracle.worst_lse(lse, expected_lse) < LSE_LIMIT[q_latent.dtype]
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, entries", [(4, 1), (4, 31), (4, 33), (4, 200), (33, 70)])
def test_lists(dtype, heads, entries):
    """Empty, partly and wholly used lists, shorter and longer than a tile."""
    check(make([0, 1, entries - 1, entries], slots=250, entries=entries, heads=heads, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, tokens", [(1, 1), (1, 3), (5, 2), (16, 1), (20, 2), (80, 1), (128, 2)])
def test_heads_and_tokens(dtype, heads, tokens):
    """Every token of a row has a list of its own."""
    check(make([9, 40] if heads < 80 else [40], slots=90, entries=40, heads=heads, tokens=tokens, dtype=dtype))


@pytest.mark.parametrize("latent, rope", [(64, 16), (16, 4), (48, 24), (128, 64), (512, 64)])
def test_widths(latent, rope):
    check(make([33, 70], slots=70, entries=70, heads=3, latent=latent, rope=rope))
    check(make([20], slots=40, entries=33, heads=3, latent=latent, rope=rope, dtype=F32))


@pytest.mark.parametrize("heads", [16, 128])
def test_full_size(heads):
    """The widths of DeepSeek-V3.2 at both ends of the head counts."""
    case = make([100, 7], slots=400, entries=100, heads=heads, latent=512, rope=64)
    check(case, sinks=torch.linspace(-2, 2, heads))


@pytest.mark.parametrize("entries", [20, 300])
def test_sinks_and_out_dtype(entries):
    """With one split and with several: a sink enters once, and alone where a list is empty."""
    case = make([0, 1, entries - 3], slots=400, entries=entries, heads=6)
    sinks = torch.tensor([-3.0, 0.0, 2.5, 8.0, -1e4, 1e4])
    out, lse = check(case, sinks=sinks, out_dtype=F32)
    assert (out[0] == 0).all() and torch.allclose(lse[0], sinks.expand(1, -1))
    check(case, sinks=sinks.half())


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_entries_are_dense_attention(dtype):
    """A list of all slots is decode_mla, whatever its order."""
    q_latent, q_rope, c, r, _ = make([70, 70], slots=70, entries=70, heads=8, dtype=dtype)
    indices = torch.stack([torch.randperm(70), torch.arange(70)])[:, None].to(torch.int32)
    out, lse = check((q_latent, q_rope, c, r, indices))
    lengths = torch.full((2,), 70, dtype=torch.int32)
    dense = tk.decode_mla(q_latent, q_rope, c, r, lengths, scale=40**-0.5)
    assert oracle.worst(out, dense[0].double().cpu().numpy()) < OUT_LIMIT[dtype]
    assert oracle.worst_lse(lse, dense[1].double().cpu().numpy()) < LSE_LIMIT[dtype]


def test_other_slots_change_no_bit():
    """The same lists in a cache that has more slots, of NaN."""
    q_latent, q_rope, c, r, indices = make([50, 90], slots=100, entries=90)
    out, lse = check((q_latent, q_rope, c, r, indices.where((indices >= 0) & (indices < 100), -1)))
    c, r = (torch.cat([x, torch.full((2, 500, x.shape[-1]), float("nan"), dtype=F16)], 1) for x in (c, r))
    again, lse_again = check((q_latent, q_rope, c, r, indices.where((indices >= 0) & (indices < 100), 600)))
    assert torch.equal(out, again) and torch.equal(lse, lse_again)


@pytest.mark.parametrize("rows", [16, 64])
def test_split_plans(rows):
    """One split, and so many that some have no entry to read; the same call gives the same bits."""
    case = make([1, 130, 160], slots=200, entries=160, heads=20)
    for early, min_split, ctas in ((False, 2**20, 1), (False, 32, 4), (True, 64, 4)):
        config = plan.LatentConfig(32, 8, 2, ctas, min_split, rows=rows, early=early)
        first, again = (check(case, config=config, sinks=torch.linspace(-1, 1, 20)) for _ in range(2))
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("batch, heads, splits", [(64, 128, 1), (64, 64, 2), (8, 128, 8), (1, 128, 16)])
def test_default_plan_fills_an_h100(batch, heads, splits):
    """DeepSeek-V3.2's lists of 2048: 64 heads a program, no merge where 132 SMs are busy without it."""
    ((_, grid, _, constants),) = offline.launches(OP, dict(B=batch, N=heads))
    assert grid[1] == splits and constants["ROWS"] == 64


def test_read_nan_is_not_hidden():
    q_latent, q_rope, c, r, indices = make([3, 3], slots=9, entries=5)
    c[:], r[:] = 1.0, 1.0
    c[0, int(indices[0][(indices[0] >= 0) & (indices[0] < 9)][0])] = float("nan")
    out, lse = tk.decode_sparse_mla(q_latent, q_rope, c, r, indices, scale=1.0)
    assert out[0].isnan().all() and lse[0].isnan().all() and (out[1] == 1).all()


def test_empty_inputs():
    q_latent, q_rope, c, r, indices = make([2, 2], slots=9, entries=5)
    out, lse = tk.decode_sparse_mla(q_latent, q_rope, c[:, :0], r[:, :0], indices, scale=1.0)
    assert (out == 0).all() and lse.isneginf().all()
    out, lse = tk.decode_sparse_mla(*(x[:0] for x in (q_latent, q_rope, c, r, indices)), scale=1.0)
    assert out.shape == (0, 1, 4, 32) and lse.shape == (0, 1, 4)


def test_strides():
    """Latent and rope key in one fused cache, queries sliced out of one projection, lists cut out of longer ones."""
    case = make([9, 100], slots=100, entries=100)
    expected = check(case)
    q_latent, q_rope, c, r, indices = case
    q, fused = torch.cat([q_latent, q_rope], -1), torch.cat([c, r], -1)
    for lists in (torch.cat([indices, indices], -1)[..., :100], indices.mT.contiguous().mT):
        out, lse = check((q[..., :32], q[..., 32:], fused[..., :32], fused[..., 32:], lists))
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def wrong(**changes):
    given = dict(q_latent=torch.ones(2, 1, 4, 32), q_rope=torch.ones(2, 1, 4, 8), latent=torch.ones(2, 64, 32))
    given |= dict(k_rope=torch.ones(2, 64, 8), indices=torch.zeros(2, 1, 5, dtype=torch.int32), scale=1.0)
    return given | changes


@pytest.mark.parametrize(
    "changes, error, word",
    [
        (dict(k_rope=torch.ones(2, 64, 16)), ValueError, "k_rope|q_rope"),
        (dict(latent=torch.ones(2, 64, 32).half()), TypeError, "latent"),
        (dict(indices=torch.zeros(2, 2, 5, dtype=torch.int32)), ValueError, "indices"),
        (dict(indices=torch.zeros(2, 1, 5, dtype=torch.int64)), TypeError, "indices"),
        (dict(sinks=torch.ones(3)), ValueError, "sinks"),
        (dict(out_dtype=torch.float64), TypeError, "out_dtype"),
        ({name: wrong()[name].double() for name in ("q_latent", "q_rope", "latent", "k_rope")}, TypeError, "q_latent"),
        (dict(q_latent=torch.ones(2, 1, 4, 576), latent=torch.ones(2, 64, 576)), NotImplementedError, "C=576"),
        (dict(q_rope=torch.ones(2, 1, 4, 80), k_rope=torch.ones(2, 64, 80)), NotImplementedError, "R=80"),
        (dict(k_rope=torch.ones(2, 8, 64).transpose(1, 2)), ValueError, "k_rope"),
        (dict(latent=torch.ones(2, 64, 32).char(), latent_scale=torch.ones(2, 64)), NotImplementedError, "latent_s"),
    ],
)  # fmt: skip
def test_wrong_arguments(changes, error, word, monkeypatch):
    monkeypatch.setattr(runtime, "launch", lambda *args, **kwargs: pytest.fail("launched"))
    with pytest.raises(error, match=word):
        tk.decode_sparse_mla(**wrong(**changes))
