"""Bugs of windows, sinks, blocks, MoBA and NSA; test_mutants.py plants them."""

import importlib
from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
from judges import case, law, patch, replaced, torch_forward, unread, walks

import jforge
from jforge import caches
from jforge.attention import block_sparse, chunked_local, dense, moba, nsa, sliding_window, streaming
from jforge.core import masks, ring
from jforge.core.spec import Buffer
from jforge.core.step import begin, end

op_module = importlib.import_module("jforge.ops.decode_block_sparse")
WINDOW, SINKS, STREAMING, SPARSE, MOBA, NSA, LIGHTNING = (
    jforge.get(name) for name in ("sliding_window", "sinks", "streaming", "block_sparse", "moba", "nsa", "lightning")
)
CHUNKED = jforge.get("chunked_local")
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SMALL = {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "rope_parameters": ROPE}
RING = WINDOW.Config(**SMALL, sliding_window=4)
CHUNKS = CHUNKED.Config(**SMALL, attention_chunk_size=4)
TURNED = WINDOW.Config(**SMALL | {"rope_parameters": None}, sliding_window=4, alibi=True)
SUNK = SINKS.Config(**SMALL)
KEPT = STREAMING.Config(**SMALL, start_size=2, recent_size=3)
# of which one is listed twice in block 2; the table is cached, so no other test may have this seed
PATTERN = SPARSE.Config(**SMALL, block_size=3, num_global_blocks=2, num_local_blocks=2, seed=991)
PICKED = MOBA.Config(**SMALL, moba_chunk_size=3, moba_topk=2)
ENTRIES = NSA.Config(**SMALL, kernel_size=4, kernel_stride=2, block_size=4, topk=3, local_blocks=1, window_size=3,
                     compress="mean")  # fmt: skip


def _slot_0_is_the_oldest(step, length, *pairs, fixed=0):
    right = right_beside(step, length, *pairs, fixed=fixed)
    arrays = (jnp.concatenate([buffer[:, fixed:], new.astype(buffer.dtype)], axis=1) for buffer, new in pairs)
    return right._replace(arrays=tuple(arrays))


def _slot_of_a_ring_without_fixed(positions, slots, fixed=0):
    return positions % slots


def _write_with_pads(cache, step, fixed=0, **new):
    everything = step._replace(keep=jnp.ones_like(step.keep), length=step.positions[:, -1] + 1)
    return replace(right_write(cache, everything, fixed, **new), length=step.length)


def _write_then_attend(params, cfg, x, cache, lengths=None):
    """The ring alone, after all new tokens are in it."""
    step = begin(cfg, WINDOW.cache_spec(cfg), x, cache, lengths)
    k, v = dense.project_keys(params, cfg, step.queries)
    cache = ring.write(cache, step, k=k, v=v)
    nothing = step._replace(keep=jnp.zeros_like(step.keep))
    recent = ring.beside(nothing, step.length, (cache.k, k), (cache.v, v))
    y = sliding_window.attend_recent(params, cfg, step.queries, recent, sliding_window.visible, cfg.sliding_window)
    return end(step, y, x.dtype), cache


def _chunk_by_slot(cfg, q_pos, k_pos):
    """Slots up to the query's own, whatever chunk left its tokens there."""
    return (k_pos <= q_pos) & (k_pos % cfg.attention_chunk_size <= q_pos % cfg.attention_chunk_size)


def _one_query(params, cfg, rows):
    recent, _ = right_queries(params, cfg, rows)
    return recent, recent


def split_in_two(sinks_in):
    """A decode of two halves of the keys, merged; which of them carry the sinks."""

    def op(q, k, v, lengths, *, sinks=None, **options):
        half, parts = k.shape[1] // 2, []
        ends = jnp.minimum(lengths, half), jnp.maximum(lengths - half, 0)
        for i, (part, n) in enumerate(zip((np.s_[:, :half], np.s_[:, half:]), ends, strict=True)):
            mine = sinks if i in sinks_in else None
            parts.append(jforge.ops.decode_attention(q, k[part], v[part], n, sinks=mine, **options))
        return jforge.ops.merge_states(*(jnp.stack(both) for both in zip(*parts, strict=True)))

    ops = SimpleNamespace(decode_attention=op)
    return SINKS._replace(decode=lambda params, cfg, x, cache: SINKS.decode(params, cfg, x, cache, ops))


def _sinks(change):
    def options(params, cfg):
        given = right_options(params, cfg)
        return given if given["sinks"] is None else {**given, "sinks": change(given["sinks"], cfg)}

    return options


def _sink_of_the_key_head(sinks, cfg):
    return jnp.repeat(sinks[: cfg.num_key_value_heads], cfg.num_attention_heads // cfg.num_key_value_heads)


def _blocks_with_repeats(cfg, n, i):
    return [*range(min(cfg.num_global_blocks, i + 1)), *range(max(0, i - cfg.num_local_blocks + 1), i + 1)]


def _whole_blocks_only(blocks, size, S, lengths):
    slots, seen = right_slots(blocks, size, S, lengths)
    ends = (slots // size + 1) * size
    return slots, seen & (ends <= (S if lengths is None else lengths[:, None, None, None]))


def _minus_1_is_block_0(blocks, size, S, lengths):
    return right_slots(jnp.maximum(blocks, 0), size, S, lengths)


def _own_block_competes(cfg, q, k_mean, q_pos, ops=jforge.ops):
    """The mean of the block that the query is in, future keys and all, takes a pick from the past ones."""
    lists = right_moba_choose(cfg, q, k_mean, q_pos + cfg.moba_chunk_size, ops)
    own = jnp.broadcast_to((q_pos // cfg.moba_chunk_size)[..., None, None], lists[..., :1].shape)
    return jnp.concatenate([jnp.where(lists[..., :-1] <= own, lists[..., :-1], -1), own], axis=-1)


def _group_chooses_together(cfg, q, k_mean, q_pos, ops=jforge.ops):
    group = q.shape[2] // k_mean.shape[2]
    return jnp.repeat(right_moba_choose(cfg, q, k_mean, q_pos, ops)[:, :, ::group], group, axis=2)


def _sum_goes_on(cfg, cache, k, v, step):
    """The running sum is not set back to 0 when its block closes."""
    after = right_moba_append(cfg, cache, k, v, step)
    new = jnp.where(step.keep[..., None, None], k, 0)[:, 0]
    return replace(after, k_sum=cache.k_sum + new.astype(cache.k_sum.dtype))


def _seen_one_late(cfg, q_pos, count):
    return jnp.arange(count) * cfg.kernel_stride + cfg.kernel_size - 1 < q_pos[..., None]


def _overlap_a_block_back(cfg, weights, q_pos, S, ops=jforge.ops):
    """Equation 9 with its minus signs: block j is scored by the entries of the block before it."""
    shift = cfg.block_size // cfg.kernel_stride
    moved = jnp.pad(weights, [(0, 0)] * 3 + [(shift, 0)])[..., : weights.shape[-1]]
    return right_nsa_choose(cfg, moved, q_pos, S, ops)


def _first_head_chooses(cfg, q, k_cmp, lse, seen):
    K = k_cmp.shape[2]
    return right_weights(replace(cfg, num_attention_heads=K), q[:, :, ::2], k_cmp, lse[:, :, ::2], seen)


def _kept(cfg, cache, name, buffer, length):
    """What a state holds after a rewind: what it held before."""
    return getattr(cache, name)


right_write, right_beside, right_queries, right_options = ring.write, ring.beside, streaming.queries, dense.options
right_slots, right_moba_choose, right_moba_append = op_module.listed_slots, moba.choose, moba._append
right_nsa_choose, right_weights = nsa.choose, nsa.entry_weights

MUTANTS = {
    "a sliding window of W + 1": (
        patch(WINDOW, masks, "window", lambda q, k, size: (k <= q) & (k >= q - size)),
        torch_forward("sliding_window", RING)),
    "a ring is read in the order of its slots": (patch(WINDOW, ring, "beside", _slot_0_is_the_oldest), walks(RING)),
    "the ring of StreamingLLM turns over the slots that stay": (
        patch(STREAMING, ring, "slot_of", _slot_of_a_ring_without_fixed), walks(KEPT)),
    "pads are written into a ring": (patch(WINDOW, ring, "write", _write_with_pads), walks(RING)),
    "prefill writes the ring before it attends": (
        replaced(WINDOW, prefill=_write_then_attend), walks(RING)),
    "ALiBi counts from the slots of a turned ring": (
        patch(WINDOW, sliding_window, "_oldest_first", lambda buffer, length: buffer), walks(TURNED)),
    "a chunk's mask is taken from slots": (patch(CHUNKED, chunked_local, "visible", _chunk_by_slot), walks(CHUNKS)),
    "a chunk's cache is full for ever": (
        patch(CHUNKED, chunked_local, "filled", lambda cfg, n: jnp.minimum(n, cfg.attention_chunk_size)),
        walks(CHUNKS)),
    "a rewind into the chunk before": (
        patch(CHUNKED, chunked_local, "_chunk", lambda cfg, n: n * 0), law("L12", CHUNKS)),
    "StreamingLLM turns one query for both groups": (
        patch(STREAMING, streaming, "queries", _one_query), torch_forward("streaming", KEPT)),
    "the sink enters both parts of a split": (lambda monkeypatch: split_in_two({0, 1}), walks(SUNK)),
    "the sink of a mechanism is scaled": (
        patch(SINKS, dense, "options", _sinks(lambda sinks, cfg: sinks * cfg.scaling)), torch_forward("sinks", SUNK)),
    "sinks are taken by key head": (
        patch(SINKS, dense, "options", _sinks(_sink_of_the_key_head)), torch_forward("sinks", SUNK)),
    "a block that is global and local is listed twice": (
        patch(SPARSE, block_sparse, "_blocks_of", _blocks_with_repeats), walks(PATTERN)),
    "the partial last block is dropped": (
        patch(SPARSE, op_module, "listed_slots", _whole_blocks_only), case("blocks_of_64")),
    "-1 in a list reads block 0": (patch(SPARSE, op_module, "listed_slots", _minus_1_is_block_0), case("blocks_of_16")),
    "MoBA: the mean of the open block competes": (
        patch(MOBA, moba, "choose", _own_block_competes), torch_forward("moba", PICKED)),
    "MoBA: the heads of a group choose together": (
        patch(MOBA, moba, "choose", _group_chooses_together), torch_forward("moba", PICKED)),
    "MoBA: the running sum goes on past its block": (patch(MOBA, moba, "_append", _sum_goes_on), walks(PICKED)),
    "MoBA: the scan of the means is not counted": (
        unread(MOBA, "k_mean"), law("L8", PICKED)),
    "MoBA: a rewind leaves the running sum": (patch(MOBA, caches, "_rewound", _kept), law("L12", PICKED)),
    "a state that goes back to no token keeps its sum": (
        patch(LIGHTNING, caches, "_rewound", _kept), law("L12", LIGHTNING.examples[0])),
    "a ring goes back past what it wrote over": (patch(WINDOW, Buffer, "always_rewinds", True), law("L12", RING)),
    "NSA: the token that completes an entry does not see it": (
        patch(NSA, nsa, "_seen", _seen_one_late), torch_forward("nsa", ENTRIES)),
    "NSA: overlaps are counted a block back": (
        patch(NSA, nsa, "choose", _overlap_a_block_back), torch_forward("nsa", ENTRIES)),
    "NSA: one head chooses for its group": (
        patch(NSA, nsa, "entry_weights", _first_head_chooses), torch_forward("nsa", ENTRIES)),
}  # fmt: skip

TWINS = (("sliding_window", RING), ("streaming", KEPT), ("sinks", SUNK), ("moba", PICKED), ("nsa", ENTRIES))
RINGS = (WINDOW, RING), (WINDOW, TURNED), (CHUNKED, CHUNKS), (STREAMING, KEPT)
JUDGES = {
    "walks of rings": lambda: not any(walks(cfg)(att) for att, cfg in RINGS),
    "a walk of a split": lambda: not walks(SUNK)(split_in_two({1})),
    "walks of blocks": lambda: not walks(replace(PATTERN, seed=990))(SPARSE) and not walks(PICKED)(MOBA),
    "torch_ref on windows and blocks": lambda: not any(torch_forward(n, cfg)(jforge.get(n)) for n, cfg in TWINS),
    "cases of blocks": lambda: not any(case(n)(SPARSE) for n in ("blocks_of_64", "blocks_of_16")),
    "L12": lambda: not any(law("L12", cfg)(att) for att, cfg in ((MOBA, PICKED), (WINDOW, RING), (CHUNKED, CHUNKS))),
    "L8 of MoBA": lambda: not law("L8", PICKED)(MOBA),
}
"""What notices a mutant notices nothing in the unchanged code."""
