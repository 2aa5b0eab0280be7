"""Text from a model: a prefill of ragged prompts, then one decode step a token, all in one compiled program."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

import jforge
from jforge.core.config import positive_int, reject
from jforge.core.spec import Lengths
from jforge.models.decoder import Decoder, Ids


class Generated(NamedTuple):
    """What a model said after each prompt."""

    tokens: Int[Array, "B new"]
    logits: Float[Array, "B new vocab"]  # from which each token was taken
    cache: tuple  # holds the prompts and all tokens but the last


def generate(
    model: Decoder, prompts: Ids, lengths: Lengths | None = None, *, new: int, temperature: float = 0.0,
    key: Array | None = None, dtype=None, ops=jforge.ops,
) -> Generated:  # fmt: skip
    """`new` tokens after each prompt: the likeliest ones, or drawn at a temperature.

    prompts: row b's are its first lengths[b] tokens (None: all of them), at least one; what follows is not read.
    temperature: what logits are divided by before a draw; 0 takes the largest, the first of equal ones.
    key: of the draws. dtype: of the caches; None for that of the parameters.

    Raises ValueError naming the argument for a prompt without a token, and a temperature without a key.
    """
    positive_int("new", new)
    if temperature < 0 or (temperature > 0 and key is None):
        reject("temperature", temperature, "0, or a positive number and a key given")
    B, P = prompts.shape
    lengths = np.full(B, P, np.int32) if lengths is None else np.asarray(lengths, np.int32)
    if lengths.shape != (B,) or (lengths < 1).any() or (lengths > P).any():
        reject("lengths", lengths.tolist(), f"{B} numbers from 1 to {P}")
    graph, state = nnx.split(model)
    cache = model.init_cache(B, P + new, dtype or model.embed.embedding[...].dtype)
    key = jax.random.key(0) if key is None else key
    return Generated(*_run(graph, state, jnp.asarray(prompts), jnp.asarray(lengths), cache, key, new, temperature, ops))


@partial(jax.jit, static_argnames=("graph", "new", "temperature", "ops"), donate_argnames="cache")
def _run(graph, state, prompts, lengths, cache, key, new: int, temperature: float, ops):
    model = nnx.merge(graph, state)
    first, cache = model.prefill(prompts, cache, lengths)
    logits = jnp.take_along_axis(first, (lengths - 1)[:, None, None], axis=1)[:, 0]

    def step(carry, key):
        logits, cache = carry
        token = _choose(logits, temperature, key)
        after, cache = model.decode(token[:, None], cache, ops)
        return (after[:, 0], cache), (token, logits)

    *keys, last = jax.random.split(key, new)
    keys = jnp.stack(keys) if keys else key[None][:0]
    (logits, cache), (tokens, before) = jax.lax.scan(step, (logits, cache), keys)
    tokens = jnp.concatenate([tokens, _choose(logits, temperature, last)[None]])
    return tokens.T, jnp.moveaxis(jnp.concatenate([before, logits[None]]), 0, 1), cache


def _choose(logits: Float[Array, "B vocab"], temperature: float, key: Array) -> Int[Array, "B"]:
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32)
