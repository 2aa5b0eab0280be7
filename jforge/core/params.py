"""Random parameters for tests and examples, the same rule for every mechanism."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array

Params = dict[str, Array]
"""Weights by name, as `Attention.shapes` lists them."""

SMALL = 2**20  # values, of all parameters of a layer


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
    """{name: array} of these shapes, `drawn` from keys split off `key`.

    Small ones come from one program, since XLA takes a tenth of a second for each that draws: as many values for every
    key as the largest needs, of which each takes the first, and those are what it would draw alone.
    """
    keys, size = jax.random.split(key, len(shapes)), max(map(math.prod, shapes.values()), default=0)
    if len(shapes) * size <= SMALL:
        rows = iter(jax.vmap(lambda one: jax.random.normal(one, (size,), dtype))(keys))
        return drawn(lambda shape: next(rows)[: math.prod(shape)].reshape(shape), shapes, dtype)
    each = iter(keys)
    return drawn(lambda shape: jax.random.normal(next(each), shape, dtype), shapes, dtype)


def drawn(normal: Callable, shapes: Mapping[str, tuple[int, ...]], dtype=jnp.float32) -> Params:
    """{name: array} of what normal(shape) gives. Weights w* have variance 1/fan_in: the first axis, for wo all but the
    last.

    The rest deviates by 0.1: norms (names that end in "norm") from 1, biases from 0, off their neutral values, so that
    a test sees whether they are used. A shape that is `Drawn` has a mean of its own, and gains.
    """
    params = {}
    for name, shape in shapes.items():
        value = normal(tuple(shape))
        if name.startswith("w"):
            value = value * (math.prod(shape[:-1]) if name == "wo" else shape[0]) ** -0.5
        else:
            value = (shape.mean if isinstance(shape, Drawn) else float(name.endswith("norm"))) + 0.1 * value
        for gain in shape.gains if isinstance(shape, Drawn) else ():
            value = value * gain
        params[name] = value.astype(dtype)
    return params
