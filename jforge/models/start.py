"""Parameters of an attention layer as training starts.

`init_params` of a mechanism draws what tests need: norms and biases off their neutral values, decays alike in heads.
A model that learns starts from the values that the papers give instead; weights stay as they are drawn, with variance
1 / fan_in. By the names of parameters, which mean the same in every mechanism:

    norms 1, biases and sinks 0, D ("skip") 1
    A in U(1, 16), one a head; where each state channel has its own, A_h = h     Mamba, Mamba-2, Gated DeltaNet
    dt with softplus(dt) in exp U(log 0.001, log 0.1)                            the same
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jforge.core.attention import Attention
from jforge.core.params import Drawn, Params

STEPS = (1e-3, 1e-1)
RATES = (1.0, 16.0)


def layer_params(att: Attention, cfg, key: Array, dtype=jnp.float32) -> Params:
    """{name: array} of one layer."""
    shapes = att.shapes(cfg)
    own, *keys = jax.random.split(key, 1 + len(shapes))
    params = att.init_params(own, cfg, dtype)
    return {n: _start(n, shape, params[n], one) for (n, shape), one in zip(shapes.items(), keys, strict=True)}


def _start(name: str, shape: tuple[int, ...], value: Array, key: Array) -> Array:
    if name == "a_log":
        if len(shape) == 2:
            return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=value.dtype)), shape)
        return jnp.log(jax.random.uniform(key, shape, value.dtype, *RATES))
    if name == "dt_bias":
        least, most = map(math.log, STEPS)
        step = jnp.exp(jax.random.uniform(key, shape, value.dtype, least, most))
        return step + jnp.log(-jnp.expm1(-step))  # softplus of it is the step
    if name.endswith("norm") or name == "skip":
        return jnp.full(shape, shape.mean if isinstance(shape, Drawn) else 1, value.dtype)
    if name.startswith("w") or (isinstance(shape, Drawn) and shape.gains):
        return value
    return jnp.zeros(shape, value.dtype)
