"""The named op cases: one list that tests, `jforge equiv`, benchmarks and GPU runs read.

A case is sizes, row lengths and options; `build` draws its inputs, and puts NaN into every slot that no query may
read, so that each case is also a poison test.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {n: np.dtype(n) for n in ("float16", "float32", "float64")} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Case:
    """One call of an op. `sizes` by letter (DESIGN names); `lengths` one a row; `options` are keyword arguments."""

    name: str
    op: str
    sizes: Mapping[str, int]
    lengths: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    tags: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call: arrays in the order of the op's signature, then keyword arguments (arrays included)."""

    arrays: Mapping[str, np.ndarray]
    options: Mapping[str, Any]


def build(case: Case, dtype: str, seed: int = 0) -> Inputs:
    """Draw the inputs of `case`, rounded to `dtype` ("float16", "bfloat16", "float32", "float64")."""
    return _BUILD[case.op](case, DTYPES[dtype], np.random.default_rng([seed, *case.name.encode()]))


def _decode_attention(case: Case, dtype: np.dtype, rng: np.random.Generator) -> Inputs:
    B, T, N, K, S, H, V = (case.sizes[axis] for axis in "BTNKSHV")
    shapes = {"q": (B, T, N, H), "k": (B, S, K, H), "v": (B, S, K, V)}
    return _over_a_cache(case, dtype, rng, shapes, ("k", "v"), H**-0.5)


def _decode_mla(case: Case, dtype: np.dtype, rng: np.random.Generator) -> Inputs:
    B, T, N, S, C, R = (case.sizes[axis] for axis in "BTNSCR")
    shapes = {"q_latent": (B, T, N, C), "q_rope": (B, T, N, R), "latent": (B, S, C), "k_rope": (B, S, R)}
    return _over_a_cache(case, dtype, rng, shapes, ("latent", "k_rope"), (C + R) ** -0.5)


def _over_a_cache(case: Case, dtype, rng, shapes: dict, caches: tuple[str, ...], scale: float) -> Inputs:
    """Normal draws of these shapes, NaN in every slot of `caches` (B S ...) that no query of the case may read."""
    arrays = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    T, S, N = (case.sizes[axis] for axis in "TSN")
    window = case.options.get("window") or S
    for row, length in enumerate(case.lengths):
        unread = np.ones(S, bool)
        unread[max(0, length - T + 1 - window) : length] = False
        for name in caches:
            arrays[name][row, unread] = np.nan
    options = _with_sinks({"scale": scale, **case.options}, N, rng)
    return Inputs({**arrays, "lengths": np.array(case.lengths, np.int32)}, options)


def _decode_block_sparse(case: Case, dtype: np.dtype, rng: np.random.Generator) -> Inputs:
    """Lists of L distinct blocks each, a few of them -1, in random order. V = 0: the values are the keys. Lengths of
    () are None. NaN in every slot of a head that no list of the head lets a query see.
    """
    B, T, N, K, S, H, V, X, L = (case.sizes[axis] for axis in "BTNKSHVXL")
    size = case.options["block_size"]
    count = -(-S // size)
    arrays = {"q": rng.standard_normal((B, T, N, H)), "k": rng.standard_normal((B, S, K, H))}
    arrays["v"] = rng.standard_normal((B, S, K, V)) if V else None
    arrays = {name: None if a is None else a.astype(dtype) for name, a in arrays.items()}
    lists = np.full((B, T, X, L), -1, np.int32)
    for b, t, x in np.ndindex(B, T, X):
        picks = rng.permutation(count)[: max(0, L - int(rng.integers(3)))]
        lists[b, t, x, : len(picks)] = picks
        rng.shuffle(lists[b, t, x])
    read = np.zeros((B, S, K), bool)
    for b, t, x in np.ndindex(B, T, X):
        end = case.lengths[b] - T + t + 1 if case.lengths else S
        seen = np.isin(np.arange(S) // size, lists[b, t, x]) & (np.arange(S) < end)
        read[b, :, x // (X // K)] |= seen
    for name in ("k", "v"):
        if arrays[name] is not None:
            arrays[name][~read] = np.nan
    arrays |= {"block_indices": lists, "lengths": np.array(case.lengths, np.int32) if case.lengths else None}
    return Inputs(arrays, _with_sinks({"scale": H**-0.5, **case.options}, N, rng))


def _decode_sparse_mla(case: Case, dtype: np.dtype, rng: np.random.Generator) -> Inputs:
    """Lists of L distinct tokens, a few of them -1, in random order; NaN in every slot that no query of a row names."""
    B, T, N, S, C, R, L = (case.sizes[axis] for axis in "BTNSCRL")
    shapes = {"q_latent": (B, T, N, C), "q_rope": (B, T, N, R), "latent": (B, S, C), "k_rope": (B, S, R)}
    arrays = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    indices = np.full((B, T, L), -1, np.int32)
    for b, t in np.ndindex(B, T):
        picks = rng.permutation(S)[: max(0, L - int(rng.integers(5)))] if case.lengths[b] else []
        indices[b, t, : len(picks)] = picks
        rng.shuffle(indices[b, t])
    for b in range(B):
        unread = ~np.isin(np.arange(S), indices[b])
        arrays["latent"][b, unread] = arrays["k_rope"][b, unread] = np.nan
    return Inputs({**arrays, "indices": indices}, _with_sinks({"scale": (C + R) ** -0.5, **case.options}, N, rng))


def _index_scores(case: Case, dtype: np.dtype, rng: np.random.Generator) -> Inputs:
    """Signed weights for index_scores, none for block_index_scores; NaN in the keys past each length. The option
    `stored` is the dtype of quantised keys.
    """
    B, T, heads, S, J = (case.sizes[axis] for axis in "BTISJ")
    q, k = (rng.standard_normal(shape).astype(dtype) for shape in ((B, T, heads, J), (B, S, J)))
    options = dict(case.options)
    for b, length in enumerate(case.lengths):
        k[b, length:] = np.nan
    if stored := options.pop("stored", None):
        k, options["k_scale"] = quantised(k, stored, 25, rng.uniform(0.02, 0.08, (B, S)))
    arrays = {"q_index": q, "k_index": k}
    if case.op == "index_scores":
        arrays["weights"] = rng.standard_normal((B, T, heads)).astype(np.float32)
    return Inputs({**arrays, "lengths": np.array(case.lengths, np.int32)}, options)


def quantised(x: np.ndarray, stored: str, steps: float, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`x` as codes of the one-byte dtype `stored`, `steps` of them a unit, and the float32 scales, one a slot. Slots of
    NaN have a scale of NaN, and codes of NaN where there is one.
    """
    unread = np.isnan(x).any(axis=-1)
    codes = np.round(steps * np.where(unread[..., None], 1, x.astype(np.float32))).clip(-127, 127).astype(stored)
    if stored != "int8":
        codes[unread] = np.nan
    return codes, np.where(unread, np.nan, scale).astype(np.float32)


def _decode_linear(case: Case, dtype: np.dtype, rng: np.random.Generator) -> Inputs:
    """`decay` is the number of axes of the decay: N, B N or B N H. Keys of unit length, as the delta rule wants."""
    B, N, H, V = (case.sizes[axis] for axis in "BNHV")
    q, k, v = (rng.standard_normal((B, N, width)) for width in (H, H, V))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    arrays = {name: a.astype(dtype) for name, a in (("q", q), ("k", k), ("v", v))}
    arrays["state"] = rng.standard_normal((B, N, H, V)).astype(np.float32)
    arrays["decay"] = rng.uniform(0.5, 1, ((N,), (B, N), (B, N, H))[case.sizes["decay"] - 1]).astype(np.float32)
    beta = {"beta": rng.uniform(0, 1, (B, N)).astype(np.float32)} if case.sizes["beta"] else {}
    return Inputs(arrays, beta)


def _with_sinks(options: dict, heads: int, rng: np.random.Generator) -> dict:
    if options.pop("sinks", False):
        options["sinks"] = rng.standard_normal(heads).astype(np.float32)
    return options


def _merge_states(case: Case, dtype: np.dtype, rng: np.random.Generator) -> Inputs:
    """Part p of row b is empty where p >= lengths[b]: NaN with lse = -inf."""
    P, B, T, N, V = (case.sizes[axis] for axis in "PBTNV")
    outs = rng.standard_normal((P, B, T, N, V)).astype(dtype)
    lses = (3 * rng.standard_normal((P, B, T, N))).astype(np.float64 if dtype.itemsize == 8 else np.float32)
    for row, parts in enumerate(case.lengths):
        outs[parts:, row], lses[parts:, row] = np.nan, -np.inf
    return Inputs({"outs": outs, "lses": lses}, {})


_BUILD = {
    "decode_attention": _decode_attention,
    "decode_block_sparse": _decode_block_sparse,
    "decode_linear": _decode_linear,
    "decode_mla": _decode_mla,
    "decode_sparse_mla": _decode_sparse_mla,
    "index_scores": _index_scores,
    "block_index_scores": _index_scores,
    "merge_states": _merge_states,
}


def _attention(name, B, N, K, H, S, lengths, *tags, T=1, V=None, **options) -> Case:
    sizes = {"B": B, "T": T, "N": N, "K": K, "S": S, "H": H, "V": V or H}
    return Case(name, "decode_attention", sizes, lengths, options, frozenset(tags))


def _mla(name, B, N, S, lengths, *tags, T=1, C=512, R=64, **options) -> Case:
    sizes = {"B": B, "T": T, "N": N, "S": S, "C": C, "R": R}
    return Case(name, "decode_mla", sizes, lengths, options, frozenset(tags))


def _blocks(name, B, N, K, H, S, size, L, lengths, *tags, T=1, V=None, X=None, **options) -> Case:
    sizes = {"B": B, "T": T, "N": N, "K": K, "S": S, "H": H, "V": H if V is None else V, "X": X or K, "L": L}
    return Case(name, "decode_block_sparse", sizes, lengths, {"block_size": size, **options}, frozenset(tags))


def _sparse_mla(name, B, N, S, L, *tags, T=1, C=512, R=64, filled=None, **options) -> Case:
    sizes = {"B": B, "T": T, "N": N, "S": S, "C": C, "R": R, "L": L}
    return Case(name, "decode_sparse_mla", sizes, filled or (1,) * B, options, frozenset(tags))


def _index(name, op, B, heads, S, J, lengths, *tags, T=1, **options) -> Case:
    return Case(name, op, {"B": B, "T": T, "I": heads, "S": S, "J": J}, lengths, options, frozenset(tags))


def _linear(name, B, N, H, *tags, V=None, decay=1, beta=0) -> Case:
    sizes = {"B": B, "N": N, "H": H, "V": V or H, "decay": decay, "beta": beta}
    return Case(name, "decode_linear", sizes, tags=frozenset(tags))


def _merge(name, P, B, T, N, V, lengths, *tags) -> Case:
    sizes = {"P": P, "B": B, "T": T, "N": N, "V": V}
    return Case(name, "merge_states", sizes, lengths, {}, frozenset(tags))


CASES: tuple[Case, ...] = (
    _attention("llama", 2, 8, 2, 128, 192, (192, 77), "basic", "demo"),
    _attention("mha", 2, 3, 3, 64, 128, (128, 5), "basic"),
    _attention("mqa", 2, 8, 1, 64, 128, (127, 128), "basic"),
    _attention("group_3", 1, 6, 2, 128, 128, (100,), "basic"),
    _attention("empty_rows", 4, 8, 2, 64, 128, (0, 1, 0, 2), "basic", "demo"),
    _attention("block_edges", 4, 4, 1, 64, 192, (63, 64, 65, 129), "basic"),
    _attention("long", 1, 4, 1, 128, 1024, (1000,), "basic", "demo"),
    _attention("ragged", 3, 4, 2, 128, 512, (512, 0, 300), "basic"),
    _attention("large_logits", 2, 4, 2, 64, 128, (128, 40), scale=40.0),
    _attention("chunked", 3, 4, 2, 64, 512, (512, 129, 0), chunk=128),
    _attention("float32_out", 2, 8, 2, 64, 128, (128, 17), out_dtype="float32"),
    _attention("sinks", 3, 8, 2, 64, 256, (256, 0, 90), sinks=True),
    _attention("softcap", 2, 8, 2, 128, 128, (128, 33), softcap=5.0),
    _attention("window", 4, 8, 2, 64, 256, (256, 0, 64, 131), window=67),
    _attention("window_sinks", 2, 8, 2, 64, 256, (256, 30), window=128, sinks=True, chunk=64),
    _attention("four_queries", 3, 8, 2, 64, 256, (256, 2, 130), T=4),
    _attention("four_queries_window", 2, 8, 2, 128, 256, (256, 70), T=4, window=50, sinks=True, softcap=20.0),
    _attention("wide_group", 2, 32, 2, 64, 128, (128, 70), T=1),
    _attention("group_71", 1, 71, 1, 64, 128, (90,)),
    _attention("head_80", 2, 8, 2, 80, 128, (128, 31)),
    _attention("head_96", 2, 8, 2, 96, 128, (128, 31)),
    _attention("head_80_chunked", 2, 8, 2, 80, 256, (256, 131), chunk=64),
    _attention("head_96_chunked", 2, 8, 2, 96, 256, (256, 131), chunk=64),
    _attention("head_192_128", 2, 8, 2, 192, 128, (128, 31), V=128),
    _attention("head_256", 2, 8, 2, 256, 128, (128, 31)),
    _mla("mla_16_heads", 2, 16, 128, (128, 70), "basic"),
    _mla("mla_128_heads", 1, 128, 128, (100,), "basic"),
    _mla("mla_empty_rows", 4, 16, 128, (0, 1, 64, 65), C=128),
    _mla("mla_one_head", 2, 1, 128, (128, 3), C=128),
    _mla("mla_64_heads", 2, 64, 192, (192, 0), C=128),
    _mla("mla_two_queries", 2, 16, 128, (128, 1), T=2, C=128),
    _mla("mla_window_sinks", 2, 32, 256, (256, 40), C=128, window=70, sinks=True),
    _mla("mla_80_heads", 2, 80, 128, (128, 70), C=128),
    _mla("mla_chunked", 3, 16, 256, (256, 130, 0), C=128, chunk=64),
    _blocks("blocks_of_64", 2, 8, 2, 128, 512, 64, 4, (512, 300), "basic"),
    _blocks("blocks_of_128", 1, 16, 2, 128, 1024, 128, 5, (1000,), "basic"),
    _blocks("blocks_of_16", 3, 4, 1, 64, 256, 16, 6, (256, 0, 77), "basic"),
    _blocks("blocks_of_8", 2, 6, 2, 64, 200, 8, 9, (200, 13)),
    _blocks("blocks_of_32_per_head", 2, 8, 2, 64, 256, 32, 3, (256, 90), X=8),
    _blocks("blocks_two_queries", 2, 8, 2, 64, 256, 64, 2, (256, 65), T=2, sinks=True),
    _blocks("blocks_sinks_softcap", 2, 8, 2, 128, 256, 64, 2, (256, 1), sinks=True, softcap=5.0),
    _blocks("blocks_keys_are_values", 2, 16, 1, 64, 256, 64, 3, (256, 130), V=0),
    _blocks("blocks_without_lengths", 2, 8, 2, 64, 200, 64, 3, (), sinks=True),
    _blocks("blocks_few_of_many", 1, 4, 1, 64, 1024, 64, 20, (700,)),
    _blocks("tokens", 2, 8, 2, 64, 128, 1, 40, (128, 30)),
    _blocks("tokens_keys_are_values", 2, 16, 1, 64, 96, 1, 33, (), V=0, sinks=True),
    _blocks("entries_64_heads", 1, 64, 1, 128, 96, 1, 70, (), V=0, sinks=True),
    _blocks("tokens_two_queries", 1, 4, 1, 128, 128, 1, 70, (128,), T=2),
    _sparse_mla("sparse_mla_16_heads", 2, 16, 256, 96, "basic"),
    _sparse_mla("sparse_mla_128_heads", 1, 128, 128, 64, "basic"),
    _sparse_mla("sparse_mla_small", 2, 8, 96, 40, C=128, T=2, sinks=True),
    _sparse_mla("sparse_mla_nothing_picked", 2, 16, 64, 16, C=128, filled=(0, 1)),
    _index("index_64_heads", "index_scores", 2, 64, 256, 128, (256, 100), "basic"),
    _index("index_5_heads", "index_scores", 3, 5, 136, 64, (136, 0, 7)),
    _index("index_two_queries", "index_scores", 2, 8, 128, 64, (128, 1), T=2),
    _index("index_int8_keys", "index_scores", 2, 8, 136, 64, (136, 70), stored="int8"),
    _index("block_index_4_heads", "block_index_scores", 2, 4, 512, 128, (512, 300), "basic", block_size=128),
    _index("block_index_blocks_of_16", "block_index_scores", 3, 2, 136, 64, (136, 0, 17), block_size=16),
    _index("block_index_two_queries", "block_index_scores", 2, 4, 128, 64, (128, 65), T=2, block_size=64),
    _index(
        "block_index_e4m3_keys", "block_index_scores", 2, 4, 128, 64, (128, 65), block_size=64, stored="float8_e4m3fn"
    ),
    _linear("linear_lightning", 2, 4, 128, "basic"),
    _linear("linear_decay_a_row", 2, 3, 64, V=128, decay=2),
    _linear("linear_delta_rule", 2, 2, 64, decay=2, beta=1),
    _linear("linear_decay_a_channel", 1, 2, 128, V=64, decay=3, beta=1),
    _merge("merge_two", 2, 2, 1, 8, 128, (2, 1), "basic", "demo"),
    _merge("merge_many", 5, 3, 2, 4, 64, (5, 0, 3), "basic"),
)


def cases(op: str | None = None, tag: str | None = None) -> tuple[Case, ...]:
    """The cases of an op, of a tag, or all."""
    return tuple(c for c in CASES if op in (None, c.op) and (tag is None or tag in c.tags))
