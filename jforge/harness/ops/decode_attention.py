"""decode_attention: dense attention of the new queries over a cache, a prefix of it, or a window."""

from dataclasses import replace
from functools import partial

import numpy as np

from jforge.harness import draws, peers, questions, views
from jforge.harness.op import Case, Draw, Fuzz, Inputs, Op, Work

NAME = "decode_attention"
CACHES = ("k", "v")


def oracle(q, k, v, lengths, *, scale, window=None, sinks=None, softcap=None, chunk=None, out_dtype=None, alibi=None):
    """(out, lse) in float64, one query at a time. chunk and out_dtype change nothing here."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    B, T, N, _ = q.shape
    group = N // k.shape[2]
    out, lse = np.zeros((B, T, N, v.shape[-1])), np.full((B, T, N), -np.inf)
    for b, t, n in np.ndindex(B, T, N):
        end = int(lengths[b]) - T + t + 1
        start = 0 if window is None else max(0, end - window)
        sink = -np.inf if sinks is None else float(sinks[n])
        if end <= 0:
            lse[b, t, n] = sink
            continue
        logits = scale * k[b, start:end, n // group] @ q[b, t, n]
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        if alibi is not None:
            logits = logits + float(alibi[n]) * np.arange(start - end + 1, 1)
        top = max(logits.max(), sink)
        weights = np.exp(logits - top)
        total = weights.sum() + np.exp(sink - top)
        out[b, t, n] = weights @ v[b, start:end, n // group] / total
        lse[b, t, n] = top + np.log(total)
    return out, lse


def draw(case: Case, dtype: np.dtype, rng: np.random.Generator) -> Inputs:
    B, T, N, K, S, H, V = (case.sizes[axis] for axis in "BTNKSHV")
    shapes = {"q": (B, T, N, H), "k": (B, S, K, H), "v": (B, S, K, V)}
    inputs = draws.over_a_cache(case, dtype, rng, shapes, CACHES, H**-0.5)
    if not inputs.options.get("alibi"):
        return inputs
    slopes = (2.0 ** rng.uniform(-9, 0, N)).astype(np.float32)  # of any heads, in no order
    return replace(inputs, options={**inputs.options, "alibi": slopes})


def _case(name, lengths, S, N=4, K=1, H=64, *tags, T=1, V=None, plan=(), **options) -> Case:
    sizes = {"B": len(lengths), "T": T, "N": N, "K": K, "S": S, "H": H, "V": V or H}
    return Case(name, NAME, sizes, lengths, options, frozenset(tags), dict(plan))


CASES = (
    _case("llama", (192, 77), 192, 8, 2, 128, "basic", "demo"),
    _case("mha", (128, 5), 128, 3, 3, 64, "basic"),
    _case("mqa", (127, 128), 128, 8, 1, 64, "basic"),
    _case("group_3", (100,), 128, 6, 2, 128, "basic"),
    _case("empty_rows", (0, 1, 0, 2), 128, 8, 2, 64, "basic", "demo"),
    _case("block_edges", (63, 64, 65, 129), 192, 4, 1, 64, "basic"),
    _case("long", (1000,), 1024, 4, 1, 128, "basic", "demo"),
    _case("ragged", (512, 0, 300), 512, 4, 2, 128, "basic"),
    _case("large_logits", (128, 40), 128, 4, 2, 64, scale=40.0),
    _case("chunked", (512, 129, 0), 512, 4, 2, 64, chunk=128),
    _case("float32_out", (128, 17), 128, 8, 2, 64, out_dtype="float32"),
    _case("sinks", (256, 0, 90), 256, 8, 2, 64, sinks=True),
    _case("softcap", (128, 33), 128, 8, 2, 128, softcap=5.0),
    _case("window", (256, 0, 64, 131), 256, 8, 2, 64, window=67),
    _case("window_sinks", (256, 30), 256, 8, 2, 64, window=128, sinks=True, chunk=64),
    _case("four_queries", (256, 2, 130), 256, 8, 2, 64, T=4),
    _case("four_queries_window", (256, 70), 256, 8, 2, 128, "memcheck", T=4, window=50, sinks=True, softcap=20.0),
    _case("wide_group", (128, 70), 128, 32, 2, 64, T=1),
    _case("group_71", (90,), 128, 71, 1, 64),
    _case("head_80", (128, 31), 128, 8, 2, 80),
    _case("head_96", (128, 31), 128, 8, 2, 96),
    _case("head_80_chunked", (256, 131), 256, 8, 2, 80, "memcheck", chunk=64),
    _case("head_96_chunked", (256, 131), 256, 8, 2, 96, chunk=64),
    _case("head_192_128", (128, 31), 128, 8, 2, 192, V=128),
    _case("head_256", (128, 31), 128, 8, 2, 256),
    _case("alibi", (192, 77, 0), 192, 8, 2, 64, alibi=True),
    _case("alibi_softcap_sinks", (256, 0, 131), 256, 12, 3, 64, alibi=True, softcap=5.0, sinks=True),
    _case("alibi_window", (256, 2, 130), 256, 8, 2, 64, T=4, alibi=True, window=67, chunk=64),
)

# --- edges of the kernels' plans

_edge = partial(draws.edge, _case)
AROUND_A_TILE = (0, 1, 63, 64, 65, 136)
MOSAIC_EDGES = (
    # Groups of 1, 4 and 8, one split and several.
    _edge(AROUND_A_TILE, 136, splits=1),
    _edge(AROUND_A_TILE, 136, 8, H=128, dtype="bfloat16", splits=2),
    _edge((136, 70), 136, 2, 2, 128, splits=2),
    _edge((0, 5), 8, H=128, dtype="bfloat16"),
    # More tiles than the ring has stages, so that slots are reused.
    _edge((500,), 504, 8, 2, splits=1),
    # Sinks with one split (folded in the kernel), with several (folded in the merge), and with empty rows.
    _edge((0, 100), 136, sinks=True, splits=1),
    _edge((0, 100), 136, 6, 2, sinks=True, splits=2, softcap=2.0, out_dtype="float32"),
    # Several queries: the first ones of a short row see nothing.
    _edge((2, 67), 72, T=3, splits=2),
    _edge((70,), 72, 12, 2, T=2, sinks=True, window=5),
    # Windows within a tile and across tiles; only their tiles are touched.
    _edge((3, 250), 264, window=70, splits=2),
    _edge((130,), 136, window=1),
    # Groups above 8: whole boxes, a prime, and more than one block of query rows.
    _edge((70,), 72, 16),
    _edge((70,), 72, 11),
    _edge((66,), 72, 128, H=128, dtype="bfloat16"),
    # Head dims that are not multiples of 64, and values narrower or wider than keys.
    _edge((70,), 72, H=80),
    _edge((70,), 72, H=80, splits=2),
    _edge((70,), 72, H=96),
    _edge((70,), 72, H=192, V=128),
    _edge((70,), 72, H=256),
    _edge((70,), 72, H=16, V=32),
    # Pages that divide a tile, hold several tiles, or neither; the last tile has no page of its own.
    _edge((0, 1, 130, 144), 144, page=16, splits=2),
    _edge((70,), 72, page=8, window=20),
    _edge((30, 200), 256, 8, 2, page=128),
    _edge((90, 25), 96, page=24, chunk=64),
    # Fixed split size.
    _edge((65, 250), 264, 8, chunk=100),
    _edge((250,), 264, chunk=64, window=70),
    # Biases of ALiBi: boxes to spare, several queries, pages, splits, a negative scale and none.
    _edge((0, 67, 136), 136, 12, 2, T=2, alibi=True, splits=2),
    _edge((130,), 136, 71, alibi=True, window=66, sinks=True),
    _edge((1, 90), 96, page=24, alibi=True, softcap=0.5, H=128, dtype="bfloat16"),
    _edge((70,), 72, alibi=True, scale=-0.1),
    _edge((70,), 72, alibi=True, scale=0.0, chunk=64),
)

AROUND_TILES = {"float16": (0, 1, 63, 64, 65, 127, 129, 150), "float32": (0, 1, 31, 32, 33, 63, 65, 150)}
TRITON_EDGES = (
    # One split and several, of the plan's size and of fixed ones.
    *(_edge(lengths, 150, 2, H=16, dtype=dtype, chunk=chunk)
      for dtype, lengths in AROUND_TILES.items() for chunk in (None, 64, 100)),
    # Groups and queries that fill a block of rows in part, one block, and several.
    *(_edge((0, T, 70), 70, N, K, 16, T=T)
      for N, K, T in ((2, 2, 1), (6, 2, 1), (8, 1, 1), (5, 1, 3), (12, 2, 4), (8, 1, 4))),
    _edge((70,), 70, 128, H=16),
    _edge((1, 100), 100, 40, H=16, T=2, window=20),
    _edge((1, 100), 100, 34, 2, 16, T=4, window=20),
    # Head dims in one piece and in two, padded and not.
    *(_edge(lengths, S, 3, H=H, V=V, dtype=dtype, chunk=chunk)
      for H, V in ((128, 128), (80, 80), (96, 96), (192, 128), (192, 192), (256, 256), (24, 8))
      for lengths, S, dtype, chunk in (((70, 131), 131, "float16", None), ((33,), 40, "float32", 17))),
    # Windows within a tile, of a tile, and longer than the cache.
    *(_edge((0, 3, 64, 160), 160, 3, H=16, T=T, window=window, chunk=chunk)
      for T in (1, 2, 4) for window, chunk in ((1, None), (63, 32), (64, None), (1000, 100))),
    # A sink enters once, whether the kernel folds it or the merge.
    *(_edge((0, 1, S - 3), S, 6, 2, 16, dtype="float32", T=T, chunk=chunk, **more)
      for T, chunk, S in ((1, None, 40), (1, None, 150), (2, 48, 150), (2, None, 150))
      for more in ({"sinks": True, "softcap": 5.0, "scale": 1.0},
                   {"softcap": 0.5, "scale": 1.0, "out_dtype": "float16"}, {"sinks": True, "window": 9})),
    # Biases of ALiBi: tiles, blocks of rows, windows, splits.
    *(_edge((0, 1, 64, 150), 150, N, 2, 16, dtype=dtype, T=T, alibi=True, **more)
      for N, T, dtype in ((6, 1, "float32"), (8, 3, "float16"), (34, 4, "float32"))
      for more in ({}, {"sinks": True, "softcap": 5.0, "scale": -1.0}, {"window": 65, "chunk": 48})),
    # No slots, and no rows.
    _edge((0, 0), 0, H=16, alibi=True),
    _edge((0, 0), 0, H=16),
    _edge((), 4, H=16),
)  # fmt: skip

# --- fuzz

# B, T, N, K, S, H, V: groups of 1 to 8, 12 and 16; all head dims; 67 and 129 slots, which Pallas refuses
SIZES = (
    (2, 1, 8, 2, 128, 64, 64), (2, 1, 6, 2, 192, 128, 128), (2, 1, 5, 1, 64, 64, 64), (2, 2, 6, 1, 128, 64, 64),
    (2, 4, 4, 2, 136, 64, 64), (2, 1, 14, 2, 72, 80, 80), (2, 1, 4, 4, 136, 96, 96), (2, 1, 16, 1, 72, 192, 128),
    (2, 2, 12, 1, 64, 256, 256), (3, 1, 8, 1, 256, 64, 64), (2, 4, 6, 2, 67, 64, 64), (2, 1, 16, 2, 129, 128, 128),
)  # fmt: skip
# One box and two, groups that do not fill a box, more than 32 rows, every width of a tile.
MOSAIC = (
    (2, 1, 4, 1, 72, 64, 64), (1, 2, 6, 2, 72, 64, 64), (1, 1, 3, 1, 72, 128, 128), (1, 1, 2, 1, 72, 96, 96),
    (1, 3, 12, 1, 64, 64, 64), (1, 1, 3, 1, 64, 192, 128), (1, 1, 2, 2, 64, 80, 80), (2, 1, 4, 2, 67, 64, 64),
)  # fmt: skip


def question(draw, st, sizes, dtypes: tuple[str, ...], out: tuple[str, ...]) -> Draw:
    chosen = dict(zip("BTNKSHV", draw(st.sampled_from(sizes)), strict=True))
    options = questions.cache_options(draw, st, chosen, chosen["H"], out)
    options |= questions.optional(draw, st, softcap=st.sampled_from(questions.SOFTCAPS), alibi=st.just(True))
    return questions.over_a_cache(draw, st, NAME, chosen, options, dtypes)


change = partial(draws.huge, queries=("q",), keys=("k",))


def _triton(draw: Draw) -> str | None:
    return "page_table has no Triton kernel yet" if draw.view == "paged" else None


# --- benchmarks


def _work(B: int, N: int, K: int, S: int, peers=None, **options) -> Work:
    H = 128
    return Work({"B": B, "N": N, "K": K, "S": S, "H": H}, {"scale": H**-0.5, **options}, peers=peers)


BENCH = tuple(
    _work(*sizes, peers=peers.fused)
    for sizes in (
        (1, 32, 8, 131072), (8, 32, 8, 32768), (64, 32, 8, 8192), (128, 32, 8, 2048), (16, 32, 32, 8192),
        (64, 8, 1, 32768), (1, 32, 8, 4096), (1, 32, 8, 1024), (16, 32, 8, 1024), (256, 32, 8, 512),
    )
)  # fmt: skip
WINDOWS = _work(64, 32, 8, 32768, window=1024), _work(64, 32, 8, 1024)

OP = Op(
    name=NAME, axes={"q": "BTNH", "k": "BSKH", "v": "BSKH", "lengths": "B"}, draw=draw, oracle=oracle, cases=CASES,
    fuzz=Fuzz(question, SIZES, MOSAIC, views.of_a_cache(CACHES), change),
    edges={"pallas": MOSAIC_EDGES, "triton": TRITON_EDGES},
    refusals={"triton": _triton, "pallas": questions.mosaic_cache}, caches=CACHES,
    moved=lambda B, N, K, S, H, window=None, **_: 4 * B * (min(S, window or S) * K + N) * H,
    bench=BENCH + WINDOWS, cpu=(_work(1, 32, 8, 1024), _work(4, 32, 8, 1024), _work(1, 32, 32, 4096)),
    reads=lambda row: f"a window of {row['window']}" if row.get("window") else "all",
    table="dense", invariant=_case("invariance", (777,), 1024, 8, 2, 128, sinks=True),
)  # fmt: skip
