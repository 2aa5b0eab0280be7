"""What holds for any stack of layers; stacks of models against transformers are in hf/test_hf_stack.py."""

import functools
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jforge
from jforge import hf, stack
from jforge.attention import dense, lightning, sliding_window
from jforge.core import compare
from jforge.cost import Cost

D = 12
ROPE = {"rope_type": "default", "rope_theta": 1e4}
LAYERS = (
    ("lightning", lightning.Config(hidden_size=D, num_attention_heads=2, layer_index=0, num_hidden_layers=3)),
    ("gqa", dense.Config(hidden_size=D, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
                         rope_parameters=ROPE)),
    ("sliding_window", sliding_window.Config(hidden_size=D, num_attention_heads=2, sliding_window=3)),
)  # fmt: skip


@functools.cache
def jitted(function, layers, bind):
    """function(params, layers, x, [cache], bind(norms), [lengths=]), compiled once for all tests."""

    def call(params, norms, x, *cache, **lengths):
        return function(params, layers, x, *cache, block=bind(norms), **lengths)

    return jax.jit(call)


def params(dtype="float64") -> list:
    return [
        jforge.get(name).init_params(jax.random.key(i), cfg, jnp.dtype(dtype)) for i, (name, cfg) in enumerate(LAYERS)
    ]


def norms(dtype="float64") -> list:
    return [jnp.asarray(1 + 0.1 * np.random.default_rng(i).normal(size=D), dtype) for i in range(len(LAYERS))]


def tokens(T: int, B: int = 2, dtype="float64"):
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), dtype)


def mixing_block(norms):
    """A block that takes a NaN of any token to all, and makes something of nothing, as an MLP with a bias does."""

    def block(x, layer, attend):
        return 0.5 * x + attend(jnp.tanh(norms[layer] * x)) + 0.1 + 0 * x.sum(axis=1, keepdims=True)

    return block


def pre_norm(norms):
    return partial(stack.pre_norm, norms)


@pytest.mark.parametrize("bind", [pre_norm, mixing_block])
def test_steps_of_ragged_rows_equal_forward(bind):
    """Each row goes its own way in prefills of 0 to 5 tokens and in decodes, with NaN in the pads, which give 0."""
    with jax.enable_x64(True):
        forward, prefill, decode = (jitted(f, LAYERS, bind) for f in (stack.forward, stack.prefill, stack.decode))
        p, weights, x, rows = params(), norms(), tokens(9, 3), np.arange(3)[:, None]
        want = np.asarray(forward(p, weights, x))
        store, done = stack.init_cache(LAYERS, 3, 9, jnp.float64), np.zeros(3, np.int32)
        for new in ([5, 2, 0], [1, 1, 1], [0, 3, 5], [1, 1, 1], [2, 2, 2]):
            T = 1 if new == [1, 1, 1] else 5
            at, real = np.minimum(done[:, None] + np.arange(T), 8), np.arange(T) < np.array(new)[:, None]
            chunk = jnp.where(real[..., None], x[rows, at], jnp.nan)
            if T == 1:
                y, store = decode(p, weights, chunk, store)
            else:
                y, store = prefill(p, weights, chunk, store, lengths=np.array(new, np.int32))
            assert compare.relative(y, np.where(real[..., None], want[rows, at], 0)) <= compare.OUT["float64"]
            done += np.array(new, np.int32)
        assert all((own.length == done).all() for own in store)


def test_gradients_of_a_ragged_prefill_are_finite():
    """To the parameters, the block's own weights and x, where those of the pads are 0."""
    with jax.enable_x64(True):
        real = (np.arange(5) < np.array([[5], [2]]))[..., None]
        x = jnp.where(real, tokens(5), jnp.nan)

        @jax.jit
        @partial(jax.grad, argnums=(0, 1, 2))
        def gradients(p, weights, x):
            store, lengths = stack.init_cache(LAYERS, 2, 5, jnp.float64), np.array([5, 2], np.int32)
            return (stack.prefill(p, LAYERS, x, store, pre_norm(weights), lengths)[0] ** 2).sum()

        got = gradients(params(), norms(), x)
        assert compare.finite(got)
        assert (np.where(real, 0, got[2]) == 0).all() and (np.asarray(got[2][0]) != 0).all()


def test_positions_feed_rope_only():
    with jax.enable_x64(True):
        order = jnp.broadcast_to(jnp.arange(6), (2, 6))
        forward = jax.jit(lambda positions: stack.forward(p, LAYERS, x, pre_norm(norms()), positions))
        p, x = params(), tokens(6)
        assert compare.relative(forward(order + 9), forward(order)) <= compare.OUT["float64"]
        assert compare.relative(forward(2 * order), forward(order)) > 1e-3


def test_one_trace_and_a_donated_cache():
    """Static layers as a tuple, names or Attentions; every later step reuses the program and takes the cache over."""
    p, weights, traces = params("float32"), norms("float32"), 0
    layers = tuple((jforge.get(name), cfg) for name, cfg in LAYERS)

    @partial(jax.jit, static_argnames="layers", donate_argnames="cache")
    def step(params, norms, layers, x, cache):
        nonlocal traces
        traces += 1
        return stack.decode(params, layers, x, cache, partial(stack.pre_norm, norms))

    cache = stack.init_cache(layers, 2, 8, jnp.float32)
    shape = jax.tree.structure(cache), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(cache)]
    for t in range(4):
        before, (_, cache) = cache, step(p, weights, layers, tokens(4, dtype="float32")[:, t : t + 1], cache)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
        assert shape == (jax.tree.structure(cache), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(cache)])
    assert traces == 1
    assert [list(own.length) for own in cache] == [[4, 4]] * 3


def test_a_compiled_step_copies_no_cache(untyped):
    cache = stack.init_cache(LAYERS, 2, 64, jnp.float32)

    def call(params, x, cache):
        return stack.decode(params, LAYERS, x, cache, pre_norm(norms("float32")))

    lowered = jax.jit(call, donate_argnums=2).lower(params("float32"), tokens(1, dtype="float32"), cache)
    compiled = lowered.compile()
    copies = [line for line in compiled.as_text().splitlines() if " copy(" in line and "f32[2,64,2,6]" in line]
    assert not copies, copies
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize("x_dtype", ["bfloat16", "float32"])
def test_dtypes(x_dtype):
    """y has x's, the caches keep theirs; nothing is run."""
    store = stack.init_cache(LAYERS, 2, 8)
    kinds = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), store)
    assert (store[0].state.dtype, store[1].k.dtype) == (jnp.float32, jnp.bfloat16)
    for T, step in ((3, stack.prefill), (1, stack.decode)):
        call = partial(step, layers=LAYERS, block=pre_norm(norms("float32")))
        y, after = jax.eval_shape(call, params(x_dtype), x=tokens(T, dtype=x_dtype), cache=store)
        assert y.dtype == x_dtype and jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == kinds
    call = partial(stack.forward, layers=LAYERS, block=pre_norm(norms("float32")))
    assert jax.eval_shape(call, params(x_dtype), x=tokens(3, dtype=x_dtype)).dtype == x_dtype


def test_the_ops_given_are_those_used():
    called = []

    def spy(name):
        def op(*args, **kwargs):
            called.append(name)
            return getattr(jforge.ops, name)(*args, **kwargs)

        return staticmethod(op)

    class Spies:
        decode_attention, decode_linear = spy("decode_attention"), spy("decode_linear")

    x, store = tokens(1, dtype="float32"), stack.init_cache(LAYERS, 2, 8, jnp.float32)
    call = partial(stack.decode, layers=LAYERS, block=pre_norm(norms("float32")), ops=Spies)
    jax.eval_shape(call, params("float32"), x=x, cache=store)
    assert called == ["decode_linear", "decode_attention", "decode_attention"]


# Overflow


def test_a_row_that_one_layer_refuses_is_nan():
    """gqa has room for 4 tokens, lightning and a full ring for any number."""
    p, weights = params("float32"), norms("float32")
    prefill, decode = (jitted(f, LAYERS, pre_norm) for f in (stack.prefill, stack.decode))
    x, store = tokens(4, dtype="float32"), stack.init_cache(LAYERS, 2, 4, jnp.float32)
    _, store = prefill(p, weights, x, store, lengths=np.array([3, 1], np.int32))
    y, store = prefill(p, weights, x, store, lengths=np.array([2, 1], np.int32))
    assert np.isnan(y[0]).all() and np.isfinite(y[1, 0]).all() and (y[1, 1:] == 0).all()
    assert [int(own.length[1]) for own in store] == [2, 2, 2] and int(store[1].length[0]) == 3
    y, store = decode(p, weights, x[:, :1], store)
    assert np.isnan(y[0]).all() and np.isfinite(y[1]).all()


def test_overflow_with_concrete_lengths_raises():
    layers, p, x = LAYERS[1:], params("float32")[1:], tokens(5, dtype="float32")
    store, block = stack.init_cache(layers, 2, 4, jnp.float32), pre_norm(norms("float32"))
    with pytest.raises(ValueError, match="row 0 would hold 5 tokens; the cache has capacity 4"):
        stack.prefill(p, layers, x, store, block)


# Costs


@pytest.mark.parametrize("sizes", [{"context": 7}, {"context": 7, "batch": 3, "capacity": 20, "dtype": jnp.float32}])
def test_cost_is_the_sum_of_the_layers(sizes):
    got = stack.cost(LAYERS, **sizes)
    parts = [jforge.get(name).cost(cfg, **sizes) for name, cfg in LAYERS]
    assert isinstance(got, Cost)
    for field in ("flops", "entries_read", "fixed", "per_token"):
        assert getattr(got, field) == sum(getattr(part, field) for part in parts)
    for field in ("stored", "written", "read"):
        assert sum(getattr(got, field).values()) == sum(sum(getattr(part, field).values()) for part in parts)
    assert set(got.stored) == {"state", "k", "v"}


def test_cost_of_minimax_01():
    """80 layers at 1M tokens: 70 states of 4 MiB and 10 caches of 4096 bytes a token."""
    path = Path(jforge.__file__).parent / "configs/minimax-text-01.json"
    got = stack.cost(hf.layers(hf.load(path)), context=2**20)
    assert got.stored == {"state": 70 * 2**22, "k": 10 * 2**31, "v": 10 * 2**31}
    assert got.written == {"state": 70 * 2**22, "k": 10 * 2048, "v": 10 * 2048}
    assert (got.fixed, got.per_token) == (70 * 2**22, 10 * 4096)


# Errors


def twice(x, layer, attend):
    return attend(x) + attend(x)


def never(x, layer, attend):
    return x


@pytest.mark.parametrize("block, count", [(twice, 2), (never, 0)])
def test_a_block_calls_attend_once(block, count):
    call = partial(stack.forward, layers=LAYERS, block=block)
    with pytest.raises(ValueError, match=f"^block calls attend {count} times in layer 0; it must call it once"):
        jax.eval_shape(call, params("float32"), x=tokens(3, dtype="float32"))


def test_bad_stacks():
    p, x, block = params("float32"), tokens(1, dtype="float32"), pre_norm(norms("float32"))
    store = stack.init_cache(LAYERS, 2, 4, jnp.float32)
    with pytest.raises(ValueError, match="^layers is empty; a stack has at least one$"):
        stack.init_cache((), 2, 4)
    with pytest.raises(ValueError, match="^no mechanism is called 'linear'; there are single_head, "):
        stack.init_cache((("linear", LAYERS[0][1]),), 2, 4)
    message = r"^layers\[1\] has a \S*dense.Config \(gqa\); its mechanism takes a \S*lightning.Config \(lightning\)$"
    with pytest.raises(TypeError, match=message):
        stack.cost((LAYERS[0], ("lightning", LAYERS[1][1])), context=3)
    with pytest.raises(ValueError, match="^params has 2 entries; it must have one for each of the 3 layers$"):
        stack.forward(p[:2], LAYERS, x, block)
    with pytest.raises(ValueError, match="^cache has 2 entries; it must have one for each of the 3 layers$"):
        stack.decode(p, LAYERS, x, store[:2], block)


def test_bad_inputs(untyped):
    p, block, store = params("float32"), pre_norm(norms("float32")), stack.init_cache(LAYERS, 2, 4, jnp.float32)
    with pytest.raises(ValueError, match="decode takes 1 to 16 tokens a row"):
        stack.decode(p, LAYERS, tokens(17, dtype="float32"), store, block)
    with pytest.raises(TypeError, match="^cache is a KVCache; it must be a State$"):
        stack.decode(p, LAYERS, tokens(1, dtype="float32"), store[::-1], block)
