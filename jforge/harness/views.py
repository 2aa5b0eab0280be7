"""Ways of putting a question of the fuzz whose answer must not differ. A view is a function of (backend, draw, inputs)
that gives (what the oracle is to be asked, what the backend answers); an op's record names those that it has.
"""

from functools import partial

import numpy as np

from jforge.harness import draws
from jforge.harness.backends import Backend
from jforge.harness.op import Draw, Inputs

Answer = tuple[Inputs, tuple[np.ndarray, ...]]
BY_ROW = ("beta", "k_scale", "latent_scale")  # options with one entry for each row of the batch


def plain(backend: Backend, draw: Draw, inputs: Inputs) -> Answer:
    return inputs, backend.call(draw.case.op, inputs)


def permuted(backend: Backend, draw: Draw, inputs: Inputs, axis: int = 0, shared: tuple[str, ...] = ()) -> Answer:
    """The answer to the batch in another order, put back into the old one. `shared`: vectors that all rows share."""
    op, arrays = draw.case.op, inputs.arrays
    order = np.roll(np.arange(next(iter(arrays.values())).shape[axis]), 1)  # a random order of two is often the old one
    whole = {n for n in shared if arrays[n].ndim == 1}
    moved = {n: a if a is None or n in whole else np.take(a, order, axis) for n, a in arrays.items()}
    options = {n: np.take(o, order, 0) if n in BY_ROW else o for n, o in inputs.options.items()}
    got = backend.call(op, Inputs(moved, options))
    return inputs, tuple(np.take(part, np.argsort(order), 0) for part in got)


def alone(backend: Backend, draw: Draw, inputs: Inputs, empty: dict[str, int]) -> Answer:
    """Row `at` as it is; the others hold `empty`, {argument: value}: nothing is to be read for them, or they are 0."""
    others, arrays = np.arange(draw.case.sizes["B"]) != draw.at, dict(inputs.arrays)
    for name, nothing in empty.items():
        if arrays.get(name) is not None:
            array = arrays[name].copy()
            array[others] = nothing
            arrays[name] = array
    return plain(backend, draw, Inputs(arrays, inputs.options))


def shuffled(backend: Backend, draw: Draw, inputs: Inputs, lists: str) -> Answer:
    """The entries of the lists in another order."""
    mixed = np.random.default_rng(draw.seed).permuted(inputs.arrays[lists], axis=-1)
    return inputs, backend.call(draw.case.op, Inputs({**inputs.arrays, lists: mixed}, inputs.options))


def pages_by_length(arrays, page: int, slots: int) -> np.ndarray:
    """Which pages of each row nobody may read: those past its length."""
    return np.arange(slots // page) >= -(-arrays["lengths"][:, None] // page)


def pages_of_nan(arrays, page: int, slots: int, cache: str = "k") -> np.ndarray:
    """Which pages nobody may read, where heads pick their blocks: those of pages that nobody picked."""
    return np.isnan(arrays[cache].astype(np.float32)).reshape(len(arrays[cache]), slots // page, -1).all(axis=2)


def paged(backend: Backend, draw: Draw, inputs: Inputs, caches: tuple[str, ...], unread=pages_by_length) -> Answer:
    """The caches as shuffled pools with one page of NaN; entries that nobody may follow point outside the pool."""
    arrays, page = dict(inputs.arrays), draw.at
    caches = [name for name in caches if arrays[name] is not None]
    B, S = arrays[caches[0]].shape[:2]
    wild = unread(arrays, page, S)
    order = np.random.default_rng(draw.seed).permutation(B * S // page).astype(np.int32)
    for name in caches:
        pool = np.full((B * S // page + 1, page, *arrays[name].shape[2:]), np.nan, arrays[name].dtype)
        pool[order] = arrays[name].reshape(-1, *pool.shape[1:])
        arrays[name] = pool
    table = np.where(wild, np.int32(10**6), order.reshape(B, -1))
    return inputs, backend.call(draw.case.op, Inputs(arrays, {**inputs.options, "page_table": table}))


# --- in two calls, whose shapes are those of one, so that nothing compiles again


def split_lists(backend: Backend, draw: Draw, inputs: Inputs, lists: str) -> Answer:
    """The entries of the lists before `at`, then the others."""
    entries = inputs.arrays[lists]
    first = np.arange(entries.shape[-1]) < draw.at
    some = [{**inputs.arrays, lists: np.where(mine, entries, -1)} for mine in (first, ~first)]
    return inputs, _two_calls(backend, draw, some, inputs.options)


def split_cache(backend: Backend, draw: Draw, inputs: Inputs, caches: tuple[str, ...]) -> Answer:
    """The slots before `at`, then the others."""
    lengths = inputs.arrays["lengths"]
    before = {**inputs.arrays, "lengths": np.minimum(lengths, draw.at)}
    after = {n: moved_up(a, draw.at) if n in caches else a for n, a in inputs.arrays.items()}
    after["lengths"] = np.maximum(lengths - draw.at, 0)
    return inputs, _two_calls(backend, draw, [before, after], inputs.options)


def _two_calls(backend: Backend, draw: Draw, arrays: list[dict], options) -> tuple[np.ndarray, ...]:
    """Two partial results in float32, joined by the backend's own merge; one call carries the sink, and the other one
    that is too small to count beside any logit.
    """
    options = {**options, "out_dtype": "float32"}
    small = {"sinks": np.full_like(options["sinks"], -draws.LARGEST)} if "sinks" in options else {}
    calls = zip(arrays, (options, options | small), strict=True)
    return backend.merge([backend.call(draw.case.op, Inputs(*call)) for call in calls])


def moved_up(array: np.ndarray, at: int) -> np.ndarray:
    """Slots from `at` on, moved to the front of a cache that ends with NaN, or with codes that mean nothing."""
    rest = np.full_like(array[:, :at], np.nan if array.dtype.kind != "i" else 99)
    return np.concatenate([array[:, at:], rest], axis=1)


def of_a_cache(caches: tuple[str, ...]) -> dict:
    """The views of an op whose queries see a prefix of its cache."""
    return {
        "plain": plain,
        "permuted": permuted,
        "alone": partial(alone, empty={"lengths": 0}),
        "paged": partial(paged, caches=caches),
        "split": partial(split_cache, caches=caches),
    }
