"""Bugs of the dense family and of what every mechanism shares; test_mutants.py plants them."""

import importlib
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from judges import case, law, patch, recount, replaced, torch_forward

import jforge
from jforge.attention import dense
from jforge.core import attend as attend_module
from jforge.core import masks, rope, step

op_module = importlib.import_module("jforge.ops.decode_attention")
GQA = jforge.get("gqa")
ROPED, NORMED, FLAT, _ = GQA.examples


def _op_with(**changes):
    """decode through an op whose arguments are changed first."""

    def op(q, k, v, lengths, **options):
        if "lengths" in changes:
            lengths = changes["lengths"](lengths, k)
        return jforge.ops.decode_attention(q, k, v, lengths, **options)

    ops = SimpleNamespace(decode_attention=op)
    return lambda params, cfg, x, cache: GQA.decode(params, cfg, x, cache, ops=ops)


def _op_without_order(q, k, v, lengths, **options):
    """Every token of a step sees all that the cache holds after it."""
    one = [jforge.ops.decode_attention(q[:, t : t + 1], k, v, lengths, **options) for t in range(q.shape[1])]
    return tuple(jnp.concatenate(parts, axis=1) for parts in zip(*one, strict=True))


def _decode_without_order(params, cfg, x, cache):
    return GQA.decode(params, cfg, x, cache, ops=SimpleNamespace(decode_attention=_op_without_order))


def _append_masked(cache, at, **new):
    """The whole buffer through a select, as a mask over the cache would do it."""
    hit = (jnp.arange(cache.k.shape[1]) == at.positions[:, :1])[..., None, None]
    whole = {n: jnp.where(hit, a[:, :1].astype(cache.k.dtype), getattr(cache, n)) for n, a in new.items()}
    return replace(cache, **whole, length=at.length)


def _append_late(cache, at, **new):
    return step.append(cache, at._replace(positions=at.positions + 1), **new)


def _attend_unblanked(q, k, v, visible, *, scale, softcap=None, sinks=None, distance=None):
    """Masked scores, but values as they are: 0 * NaN."""
    B, T, N, H = q.shape
    K = k.shape[2]
    scores = jnp.einsum("btkgh,bskh->btkgs", q.reshape(B, T, K, N // K, H), k) * scale
    weights, lse = attend_module.masked_softmax(scores, visible[:, :, None, None])
    return jnp.einsum("btkgs,bskv->btkgv", weights, v).reshape(B, T, N, -1), lse.reshape(B, T, N)


def _attend(change):
    def attend(q, k, v, visible, **options):
        return change(attend_module.attend, q, k, v, visible, **options)

    return attend


def _interleave_heads(attend, q, k, v, visible, **options):
    """Query head n reads KV head n % K instead of n // G."""
    N, K = q.shape[2], k.shape[2]
    order = jnp.arange(N).reshape(N // K, K).T.reshape(-1)
    out, lse = attend(q[:, :, order], k, v, visible, **options)
    back = jnp.argsort(order)
    return out[:, :, back], lse[:, :, back]


def _cap_unscaled(attend, q, k, v, visible, *, scale, softcap=None, **more):
    return attend(q, k, v, visible, scale=scale, softcap=softcap / scale if softcap else None, **more)


def _sinks_scaled(attend, q, k, v, visible, *, scale, sinks=None, **more):
    return attend(q, k, v, visible, scale=scale, sinks=None if sinks is None else sinks * scale, **more)


def _bias_scaled(attend, *args, scale, alibi=None, **options):
    return attend(*args, scale=scale, alibi=None if alibi is None else alibi * scale, **options)


def _lse_base_2(attend, *args, **options):
    out, lse = attend(*args, **options)
    return out, lse / jnp.log(2.0)


def _norm_after_rope(monkeypatch):
    """Of queries and keys: what is to be normed is turned first."""
    waiting = []

    def normed(params, cfg, heads, norm):
        waiting.append(lambda turned: right_normed(params, cfg, turned, norm))
        return heads

    monkeypatch.setattr(dense, "_normed", normed)
    monkeypatch.setattr(dense, "rotate", lambda cfg, x, positions: waiting.pop()(right_rotate(cfg, x, positions)))
    return GQA


right_normed, right_rotate = dense._normed, dense.rotate


def _llama3_swapped(theta, p):
    flipped = {**p, "low_freq_factor": p["high_freq_factor"], "high_freq_factor": p["low_freq_factor"]}
    return right_llama3(theta, flipped)


right_llama3 = rope._llama3
right_rope = rope.apply_rope


def _decode_late(params, cfg, x, cache, ops=jforge.ops):
    """RoPE at the next position: what comes of incrementing length before projecting."""
    shifted = lambda a, positions, *rest: right_rope(a, positions + 1, *rest)  # noqa: E731
    dense.rope.apply_rope, kept = shifted, dense.rope.apply_rope
    try:
        return GQA.decode(params, cfg, x, cache, ops=ops)
    finally:
        dense.rope.apply_rope = kept


def _decode_wide_length(params, cfg, x, cache, ops=jforge.ops):
    y, cache = GQA.decode(params, cfg, x, cache, ops=ops)
    return y, type(cache)(k=cache.k, v=cache.v, length=cache.length.astype(jnp.int64))


def _prefill_ignores_lengths(params, cfg, x, cache, lengths=None):
    return GQA.prefill(params, cfg, x, cache)


def _forward_noncausal(params, cfg, x, positions=None):
    see_all = lambda cfg, q_pos, k_pos: jnp.ones(jnp.broadcast_shapes(q_pos.shape, k_pos.shape), bool)  # noqa: E731
    kept, dense.visible = dense.visible, see_all
    try:
        return GQA.forward(params, cfg, x, positions)
    finally:
        dense.visible = kept


def _merge_counts_empty_parts(outs, lses):
    weights = jax.nn.softmax(jnp.where(jnp.isneginf(lses), 0, lses), axis=0)
    return (weights[..., None] * outs).sum(0), jax.nn.logsumexp(lses, axis=0)


MUTANTS = {
    "decode forgets the new token": (replaced(GQA, decode=_op_with(lengths=lambda n, k: n - 1)), law("L2", ROPED)),
    "decode reads the whole buffer, not the row's length": (
        replaced(GQA, decode=_op_with(lengths=lambda n, k: jnp.full_like(n, k.shape[1]))), law("L2", ROPED)),
    "the tokens of one step see one another's future": (
        replaced(GQA, decode=_decode_without_order), law("L2", ROPED)),
    "decode rotates by the next position": (replaced(GQA, decode=_decode_late), law("L4", ROPED)),
    "the new token lands one slot late": (patch(GQA, dense, "append", _append_late), law("L1", ROPED)),
    "forward sees the future": (replaced(GQA, forward=_forward_noncausal), law("L7", ROPED)),
    "prefill ignores lengths": (replaced(GQA, prefill=_prefill_ignores_lengths), law("L6", ROPED)),
    "values are not blanked: 0 * NaN": (patch(GQA, dense, "attend", _attend_unblanked), law("L5", ROPED)),
    "the mask of visible leaves out the token itself": (
        replaced(GQA, visible=lambda cfg, q_pos, k_pos: k_pos < q_pos), law("L7", ROPED)),
    "the append masks the whole cache": (patch(GQA, dense, "append", _append_masked), law("L8", ROPED)),
    "K and V are counted twice": (
        recount(GQA, stored=lambda c: {n: 2 * b for n, b in c.stored.items()}), law("L8", ROPED)),
    "the bytes of v are forgotten": (recount(GQA, read=lambda c: {"k": c.read["k"]}), law("L8", ROPED)),
    "the write is forgotten": (recount(GQA, written=lambda c: {}), law("L8", ROPED)),
    "length changes its dtype": (replaced(GQA, decode=_decode_wide_length), law("L9", ROPED)),
    "RoPE by absolute slot parity is not relative": (
        patch(GQA, rope, "apply_rope", lambda a, positions, *rest: right_rope(a, positions**2, *rest)),
        law("L10", ROPED)),
    "the RoPE layouts are swapped": (
        patch(GQA, rope, "apply_rope", lambda a, n, p, layout: right_rope(a, n, p, "interleaved")),
        torch_forward("gqa", ROPED)),
    "llama3 bands are swapped": (patch(GQA, rope, "_llama3", _llama3_swapped), torch_forward("gqa", ROPED)),
    "QK-norm comes after RoPE": (_norm_after_rope, torch_forward("gqa", NORMED)),
    "query head n reads KV head n % K": (
        patch(GQA, dense, "attend", _attend(_interleave_heads)), torch_forward("gqa", ROPED)),
    "softcap on unscaled logits": (patch(GQA, dense, "attend", _attend(_cap_unscaled)), torch_forward("gqa", FLAT)),
    "a window of W + 1": (
        patch(GQA, masks, "window", lambda q, k, size: (k <= q) & (k >= q - size)), case("window")),
    "the sink is scaled": (patch(GQA, op_module, "attend", _attend(_sinks_scaled)), case("sinks")),
    "ALiBi is added before the scale": (patch(GQA, op_module, "attend", _attend(_bias_scaled)), case("alibi")),
    "the LSE is in base 2": (patch(GQA, op_module, "attend", _attend(_lse_base_2)), case("llama")),
    "an empty part has weight in a merge": (patch(GQA, jforge.ops, "merge_states", _merge_counts_empty_parts),
                                            case("merge_many")),
}  # fmt: skip

JUDGES = {
    "laws": lambda: jforge.check(GQA, ROPED, laws=("L1", "L2", "L4", "L5", "L6", "L7", "L8", "L9", "L10")).ok,
    "torch_ref": lambda: not any(torch_forward("gqa", cfg)(GQA) for cfg in GQA.examples),
    "cases": lambda: not any(case(n)(GQA) for n in ("window", "sinks", "alibi", "llama", "merge_many")),
}
"""What notices a mutant notices nothing in the unchanged code."""
