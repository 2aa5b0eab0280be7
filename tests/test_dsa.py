"""DeepSeek sparse attention beyond the laws: limit, picks, shared picks, bytes, e4m3 scores, bad input, mutants."""

import importlib
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from judges import compiled, law, limit, patch, tokens, torch_forward, unread, walks, weights

import jforge
import torch_ref
from jforge.attention import dsa, mla
from jforge.core import compare, quant, rope
from jforge.core.norm import rms_norm
from jforge.core.step import all_of
from jforge.harness.backends import to_torch

DSA, MLA, TWIN = jforge.get("dsa"), jforge.get("mla"), torch_ref.get("dsa")
SMALL = DSA.Config(
    hidden_size=9, num_attention_heads=2, q_lora_rank=7, kv_lora_rank=6, qk_nope_head_dim=3, qk_rope_head_dim=4,
    v_head_dim=5, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, index_n_heads=8, index_head_dim=8,
    index_topk=4,
)  # fmt: skip
E4M3 = replace(SMALL, index_quantised=True)
V32 = DSA.models["DeepSeek-V3.2"]


def as_mla(cfg):
    """The `twin` of DSA on MLA's fields and weights."""
    config = MLA.Config(**{f.name: getattr(cfg, f.name) for f in fields(MLA.Config)})
    return MLA, config, lambda params: {name: params[name] for name in mla.shapes(config)}


# --- limits and sizes that the examples do not have


def test_all_tokens_are_mla():
    """forward, prefill and decode of 10 tokens are MLA with the same weights, whatever the index keys are."""
    cfg = replace(E4M3, index_topk=99)
    assert limit(DSA, cfg, as_mla(cfg)) <= compare.OUT["float64"]


def test_it_is_mla_up_to_index_topk_tokens():
    other, config, convert = as_mla(SMALL)
    with jax.enable_x64(True):
        params, x = weights(DSA, SMALL), tokens(SMALL, 2, 8)
        y, want = compiled(DSA, SMALL)[0](params, x), compiled(other, config)[0](convert(params), x)
        assert compare.relative(y[:, :4], want[:, :4]) <= compare.OUT["float64"]
        assert compare.relative(y[:, 4:], want[:, 4:]) > 1e-3


def test_torch_ref_picks_the_same_but_for_ties():
    """float32 in both; torch_ref's scores in float64 decide what is a tie."""
    T, params, x = 40, weights(DSA, SMALL, "float32"), tokens(SMALL, 2, 40, "float32")
    cache = DSA.init_cache(SMALL, 2, T, jnp.float32)
    got = jax.jit(lambda params, x: dsa.index(params, SMALL, x, cache))(params, x)
    theirs = {n: to_torch(p) for n, p in params.items()}
    want = TWIN.index(theirs, SMALL, to_torch(x), TWIN.init_cache(SMALL, 2, T, torch.float32))
    order, lengths = torch.arange(T).expand(2, T), torch.full((2,), T, dtype=torch.int32)
    exact = {n: p.double() for n, p in theirs.items()}
    q, k, w, _ = TWIN.indexer.project(exact, SMALL, to_torch(x).double(), order, torch.float64)
    found = compare.picks(got, want, torch_ref.ops.index_scores(q, k, w, lengths), SMALL.index_topk, 1e-5)
    assert found.rows == 2 * T and found.wrong == 0 and found.tied <= 1


# --- shared picks


def taking(params, cfg):
    """forward, prefill and decode of the picks of another layer and the rest."""

    def compile(step):
        return jax.jit(lambda picks, *rest: step(params, cfg, *rest, indices=picks))

    return map(compile, (DSA.forward, DSA.prefill, DSA.decode))


def test_picks_of_another_layer_are_as_good_as_its_own():
    """A layer without an indexer, given the picks of one with the same weights: forward, two chunks, decode."""
    cfg, shared, T = E4M3, replace(E4M3, index_shared=True), 9
    assert set(DSA.cache_spec(shared)) == set(MLA.cache_spec(as_mla(cfg)[1]))
    assert set(dsa.shapes(shared)) == set(mla.shapes(as_mla(cfg)[1]))
    with jax.enable_x64(True):
        params, x = jax.tree.map(jnp.asarray, (weights(DSA, cfg), tokens(cfg, 2, T)))
        forward, prefill, decode = taking({name: params[name] for name in dsa.shapes(shared)}, shared)
        index = jax.jit(lambda x, cache: dsa.index(params, cfg, x, cache))
        own_forward, *own_steps = compiled(DSA, cfg)
        want = own_forward(params, x)
        full, cache = (DSA.init_cache(c, 2, T, jnp.float64) for c in (cfg, shared))
        assert compare.relative(forward(index(x, full), x), want) <= compare.OUT["float64"]
        for at in (slice(0, 4), slice(4, 8), slice(8, 9)):
            one, picks = at.stop == T, index(x[:, at], full)
            y, cache = (decode if one else prefill)(picks, x[:, at], cache)
            _, full = own_steps[one](params, x[:, at], full)
            assert compare.relative(y, want[:, at]) <= compare.OUT["float64"]


def test_given_picks_that_no_query_may_see_are_ignored():
    """-1, negative numbers, the future and slots past the cache, anywhere in the list."""
    shared, T = replace(SMALL, index_shared=True), 5
    params, x = jax.tree.map(jnp.asarray, (weights(DSA, shared, "float32"), tokens(SMALL, 2, T, "float32")))
    clean = np.array([[t, 0 if t else -1, -1, -1, -1] for t in range(T)], np.int32)
    dirty = np.array([[-7, t, t + 1, 0 if t else -1, 2**31 - 1] for t in range(T)], np.int32)
    clean, dirty = np.stack([clean, clean]), np.stack([dirty, dirty])
    forward, prefill, decode = taking(params, shared)
    want = forward(clean, x)
    assert compare.relative(forward(dirty, x), want) == 0
    y, cache = prefill(dirty[:, :4], x[:, :4], DSA.init_cache(shared, 2, 7, jnp.float32))
    assert compare.relative(y, want[:, :4]) <= compare.OUT["float32"]
    y, _ = decode(dirty[:, 4:], x[:, 4:], DSA.cache_spec(shared).poison(shared, cache))
    assert compare.relative(y, want[:, 4:]) <= compare.OUT["float32"]


# --- bytes (mechanisms.md 6.4)


def test_v32_bytes():
    """1152 + 256 B a token and layer in bfloat16; 83.9 GiB for 61 layers at 2^20 tokens."""
    cost = DSA.cost(V32, context=131072)
    assert cost.stored == {"latent": 131072 * 1024, "k_rope": 131072 * 128, "k_index": 131072 * 256}
    assert (cost.per_token, cost.fixed) == (1152 + 256, 0)
    assert cost.written == {"latent": 1024, "k_rope": 128, "k_index": 256}
    assert cost.read == {"latent": 2048 * 1024, "k_rope": 2048 * 128, "k_index": 32 * 2**20}
    assert cost.entries_read == 131072 + 2048
    whole = 61 * DSA.cost(V32, context=2**20)
    assert round(sum(whole.stored.values()) / 2**30, 1) == 83.9
    short = DSA.cost(V32, context=1000)
    assert short.read == short.stored


def test_v32_reads_less_than_mla_from_2634_tokens_on():
    """T (1152 - 256) > 2048 * 1152."""
    _, config, _ = as_mla(V32)
    less = [
        sum(DSA.cost(V32, context=T).read.values()) < sum(MLA.cost(config, context=T).read.values())
        for T in (2633, 2634)
    ]
    assert less == [False, True]


def test_e4m3_index_bytes():
    """128 + 4 B a token; 16.5 MiB of them at 131,072 tokens. The latents stay in bfloat16."""
    cost = DSA.cost(DSA.models["DeepSeek-V3.2, e4m3 index"], context=131072)
    assert cost.per_token == 1152 + 132
    assert (cost.read["k_index"], cost.read["k_index_scale"]) == (16 * 2**20, 2**19)
    assert (cost.written["k_index"], cost.written["k_index_scale"]) == (128, 4)
    shared = DSA.cost(replace(V32, index_shared=True), context=131072)
    assert shared.per_token == 1152 and shared.read == {"latent": 2048 * 1024, "k_rope": 2048 * 128}
    assert shared.entries_read == 2048


# --- e4m3


def scores(cfg, params, x):
    """B T S: the scores of T tokens for each other, as forward ranks them."""
    order = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    q, w = dsa.index_queries(params, cfg, x, order, x.dtype)
    index = dsa.index_keys(params, cfg, x, order, x.dtype)
    return dsa.token_scores(q, index["k_index"], w, order[:, None] <= order[..., None], index.get("k_index_scale"))


def test_e4m3_scores_are_near_the_exact_ones():
    """Within sum_i |w_i| (|q_i| e_k + e_q |k| + e_q e_k), where e is half a step of a rotated channel: 1/16 of it, or
    1/1024 of the scale."""
    params, x = weights(DSA, SMALL, "float32"), tokens(SMALL, 2, 12, "float32")

    @jax.jit
    def run(params, x):
        order = jnp.broadcast_to(jnp.arange(12), (2, 12))
        (q, w), k = (side(params, SMALL, x, order, x.dtype) for side in (dsa.index_queries, dsa.index_keys))
        k = k["k_index"]
        sides = []
        for a in (quant.hadamard(q), quant.hadamard(k)):
            sides += [jnp.abs(a), jnp.maximum(jnp.abs(a) / 16, quant.e4m3(a)[1][..., None] / 1024)]
        return scores(SMALL, params, x), scores(E4M3, params, x), *sides, jnp.abs(w)

    exact, rounded, q, q_step, k, k_step, w = map(np.asarray, run(params, x))
    bound = np.einsum("btij,bsj->btis", q + q_step, k + k_step) - np.einsum("btij,bsj->btis", q, k)
    seen = np.isfinite(exact)
    assert (seen == np.isfinite(rounded)).all() and (seen == np.tril(np.ones((12, 12), bool))).all()
    error = np.abs(rounded[seen] - exact[seen])
    assert (error <= np.einsum("bti,btis->bts", w, bound)[seen] + 1e-6).all() and error.max() > 1e-3


# --- bad input


def test_indices_go_with_index_shared():
    shared = replace(SMALL, index_shared=True)
    x = jnp.zeros((2, 1, SMALL.hidden_size))
    cache = DSA.init_cache(shared, 2, 4, jnp.float32)
    with pytest.raises(ValueError, match="^indices is None; "):
        DSA.forward({}, shared, x)
    for step in (DSA.prefill, DSA.decode):
        with pytest.raises(ValueError, match="^indices is None; "):
            step({}, shared, x, cache)


def test_its_own_picks_may_be_given():
    """What `lend` gives before the layer is called is what it would pick; other picks are obeyed."""
    with jax.enable_x64(True):
        params, x = jax.tree.map(jnp.asarray, (weights(DSA, SMALL), tokens(SMALL, 2, 9)))
        rows, cache = all_of(SMALL, x, None), DSA.init_cache(SMALL, 2, 9, jnp.float64)
        for own, call in ((DSA.lend(params, SMALL, rows, None), lambda **more: DSA.forward(params, SMALL, x, **more)),
                          (DSA.lend(params, SMALL, rows, cache),
                           lambda **more: DSA.prefill(params, SMALL, x, cache, **more)[0])):  # fmt: skip
            np.testing.assert_array_equal(call(indices=own), call())
            assert compare.relative(call(indices=jnp.zeros_like(own)), call()) > 1e-3


def test_given_indices_must_fit_x(untyped):
    shared, x = replace(SMALL, index_shared=True), jnp.zeros((2, 1, SMALL.hidden_size))
    for bad, error in ((jnp.zeros((2, 3), jnp.int32), ValueError), (jnp.zeros((2, 2, 3), jnp.int32), ValueError),
                       (jnp.zeros((3, 1, 3), jnp.int32), ValueError), (jnp.zeros((2, 1, 3)), TypeError)):  # fmt: skip
        cache = DSA.init_cache(shared, 2, 4, jnp.float32)
        for step, given in ((DSA.forward, (x,)), (DSA.prefill, (x, cache)), (DSA.decode, (x, cache))):
            with pytest.raises(error, match="^indices has "):
                step({}, shared, *given, indices=bad)


def test_index_of_a_ragged_chunk():
    """Rows of their own length: the picks of each are those of the row alone, and pads pick nothing."""
    given = weights(DSA, SMALL, "float32"), tokens(SMALL, 2, 5, "float32"), tokens(SMALL, 2, 4, "float32")
    params, x, new = jax.tree.map(jnp.asarray, given)
    _, cache = compiled(DSA, SMALL)[1](params, x, DSA.init_cache(SMALL, 2, 12, jnp.float32), np.array([5, 2], np.int32))
    got = dsa.index(params, SMALL, new, cache, np.array([2, 4], np.int32))
    for row, n in enumerate((2, 4)):
        alone = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], cache)
        want = dsa.index(params, SMALL, new[row : row + 1, :n], alone)
        np.testing.assert_array_equal(got[row, :n], want[0])
        assert (got[row, n:] == -1).all() and (got[row, :n] >= 0).any()


def test_a_shared_layer_has_no_picks_of_its_own():
    shared = replace(SMALL, index_shared=True)
    cache = DSA.init_cache(shared, 2, 4, jnp.float32)
    for ask in (dsa.index, DSA.select):
        with pytest.raises(ValueError, match="^index_shared is True; "):
            ask({}, shared, jnp.zeros((2, 1, SMALL.hidden_size)), cache)


# --- mutants

score_module = importlib.import_module("jforge.ops.index_scores")
right_queries, right_scores = dsa.index_queries, dsa.token_scores


def _layout_of_glm(cfg, heads, positions):
    return rope.apply_rope(heads, positions, cfg.rope_parameters, "interleaved", dim=cfg.qk_rope_head_dim)


def _rms_norm(x, weight, bias, *, eps):
    return rms_norm(x, weight, eps=eps) + bias


def _weights(change):
    def index_queries(params, cfg, x, positions, dtype):
        q, w = right_queries(params, cfg, x, positions, dtype)
        return q, change(w, cfg)

    return index_queries


def _no_relu(q, k, weights, seen, k_scale=None):
    return jnp.where(seen, jnp.einsum("bti,btis->bts", weights, score_module._products(q, k, seen, k_scale)), -jnp.inf)


def _query_scale_dropped(params, cfg, x, positions, dtype):
    q, _ = right_queries(params, cfg, x, positions, dtype)
    return q, right_queries(params, replace(cfg, index_quantised=False), x, positions, dtype)[1]


def _key_scale_dropped(q, k, weights, seen, k_scale=None):
    return right_scores(q, k, weights, seen, None)


def _query_not_rotated(params, cfg, x, positions, dtype):
    q, w = right_queries(params, replace(cfg, index_quantised=False), x, positions, dtype)
    q, scale = quant.e4m3(q)
    return q.astype(dtype), w * scale


def other_scores(att) -> bool:
    """Do the e4m3 scores differ from torch_ref's? A factor on all of them moves no pick, so no output shows it."""
    params, x = weights(DSA, E4M3, "float32"), tokens(E4M3, 2, 9, "float32")
    theirs = {n: to_torch(p) for n, p in params.items()}
    q, k, w, k_scale = TWIN.indexer.project(theirs, E4M3, to_torch(x), torch.arange(9).expand(2, 9), torch.float32)
    want = torch_ref.ops.index_scores(q, k, w, torch.tensor([9, 9], dtype=torch.int32), k_scale=k_scale)
    got = jax.jit(lambda p, x: scores(E4M3, p, x))(params, x)
    return compare.worst_row(got, want) > compare.OUT["float32"]


in_torch, in_torch_e4m3 = torch_forward("dsa", SMALL), torch_forward("dsa", E4M3)
MUTANTS = {
    "DSA: interleaved RoPE in the indexer of V3.2": (patch(DSA, dsa, "_turn", _layout_of_glm), in_torch),
    "DSA: RMSNorm of the index keys": (patch(DSA, dsa, "layer_norm", _rms_norm), in_torch),
    "DSA: no ReLU": (patch(DSA, dsa, "token_scores", _no_relu), in_torch),
    "DSA: weights without their sign": (
        patch(DSA, dsa, "index_queries", _weights(lambda w, cfg: jnp.abs(w))), in_torch),
    "DSA: picks of -inf are attended": (
        patch(DSA, dsa, "choose", lambda cfg, s, ops=None: jax.lax.top_k(s, min(cfg.index_topk, s.shape[-1]))[1]),
        walks(E4M3, 17)),
    "DSA: the scan of the index keys is not counted": (
        unread(DSA, "k_index"), law("L8", SMALL)),
    "DSA, e4m3: I^-1/2 is forgotten": (
        patch(DSA, dsa, "index_queries", _weights(lambda w, cfg: w * cfg.index_n_heads**0.5)),
        other_scores),
    "DSA, e4m3: the scale of a query is dropped": (
        patch(DSA, dsa, "index_queries", _query_scale_dropped), in_torch_e4m3),
    "DSA, e4m3: the scale of a key is dropped": (patch(DSA, dsa, "token_scores", _key_scale_dropped), in_torch_e4m3),
    "DSA, e4m3: keys are rotated and queries are not": (
        patch(DSA, dsa, "index_queries", _query_not_rotated), in_torch_e4m3),
}  # fmt: skip


judges = in_torch, in_torch_e4m3, law("L8", SMALL), other_scores
JUDGES = {
    "a walk of DSA": lambda: not walks(E4M3, 17)(DSA),
    "torch_ref and L8 on DSA": lambda: not any(notices(DSA) for notices in judges),
}
