"""decode_linear: one token of a recurrent state, with a decay and perhaps a delta rule."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jforge.core import compare
from jforge.harness import draws, peers, questions, views
from jforge.harness.op import Case, Draw, Fuzz, Inputs, Op, Work

NAME = "decode_linear"


def oracle(q, k, v, state, decay, *, beta=None):
    """(out, state) in float64."""
    q, k, v, state, decay = (np.array(a, np.float64) for a in (q, k, v, state, decay))
    out = np.zeros((*q.shape[:2], v.shape[-1]))
    for b, n in np.ndindex(q.shape[:2]):
        factor = decay[n] if decay.ndim == 1 else decay[b, n]
        state[b, n] *= np.reshape(factor, (-1, 1))
        u = v[b, n] if beta is None else beta[b, n] * (v[b, n] - k[b, n] @ state[b, n])
        state[b, n] += np.outer(k[b, n], u)
        out[b, n] = q[b, n] @ state[b, n]
    return out, state


def draw(case: Case, dtype: np.dtype, rng: np.random.Generator) -> Inputs:
    """Size `decay` is the number of axes of the decay, N, B N or B N H; `beta` whether there is a delta rule. Keys of
    unit length, as it wants.
    """
    B, N, H, V = (case.sizes[axis] for axis in "BNHV")
    q, k, v = (rng.standard_normal((B, N, width)) for width in (H, H, V))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    arrays = {name: a.astype(dtype) for name, a in (("q", q), ("k", k), ("v", v))}
    arrays["state"] = rng.standard_normal((B, N, H, V)).astype(np.float32)
    arrays["decay"] = rng.uniform(0.5, 1, ((N,), (B, N), (B, N, H))[case.sizes["decay"] - 1]).astype(np.float32)
    beta = {"beta": rng.uniform(0, 1, (B, N)).astype(np.float32)} if case.sizes["beta"] else {}
    return Inputs(arrays, beta)


def _case(name, B, N, H, *tags, V=None, decay=1, beta=0, plan=()) -> Case:
    sizes = {"B": B, "N": N, "H": H, "V": V or H, "decay": decay, "beta": beta}
    return Case(name, NAME, sizes, tags=frozenset(tags), plan=dict(plan))


CASES = (
    _case("linear_lightning", 2, 4, 128, "basic"),
    _case("linear_decay_a_row", 2, 3, 64, V=128, decay=2),
    _case("linear_delta_rule", 2, 2, 64, decay=2, beta=1),
    _case("linear_decay_a_channel", 1, 2, 128, "memcheck", V=64, decay=3, beta=1),
    _case("linear_olmo_hybrid", 1, 2, 96, V=192, decay=2, beta=1),
    _case("linear_nemotron_nano", 1, 3, 128, V=80, decay=2),
    _case("linear_falcon_h1", 2, 1, 256, V=64, decay=2),
)

# --- edges of the kernels' plans


def _edge(B, N, H, V, dtype, *, width=0, plan=(), **more) -> Draw:
    return Draw(_case("edge", B, N, H, V=V, plan={"width": width} if width else plan, **more), dtype, 0)


MOSAIC_EDGES = (
    # Tiles of every width; decays of a head, a row and a channel; with and without delta rule.
    _edge(2, 3, 128, 128, "bfloat16", width=64),
    _edge(2, 3, 128, 128, "float32", decay=2, beta=1, width=32),
    _edge(1, 2, 64, 128, "float16", decay=3, beta=1, width=64),
    _edge(1, 2, 128, 64, "float32", decay=3, width=64),
    _edge(1, 2, 256, 96, "bfloat16", decay=2, width=32),
    _edge(1, 1, 64, 64, "float32", beta=1),
    # Key channels that are no whole pieces of 32, fewer value columns than a tile has, tiles of 16.
    _edge(1, 2, 32, 80, "bfloat16", decay=2, beta=1),
    _edge(2, 1, 24, 48, "float32", decay=3),
    _edge(2, 2, 40, 32, "float16", decay=3, beta=1),
    _edge(2, 3, 8, 8, "bfloat16", decay=2, beta=1),
    _edge(1, 3, 24, 16, "float32"),
)

TRITON_EDGES = (
    # Decays of a head, a row and a channel, with and without delta rule, in tiles that are padded.
    *(_edge(2, 3, 20, 40, dtype, decay=decay, beta=beta)
      for dtype in ("float16", "float32") for decay in (1, 2, 3) for beta in (0, 1)),
    # From one key channel to the most that there may be, from one value column to several tiles.
    *(_edge(*rows, H, V, dtype, decay=decay, beta=beta)
      for H, V in ((128, 128), (64, 64), (1, 1), (5, 3), (96, 80), (16, 200), (256, 256), (130, 33), (1024, 9))
      for rows, dtype, decay, beta in (((1, 2), "float16", 3, 1), ((2, 1), "float32", 1, 0))),
    # Tiles of several widths.
    *(_edge(2, 3, 20, 50, "float16", beta=1, plan={"block_v": columns, "num_warps": warps})
      for columns, warps in ((8, 2), (16, 4), (64, 8))),
)  # fmt: skip

# --- fuzz

# B, N, H, V: tiles of several widths and parts of one; 12, 17 and 1032 key channels, 5 and 40 value columns, which a
# kernel or two refuse
SIZES = (
    (2, 3, 64, 64), (1, 2, 128, 32), (3, 1, 16, 8), (2, 2, 8, 96), (1, 1, 256, 128), (2, 1, 40, 24), (1, 2, 32, 160),
    (2, 1, 12, 32), (2, 2, 16, 40), (1, 2, 17, 5), (1, 1, 1032, 8), (2, 2, 96, 192), (1, 3, 128, 80), (1, 2, 16, 1),
)  # fmt: skip
MOSAIC = (
    (2, 1, 64, 64), (1, 2, 40, 32), (3, 1, 16, 8), (1, 1, 32, 96), (2, 1, 8, 24), (1, 1, 16, 32), (1, 2, 32, 64),
    (2, 1, 12, 32), (1, 2, 16, 48),
)  # fmt: skip


def question(draw, st, sizes, dtypes: tuple[str, ...], out: tuple[str, ...]) -> Draw:
    chosen = dict(zip("BNHV", draw(st.sampled_from(sizes)), strict=True))
    chosen |= {"decay": draw(st.integers(1, 3)), "beta": draw(st.integers(0, 1))}
    places = {"alone": st.integers(0, chosen["B"] - 1)}
    return questions.put(draw, st, Case("fuzz", NAME, chosen), dtypes, VIEWS, places)


def change(draw: Draw, inputs: Inputs, rng: np.random.Generator) -> Inputs:
    """Some factors at the ends of their range."""
    decay, beta = inputs.arrays["decay"], inputs.options.get("beta", np.zeros(0))
    for factors, edges in ((decay, [0, 1] if draw.case.sizes["decay"] == 3 else [1]), (beta, [0, 1])):
        at_edge = rng.random(factors.shape) < 0.25
        factors[at_edge] = rng.choice(edges, at_edge.sum())
    return inputs


def _two_tokens(backend, draw: Draw, inputs: Inputs) -> views.Answer:
    """Another token after the first one, with the state that the first left."""
    other = Draw(draw.case, draw.dtype, draw.seed + 2**17)
    second = change(other, OP.inputs(other.case, other.dtype, other.seed), np.random.default_rng(other.seed))
    state = backend.call(NAME, inputs)[1].astype(np.float32)
    got = backend.call(NAME, Inputs({**second.arrays, "state": state}, second.options))
    return Inputs({**second.arrays, "state": OP.truth(inputs)[1]}, second.options), got


VIEWS = {
    "plain": views.plain,
    "permuted": partial(views.permuted, shared=("decay",)),
    "alone": partial(views.alone, empty=dict.fromkeys(("q", "k", "v", "state"), 0)),
    "split": _two_tokens,
}


def _triton(draw: Draw) -> str | None:
    return "needs more registers" if draw.case.sizes["H"] > 1024 else None


def _pallas(draw: Draw) -> str | None:
    B, N, H, V = (draw.case.sizes[axis] for axis in "BNHV")
    return questions.first(
        (H % 8 > 0 or H > 256, "the kernel takes multiples of 8"),
        (V % 16 > 0 and (V % 8 > 0 or V > 32), "the kernel takes multiples of 16"),
        (min(B, N, H, V) == 0 or max(B, N) > 65535, "none may be 0"),
    )


# --- benchmarks: B, N, H, V, axes of the decay, delta rule

BENCH = (
    (64, 64, 128, 128, 1, 0),  # MiniMax-Text-01
    (64, 32, 128, 128, 2, 1),  # Qwen3-Next
    (1, 32, 128, 128, 2, 1),
    (64, 30, 96, 192, 2, 1),  # Olmo-Hybrid
    (64, 32, 128, 128, 3, 1),  # Kimi-Linear
    (64, 128, 128, 64, 2, 0),  # Nemotron-H-8B
    (64, 128, 128, 80, 2, 0),  # Nemotron-Nano-9B-v2
    (64, 48, 256, 64, 2, 0),  # Falcon-H1-1.5B
)


def _work(B, N, H, V, decay, beta) -> Work:
    sizes = {"B": B, "N": N, "H": H, "V": V, "decay": decay, "beta": beta}
    return Work(sizes, {}, () if beta else ("beta",), peers.copied)


def _decays(sizes) -> jax.Array:
    """From 0.5 to 0.99 over the heads, the same for every row and channel."""
    heads = jnp.linspace(0.5, 0.99, sizes["N"])
    B, N, H = (sizes[axis] for axis in "BNH")
    return jnp.broadcast_to(heads[:, None], (B, N, H))[((0, slice(None), 0), (..., 0), (...,))[sizes["decay"] - 1]]


OP = Op(
    name=NAME, axes={"q": "BNH", "k": "BNH", "v": "BNV", "state": "BNHV", "decay": "BN"}, draw=draw, oracle=oracle,
    cases=CASES, fuzz=Fuzz(question, SIZES, MOSAIC, VIEWS, change, same_bits=True),
    results={"out": "BNV", "state": "BNHV"}, metrics=(compare.worst_row, compare.worst_row),
    edges={"pallas": MOSAIC_EDGES, "triton": TRITON_EDGES}, refusals={"triton": _triton, "pallas": _pallas},
    attends=False,
    moved=lambda B, N, H, V, **_: B * N * (8 * H * V + 4 * H + 4 * V),
    fill={
        "k": lambda key, shape, sizes, options: draws.normal(key, shape) * shape[-1] ** -0.5,
        "state": draws.float32,
        "decay": lambda key, shape, sizes, options: _decays(sizes),
        "beta": lambda key, shape, sizes, options: jnp.full(shape, 0.5, jnp.float32),
    },
    keywords={"beta": "BN"}, carry="state", bench=tuple(_work(*sizes) for sizes in BENCH),
    table="states", reads=lambda row: f"a float32 state of {row['H']} x {row.get('V', row['H'])} a head, and writes it",
)  # fmt: skip
