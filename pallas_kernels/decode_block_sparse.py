"""Split decode attention over listed blocks, or tokens, of a cache: for MHA, GQA and MQA, contiguous or paged.

The kernel is decode_attention's: keys on the rows of the MMA, query rows in boxes of 8 on its columns, a ring of K and
V tiles of 64 keys. The list takes the place of the tile counter: TMA copies its blocks, or the pages that they are made
of, several to a tile where they are smaller; the threads of a warpgroup gather single tokens. Every list is a row of
the batch of its own, shared by the heads of a KV head, or of one head where heads choose alone. With v=None the kernels
of decode_sparse_mla.py load each row once and use it twice. The work follows from the length of the lists alone.
"""

import functools
import math
from dataclasses import dataclass

import jax

from jforge.ops import check
from pallas_kernels.compat import jnp, launch, plgpu, swizzled
from pallas_kernels.decode_attention import Facts as DenseFacts
from pallas_kernels.decode_attention import make_facts as dense_facts
from pallas_kernels.decode_block_sparse_kernel import kernel
from pallas_kernels.decode_listed import Lists, refuse
from pallas_kernels.decode_sparse_mla import make_facts as shared_facts
from pallas_kernels.decode_sparse_mla import refuse_rows
from pallas_kernels.decode_sparse_mla import run as run_shared
from pallas_kernels.merge_states import merge
from pallas_kernels.plan import default_config

BLOCK_SIZES = (1, 8, 16, 32, 64, 128)


def decode_block_sparse(q, k, v, block_indices, lengths, *, block_size, scale, sinks=None, softcap=None,
                        page_table=None, k_scale=None, v_scale=None, out_dtype=None):  # fmt: skip
    """out_t = sum_s softmax_s(cap(scale * q_t . k_s)) v_s over s < lengths[b]-T+t+1 whose block is in the list.

    q: B T N H, k: B S K H, v: B S K V in float16 or bfloat16; v None: the values are the keys. block_indices: int32
    B T K L, a list for the heads of each KV head, or B T N L, one for each head, of distinct blocks in any order; those
    outside 0..ceil(S/block_size)-1 are ignored wherever they stand, and the last block may be partial. lengths: int32
    B, or None: every slot of a listed block is seen. `sinks` (N) are logits in natural-log units, not scaled;
    cap(x) = softcap * tanh(x / softcap). Returns out B T N V in `out_dtype` (default q's) and float32 lse B T N:
    natural log, sink included. A query that sees nothing gives 0 and -inf (or its sink). Slots that no query may read
    may hold NaN. With `page_table` (int32 B P) k and v are pools `pages page K H`; only the entries of pages that a
    query reads are followed.

    Raises ValueError and TypeError from jforge.ops.check, and NotImplementedError for what has no kernel: float32 and
    float64, k_scale and v_scale, other block sizes than 1, 8, 16, 32, 64 and 128, empty sizes, B*T above 65535. Blocks:
    S or a page that is not a multiple of 8 (TMA), pages that neither divide a block nor are made of blocks, H and V
    that are not multiples of 16 or above 256. Tokens: H and V that are not multiples of 64 or above 256. v None:
    softcap, and H that is not a multiple of 64 or above 512. Lists for a KV head are those of NSA (arXiv 2502.11089)
    and MiniMax-M3 (arXiv 2606.13392), lists for a head those of MoBA (arXiv 2502.13189).
    """
    sizes = check.decode_block_sparse(
        q, k, v, block_indices, lengths, block_size=block_size, scale=scale, sinks=sinks, softcap=softcap,
        page_table=page_table, k_scale=k_scale, v_scale=v_scale, out_dtype=out_dtype,
    )  # fmt: skip
    if k_scale is not None:
        raise NotImplementedError("k_scale is given; the kernel reads float16 and bfloat16 caches only")
    if block_size not in BLOCK_SIZES:
        raise NotImplementedError(f"block_size is {block_size}; the kernels take {', '.join(map(str, BLOCK_SIZES))}")
    B, T, N, K, H, X, L = (sizes[x] for x in "BTNKHXL")
    S = sizes["S"] if page_table is None else sizes["P"] * sizes["page"]
    if lengths is not None:
        check.length_values(lengths, S)
    lists = Lists(T=T, count=X, K=K, L=L, size=int(block_size), S=S, page=sizes.get("page"))
    refuse(lists, q.dtype, out_dtype, B, N, ("q", "k", "block_indices"))
    out_dtype, scale, softcap = jnp.dtype(out_dtype or q.dtype), float(scale), softcap and float(softcap)
    if v is None:
        if softcap is not None:
            raise NotImplementedError(f"softcap is {softcap} and v is None; the kernel for shared rows has no cap")
        refuse_rows("k", H)
        facts = shared_facts(B, N, H, 0, lists, q.dtype, out_dtype, scale=scale)
        return run_shared(q, None, _flat(k, lists), None, block_indices, lengths, page_table, sinks, facts)
    _refuse(lists, H, sizes["V"])
    facts = make_facts(B, N, H, sizes["V"], lists, q.dtype, out_dtype, scale=scale, softcap=softcap)
    return run(q, k, v, block_indices, lengths, page_table, sinks, facts)


def _refuse(lists, H, V) -> None:
    """NotImplementedError for shapes without a kernel."""
    size, page = lists.size, lists.page
    multiple = 64 if size == 1 else 16
    for name, width in (("q has H", H), ("v has V", V)):
        if width % multiple or not 0 < width <= 256:
            reason = f"with block_size {size} the kernel takes multiples of {multiple} up to 256"
            raise NotImplementedError(f"{name}={width}; {reason}")
    if size > 1 and (page or lists.S) % 8:
        name = f"S={lists.S}" if page is None else f"page={page}"
        raise NotImplementedError(f"k has {name} slots; TMA needs a multiple of 8")
    if page is not None and page % size and size % page:
        raise NotImplementedError(
            f"k has page={page} slots; with block_size {size} it must be its multiple or divide it"
        )


def _flat(cache, lists):
    """A pool as one row of slots, for kernels that look for tokens; a cache without pages as it is."""
    return cache if lists.page is None else cache.reshape(1, -1, *cache.shape[2:])


@dataclass(frozen=True, kw_only=True)
class Facts(DenseFacts):
    """Everything static about one call. Every list is a row of the batch with one query; K counts a query's lists."""

    lists: Lists

    @property
    def tokens(self):
        """Whether keys are gathered one by one."""
        return self.lists.size == 1

    @property
    def piece(self):
        """Keys that one TMA copy brings in."""
        return math.gcd(self.lists.page or self.block, self.lists.size, self.block)


def make_facts(B, N, H, V, lists, dtype, out_dtype, *, scale, softcap=None, config=None) -> Facts:
    """The plan of decode_attention over as many keys as a list has. `config` overrides its table."""
    x = lists
    sizes = dict(B=B * x.T, T=1, S=x.L * x.size, N=N, K=x.count, H=H, V=V)
    options = dict(scale=scale, softcap=softcap)
    plan = dense_facts(sizes, dtype, out_dtype, config=config, **options)
    if x.size == 1 and plan.block != 64:  # the gather fills tiles of 64
        default = default_config(H, plan.width, plan.rows)
        plan = dense_facts(sizes, dtype, out_dtype, config=default, **options)
    splits = x.even_splits(plan.splits, plan.block)
    return Facts(**vars(plan) | dict(splits=splits), lists=lists)


@functools.partial(jax.jit, static_argnames="facts")
def run(q, k, v, lists, lengths, page_table, sinks, facts):
    """The decode kernel, and the merge kernel when there are splits. Reshapes only relabel; nothing is moved."""
    f, (B, T, N, _) = facts, q.shape
    alone, batch = f.splits == 1, B * T * f.K
    if f.tokens:
        k, v = _flat(k, f.lists), _flat(v, f.lists)
    operands = dict(
        q=q.reshape(batch, 1, f.units, f.heads, f.H), k=k, v=v, lists=lists.reshape(batch, -1), lengths=lengths,
        pages=page_table, sinks=sinks if alone else None,
    )  # fmt: skip
    operands = {name: array for name, array in operands.items() if array is not None}
    heads = (f.splits, batch, 1, f.units, f.heads)
    copies = 1 if f.tokens else f.block // f.piece
    keys, values = swizzled(f.H, 2), swizzled(f.V, 2)
    scratch = dict(
        q_s=plgpu.SMEM((f.rows, f.H), q.dtype, transforms=keys),
        k_s=plgpu.SMEM((f.stages, f.block, f.H), q.dtype, transforms=keys),
        v_s=plgpu.SMEM((f.stages, f.block, f.width), q.dtype, transforms=values),
        p_s=plgpu.SMEM((f.rows, f.block), q.dtype, transforms=values),
        out_s=plgpu.SMEM((f.rows, f.width), f.out_dtype if alone else jnp.float32),
        row_s=plgpu.SMEM((f.rows,), jnp.float32),
        q_full=plgpu.Barrier(num_arrivals=f.boxes),
        k_full=plgpu.Barrier(num_arrivals=copies, num_barriers=f.stages),
        v_full=plgpu.Barrier(num_arrivals=copies, num_barriers=f.stages),
        k_free=plgpu.Barrier(num_barriers=f.stages),
        v_free=plgpu.Barrier(num_barriers=f.stages),
    )
    if f.tokens:
        scratch |= dict(rows_s=plgpu.SMEM((f.stages, f.block), jnp.int32))
    out, lse = launch(
        functools.partial(kernel, f, tuple(operands)),
        *operands.values(),
        out_type=[
            jax.ShapeDtypeStruct((*heads, f.V if alone else f.width), f.out_dtype if alone else jnp.float32),
            jax.ShapeDtypeStruct(heads, jnp.float32),
        ],
        scratch_types=scratch,
        grid=(B * T, f.splits, f.K * f.row_blocks),
        grid_names=("b", "split", "head"),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="decode_block_sparse",
    )
    if alone:
        return out.reshape(B, T, N, f.V), lse.reshape(B, T, N)
    out, lse = out.reshape(f.splits, B, T * N, -1), lse.reshape(f.splits, B, T * N)
    return merge(out, lse, (T, N, f.V), f.out_dtype, sinks)
