"""What the fuzz draws for the ops of the sparse and the linear mechanisms.

A score is a sum that may cancel, and then float32 has no relative error to be judged by. So the index ops get values
whose sums are exact, or whose sums cannot cancel, and compare.py's limit for float32 holds for both.
"""

from hypothesis import strategies as st

from jforge.harness.cases import Case
from jforge.harness.fuzz_draws import Draw, common, near, optional, seeds

# B, T, I, S, J: one box of heads, several and a part of one; no keys at all; 67 slots, and widths of 24 and 272, which
# Pallas refuses; more heads, and more bytes of heads, than Triton takes
INDEX = (
    (2, 1, 8, 136, 64), (2, 1, 5, 72, 32), (1, 2, 4, 128, 64), (3, 1, 1, 40, 16), (2, 3, 3, 67, 64),
    (1, 1, 64, 264, 128), (2, 4, 8, 64, 64), (2, 1, 4, 200, 24), (1, 1, 12, 136, 80), (2, 2, 136, 16, 8),
    (2, 1, 4, 0, 64), (1, 1, 3, 24, 272), (1, 1, 264, 8, 256), (1, 1, 256, 8, 256),
)  # fmt: skip
# Each of them with blocks of several sizes, up to one that no cache fills
INDEX_BLOCKS = tuple((*sizes, block) for sizes in INDEX for block in (1, 8, 16, 24, 32, 64, 100, 128, 300))
# B, T, N, S, C, R, L, the dtype of a latent with scales: more entries than slots, no slots at all, and rows that are
# too wide for the kernels or no multiple of what Pallas takes
LISTED = (
    (2, 1, 4, 96, 64, 16, 20, None), (2, 2, 8, 40, 64, 16, 9, None), (1, 3, 5, 33, 64, 8, 40, None),
    (1, 1, 64, 32, 128, 64, 24, None), (3, 1, 1, 72, 64, 16, 130, None), (2, 1, 3, 16, 80, 12, 5, None),
    (1, 1, 2, 24, 520, 8, 10, None), (2, 1, 4, 0, 64, 16, 7, None), (2, 2, 4, 40, 64, 16, 20, "int8"),
    (2, 1, 3, 40, 64, 16, 12, "float8_e4m3fn"),
)  # fmt: skip
# The axes before S, and S: one row and many, one score, none, and more scores than one program of Triton's takes
SCORES = (((), 7), ((3,), 40), ((2, 2), 64), ((2, 1, 3), 17), ((2,), 1030), ((2,), 1), ((3,), 0), ((2, 3), 128))
# B, N, H, V: tiles of several widths and parts of one; 12, 17 and 1032 key channels, 5 and 40 value columns, which a
# kernel or two refuse
STATES = (
    (2, 3, 64, 64), (1, 2, 128, 32), (3, 1, 16, 8), (2, 2, 8, 96), (1, 1, 256, 128), (2, 1, 40, 24), (1, 2, 32, 160),
    (2, 1, 12, 32), (2, 2, 16, 40), (1, 2, 17, 5), (1, 1, 1032, 8),
)  # fmt: skip
BUCKETS = {
    "index_scores": INDEX,
    "block_index_scores": INDEX_BLOCKS,
    "topk_indices": SCORES,
    "decode_sparse_mla": LISTED,
    "decode_linear": STATES,
}
MOSAIC = BUCKETS | {
    "index_scores": (
        (2, 1, 8, 72, 64), (1, 2, 5, 72, 32), (1, 1, 12, 64, 80), (3, 1, 1, 8, 64), (1, 1, 4, 136, 32),
        (1, 3, 3, 67, 64),
    ),
    # Blocks of a part of a tile and of several tiles, and 24 tokens, of which no kernel is made.
    "block_index_scores": (
        (2, 1, 8, 72, 64, 16), (2, 2, 5, 72, 32, 8), (1, 1, 12, 264, 64, 128), (3, 1, 1, 8, 64, 64),
        (1, 1, 4, 136, 32, 32), (1, 2, 3, 136, 32, 64), (1, 3, 3, 67, 64, 16), (1, 1, 4, 72, 32, 24),
    ),
    # The kernel of few rows with one box and with two, and the kernel of many; one tile of a list and two.
    "decode_sparse_mla": (
        (2, 1, 4, 40, 64, 16, 20, None), (1, 2, 12, 24, 64, 64, 9, None), (1, 1, 40, 24, 128, 16, 20, None),
        (2, 1, 1, 80, 64, 8, 70, None), (1, 1, 3, 40, 64, 16, 9, None), (1, 1, 8, 33, 64, 24, 33, None),
    ),
    "decode_linear": (
        (2, 1, 64, 64), (1, 2, 40, 32), (3, 1, 16, 8), (1, 1, 32, 96), (2, 1, 8, 24), (1, 1, 16, 32),
        (1, 2, 32, 64), (2, 1, 12, 32),
    ),
}  # fmt: skip
QUANTISED = ("int8", "float8_e4m3fn", "float8_e5m2")
VIEWS = {
    "index_scores": ("plain", "permuted", "alone", "split"),
    "block_index_scores": ("plain", "permuted", "alone", "split"),
    "topk_indices": ("plain", "permuted", "split", "shuffled"),
    "decode_sparse_mla": ("plain", "permuted", "alone", "split", "shuffled"),
    "decode_linear": ("plain", "permuted", "alone", "split"),
}


@st.composite
def index_scores(draw, buckets, dtypes: tuple[str, ...], out: tuple[str, ...]) -> Draw:
    return _over_keys(draw, "index_scores", dict(zip("BTISJ", draw(st.sampled_from(buckets)), strict=True)), {}, dtypes)


@st.composite
def block_index_scores(draw, buckets, dtypes: tuple[str, ...], out: tuple[str, ...]) -> Draw:
    *sizes, block_size = draw(st.sampled_from(buckets))
    sizes = dict(zip("BTISJ", sizes, strict=True))
    return _over_keys(draw, "block_index_scores", sizes, {"block_size": block_size}, dtypes)


def _over_keys(draw, op: str, sizes: dict[str, int], options: dict, dtypes: tuple[str, ...]) -> Draw:
    view = draw(st.sampled_from(VIEWS[op]))
    if view == "split":  # with more queries, the keys of a part end elsewhere for each of them
        sizes = sizes | {"T": 1}
    B, T, S = (sizes[axis] for axis in "BTS")
    block = options.get("block_size", 64)
    lengths = tuple(draw(near(S, block, 64, 128, S // block * block, also=(T - 1, T))) for _ in range(B))
    cut = st.integers(0, S // block).map(lambda e: e * block) if "block_size" in options else st.integers(0, S)
    at = draw({"alone": st.integers(0, B - 1), "split": cut}.get(view, st.just(0)))
    values, stored = draw(st.sampled_from(("coarse", "positive"))), draw(st.sampled_from((None, None, *QUANTISED)))
    case = Case("fuzz", op, sizes, lengths, options)
    return Draw(case, draw(st.sampled_from(dtypes)), draw(seeds()), view, at, values, stored)


@st.composite
def topk_indices(draw, buckets, dtypes: tuple[str, ...], out: tuple[str, ...]) -> Draw:
    """lengths: how many scores of a row are above -inf."""
    axes, S = draw(st.sampled_from(buckets))
    sizes = dict(zip("BTI", axes, strict=False)) | {"S": S}
    rows = 1
    for size in axes:
        rows *= size
    k = draw(st.sampled_from(sorted(k for k in {1, 2, S // 2, S - 1, S, S + 1, S + 5} if k > 0)))
    lengths = tuple(draw(near(S, k)) for _ in range(rows))
    view = draw(st.sampled_from(VIEWS["topk_indices"]))
    at = draw(st.integers(0, S)) if view == "split" else 0
    case = Case("fuzz", "topk_indices", sizes, lengths, {"k": k})
    values = draw(st.sampled_from(("coarse", "normal", "broken")))
    return Draw(case, draw(st.sampled_from(dtypes)), draw(seeds()), view, at, values)


@st.composite
def decode_sparse_mla(draw, buckets, dtypes: tuple[str, ...], out: tuple[str, ...]) -> Draw:
    """lengths: how many tokens the list of a row's last query names; those of the others name no more."""
    *sizes, stored = draw(st.sampled_from(buckets))
    sizes = dict(zip("BTNSCRL", sizes, strict=True))
    B, L = sizes["B"], sizes["L"]
    strategies = common(sizes["C"] + sizes["R"], out)
    if buckets is MOSAIC["decode_sparse_mla"]:  # all of the options or none, so that fewer calls are new
        options = {name: draw(strategy) for name, strategy in strategies.items()} if draw(st.booleans()) else {}
    else:
        options = optional(draw, **strategies)
    lengths = tuple(draw(near(L, 64)) for _ in range(B))
    view = draw(st.sampled_from(VIEWS["decode_sparse_mla"]))
    at = draw({"alone": st.integers(0, B - 1), "split": st.integers(0, L)}.get(view, st.just(0)))
    case = Case("fuzz", "decode_sparse_mla", sizes, lengths, options)
    return Draw(case, draw(st.sampled_from(dtypes)), draw(seeds()), view, at, stored=stored)


@st.composite
def decode_linear(draw, buckets, dtypes: tuple[str, ...], out: tuple[str, ...]) -> Draw:
    """Sizes `decay` and `beta` as in cases.py: the axes of the decay, and whether there is a delta rule."""
    sizes = dict(zip("BNHV", draw(st.sampled_from(buckets)), strict=True))
    sizes |= {"decay": draw(st.integers(1, 3)), "beta": draw(st.integers(0, 1))}
    view = draw(st.sampled_from(VIEWS["decode_linear"]))
    at = draw(st.integers(0, sizes["B"] - 1)) if view == "alone" else 0
    return Draw(Case("fuzz", "decode_linear", sizes), draw(st.sampled_from(dtypes)), draw(seeds()), view, at)
