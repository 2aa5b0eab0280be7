"""What records share of drawing questions for the fuzz. `draw` and `st` are hypothesis' draw function and its module of
strategies: only the fuzz imports it.

Sizes come from a few buckets, and where Mosaic's interpreter compiles every new call, from fewer and smaller ones;
lengths, options and values are free.
"""

from jforge.harness.op import Case, Draw

SOFTCAPS = (0.5, 5.0, 50.0, 1e-30, 1e38)
CACHED = ("plain", "permuted", "alone", "paged", "split")  # the views of an op that attends a cache


def seeds(st):
    return st.integers(0, 2**16)


def near(st, S: int, *edges: int, also: tuple[int, ...] = ()):
    """Lengths of 0 to S: those at or beside the edges first of all."""
    tried = {n + d for n in edges for d in (-1, 0, 1)} | {0, 1, S - 1, S, *also}
    return st.sampled_from(sorted(n for n in tried if 0 <= n <= S)) | st.integers(0, S)


def optional(draw, st, **strategies) -> dict:
    """Each keyword argument given or left out."""
    drawn = {name: draw(st.none() | strategy) for name, strategy in strategies.items()}
    return {name: value for name, value in drawn.items() if value is not None}


def common(st, width: int, out: tuple[str, ...]) -> dict:
    """Logits of a spread from 0, uniform weights, to 4, and a negative scale.

    No larger ones: float32 holds a logit x to x * 2^-24, and exp makes that the relative error of a weight. Those of
    `draws.huge` are so far apart that only the largest counts.
    """
    scale = st.sampled_from((0.1, 4.0, -1.0, 0.0)).map(lambda spread: spread * width**-0.5)
    return {"sinks": st.just(True), "scale": scale, "out_dtype": st.sampled_from(out)}


def values(st):
    return st.sampled_from(("normal", "normal", "huge"))


def pages(st, S: int):
    return st.sampled_from([n for n in (8, 16, 32, 64, S) if S % n == 0])


def cache_options(draw, st, sizes: dict[str, int], width: int, out: tuple[str, ...]) -> dict:
    """Windows and chunks at the edges of tiles and cache, and what all attending ops take."""
    T, S = sizes["T"], sizes["S"]
    return optional(
        draw,
        st,
        window=st.sampled_from((1, T, 63, 64, 65, S - 1, S, S + 5)) | st.integers(1, S),
        chunk=st.sampled_from((16, 64, 100, 128, S + 1)),
        **common(st, width, out),
    )


def over_a_cache(draw, st, op: str, sizes: dict[str, int], options: dict, dtypes: tuple[str, ...]) -> Draw:
    view = draw(st.sampled_from(CACHED))
    if view == "split":  # with more queries or a window, the keys of a part end elsewhere for each query or row, and a
        sizes = sizes | {"T": 1}  # part takes its own end for the query's place
        options = {name: value for name, value in options.items() if name not in ("window", "alibi")}
    if view in ("permuted", "alone"):  # with a chunk the bits are compared too; "plain" goes without one
        options.setdefault("chunk", 64)
    B, T, S = (sizes[axis] for axis in "BTS")
    row = near(st, S, 64, 128, options.get("window", S), options.get("chunk", S), also=(T - 1, T))
    lengths = tuple(draw(row) for _ in range(B))
    places = {"alone": st.integers(0, B - 1), "paged": pages(st, S), "split": st.integers(0, S)}
    return put(draw, st, Case("fuzz", op, sizes, lengths, options), dtypes, (view,), places, values(st))


def put(draw, st, case: Case, dtypes, views, places: dict, values=None, stored: str | None = None) -> Draw:
    """A case in one of the views. places: {view: where, a strategy}; values: a strategy too, None for normal ones."""
    view = draw(st.sampled_from(tuple(views)))
    at = draw(places.get(view, st.just(0)))
    dtype, seed = draw(st.sampled_from(dtypes)), draw(seeds(st))
    return Draw(case, dtype, seed, view, at, draw(st.just("normal") if values is None else values), stored)


# --- refusals


TF32, SLOTS, GRID = "only as tf32", "TMA needs a positive multiple of 8", "the grid must not be empty"


def first(*rules: tuple[bool, str]) -> str | None:
    """The reason of the first rule that holds."""
    return next((reason for holds, reason in rules if holds), None)


def mosaic_cache(draw: Draw) -> str | None:
    """What Mosaic's kernels over a whole cache refuse."""
    slots = draw.at if draw.view == "paged" else draw.case.sizes["S"]
    return first((draw.dtype == "float32", TF32), (slots % 8 > 0, SLOTS))
