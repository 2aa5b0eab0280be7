"""The laws that any attention must keep, public as `jforge.check`.

A law needs no second implementation: it compares a mechanism with itself (decode with forward, chunks with one shot),
with its own bookkeeping (visible, cost) or with what is true of every causal model. They run in float64 at 1e-10, so
a pass is not a matter of luck; an error that forward and decode share is left to torch_ref and transformers.
"""

import math
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jforge.core import compare
from jforge.core.attention import Attention
from jforge.traffic import trace_decode
from jforge.verdict import Found, Report, Row, Where, caches, outputs, worst

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
}
COUNTED = ("L7", "L8", "L9")
"""Laws whose error is a count of violations."""
STATIC = ("L8", "L9")
"""Laws on traced programs and their shapes, to which it is all one how XLA compiles."""
CHEAPLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""What the laws tell XLA on a CPU: a third less time to compile, which is what a check costs. It cannot be trusted with
a failure: gradients of a correct softmax can be NaN (jax 0.11.2), so what fails is run again."""
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
"""As users compile, whatever the process's flags are."""


def check(
    att: Attention,
    cfg=None,
    *,
    laws: Sequence[str] = tuple(TITLES),
    seed: int = 0,
    each: Callable[[Row], None] = lambda row: None,
) -> Report:
    """Run the laws (default: all) on `att` with `cfg` (default: its first example). Works on anybody's Attention.

    Programs are compiled with few of XLA's optimisations. A law that fails so is run again as users compile, and that
    second run is reported, with the first in `before`. `each` is given every row as soon as it is there.

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
        bench = cache(lambda options: Bench(att, _example(att) if cfg is None else cfg, seed, dict(options)))
        cheap = jax.default_backend() == "cpu"
        for law in laws:
            row = _run(law, bench, CHEAPLY if cheap else {})
            if cheap and not row.ok and law not in STATIC and not (row.where and row.where.source):
                row = replace(_run(law, bench, OPTIMISED), before=row)
            rows.append(row)
            each(row)
    return Report(tuple(rows), *_described(bench))


def _run(law: str, bench, options: dict) -> Row:
    tolerance, b = 0 if law in COUNTED else compare.OUT["float64"], None
    compiled = "cheaply" if options is CHEAPLY else "optimised"
    try:
        b = bench(tuple(options.items()))
        error, note, where = Found(*LAWS[law](b))
    except Exception as problem:  # a broken mechanism may raise anything; the report must still come
        first = (str(problem).splitlines() or [""])[0]
        error, note, where = math.inf, f"{type(problem).__name__}: {first}", _raised(problem, b)
    return Row(law, error, tolerance, note, TITLES[law], where, compiled)


def _raised(problem: Exception, b: "Bench | None") -> Where | None:
    """The function of the mechanism that was called, and the last line of it that is in no installed package."""
    if isinstance(problem, jax.errors.JaxRuntimeError):
        return None  # from a compiled program, which the optimised run may do without
    frames = [f for f in traceback.extract_tb(problem.__traceback__) if "site-packages" not in f.filename]
    source = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else None
    return Where(b.calling if b else "the Config or cache_spec", source=source)


def _example(att: Attention):
    if not att.examples:
        raise ValueError("examples is empty; a Config must be given")
    return att.examples[0]


def _described(bench) -> tuple[str, tuple[frozenset[str], int]]:
    """(the Config, the buffers that turn and their least number of slots), as far as they can be had."""
    try:
        b = bench(tuple((CHEAPLY if jax.default_backend() == "cpu" else {}).items()))
    except Exception:  # each row says why
        return "", (frozenset(), 0)
    rings = {name: buffer.limit for name, buffer in b.spec.items() if buffer.limit}
    return str(b.cfg), (frozenset(rings), min(rings.values(), default=0))


class Bench:
    """The inputs that the laws share, and jitted functions, so that each shape is compiled once.

    Compiling is what a check costs, so there are few shapes: all rows in every call, and prefills of T, of half of T
    and of 2 tokens. Tokens and outputs are sliced and joined in NumPy, where that compiles nothing. `calling` is the
    function of the mechanism that was asked last.
    """

    def __init__(self, att: Attention, cfg, seed: int, options: dict | None = None):
        self.att, self.cfg, self.seed, self.options, self.calling = att, cfg, seed, options, "cache_spec"
        self.spec = att.cache_spec(cfg)
        sizes = [s for b in self.spec.values() for s in (b.every, b.limit) if s]
        self.span = max(sizes, default=1)  # the longest window or block: every law crosses it
        self.block = math.lcm(*(b.every for b in self.spec.values() if b.every))
        self.half = max(5, self.span + 1)
        self.T = 2 * self.half
        self.capacity = self.T + 2
        near = (0, 1, self.span - 1, self.span, self.span + 1, 2 * self.span, self.T - 1)
        self.lengths = np.array(sorted({n for n in near if 0 <= n < self.T}), np.int32)  # those of ragged rows
        self.traces = Counter()  # of decode, by the shapes and dtypes that it was given
        jit = self._jit
        self.forward = jit("forward", lambda params, x: att.forward(params, cfg, x))
        self.shifted = jit("forward", lambda params, x, positions: att.forward(params, cfg, x, positions=positions))
        self.gradient = jit("forward", self._gradient)
        self.prefill = jit("prefill", lambda params, x, cache: att.prefill(params, cfg, x, cache))
        self.ragged = jit("prefill", lambda params, x, cache, n: att.prefill(params, cfg, x, cache, lengths=n))
        self.decode = jit("decode", self._decode, donate_argnums=2)
        self.select = jit("select", lambda params, x, cache: att.select(params, cfg, x, cache))
        self.tokens_of = jit("tokens_of", lambda selection: att.tokens_of(cfg, selection, self.T))
        self.poison = jit("cache_spec", lambda cache: self.spec.poison(cfg, cache))
        self.used = jit("cache_spec", lambda cache: self.spec.used(cfg, cache))
        self._params: dict = {}

    def _jit(self, name: str, function: Callable, **more) -> Callable:
        """The function compiled; `calling` is its name while it runs."""
        compiled = jax.jit(function, compiler_options=self.options, **more)

        def call(*args):
            self.calling = name
            return compiled(*args)

        return call

    def _decode(self, params, x, cache):
        self.traces[str([(a.shape, a.dtype) for a in jax.tree.leaves((x, cache))])] += 1
        return self.att.decode(params, self.cfg, x, cache)

    def _gradient(self, params, x, towards):
        """Of (towards * forward).sum() by params and x, where `towards` is like an output."""
        _, back = jax.vjp(lambda params, x: self.att.forward(params, self.cfg, x), params, x)
        return back(towards)

    def params(self, dtype=np.float64):
        if np.float64 not in self._params:
            draw = self._jit("init_params", lambda key: self.att.init_params(key, self.cfg, np.float64))
            self._params[np.float64] = draw(jax.random.key(self.seed))
        if dtype not in self._params:
            self._params[dtype] = jax.tree.map(lambda a: np.asarray(a).astype(dtype), self._params[np.float64])
        return self._params[dtype]

    def x(self, dtype=np.float64) -> np.ndarray:
        """Tokens of as many rows as there are lengths."""
        rng = np.random.default_rng(self.seed + 1)
        return rng.standard_normal((len(self.lengths), self.T, self.cfg.hidden_size)).astype(dtype)

    def empty(self, dtype=np.float64, poison: bool = False):
        self.calling = "init_cache"
        cache = self.att.init_cache(self.cfg, len(self.lengths), self.capacity, dtype)
        return self.poison(cache) if poison else cache

    @cached_property
    def truth(self) -> np.ndarray:
        """forward of x in float64."""
        return np.asarray(self.forward(self.params(), self.x()))

    @cached_property
    def one_shot(self):
        """(y, cache) of one prefill of x."""
        return self.prefill(self.params(), self.x(), self.empty())

    @cached_property
    def folded(self):
        """(y, cache) of decoding x token by token."""
        return self.fold(self.x(), self.empty())

    @cached_property
    def halved(self):
        """(y, cache) of two prefills, the first just past the longest window or block."""
        x, cache, ys = self.x(), self.empty(), []
        for chunk in (x[:, : self.half], x[:, self.half :]):
            y, cache = self.prefill(self.params(), chunk, cache)
            ys.append(y)
        return np.concatenate(ys, axis=1), cache

    @cached_property
    def uneven(self):
        """(y, cache) of small chunks."""
        return self.nibble()

    def fold(self, x, cache, poison: bool = False):
        params, ys = self.params(x.dtype.type), []
        for t in range(x.shape[1]):
            y, cache = self.decode(params, x[:, t : t + 1], cache)
            cache = self.poison(cache) if poison else cache
            ys.append(y)
        return np.concatenate(ys, axis=1), cache

    def nibble(self, poison: bool = False):
        """Prefills of 2, 1, 2 or no tokens a row, each row at another place of this cycle, until all have T."""
        x, cache, rows = self.x(), self.empty(poison=poison), np.arange(len(self.lengths))[:, None]
        done, step, y = np.zeros(len(rows), np.int32), 0, np.full(x.shape, np.nan)
        while (done < self.T).any():
            new = np.minimum(np.array((2, 1, 2, 0))[(step + rows[:, 0]) % 4], self.T - done).astype(np.int32)
            chunk, real = self.cut(done, new, 2)
            got, cache = self.ragged(self.params(), chunk, cache, new)
            at = done[:, None] + np.arange(2)
            y[np.broadcast_to(rows, at.shape)[real], at[real]] = np.asarray(got)[real]
            cache = self.poison(cache) if poison else cache
            done, step = done + new, step + 1
        return y, cache

    def cut(self, start: np.ndarray, count: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(x from start[b] on, NaN after count[b] tokens; which are not): B width D, bool B width."""
        real = np.arange(width) < count[:, None]
        at = np.minimum(start[:, None] + np.arange(width), self.T - 1)
        return np.where(real[..., None], self.x()[np.arange(len(start))[:, None], at], np.nan), real

    def same_cache(self, of: str, got, want=None) -> Found:
        """Slot by slot, against that of one prefill."""
        want = self.one_shot[1] if want is None else want
        return caches(of, jax.tree.map(np.asarray, self.used(want)), got, want)


def _l1(b: Bench) -> Found:
    return outputs("prefill", b.one_shot[0], b.truth)


def _l2(b: Bench) -> Found:
    wide = outputs("decode", b.folded[0], b.truth)
    if wide.error > compare.OUT["float64"]:
        return wide
    x = b.x(np.float32)
    got, _ = b.fold(x, b.empty(np.float32))
    if got.dtype != np.float32:
        return Found(math.inf, f"decode of float32 gives {got.dtype}", Where("decode"))
    narrow = outputs("decode in float32", got, b.forward(b.params(np.float32), x), "float32")
    return narrow if narrow.error > compare.OUT["float32"] else wide


def _l3(b: Bench) -> Found:
    halves = outputs(f"prefill in chunks of {b.half}", b.halved[0], b.truth)
    return worst(halves, outputs("prefill in chunks of 0 to 2", b.uneven[0], b.truth))


def _l4(b: Bench) -> Found:
    b.spec.check(b.one_shot[1])
    others = {"decode": b.folded, f"prefill in chunks of {b.half}": b.halved, "prefill in chunks of 0 to 2": b.uneven}
    return worst(*(b.same_cache(f"after {how}", cache) for how, (_, cache) in others.items()))


def _l5(b: Bench) -> Found:
    decoded, cache = b.fold(b.x(), b.empty(poison=True), poison=True)
    chunked, _ = b.nibble(poison=True)
    found = outputs("decode", decoded, b.truth), outputs("prefill in chunks of 0 to 2", chunked, b.truth)
    return worst(*found, b.same_cache("after decode", cache))


def _l6(b: Bench) -> Found:
    """Rows of many lengths, NaN at the pads, one more token, then the rest: as if each row had been alone."""
    n, params, T = b.lengths, b.params(), b.T
    x, real = b.cut(np.zeros_like(n), n, T)
    y, cache = b.ragged(params, x, b.empty(poison=True), n)
    next_y, cache = b.decode(params, b.cut(n, np.ones_like(n), 1)[0], cache)
    lengths = np.asarray(cache.length)
    if (lengths != n + 1).any():
        row = int(np.flatnonzero(lengths != n + 1)[0])
        place = Where("after a ragged prefill and decode", row, None, "length", None, float(lengths[row]), n[row] + 1.0)
        return Found(math.inf, "", place)
    x, after = b.cut(n + 1, T - n - 1, T)
    rest, cache = b.ragged(params, x, cache, T - n - 1)

    def alone(start):
        return b.truth[np.arange(len(n))[:, None], np.minimum(start[:, None] + np.arange(T), T - 1)]

    return worst(
        outputs("prefill of ragged rows", y, np.where(real[..., None], b.truth, 0)),
        outputs("decode after a ragged prefill", next_y, alone(n)[:, :1]),
        outputs("prefill of the rest of each row", rest, np.where(after[..., None], alone(n + 1), 0)),
        b.same_cache("after ragged prefills", cache),
    )


def _l7(b: Bench) -> Found:
    """Count the (t, s) where dy_t/dx_s is non-zero and visible says no, or the reverse."""
    order, x = np.arange(b.T), np.broadcast_to(b.x()[:1], b.x().shape)
    support, picks = _support(b, x), _picks(b, x)
    b.calling = "visible"
    t = jnp.asarray(order)
    seen = np.broadcast_to(b.att.visible(b.cfg, t[:, None], t), support.shape)
    if picks is None:
        return _pairs({"visible, but without influence": seen & ~support, "not visible": support & ~seen})
    b.calling = "tokens_of"
    always = np.asarray(jax.jit(lambda: b.att.tokens_of(b.cfg, None, b.T)[0])())
    read = (picks | always | (order[:, None] == order)) & seen  # a query is made of its own token
    return _pairs({"not visible": support & ~seen, "not read": support & ~read, "read, but unused": read & ~support})


def _pairs(wrong: dict[str, np.ndarray]) -> Found:
    """The count of (query, key) pairs that are wrong in any way, and those of the first way."""
    count = int(np.logical_or.reduce(list(wrong.values())).sum())
    said = ", ".join(f"{mask.sum()} pairs {what}" for what, mask in wrong.items() if mask.any())
    first = next((mask for mask in wrong.values() if mask.any()), None)
    if first is None:
        return Found(count)
    return Found(count, said, Where(pairs=tuple((int(t), int(s)) for t, s in np.argwhere(first))))


def _support(b: Bench, x) -> np.ndarray:
    """bool[T, T]: where dy_t/dx_s is not 0 (NaN is not). Each row of a call asks for another t, or for none."""
    probe, B, found = np.random.default_rng(7).standard_normal(x.shape[2]), len(x), []
    for start in range(0, b.T, B):
        towards = np.zeros(x.shape)
        rows = np.arange(min(B, b.T - start))
        towards[rows, start + rows] = probe
        found.append((np.asarray(b.gradient(b.params(), x, towards)[1]) != 0).any(axis=-1)[: len(rows)])
    return np.concatenate(found)


def _picks(b: Bench, x) -> np.ndarray | None:
    """bool[T, T]: the tokens that decode would pick for each query; None where nothing is chosen."""
    B, found = len(x), []
    for start in range(0, b.T, B):
        n = np.minimum(start + np.arange(B), b.T - 1).astype(np.int32)
        _, cache = b.ragged(b.params(), x, b.empty(), n)
        selection = b.select(b.params(), x[np.arange(B), n][:, None], cache)
        if selection is None:
            return None
        found.append(np.asarray(b.tokens_of(selection))[: b.T - start, 0])
    return np.concatenate(found)


def _l8(b: Bench) -> Found:
    """Bytes at three contexts, two dtypes, and with and without a block that closes."""
    wrong = []
    for dtype in (jnp.float32, jnp.bfloat16):
        for context in (b.block * n for n in (3, 8, 17)):
            b.calling = "init_cache"
            cache = b.att.init_cache(b.cfg, 1, context, dtype)
            stored = {name: getattr(cache, name).nbytes for name in b.spec}
            b.calling = "decode"
            step = trace_decode(b.att, b.cfg, context, dtype)
            b.calling = "cost"
            for closing in (False, True):
                cost, moved = b.att.cost(b.cfg, context=context, dtype=dtype, closing=closing), step.count(closing)
                pairs = {"stored": (cost.stored, stored), "read": (cost.read, moved.read)}
                pairs["written"] = (cost.written, moved.written)
                pairs["fixed + per_token"] = ({"": cost.fixed + cost.per_token * context}, {"": sum(stored.values())})
                for what, (claimed, counted) in pairs.items():
                    for name in claimed.keys() | counted.keys():
                        if claimed.get(name, 0) != counted.get(name, 0):
                            where = f"{what} at context {context}, {jnp.dtype(dtype)}"
                            wrong.append((where, name, counted.get(name, 0), claimed.get(name, 0)))
    if not wrong:
        return Found(0)
    where, name, counted, claimed = wrong[0]
    return Found(len(wrong), f"{where}: cost says {claimed} B, counted {counted} B", Where(buffer=name or None))


def _l9(b: Bench) -> Found:
    def kind(c):
        return jax.tree.structure(c), [(a.shape, a.dtype) for a in jax.tree.leaves(c)]

    cache = b.empty()
    before = kind(cache)
    for t in range(3):
        _, cache = b.decode(b.params(), b.x()[:, t : t + 1], cache)
        if kind(cache) != before:
            changed = sum(a != c for a, c in zip(before[1], kind(cache)[1], strict=False)) or 1
            return Found(changed, f"the cache changes from {before} to {kind(cache)}", Where("decode"))
    traces = max(b.traces.values())
    return Found(traces - 1, f"{traces} traces of one shape" if traces > 1 else "")


def _l10(b: Bench) -> Found:
    swapped = np.asarray(b.forward(b.params(), b.x()[::-1]))[::-1]
    order = np.broadcast_to(np.arange(b.T), b.x().shape[:2])
    shifted = b.shifted(b.params(), b.x(), order + 37)
    return worst(outputs("forward of the rows in reverse", swapped, b.truth),
                 outputs("forward at positions + 37", shifted, b.truth))  # fmt: skip


def _l11(b: Bench) -> Found:
    """Gradients of forward and of a ragged prefill whose pads and unused slots are NaN; those of the pads are 0."""
    x, real = b.cut(np.zeros_like(b.lengths), b.lengths, b.T)
    square = lambda p, x, c: (b.att.prefill(p, b.cfg, x, c, lengths=b.lengths)[0] ** 2).sum()  # noqa: E731
    ragged = b._jit("prefill", jax.grad(square, argnums=(0, 1)))
    gradients = {
        "the gradient of forward": b.gradient(b.params(), b.x(), 2 * b.truth),
        "the gradient of a ragged prefill": ragged(b.params(), x, b.empty(poison=True)),
    }
    for of, tree in gradients.items():
        if not compare.finite(tree):
            return Found(math.inf, "NaN or Inf", Where(of))
    pads = np.where(real[..., None], 0, gradients["the gradient of a ragged prefill"][1])
    return outputs("the gradient to pads of a ragged prefill", pads, np.zeros_like(pads))


LAWS: dict[str, Callable[[Bench], tuple[float, str]]] = {
    "L1": _l1, "L2": _l2, "L3": _l3, "L4": _l4, "L5": _l5, "L6": _l6,
    "L7": _l7, "L8": _l8, "L9": _l9, "L10": _l10, "L11": _l11,
}  # fmt: skip
