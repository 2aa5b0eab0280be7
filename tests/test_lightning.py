"""Lightning attention beyond the laws: golden slopes, its three forms, the float32 state, bytes, mutants."""

import importlib
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judges import case, compiled, patch, tokens, torch_forward, walks, weights

import jforge
from jforge.attention import lightning
from jforge.core import compare, linear

ATT = jforge.get("lightning")
SMALL = ATT.Config(hidden_size=8, num_attention_heads=4, head_dim=3, layer_index=2, num_hidden_layers=6, block_size=5)
TEXT_01 = ATT.models["MiniMax-Text-01"]

# --- slopes (mechanisms.md 8.1 and 13)


@pytest.mark.parametrize("layer,golden", [(0, (0.91701321, 0.06250063, 0.00390629)),
                                          (78, (0.01161693, 0.00079177, 0.00004949))])  # fmt: skip
def test_golden_slopes(layer, golden):
    """Heads 0, 31 and 63 of MiniMax-Text-01; layers count from 0 among all 80."""
    cfg = replace(TEXT_01, layer_index=layer)
    slopes = lightning.slopes(cfg)
    assert slopes.shape == (64,) and np.abs(slopes[[0, 31, 63]] - golden).max() <= 5.1e-9
    np.testing.assert_allclose(lightning.decay_of(cfg), np.exp(-slopes), rtol=1e-7)


@pytest.mark.parametrize("heads,lower", [(12, 8), (80, 64)])
def test_slopes_between_powers_of_two(heads, lower):
    """ALiBi's rule: those of the power of two below, then every other one of its double, from the first."""
    exponents = [8 * (n + 1) / lower for n in range(lower)] + [4 * (2 * n + 1) / lower for n in range(heads - lower)]
    slopes = lightning.slopes(replace(SMALL, num_attention_heads=heads, layer_index=0))
    np.testing.assert_allclose(slopes, 2.0 ** -np.array(exponents) * (1 + 1e-5), rtol=1e-14)


# --- the three forms


def _draw(count: int) -> list[tuple[int, int]]:
    """Lengths that are no multiple of the block, some of them shorter."""
    pairs = np.random.default_rng(0).integers((3, 2), (20, 9), (50, 2)).tolist()
    return [(T, size) for T, size in pairs if T % size][:count]


@jax.jit
def recurrent(q, k, v, decay, state):
    """The op, one token after another."""

    def step(state, token):
        out, state = jforge.ops.decode_linear(*token, state, decay)
        return state, out

    state, outs = jax.lax.scan(step, state, tuple(jnp.moveaxis(a, 1, 0) for a in (q, k, v)))
    return jnp.moveaxis(outs, 0, 1), state


@partial(jax.jit, static_argnames="size")
def blockwise(q, k, v, slope, state, size):
    def block(state, *rows):
        out, state = lightning.one_block(*rows, slope, state)
        return state, out

    return linear.blockwise(block, state, size, q, k, v, jnp.ones(q.shape[:2], bool))


@pytest.mark.parametrize("T,size", _draw(4), ids=str)
def test_recurrent_is_blockwise_is_quadratic(T, size):
    """From an empty state; with a state before them, blockwise is the recurrence."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(T)
        q, k, v = (rng.standard_normal((2, T, 3, 4)) for _ in "qkv")
        slope, state = np.array([2.0, 0.3, 1e-4]), rng.standard_normal((2, 3, 4, 4))
        for before in (np.zeros_like(state), state):
            want = recurrent(q, k, v, np.exp(-slope), before)
            for got, right in zip(blockwise(q, k, v, slope, before, size), want, strict=True):
                assert compare.relative(got, right) <= compare.OUT["float64"]
        fresh = recurrent(q, k, v, np.exp(-slope), np.zeros_like(state))[0]
        got = jax.jit(lightning.quadratic)(q, k, v, slope, np.arange(T))
        assert compare.relative(got, fresh) <= compare.OUT["float64"]


def test_blocks_whose_decay_underflows():
    """exp(-0.917 * 256) is 0 in float32 and its inverse infinite; every factor of a block is at most 1."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 300, 2, 4)).astype("float32") for _ in "qkv")
    slope, state = np.array([0.917, 1e-3], np.float32), np.zeros((1, 2, 4, 4), np.float32)
    out, last = blockwise(q, k, v, slope, state, 256)
    power = np.exp(-slope.astype(np.float64)[:, None, None] * np.maximum(np.subtract.outer(range(300), range(300)), 0))
    products = np.einsum("btnh,bsnh,nts->bnts", q, k, np.tril(power))
    assert compare.relative(out, np.einsum("bnts,bsnv->btnv", products, v)) <= compare.OUT["float32"]
    assert compare.relative(last, np.einsum("bsnh,ns,bsnv->bnhv", k, power[:, -1], v)) <= compare.OUT["float32"]


# --- the state


def state_is_exact(att) -> bool:
    """In a bfloat16 cache, of float32 tokens: the state after 40 of them is the float64 sum, to float32's rounding."""
    cfg, T = replace(SMALL, layer_index=0), 40
    params, x = weights(att, cfg, "float32"), tokens(cfg, 2, T, "float32")
    _, k, v = (np.asarray(a, np.float64) for a in jax.jit(lightning.project)(params, x))
    power = np.exp(-np.outer(T - 1 - np.arange(T), lightning.slopes(cfg)))
    want = np.einsum("bsnh,sn,bsnv->bnhv", k, power, v)
    _, prefill, decode = compiled(att, cfg)
    _, cache = prefill(params, x[:, :30], att.init_cache(cfg, 2, T, jnp.bfloat16))
    for t in range(30, T):
        _, cache = decode(params, x[:, t : t + 1], cache)
    return compare.relative(cache.state, want) <= compare.OUT["float32"]


def test_the_state_is_float32_in_a_bfloat16_cache():
    assert state_is_exact(ATT)
    params = jax.eval_shape(lambda: ATT.init_params(jax.random.key(0), SMALL, jnp.bfloat16))
    cache = jax.eval_shape(lambda: ATT.init_cache(SMALL, 2, 9))
    x = jax.ShapeDtypeStruct((2, 1, SMALL.hidden_size), jnp.bfloat16)
    for step in (ATT.prefill, ATT.decode):
        y, after = jax.eval_shape(lambda p, x, c, step=step: step(p, SMALL, x, c), params, x, cache)
        assert (y.dtype, after.state.dtype) == (jnp.bfloat16, jnp.float32)


def test_bytes_do_not_grow():
    """mechanisms.md 8.1: 4 MiB a layer and row, read and written whole by every step."""
    cost = ATT.cost(TEXT_01, context=1)
    assert cost.stored == cost.read == cost.written == {"state": 4 * 2**20}
    assert (cost.fixed, cost.per_token) == (4 * 2**20, 0) and cost.flops == 5 * 64 * 128 * 128
    assert cost == ATT.cost(TEXT_01, context=2**20)


# --- mutants

op_module = importlib.import_module("jforge.ops.decode_linear")
right_project, right_block, right_op = lightning.project, lightning.one_block, op_module.decode_linear


def _linear_slopes(cfg):
    """Those of flash-linear-attention's lightning_attn."""
    N = cfg.num_attention_heads
    return 8 / N * (1 - cfg.layer_index / cfg.num_hidden_layers) * np.arange(N)


def _token_decayed_in_all_forms(params, x):
    q, k, v = right_project(params, x)
    return q, k, v * lightning.decay_of(SMALL)[:, None]


def _values_without_silu(params, x):
    return *right_project(params, x)[:2], jnp.einsum("btd,dnh->btnh", x, params["wv"])


def _read_before_write(q, k, v, state, decay, *, beta=None):
    _, after = right_op(q, k, v, state, decay, beta=beta)
    return right_op(q, jnp.zeros_like(k), v, state, decay, beta=beta)[0], after


def _token_decayed(q, k, v, state, decay, *, beta=None):
    factor = decay.reshape(decay.shape + (1,) * (4 - decay.ndim)) if decay.ndim > 1 else decay[:, None, None]
    after = factor * (state + k[..., None] * v[:, :, None])
    return jnp.einsum("bnhv,bnh->bnv", after, q).astype(q.dtype), after


def _norm_of_each_head(x, weight, *, eps):
    return weight * x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def _gate_before_norm(params, cfg, x, out):
    gate = jax.nn.sigmoid(jnp.einsum("btd,dnh->btnh", x, params["wg"]))
    normed = lightning.rms_norm(gate * out, params["o_norm"], eps=cfg.rms_norm_eps)
    return jnp.einsum("btnh,nhd->btd", normed, params["wo"])


def _pads_decay(q, k, v, keep, slope, state):
    return right_block(q, jnp.where(keep[..., None, None], k, 0), v, jnp.ones_like(keep), slope, state)


def _state_rounded_to_the_cache_dtype(monkeypatch):
    def rounded(step):
        def run(params, cfg, x, cache, **options):
            y, after = step(params, cfg, x, cache, **options)
            return y, replace(after, state=after.state.astype(jnp.bfloat16).astype(jnp.float32))

        return run

    return ATT._replace(prefill=rounded(ATT.prefill), decode=rounded(ATT.decode))


in_torch = torch_forward("lightning", SMALL)
MUTANTS = {
    "lightning: slopes linear in the head": (patch(ATT, lightning, "slopes", _linear_slopes), in_torch),
    "lightning: the current token is decayed in all forms": (
        patch(ATT, lightning, "project", _token_decayed_in_all_forms), in_torch),
    "lightning: values without SiLU": (patch(ATT, lightning, "project", _values_without_silu), in_torch),
    "lightning: RMSNorm of each head": (patch(ATT, lightning, "rms_norm", _norm_of_each_head), in_torch),
    "lightning: the gate comes before the norm": (patch(ATT, lightning, "project_out", _gate_before_norm), in_torch),
    "lightning: right padding decays the state": (patch(ATT, lightning, "one_block", _pads_decay), walks(SMALL, 17)),
    "lightning: the state is read before the token is added": (
        patch(ATT, jforge.ops, "decode_linear", _read_before_write), walks(SMALL, 17)),
    "lightning: the state is rounded to the cache's dtype": (
        _state_rounded_to_the_cache_dtype, lambda att: not state_is_exact(att)),
    "decode_linear decays the new token": (
        patch(ATT, jforge.ops, "decode_linear", _token_decayed), case("linear_lightning")),
}  # fmt: skip


JUDGES = {
    "a walk of lightning": lambda: not walks(SMALL, 17)(ATT),
    "torch_ref and a case of lightning": lambda: not in_torch(ATT) and not case("linear_lightning")(ATT),
}
