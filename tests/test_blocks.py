"""Block sparsity and MoBA beyond the laws: patterns, picks, what a decode step may make, bytes, bad input."""

import importlib
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from judges import as_gqa, compiled, limit, tokens, weights

import jforge
from jforge.attention import REGISTRY, block_sparse, moba
from jforge.core import blocks, compare
from jforge.harness.backends import BACKENDS
from jforge.traffic import SCATTERS

SPARSE, MOBA = jforge.get("block_sparse"), jforge.get("moba")
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SMALL = {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "rope_parameters": ROPE}

# --- patterns (mechanisms.md 5.1)

PATTERNS = [
    SPARSE.Config(**SMALL, block_size=4, num_global_blocks=1, num_local_blocks=2, num_random_blocks=2, seed=5),
    SPARSE.Config(**SMALL, block_size=4, num_global_blocks=3, num_local_blocks=1, num_random_blocks=1,
                  homo_head_pattern=False),
    SPARSE.Config(**SMALL, block_size=4, num_local_blocks=3, vert_stride=8, homo_head_pattern=False),
    SPARSE.Config(**SMALL, block_size=4, num_local_blocks=1),
]  # fmt: skip


@pytest.mark.parametrize("cfg", PATTERNS, ids=["homo", "per head", "stride", "local"])
def test_pattern_is_the_definition(cfg):
    """Global, local and strided blocks by their formulas; what is left are the random ones, of the right number and
    place. Ascending, distinct, -1 last, the own block always there; a longer table begins with a shorter one."""
    g, w, r, count = cfg.num_global_blocks, cfg.num_local_blocks, cfg.num_random_blocks, 14
    table = block_sparse.pattern(cfg, count)
    assert table.dtype == np.int32 and len(table) == (1 if cfg.homo_head_pattern else 4)
    for (n, i), row in (((n, i), table[n, i]) for n, i in np.ndindex(table.shape[:2])):
        listed = row[row >= 0].tolist()
        assert listed == sorted(set(listed)) and listed[-1] == i and (row[len(listed) :] == -1).all()
        fixed = {j for j in range(i + 1) if j < g or j > i - w}
        if cfg.vert_stride:
            step = max(1, cfg.vert_stride // cfg.num_attention_heads)
            fixed |= {j for j in range(i + 1) if (j + n * step + 1) % cfg.vert_stride == 0}
        drawn = set(listed) - fixed
        assert fixed <= set(listed) and drawn <= set(range(g, i - w + 1))
        assert len(drawn) == min(r, max(0, i - w - g + 1))
    shorter = block_sparse.pattern(cfg, 9)
    width = min(shorter.shape[-1], table.shape[-1])
    np.testing.assert_array_equal(shorter[..., :width], table[:, :9, :width])


LISTS = [*PATTERNS, *(
    SPARSE.Config(**SMALL, block_size=4, num_global_blocks=g, num_local_blocks=w, num_random_blocks=r, vert_stride=v,
                  homo_head_pattern=homo)
    for g, w, r, v, homo in ((2, 2, 0, 3, True), (2, 1, 0, 8, False), (5, 4, 0, 1, True), (1, 1, 2, 3, False))
)]  # fmt: skip


@pytest.mark.parametrize("cfg", LISTS, ids=range(len(LISTS)))
def test_longest_list_is_that_of_the_table(cfg):
    for count in range(1, 25):
        assert block_sparse.longest_list(cfg, count) == block_sparse.pattern(cfg, count).shape[-1], count


def test_cost_of_a_long_context_draws_no_table(monkeypatch):
    monkeypatch.setattr(block_sparse, "pattern", None)
    for cfg in SPARSE.models.values():
        assert SPARSE.cost(cfg, context=2**40).entries_read < 2**40


def test_heads_draw_and_stride_apart():
    """The stride's offset of head n is n * vert_stride // N: heads 0..3 of 8 see 7 5 3 1 in block 7."""
    strided = replace(PATTERNS[2], num_local_blocks=1)
    rows = block_sparse.pattern(strided, 8)[:, 6]
    assert [[j for j in row.tolist() if 0 <= j < 6] for row in rows] == [[], [5], [3], [1]]
    drawn = block_sparse.pattern(PATTERNS[1], 40)[:, 30:]
    assert len({head.tobytes() for head in drawn}) == 4
    other = block_sparse.pattern(replace(PATTERNS[0], seed=6), 40)
    assert (other != block_sparse.pattern(PATTERNS[0], 40)).any()


def test_lists_stand_for_whole_blocks():
    lists = jnp.array([[[[2, -1, 0], [-1, -1, -1]]]])
    got = blocks.tokens(lists, 3, 8)
    np.testing.assert_array_equal(got[0, 0, 0], [1, 1, 1, 0, 0, 0, 1, 1])  # the last block is partial
    assert not got[0, 0, 1].any()
    seen = blocks.visible(lists, 3, jnp.array([[6]]), 8, 4)
    np.testing.assert_array_equal(seen[0, 0], [[1, 1, 1, 0, 0, 0, 1, 0]] * 2 + [[0] * 8] * 2)


# --- MoBA's picks (mechanisms.md 5.2)


@pytest.mark.parametrize("topk", [1, 2, 4, 9])
def test_moba_takes_its_own_block_and_the_best_past_ones(topk):
    """In every head: the mean of a block not yet complete, here NaN, is never looked at; ties take the lower block."""
    cfg = MOBA.Config(**SMALL, moba_chunk_size=3, moba_topk=topk)
    rng = np.random.default_rng(0)
    q, k_mean = rng.standard_normal((2, 5, 4, 4)).astype("float32"), rng.standard_normal((2, 6, 2, 4)).astype("float32")
    k_mean[:, 1] = k_mean[:, 0]  # a tie
    k_mean[:, 5] = np.nan
    positions = np.array([[0, 3, 8, 9, 16], [2, 5, 6, 12, 15]], np.int32)
    lists = np.asarray(moba.choose(cfg, *map(jnp.asarray, (q, k_mean, positions))))
    for b, t, n in np.ndindex(2, 5, 4):
        own = positions[b, t] // 3
        gates = k_mean[b, :own, n // 2] @ q[b, t, n]
        best = np.argsort(-gates, kind="stable")[: topk - 1].tolist()
        got = lists[b, t, n].tolist()
        assert got[-1] == own and [j for j in got[:-1] if j >= 0] == best


DENSE_DECODE = MOBA.Config(**SMALL, moba_chunk_size=2, moba_topk=2, dense_decode=True)


def test_moba_dense_decode_reads_everything():
    """The official wrapper: decode is dense attention over the cache, so forward's only up to moba_topk blocks."""
    cfg = DENSE_DECODE
    gqa, config, rename = as_gqa(cfg)
    with jax.enable_x64(True):
        params, x = weights(MOBA, cfg), tokens(cfg, 2, 8)
        forward, prefill, decode = compiled(MOBA, cfg)
        truth, want = forward(params, x), compiled(gqa, config)[0](rename(params), x)
        _, cache = prefill(params, x[:, :1], MOBA.init_cache(cfg, 2, 8, jnp.float64))
        for t in range(1, 8):
            y, cache = decode(params, x[:, t : t + 1], cache)
            assert compare.relative(y, want[:, t : t + 1]) <= compare.OUT["float64"]
            same = compare.relative(y, truth[:, t : t + 1]) <= compare.OUT["float64"]
            assert same == (t < 4)
        sparse = compiled(MOBA, replace(cfg, dense_decode=False))[2]
        back = replace(cache, length=cache.length - 1)
        assert compare.relative(sparse(params, x[:, 7:], back)[0], want[:, 7:]) > 0.01
        assert jforge.check(MOBA, cfg, laws=("L8",)).ok


def test_moba_cost_says_so():
    """A slot of k has 32 bytes. Dense: all 64 slots, no means. Sparse: 32 means, and 2 blocks of 2 for 2 heads each."""
    read = MOBA.cost(DENSE_DECODE, context=64, dtype=jnp.float32).read
    assert read == {"k": 64 * 32, "v": 64 * 32, "k_sum": 32}
    sparse = MOBA.cost(replace(DENSE_DECODE, dense_decode=False), context=64, dtype=jnp.float32).read
    assert sparse == {"k": 2 * 4 * 32, "v": 2 * 4 * 32, "k_sum": 32, "k_mean": 32 * 32}


# --- limits


@pytest.mark.parametrize("att,cfg", [
    (SPARSE, replace(PATTERNS[0], num_global_blocks=3)),
    (SPARSE, SPARSE.Config(**SMALL, block_size=4, num_random_blocks=9, homo_head_pattern=False)),
    (SPARSE, SPARSE.Config(**SMALL, block_size=3, vert_stride=1)),
    (MOBA, MOBA.Config(**SMALL, moba_chunk_size=3, moba_topk=4, attn_logit_softcapping=3.0)),
], ids=["all global", "all random", "stride 1", "topk = all"])  # fmt: skip
def test_all_blocks_are_dense(att, cfg):
    assert limit(att, cfg, as_gqa(cfg)) <= compare.OUT["float64"]


# --- what a decode step makes

S = 4999  # a prime, and far from every other size
STEPS = [(name, i, cfg) for name, att in REGISTRY.items() for i, cfg in enumerate(att.examples)]
STEPS += [("moba", "dense", DENSE_DECODE)]


def _reads_a_buffer_whole(att, cfg) -> bool:
    """Does cost say that a buffer with a slot a token is read from end to end?"""
    cost = att.cost(cfg, context=S)
    grows = [name for name, buffer in att.cache_spec(cfg).items() if buffer.slots(S) == S]
    return any(cost.read.get(name, 0) == cost.stored[name] for name in grows)


def _long(jaxpr):
    """Everything made with an axis of S or a multiple, but for the cache buffers after their scatters."""
    for eqn in jaxpr.eqns:
        inner = [p for p in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr"))
                 if hasattr(p, "jaxpr")]  # fmt: skip
        for sub in inner:
            yield from _long(sub.jaxpr)
        if not inner and eqn.primitive.name not in SCATTERS:
            yield from (str(eqn) for v in eqn.outvars if any(size and size % S == 0 for size in v.aval.shape))


def _long_values(att, cfg) -> list[str]:
    params = jax.eval_shape(lambda: att.init_params(jax.random.key(0), cfg))
    cache = jax.eval_shape(lambda: att.init_cache(cfg, 2, S, jnp.float32))
    x = jax.ShapeDtypeStruct((2, 1, cfg.hidden_size), jnp.float32)
    return list(_long(jax.make_jaxpr(lambda p, x, c: att.decode(p, cfg, x, c))(params, x, cache).jaxpr))


@pytest.mark.parametrize("name,cfg", [(n, c) for n, _, c in STEPS], ids=[f"{n}-{i}" for n, i, _ in STEPS])
def test_decode_gathers_what_cost_does_not_read_whole(name, cfg):
    """No mask, score or copy over all S tokens, where cost does not say that all are read."""
    att = jforge.get(name)
    whole, long = _reads_a_buffer_whole(att, cfg), _long_values(att, cfg)
    assert whole or not long, long[0]


def test_the_walk_over_decode_sees_masks():
    sparse = {name for name, _, cfg in STEPS if not _reads_a_buffer_whole(jforge.get(name), cfg)}
    assert {"sliding_window", "sinks", "streaming", "block_sparse", "moba", "nsa"} <= sparse
    assert not {"gqa", "mla"} & sparse
    for name, cfg in (("gqa", jforge.get("gqa").examples[0]), ("moba", DENSE_DECODE)):
        assert any("bool[" in value for value in _long_values(jforge.get(name), cfg))

    def masked(q, k, v, lists, lengths, *, block_size, **options):  # the dense op under a mask of the same blocks
        picked = blocks.tokens(lists, block_size, k.shape[1]).any(axis=2)
        return jforge.ops.decode_attention(q, jnp.where(picked[:, 0, :, None, None], k, 0), v, lengths, **options)

    ops = SimpleNamespace(decode_block_sparse=masked)
    att = SPARSE._replace(decode=lambda params, cfg, x, cache: SPARSE.decode(params, cfg, x, cache, ops))
    assert _long_values(att, SPARSE.examples[0])


# --- bad input

OP = "decode_block_sparse"
PACKAGES = [b.package for b in BACKENDS.values()]
WRITTEN = [p for p in PACKAGES if getattr(importlib.import_module(p), OP).__module__ != f"{p}.unwritten"]
GIVEN = {"q": (2, 1, 4, 64), "k": (2, 128, 2, 64), "v": (2, 128, 2, 64)}
LISTS, LENGTHS = np.zeros((2, 1, 2, 3), np.int32), np.array([5, 128], np.int32)
BAD_CALLS = {
    "q's rank": ({"q": (1, 4, 64)}, {}, ValueError, "q has shape"),
    "heads": ({"q": (2, 1, 3, 64)}, {}, ValueError, "N=3"),
    "slots of v": ({"v": (2, 64, 2, 64)}, {}, ValueError, "v has shape"),
    "mixed dtypes": ({"v": np.zeros(GIVEN["v"], np.float32)}, {}, TypeError, "v has dtype"),
    "lists of no head": ({"block_indices": LISTS[:, :, :1]}, {}, ValueError, "block_indices"),
    "lists' rank": ({"block_indices": LISTS[:, 0]}, {}, ValueError, "block_indices has shape"),
    "lists' queries": ({"block_indices": LISTS.repeat(2, 1)}, {}, ValueError, "block_indices has shape"),
    "lists' dtype": ({"block_indices": LISTS.astype(np.float32)}, {}, TypeError, "block_indices has dtype"),
    "lengths' dtype": ({"lengths": LENGTHS.astype(np.float32)}, {}, TypeError, "lengths has dtype"),
    "lengths' rows": ({"lengths": LENGTHS[:1]}, {}, ValueError, "lengths has shape"),
    "block size": ({}, {"block_size": 0}, ValueError, "block_size is 0"),
    "block size as float": ({}, {"block_size": 8.0}, (ValueError, TypeError), "block_size is"),
    "softcap": ({}, {"softcap": 0.0}, ValueError, "softcap is 0.0"),
    "sinks": ({}, {"sinks": np.zeros(2, np.float32)}, ValueError, "sinks has shape"),
    "page table": ({}, {"page_table": np.zeros((2, 2), np.float32)}, TypeError, "page_table has dtype"),
    "scale of no values": ({"v": None}, {"v_scale": np.ones((2, 128, 2), np.float32)}, TypeError, "v_scale"),
}  # fmt: skip


@pytest.mark.parametrize("package", WRITTEN)
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_arguments_are_named(untyped, package, name):
    changes, options, error, named = BAD_CALLS[name]
    convert = torch.from_numpy if package in ("torch_ref.ops", "triton_kernels") else jnp.asarray
    given = {**GIVEN, "block_indices": LISTS, "lengths": LENGTHS, **changes}
    arrays = [np.zeros(a, np.float16) if isinstance(a, tuple) else a for a in given.values()]
    options = {"block_size": 8, "scale": 0.1} | options
    options = {n: convert(v) if isinstance(v, np.ndarray) else v for n, v in options.items()}
    with pytest.raises(error, match=named) as caught:
        getattr(importlib.import_module(package), OP)(*(a if a is None else convert(a) for a in arrays), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length,row", [((-1, 3), 0), ((4, 129), 1)])
def test_lengths_outside_the_cache(length, row):
    q, k = (jnp.zeros(GIVEN[name]) for name in "qk")
    with pytest.raises(ValueError, match=rf"lengths\[{row}\] is {length[row]}; it must lie in 0..128"):
        jforge.ops.decode_block_sparse(
            q, k, k, jnp.asarray(LISTS), jnp.array(length, jnp.int32), block_size=8, scale=0.1
        )


@pytest.mark.parametrize("values", ["v", None])
def test_quantised_values_mean_stored_times_scale(values):
    """int8 keys and values, or int8 keys that are the values too."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal(GIVEN["q"]).astype("float32")
    k, v = (rng.integers(-9, 9, GIVEN[n]).astype("int8") for n in "kv")
    scales = {f"{n}_scale": rng.uniform(0.1, 0.3, (2, 128, 2)).astype("float32") for n in "kv"}
    wide, wide_v = (a * scales[f"{n}_scale"][..., None] for n, a in (("k", k), ("v", v)))
    if values is None:
        v = wide_v = scales["v_scale"] = None
    op = jax.jit(partial(jforge.ops.decode_block_sparse, block_size=8, scale=0.1))
    rest = rng.permutation(16)[:12].reshape(2, 1, 2, 3).astype("int32"), LENGTHS
    got, want = op(q, k, v, *rest, **scales), op(q, wide, wide_v, *rest)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6)
