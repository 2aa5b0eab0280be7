"""MiniMax sparse attention beyond the laws: golden picks, the dense limit, bytes, mutants."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from judges import as_gqa, compiled, law, limit, patch, tokens, torch_forward, unread, walks, weights

import jforge
import torch_ref
from jforge.attention import msa
from jforge.core import compare, masks
from jforge.harness.backends import to_torch

MSA = jforge.get("msa")
ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
SMALL = MSA.Config(
    hidden_size=8, num_attention_heads=4, num_key_value_heads=2, head_dim=4, qk_norm="head", norm_offset=1.0,
    rope_parameters=ROPE, index_head_dim=5, index_block_size=4, index_topk_blocks=3,
)  # fmt: skip

# --- picks


def _lists(cfg, scores, positions) -> np.ndarray:
    """The lists of queries at `positions` for scores [queries, heads, blocks]."""
    return np.asarray(msa.choose(cfg, jnp.asarray(scores)[None], jnp.asarray(positions)[None]))[0]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)], ids=str)
def test_golden_picks(order):
    """mechanisms.md 13, blocks of 4 and top 3: block 0 at t=3, all of 0, 1, 2 at t=11, 3 and the best two at t=13."""
    scores = np.zeros((3, 1, 4), np.float32)
    scores[..., list(order)] = 3.0, 2.0, 1.0  # block 3 scores least and is forced
    lists = _lists(SMALL, scores, np.array([3, 11, 13]))[:, 0]
    assert [set(row.tolist()) - {-1} for row in lists] == [{0}, {0, 1, 2}, {3, *order[:2]}]


@pytest.mark.parametrize("more", [
    {}, {"index_topk_blocks": 1}, {"index_local_blocks": 2}, {"index_init_blocks": 2},
    {"index_local_blocks": 2, "index_init_blocks": 1, "index_topk_blocks": 4},
], ids=str)  # fmt: skip
def test_picks_are_the_definition(more):
    """Forced blocks, each once and counted, then the best others; ties to the lower block, none of the future."""
    cfg, S = replace(SMALL, **more), 34
    scores = np.random.default_rng(0).standard_normal((S, 2, 9)).astype("float32")
    scores[:, :, 4] = scores[:, :, 2] = scores[:, :, 1]
    lists = _lists(cfg, scores, np.arange(S))
    for t, g in np.ndindex(S, 2):
        own = t // cfg.index_block_size
        forced = [j for j in range(own + 1) if j < cfg.index_init_blocks or j > own - cfg.index_local_blocks]
        free = [j for j in np.argsort(-scores[t, g], kind="stable").tolist() if j <= own and j not in forced]
        want = forced + free[: cfg.index_topk_blocks - len(forced)]
        assert lists[t, g].tolist() == want + [-1] * (cfg.index_topk_blocks - len(want))


def test_torch_ref_picks_the_same_but_for_ties():
    """float32 in both; the scores of float64 decide what is a tie."""
    T, twin = 40, torch_ref.get("msa")
    params, x = weights(MSA, SMALL, "float32"), tokens(SMALL, 2, T, "float32")
    order = np.broadcast_to(np.arange(T, dtype=np.int32), (2, T))

    @jax.jit
    def scores(params, x):
        q_pos = jnp.asarray(order)
        seen = masks.causal(q_pos[..., None], q_pos[:, None])
        sides = (side(params, SMALL, x, q_pos) for side in (msa.index_queries, msa.index_keys))
        return msa.block_maxima(*sides, seen, SMALL.index_block_size)

    got = msa.choose(SMALL, scores(params, x), jnp.asarray(order))
    q, k = twin.project_index({n: to_torch(p) for n, p in params.items()}, SMALL, to_torch(x), to_torch(order))
    lengths = torch.full((2,), T, dtype=torch.int32)
    theirs = torch_ref.ops.block_index_scores(q, k, lengths, block_size=SMALL.index_block_size)
    want = twin.choose(SMALL, theirs, to_torch(order))
    with jax.enable_x64(True):
        exact = scores({n: p.astype(np.float64) for n, p in params.items()}, x.astype(np.float64))
    own = (order // SMALL.index_block_size)[..., None, None] == np.arange(exact.shape[-1])
    found = compare.picks(got, want, np.where(own, np.inf, exact), SMALL.index_topk_blocks, 1e-4)
    assert found.rows == 2 * T * 2 and found.wrong == 0 and found.tied <= 2


# --- limits and sizes that the examples do not have


def test_it_is_dense_while_all_blocks_fit():
    """forward, prefill and decode of 10 tokens, the last block partial, are gqa with the same weights."""
    cfg = replace(SMALL, index_block_size=3, index_topk_blocks=4, attn_logit_softcapping=2.0, v_head_dim=3)
    assert limit(MSA, cfg, as_gqa(cfg)) <= compare.OUT["float64"]


def test_it_is_not_dense_from_the_next_block_on():
    gqa, config, rename = as_gqa(SMALL)
    with jax.enable_x64(True):
        params, x = weights(MSA, SMALL), tokens(SMALL, 2, 14)
        y, want = compiled(MSA, SMALL)[0](params, x), compiled(gqa, config)[0](rename(params), x)
        assert compare.relative(y[:, :12], want[:, :12]) <= compare.OUT["float64"]
        assert compare.relative(y[:, 12:], want[:, 12:]) > 1e-3


FIRST_AND_LAST = replace(SMALL, index_local_blocks=2, index_init_blocks=1, index_block_size=3, index_topk_blocks=4)


# --- bytes (mechanisms.md 8.3)


def test_minimax_m3_bytes():
    """2304 B a token and layer; at 1M tokens 256 MiB of index keys and 4 MiB of the rest, where gqa reads 2048 MiB."""
    cfg = MSA.models["MiniMax-M3"]
    cost = MSA.cost(cfg, context=2**20)
    assert (cost.per_token, cost.fixed) == (2304, 0) and sum(cost.written.values()) == 2304
    assert cost.read == {"k": 2 * 2**20, "v": 2 * 2**20, "k_index": 256 * 2**20}
    assert cost.entries_read == 2**20 + 2048
    assert sum(as_gqa(cfg)[0].cost(as_gqa(cfg)[1], context=2**20).read.values()) == 2048 * 2**20
    assert sum(MSA.cost(cfg, context=2048).read.values()) == 2304 * 2048  # all 16 blocks


# --- mutants

right_choose, right_norm = msa.choose, msa.rms_norm


def _own_block_takes_two_places(cfg, scores, q_pos, ops=jforge.ops):
    return right_choose(cfg, scores, q_pos, ops)[..., : cfg.index_topk_blocks - 1]


def _forced_block_listed_twice(cfg, scores, q_pos, ops=jforge.ops):
    lists = right_choose(cfg, scores, q_pos, ops)
    return jnp.concatenate([lists[..., :1], lists], axis=-1)


def _own_block_competes(cfg, scores, q_pos, ops=jforge.ops):
    return ops.topk_indices(scores, min(cfg.index_topk_blocks, scores.shape[-1]))


def _first_head_chooses(cfg, scores, q_pos, ops=jforge.ops):
    return jnp.broadcast_to(right_choose(cfg, scores[:, :, :1], q_pos, ops), (*scores.shape[:3], cfg.index_topk_blocks))


def _norm_without_offset(x, weight, *, eps, offset):
    return right_norm(x, weight, eps=eps)


def _sees_to_the_end_of_its_block(lengths, T, S):
    """Only what is in the cache, so that no NaN gives it away."""
    own = (lengths[:, None] - T + jnp.arange(T)) // SMALL.index_block_size
    slots = jnp.arange(S)
    return (slots // SMALL.index_block_size <= own[..., None]) & (slots < lengths[:, None, None])


def own_block_is_causal(att) -> bool:
    """Two queries in one block, whose second token has the better key: the first query scores without it."""
    q, k = jnp.ones((1, 2, 1, 1)), jnp.array([[[1.0], [3.0], [2.0], [9.0]]])
    return jforge.ops.block_index_scores(q, k, jnp.array([4]), block_size=4).tolist() == [[[[3.0]], [[9.0]]]]


in_torch = torch_forward("msa", SMALL)
MUTANTS = {
    "MSA: the own block takes two places": (patch(MSA, msa, "choose", _own_block_takes_two_places), in_torch),
    "MSA: a forced block is listed twice": (
        patch(MSA, msa, "choose", _forced_block_listed_twice), walks(FIRST_AND_LAST, 20)),
    "MSA: the own block is not forced": (patch(MSA, msa, "choose", _own_block_competes), in_torch),
    "MSA: one index head chooses for all": (patch(MSA, msa, "choose", _first_head_chooses), in_torch),
    "MSA: no norm in the index branch": (patch(MSA, msa, "rms_norm", lambda x, weight, **options: x), in_torch),
    "MSA: index norms without 1 +": (patch(MSA, msa, "rms_norm", _norm_without_offset), in_torch),
    "MSA: no RoPE in the index branch": (patch(MSA, msa.Config, "index_rotary_dim", 0), in_torch),
    "MSA: the scan of the index keys is not counted": (
        unread(MSA, "k_index"), law("L8", SMALL)),
    "block_index_scores takes the maximum over future tokens of the block": (
        patch(MSA, masks, "decode", _sees_to_the_end_of_its_block), lambda att: not own_block_is_causal(att)),
}  # fmt: skip


JUDGES = {
    "a walk of MSA": lambda: not walks(FIRST_AND_LAST, 20)(MSA),
    "torch_ref and L8 on MSA": lambda: not (in_torch(MSA) or law("L8", SMALL)(MSA)) and own_block_is_causal(MSA),
}
