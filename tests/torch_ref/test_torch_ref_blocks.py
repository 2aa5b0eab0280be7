"""torch_ref's static block patterns and MoBA, each against a loop over the tokens of the blocks a query chooses."""

import dense_family as family
import numpy
import pytest
import torch
from dense_family import DENSE, NAN, close, config, int32, tokens

import torch_ref
from torch_ref import ops
from torch_ref.attention import block_sparse, dense, moba

PATTERNS = {
    "local": dict(num_global_blocks=0, num_local_blocks=2, num_random_blocks=0, vert_stride=None),
    "bigbird": dict(num_global_blocks=1, num_local_blocks=1, num_random_blocks=2, vert_stride=None, seed=3),
    "phi": dict(num_global_blocks=0, num_local_blocks=2, num_random_blocks=0, vert_stride=3),
    "all_parts": dict(num_global_blocks=1, num_local_blocks=2, num_random_blocks=1, vert_stride=5, seed=8),
}
SPLITS = [3, 6, [7, 1, 11], [2, 1, 1, 8, 7]]  # of 19 tokens in blocks of 3


def pattern_config(pattern="all_parts", homo=False, **fields):
    defaults = dict(block_size=3, homo_head_pattern=homo, seed=0) | PATTERNS[pattern]
    return config(**(defaults | fields))


def blocks_of(cfg, head, i):
    """A_n(i) by the definition, a condition for each block."""
    head = 0 if cfg.homo_head_pattern else head
    g, w, r, stride = cfg.num_global_blocks, cfg.num_local_blocks, cfg.num_random_blocks, cfg.vert_stride
    rest = [j for j in range(i + 1) if g <= j <= i - w]
    if len(rest) > r:
        rest = numpy.random.default_rng([cfg.seed, head, i]).choice(rest, r, replace=False).tolist()
    allowed = set()
    for j in range(i + 1):
        step = max(1, (stride or 0) // cfg.num_attention_heads)
        strided = stride is not None and (j + head * step + 1) % stride == 0
        if j < g or j > i - w or j in rest or strided:
            allowed.add(j)
    return allowed


def pattern_loop(cfg):
    def sees(q, k, t, n):
        return [s for s in range(t + 1) if s // cfg.block_size in blocks_of(cfg, n, t // cfg.block_size)]

    return sees


def gates_of(cfg, q, k, t, n):
    """{block: gate} of the past blocks."""
    size, kv = cfg.moba_chunk_size, n // (cfg.num_attention_heads // cfg.num_key_value_heads)
    return {j: float(q[t, n] @ k[j * size : (j + 1) * size, kv].mean(0)) for j in range(t // size)}


def moba_loop(cfg):
    def sees(q, k, t, n):
        gates = gates_of(cfg, q, k, t, n)
        best = sorted(gates, key=lambda j: (-gates[j], j))[: cfg.moba_topk - 1]
        return [s for s in range(t + 1) if s // cfg.moba_chunk_size in {*best, t // cfg.moba_chunk_size}]

    return sees


def cases():
    """(mechanism, cfg, params, visible): the patterns on one kind of dense config, every kind on one pattern."""
    built = {}
    for name, fields in DENSE.items():
        built[f"pattern-{name}"] = pattern_config(**fields)
        built[f"moba-{name}"] = config(**fields, moba_chunk_size=3, moba_topk=3, dense_decode=False)
    for name in PATTERNS:
        for homo in (True, False):
            built[f"pattern-{name}-{homo}"] = pattern_config(name, homo)
    for size, topk in ((1, 4), (4, 1), (7, 2), (3, 99)):
        built[f"moba-{size}-{topk}"] = config(moba_chunk_size=size, moba_topk=topk, dense_decode=False)
    made = {}
    for name, cfg in built.items():
        att, loop = (moba, moba_loop) if name.startswith("moba") else (block_sparse, pattern_loop)
        made[name] = (att, cfg, family.init_params(cfg), loop(cfg))
    return made


CASES = cases()
every_case = pytest.mark.parametrize(("att", "cfg", "params", "visible"), CASES.values(), ids=CASES)


@every_case
def test_forward_is_the_loop(att, cfg, params, visible):
    x = tokens(cfg, new=19)
    default, odd = family.default_positions(x), family.odd_positions(x)
    close(att.forward(params, cfg, x), family.loop_over_visible(params, cfg, x, default, visible))
    close(att.forward(params, cfg, x, odd), family.loop_over_visible(params, cfg, x, odd, visible))
    close(att.forward(params, cfg, x, default + 50), att.forward(params, cfg, x))


@every_case
def test_every_split_is_forward(att, cfg, params, visible):
    for capacity in (19, 24):
        family.check_splits(att, params, cfg, tokens(cfg, new=19), capacity, SPLITS if capacity == 24 else [])


@every_case
def test_ragged_rows_equal_rows_alone(att, cfg, params, visible):
    family.check_ragged(att, params, cfg, 26, first=(13, 0, 3, 1, 6), second=(1, 2, 0, 12, 3))


@every_case
def test_gradients_and_inputs(att, cfg, params, visible):
    family.check_gradients(att, params, cfg, capacity=8)
    family.check_inputs_kept(att, params, cfg, capacity=12)


@pytest.mark.parametrize("name", ["pattern-gpt_oss", "moba-plain", "moba-gated"])
def test_prefill_attends_over_what_it_stored(name):
    att, cfg, params, _ = CASES[name]
    family.check_stored_precision(att, params, cfg, tokens(cfg, new=13), capacity=16)


@pytest.mark.parametrize("capacity", [7, 9])
@pytest.mark.parametrize("name", ["pattern-plain", "moba-plain"])
def test_overflow(name, capacity, monkeypatch):
    att, cfg, params, _ = CASES[name]
    family.check_overflow(att, params, cfg, capacity, monkeypatch)


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
    cfg = config(**fields, moba_chunk_size=3, moba_topk=4, dense_decode=False)
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


class Spy:
    """The reference ops, with the arguments of the last block-sparse call."""

    topk_indices = staticmethod(ops.topk_indices)

    def decode_block_sparse(self, q, k, v, block_indices, lengths, **options):
        self.lists, self.lengths, self.options = block_indices, lengths, options
        return ops.decode_block_sparse(q, k, v, block_indices, lengths, **options)


@pytest.mark.parametrize("name", ["pattern-plain", "pattern-phi-True", "moba-plain", "moba-mqa"])
def test_decode_gathers_the_choose(name):
    """NaN in all other blocks of a full cache, and the lists that the op was handed."""
    att, cfg, params, visible = CASES[name]
    size, kv_heads = getattr(cfg, "block_size", None) or cfg.moba_chunk_size, cfg.num_key_value_heads
    x = tokens(cfg, batch=1, new=18)
    _, cache = att.prefill(params, cfg, x[:, :17], att.init_cache(cfg, 1, 18, x.dtype))
    q, k, _ = family.project_row(params, cfg, x[0])
    q, k = (family.rotated(cfg, z, range(18)) for z in (q, k))
    group = cfg.num_attention_heads // kv_heads
    chosen = [{s // size for s in visible(q, k, 17, n)} for n in range(cfg.num_attention_heads)]
    for head in range(kv_heads):
        read = set().union(*chosen[head * group : (head + 1) * group])
        unread = [s for s in range(18) if s // size not in read]
        cache["k"][0, unread, head], cache["v"][0, unread, head] = NAN, NAN
    assert cache["k"].isnan().any()
    spy = Spy()
    y, _ = att.decode(params, cfg, x[:, 17:], cache, ops=spy)
    close(y, att.forward(params, cfg, x)[:, 17:])
    lists = spy.lists.shape[2]
    assert spy.lists.dtype == torch.int32 and lists == (
        kv_heads if getattr(cfg, "homo_head_pattern", False) else len(chosen)
    )
    for j in range(lists):
        picks = [i for i in spy.lists[0, 0, j].tolist() if i >= 0]
        assert set(picks) == chosen[j * cfg.num_attention_heads // lists] and len(set(picks)) == len(picks)
    assert spy.lengths.tolist() == [18] and spy.options["block_size"] == size


# ---- MoBA's means


def test_means_and_the_open_sum():
    cfg = config(moba_chunk_size=4, moba_topk=2, dense_decode=False)
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
    cfg = config(moba_chunk_size=4, moba_topk=2, dense_decode=False)
    params, x = family.init_params(cfg, torch.float32), tokens(cfg, 1, 9, torch.float32)
    _, cache = moba.prefill(params, cfg, x, moba.init_cache(cfg, 1, 9))
    stored = cache["k"].float()
    close(cache["k_mean"][0], stored[0, :8].unflatten(0, (2, 4)).mean(1), 1e-6)
    close(cache["k_sum"], stored[:, 8], 1e-6)


def test_moba_ties_take_the_lower_block():
    cfg = config(moba_chunk_size=2, moba_topk=3, dense_decode=False)
    k_mean, q = torch.ones(1, 5, 2, 6), torch.ones(1, 1, 4, 6)
    k_mean[0, 3] = 2.0
    lists = moba.choose(cfg, q, k_mean, torch.tensor([[9]]), 10)
    assert lists.shape == (1, 1, 4, 3) and (lists == int32(4, 3, 0)).all()
    assert moba.choose(cfg, q, k_mean * NAN, torch.tensor([[1]]), 10).tolist() == [[[[0, -1, -1]] * 4]]
    assert (moba.choose(cfg, q, -k_mean, torch.tensor([[9]]), 10) == int32(4, 0, 1)).all()


# ---- bad inputs


@pytest.mark.parametrize(
    ("att", "fields", "error", "message"),
    [
        (block_sparse, {"block_size": 0}, ValueError, r"^block_size is 0; allowed: an int >= 1$"),
        (block_sparse, {"num_local_blocks": 0}, ValueError, r"^num_local_blocks is 0; allowed: an int >= 1$"),
        (block_sparse, {"num_global_blocks": -1}, ValueError, r"^num_global_blocks is -1; allowed: an int >= 0$"),
        (
            block_sparse,
            {"num_random_blocks": None},
            TypeError,
            r"^num_random_blocks is a NoneType; allowed: an int >= 0$",
        ),
        (block_sparse, {"vert_stride": 0}, ValueError, r"^vert_stride is 0; allowed: an int >= 1$"),
        (block_sparse, {"seed": -1}, ValueError, r"^seed is -1; allowed: an int >= 0$"),
        (moba, {"moba_chunk_size": 0}, ValueError, r"^moba_chunk_size is 0; allowed: an int >= 1$"),
        (moba, {"moba_topk": True}, TypeError, r"^moba_topk is a bool; allowed: an int >= 1$"),
    ],
)
def test_bad_fields_are_named(att, fields, error, message):
    good = pattern_config(moba_chunk_size=3, moba_topk=2, dense_decode=False)
    cfg, x, params = pattern_config(**vars(good) | fields), tokens(good), family.init_params(good)
    cache = att.init_cache(good, 2, 9, x.dtype)
    for call in (att.forward, att.prefill, att.decode):
        with pytest.raises(error, match=message):
            call(params, cfg, x[:, :1], *([] if call is att.forward else [cache]))
    with pytest.raises(error, match=message):
        att.init_cache(cfg, 2, 9)


def test_bad_caches_are_named():
    cfg = config(moba_chunk_size=3, moba_topk=2, dense_decode=False)
    params, x, cache = family.init_params(cfg), tokens(cfg), moba.init_cache(cfg, 2, 9, torch.float64)
    with pytest.raises(ValueError, match=r'^cache\["k_mean"\] has shape \[2, 2, 2, 6\]; allowed: \[B=2 S=3 K=2 H=6\]$'):
        moba.prefill(params, cfg, x, cache | {"k_mean": cache["k_mean"][:, :2]})
    with pytest.raises(TypeError, match=r'^cache\["k_mean"\] has dtype torch.bfloat16; allowed: float32, float64$'):
        moba.prefill(params, cfg, x, cache | {"k_mean": cache["k_mean"].bfloat16()})
    with pytest.raises(ValueError, match=r'^cache\["k_sum"\] has shape \[1, 2, 6\]; allowed: \[B=2 K=2 H=6\]$'):
        moba.prefill(params, cfg, x, cache | {"k_sum": cache["k_sum"][:1]})


@pytest.mark.parametrize("name", ["block_sparse", "moba"])
def test_the_registry_knows_them(name):
    assert torch_ref.get(name).__name__ == f"torch_ref.attention.{name}"
