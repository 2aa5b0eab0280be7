"""Argument checks of the ops, shared by every torch backend.

Each function named after an op takes that op's arguments and returns None or raises one line that names the argument,
its value and what is allowed: ValueError for shapes, ranges and devices, TypeError for types and dtypes. They look at
metadata only, so they never wait for a device; the two functions that read values, `length_values` and `page_values`,
stand apart, and values are read on the CPU alone.
"""

import functools
import numbers

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
QUANTISED = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
WIDE = (torch.float32, torch.float64)
INT32 = (torch.int32,)
MAY_BE_EMPTY = ("B", "S", "P")  # a batch, a cache and a page table may have no entry; every other dimension has one
DECAYS = ("N", "B N", "B N H")
FLOAT32_MAX = torch.finfo(torch.float32).max


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


def is_tensor(name, value):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; allowed: a torch.Tensor")


def number(name, value, least=-FLOAT32_MAX, most=FLOAT32_MAX):
    """A Python (or NumPy) number; a tensor would need a device sync to be read."""
    wanted = f"a number from {least:.3g} to {most:.3g}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is a {type(value).__name__}; allowed: {wanted}")
    if not least <= (value.item() if hasattr(value, "item") else value) <= most:  # NumPy's float16 holds no bound
        raise ValueError(f"{name} is {value}; allowed: {wanted}")


def integer(name, value, least=1):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is a {type(value).__name__}; allowed: an int >= {least}")
    if value < least:
        raise ValueError(f"{name} is {value}; allowed: an int >= {least}")


def floating_dtype(name, value):
    if value is not None and value not in FLOATS:
        raise TypeError(f"{name} is {value}; allowed: None, {_names(FLOATS)}")


def length_values(lengths, limit, meaning="the number of slots"):
    """Raise ValueError unless 0 <= lengths[b] <= limit in every row; on a device the values are not read."""
    for row, length in enumerate(lengths.tolist() if lengths.device.type == "cpu" else ()):
        if not 0 <= length <= limit:
            raise ValueError(f"lengths[{row}] is {length}; allowed: 0 to {limit}, {meaning}")


def page_values(page_table, needed, pages):
    """Raise ValueError unless 0 <= page_table[b, p] < pages wherever needed[b, p]; for tensors on the CPU."""
    wrong = needed & ((page_table < 0) | (page_table >= pages))
    for row, entry in wrong.nonzero().tolist():
        value = page_table[row, entry].item()
        raise ValueError(f"page_table[{row}, {entry}] is {value}; allowed: 0 to {pages - 1}, the pages of the pool")


# Rules between arguments. given: {name: argument} of one call. sizes: {dimension: size} of the tensors before the rule.


def _heads(given, sizes):
    """Every KV head serves the same number of query heads; k and v share a dtype, and both are quantised or neither.

    v=None: the values are k, and its scale is theirs.
    """
    k, v = given["k"], given["v"]
    if v is None and given.get("v_scale") is not None:
        raise TypeError("v_scale is given with v=None; allowed: None, because the values are k and its scale k_scale")
    if sizes["N"] % sizes["K"]:
        raise ValueError(f"q has N={sizes['N']} heads; allowed: a multiple of the K={sizes['K']} heads of k")
    if v is not None and v.dtype != k.dtype:
        raise TypeError(f"v has dtype {v.dtype}; allowed: {k.dtype}, the dtype of k")
    for name in ("k", "v") if v is not None else ("k",):
        _scaled(name, f"{name}_scale")(given, sizes)


def _lists(given, sizes):
    if sizes["lists"] not in (sizes["K"], sizes["N"]):
        raise ValueError(
            f"block_indices has {sizes['lists']} lists per query; allowed: K={sizes['K']}, one per KV head, "
            f"or N={sizes['N']}, one per head"
        )


def _scaled(name, scale):
    """The rule that the argument `scale` comes with a quantised argument `name`, and with no other."""

    def rule(given, sizes):
        stored = given[name].dtype
        if stored in QUANTISED and given.get(scale) is None:
            raise TypeError(f"{scale} is None; allowed: a float32 tensor, because {name} has dtype {stored}")
        if stored not in QUANTISED and given.get(scale) is not None:
            raise TypeError(f"{scale} is given for {name} of dtype {stored}; allowed: with {_names(QUANTISED)}")

    return rule


def _decay(given, sizes):
    decay = given["decay"]
    is_tensor("decay", decay)
    if not 1 <= decay.ndim <= len(DECAYS):
        allowed = ", ".join(f"[{dims}]" for dims in DECAYS)
        raise ValueError(f"decay has shape {list(decay.shape)}; allowed: {allowed}")
    tensor("decay", decay, DECAYS[decay.ndim - 1], sizes, WIDE, given["q"].device)


def _scores(given, sizes):
    scores = given["scores"]
    is_tensor("scores", scores)
    if scores.dtype not in FLOATS:
        raise TypeError(f"scores has dtype {scores.dtype}; allowed: {_names(FLOATS)}")
    if scores.ndim == 0:
        raise ValueError("scores has shape []; allowed: [..., S], at least one dimension")
    integer("k", given["k"])


def _names(dtypes):
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


OPTIONS = {
    "scale": number,
    "softcap": functools.partial(number, least=1e-30, most=1e38),
    "window": integer,
    "chunk": integer,
    "block_size": integer,
    "out_dtype": floating_dtype,
}
MAY_BE_NONE = ("softcap", "window", "chunk")


def _checks(positional, *rows):
    """The check of an op: rows in their order, arguments (name, dimensions, dtypes) or rules, then its options.

    A name with `?` may be None; "query" among the dtypes is that of the first tensor; with a page_table, B S stands for
    pages page. positional: the names of what the op takes by position.
    """

    def check(*args, **given):
        given = dict(zip(positional.split(), args, strict=False)) | given
        sizes, query = {}, None
        for row in rows:
            if callable(row):
                row(given, sizes)
                continue
            name, dims, dtypes = row[0].removesuffix("?"), row[1], row[2]
            value = given.get(name)
            if value is None and row[0].endswith("?"):
                continue
            if given.get("page_table") is not None:
                dims = dims.replace("B S", "pages page")
            dtypes = [query.dtype if d == "query" else d for d in dtypes]
            tensor(name, value, dims, sizes, dtypes, None if query is None else query.device)
            query = value if query is None else query
        for name, rule in OPTIONS.items():
            if name in given and not (given[name] is None and name in MAY_BE_NONE):
                rule(name, given[name])

    return check


LIKE_QUERY, SCALE = ("query",), (torch.float32,)
STORED = LIKE_QUERY + QUANTISED
Q, K, V = ("q", "B T N H", FLOATS), ("k", "B S K H", STORED), ("v", "B S K V", STORED)
SCALES = ("k_scale?", "B S K", SCALE), ("v_scale?", "B S K", SCALE)
ALIBI = ("alibi?", "N", WIDE)
LENGTHS, PAGES, SINKS = ("lengths", "B", INT32), ("page_table?", "B P", INT32), ("sinks?", "N", FLOATS)
BLOCKS, TOKENS = ("block_indices", "B T lists L", INT32), ("indices", "B T L", INT32)
V_OR_K, LENGTHS_OR_ALL = ("v?", *V[1:]), ("lengths?", *LENGTHS[1:])
MLA_QUERIES = ("q_latent", "B T N C", FLOATS), ("q_rope", "B T N R", LIKE_QUERY)
LATENTS = ("latent", "B S C", STORED), ("k_rope", "B S R", LIKE_QUERY)
MLA = *MLA_QUERIES, *LATENTS, _scaled("latent", "latent_scale"), ("latent_scale?", "B S", SCALE)
KEYS = ("q_index", "B T I J", FLOATS), ("k_index", "B S J", STORED)
INDEX = *KEYS, _scaled("k_index", "k_scale"), ("k_scale?", "B S", SCALE)
ROW = ("q", "B N H", FLOATS), ("k", "B N H", LIKE_QUERY), ("v", "B N V", LIKE_QUERY), ("state", "B N H V", WIDE)

decode_attention = _checks("q k v lengths", Q, K, V, _heads, *SCALES, LENGTHS, PAGES, SINKS, ALIBI)
decode_mla = _checks("q_latent q_rope latent k_rope lengths", *MLA, LENGTHS, PAGES, SINKS)
decode_block_sparse = _checks(
    "q k v block_indices lengths", Q, K, V_OR_K, _heads, *SCALES, BLOCKS, _lists, LENGTHS_OR_ALL, PAGES, SINKS
)
decode_sparse_mla = _checks("q_latent q_rope latent k_rope indices", *MLA, TOKENS, SINKS)
index_scores = _checks("q_index k_index weights lengths", *INDEX, ("weights", "B T I", WIDE), LENGTHS)
block_index_scores = _checks("q_index k_index lengths", *INDEX, LENGTHS)
topk_indices = _checks("scores k", _scores)
decode_linear = _checks("q k v state decay", *ROW, _decay, ("beta?", "B N", WIDE))
# "parts" and not "P": a merge of no parts has no meaning, while a page table P may be empty
merge_states = _checks("outs lses", ("outs", "parts B T N V", FLOATS), ("lses", "parts B T N", WIDE))
