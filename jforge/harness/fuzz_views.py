"""The inputs of an example of the fuzz, and the ways of putting a question whose answer must not differ."""

import numpy as np

from jforge.harness import oracle
from jforge.harness.backends import Backend
from jforge.harness.cases import DTYPES, Inputs, build, quantised
from jforge.harness.fuzz_draws import Draw

CACHES = {
    "decode_attention": ("k", "v"),
    "decode_block_sparse": ("k", "v"),
    "decode_mla": ("latent", "k_rope"),
}
LISTS = {"decode_block_sparse": "block_indices", "decode_sparse_mla": "indices"}
STORED = {"index_scores": "k", "block_index_scores": "k", "decode_sparse_mla": "latent"}  # of k_index and k_scale, ...
BY_ROW = ("beta", "k_scale", "latent_scale")  # options with one entry for each row of the batch


def inputs_of(draw: Draw) -> Inputs:
    """The arrays of an example, in the order of the op's signature, and its options."""
    case, rng = draw.case, np.random.default_rng(draw.seed)
    if case.op == "topk_indices":
        return _scores(draw, rng)
    inputs = build(case, draw.dtype, draw.seed)
    arrays, options = dict(inputs.arrays), dict(inputs.options)
    match case.op:
        case "decode_block_sparse":
            past = -(-case.sizes["S"] // case.options["block_size"])
            arrays["block_indices"] = _with_garbage(arrays["block_indices"], past, rng)
        case "decode_sparse_mla":
            _shorten(arrays, case.lengths, rng)
            arrays["indices"] = _with_garbage(arrays["indices"], case.sizes["S"], rng)
        case "index_scores" | "block_index_scores":
            change = np.abs if draw.values == "positive" else _coarse
            for name in ("q_index", "k_index", "weights"):
                if name in arrays:
                    arrays[name] = change(arrays[name])
        case "decode_linear":
            for factors, edges in ((arrays["decay"], [0, 1] if case.sizes["decay"] == 3 else [1]),
                                   (options.get("beta", np.zeros(0)), [0, 1])):  # fmt: skip
                at_edge = rng.random(factors.shape) < 0.25
                factors[at_edge] = rng.choice(edges, at_edge.sum())
    inputs = Inputs(arrays, options)
    return inputs if draw.stored is None else _quantised(inputs, draw, rng)


def _coarse(x: np.ndarray) -> np.ndarray:
    """Quarters, so that sums of products are exact in float32; NaN stays."""
    return (np.round(4 * x.astype(np.float32)) / 4).astype(x.dtype)


def _scores(draw: Draw, rng: np.random.Generator) -> Inputs:
    """As many scores above -inf as a row's length says, some of them +inf; coarse ones tie, 0.0 with -0.0 too;
    broken ones hold NaN of either sign.
    """
    *axes, S = draw.case.sizes.values()
    scores = rng.standard_normal((len(draw.case.lengths), S))
    scores = np.round(2 * scores) / 2 if draw.values == "coarse" else scores
    scores[rng.random(scores.shape) < 0.02] = np.inf
    if draw.values == "broken":
        signed = np.copysign(np.nan, rng.standard_normal(scores.shape))
        scores = np.where(rng.random(scores.shape) < 0.1, signed, scores)
    for row, length in zip(scores, draw.case.lengths, strict=True):
        row[rng.permutation(S)[length:]] = -np.inf
    return Inputs({"scores": scores.reshape(*axes, S).astype(DTYPES[draw.dtype])}, dict(draw.case.options))


def _with_garbage(lists: np.ndarray, past: int, rng: np.random.Generator) -> np.ndarray:
    """Every -1 of the lists as it is, or as another index that a call must ignore; `past` is the first of these."""
    ignored = np.array([-1, -1, -2, past, 2**31 - 1, -(2**31)], np.int64).astype(np.int32)
    return np.where(lists < 0, rng.choice(ignored, lists.shape), lists)


def _shorten(arrays: dict[str, np.ndarray], lengths: tuple[int, ...], rng: np.random.Generator) -> None:
    """Leave at most lengths[b] tokens in the list of row b's last query, perhaps fewer in the others, and NaN in the
    slots that no list names any more."""
    indices = arrays["indices"]
    B, T, L = indices.shape
    for b, t in np.ndindex(B, T):
        kept = lengths[b] if t == T - 1 else rng.integers(lengths[b] + 1)
        indices[b, t, rng.permutation(L)[kept:]] = -1
    for b in range(B):
        unread = ~np.isin(np.arange(arrays["latent"].shape[1]), indices[b])
        arrays["latent"][b, unread] = arrays["k_rope"][b, unread] = np.nan


def _quantised(inputs: Inputs, draw: Draw, rng: np.random.Generator) -> Inputs:
    """The keys quantised: with exact sums and scales of either sign where the values are coarse."""
    name = STORED[draw.case.op]
    key = "k_index" if name == "k" else name
    x, coarse = inputs.arrays[key], draw.values == "coarse"
    scale = rng.uniform(0.02, 0.08, x.shape[:2])
    if coarse:
        scale = rng.choice([-3, -1, 1, 3, 5], x.shape[:2]) * 2.0 ** rng.integers(-4, 1, x.shape[:2])
    codes, scale = quantised(x, draw.stored, 4 if coarse else 25, scale)
    return Inputs({**inputs.arrays, key: codes}, {**inputs.options, f"{name}_scale": scale})


# --- the ways of asking


def ask(backend: Backend, draw: Draw, inputs: Inputs) -> tuple[Inputs, tuple[np.ndarray, ...]]:
    """(what the oracle is to be asked, what the backend answers to the drawn view of it)."""
    op = draw.case.op
    rng = np.random.default_rng(draw.seed)
    match draw.view:
        case "permuted":
            return inputs, _permuted(backend, draw, inputs)
        case "alone":
            inputs = _alone(inputs, draw)
        case "paged":
            return inputs, backend.call(op, _paged(inputs, op, draw.at, rng))
        case "shuffled" if op == "topk_indices":
            return inputs, _shuffled_scores(backend, inputs, rng)
        case "shuffled":
            mixed = rng.permuted(inputs.arrays[LISTS[op]], axis=-1)
            return inputs, backend.call(op, Inputs({**inputs.arrays, LISTS[op]: mixed}, inputs.options))
        case "split" if op == "decode_linear":
            return _two_tokens(backend, draw, inputs)
        case "split":
            return inputs, SPLIT[op](backend, draw, inputs)
    return inputs, backend.call(op, inputs)


def _permuted(backend: Backend, draw: Draw, inputs: Inputs) -> tuple[np.ndarray, ...]:
    """The answer to the batch in another order, put back into the old one."""
    op, arrays = draw.case.op, inputs.arrays
    axis = 1 if op == "merge_states" else 0
    first = next(iter(arrays.values()))
    if first.ndim == axis + (op == "topk_indices"):  # one row of scores
        return backend.call(op, inputs)
    order = np.roll(np.arange(first.shape[axis]), 1)  # a random order of two rows is often the old one
    fixed = {"decay"} if op == "decode_linear" and arrays["decay"].ndim == 1 else set()
    moved = {n: a if a is None or n in fixed else np.take(a, order, axis) for n, a in arrays.items()}
    options = {n: np.take(o, order, 0) if n in BY_ROW else o for n, o in inputs.options.items()}
    got = backend.call(op, Inputs(moved, options))
    return tuple(np.take(part, np.argsort(order), 0) for part in got)


def _alone(inputs: Inputs, draw: Draw) -> Inputs:
    """Row `at` as it is; nothing is to be read for the others, or they are 0."""
    others, arrays = np.arange(draw.case.sizes["B"]) != draw.at, dict(inputs.arrays)
    empty = {"lengths": 0, "block_indices": -1, "indices": -1}
    if draw.case.op == "decode_linear":
        empty = dict.fromkeys(("q", "k", "v", "state"), 0)
    for name, nothing in empty.items():
        if arrays.get(name) is not None:
            array = arrays[name].copy()
            array[others] = nothing
            arrays[name] = array
    return Inputs(arrays, inputs.options)


def _paged(inputs: Inputs, op: str, page: int, rng: np.random.Generator) -> Inputs:
    """The caches as shuffled pools with one page of NaN; entries that nobody may follow point outside the pool: past
    the lengths, or where heads pick their blocks those of pages that nobody picked.
    """
    arrays = dict(inputs.arrays)
    caches = [name for name in CACHES[op] if arrays[name] is not None]
    first = arrays[caches[0]]
    B, S = first.shape[:2]
    if op == "decode_block_sparse":
        unread = np.isnan(first.astype(np.float32)).reshape(B, S // page, -1).all(axis=2)
    else:
        unread = np.arange(S // page) >= -(-arrays["lengths"][:, None] // page)
    order = rng.permutation(B * S // page).astype(np.int32)
    for name in caches:
        pool = np.full((B * S // page + 1, page, *arrays[name].shape[2:]), np.nan, arrays[name].dtype)
        pool[order] = arrays[name].reshape(-1, *pool.shape[1:])
        arrays[name] = pool
    table = np.where(unread, np.int32(10**6), order.reshape(B, -1))
    return Inputs(arrays, {**inputs.options, "page_table": table})


# --- in two calls, whose shapes are those of one, so that nothing compiles again


def _split_parts(backend: Backend, draw: Draw, inputs: Inputs) -> tuple[np.ndarray, ...]:
    outs, lses = inputs.arrays["outs"].astype(np.float32), inputs.arrays["lses"]  # parts are not rounded twice
    first = np.arange(len(outs)) < draw.at
    kept = [np.where(mine[:, None, None, None], lses, -np.inf).astype(lses.dtype) for mine in (first, ~first)]
    return _merged(backend, [backend.call("merge_states", Inputs({"outs": outs, "lses": some}, {})) for some in kept])


def _split_lists(backend: Backend, draw: Draw, inputs: Inputs) -> tuple[np.ndarray, ...]:
    name = LISTS[draw.case.op]
    lists = inputs.arrays[name]
    first = np.arange(lists.shape[-1]) < draw.at
    some = [{**inputs.arrays, name: np.where(mine, lists, -1)} for mine in (first, ~first)]
    return _two_calls(backend, draw, some, inputs.options)


def _split_cache(backend: Backend, draw: Draw, inputs: Inputs) -> tuple[np.ndarray, ...]:
    lengths, caches = inputs.arrays["lengths"], CACHES[draw.case.op]
    before = {**inputs.arrays, "lengths": np.minimum(lengths, draw.at)}
    after = {n: _from(a, draw.at) if n in caches else a for n, a in inputs.arrays.items()}
    return _two_calls(backend, draw, [before, {**after, "lengths": np.maximum(lengths - draw.at, 0)}], inputs.options)


def _two_calls(backend: Backend, draw: Draw, arrays: list[dict], options) -> tuple[np.ndarray, ...]:
    """Two partial results in float32, joined by the backend's own merge_states; one call carries the sink, and the
    other one that is too small to count.
    """
    options = {**options, "out_dtype": "float32"}
    small = {"sinks": np.full_like(options["sinks"], -1e4)} if "sinks" in options else {}
    calls = zip(arrays, (options, options | small), strict=True)
    return _merged(backend, [backend.call(draw.case.op, Inputs(*call)) for call in calls])


def _merged(backend: Backend, parts: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    outs, lses = (np.stack(both).astype(np.float32) for both in zip(*parts, strict=True))
    return backend.call("merge_states", Inputs({"outs": outs, "lses": lses}, {}))


def _from(array: np.ndarray, at: int) -> np.ndarray:
    """Slots from `at` on, moved to the front of a cache that ends with NaN, or with codes that mean nothing."""
    rest = np.full_like(array[:, :at], np.nan if array.dtype.kind != "i" else 99)
    return np.concatenate([array[:, at:], rest], axis=1)


def _split_keys(backend: Backend, draw: Draw, inputs: Inputs) -> tuple[np.ndarray, ...]:
    """The scores of the keys before slot `at`, then those of the others."""
    at, lengths, size = draw.at, inputs.arrays["lengths"], draw.case.options.get("block_size", 1)
    before = {**inputs.arrays, "lengths": np.minimum(lengths, at)}
    after = {**inputs.arrays, "k_index": _from(inputs.arrays["k_index"], at), "lengths": np.maximum(lengths - at, 0)}
    options = {n: _from(o, at) if n == "k_scale" else o for n, o in inputs.options.items()}
    (first,) = backend.call(draw.case.op, Inputs(before, inputs.options))
    (second,) = backend.call(draw.case.op, Inputs(after, options))
    return (np.concatenate([first[..., : at // size], second[..., : first.shape[-1] - at // size]], axis=-1),)


def _split_scores(backend: Backend, draw: Draw, inputs: Inputs) -> tuple[np.ndarray, ...]:
    """The picks among those of the scores before `at` and those of the others."""
    scores = inputs.arrays["scores"]
    first = np.arange(scores.shape[-1]) < draw.at
    halves = [np.where(mine, scores, -np.inf).astype(scores.dtype) for mine in (first, ~first)]
    picks = [backend.call("topk_indices", Inputs({"scores": half}, inputs.options))[0] for half in halves]
    picks = np.concatenate(picks, axis=-1).astype(np.int64)
    if not scores.size:
        return (picks[..., : inputs.options["k"]],)
    kept = np.where(picks < 0, -np.inf, np.take_along_axis(scores, picks, -1)).astype(scores.dtype)
    return (_there(picks, backend.call("topk_indices", Inputs({"scores": kept}, inputs.options))[0]),)


def _shuffled_scores(backend: Backend, inputs: Inputs, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """The picks among scores in another order, as places in the old one."""
    scores = inputs.arrays["scores"]
    order = rng.permutation(scores.shape[-1])
    (got,) = backend.call("topk_indices", Inputs({"scores": scores[..., order]}, inputs.options))
    return (_there(np.broadcast_to(order, scores.shape), got),) if scores.size else (got,)


def _there(places: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """places[picks] on the last axis; -1 stays."""
    picks = picks.astype(np.int64)
    return np.where(picks < 0, picks, np.take_along_axis(places, np.maximum(picks, 0), -1))


def _two_tokens(backend: Backend, draw: Draw, inputs: Inputs) -> tuple[Inputs, tuple[np.ndarray, ...]]:
    """Another token after the first one, with the state that the first left."""
    second = inputs_of(Draw(draw.case, draw.dtype, draw.seed + 2**17))
    state = backend.call("decode_linear", inputs)[1].astype(np.float32)
    got = backend.call("decode_linear", Inputs({**second.arrays, "state": state}, second.options))
    exact = oracle.decode_linear(*inputs.arrays.values(), **inputs.options)[1]
    return Inputs({**second.arrays, "state": exact}, second.options), got


SPLIT = {
    "decode_attention": _split_cache,
    "decode_block_sparse": _split_lists,
    "decode_mla": _split_cache,
    "decode_sparse_mla": _split_lists,
    "index_scores": _split_keys,
    "block_index_scores": _split_keys,
    "topk_indices": _split_scores,
    "merge_states": _split_parts,
}
