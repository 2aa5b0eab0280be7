"""Sliding windows, learned sinks and StreamingLLM beyond the laws: golden tables, limits, bytes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judges import as_gqa, compiled, limit, tokens, weights

import jforge
from jforge.attention import dense, streaming, v4_window
from jforge.core import compare, ring
from jforge.core.attend import attend
from jforge.core.step import Queries, place

WINDOW, SINKS, STREAMING = (jforge.get(name) for name in ("sliding_window", "sinks", "streaming"))
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SMALL = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "rope_parameters": ROPE}

# --- golden tables (mechanisms.md 13)


@pytest.mark.parametrize("tokens,positions", [(3, [0, 1, 2, -1]), (4, [0, 1, 2, 3]), (5, [4, 1, 2, 3]),
                                              (10, [8, 9, 6, 7]), (6, [4, 5, 2, 3]), (8, [4, 5, 6, 7]),
                                              (0, [-1, -1, -1, -1])])  # fmt: skip
def test_ring_of_4(tokens, positions):
    """Slot -> position after so many tokens, and back."""
    np.testing.assert_array_equal(held(tokens, 4), positions)
    filled = jnp.array([p for p in positions if p >= 0], jnp.int32)
    np.testing.assert_array_equal(ring.slot_of(filled, 4), np.flatnonzero(np.array(positions) >= 0))


def held(count: int, slots: int, fixed: int = 0) -> list[int]:
    """The position in each slot after tokens 0..count-1, written one after the other; -1 in an empty one."""
    out = [-1] * slots
    for p in range(count):
        out[p if p < fixed else fixed + (p - fixed) % (slots - fixed)] = p
    return out


@pytest.mark.parametrize("fixed,slots", [(0, 4), (0, 1), (2, 6), (3, 4), (2, 3)])
def test_a_ring_holds_the_same_whatever_the_chunks(fixed, slots):
    """A buffer that stores each token's own position, beside a row that brings fewer tokens; before each chunk it is
    read in the order of the tokens.
    """

    @jax.jit
    def put(buffer, length, new):
        step = place(jnp.ones((2, 13, 1)), length, new, 1, None)
        recent = ring.beside(step, length, (buffer, step.positions), fixed=fixed)
        after = ring.write(v4_window.WindowCache(buffer, length), step, fixed, kv=step.positions)
        return after.kv, after.length, recent

    for chunks in ((13,), (3, 1, 4, 5), (1,) * 13, (5, 8), (0, 9, 2)):
        buffer, length = np.full((2, slots), -1, np.int32), np.zeros(2, np.int32)
        for size in chunks:
            before, new = length, np.array([size, size // 2], np.int32)
            buffer, length, recent = put(buffer, length, new)
            assert buffer.tolist() == [held(n, slots, fixed) for n in length]
            rows = zip(recent.first, recent.positions, *recent.arrays, strict=True)
            for row, (first, positions, stored) in enumerate(rows):
                there = positions != ring.NEVER
                turned = range(max(fixed, before[row] - (slots - fixed)), before[row])
                assert positions[there].tolist() == [*turned, *range(before[row], length[row])]
                np.testing.assert_array_equal(stored[there], positions[there])
                np.testing.assert_array_equal(np.flatnonzero(there) + first, positions[there])
        assert length[0] == sum(chunks)


KEPT = {6: [0, 1, 2, 3, 4, 5], 7: [0, 1, 3, 4, 5, 6], 10: [0, 1, 6, 7, 8, 9]}


@pytest.mark.parametrize("length", KEPT)
def test_streaming_keeps_2_and_4(length):
    """What the newest query sees, what the ring holds, and where the keys stand for it: 0..5 in the cache."""
    cfg = STREAMING.Config(**SMALL, start_size=2, recent_size=4)
    t = length - 1
    assert np.flatnonzero(STREAMING.visible(cfg, jnp.array([t]), jnp.arange(length))).tolist() == KEPT[length]
    assert sorted(held(length, 6, 2)) == KEPT[length]
    params, x = jax.tree.map(jnp.asarray, (weights(STREAMING, cfg, "float32"), tokens(cfg, 1, 1, "float32")))
    place = jnp.array([[t]])
    recent, first = streaming.queries(params, cfg, Queries(x, place, place, place >= 0))
    q, _, _ = dense.qkv(params, cfg, x)
    np.testing.assert_array_equal(recent, dense.rotate(cfg, q, place))  # t - k to a recent key, itself turned by k
    np.testing.assert_array_equal(first, dense.rotate(cfg, q, jnp.array([[5]])))  # n - 1 - j to one of the first
    assert [k if k < 2 else 5 - (t - k) for k in KEPT[length]] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("cfg", STREAMING.examples, ids=["yarn", "flat-norm"])
def test_streaming_is_rerotation_at_cache_positions(cfg):
    """The paper's form: the raw keys kept turned to 0..n-1 at every step, the query to n - 1, then plain softmax."""
    T, s, R = 3 * cfg.kept, cfg.start_size, cfg.recent_size
    lists = [[*range(min(s, t + 1)), *range(max(s, t + 1 - R), t + 1)] for t in range(T)]
    kept = np.array([row + [-1] * (cfg.kept - len(row)) for row in lists])

    @jax.jit
    def rotated_anew(params, x):
        q, k, v = (a[0] for a in dense.qkv(params, cfg, x))
        slots = jnp.broadcast_to(jnp.arange(cfg.kept), kept.shape)
        newest = jnp.array([[len(row) - 1] for row in lists])
        keys, query = dense.rotate(cfg, k[kept], slots), dense.rotate(cfg, q[:, None], newest)
        out, _ = attend(query, keys, v[kept], jnp.asarray(kept >= 0)[:, None], **dense.options(params, cfg))
        return dense.project_out(params, cfg, x, jnp.moveaxis(out, 0, 1))

    with jax.enable_x64(True):
        params, x = weights(STREAMING, cfg), tokens(cfg, 1, T)
        got = compiled(STREAMING, cfg)[0](params, x)
        assert compare.relative(got, rotated_anew(params, x)) <= compare.OUT["float64"]


# --- limits


@pytest.mark.parametrize("att,cfg", [
    (WINDOW, replace(WINDOW.examples[0], sliding_window=10)),
    (WINDOW, replace(WINDOW.examples[1], sliding_window=99)),  # a ring of 10 slots for a window of 99
    (STREAMING, replace(STREAMING.examples[0], start_size=3, recent_size=7)),
    (STREAMING, replace(STREAMING.examples[1], start_size=20, recent_size=1)),  # all in the slots that stay
], ids=["W=S", "W>S", "s+R=S", "s>S"])  # fmt: skip
def test_a_window_of_everything_is_dense(att, cfg):
    assert limit(att, cfg, as_gqa(cfg)) <= compare.OUT["float64"]


@pytest.mark.parametrize("cfg", SINKS.examples, ids=["full", "window"])
def test_sinks_of_minus_infinity_are_none(cfg):
    def change(params):
        return {**params, "sinks": jnp.full_like(params["sinks"], -jnp.inf)}

    if cfg.sliding_window is None:
        twin = as_gqa(cfg)
    else:
        fields = {f: getattr(cfg, f) for f in cfg.__dataclass_fields__}
        twin = WINDOW, WINDOW.Config(**fields), lambda params: {n: p for n, p in params.items() if n != "sinks"}
    assert limit(SINKS, cfg, twin, change) <= compare.OUT["float64"]


def test_a_large_sink_takes_everything():
    cfg = SINKS.examples[1]  # no output bias
    params, x = weights(SINKS, cfg, "float32"), tokens(cfg, 1, 4, "float32")
    forward, _, decode = compiled(SINKS, cfg)
    cache = SINKS.init_cache(cfg, 1, 5, jnp.float32)
    full = {**params, "sinks": np.full_like(params["sinks"], 1e4)}
    assert (forward(params, x) != 0).all() and (forward(full, x) == 0).all()
    assert (decode(params, x[:, :1], cache)[0] != 0).all() and (decode(full, x[:, :1], cache)[0] == 0).all()


# --- bytes (mechanisms.md 10)


def test_a_ring_stops_growing():
    """Mistral-7B-v0.1: 4096 B a token up to W = 4096 tokens; gpt-oss: 2048 B and W = 128."""
    mistral, oss = WINDOW.models["Mistral-7B-v0.1"], SINKS.models["gpt-oss-120b window"]
    for att, cfg, width, W in ((WINDOW, mistral, 4096, 4096), (SINKS, oss, 2048, 128)):
        for context in (1, W - 1, W, W + 1, 5 * W):
            cost = att.cost(cfg, context=context)
            assert sum(cost.read.values()) == sum(cost.stored.values()) == width * min(context, W)
            assert sum(cost.written.values()) == width and cost.entries_read == min(context, W)
        assert (att.cost(cfg, context=W - 1).per_token, att.cost(cfg, context=W + 1).per_token) == (width, 0)


def test_streaming_bytes():
    cfg = STREAMING.models["Llama-2-7B streaming"]
    cost = STREAMING.cost(cfg, context=100_000)
    assert sum(cost.read.values()) == sum(cost.stored.values()) == cost.fixed == 2004 * 16384
    assert sum(cost.written.values()) == 16384 and cost.per_token == 0
