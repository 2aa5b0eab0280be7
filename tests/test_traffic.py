"""What a step reads through an op is what the op's lengths, window and lists let it read; the rest is the static rule.

tests/test_cost.py holds the static rule, and the bytes of every mechanism.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from own_chunked import chunked, decode_reading

import jforge
from jforge.attention import dense
from jforge.traffic import Trace, decode_traffic

GQA = jforge.get("gqa")
(CHUNK,) = chunked.examples
S, SLOT = 8, 80  # slots of the cache below; float32 bytes of one in k or in v


def test_a_chunked_mechanism_keeps_every_law():
    """It reads t % C + 1 of C slots."""
    report = jforge.check(chunked)
    assert report.ok, report


def _jitted(params, cfg, x, cache):
    return jax.jit(chunked.decode, static_argnames="cfg")(params, cfg, x, cache)


@pytest.mark.parametrize(
    "changes, wrong",
    [
        ({}, 0),
        ({"decode": _jitted}, 0),
        ({"decode": decode_reading(lambda cfg, n: jnp.minimum(n, cfg.chunk_size))}, 8),
        ({"work": lambda cfg, context, *_: dense.work_on(cfg, min(context, cfg.chunk_size), 1, context)}, 8),
        ({"work": lambda cfg, context, *_: dense.work_on(cfg, 1, 1, 1)}, 16),
    ],
    ids=["right", "jitted", "reads the whole ring", "counts the whole ring", "counts one slot"],
)
def test_bytes_of_a_chunk(changes, wrong):
    """At contexts 3, 8 and 17 of chunks of 4 the last holds 3, 4 and 1 tokens, and the ring 3, 4 and 4; each number
    that is wrong counts for k and v, two dtypes, closing or not.
    """
    (row,) = jforge.check(chunked._replace(**changes), laws=("L8",))
    assert row.error == wrong, row.says


@pytest.mark.parametrize("context, slots", [(1, 1), (3, 3), (4, 4), (5, 1), (7, 3)])
def test_reads_follow_the_context(context, slots):
    moved = decode_traffic(chunked, CHUNK, context, jnp.float32)
    assert moved.read == {"k": slots * 48, "v": slots * 48} and moved.written == {"k": 48, "v": 48}


def read(call, length: int | None = 4) -> dict[str, int]:
    """Slots that `call` (of q and a cache with room for S tokens) reads of k and v after `length` tokens."""
    cfg = GQA.examples[0]
    cache = GQA.init_cache(cfg, 1, S, jnp.float32)
    q = jnp.zeros((1, 1, cfg.num_attention_heads, cfg.head_dim))

    def step(params, x, cache):
        out, _ = call(q, cache)
        return x + out.sum(), cache

    moved = Trace(step, {}, jnp.zeros(3), cache, length).count()
    return {name: moved_ / SLOT for name, moved_ in moved.read.items()}


def dense_call(n, **options):
    return lambda q, c: jforge.ops.decode_attention(q, c.k, c.v, n(c), scale=1.0, **options)


def listed_call(lists, size, lengths=None):
    def call(q, c):
        picks = jnp.broadcast_to(jnp.asarray(lists(c), jnp.int32), (1, 1, 2, len(lists(c))))
        return jforge.ops.decode_block_sparse(q, c.k, c.v, picks, lengths and lengths(c), block_size=size, scale=1.0)

    return call


@pytest.mark.parametrize(
    "call, length, slots",
    [
        (dense_call(lambda c: c.length + 1), 4, 5),
        (dense_call(lambda c: c.length + 1), None, S),
        (dense_call(lambda c: c.length + 1, window=3), 4, 3),
        (dense_call(lambda c: c.length + 1, window=3), 1, 2),
        (dense_call(lambda c: c.length * 0), 4, 1),
        (dense_call(lambda c: (c.k[:, 0, 0, 0] > 0).astype(jnp.int32) + 2), 4, S),
        (listed_call(lambda c: np.array([0, 2, 5, -1, 99]), 1), 4, 3),
        (listed_call(lambda c: jnp.stack([c.length[0], -1 * c.length[0], c.length[0] + 1]), 1), 4, 2),
        (listed_call(lambda c: np.array([0, 1]), 2, lambda c: c.length + 1), 4, 4),
        (listed_call(lambda c: np.array([0, 1, 3]), 2, lambda c: c.length + 1), 4, 5),
        (listed_call(lambda c: np.array([0, 1, -1]), 2), None, 4),
    ],
    ids=["length", "any length", "window", "window not full", "nothing", "length from data", "tokens",
         "tokens of the context", "blocks", "blocks past the length", "blocks alone"],
)  # fmt: skip
def test_reads_through_an_op(call, length, slots):
    assert read(call, length) == {"k": slots, "v": slots}


def test_a_masked_read_that_is_no_op_counts_whole():
    def call(q, c):
        seen = (jnp.arange(S) <= c.length[:, None])[..., None, None]
        return jnp.where(seen, c.k, 0).sum() + jnp.where(seen, c.v, 0).sum(), None

    assert read(call) == {"k": S, "v": S}


def test_an_unknown_primitive_still_raises():
    def call(q, c):
        grown = jax.lax.while_loop(lambda k: k.sum() < 0, lambda k: k + 1, c.k)
        return jforge.ops.decode_attention(q, grown, c.v, c.length, scale=1.0)

    with pytest.raises(ValueError, match="does not know the primitive 'while'.* k"):
        read(call)


def test_steps_run_as_ever_beside_a_trace():
    """The ops are looked at while a step is traced, and are themselves again after it."""
    cfg = GQA.examples[0]
    decode_traffic(GQA, cfg, 4)
    text = str(jax.make_jaxpr(lambda q, k, n: jforge.ops.decode_attention(q, k, k, n, scale=1.0))(
        jnp.zeros((1, 1, 2, 4)), jnp.zeros((1, 3, 1, 4)), jnp.zeros(1, jnp.int32)))  # fmt: skip
    assert "jforge.ops" not in text
