"""The laws that any attention must keep, public as `jforge.check`.

A law needs no second implementation: it compares a mechanism with itself (decode with forward, chunks with one shot),
with its own bookkeeping (visible, cost) or with what is true of every causal model. They run in float64 at 1e-10, so
a pass is not a matter of luck; an error that forward and decode share is left to torch_ref and transformers.
"""

import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jforge import caches
from jforge.core import compare
from jforge.core.attention import Attention
from jforge.lawbench import Bench
from jforge.traffic import trace_decode
from jforge.verdict import Found, Report, Row, Where, outputs, worst

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


def _l1(b: Bench) -> Found:
    return outputs("prefill", b.one_shot[0], b.truth)


def _l2(b: Bench) -> Found:
    together, _ = b.fold(b.x(), b.empty(poison=True), poison=True, tokens=4)
    wide = worst(outputs("decode", b.folded[0], b.truth), outputs("decode of 4 tokens a step", together, b.truth))
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
    """Steps from an empty cache and from a prefilled one, which decode is given to keep."""

    def kind(c):
        return jax.tree.structure(c), [(a.shape, a.dtype) for a in jax.tree.leaves(c)]

    before = kind(b.empty())
    for kept in (b.empty(), jax.tree.map(jnp.copy, b.one_shot[1])):
        for t in range(2):
            _, kept = b.decode(b.params(), b.x()[:, t : t + 1], kept)
            if kind(kept) != before:
                changed = sum(a != c for a, c in zip(before[1], kind(kept)[1], strict=False)) or 1
                return Found(changed, f"the cache changes from {before} to {kind(kept)}", Where("decode"))
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

    def square(params, x, cache):
        return (b.att.prefill(params, b.cfg, x, cache, lengths=b.lengths)[0] ** 2).sum()

    ragged = b.jit("prefill", jax.grad(square, argnums=(0, 1)))
    gradients = {
        "the gradient of forward": b.gradient(b.params(), b.x(), 2 * b.truth),
        "the gradient of a ragged prefill": ragged(b.params(), x, b.empty(poison=True)),
    }
    for of, tree in gradients.items():
        if not compare.finite(tree):
            return Found(math.inf, "NaN or Inf", Where(of))
    pads = np.where(real[..., None], 0, gradients["the gradient of a ragged prefill"][1])
    return outputs("the gradient to pads of a ragged prefill", pads, np.zeros_like(pads))


def _l12(b: Bench) -> Found:
    """Rows that are set back as if they had never seen more, or a refusal; forks and rows put in place of others as if
    they had always been there. What the cache has no right to hold is NaN."""
    n, found, everything = b.lengths, [], np.full_like(b.lengths, b.T)
    _, ragged = b.ragged(b.params(), b.x(), b.empty(), n)
    for old, held in ((everything, b.one_shot[1]), (n, ragged)):
        for new in (n, np.maximum(n - 1, 0), np.maximum(n - b.span, 0)):
            pairs = ((buffer, getattr(held, name)) for name, buffer in b.spec.items())
            exact = np.all([np.asarray(buffer.rewinds(b.cfg, leaf, old, new)) for buffer, leaf in pairs], axis=0)
            kept = np.where(exact, new, old).astype(np.int32)
            back = caches.rewind(b.att, b.cfg, held, kept)
            found.append(_go_on(b, f"decode after a rewind from {old} to {kept} tokens", back, kept))
            for row in np.flatnonzero(~exact):
                if not _refused(b, held, np.where(np.arange(len(n)) == row, new, old)):
                    note = f"goes back from {old[row]} to {new[row]} tokens, which its cache cannot"
                    return Found(math.inf, note, Where("rewind", int(row)))
    rows = np.arange(len(n))[::-1] // 2  # those of the first half, twice
    forked = b.jit("cache_spec", caches.take)(ragged, rows)
    found.append(_go_on(b, f"decode of rows {rows}, forked", forked, n[rows], rows))
    replaced = b.jit("cache_spec", caches.put)(b.one_shot[1], rows[::2], caches.take(ragged, rows[::2]))
    everything[rows[::2]] = n[rows[::2]]
    found.append(_go_on(b, f"decode of rows {rows[::2]}, put in place of others", replaced, everything))
    return worst(*found)


def _refused(b: Bench, cache, new) -> bool:
    try:
        caches.rewind(b.att, b.cfg, cache, new)
    except ValueError:
        return True
    return False


def _go_on(b: Bench, of: str, cache, length, rows=slice(None)) -> Found:
    """Rows `rows` of x that have seen `length` tokens, decoded to their end."""
    x, want, cache, batch = b.x()[rows], b.truth[rows], b.poison(cache), np.arange(len(length))
    got = want.copy()
    for at in length + np.arange(b.T - length.min())[:, None]:
        y, cache = b.decode(b.params(), x[batch, np.minimum(at, b.T - 1)][:, None], cache)
        more = at < b.T  # the rows that have ended went on with anything
        got[batch[more], at[more]] = np.asarray(y)[more, 0]
    return outputs(of, got, want)


LAWS: dict[str, Callable[[Bench], tuple[float, str]]] = {
    "L1": _l1, "L2": _l2, "L3": _l3, "L4": _l4, "L5": _l5, "L6": _l6,
    "L7": _l7, "L8": _l8, "L9": _l9, "L10": _l10, "L11": _l11, "L12": _l12,
}  # fmt: skip
