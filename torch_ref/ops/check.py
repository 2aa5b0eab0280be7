"""Argument checks of the ops, shared by every torch backend.

Each function named after an op takes that op's arguments and returns None or raises one line that names the argument,
its value and what is allowed: ValueError for shapes, ranges and devices, TypeError for types and dtypes. They look at
metadata only, so they never wait for a device; the two functions that read values, `length_values` and `page_values`,
stand apart and are for tensors on the CPU.
"""

import math
import numbers

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
QUANTISED = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
MAY_BE_EMPTY = ("B", "S", "P")  # a batch, a cache and a page table may have no entry; every other dimension has one


def decode_attention(
    q,
    k,
    v,
    lengths,
    *,
    scale,
    window=None,
    sinks=None,
    softcap=None,
    page_table=None,
    k_scale=None,
    v_scale=None,
    chunk=None,
    out_dtype=None,
):
    """Check the arguments of `decode_attention`; shapes and dtypes are those of its docstring."""
    sizes = {}
    tensor("q", q, "B T N H", sizes, FLOATS)
    slots = "B S K" if page_table is None else "pages page K"
    tensor("k", k, f"{slots} H", sizes, FLOATS + QUANTISED, q.device)
    tensor("v", v, f"{slots} V", sizes, FLOATS + QUANTISED, q.device)
    heads(sizes)
    same_dtypes(q, k, v, k_scale, v_scale)
    for name, scales in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scales is not None:
            tensor(name, scales, slots, sizes, (torch.float32,), q.device)
    tensor("lengths", lengths, "B", sizes, (torch.int32,), q.device)
    if page_table is not None:
        tensor("page_table", page_table, "B P", sizes, (torch.int32,), q.device)
    if sinks is not None:
        tensor("sinks", sinks, "N", sizes, FLOATS, q.device)
    number("scale", scale)
    if softcap is not None:
        number("softcap", softcap, positive=True)
    for name, value in (("window", window), ("chunk", chunk)):
        if value is not None:
            integer(name, value)
    floating_dtype("out_dtype", out_dtype)


def decode_mla(
    q_latent,
    q_rope,
    latent,
    k_rope,
    lengths,
    *,
    scale,
    window=None,
    sinks=None,
    page_table=None,
    latent_scale=None,
    chunk=None,
    out_dtype=None,
):
    """Check the arguments of `decode_mla`; shapes and dtypes are those of its docstring."""
    sizes = {}
    tensor("q_latent", q_latent, "B T N C", sizes, FLOATS)
    tensor("q_rope", q_rope, "B T N R", sizes, (q_latent.dtype,), q_latent.device)
    slots = "B S" if page_table is None else "pages page"
    tensor("latent", latent, f"{slots} C", sizes, FLOATS + QUANTISED, q_latent.device)
    tensor("k_rope", k_rope, f"{slots} R", sizes, (q_latent.dtype,), q_latent.device)
    latent_dtype(q_latent, latent, latent_scale)
    if latent_scale is not None:
        tensor("latent_scale", latent_scale, slots, sizes, (torch.float32,), q_latent.device)
    tensor("lengths", lengths, "B", sizes, (torch.int32,), q_latent.device)
    if page_table is not None:
        tensor("page_table", page_table, "B P", sizes, (torch.int32,), q_latent.device)
    if sinks is not None:
        tensor("sinks", sinks, "N", sizes, FLOATS, q_latent.device)
    number("scale", scale)
    for name, value in (("window", window), ("chunk", chunk)):
        if value is not None:
            integer(name, value)
    floating_dtype("out_dtype", out_dtype)


def decode_block_sparse(
    q,
    k,
    v,
    block_indices,
    lengths,
    *,
    block_size,
    scale,
    sinks=None,
    softcap=None,
    page_table=None,
    k_scale=None,
    v_scale=None,
    out_dtype=None,
):
    """Check the arguments of `decode_block_sparse`; shapes and dtypes are those of its docstring."""
    sizes = {}
    tensor("q", q, "B T N H", sizes, FLOATS)
    slots = "B S K" if page_table is None else "pages page K"
    tensor("k", k, f"{slots} H", sizes, FLOATS + QUANTISED, q.device)
    if v is not None:
        tensor("v", v, f"{slots} V", sizes, FLOATS + QUANTISED, q.device)
    elif v_scale is not None:
        raise TypeError("v_scale is given with v=None; allowed: None, because the values are k and its scale k_scale")
    heads(sizes)
    same_dtypes(q, k, k if v is None else v, k_scale, k_scale if v is None else v_scale)
    for name, scales in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scales is not None:
            tensor(name, scales, slots, sizes, (torch.float32,), q.device)
    tensor("block_indices", block_indices, "B T lists L", sizes, (torch.int32,), q.device)
    if sizes["lists"] not in (sizes["K"], sizes["N"]):
        raise ValueError(
            f"block_indices has {sizes['lists']} lists per query; allowed: K={sizes['K']}, one per KV head, "
            f"or N={sizes['N']}, one per head"
        )
    if lengths is not None:
        tensor("lengths", lengths, "B", sizes, (torch.int32,), q.device)
    if page_table is not None:
        tensor("page_table", page_table, "B P", sizes, (torch.int32,), q.device)
    if sinks is not None:
        tensor("sinks", sinks, "N", sizes, FLOATS, q.device)
    number("scale", scale)
    if softcap is not None:
        number("softcap", softcap, positive=True)
    integer("block_size", block_size)
    floating_dtype("out_dtype", out_dtype)


def merge_states(outs, lses):
    """Check the arguments of `merge_states`: outs P B T N V of a float dtype, lses P B T N in float32 or float64."""
    sizes = {}
    # "parts" and not "P": a merge of no parts has no meaning, while a page table P may be empty
    tensor("outs", outs, "parts B T N V", sizes, FLOATS)
    tensor("lses", lses, "parts B T N", sizes, (torch.float32, torch.float64), outs.device)


def topk_indices(scores, k):
    """Check the arguments of `topk_indices`: scores [..., S] of a float dtype, k an int >= 1."""
    is_tensor("scores", scores)
    if scores.dtype not in FLOATS:
        raise TypeError(f"scores has dtype {scores.dtype}; allowed: {_names(FLOATS)}")
    if scores.ndim == 0:
        raise ValueError("scores has shape []; allowed: [..., S], at least one dimension")
    integer("k", k)


def length_values(lengths, limit, meaning="the number of slots"):
    """Raise ValueError unless 0 <= lengths[b] <= limit in every row. Reads values: it waits for a device tensor."""
    for row, length in enumerate(lengths.tolist()):
        if not 0 <= length <= limit:
            raise ValueError(f"lengths[{row}] is {length}; allowed: 0 to {limit}, {meaning}")


def page_values(page_table, needed, pages):
    """Raise ValueError unless 0 <= page_table[b, p] < pages wherever needed[b, p]. Reads values, as `length_values`."""
    wrong = needed & ((page_table < 0) | (page_table >= pages))
    for row, entry in wrong.nonzero().tolist():
        value = page_table[row, entry].item()
        raise ValueError(f"page_table[{row}, {entry}] is {value}; allowed: 0 to {pages - 1}, the pages of the pool")


def tensor(name, value, dims, sizes, dtypes, device=None):
    """Check one tensor: its rank, the sizes of its dimensions, its dtype and its device.

    dims names the dimensions, as in "B S K H". sizes maps names to numbers: a known name must agree, a new one is
    added, which is how two arguments are held to the same B.
    """
    is_tensor(name, value)
    if value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {value.dtype}; allowed: {_names(dtypes)}")
    letters = dims.split()
    expected = " ".join(f"{d}={sizes[d]}" if d in sizes else d for d in letters)
    shape = list(value.shape)
    fits = len(shape) == len(letters) and all(
        sizes.get(d, n) == n and (n > 0 or d in MAY_BE_EMPTY) for d, n in zip(letters, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} has shape {shape}; allowed: [{expected}]")
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on device {value.device}; allowed: {device}, where the first argument is")
    sizes.update(zip(letters, shape, strict=True))


def heads(sizes):
    """Every KV head must serve the same number of query heads."""
    if sizes["N"] % sizes["K"]:
        raise ValueError(f"q has N={sizes['N']} heads; allowed: a multiple of the K={sizes['K']} heads of k")


def same_dtypes(q, k, v, k_scale, v_scale):
    """q, k and v share one dtype, or k and v share a quantised one and both come with scales."""
    quantised = k.dtype in QUANTISED
    if not quantised and k.dtype != q.dtype:
        raise TypeError(f"k has dtype {k.dtype}; allowed: {q.dtype}, the dtype of q, or a quantised one with scales")
    if v.dtype != k.dtype:
        raise TypeError(f"v has dtype {v.dtype}; allowed: {k.dtype}, the dtype of k")
    for name, scales in (("k_scale", k_scale), ("v_scale", v_scale)):
        if quantised and scales is None:
            raise TypeError(f"{name} is None; allowed: a float32 tensor, because k and v have dtype {k.dtype}")
        if not quantised and scales is not None:
            raise TypeError(f"{name} is given for k and v of dtype {k.dtype}; allowed: with {_names(QUANTISED)}")


def latent_dtype(q_latent, latent, latent_scale):
    """latent has q_latent's dtype and no scales, or a quantised one with them."""
    if latent.dtype in QUANTISED:
        if latent_scale is None:
            raise TypeError(f"latent_scale is None; allowed: a float32 tensor, because latent has dtype {latent.dtype}")
    elif latent.dtype != q_latent.dtype:
        raise TypeError(
            f"latent has dtype {latent.dtype}; allowed: {q_latent.dtype}, the dtype of q_latent, or a quantised one "
            "with scales"
        )
    elif latent_scale is not None:
        raise TypeError(
            f"latent_scale is given for a latent of dtype {latent.dtype}; allowed: with {_names(QUANTISED)}"
        )


def is_tensor(name, value):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; allowed: a torch.Tensor")


def number(name, value, positive=False):
    """A finite Python (or NumPy) number; a tensor would need a device sync to be read."""
    wanted = "a finite number > 0" if positive else "a finite number"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is a {type(value).__name__}; allowed: {wanted}")
    if not math.isfinite(value) or (positive and value <= 0):
        raise ValueError(f"{name} is {value}; allowed: {wanted}")


def integer(name, value, least=1):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is a {type(value).__name__}; allowed: an int >= {least}")
    if value < least:
        raise ValueError(f"{name} is {value}; allowed: an int >= {least}")


def floating_dtype(name, value):
    if value is not None and value not in FLOATS:
        raise TypeError(f"{name} is {value}; allowed: None, {_names(FLOATS)}")


def _names(dtypes):
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)
