"""torch_ref's DeepSeek sparse attention: against a loop over queries and tokens, as latent attention, quantised."""

from types import SimpleNamespace

import dense_family as family
import pytest
import torch
from dense_family import INF, NAN, close, default_positions, int32, odd_positions, tokens
from dsa_loop import CONFIGS, dsa_config, dsa_loop, index_row, init_params

import torch_ref
from torch_ref import ops
from torch_ref.attention import dsa, mla
from torch_ref.core.quant import hadamard

every_config = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
two_configs = pytest.mark.parametrize(
    "cfg", [CONFIGS["deepseek_v32"], CONFIGS["quantised"]], ids=["plain", "quantised"]
)


def widened(cfg):
    """dsa for the shared laws, which compare caches at 1e-10: a float8 buffer is shown to them as the float32 it is."""

    def show(cache, dtype):
        return cache | {"k_index": cache["k_index"].to(dtype)} if cfg.index_quantised else cache

    def step(call, params, cfg, x, cache, *rest):
        y, cache = call(params, cfg, x, show(cache, torch.float8_e4m3fn), *rest)
        return y, show(cache, torch.float32)

    return SimpleNamespace(
        init_cache=lambda *args: show(dsa.init_cache(*args), torch.float32),
        forward=dsa.forward,
        prefill=lambda *args: step(dsa.prefill, *args),
        decode=lambda *args: step(dsa.decode, *args),
    )


def filled(cfg, params, first=(9, 6), capacity=11, dtype=torch.float64):
    """A cache of two rows after a ragged prefill, NaN in every slot that holds nothing."""
    empty = family.poisoned_cache(dsa, cfg, 2, capacity, dtype)
    return dsa.prefill(params, cfg, tokens(cfg, new=max(first)), empty, int32(*first))[1]


# ---- the equations


@every_config
def test_forward_is_the_loop(cfg):
    params, x = init_params(cfg), tokens(cfg, new=9)
    for positions in (default_positions(x), odd_positions(x)):
        expected, picks = dsa_loop(params, cfg, x, positions, mla.scaling(cfg))
        close(dsa.forward(params, cfg, x, positions), expected)
        assert picks[0][8] != list(range(9)) and len(picks[0][8]) == cfg.index_topk
    close(dsa.forward(params, cfg, x), dsa.forward(params, cfg, x, default_positions(x)))


@every_config
def test_index_gives_the_picks_of_the_loop_in_their_order(cfg):
    params, x = init_params(cfg), tokens(cfg, new=9)
    _, picks = dsa_loop(params, cfg, x, default_positions(x), mla.scaling(cfg))
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
        params, x, seen = init_params(cfg), tokens(cfg, new=6), []

        def spy(scores, k, seen=seen):
            seen.append((scores, k))
            return ops.topk_indices(scores, k)

        _, cache = dsa.prefill(params, cfg, x[:, :5], dsa.init_cache(cfg, 2, 8, torch.float64))
        names = ("index_scores", "decode_sparse_mla")
        spied = SimpleNamespace(topk_indices=spy, **{name: getattr(ops, name) for name in names})
        dsa.decode(params, cfg, x[:, 5:], cache, spied)
        (scores, k), expected = seen[0], [index_row(params, cfg, row, range(6))[0][5] for row in x]
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


def test_a_constant_added_to_all_positions_changes_nothing():
    for name in ("deepseek_v32", "glm_5"):
        cfg = CONFIGS[name]
        params, x = init_params(cfg), tokens(cfg, new=9)
        close(dsa.forward(params, cfg, x, default_positions(x) + 50), dsa.forward(params, cfg, x))


# ---- the laws of a cache


@every_config
def test_splits(cfg):
    x = tokens(cfg, new=9)
    family.check_splits(widened(cfg), init_params(cfg), cfg, x, 11, [1, 4, [3, 1, 5], [8, 1]])


@every_config
def test_ragged_rows_equal_rows_alone(cfg):
    family.check_ragged(widened(cfg), init_params(cfg), cfg, 10, (7, 0, 4), (1, 6, 0))


@two_configs
def test_inputs_are_kept_and_overflow_names_the_row(cfg, monkeypatch):
    family.check_inputs_kept(widened(cfg), init_params(cfg), cfg, 10)
    family.check_overflow(widened(cfg), init_params(cfg), cfg, 5, monkeypatch)


@two_configs
def test_tokens_that_are_not_picked_reach_nothing(cfg):
    params = init_params(cfg)
    cache, x = filled(cfg, params), tokens(cfg, new=1, seed=5)
    expected, _ = dsa.decode(params, cfg, x, cache)
    picks = dsa.index(params, cfg, x, cache)[:, 0].long()
    unpicked = torch.ones(2, 11, dtype=torch.bool).scatter(1, picks, False)
    assert unpicked.sum() == 2 * (11 - cfg.index_topk)
    poisoned = cache | {name: cache[name].masked_fill(unpicked[..., None], NAN) for name in ("latent", "k_rope")}
    for call in (dsa.decode, dsa.prefill):
        close(call(params, cfg, x, poisoned)[0], expected)


@two_configs
def test_gradients_beside_pads_and_poison_are_finite(cfg):
    params = {name: leaf.requires_grad_() for name, leaf in init_params(cfg).items()}
    x = tokens(cfg)
    x[1, 3:] = NAN
    x.requires_grad_()
    y, cache = dsa.prefill(params, cfg, x, family.poisoned_cache(dsa, cfg, 2, 8), int32(7, 3))
    y2, _ = dsa.decode(params, cfg, tokens(cfg, new=1), cache)
    (y.square().sum() + y2.square().sum()).backward()
    indexer = {name for name in params if "index" in name}
    assert {name for name, leaf in params.items() if leaf.grad is None} == indexer  # a pick has no derivative
    assert all(leaf.grad.isfinite().all() for name, leaf in params.items() if name not in indexer)
    assert (x.grad[1, 3:] == 0).all() and x.grad[1, :3].all()


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@two_configs
def test_a_narrow_cache_is_read_as_stored(cfg, x_dtype):
    params, x = init_params(cfg, x_dtype), tokens(cfg, new=9, dtype=x_dtype)
    y, prefilled = dsa.prefill(params, cfg, x, dsa.init_cache(cfg, 2, 9))
    stepped, decoded = family.fold_decode(dsa, params, cfg, x, dsa.init_cache(cfg, 2, 9))
    assert y.dtype == stepped.dtype == x_dtype
    assert all(prefilled[name].dtype == torch.bfloat16 for name in ("latent", "k_rope"))
    assert (stepped.double() - y.double()).norm() < 4 * torch.finfo(torch.bfloat16).eps * y.double().norm()
    for name in ("latent", "k_rope"):
        close(decoded[name], prefilled[name], 4 * torch.finfo(torch.bfloat16).eps)
    if x_dtype == torch.float32:
        assert not torch.allclose(y, dsa.forward(params, cfg, x), rtol=1e-4, atol=1e-4)


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
    expected, _ = dsa_loop(params, cfg, x, default_positions(x), mla.scaling(cfg), picks)
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
    cache, x = filled(cfg, params), tokens(cfg, new=2, seed=5)
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


# ---- layout and bad inputs


def test_cache_layout_and_registry():
    layout = {
        "latent": ([2, 9, 8], torch.bfloat16),
        "k_rope": ([2, 9, 4], torch.bfloat16),
        "length": ([2], torch.int32),
    }
    plain = {"k_index": ([2, 9, 6], torch.bfloat16)}
    quantised = {"k_index": ([2, 9, 8], torch.float8_e4m3fn), "k_index_scale": ([2, 9], torch.float32)}
    shared = SimpleNamespace(**(vars(CONFIGS["glm_5"]) | {"index_shared": True}))
    for cfg, more in ((CONFIGS["glm_5"], plain), (CONFIGS["quantised"], quantised), (shared, {})):
        cache = dsa.init_cache(cfg, 2, 9)
        assert {name: (list(leaf.shape), leaf.dtype) for name, leaf in cache.items()} == layout | more
    assert torch_ref.get("dsa") is dsa


BAD_FIELDS = [
    ({"q_lora_rank": None}, ValueError, "^q_lora_rank is None; allowed: an int >= 1"),
    ({"index_topk": 0}, ValueError, "^index_topk is 0; allowed: an int >= 1$"),
    ({"index_topk": 2.0}, TypeError, "^index_topk is a float; allowed: an int >= 1$"),
    ({"index_n_heads": 0}, ValueError, "^index_n_heads is 0; allowed: an int >= 1$"),
    ({"index_head_dim": 3}, ValueError, "^index_head_dim is 3; allowed: at least qk_rope_head_dim 4$"),
    ({"index_quantised": True}, ValueError, "^index_head_dim is 6; allowed with index_quantised: a power of two$"),
    ({"index_rope_layout": "neox"}, ValueError, "^index_rope_layout is 'neox'; allowed: half, interleaved$"),
    ({"index_shared": True}, ValueError, "^indices is None; allowed with index_shared: int32 B T L"),
]


@pytest.mark.parametrize(("fields", "error", "message"), BAD_FIELDS, ids=range(len(BAD_FIELDS)))
def test_bad_fields_are_named(fields, error, message):
    cfg = dsa_config()
    params, x = init_params(cfg), tokens(cfg, new=1)
    bad = SimpleNamespace(**(vars(cfg) | fields))
    with pytest.raises(error, match=message):
        dsa.forward(params, bad, x)
    for call in (dsa.prefill, dsa.decode):
        with pytest.raises(error, match=message):
            call(params, bad, x, dsa.init_cache(cfg, 2, 4, torch.float64))


def test_bad_arguments_are_named():
    cfg, shared = CONFIGS["deepseek_v32"], dsa_config(index_shared=True)
    params, x, cache = init_params(cfg), tokens(cfg), dsa.init_cache(cfg, 2, 8, torch.float64)
    with pytest.raises(ValueError, match=r"^x has shape \[2, 7, 10\]; allowed: \[B T=1 D=10\]$"):
        dsa.decode(params, cfg, x, cache)
    with pytest.raises(ValueError, match=r'^params\["k_index_bias"\] has shape \[1\]; allowed: \[6\]$'):
        dsa.forward(params | {"k_index_bias": torch.zeros(1)}, cfg, x)
    with pytest.raises(ValueError, match=r'^cache\["k_index"\] has shape \[2, 7, 6\]; allowed: \[B=2 S=8 J=6\]$'):
        dsa.prefill(params, cfg, x, cache | {"k_index": torch.zeros(2, 7, 6).double()})
    with pytest.raises(TypeError, match=r'^cache\["k_index"\] has dtype torch.float32; allowed: float64$'):
        dsa.prefill(params, cfg, x, cache | {"k_index": torch.zeros(2, 8, 6)})
    with pytest.raises(ValueError, match="^indices is given; allowed: None without index_shared"):
        dsa.forward(params, cfg, x, indices=torch.zeros(2, 7, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"^indices has shape \[2, 6, 4\]; allowed: \[B=2 T=7 L\]$"):
        dsa.forward(params, shared, x, indices=torch.zeros(2, 6, 4, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"^indices has dtype torch.int64; allowed: int32$"):
        dsa.forward(params, shared, x, indices=torch.zeros(2, 7, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="^index_shared is True; allowed: False"):
        dsa.index(params, shared, x, cache)
