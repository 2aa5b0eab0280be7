"""decode_attention and merge_states against float64 NumPy, in Triton's interpreter (on a GPU with TRITON_INTERPRET=0).

bfloat16 is tested on a GPU only: the interpreter multiplies its bit patterns.
"""

import pytest
import torch
import triton_oracle as oracle

import triton_kernels as tk
from triton_kernels import plan

F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16
OUT_LIMIT = {F16: 1e-3, BF16: 4e-3, F32: 1e-5}
LSE_LIMIT = 1e-3
DEVICE = "cpu" if tk.runtime.INTERPRETED else "cuda"
DTYPES = [F16, F32] if tk.runtime.INTERPRETED else [F16, F32, BF16]


pytestmark = pytest.mark.usefixtures("device", "poisoned_memory")


def make(lengths, *, slots, heads=2, kv_heads=1, dim=64, value_dim=None, tokens=1, dtype=F16, window=None, seed=0):
    """q, k, v, lengths with NaN in every slot that no query of the row may read (K: also Inf)."""
    rng = torch.Generator(DEVICE).manual_seed(seed)
    batch = len(lengths)
    q = torch.randn(batch, tokens, heads, dim, generator=rng).to(dtype)
    k = torch.randn(batch, slots, kv_heads, dim, generator=rng).to(dtype)
    v = torch.randn(batch, slots, kv_heads, value_dim or dim, generator=rng).to(dtype)
    for b, length in enumerate(lengths):
        first = 0 if window is None else max(length - tokens + 1 - window, 0)
        for unread in (slice(0, min(first, length)), slice(length, slots)):
            k[b, unread], v[b, unread] = float("inf"), float("nan")
            k[b, unread, :, ::2] = float("nan")
    return q, k, v, torch.tensor(lengths, dtype=torch.int32)


def check(q, k, v, lengths, **options):
    out, lse = tk.decode_attention(q, k, v, lengths, scale=q.shape[-1] ** -0.5, **options)
    semantic = {name: value for name, value in options.items() if name in ("window", "sinks", "softcap")}
    expected, expected_lse = oracle.decode_attention(q, k, v, lengths, scale=q.shape[-1] ** -0.5, **semantic)
    assert out.dtype == options.get("out_dtype", q.dtype) and lse.dtype == F32
    assert oracle.worst(out, expected) < max(OUT_LIMIT[q.dtype], OUT_LIMIT[out.dtype])
    assert oracle.worst_lse(lse, expected_lse) < LSE_LIMIT
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [None, 64, 100])
def test_lengths(dtype, chunk):
    block = plan.default_config(dtype.itemsize, 64, 64, 16).block_n
    lengths = [0, 1, block - 1, block, block + 1, 2 * block - 1, 2 * block + 1, 230]
    check(*make(lengths, slots=230, dtype=dtype), chunk=chunk)


@pytest.mark.parametrize(
    "heads, kv_heads, tokens", [(2, 2, 1), (6, 2, 1), (8, 1, 1), (5, 1, 3), (12, 2, 4), (8, 1, 4), (128, 1, 1)]
)
def test_groups_and_tokens(heads, kv_heads, tokens):
    lengths = [0, 1, tokens, 130] if heads < 128 else [130]
    check(*make(lengths, slots=130, heads=heads, kv_heads=kv_heads, tokens=tokens))


@pytest.mark.parametrize("heads, kv_heads, tokens", [(40, 1, 2), (34, 2, 4)])
def test_several_row_blocks(heads, kv_heads, tokens):
    check(*make([1, 100], slots=100, heads=heads, kv_heads=kv_heads, tokens=tokens, dim=16, window=20), window=20)


@pytest.mark.parametrize(
    "dim, value_dim", [(128, 128), (80, 80), (96, 96), (192, 128), (192, 192), (256, 256), (24, 8)]
)
def test_head_dims(dim, value_dim):
    check(*make([70, 131], slots=131, heads=3, dim=dim, value_dim=value_dim))
    check(*make([33], slots=40, dim=dim, value_dim=value_dim, dtype=F32), chunk=17)


@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("window, chunk", [(1, None), (63, 32), (64, None), (1000, 100)])
def test_window(tokens, window, chunk):
    lengths = [0, 3, 64, 160]
    case = make(lengths, slots=160, heads=3, tokens=tokens, window=window)
    check(*case, window=window, chunk=chunk)


@pytest.mark.parametrize("tokens, chunk, slots", [(1, None, 40), (1, None, 200), (2, 48, 200), (2, None, 200)])
def test_sinks_softcap_out_dtype(tokens, chunk, slots):
    q, k, v, lengths = make([0, 1, slots - 3], slots=slots, heads=6, kv_heads=2, tokens=tokens, dtype=F32)
    sinks = torch.tensor([-3.0, 0.0, 2.5, 8.0, -1e4, 1e4])
    out, lse = check(q * 4, k, v, lengths, sinks=sinks, softcap=5.0, chunk=chunk)
    assert (out[0] == 0).all() and torch.allclose(lse[0], sinks.expand(tokens, -1))
    check(q * 4, k, v, lengths, softcap=0.5, chunk=chunk, out_dtype=F16)
    check(q, k, v, lengths, sinks=sinks, window=9, chunk=chunk)


def test_large_logits():
    q, k, v, lengths = make([5, 90], slots=90, dtype=F32)
    out, lse = tk.decode_attention(q * 1e4, k, v, lengths, scale=1.0)
    expected, expected_lse = oracle.decode_attention(q * 1e4, k, v, lengths, scale=1.0)
    assert oracle.worst(out, expected) < 1e-5
    assert torch.allclose(lse.double(), torch.as_tensor(expected_lse, device=DEVICE), rtol=1e-6)


@pytest.mark.parametrize("tokens", [1, 2])
def test_visible_nan_is_not_hidden(tokens):
    q, k, v, lengths = make([9, 9], slots=9, tokens=tokens)
    k[0, 3] = float("nan")
    k[1] = float("nan")
    out, lse = tk.decode_attention(q, k, v, lengths, scale=1.0)
    assert out.isnan().all() and lse.isnan().all()


def test_empty_inputs():
    q, k, v, _ = make([4, 4], slots=4)
    out, lse = tk.decode_attention(q, k[:, :0], v[:, :0], torch.zeros(2, dtype=torch.int32), scale=1.0)
    assert (out == 0).all() and lse.isneginf().all()
    out, lse = tk.decode_attention(q[:0], k[:0], v[:0], torch.zeros(0, dtype=torch.int32), scale=1.0)
    assert out.shape == (0, 1, 2, 64) and lse.shape == (0, 1, 2)


def test_strides():
    """Head-major caches, fused K and V, and a q sliced out of a wider projection."""
    q, k, v, lengths = make([9, 100], slots=100, heads=6, kv_heads=2)
    head_major = k.transpose(1, 2).contiguous().transpose(1, 2)
    fused = torch.cat([k, v], -1)
    wide = torch.cat([q, q], 2)[:, :, :6]
    expected = check(q, k, v, lengths)
    for args in ((q, head_major, v), (wide, fused[..., :64], fused[..., 64:])):
        out, lse = check(*args, lengths)
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    with pytest.raises(ValueError, match="last dimension of k"):
        tk.decode_attention(q, k.transpose(1, 3).contiguous().transpose(1, 3), v, lengths, scale=1.0)


@pytest.mark.parametrize("window, tokens", [(None, 1), (70, 2)])
def test_chunk_is_batch_invariant(window, tokens):
    """A row's bits are the same alone, in a batch, and in a cache with more slots."""
    lengths = [0, 30, 160]
    q, k, v, n = make(lengths, slots=320, heads=4, kv_heads=2, dim=16, tokens=tokens, dtype=F32, window=window)
    options = dict(scale=0.1, chunk=40, window=window, sinks=torch.tensor([0.1, 1.0, -1.0, 3.0]))
    out, lse = tk.decode_attention(q, k, v, n, **options)
    again, lse_again = tk.decode_attention(q, k, v, n, **options)
    assert torch.equal(out, again) and torch.equal(lse, lse_again)
    for b, length in enumerate(lengths):
        row = slice(b, b + 1)
        for slots in {max(length, 1), 320}:
            alone, lse_alone = tk.decode_attention(q[row], k[row, :slots], v[row, :slots], n[row], **options)
            assert torch.equal(alone[0], out[b]) and torch.equal(lse_alone[0], lse[b])


def test_lengths_outside_of_the_cache_are_refused():
    q, k, v, lengths = make([5], slots=8)
    for n in (-1, 9):
        with pytest.raises(ValueError, match=rf"lengths\[0\] is {n}"):
            tk.decode_attention(q, k, v, torch.full_like(lengths, n), scale=1.0)


def test_slots_too_far_apart_for_offsets_of_32_bits_are_refused():
    """In a cache whose first dimension is the slot, the next slot of a row is a whole batch away."""
    q, k, v, lengths = make([2], slots=2, heads=1, kv_heads=1)
    expected = tk.decode_attention(q, k, v, lengths, scale=1.0)
    for stride, fits in ((tk.runtime.MAX_SLOT_STRIDE, True), (tk.runtime.MAX_SLOT_STRIDE + 1, False)):
        far = torch.empty(stride + k.shape[-1], dtype=k.dtype)
        far = far.as_strided(k.shape, (0, stride, 0, 1))
        far.copy_(k)
        if fits:
            assert torch.equal(tk.decode_attention(q, far, v, lengths, scale=1.0)[0], expected[0])
            continue
        with pytest.raises(NotImplementedError, match=f"k has {stride} elements from slot to slot"):
            tk.decode_attention(q, far, v, lengths, scale=1.0)


def test_merge_is_skipped_for_one_split():
    for slots, kernels in ((40, 1), (400, 2)):
        with tk.runtime.recorded() as launches:
            tk.decode_attention(*make([slots], slots=slots), scale=1.0)
        assert len(launches) == kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts, value_dim", [(1, 64), (3, 80), (33, 24), (70, 128)])
def test_merge_states(dtype, parts, value_dim):
    rng = torch.Generator(DEVICE).manual_seed(parts)
    outs = torch.randn(parts, 2, 2, 3, value_dim, generator=rng).to(dtype)
    lses = torch.randn(parts, 2, 2, 3, generator=rng) * 20
    lses[:, 0, 0, 0] = float("-inf")
    lses[parts // 2, 1] = float("-inf")
    outs[lses.isneginf()] = float("nan")
    out, lse = tk.merge_states(outs, lses)
    expected, expected_lse = oracle.merge_states(outs, lses)
    assert out.dtype == dtype and lse.dtype == F32
    assert oracle.worst(out, expected) < OUT_LIMIT[dtype]
    assert oracle.worst_lse(lse, expected_lse) < 1e-5
    strided = outs.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(tk.merge_states(strided, lses)[0], out)


def test_merge_of_parts_equals_one_call():
    q, k, v, lengths = make([128], slots=128, heads=4, dtype=F32)
    half = torch.tensor([64], dtype=torch.int32)
    sides = [tk.decode_attention(q, k[:, s : s + 64], v[:, s : s + 64], half, scale=0.2) for s in (0, 64)]
    out, lse = tk.merge_states(torch.stack([s[0] for s in sides]), torch.stack([s[1] for s in sides]))
    expected, expected_lse = tk.decode_attention(q, k, v, lengths, scale=0.2)
    assert torch.allclose(out, expected, atol=1e-6) and torch.allclose(lse, expected_lse, atol=1e-6)
