"""Random parameters for tests and examples, the same rule for every mechanism."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array

Params = dict[str, Array]
"""Weights by name, as `Attention.shapes` lists them."""


class Drawn(tuple[int, ...]):
    """The shape of a parameter whose name does not say how it is drawn: what `random_params` draws, about `mean`, times
    each of `gains`.
    """

    mean: float
    gains: tuple[float, ...]

    def __new__(cls, *shape: int, mean: float = 0.0, gains: tuple[float, ...] = ()):
        self = super().__new__(cls, shape)
        self.mean, self.gains = mean, gains
        return self


def random_params(key: Array, shapes: Mapping[str, tuple[int, ...]], dtype=jnp.float32) -> Params:
    """{name: array} of these shapes. Weights w* have variance 1/fan_in: the first axis, for wo all but the last.

    The rest deviates by 0.1: norms (names that end in "norm") from 1, biases from 0, off their neutral values, so that
    a test sees whether they are used. A shape that is `Drawn` has a mean of its own, and gains.
    """
    params = {}
    for (name, shape), k in zip(shapes.items(), jax.random.split(key, len(shapes)), strict=True):
        value = jax.random.normal(k, tuple(shape), dtype)
        if name.startswith("w"):
            value = value * (math.prod(shape[:-1]) if name == "wo" else shape[0]) ** -0.5
        else:
            value = (shape.mean if isinstance(shape, Drawn) else float(name.endswith("norm"))) + 0.1 * value
        for gain in shape.gains if isinstance(shape, Drawn) else ():
            value = value * gain
        params[name] = value.astype(dtype)
    return params
