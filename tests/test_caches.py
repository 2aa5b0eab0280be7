"""jforge.caches as a user calls it: drafts that are refused, forks, rows that finish; what is refused, by name."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jforge
from jforge import caches, stack
from jforge.core import compare

EXACT = ("single_head", "mha", "mqa", "gqa", "mla", "block_sparse", "moba", "msa", "dsa")
GONE = {"sliding_window": "k", "streaming": "k", "lightning": "state", "v4_window": "kv"}
GONE |= {"csa": "kv", "hca": "kv", "nsa": "tail_k"}


@cache
def filled(name: str, tokens: int):
    """(att, cfg, params, x, the cache after `tokens` of the tokens of x)."""
    att = jforge.get(name)
    cfg = att.examples[0]
    params = att.init_params(jax.random.key(0), cfg)
    x = jax.random.normal(jax.random.key(1), (2, tokens + 4, cfg.hidden_size))
    prefill = jax.jit(lambda x, cache: att.prefill(params, cfg, x, cache))
    _, held = prefill(x[:, :tokens], att.init_cache(cfg, 2, tokens + 4, jnp.float32))
    return att, cfg, params, x, held


@pytest.mark.parametrize("name", EXACT)
def test_drafts_that_are_refused(name):
    """Four tokens are verified in one step; two of one row and none of the other are kept, under jit as well."""
    att, cfg, params, x, held = filled(name, 11)
    forward, decode = jax.jit(partial(att.forward, params, cfg)), jax.jit(partial(att.decode, params, cfg))
    want = forward(x)
    _, ahead = decode(-x[:, 11:], held)
    for rewind in (caches.rewind, jax.jit(caches.rewind, static_argnums=(0, 1))):
        back = rewind(att, cfg, ahead, jnp.array([11, 11]))
        y, _ = decode(x[:, 11:], back)
        assert compare.relative(y, want[:, 11:]) <= compare.OUT["float32"]


@pytest.mark.parametrize("name", GONE)
def test_what_cannot_go_back_is_named(name, untyped):
    att, cfg, _, _, held = filled(name, 11)
    message = rf"^lengths\[1\] is 3; cache.{GONE[name]} of row 1 cannot go back from 11 tokens to that: keep the cache"
    with pytest.raises(ValueError, match=message):
        caches.rewind(att, cfg, held, [11, 3])
    with pytest.raises(ValueError, match=rf"^lengths is traced; whether cache.{GONE[name]} can go back"):
        jax.jit(caches.rewind, static_argnums=(0, 1))(att, cfg, held, jnp.array([11, 11]))


def test_a_stack_is_forked_and_filled_again():
    layers = tuple((name, jforge.get(name).examples[0]) for name in ("sliding_window",) * 2)
    empty = stack.init_cache(layers, 3, 8, jnp.float32)
    marked = jax.tree.map(lambda a: a + jnp.arange(3, dtype=a.dtype).reshape(3, *[1] * (a.ndim - 1)), empty)
    forked = caches.take(marked, [2, 2, 0])
    for leaf in jax.tree.leaves(caches.put(empty, jnp.array([1, 0]), caches.take(forked, [0, 2]))):
        rows = np.asarray(leaf).reshape(3, -1)
        assert (rows == np.array([0, 2, 0])[:, None]).all()


def test_put_writes_in_place():
    *_, held = filled("gqa", 5)
    put = jax.jit(caches.put, donate_argnums=0)
    text = put.lower(held, jnp.array([1]), caches.take(held, [0])).compile().as_text()
    assert "input_output_alias" in text and " copy(" not in text


BAD = [
    (lambda c: caches.take(c, [0, 2]), ValueError, r"^rows\[1\] is 2; it must lie in 0..1, the rows of the cache$"),
    (lambda c: caches.take(c, [-1]), ValueError, r"^rows\[0\] is -1; it must lie in 0..1"),
    (lambda c: caches.take(c, 1), ValueError, r"^rows has shape \(\); it needs one axis$"),
    (lambda c: caches.take(c, [0.0]), TypeError, "^rows has dtype float32; it must be an integer dtype$"),
    (lambda c: caches.take(c, [True]), TypeError, "^rows has dtype bool"),
    (lambda c: caches.take({}, [0]), TypeError, "^cache is a dict; it must be a cache"),
    (lambda c: caches.put(c, [0], c), ValueError, "^rows has 1 entries; it must have 2, one for each row of other$"),
    (lambda c: caches.put(c, [1, 1], c), ValueError, r"^rows is \[1, 1\]; a row must not be put twice$"),
    (lambda c: caches.put(c, [0, 1], (c,)), TypeError, "^other is a tuple; it must be laid out as cache, a KVCache$"),
    (lambda c: caches.put(c, [0, 1], grown(c)), ValueError, r"^other.k has rows of float32\[8, 2, 10\]; they must be"),
    (lambda c: rewound(c, [4, 6]), ValueError, r"^lengths\[1\] is 6; it must lie in 0..5, what the row has seen$"),
    (lambda c: rewound(c, [-1, 0]), ValueError, r"^lengths\[0\] is -1; it must lie in 0..5"),
    (lambda c: rewound(c, [4]), ValueError, r"^lengths has shape \(1,\); it must be \(2,\)"),
    (lambda c: rewound(c, [4.0, 4.0]), TypeError, "^lengths has dtype float"),
    (
        lambda c: rewound(caches.take(c, [0, 1, 1]), [5] * 2),
        ValueError,
        r"^lengths has shape \(2,\); it must be \(3,\)",
    ),
]


def rewound(cache, lengths):
    att = jforge.get("gqa")
    return caches.rewind(att, att.examples[0], cache, lengths)


def grown(cache):
    return filled("gqa", 4)[-1]


@pytest.mark.parametrize("call, error, message", BAD, ids=range(len(BAD)))
def test_bad_arguments_are_named(call, error, message, untyped):
    with pytest.raises(error, match=message):
        call(filled("gqa", 5)[-1])
