"""Layers that read the cache of an earlier one: the same in one go and in steps, nothing written, reads counted."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jforge
from jforge import stack
from jforge.attention import dense
from jforge.core import compare, share
from jforge.traffic import Trace

ROPE = {"rope_type": "default", "rope_theta": 1e4}
D = {"hidden_size": 10, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "rope_parameters": ROPE}
OWNERS = {  # one with a slot a token, rings that turn within 11 tokens, biases by place, sinks
    "gqa": dense.Config(**D, qk_norm="head"),
    "sliding_window": jforge.get("sliding_window").Config(
        **D, sliding_window=3, alibi=True, attn_scale=0.5, floor_scale=2.0
    ),
    "chunked_local": jforge.get("chunked_local").Config(**D, attention_chunk_size=4, attention_bias=True),
    "sinks": jforge.get("sinks").Config(**D, sliding_window=5),
}
READERS = {name: replace(cfg, kv_shared=True, num_attention_heads=6) for name, cfg in OWNERS.items()}
LAYERS = (
    *OWNERS.items(),
    *((name, cfg, i) for i, (name, cfg) in enumerate(READERS.items())),
    ("gqa", READERS["gqa"], 0),
)
TOKENS = 11


def params(layers, dtype="float64"):
    keys = jax.random.split(jax.random.key(1), len(layers))
    return [
        jforge.get(name).init_params(key, cfg, jnp.dtype(dtype))
        for (name, cfg, *_), key in zip(layers, keys, strict=True)
    ]


def block(x, index, attend):
    return x + attend(x)


def jitted(function, layers):
    return jax.jit(lambda params, x, *rest, **more: function(params, layers, x, *rest, block, **more))


def in_steps(layers, given, x, want):
    """The worst error of ragged prefills and decodes of one and of several tokens; every layer's cache at the end."""
    prefill, decode = jitted(stack.prefill, layers), jitted(stack.decode, layers)
    store, done, worst, rows = (
        stack.init_cache(layers, 3, TOKENS, jnp.float64),
        np.zeros(3, np.int32),
        0.0,
        np.arange(3)[:, None],
    )
    for new, step in (([6, 2, 0], "prefill"), ([1, 1, 1], "decode"), ([0, 3, 5], "prefill"), ([3, 3, 3], "decode"),
                      ([1, 2, 2], "prefill")):  # fmt: skip
        T = max(new)
        at, real = np.minimum(done[:, None] + np.arange(T), TOKENS - 1), np.arange(T) < np.array(new)[:, None]
        chunk = jnp.where(real[..., None], x[rows, at], jnp.nan)
        if step == "decode":
            y, store = decode(given, chunk, store)
        else:
            y, store = prefill(given, chunk, store, lengths=np.array(new, np.int32))
        worst = max(worst, compare.relative(y, np.where(real[..., None], want[rows, at], 0)))
        done += np.array(new, np.int32)
    return worst, store, done


def test_steps_of_ragged_rows_equal_forward_and_readers_write_nothing():
    """The caches of the owners are, leaf by leaf, those of a stack that ends before the first reader."""
    with jax.enable_x64(True):
        given = params(LAYERS)
        x = jax.random.normal(jax.random.key(2), (3, TOKENS, 10))
        want = np.asarray(jitted(stack.forward, LAYERS)(given, x))
        worst, store, done = in_steps(LAYERS, given, x, want)
        assert worst <= compare.OUT["float64"] and all((own.length == done).all() for own in store)
        count = len(OWNERS)
        alone = jitted(stack.forward, LAYERS[:count])(given[:count], x)
        _, owners, _ = in_steps(LAYERS[:count], given[:count], x, np.asarray(alone))
        for got, right in zip(jax.tree.leaves(store[:count]), jax.tree.leaves(owners), strict=True):
            np.testing.assert_array_equal(got, right)
        assert all(type(own) is share.NoCache for own in store[count:])
        assert compare.relative(want, jitted(stack.forward, LAYERS[:-1])(given[:-1], x)) > 1e-3  # the last one counts


@pytest.mark.parametrize("name", OWNERS)
def test_a_reader_stores_and_writes_nothing_and_its_reads_are_counted(name):
    """To the byte, of the traced read of one token."""
    att, cfg, context = jforge.get(name), READERS[name], 12
    owner = att.cost(OWNERS[name], context=context)
    cost = att.cost(cfg, context=context)
    assert (cost.stored, cost.written, cost.fixed, cost.per_token) == ({}, {}, 0, 0)
    assert cost.read == owner.read and cost.flops == owner.flops * 6 // 4
    both = stack.cost([(name, OWNERS[name]), (name, cfg, 0)], context=context)
    assert (both.stored, both.written) == (owner.stored, owner.written)
    assert both.read == {buffer: 2 * count for buffer, count in owner.read.items()}
    if getattr(cfg, "alibi", False):  # the ring is put in order before the op, which then cannot be counted
        return

    def read(params, x, cache):
        rows = jforge.core.step.all_of(cfg, x, None)
        source = share.Source(rows, cache, cache, {"k": cache.k[:, :1], "v": cache.v[:, :1]})
        return att.read(params, cfg, x, source, jforge.ops), cache

    shapes = jax.eval_shape(lambda: att.init_params(jax.random.key(0), cfg, jnp.bfloat16))
    cache = jax.eval_shape(lambda: att.init_cache(OWNERS[name], 1, context))
    x = jax.ShapeDtypeStruct((1, 1, 10), jnp.bfloat16)
    moved = Trace(read, shapes, x, cache, length=context).count()
    assert moved.read == cost.read and moved.written == {}


def test_a_reader_alone_says_what_it_needs():
    cfg, x = READERS["gqa"], jnp.zeros((1, 2, 10))
    (given,) = params([("gqa", cfg)], "float32")
    assert set(given) == {"wq", "wo", "q_norm"}
    with pytest.raises(
        ValueError, match="^kv_shared is True; such a layer has no keys, jforge.stack gives it those of"
    ):
        dense.gqa.forward(given, cfg, x)


@pytest.mark.parametrize(
    "layer,message",
    [
        (("gqa", READERS["gqa"]), r"layers\[2\] has kv_shared; it must name its source: \(mechanism, Config, source\)"),
        (("gqa", READERS["gqa"], 2), r"layers\[2\] has the source 2; it must be an earlier layer, 0..1"),
        (("gqa", READERS["gqa"], True), r"layers\[2\] has the source True; it must be an earlier layer"),
        (("gqa", OWNERS["gqa"], 0), r"layers\[2\] has the source 0; its Config must have kv_shared or index_shared"),
        (
            ("gqa", READERS["gqa"], 1),
            r"layers\[2\] has the source 1; its keys and values are not laid out as those there",
        ),
        (
            ("sliding_window", READERS["sliding_window"], 0),
            r"layers\[2\] has the source 0; its keys and values are not",
        ),
    ],
)
def test_sources_that_cannot_be(layer, message):
    layers = (("gqa", OWNERS["gqa"]), ("sliding_window", OWNERS["sliding_window"]), layer)
    with pytest.raises(ValueError, match=f"^{message}"):
        stack.cost(layers, context=4)
    with pytest.raises(
        ValueError, match=r"^layers\[1\] has the source 0; that layer has nothing to lend for kv_shared"
    ):
        mla = jforge.get("mla")
        stack.cost((("mla", mla.examples[0]), ("gqa", READERS["gqa"], 0)), context=4)


@pytest.mark.parametrize("name", ["block_sparse", "moba", "msa", "nsa", "streaming"])
def test_mechanisms_that_cannot_read_refuse_it(name):
    cfg = jforge.get(name).examples[0]
    with pytest.raises(ValueError, match=f"^kv_shared is True; it must be False in {name}"):
        replace(cfg, kv_shared=True)


def _writes(right, params, cfg, x, source, ops=None):
    """Its own keys go where its source's are, as if the layer had a cache."""
    changed = source._replace(after=source.after and replace(source.after, k=source.after.k * 0.5))
    return right(params, cfg, x, changed, ops)


def _after_alone(right, params, cfg, x, source, ops=None):
    """A long prompt reads what is left in the ring."""
    return right(params, cfg, x, source._replace(before=source.after), ops)


@pytest.mark.parametrize(
    "name,bug", [("gqa", _writes), ("sliding_window", _after_alone), ("chunked_local", _after_alone)]
)
def test_bugs_of_readers_are_caught(name, bug):
    att = jforge.get(name)
    wrong = att._replace(read=partial(bug, att.read))
    with jax.enable_x64(True):
        layers = ((att, OWNERS[name]), (wrong, READERS[name], 0))
        given = [a.init_params(jax.random.key(i), cfg, jnp.float64) for i, (a, cfg, *_) in enumerate(layers)]
        x = jax.random.normal(jax.random.key(2), (3, TOKENS, 10))
        right = jitted(stack.forward, ((att, OWNERS[name]), (att, READERS[name], 0)))
        assert in_steps(layers, given, x, np.asarray(right(given, x)))[0] > 1e-3
