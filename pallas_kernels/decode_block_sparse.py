"""Split decode attention over listed blocks, or tokens, of a cache: for MHA, GQA and MQA, contiguous or paged.

The kernel is decode_attention's: keys on the rows of the MMA, query rows in boxes of 8 on its columns, a ring of K and
V tiles of 64 keys. The list takes the place of the tile counter: TMA copies its blocks, or the pages that they are made
of, several to a tile where they are smaller; the threads of a warpgroup gather single tokens. Every list is a row of
the batch of its own, shared by the heads of a KV head, or of one head where heads choose alone. With v=None the kernels
of decode_sparse_mla.py load each row once and use it twice. The work follows from the length of the lists alone.
"""

import functools
from dataclasses import replace

import jax

from jforge.ops import check
from pallas_kernels import limits, ring
from pallas_kernels.compat import TILE, jnp, lax, pl, plgpu
from pallas_kernels.decode_attention import KvFacts, consume, copy_in, launch_kv
from pallas_kernels.decode_attention import make_facts as dense_facts
from pallas_kernels.decode_sparse_mla import make_facts as shared_facts
from pallas_kernels.decode_sparse_mla import refuse_rows
from pallas_kernels.decode_sparse_mla import run as run_shared
from pallas_kernels.lists import Gathered, Listed, refuse
from pallas_kernels.plan import default_config
from pallas_kernels.tiles import Lists, keep, load_boxes

BLOCK_SIZES = (1, 8, 16, 32, 64, 128)


def decode_block_sparse(q, k, v, block_indices, lengths, *, block_size, scale, sinks=None, softcap=None,
                        page_table=None, k_scale=None, v_scale=None, chunk=None, out_dtype=None):  # fmt: skip
    """out_t = sum_s softmax_s(cap(scale * q_t . k_s)) v_s over s < lengths[b]-T+t+1 whose block is in the list.

    q: B T N H, k: B S K H, v: B S K V, or None where the values are the keys (or pools `pages page K H` with
    page_table: int32 B P) in float16 or bfloat16; block_indices: int32 B T K L, a list for the heads of each KV head,
    or B T N L, one for each head; lengths: int32 B or None; sinks: N. Returns out B T N V in `out_dtype` (default q's)
    and float32 lse B T N. Everything means what it means in jforge.ops.decode_block_sparse; `chunk` counts slots of the
    listed blocks and is as in decode_attention.py.

    Raises ValueError and TypeError from jforge.ops.check, and NotImplementedError for what has no kernel: float32 and
    float64, k_scale and v_scale, other block sizes than 1, 8, 16, 32, 64 and 128, empty sizes, B*T above 65535. Blocks:
    S or a page that is not a multiple of 8 (TMA), pages that neither divide a block nor are made of blocks, H and V
    that are not multiples of 16 or above 256. Tokens: H and V that are not multiples of 64 or above 256. v None:
    softcap, and H that is not a multiple of 64 or above 512. Lists for a KV head are those of NSA (arXiv 2502.11089)
    and MiniMax-M3 (arXiv 2606.13392), lists for a head those of MoBA (arXiv 2502.13189).
    """
    sizes = check.decode_block_sparse(
        q, k, v, block_indices, lengths, block_size=block_size, scale=scale, sinks=sinks, softcap=softcap,
        page_table=page_table, k_scale=k_scale, v_scale=v_scale, chunk=chunk, out_dtype=out_dtype,
    )  # fmt: skip
    limits.need(k_scale is None, "k_scale is given; the kernel reads float16 and bfloat16 caches only")
    known = ", ".join(map(str, BLOCK_SIZES))
    limits.need(block_size in BLOCK_SIZES, f"block_size is {block_size}; the kernels take {known}")
    B, T, N, K, H, X, L = (sizes[x] for x in "BTNKHXL")
    S = sizes["S"] if page_table is None else sizes["P"] * sizes["page"]
    if lengths is not None:
        check.length_values(lengths, S)
    lists = Lists(T=T, count=X, K=K, L=L, size=int(block_size), S=S, page=sizes.get("page"))
    refuse(lists, q.dtype, out_dtype, B, N, ("q", "k", "block_indices"))
    if v is None:
        limits.need(softcap is None, f"softcap is {softcap} and v is None; the kernel for shared rows has no cap")
        refuse_rows("k", H)
        facts = shared_facts(B, N, H, 0, lists, q.dtype, out_dtype, scale=scale, chunk=chunk)
        return run_shared(q, None, _flat(k, lists), None, block_indices, lengths, page_table, sinks, facts)
    _refuse(lists, H, sizes["V"])
    options = dict(scale=scale, softcap=softcap, chunk=chunk)
    facts = make_facts(B, N, H, sizes["V"], lists, q.dtype, out_dtype, **options)
    return run(q, k, v, block_indices, lengths, page_table, sinks, facts)


def _refuse(lists, H, V) -> None:
    """NotImplementedError for shapes without a kernel."""
    size, page = lists.size, lists.page
    for name, axis, width in (("q", "H", H), ("v", "V", V)):
        limits.width(name, axis, width, 64 if size == 1 else 16, 256, f" with block_size {size}")
    name = f"S={lists.S}" if page is None else f"page={page}"
    limits.need(size == 1 or (page or lists.S) % 8 == 0, f"k has {name} slots; TMA needs a multiple of 8")
    whole = page is None or page % size == 0 or size % page == 0
    limits.need(whole, f"k has page={page} slots; with block_size {size} it must be its multiple or divide it")


def _flat(cache, lists):
    """A pool as one row of slots, for kernels that look for tokens; a cache without pages as it is."""
    return cache if lists.page is None else cache.reshape(1, -1, *cache.shape[2:])


def make_facts(B, N, H, V, lists, dtype, out_dtype, **options) -> KvFacts:
    """The plan of dense attention over as many keys as a list has, by its table."""
    x = lists
    sizes = dict(B=B * x.T, T=1, S=x.keys, N=N, K=x.count, H=H, V=V)
    plan = dense_facts(sizes, dtype, out_dtype, **options)
    if x.size == 1 and plan.block != 64:  # the gather fills tiles of 64
        default = default_config(H, plan.width, plan.rows)
        plan = dense_facts(sizes, dtype, out_dtype, config=default, **options)
    return replace(plan, splits=x.even_splits(plan.splits, plan.block), lists=x)


@functools.partial(jax.jit, static_argnames="facts")
def run(q, k, v, lists, lengths, page_table, sinks, facts):
    """The decode kernel, and the merge kernel when there are splits. Reshapes only relabel; nothing is moved."""
    f, (B, T, N, _) = facts, q.shape
    batch, copies, more = B * T * f.K, f.block // f.piece, {}
    if f.lists.size == 1:
        copies = 1
        k, v, more = _flat(k, f.lists), _flat(v, f.lists), dict(rows_s=plgpu.SMEM((f.stages, f.block), jnp.int32))
    operands = dict(
        q=q.reshape(batch, 1, f.units, f.heads, f.H), k=k, v=v, lists=lists.reshape(batch, -1), lengths=lengths,
        pages=page_table, sinks=sinks if f.alone else None,
    )  # fmt: skip
    return launch_kv(_kernel, f, operands, (B, T, N), sinks, copies, "decode_block_sparse", **more)


def _kernel(f, given, out, lse, *, rows_s=None, **smem):
    """One program: query boxes of one list against one split of it."""
    tokens = f.lists.size == 1
    where, produce = (Tokens(f, given, rows_s), _gather) if tokens else (Blocks(f, given), copy_in)
    warpgroup = lax.axis_index("warpgroup")
    pl.when(warpgroup == 0)(lambda: consume(f, where, out, lse, **smem))
    pl.when(warpgroup == 1)(lambda: produce(f, where, given, **smem))


class Tokens(Gathered):
    """Tiles of tokens; the rows that are not seen were filled with zeros."""

    def tile(self, i):
        number = self.first + i
        return lambda: self.visible(number * self.f.block), lambda values: None


def _gather(f, where, given, *, k, v, q_s, q_full, **_):
    """Gather K and V tiles into the ring."""
    load_boxes(where, q_full, (given["q"], q_s))

    def copies(slot):
        return [(where.source(given[name]), lane.tiles.at[slot]) for name, lane in (("k", k), ("v", v))]

    ring.stream(f, where, copies, k, v, ahead=f.stages)


class Blocks(Listed):
    """Tiles of blocks, or of the pages that they are made of."""

    def pieces(self, i):
        """(row or page, its slots, how many of the first of them are seen) of every piece of the i-th tile.

        An entry that is ignored has the first block in its place, and one that lies past what the query sees, in a
        paged cache, the first page: both are there whatever the list and the page table say.
        """
        f, tile, pieces = self.f, self.first + i, []
        x, parts = f.lists, jnp.int32(f.lists.size // f.piece)
        for j in range(f.block // f.piece):
            number = tile * (f.block // f.piece) + j
            entry, part = lax.div(number, parts), lax.rem(number, parts)
            index = self.list[jnp.minimum(entry, x.L - 1)]
            listed = (entry < x.L) & (index >= 0) & (index < -(-x.S // x.size))
            at = jnp.where(listed, index, 0) * (x.size // f.piece) + part  # in pieces
            seen = jnp.where(listed, jnp.clip(self.limit - at * f.piece, 0, f.piece), 0)
            row = self.row
            if x.page is not None:
                count = x.page // f.piece
                page = self.pages[jnp.minimum(lax.div(at, jnp.int32(count)), x.S // x.page - 1)]
                row, at = jnp.where(seen > 0, page, 0), lax.rem(at, jnp.int32(count))
            pieces.append((row, pl.ds(at * f.piece, f.piece), seen))
        return pieces

    def tile(self, i):
        """As of a dense cache. Called before the waits, so that the list loads while the tile is under way."""
        f = self.f
        counts = [seen for *_, seen in self.pieces(i)]

        def within(shape):
            """Which keys, along axis 0, are among the first of their piece that are seen."""
            key = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=TILE)
            end = jnp.full(shape, counts[0])
            for j, count in enumerate(counts[1:], 1):
                end = jnp.where(key < j * f.piece, end, jnp.full(shape, count + j * f.piece))
            return key < end

        def blank(values):
            pl.when(sum(counts) < f.block)(lambda: keep(f, values, within))

        return lambda: within((f.block, f.rows)), blank
