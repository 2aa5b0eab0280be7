"""DeepSeek-V4's attention beyond the laws: golden tables, entries by their definition, states, bytes, limits."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judges import compiled, limit, tokens, weights

import jforge
from jforge.attention import csa, hca, v4_compress
from jforge.core import compare, rope
from jforge.traffic import decode_traffic

WINDOW, CSA, HCA = (jforge.get(name) for name in ("v4_window", "csa", "hca"))
YARN = {"rope_type": "yarn", "rope_theta": 1.6e5, "factor": 4.0, "original_max_position_embeddings": 32}
SMALL = {"hidden_size": 8, "num_attention_heads": 4, "head_dim": 6, "qk_rope_head_dim": 4, "q_lora_rank": 5,
         "o_groups": 2, "o_lora_rank": 3, "sliding_window": 3, "rope_parameters": YARN}  # fmt: skip
INDEX = {"index_n_heads": 4, "index_head_dim": 5, "index_topk": 2}
ONLY_WINDOW = WINDOW.Config(**SMALL)
PICKED, ALL = CSA.Config(**SMALL, **INDEX, compress_rate=4), HCA.Config(**SMALL, compress_rate=4)
BOTH = [("csa", PICKED), ("hca", ALL)]
NAMES = [name for name, _ in BOTH]


def compressors(cfg):
    return csa.compressors(cfg) if isinstance(cfg, CSA.Config) else (hca.compressor(cfg),)


# --- golden tables (mechanisms.md 13)


def test_entries_that_a_query_sees():
    t = jnp.array([[0, 2, 3, 4, 6, 7, 8, 11]])
    want = [0, 0, 1, 1, 1, 2, 2, 3]
    seen = v4_compress.seen(PICKED, t, 4)[0]
    assert seen.sum(axis=-1).tolist() == want
    assert (jnp.diff(seen.astype(int), axis=-1) <= 0).all()  # the first ones
    for att, cfg in ((CSA, PICKED), (HCA, ALL)):
        assert att.cache_spec(cfg)["c_kv"].valid(cfg, t[0] + 1).tolist() == want


def test_tokens_that_an_entry_pools():
    picks = jnp.array([0, 1, 2, -1])[:, None, None, None]
    read = csa.tokens_of(PICKED, picks, 12)[:, 0]
    assert [np.flatnonzero(row).tolist() for row in read] == [[0, 1, 2, 3], list(range(8)), list(range(4, 12)), []]
    assert csa.tokens_of(PICKED, picks.swapaxes(0, 3), 12)[0, 0].all()


def test_yarn_blends_between_channels_15_and_25():
    cfg = CSA.models["DeepSeek-V4-Pro"]
    assert rope.yarn_range(cfg.rope_parameters, cfg.qk_rope_head_dim) == (15, 25)
    assert rope.frequencies(cfg.rope_parameters, cfg.qk_rope_head_dim)[1] == 1.0


# --- entries and states by their definition


def _turn(cfg, x, position):
    """Pairs of the last R channels as complex numbers, times exp(i position theta)."""
    R, out = cfg.qk_rope_head_dim, x.copy()
    theta, _ = rope.frequencies(cfg.rope_parameters, R)
    pairs = (x[-R::2] + 1j * x[len(x) - R + 1 :: 2]) * np.exp(1j * position * theta)
    out[-R::2], out[len(x) - R + 1 :: 2] = pairs.real, pairs.imag
    return out


def _entry(cfg, c, params, u, z, w):
    """Entry w of one row, channel by channel: softmax over time of its rows."""
    m, H, out = c.rate, c.width, np.zeros(c.width)
    for h in range(H):
        own = [(s, H + h if c.overlap else h) for s in range(w * m, (w + 1) * m)]
        before = [(s, h) for s in range(max(0, w - 1) * m, w * m)] if c.overlap else []
        gates = np.exp([z[row] for row in before + own])
        out[h] = gates @ [u[row] for row in before + own] / gates.sum()
    out = out / np.sqrt((out**2).mean() + cfg.rms_norm_eps) * params[f"{c.params}_norm"]
    return _turn(cfg, out, w * m)


def _rows(c, params, x):
    bias = params[f"{c.params}_bias"][np.arange(len(x)) % c.rate]
    return x @ params[f"w{c.params}_kv"], x @ params[f"w{c.params}_gate"] + bias


def _state(c, rows, length):
    """[last complete block |] open block, 0 where there is no token."""
    start, out = length // c.rate * c.rate - c.behind, np.zeros((c.behind + c.rate, c.channels))
    for i in range(len(out)):
        if 0 <= start + i < length:
            out[i] = rows[start + i]
    return out


@pytest.mark.parametrize("name,cfg", BOTH, ids=NAMES)
def test_cache_holds_the_entries_and_rows_of_the_definition(name, cfg):
    """Every length mod m twice, in one ragged prefill of rows of 0 to 9 tokens."""
    att, lengths = jforge.get(name), np.arange(10, dtype=np.int32)
    with jax.enable_x64(True):
        params, x = weights(att, cfg), tokens(cfg, 10, 9)
        _, cache = compiled(att, cfg)[1](params, x, att.init_cache(cfg, 10, 9, jnp.float64), lengths)
        for c in compressors(cfg):
            for b in range(10):
                u, z = _rows(c, params, x[b])
                got = np.asarray(getattr(cache, c.entries))[b, : b // 4]
                want = np.array([_entry(cfg, c, params, u, z, w) for w in range(b // 4)]).reshape(got.shape)
                assert compare.relative(got, want) <= compare.OUT["float64"], (c.entries, b)
                for state, rows in zip(c.states, (u, z), strict=True):
                    got = getattr(cache, state)[b]
                    assert compare.relative(got, _state(c, rows, b)) <= compare.OUT["float64"], (state, b)


@pytest.mark.parametrize("name,cfg", BOTH, ids=NAMES)
def test_states_are_float32_and_entries_rounded(name, cfg):
    """A bfloat16 cache: decode and one prefill agree to bfloat16, states hold more digits than that."""
    att = jforge.get(name)
    params, x = weights(att, cfg, "float32"), tokens(cfg, 2, 9, "float32")
    _, prefill, decode = compiled(att, cfg)
    empty = att.init_cache(cfg, 2, 9, jnp.bfloat16)
    want, one_shot = prefill(params, x, empty)
    cache, ys = empty, []
    for t in range(9):
        y, cache = decode(params, x[:, t : t + 1], cache)
        ys.append(y)
    assert compare.relative(jnp.concatenate(ys, axis=1), want) <= compare.OUT["bfloat16"]
    for c in compressors(cfg):
        assert getattr(cache, c.entries).dtype == jnp.bfloat16
        for state in c.states:
            leaf = getattr(cache, state)
            assert leaf.dtype == jnp.float32 and (leaf.astype(jnp.bfloat16) != leaf).any()
            assert compare.relative(leaf, getattr(one_shot, state)) <= compare.OUT["float32"]


# --- limits


def _shut(params):
    """No weight on the series that the next block would use."""
    bias, H = params["c_bias"].copy(), params["c_norm"].shape[0]
    bias[:, :H] = -1e9
    return {**params, "c_bias": bias}


def _own_series(params):
    """The parameters of an hca layer that makes the same entries."""
    H = params["c_norm"].shape[0]
    mine = {name: params[name] for name in jax.eval_shape(lambda: HCA.init_params(jax.random.key(0), ALL))}
    return mine | {name: params[name][:, H:] for name in ("wc_kv", "wc_gate", "c_bias")}


def test_csa_with_all_picks_and_one_series_is_hca():
    cfg = replace(PICKED, index_topk=9)
    assert limit(CSA, cfg, (HCA, ALL, _own_series), _shut) <= compare.OUT["float64"]


def test_no_complete_block_is_the_window_alone():
    names = jax.eval_shape(lambda: WINDOW.init_params(jax.random.key(0), ONLY_WINDOW))
    twin = (WINDOW, ONLY_WINDOW, lambda params: {name: params[name] for name in names})
    assert limit(CSA, replace(PICKED, compress_rate=11), twin) <= compare.OUT["float64"]


# --- what decode hands to its ops, and what it moves


def _spied(att, cfg, T: int):
    """The calls of the last of T decode steps, by op: keyword arguments and argument shapes."""
    calls = {}

    def spy(op):
        def call(*args, **kwargs):
            shapes = [getattr(a, "shape", a) for a in args]
            calls.setdefault(op, []).append((shapes, kwargs))
            return getattr(jforge.ops, op)(*args, **kwargs)

        return call

    ops = SimpleNamespace(**{op: spy(op) for op in jforge.ops.__all__ if op != "mix"})
    params, x = weights(att, cfg, "float32"), tokens(cfg, 1, T, "float32")
    _, cache = compiled(att, cfg)[1](params, x[:, :-1], att.init_cache(cfg, 1, T, jnp.float32))
    jax.eval_shape(lambda p, x, c: att.decode(p, cfg, x, c, ops=ops), params, x[:, -1:], cache)
    return calls


def test_csa_decodes_through_four_ops_and_one_sink():
    calls = _spied(CSA, PICKED, 13)
    assert {op: len(c) for op, c in calls.items()} == {
        "decode_attention": 1, "index_scores": 1, "topk_indices": 1, "decode_block_sparse": 1, "merge_states": 1
    }  # fmt: skip
    (ring, near), (picked, far) = calls["decode_attention"][0], calls["decode_block_sparse"][0]
    assert ring[1] == (1, 3, 1, 6) and near["sinks"] is not None
    assert picked == [(1, 1, 4, 6), (1, 3, 1, 6), None, (1, 1, 1, 2), None]  # v=None, two picks of three, no lengths
    assert far["block_size"] == 1 and far.get("sinks") is None
    assert near["out_dtype"] == far["out_dtype"] == jnp.float32


def test_hca_decodes_through_two_dense_calls_and_one_sink():
    calls = _spied(HCA, ALL, 13)
    assert {op: len(c) for op, c in calls.items()} == {"decode_attention": 2, "merge_states": 1}
    assert [shapes[1] for shapes, _ in calls["decode_attention"]] == [(1, 3, 1, 6), (1, 3, 1, 6)]
    assert [kwargs.get("sinks") is not None for _, kwargs in calls["decode_attention"]] == [True, False]


@pytest.mark.parametrize("context", [1, 2, 3, 4, 5, 7, 8, 13])
@pytest.mark.parametrize("name,cfg", BOTH, ids=NAMES)
def test_bytes_at_any_context(name, cfg, context):
    att = jforge.get(name)
    for closing in (False, True):
        cost = att.cost(cfg, context=context, dtype=jnp.bfloat16, closing=closing)
        moved = decode_traffic(att, cfg, context, jnp.bfloat16, closing=closing)
        assert (cost.read, cost.written) == (moved.read, moved.written), closing
        assert all(type(count) is int for count in cost.written.values())
        assert set(cost.read) & {s for c in compressors(cfg) for s in c.states} == (
            {s for c in compressors(cfg) for s in c.states} if closing else set()
        )


# --- bytes (mechanisms.md 7.7)

MiB = 2**20
LAYERS = {"DeepSeek-V4-Flash": (2, 21, 20), "DeepSeek-V4-Pro": (0, 30, 31)}


def _model(name: str, context: int, closing: bool = False):
    counts = zip((WINDOW, CSA, HCA), LAYERS[name], strict=True)
    layers = [count * att.cost(att.models[name], context=context, closing=closing) for att, count in counts if count]
    return sum(layers[1:], layers[0])


@pytest.mark.parametrize("name,stored,read", [("DeepSeek-V4-Flash", 6.72, 1520), ("DeepSeek-V4-Pro", 9.62, 2206)])
def test_published_bytes_at_a_million_tokens(name, stored, read):
    cost = _model(name, 2**20)
    states = {buffer: size for buffer, size in cost.stored.items() if "state" in buffer}
    _, picked, all_read = LAYERS[name]
    assert sum(states.values()) == picked * (65536 + 16384) + all_read * 524288
    assert round((sum(cost.stored.values()) - sum(states.values())) / 1024 / MiB, 2) == stored
    assert round(sum(cost.read.values()) / MiB) == read


def test_bytes_of_one_layer():
    """E = 1024, E_I = 256: the table's lines at a context above the window and the picks."""
    name, T = "DeepSeek-V4-Flash", 2**16
    window, picked, every = (att.cost(att.models[name], context=T) for att in (WINDOW, CSA, HCA))
    assert (window.per_token, picked.per_token, every.per_token) == (0, (1024 + 256) / 4, 1024 / 128)
    assert window.fixed == 131072 and picked.fixed == 131072 + 65536 + 16384 and every.fixed == 131072 + 524288
    assert sum(window.written.values()) == 1024
    assert sum(picked.written.values()) == 1024 + 2 * 1024 * 4 + 2 * 256 * 4
    assert sum(every.written.values()) == 1024 + 2 * 512 * 4
    assert sum(window.read.values()) == 128 * 1024
    assert picked.read == {"kv": 128 * 1024, "c_kv": 512 * 1024, "k_index": T // 4 * 256}
    assert sum(every.read.values()) == (128 + T // 128) * 1024


def test_a_step_that_closes_a_block_reads_its_state():
    """80 KiB and an entry of both kinds in csa, 512 KiB and an entry in hca; the states are written anew."""
    for att, state, entry in ((CSA, 81920, 1280), (HCA, 524288, 1024)):
        cfg = att.models["DeepSeek-V4-Flash"]
        plain, closing = (att.cost(cfg, context=2**16, closing=c) for c in (False, True))
        assert sum(closing.read.values()) - sum(plain.read.values()) == state
        assert sum(closing.written.values()) == 1024 + entry + state


@pytest.mark.parametrize("slots,capacity", [(1, 1), (2, 2), (3, 7), (5, 7), (8, 11), (12, 15)])
def test_capacity(slots, capacity):
    """Of W = 3 and m = 4: a short ring holds what it has slots for, a whole one leaves it to the entries."""
    for att, cfg in ((CSA, PICKED), (HCA, ALL)):
        assert att.cache_spec(cfg).capacity(att.init_cache(cfg, 1, slots)) == capacity
