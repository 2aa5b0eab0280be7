"""Split decode attention over listed blocks of a cache, for MHA, GQA and MQA; contiguous or paged.

    s_tj = scale * q_t . k_j, softcap * tanh(s_tj / softcap) if capped;   query t of row b sees slot j if its list has
    block j // block_size and j < lengths[b] - T + t + 1 (without lengths: j < S)
    out_t = sum_j exp(s_tj) v_j / (sum_j exp(s_tj) + exp(sink));   lse_t = log of that denominator

One program owns one list, one block of the heads that share it, and one split of its positions: position i of a list is
slot i % block_size of its block i // block_size. The heads of a list are the rows of the MMAs, as in
`decode_attention`; queries of other tokens have other lists and other programs. Where tiles lie in one block, and in
one page, a tile is one address and its neighbours; otherwise every row of it is gathered by its own slot, which serves
any block size from 1 (tokens) on and any page size. An ignored or unseen slot has a mask and no address: nothing is
read for it. With v=None the kernel of `listed_latents` loads every row once and uses it twice.

Sources: NSA (arXiv 2502.11089) and MiniMax-M3 (MSA) for lists that a KV head's group shares, MoBA (arXiv 2502.13189)
for heads that choose alone, DeepSeek-V4 (CSA) for keys that are their own values.
"""

import torch
import triton
import triton.language as tl

from torch_ref.ops import check
from triton_kernels import listed_latents, runtime
from triton_kernels.merge import over_lists
from triton_kernels.plan import (
    Key,
    Record,
    block_rows,
    default_config,
    pow2_ceil,
    split_dim,
    sweep_latents,
    sweep_tiles,
    value_chunks,
)
from triton_kernels.tiles import (
    cap_logits,
    close_rows,
    listed_slot,
    load_tile,
    seen_slots,
    split_range,
    store_tile,
    tile_rows,
    weigh,
    whole_tiles,
)

MAX_HEAD_DIM, MAX_SHARED_DIM = 256, 512  # the second for rows that are keys and values at once


@triton.jit(do_not_specialize=["slots", "n_entries", "chunk"])
def block_sparse_kernel(
    q, k, v, block_indices, lengths, page_table, sinks, out, lse,
    q_stride_b, q_stride_t, q_stride_n, k_stride_b, k_stride_s, k_stride_k, v_stride_b, v_stride_s, v_stride_k,
    list_stride_b, list_stride_t, list_stride_n, table_stride,
    scale, softcap, inverse, slots, n_entries, chunk,
    T: tl.constexpr, LISTS: tl.constexpr, SHARE: tl.constexpr, G: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
    H1: tl.constexpr, H2: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_SINK: tl.constexpr, HAS_CAP: tl.constexpr, FIXED: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    # Blocks of heads of one list are neighbours in the grid: the second reads K and V from L2.
    block = tl.program_id(0) % BLOCKS
    number = tl.program_id(0) // BLOCKS
    split = tl.program_id(1)
    n_splits = tl.num_programs(1)
    head = number % LISTS
    t = number // LISTS % T
    batch = number // LISTS // T

    g = block * ROWS + tl.arange(0, ROWS)
    n = head * G + g
    real = g < G
    seen = seen_slots(lengths, batch, t, slots, T, HAS_LENGTHS)
    start, end = split_range(n_entries * BLOCK, split, n_splits, BLOCK_N, chunk, FIXED)

    q_base = q + batch.to(tl.int64) * q_stride_b + t * q_stride_t
    q1 = load_tile(q_base, n * q_stride_n, real, 0, H1, H, False)
    if H2 > 0:
        q2 = load_tile(q_base, n * q_stride_n, real, H1, H2, H, False)
    entries = block_indices + batch.to(tl.int64) * list_stride_b + t * list_stride_t + head * list_stride_n
    table = page_table + batch.to(tl.int64) * table_stride
    k += (head // SHARE).to(tl.int64) * k_stride_k
    v += (head // SHARE).to(tl.int64) * v_stride_k
    if PAGE == 0:
        k += batch.to(tl.int64) * k_stride_b
        v += batch.to(tl.int64) * v_stride_b

    j = tl.arange(0, BLOCK_N)
    lane = j
    if WHOLE:
        lane = 0
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc1 = tl.zeros([ROWS, V1], tl.float32)
    if V2 > 0:
        acc2 = tl.zeros([ROWS, V2], tl.float32)
    # The slots are loaded one tile ahead: a chain of loads inside a tile would have to share the pipeline's stages.
    next_slot, next_page = listed_slot(entries, table, start + lane, end, seen, BLOCK, PAGE)
    for tile in tl.range(start, end, BLOCK_N):
        slot, page = next_slot, next_page
        next_slot, next_page = listed_slot(entries, table, tile + BLOCK_N + lane, end, seen, BLOCK, PAGE)
        inside = slot >= 0
        if WHOLE:
            inside = inside & (slot + j < seen)
        k_tile, offsets = tile_rows(k, slot, page, j, k_stride_b, k_stride_s, PAGE, WHOLE)
        x = tl.dot(q1, load_tile(k_tile, offsets, inside, 0, H1, H, True), input_precision="ieee")
        if H2 > 0:
            x = tl.dot(q2, load_tile(k_tile, offsets, inside, H1, H2, H, True), x, input_precision="ieee")
        x = x * scale
        if HAS_CAP:
            x = cap_logits(x, softcap, inverse)
        x = tl.where(inside[None, :], x, float("-inf"))

        p, alpha, peak = weigh(x, peak)
        total = total * alpha + tl.sum(p, 1)
        # V is 0, not only unweighted, where nobody looks: 0 * NaN is NaN.
        v_tile, offsets = tile_rows(v, slot, page, j, v_stride_b, v_stride_s, PAGE, WHOLE)
        p = p.to(v.dtype.element_ty)
        v1 = load_tile(v_tile, offsets, inside, 0, V1, V, False)
        acc1 = tl.dot(p, v1, acc1 * alpha[:, None], input_precision="ieee")
        if V2 > 0:
            v2 = load_tile(v_tile, offsets, inside, V1, V2, V, False)
            acc2 = tl.dot(p, v2, acc2 * alpha[:, None], input_precision="ieee")

    index = (number.to(tl.int64) * G + g) * n_splits + split
    factor, shrink, keep = close_rows(peak, total, lse, index, real, sinks, n, HAS_SINK, SPLIT)
    store_tile(out, index, keep, acc1 * factor[:, None] * shrink[:, None], 0, V1, V)
    if V2 > 0:
        store_tile(out, index, keep, acc2 * factor[:, None] * shrink[:, None], V1, V2, V)


def site(q, k, v, block_indices, lengths, *, block_size, **options):
    """(Key, default) of a call; value_dim 0 stands for v=None."""
    batch, tokens, heads, head_dim = q.shape
    lists, n_entries = block_indices.shape[2:]
    if v is None:
        key, default = listed_latents.site(q, 0, lists, n_entries * block_size)
        return key._replace(value_dim=0), default
    group, value_dim = heads // lists, v.shape[-1]
    dtype = runtime.FLOAT_DTYPES[q.dtype]
    key = Key(dtype, head_dim, value_dim, group, batch * tokens * lists, n_entries * block_size)
    return key, default_config(q.element_size(), head_dim, value_dim, block_rows(group), most_ctas=2)


def run(q, k, v, block_indices, lengths, *, page_table=None, chunk=None, config=None, **options):
    """`decode_block_sparse` on arguments that were checked; `config` overrides the plan (for tuning)."""
    block_size = options["block_size"]
    key, default = site(q, k, v, block_indices, lengths, block_size=block_size)
    chosen = config or OP.config(q, None if chunk else key, default)  # tables look at the batch
    options |= dict(chunk=chunk, config=chosen)
    if v is None:
        return listed_latents.run(OP.name, q, None, k, None, block_indices, lengths, page_table, **options)
    page = 0 if page_table is None else k.shape[1]
    if config is None and not whole_tiles(block_size, page, chosen.block_n):
        options["config"] = default  # tables are measured with whole tiles
    h1, h2 = split_dim(key.head_dim)
    v1, v2 = value_chunks(key.value_dim)
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
    return over_lists(
        OP.name, block_sparse_kernel, (q, k, v), strides, k, block_indices, lengths, page_table, **options,
        width=key.value_dim, rows=block_rows(key.group),
        H=key.head_dim, V=key.value_dim, H1=h1, H2=h2, V1=v1, V2=v2,
    )  # fmt: skip


def decode_block_sparse(q, k, v, block_indices, lengths, *, block_size, scale, sinks=None, softcap=None,
                        page_table=None, k_scale=None, v_scale=None, chunk=None, out_dtype=None):  # fmt: skip
    """Attention of T tokens of every row over listed blocks of its cache; the equation is at the top of this file.

    q: B T N H, k: B S K H, v: B S K V of one dtype (float16, bfloat16, float32), N a multiple of K, H and V at most
    256; any strides, the last dimension contiguous. v=None: the values are k, loaded once, and H is at most 512.
    block_indices: int32 B T K L, one list for a KV head and its group, or B T N L, one for each head; blocks are
    distinct (the caller's duty) and in any order; -1 and what is not in 0 .. ceil(S / block_size) - 1 is ignored.
    block_size: >= 1; the last block of a cache can be partial. lengths: int32 B, keys with the T new ones included, 0
    to S; None: the lists alone decide. page_table: int32 B P; then k and v are pools, `pages page K H` and
    `pages page K V`, S = P * page, and only the entries of listed slots that a query sees are read.
    sinks: N, natural-log units, unscaled. softcap: 1e-30 to 1e38. chunk: slots of a list's blocks in one split (rounded
    up to whole tiles); results are then bitwise the same whatever else is in the batch, and if a list is made longer
    by -1.
    Returns out: B T N V in out_dtype (default q's dtype) and lse: float32 B T N, natural log, sink included.

    A query that sees no key gives out = 0 and lse = -inf, or its sink. Slots that no query may read can hold NaN or
    Inf. Raises ValueError for shapes, ranges, strides and devices, TypeError for dtypes and for CPU tensors outside the
    interpreter, NotImplementedError for quantised caches and wider heads; always before any launch.
    """
    options = dict(block_size=block_size, scale=scale, sinks=sinks, softcap=softcap, page_table=page_table)
    options |= dict(chunk=chunk, out_dtype=out_dtype)
    check.decode_block_sparse(q, k, v, block_indices, lengths, **options, k_scale=k_scale, v_scale=v_scale)
    if k_scale is not None or v_scale is not None:
        raise NotImplementedError(f"{OP.name}: quantised k and v (k_scale, v_scale) have no Triton kernel yet")
    runtime.check_lengths(lengths, k, page_table)
    runtime.check_slots(OP.name, k=k, v=v)
    runtime.check_rows(OP.name, q=q, block_indices=block_indices)
    widths = {"H": (q.shape[-1], MAX_SHARED_DIM if v is None else MAX_HEAD_DIM)}
    widths |= {} if v is None else {"V": (v.shape[-1], MAX_HEAD_DIM)}
    runtime.check_inputs(OP.name, widths, out_dtype, q=q, k=k, v=v)
    slots = k.shape[1] * (1 if page_table is None else page_table.shape[1])
    options["block_size"] = min(int(block_size), pow2_ceil(max(slots, 1)))  # what is longer is one block too
    return run(q, k, v, block_indices, lengths, **options)


def calls(device, *, B=1, T=1, N=64, K=4, S=4096, H=128, V=128, M=128, L=16, page=0, dtype="bfloat16", sinks=False,
          full=True, **options):  # fmt: skip
    """Arguments of `run`: one cache, other lists of L blocks of M. full: rows have lengths; V = 0: no v."""
    kind = dict(dtype=getattr(torch, dtype), device=device)
    cache = (B * S // page, page) if page else (B, S)
    q, k, v = (torch.randn(shape, **kind) for shape in ((B, T, N, H), (*cache, K, H), (*cache, K, V)))
    lengths = torch.full((B,), S, dtype=torch.int32, device=device) if full else None
    options |= dict(block_size=M, scale=H**-0.5, sinks=torch.zeros(N, device=device) if sinks else None)
    options |= dict(page_table=torch.randperm(cache[0], device=device).int().view(B, -1) if page else None)
    while True:
        lists = torch.rand(B, T, K, S // M, device=device).topk(L).indices.int()
        yield (q, k, v if V else None, lists, lengths), options


OP = Record(
    "decode_block_sparse", run=run, site=site, calls=calls,
    kernels=(block_sparse_kernel, listed_latents.latent_list_kernel),
    sweep=lambda key: sweep_tiles(key) if key.value_dim else sweep_latents(key),
    # Several splits where L * M is above 128; blocks and pages that are no multiple of a tile are gathered.
    offline=(
        dict(L=1), dict(T=2, page=128, sinks=True), dict(T=2, M=64, L=2, H=192), dict(T=2, N=4, M=16, H=64, V=64),
        dict(T=2, M=1, L=64, page=64, full=False), dict(T=2, M=16, L=4, H=256, V=256, page=16, sinks=True, softcap=9.0),
        dict(T=2, N=256, S=4800, M=8, L=8, page=24, softcap=9.0),
        dict(T=2, N=256, M=16, L=2, H=256, V=256, page=16, dtype="float32"),
        dict(T=2, K=1, H=512, V=0, M=1, L=512, full=False, sinks=True),
        dict(T=2, N=128, K=1, H=512, V=0, M=1, L=64, page=64, sinks=True, softcap=9.0),
        dict(T=2, N=4, K=1, V=0, page=128),
    ),
    shapes=(
        dict(B=64, S=131072), dict(B=16, S=131072), dict(B=1, S=131072), dict(B=64, S=65536, H=192, M=64),
        dict(B=64, K=1, S=32768, H=512, V=0, M=1, L=512, full=False),
        dict(B=64, N=128, K=1, S=32768, H=512, V=0, M=1, L=1024, full=False),
    ),
)  # fmt: skip
