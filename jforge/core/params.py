"""Random parameters for tests and examples, the same rule for every mechanism."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array


def random_params(
    key: Array, shapes: Mapping[str, tuple[int, ...]], dtype=jnp.float32, norm_center: float = 1.0
) -> dict[str, Array]:
    """{name: array} of these shapes. Weights w* have variance 1/fan_in: the first axis, for wo all but the last.

    Norms (names that end in "norm") lie about `norm_center`, biases about 0, both off their neutral values, so that a
    test sees whether they are used.
    """
    params = {}
    for (name, shape), k in zip(shapes.items(), jax.random.split(key, len(shapes)), strict=True):
        value = jax.random.normal(k, shape, dtype)
        if name.startswith("w"):
            params[name] = value * (math.prod(shape[:-1]) if name == "wo" else shape[0]) ** -0.5
        else:
            params[name] = ((norm_center if name.endswith("norm") else 0) + 0.1 * value).astype(dtype)
    return params
