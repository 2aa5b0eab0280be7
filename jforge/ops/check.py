"""Argument checks of the ops. Every message names the argument, its value and what is allowed.

Each function named after an op takes that op's arguments and returns the sizes by letter, or raises ValueError for
shapes and ranges, TypeError for types and dtypes. They look at shapes and dtypes only, so they cost nothing under jit;
`length_values` also looks at values where they are concrete.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jforge.core.softmax import CAPS

FLOATS = ("float16", "bfloat16", "float32", "float64")
QUANTISED = ("int8", "float8_e4m3fn", "float8_e5m2")
WIDE, SCALE, INT32 = ("float32", "float64"), ("float32",), ("int32",)
FLOAT32_MAX = float(np.finfo(np.float32).max)
DECAYS = ("N", "B N", "B N H")


def tensor(name: str, array, letters: str, sizes: dict[str, int], dtypes: tuple[str, ...] | None = None) -> None:
    """`array` has the axes `letters` (a letter seen before has the same size, any other is added) and a dtype of those
    given."""
    axes = letters.split()
    if array.ndim != len(axes):
        raise ValueError(f"{name} has shape {tuple(array.shape)}; it needs {len(axes)} axes: {letters}")
    if axes[0] == "pages" and 0 in array.shape[:2]:
        raise ValueError(f"{name} has shape {tuple(array.shape)} for {letters}; a pool needs a page and a slot in it")
    for axis, size in zip(axes, array.shape, strict=True):
        if sizes.setdefault(axis, size) != size:
            raise ValueError(f"{name} has shape {tuple(array.shape)} for {letters}; {axis} must be {sizes[axis]}")
    if dtypes is not None:
        dtype(name, array.dtype, dtypes)


def dtype(name: str, given, allowed: tuple[str, ...], verb: str = "has dtype") -> None:
    if str(given) not in allowed:
        raise TypeError(f"{name} {verb} {given}; allowed: {', '.join(allowed)}")


def number(name: str, value, least: float = -FLOAT32_MAX, most: float = FLOAT32_MAX) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} is {value!r}; it must be a number")
    if not least <= (value.item() if isinstance(value, np.generic) else value) <= most:  # float16 holds no bound
        raise ValueError(f"{name} is {value!r}; it must lie in {least:.3g}..{most:.3g}")


def positive(name: str, value) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a positive integer")


def length_values(lengths, slots: int) -> None:
    """0 <= lengths <= slots, checked when `lengths` is concrete: a traced value has no value to check."""
    if isinstance(lengths, jax.core.Tracer):
        return
    values = np.asarray(lengths)
    for row in np.flatnonzero((values < 0) | (values > slots)):
        raise ValueError(f"lengths[{row}] is {values[row]}; it must lie in 0..{slots}")


# Rules between arguments. given: {name: argument} of one call. sizes: {letter: size} of the arrays before the rule.


def _heads(given, sizes) -> None:
    if sizes["K"] == 0 or sizes["N"] % sizes["K"]:
        raise ValueError(f"q has N={sizes['N']} heads; N must be a multiple of k's K={sizes['K']}")


def _lists(given, sizes) -> None:
    """X, the number of lists of a query token, is K, or N where every head has its own. v=None: the values are k."""
    if sizes["X"] not in (sizes["K"], sizes["N"]):
        raise ValueError(f"block_indices has {sizes['X']} lists; it must be K={sizes['K']} or N={sizes['N']}")
    if given["v"] is None and given.get("v_scale") is not None:
        raise TypeError("v_scale is given, but v is None: the values are k, and k_scale is theirs")


def _stored(floats: str, scales: dict[str, str], letters: str, dtypes: tuple[str, ...] = SCALE):
    """The rule that `floats` and the stored arrays share a float dtype, or that these are quantised with scales.

    scales: {stored array: its scale}. letters, dtypes: the axes and the dtypes of a scale.
    """

    def rule(given, sizes) -> None:
        held = {name: scale for name, scale in scales.items() if given[name] is not None}
        missing = [scale for scale in held.values() if given.get(scale) is None]
        if missing and len(missing) < len(held):
            both = " and ".join(scales.values())
            raise TypeError(f"{missing[0]} is None; {both} come together, with quantised {' and '.join(scales)}")
        first, *rest = [*floats.split(), *(held if missing else ())]
        dtype(first, given[first].dtype, FLOATS)
        for name in rest:
            if given[name].dtype != given[first].dtype:
                raise TypeError(f"{name} has dtype {given[name].dtype}; it must be {first}'s, {given[first].dtype}")
        for name, scale in () if missing else held.items():
            dtype(name, given[name].dtype, QUANTISED)
            tensor(scale, given[scale], _addressed(letters, given), sizes, dtypes)

    return rule


def _decay(given, sizes) -> None:
    decay, allowed = given["decay"], "the axes N, B N or B N H"
    if not hasattr(decay, "ndim"):
        raise TypeError(f"decay is {decay!r}; it must be an array with {allowed}")
    if not 1 <= decay.ndim <= len(DECAYS):
        raise ValueError(f"decay has shape {tuple(decay.shape)}; it needs {allowed}")
    tensor("decay", decay, DECAYS[decay.ndim - 1], sizes, WIDE)


def _scores(given, sizes) -> None:
    dtype("scores", given["scores"].dtype, FLOATS)
    if given["scores"].ndim == 0:
        raise ValueError("scores has shape (); it needs at least one axis")


def _parts(given, sizes) -> None:
    if sizes["P"] == 0:
        raise ValueError("outs has no parts (P=0); at least one is needed")


def _addressed(letters: str, given) -> str:
    """With a page_table, B S stands for pages page."""
    return letters if given.get("page_table") is None else letters.replace("B S", "pages page")


OPTIONS = {
    "scale": number,
    "window": positive,
    "chunk": positive,
    "block_size": positive,
    "k": positive,
    "softcap": partial(number, least=CAPS[0], most=CAPS[1]),
    "out_dtype": lambda name, value: dtype(name, jnp.dtype(value), FLOATS, "is"),
}
MAY_BE_NONE = ("window", "chunk", "softcap", "out_dtype")


def _checks(positional: str, options: str, *rows):
    """The check of an op: rows in their order, arguments (name, axes[, dtypes]) or rules, then its options.

    positional: the names of what the op takes by position. A name with `?` may be None.
    """

    def check(*args, **given) -> dict[str, int]:
        given = dict(zip(positional.split(), args, strict=False)) | given
        sizes: dict[str, int] = {}
        for row in rows:
            if callable(row):
                row(given, sizes)
                continue
            name, letters, *dtypes = row
            value = given.get(name.removesuffix("?"))
            if value is not None or not name.endswith("?"):
                tensor(name.removesuffix("?"), value, _addressed(letters, given), sizes, *dtypes)
        for name in options.split():
            if (value := given.get(name)) is not None or name not in MAY_BE_NONE:
                OPTIONS[name](name, value)
        return sizes

    return check


Q, K, V, SCALES = ("q", "B T N H"), ("k", "B S K H"), ("v", "B S K V"), {"k": "k_scale", "v": "v_scale"}
LENGTHS, PAGES, SINKS = ("lengths", "B", INT32), ("page_table?", "B P", INT32), ("sinks?", "N", FLOATS)
ALIBI = ("alibi?", "N", WIDE)
V_OR_K, LENGTHS_OR_ALL = ("v?", *V[1:]), ("lengths?", *LENGTHS[1:])
CACHED = PAGES, _stored("q", SCALES, "B S K"), SINKS
BLOCKS, TOKENS = ("block_indices", "B T X L", INT32), ("indices", "B T L", INT32)
QUERIES, ROWS = (("q_latent", "B T N C"), ("q_rope", "B T N R")), (("latent", "B S C"), ("k_rope", "B S R"))
LATENTS = *QUERIES, *ROWS, _stored("q_latent q_rope k_rope", {"latent": "latent_scale"}, "B S")
INDEX = ("q_index", "B T I J"), ("k_index", "B S J"), LENGTHS, _stored("q_index", {"k_index": "k_scale"}, "B S", WIDE)
STEP = ("q", "B N H"), ("k", "B N H"), ("v", "B N V"), ("state", "B N H V", WIDE), _stored("q k v", {}, "")
ATTEND = "scale window chunk out_dtype"

decode_attention = _checks("q k v lengths", ATTEND + " softcap", Q, K, V, LENGTHS, _heads, *CACHED, ALIBI)
decode_mla = _checks("q_latent q_rope latent k_rope lengths", ATTEND, *LATENTS, LENGTHS, PAGES, SINKS)
decode_block_sparse = _checks(
    "q k v block_indices lengths",
    "block_size scale softcap chunk out_dtype",
    *(Q, K, V_OR_K, BLOCKS, _heads, _lists, LENGTHS_OR_ALL, *CACHED),
)
decode_sparse_mla = _checks("q_latent q_rope latent k_rope indices", "scale chunk out_dtype", *LATENTS, TOKENS, SINKS)
index_scores = _checks("q_index k_index weights lengths", "", *INDEX, ("weights", "B T I", WIDE))
block_index_scores = _checks("q_index k_index lengths", "block_size", *INDEX)
topk_indices = _checks("scores k", "k", _scores)
merge_states = _checks("outs lses", "", ("outs", "P B T N V", FLOATS), ("lses", "P B T N", WIDE), _parts)
decode_linear = _checks("q k v state decay", "", *STEP, _decay, ("beta?", "B N", WIDE))
