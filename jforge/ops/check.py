"""Argument checks of the ops. Every message names the argument, its value and what is allowed.

The checks look at shapes and dtypes only, so they cost nothing under jit; `length_values` also looks at values where
they are concrete.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

FLOATS = ("float16", "bfloat16", "float32", "float64")
NUMBERS = (int, float, np.integer, np.floating)
QUANTISED = ("int8", "float8_e4m3fn", "float8_e5m2")


def shape(name: str, array, letters: str, sizes: dict[str, int]) -> None:
    """`array` has the axes `letters`; a letter seen before must have the same size (and is added otherwise)."""
    axes = letters.split()
    if array.ndim != len(axes):
        raise ValueError(f"{name} has shape {tuple(array.shape)}; it needs {len(axes)} axes: {letters}")
    if axes[0] == "pages" and 0 in array.shape[:2]:
        raise ValueError(f"{name} has shape {tuple(array.shape)} for {letters}; a pool needs a page and a slot in it")
    for axis, size in zip(axes, array.shape, strict=True):
        if sizes.setdefault(axis, size) != size:
            raise ValueError(f"{name} has shape {tuple(array.shape)} for {letters}; {axis} must be {sizes[axis]}")


def dtype(name: str, array, allowed: tuple[str, ...]) -> None:
    if str(array.dtype) not in allowed:
        raise TypeError(f"{name} has dtype {array.dtype}; allowed: {', '.join(allowed)}")


def same_float(**arrays) -> None:
    """The named arrays share one floating dtype."""
    (first, lead), *rest = arrays.items()
    dtype(first, lead, FLOATS)
    for name, array in rest:
        if array.dtype != lead.dtype:
            raise TypeError(f"{name} has dtype {array.dtype}; it must be {first}'s, {lead.dtype}")


def positive(name: str, value, integer: bool = False) -> None:
    kinds = (int, np.integer) if integer else NUMBERS
    if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value!r}; it must be a positive {'integer' if integer else 'number'}")


def length_values(lengths, slots: int) -> None:
    """0 <= lengths <= slots, checked when `lengths` is concrete: a traced value has no value to check."""
    if isinstance(lengths, jax.core.Tracer):
        return
    values = np.asarray(lengths)
    for row in np.flatnonzero((values < 0) | (values > slots)):
        raise ValueError(f"lengths[{row}] is {values[row]}; it must lie in 0..{slots}")


def decode_attention(
    q, k, v, lengths, *, scale, window=None, sinks=None, softcap=None, page_table=None, k_scale=None, v_scale=None,
    chunk=None, out_dtype=None,
) -> dict[str, int]:  # fmt: skip
    """Raise ValueError or TypeError unless the arguments fit `decode_attention`; return the sizes by letter."""
    sizes: dict[str, int] = {}
    shape("q", q, "B T N H", sizes)
    pool = "pages page" if page_table is not None else "B S"
    shape("k", k, f"{pool} K H", sizes)
    shape("v", v, f"{pool} K V", sizes)
    shape("lengths", lengths, "B", sizes)
    dtype("lengths", lengths, ("int32",))
    if sizes["K"] == 0 or sizes["N"] % sizes["K"]:
        raise ValueError(f"q has N={sizes['N']} heads; N must be a multiple of k's K={sizes['K']}")
    if page_table is not None:
        shape("page_table", page_table, "B P", sizes)
        dtype("page_table", page_table, ("int32",))
    _values_and_scales(q, k, v, k_scale, v_scale, pool, sizes)
    _options(sizes, scale, sinks, out_dtype, window=window, chunk=chunk, softcap=softcap)
    return sizes


def _options(sizes: dict[str, int], scale, sinks, out_dtype, softcap=None, **integers) -> None:
    """What the attending ops share: a number, N sinks, a float dtype, and options that are positive or None."""
    if sinks is not None:
        shape("sinks", sinks, "N", sizes)
        dtype("sinks", sinks, FLOATS)
    if isinstance(scale, bool) or not isinstance(scale, NUMBERS):
        raise TypeError(f"scale is {scale!r}; it must be a number")
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale!r}; it must be finite")
    for name, value in integers.items():
        if value is not None:
            positive(name, value, integer=True)
    if softcap is not None:
        positive("softcap", softcap)
    if out_dtype is not None and str(jnp.dtype(out_dtype)) not in FLOATS:
        raise TypeError(f"out_dtype is {jnp.dtype(out_dtype)}; allowed: {', '.join(FLOATS)}")


def decode_block_sparse(
    q, k, v, block_indices, lengths, *, block_size, scale, sinks=None, softcap=None, page_table=None, k_scale=None,
    v_scale=None, out_dtype=None,
) -> dict[str, int]:  # fmt: skip
    """Raise ValueError or TypeError unless the arguments fit `decode_block_sparse`; return the sizes by letter.

    X is the number of lists of a query token: K, or N where every head has its own.
    """
    sizes: dict[str, int] = {}
    shape("q", q, "B T N H", sizes)
    pool = "pages page" if page_table is not None else "B S"
    shape("k", k, f"{pool} K H", sizes)
    if v is not None:
        shape("v", v, f"{pool} K V", sizes)
    shape("block_indices", block_indices, "B T X L", sizes)
    dtype("block_indices", block_indices, ("int32",))
    if sizes["K"] == 0 or sizes["N"] % sizes["K"]:
        raise ValueError(f"q has N={sizes['N']} heads; N must be a multiple of k's K={sizes['K']}")
    if sizes["X"] not in (sizes["K"], sizes["N"]):
        raise ValueError(f"block_indices has {sizes['X']} lists; it must be K={sizes['K']} or N={sizes['N']}")
    if lengths is not None:
        shape("lengths", lengths, "B", sizes)
        dtype("lengths", lengths, ("int32",))
    if page_table is not None:
        shape("page_table", page_table, "B P", sizes)
        dtype("page_table", page_table, ("int32",))
    if v is None and v_scale is not None:
        raise TypeError("v_scale is given, but v is None: the values are k, and k_scale is theirs")
    both = (k, k_scale) if v is None else (v, v_scale)
    _values_and_scales(q, k, both[0], k_scale, both[1], pool, sizes)
    positive("block_size", block_size, integer=True)
    _options(sizes, scale, sinks, out_dtype, softcap)
    return sizes


def _values_and_scales(q, k, v, k_scale, v_scale, pool: str, sizes: dict[str, int]) -> None:
    """q, k and v share a float dtype, or k and v are quantised and both have scales."""
    if (k_scale is None) != (v_scale is None):
        missing = "k_scale" if k_scale is None else "v_scale"
        raise TypeError(f"{missing} is None; k_scale and v_scale come together, with quantised k and v")
    if k_scale is None:
        same_float(q=q, k=k, v=v)
        return
    dtype("q", q, FLOATS)
    for name, array in (("k", k), ("v", v)):
        dtype(name, array, QUANTISED)
    for name, array in (("k_scale", k_scale), ("v_scale", v_scale)):
        shape(name, array, f"{pool} K", sizes)
        dtype(name, array, ("float32",))


def decode_mla(
    q_latent, q_rope, latent, k_rope, lengths, *, scale, window=None, sinks=None, page_table=None, latent_scale=None,
    chunk=None, out_dtype=None,
) -> dict[str, int]:  # fmt: skip
    """Raise ValueError or TypeError unless the arguments fit `decode_mla`; return the sizes by letter.

    A quantised latent comes with `latent_scale`, float32 with one value a slot: value = stored * scale.
    """
    sizes: dict[str, int] = {}
    pool = "pages page" if page_table is not None else "B S"
    _latent_arrays(q_latent, q_rope, latent, k_rope, latent_scale, pool, sizes)
    shape("lengths", lengths, "B", sizes)
    dtype("lengths", lengths, ("int32",))
    if page_table is not None:
        shape("page_table", page_table, "B P", sizes)
        dtype("page_table", page_table, ("int32",))
    _options(sizes, scale, sinks, out_dtype, window=window, chunk=chunk)
    return sizes


def _latent_arrays(q_latent, q_rope, latent, k_rope, latent_scale, pool: str, sizes: dict[str, int]) -> None:
    """Both queries, the latents (perhaps quantised, with a scale for each slot) and the rotary keys."""
    shape("q_latent", q_latent, "B T N C", sizes)
    shape("q_rope", q_rope, "B T N R", sizes)
    shape("latent", latent, f"{pool} C", sizes)
    shape("k_rope", k_rope, f"{pool} R", sizes)
    if latent_scale is None:
        same_float(q_latent=q_latent, q_rope=q_rope, latent=latent, k_rope=k_rope)
    else:
        same_float(q_latent=q_latent, q_rope=q_rope, k_rope=k_rope)
        dtype("latent", latent, QUANTISED)
        shape("latent_scale", latent_scale, pool, sizes)
        dtype("latent_scale", latent_scale, ("float32",))


def topk_indices(scores, k) -> None:
    """Raise ValueError or TypeError unless scores has a floating dtype and an axis, and k is a positive integer."""
    dtype("scores", scores, FLOATS)
    if scores.ndim == 0:
        raise ValueError("scores has shape (); it needs at least one axis")
    positive("k", k, integer=True)


def merge_states(outs, lses) -> None:
    """Raise ValueError or TypeError unless outs is P B T N V and lses its P B T N."""
    sizes: dict[str, int] = {}
    shape("outs", outs, "P B T N V", sizes)
    shape("lses", lses, "P B T N", sizes)
    dtype("outs", outs, FLOATS)
    dtype("lses", lses, ("float32", "float64"))
    if sizes["P"] == 0:
        raise ValueError("outs has no parts (P=0); at least one is needed")


def decode_sparse_mla(
    q_latent, q_rope, latent, k_rope, indices, *, scale, sinks=None, latent_scale=None, out_dtype=None
) -> dict[str, int]:
    """Raise ValueError or TypeError unless the arguments fit `decode_sparse_mla`; return the sizes by letter."""
    sizes: dict[str, int] = {}
    _latent_arrays(q_latent, q_rope, latent, k_rope, latent_scale, "B S", sizes)
    shape("indices", indices, "B T L", sizes)
    dtype("indices", indices, ("int32",))
    _options(sizes, scale, sinks, out_dtype)
    return sizes


def index_scores(q_index, k_index, lengths, *, k_scale=None, weights=None) -> None:
    """Raise ValueError or TypeError unless the arguments fit `index_scores` or `block_index_scores`."""
    sizes: dict[str, int] = {}
    shape("q_index", q_index, "B T I J", sizes)
    shape("k_index", k_index, "B S J", sizes)
    shape("lengths", lengths, "B", sizes)
    dtype("lengths", lengths, ("int32",))
    if k_scale is None:
        same_float(q_index=q_index, k_index=k_index)
    else:
        dtype("q_index", q_index, FLOATS)
        dtype("k_index", k_index, QUANTISED)
        shape("k_scale", k_scale, "B S", sizes)
        dtype("k_scale", k_scale, ("float32", "float64"))
    if weights is not None:
        shape("weights", weights, "B T I", sizes)
        dtype("weights", weights, ("float32", "float64"))


def decode_linear(q, k, v, state, decay, *, beta=None) -> None:
    """Raise ValueError or TypeError unless the arguments fit `decode_linear`. float64 stands where float32 is asked."""
    sizes: dict[str, int] = {}
    for name, array, letters in (("q", q, "B N H"), ("k", k, "B N H"), ("v", v, "B N V"), ("state", state, "B N H V")):
        shape(name, array, letters, sizes)
    same_float(q=q, k=k, v=v)
    if not hasattr(decay, "ndim"):
        raise TypeError(f"decay is {decay!r}; it must be an array with the axes N, B N or B N H")
    if decay.ndim not in (1, 2, 3):
        raise ValueError(f"decay has shape {tuple(decay.shape)}; it needs the axes N, B N or B N H")
    shape("decay", decay, ("N", "B N", "B N H")[decay.ndim - 1], sizes)
    for name, array in (("state", state), ("decay", decay), ("beta", beta)):
        if array is not None:
            dtype(name, array, ("float32", "float64"))
    if beta is not None:
        shape("beta", beta, "B N", sizes)
