"""index_scores, block_index_scores and topk_indices against float64 NumPy, in Triton's interpreter (on a GPU with
TRITON_INTERPRET=0)."""

import numpy as np
import pytest
import torch
import triton_oracle as oracle

import triton_kernels as tk
from triton_kernels import device, indexer, offline, plan, runtime

OP, BLOCK_OP = (offline.RECORDS[name] for name in ("index_scores", "block_index_scores"))

F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16
LIMIT = {F16: 1e-3, BF16: 4e-3, F32: 1e-5}
DTYPES = [F16, F32] if runtime.INTERPRETED else [F16, F32, BF16]
STORED = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
SMALL = plan.Config(32, 4, 2, 1, 32)  # several tiles in a short row
NAN, INF = float("nan"), float("inf")
pytestmark = pytest.mark.usefixtures("device", "poisoned_memory")


def make(lengths, *, slots, heads=3, dim=24, tokens=1, dtype=F16, stored=None, seed=0):
    """q_index, k_index, weights, lengths of a call, and k_scale; NaN and Inf in the keys that no query sees."""
    rng = np.random.default_rng(seed)
    batch = len(lengths)
    q, k = (rng.standard_normal(shape) for shape in ((batch, tokens, heads, dim), (batch, slots, dim)))
    weights = torch.tensor(rng.standard_normal((batch, tokens, heads)), dtype=F32)
    q, k = torch.tensor(q, dtype=dtype), torch.tensor(k * (1 if stored is None else 20), dtype=F32).to(stored or dtype)
    k_scale = None if stored is None else torch.tensor(rng.standard_normal((batch, slots)), dtype=F32)
    for row, length in enumerate(lengths):
        if stored is None:
            k[row, length:] = INF
            k[row, length:, ::2] = NAN
        else:
            k_scale[row, length:] = NAN
    return (q, k, weights, torch.tensor(lengths, dtype=torch.int32)), k_scale


def check_tokens(case, k_scale=None, config=None):
    scores = OP.run(*case, k_scale=k_scale, config=config) if config else (
        tk.index_scores(*case, k_scale=k_scale)
    )  # fmt: skip
    assert scores.dtype == F32
    assert oracle.worst_query(scores, oracle.index_scores(*case, k_scale=k_scale)) < LIMIT[case[0].dtype]
    return scores


def check_blocks(case, block_size, k_scale=None, config=None):
    q, k, _, lengths = case
    options = dict(block_size=block_size, k_scale=k_scale)
    scores = BLOCK_OP.run(q, k, lengths, **options, config=config) if config else (
        tk.block_index_scores(q, k, lengths, **options)
    )  # fmt: skip
    assert scores.dtype == F32
    assert oracle.worst_query(scores, oracle.block_index_scores(q, k, lengths, **options)) < LIMIT[q.dtype]
    return scores


@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths(dtype):
    """Rows that end before, at and after the edge of a tile."""
    block = indexer.default_score_config(dtype.itemsize, dtype.itemsize, 24, 3).block_n
    lengths = [0, 1, block - 1, block, block + 1, 2 * block + 7]
    case, _ = make(lengths, slots=2 * block + 7, dtype=dtype)
    check_tokens(case)
    check_blocks(case, 16)


@pytest.mark.parametrize("block_size", [1, 5, 16, 24, 32, 33, 64, 100, 139, 10**9])
def test_block_sizes(block_size):
    """Blocks that are a part of a tile, one and several of them; the last block of the cache is partial."""
    case, _ = make([0, min(block_size, 139), 65, 139], slots=139, tokens=2)
    check_blocks(case, block_size, config=SMALL)
    if block_size in (5, 64):
        check_blocks(case, block_size)


@pytest.mark.parametrize("tokens", [2, 5])
def test_tokens(tokens):
    """Every query sees one key more than the one before it; short rows have queries that see nothing."""
    case, _ = make([1, tokens, 33, 70], slots=70, tokens=tokens)
    check_tokens(case, config=SMALL)
    check_blocks(case, 8, config=SMALL)


@pytest.mark.parametrize("heads", [1, 5, 16, 33, 64, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads(heads, dtype):
    case, _ = make([70, 9], slots=70, heads=heads, dtype=dtype)
    check_tokens(case)
    check_blocks(case, 32)


@pytest.mark.parametrize("dim", [1, 16, 80, 128, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dims(dim, dtype):
    case, _ = make([70, 9], slots=70, dim=dim, heads=8, dtype=dtype)
    check_tokens(case)
    check_blocks(case, 64)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_keys(stored, dtype):
    """Scales of either sign: they multiply before the relu, and before the maximum."""
    case, k_scale = make([0, 40, 70], slots=70, tokens=2, dtype=dtype, stored=stored)
    assert (k_scale[2] < 0).any() and (k_scale[2] > 0).any()
    check_tokens(case, k_scale)
    check_blocks(case, 24, k_scale)
    strided = k_scale.t().contiguous().t()
    check_tokens(case, strided)


def test_nothing_is_clipped_or_weighted_in_block_scores():
    q, k = torch.tensor([[[[1.0, 0.0], [0.0, -3.0]]]]), torch.tensor([[[-2.0, 1.0], [-5.0, 2.0], [-1.0, 4.0]]])
    lengths = torch.tensor([3], dtype=torch.int32)
    assert tk.block_index_scores(q, k, lengths, block_size=2).tolist() == [[[[-2.0, -1.0], [-3.0, -12.0]]]]
    weights = torch.tensor([[[2.0, -0.5]]])
    assert tk.index_scores(-q, k, weights, lengths).tolist() == [[[2.5, 7.0, -4.0]]]


def test_seen_nan_is_not_hidden():
    """A broken key breaks its own score, or its block's, and no other."""
    (q, k, weights, lengths), _ = make([90, 90], slots=90)
    k[0, 40] = NAN
    scores = tk.index_scores(q, k, weights, lengths)
    assert scores[0, 0, 40].isnan() and scores.isnan().sum() == 1
    for config, block_size in ((None, 16), (SMALL, 7), (SMALL, 80)):
        blocks = BLOCK_OP.run(q, k, lengths, block_size=block_size, config=config)
        assert blocks[0, 0, :, 40 // block_size].isnan().all() and blocks.isnan().sum() == q.shape[2]
    k[0, 40] = INF
    q, weights = q.abs(), weights.abs()
    assert tk.index_scores(q, k, weights, lengths)[0, 0, 40] == INF
    assert (tk.block_index_scores(q, k, lengths, block_size=16)[0, 0, :, 2] == INF).all()


def test_strides():
    """Keys in a fused buffer, queries of a head-major projection, weights of another layout."""
    (q, k, weights, lengths), _ = make([9, 70], slots=70, tokens=2)
    fused = torch.cat([k, k], -1)[..., 24:]
    head_major = q.transpose(1, 2).contiguous().transpose(1, 2)
    case = (
        head_major,
        fused,
        weights.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        lengths.repeat_interleave(2)[::2],
    )
    check_tokens(case)
    check_blocks(case, 16)


def test_splits_change_no_bit(monkeypatch):
    """One split, and so many that most have no key: scores do not depend on them."""
    case, _ = make([0, 3, 150], slots=200)
    monkeypatch.setattr(indexer, "device_of", lambda tensor: device.TARGET)
    many, one = plan.Config(32, 4, 2, 1, 32), plan.Config(32, 4, 2, 1, 2**20)
    assert [indexer.splits("", *case[:2], 1, config) for config in (many, one)] == [7, 1]
    assert torch.equal(check_tokens(case, config=many), check_tokens(case, config=one))
    assert torch.equal(check_blocks(case, 20, config=many), check_blocks(case, 20, config=one))


def test_a_length_past_the_cache_stays_in_its_row():
    """Invalid, and unchecked on a GPU: whatever the scores are, they must not be written over the next row's."""
    (q, k, weights, _), _ = make([40, 40], slots=40)
    given, valid = torch.tensor([1000, 5], dtype=torch.int32), torch.tensor([40, 5], dtype=torch.int32)
    tokens = [OP.run(q, k, weights, lengths, k_scale=None) for lengths in (given, valid)]
    blocks = [BLOCK_OP.run(q, k, lengths, block_size=8, k_scale=None) for lengths in (given, valid)]
    assert torch.equal(*tokens) and torch.equal(*blocks)
    if given.device.type == "cpu":  # whose values are at hand
        for call in (
            lambda: tk.index_scores(q, k, weights, given),
            lambda: tk.block_index_scores(q, k, given, block_size=8),
        ):
            with pytest.raises(ValueError, match=r"lengths\[0\] is 1000"):
                call()


def test_empty_inputs():
    (q, k, weights, lengths), _ = make([4, 4], slots=4)
    none = torch.zeros_like(lengths)
    assert tk.index_scores(q, k[:, :0], weights, none).shape == (2, 1, 0)
    assert tk.block_index_scores(q, k[:, :0], none, block_size=4).shape == (2, 1, 3, 0)
    assert tk.index_scores(q[:0], k[:0], weights[:0], none[:0]).shape == (0, 1, 4)
    assert tk.block_index_scores(q[:0], k[:0], none[:0], block_size=3).shape == (0, 1, 3, 2)
    assert tk.index_scores(q, k, weights, none).isneginf().all()


def test_launches_do_not_depend_on_values(monkeypatch):
    """The same grids and constants whatever the lengths hold: a captured graph can be replayed."""
    launches = []
    launch = runtime.launch

    def record(kernel, grid, *args, **options):
        launches.append((grid, options, [x for x in args if not isinstance(x, torch.Tensor)]))
        return launch(kernel, grid, *args, **options)

    monkeypatch.setattr(runtime, "launch", record)
    (q, k, weights, lengths), _ = make([5, 150], slots=150)
    for given in (lengths, torch.zeros_like(lengths)):
        tk.index_scores(q, k, weights, given)
        tk.block_index_scores(q, k, given, block_size=16)
    assert len(launches) == 4 and launches[:2] == launches[2:]


@pytest.mark.parametrize("op, batch, splits", [(OP, 16, 32), (OP, 1, 256), (BLOCK_OP, 16, 32)])
def test_default_plan_fills_an_h100(op, batch, splits):
    """DeepSeek-V3.2's and MiniMax-M3's shapes: two programs for each that fits 132 SMs, each of two tiles or more."""
    ((_, grid, _, constants),) = offline.launches(op, dict(B=batch, S=65536))
    assert grid[1] == splits and constants["BLOCK_N"] == indexer.default_score_config(2, 2, 128, 64).block_n


def test_table_lookup(monkeypatch):
    """An entry serves its number of heads, rounded up to a power of two, and keys that are not quantised."""
    config = dict(block_n=64, num_warps=4, num_stages=5, ctas_per_sm=2, min_split=64)
    key = dict(dtype="bfloat16", head_dim=128, value_dim=0, group=32, batch_heads=1, length=4096, device="cpu")
    monkeypatch.setattr(plan, "table", lambda op: [key | dict(config=config)])
    plan.nearest.cache_clear()

    def found(heads, **sizes):
        ((_, _, _, constants),) = offline.launches(OP, dict(I=heads) | sizes)
        return constants["num_stages"] == 5

    assert found(32) and found(20)
    assert not (found(16) or found(64) or found(32, dtype="float16") or found(32, stored="int8") or found(32, J=64))
    plan.nearest.cache_clear()


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_topk_order(dtype):
    """Ties go to the lower position; +inf first, -inf never; 0.0 and -0.0 are equal; NaN of either sign leads."""
    rng = np.random.default_rng(0)
    scores = torch.tensor(rng.integers(-3, 3, (4, 2, 1500)), dtype=dtype)
    scores[0, 0, 5:], scores[0, 1] = -INF, -INF
    scores[1, 0, 7], scores[1, 0, 9], scores[1, 1, 3] = NAN, -NAN, INF
    scores[2, 0, :700], scores[2, 0, 700:] = -0.0, 0.0
    scores[3] = torch.tensor(rng.standard_normal((2, 1500)), dtype=dtype)
    for k in (1, 8, 1030, 1500, 1600):
        picks = tk.topk_indices(scores, k)
        assert picks.dtype == torch.int32
        np.testing.assert_array_equal(picks.cpu().numpy(), oracle.topk_indices(scores, k))


def test_topk_shapes():
    scores = torch.tensor([3.0, -INF, 5.0, 3.0])
    assert tk.topk_indices(scores, 6).tolist() == [2, 0, 3, -1, -1, -1]
    assert tk.topk_indices(scores[:0], 2).tolist() == [-1, -1]
    assert tk.topk_indices(scores[None, :][:0], 2).shape == (0, 2)
    strided = scores.repeat_interleave(2)[::2].expand(2, 3, 4)
    assert tk.topk_indices(strided, 1).tolist() == [[[2]] * 3] * 2


def index_case(**changes):
    given = dict(q_index=torch.ones(2, 1, 4, 32), k_index=torch.ones(2, 40, 32), weights=torch.ones(2, 1, 4))
    return given | dict(lengths=torch.ones(2, dtype=torch.int32)) | changes


def on_device(given):
    """Tensors of a parameter list are made before a test's device is known."""
    here = torch.empty(0).device
    return {name: x.to(here) if isinstance(x, torch.Tensor) else x for name, x in given.items()}


BOTH = [
    (dict(k_index=torch.ones(2, 40, 16)), ValueError, "k_index has shape"),
    (dict(k_index=torch.ones(2, 40, 32).half()), TypeError, "k_index has dtype"),
    (dict(k_index=torch.ones(2, 40, 32).char()), TypeError, "k_scale is None"),
    (dict(k_scale=torch.ones(2, 40)), TypeError, "k_scale is given"),
    (dict(k_index=torch.ones(2, 40, 32).char(), k_scale=torch.ones(2, 39)), ValueError, "k_scale has shape"),
    (dict(lengths=torch.ones(2)), TypeError, "lengths"),
    (dict(lengths=torch.ones(3, dtype=torch.int32)), ValueError, "lengths"),
    (dict(q_index=torch.ones(2, 1, 4, 32).double(), k_index=torch.ones(2, 40, 32).double()), TypeError, "q_index must"),
    (dict(k_index=torch.ones(2, 32, 40).mT), ValueError, "last dimension of k_index"),
    (dict(q_index=torch.ones(2, 1, 257, 32), weights=torch.ones(2, 1, 257)), NotImplementedError, "I=257"),
    (dict(q_index=torch.ones(2, 1, 4, 257), k_index=torch.ones(2, 40, 257)), NotImplementedError, "J=257"),
    (dict(q_index=torch.ones(2, 1, 200, 200), k_index=torch.ones(2, 40, 200), weights=torch.ones(2, 1, 200)),
     NotImplementedError, "I=200 heads of J=200"),
]  # fmt: skip


@pytest.mark.parametrize("changes, error, word", [
    *BOTH,
    (dict(weights=torch.ones(2, 1, 3)), ValueError, "weights"),
    (dict(weights=torch.ones(2, 1, 4).half()), TypeError, "weights"),
    (dict(weights=torch.ones(2, 1, 4).double()), TypeError, "weights must be float32"),
])  # fmt: skip
def test_wrong_index_arguments(changes, error, word, monkeypatch):
    monkeypatch.setattr(runtime, "launch", lambda *args, **kwargs: pytest.fail("launched"))
    with pytest.raises(error, match=word):
        tk.index_scores(**on_device(index_case(**changes)))


@pytest.mark.parametrize("changes, error, word", [
    *BOTH, (dict(block_size=0), ValueError, "block_size"), (dict(block_size=1.5), TypeError, "block_size"),
])  # fmt: skip
def test_wrong_block_arguments(changes, error, word, monkeypatch):
    monkeypatch.setattr(runtime, "launch", lambda *args, **kwargs: pytest.fail("launched"))
    given = on_device(dict(block_size=8) | index_case(**changes))
    given.pop("weights")
    with pytest.raises(error, match=word):
        tk.block_index_scores(**given)


@pytest.mark.parametrize("scores, k, error, word", [
    (torch.ones(3), 0, ValueError, "k is 0"),
    (torch.ones(3), 1.0, TypeError, "k is a float"),
    (torch.ones(()), 1, ValueError, "scores has shape"),
    (torch.ones(3).int(), 1, TypeError, "scores has dtype"),
    (torch.ones(3).double(), 1, TypeError, "scores must be"),
])  # fmt: skip
def test_wrong_topk_arguments(scores, k, error, word):
    with pytest.raises(error, match=word):
        tk.topk_indices(scores, k)
