"""torch_ref's native sparse attention: its branches one at a time, golden tables, selection, and what decode reads."""

import dense_family as family
import pytest
import torch
from dense_family import DENSE, NAN, close, int32, spied, tokens
from mechanisms import CASES
from nsa_loop import init_params, nsa_config, nsa_loop

import torch_ref
from torch_ref import ops
from torch_ref.attention import dense, nsa, nsa_compress


def test_the_test_configs_pick_more_than_the_first_blocks():
    for name, case in CASES.items():
        if name.startswith("nsa:") and case.cfg.topk > 1:
            x = tokens(case.cfg, new=case.tokens)
            _, picks = nsa_loop(case.params, case.cfg, x, family.default_positions(x))
            assert any(blocks not in ([0], [0, 1], [0, 1, 2]) for blocks in picks.values())


def test_a_cache_without_room_for_an_entry_keeps_one_unused():
    cfg = nsa_config(separate_branches=True)
    cache = nsa.init_cache(cfg, 2, 3)
    shapes = {name: list(leaf.shape) for name, leaf in cache.items()}
    assert shapes["k_cmp"] == [2, 1, 2, 6] and shapes["v_cmp"] == [2, 1, 2, 5]
    assert shapes["tail_k"] == [2, 3, 2, 6] and shapes["k_win"] == [2, 3, 2, 6]
    params, x = init_params(cfg), tokens(cfg, new=3)
    y, cache = nsa.prefill(params, cfg, x, family.poisoned_cache(nsa, cfg, 2, 3))
    close(y, nsa.forward(params, cfg, x))
    assert cache["k_cmp"].isnan().all() and cache["v_cmp"].isnan().all()


# ---- limits: one branch at a time, by gates that are 0 or 1


def only(params, branch):
    """Params whose gate of one branch is 1 and of the others 0, to float64 precision, for x with x[..., 0] = 1."""
    gate = torch.full_like(params["wgate"], 0.0)
    gate[0] = -800.0
    gate[0, :, branch] = 800.0
    return params | {"wgate": gate}


def with_a_one(x):
    return torch.cat([torch.ones_like(x[..., :1]), x[..., 1:]], -1)


@pytest.mark.parametrize("fields", DENSE.values(), ids=DENSE)
def test_all_blocks_selected_is_gqa(fields):
    cfg = nsa_config(**fields, topk=3)
    params, x = init_params(cfg), with_a_one(tokens(cfg, new=17))
    expected = dense.forward(params, cfg, x)
    close(nsa.forward(only(params, 1), cfg, x), expected)
    y, _ = family.fold_decode(nsa, only(params, 1), cfg, x, family.poisoned_cache(nsa, cfg, 2, 17))
    close(y, expected)
    less = nsa.forward(only(params, 1), nsa_config(**fields, topk=2), x)
    close(less[:, :12], expected[:, :12])
    assert (less - expected)[:, 12:].abs().max() > 1e-4


@pytest.mark.parametrize("separate", [False, True])
def test_the_window_branch_is_a_sliding_window(separate):
    cfg = nsa_config(separate_branches=separate, sliding_window=3)
    params, x = init_params(cfg), with_a_one(tokens(cfg, new=17))
    weights = {f"w{side}": params[f"w{side}_win"] for side in "kv"} if separate else {}
    expected = torch_ref.get("sliding_window").forward(params | weights, cfg, x)
    close(nsa.forward(only(params, 2), cfg, x), expected)
    close(family.fold_decode(nsa, only(params, 2), cfg, x, nsa.init_cache(cfg, 2, 17, x.dtype))[0], expected)


def test_entries_of_one_token_are_gqa():
    """l = d = 1, mean, no pe: the compressed branch is full attention."""
    cfg = nsa_config(kernel_size=1, kernel_stride=1, block_size=2, compress="mean")
    params, x = init_params(cfg), with_a_one(tokens(cfg, new=9))
    params |= {name: torch.zeros_like(params[name]) for name in ("k_pe", "v_pe")}
    close(nsa.forward(only(params, 0), cfg, x), dense.forward(params, cfg, x))


def test_no_entry_gives_nothing():
    cfg = nsa_config(attention_output_bias=True)
    params, x = init_params(cfg), with_a_one(tokens(cfg, new=6))
    for y in (
        nsa.forward(only(params, 0), cfg, x),
        nsa.prefill(only(params, 0), cfg, x, family.poisoned_cache(nsa, cfg, 2, 6))[0],
        family.fold_decode(nsa, only(params, 0), cfg, x, family.poisoned_cache(nsa, cfg, 2, 6))[0],
    ):
        close(y[:, :3], params["bo"].expand(2, 3, -1))
        assert (y[:, 3:] - params["bo"]).abs().max() > 1e-4
    close(nsa.forward(only(params, 0), cfg, x[:, :3]), params["bo"].expand(2, 3, -1))


# ---- golden tables

PAPER = nsa_config(kernel_size=32, kernel_stride=16, block_size=64, topk=16, init_blocks=1, local_blocks=2)


@pytest.mark.parametrize(
    ("total", "count"), [(0, 0), (31, 0), (32, 1), (47, 1), (48, 2), (64, 3), (100, 5), (65536, 4095)]
)
def test_entries_after_so_many_tokens(total, count):
    assert nsa_compress.entry_count(PAPER, total) == count
    assert nsa_compress.entry_count(PAPER, int32(total)).tolist() == [count]
    assert nsa.init_cache(PAPER, 1, total)["k_cmp"].shape[1] == max(1, count)


@pytest.mark.parametrize(("t", "count"), [(30, 0), (31, 1), (46, 1), (47, 2), (63, 3)])
def test_entries_visible_to_a_query(t, count):
    seen = nsa_compress.seen(PAPER, torch.tensor([[t]]), 5)[0, 0]
    assert seen.tolist() == [i < count for i in range(5)]


def test_overlap_weights():
    table = nsa_compress.overlaps(PAPER, 20, 3)
    by_block = [{i: w for i, w in enumerate(column.tolist()) if w} for column in table.T]
    assert by_block[0] == {0: 2, 1: 2, 2: 2, 3: 1}
    assert by_block[1] == {3: 1, 4: 2, 5: 2, 6: 2, 7: 1}
    assert by_block[2] == {7: 1, 8: 2, 9: 2, 10: 2, 11: 1}


@pytest.mark.parametrize(("total", "rows"), [(31, 31), (32, 16), (100, 20), (112, 16)])
def test_raw_rows_that_are_still_needed(total, rows):
    """All but the last `rows` tokens' raw rows can be NaN, and one more cannot."""
    cfg = nsa_config(kernel_size=32, kernel_stride=16, block_size=64, topk=2, compress="mean")
    params, x = init_params(cfg), tokens(cfg, 1, 130)
    _, cache = nsa.prefill(params, cfg, x[:, :total], family.poisoned_cache(nsa, cfg, 1, 130))
    expected = nsa.forward(params, cfg, x)[:, total:]
    for kept in (rows, rows - 1):
        dead = [p % 32 for p in range(max(0, total - 32), total - kept)]
        tails = {
            name: cache[name].index_fill(1, torch.tensor(dead, dtype=torch.long), NAN) for name in ("tail_k", "tail_v")
        }
        y, _ = nsa.prefill(params, cfg, x[:, total:], cache | tails)
        assert y.isfinite().all() == (kept == rows)
        if kept == rows:
            close(y, expected)
            close(family.fold_decode(nsa, params, cfg, x[:, total:], cache | tails)[0], expected)


# ---- selection


def scores_to_blocks(cfg, entries, t, blocks):
    """The picks for one head whose probabilities are given by entry."""
    p = torch.zeros(1, 1, 1, 1, 1 + max(entries))
    for i, weight in entries.items():
        p[..., i] = weight
    return nsa.choose(cfg, p, torch.tensor([[t]]), blocks * cfg.block_size)[0, 0, 0].tolist()


def test_forced_blocks_come_first_and_count():
    cfg = nsa_config(kernel_size=32, kernel_stride=16, block_size=64, topk=5, local_blocks=2)
    assert scores_to_blocks(cfg, {8: 0.9, 17: 0.1}, t=6 * 64, blocks=8) == [0, 5, 6, 2, 4]
    assert scores_to_blocks(cfg, {7: 0.6, 21: 0.4}, t=6 * 64, blocks=8) == [0, 5, 6, 1, 2]  # 7 lies in 1 and 2: a tie
    assert scores_to_blocks(cfg, {0: 1.0}, t=2 * 64 + 63, blocks=8) == [0, 1, 2, -1, -1]
    assert scores_to_blocks(cfg, {8: 0.0}, t=6 * 64, blocks=8) == [0, 5, 6, 1, 2]
    assert scores_to_blocks(nsa_config(topk=9, block_size=6), {0: 1.0}, t=3, blocks=2) == [0, -1]


@pytest.mark.parametrize("name", ["plain", "mqa", "mlp_separate"])
def test_decode_reads_the_chosen_blocks_and_the_window(name):
    """NaN in all other slots of k and v; one list per KV head; a window of w slots."""
    cfg = nsa_config(**vars(CASES[f"nsa:{name}"].cfg) | dict(topk=2))
    params, x = init_params(cfg), tokens(cfg, 1, 22)
    _, cache = nsa.prefill(params, cfg, x[:, :21], nsa.init_cache(cfg, 1, 22, x.dtype))
    expected, picks = nsa_loop(params, cfg, x, family.default_positions(x))
    for kv in range(cfg.num_key_value_heads):
        window = [] if cfg.separate_branches else range(19, 22)
        unread = [s for s in range(22) if s // 6 not in picks[0, 21, kv] and s not in window]
        cache["k"][0, unread, kv], cache["v"][0, unread, kv] = NAN, NAN
    calls, spies = spied(ops)
    y, _ = nsa.decode(params, cfg, x[:, 21:], cache, ops=spies)
    (((*_, lists, _), _, _),) = calls["decode_block_sparse"]
    close(y, expected[:, 21:])
    assert cache["k"].isnan().any()
    assert lists.dtype == torch.int32
    assert lists[0, 0].tolist() == [picks[0, 21, kv] for kv in range(cfg.num_key_value_heads)]
    assert [(args[1].shape[1], args[3].tolist()) for args, _, _ in calls["decode_attention"]] == [(10, [10]), (3, [3])]
