"""Cost against buffers, traffic, the published byte counts, and its own algebra."""

import jax
import jax.numpy as jnp
import pytest

import jforge
from jforge.attention import REGISTRY
from jforge.traffic import decode_traffic, traffic

EXAMPLES = [(name, i) for name in REGISTRY for i in range(len(REGISTRY[name].examples))]


@pytest.mark.parametrize("context", [3, 16, 41])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name,i", EXAMPLES, ids=[f"{name}-{i}" for name, i in EXAMPLES])
def test_bytes_are_the_buffers_and_the_traffic(name, i, dtype, context):
    att = jforge.get(name)
    cfg = att.examples[i]
    cost = att.cost(cfg, context=context, dtype=dtype)
    cache = att.init_cache(cfg, 1, context, dtype)
    assert cost.stored == {n: getattr(cache, n).nbytes for n in att.cache_spec(cfg)}
    moved = decode_traffic(att, cfg, context, dtype)
    assert (cost.read, cost.written) == (moved.read, moved.written)


@pytest.mark.parametrize("name,model,per_token", [("gqa", "Llama-3.1-8B", 4096), ("gqa", "Qwen3-235B-A22B", 2048),
                                                  ("mha", "Llama-2-7B", 16384), ("mqa", "Falcon-7B", 256)])  # fmt: skip
def test_published_bytes_per_token(name, model, per_token):
    """mechanisms.md 1.4 and 2 K H e for Falcon's one head of 64."""
    att = jforge.get(name)
    cost = att.cost(att.models[model], context=1000)
    assert cost.per_token == per_token and cost.fixed == 0
    assert sum(cost.written.values()) == per_token
    assert sum(cost.read.values()) == 1000 * per_token


def test_flops_are_those_of_the_traced_attend_step():
    """2 N (H + V) a key: the two matmuls of decode_attention, counted from its jaxpr by XLA's rule for dot_general."""
    att = jforge.get("gqa")
    cfg = att.examples[1]
    q = jax.ShapeDtypeStruct((1, 1, cfg.num_attention_heads, cfg.head_dim), jnp.float32)
    k = jax.ShapeDtypeStruct((1, 16, cfg.num_key_value_heads, cfg.head_dim), jnp.float32)
    v = jax.ShapeDtypeStruct((1, 16, cfg.num_key_value_heads, cfg.v_head_dim), jnp.float32)
    n = jax.ShapeDtypeStruct((1,), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda *a: jforge.ops.decode_attention(*a, scale=1.0))(q, k, v, n)
    assert _dot_flops(jaxpr.jaxpr) == att.cost(cfg, context=16).flops


def _dot_flops(jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            width = 1
            for axis in contract:
                width *= eqn.invars[0].aval.shape[axis]
            total += 2 * eqn.outvars[0].aval.size * width
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")):
            if hasattr(inner, "jaxpr"):
                total += _dot_flops(inner.jaxpr)
    return total


def test_batch_and_capacity():
    att = jforge.get("gqa")
    cfg = att.examples[0]
    one, many = att.cost(cfg, context=8), att.cost(cfg, context=8, batch=3, capacity=32)
    assert many.read == {n: 3 * b for n, b in one.read.items()}
    assert many.stored == {n: 12 * b for n, b in one.stored.items()}
    assert many.flops == 3 * one.flops


def test_algebra():
    att = jforge.get("mqa")
    cost = att.cost(att.examples[0], context=8)
    assert cost + cost == 2 * cost == cost * 2
    assert (cost + cost).stored == {n: 2 * b for n, b in cost.stored.items()}


@pytest.mark.parametrize(
    "bad,named",
    [
        ({"context": 0}, "context is 0"),
        ({"context": 9, "capacity": 8}, "context is 9"),
        ({"context": 8, "batch": -1}, "batch is -1"),
    ],
)
def test_bad_sizes_are_named(bad, named):
    att = jforge.get("gqa")
    with pytest.raises(ValueError, match=named):
        att.cost(att.examples[0], **bad)


def _moved(step, slots: int = 8):
    att = jforge.get("gqa")
    cache = att.init_cache(att.examples[0], 1, slots, jnp.float32)
    return traffic(lambda p, x, c: (x, step(c)), {}, jnp.zeros(3), cache), cache.k.nbytes


def _with(cache, **leaves):
    return type(cache)(**{"k": cache.k, "v": cache.v, "length": cache.length, **leaves})


def test_traffic_counts_a_masked_write_as_the_whole_buffer():
    moved, whole = _moved(lambda c: _with(c, k=jnp.where(c.length[:, None, None, None] > 2, c.k, 1.0)))
    assert moved.written == {"k": whole} and moved.read == {"k": whole}


def test_traffic_counts_gathers_and_caps_their_sum():
    def rows(n):
        return lambda c: _with(c, length=c.length + c.k[:, jnp.arange(n)].sum().astype(jnp.int32))

    moved, whole = _moved(rows(2))
    assert moved.read == {"k": whole // 4} and moved.written == {}
    moved, whole = _moved(rows(20))
    assert moved.read == {"k": whole}


def test_traffic_counts_one_branch_of_a_cond():
    att = jforge.get("gqa")
    cache = att.init_cache(att.examples[0], 1, 8, jnp.float32)

    def step(p, x, c):
        total = jax.lax.cond(c.length[0] % 4 == 3, lambda c: c.k.sum(), lambda c: c.k[:, 0].sum(), c)
        return x + total, c

    whole = cache.k.nbytes
    assert traffic(step, {}, jnp.zeros(3), cache).read == {"k": whole // 8}
    assert traffic(step, {}, jnp.zeros(3), cache, closing=True).read == {"k": whole}


def test_traffic_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="does not know the primitive 'while'.* k"):
        _moved(lambda c: _with(c, k=jax.lax.while_loop(lambda k: k.sum() < 0, lambda k: k + 1, c.k)))
