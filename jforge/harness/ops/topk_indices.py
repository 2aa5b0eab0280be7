"""topk_indices: the places of the k best scores of a row."""

import math

import ml_dtypes
import numpy as np

from jforge.core import compare
from jforge.harness import questions, views
from jforge.harness.op import DTYPES, Case, Draw, Fuzz, Inputs, Op

NAME = "topk_indices"


def oracle(scores, k):
    """(picks,): NaN first, then descending scores, of equals the lower index first; -1 for -inf and past the end."""
    scores = np.asarray(scores, np.float64)
    broken = np.isnan(scores)
    order = np.lexsort((np.where(broken, 0, -scores), ~broken), axis=-1)[..., :k]
    picks = np.where(np.take_along_axis(scores, order, -1) == -np.inf, -1, order)
    missing = [(0, 0)] * (picks.ndim - 1) + [(0, k - picks.shape[-1])]
    return (np.pad(picks, missing, constant_values=-1).astype(np.float64),)


def draw(case: Case, dtype: np.dtype, rng: np.random.Generator) -> Inputs:
    return _drawn(case, dtype, rng, next((values for values in VALUES if values in case.tags), "coarse"))


def _drawn(case: Case, dtype: np.dtype, rng: np.random.Generator, values: str) -> Inputs:
    """As many scores above -inf as a row's length says, some of them +inf; coarse ones tie, 0.0 with -0.0 too; tiny
    ones are a few steps of the dtype round 0; broken ones hold NaN of either sign.
    """
    *axes, S = case.sizes.values()
    scores = rng.standard_normal((len(case.lengths), S))
    scores = np.round(2 * scores) / 2 if values == "coarse" else scores
    scores = np.round(9 * scores) * float(ml_dtypes.finfo(dtype).smallest_subnormal) if values == "tiny" else scores
    scores[rng.random(scores.shape) < 0.02] = np.inf
    if values == "broken":
        signed = np.copysign(np.nan, rng.standard_normal(scores.shape))
        scores = np.where(rng.random(scores.shape) < 0.1, signed, scores)
    for row, length in zip(scores, case.lengths, strict=True):
        row[rng.permutation(S)[length:]] = -np.inf
    return Inputs({"scores": scores.reshape(*axes, S).astype(dtype)}, dict(case.options))


def _case(name: str, B: int, S: int, k: int, lengths: tuple[int, ...], *tags: str) -> Case:
    return Case(name, NAME, {"B": B, "S": S}, lengths, {"k": k}, frozenset(tags))


CASES = (
    _case("topk_of_many", 2, 1030, 64, (1030, 40), "basic"),
    _case("topk_more_than_there_are", 3, 7, 9, (7, 0, 3), "basic"),
    _case("topk_of_denormals", 2, 70, 16, (70, 9), "basic", "tiny"),
    _case("topk_of_nan", 2, 1030, 16, (1030, 700), "basic", "broken"),
)

# --- edges of the kernels' plans: more scores than a program takes, as many picks as scores and more; ties, 0.0 and
# -0.0, infinities, and NaN of either sign; one row of scores, none of them, and no rows


def _edge(sizes: dict, k: int, lengths: tuple[int, ...], dtype: str, values: str = "coarse") -> Draw:
    return Draw(Case("edge", NAME, sizes, lengths, {"k": k}), dtype, 0, values=values)


TRITON_EDGES = (
    *(_edge({"B": 2, "T": 2, "S": 1500}, k, (1500, 5, 0, 700), dtype, values)
      for k in (1, 8, 1030, 1500, 1600) for dtype in ("float16", "bfloat16", "float32")
      for values in ("coarse", "broken")),
    # Not in bfloat16, whose denormals Triton's interpreter reads as other numbers.
    *(_edge({"B": 2, "T": 2, "S": 1500}, k, (1500, 5, 0, 700), dtype, "tiny")
      for k in (8, 1500) for dtype in ("float16", "float32")),
    _edge({"S": 4}, 6, (3,), "float32"),
    _edge({"S": 0}, 2, (0,), "float32"),
    _edge({"B": 0, "S": 4}, 2, (), "float32"),
)  # fmt: skip

# --- fuzz

VALUES = ("coarse", "normal", "tiny", "broken")
# The axes before S, and S: one row and many, one score, none, and more scores than one program of Triton's takes
SIZES = (((), 7), ((3,), 40), ((2, 2), 64), ((2, 1, 3), 17), ((2,), 1030), ((2,), 1), ((3,), 0), ((2, 3), 128))


def question(draw, st, sizes, dtypes: tuple[str, ...], out: tuple[str, ...]) -> Draw:
    """lengths: how many scores of a row are above -inf."""
    axes, S = draw(st.sampled_from(sizes))
    chosen = dict(zip("BTI", axes, strict=False)) | {"S": S}
    k = draw(st.sampled_from(sorted(k for k in {1, 2, S // 2, S - 1, S, S + 1, S + 5} if k > 0)))
    lengths = tuple(draw(questions.near(st, S, k)) for _ in range(math.prod(axes)))
    view = draw(st.sampled_from(tuple(VIEWS)))
    at = draw(st.integers(0, S)) if view == "split" else 0
    case = Case("fuzz", NAME, chosen, lengths, {"k": k})
    values = draw(st.sampled_from(VALUES))
    return Draw(case, draw(st.sampled_from(dtypes)), draw(questions.seeds(st)), view, at, values)


def change(draw: Draw, inputs: Inputs, rng: np.random.Generator) -> Inputs:
    return _drawn(draw.case, DTYPES[draw.dtype], rng, draw.values)


def judge(draw: Draw, inputs: Inputs, got: tuple[np.ndarray, ...]) -> str | None:
    """What is wrong with the picks. Their order is fixed; only where the scores were shuffled may equal ones have
    swapped.
    """
    scores, (got,), want = inputs.arrays["scores"].astype(np.float64), got, OP.truth(inputs)[0].astype(np.int64)
    if got.shape != want.shape or (got != got.astype(np.int64)).any():
        return f"is wrong: picks of shape {got.shape}, which are to be {want.shape} integers"
    got = got.astype(np.int64)
    if draw.view != "shuffled":
        different = (got != want).any(axis=-1).sum()
        return f"is wrong: {different} rows of picks" if different else None
    ascending = np.sort(got, axis=-1)
    twice = (ascending[..., 1:] == ascending[..., :-1]) & (ascending[..., 1:] >= 0)
    if (got < -1).any() or (got >= scores.shape[-1]).any() or twice.any() or ((got < 0) != (want < 0)).any():
        return "is wrong: picks that are no tokens, or the same token twice"
    padded = np.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(0, 1)], constant_values=-np.inf)
    picked, best = (np.take_along_axis(padded, picks, -1) for picks in (got, want))  # -1 takes the -inf at the end
    return None if np.array_equal(picked, best, equal_nan=True) else "is wrong: picks of other scores"


def _permuted(backend, draw: Draw, inputs: Inputs) -> views.Answer:
    one_row = inputs.arrays["scores"].ndim == 1
    return (views.plain if one_row else views.permuted)(backend, draw, inputs)


def _split(backend, draw: Draw, inputs: Inputs) -> views.Answer:
    """The picks among those of the scores before `at` and those of the others."""
    scores = inputs.arrays["scores"]
    first = np.arange(scores.shape[-1]) < draw.at
    halves = [np.where(mine, scores, -np.inf).astype(scores.dtype) for mine in (first, ~first)]
    picks = [backend.call(NAME, Inputs({"scores": half}, inputs.options))[0] for half in halves]
    picks = np.concatenate(picks, axis=-1).astype(np.int64)
    if not scores.size:
        return inputs, (picks[..., : inputs.options["k"]],)
    kept = np.where(picks < 0, -np.inf, np.take_along_axis(scores, picks, -1)).astype(scores.dtype)
    return inputs, (_there(picks, backend.call(NAME, Inputs({"scores": kept}, inputs.options))[0]),)


def _shuffled(backend, draw: Draw, inputs: Inputs) -> views.Answer:
    """The picks among scores in another order, as places in the old one."""
    scores = inputs.arrays["scores"]
    order = np.random.default_rng(draw.seed).permutation(scores.shape[-1])
    (got,) = backend.call(NAME, Inputs({"scores": scores[..., order]}, inputs.options))
    return inputs, (_there(np.broadcast_to(order, scores.shape), got),) if scores.size else (got,)


def _there(places: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """places[picks] on the last axis; -1 stays."""
    picks = picks.astype(np.int64)
    return np.where(picks < 0, picks, np.take_along_axis(places, np.maximum(picks, 0), -1))


VIEWS = {"plain": views.plain, "permuted": _permuted, "split": _split, "shuffled": _shuffled}

OP = Op(
    name=NAME, axes={"scores": "BTS"}, draw=draw, oracle=oracle, cases=CASES,
    fuzz=Fuzz(question, SIZES, SIZES, VIEWS, change, judge=judge), edges={"triton": TRITON_EDGES},
    results={"picks": "BL"}, metrics=(compare.different,), attends=False,
)  # fmt: skip
