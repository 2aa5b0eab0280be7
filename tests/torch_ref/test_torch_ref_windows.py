"""torch_ref's sliding window, learned sinks and StreamingLLM, each against a loop over the tokens a query sees."""

import math

import dense_family as family
import pytest
import torch
from dense_family import DENSE, INF, NAN, close, config, int32, random, tokens

import torch_ref
from torch_ref.attention import dense, sinks, sliding_window, streaming
from torch_ref.core import ring

every_dense = pytest.mark.parametrize("fields", DENSE.values(), ids=DENSE)
# of 17 tokens: at and around 5 and 10 (W = 5), 7 and 8 (s + R), and chunks longer than both
SPLITS = [5, 11, [4, 2, 1, 1, 9]]


def window_loop(cfg, sink_logits=None, window=None):
    def loop(params, x, positions):
        width = window or x.shape[1]
        sees = lambda q, k, t, n: [s for s in range(t + 1) if t - width < s]  # noqa: E731
        return family.loop_over_visible(params, cfg, x, positions, sees, sink_logits)

    return loop


def cases():
    """(mechanism, cfg, params, loop) by name: each kind of dense config under each mechanism."""
    built = {}
    for name, fields in DENSE.items():
        cfg = config(**fields, sliding_window=5)
        params = family.init_params(cfg)
        built[f"sliding_window-{name}"] = (sliding_window, cfg, params, window_loop(cfg, window=5))
        for window in (None, 5):
            cfg = config(**fields, sliding_window=window)
            params = family.init_params(cfg, sinks=(cfg.num_attention_heads,))
            params["sinks"] = 4 * params["sinks"]
            loop = window_loop(cfg, params["sinks"].tolist(), window)
            built[f"sinks-{window}-{name}"] = (sinks, cfg, params, loop)
        cfg = config(**fields, start_size=2, recent_size=5)
        built[f"streaming-{name}"] = (streaming, cfg, family.init_params(cfg), streaming_loop(cfg))
    return built


def streaming_loop(cfg):
    """The tokens kept, in a list; sinks meet the query where the dropped tokens would not have been."""

    def loop(params, x, positions):
        ys = []
        for row, where in zip(x, positions.tolist(), strict=True):
            q, k, v = family.project_row(params, cfg, row)
            outs = torch.zeros(len(row), cfg.num_attention_heads, cfg.v_head_dim, dtype=x.dtype)
            kept = []
            for t in range(len(row)):
                dropped = t - len(kept)
                if len(kept) == cfg.start_size + cfg.recent_size:
                    del kept[cfg.start_size]
                    dropped += 1
                kept.append(t)
                for n in range(cfg.num_attention_heads):
                    kv = n // (cfg.num_attention_heads // cfg.num_key_value_heads)
                    logits = []
                    for s in kept:
                        query = family.rope(cfg, q[t, n], where[t] - (dropped if s < cfg.start_size else 0))
                        logits.append(family.logit(cfg, query, family.rope(cfg, k[s, kv], where[s])))
                    for s, weight in zip(kept, family.probabilities(logits), strict=True):
                        outs[t, n] += weight * v[s, kv]
            ys.append(family.output_row(params, cfg, row, outs))
        return torch.stack(ys)

    return loop


CASES = cases()
every_case = pytest.mark.parametrize(("att", "cfg", "params", "loop"), CASES.values(), ids=CASES)


@every_case
def test_forward_is_the_loop(att, cfg, params, loop):
    x = tokens(cfg, new=13)
    close(att.forward(params, cfg, x), loop(params, x, family.default_positions(x)))
    odd = family.odd_positions(x)
    close(att.forward(params, cfg, x, odd), loop(params, x, odd))


@every_case
def test_a_shift_of_all_positions_changes_nothing(att, cfg, params, loop):
    x = tokens(cfg, new=13)
    close(att.forward(params, cfg, x, family.default_positions(x) + 50), att.forward(params, cfg, x))


@every_case
def test_every_split_is_forward(att, cfg, params, loop):
    family.check_splits(att, params, cfg, tokens(cfg, new=17), capacity=17, splits=SPLITS)


@every_case
def test_ragged_rows_equal_rows_alone(att, cfg, params, loop):
    family.check_ragged(att, params, cfg, 30, first=(13, 0, 4, 1, 6), second=(1, 2, 0, 12, 3))


@every_case
def test_gradients_and_inputs(att, cfg, params, loop):
    family.check_gradients(att, params, cfg, capacity=8)
    family.check_inputs_kept(att, params, cfg, capacity=12)


@pytest.mark.parametrize("name", ["sliding_window-gpt_oss", "sinks-None-gemma", "sinks-5-gated", "streaming-plain"])
def test_prefill_attends_over_what_it_stored(name):
    att, cfg, params, _ = CASES[name]
    family.check_stored_precision(att, params, cfg, tokens(cfg, new=13), capacity=16)


@pytest.mark.parametrize(
    ("name", "fields", "capacity"),
    [
        ("sliding_window-plain", {"sliding_window": 9}, 8),
        ("sinks-None-plain", {}, 8),
        ("sinks-5-plain", {"sliding_window": 9}, 8),
        ("streaming-plain", {"recent_size": 9}, 8),
        ("streaming-plain", {"start_size": 9, "recent_size": 3}, 8),
        ("streaming-plain", {"start_size": 4, "recent_size": 5}, 3),
    ],
)
def test_a_cache_shorter_than_the_window_overflows(name, fields, capacity, monkeypatch):
    att, cfg, params, _ = CASES[name]
    cfg = config(**vars(cfg) | fields)
    family.check_overflow(att, params, cfg, capacity, monkeypatch)
    x = tokens(cfg, new=capacity)
    close(att.prefill(params, cfg, x, att.init_cache(cfg, 2, capacity, x.dtype))[0], att.forward(params, cfg, x))


@pytest.mark.parametrize("name", ["sliding_window-plain", "sinks-5-plain", "streaming-plain"])
def test_a_cache_of_the_window_never_overflows(name):
    att, cfg, params, _ = CASES[name]
    whole = cfg.start_size + cfg.recent_size if att is streaming else cfg.sliding_window
    family.check_splits(att, params, cfg, tokens(cfg, new=17), capacity=whole, splits=[7])
    cache = att.init_cache(cfg, 2, 1000)
    assert cache["k"].shape[1] == cache["v"].shape[1] == whole


# ---- limits


@every_dense
def test_wide_windows_and_absent_sinks_are_gqa(fields):
    x = tokens(config(**fields), new=9)
    base = family.init_params(config(**fields))
    expected = dense.forward(base, config(**fields), x)
    close(sliding_window.forward(base, config(**fields, sliding_window=9), x), expected)
    close(streaming.forward(base, config(**fields, start_size=4, recent_size=5), x), expected)
    absent = base | {"sinks": torch.full(base["wq"].shape[1:2], -INF, dtype=x.dtype)}
    close(sinks.forward(absent, config(**fields, sliding_window=None), x), expected)
    narrow = config(**fields, sliding_window=3)
    close(sinks.forward(absent, narrow, x), sliding_window.forward(base, narrow, x))
    y, _ = family.fold_decode(sinks, absent, narrow, x, sinks.init_cache(narrow, 2, 9, x.dtype))
    close(y, sliding_window.forward(base, narrow, x))


def test_one_key_short_of_the_limit_differs():
    cfg, x = config(sliding_window=8, start_size=3, recent_size=5), tokens(config(), new=9)
    params = family.init_params(cfg)
    expected = dense.forward(params, cfg, x)
    for att in (sliding_window, streaming):
        y = att.forward(params, cfg, x)
        close(y[:, :8], expected[:, :8])
        assert not torch.allclose(y[:, 8], expected[:, 8], atol=1e-4)


def test_a_huge_sink_takes_all_the_weight():
    cfg = config(sliding_window=None)
    params = family.init_params(cfg) | {"sinks": torch.full((4,), 800.0, dtype=torch.float64)}
    assert (sinks.forward(params, cfg, tokens(cfg)).abs() < 1e-300).all()


def test_streaming_is_the_paper_where_all_keys_are_rotated_again():
    """Keys before RoPE in a list, rotated at 0 .. n-1 at every step, the query at n-1."""
    cfg = config(start_size=2, recent_size=4)
    params, x = family.init_params(cfg), tokens(config(), batch=1, new=11)
    q, k, v = family.project_row(params, cfg, x[0])
    outs = torch.zeros(11, 4, 5, dtype=x.dtype)
    for t in range(11):
        kept = [*range(min(2, t + 1)), *range(max(2, t - 3), t + 1)]
        for n in range(4):
            query = family.rope(cfg, q[t, n], len(kept) - 1)
            logits = [family.logit(cfg, query, family.rope(cfg, k[s, n // 2], i)) for i, s in enumerate(kept)]
            outs[t, n] = sum(w * v[s, n // 2] for s, w in zip(kept, family.probabilities(logits), strict=True))
    expected = family.output_row(params, cfg, x[0], outs)[None]
    close(streaming.forward(params, cfg, x), expected)
    close(family.fold_decode(streaming, params, cfg, x, streaming.init_cache(cfg, 1, 11, x.dtype))[0], expected)


def test_streaming_writes_each_token_to_one_part():
    cfg = config(start_size=2, recent_size=5)
    params, x = family.init_params(cfg), tokens(cfg, 1, 3)
    _, cache = streaming.prefill(params, cfg, x[:, :1], family.poisoned_cache(streaming, cfg, 1, 9))
    assert cache["k"][0, 0].isfinite().all() and cache["k"][0, 1:].isnan().all()
    _, cache = streaming.prefill(params, cfg, x[:, 1:], cache)
    assert cache["k"][0, :3].isfinite().all() and cache["k"][0, 3:].isnan().all()


# ---- golden tables


@pytest.mark.parametrize(
    ("length", "held"),
    [(0, [-4, -3, -2, -1]), (3, [0, 1, 2, -1]), (4, [0, 1, 2, 3]), (5, [4, 1, 2, 3]), (10, [8, 9, 6, 7])]
    + [(6, [4, 5, 2, 3]), (8, [4, 5, 6, 7])],
)
def test_ring_of_four_slots(length, held):
    assert ring.held(int32(length), 4).tolist() == [held]
    ids = torch.arange(10.0)[None, :, None]
    buffer = ring.write(torch.full((1, 4, 1), NAN), ids, int32(0), int32(length))
    expected = torch.tensor([float(position) if position >= 0 else NAN for position in held])
    torch.testing.assert_close(buffer[0, :, 0], expected, equal_nan=True)


@pytest.mark.parametrize(
    ("total", "kept"),
    [(6, [0, 1, 2, 3, 4, 5]), (7, [0, 1, 3, 4, 5, 6]), (10, [0, 1, 6, 7, 8, 9])],
)
def test_streaming_keeps_two_and_four(total, kept):
    """Values that are token ids tell which tokens the last query attends; keys tell the positions they stand at."""
    cfg = config(n=1, k=1, start_size=2, recent_size=4)
    order = torch.arange(total)[None]
    assert streaming.visible(cfg, order, order)[0, -1].nonzero().flatten().tolist() == kept
    unit = torch.zeros(1, total, 1, 6, dtype=torch.float64)
    unit[..., 2] = 1.0  # a channel that turns by 1e4^(-1/3) a position
    window, sink = streaming.both_queries(cfg, unit, order, order)
    distances = []
    for s in kept:
        query = (sink if s < 2 else window)[0, -1, 0]
        cosine = query @ family.rope(cfg, unit[0, 0, 0], s)
        distances.append(round(math.acos(min(1.0, float(cosine))) / 1e4 ** (-2 / 3)))
    assert distances == [5, 4, 3, 2, 1, 0]
    cache = streaming.init_cache(cfg, 1, total, torch.float64)
    x = tokens(cfg, 1, total)
    _, cache = streaming.prefill(family.init_params(cfg), cfg, x, cache)
    v = cache["v"][0, :, 0]
    every = (x[0] @ family.init_params(cfg)["wv"][:, 0])[kept]
    close(v.sort(0).values, every.sort(0).values)


# ---- bad inputs


def run(att, cfg, cache=None, params=None):
    x = tokens(cfg)
    params = family.init_params(cfg, sinks=(4,)) if params is None else params
    return att.prefill(params, cfg, x, att.init_cache(cfg, 2, 9, x.dtype) if cache is None else cache)


@pytest.mark.parametrize(
    ("att", "fields", "error", "message"),
    [
        (sliding_window, {"sliding_window": 0}, ValueError, r"^sliding_window is 0; allowed: an int >= 1$"),
        (sliding_window, {"sliding_window": None}, TypeError, r"^sliding_window is a NoneType; allowed: an int >= 1$"),
        (sinks, {"sliding_window": -1}, ValueError, r"^sliding_window is -1; allowed: an int >= 1$"),
        (streaming, {"start_size": 0, "recent_size": 1}, ValueError, r"^start_size is 0; allowed: an int >= 1$"),
        (streaming, {"start_size": 1, "recent_size": 2.0}, TypeError, r"^recent_size is a float; allowed: an int"),
    ],
)
def test_bad_fields_are_named(att, fields, error, message):
    cfg = config(**fields)
    for call in (lambda: att.forward(family.init_params(cfg, sinks=(4,)), cfg, tokens(cfg)), lambda: run(att, cfg)):
        with pytest.raises(error, match=message):
            call()


def test_bad_caches_and_parameters_are_named():
    cfg = config(sliding_window=5, start_size=2, recent_size=5)
    wide = sliding_window.init_cache(config(sliding_window=6), 2, 9, torch.float64)
    with pytest.raises(ValueError, match=r'^cache\["k"\] has S=6 slots; allowed: at most 5, the window$'):
        run(sliding_window, cfg, wide)
    with pytest.raises(ValueError, match=r'^params\["sinks"\] has shape \[2\]; allowed: \[4\]$'):
        run(sinks, cfg, params=family.init_params(cfg, sinks=(2,)))
    cache = streaming.init_cache(cfg, 2, 9, torch.float64)
    with pytest.raises(ValueError, match=r'^cache\["k"\] has 8 slots; allowed: at most start_size \+ recent_size = 7$'):
        run(streaming, cfg, streaming.init_cache(config(start_size=2, recent_size=6), 2, 9, torch.float64))
    with pytest.raises(ValueError, match=r'^cache\["v"\] has shape \[2, 1, 2, 5\]; allowed: \[B=2 S=7 '):
        run(streaming, cfg, cache | {"v": cache["v"][:, :1]})
    with pytest.raises(TypeError, match=r'^cache\["v"\] has dtype torch.float32; allowed: float64$'):
        run(streaming, cfg, cache | {"v": cache["v"].float()})
    for att in (sliding_window, sinks, streaming):
        with pytest.raises(ValueError, match=r"^x has shape \[2, 7, 10\]; allowed: \[B T=1 D=10\]$"):
            params = family.init_params(cfg, sinks=(4,))
            att.decode(params, cfg, tokens(cfg), att.init_cache(cfg, 2, 9, torch.float64))


@pytest.mark.parametrize("name", ["sliding_window", "sinks", "streaming"])
def test_the_registry_knows_them(name):
    assert torch_ref.get(name).__name__ == f"torch_ref.attention.{name}"


def test_decode_reads_a_ring_by_its_length():
    """The op is handed min(length, W) slots and no window, so slots that were never written stay unread."""
    cfg = config(sliding_window=5)
    params, calls = family.init_params(cfg), []

    class Spy:
        @staticmethod
        def decode_attention(q, k, v, lengths, **options):
            calls.append((k.shape[1], lengths.tolist(), options))
            return torch_ref.ops.decode_attention(q, k, v, lengths, **options)

    x = random(2, 12, 10)
    _, cache = sliding_window.prefill(params, cfg, x, sliding_window.init_cache(cfg, 2, 9, x.dtype), int32(12, 2))
    sliding_window.decode(params, cfg, x[:, :1], cache, ops=Spy)
    assert calls[0][:2] == (5, [5, 3]) and "window" not in calls[0][2]
