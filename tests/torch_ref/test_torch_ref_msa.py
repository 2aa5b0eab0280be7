"""torch_ref's MiniMax sparse attention: which blocks it picks, its index vectors, and what decode reads."""

import math

import dense_family as family
import pytest
import torch
from block_loop import index_vectors, msa_config
from dense_family import DENSE, NAN, close, config, int32, random, spied, tokens
from mechanisms import CASES

from torch_ref import ops
from torch_ref.attention import dense, msa


def test_prefill_picks_by_rounded_index_vectors():
    """120 tokens to pick 5 from lie so close that rounding queries or keys otherwise than decode moves some pick."""
    cfg, params = CASES["msa:single_tokens"][1:3]
    params, x = {name: w.float() for name, w in params.items()}, tokens(cfg, new=120, dtype=torch.float32)
    y, _ = msa.prefill(params, cfg, x, msa.init_cache(cfg, 2, 120))
    torch.testing.assert_close(y, family.fold_decode(msa, params, cfg, x, msa.init_cache(cfg, 2, 120))[0])


# ---- the choice of blocks


@pytest.mark.parametrize("name", DENSE)
def test_it_is_dense_while_the_budget_holds_all_blocks(name):
    cfg, params = CASES[f"msa:{name}"][1:3]
    x = tokens(cfg, new=10)
    y, expected = msa.forward(params, cfg, x), dense.forward(params, cfg, x)
    close(y[:, :9], expected[:, :9])
    assert not torch.allclose(y[:, 9], expected[:, 9], atol=1e-4)
    stepped, _ = family.fold_decode(msa, params, cfg, x, msa.init_cache(cfg, 2, 10, x.dtype))
    close(stepped[:, :9], expected[:, :9])


def random_scores(cfg, positions, slots=16, seed=0):
    """Scores of one row, 2 KV heads, with -inf for the future, as the op gives them."""
    blocks = -(-slots // cfg.index_block_size)
    scores = random(1, len(positions), 2, blocks, seed=seed)
    where = torch.tensor([positions])
    future = torch.arange(blocks) > (where // cfg.index_block_size)[..., None, None]
    return scores.masked_fill(future, -torch.inf), where


def test_blocks_of_four_and_three_picks():
    """t = 3 has block 0, t = 11 has all of 0, 1, 2, and t = 13 has block 3, forced, and the best two of 0, 1, 2."""
    cfg = msa_config(index_block_size=4)
    scores, where = random_scores(cfg, [3, 11, 13])
    picks = msa.choose(cfg, scores, where)
    assert picks.dtype == torch.int32 and picks.shape == (1, 3, 2, 3)
    for g in range(2):
        assert sorted(picks[0, 0, g].tolist()) == [-1, -1, 0]
        assert sorted(picks[0, 1, g].tolist()) == [0, 1, 2]
        best = scores[0, 2, g, :3].argsort(descending=True)[:2].tolist()
        assert picks[0, 2, g].tolist() == [3, *best]


@pytest.mark.parametrize(
    ("index", "position", "picks"),
    [
        (dict(index_local_blocks=3), 2, [0, -1, -1]),
        (dict(index_local_blocks=2, index_init_blocks=2), 5, [0, 1, -1]),
        (dict(index_local_blocks=2, index_init_blocks=1), 14, [0, 3, 4]),
        (dict(index_init_blocks=4), 8, [0, 1, 2]),
        (dict(index_topk_blocks=99, index_local_blocks=2), 15, [4, 5, 3, 2, 1, 0]),
        (dict(index_topk_blocks=2, index_local_blocks=3), 14, [2, 3]),
    ],
)
def test_a_forced_block_is_counted_once(index, position, picks):
    """Scores rise with the block, so that the free picks are the last blocks; ties among the forced go to the lower."""
    cfg = msa_config(**index)
    scores = torch.arange(6.0).expand(1, 1, 2, 6)
    scores = scores.masked_fill(torch.arange(6) > position // 3, -torch.inf)
    assert msa.choose(cfg, scores, torch.tensor([[position]])).tolist() == [[[picks, picks]]]


@pytest.mark.parametrize("step", [msa.prefill, lambda *a: family.fold_decode(msa, *a)])
def test_ties_go_to_the_lower_block(step):
    """Index keys of 0 score 0 everywhere: each query reads block 0, block 1 and its own."""
    cfg, params = CASES["msa:plain"][1:3]
    params, x = params | {"wk_index": torch.zeros_like(params["wk_index"])}, tokens(cfg, new=17)
    sees = lambda q, k, t, n: [s for s in range(t + 1) if s // 3 in (0, 1, t // 3)]  # noqa: E731
    expected = family.loop_over_visible(params, cfg, x, family.default_positions(x), sees)
    close(step(params, cfg, x, msa.init_cache(cfg, 2, 17, x.dtype))[0], expected)


@pytest.mark.parametrize("name", ["plain", "gemma"])
def test_index_vectors_are_the_loop(name):
    """An eps this large shows; that of the query scales all its scores alike and moves no pick."""
    cfg, params = CASES[f"msa:{name}"][1:3]
    cfg, x = config(**(vars(cfg) | {"rms_norm_eps": 0.5})), tokens(cfg, batch=1, new=5)
    positions = family.odd_positions(x)
    q, k = index_vectors(cfg, params, x[0], positions[0])
    expected = torch.stack([torch.stack(heads) for heads in q])[None], torch.stack(k)[None]
    for actual, one in zip(msa.project_index(params, cfg, x, positions), expected, strict=True):
        close(actual, one)


def test_index_vectors_turn_by_the_angles_of_the_main_heads():
    """Half-split pairs (j, j + 2) of the first 4 of 7 channels, 5e6^(-2j/4) a position; the other 3 stay."""
    cfg, params = CASES["msa:gated"][1:3]
    x = tokens(cfg, batch=1, new=4)
    still = msa.project_index(params, cfg, x, torch.zeros(1, 4).int())
    turned = msa.project_index(params, cfg, x, torch.tensor([[0, 1, 5, 300]]))
    for before, after in zip(still, turned, strict=True):
        expected = before.clone()
        for t, p in enumerate((0, 1, 5, 300)):
            for j in range(2):
                c, s = math.cos(p * 5e6 ** (-j / 2)), math.sin(p * 5e6 ** (-j / 2))
                a, b = before[0, t, ..., j], before[0, t, ..., j + 2]
                expected[0, t, ..., j], expected[0, t, ..., j + 2] = a * c - b * s, b * c + a * s
        close(after, expected)


# ---- decode and its ops


def test_decode_hands_the_scores_of_stored_keys_to_the_op():
    cfg, params = CASES["msa:gemma"][1:3]
    params, x = {name: w.float() for name, w in params.items()}, tokens(cfg, new=11, dtype=torch.float32)
    calls, spies = spied(ops)
    _, cache = msa.prefill(params, cfg, x, msa.init_cache(cfg, 2, 13), int32(11, 4))
    _, after = msa.decode(params, cfg, x[:, :1], cache, spies)
    seen = {name: made[0] for name, made in calls.items() if made}
    (q_index, k_index, lengths), options, scores = seen["block_index_scores"]
    assert q_index.dtype == k_index.dtype == torch.bfloat16 and list(q_index.shape) == [2, 1, 2, 7]
    assert torch.equal(k_index, after["k_index"]) and options == {"block_size": 3} and lengths.tolist() == [12, 5]
    assert scores.shape == (2, 1, 2, 5) and seen["topk_indices"][0][1] == 3
    (*_, picks, lengths), options, _ = seen["decode_block_sparse"]
    assert torch.equal(picks, seen["topk_indices"][2]) and lengths.tolist() == [12, 5]
    assert options == dict(block_size=3, scale=0.9, softcap=0.8, out_dtype=torch.float32)


def test_decode_reads_the_picked_blocks_alone():
    """NaN in every key and value outside the picks reaches nothing; the index keys are read whole."""
    cfg, params = CASES["msa:mqa"][1:3]
    x = tokens(cfg, new=17)
    expected, cache = msa.prefill(params, cfg, x[:, :16], msa.init_cache(cfg, 2, 17, x.dtype))
    expected, after = msa.decode(params, cfg, x[:, 16:], cache)
    q_index, _ = msa.project_index(params, cfg, x[:, 16:], torch.full((2, 1), 16))
    scores = ops.block_index_scores(q_index, after["k_index"], int32(17, 17), block_size=3)
    picks = msa.choose(cfg, scores, torch.full((2, 1), 16))[:, 0, 0].tolist()
    for b in range(2):
        unread = [s for s in range(16) if s // 3 not in picks[b]]
        assert len(unread) == 9
        cache["k"][b, unread], cache["v"][b, unread] = NAN, NAN
    close(msa.decode(params, cfg, x[:, 16:], cache)[0], expected)
