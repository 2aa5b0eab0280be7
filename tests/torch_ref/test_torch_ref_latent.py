"""torch_ref's latent attention, dense and sparse: its two forms, its scale, the indexer's picks and scores, and layers
that take the picks of another.
"""

from types import SimpleNamespace

import dense_family as family
import pytest
import torch
from dense_family import INF, NAN, close, default_positions, filled, int32, spied, tokens
from dsa_loop import CONFIGS, MLA, dsa_config, dsa_loop, index_row, init_params

from torch_ref import ops
from torch_ref.attention import dsa, mla
from torch_ref.core.quant import hadamard

every_config = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
two_configs = pytest.mark.parametrize(
    "cfg", [CONFIGS["deepseek_v32"], CONFIGS["quantised"]], ids=["plain", "quantised"]
)


@pytest.mark.parametrize("cfg", MLA.values(), ids=MLA)
def test_naive_is_absorbed(cfg):
    params, x = init_params(cfg, indexer=False), tokens(cfg, batch=3)
    projected = mla.project(params, cfg, x, torch.arange(7).expand(3, 7))
    causal = torch.ones(7, 7).tril().bool().expand(3, -1, -1)
    naive = mla.attend_naive(params, cfg, *projected, causal)
    close(mla.attend_absorbed(params, cfg, *projected, int32(7, 7, 7)), naive)
    q_nope, q_rope, *cached = projected
    for slots in cached:
        slots[1, 4:] = NAN
    seen = torch.arange(7) < int32(7, 4, 7)[:, None, None]
    naive = mla.attend_naive(params, cfg, q_nope[:, -1:], q_rope[:, -1:], *cached, seen)
    close(mla.attend_absorbed(params, cfg, q_nope[:, -1:], q_rope[:, -1:], *cached, int32(7, 4, 7)), naive)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40}


@pytest.mark.parametrize(
    ("rope", "scale"),
    [
        (YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, 0.135233),
        (YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}, 0.114722),
        (YARN | {"mscale_all_dim": 0}, 192**-0.5),
        (YARN | {"mscale_all_dim": None}, 192**-0.5),
        (YARN, 192**-0.5),
        (YARN | {"factor": 0.5, "mscale_all_dim": 1.0}, 192**-0.5),
        (YARN | {"rope_type": "default", "mscale_all_dim": 1.0}, 192**-0.5),
        ({"rope_theta": 1e4}, 192**-0.5),
        (None, 192**-0.5),
    ],
)
def test_softmax_scale(rope, scale):
    cfg = dsa_config(qk_nope_head_dim=128, qk_rope_head_dim=64, rope_parameters=rope)
    # the specification gives six digits of its constants, cut or rounded
    assert mla.scaling(cfg) == pytest.approx(scale, abs=1e-6)
    cfg.scaling = 0.25
    assert mla.scaling(cfg) == 0.25


# ---- the indexer


@every_config
def test_index_gives_the_picks_of_the_loop_in_their_order(cfg):
    params, x = init_params(cfg), tokens(cfg, new=9)
    _, picks = dsa_loop(params, cfg, x, default_positions(x))
    cache = family.poisoned_cache(dsa, cfg, 2, 11)
    for first, stop in ((0, 4), (4, 9)):
        indices = dsa.index(params, cfg, x[:, first:stop], cache)
        assert indices.dtype == torch.int32 and indices.shape == (2, stop - first, cfg.index_topk)
        for given, wanted in zip(indices.tolist(), picks, strict=True):
            assert [[s for s in row if s >= 0] for row in given] == wanted[first:stop]
        _, cache = dsa.prefill(params, cfg, x[:, first:stop], cache)


def test_scores_carry_every_scale():
    """The order would not tell: what decode hands to topk_indices is the loop's score itself."""
    for cfg in CONFIGS.values():
        params, x, (calls, spies) = init_params(cfg), tokens(cfg, new=6), spied(ops)
        _, cache = dsa.prefill(params, cfg, x[:, :5], dsa.init_cache(cfg, 2, 8, torch.float64))
        dsa.decode(params, cfg, x[:, 5:], cache, spies)
        (((scores, k), _, _),), expected = (
            calls["topk_indices"],
            [index_row(params, cfg, row, range(6))[0][5] for row in x],
        )
        close(scores[:, 0, :6], torch.tensor(expected, dtype=torch.float64))
        assert (scores[:, 0, 6:] == -INF).all() and k == cfg.index_topk


@every_config
@pytest.mark.parametrize("topk", [9, 50])
def test_every_token_picked_is_latent_attention(cfg, topk):
    cfg = SimpleNamespace(**(vars(cfg) | {"index_topk": topk}))
    params, x = init_params(cfg), tokens(cfg, new=9)
    close(dsa.forward(params, cfg, x), mla.forward(params, cfg, x))
    y, cache = dsa.prefill(params, cfg, x[:, :6], family.poisoned_cache(dsa, cfg, 2, 9))
    expected, mla_cache = mla.prefill(params, cfg, x[:, :6], family.poisoned_cache(mla, cfg, 2, 9))
    close(y, expected)
    y, cache = family.fold_decode(dsa, params, cfg, x[:, 6:], cache)
    expected, mla_cache = family.fold_decode(mla, params, cfg, x[:, 6:], mla_cache)
    close(y, expected)
    family.same_caches({name: cache[name] for name in mla_cache}, mla_cache)


@two_configs
def test_tokens_that_are_not_picked_reach_nothing(cfg):
    params = init_params(cfg)
    cache, x = filled(dsa, cfg, params, (9, 6), 11), tokens(cfg, new=1, seed=5)
    expected, _ = dsa.decode(params, cfg, x, cache)
    picks = dsa.index(params, cfg, x, cache)[:, 0].long()
    unpicked = torch.ones(2, 11, dtype=torch.bool).scatter(1, picks, False)
    assert unpicked.sum() == 2 * (11 - cfg.index_topk)
    poisoned = cache | {name: cache[name].masked_fill(unpicked[..., None], NAN) for name in ("latent", "k_rope")}
    for call in (dsa.decode, dsa.prefill):
        close(call(params, cfg, x, poisoned)[0], expected)


# ---- picks of another layer


def test_a_shared_layer_attends_the_picks_of_another():
    full = CONFIGS["glm_5"]
    cfg = SimpleNamespace(**(vars(full) | {"index_shared": True}))
    params, x = init_params(full), tokens(full, new=9)
    own = {name: leaf for name, leaf in params.items() if "index" not in name}
    indices = dsa.index(params, full, x, dsa.init_cache(full, 2, 9, torch.float64))
    expected = dsa.forward(params, full, x)
    close(dsa.forward(own, cfg, x, indices=indices), expected)
    cache = family.poisoned_cache(dsa, cfg, 2, 9)
    assert set(cache) == {"latent", "k_rope", "length"}
    y, cache = dsa.prefill(own, cfg, x[:, :5], cache, indices=indices[:, :5])
    close(y, expected[:, :5])
    for t in range(5, 9):
        y, cache = dsa.decode(own, cfg, x[:, t : t + 1], cache, indices=indices[:, t : t + 1])
        close(y, expected[:, t : t + 1])


def test_given_picks_that_no_query_may_see_are_ignored():
    cfg = dsa_config(index_shared=True)
    params, x = init_params(cfg), tokens(cfg)
    indices = torch.tensor([[t, -1, 0, 99, t + 1, -7, 2**31 - 1, 5] for t in range(7)], dtype=torch.int32)
    indices[0, 0], indices[5, 7] = -5, -1  # distinct picks stay the caller's duty
    picks = [[sorted({s for s in row if 0 <= s <= t}) for t, row in enumerate(indices.tolist())]] * 2
    expected, _ = dsa_loop(params, cfg, x, default_positions(x), picks)
    indices = indices.expand(2, -1, -1)
    close(dsa.forward(params, cfg, x, indices=indices), expected)
    y, _ = dsa.prefill(params, cfg, x, family.poisoned_cache(dsa, cfg, 2, 9), indices=indices)
    close(y, expected)
    cache = family.poisoned_cache(dsa, cfg, 2, 9)
    for t in range(7):
        y, cache = dsa.decode(params, cfg, x[:, t : t + 1], cache, indices=indices[:, t : t + 1])
        close(y, expected[:, t : t + 1])


def test_index_of_pads_and_rows_without_room_is_none():
    cfg = CONFIGS["deepseek_v32"]
    params = init_params(cfg)
    cache, x = filled(dsa, cfg, params, (9, 6), 11), tokens(cfg, new=2, seed=5)
    kept = {name: leaf.clone() for name, leaf in cache.items()}
    x[0, 1], x[1] = NAN, INF
    indices = dsa.index(params, cfg, x, cache, int32(1, 0))
    assert (indices[0, 1] == -1).all() and (indices[1] == -1).all() and (indices[0, 0] >= 0).all()
    family.same_caches(cache, kept)
    with pytest.raises(ValueError, match=r"^row 0 overflows its cache: length 9 \+ 3 new tokens, capacity 11$"):
        dsa.index(params, cfg, tokens(cfg, new=3), cache)


def test_quantised_scores_are_near_the_exact_ones():
    """|q8 s_q . k8 s_k - q . k| <= sum_j (|q_j| e_k,j + |k_j| e_q,j + e_q,j e_k,j) after the rotation, head by head."""
    cfg = CONFIGS["quantised"]
    exact = SimpleNamespace(**(vars(cfg) | {"index_quantised": False}))
    params, x = init_params(cfg), tokens(cfg, new=9)
    where = default_positions(x)
    (q, k, weights, _), (q8, k8, w8, k_scale) = (
        dsa.indexer.project(params, c, x, where, torch.float64) for c in (exact, cfg)
    )
    q, k, q_scale = hadamard(q), hadamard(k), (w8 / weights)[..., None]
    q_error, k_error = (q8 * q_scale - q).abs(), (k8.double() * k_scale[..., None] - k).abs()
    bound = torch.einsum("btij,bsj->btis", q.abs(), k_error) + torch.einsum(
        "btij,bsj->btis", q_error, k.abs() + k_error
    )
    lengths = int32(9, 9)
    scores = ops.index_scores(q, k, weights, lengths)
    rounded = ops.index_scores(q8, k8, w8, lengths, k_scale=k_scale)
    seen = scores > -INF
    error = (rounded - scores)[seen].abs()
    assert (error <= torch.einsum("bti,btis->bts", weights.abs(), bound)[seen] + 1e-12).all() and error.max() > 1e-3


def test_bad_picks_are_named():
    cfg, shared = CONFIGS["deepseek_v32"], dsa_config(index_shared=True)
    params, x, given = init_params(cfg), tokens(cfg), torch.zeros(2, 7, 4, dtype=torch.int32)
    for config, indices, error, message in (
        (cfg, given, ValueError, "^indices is given; allowed: None without index_shared"),
        (shared, None, ValueError, "^indices is None; allowed with index_shared: int32 B T L"),
        (shared, given[:, 1:], ValueError, r"^indices has shape \[2, 6, 4\]; allowed: \[B=2 T=7 L\]$"),
        (shared, given.long(), TypeError, r"^indices has dtype torch.int64; allowed: int32$"),
    ):
        with pytest.raises(error, match=message):
            dsa.forward(params, config, x, indices=indices)
    with pytest.raises(ValueError, match="^index_shared is True; allowed: False"):
        dsa.index(params, shared, x, dsa.init_cache(cfg, 2, 8, torch.float64))
    with pytest.raises(ValueError, match="^index_head_dim is 6; allowed with index_quantised: a power of two$"):
        dsa.forward(params, dsa_config(index_quantised=True), x)
