"""decode_block_sparse against float64 NumPy, in Triton's interpreter (on a GPU with TRITON_INTERPRET=0)."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
import triton_oracle as oracle

import triton_kernels as tk
from triton_kernels import offline, plan, runtime

OP = offline.RECORDS["decode_block_sparse"]

F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16
OUT_LIMIT = {F16: 1e-3, BF16: 4e-3, F32: 1e-5}
LSE_LIMIT = {F16: 1e-3, BF16: 1e-3, F32: 1e-5}
DTYPES = [F16, F32] if runtime.INTERPRETED else [F16, F32, BF16]
IGNORED = (-1, -7, -(2**31), 2**31 - 1, 2**29)  # the last times a block size is 0 in 32 bits
pytestmark = pytest.mark.usefixtures("device", "poisoned_memory")


def make(lengths, *, slots, block_size, entries=4, lists=None, heads=4, kv_heads=2, dim=32, value_dim=None, tokens=1,
         dtype=F16, seed=0):  # fmt: skip
    """q, k, v, block_indices, lengths of a call; lengths None: two rows that see every listed slot.

    Every list holds distinct blocks in any order among entries to be ignored. Slots that no query reads hold NaN (K:
    also Inf). value_dim 0: no v.
    """
    rng = np.random.default_rng(seed)
    batch = 2 if lengths is None else len(lengths)
    blocks = -(-slots // block_size)
    indices = rng.choice(np.array([*IGNORED, blocks]), (batch, tokens, lists or kv_heads, entries))
    for chosen in indices.reshape(-1, entries):
        some = rng.choice(entries, min(blocks, rng.integers(1, entries + 1)), replace=False)
        chosen[some] = rng.choice(blocks, len(some), replace=False)
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    shapes = (batch, tokens, heads, dim), (batch, slots, kv_heads, dim), (batch, slots, kv_heads, value_dim or dim)
    q, k, v = (torch.tensor(rng.standard_normal(shape), dtype=dtype) for shape in shapes)
    indices = torch.tensor(indices, dtype=torch.int32)
    unread = torch.ones(batch, slots, kv_heads, dtype=torch.bool)
    for b, t, head in np.ndindex(*indices.shape[:3]):
        stop = slots if lengths is None else int(lengths[b]) - tokens + t + 1
        read = oracle.listed_slots(indices[b, t, head], block_size, slots, stop)
        unread[b, read, head * kv_heads // indices.shape[2]] = False
    k[unread], v[unread] = float("inf"), float("nan")
    k[..., ::2][unread] = float("nan")
    return q, k, None if value_dim == 0 else v, indices, lengths


def paged(case, page, block_size, seed=1):
    """The same call with its cache in shuffled pages: unused pages of NaN, garbage in table entries of unread pages."""
    q, k, v, indices, lengths = case
    batch, slots = k.shape[:2]
    pages = -(-slots // page)
    order = torch.randperm(batch * pages + 3, generator=torch.Generator(k.device).manual_seed(seed))
    table = order[: batch * pages].reshape(batch, pages).to(torch.int32)
    pools = []
    for cache in (k, v):
        pool = torch.full((len(order), page, *k.shape[2:3], cache.shape[-1]), float("nan"), dtype=k.dtype)
        for b, entries in enumerate(table):
            rows = torch.full((pages * page, *pool.shape[2:]), float("nan"), dtype=k.dtype)
            rows[:slots] = cache[b]
            pool[entries.long()] = rows.unflatten(0, (pages, page))
        pools.append(pool)
    unread = torch.ones_like(table, dtype=torch.bool)
    for b, t, head in np.ndindex(*indices.shape[:3]):
        stop = int(lengths[b]) - indices.shape[1] + t + 1
        unread[b, oracle.listed_slots(indices[b, t, head], block_size, slots, stop) // page] = False
    table[unread] = 2**30
    return (q, *pools, indices, lengths), table


def check(case, block_size, *, config=None, out_dtype=None, **options):
    q, k, v, indices, lengths = case
    options |= dict(block_size=block_size, scale=q.shape[-1] ** -0.5)
    if config is None:
        out, lse = tk.decode_block_sparse(*case, out_dtype=out_dtype, **options)
    else:
        out, lse = OP.run(*case, config=config, **options)
    expected, expected_lse = oracle.decode_block_sparse(*case, **options)
    assert out.dtype == (out_dtype or q.dtype) and lse.dtype == F32
    assert oracle.worst(out, expected) < max(OUT_LIMIT[q.dtype], OUT_LIMIT[out.dtype])
    assert oracle.worst_lse(lse, expected_lse) < LSE_LIMIT[q.dtype]
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 5, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("value_dim", [24, 0])
def test_block_sizes(dtype, block_size, value_dim):
    """Rows that end before, at and after the edge of a block; the last block of the cache is partial."""
    slots = 2 * block_size + block_size // 2
    sizes = dict(slots=slots, block_size=block_size, entries=3, heads=2, kv_heads=1, value_dim=value_dim, dtype=dtype)
    check(make([0, 1, block_size, block_size + 1, slots - 1, slots], **sizes), block_size)
    check(make(None, **sizes), block_size)


@pytest.mark.parametrize("value_dim", [32, 0])
@pytest.mark.parametrize(
    "heads, kv_heads, lists", [(3, 3, 3), (6, 2, 2), (6, 2, 6), (5, 1, 1), (16, 1, 16), (80, 1, 1)]
)
@pytest.mark.parametrize("block_size", [1, 64])
def test_heads_and_lists(heads, kv_heads, lists, block_size, value_dim):
    sizes = dict(heads=heads, kv_heads=kv_heads, lists=lists, block_size=block_size, value_dim=value_dim)
    lengths = [130, 77] if lists < 16 else [130]
    check(make(lengths, slots=130, entries=max(2, 50 // block_size), **sizes), block_size)


@pytest.mark.parametrize("tokens, lists", [(2, 2), (4, 2), (3, 4)])
@pytest.mark.parametrize("block_size, value_dim", [(16, 32), (16, 0), (64, 32)])
def test_tokens(tokens, lists, block_size, value_dim):
    """Every token has its own lists and sees one slot more than the one before it; short rows have empty queries."""
    sizes = dict(slots=150, tokens=tokens, lists=lists, block_size=block_size, entries=2, value_dim=value_dim)
    check(make([1, tokens, 65, 150], **sizes), block_size)


@pytest.mark.parametrize(
    "dim, value_dim", [(128, 128), (80, 80), (96, 96), (192, 128), (256, 256), (24, 8), (80, 0), (256, 0)]
)
def test_head_dims(dim, value_dim):
    for block_size, dtype in ((64, F16), (8, F16), (16, F32)):
        sizes = dict(slots=131, heads=3, kv_heads=1, block_size=block_size, entries=3, dim=dim, value_dim=value_dim)
        check(make([131, 70], dtype=dtype, **sizes), block_size)


@pytest.mark.parametrize("heads", [64, 128])
def test_compressed_entries(heads):
    """DeepSeek-V4's CSA: one KV head of 512 that is its own value, lists of entries alone, learned sinks."""
    case = make(None, slots=200, heads=heads, kv_heads=1, block_size=1, entries=90, dim=512, value_dim=0)
    check(case, 1, sinks=torch.linspace(-2, 2, heads))
    check(make([3, 150], slots=150, heads=heads, kv_heads=1, block_size=1, entries=66, dim=512, value_dim=0), 1)


@pytest.mark.parametrize(
    "block_size, page, tokens, dtype",
    [(1, 16, 1, F16), (16, 64, 2, F16), (64, 16, 1, F16), (128, 64, 1, F16), (64, 128, 2, DTYPES[-1]), (64, 64, 1, F16),
     (16, 24, 1, DTYPES[-1])],
)  # fmt: skip
def test_pages(block_size, page, tokens, dtype):
    """Pages that are a multiple of the block, part of it, and neither."""
    sizes = dict(slots=260, tokens=tokens, block_size=block_size, entries=3, dtype=dtype)
    case = make([0, page + 1, 260], **sizes)
    expected, expected_lse = check(case, block_size)
    case, table = paged(case, page, block_size)
    out, lse = check(case, block_size, page_table=table)
    assert torch.allclose(out, expected, rtol=0, atol=OUT_LIMIT[dtype])
    assert torch.equal(lse.isneginf(), expected_lse.isneginf())
    strided = table.repeat_interleave(2, 1)[:, ::2]
    options = dict(block_size=block_size, scale=case[0].shape[-1] ** -0.5, page_table=strided)
    assert torch.equal(tk.decode_block_sparse(*case, **options)[0], out)
    q, pool, _, indices, lengths = case
    check((q, pool, None, indices, lengths), block_size, page_table=table)


@pytest.mark.parametrize("value_dim", [32, 0])
@pytest.mark.parametrize("block_size, slots, entries", [(64, 130, 2), (64, 310, 5), (8, 130, 6), (1, 300, 160)])
def test_sinks_softcap_out_dtype(block_size, slots, entries, value_dim):
    """With one split and with several: a sink enters once."""
    sizes = dict(slots=slots, block_size=block_size, entries=entries, value_dim=value_dim, heads=6)
    q, *rest = make([0, slots, slots - 3], **sizes)
    sinks = torch.tensor([-3.0, 0.0, 2.5, 8.0, -1e4, 1e4])
    out, lse = check((q * 4, *rest), block_size, sinks=sinks, softcap=5.0)
    assert (out[0] == 0).all() and torch.allclose(lse[0], sinks.expand(1, -1))
    check((q * 4, *rest), block_size, softcap=0.5, out_dtype=F32)
    check((q, *rest), block_size, sinks=sinks.half())


@pytest.mark.parametrize("value_dim", [32, 0])
@pytest.mark.parametrize("block_size", [1, 8, 128])
def test_lists_without_a_block(block_size, value_dim):
    sizes = dict(slots=100, heads=2, kv_heads=1, block_size=block_size, entries=2, value_dim=value_dim)
    q, k, v, indices, lengths = make([100, 100], **sizes)
    k[:] = float("nan")
    v = None if v is None else v * float("nan")
    for ignored in (*IGNORED, 100):
        for given in (lengths, None):
            case = (q, k, v, torch.full_like(indices, ignored), given)
            out, lse = check(case, block_size)
            assert (out == 0).all() and lse.isneginf().all()


def test_empty_inputs():
    for value_dim in (32, 0):
        q, k, v, indices, _ = make([4, 4], slots=4, block_size=2, value_dim=value_dim)
        none = torch.zeros(2, dtype=torch.int32)
        for given in (none, None):
            case = (q, k[:, :0], None if v is None else v[:, :0], indices, given)
            out, lse = tk.decode_block_sparse(*case, block_size=2, scale=1.0)
            assert (out == 0).all() and lse.isneginf().all()
        case = (q[:0], k[:0], None if v is None else v[:0], indices[:0], none[:0])
        out, lse = tk.decode_block_sparse(*case, block_size=2, scale=1.0)
        assert out.shape == (0, 1, 4, 32) and lse.shape == (0, 1, 4)


@pytest.mark.parametrize("block_size, value_dim", [(1, 32), (64, 32), (8, 0)])
def test_read_nan_is_not_hidden(block_size, value_dim):
    q, k, v, indices, lengths = make([128, 128], slots=128, block_size=block_size, value_dim=value_dim)
    indices[..., 0] = 1
    indices[..., 1:] = -1
    case = (q, torch.ones_like(k), None if v is None else torch.ones_like(v), indices, lengths)
    case[1][0, block_size] = float("nan")
    out, lse = tk.decode_block_sparse(*case, block_size=block_size, scale=1.0)
    assert out[0].isnan().all() and lse[0].isnan().all() and (out[1] == 1).all()


@pytest.mark.parametrize("value_dim", [32, 0])
def test_a_block_may_be_longer_than_the_cache_and_a_numpy_integer(value_dim):
    q, k, v, _, lengths = case = make([100, 33], slots=100, block_size=128, entries=2, value_dim=value_dim)
    expected = check(case, 128)
    for block_size in (np.int64(128), 2**30, 2**31 - 1, 2**40):
        out, lse = tk.decode_block_sparse(*case, block_size=block_size, scale=q.shape[-1] ** -0.5)
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_rows_too_long_for_offsets_of_32_bits_are_refused():
    far, too_far = (
        torch.empty_strided((1, 2, 1, 64), (1, stride, 1, 1), device="meta") for stride in (2**31 - 64, 2**31)
    )
    tk.runtime.check_rows("op", q=far)
    with pytest.raises(NotImplementedError, match=f"a row of q reaches over {2**31 + 63} elements"):
        tk.runtime.check_rows("op", q=too_far)


@pytest.mark.parametrize("block_size", [8, 64])
def test_strides(block_size):
    """Head-major caches, fused K and V, a q sliced out of a wider projection, lists cut out of longer ones."""
    q, k, v, indices, lengths = make([9, 100], slots=100, block_size=block_size)
    head_major = k.transpose(1, 2).contiguous().transpose(1, 2)
    fused = torch.cat([k, v], -1)
    wide = torch.cat([q, q], 2)[:, :, :4]
    longer = torch.cat([indices, indices], -1)[..., : indices.shape[-1]]
    expected = check((q, k, v, indices, lengths), block_size)
    apart = indices.transpose(2, 3).contiguous().transpose(2, 3)
    for case in ((q, head_major, v, longer), (wide, fused[..., :32], fused[..., 32:], apart)):
        out, lse = check((*case, lengths), block_size)
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    with pytest.raises(ValueError, match="last dimension of k"):
        tk.decode_block_sparse(
            q, k.repeat_interleave(2, -1)[..., ::2], v, indices, lengths, block_size=block_size, scale=1.0
        )


@pytest.mark.parametrize("value_dim", [32, 0])
@pytest.mark.parametrize("block_size", [4, 128])
def test_split_plans(block_size, value_dim):
    """One split, and so many that some end up without a seen slot; the same call gives the same bits."""
    sizes = dict(slots=250, heads=2, kv_heads=1, block_size=block_size, entries=256 // block_size)
    case = make([250, 1, 100], value_dim=value_dim, **sizes)
    few = plan.Config(32, 4, 2, 1, 2**20) if value_dim else plan.LatentConfig(32, 4, 2, 1, 2**20, rows=16)
    many = plan.Config(32, 4, 2, 4, 32) if value_dim else plan.LatentConfig(32, 4, 2, 4, 32, rows=16)
    for config in (few, many):
        first, again = (check(case, block_size, config=config) for _ in range(2))
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("batch, splits", [(64, 1), (16, 4), (1, 16)])
def test_default_plan_fills_an_h100(batch, splits):
    """MiniMax-M3's shape: no merge where the rows fill 132 SMs, as many splits as fill them otherwise."""
    ((_, grid, _, constants),) = offline.launches(OP, dict(B=batch, S=131072))
    assert grid[1] == splits and constants["BLOCK_N"] == plan.default_config(2, 128, 128, 16).block_n


def test_table_serves_whole_tiles(monkeypatch):
    monkeypatch.setattr(plan, "nearest", lambda *key: asdict(plan.Config(128, 4, 3, 2, 128)))
    for block_size, page, found in ((128, 0, True), (256, 128, True), (64, 0, False), (128, 64, False)):
        (launch,) = offline.launches(OP, dict(M=block_size, L=1, page=page))
        assert (launch[-1]["BLOCK_N"] == 128) == found


def test_early_copies():
    """Both orders of a 64-row program's copies."""
    case = make(None, slots=90, heads=33, kv_heads=1, block_size=3, entries=30, value_dim=0)
    for early in (False, True):
        check(case, 3, config=plan.LatentConfig(64, 8, 2, 1, 128, rows=64, early=early), softcap=3.0)


def test_launches_do_not_depend_on_values(monkeypatch):
    """The same grids and constants whatever lengths and lists hold: a captured graph can be replayed."""
    launches = []
    launch = runtime.launch

    def record(kernel, grid, *args, **options):
        launches.append((grid, options, [x for x in args if not isinstance(x, torch.Tensor)]))
        return launch(kernel, grid, *args, **options)

    monkeypatch.setattr(runtime, "launch", record)
    for value_dim in (32, 0):
        q, k, v, indices, lengths = make([5, 330], slots=330, block_size=16, entries=20, value_dim=value_dim)
        for case in ((q, k, v, indices, lengths), (q, k, v, indices.fill_(-1), lengths.fill_(0))):
            tk.decode_block_sparse(*case, block_size=16, scale=1.0)
        half = len(launches) // 2
        assert half == 2 and launches[:half] == launches[half:]
        launches.clear()


def wrong(**changes):
    q, k = torch.ones(2, 1, 4, 32), torch.ones(2, 40, 2, 32)
    given = dict(q=q, k=k, v=k, block_indices=torch.zeros(2, 1, 2, 3, dtype=torch.int32), block_size=8, scale=1.0)
    return given | dict(lengths=torch.ones(2, dtype=torch.int32)) | changes


@pytest.mark.parametrize(
    "changes, error, word",
    [
        (dict(block_indices=torch.zeros(2, 1, 3, 3, dtype=torch.int32)), ValueError, "block_indices"),
        (dict(block_indices=torch.zeros(2, 1, 2, 3)), TypeError, "block_indices"),
        (dict(block_size=0), ValueError, "block_size"),
        (dict(v=torch.ones(2, 40, 2, 32).half()), TypeError, "v"),
        (dict(lengths=torch.ones(3, dtype=torch.int32)), ValueError, "lengths"),
        (dict(sinks=torch.ones(3)), ValueError, "sinks"),
        (dict(softcap=0.0), ValueError, "softcap"),
        (dict(out_dtype=torch.float64), TypeError, "out_dtype"),
        ({name: wrong()[name].double() for name in "qkv"}, TypeError, "q must be"),
        (dict(q=torch.ones(2, 1, 4, 272), k=torch.ones(2, 40, 2, 272)), NotImplementedError, "H=272"),
        (dict(v=torch.ones(2, 40, 2, 272)), NotImplementedError, "V=272"),
        (dict(q=torch.ones(2, 1, 4, 528), k=torch.ones(2, 40, 2, 528), v=None), NotImplementedError, "H=528"),
        (dict(k=torch.ones(2, 40, 2, 32).char(), v=torch.ones(2, 40, 2, 32).char(), k_scale=torch.ones(2, 40, 2),
              v_scale=torch.ones(2, 40, 2)), NotImplementedError, "k_scale"),
    ],
)  # fmt: skip
def test_wrong_arguments(changes, error, word, monkeypatch):
    monkeypatch.setattr(runtime, "launch", lambda *args, **kwargs: pytest.fail("launched"))
    with pytest.raises(error, match=word):
        tk.decode_block_sparse(**wrong(**changes))
