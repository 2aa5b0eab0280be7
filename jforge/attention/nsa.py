"""NSA: three branches of one attention, over compressed blocks, selected blocks and a window, mixed by gates.

    o_t = sum over c in {cmp, slc, win} of g_t,c o_t,c,   g_t = sigmoid(x_t W_g), one gate a head and branch
    cmp: softmax over entries e of q . k~_e, e seen from its last token on (e d + l - 1 <= t); 0 when there is none
    slc: softmax over tokens s <= t of the top n blocks of l' tokens, one list for each group of G heads
         score_j = sum over the heads of the group and the entries e of p_cmp,e |block j and entry e| / d
    win: softmax over the last w tokens

The first `init_blocks` blocks and the `local_blocks` up to the query's own are always selected and count in n. Entries
are made from raw rows, keys before RoPE; a compressed key turns at the position of its entry's first token.

The cache has dense k and v, the entries, and a ring of the last l raw rows, from which the next entry is made: the
token that completes an entry sees it. Branches share keys and values; with `separate_branches` (the paper) each has its
own, and the window's live in a ring.

Sources: Yuan et al. 2025 (arXiv 2502.11089) with the overlap weights that its figure shows (the signs of its eq. 9
point a block back); XunhaoLai/native-sparse-attention-triton for compression before RoPE and the forced blocks.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

import jforge.ops as jax_ops
from jforge.attention import dense, nsa_compress
from jforge.attention.dense import PLAIN
from jforge.attention.dense_config import lacks
from jforge.attention.nsa_select import choose, entry_weights
from jforge.core import blocks, masks, ring
from jforge.core.attend import attend, einsum, over_queries
from jforge.core.attention import Attention
from jforge.core.config import FrozenDict, natural, one_of, positive_int, positive_ints, reject
from jforge.core.norm import rms_norm
from jforge.core.params import Params
from jforge.core.softmax import accumulation_dtype, common
from jforge.core.spec import Buffer, CacheSpec, cache_class
from jforge.core.step import (
    Queries,
    Step,
    Token,
    Tokens,
    all_of,
    append,
    begin,
    end,
    few_tokens,
    one_by_one,
    one_token,
    several,
)
from jforge.cost import Work, seen

_OF_OTHERS = (
    *("qk_norm_type", "qk_norm_weight", "qk_norm_after_rope", "v_norm", "attention_k_eq_v", "clip_qkv"),
    *("alibi", "attn_scale", "kv_shared"),
)
"""Options of the dense family that the branches of NSA, which norm and rotate on their own, do not have."""


@dataclass(frozen=True, kw_only=True)
class Config(dense.Config):
    """The dense family's fields and NSA's, with the names of XunhaoLai's module.

    kernel_size: l, raw tokens of a compressed entry
    kernel_stride: d, tokens from one entry to the next, a divisor of l
    block_size: l', tokens of a block that is selected
    topk: n, blocks selected, those that always are among them
    window_size: w, the last tokens, the query's own included
    init_blocks: the first blocks, always selected
    local_blocks: the last blocks, always selected, the query's own among them
    compress: how l rows become an entry: "mlp" (the paper), "linear", "weighted" or "mean"
    compress_hidden_size: F, of the mlp; None: head_dim where compress is "mlp"
    separate_branches: each of the three branches has keys and values of its own (the paper)
    """

    kernel_size: int
    kernel_stride: int
    block_size: int
    topk: int
    window_size: int
    init_blocks: int = 1
    local_blocks: int = 2
    compress: str = "mlp"
    compress_hidden_size: int | None = None
    separate_branches: bool = False

    def __post_init__(self):
        super().__post_init__()
        lacks(self, *_OF_OTHERS)
        if self.qk_norm == "heads":
            reject("qk_norm", self.qk_norm, "one of None, 'head', 'flat' in nsa")
        positive_ints(self, "kernel_size", "kernel_stride", "block_size", "topk", "window_size", "local_blocks")
        natural("init_blocks", self.init_blocks)
        l, d = self.kernel_size, self.kernel_stride  # noqa: E741
        if l % d:
            reject("kernel_size", l, f"a multiple of kernel_stride={d}")
        if self.block_size % d or self.block_size < l:
            reject("block_size", self.block_size, f"a multiple of kernel_stride={d} and at least kernel_size={l}")
        if self.topk < self.init_blocks + self.local_blocks:
            reject("topk", self.topk, "at least init_blocks + local_blocks, which are always selected")
        one_of("compress", self.compress, nsa_compress.KINDS)
        self._derive("compress_hidden_size", self.head_dim if self.compress == "mlp" else None)
        if self.compress == "mlp":
            positive_int("compress_hidden_size", self.compress_hidden_size)


@cache_class
class NSACache:
    """k, v: what selection (and, if shared, the window) reads. tail: raw rows of the last l tokens, slot p mod l."""

    k: jax.Array  # B S K H, after RoPE
    v: jax.Array  # B S K V
    k_cmp: jax.Array  # B E K H, after RoPE
    v_cmp: jax.Array  # B E K V
    tail_k: jax.Array  # B l K H, before RoPE
    tail_v: jax.Array  # B l K V
    length: jax.Array  # int32[B]


@cache_class
class SeparateCache(NSACache):
    """With the ring of the window's own keys and values."""

    k_win: jax.Array  # B w K H
    v_win: jax.Array  # B w K V


def shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """{parameter: shape} of a Config."""
    D, N, K, H, V = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.v_head_dim
    out = dense.shapes(cfg) | {"wgate": (D, N, 3)}
    out |= nsa_compress.shapes(cfg.compress, cfg.kernel_size, K, H, V, cfg.compress_hidden_size)
    if cfg.separate_branches:
        out |= {f"{w}_{branch}": out[w] for branch in ("cmp", "win") for w in ("wk", "wv")}
    return out


def _branch(params: Params, cfg: Config, x, shared: tuple[Array, Array], branch: str) -> tuple[Array, Array]:
    """Keys (before RoPE) and values of a branch: its own, or those of the selected one."""
    if not cfg.separate_branches:
        return shared
    k, v = (einsum("btd,dkh->btkh", x, params[f"{w}_{branch}"]) for w in ("wk", "wv"))
    if cfg.qk_norm:
        k = rms_norm(k, params["k_norm"], eps=cfg.rms_norm_eps, offset=cfg.norm_offset)
    return k, v


def _mix(params: Params, cfg: Config, x, cmp: Array, slc: Array, win: Array) -> Tokens:
    gates = jax.nn.sigmoid(einsum("btd,dnc->btnc", x, params["wgate"]))[..., None, :]
    gates, cmp, slc, win = common(gates, cmp, slc, win)
    out = gates[..., 0] * cmp + gates[..., 1] * slc + gates[..., 2] * win
    return dense.project_out(params, cfg, x, out)


def _seen(cfg: Config, q_pos: Int[Array, "B T"], count: int) -> Bool[Array, "B T E"]:
    """Entry e from its last token on."""
    return jnp.arange(count) * cfg.kernel_stride + cfg.kernel_size - 1 <= q_pos[..., None]


def _attend(params: Params, cfg: Config, rows: Queries, slots, entries, recent: ring.Recent) -> Tokens:
    """The three branches of `rows`, projected in and out, in blocks of queries.

    slots: k and v, slot s has token s; entries: k_cmp and v_cmp; recent: keys and values of the window.
    """
    k_cmp, v_cmp = entries
    size, N, more = cfg.block_size, cfg.num_attention_heads, dense.options(params, cfg)

    def block(rows, slots):
        rows, (k, v), S = Queries(*rows), slots, slots[0].shape[1]
        q = dense.rotate(cfg, dense.queries(params, cfg, rows.x), rows.positions).astype(k.dtype)
        keep = rows.keep[..., None]
        seen = _seen(cfg, rows.order, k_cmp.shape[1]) & keep
        cmp, lse = attend(q, k_cmp, v_cmp, seen, **more)
        lists = choose(cfg, entry_weights(cfg, q, k_cmp, lse, seen), rows.order, S)
        picked = blocks.visible(lists, size, rows.order, S, N) & keep[..., None]
        slc, _ = attend(q, k, v, picked, **more)
        positions, k, v = recent.around(rows.order, cfg.window_size)
        near = masks.window(rows.order[..., None], positions[:, None], cfg.window_size) & keep
        win, _ = attend(q, k, v, near, **more)
        return _mix(params, cfg, rows.x, cmp, slc, win).astype(rows.x.dtype)

    (B, S), E = slots[0].shape[:2], k_cmp.shape[1]
    numbers = N * B * (S + E) + recent.numbers(N, cfg.window_size)
    return over_queries(block, rows, numbers, slots, jnp.where(rows.keep, rows.order, 0))


def forward(params: Params, cfg: Config, x: Tokens, positions=None) -> Tokens:
    """The definition. `positions` (int B T) feed RoPE only; blocks and windows follow the order of x."""
    rows = all_of(cfg, x, positions)
    k, v = dense.keys_values(params, cfg, x)
    raw = _branch(params, cfg, x, (k, v), "cmp")
    k_win, v_win = _branch(params, cfg, x, (k, v), "win")
    k, k_win = (dense.rotate(cfg, a, rows.positions) for a in (k, k_win))
    l, d = cfg.kernel_size, cfg.kernel_stride  # noqa: E741
    k_cmp, v_cmp = (
        nsa_compress.compress(params, cfg.compress, w, nsa_compress.blocks_of(rows, l, d))
        for w, rows in zip("kv", raw, strict=True)
    )
    k_cmp = dense.rotate(cfg, k_cmp, rows.positions[:, : k_cmp.shape[1] * d : d])
    return _attend(params, cfg, rows, (k, v), (k_cmp, v_cmp), ring.in_order(rows.order, k_win, v_win))


def prefill(params: Params, cfg: Config, x: Tokens, cache: NSACache, lengths=None):
    """Append T tokens, make the entries that they complete, and attend over what is stored then."""
    step, old = begin(cfg, cache_spec(cfg), x, cache, lengths), cache
    cache, (k_win, v_win) = _append(params, cfg, cache, step)
    if cfg.separate_branches:
        recent = ring.beside(step, old.length, (old.k_win, k_win), (old.v_win, v_win))
    else:
        slots = jnp.broadcast_to(jnp.arange(cache.k.shape[1]), cache.k.shape[:2])
        recent = ring.in_order(slots, cache.k, cache.v)
    y = _attend(params, cfg, step.queries, (cache.k, cache.v), (cache.k_cmp, cache.v_cmp), recent)
    return end(step, y, x.dtype), cache


def decode(params: Params, cfg: Config, x: Tokens, cache: NSACache, ops=jax_ops):
    """Token by token: a scan of the entries, a gather of the selected blocks, and a gather (or ring) of the window."""
    if several(x):
        return one_by_one(decode, cache_spec(cfg), params, cfg, x, cache, ops)
    step, S = begin(cfg, cache_spec(cfg), few_tokens(x), cache), cache.k.shape[1]
    q, (cache, _) = _queries(params, cfg, step, cache), _append(params, cfg, cache, step)
    more = {"out_dtype": accumulation_dtype(x), **dense.options(params, cfg)}
    cmp, lists = _select(params, cfg, q, cache, step, ops)
    slc, _ = ops.decode_block_sparse(q, cache.k, cache.v, lists, cache.length, block_size=cfg.block_size, **more)
    if cfg.separate_branches:
        filled = jnp.minimum(cache.length, cache.k_win.shape[1])
        win, _ = ops.decode_attention(q, cache.k_win, cache.v_win, filled, **more)
    else:
        newest = cache.length[:, None] - 1 - jnp.arange(min(cfg.window_size, S), dtype=jnp.int32)
        recent = jnp.broadcast_to(newest[:, None, None], (len(x), 1, cfg.num_key_value_heads, newest.shape[-1]))
        win, _ = ops.decode_block_sparse(q, cache.k, cache.v, recent, cache.length, block_size=1, **more)
    return end(step, _mix(params, cfg, step.x, cmp, slc, win), x.dtype), cache


def _select(params: Params, cfg: Config, q, cache: NSACache, step: Step, ops) -> tuple[Array, Int[Array, "B 1 K L"]]:
    """(the compressed branch, the selected blocks) of one token a row."""
    entries = cache_spec(cfg)["k_cmp"].valid(cfg, step.length)
    more = {"out_dtype": accumulation_dtype(step.x), **dense.options(params, cfg)}
    cmp, lse = ops.decode_attention(q, cache.k_cmp, cache.v_cmp, entries, **more)
    weights = entry_weights(cfg, q, cache.k_cmp, lse, _seen(cfg, step.positions, cache.k_cmp.shape[1]))
    return cmp, choose(cfg, weights, step.positions, cache.k.shape[1], ops)


def _queries(params: Params, cfg: Config, step: Step, cache: NSACache) -> Array:
    return dense.rotate(cfg, dense.queries(params, cfg, step.x), step.positions).astype(cache.k.dtype)


def _append(params: Params, cfg: Config, cache: NSACache, step: Step) -> tuple[NSACache, tuple[Array, Array]]:
    """(the cache with the new tokens and the entries they complete, the window's new keys and values)."""
    dtype = cache.k.dtype
    k, v = dense.keys_values(params, cfg, step.x)
    raw = tuple(a.astype(dtype) for a in _branch(params, cfg, step.x, (k, v), "cmp"))
    k_win, v_win = _branch(params, cfg, step.x, (k, v), "win")
    k, k_win = (dense.rotate(cfg, a, step.positions).astype(dtype) for a in (k, k_win))
    k_cmp, v_cmp = _complete(params, cfg, cache, raw, step)
    cache = ring.write(append(cache, step, k=k, v=v), step, tail_k=raw[0], tail_v=raw[1])
    if cfg.separate_branches:
        cache = ring.write(cache, step, k_win=k_win, v_win=v_win)
    return replace(cache, k_cmp=k_cmp, v_cmp=v_cmp), (k_win, v_win)


def _complete(params: Params, cfg: Config, cache: NSACache, raw: tuple[Array, Array], step: Step):
    """k_cmp and v_cmp with the entries that end in the new tokens; untouched, and no row read, where none does.

    An entry's rows lie in the ring of the tail up to the old length and in `raw` after it.
    """
    buffer, l, d = cache_spec(cfg)["k_cmp"], cfg.kernel_size, cfg.kernel_stride  # noqa: E741
    old, new = buffer.valid(cfg, cache.length), buffer.valid(cfg, step.length)
    T, ring_slots = step.x.shape[1], cache.tail_k.shape[1]
    entry = old[:, None] + jnp.arange(-(-T // d))  # at most so many end in T tokens
    position = entry[..., None] * d + jnp.arange(l)
    since = position - cache.length[:, None, None]
    rows = jnp.arange(len(entry))[:, None, None]

    def write(k_cmp, v_cmp, tail_k, tail_v):
        out = []
        for w, entries, tail, fresh in zip("kv", (k_cmp, v_cmp), (tail_k, tail_v), raw, strict=True):
            held, late = tail[rows, position % ring_slots], fresh[rows, jnp.clip(since, 0, T - 1)]
            made = nsa_compress.compress(params, cfg.compress, w, jnp.where((since < 0)[..., None, None], held, late))
            made = dense.rotate(cfg, made, entry * d) if w == "k" else made
            slot = jnp.where(entry < new[:, None], entry, entries.shape[1])
            out.append(entries.at[rows[..., 0], slot].set(made.astype(entries.dtype), mode="drop"))
        return tuple(out)

    buffers = cache.k_cmp, cache.v_cmp, cache.tail_k, cache.tail_v
    return jax.lax.cond((new > old).any(), write, lambda k_cmp, v_cmp, *_: (k_cmp, v_cmp), *buffers)


def select(params: Params, cfg: Config, x: Token, cache: NSACache) -> Int[Array, "B 1 K L"]:
    """The blocks that decode would gather for x; the entry that x completes takes part in the choice."""
    step = begin(cfg, cache_spec(cfg), one_token(x), cache)
    q, (cache, _) = _queries(params, cfg, step, cache), _append(params, cfg, cache, step)
    return _select(params, cfg, q, cache, step, jax_ops)[1]


def tokens_of(cfg: Config, selection, S: int) -> Bool[Array, "B T S"]:
    """All tokens of the selected blocks; with None, those of the window and of every entry that is seen."""
    if selection is not None:
        return blocks.tokens(selection, cfg.block_size, S).any(axis=2)
    t, s = jnp.arange(S)[:, None], jnp.arange(S)
    entries = cache_spec(cfg)["k_cmp"].entries(t + 1)
    compressed = (entries > 0) & (s < (entries - 1) * cfg.kernel_stride + cfg.kernel_size)
    return (compressed | masks.window(t, s, cfg.window_size))[None]


def cache_spec(cfg: Config) -> CacheSpec:
    K, H, V, l = cfg.num_key_value_heads, cfg.head_dim, cfg.v_head_dim, cfg.kernel_size  # noqa: E741
    out = {}
    for x, axis, width in (("k", "H", H), ("v", "V", V)):
        entries = Buffer(("B", "E", "K", axis), (K, width), every=cfg.kernel_stride, first=l)
        # The rows of the entry that comes next are in the tail for as long as it is the next.
        tail = Buffer(("B", "W", "K", axis), (K, width), limit=l, steady=lambda cfg, n, e=entries: e.entries(n))
        out |= {x: Buffer(("B", "S", "K", axis), (K, width)), f"{x}_cmp": entries, f"tail_{x}": tail}
        if cfg.separate_branches:
            out[f"{x}_win"] = Buffer(("B", "W", "K", axis), (K, width), limit=cfg.window_size)
    return CacheSpec(SeparateCache if cfg.separate_branches else NSACache, out)


def work(cfg: Config, context: int, capacity: int, new: int, closing: bool) -> Work:
    """One step scans the entries and gathers n blocks and w tokens; one that completes an entry reads l raw rows.

    A prefill masks all slots.
    """
    buffer, rows = cache_spec(cfg)["k_cmp"], cfg.kernel_size
    entries, made = buffer.slots(context), buffer.entries(context) - buffer.entries(context - new)
    made, window = (made if new > 1 else int(closing)), min(cfg.window_size, context)
    listed = min(cfg.topk, -(-capacity // cfg.block_size)) * cfg.block_size
    near = 0 if cfg.separate_branches else window
    slots, read, written = (min(context, listed + near) if new == 1 else context), {}, {}
    for x in "kv":
        read |= {x: slots, f"{x}_cmp": entries}
        written |= {x: new, f"tail_{x}": min(new, rows)}
        if cfg.separate_branches:
            read[f"{x}_win"] = window
            written[f"{x}_win"] = min(new, cfg.window_size)
        if made:
            read[f"tail_{x}"] = min(rows, capacity)
            written[f"{x}_cmp"] = made
    pairs = (
        seen(context, new, every=cfg.kernel_stride, first=rows)
        + seen(context, new, listed)
        + seen(context, new, cfg.window_size)
    )
    attended = entries + min(context, listed) + window if new == 1 else entries + slots + window * cfg.separate_branches
    return Work(read, written, dense.flops(cfg, pairs), attended)


nsa = Attention(
    summary="compressed, selected and recent keys, mixed by gates (DeepSeek's native sparse attention)",
    traded="reads for three views of the past, one of them learned; all is kept, and more on top",
    Config=Config, shapes=shapes, cache_spec=cache_spec, work=work,
    forward=forward, prefill=prefill, decode=decode, select=select, tokens_of=tokens_of,
    models=FrozenDict({
        # the paper does not say which RoPE: a plain one stands for it
        "NSA paper 27B": Config(hidden_size=2560, num_attention_heads=64, num_key_value_heads=4, head_dim=192,
                                v_head_dim=128, kernel_size=32, kernel_stride=16, block_size=64, topk=16,
                                window_size=512, separate_branches=True, rope_parameters=PLAIN),
    }),
    examples=(
        Config(hidden_size=12, num_attention_heads=4, num_key_value_heads=2, head_dim=6, rope_parameters=PLAIN,
               kernel_size=4, kernel_stride=2, block_size=4, topk=3, local_blocks=1, window_size=3,
               compress_hidden_size=5),
        Config(hidden_size=12, num_attention_heads=2, num_key_value_heads=1, head_dim=4, v_head_dim=6,
               rope_parameters=PLAIN, kernel_size=2, kernel_stride=1, block_size=3, topk=3, window_size=4,
               compress="linear", separate_branches=True, qk_norm="head"),
    ),
)  # fmt: skip
