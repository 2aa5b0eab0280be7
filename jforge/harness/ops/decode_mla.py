"""decode_mla: absorbed latent attention of the new queries over one shared head of latents and rope keys."""

from functools import partial

import numpy as np

from jforge.harness import draws, peers, questions, views
from jforge.harness.op import Case, Draw, Fuzz, Inputs, Op, Work
from jforge.harness.ops import decode_attention

NAME = "decode_mla"
CACHES = ("latent", "k_rope")


def oracle(q_latent, q_rope, latent, k_rope, lengths, **options):
    """(out, lse) in float64: attention with one key head, [latent | k_rope], whose values are the latent."""
    q_latent, q_rope, latent, k_rope = (np.asarray(a, np.float64) for a in (q_latent, q_rope, latent, k_rope))
    q = np.concatenate([q_latent, q_rope], axis=-1)
    k = np.concatenate([latent, k_rope], axis=-1)[:, :, None]
    return decode_attention.oracle(q, k, latent[:, :, None], lengths, **options)


def draw(case: Case, dtype: np.dtype, rng: np.random.Generator) -> Inputs:
    B, T, N, S, C, R = (case.sizes[axis] for axis in "BTNSCR")
    shapes = {"q_latent": (B, T, N, C), "q_rope": (B, T, N, R), "latent": (B, S, C), "k_rope": (B, S, R)}
    return draws.over_a_cache(case, dtype, rng, shapes, CACHES, (C + R) ** -0.5)


def _case(name, lengths, S, N, C=128, R=64, *tags, T=1, plan=(), **options) -> Case:
    sizes = {"B": len(lengths), "T": T, "N": N, "S": S, "C": C, "R": R}
    return Case(name, NAME, sizes, lengths, options, frozenset(tags), dict(plan))


CASES = (
    _case("mla_16_heads", (128, 70), 128, 16, 512, 64, "basic"),
    _case("mla_128_heads", (100,), 128, 128, 512, 64, "basic"),
    _case("mla_empty_rows", (0, 1, 64, 65), 128, 16, 128),
    _case("mla_one_head", (128, 3), 128, 1, 128),
    _case("mla_64_heads", (192, 0), 192, 64, 128),
    _case("mla_two_queries", (128, 1), 128, 16, 128, T=2),
    _case("mla_window_sinks", (256, 40), 256, 32, 128, window=70, sinks=True),
    _case("mla_80_heads", (128, 70), 128, 80, 128, 64, "memcheck"),
    _case("mla_chunked", (256, 130, 0), 256, 16, 128, 64, "memcheck", chunk=64),
)

# --- edges of the kernels' plans

_edge = partial(draws.edge, _case)
AROUND_A_TILE = decode_attention.AROUND_A_TILE
MOSAIC_EDGES = (
    # The kernel of few rows: one split and several.
    _edge(AROUND_A_TILE, 136, 16, dtype="bfloat16", splits=1),
    _edge(AROUND_A_TILE, 136, 8, splits=2),
    _edge((0, 70), 72, 1, splits=1),
    # More tiles than the ring has stages, at the model's widths, in pages of one tile.
    _edge((330, 100), 384, 16, 512, dtype="bfloat16", page=64, splits=1),
    # Sinks with one split and with several, empty rows, several queries, heads that are no whole boxes of 8.
    _edge((0, 100), 136, 4, T=2, sinks=True, splits=1, out_dtype="float32"),
    _edge((2, 100), 136, 12, T=2, sinks=True, splits=2),
    _edge((70,), 72, 11),
    _edge((70,), 72, 16, T=2, window=5),
    # Narrow latents and rope keys, windows across tiles, pages smaller than a tile, fixed split size.
    _edge((3, 250), 264, 4, 64, 16, splits=2, window=70),
    _edge((90, 25), 96, 4, R=32, page=24, chunk=64),
    # Too many rows for one program of this kernel, and not the other's shape.
    _edge((70,), 72, 20, 64, T=2),
    # The kernel of many rows: odd and even numbers of tiles, more of them than stages, one split and several.
    _edge(AROUND_A_TILE, 136, 64, dtype="bfloat16", splits=1),
    _edge((330,), 336, 64, splits=1),
    _edge((250, 64), 256, 40, splits=2),
    _edge((70,), 72, 128, dtype="bfloat16", sinks=True, splits=1),
    # At the model's widths, in pages of one tile.
    _edge((330,), 384, 64, 512, dtype="bfloat16", page=64, splits=1),
    # Blocks of 64 rows that are not full: final in 16 bits, final in float32, partial.
    _edge((70,), 72, 48, sinks=True),
    _edge((70,), 72, 40, 256, 32, out_dtype="float32"),
    _edge((150,), 152, 40, sinks=True, splits=2),
    _edge((70,), 72, 64, splits=1, out_dtype="float32"),
    # Several queries, windows within a tile and across tiles, pages that are no tile, fixed split size.
    _edge((1, 250), 264, 64, T=2, splits=1, window=70),
    _edge((130,), 136, 64, splits=1, window=1),
    _edge((30, 200), 256, 64, page=128, splits=1),
    _edge((70,), 72, 40, page=8, window=20),
    _edge((250,), 264, 40, chunk=100),
)

AROUND_TILES = {"float16": (0, 1, 31, 32, 33, 65, 150), "float32": (0, 1, 15, 16, 17, 33, 150)}
TRITON_EDGES = (
    # One split and several, of the plan's size and of fixed ones, for few rows and for blocks of 64.
    *(_edge(lengths, max(lengths), N, 32, 8, dtype=dtype, chunk=chunk)
      for dtype, rows in AROUND_TILES.items()
      for N, lengths, chunk in ((4, rows, None), (4, rows, 64), (4, rows, 50), (33, (63, 65), None))),
    # Heads and queries that fill a block of rows in part, one block, and several.
    *(_edge((0, T, 40), 40, N, 16, 8, dtype=dtype, T=T)
      for dtype in ("float16", "float32")
      for N, T in ((1, 1), (1, 2), (4, 2), (16, 1), (16, 2), (20, 1), (20, 2), (5, 3))),
    *(_edge((40,), 40, 80, 16, 8, dtype=dtype) for dtype in ("float16", "float32")),
    # Widths, padded and not.
    *(_edge(lengths, S, 3, C, R, dtype=dtype, chunk=chunk)
      for C, R in ((64, 16), (16, 4), (48, 24), (128, 64), (512, 64))
      for lengths, S, dtype, chunk in (((33, 70), 70, "float16", None), ((20,), 40, "float32", 17))),
    # The widths of DeepSeek-V2 and V3 at both ends of their head counts.
    *(_edge((1, 100), 128, N, 512, page=64, sinks=True) for N in (16, 128)),
    # Windows within a tile, of two tiles, and longer than the cache.
    *(_edge((0, 3, 64, 130), 144, 4, 16, 8, T=T, page=page, window=window, chunk=chunk)
      for T in (1, 2) for window, chunk in ((1, None), (31, 32), (64, None), (1000, 50)) for page in (0, 16)),
    # A sink enters once, whether the kernel folds it or the merge.
    *(_edge((0, 1, S - 3), S, 6, 32, 8, T=T, chunk=chunk, sinks=True, **more)
      for T, chunk, S in ((1, None, 20), (1, None, 150), (2, 48, 150))
      for more in ({"out_dtype": "float32"}, {"window": 9})),
    # Pages of less than a tile and of several; rows that end at and beside their edges.
    *(_edge((0, 1, page - 1, page, page + 1, 2 * page + 22)[:rows], 3 * page, N, 16, 8, dtype=dtype, T=T, page=page,
            chunk=chunk)
      for dtype in ("float16", "float32")
      for page, rows, N, T, chunk in ((16, 5, 4, 1, None), (64, 6, 4, 2, None), (128, 5, 4, 2, 64))),
    *(_edge((0, 86), 128, 33, 16, 8, dtype=dtype, page=64, chunk=50) for dtype in ("float16", "float32")),
    # No slots, no pages, and no rows.
    _edge((0, 0), 0, 4, 16, 8),
    _edge((), 4, 4, 16, 8),
)  # fmt: skip

# --- fuzz

# B, T, N, S, C, R
SIZES = (
    (2, 1, 4, 128, 64, 16), (2, 1, 16, 192, 128, 64), (2, 2, 8, 64, 64, 16), (2, 4, 16, 136, 64, 64),
    (1, 1, 64, 72, 128, 64), (2, 1, 5, 67, 64, 8), (3, 1, 8, 256, 64, 16),
)  # fmt: skip
# The kernel of few rows with one box and with two, and the kernel of many.
MOSAIC = (
    (2, 1, 4, 72, 64, 16), (1, 2, 8, 72, 64, 16), (1, 1, 12, 64, 128, 64), (1, 1, 40, 72, 128, 64),
    (1, 1, 5, 67, 64, 8),
)  # fmt: skip


def question(draw, st, sizes, dtypes: tuple[str, ...], out: tuple[str, ...]) -> Draw:
    chosen = dict(zip("BTNSCR", draw(st.sampled_from(sizes)), strict=True))
    options = questions.cache_options(draw, st, chosen, chosen["C"] + chosen["R"], out)
    return questions.over_a_cache(draw, st, NAME, chosen, options, dtypes)


change = partial(draws.huge, queries=("q_latent", "q_rope"), keys=("latent", "k_rope"))


def _triton(draw: Draw) -> str | None:
    odd = draw.view == "paged" and (draw.at < 16 or draw.at & (draw.at - 1))
    return "the page size is" if odd else None


# --- benchmarks

SCALE = 192**-0.5  # of DeepSeek's expanded heads: nope 128 + rope 64
BENCH = tuple(
    Work({"B": B, "N": N, "S": S, "C": 512, "R": 64}, {"scale": SCALE}, peers=peers.expanded)
    for B, N, S in (
        (128, 16, 4096), (128, 64, 4096), (128, 128, 4096), (16, 128, 16384), (1, 128, 131072), (1, 128, 4096),
    )
)  # fmt: skip

OP = Op(
    name=NAME, axes={"q_latent": "BTNC", "q_rope": "BTNR", "latent": "BSC", "k_rope": "BSR", "lengths": "B"}, draw=draw,
    oracle=oracle, cases=CASES, fuzz=Fuzz(question, SIZES, MOSAIC, views.of_a_cache(CACHES), change),
    edges={"pallas": MOSAIC_EDGES, "triton": TRITON_EDGES},
    refusals={"triton": _triton, "pallas": questions.mosaic_cache}, caches=CACHES,
    moved=lambda B, N, S, C, R, **_: 2 * B * (S * (C + R) + N * (2 * C + R)),
    bench=BENCH, table="latent", invariant=_case("invariance", (777,), 1024, 16, sinks=True),
)  # fmt: skip
