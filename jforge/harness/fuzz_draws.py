"""What the fuzz of the ops draws, and what a backend may refuse of it.

Sizes come from a few buckets, since Mosaic's interpreter compiles every new shape; lengths, options and values are
free. A new op is one strategy and one entry of OPS, and an entry of `refusal` where a backend documents one.
"""

import dataclasses
from collections.abc import Callable

from hypothesis import strategies as st

from jforge.harness.backends import Backend, gpu
from jforge.harness.cases import DTYPES, Case

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
VIEWS = ("plain", "permuted", "alone", "paged", "split")


@dataclasses.dataclass(frozen=True)
class Draw:
    """One example: a case, the dtype and seed of its values, and how the question is put.

    view: "plain"; "permuted" (the batch in another order); "alone" (row `at`, all others emptied); "paged" (pages of
    `at` slots); "split" (keys before and after slot `at` in two calls, or entries of the lists, or parts).
    """

    case: Case
    dtype: str
    seed: int
    view: str = "plain"
    at: int = 0


@st.composite
def _decode_attention(draw, dtypes: tuple[str, ...], out: tuple[str, ...]) -> Draw:
    sizes = dict(zip("BTNKSHV", draw(st.sampled_from(ATTENTION)), strict=True))
    options = _options(draw, sizes, out) | _optional(draw, softcap=st.floats(0.5, 50.0))
    return _over_a_cache(draw, "decode_attention", sizes, options, dtypes)


@st.composite
def _decode_mla(draw, dtypes: tuple[str, ...], out: tuple[str, ...]) -> Draw:
    sizes = dict(zip("BTNSCR", draw(st.sampled_from(LATENT)), strict=True))
    return _over_a_cache(draw, "decode_mla", sizes, _options(draw, sizes, out), dtypes)


@st.composite
def _merge_states(draw, dtypes: tuple[str, ...], out: tuple[str, ...]) -> Draw:
    sizes = dict(zip("PBTNV", draw(st.sampled_from(PARTS)), strict=True))
    lengths = tuple(draw(st.integers(0, sizes["P"])) for _ in range(sizes["B"]))
    view = draw(st.sampled_from(("plain", "permuted", "split")))
    at = draw(st.integers(0, sizes["P"])) if view == "split" else 0
    case = Case("fuzz", "merge_states", sizes, lengths)
    return Draw(case, draw(st.sampled_from(dtypes)), draw(_seeds()), view, at)


@st.composite
def _decode_block_sparse(draw, dtypes: tuple[str, ...], out: tuple[str, ...]) -> Draw:
    *sizes, block_size = draw(st.sampled_from(BLOCKS))
    sizes = dict(zip("BTNKSHVXL", sizes, strict=True))
    strategies = _common(sizes["H"], out) | {"softcap": st.floats(0.5, 50.0)}
    options = {"block_size": block_size} | _optional(draw, **strategies)
    B, T, S, L = (sizes[axis] for axis in "BTSL")
    edges = {n + d for n in (block_size, 64, S // block_size * block_size) for d in (-1, 0, 1)} | {0, 1, T - 1, T, S}
    row = st.sampled_from(sorted(n for n in edges if 0 <= n <= S)) | st.integers(0, S)
    lengths = tuple(draw(row) for _ in range(B)) if draw(st.integers(0, 4)) else ()  # (): the lists alone decide
    view = draw(st.sampled_from(VIEWS))
    choices = {"alone": st.integers(0, B - 1), "paged": _pages(S), "split": st.integers(0, L)}
    case = Case("fuzz", "decode_block_sparse", sizes, lengths, options)
    at = draw(choices.get(view, st.just(0)))
    return Draw(case, draw(st.sampled_from(dtypes)), draw(_seeds()), view, at)


OPS: dict[str, Callable[..., st.SearchStrategy[Draw]]] = {
    "decode_attention": _decode_attention,
    "decode_block_sparse": _decode_block_sparse,
    "decode_mla": _decode_mla,
    "merge_states": _merge_states,
}


def _seeds():
    return st.integers(0, 2**16)


def _pages(S: int):
    return st.sampled_from([n for n in (8, 16, 32, 64, S) if S % n == 0])


def _optional(draw, **strategies) -> dict:
    """Each keyword argument given or left out."""
    drawn = {name: draw(st.none() | strategy) for name, strategy in strategies.items()}
    return {name: value for name, value in drawn.items() if value is not None}


def _options(draw, sizes: dict[str, int], out: tuple[str, ...]) -> dict:
    """Windows and chunks at the edges of tiles and cache, and what all attending ops take."""
    T, S = sizes["T"], sizes["S"]
    width = sizes["H"] if "H" in sizes else sizes["C"] + sizes["R"]
    return _optional(
        draw,
        window=st.sampled_from((1, T, 63, 64, 65, S - 1, S, S + 5)) | st.integers(1, S),
        chunk=st.sampled_from((16, 64, 100, 128, S + 1)),
        **_common(width, out),
    )


def _common(width: int, out: tuple[str, ...]) -> dict:
    """Logits of a spread from 0.1, nearly uniform weights, to 4.

    No larger ones: float32 holds a logit x to x * 2^-24, and exp makes that the relative error of a weight.
    """
    scale = st.floats(0.1, 4.0).map(lambda spread: spread * width**-0.5)
    return {"sinks": st.just(True), "scale": scale, "out_dtype": st.sampled_from(out)}


def _over_a_cache(draw, op: str, sizes: dict[str, int], options: dict, dtypes: tuple[str, ...]) -> Draw:
    view = draw(st.sampled_from(VIEWS))
    if view == "split":  # with more queries or a window, the keys of a part end elsewhere for each query or row
        sizes = sizes | {"T": 1}
        options.pop("window", None)
    if view in ("permuted", "alone"):  # with a chunk the bits are compared too; "plain" goes without one
        options.setdefault("chunk", 64)
    B, T, S = (sizes[axis] for axis in "BTS")
    window, chunk = options.get("window", S), options.get("chunk", S)
    near = {n + d for n in (64, 128, window, chunk) for d in (-1, 0, 1)} | {0, 1, T - 1, T, S - 1, S}
    row = st.sampled_from(sorted(n for n in near if 0 <= n <= S)) | st.integers(0, S)
    lengths = tuple(draw(row) for _ in range(B))
    choices = {"alone": st.integers(0, B - 1), "paged": _pages(S), "split": st.integers(0, S)}
    at = draw(choices.get(view, st.just(0)))
    return Draw(Case("fuzz", op, sizes, lengths, options), draw(st.sampled_from(dtypes)), draw(_seeds()), view, at)


def draws(backend: Backend, op: str) -> st.SearchStrategy[Draw]:
    """Examples of `op` in the dtypes that the backend is judged in here, and for Pallas now and then in the one that
    it must refuse. float32 results are for all; Triton's interpreter truncates to bfloat16 where a GPU rounds.
    """
    judged = backend.gpu_dtypes if gpu() else backend.dtypes
    out = tuple(dict.fromkeys(("float32", *judged)))
    return OPS[op](judged * 4 + ("float32",) if backend.name == "pallas" else judged, out)


def refusal(backend: Backend, draw: Draw) -> str | None:
    """The reason (a pattern) that the backend documents for not answering this example; None: it must answer."""
    op, sizes, paged = draw.case.op, draw.case.sizes, draw.view == "paged"
    if backend.name == "triton":
        if op == "decode_attention" and paged:
            return "page_table has no Triton kernel yet"
        if op == "decode_mla" and paged and (draw.at < 16 or draw.at & (draw.at - 1)):
            return "the page size is"
    if backend.name == "pallas":
        if op == "merge_states":
            itemsize = 4 if draw.view == "split" else DTYPES[draw.dtype].itemsize
            return "multiple of 16 bytes" if sizes["V"] * itemsize % 16 else None
        if draw.dtype == "float32":
            return "only as tf32"
        if op == "decode_block_sparse":
            return _of_lists(sizes, draw.case.options, draw.at if paged else None)
        if (draw.at if paged else sizes["S"]) % 8:
            return "TMA needs a positive multiple of 8"
    return None


def _of_lists(sizes, options, page: int | None) -> str | None:
    """What Pallas refuses of decode_block_sparse, in the dtypes and head dims that are drawn."""
    size = options["block_size"]
    if sizes["V"] == 0:
        return "has no cap" if "softcap" in options else None
    if size > 1 and (page or sizes["S"]) % 8:
        return "TMA needs a multiple of 8"
    return "its multiple or divide it" if page and page % size and size % page else None
