"""What the fuzz draws for the ops that attend a cache, and for merge_states; fuzz_draws_sparse.py has the other ops.

Sizes come from a few buckets, and where Mosaic's interpreter compiles every new call, from fewer and smaller ones;
lengths, options and values are free. A new op is one strategy, its buckets, its views, one entry of OPS in fuzz.py, and
an entry in fuzz_refusals.py where a backend documents one.
"""

import dataclasses

from hypothesis import strategies as st

from jforge.harness.cases import Case

# B, T, N, K, S, H, V: groups of 1 to 8, 12 and 16; all head dims; 67 and 129 slots, which Pallas refuses
ATTENTION = (
    (2, 1, 8, 2, 128, 64, 64), (2, 1, 6, 2, 192, 128, 128), (2, 1, 5, 1, 64, 64, 64), (2, 2, 6, 1, 128, 64, 64),
    (2, 4, 4, 2, 136, 64, 64), (2, 1, 14, 2, 72, 80, 80), (2, 1, 4, 4, 136, 96, 96), (2, 1, 16, 1, 72, 192, 128),
    (2, 2, 12, 1, 64, 256, 256), (3, 1, 8, 1, 256, 64, 64), (2, 4, 6, 2, 67, 64, 64), (2, 1, 16, 2, 129, 128, 128),
)  # fmt: skip
# B, T, N, S, C, R
LATENT = (
    (2, 1, 4, 128, 64, 16), (2, 1, 16, 192, 128, 64), (2, 2, 8, 64, 64, 16), (2, 4, 16, 136, 64, 64),
    (1, 1, 64, 72, 128, 64), (2, 1, 5, 67, 64, 8), (3, 1, 8, 256, 64, 16),
)  # fmt: skip
# B, T, N, K, S, H, V, X, L, block_size: lists for a key head or (X = N) a query head, partial last blocks, more entries
# than blocks, lists that may hold nothing but -1; V = 0: the values are the keys
BLOCKS = (
    (2, 1, 8, 2, 192, 64, 64, 2, 3, 64), (2, 1, 4, 2, 96, 64, 64, 4, 2, 32), (1, 2, 4, 1, 72, 64, 0, 1, 9, 8),
    (2, 1, 4, 2, 80, 64, 64, 2, 40, 1), (2, 1, 5, 1, 67, 64, 64, 1, 3, 16), (1, 3, 4, 2, 136, 64, 64, 4, 2, 64),
    (1, 1, 16, 1, 264, 128, 128, 1, 2, 128), (2, 1, 3, 1, 40, 64, 0, 1, 21, 1), (2, 1, 4, 2, 136, 192, 128, 2, 12, 16),
)  # fmt: skip
# P, B, T, N, V: rows of 12 values are not a multiple of 16 bytes in 16 bits, 40 parts are more than one TMA copy
PARTS = ((1, 2, 1, 3, 64), (3, 2, 2, 1, 128), (7, 2, 1, 2, 64), (2, 3, 1, 2, 12), (4, 1, 2, 1, 256), (40, 2, 1, 1, 64))
BUCKETS = {"decode_attention": ATTENTION, "decode_block_sparse": BLOCKS, "decode_mla": LATENT, "merge_states": PARTS}
# For Mosaic's interpreter, which takes a second to compile a new call, and more where there are parts to merge.
MOSAIC = BUCKETS | {
    # One box and two, groups that do not fill a box, more than 32 rows, every width of a tile.
    "decode_attention": (
        (2, 1, 4, 1, 72, 64, 64), (1, 2, 6, 2, 72, 64, 64), (1, 1, 3, 1, 72, 128, 128), (1, 1, 2, 1, 72, 96, 96),
        (1, 3, 12, 1, 64, 64, 64), (1, 1, 3, 1, 64, 192, 128), (1, 1, 2, 2, 64, 80, 80), (2, 1, 4, 2, 67, 64, 64),
    ),
    # The kernel of few rows with one box and with two, and the kernel of many.
    "decode_mla": (
        (2, 1, 4, 72, 64, 16), (1, 2, 8, 72, 64, 16), (1, 1, 12, 64, 128, 64), (1, 1, 40, 72, 128, 64),
        (1, 1, 5, 67, 64, 8),
    ),
    # Tiles of one block, of several, of a part of one, and gathered; lists of two heads, and of each query head.
    "decode_block_sparse": (
        (2, 1, 4, 1, 136, 64, 64, 1, 2, 64), (1, 1, 4, 2, 72, 64, 64, 4, 2, 32), (1, 2, 4, 1, 72, 64, 0, 1, 9, 8),
        (2, 1, 2, 1, 40, 64, 64, 1, 40, 1), (1, 1, 5, 1, 67, 64, 64, 1, 3, 16), (1, 1, 3, 1, 264, 64, 64, 1, 2, 128),
        (1, 2, 2, 2, 72, 128, 64, 2, 4, 16), (1, 1, 2, 1, 72, 64, 64, 2, 2, 16),
    ),
}  # fmt: skip
CACHED = ("plain", "permuted", "alone", "paged", "split")
VIEWS = {"decode_attention": CACHED, "decode_block_sparse": CACHED, "decode_mla": CACHED,
         "merge_states": ("plain", "permuted", "split")}  # fmt: skip


SOFTCAPS = st.sampled_from((0.5, 5.0, 50.0))


@dataclasses.dataclass(frozen=True)
class Draw:
    """One example: a case, the dtype and seed of its values, and how the question is put.

    view: "plain"; "permuted" (the batch in another order); "alone" (row `at`, all others emptied); "paged" (pages of
    `at` slots); "split" (keys before and after slot `at` in two calls, or entries of the lists, or parts, or scores, or
    two tokens); "shuffled" (the entries of a list, or the scores, in another order).
    values: "normal"; "coarse" (few bits: sums are exact and scores tie); "positive" (sums do not cancel).
    stored: the dtype of keys that come with a scale.
    """

    case: Case
    dtype: str
    seed: int
    view: str = "plain"
    at: int = 0
    values: str = "normal"
    stored: str | None = None


@st.composite
def decode_attention(draw, buckets, dtypes: tuple[str, ...], out: tuple[str, ...]) -> Draw:
    sizes = dict(zip("BTNKSHV", draw(st.sampled_from(buckets)), strict=True))
    options = _options(draw, sizes, out) | optional(draw, softcap=SOFTCAPS)
    return _over_a_cache(draw, "decode_attention", sizes, options, dtypes)


@st.composite
def decode_mla(draw, buckets, dtypes: tuple[str, ...], out: tuple[str, ...]) -> Draw:
    sizes = dict(zip("BTNSCR", draw(st.sampled_from(buckets)), strict=True))
    return _over_a_cache(draw, "decode_mla", sizes, _options(draw, sizes, out), dtypes)


@st.composite
def merge_states(draw, buckets, dtypes: tuple[str, ...], out: tuple[str, ...]) -> Draw:
    sizes = dict(zip("PBTNV", draw(st.sampled_from(buckets)), strict=True))
    lengths = tuple(draw(st.integers(0, sizes["P"])) for _ in range(sizes["B"]))
    view = draw(st.sampled_from(VIEWS["merge_states"]))
    at = draw(st.integers(0, sizes["P"])) if view == "split" else 0
    case = Case("fuzz", "merge_states", sizes, lengths)
    return Draw(case, draw(st.sampled_from(dtypes)), draw(seeds()), view, at)


@st.composite
def decode_block_sparse(draw, buckets, dtypes: tuple[str, ...], out: tuple[str, ...]) -> Draw:
    *sizes, block_size = draw(st.sampled_from(buckets))
    sizes = dict(zip("BTNKSHVXL", sizes, strict=True))
    strategies = common(sizes["H"], out) | {"softcap": SOFTCAPS}
    options = {"block_size": block_size} | optional(draw, **strategies)
    B, T, S, L = (sizes[axis] for axis in "BTSL")
    row = near(S, block_size, 64, S // block_size * block_size, also=(T - 1, T))
    lengths = tuple(draw(row) for _ in range(B)) if draw(st.integers(0, 4)) else ()  # (): the lists alone decide
    view = draw(st.sampled_from(CACHED))
    choices = {"alone": st.integers(0, B - 1), "paged": _pages(S), "split": st.integers(0, L)}
    case = Case("fuzz", "decode_block_sparse", sizes, lengths, options)
    at = draw(choices.get(view, st.just(0)))
    return Draw(case, draw(st.sampled_from(dtypes)), draw(seeds()), view, at)


# --- shared with fuzz_draws_sparse.py


def seeds():
    return st.integers(0, 2**16)


def near(S: int, *edges: int, also: tuple[int, ...] = ()):
    """Lengths of 0 to S: those at or beside the edges first of all."""
    tried = {n + d for n in edges for d in (-1, 0, 1)} | {0, 1, S - 1, S, *also}
    return st.sampled_from(sorted(n for n in tried if 0 <= n <= S)) | st.integers(0, S)


def optional(draw, **strategies) -> dict:
    """Each keyword argument given or left out."""
    drawn = {name: draw(st.none() | strategy) for name, strategy in strategies.items()}
    return {name: value for name, value in drawn.items() if value is not None}


def common(width: int, out: tuple[str, ...]) -> dict:
    """Logits of a spread from 0.1, nearly uniform weights, to 4.

    No larger ones: float32 holds a logit x to x * 2^-24, and exp makes that the relative error of a weight.
    """
    scale = st.sampled_from((0.1, 4.0)).map(lambda spread: spread * width**-0.5)
    return {"sinks": st.just(True), "scale": scale, "out_dtype": st.sampled_from(out)}


# --- over a cache


def _pages(S: int):
    return st.sampled_from([n for n in (8, 16, 32, 64, S) if S % n == 0])


def _options(draw, sizes: dict[str, int], out: tuple[str, ...]) -> dict:
    """Windows and chunks at the edges of tiles and cache, and what all attending ops take."""
    T, S = sizes["T"], sizes["S"]
    width = sizes["H"] if "H" in sizes else sizes["C"] + sizes["R"]
    return optional(
        draw,
        window=st.sampled_from((1, T, 63, 64, 65, S - 1, S, S + 5)) | st.integers(1, S),
        chunk=st.sampled_from((16, 64, 100, 128, S + 1)),
        **common(width, out),
    )


def _over_a_cache(draw, op: str, sizes: dict[str, int], options: dict, dtypes: tuple[str, ...]) -> Draw:
    view = draw(st.sampled_from(CACHED))
    if view == "split":  # with more queries or a window, the keys of a part end elsewhere for each query or row
        sizes = sizes | {"T": 1}
        options.pop("window", None)
    if view in ("permuted", "alone"):  # with a chunk the bits are compared too; "plain" goes without one
        options.setdefault("chunk", 64)
    B, T, S = (sizes[axis] for axis in "BTS")
    row = near(S, 64, 128, options.get("window", S), options.get("chunk", S), also=(T - 1, T))
    lengths = tuple(draw(row) for _ in range(B))
    choices = {"alone": st.integers(0, B - 1), "paged": _pages(S), "split": st.integers(0, S)}
    at = draw(choices.get(view, st.just(0)))
    return Draw(Case("fuzz", op, sizes, lengths, options), draw(st.sampled_from(dtypes)), draw(seeds()), view, at)
