"""block_index_scores: the largest product of an index query with the seen keys of each block."""

from functools import partial

import numpy as np

from jforge.core import compare
from jforge.harness import draws
from jforge.harness.op import Case, Draw, Fuzz, Inputs, Op, Work
from jforge.harness.ops import index_scores
from jforge.harness.ops.index_scores import KEYS, case

NAME = "block_index_scores"


def oracle(q_index, k_index, lengths, *, block_size, k_scale=None):
    """(scores,) in float64."""
    q, k = np.asarray(q_index, np.float64), draws.meant(k_index, k_scale)
    (B, T, heads, _), S = q.shape, k.shape[1]
    scores = np.full((B, T, heads, -(-S // block_size)), -np.inf)
    for b, t, block in np.ndindex(B, T, scores.shape[-1]):
        start, end = block * block_size, min((block + 1) * block_size, int(lengths[b]) - T + t + 1)
        if end > start:
            scores[b, t, :, block] = (q[b, t] @ k[b, start:end].T).max(axis=-1)
    return (scores,)


def draw(case: Case, dtype: np.dtype, rng: np.random.Generator) -> Inputs:
    arrays, options = index_scores.draw_keys(case, dtype, rng)
    return Inputs({**arrays, "lengths": np.array(case.lengths, np.int32)}, options)


CASES = (
    case("block_index_4_heads", NAME, 2, 4, 512, 128, (512, 300), "basic", block_size=128),
    case("block_index_blocks_of_16", NAME, 3, 2, 136, 64, (136, 0, 17), "memcheck", block_size=16),
    case("block_index_two_queries", NAME, 2, 4, 128, 64, (128, 65), T=2, block_size=64),
    case("block_index_e4m3_keys", NAME, 2, 4, 128, 64, (128, 65), "memcheck", block_size=64, stored="float8_e4m3fn"),
)

# --- edges of the kernels' plans

edge = partial(index_scores.edge, NAME)
MOSAIC_EDGES = (
    # Every size, rows of any length, a partial last block, whole groups of 8 blocks and not.
    edge(index_scores.AROUND_A_TILE, 136, block_size=8, splits=1),
    edge((136, 0, 75), 136, 4, 128, block_size=16, dtype="bfloat16", splits=2),
    edge((512, 300), 512, 5, block_size=32, splits=2),
    edge((512, 0, 129), 512, 8, block_size=64, splits=1),
    edge((1000, 300), 1000, 4, 128, block_size=128, dtype="bfloat16", splits=1),
    edge((1100, 2048), 2048, block_size=128, splits=2),
    edge((300,), 400, 2, block_size=192),
    edge((5,), 8, 1, block_size=64),
    # Several queries, some of which see nothing; more rows than a program has, in whole boxes and with boxes to spare.
    edge((2, 67), 72, 5, block_size=8, T=3),
    edge((70, 9), 128, 64, block_size=16, T=2),
    edge((70,), 72, 36, block_size=32, T=2),
    # Keys of 8 bits.
    edge((136, 75), 136, 4, 128, block_size=16, dtype="bfloat16", stored="float8_e4m3fn"),
    edge((136, 0), 136, block_size=64, stored="float8_e5m2"),
    edge((300,), 512, block_size=128, T=2, stored="int8"),
)

TRITON_EDGES = (
    *index_scores.triton_edges(NAME, 24),
    # Blocks that are a part of a tile, one and several of them; the last block of the cache is partial.
    *(edge((0, min(size, 139), 65, 139), 139, 3, 24, T=2, block_size=size, plan=index_scores.SMALL)
      for size in (1, 5, 16, 24, 32, 33, 64, 100, 139, 10**9)),
    *(edge((0, size, 65, 139), 139, 3, 24, T=2, block_size=size) for size in (5, 64)),
)  # fmt: skip

# --- fuzz

# Those of index_scores with blocks of several sizes, up to one that no cache fills
SIZES = tuple((*sizes, block) for sizes in index_scores.SIZES for block in (1, 8, 16, 24, 32, 64, 100, 128, 300))
# Blocks of a part of a tile and of several tiles, and 24 tokens, of which no kernel is made.
MOSAIC = (
    (2, 1, 8, 72, 64, 16), (2, 2, 5, 72, 32, 8), (1, 1, 12, 264, 64, 128), (3, 1, 1, 8, 64, 64),
    (1, 1, 4, 136, 32, 32), (1, 2, 3, 136, 32, 64), (1, 3, 3, 67, 64, 16), (1, 1, 4, 72, 32, 24),
)  # fmt: skip


def question(draw, st, sizes, dtypes: tuple[str, ...], out: tuple[str, ...]) -> Draw:
    *chosen, block_size = draw(st.sampled_from(sizes))
    chosen = dict(zip("BTISJ", chosen, strict=True))
    return index_scores.ask(draw, st, NAME, chosen, {"block_size": block_size}, dtypes)


def _pallas(draw: Draw) -> str | None:
    size = draw.case.options["block_size"]
    return index_scores.pallas(draw) or ("block_size is" if size not in (8, 16, 32) and size % 64 else None)


OP = Op(
    name=NAME, axes={"q_index": "BTIJ", KEYS: "BSJ", "lengths": "B"}, draw=draw, oracle=oracle, cases=CASES,
    fuzz=Fuzz(question, SIZES, MOSAIC, index_scores.VIEWS, index_scores.change, exact=True, same_bits=True),
    results={"scores": "BTIL"}, metrics=(compare.worst_row,),
    edges={"pallas": MOSAIC_EDGES, "triton": TRITON_EDGES},
    refusals={"triton": index_scores.triton, "pallas": _pallas}, caches=(KEYS,), stored="k", attends=False,
    moved=lambda B, I, S, J, block_size: B * (2 * (I + S) * J + 4 * I * -(-S // block_size)),  # noqa: E741
    bench=(Work({"B": 16, "I": 4, "S": 131072, "J": 128}, {"block_size": 128}),),
    reads=lambda row: f"all index keys, by blocks of {row['block_size']}",
)  # fmt: skip
