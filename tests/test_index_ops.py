"""The ops of the indexed and linear mechanisms beyond the cases, their quantiser, and what decode makes with them."""

import importlib
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jforge
import torch_ref
from jforge.core import blocks, compare, quant
from jforge.harness.backends import BACKENDS, to_torch
from jforge.traffic import SCATTERS

PACKAGES = [b.package for b in BACKENDS.values()]
REFERENCES = ("jforge.ops", "torch_ref.ops")


def call(package: str, op: str, *arrays, **options):
    """NumPy arrays (or anything else) in, arrays of the package's framework out."""
    convert = to_torch if package in ("torch_ref.ops", "triton_kernels") else jnp.asarray
    arrays = [convert(a) if isinstance(a, np.ndarray) else a for a in arrays]
    options = {name: convert(a) if isinstance(a, np.ndarray) else a for name, a in options.items()}
    return getattr(importlib.import_module(package), op)(*arrays, **options)


def zeros(*shape, dtype="float16") -> np.ndarray:
    return np.zeros(shape, dtype)


def f32(*shape) -> np.ndarray:
    return np.zeros(shape, np.float32)


LENGTHS = np.array([5, 64], np.int32)
KEYS = {"q_index": zeros(2, 1, 8, 16), "k_index": zeros(2, 64, 16)}
GOOD = {
    "decode_linear": {"q": zeros(2, 3, 16), "k": zeros(2, 3, 16), "v": zeros(2, 3, 8), "state": f32(2, 3, 16, 8),
                      "decay": f32(3)},
    "index_scores": {**KEYS, "weights": f32(2, 1, 8), "lengths": LENGTHS},
    "block_index_scores": {**KEYS, "lengths": LENGTHS},
    "decode_sparse_mla": {"q_latent": zeros(2, 1, 4, 64), "q_rope": zeros(2, 1, 4, 16), "latent": zeros(2, 32, 64),
                          "k_rope": zeros(2, 32, 16), "indices": np.zeros((2, 1, 8), np.int32)},
}  # fmt: skip
NEEDED = {"block_index_scores": {"block_size": 16}, "decode_sparse_mla": {"scale": 0.1}}


# --- meaning beyond the cases


@pytest.mark.parametrize("stored", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("op", ["index_scores", "block_index_scores", "decode_sparse_mla"])
def test_quantised_values_mean_stored_times_scale(op, stored):
    """Where a query may not look, values and scales are NaN (int8 has none: scales only)."""
    rng = np.random.default_rng(0)
    name, scale_name = ("latent", "latent_scale") if op == "decode_sparse_mla" else ("k_index", "k_scale")
    arrays = {n: rng.standard_normal(a.shape).astype(a.dtype) for n, a in GOOD[op].items() if a.dtype != np.int32}
    arrays = {n: jnp.asarray(a, jnp.float32) for n, a in arrays.items()}
    indices = np.array([[[4, 2, -1, 0, 1, 3, 99, -5]], [rng.permutation(32)[:8]]], np.int32)
    arrays |= {
        n: jnp.asarray({"lengths": LENGTHS, "indices": indices}[n]) for n in ("lengths", "indices") if n in GOOD[op]
    }
    arrays = {n: arrays[n] for n in GOOD[op]}
    codes = (9 * arrays[name]).astype(stored)
    scale = jnp.asarray(rng.uniform(0.5, 2, codes.shape[:2]), jnp.float32)
    function = getattr(jforge.ops, op)
    want = function(*(arrays | {name: codes.astype(jnp.float32) * scale[..., None]}).values(), **NEEDED.get(op, {}))
    unseen = np.arange(codes.shape[1]) >= 5  # of row 0
    scale = scale.at[0, unseen].set(jnp.nan)
    codes = codes if stored == "int8" else codes.at[0, unseen].set(jnp.nan)
    got = function(*(arrays | {name: codes}).values(), **NEEDED.get(op, {}), **{scale_name: scale})
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("package", REFERENCES)
def test_the_state_keeps_its_dtype(package):
    """float64 factors and a float32 state."""
    arrays = GOOD["decode_linear"] | {"decay": np.full(3, 0.5)}
    with jax.enable_x64(True):
        out, state = call(package, "decode_linear", *arrays.values(), beta=np.full((2, 3), 0.5))
    assert str(state.dtype).endswith("float32") and str(out.dtype).endswith("float16")


# --- topk_indices

INF = np.inf
TABLES = {
    "ties": ([1, 3, 3, 2, 3, 2], 4, [1, 2, 4, 3]),
    "-inf is no pick": ([-INF, 2, -INF, -1], 3, [1, 3, -1]),
    "nothing to pick": ([-INF] * 4, 2, [-1, -1]),
    "+inf comes first": ([2, INF, 9, INF], 3, [1, 3, 2]),
    "-0.0 and 0.0 are one score": ([-0.0, 0.0, -0.0, -1], 3, [0, 1, 2]),
    "k > S": ([0, -INF, 5], 5, [2, 0, -1, -1, -1]),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("package", REFERENCES)
def test_topk_tables(package, name):
    scores, k, want = TABLES[name]
    got = call(package, "topk_indices", np.array(scores, np.float32), k)
    assert str(got.dtype).endswith("int32") and np.asarray(got).tolist() == want


@pytest.mark.parametrize("package", PACKAGES)
def test_topk_of_broken_scores(untyped, package):
    """NaN of either sign above +inf, the lower index first; k may be a NumPy integer."""
    scores = np.array([1, np.copysign(np.nan, -1), INF, np.copysign(np.nan, 1), -INF], np.float32)
    assert np.asarray(call(package, "topk_indices", scores, np.int64(5))).tolist() == [1, 3, 2, 0, -1]


# --- the quantiser of the index


def test_hadamard_is_the_signed_sum_and_its_own_inverse():
    for J in (1, 2, 8, 128):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((3, J)), jnp.float32)
        signs = np.array([[(-1.0) ** (i & j).bit_count() for j in range(J)] for i in range(J)])
        assert compare.relative(quant.hadamard(x), x @ signs / J**0.5) <= compare.OUT["float32"]
        assert compare.relative(quant.hadamard(quant.hadamard(x)), x) <= compare.OUT["float32"]


def scale_of(largest: float) -> float:
    return float(quant.e4m3(jnp.asarray([largest / 3, -largest], jnp.float32))[1])


def scale_rule_holds() -> bool:
    """At 448 * 2^n the scale is 2^n, and so one float32 below; one above it is 2^(n+1)."""

    def holds(n: int) -> bool:
        edge = np.float32(448 * 2.0**n)
        below, above = (float(np.nextafter(edge, np.float32(to))) for to in (0, INF))
        return (scale_of(below), scale_of(float(edge)), scale_of(above)) == (2.0**n, 2.0**n, 2.0 ** (n + 1))

    return all(map(holds, (-20, -1, 0, 1, 9, 30)))


def test_scale_rule():
    assert scale_rule_holds()
    assert scale_of(0.0) == scale_of(1e-7) == scale_of(1e-4) == 2.0**-22  # 1e-4 / 448 = 2^-22.1


def _nearest_scale(x):
    scale = 2.0 ** jnp.round(jnp.log2(jnp.maximum(jnp.abs(x).max(axis=-1), 1e-4) / quant.E4M3_MAX))
    return jnp.clip(x / scale[..., None], -quant.E4M3_MAX, quant.E4M3_MAX).astype(jnp.float8_e4m3fn), scale


MUTANTS = {
    "e4m3: the scale is the nearest power of two": (
        lambda monkeypatch: monkeypatch.setattr(quant, "e4m3", _nearest_scale), lambda _: not scale_rule_holds()),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, monkeypatch):
    plant, notices = MUTANTS[name]
    assert notices(plant(monkeypatch)), f"nobody noticed: {name}"


def test_e4m3_values_come_back():
    """Every finite e4m3 value, 448 among them, times a power of two."""
    every = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float32)
    every = every[np.isfinite(every)]
    assert len(every) == 254 and every.max() == 448
    x = jnp.asarray(every * 2.0 ** np.array([[-12], [-3], [0], [8]]), jnp.float32)
    stored, scale = quant.e4m3(x)
    assert stored.dtype == jnp.float8_e4m3fn and scale.tolist() == [2.0**-12, 2.0**-3, 1.0, 2.0**8]
    np.testing.assert_array_equal(stored.astype(jnp.float32) * scale[:, None], x)


def test_e4m3_error_is_within_half_a_step():
    """|stored * s - x| <= max(|x| / 16, s / 1024); torch_ref stores the same values."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((400, 16)) * np.exp(4 * rng.standard_normal((400, 1)))).astype("float32")
    stored, scale = (np.asarray(a, np.float32) for a in quant.e4m3(jnp.asarray(x)))
    error = np.abs(stored * scale[:, None] - x)
    assert (error <= np.maximum(np.abs(x) / 16, scale[:, None] / 1024)).all() and error.max() > 0
    theirs, their_scale = torch_ref.core.quant.e4m3(torch.from_numpy(x))
    np.testing.assert_array_equal(scale, their_scale)
    np.testing.assert_array_equal(stored, theirs.float())


# --- what a decode step makes

S = 4999  # a prime, and far from every other size
MSA, DSA = jforge.get("msa"), jforge.get("dsa")
GROUPS = MSA.Config(
    hidden_size=17, num_attention_heads=6, num_key_value_heads=3, head_dim=4, v_head_dim=7, index_head_dim=5,
    index_block_size=2, index_topk_blocks=2,
)  # fmt: skip
LATENT = DSA.Config(
    hidden_size=17, num_attention_heads=7, q_lora_rank=9, kv_lora_rank=11, qk_nope_head_dim=6, qk_rope_head_dim=2,
    v_head_dim=5, index_n_heads=3, index_head_dim=8, index_topk=13,
)  # fmt: skip
STEPS = {"msa": (MSA, GROUPS), "dsa": (DSA, LATENT), "dsa e4m3": (DSA, replace(LATENT, index_quantised=True))}


def long_values(att, cfg, ops=jforge.ops) -> dict[int, str]:
    """{size: one equation} of all that a decode step of one row makes of S / 2 elements or more, apart from the
    buffers after their scatters."""
    params = jax.eval_shape(lambda: att.init_params(jax.random.key(0), cfg))
    cache = jax.eval_shape(lambda: att.init_cache(cfg, 1, S))
    x = jax.ShapeDtypeStruct((1, 1, cfg.hidden_size), jnp.float32)
    found = {}

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            leaves = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr"))
            inner = [p.jaxpr for p in leaves if hasattr(p, "jaxpr")]
            for sub in inner:
                walk(sub)
            if not inner and eqn.primitive.name not in SCATTERS:
                found.update((v.aval.size, str(eqn)) for v in eqn.outvars if v.aval.size >= S // 2)

    walk(jax.make_jaxpr(lambda p, x, c: att.decode(p, cfg, x, c, ops))(params, x, cache).jaxpr)
    return found


def of_the_scan(cfg) -> set[int]:
    """Sizes of the index keys, of a score for each index head, and of one for all; of slots, and in MSA of blocks."""
    if not hasattr(cfg, "index_block_size"):
        return {S, S * cfg.index_n_heads, S * cfg.index_head_dim}
    entries, heads = -(-S // cfg.index_block_size), cfg.num_key_value_heads
    padded = entries * cfg.index_block_size
    return {S, S * heads, S * cfg.index_head_dim, padded * heads, entries, entries * heads}


@pytest.mark.parametrize("name", STEPS)
def test_decode_makes_nothing_long_but_the_index_scan(name):
    att, cfg = STEPS[name]
    long, scan = long_values(att, cfg), of_the_scan(cfg)
    assert long.keys() <= scan, next(equation for size, equation in long.items() if size not in scan)
    assert len(long) >= 3


def _blocks_under_a_mask(q, k, v, lists, lengths, *, block_size, **options):
    picked = blocks.tokens(lists, block_size, S).any(axis=2)[:, 0, :, None, None]
    return jforge.ops.decode_attention(q, jnp.where(picked, k, 0), v, lengths, **options)


def _latents_under_a_mask(q_latent, q_rope, latent, k_rope, indices, **options):
    picked = blocks.tokens(indices[:, :, None], 1, S)[:, 0, 0, :, None]
    lengths = jnp.full(len(latent), S, jnp.int32)
    return jforge.ops.decode_mla(q_latent, q_rope, jnp.where(picked, latent, 0), k_rope, lengths, **options)


@pytest.mark.parametrize("name,op,masked", [("msa", "decode_block_sparse", _blocks_under_a_mask),
                                            ("dsa", "decode_sparse_mla", _latents_under_a_mask)])  # fmt: skip
def test_the_walk_over_decode_sees_a_mask(name, op, masked):
    ops = SimpleNamespace(**{n: getattr(jforge.ops, n) for n in jforge.ops.__all__ if n != "mix"} | {op: masked})
    att, cfg = STEPS[name]
    heads = cfg.num_attention_heads
    assert {S * heads} <= long_values(att, cfg, ops).keys() - of_the_scan(cfg)
