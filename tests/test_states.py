"""Delta rules, state spaces and short convolutions beyond the laws: forms, dtypes, bytes, limits, mutants."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judges import compiled, patch, tokens, torch_forward, walks, weights

import jforge
from jforge.attention import gated_deltanet, kda, mamba1, mamba2
from jforge.core import compare, conv, linear, recurrent

NAMES = ("gated_deltanet", "kda", "mamba1", "mamba2", "short_conv")
MODULES = {"gated_deltanet": gated_deltanet, "kda": kda, "mamba1": mamba1, "mamba2": mamba2}
GDN, KDA, MAMBA2, CONV = (jforge.get(name) for name in ("gated_deltanet", "kda", "mamba2", "short_conv"))
SMALL = GDN.examples[0]  # two key heads for four value heads
BOUND = KDA.examples[1]
GROUPS = MAMBA2.examples[0]  # two groups for four heads
LIMITS = MAMBA2.examples[1]

# --- forms


@partial(jax.jit, static_argnames="size")
def in_blocks(size, state, *terms):
    def block(state, *terms):
        beta = terms[4] if len(terms) > 4 else None
        out, state = linear.block(*terms[:4], beta, state)
        return state, out

    return linear.blockwise(block, state, size, *terms)


@jax.jit
def in_steps(state, *terms):
    def step(state, token):
        q, k, v, log_decay, *beta = token
        beta = beta[0] if beta else None
        out, state = jforge.ops.decode_linear(q, k, v, state, jnp.exp(log_decay), beta=beta)
        return state, out

    state, outs = jax.lax.scan(step, state, tuple(jnp.moveaxis(a, 1, 0) for a in terms))
    return jnp.moveaxis(outs, 0, 1), state


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("size", [1, 3, 16, 40])
def test_blocks_are_the_recurrence(delta, by_channel, size):
    """Of 37 tokens with a state before them, some with factors of 0, in float64; no two axes have one size."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        q, k = (rng.standard_normal((2, 37, 3, 5)) for _ in "qk")
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
        v, state = rng.standard_normal((2, 37, 3, 4)), rng.standard_normal((2, 3, 5, 4))
        log_decay = -rng.exponential(2.0, (2, 37, 3, *(5,) * by_channel))
        log_decay[:, ::9] = -1000.0
        beta = (rng.uniform(0, 2, (2, 37, 3)),) * delta
        for got, want in zip(in_blocks(size, state, q, k, v, log_decay, *beta),
                             in_steps(state, q, k, v, log_decay, *beta), strict=True):  # fmt: skip
            assert compare.relative(got, want) <= compare.OUT["float64"]


def test_blocks_whose_decay_underflows():
    """Bounded decays sum to -320 in a block of 64 tokens; float32 holds no exp of that, nor of its negative."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 128, 2, 8)).astype(np.float32) for _ in "qkv")
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    log_decay = rng.uniform(-5, -4.9, (1, 128, 2, 8)).astype(np.float32)
    beta, state = rng.uniform(0, 1, (1, 128, 2)).astype(np.float32), np.zeros((1, 2, 8, 8), np.float32)
    for got, want in zip(in_blocks(64, state, q, k, v, log_decay, beta), in_steps(state, q, k, v, log_decay, beta),
                         strict=True):  # fmt: skip
        assert compare.relative(got, want) <= compare.OUT["float32"]


def test_no_array_of_all_pairs_of_tokens():
    """Nor a program that grows with the tokens: the equations of 4,096 are as many as those of 1,024."""
    for name in NAMES:
        att = jforge.get(name)
        cfg = att.examples[0]
        params = jax.eval_shape(lambda att=att, cfg=cfg: att.init_params(jax.random.key(0), cfg))
        texts = {}
        for T in (1024, 4096):
            cache = jax.eval_shape(lambda att=att, cfg=cfg, T=T: att.init_cache(cfg, 1, T, jnp.float32))
            x = jax.ShapeDtypeStruct((1, T, cfg.hidden_size), jnp.float32)
            step = jax.make_jaxpr(lambda p, x, c, att=att, cfg=cfg: att.prefill(p, cfg, x, c))(params, x, cache)
            texts[T] = str(step)
        assert "4096,4096" not in texts[4096] and texts[1024].count("\n") == texts[4096].count("\n"), name


# --- dtypes and bytes


@pytest.mark.parametrize("name", MODULES)
def test_states_are_float32_and_convolutions_as_the_cache(name):
    att = jforge.get(name)
    cfg = att.examples[0]
    cache = att.init_cache(cfg, 2, 9, jnp.bfloat16)
    params = jax.tree.map(jnp.asarray, weights(att, cfg, "float32"))
    x = tokens(cfg, 2, 9, "float32")
    for step, new in ((att.prefill, x), (att.decode, x[:, :1])):
        y, after = step(params, cfg, jnp.asarray(new, jnp.bfloat16), cache)
        assert (y.dtype, after.state.dtype, after.conv.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_convolved_is_what_is_stored(name):
    """In a bfloat16 cache prefill and steps of float32 tokens agree: both convolve rounded rows."""
    att = jforge.get(name)
    cfg = att.examples[0]
    params, x = weights(att, cfg, "float32"), tokens(cfg, 2, 11, "float32")
    _, prefill, decode = compiled(att, cfg)
    whole, cache = prefill(params, x, att.init_cache(cfg, 2, 11, jnp.bfloat16))
    _, steps = prefill(params, x[:, :4], att.init_cache(cfg, 2, 11, jnp.bfloat16))
    ys = []
    for t in range(4, 11):
        y, steps = decode(params, x[:, t : t + 1], steps)
        ys.append(y)
    assert compare.relative(jnp.concatenate(ys, axis=1), whole[:, 4:]) <= compare.OUT["float32"]
    np.testing.assert_array_equal(steps.conv, cache.conv)


@pytest.mark.parametrize("count", range(7))
def test_a_prompt_shorter_than_the_kernel_has_zeros_before_it(count):
    cfg = replace(CONV.examples[0], conv_L_cache=5)
    with jax.enable_x64(True):
        params, x = jax.tree.map(jnp.asarray, (weights(CONV, cfg), tokens(cfg, 2, 7)))
        _, cache = CONV.prefill(params, cfg, x, CONV.init_cache(cfg, 2, 7, jnp.float64), np.array([count, 7], np.int32))
        rows = np.einsum("td,dx->tx", x[0], params["wb"]) * np.einsum("td,dx->tx", x[0], params["wx"])
        want = np.concatenate([np.zeros((4, cfg.hidden_size)), rows[:count]])[count:][:4]
        np.testing.assert_allclose(cache.conv[0], want, rtol=0, atol=1e-12)


GOLDEN = {  # mechanisms2.md A to E: bytes of states, of the convolution's rows in bfloat16
    ("gated_deltanet", "Qwen3-Next-80B-A3B"): (2 * 2**20, 48 * 2**10),
    ("gated_deltanet", "Olmo-Hybrid-7B"): (4 * 30 * 96 * 192, 67.5 * 2**10),
    ("kda", "Kimi-Linear-48B-A3B"): (2 * 2**20, 72 * 2**10),
    ("kda", "GLM-5.3-Flash"): (4 * 2**20, 144 * 2**10),
    ("mamba2", "Nemotron-H-8B"): (4 * 2**20, 60 * 2**10),
    ("mamba2", "Nemotron-Nano-9B-v2"): (5 * 2**20, 72 * 2**10),
    ("mamba2", "Granite-4.0-H-Tiny"): (1.5 * 2**20, 19.5 * 2**10),
    ("mamba2", "Falcon-H1-1.5B"): (3 * 2**20, 21 * 2**10),
    ("mamba1", "Falcon-Mamba-7B"): (512 * 2**10, 48 * 2**10),
    ("mamba1", "Jamba-v0.1"): (512 * 2**10, 48 * 2**10),
    ("short_conv", "LFM2-1.2B"): (0, 8 * 2**10),
    ("short_conv", "LFM3-1.7B"): (0, 24 * 2**10),
}


def test_every_shipped_model_has_golden_bytes():
    assert set(GOLDEN) == {(name, model) for name in NAMES for model in jforge.get(name).models}


@pytest.mark.parametrize("name,model", GOLDEN)
def test_golden_bytes(name, model):
    att = jforge.get(name)
    state, rows = GOLDEN[name, model]
    cost = att.cost(att.models[model], context=1)
    assert cost.stored == cost.read == cost.written == ({"state": state} if state else {}) | {"conv": rows}
    assert cost.per_token == 0 and cost == att.cost(att.models[model], context=2**20)


# --- limits and refusals


def test_delta_is_held_within_its_limits():
    with jax.enable_x64(True):
        params, u = jax.tree.map(jnp.asarray, (weights(MAMBA2, LIMITS), tokens(LIMITS, 2, 9)))
        held = np.asarray(mamba2.time_step(params, LIMITS, u))
        free = np.asarray(mamba2.time_step(params, replace(LIMITS, time_step_limit=(0.0, math.inf)), u))
    assert (held == np.clip(free, 0.5, 0.9)).all() and (held != free).any()


@pytest.mark.parametrize(
    "att,fields,message",
    [
        (GDN, {"linear_num_value_heads": 3}, "linear_num_value_heads is 3; it must be a multiple of linear_num_key_he"),
        (GDN, {"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim is 1; it must be an integer of at least 2"),
        (GDN, {"output_gate_type": "tanh"}, "output_gate_type is 'tanh'; it must be one of 'silu', 'sigmoid'"),
        (KDA, {"linear_lower_bound": 5.0}, "linear_lower_bound is 5.0; it must be a negative number or None"),
        (MAMBA2, {"n_groups": 3}, "num_heads is 4; it must be a multiple of n_groups=3"),
        (
            MAMBA2,
            {"time_step_limit": (1.0, 0.5)},
            r"time_step_limit is \(1.0, 0.5\); it must be two numbers, the lower",
        ),
        (MAMBA2, {"norm": "both"}, "norm is 'both'; it must be one of 'gate_first', 'norm_first', None"),
        (
            jforge.get("mamba1"),
            {"norm": "gate_first"},
            "norm is 'gate_first'; it must be one of None, 'plain', 'weight",
        ),
        (CONV, {"conv_L_cache": True}, "conv_L_cache is True; it must be a positive integer"),
    ],
)
def test_bad_fields(att, fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        replace(att.examples[0], **fields)


# --- mutants


def _variant(att, module, **changes):
    """The mechanism with other parts of its recurrence."""
    own = module.RECURRENCE._replace(**changes)
    return att._replace(forward=own.forward, prefill=own.prefill, decode=own.decode)


def _terms(att, module, change):
    """Its terms changed, in every form."""

    def terms(params, cfg, x, held):
        return change(module.terms, params, cfg, x, held)

    return lambda monkeypatch: _variant(att, module, terms=terms)


def _decay_after_the_write(right, q, k, v, state, decay, *, beta=None):
    one = jnp.ones_like(decay)
    out, after = right(q, k, v, state, one, beta=beta)
    factor = decay.reshape(*decay.shape, *(1,) * (4 - decay.ndim))
    return right(q, jnp.zeros_like(k), v, factor * after, one)[0], factor * after


def _beta_on_k(right, q, k, v, state, decay, *, beta=None):
    return right(q, k * beta[..., None], v, state, decay, beta=jnp.ones_like(beta))


def _op(change):
    right = jforge.ops.decode_linear
    return lambda *args, **more: change(right, *args, **more)


def _beta_on_k_in_all_forms(right, params, cfg, x, held):
    terms, rows = right(params, cfg, x, held)
    return terms._replace(k=terms.k * terms.beta[..., None], beta=jnp.ones_like(terms.beta)), rows


def _one_decay_a_head(right, params, cfg, x, held):
    terms, rows = right(params, cfg, x, held)
    mean = terms.log_decay.mean(axis=-1, keepdims=True)
    return terms._replace(log_decay=jnp.broadcast_to(mean, terms.log_decay.shape)), rows


def _heads_interleaved(right, params, cfg, x, held):
    """Value head n reads key head n % K."""
    terms, rows = right(params, cfg, x, held)
    order = np.arange(4).reshape(2, 2).T.reshape(-1)
    return terms._replace(q=terms.q[:, :, order], k=terms.k[:, :, order]), rows


def _delta_without_softplus(params, cfg, u):
    return jnp.exp(mamba2._into(params, cfg, u, "dt") + params["dt_bias"])


def _gate_before_norm(params, cfg, x, out, rest=None):
    gate = gated_deltanet.GATES[cfg.output_gate_type](jnp.einsum("btd,dnv->btnv", x, params["wg"]))
    normed = gated_deltanet.rms_norm(out * gate, params["o_norm"], eps=cfg.rms_norm_eps)
    return jnp.einsum("btnv,nvd->btd", normed, params["wo"])


def _norm_of_all_groups(params, cfg, out):
    whole = out.reshape(*out.shape[:2], 1, -1)
    whole = whole * jax.lax.rsqrt((whole * whole).mean(axis=-1, keepdims=True) + cfg.rms_norm_eps)
    return whole.reshape(out.shape) * params["o_norm"]


def _no_skip(params, cfg, u, out, x):
    return mamba2.project_out(params | {"skip": jnp.zeros_like(params["skip"])}, cfg, u, out, x)


def _state_off_by_one(rows, keep):
    return right_keep_last(jnp.pad(rows, ((0, 0), (1, 0), (0, 0)))[:, :-1], keep)


def _state_of_activations(rows, keep):
    return jax.nn.silu(right_keep_last(rows, keep))


def _state_of_the_pads(rows, keep):
    return rows[:, keep.shape[1] :]


def _pads_decay(terms, keep):
    return right_of(terms, keep)._replace(log_decay=terms.log_decay)


right_keep_last, right_of = conv.keep_last, recurrent.Terms.of
in_torch = {att: torch_forward(name, cfg) for att, name, cfg in
            ((GDN, "gated_deltanet", SMALL), (KDA, "kda", BOUND), (MAMBA2, "mamba2", GROUPS))}  # fmt: skip
walk = walks(SMALL, 11)
OP = "decode_linear"
MUTANTS = {
    "gated_deltanet: the state decays after the write": (
        patch(GDN, jforge.ops, OP, _op(_decay_after_the_write)), walk),
    "gated_deltanet: beta on the key and not on the error, in decode": (
        patch(GDN, jforge.ops, OP, _op(_beta_on_k)), walk),
    "gated_deltanet: beta on the key in all forms": (
        _terms(GDN, gated_deltanet, _beta_on_k_in_all_forms), in_torch[GDN]),
    "gated_deltanet: value head n reads key head n % K": (
        _terms(GDN, gated_deltanet, _heads_interleaved), in_torch[GDN]),
    "gated_deltanet: the gate comes before the norm": (
        lambda monkeypatch: _variant(GDN, gated_deltanet, project_out=_gate_before_norm), in_torch[GDN]),
    "gated_deltanet: the convolution's rows are off by one": (patch(GDN, conv, "keep_last", _state_off_by_one), walk),
    "gated_deltanet: activations are kept in the place of rows": (
        patch(GDN, conv, "keep_last", _state_of_activations), walk),
    "gated_deltanet: rows of pads are kept": (patch(GDN, conv, "keep_last", _state_of_the_pads), walk),
    "gated_deltanet: right padding decays the state": (patch(GDN, recurrent.Terms, "of", _pads_decay), walk),
    "kda: one decay for all channels of a head": (_terms(KDA, kda, _one_decay_a_head), in_torch[KDA]),
    "mamba2: delta without softplus": (patch(MAMBA2, mamba2, "time_step", _delta_without_softplus), in_torch[MAMBA2]),
    "mamba2: a head reads the B and C of group n % K": (_terms(MAMBA2, mamba2, _heads_interleaved), in_torch[MAMBA2]),
    "mamba2: one norm for all groups": (patch(MAMBA2, mamba2, "_grouped_norm", _norm_of_all_groups), in_torch[MAMBA2]),
    "mamba2: no skip": (lambda monkeypatch: _variant(MAMBA2, mamba2, project_out=_no_skip), in_torch[MAMBA2]),
}  # fmt: skip
JUDGES = {
    "a walk of gated_deltanet": lambda: not walk(GDN),
    "torch_ref of gated_deltanet, kda and mamba2": lambda: not any(judge(att) for att, judge in in_torch.items()),
}
