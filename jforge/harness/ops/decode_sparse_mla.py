"""decode_sparse_mla: absorbed latent attention over the tokens that a list names."""

from functools import partial

import numpy as np

from jforge.harness import draws, questions, views
from jforge.harness.op import Case, Draw, Fuzz, Inputs, Op, Work
from jforge.harness.ops import decode_block_sparse

NAME, LISTS = "decode_sparse_mla", "indices"
CACHES = ("latent", "k_rope")


def oracle(q_latent, q_rope, latent, k_rope, indices, *, latent_scale=None, **options):
    """(out, lse) in float64: a token gather with one key head, [latent | k_rope], whose values are the latent."""
    q_latent, q_rope, k_rope = (np.asarray(a, np.float64) for a in (q_latent, q_rope, k_rope))
    latent = draws.meant(latent, latent_scale)
    q = np.concatenate([q_latent, q_rope], axis=-1)
    k = np.concatenate([latent, k_rope], axis=-1)[:, :, None]
    values, lists = latent[:, :, None], indices[:, :, None]
    return decode_block_sparse.oracle(q, k, values, lists, None, block_size=1, **options)


def draw(case: Case, dtype: np.dtype, rng: np.random.Generator) -> Inputs:
    """Lists of L distinct tokens, a few of them -1, in random order; NaN in every slot that no query of a row names."""
    B, T, N, S, C, R, L = (case.sizes[axis] for axis in "BTNSCRL")
    shapes = {"q_latent": (B, T, N, C), "q_rope": (B, T, N, R), "latent": (B, S, C), "k_rope": (B, S, R)}
    arrays = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    indices = np.full((B, T, L), -1, np.int32)
    for b, t in np.ndindex(B, T):
        picks = rng.permutation(S)[: max(0, L - int(rng.integers(5)))] if case.lengths[b] else []
        indices[b, t, : len(picks)] = picks
        rng.shuffle(indices[b, t])
    _poison(arrays, indices)
    options = draws.with_sinks({"scale": (C + R) ** -0.5, **case.options}, N, rng)
    return Inputs({**arrays, LISTS: indices}, options)


def _poison(arrays: dict[str, np.ndarray], indices: np.ndarray) -> None:
    for b in range(len(indices)):
        unread = ~np.isin(np.arange(arrays["latent"].shape[1]), indices[b])
        arrays["latent"][b, unread] = arrays["k_rope"][b, unread] = np.nan


def _case(name, filled, S, N, L, C=128, R=64, *tags, T=1, plan=(), **options) -> Case:
    """filled: how many tokens the list of each row's last query names at most; 0: no list of the row names any."""
    sizes = {"B": len(filled), "T": T, "N": N, "S": S, "C": C, "R": R, "L": L}
    return Case(name, NAME, sizes, filled, options, frozenset(tags), dict(plan))


CASES = (
    _case("sparse_mla_16_heads", (1, 1), 256, 16, 96, 512, 64, "basic"),
    _case("sparse_mla_128_heads", (1,), 128, 128, 64, 512, 64, "basic", "memcheck"),
    _case("sparse_mla_small", (1, 1), 96, 8, 40, 128, 64, "memcheck", T=2, sinks=True),
    _case("sparse_mla_nothing_picked", (0, 1), 64, 16, 16, 128),
)

# --- edges of the kernels' plans

_edge = partial(draws.edge, _case)

MOSAIC_EDGES = (
    # The kernel of few rows: lists of less than a tile, around one and of several, longer than the cache.
    _edge((150, 64, 0), 150, 16, 150, dtype="bfloat16", splits=1),
    _edge((129, 65, 1), 150, 8, 129, splits=2),
    _edge((37, 20), 37, 1, 70),
    _edge((1, 0), 300, 4, 1),
    # More tiles than the ring has stages, at the model's widths.
    _edge((320,), 330, 16, 320, 512, dtype="bfloat16", splits=1),
    # Sinks with one split and with several, several queries, heads that are no whole boxes of 8.
    _edge((64, 0), 136, 4, 64, T=2, sinks=True, splits=1, out_dtype="float32"),
    _edge((65, 30), 136, 12, 65, T=2, sinks=True, splits=2),
    _edge((63, 7), 70, 11, 63),
    # Narrow latents and rope keys; too many rows for one program of this kernel, and not the other's shape.
    _edge((200,), 264, 4, 200, 64, 16, splits=3),
    _edge((70,), 70, 40, 70, 64, 8),
    # The kernel of many rows: odd and even numbers of tiles, one and more than there are stages, one split and several.
    _edge((60, 0), 150, 64, 60, splits=1),
    _edge((150, 64, 0), 150, 64, 150, dtype="bfloat16", splits=1),
    _edge((400,), 400, 64, 400, splits=1),
    _edge((250, 100), 250, 40, 250, splits=2),
    _edge((70,), 72, 128, 70, dtype="bfloat16", sinks=True, splits=1),
    # At the model's widths.
    _edge((256,), 330, 128, 256, 512, dtype="bfloat16", splits=1),
    # Blocks of 64 rows that are not full: final in 16 bits, final in float32, partial; several queries.
    _edge((64, 9), 70, 48, 64, sinks=True),
    _edge((70,), 70, 40, 70, 256, 32, out_dtype="float32"),
    _edge((140,), 150, 40, 140, T=2, sinks=True, splits=3),
    _edge((70,), 70, 64, 70, T=2, splits=1, out_dtype="float32"),
)

TRITON_EDGES = (
    # Empty, partly and wholly used lists, shorter and longer than a tile, for few rows and for a block of 64.
    *(_edge((0, 1, L - 1, L), 250, N, L, 32, 8, dtype=dtype)
      for dtype in ("float16", "float32") for N, L in ((4, 1), (4, 31), (4, 33), (4, 200), (33, 70))),
    # Heads that fill a block of rows in part, one block, and several; every query has a list of its own.
    *(_edge((9, 40)[-1 - (N < 80) :], 90, N, 40, 32, 8, dtype=dtype, T=T)
      for dtype in ("float16", "float32") for N, T in ((1, 1), (1, 3), (5, 2), (16, 1), (20, 2), (80, 1), (128, 2))),
    # Widths, padded and not.
    *(_edge(filled, S, 3, L, C, R, dtype=dtype)
      for C, R in ((64, 16), (16, 4), (48, 24), (128, 64), (512, 64))
      for filled, S, L, dtype in (((33, 70), 70, 70, "float16"), ((20,), 40, 33, "float32"))),
    # The widths of DeepSeek-V3.2 at both ends of the head counts.
    *(_edge((100, 7), 400, N, 100, 512, sinks=True) for N in (16, 128)),
    # A sink enters once, whether the kernel folds it or the merge, and alone where a list is empty.
    *(_edge((0, 1, L - 3), 400, 6, L, 32, 8, sinks=True, **more)
      for L in (20, 300) for more in ({"out_dtype": "float32"}, {})),
    # One split, and so many that some have no entry to read, for both orders of copies.
    *(_edge((1, 130, 160), 200, 20, 160, 16, 8, sinks=True,
            plan={"block_n": 32, "rows": rows, "early": early, "min_split": least, "ctas_per_sm": 4})
      for rows in (16, 64) for early, least in ((False, 2**20), (False, 32), (True, 64))),
    # No slots, and no rows.
    _edge((0, 0), 0, 4, 5, 32, 8),
    _edge((), 9, 4, 5, 32, 8),
)  # fmt: skip

# --- fuzz

# B, T, N, S, C, R, L, the dtype of a latent with scales: more entries than slots, no slots at all, and rows that are
# too wide for the kernels or no multiple of what Pallas takes
SIZES = (
    (2, 1, 4, 96, 64, 16, 20, None), (2, 2, 8, 40, 64, 16, 9, None), (1, 3, 5, 33, 64, 8, 40, None),
    (1, 1, 64, 32, 128, 64, 24, None), (3, 1, 1, 72, 64, 16, 130, None), (2, 1, 3, 16, 80, 12, 5, None),
    (1, 1, 2, 24, 520, 8, 10, None), (2, 1, 4, 0, 64, 16, 7, None), (2, 2, 4, 40, 64, 16, 20, "int8"),
    (2, 1, 3, 40, 64, 16, 12, "float8_e4m3fn"),
)  # fmt: skip
# The kernel of few rows with one box and with two, and the kernel of many; one tile of a list and two.
MOSAIC = (
    (2, 1, 4, 40, 64, 16, 20, None), (1, 2, 12, 24, 64, 64, 9, None), (1, 1, 40, 24, 128, 16, 20, None),
    (2, 1, 1, 80, 64, 8, 70, None), (1, 1, 3, 40, 64, 16, 9, None), (1, 1, 8, 33, 64, 24, 33, None),
)  # fmt: skip


def question(draw, st, sizes, dtypes: tuple[str, ...], out: tuple[str, ...]) -> Draw:
    """lengths: how many tokens the list of a row's last query names; those of the others name no more."""
    *chosen, stored = draw(st.sampled_from(sizes))
    chosen = dict(zip("BTNSCRL", chosen, strict=True))
    B, L = chosen["B"], chosen["L"]
    strategies = questions.common(st, chosen["C"] + chosen["R"], out) | {"chunk": st.sampled_from((16, 64, 100))}
    if sizes is MOSAIC:  # all of the options or none, so that fewer calls are new
        options = {name: draw(strategy) for name, strategy in strategies.items()} if draw(st.booleans()) else {}
    else:
        options = questions.optional(draw, st, **strategies)
    lengths = tuple(draw(questions.near(st, L, 64)) for _ in range(B))
    places = {"alone": st.integers(0, B - 1), "split": st.integers(0, L)}
    case = Case("fuzz", NAME, chosen, lengths, options)
    return questions.put(draw, st, case, dtypes, VIEWS, places, None if stored else questions.values(st), stored)


def change(draw: Draw, inputs: Inputs, rng: np.random.Generator) -> Inputs:
    """At most lengths[b] tokens in the list of row b's last query, perhaps fewer in the others, and NaN in the slots
    that no list names any more.
    """
    inputs = draws.huge(draw, inputs, rng, queries=("q_latent", "q_rope"), keys=("latent", "k_rope"))
    arrays, lengths = dict(inputs.arrays), draw.case.lengths
    B, T, L = arrays[LISTS].shape
    for b, t in np.ndindex(B, T):
        kept = lengths[b] if t == T - 1 else rng.integers(lengths[b] + 1)
        arrays[LISTS][b, t, rng.permutation(L)[kept:]] = -1
    _poison(arrays, arrays[LISTS])
    arrays[LISTS] = draws.with_garbage(arrays[LISTS], draw.case.sizes["S"], rng)
    return draws.as_codes(draw, Inputs(arrays, inputs.options), rng, "latent", "latent_scale")


VIEWS = {
    "plain": views.plain,
    "permuted": views.permuted,
    "alone": partial(views.alone, empty={LISTS: -1}),
    "split": partial(views.split_lists, lists=LISTS),
    "shuffled": partial(views.shuffled, lists=LISTS),
}


def _triton(draw: Draw) -> str | None:
    wide = draw.case.sizes["C"] > 512 or draw.case.sizes["R"] > 64
    unscaled = "latent_scale. has no Triton kernel yet"
    return questions.first((bool(draw.stored), unscaled), (wide, "needs more registers"))


def _pallas(draw: Draw) -> str | None:
    B, T, N, S, C, R, L = (draw.case.sizes[axis] for axis in "BTNSCRL")
    return questions.first(
        (bool(draw.stored), "latent_scale is given"),
        (draw.dtype == "float32", questions.TF32),
        (draw.case.options.get("out_dtype") == "float64", "out_dtype is float64"),
        (S == 0, "needs at least one"),
        (L == 0, "needs at least one"),
        (min(B, T, N) == 0 or B * T > 65535, questions.GRID),
        (C % 64 > 0 or not 0 < C <= 512, "must be multiples of 64"),
        (R % 8 > 0 or not 0 < R <= 64, "the kernel takes multiples of 8"),
    )


OP = Op(
    name=NAME, axes={"q_latent": "BTNC", "q_rope": "BTNR", "latent": "BSC", "k_rope": "BSR", LISTS: "BTL"}, draw=draw,
    oracle=oracle, cases=CASES, fuzz=Fuzz(question, SIZES, MOSAIC, VIEWS, change),
    edges={"pallas": MOSAIC_EDGES, "triton": TRITON_EDGES}, refusals={"triton": _triton, "pallas": _pallas},
    caches=CACHES, lists=LISTS, stored="latent",
    moved=lambda B, N, L, C, R, **_: 2 * B * (L * (C + R) + N * (2 * C + R)),
    fill={LISTS: draws.lists},
    bench=tuple(
        Work({"B": B, "N": N, "S": S, "C": 512, "R": 64, "L": L}, {"scale": 192**-0.5})
        for B, N, S, L in ((64, 128, 16384, 2048), (64, 128, 131072, 2048), (64, 64, 32768, 2048))
    ),
    reads=lambda row: f"{row['L']} tokens", invariant=_case("invariance", (1,), 512, 16, 512, sinks=True),
)  # fmt: skip
