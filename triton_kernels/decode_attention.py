"""Split-KV decode attention for MHA, GQA and MQA over a contiguous cache.

    s_tj = scale * q_t . k_j, softcap * tanh(s_tj / softcap) if capped, plus alibi_n (j - p);   query t of row b sees
    max(0, p + 1 - window) <= j <= p  with its position  p = lengths[b] - T + t
    out_t = sum_j exp(s_tj) v_j / (sum_j exp(s_tj) + exp(sink));   lse_t = log of that denominator

One program owns one row of the batch, one KV head, one block of query rows and one split of the keys. The T * G
queries that share a KV head are the rows of its MMAs, so every key is read once for all of them. Splits write
normalised float32 parts with their lse, and `merge.merge_kernel` combines them in a fixed order. With one split
the kernel writes the final output itself and no merge is launched.

Grids are static: lengths are read on the device, a split without keys leaves lse = -inf. Source: Flash-Decoding and
FlashAttention-2 (arXiv 2307.08691) for the algorithm; group packing as in FlashInfer (arXiv 2501.01005).
"""

import torch
import triton
import triton.language as tl

from torch_ref.ops import check
from triton_kernels import runtime
from triton_kernels.merge import over_cache
from triton_kernels.plan import Key, Record, block_rows, default_config, split_dim, sweep_tiles, value_chunks
from triton_kernels.tiles import cap_logits, cap_numbers, close_rows, key_range, load_tile, store_tile, weigh

MAX_HEAD_DIM = 256


@triton.jit(do_not_specialize=["window", "chunk"])
def decode_kernel(
    q, k, v, lengths, alibi, sinks, out, lse,
    q_stride_b, q_stride_t, q_stride_n, k_stride_b, k_stride_s, k_stride_k, v_stride_b, v_stride_s, v_stride_k,
    scale, softcap, inverse, window, chunk,
    T: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
    H1: tl.constexpr, H2: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SINK: tl.constexpr, HAS_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    FIXED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    # Row blocks of one head are neighbours in the grid: the second reads K and V from L2.
    head = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    split = tl.program_id(1)
    n_splits = tl.num_programs(1)
    batch = tl.program_id(2)

    row = block * ROWS + tl.arange(0, ROWS)
    t = row // G
    n = head * G + row % G
    real = row < T * G
    length = tl.load(lengths + batch)
    seen = length - T + t + 1
    if HAS_ALIBI:
        slope = tl.load(alibi + n, mask=real, other=0.0)
    start, end = key_range(length, block, split, n_splits, chunk, window, T, G, ROWS, BLOCK_N, HAS_WINDOW, FIXED)

    q_base = q + batch.to(tl.int64) * q_stride_b
    q_offsets = t * q_stride_t + n * q_stride_n
    q1 = load_tile(q_base, q_offsets, real, 0, H1, H, False)
    if H2 > 0:
        q2 = load_tile(q_base, q_offsets, real, H1, H2, H, False)
    # A cache can pass 2**31 elements: what grows with batch, head or position is 64-bit and scalar, so that the
    # offsets inside a tile stay 32-bit constants of the loop.
    j = tl.arange(0, BLOCK_N)
    k_base = k + batch.to(tl.int64) * k_stride_b + head.to(tl.int64) * k_stride_k
    v_base = v + batch.to(tl.int64) * v_stride_b + head.to(tl.int64) * v_stride_k
    k_offsets = j * k_stride_s
    v_offsets = j * v_stride_s

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc1 = tl.zeros([ROWS, V1], tl.float32)
    if V2 > 0:
        acc2 = tl.zeros([ROWS, V2], tl.float32)
    for tile in tl.range(start, end, BLOCK_N):
        key = tile + j
        inside = key < end
        k_tile = k_base + tl.cast(tile, tl.int64) * k_stride_s
        x = tl.dot(q1, load_tile(k_tile, k_offsets, inside, 0, H1, H, True), input_precision="ieee")
        if H2 > 0:
            x = tl.dot(q2, load_tile(k_tile, k_offsets, inside, H1, H2, H, True), x, input_precision="ieee")
        x = x * scale
        if HAS_CAP:
            x = cap_logits(x, softcap, inverse)
        if HAS_ALIBI:
            x += slope[:, None] * (key[None, :] - (seen - 1)[:, None]).to(tl.float32)
        visible = inside[None, :]
        if T > 1:  # a single query sees all of [start, end)
            visible = visible & (key[None, :] < seen[:, None])
            if HAS_WINDOW:
                visible = visible & (key[None, :] >= (seen - window)[:, None])
        x = tl.where(visible, x, float("-inf"))

        p, alpha, peak = weigh(x, peak)
        total = total * alpha + tl.sum(p, 1)
        # V is 0, not only unweighted, where nobody looks: 0 * NaN is NaN.
        v_tile = v_base + tl.cast(tile, tl.int64) * v_stride_s
        p = p.to(v.dtype.element_ty)
        v1 = load_tile(v_tile, v_offsets, inside, 0, V1, V, False)
        acc1 = tl.dot(p, v1, acc1 * alpha[:, None], input_precision="ieee")
        if V2 > 0:
            v2 = load_tile(v_tile, v_offsets, inside, V1, V2, V, False)
            acc2 = tl.dot(p, v2, acc2 * alpha[:, None], input_precision="ieee")

    index = ((batch * T + t) * HEADS + n).to(tl.int64) * n_splits + split
    factor, shrink, keep = close_rows(peak, total, lse, index, real, sinks, n, HAS_SINK, SPLIT)
    store_tile(out, index, keep, acc1 * factor[:, None] * shrink[:, None], 0, V1, V)
    if V2 > 0:
        store_tile(out, index, keep, acc2 * factor[:, None] * shrink[:, None], V1, V2, V)


def site(q, k, v, lengths, *, chunk=None, **options):
    """(Key, default) of a call. A fixed chunk takes nothing from the batch or the other rows, so no table either."""
    batch, tokens, heads, head_dim = q.shape
    slots, kv_heads, value_dim = v.shape[1:]
    rows = tokens * (heads // kv_heads)
    key = Key(runtime.FLOAT_DTYPES[q.dtype], head_dim, value_dim, rows, batch * kv_heads, slots)
    return None if chunk else key, default_config(q.element_size(), head_dim, value_dim, block_rows(rows))


def run(q, k, v, lengths, *, scale, softcap=None, chunk=None, alibi=None, config=None, **options):
    """`decode_attention` on arguments that were checked; `config` overrides the plan (for tuning)."""
    tokens, heads, head_dim = q.shape[1:]
    slots, kv_heads, value_dim = v.shape[1:]
    config = config or OP.config(q, *site(q, k, v, lengths, chunk=chunk))
    group = heads // kv_heads
    rows = block_rows(tokens * group)
    blocks = -(-tokens * group // rows)
    h1, h2 = split_dim(head_dim)
    v1, v2 = value_chunks(value_dim)
    numbers = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], float(scale), *cap_numbers(softcap)
    lengths = lengths.contiguous()
    slopes = lengths if alibi is None else alibi.float().contiguous()  # lengths: a tensor that is not read
    return over_cache(
        OP.name, decode_kernel, (q, k, v, lengths, slopes), numbers,
        programs=kv_heads * blocks, slots=slots, width=value_dim, config=config, chunk=chunk, **options,
        G=group, HEADS=heads, H=head_dim, V=value_dim, H1=h1, H2=h2, V1=v1, V2=v2,
        ROWS=rows, BLOCKS=blocks, BLOCK_N=config.block_n, HAS_CAP=softcap is not None, HAS_ALIBI=alibi is not None,
    )  # fmt: skip


def decode_attention(q, k, v, lengths, *, scale, window=None, sinks=None, softcap=None, page_table=None, k_scale=None,
                     v_scale=None, chunk=None, out_dtype=None, alibi=None):  # fmt: skip
    """Attention of the last T tokens of every row over its cache; the equation is at the top of this file.

    q: B T N H, k: B S K H, v: B S K V of one dtype (float16, bfloat16, float32), N a multiple of K, H and V at most
    256; any strides, the last dimension contiguous. lengths: int32 B, keys with the T new ones included, 0 to
    S (a CUDA tensor's values are not looked at).
    window: keys that a query sees, its own included. sinks: N, natural-log units, unscaled. softcap: 1e-30 to 1e38.
    alibi: float32 N, slopes in natural-log units; the logit of slot j grows by alibi_n (j - p), after scale and cap.
    chunk: keys of one split; results are then bitwise the same whatever else is in the batch. By default the number of
    splits follows from the shapes and the card.
    Returns out: B T N V in out_dtype (default q's dtype) and lse: float32 B T N, natural log, sink included.

    A query that sees no key gives out = 0 and lse = -inf, or its sink. Slots that no query may read can hold NaN or
    Inf. Raises ValueError for shapes, ranges, strides and devices, TypeError for dtypes and for CPU tensors outside the
    interpreter, NotImplementedError for page_table, k_scale, v_scale and wider heads; always before any launch.
    """
    options = dict(scale=scale, window=window, sinks=sinks, softcap=softcap, chunk=chunk, out_dtype=out_dtype,
                   alibi=alibi)  # fmt: skip
    unwritten = dict(page_table=page_table, k_scale=k_scale, v_scale=v_scale)
    check.decode_attention(q, k, v, lengths, **options, **unwritten)
    if page_table is not None:
        raise NotImplementedError(f"{OP.name}: page_table has no Triton kernel yet")
    if k_scale is not None or v_scale is not None:
        raise NotImplementedError(f"{OP.name}: quantised k and v (k_scale, v_scale) have no Triton kernel yet")
    widths = {"H": (q.shape[-1], MAX_HEAD_DIM), "V": (v.shape[-1], MAX_HEAD_DIM)}
    runtime.check_inputs(OP.name, widths, out_dtype, q=q, k=k, v=v)
    runtime.check_lengths(lengths, k)
    runtime.check_slots(OP.name, k=k, v=v)
    runtime.check_rows(OP.name, q=q)
    return run(q, k, v, lengths, **options)


def calls(device, *, B=1, T=1, N=32, K=8, S=4096, H=128, V=128, dtype="bfloat16", sinks=False, alibi=False, **options):
    """Arguments of `run` for full rows."""
    kind = dict(dtype=getattr(torch, dtype), device=device)
    lengths = torch.full((B,), S, dtype=torch.int32, device=device)
    zeros = torch.zeros(N, device=device)
    options |= dict(scale=H**-0.5, sinks=zeros if sinks else None, alibi=zeros if alibi else None)
    while True:
        q, k, v = (torch.randn(shape, **kind) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, V)))
        yield (q, k, v, lengths), options


OP = Record(
    "decode_attention", run=run, site=site, calls=calls, kernels=(decode_kernel,), sweep=sweep_tiles,
    # One split where S is 16.
    offline=(
        dict(), dict(S=16, sinks=True), dict(N=64, H=64, V=64, dtype="float16", window=2048, sinks=True),
        dict(N=8, H=64, V=64), dict(N=8, H=80, V=80), dict(N=48, H=96, V=96, softcap=9.0), dict(N=128, H=192, S=16),
        dict(N=64, H=192, V=192), dict(N=64, H=256, V=256, softcap=9.0, window=2048),
        dict(T=4, N=64, window=2048, softcap=9.0), dict(T=8, N=64, chunk=256), dict(N=1024, chunk=256),
        dict(T=4, N=128, H=192), dict(T=4, N=128, H=256, V=256, S=16), dict(T=4, N=128, H=192, V=192, softcap=9.0),
        dict(T=4, N=64, H=256, V=256), dict(T=4, N=128, H=80, V=80), dict(H=64, V=64, dtype="float32"),
        dict(dtype="float32"), dict(T=4, N=128, dtype="float32"),
        dict(T=4, N=64, H=96, V=96, dtype="float32", softcap=9.0, window=2048),
        dict(N=64, H=256, V=256, dtype="float32"), dict(T=4, N=128, H=256, V=256, dtype="float32"),
        dict(alibi=True), dict(T=4, N=64, alibi=True, softcap=9.0, window=2048),
    ),
    shapes=(
        dict(B=1, S=1024), dict(B=1, S=4096), dict(B=1, S=131072), dict(B=8, S=32768), dict(B=16, S=1024),
        dict(B=64, S=8192), dict(B=256, S=512), dict(B=16, K=32, S=8192), dict(B=64, N=8, K=1, S=32768),
        dict(B=1, N=64, S=4096, H=64, V=64), dict(B=64, N=64, S=8192, H=64, V=64),
        dict(B=16, N=8, K=4, S=8192, H=256, V=256), dict(B=16, N=16, K=16, S=8192, H=192),
    ),
)  # fmt: skip
