"""torch_ref's layers of DeepSeek-V4: their limits, tables, caches, and what decode hands to the ops."""

from types import SimpleNamespace

import dense_family as family
import pytest
import torch
from dense_family import INF, NAN, close, default_positions, filled, spied, tokens
from v4_loop import CASES, angles, gate_rows, init_params, v4_config, v4_loop, v4_row

from torch_ref import ops
from torch_ref.attention import csa, hca, v4_compress, v4_window
from torch_ref.core.rope import frequencies

every_case = pytest.mark.parametrize(("att", "cfg"), CASES.values(), ids=CASES)
COMPRESSED = {name: case for name, case in CASES.items() if case[0] is not v4_window}
every_compressed = pytest.mark.parametrize(("att", "cfg"), COMPRESSED.values(), ids=COMPRESSED)
both = pytest.mark.parametrize(("att", "overlap"), [(csa, True), (hca, False)], ids=["csa", "hca"])


# ---- limits


@every_case
def test_sinks_at_their_limits(att, cfg):
    params, x = init_params(att, cfg), tokens(cfg, new=6)
    off = params | {"sinks": torch.full_like(params["sinks"], -INF)}
    close(att.forward(off, cfg, x), v4_loop(att, off, cfg, x, default_positions(x)))
    assert not torch.allclose(att.forward(off, cfg, x), att.forward(params, cfg, x), rtol=1e-3)
    drowned = params | {"sinks": torch.full_like(params["sinks"], 1e4)}
    assert att.forward(drowned, cfg, x).abs().max() < 1e-100


@every_compressed
def test_before_the_first_entry_it_is_the_window(att, cfg):
    cfg = SimpleNamespace(**(vars(cfg) | {"compress_rate": 9}))
    params, x = init_params(att, cfg), tokens(cfg, new=9)
    close(att.forward(params, cfg, x[:, :8]), v4_window.forward(params, cfg, x[:, :8]))
    expected = v4_window.forward(params, cfg, x)
    y, cache = att.prefill(params, cfg, x[:, :5], family.poisoned_cache(att, cfg, 2, 9))
    close(y, expected[:, :5])
    y, _ = family.fold_decode(att, params, cfg, x[:, 5:], cache)
    close(y[:, :3], expected[:, 5:8])
    assert not torch.allclose(y[:, 3], expected[:, 8], rtol=1e-3)  # the ninth token sees the entry that it completes


def test_enough_picks_are_all_entries():
    cfg = v4_config(index_topk=3)
    params, x = init_params(csa, cfg), tokens(cfg, new=14)
    more = SimpleNamespace(**(vars(cfg) | {"index_topk": 99}))
    close(csa.forward(params, more, x), csa.forward(params, cfg, x))
    _, cache = csa.prefill(params, more, x, family.poisoned_cache(csa, more, 2, 16))
    _, expected = csa.prefill(params, cfg, x, family.poisoned_cache(csa, cfg, 2, 16))
    last = tokens(cfg, new=1, seed=3)
    close(csa.decode(params, more, last, cache)[0], csa.decode(params, cfg, last, expected)[0])


# ---- tables of the specification


def test_visible_entries_by_position():
    table = {0: 0, 2: 0, 3: 1, 4: 1, 6: 1, 7: 2, 8: 2, 11: 3}
    seen = v4_compress.seen(v4_config(compress_rate=4), torch.tensor([list(table)]), 5)
    assert seen.sum(-1).tolist() == [list(table.values())]
    assert all(row == sorted(row, reverse=True) for row in seen[0].tolist())  # the first entries, not any


@both
def test_queries_reach_the_tokens_of_visible_blocks_and_no_other(att, overlap):
    """With a window of 1 and every entry picked, y_t depends on itself and on the blocks complete at t."""
    cfg = v4_config(sliding_window=1, index_topk=9)
    params, x = init_params(att, cfg), tokens(cfg, batch=1, new=12).requires_grad_()
    y = att.forward(params, cfg, x)
    for t in range(12):
        (gradient,) = torch.autograd.grad(y[0, t].square().sum(), x, retain_graph=True)
        reached = [s for s in range(12) if gradient[0, s].any()]
        assert reached == sorted({t, *range((t + 1) // 4 * 4)})


@both
def test_which_tokens_pool_into_which_entry(att, overlap):
    """m = 4: entry 0 holds b of 0-3, entry 1 a of 0-3 and b of 4-7, entry 2 a of 4-7 and b of 8-11; HCA b alone.

    With equal gates an unturned entry is the norm of a mean. a: the first half of the channels, b: the second.
    """
    cfg = v4_config(rms_norm_eps=0.0)
    params, x = init_params(att, cfg), tokens(cfg, batch=1, new=13)
    params |= {name: torch.zeros_like(params[name]) for name in ("wc_gate", "c_bias")}
    params["c_norm"] = torch.ones_like(params["c_norm"])
    _, cache = att.prefill(params, cfg, x, family.poisoned_cache(att, cfg, 1, 15))
    a, b = (x[0] @ params["wc_kv"]).split(7, dim=-1) if overlap else (None, x[0] @ params["wc_kv"])
    for w, first in enumerate((0, 4, 8)):
        total = b[first : first + 4].sum(0)
        if overlap and w > 0:
            total = total + a[first - 4 : first].sum(0)
        unturned = v4_window.rotate(cfg, cache["c_kv"][:, w : w + 1, None], torch.tensor([[-first]]))
        close(unturned[0, 0, 0], total / total.square().mean().sqrt())


@pytest.mark.parametrize(
    ("base", "factor", "length", "low", "high"),
    [(1e4, 40.0, 4096, 10, 23), (1.6e5, 16.0, 65536, 15, 25)],
    ids=["deepseek_v3", "v4_compress"],
)
def test_yarn_ranges(base, factor, length, low, high):
    rope = {"rope_type": "yarn", "rope_theta": base, "factor": factor, "original_max_position_embeddings": length}
    theta, _ = frequencies(rope, 64)
    plain, _ = frequencies({"rope_theta": base}, 64)
    ramp = [min(max((j - low) / (high - low), 0.0), 1.0) for j in range(32)]
    expected = [float(a) * (1 - s + s / factor) for a, s in zip(plain, ramp, strict=True)]
    assert theta.tolist() == pytest.approx(expected, rel=1e-12)
    assert angles(rope, 64) == pytest.approx(expected, rel=1e-12)


def test_rotation_has_no_magnitude_and_takes_all_of_its_channels():
    cfg, x = v4_config(), tokens(v4_config(), new=3).reshape(2, 3, 1, 10)
    where = default_positions(x) + 7
    close(v4_window.rotate(cfg, x, where).norm(dim=-1), x.norm(dim=-1))
    rope = cfg.rope_parameters | {"attention_factor": 3.0, "mscale": 2.0, "partial_rotary_factor": 0.25}
    close(v4_window.rotate(v4_config(rope_parameters=rope), x, where), v4_window.rotate(cfg, x, where))


# ---- the cache


@every_compressed
def test_decode_after_every_prefill_length(att, cfg):
    params, x = init_params(att, cfg), tokens(cfg, new=14)
    expected = att.forward(params, cfg, x)
    for first in range(2 * cfg.compress_rate + 2):
        cache = family.poisoned_cache(att, cfg, 2, 14)
        if first:
            y, cache = att.prefill(params, cfg, x[:, :first], cache)
            close(y, expected[:, :first])
        close(family.fold_decode(att, params, cfg, x[:, first:], cache)[0], expected[:, first:])


@every_compressed
def test_entries_and_states_hold_what_the_loop_says(att, cfg):
    params, x, m = init_params(att, cfg), tokens(cfg, batch=1, new=14), cfg.compress_rate
    names = [("c", "c_kv", "state_kv", "state_score")]
    names += [("ic", "k_index", "index_state_kv", "index_state_score")] if att is csa else []
    cache = family.poisoned_cache(att, cfg, 1, 14)
    for t in range(14):
        _, cache = att.decode(params, cfg, x[:, t : t + 1], cache)
        row = v4_row(att, params, cfg, x[0, : t + 1], range(t + 1))
        complete, opened = (t + 1) // m, (t + 1) // m * m
        for (prefix, entries, *state), expected in zip(names, (row.entries, row.index_keys), strict=False):
            assert cache[entries][0, complete:].isnan().all()
            if complete:
                close(cache[entries][0, :complete], torch.stack(expected))
            raw = gate_rows(params, cfg, x[0, : t + 1], prefix)
            for i, name in enumerate(state):
                wanted = torch.zeros_like(cache[name][0])
                for p in range(max(0, opened - m) if att is csa else opened, t + 1):
                    wanted[p - opened + (m if att is csa else 0)] = raw[p][i]
                close(cache[name][0], wanted)


@every_compressed
def test_entries_that_may_not_be_read_reach_nothing(att, cfg):
    """Of 13 and 6 tokens: entries that are not complete and, in csa, complete ones that the query does not pick."""
    params = init_params(att, cfg)
    cache, x = filled(att, cfg, params), tokens(cfg, new=1, seed=5)
    calls, spies = spied(ops)
    expected, _ = att.decode(params, cfg, x, cache, spies)
    entries = cache["c_kv"].shape[1]
    read = torch.arange(entries) < (cache["length"][:, None] + 1) // cfg.compress_rate
    assert cache["c_kv"][~read].isnan().all() and (~read).any()
    if att is csa:
        ((_, _, picks),) = calls["topk_indices"]
        picked = (picks[:, 0, :, None] == torch.arange(entries)).any(1)
        assert (picked <= read).all() and (read & ~picked).any()
        read = picked
    fresh = torch.arange(entries) == cache["length"][:, None] // cfg.compress_rate  # this call may write it
    poisoned = cache | {"c_kv": cache["c_kv"].masked_fill((~read & ~fresh)[..., None], NAN)}
    for call in (att.decode, att.prefill):
        close(call(params, cfg, x, poisoned)[0], expected)


# ---- overflow


def test_a_row_goes_on_while_its_blocks_have_slots():
    cfg = v4_config()
    params, x = init_params(hca, cfg), tokens(cfg, new=12)
    y, cache = hca.prefill(params, cfg, x[:, :11], family.poisoned_cache(hca, cfg, 2, 9))  # two slots for entries
    close(y, hca.forward(params, cfg, x[:, :11]))
    with pytest.raises(ValueError, match=r"^row 0 overflows its cache: length 11 \+ 1 new tokens, capacity 11$"):
        hca.decode(params, cfg, x[:, 11:], cache)


@both
def test_a_ring_below_the_window_ends_the_row(att, overlap):
    """Three tokens of capacity: the one slot for an entry would do for seven, the ring of three would not."""
    cfg = v4_config()
    params, x = init_params(att, cfg), tokens(cfg, new=4)
    y, cache = att.prefill(params, cfg, x[:, :3], family.poisoned_cache(att, cfg, 2, 3))
    close(y, att.forward(params, cfg, x[:, :3]))
    with pytest.raises(ValueError, match=r"^row 0 overflows its cache: length 3 \+ 1 new tokens, capacity 3$"):
        att.decode(params, cfg, x[:, 3:], cache)


# ---- the ops


def test_decode_hands_the_ops_what_they_need():
    """The sink rides with the window alone, parts are merged in float32, picks are gathered and nothing is masked."""
    for name in ("csa", "hca"):
        att, cfg = CASES[name]
        params = init_params(att, cfg, torch.bfloat16)
        cache, (calls, spies) = filled(att, cfg, params, (13, 7), dtype=torch.bfloat16), spied(ops)
        att.decode(params, cfg, tokens(cfg, new=1, dtype=torch.bfloat16), cache, spies)
        (args, options, _), *others = calls["decode_attention"]
        assert torch.equal(options["sinks"], params["sinks"]) and args[3].tolist() == [5, 5]
        assert [list(x.shape) for x in args[:3]] == [[2, 1, 4, 7], [2, 5, 1, 7], [2, 5, 1, 7]]
        if att is csa:
            ((q, k, v, picks, lengths), options, _) = calls["decode_block_sparse"][0]
            assert v is None and lengths is None and options["block_size"] == 1 and picks.shape == (2, 1, 1, 2)
            ((_, _, weights, complete), _, _) = calls["index_scores"][0]
            assert weights.dtype == torch.float32
            assert not others
        else:
            ((q, k, v, complete), options, _) = others[0]
        assert k.shape == (2, 4, 1, 7) and complete.tolist() == [3, 2]
        assert "sinks" not in options and options["scale"] == 7**-0.5
        ((outs, lses), _, _) = calls["merge_states"][0]
        assert outs.dtype == lses.dtype == torch.float32 and outs.shape == (2, 2, 1, 4, 7)


def test_index_scores_carry_their_scale():
    att, cfg = CASES["csa"]
    params = init_params(att, cfg)
    cache, x, (calls, spies) = filled(att, cfg, params), tokens(cfg, new=1, seed=5), spied(ops)
    att.decode(params, cfg, x, cache, spies)
    ((_, _, weights, _), _, _) = calls["index_scores"][0]
    close(weights, x @ params["ww_index"] / 40**0.5)
