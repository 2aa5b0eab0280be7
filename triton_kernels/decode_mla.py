"""Split-KV decode attention over a latent cache (absorbed MLA), contiguous or paged.

    s_tj = scale * (q_latent_t . latent_j + q_rope_t . k_rope_j);   query t of row b sees
    max(0, p + 1 - window) <= j <= p  with its position  p = lengths[b] - T + t
    out_t = sum_j exp(s_tj) latent_j / (sum_j exp(s_tj) + exp(sink));   lse_t = log of that denominator

All N heads share the one latent, so the T * N queries of a row of the batch are the rows of its MMAs, in blocks of
ROWS. A tile of the latent is copied to shared memory once and used twice: transposed as keys, and as it is as values.
Splits, their parts and the merge are those of `decode_attention`. Strides of a slot are compile-time constants, which
leaves the registers of their multiples to the accumulator.

Layouts. With 64 rows and 8 warps, Triton repeats a product in both warpgroups if another product depends on it, and
shares its columns between them if none does. It looks for a dependence through values, not through branches and not
through sums of scaled products, so the scores are written that way: half the MMA instructions for q . k.

Copies. Triton issues the copy of the next tile after everything that it can place before it; with two stages only the
last product would then hide it. It places a branch after the copies, so with EARLY the softmax and the second product
stand in one that is always taken: the next tile is under way as soon as q . k has been issued.

In a paged cache tiles start at multiples of BLOCK_N and BLOCK_N divides the page, so a tile lies in one page; its
number is loaded one tile ahead. Source: DeepSeek-V2 (arXiv 2405.04434) for the absorbed form, FlashMLA for the layout.
"""

import torch
import triton
import triton.language as tl

from torch_ref.ops import check
from triton_kernels import runtime
from triton_kernels.merge import over_cache
from triton_kernels.plan import Key, Record, default_latent_config, mma_width, sweep_latents
from triton_kernels.tiles import absorb, close_rows, key_range, load_tile, store_tile

MIN_PAGE = 16


@triton.jit
def page_of(page_table, tile, start, end, PAGE: tl.constexpr):
    """Number of the page that holds key `tile`; 0 and no read past the split's last key."""
    return tl.load(page_table + tile // PAGE, mask=(tile < end) & (start < end), other=0)


@triton.jit
def query_rows(block, ROWS: tl.constexpr, N: tl.constexpr, T: tl.constexpr):
    """Token and head of the rows of a block, and which rows exist."""
    row = block * ROWS + tl.arange(0, ROWS)
    return row // N, row % N, row < T * N


@triton.jit(do_not_specialize=["window", "chunk"])
def mla_kernel(
    q_latent, q_rope, latent, k_rope, lengths, page_table, sinks, out, lse,
    ql_stride_b, ql_stride_t, ql_stride_n, qr_stride_b, qr_stride_t, qr_stride_n,
    latent_stride_b, rope_stride_b, table_stride,
    scale, window, chunk,
    T: tl.constexpr, N: tl.constexpr, C: tl.constexpr, R: tl.constexpr, C_PAD: tl.constexpr, R_PAD: tl.constexpr,
    LATENT_STRIDE: tl.constexpr, ROPE_STRIDE: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SINK: tl.constexpr, FIXED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    # Row blocks of one split are neighbours in the grid: the second reads the latent from L2.
    block = tl.program_id(0)
    split = tl.program_id(1)
    n_splits = tl.num_programs(1)
    batch = tl.program_id(2)

    t, n, real = query_rows(block, ROWS, N, T)
    length = tl.load(lengths + batch)
    seen = length - T + t + 1
    start, end = key_range(length, block, split, n_splits, chunk, window, T, N, ROWS, BLOCK_N, HAS_WINDOW, FIXED)

    ql_base = q_latent + batch.to(tl.int64) * ql_stride_b
    ql = load_tile(ql_base, t * ql_stride_t + n * ql_stride_n, real, 0, C_PAD, C, False)
    qr_base = q_rope + batch.to(tl.int64) * qr_stride_b
    qr = load_tile(qr_base, t * qr_stride_t + n * qr_stride_n, real, 0, R_PAD, R, False)

    # What grows with batch, page or position is 64-bit and scalar; offsets inside a tile are constants of the loop.
    j = tl.arange(0, BLOCK_N)
    first = start
    if PAGE > 0:
        first = start // BLOCK_N * BLOCK_N
        table = page_table + batch.to(tl.int64) * table_stride
        page = page_of(table, first, start, end, PAGE)
        end = tl.where(start < end, end, first)  # an empty split has no tile, its aligned first one included
    else:
        latent += batch.to(tl.int64) * latent_stride_b
        k_rope += batch.to(tl.int64) * rope_stride_b

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    acc = tl.zeros([ROWS, C_PAD], tl.float32)
    for tile in tl.range(first, end, BLOCK_N):
        key = tile + j
        inside = key < end
        if PAGE > 0:
            inside = inside & (key >= start)
            slot = tl.cast(tile % PAGE, tl.int64)
            latent_tile = latent + page.to(tl.int64) * latent_stride_b + slot * LATENT_STRIDE
            rope_tile = k_rope + page.to(tl.int64) * rope_stride_b + slot * ROPE_STRIDE
            page = page_of(table, tile + BLOCK_N, start, end, PAGE)
        else:
            latent_tile = latent + tl.cast(tile, tl.int64) * LATENT_STRIDE
            rope_tile = k_rope + tl.cast(tile, tl.int64) * ROPE_STRIDE
        # Values are 0, not only unweighted, where nobody looks: 0 * NaN is NaN.
        r = load_tile(rope_tile, j * ROPE_STRIDE, inside, 0, R_PAD, R, True)
        c = load_tile(latent_tile, j * LATENT_STRIDE, inside, 0, C_PAD, C, False)
        # Two sums and a branch, for the layout of the MMAs: see "Layouts" at the top of this file.
        x_rope = tl.dot(qr, r, input_precision="ieee")
        x = tl.dot(ql, tl.trans(c), input_precision="ieee")
        x = x * scale + x_rope * scale
        if (tile < start) | (tile + BLOCK_N > end):
            x = tl.where(inside[None, :], x, float("-inf"))
        if EARLY:
            if tile < end:  # always; see "Copies" at the top of this file
                peak, total, acc = absorb(x, c, key, seen, window, peak, total, acc, T, HAS_WINDOW)
        else:
            peak, total, acc = absorb(x, c, key, seen, window, peak, total, acc, T, HAS_WINDOW)

    total = tl.sum(total, 1)
    # Anew, in a form that the compiler cannot tell to be the first one: kept through the loop, the rows would spill.
    t, n, real = query_rows(block + tl.minimum(length, 0), ROWS, N, T)
    index = ((batch * T + t) * N + n).to(tl.int64) * n_splits + split
    factor, shrink, keep = close_rows(peak, total, lse, index, real, sinks, n, HAS_SINK, SPLIT)
    store_tile(out, index, keep, acc * factor[:, None] * shrink[:, None], 0, C_PAD, C)


def site(q_latent, q_rope, latent, k_rope, lengths, *, page_table=None, chunk=None, **options):
    """(Key, default) of a call. A fixed chunk takes nothing from the batch or the other rows, so no table either; and
    tables are measured with one token: the mask of several takes more registers.
    """
    batch, tokens, heads, latent_dim = q_latent.shape
    slots = latent.shape[1] * (1 if page_table is None else page_table.shape[1])
    dtype = runtime.FLOAT_DTYPES[q_latent.dtype]
    key = Key(dtype, latent_dim + q_rope.shape[-1], latent_dim, tokens * heads, batch, slots)
    default = default_latent_config(q_latent.element_size(), latent_dim, tokens, heads)
    return None if chunk or tokens > 1 else key, default


def run(q_latent, q_rope, latent, k_rope, lengths, *, scale, page_table=None, chunk=None, config=None, **options):
    """`decode_mla` on arguments that were checked; `config` overrides the plan (for tuning)."""
    tokens, heads, latent_dim = q_latent.shape[1:]
    rope_dim = q_rope.shape[-1]
    page = 0 if page_table is None else latent.shape[1]
    place = site(q_latent, q_rope, latent, k_rope, lengths, page_table=page_table, chunk=chunk)
    config = config or OP.config(q_latent, *place)
    table = lengths if page_table is None else page_table if page_table.stride(1) == 1 else page_table.contiguous()
    strides = *q_latent.stride()[:3], *q_rope.stride()[:3], latent.stride(0), k_rope.stride(0), table.stride(0)
    return over_cache(
        OP.name, mla_kernel, (q_latent, q_rope, latent, k_rope, lengths.contiguous(), table),
        (*strides, float(scale)), programs=-(-tokens * heads // config.rows),
        slots=latent.shape[1] if page_table is None else page_table.shape[1] * page, width=latent_dim,
        config=config, chunk=chunk, **options,
        N=heads, C=latent_dim, R=rope_dim, C_PAD=mma_width(latent_dim), R_PAD=mma_width(rope_dim),
        LATENT_STRIDE=latent.stride(1), ROPE_STRIDE=k_rope.stride(1), PAGE=page,
        ROWS=config.rows, BLOCK_N=min(config.block_n, page or config.block_n), EARLY=config.early,
    )  # fmt: skip


def decode_mla(q_latent, q_rope, latent, k_rope, lengths, *, scale, window=None, sinks=None, page_table=None,
               latent_scale=None, chunk=None, out_dtype=None):  # fmt: skip
    """Attention of the last T tokens of every row over its latent cache; the equation is at the top of this file.

    q_latent: B T N C, q_rope: B T N R, latent: B S C, k_rope: B S R of one dtype (float16, bfloat16, float32), C at
    most 512 and R at most 64; any strides, the last dimension contiguous. lengths: int32 B, keys with the T new ones
    included, 0 to S. page_table: int32 B P; then latent and k_rope are pools, `pages page C` and `pages page R`, page a
    power of two >= 16, S = P * page, and entries past ceil(length / page) are never read.
    window: keys that a query sees, its own included. sinks: N, natural-log units, unscaled.
    chunk: keys of one split; results are then bitwise the same whatever else is in the batch. By default the number of
    splits follows from the shapes and the card.
    Returns out_latent: B T N C in out_dtype (default q_latent's dtype) and lse: float32 B T N, natural log, sink
    included; W_uv of each head is the caller's to apply.

    A query that sees no key gives out = 0 and lse = -inf, or its sink. Slots that no query may read can hold NaN or
    Inf. Raises ValueError for shapes, ranges, strides and devices, TypeError for dtypes and for CPU tensors outside the
    interpreter, NotImplementedError for latent_scale, other page sizes and wider caches; always before any launch.
    """
    options = dict(scale=scale, window=window, sinks=sinks, page_table=page_table, chunk=chunk, out_dtype=out_dtype)
    check.decode_mla(q_latent, q_rope, latent, k_rope, lengths, **options, latent_scale=latent_scale)
    runtime.check_latents(OP.name, out_dtype, latent_scale, q_latent, q_rope, latent, k_rope)
    if page_table is not None and (latent.shape[1] < MIN_PAGE or latent.shape[1] & (latent.shape[1] - 1)):
        page = latent.shape[1]
        raise NotImplementedError(f"{OP.name}: the page size is {page}; allowed: powers of two from {MIN_PAGE}")
    runtime.check_lengths(lengths, latent, page_table)
    return run(q_latent, q_rope, latent, k_rope, lengths, **options)


def calls(device, *, B=1, T=1, N=128, S=4096, C=512, R=64, page=0, dtype="bfloat16", sinks=False, **options):
    """Arguments of `run` for full rows, in shuffled pages if `page` is given."""
    kind = dict(dtype=getattr(torch, dtype), device=device)
    cache = (B * S // page, page) if page else (B, S)
    lengths = torch.full((B,), S, dtype=torch.int32, device=device)
    options |= dict(scale=(C + R) ** -0.5, sinks=torch.zeros(N, device=device) if sinks else None)
    while True:
        shapes = (B, T, N, C), (B, T, N, R), (*cache, C), (*cache, R)
        table = torch.randperm(cache[0], device=device).int().view(B, -1) if page else None
        yield (*(torch.randn(shape, **kind) for shape in shapes), lengths), options | dict(page_table=table)


OP = Record(
    "decode_mla", run=run, site=site, calls=calls, kernels=(mla_kernel,), sweep=sweep_latents,
    # One split where S is 64.
    offline=(
        dict(S=64), dict(S=64, page=64, sinks=True), dict(page=64), dict(T=2, S=64, page=64, window=32, sinks=True),
        dict(N=16), dict(N=16, page=64, window=2048, chunk=256), dict(N=32, S=64), dict(S=64, page=64, dtype="float32"),
    ),
    shapes=(
        dict(B=128, S=4096), dict(B=16, S=16384), dict(B=1, S=4096), dict(B=64, N=64, S=8192),
        dict(B=128, N=16, S=4096), dict(B=1, N=16, S=4096),
    ),
)  # fmt: skip
