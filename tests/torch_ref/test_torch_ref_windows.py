"""torch_ref's sliding window, learned sinks and StreamingLLM: their limits, their rings, and tables by hand."""

import math

import dense_family as family
import pytest
import torch
from dense_family import DENSE, INF, NAN, close, config, int32, random, spied, tokens
from mechanisms import CASES

from torch_ref import ops
from torch_ref.attention import dense, sinks, sliding_window, streaming
from torch_ref.core import ring


@pytest.mark.parametrize("name", ["sliding_window:plain", "sinks:5_plain", "streaming:plain"])
def test_a_cache_of_the_window_never_overflows(name):
    att, cfg, params, *_ = CASES[name]
    whole, x = 7 if att is streaming else 5, tokens(cfg, new=17)
    y, cache = family.fold_decode(att, params, cfg, x, family.poisoned_cache(att, cfg, 2, whole))
    close(y, att.forward(params, cfg, x))
    assert att.init_cache(cfg, 2, 1000)["k"].shape[1] == cache["v"].shape[1] == whole
    allowed = r"start_size \+ recent_size = 7" if att is streaming else "5, the window"
    wide = {side: torch.cat([cache[side], cache[side][:, :1]], 1) for side in "kv"}
    with pytest.raises(ValueError, match=rf'^cache\["k"\] has (S=)?{whole + 1} slots; allowed: at most {allowed}$'):
        att.prefill(params, cfg, x, cache | wide)


# ---- limits


@pytest.mark.parametrize("fields", DENSE.values(), ids=DENSE)
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


def test_decode_reads_a_ring_by_its_length():
    """The op is handed min(length, W) slots and no window, so slots that were never written stay unread."""
    cfg = config(sliding_window=5)
    params, x, (calls, spies) = family.init_params(cfg), random(2, 12, 10), spied(ops)
    _, cache = sliding_window.prefill(params, cfg, x, sliding_window.init_cache(cfg, 2, 9, x.dtype), int32(12, 2))
    sliding_window.decode(params, cfg, x[:, :1], cache, ops=spies)
    (((_, k, _, lengths), options, _),) = calls["decode_attention"]
    assert k.shape[1] == 5 and lengths.tolist() == [5, 3] and "window" not in options
