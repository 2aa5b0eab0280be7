"""What the mechanisms share whose cache is a matrix state and the last rows of a short convolution.

Such a mechanism says two things, both of a run of tokens and the convolution's rows before them:

    terms(params, cfg, x, conv) -> (Terms, rows)       what each token does to the state, and the rows it has stored
    project_out(params, cfg, x, out, rest) -> y        from what the state answers

`forward` is the recurrence, token by token; `prefill` takes a block of tokens at a time, in which all is a product of
matrices; `decode` is one step through `ops.decode_linear`, which may overwrite the state. Pads neither decay the state
nor write to it nor enter the convolution. There is no capacity: such a cache never overflows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import jforge.ops as jax_ops
from jforge.core import conv, linear
from jforge.core.softmax import accumulation_dtype
from jforge.core.spec import Buffer, CacheSpec, cache_class
from jforge.core.step import Tokens, all_of, begin, end, few_tokens, one_by_one, several
from jforge.cost import Work


@cache_class
class State:
    """What a row has summed, and the inputs of its last convolutions."""

    state: jax.Array  # B N H V (key channel, value channel), float32 or wider
    conv: jax.Array  # B P X, the oldest first
    length: jax.Array  # int32[B]


class Terms(NamedTuple):
    """What the tokens do to the state and ask of it."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T N H"]
    v: Float[Array, "B T N V"]
    log_decay: Float[Array, "B T N"] | Float[Array, "B T N H"]
    beta: Float[Array, "B T N"] | None = None  # of the delta rule
    rest: Any = None  # what project_out wants beside the answer, B T ...

    def of(self, keep) -> "Terms":
        """Without the tokens that are not kept."""
        log_decay = jnp.where(_beside(keep, self.log_decay), self.log_decay, 0)
        if self.beta is not None:
            return self._replace(log_decay=log_decay, beta=jnp.where(keep[..., None], self.beta, 0))
        return self._replace(log_decay=log_decay, v=jnp.where(_beside(keep, self.v), self.v, 0))


def _beside(keep, array):
    return keep.reshape(*keep.shape, *(1,) * (array.ndim - keep.ndim))


class Recurrence(NamedTuple):
    """A mechanism of this kind. block: of a prefill, from the fields of Terms but the last and the state."""

    terms: Callable[..., tuple[Terms, Array]]
    project_out: Callable[..., Array]
    spec: Callable[[Any], CacheSpec]
    block: Callable[..., tuple[Array, Array]] = linear.block

    def forward(self, params, cfg, x: Tokens, positions=None) -> Tokens:
        """The definition: the recurrence from an empty state. There is no RoPE, so `positions` change nothing."""
        all_of(cfg, x, positions)
        buffers, wide = self.spec(cfg), accumulation_dtype(x)
        terms, _ = self.terms(params, cfg, x, jnp.zeros((len(x), *buffers["conv"].shape), x.dtype))

        def step(state, token):
            q, k, v, log_decay, *beta = token
            beta = beta[0] if beta else None
            out, state = jax_ops.decode_linear(q, k, v, state, jnp.exp(log_decay), beta=beta)
            return state, out

        rows = [jnp.moveaxis(a, 1, 0) for a in terms[:5] if a is not None]
        _, out = jax.lax.scan(step, jnp.zeros((len(x), *buffers["state"].shape), wide), tuple(rows))
        return self.project_out(params, cfg, x, jnp.moveaxis(out, 0, 1), terms.rest).astype(x.dtype)

    def prefill(self, params, cfg, x: Tokens, cache: State, lengths=None) -> tuple[Tokens, State]:
        """Take T tokens (row b its first lengths[b]) into the state, block by block."""
        step = begin(cfg, self.spec(cfg), x, cache, lengths)

        def block(carry, x, keep):
            state, held = carry
            terms, rows = self.terms(params, cfg, x, held)
            out, state = self.block(*terms.of(keep)[:5], state)
            y = self.project_out(params, cfg, x, out.astype(x.dtype), terms.rest)
            return (state, conv.keep_last(rows, keep)), y.astype(x.dtype)

        size = max(1, min(cfg.block_size, x.shape[1]))
        y, (state, held) = linear.blockwise(block, (cache.state, cache.conv), size, step.x, step.keep)
        return end(step, y, x.dtype), State(state, held, step.length)

    def decode(self, params, cfg, x: Tokens, cache: State, ops=jax_ops) -> tuple[Tokens, State]:
        """Steps of the recurrence through `ops.decode_linear`."""
        if several(x):
            return one_by_one(self.decode, self.spec(cfg), params, cfg, x, cache, ops)
        step = begin(cfg, self.spec(cfg), few_tokens(x), cache)
        terms, rows = self.terms(params, cfg, step.x, cache.conv)
        q, k, v, log_decay, beta = (None if a is None else a[:, 0] for a in terms[:5])
        out, state = ops.decode_linear(q, k, v, cache.state, jnp.exp(log_decay), beta=beta)
        y = self.project_out(params, cfg, step.x, out[:, None], terms.rest)
        return end(step, y, x.dtype), State(state, conv.keep_last(rows, step.keep), step.length)


def cache_spec(N: int, H: int, V: int, L: int, channels: int) -> CacheSpec:
    """N states of H V and a convolution of L taps over so many channels."""
    state = Buffer(("B", "N", "H", "V"), (N, H, V), every=None, dtype="float32")
    return CacheSpec(State, {"state": state, "conv": conv.buffer(L, channels)})


def work(spec: CacheSpec, new: int, size: int, *, delta: bool) -> Work:
    """One step, or a block of a prefill, reads and writes both buffers whole."""
    (N, H, V), (P, X) = spec["state"].shape, spec["conv"].shape
    flops = linear.flops(N, H, V, new, size, delta=delta) + 2 * (P + 1) * X * new
    return Work({"state": 1, "conv": 1}, {"state": 1, "conv": 1}, flops, 1)
