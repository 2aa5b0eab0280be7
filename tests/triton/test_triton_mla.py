"""decode_mla against float64 NumPy, in Triton's interpreter (on a GPU with TRITON_INTERPRET=0)."""

import pytest
import torch
import triton_oracle as oracle

import triton_kernels as tk
from triton_kernels import plan

F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16
OUT_LIMIT = {F16: 1e-3, BF16: 4e-3, F32: 1e-5}
LSE_LIMIT = 1e-3
DTYPES = [F16, F32] if tk.runtime.INTERPRETED else [F16, F32, BF16]
SEMANTIC = ("window", "sinks", "page_table")
pytestmark = pytest.mark.usefixtures("device", "poisoned_memory")


def make(lengths, *, slots, heads=4, latent=32, rope=8, tokens=1, dtype=F16, window=None, seed=0):
    """The tensors of a call, with NaN and Inf in every slot that no query of the row may read."""
    lengths = torch.tensor(lengths, dtype=torch.int32)
    rng = torch.Generator(lengths.device).manual_seed(seed)
    batch = len(lengths)
    q_latent, q_rope = (torch.randn(batch, tokens, heads, width, generator=rng).to(dtype) for width in (latent, rope))
    c, r = (torch.randn(batch, slots, width, generator=rng).to(dtype) for width in (latent, rope))
    for b, length in enumerate(lengths.tolist()):
        first = 0 if window is None else max(length - tokens + 1 - window, 0)
        for unread in (slice(0, min(first, length)), slice(length, slots)):
            c[b, unread], r[b, unread] = float("nan"), float("inf")
            c[b, unread, ::2] = float("inf")
    return q_latent, q_rope, c, r, lengths


def paged(case, page, seed=1):
    """The same call with its cache in shuffled pages: pools with unused pages of NaN, and a table full of garbage."""
    *q, c, r, lengths = case
    batch, slots = c.shape[:2]
    pages = -(-slots // page)
    order = torch.randperm(batch * pages + 3, generator=torch.Generator(c.device).manual_seed(seed))
    table = order[: batch * pages].reshape(batch, pages).to(torch.int32)
    pools = []
    for cache in (c, r):
        pool = torch.full((len(order), page, cache.shape[-1]), float("nan"), dtype=cache.dtype)
        for b, entries in enumerate(table):
            rows = torch.full((pages * page, cache.shape[-1]), float("nan"), dtype=cache.dtype)
            rows[:slots] = cache[b]
            pool[entries.long()] = rows.unflatten(0, (pages, page))
        pools.append(pool)
    for b, length in enumerate(lengths.tolist()):
        table[b, -(-length // page) :] = 2**30 if b % 2 else -1
    return (*q, *pools, lengths), table


def check(case, **options):
    q_latent, q_rope, *_ = case
    scale = (q_latent.shape[-1] + q_rope.shape[-1]) ** -0.5
    out, lse = tk.decode_mla(*case, scale=scale, **options)
    expected, expected_lse = oracle.decode_mla(
        *case, scale=scale, **{k: v for k, v in options.items() if k in SEMANTIC}
    )
    assert out.dtype == options.get("out_dtype", q_latent.dtype) and lse.dtype == F32
    assert oracle.worst(out, expected) < max(OUT_LIMIT[q_latent.dtype], OUT_LIMIT[out.dtype])
    assert oracle.worst_lse(lse, expected_lse) < LSE_LIMIT
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, chunk", [(4, None), (4, 64), (4, 50), (33, None)])
def test_lengths(dtype, heads, chunk):
    block = plan.default_latent_config(dtype.itemsize, 32, 1, heads).block_n
    lengths = [0, 1, block - 1, block, block + 1, 2 * block + 1, 150] if heads < 33 else [block - 1, block + 1, 110]
    check(make(lengths, slots=max(lengths), heads=heads, dtype=dtype), chunk=chunk)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, tokens", [(1, 1), (1, 2), (4, 2), (16, 1), (16, 2), (20, 1), (20, 2), (5, 3), (80, 1)])
def test_heads_and_tokens(dtype, heads, tokens):
    check(make([0, 1, tokens, 70], slots=70, heads=heads, tokens=tokens, dtype=dtype))


@pytest.mark.parametrize("latent, rope", [(64, 16), (16, 4), (48, 24), (128, 64), (512, 64)])
def test_widths(latent, rope):
    check(make([33, 70], slots=70, heads=3, latent=latent, rope=rope))
    check(make([20], slots=40, heads=3, latent=latent, rope=rope, dtype=F32), chunk=17)


@pytest.mark.parametrize("heads", [16, 128])
def test_full_size(heads):
    """The widths of DeepSeek-V2 and V3 at both ends of their head counts, in pages."""
    case, table = paged(make([1, 100], slots=128, heads=heads, latent=512, rope=64), 64)
    check(case, page_table=table, sinks=torch.linspace(-2, 2, heads))


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("window, chunk", [(1, None), (31, 32), (64, None), (1000, 50)])
def test_window(tokens, window, chunk):
    case = make([0, 3, 64, 130], slots=130, tokens=tokens, window=window)
    check(case, window=window, chunk=chunk)
    case, table = paged(case, 16)
    check(case, window=window, chunk=chunk, page_table=table)


@pytest.mark.parametrize("tokens, chunk, slots", [(1, None, 20), (1, None, 150), (2, 48, 150)])
def test_sinks_and_out_dtype(tokens, chunk, slots):
    case = make([0, 1, slots - 3], slots=slots, heads=6, tokens=tokens)
    sinks = torch.tensor([-3.0, 0.0, 2.5, 8.0, -1e4, 1e4])
    out, lse = check(case, sinks=sinks, chunk=chunk, out_dtype=F32)
    assert (out[0] == 0).all() and torch.allclose(lse[0], sinks.expand(tokens, -1))
    check(case, sinks=sinks.half(), chunk=chunk, window=9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "page, heads, tokens, chunk", [(16, 4, 1, None), (64, 4, 2, None), (64, 33, 1, 50), (128, 4, 2, 64)]
)
def test_pages(dtype, page, heads, tokens, chunk):
    lengths = [0, 1, page - 1, page, page + 1, 2 * page + 22] if heads < 33 else [0, page + 22]
    case = make(lengths, slots=max(lengths), heads=heads, tokens=tokens, dtype=dtype)
    expected = check(case, chunk=chunk)
    case, table = paged(case, page)
    out, lse = check(case, page_table=table, chunk=chunk)
    assert oracle.worst(out, expected[0].double().cpu().numpy()) < OUT_LIMIT[dtype]
    assert torch.equal(lse.isneginf(), expected[1].isneginf())
    strided = table.repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(tk.decode_mla(*case, scale=1.0, page_table=strided, chunk=chunk)[0].isnan(), out.isnan())


@pytest.mark.parametrize(
    "heads, window, tokens, page", [(4, None, 1, 0), (4, 40, 2, 0), (4, None, 1, 16), (33, 40, 1, 32)]
)
def test_chunk_is_batch_invariant(heads, window, tokens, page):
    """A row's bits are the same alone, in a batch, and in a cache with more slots."""
    lengths = [0, 30, 130] if heads < 33 else [0, 130]
    case = make(lengths, slots=256, heads=heads, latent=16, tokens=tokens, window=window)
    options = dict(scale=0.2, chunk=40, window=window, sinks=torch.linspace(-2, 2, heads))
    table = None
    if page:
        case, table = paged(case, page)
    q_latent, q_rope, c, r, n = case
    out, lse = tk.decode_mla(*case, page_table=table, **options)
    again, lse_again = tk.decode_mla(*case, page_table=table, **options)
    assert torch.equal(out, again) and torch.equal(lse, lse_again)
    for b, length in enumerate(lengths):
        row = slice(b, b + 1)
        for slots in {max(length, 1), 256}:
            cache = (c, r) if page else (c[row, :slots], r[row, :slots])
            mine = table[row, : -(-slots // page)] if page else None
            alone = tk.decode_mla(q_latent[row], q_rope[row], *cache, n[row], page_table=mine, **options)
            assert torch.equal(alone[0][0], out[b]) and torch.equal(alone[1][0], lse[b])


@pytest.mark.parametrize("tokens", [1, 2])
def test_visible_nan_is_not_hidden(tokens):
    case = make([9, 9], slots=9, tokens=tokens)
    case[2][0, 3] = float("nan")
    case[3][1] = float("nan")
    out, lse = tk.decode_mla(*case, scale=1.0)
    assert out.isnan().all() and lse.isnan().all()


def test_empty_inputs():
    q_latent, q_rope, c, r, _ = make([4, 4], slots=4)
    none = torch.zeros(2, dtype=torch.int32)
    for cache, table in (((c[:, :0], r[:, :0]), None), ((c[:, :1].expand(2, 16, 32), r[:, :1].expand(2, 16, 8)), none)):
        table = None if table is None else table[:, None][:, :0]
        out, lse = tk.decode_mla(q_latent, q_rope, *cache, none, scale=1.0, page_table=table)
        assert (out == 0).all() and lse.isneginf().all()
    out, lse = tk.decode_mla(q_latent[:0], q_rope[:0], c[:0], r[:0], none[:0], scale=1.0)
    assert out.shape == (0, 1, 4, 32) and lse.shape == (0, 1, 4)


def test_strides():
    """Latent and rope key in one fused cache, and queries sliced out of one projection."""
    case = make([9, 100], slots=100)
    expected = check(case)
    q_latent, q_rope, c, r, lengths = case
    q, fused = torch.cat([q_latent, q_rope], -1), torch.cat([c, r], -1)
    out, lse = check((q[..., :32], q[..., 32:], fused[..., :32], fused[..., 32:], lengths))
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
