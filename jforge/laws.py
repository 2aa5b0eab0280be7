"""The laws that any attention must keep, public as `jforge.check`.

A law needs no second implementation: it compares a mechanism with itself (decode with forward, chunks with one shot),
with its own bookkeeping (visible, cost) or with what is true of every causal model. They run in float64 at 1e-10, so
a pass is not a matter of luck; an error that forward and decode share is left to torch_ref and transformers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np

from jforge import caches
from jforge.core import compare
from jforge.core.attention import Attention
from jforge.traffic import decode_traffic

TITLES = {
    "L1": "prefill = forward",
    "L2": "folded decode = forward, float64 and float32",
    "L3": "chunks = one shot",
    "L4": "caches agree, slot by slot",
    "L5": "unused slots may be NaN",
    "L6": "ragged rows = rows alone",
    "L7": "support of dy/dx = visible",
    "L8": "bytes = buffers = traffic",
    "L9": "no retrace, cache is a fixed point",
    "L10": "batch order and position shift",
    "L11": "gradients are finite",
    "L12": "rows rewound, forked, replaced",
}


@dataclass(frozen=True)
class Row:
    """One law: the error against its tolerance, and what went wrong if anything did."""

    law: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Report:
    """The outcome of `check`. `ok` is True when every law holds; prints as a table."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __str__(self) -> str:
        wide = max(map(len, TITLES.values()))
        lines = [f"{'law':4} {'':{wide}} {'error':>9} {'allowed':>9}"]
        for row in self.rows:
            verdict = "ok" if row.ok else f"FAILS {row.note}".rstrip()
            lines.append(f"{row.law:4} {TITLES[row.law]:{wide}} {row.error:9.2g} {row.tolerance:9.2g}  {verdict}")
        return "\n".join(lines)


def check(att: Attention, cfg=None, *, laws: Sequence[str] = tuple(TITLES), seed: int = 0) -> Report:
    """Run the laws (default: all) on `att` with `cfg` (default: its first example). Works on anybody's Attention.

    An exception inside a law, or in what all laws need (a Config, its cache spec), fails the row and is its note;
    nothing is raised for a broken mechanism. Raises TypeError when att is no Attention and ValueError for a law that
    does not exist.
    """
    if not isinstance(att, Attention):
        raise TypeError(f"att is a {type(att).__name__}; it must be a jforge.Attention")
    if unknown := [law for law in laws if law not in TITLES]:
        raise ValueError(f"laws holds {unknown[0]!r}; there are {', '.join(TITLES)}")
    rows = []
    with jax.enable_x64(True):
        bench = cache(lambda: Bench(att, _example(att) if cfg is None else cfg, seed))
        for law in laws:
            tolerance = 0.0 if law in ("L7", "L8", "L9") else compare.OUT["float64"]
            try:
                error, note = LAWS[law](bench())
            except Exception as problem:  # a broken mechanism may raise anything; the report must still come
                first = (str(problem).splitlines() or [""])[0]
                error, note = math.inf, f"{type(problem).__name__}: {first}"
            rows.append(Row(law, error, tolerance, note))
    return Report(tuple(rows))


def _example(att: Attention):
    if not att.examples:
        raise ValueError("examples is empty; a Config must be given")
    return att.examples[0]


class Bench:
    """The inputs that the laws share, and jitted functions, so that each shape is compiled once.

    Tokens and outputs are sliced and joined in NumPy, where that compiles nothing.
    """

    def __init__(self, att: Attention, cfg, seed: int):
        self.att, self.cfg, self.seed = att, cfg, seed
        self.spec = att.cache_spec(cfg)
        sizes = [s for b in self.spec.values() for s in (b.every, b.limit) if s]
        self.span = max(sizes, default=1)  # the longest window or block: every law crosses it
        self.block = math.lcm(*(b.every for b in self.spec.values() if b.every))
        self.T = max(9, 2 * self.span + 2)
        self.capacity = self.T + 2
        near = (0, 1, self.span - 1, self.span, self.span + 1, 2 * self.span, self.T - 1)
        self.lengths = np.array(sorted({n for n in near if 0 <= n < self.T}), np.int32)  # those of ragged rows
        self.forward = jax.jit(lambda params, x: att.forward(params, cfg, x))
        self.prefill = jax.jit(lambda params, x, cache: att.prefill(params, cfg, x, cache))
        self.ragged = jax.jit(lambda params, x, cache, lengths: att.prefill(params, cfg, x, cache, lengths=lengths))
        self.decode = jax.jit(lambda params, x, cache: att.decode(params, cfg, x, cache))
        self.select = jax.jit(lambda params, x, cache: att.select(params, cfg, x, cache))
        self.tokens_of = jax.jit(lambda selection: att.tokens_of(cfg, selection, self.T))

        self.poison = jax.jit(lambda cache: self.spec.poison(cfg, cache))
        self._params: dict = {}

    def params(self, dtype=np.float64):
        if dtype not in self._params:
            draw = jax.jit(lambda key: self.att.init_params(key, self.cfg, dtype))
            self._params[dtype] = draw(jax.random.key(self.seed))
        return self._params[dtype]

    def x(self, batch: int | None = None, dtype=np.float64) -> np.ndarray:
        """Tokens of as many rows as there are lengths, so that most laws share their compilations."""
        rng = np.random.default_rng(self.seed + 1)
        return rng.standard_normal((batch or len(self.lengths), self.T, self.cfg.hidden_size)).astype(dtype)

    def empty(self, batch: int | None = None, dtype=np.float64, poison: bool = False):
        cache = self.att.init_cache(self.cfg, batch or len(self.lengths), self.capacity, dtype)
        return self.poison(cache) if poison else cache

    @cached_property
    def truth(self):
        """forward of x in float64."""
        return self.forward(self.params(), self.x())

    @cached_property
    def one_shot(self):
        """(y, cache) of one prefill of x."""
        return self.prefill(self.params(), self.x(), self.empty())

    @cached_property
    def folded(self):
        """(y, cache) of decoding x token by token."""
        return self.fold(self.x(), self.empty())

    def fold(self, x, cache, poison: bool = False, tokens: int = 1):
        """(y, cache) of decoding x, so many tokens at a time and the last ones alone."""
        params, ys, t = self.params(x.dtype.type), [], 0
        while t < x.shape[1]:
            size = tokens if t + tokens <= x.shape[1] else 1
            y, cache = self.decode(params, x[:, t : t + size], cache)
            cache = self.poison(cache) if poison else cache
            ys.append(y)
            t += size
        return np.concatenate(ys, axis=1), cache

    def chunks(self, sizes: tuple[int, ...], poison: bool = False):
        cache, ys, x = self.empty(poison=poison), [], self.x()
        for start, size in zip(np.cumsum((0, *sizes)), sizes, strict=False):
            y, cache = self.prefill(self.params(), x[:, start : start + size], cache)
            cache = self.poison(cache) if poison else cache
            ys.append(y)
        return np.concatenate(ys, axis=1), cache

    @cached_property
    def splits(self) -> tuple[tuple[int, ...], ...]:
        """Two ways to cut T: small uneven chunks, and a cut just past the longest window or block."""
        return (2, 1, 2, self.T - 5), (self.span + 1, self.T - self.span - 1)


def _worst(errors: dict[str, float]) -> tuple[float, str]:
    """(the largest error, its key)."""
    worst = max(errors, key=errors.get)
    return errors[worst], worst


def _l1(b: Bench):
    return compare.relative(b.one_shot[0], b.truth), ""


def _l2(b: Bench):
    wide, note = _worst({
        "one token a step": compare.relative(b.folded[0], b.truth),
        "4 tokens a step": compare.relative(b.fold(b.x(), b.empty(poison=True), poison=True, tokens=4)[0], b.truth),
    })  # fmt: skip
    x = b.x(dtype=np.float32)
    got, _ = b.fold(x, b.empty(dtype=np.float32))
    narrow = compare.relative(got, b.forward(b.params(np.float32), x))
    if got.dtype != np.float32 or narrow > compare.OUT["float32"]:
        return math.inf, f"float32: error {narrow:.1e}, dtype {got.dtype}"
    return wide, note


def _l3(b: Bench):
    return _worst({f"chunks of {sizes}": compare.relative(b.chunks(sizes)[0], b.truth) for sizes in b.splits})


def _l4(b: Bench):
    others = {"after decode": b.folded[1]} | {f"after chunks of {s}": b.chunks(s)[1] for s in b.splits}
    b.spec.check(b.one_shot[1])
    return _worst({after: compare.caches(b.spec, b.cfg, cache, b.one_shot[1]) for after, cache in others.items()})


def _l5(b: Bench):
    decoded, cache = b.fold(b.x(), b.empty(poison=True), poison=True)
    chunked, _ = b.chunks(b.splits[0], poison=True)
    errors = compare.relative(decoded, b.truth), compare.relative(chunked, b.truth)
    return max(*errors, compare.caches(b.spec, b.cfg, cache, b.one_shot[1])), ""


def _l6(b: Bench):
    """Rows of many lengths, NaN at the pads, then one more token: as if each row had been alone."""
    n, x, truth = b.lengths, b.x(), np.asarray(b.truth)
    real = (np.arange(b.T) < n[:, None])[..., None]
    y, cache = b.ragged(b.params(), np.where(real, x, np.nan), b.empty(poison=True), n)
    next_x = np.take_along_axis(x, n[:, None, None], axis=1)
    next_y, after = b.decode(b.params(), next_x, cache)
    row = len(n) - 1
    _, alone = b.prefill(b.params(), x[row:, : n[row]], b.empty(1))
    errors = {
        "prefill": compare.relative(y, np.where(real, truth, 0)),
        "the next token": compare.relative(next_y, np.take_along_axis(truth, n[:, None, None], axis=1)),
        "the cache": compare.caches(b.spec, b.cfg, jax.tree.map(lambda a: np.asarray(a)[row:], cache), alone),
        "length": float(np.abs(np.asarray(after.length) - n - 1).max()),
    }
    return _worst(errors)


def _l7(b: Bench):
    """Count the (t, s) where dy_t/dx_s is non-zero and visible says no, or the reverse."""
    params, x = b.params(), b.x(1)
    probe = np.random.default_rng(7).standard_normal(x.shape[2:])
    jacobian = jax.jit(jax.jacrev(lambda x: b.att.forward(params, b.cfg, x)[0] @ probe))(x)
    support = (np.asarray(jacobian)[:, 0] != 0).any(axis=-1)
    order = np.arange(b.T)
    t = jnp.asarray(order)
    seen = np.broadcast_to(b.att.visible(b.cfg, t[:, None], t), support.shape)
    picks = [_picks(b, params, x, t) for t in range(b.T)]
    if picks[0] is None:
        return float((support != seen).sum()), "pairs differ"
    always = np.asarray(b.att.tokens_of(b.cfg, None, b.T)[0])
    read = (np.stack(picks) | always | (order[:, None] == order)) & seen  # a query is made of its own token
    hidden, unread, unused = support & ~seen, support & ~read, read & ~support
    counts = f"{hidden.sum()} pairs not visible, {unread.sum()} not read, {unused.sum()} reads unused"
    return float((hidden | unread | unused).sum()), counts


def _picks(b: Bench, params, x, t: int):
    """bool[T]: the tokens that decode would pick for token t; None where nothing is chosen."""
    cache = b.empty(1)
    if t:
        _, cache = b.ragged(params, x, cache, np.array([t], np.int32))
    selection = b.select(params, x[:, t : t + 1], cache)
    return None if selection is None else b.tokens_of(selection)[0, 0]


def _l8(b: Bench):
    """Bytes at three contexts, two dtypes, and with and without a block that closes."""
    for dtype in (jnp.float32, jnp.bfloat16):
        for context in (b.block * n for n in (3, 8, 17)):
            cache = b.att.init_cache(b.cfg, 1, context, dtype)
            stored = {name: getattr(cache, name).nbytes for name in b.spec}
            for closing in (False, True):
                cost = b.att.cost(b.cfg, context=context, dtype=dtype, closing=closing)
                moved = decode_traffic(b.att, b.cfg, context, dtype, closing=closing)
                pairs = {"stored": (cost.stored, stored), "read": (cost.read, moved.read)}
                pairs["written"] = (cost.written, moved.written)
                pairs["fixed + per_token"] = ({"": cost.fixed + cost.per_token * context}, {"": sum(stored.values())})
                for what, (claimed, counted) in pairs.items():
                    if dict(claimed) != counted:
                        where = f"{what} at context {context}, {jnp.dtype(dtype)}"
                        return math.inf, f"{where}: cost {dict(claimed)}, counted {counted}"
    return 0.0, ""


def _l9(b: Bench):
    traces = 0

    @partial(jax.jit, static_argnames="cfg", donate_argnames="cache")
    def step(params, x, cache, cfg):
        nonlocal traces
        traces += 1
        return b.att.decode(params, cfg, x, cache)

    cache = b.empty()

    def kind(c):
        return jax.tree.structure(c), [(a.shape, a.dtype) for a in jax.tree.leaves(c)]

    before = kind(cache)
    for t in range(3):
        _, cache = step(b.params(), b.x()[:, t : t + 1], cache, b.cfg)
        if kind(cache) != before:
            return math.inf, f"the cache changes from {before} to {kind(cache)}"
    return float(traces - 1), f"{traces} traces"


def _l10(b: Bench):
    swapped = compare.relative(np.asarray(b.forward(b.params(), b.x()[::-1]))[::-1], b.truth)
    order = np.broadcast_to(np.arange(b.T), b.x().shape[:2])
    at = jax.jit(lambda params, x, positions: b.att.forward(params, b.cfg, x, positions=positions))
    shifted = compare.relative(at(b.params(), b.x(), order + 37), b.truth)
    return max(swapped, shifted), "batch order" if swapped > shifted else "positions + 37"


def _l11(b: Bench):
    """Gradients of forward and of a ragged prefill whose pads and unused slots are NaN; those of the pads are 0."""
    n = np.array([b.T, b.T - 4], np.int32)
    pads = (np.arange(b.T) >= n[:, None])[..., None]
    x = np.where(pads, np.nan, b.x(2))
    plain = jax.jit(jax.grad(lambda p, x: (b.att.forward(p, b.cfg, x) ** 2).sum(), argnums=(0, 1)))
    ragged = jax.jit(jax.grad(lambda p, x, c: (b.att.prefill(p, b.cfg, x, c, lengths=n)[0] ** 2).sum(), argnums=(0, 1)))
    of_forward = plain(b.params(), b.x(2))
    of_prefill = ragged(b.params(), x, b.empty(2, poison=True))
    if not compare.finite(of_forward) or not compare.finite(of_prefill):
        return math.inf, "NaN or Inf in a gradient"
    return float(np.abs(np.where(pads, of_prefill[1], 0)).max()), "gradient to pads"


def _l12(b: Bench):
    """Rows that are set back as if they had never seen more, or a refusal; forks and rows put in place of others as if
    they had always been there. What the cache has no right to hold is NaN."""
    n, errors = b.lengths, {}
    _, ragged = b.ragged(b.params(), b.x(), b.empty(), n)
    for old, held in ((np.full_like(n, b.T), b.one_shot[1]), (n, ragged)):
        for new in (n, np.maximum(n - 1, 0), np.maximum(n - b.span, 0)):
            pairs = ((buffer, getattr(held, name)) for name, buffer in b.spec.items())
            exact = np.all([np.asarray(buffer.rewinds(b.cfg, leaf, old, new)) for buffer, leaf in pairs], axis=0)
            kept = np.where(exact, new, old).astype(np.int32)
            errors[f"from {old} to {kept} tokens"] = _go_on(b, caches.rewind(b.att, b.cfg, held, kept), kept)
            for row in np.flatnonzero(~exact):
                if not _refused(b, held, np.where(np.arange(len(n)) == row, new, old)):
                    return math.inf, f"row {row} goes back from {old[row]} to {new[row]} tokens, which its cache cannot"
    rows = np.arange(len(n))[::-1] // 2  # those of the first half, twice
    forked = jax.jit(caches.take)(ragged, rows)
    errors["forks"] = _go_on(b, forked, n[rows], rows)
    replaced = jax.jit(caches.put)(b.one_shot[1], rows[::2], caches.take(ragged, rows[::2]))
    length = np.full_like(n, b.T)
    length[rows[::2]] = n[rows[::2]]
    errors["rows put"] = _go_on(b, replaced, length)
    return _worst(errors)


def _refused(b: Bench, cache, new) -> bool:
    try:
        caches.rewind(b.att, b.cfg, cache, new)
    except ValueError:
        return True
    return False


def _go_on(b: Bench, cache, length, rows=slice(None)) -> float:
    """The worst error of rows `rows` of x that have seen `length` tokens and are decoded to their end."""
    x, truth, cache, errors = b.x()[rows], np.asarray(b.truth)[rows], b.poison(cache), [0.0]
    for at in length + np.arange(b.T - length.min())[:, None]:
        more, at = at < b.T, np.minimum(at, b.T - 1)[:, None, None]  # the rows that have ended go on with anything
        y, cache = b.decode(b.params(), np.take_along_axis(x, at, axis=1), cache)
        errors.append(compare.relative(np.asarray(y)[more], np.take_along_axis(truth, at, axis=1)[more]))
    return max(errors)


LAWS: dict[str, Callable[[Bench], tuple[float, str]]] = {
    "L1": _l1, "L2": _l2, "L3": _l3, "L4": _l4, "L5": _l5, "L6": _l6,
    "L7": _l7, "L8": _l8, "L9": _l9, "L10": _l10, "L11": _l11, "L12": _l12,
}  # fmt: skip
