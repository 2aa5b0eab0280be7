"""What records share of drawing inputs: values for NumPy in named cases and the fuzz, for JAX in benchmarks."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jforge.harness.op import Case, Draw, Inputs


def over_a_cache(case: Case, dtype, rng, shapes: dict, caches: tuple[str, ...], scale: float) -> Inputs:
    """Normal draws of these shapes, NaN in every slot of `caches` (B S ...) that no query of the case may read."""
    arrays = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    T, S, N = (case.sizes[axis] for axis in "TSN")
    window = case.options.get("window") or S
    for row, length in enumerate(case.lengths):
        unread = np.ones(S, bool)
        unread[max(0, length - T + 1 - window) : length] = False
        for name in caches:
            arrays[name][row, unread] = np.nan
    options = with_sinks({"scale": scale, **case.options}, N, rng)
    return Inputs({**arrays, "lengths": np.array(case.lengths, np.int32)}, options)


def with_sinks(options: dict, heads: int, rng: np.random.Generator) -> dict:
    """The options with an array in the place of `sinks=True`."""
    if options.pop("sinks", False):
        options["sinks"] = rng.standard_normal(heads).astype(np.float32)
    return options


def quantised(x: np.ndarray, stored: str, steps: float, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`x` as codes of the one-byte dtype `stored`, `steps` of them a unit, and the float32 scales, one a slot. Slots of
    NaN have a scale of NaN, and codes of NaN where there is one.
    """
    unread = np.isnan(x).any(axis=-1)
    codes = np.round(steps * np.where(unread[..., None], 1, x.astype(np.float32))).clip(-127, 127).astype(stored)
    if stored != "int8":
        codes[unread] = np.nan
    return codes, np.where(unread, np.nan, scale).astype(np.float32)


def meant(codes: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    """What a cache means, in float64: its values, or codes with a scale for each slot."""
    codes = np.asarray(codes, np.float64)
    return codes if scale is None else codes * np.asarray(scale, np.float64)[..., None]


def edge(case: Callable[..., Case], lengths, *sizes, dtype="float16", page=0, splits=0, plan=(), **more) -> Draw:
    """An example of what `case` makes: in pages, or with forced splits."""
    plan = {"splits": splits} if splits else plan
    return Draw(case("edge", lengths, *sizes, plan=plan, **more), dtype, 0, "paged" if page else "plain", page)


# --- edges that the fuzz adds


def with_garbage(lists: np.ndarray, past: int, rng: np.random.Generator) -> np.ndarray:
    """Every -1 of the lists as it is, or as another index that a call must ignore; `past` is the first of these."""
    ignored = np.array([-1, -1, -2, past, 2**31 - 1, -(2**31)], np.int64).astype(np.int32)
    return np.where(lists < 0, rng.choice(ignored, lists.shape), lists)


def as_codes(draw: Draw, inputs: Inputs, rng: np.random.Generator, cache: str, scale_name: str) -> Inputs:
    """A cache quantised, where the example asks for it: with exact sums and scales of either sign where the values are
    coarse.
    """
    if draw.stored is None:
        return inputs
    x, coarse = inputs.arrays[cache], draw.values == "coarse"
    scale = rng.uniform(0.02, 0.08, x.shape[:2])
    if coarse:
        scale = rng.choice([-3, -1, 1, 3, 5], x.shape[:2]) * 2.0 ** rng.integers(-4, 1, x.shape[:2])
    codes, scale = quantised(x, draw.stored, 4 if coarse else 25, scale)
    return Inputs({**inputs.arrays, cache: codes}, {**inputs.options, scale_name: scale})


LARGEST = float(np.finfo(np.float32).max)
MAGNITUDES = (2.0**20, 3.1e9, 1.3e10, 1e30, 0.97 * LARGEST)


def levels(count: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers of eight bits from just below 1 down, of either sign and in random order; no two magnitudes are closer
    than 1/256 of them, so that of their multiples by one of MAGNITUDES only the largest has a weight.
    """
    number = np.arange(count)
    sizes = (255 - number % 128) / (256 * 2.0 ** (number // 128))
    return rng.permutation(sizes * rng.choice([-1, 1], count))


def huge(draw: Draw, inputs: Inputs, rng: np.random.Generator, queries: tuple, keys: tuple) -> Inputs:
    """Logits up to the ends of float32, where the example asks for them: exact multiples of `levels`, since queries and
    keys are vectors of signs by a number. Sinks lie between, above and below them. queries and keys: names, in pairs
    that are multiplied.
    """
    if draw.values != "huge":
        return inputs
    arrays, options = dict(inputs.arrays), dict(inputs.options)
    width = sum(arrays[name].shape[-1] for name in queries)
    row, most = rng.choice([-1, 1], arrays[queries[0]].shape[:-1]), rng.choice(MAGNITUDES)
    raised = 2.0 ** rng.integers(0, 16)
    slots = arrays[keys[0]].shape[:-1]
    along = np.moveaxis(np.array([levels(slots[1], rng) for _ in range(math.prod(slots) // max(1, slots[1]))]), -1, 0)
    level = np.moveaxis(along.reshape(slots[1], *slots[:1], *slots[2:]), 0, 1)
    for query, key in zip(queries, keys, strict=True):
        signs = rng.choice([-1, 1], arrays[query].shape[-1])
        arrays[query] = (raised * row[..., None] * signs).astype(arrays[query].dtype)
        unread = np.isnan(arrays[key].astype(np.float32))
        arrays[key] = np.where(unread, np.nan, level[..., None] * signs).astype(arrays[key].dtype)
    options["scale"] = float(most / (width * raised))
    if "sinks" in options:
        between = most * (2 * rng.integers(128, 256, options["sinks"].shape) + 1) / 512
        ends = rng.choice([0.0, 1e10, LARGEST, -LARGEST], options["sinks"].shape)
        options["sinks"] = np.where(rng.random(between.shape) < 0.5, between, ends).astype(np.float32)
    return Inputs(arrays, options)


# --- for benchmarks, on the device


def normal(key, shape: tuple[int, ...], dtype=jnp.bfloat16) -> jax.Array:
    return jax.jit(lambda key: jax.random.normal(key, shape, dtype))(key)


def float32(key, shape: tuple[int, ...], sizes: Mapping, options: Mapping) -> jax.Array:
    """Normal draws that are float32 whatever the others are."""
    return normal(key, shape, jnp.float32)


def full(key, shape: tuple[int, ...], sizes: Mapping, options: Mapping) -> jax.Array:
    """Every row as long as the cache."""
    return jnp.full(shape, sizes["S"], jnp.int32)


def lists(key, shape: tuple[int, ...], sizes: Mapping, options: Mapping) -> jax.Array:
    """int32 [..., L]: L distinct blocks, or slots, of the cache in random order."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    count = sizes["S"] // options.get("block_size", 1)
    drawn = [rng.choice(count, shape[-1], replace=False) for _ in range(math.prod(shape[:-1]))]
    return jnp.asarray(np.reshape(drawn, shape), jnp.int32)
