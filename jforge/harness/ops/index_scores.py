"""index_scores: the weighted, rectified products of a query's index heads with every index key that it sees; and what
block_index_scores shares with it.

A score is a sum that may cancel, and then float32 has no relative error to be judged by. So the fuzz gives both ops
values whose sums are exact, or whose sums cannot cancel, and compare.py's limit for float32 holds for both.
"""

from functools import partial

import numpy as np

from jforge.core import compare
from jforge.harness import draws, questions, views
from jforge.harness.op import DTYPES, Case, Draw, Fuzz, Inputs, Op, Work

NAME, KEYS = "index_scores", "k_index"
QUANTISED = ("int8", "float8_e4m3fn", "float8_e5m2")


def oracle(q_index, k_index, weights, lengths, *, k_scale=None):
    """(scores,) in float64."""
    q, k, weights = np.asarray(q_index, np.float64), draws.meant(k_index, k_scale), np.asarray(weights, np.float64)
    scores = np.full((*q.shape[:2], k.shape[1]), -np.inf)
    for b, t in np.ndindex(q.shape[:2]):
        end = max(0, int(lengths[b]) - q.shape[1] + t + 1)
        scores[b, t, :end] = weights[b, t] @ np.maximum(q[b, t] @ k[b, :end].T, 0)
    return (scores,)


def draw_keys(case: Case, dtype: np.dtype, rng: np.random.Generator) -> tuple[dict[str, np.ndarray], dict]:
    """(queries and keys, options), NaN in the keys past each length. The option `stored` is the dtype of quantised
    keys.
    """
    B, T, heads, S, J = (case.sizes[axis] for axis in "BTISJ")
    q, k = (rng.standard_normal(shape).astype(dtype) for shape in ((B, T, heads, J), (B, S, J)))
    options = dict(case.options)
    for b, length in enumerate(case.lengths):
        k[b, length:] = np.nan
    if stored := options.pop("stored", None):
        k, options["k_scale"] = draws.quantised(k, stored, 25, rng.uniform(0.02, 0.08, (B, S)))
    return {"q_index": q, KEYS: k}, options


def draw(case: Case, dtype: np.dtype, rng: np.random.Generator) -> Inputs:
    """Signed weights."""
    arrays, options = draw_keys(case, dtype, rng)
    arrays["weights"] = rng.standard_normal([case.sizes[axis] for axis in "BTI"]).astype(np.float32)
    return Inputs({**arrays, "lengths": np.array(case.lengths, np.int32)}, options)


def case(name, op, B, heads, S, J, lengths, *tags, T=1, plan=(), **options) -> Case:
    sizes = {"B": B, "T": T, "I": heads, "S": S, "J": J}
    return Case(name, op, sizes, lengths, options, frozenset(tags), dict(plan))


CASES = (
    case("index_64_heads", NAME, 2, 64, 256, 128, (256, 100), "basic"),
    case("index_5_heads", NAME, 3, 5, 136, 64, (136, 0, 7), "memcheck"),
    case("index_two_queries", NAME, 2, 8, 128, 64, (128, 1), T=2),
    case("index_int8_keys", NAME, 2, 8, 136, 64, (136, 70), "memcheck", stored="int8"),
)

# --- edges of the kernels' plans


def edge(op, lengths, S, heads=4, J=64, *, dtype="float16", stored=None, splits=0, plan=(), **more) -> Draw:
    """An example of either op."""
    plan = {"splits": splits} if splits else plan
    example = case("edge", op, len(lengths), heads, S, J, lengths, plan=plan, **more)
    return Draw(example, dtype, 0, values="coarse", stored=stored)


AROUND_A_TILE = (0, 1, 63, 64, 65, 136)
MOSAIC_EDGES = (
    # Heads that fill boxes and that do not, one split and several.
    edge(NAME, AROUND_A_TILE, 136, 8, splits=1),
    edge(NAME, (136, 70, 0), 136, 8, 128, dtype="bfloat16", splits=2),
    edge(NAME, (136, 0, 75), 136, 5, splits=3),
    edge(NAME, (136, 75), 136, 4, 128),
    edge(NAME, (70,), 72, 12, 80, dtype="bfloat16"),
    edge(NAME, (70,), 128, 1, 16),
    # More tiles than the ring has, a cache of less than one tile, heads that need two accumulators.
    edge(NAME, (840, 100), 840, 8, splits=1),
    edge(NAME, (5, 0), 8),
    edge(NAME, (70,), 72, 136),
    # Several queries: some see nothing, in one program and in several.
    edge(NAME, (1, 64, 136), 136, 5, T=2, splits=2),
    edge(NAME, (2, 67), 72, 8, T=8),
    edge(NAME, (70,), 72, 64, 128, T=4, dtype="bfloat16"),
    # Keys of 8 bits.
    edge(NAME, (136, 75), 136, 8, 128, dtype="bfloat16", stored="float8_e4m3fn"),
    edge(NAME, (136, 0), 136, 5, T=2, stored="float8_e5m2"),
    edge(NAME, (600,), 840, dtype="bfloat16", stored="int8", splits=1),
    edge(NAME, (70,), 72, 4, 96, stored="int8"),
)

SMALL = {"block_n": 32, "num_stages": 2, "ctas_per_sm": 1, "min_split": 32}  # several tiles in a short row


def triton_edges(op: str, size: int = 0) -> tuple[Draw, ...]:
    """Those of either op; `size` is of a block."""
    of = partial(edge, op, **({"block_size": size} if size else {}))
    both = ("float16", "float32")
    return (
        # Rows that end before, at and after the edge of a tile, of 128 keys and of 32; no row, no keys.
        of((0, 1, 127, 128, 129, 263), 263, 3, 24),
        of((0, 1, 31, 32, 33, 71), 71, 3, 24, dtype="float32"),
        of((0, 0), 0, 3, 24),
        of((), 4, 3, 24),
        # Every query sees one key more than the one before it; some see nothing.
        *(of((1, T, 33, 70), 70, 3, 24, T=T, plan=SMALL) for T in (2, 5)),
        # Heads and channels, padded and not.
        *(of((70, 9), 70, heads, 24, dtype=dtype) for heads in (1, 5, 16, 33, 64, 130) for dtype in both),
        *(of((70, 9), 70, 8, J, dtype=dtype) for J in (1, 16, 80, 128, 200) for dtype in both),
        # Scales of either sign: they multiply before the relu, and before the maximum.
        *(of((0, 40, 70), 70, 3, 24, T=2, dtype=dtype, stored=stored) for stored in QUANTISED for dtype in both),
    )


TRITON_EDGES = triton_edges(NAME)

# --- fuzz

# B, T, I, S, J: one box of heads, several and a part of one; no keys at all; 67 slots, and widths of 24 and 272, which
# Pallas refuses; more heads, and more bytes of heads, than Triton takes
SIZES = (
    (2, 1, 8, 136, 64), (2, 1, 5, 72, 32), (1, 2, 4, 128, 64), (3, 1, 1, 40, 16), (2, 3, 3, 67, 64),
    (1, 1, 64, 264, 128), (2, 4, 8, 64, 64), (2, 1, 4, 200, 24), (1, 1, 12, 136, 80), (2, 2, 136, 16, 8),
    (2, 1, 4, 0, 64), (1, 1, 3, 24, 272), (1, 1, 264, 8, 256), (1, 1, 256, 8, 256),
)  # fmt: skip
MOSAIC = (
    (2, 1, 8, 72, 64), (1, 2, 5, 72, 32), (1, 1, 12, 64, 80), (3, 1, 1, 8, 64), (1, 1, 4, 136, 32), (1, 3, 3, 67, 64),
)  # fmt: skip


def question(draw, st, sizes, dtypes: tuple[str, ...], out: tuple[str, ...]) -> Draw:
    return ask(draw, st, NAME, dict(zip("BTISJ", draw(st.sampled_from(sizes)), strict=True)), {}, dtypes)


def ask(draw, st, op: str, sizes: dict[str, int], options: dict, dtypes: tuple[str, ...]) -> Draw:
    """A question of either op."""
    view = draw(st.sampled_from(tuple(VIEWS)))
    if view == "split":  # with more queries, the keys of a part end elsewhere for each of them
        sizes = sizes | {"T": 1}
    B, T, S = (sizes[axis] for axis in "BTS")
    block = options.get("block_size", 64)
    row = questions.near(st, S, block, 64, 128, S // block * block, also=(T - 1, T))
    lengths = tuple(draw(row) for _ in range(B))
    cut = st.integers(0, S // block).map(lambda e: e * block) if "block_size" in options else st.integers(0, S)
    at = draw({"alone": st.integers(0, B - 1), "split": cut}.get(view, st.just(0)))
    values, stored = draw(st.sampled_from(("coarse", "positive"))), draw(st.sampled_from((None, None, *QUANTISED)))
    case = Case("fuzz", op, sizes, lengths, options)
    return Draw(case, draw(st.sampled_from(dtypes)), draw(questions.seeds(st)), view, at, values, stored)


def change(draw: Draw, inputs: Inputs, rng: np.random.Generator) -> Inputs:
    of = np.abs if draw.values == "positive" else _coarse
    arrays = {name: a if name == "lengths" else of(a) for name, a in inputs.arrays.items()}
    return draws.as_codes(draw, Inputs(arrays, inputs.options), rng, KEYS, "k_scale")


def _coarse(x: np.ndarray) -> np.ndarray:
    """Quarters, so that sums of products are exact in float32; NaN stays."""
    return (np.round(4 * x.astype(np.float32)) / 4).astype(x.dtype)


def _split(backend, draw: Draw, inputs: Inputs) -> views.Answer:
    """The scores of the keys before slot `at`, then those of the others."""
    at, lengths, size = draw.at, inputs.arrays["lengths"], draw.case.options.get("block_size", 1)
    before = {**inputs.arrays, "lengths": np.minimum(lengths, at)}
    after = {**inputs.arrays, KEYS: views.moved_up(inputs.arrays[KEYS], at), "lengths": np.maximum(lengths - at, 0)}
    options = {n: views.moved_up(o, at) if n == "k_scale" else o for n, o in inputs.options.items()}
    (first,) = backend.call(draw.case.op, Inputs(before, inputs.options))
    (second,) = backend.call(draw.case.op, Inputs(after, options))
    return inputs, (np.concatenate([first[..., : at // size], second[..., : first.shape[-1] - at // size]], axis=-1),)


VIEWS = {
    "plain": views.plain,
    "permuted": views.permuted,
    "alone": partial(views.alone, empty={"lengths": 0}),
    "split": _split,
}


def triton(draw: Draw) -> str | None:
    heads, dim = draw.case.sizes["I"], draw.case.sizes["J"]
    padded = 2 ** (heads - 1).bit_length() * 2 ** (dim - 1).bit_length()
    size = padded * DTYPES[draw.dtype].itemsize
    return questions.first((max(heads, dim) > 256, "needs more registers"), (size > 2**17, "need more shared memory"))


def pallas(draw: Draw) -> str | None:
    """What both ops refuse."""
    B, T, heads, S, J = (draw.case.sizes[axis] for axis in "BTISJ")
    whole = 32 if draw.stored else 16
    return questions.first(
        (draw.dtype == "float32", questions.TF32),
        (S == 0 or S % 8 > 0, questions.SLOTS),
        (J % whole > 0 or not 0 < J <= 256, "the kernel takes multiples of"),
        (min(B, T, heads) == 0 or B > 65535, questions.GRID),
    )


def _pallas(draw: Draw) -> str | None:
    heads, J = draw.case.sizes["I"], draw.case.sizes["J"]
    box = next((g for g in range(8, 0, -1) if heads % g == 0), 1)
    return pallas(draw) or ("heads of one query must fit" if 16 * (heads // box) * J > 2**17 else None)


OP = Op(
    name=NAME, axes={"q_index": "BTIJ", KEYS: "BSJ", "weights": "BTI", "lengths": "B"}, draw=draw, oracle=oracle,
    cases=CASES, fuzz=Fuzz(question, SIZES, MOSAIC, VIEWS, change, exact=True, same_bits=True),
    results={"scores": "BTS"}, metrics=(compare.worst_row,),
    edges={"pallas": MOSAIC_EDGES, "triton": TRITON_EDGES},
    refusals={"triton": triton, "pallas": _pallas}, caches=(KEYS,), stored="k", attends=False,
    moved=lambda B, I, S, J: B * (2 * (I + S) * J + 4 * S),  # noqa: E741
    fill={"weights": draws.float32}, bench=(Work({"B": 16, "I": 64, "S": 65536, "J": 128}, {}),),
    reads=lambda row: "all index keys",
)  # fmt: skip
