"""torch_ref's static block patterns and MoBA: their limits, tables by hand, what decode gathers, and MoBA's means."""

import dense_family as family
import pytest
import torch
from block_loop import blocks_of, moba_config, moba_sees, pattern_config, pattern_sees
from dense_family import DENSE, NAN, close, config, int32, spied, tokens
from mechanisms import CASES

from torch_ref import ops
from torch_ref.attention import block_sparse, dense, moba

# ---- limits


@pytest.mark.parametrize("fields", DENSE.values(), ids=DENSE)
def test_all_blocks_are_gqa(fields):
    x, params = tokens(config(**fields), new=11), family.init_params(config(**fields))
    expected = dense.forward(params, config(**fields), x)
    for part in ("num_global_blocks", "num_local_blocks", "num_random_blocks"):
        cfg = pattern_config("local", **fields | {part: 4})
        close(block_sparse.forward(params, cfg, x), expected)
        close(
            family.fold_decode(block_sparse, params, cfg, x, block_sparse.init_cache(cfg, 2, 11, x.dtype))[0], expected
        )
    close(block_sparse.forward(params, pattern_config("local", **fields, vert_stride=1), x), expected)
    cfg = moba_config(3, 4, **fields)
    close(moba.forward(params, cfg, x), expected)
    close(family.fold_decode(moba, params, cfg, x, moba.init_cache(cfg, 2, 11, x.dtype))[0], expected)


def test_dense_decode_sees_all_keys_and_prefill_does_not():
    cfg = config(moba_chunk_size=3, moba_topk=2, dense_decode=True)
    params, x = family.init_params(cfg), tokens(cfg, new=11)
    y, cache = family.fold_decode(moba, params, cfg, x, family.poisoned_cache(moba, cfg, 2, 12))
    close(y, dense.forward(params, cfg, x))
    sparse, prefilled = moba.prefill(params, cfg, x, family.poisoned_cache(moba, cfg, 2, 12))
    close(sparse, moba.forward(params, cfg, x))
    family.same_caches(prefilled, cache)
    assert (sparse - y)[:, 6:].abs().amin(dim=-1).max() > 1e-4
    close(sparse[:, :6], y[:, :6])


# ---- patterns


def test_patterns_by_hand():
    """Blocks of the last of 8 query blocks, and of the first, where the parts meet."""
    cfg = pattern_config("local", num_global_blocks=2, num_local_blocks=3)
    assert block_sparse.pattern(cfg, 0, 7) == [0, 1, 5, 6, 7]
    assert [block_sparse.pattern(cfg, 0, i) for i in range(4)] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    strided = pattern_config("local", num_local_blocks=1, vert_stride=8)  # N = 4: step 2
    heads = [block_sparse.pattern(strided, n, 9) for n in range(4)]
    assert heads == [[7, 9], [5, 9], [3, 9], [1, 9]]
    more_heads = pattern_config("local", n=6, num_local_blocks=1, vert_stride=4)  # 4 // 6 = 0: step 1
    assert [block_sparse.pattern(more_heads, n, 4) for n in range(5)] == [[3, 4], [2, 4], [1, 4], [0, 4], [3, 4]]


def test_random_blocks_are_drawn_once_for_each_head_and_block():
    cfg = pattern_config("bigbird", num_random_blocks=3)
    drawn = {}
    for head in range(4):
        for i in range(30):
            blocks = block_sparse.pattern(cfg, head, i)
            middle = [j for j in blocks if 1 <= j <= i - 1]
            assert len(middle) == min(3, max(0, i - 1)) and blocks == sorted(set(blocks)) and blocks[-1] == i
            drawn[head, i] = tuple(middle)
    assert drawn == {key: tuple(j for j in block_sparse.pattern(cfg, *key) if 1 <= j < key[1]) for key in drawn}
    assert len({drawn[head, 29] for head in range(4)}) > 1
    assert any(
        drawn[0, 29] != tuple(block_sparse.pattern(pattern_config("bigbird", seed=s), 0, 29)[1:-1]) for s in (4, 5)
    )


def test_the_table_is_packed_sorted_and_shared_on_demand():
    cfg = pattern_config("all_parts")
    table = block_sparse.table(cfg, 7)
    assert table.dtype == torch.int32 and table.shape[:2] == (4, 7)
    for head in range(4):
        for i in range(7):
            row = [j for j in table[head, i].tolist() if j >= 0]
            assert row == sorted(blocks_of(cfg, head, i)) and (table[head, i, len(row) :] == -1).all()
    shared = block_sparse.table(pattern_config("all_parts", homo=True), 7)
    assert shared.shape[0] == 1 and torch.equal(shared[0, :, : table.shape[2]], table[0, :, : shared.shape[2]])


# ---- what decode reads


@pytest.mark.parametrize("name", ["block_sparse:plain", "block_sparse:phi_True", "moba:plain", "moba:mqa"])
def test_decode_gathers_the_choose(name):
    """NaN in all other blocks of a full cache, and the lists that the op was handed."""
    att, cfg, params, *_ = CASES[name]
    sees = (moba_sees if att is moba else pattern_sees)(cfg)
    size, kv_heads = getattr(cfg, "block_size", None) or cfg.moba_chunk_size, cfg.num_key_value_heads
    x = tokens(cfg, batch=1, new=18)
    _, cache = att.prefill(params, cfg, x[:, :17], att.init_cache(cfg, 1, 18, x.dtype))
    q, k, _ = family.project_row(params, cfg, x[0])
    q, k = (family.rotated(cfg, z, range(18)) for z in (q, k))
    group = cfg.num_attention_heads // kv_heads
    chosen = [{s // size for s in sees(q, k, 17, n)} for n in range(cfg.num_attention_heads)]
    for head in range(kv_heads):
        read = set().union(*chosen[head * group : (head + 1) * group])
        unread = [s for s in range(18) if s // size not in read]
        cache["k"][0, unread, head], cache["v"][0, unread, head] = NAN, NAN
    assert cache["k"].isnan().any()
    calls, spies = spied(ops)
    y, _ = att.decode(params, cfg, x[:, 17:], cache, ops=spies)
    (((*_, named, length), options, _),) = calls["decode_block_sparse"]
    close(y, att.forward(params, cfg, x)[:, 17:])
    lists = named.shape[2]
    assert named.dtype == torch.int32 and lists == (
        kv_heads if getattr(cfg, "homo_head_pattern", False) else len(chosen)
    )
    for j in range(lists):
        picks = [i for i in named[0, 0, j].tolist() if i >= 0]
        assert set(picks) == chosen[j * cfg.num_attention_heads // lists] and len(set(picks)) == len(picks)
    assert length.tolist() == [18] and options["block_size"] == size


# ---- MoBA's means


def test_means_and_the_open_sum():
    cfg = moba_config(4, 2)
    params, x = family.init_params(cfg), tokens(cfg, batch=1, new=14)
    cache = family.poisoned_cache(moba, cfg, 1, 15)
    assert cache["k_mean"].shape == (1, 3, 2, 6) and cache["k_sum"].shape == (1, 2, 6)
    for t in range(14):
        _, cache = moba.decode(params, cfg, x[:, t : t + 1], cache)
        done = (t + 1) // 4
        close(cache["k_mean"][0, :done], cache["k"][0, : 4 * done].unflatten(0, (done, 4)).mean(1))
        assert cache["k_mean"][0, done:].isnan().all()
        close(cache["k_sum"][0], cache["k"][0, 4 * done : t + 1].sum(0))
    assert moba.init_cache(cfg, 1, 15)["k_mean"].dtype == moba.init_cache(cfg, 1, 15)["k_sum"].dtype == torch.float32
    assert moba.init_cache(cfg, 1, 3)["k_mean"].shape[1] == 0


def test_means_are_of_the_keys_as_stored():
    cfg = moba_config(4, 2)
    params, x = family.init_params(cfg, torch.float32), tokens(cfg, 1, 9, torch.float32)
    _, cache = moba.prefill(params, cfg, x, moba.init_cache(cfg, 1, 9))
    stored = cache["k"].float()
    close(cache["k_mean"][0], stored[0, :8].unflatten(0, (2, 4)).mean(1), 1e-6)
    close(cache["k_sum"], stored[:, 8], 1e-6)


def test_moba_ties_take_the_lower_block():
    cfg = moba_config(2, 3)
    k_mean, q = torch.ones(1, 5, 2, 6), torch.ones(1, 1, 4, 6)
    k_mean[0, 3] = 2.0
    lists = moba.choose(cfg, q, k_mean, torch.tensor([[9]]), 10)
    assert lists.shape == (1, 1, 4, 3) and (lists == int32(4, 3, 0)).all()
    assert moba.choose(cfg, q, k_mean * NAN, torch.tensor([[1]]), 10).tolist() == [[[[0, -1, -1]] * 4]]
    assert (moba.choose(cfg, q, -k_mean, torch.tensor([[9]]), 10) == int32(4, 0, 1)).all()
