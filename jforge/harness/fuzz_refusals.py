"""What the kernel packages document that they do not answer, for everything that the fuzz may ask of them."""

from jforge.harness.backends import Backend
from jforge.harness.cases import DTYPES
from jforge.harness.fuzz_draws import Draw

TF32, SLOTS, GRID = "only as tf32", "TMA needs a positive multiple of 8", "the grid must not be empty"


def refusal(backend: Backend, draw: Draw) -> str | None:
    """The reason (a pattern) that the backend documents for not answering this example; None: it must answer."""
    rules = {"triton": TRITON, "pallas": PALLAS}.get(backend.name, {}).get(draw.case.op)
    return rules(draw) if rules else None


def _first(*rules: tuple[bool, str]) -> str | None:
    """The reason of the first rule that holds."""
    return next((reason for holds, reason in rules if holds), None)


# --- Triton


def _triton_attention(draw: Draw) -> str | None:
    return "page_table has no Triton kernel yet" if draw.view == "paged" else None


def _triton_mla(draw: Draw) -> str | None:
    odd = draw.view == "paged" and (draw.at < 16 or draw.at & (draw.at - 1))
    return "the page size is" if odd else None


def _triton_index(draw: Draw) -> str | None:
    heads, dim = draw.case.sizes["I"], draw.case.sizes["J"]
    padded = 2 ** (heads - 1).bit_length() * 2 ** (dim - 1).bit_length()
    size = padded * DTYPES[draw.dtype].itemsize
    return _first((max(heads, dim) > 256, "needs more registers"), (size > 2**17, "need more shared memory"))


def _triton_listed(draw: Draw) -> str | None:
    wide = draw.case.sizes["C"] > 512 or draw.case.sizes["R"] > 64
    return _first((bool(draw.stored), "latent_scale. has no Triton kernel yet"), (wide, "needs more registers"))


def _triton_linear(draw: Draw) -> str | None:
    return "needs more registers" if draw.case.sizes["H"] > 1024 else None


TRITON = {
    "decode_attention": _triton_attention,
    "decode_mla": _triton_mla,
    "index_scores": _triton_index,
    "block_index_scores": _triton_index,
    "decode_sparse_mla": _triton_listed,
    "decode_linear": _triton_linear,
}

# --- Pallas


def _pallas_cache(draw: Draw) -> str | None:
    slots = draw.at if draw.view == "paged" else draw.case.sizes["S"]
    return _first((draw.dtype == "float32", TF32), (slots % 8 > 0, SLOTS))


def _pallas_blocks(draw: Draw) -> str | None:
    """In the head dims that are drawn."""
    sizes, options = draw.case.sizes, draw.case.options
    size, page = options["block_size"], draw.at if draw.view == "paged" else 0
    keys_are_values = sizes["V"] == 0
    return _first(
        (draw.dtype == "float32", TF32),
        (keys_are_values and "softcap" in options, "has no cap"),
        (not keys_are_values and size > 1 and (page or sizes["S"]) % 8 > 0, "TMA needs a multiple of 8"),
        (not keys_are_values and page and page % size and size % page, "its multiple or divide it"),
    )


def _pallas_parts(draw: Draw) -> str | None:
    itemsize = 4 if draw.view == "split" else DTYPES[draw.dtype].itemsize
    return "multiple of 16 bytes" if draw.case.sizes["V"] * itemsize % 16 else None


def _pallas_index(draw: Draw) -> str | None:
    """What both index ops refuse."""
    B, T, heads, S, J = (draw.case.sizes[axis] for axis in "BTISJ")
    whole = 32 if draw.stored else 16
    return _first(
        (draw.dtype == "float32", TF32),
        (S == 0 or S % 8 > 0, SLOTS),
        (J % whole > 0 or not 0 < J <= 256, "the kernel takes multiples of"),
        (min(B, T, heads) == 0 or B > 65535, GRID),
    )


def _pallas_tokens(draw: Draw) -> str | None:
    heads, J = draw.case.sizes["I"], draw.case.sizes["J"]
    box = next((g for g in range(8, 0, -1) if heads % g == 0), 1)
    return _pallas_index(draw) or ("heads of one query must fit" if 16 * (heads // box) * J > 2**17 else None)


def _pallas_maxima(draw: Draw) -> str | None:
    size = draw.case.options["block_size"]
    return _pallas_index(draw) or ("block_size is" if size not in (8, 16, 32) and size % 64 else None)


def _pallas_listed(draw: Draw) -> str | None:
    B, T, N, S, C, R, L = (draw.case.sizes[axis] for axis in "BTNSCRL")
    return _first(
        (bool(draw.stored), "latent_scale is given"),
        (draw.dtype == "float32", TF32),
        (draw.case.options.get("out_dtype") == "float64", "out_dtype is float64"),
        (S == 0, "needs at least one"),
        (L == 0, "needs at least one"),
        (min(B, T, N) == 0 or B * T > 65535, GRID),
        (C % 64 > 0 or not 0 < C <= 512, "must be multiples of 64"),
        (R % 8 > 0 or not 0 < R <= 64, "the kernel takes multiples of 8"),
    )


def _pallas_linear(draw: Draw) -> str | None:
    B, N, H, V = (draw.case.sizes[axis] for axis in "BNHV")
    return _first(
        (H % 8 > 0 or H > 256, "the kernel takes multiples of 8"),
        (V % 32 > 0 and (V % 8 > 0 or V > 32), "the kernel takes multiples of 32"),
        (min(B, N, H, V) == 0 or max(B, N) > 65535, "none may be 0"),
    )


PALLAS = {
    "decode_attention": _pallas_cache,
    "decode_mla": _pallas_cache,
    "decode_block_sparse": _pallas_blocks,
    "merge_states": _pallas_parts,
    "index_scores": _pallas_tokens,
    "block_index_scores": _pallas_maxima,
    "decode_sparse_mla": _pallas_listed,
    "decode_linear": _pallas_linear,
}
