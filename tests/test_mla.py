"""MLA beyond the laws: the two forms, the size of what absorbed decode makes, published bytes and scales, mutants."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judges import law, patch, recount, replaced

import jforge
import torch_ref
from jforge.attention import mla
from jforge.core import compare
from jforge.core.step import Queries
from jforge.harness.backends import to_torch
from jforge.harness.frameworks import against_torch

ATT = jforge.get("mla")
LORA, PLAIN = ATT.examples


@pytest.mark.parametrize("cfg", ATT.examples, ids=["q-lora", "NoPE"])
def test_naive_equals_absorbed(cfg, untyped):
    with jax.enable_x64(True):
        params = ATT.init_params(jax.random.key(0), cfg, jnp.float64)
        x = jax.random.normal(jax.random.key(1), (2, 6, cfg.hidden_size), jnp.float64)
        _, cache = ATT.prefill(params, cfg, x, ATT.init_cache(cfg, 2, 6, jnp.float64))
        last, at = x[:, 5:], jnp.full((2, 1), 5)
        naive = mla.attend_naive(params, cfg, Queries(last, at, at, at > 0), cache.latent, cache.k_rope)
        q = mla.queries(params, cfg, last, at)
        absorbed = mla.attend_absorbed(params, cfg, *q, cache, jforge.ops.decode_mla, cache.length)
        assert compare.relative(mla.project_out(params, cfg, absorbed), naive) <= compare.OUT["float64"]


def test_absorbed_decode_never_expands_the_cache():
    """No value in the traced step has B*S*N*H elements or more, and a step writes C + R elements."""
    B, S = 2, 64
    params = jax.eval_shape(lambda: ATT.init_params(jax.random.key(0), PLAIN))
    cache = jax.eval_shape(lambda: ATT.init_cache(PLAIN, B, S, jnp.float32))
    x = jax.ShapeDtypeStruct((B, 1, PLAIN.hidden_size), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda p, x, c: ATT.decode(p, PLAIN, x, c))(params, x, cache)
    smallest_head = min(PLAIN.qk_nope_head_dim, PLAIN.v_head_dim)
    assert max(_sizes(jaxpr.jaxpr)) < B * S * PLAIN.num_attention_heads * smallest_head
    naive = jax.make_jaxpr(lambda p, x: ATT.forward(p, PLAIN, x))(
        params, jax.ShapeDtypeStruct((B, S, PLAIN.hidden_size), jnp.float32)
    )
    assert max(_sizes(naive.jaxpr)) >= B * S * PLAIN.num_attention_heads * smallest_head
    written = ATT.cost(PLAIN, context=S, dtype=jnp.float32).written
    assert sum(written.values()) == 4 * (PLAIN.kv_lora_rank + PLAIN.qk_rope_head_dim)


def _sizes(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")):
            if hasattr(inner, "jaxpr"):
                yield from _sizes(inner.jaxpr)


def test_deepseek_v3_bytes():
    """mechanisms.md 2.4: 1152 B a token and layer in bfloat16, 70,272 B for 61 layers, 81,920 B a layer expanded."""
    cfg = ATT.models["DeepSeek-V3"]
    cost = ATT.cost(cfg, context=4096)
    assert cost.per_token == 1152 and (61 * cost).per_token == 70272
    expanded = cfg.num_attention_heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim) * 2
    assert expanded == 81920
    assert sum(cost.read.values()) == 1152 * 4096


def test_softmax_scales():
    """192^-1/2 m^2: DeepSeek-V3 with mscale_all_dim 1, V2 with 0.707."""
    v3 = ATT.models["DeepSeek-V3"]
    assert v3.scaling == pytest.approx(0.1352338, abs=1e-7)
    fields = {f: getattr(v3, f) for f in v3.__dataclass_fields__ if f != "scaling"}
    v2 = {**v3.rope_parameters, "mscale": 0.707, "mscale_all_dim": 0.707}
    assert ATT.Config(**{**fields, "rope_parameters": v2}).scaling == pytest.approx(0.1147214, abs=1e-7)
    assert ATT.models["Kimi-Linear"].scaling == pytest.approx(192**-0.5)


right_queries, right_latents = mla.queries, mla.latents


def _latent_not_normed(params, cfg, x, positions):
    down = x @ params["wkv_a"] + params["bkv_a"]
    return down[..., : cfg.kv_lora_rank], right_latents(params, cfg, x, positions)[1]


def _rope_slice_normed(params, cfg, x, positions):
    latent, k_rope = right_latents(params, cfg, x, positions)
    return latent, mla.rms_norm(k_rope, jnp.ones(k_rope.shape[-1]), eps=1e-6)


def _query_order_swapped(params, cfg, x, positions):
    R = cfg.qk_rope_head_dim
    swapped = {**params, "wq_b": jnp.roll(params["wq_b"], R, axis=-1)}
    return right_queries(swapped, cfg, x, positions)


def _mscale_error(power: float) -> float:
    """Against torch_ref, which has its own rule for scaling=None; m to the power 2 is right."""
    plain = (LORA.qk_nope_head_dim + LORA.qk_rope_head_dim) ** -0.5
    fields = {f: getattr(LORA, f) for f in LORA.__dataclass_fields__}
    scaled = ATT.Config(**{**fields, "scaling": plain * (LORA.scaling / plain) ** (power / 2)})
    theirs = SimpleNamespace(**{**fields, "scaling": None})
    params = ATT.init_params(jax.random.key(0), LORA)
    x = np.asarray(jax.random.normal(jax.random.key(1), (1, 5, LORA.hidden_size)))
    weights = {k: to_torch(np.asarray(v)) for k, v in params.items()}
    want = torch_ref.get("mla").forward(weights, theirs, to_torch(x)).numpy()
    return compare.relative(ATT.forward(params, scaled, x), want)


def _in_torch(_) -> bool:
    return max(against_torch(ATT, torch_ref.get("mla"), LORA).values()) > compare.OUT["float32"]


MUTANTS = {
    "MLA: the latent is stored without its norm": (patch(ATT, mla, "latents", _latent_not_normed), _in_torch),
    "MLA: the rotary key is normed": (patch(ATT, mla, "latents", _rope_slice_normed), _in_torch),
    "MLA: a query is rope, then nope": (patch(ATT, mla, "queries", _query_order_swapped), _in_torch),
    "MLA: mscale enters the softmax scale once": (
        replaced(ATT), lambda _: _mscale_error(1) > compare.OUT["float32"]),
    "MLA: keys and values are counted apart": (
        recount(ATT, read=lambda cost: {**cost.read, "latent": 2 * cost.read["latent"]}), law("L8", LORA)),
}  # fmt: skip


JUDGES = {
    "torch_ref on MLA": lambda: not _in_torch(ATT) and _mscale_error(2) <= compare.OUT["float32"],
    "L8 of MLA": lambda: not law("L8", LORA)(ATT),
}
