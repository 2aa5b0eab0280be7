"""NSA beyond the laws: golden tables, selection by its definition, each branch alone, bytes."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judges import as_gqa, compiled, limit, tokens, weights

import jforge
from jforge.attention import dense, nsa
from jforge.core import compare
from jforge.core.attend import attend

NSA = jforge.get("nsa")
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SMALL = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "rope_parameters": ROPE}
# the paper's l, stride and l' on a small layer; no block is forced but the query's own
PAPER = NSA.Config(**SMALL, kernel_size=32, kernel_stride=16, block_size=64, topk=3, window_size=16, compress="mean",
                   init_blocks=0, local_blocks=1)  # fmt: skip

# --- golden tables (mechanisms.md 13)


def test_entries_after_so_many_tokens():
    length = jnp.array([0, 31, 32, 47, 48, 64, 100])
    assert NSA.cache_spec(PAPER)["k_cmp"].valid(PAPER, length).tolist() == [0, 0, 1, 1, 2, 3, 5]


def test_entries_that_a_query_sees():
    seen = nsa._seen(PAPER, jnp.array([[30, 31, 46, 47, 63]]), 5)[0]
    assert seen.sum(axis=-1).tolist() == [0, 1, 1, 2, 3]
    assert (jnp.diff(seen.astype(int), axis=-1) <= 0).all()  # the first ones


def _scores(cfg, entry_weights, position: int, S: int) -> np.ndarray:
    """What `choose` ranks: the score of each block, forced and future ones included."""
    found = []

    def catch(scores, k):
        found.append(np.asarray(scores))
        return jforge.ops.topk_indices(scores, k)

    nsa.choose(cfg, entry_weights, jnp.full(entry_weights.shape[:2], position), S, SimpleNamespace(topk_indices=catch))
    return found[0]


def test_overlap_weights():
    """Block j takes entries 4j-1 .. 4j+3 with weights 1 2 2 2 1."""
    one_hot = jnp.eye(19)[:, None, None]  # a batch of queries, each with all its mass on one entry
    overlap = _scores(PAPER, one_hot, 64 * 5, 64 * 6)[:, 0, 0]
    blocks = [{e: w for e, w in enumerate(column) if w} for column in overlap[:, :3].T]
    assert blocks == [{0: 2, 1: 2, 2: 2, 3: 1}, {3: 1, 4: 2, 5: 2, 6: 2, 7: 1}, {7: 1, 8: 2, 9: 2, 10: 2, 11: 1}]


def test_tail_holds_the_rows_of_the_next_entry():
    """Raw rows that no entry has taken for good: 20 after 100 tokens, 16 after 112; each in slot p mod 32."""
    params, x = weights(NSA, PAPER, "float32"), tokens(PAPER, 2, 112, "float32")
    cache = NSA.init_cache(PAPER, 2, 112, jnp.float32)
    _, cache = compiled(NSA, PAPER)[1](params, x, cache, np.array([100, 112]))
    _, k, v = jax.jit(lambda p, x: dense.qkv(p, PAPER, x))(params, x)
    for row, (length, rows) in enumerate(((100, 20), (112, 16))):
        entries = int(NSA.cache_spec(PAPER)["k_cmp"].valid(PAPER, cache.length)[row])
        open_rows = np.arange(entries * 16, length)
        assert len(open_rows) == rows
        for tail, raw in ((cache.tail_k, k), (cache.tail_v, v)):
            np.testing.assert_allclose(tail[row, open_rows % 32], raw[row, open_rows], rtol=1e-6)


# --- selection


SELECT = [
    replace(PAPER, kernel_size=4, kernel_stride=2, block_size=8, topk=4, init_blocks=1, local_blocks=2),
    replace(PAPER, kernel_size=3, kernel_stride=3, block_size=3, topk=2, init_blocks=0, local_blocks=1),
    replace(PAPER, kernel_size=6, kernel_stride=2, block_size=6, topk=5, init_blocks=2, local_blocks=1),
]


@pytest.mark.parametrize("cfg", SELECT, ids=["l<l'", "l=d=l'", "l=3d=l'"])
def test_selection_by_overlap_in_tokens(cfg):
    """score_j = sum_e p_e |tokens of e and of j| / d; first and newest blocks always; never a later one than t's."""
    S, l, d, M = 45, cfg.kernel_size, cfg.kernel_stride, cfg.block_size  # noqa: E741
    entries, count = (S - l) // d + 1, -(-S // M)
    p = np.random.default_rng(0).uniform(size=(1, S, 1, entries)).astype("float32")
    order = np.arange(S)[None]
    lists = jax.jit(lambda p, t: nsa.choose(cfg, p, t, S))(p, order)
    ranges = [set(range(e * d, e * d + l)) for e in range(entries)]
    overlap = np.array([[len(r & set(range(j * M, (j + 1) * M))) / d for j in range(count)] for r in ranges])
    for t in range(S):
        own, score = t // M, p[0, t, 0] @ overlap
        forced = {j for j in range(own + 1) if j < cfg.init_blocks or j > own - cfg.local_blocks}
        free = [j for j in np.argsort(-score, kind="stable").tolist() if j <= own and j not in forced]
        assert set(lists[0, t, 0].tolist()) - {-1} == forced | set(free[: cfg.topk - len(forced)])


def test_entry_weights_are_probabilities_of_seen_entries():
    """They sum to G over the entries where one is seen, else to 0; NaN in unseen entries stays there."""
    cfg = replace(SELECT[0], num_attention_heads=6, num_key_value_heads=2)
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal(shape).astype("float32") for shape in ((1, 9, 6, 4), (1, 5, 2, 4)))
    k[:, 3:] = np.nan

    def weigh(q, k):
        seen = nsa._seen(cfg, jnp.arange(9)[None], 5)
        lse = attend(q, k, k, seen, scale=cfg.scaling)[1]
        return nsa.entry_weights(cfg, q, k, lse, seen), seen

    got, seen = jax.jit(weigh)(q, k)
    np.testing.assert_allclose(got.sum(axis=-1)[0], [[3.0 * (t >= 3)] * 2 for t in range(9)], rtol=1e-5)
    assert ((got > 0) == seen[:, :, None]).all()


# --- each branch alone


def _only(branch: str):
    """Parameters whose gates are 1 on one branch and 0 on the others, wherever x's first channel is 1."""

    def change(params):
        gates = np.zeros_like(params["wgate"])
        gates[0] = -1000.0
        gates[0, :, ("cmp", "slc", "win").index(branch)] = 1000.0
        blank = {name: np.zeros_like(params[name]) for name in ("k_pe", "v_pe")}
        return {**params, **blank, "wgate": gates}

    return change


def _ones(x):
    x[..., 0] = 1.0
    return x


def _own(branch: str):
    return lambda params: {**params, "wk": params[f"wk_{branch}"], "wv": params[f"wv_{branch}"]}


@pytest.mark.parametrize("branch,cfg,rename", [
    ("slc", replace(SELECT[0], topk=5), lambda params: params),
    ("win", replace(SELECT[1], window_size=10), lambda params: params),
    ("win", replace(SELECT[1], window_size=12, separate_branches=True), _own("win")),
    ("cmp", replace(SELECT[1], kernel_size=1, kernel_stride=1, separate_branches=True), _own("cmp")),
], ids=["all blocks", "w = S", "own w > S", "entries = tokens"])  # fmt: skip
def test_a_branch_that_leaves_nothing_out_is_dense(branch, cfg, rename):
    assert limit(NSA, cfg, as_gqa(cfg, rename), _only(branch), _ones) <= compare.OUT["float64"]


def test_no_entry_gives_0():
    """The compressed branch alone, at the first l - 1 tokens and after."""
    cfg, l = SELECT[0], SELECT[0].kernel_size  # noqa: E741
    params, x = _only("cmp")(weights(NSA, cfg, "float32")), _ones(tokens(cfg, 2, 6, "float32"))
    y = compiled(NSA, cfg)[0](params, x)
    assert (y[:, : l - 1] == 0).all() and (y[:, l - 1 :] != 0).all()


# --- bytes (mechanisms.md 5.3)


def test_paper_bytes():
    """K (D_k + D_v) e = 2560 B a token; at 65,536 tokens 4095 entries (the paper's table has 4094), 1024, and 512."""
    cfg = NSA.models["NSA paper 27B"]
    cost, closing = (NSA.cost(cfg, context=65536, closing=c) for c in (False, True))
    assert cost.entries_read == 4095 + 1024 + 512
    assert sum(cost.read.values()) == 2560 * cost.entries_read
    assert sum(closing.read.values()) - sum(cost.read.values()) == 2560 * 32
    assert cost.per_token == 2560 * 17 / 16 and cost.fixed == 2560 * (512 + 32 - 1)
    assert sum(cost.written.values()) == 3 * 2560 and sum(closing.written.values()) == 4 * 2560
    shared = NSA.cost(replace(cfg, separate_branches=False), context=65536)
    assert sum(shared.read.values()) == sum(cost.read.values())
    assert sum(shared.written.values()) == 2 * 2560
