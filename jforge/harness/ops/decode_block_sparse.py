"""decode_block_sparse: attention over the blocks, or with block_size 1 the slots, that a list names."""

from functools import partial

import numpy as np

from jforge.harness import draws, questions, views
from jforge.harness.op import Case, Draw, Fuzz, Inputs, Op, Work
from jforge.harness.ops import decode_attention

NAME, LISTS = "decode_block_sparse", "block_indices"
CACHES = ("k", "v")


def oracle(q, k, v, block_indices, lengths, *, block_size, scale, sinks=None, softcap=None, chunk=None, out_dtype=None):
    """(out, lse) in float64: attention of each query alone over the slots that its list lets it see."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, k if v is None else v))
    B, T, N, _ = q.shape
    S, K, X = k.shape[1], k.shape[2], block_indices.shape[2]
    out, lse = np.zeros((B, T, N, v.shape[-1])), np.full((B, T, N), -np.inf)
    for b, t, n in np.ndindex(B, T, N):
        end = S if lengths is None else int(lengths[b]) - T + t + 1
        listed = set(block_indices[b, t, n // (N // X)].tolist())
        slots = [s for s in range(min(S, end)) if s // block_size in listed]
        head, own = np.s_[b, slots, n // (N // K)], None if sinks is None else sinks[n : n + 1]
        one = (a[None, :, None] for a in (k[head], v[head]))
        query = q[b, t, n][None, None, None]
        result = decode_attention.oracle(query, *one, [len(slots)], scale=scale, sinks=own, softcap=softcap)
        out[b, t, n], lse[b, t, n] = (part[0, 0, 0] for part in result)
    return out, lse


def draw(case: Case, dtype: np.dtype, rng: np.random.Generator) -> Inputs:
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
    for name in CACHES:
        if arrays[name] is not None:
            arrays[name][~read] = np.nan
    arrays |= {LISTS: lists, "lengths": np.array(case.lengths, np.int32) if case.lengths else None}
    return Inputs(arrays, draws.with_sinks({"scale": H**-0.5, **case.options}, N, rng))


def _case(name, lengths, S, size, L, N=4, K=1, H=64, *tags, B=1, T=1, V=None, X=None, plan=(), **options) -> Case:
    """lengths () with B rows: the lists alone decide."""
    sizes = {"B": len(lengths) or B, "T": T, "N": N, "K": K, "S": S, "H": H, "V": H if V is None else V}
    sizes |= {"X": X or K, "L": L}
    return Case(name, NAME, sizes, lengths, {"block_size": size, **options}, frozenset(tags), dict(plan))


CASES = (
    _case("blocks_of_64", (512, 300), 512, 64, 4, 8, 2, 128, "basic"),
    _case("blocks_of_128", (1000,), 1024, 128, 5, 16, 2, 128, "basic"),
    _case("blocks_of_16", (256, 0, 77), 256, 16, 6, 4, 1, 64, "basic", "memcheck"),
    _case("blocks_of_8", (200, 13), 200, 8, 9, 6, 2, 64),
    _case("blocks_of_32_per_head", (256, 90), 256, 32, 3, 8, 2, 64, X=8),
    _case("blocks_two_queries", (256, 65), 256, 64, 2, 8, 2, 64, T=2, sinks=True),
    _case("blocks_sinks_softcap", (256, 1), 256, 64, 2, 8, 2, 128, sinks=True, softcap=5.0),
    _case("blocks_keys_are_values", (256, 130), 256, 64, 3, 16, 1, 64, V=0),
    _case("blocks_without_lengths", (), 200, 64, 3, 8, 2, 64, B=2, sinks=True),
    _case("blocks_few_of_many", (700,), 1024, 64, 20, 4, 1, 64),
    _case("tokens", (128, 30), 128, 1, 40, 8, 2, 64),
    _case("tokens_keys_are_values", (), 96, 1, 33, 16, 1, 64, B=2, V=0, sinks=True),
    _case("entries_64_heads", (), 96, 1, 70, 64, 1, 128, "memcheck", V=0, sinks=True),
    _case("tokens_two_queries", (128,), 128, 1, 70, 4, 1, 128, "memcheck", T=2),
)

# --- edges of the kernels' plans

_edge = partial(draws.edge, _case)

MOSAIC_EDGES = (
    # Every size, blocks smaller than a tile and larger, a partial last block, rows of any length.
    _edge((136, 0, 75), 136, 8, 13, splits=1),
    _edge((136, 1, 75), 136, 16, 5, K=2, dtype="bfloat16", splits=2),
    _edge((120, 96), 136, 32, 3, 8, H=128),
    _edge((200, 70), 200, 64, 4, 8, dtype="bfloat16"),
    _edge((1000, 321), 1000, 128, 8, 16, 2, 128, splits=1),
    # A list that is longer than the cache has blocks, and a cache of less than one block.
    _edge((72, 60), 72, 16, 9, splits=2),
    _edge((5,), 8, 64, 2),
    # The list alone decides; heads choose alone; several queries, the first of which see less or nothing.
    _edge((), 136, 32, 3, 8, B=2),
    _edge((100, 136), 136, 16, 4, 8, 2, X=8, sinks=True),
    _edge((2, 67), 72, 8, 6, 4, 2, T=3, splits=1),
    _edge((70,), 72, 16, 4, 4, T=2, X=4, softcap=2.0, out_dtype="float32"),
    # Sinks in the kernel and in the merge, groups above 8, a prime one, more rows than a program has, odd widths.
    _edge((70, 0), 72, 16, 4, 6, 2, sinks=True, splits=1),
    _edge((70, 0), 72, 16, 5, 6, 2, sinks=True, splits=2),
    _edge((70,), 72, 64, 2, 11),
    _edge((70,), 72, 64, 2, 128, H=128, dtype="bfloat16"),
    _edge((70,), 72, 32, 3, H=80, V=96, splits=1),
    _edge((70,), 72, 32, 3, H=80, splits=2),
    _edge((70,), 72, 32, 3, H=256),
    # Pages that are made of blocks, are blocks, and divide them.
    _edge((140, 30), 144, 8, 9, page=24, splits=2),
    _edge((140, 1), 144, 16, 5, page=16),
    _edge((140, 130), 144, 64, 3, 8, page=8),
    _edge((250, 130), 256, 128, 2, page=64),
    # Tokens: more tiles than the ring has stages, K and V heads, odd numbers of slots, tokens at all lengths.
    _edge((150, 0, 64), 150, 1, 100, K=2, H=128, splits=1),
    _edge((401,), 401, 1, 390, 8, H=128, V=64, dtype="bfloat16", splits=1),
    _edge((70, 1), 77, 1, 130, 12, 2, T=2, sinks=True, splits=2),
    _edge((70, 35), 70, 1, 64, X=4, softcap=2.0),
    _edge((), 84, 1, 70, page=12, B=2),
    # Keys that are the values: the kernel of few rows, by tokens and by blocks, and the kernel of many rows.
    _edge((), 150, 1, 150, 16, H=128, V=0, B=2, splits=1),
    _edge((70, 35), 77, 8, 9, 12, 2, T=2, V=0, sinks=True, splits=2),
    _edge((70, 35), 80, 16, 5, V=0, X=4, page=8),
    _edge((150, 70), 150, 1, 330, 64, H=128, V=0, dtype="bfloat16", sinks=True, splits=1),
    _edge((), 77, 1, 70, 128, H=512, V=0, sinks=True, splits=2),
    _edge((150, 70), 152, 32, 5, 80, H=128, T=2, V=0, sinks=True, splits=3),
    # Many rows in several lists, whole blocks of 64 and not.
    _edge((70,), 72, 8, 9, 128, 2, 128, V=0, sinks=True, splits=2),
    _edge((70,), 72, 8, 9, 80, 2, 128, V=0, sinks=True, splits=2),
    _edge((70,), 77, 1, 77, 64, H=256, V=0, splits=1, out_dtype="float32"),
)

VALUES = (32, 0)  # V; 0: the values are the keys, which another kernel reads
FEW, MANY = {"ctas_per_sm": 1, "min_split": 2**20}, {"block_n": 32, "ctas_per_sm": 4, "min_split": 32}
TRITON_EDGES = (
    # Rows that end before, at and after the edge of a block; the last block of the cache is partial.
    *(_edge(lengths, 2 * size + size // 2, size, 3, 2, H=32, V=V, dtype=dtype, B=2)
      for size in (1, 5, 8, 16, 32, 64, 128) for V in (24, 0) for dtype in ("float16", "float32")
      for lengths in ((0, size, size + 1, 2 * size + size // 2), ())),
    # Lists of key heads and of query heads, which fill a block of rows in part, one block, and several.
    *(_edge((130, 77)[: 1 + (X < 16)], 130, size, max(2, 50 // size), N, K, 32, X=X, V=V)
      for N, K, X in ((3, 3, 3), (6, 2, 2), (6, 2, 6), (5, 1, 1), (16, 1, 16), (80, 1, 1))
      for size in (1, 64) for V in VALUES),
    # Every query has its own lists, and sees one slot more than the one before it; some see nothing.
    *(_edge((1, T, 70), 70, size, 2, 4, 2, 16, T=T, X=X, V=V)
      for T, X in ((2, 2), (4, 2), (3, 4)) for size, V in ((16, 16), (16, 0), (64, 16))),
    # Head dims in one piece and in two, padded and not; whole tiles and gathered ones.
    *(_edge((131, 70), 131, size, 3, 3, H=H, V=V, dtype=dtype)
      for H, V in ((128, 128), (80, 80), (96, 96), (192, 128), (256, 256), (24, 8), (80, 0), (256, 0))
      for size, dtype in ((64, "float16"), (8, "float16"), (16, "float32"))),
    # DeepSeek-V4's entries.
    *(_edge((), 200, 1, 90, N, H=512, V=0, B=2, sinks=True) for N in (64, 128)),
    *(_edge((3, 150), 150, 1, 66, N, H=512, V=0) for N in (64, 128)),
    # Pages that are a multiple of the block, part of it, and neither.
    *(_edge((0, page + 1, S), S, size, 3, 4, 2, 32, T=T, V=V, dtype=dtype, page=page)
      for size, page, S, T, dtype in (
          (1, 16, 48, 1, "float16"), (16, 64, 192, 2, "float16"), (64, 16, 144, 1, "float16"),
          (128, 64, 192, 1, "float16"), (64, 128, 256, 2, "float32"), (64, 64, 192, 1, "float16"),
          (16, 24, 120, 1, "float32"))
      for V in VALUES),
    # A sink enters once, whether the kernel folds it or the merge.
    *(_edge((0, S, S - 3), S, size, L, 6, 2, 32, V=V, **more)
      for size, S, L in ((64, 130, 2), (64, 310, 5), (8, 130, 6), (1, 300, 160)) for V in VALUES
      for more in ({"sinks": True, "softcap": 5.0, "scale": 0.7},
                   {"softcap": 0.5, "scale": 0.7, "out_dtype": "float32"}, {"sinks": True})),
    # One split, and so many that some end up without a seen slot: in whole tiles, and gathered ones.
    *(_edge((250, 1, 100), 250, size, 256 // size, 2, H=32, V=V, plan=plan)
      for size, V in ((128, 32), (128, 0), (4, 0)) for plan in (FEW, MANY)),
    *(_edge((250, 1, 100), 250, size, 256 // size, 2, H=32, dtype="float32") for size in (1, 4)),
    # Both orders of the copies of a program of 64 rows.
    *(_edge((90, 70), 90, 3, 30, 33, H=32, V=0, softcap=3.0, plan={"early": early}) for early in (False, True)),
    # Blocks that are longer than the cache, and than 32 bits; no slots, and no rows.
    *(_edge((100, 33), 100, size, 2, 4, 2, 16, V=V) for size in (128, 2**30, 2**31 - 1, 2**40) for V in (16, 0)),
    *(_edge(lengths, 0, 2, 4, H=16, V=V, B=2) for lengths in ((0, 0), ()) for V in (16, 0)),
    *(_edge((), 4, 2, 4, H=16, V=V, B=0) for V in (16, 0)),
)  # fmt: skip

# --- fuzz

# B, T, N, K, S, H, V, X, L, block_size: lists for a key head or (X = N) a query head, partial last blocks, more entries
# than blocks, lists that may hold nothing but -1; V = 0: the values are the keys
SIZES = (
    (2, 1, 8, 2, 192, 64, 64, 2, 3, 64), (2, 1, 4, 2, 96, 64, 64, 4, 2, 32), (1, 2, 4, 1, 72, 64, 0, 1, 9, 8),
    (2, 1, 4, 2, 80, 64, 64, 2, 40, 1), (2, 1, 5, 1, 67, 64, 64, 1, 3, 16), (1, 3, 4, 2, 136, 64, 64, 4, 2, 64),
    (1, 1, 16, 1, 264, 128, 128, 1, 2, 128), (2, 1, 3, 1, 40, 64, 0, 1, 21, 1), (2, 1, 4, 2, 136, 192, 128, 2, 12, 16),
)  # fmt: skip
# Tiles of one block, of several, of a part of one, and gathered; lists of two heads, and of each query head.
MOSAIC = (
    (2, 1, 4, 1, 136, 64, 64, 1, 2, 64), (1, 1, 4, 2, 72, 64, 64, 4, 2, 32), (1, 2, 4, 1, 72, 64, 0, 1, 9, 8),
    (2, 1, 2, 1, 40, 64, 64, 1, 40, 1), (1, 1, 5, 1, 67, 64, 64, 1, 3, 16), (1, 1, 3, 1, 264, 64, 64, 1, 2, 128),
    (1, 2, 2, 2, 72, 128, 64, 2, 4, 16), (1, 1, 2, 1, 72, 64, 64, 2, 2, 16),
)  # fmt: skip


def question(draw, st, sizes, dtypes: tuple[str, ...], out: tuple[str, ...]) -> Draw:
    *chosen, block_size = draw(st.sampled_from(sizes))
    chosen = dict(zip("BTNKSHVXL", chosen, strict=True))
    strategies = questions.common(st, chosen["H"], out) | {"chunk": st.sampled_from((16, 64, 100))}
    strategies |= {"softcap": st.sampled_from(questions.SOFTCAPS)}
    options = {"block_size": block_size} | questions.optional(draw, st, **strategies)
    B, T, S, L = (chosen[axis] for axis in "BTSL")
    row = questions.near(st, S, block_size, 64, S // block_size * block_size, also=(T - 1, T))
    lengths = tuple(draw(row) for _ in range(B)) if draw(st.integers(0, 4)) else ()  # (): the lists alone decide
    places = {"alone": st.integers(0, B - 1), "paged": questions.pages(st, S), "split": st.integers(0, L)}
    case = Case("fuzz", NAME, chosen, lengths, options)
    return questions.put(draw, st, case, dtypes, questions.CACHED, places, questions.values(st))


def change(draw: Draw, inputs: Inputs, rng: np.random.Generator) -> Inputs:
    inputs = draws.huge(draw, inputs, rng, queries=("q",), keys=("k",))
    past = -(-draw.case.sizes["S"] // draw.case.options["block_size"])
    return Inputs({**inputs.arrays, LISTS: draws.with_garbage(inputs.arrays[LISTS], past, rng)}, inputs.options)


VIEWS = views.of_a_cache(CACHES) | {
    "alone": partial(views.alone, empty={"lengths": 0, LISTS: -1}),
    "paged": partial(views.paged, caches=CACHES, unread=views.pages_of_nan),
    "split": partial(views.split_lists, lists=LISTS),
}


def _pallas(draw: Draw) -> str | None:
    """In the head dims that are drawn."""
    sizes, options = draw.case.sizes, draw.case.options
    size, page = options["block_size"], draw.at if draw.view == "paged" else 0
    keys_are_values = sizes["V"] == 0
    return questions.first(
        (draw.dtype == "float32", questions.TF32),
        (keys_are_values and "softcap" in options, "has no cap"),
        (not keys_are_values and size > 1 and (page or sizes["S"]) % 8 > 0, "TMA needs a multiple of 8"),
        (not keys_are_values and page > 0 and page % size > 0 and size % page > 0, "its multiple or divide it"),
    )


# --- benchmarks


def moved(B, N, K, H, L, block_size, V=None, **_) -> int:
    caches = 1 if V == 0 else 2
    return 2 * B * (caches * L * block_size * K + 2 * N) * H


def _blocks(B: int, N: int, K: int, S: int, L: int, size: int) -> Work:
    H = 128
    return Work({"B": B, "N": N, "K": K, "S": S, "H": H, "L": L}, {"scale": H**-0.5, "block_size": size})


def _entries(B: int, N: int, S: int, L: int) -> Work:
    """DeepSeek-V4: picked entries of one head whose keys are its values."""
    H = 512
    sizes = {"B": B, "N": N, "K": 1, "S": S, "H": H, "V": 0, "L": L}
    return Work(sizes, {"scale": H**-0.5, "block_size": 1}, absent=("v", "lengths"))


def _reads(row) -> str:
    if row["block_size"] == 1:
        return f"{row['L']} entries of {row['H']}, keys are values"
    return f"{row['L']} blocks of {row['block_size']} a key head"


OP = Op(
    name=NAME, axes={"q": "BTNH", "k": "BSKH", "v": "BSKH", LISTS: "BTKL", "lengths": "B"}, draw=draw, oracle=oracle,
    cases=CASES, fuzz=Fuzz(question, SIZES, MOSAIC, VIEWS, change),
    edges={"pallas": MOSAIC_EDGES, "triton": TRITON_EDGES}, refusals={"pallas": _pallas}, caches=CACHES, lists=LISTS,
    moved=moved, fill={LISTS: draws.lists},
    bench=(_blocks(64, 64, 4, 131072, 16, 128), _blocks(16, 64, 4, 131072, 16, 128), _entries(64, 64, 32768, 512)),
    reads=_reads, invariant=_case("invariance", (777,), 1024, 64, 16, 8, 2, 128, sinks=True),
)  # fmt: skip
