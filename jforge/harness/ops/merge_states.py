"""merge_states: partial attentions of the same queries joined by their log-sum-exps."""

from functools import partial

import numpy as np

from jforge.harness import draws, questions, views
from jforge.harness.op import DTYPES, Case, Draw, Fuzz, Inputs, Op

NAME = "merge_states"


def oracle(outs, lses):
    """(out, lse) in float64."""
    outs, lses = np.asarray(outs, np.float64), np.asarray(lses, np.float64)
    out, lse = np.zeros(outs.shape[1:]), np.full(lses.shape[1:], -np.inf)
    for index in np.ndindex(lse.shape):
        parts = [p for p in range(len(lses)) if lses[(p, *index)] > -np.inf]
        if parts:
            logs = np.array([lses[(p, *index)] for p in parts])
            top = logs.max()
            weights = np.exp(logs - top)
            out[index] = sum(w * outs[(p, *index)] for w, p in zip(weights, parts, strict=True)) / weights.sum()
            lse[index] = top + np.log(weights.sum())
    return out, lse


def draw(case: Case, dtype: np.dtype, rng: np.random.Generator) -> Inputs:
    """Part p of row b is empty where p >= lengths[b]: NaN with lse = -inf."""
    P, B, T, N, V = (case.sizes[axis] for axis in "PBTNV")
    outs = rng.standard_normal((P, B, T, N, V)).astype(dtype)
    lses = (3 * rng.standard_normal((P, B, T, N))).astype(np.float64 if dtype.itemsize == 8 else np.float32)
    for row, parts in enumerate(case.lengths):
        outs[parts:, row], lses[parts:, row] = np.nan, -np.inf
    return Inputs({"outs": outs, "lses": lses}, {})


def _case(name, P, B, T, N, V, lengths, *tags, plan=()) -> Case:
    sizes = {"P": P, "B": B, "T": T, "N": N, "V": V}
    return Case(name, NAME, sizes, lengths, {}, frozenset(tags), dict(plan))


CASES = (
    _case("merge_two", 2, 2, 1, 8, 128, (2, 1), "basic", "demo"),
    _case("merge_many", 5, 3, 2, 4, 64, (5, 0, 3), "basic", "memcheck"),
)

# --- edges of the kernels' plans: two groups of parts (more than 32), one part, rows that are no whole number of 64
# columns
MOSAIC_EDGES = tuple(
    Draw(_case("edge", P, 3, 2, 2, V, (P, P // 2, 0)), dtype, 0)
    for P, V, dtype in (
        (3, 128, "float32"), (1, 64, "float16"), (5, 80, "bfloat16"), (34, 64, "float32"), (2, 256, "float16"),
    )
)  # fmt: skip

# One part, one block of parts and several, rows of several widths
TRITON_EDGES = tuple(
    Draw(_case("edge", P, 3, 2, 3, V, (P, P // 2, 0)), dtype, 0)
    for P, V in ((1, 64), (3, 80), (33, 24), (70, 128))
    for dtype in ("float16", "float32")
)

# --- fuzz

# P, B, T, N, V: rows of 12 values are not a multiple of 16 bytes in 16 bits, 40 parts are more than one TMA copy
SIZES = ((1, 2, 1, 3, 64), (3, 2, 2, 1, 128), (7, 2, 1, 2, 64), (2, 3, 1, 2, 12), (4, 1, 2, 1, 256), (40, 2, 1, 1, 64))


def question(draw, st, sizes, dtypes: tuple[str, ...], out: tuple[str, ...]) -> Draw:
    chosen = dict(zip("PBTNV", draw(st.sampled_from(sizes)), strict=True))
    lengths = tuple(draw(st.integers(0, chosen["P"])) for _ in range(chosen["B"]))
    places = {"split": st.integers(0, chosen["P"])}
    return questions.put(draw, st, Case("fuzz", NAME, chosen, lengths), dtypes, VIEWS, places, questions.values(st))


def change(draw: Draw, inputs: Inputs, rng: np.random.Generator) -> Inputs:
    if draw.values != "huge":
        return inputs
    lses = inputs.arrays["lses"]
    order = np.array([draws.levels(len(lses), rng) for _ in range(lses[0].size)]).T.reshape(lses.shape)
    far = (rng.choice(draws.MAGNITUDES) * order).astype(lses.dtype)
    return Inputs({**inputs.arrays, "lses": np.where(np.isneginf(lses), lses, far)}, inputs.options)


def _split(backend, draw: Draw, inputs: Inputs) -> views.Answer:
    """The parts before `at`, then the others, in float32: parts are not rounded twice."""
    outs, lses = inputs.arrays["outs"].astype(np.float32), inputs.arrays["lses"]
    first = np.arange(len(outs)) < draw.at
    kept = [np.where(mine[:, None, None, None], lses, -np.inf).astype(lses.dtype) for mine in (first, ~first)]
    return inputs, backend.merge([backend.call(NAME, Inputs({"outs": outs, "lses": some}, {})) for some in kept])


VIEWS = {"plain": views.plain, "permuted": partial(views.permuted, axis=1), "split": _split}


def _pallas(draw: Draw) -> str | None:
    itemsize = 4 if draw.view == "split" else DTYPES[draw.dtype].itemsize
    return "multiple of 16 bytes" if draw.case.sizes["V"] * itemsize % 16 else None


OP = Op(
    name=NAME, axes={"outs": "PBTNV", "lses": "PBTN"}, draw=draw, oracle=oracle, cases=CASES,
    fuzz=Fuzz(question, SIZES, SIZES, VIEWS, change, same_bits=True), refusals={"pallas": _pallas},
    edges={"pallas": MOSAIC_EDGES, "triton": TRITON_EDGES},
)  # fmt: skip
