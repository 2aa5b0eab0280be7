"""The compiled decode step of every mechanism: the donated cache is updated in place, nothing that grows is copied."""

import re

import jax
import jax.numpy as jnp
import pytest

from jforge.attention import REGISTRY

SLOTS = 512  # more than any other size of an example


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("name", REGISTRY)
def test_decode_copies_no_cache(name, tokens, untyped):
    att = REGISTRY[name]
    cfg = att.examples[0]
    params = jax.eval_shape(lambda: att.init_params(jax.random.key(0), cfg))
    cache = jax.eval_shape(lambda: att.init_cache(cfg, 2, SLOTS, jnp.float32))
    x = jax.ShapeDtypeStruct((2, tokens, cfg.hidden_size), jnp.float32)
    step = jax.jit(lambda p, x, c: att.decode(p, cfg, x, c), donate_argnums=2)
    text = step.lower(params, x, cache).compile().as_text()
    aliased = text[: text.index("\n")].count("may-alias") + text[: text.index("\n")].count("must-alias")
    assert aliased >= len(jax.tree.leaves(cache)), "a leaf of the donated cache is not updated in place"
    grows = {n for n, buffer in att.cache_spec(cfg).items() if buffer.every is not None and buffer.limit is None}
    shapes = {",".join(map(str, getattr(cache, n).shape)) for n in grows}
    copied = [s for s in re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", text) if s in shapes]
    assert not copied, f"the step copies buffers of shape {copied}"
