"""Reads and writes of a traced decode step or prefill, by cache buffer: what `cost` claims, taken from the program.

The rule is static. A buffer that a computation consumes whole counts once a step, however often it is used; a gather
counts the rows that it returns. A scatter counts its update; a returned buffer that is not an updated version of its
own input counts as written whole. The sums a buffer are capped at its size. Reshapes, casts and the like are views:
they move nothing by themselves. A scan is a computation that consumes what it is given. A `lax.cond` is taken to close
a block in its true branch: `closing` picks the branch. A primitive that touches a cache buffer and is not listed here
raises, so that no traffic goes unseen.

A call of an op of `jforge.ops` counts what its `lengths`, `window` and indices let it read, where these follow from
the context alone: the slots of a row up to its length, the last of them under a window; of lists, as many blocks as
the longest names, each of them whole, up to the length in all. A row that may read nothing counts one slot, the least
that a buffer has. Where they depend on data, and for a masked read that is no op, the static rule holds.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jforge.ops.watch import watching

VIEWS = {"broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "reshape", "rev", "slice", "squeeze",
         "stop_gradient", "transpose"}  # fmt: skip
CALLS = {"checkpoint", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit", "remat2"}
GATHERS = {"dynamic_slice", "gather"}
SCATTERS = {"dynamic_update_slice", "scatter", "scatter-add"}
COMPUTE = {"abs", "add", "and", "argmax", "argmin", "bitcast_convert_type", "clamp", "concatenate", "cos", "cumsum",
           "div", "dot_general", "eq", "exp", "exp2", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p",
           "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pad", "pow", "reduce_and", "reduce_max",
           "reduce_min", "reduce_or", "reduce_sum", "rsqrt", "scan", "select_n", "sign", "sin", "sort", "split", "sqrt",
           "square", "sub", "tanh", "top_k"}  # fmt: skip
RANGES = {"decode_attention": "k v k_scale v_scale", "decode_mla": "latent k_rope latent_scale",
          "index_scores": "k_index k_scale", "block_index_scores": "k_index k_scale"}  # fmt: skip
"""What an op reads up to `lengths`."""
LISTS = {"decode_block_sparse": ("block_indices", "k v k_scale v_scale"),
         "decode_sparse_mla": ("indices", "latent k_rope latent_scale")}  # fmt: skip
"""(the lists, what an op reads of the listed blocks)."""


class View(NamedTuple):
    """A traced value that is a cache buffer seen through views. `intact`: still its own elements in its own dtype."""

    buffer: str
    itemsize: int
    intact: bool


@dataclass
class Traffic:
    """Bytes of one step by buffer; buffers that are not touched are absent."""

    read: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)


def decode_traffic(att, cfg, context: int, dtype=jnp.bfloat16, *, closing: bool = False) -> Traffic:
    """The traffic of `att.decode` for one row whose cache holds exactly `context` tokens after the step."""
    return trace_decode(att, cfg, context, dtype).count(closing)


def trace_decode(att, cfg, context: int, dtype=jnp.bfloat16) -> "Trace":
    """The step of `decode_traffic`, traced once for both values of `closing`."""
    params = jax.eval_shape(lambda: att.init_params(jax.random.key(0), cfg, dtype))
    cache = jax.eval_shape(lambda: att.init_cache(cfg, 1, context, dtype))
    x = jax.ShapeDtypeStruct((1, 1, cfg.hidden_size), jnp.dtype(dtype))
    return Trace(lambda p, x, c: att.decode(p, cfg, x, c), params, x, cache, length=context - 1)


def traffic(step, params, x, cache, *, closing: bool = False) -> Traffic:
    """Trace step(params, x, cache) -> (y, cache) and count what it reads and writes of every leaf but `length`."""
    return Trace(step, params, x, cache).count(closing)


class Trace:
    """A traced step(params, x, cache) -> (y, cache). length: tokens of every row before the step, None for any."""

    def __init__(self, step, params, x, cache, length: int | None = None):
        with watching(_marked):
            closed, (_, out) = jax.make_jaxpr(step, return_shape=True)(params, x, cache)
        names, leaves = _names(cache), jax.tree.leaves(cache)
        if _names(out) != names:
            raise ValueError(f"the step returns a cache with leaves {_names(out)}; it was given {names}")
        self.jaxpr, self.leaves = closed.jaxpr, dict(zip(names, leaves, strict=True))
        known = [None if n != "length" or length is None else np.full(a.shape, length, a.dtype)
                 for n, a in self.leaves.items()]  # fmt: skip
        others = [None] * (len(self.jaxpr.invars) - len(known))
        self.values = _Values(closed, [partial(_same, value) for value in others + known])

    def count(self, closing: bool = False) -> Traffic:
        """What it reads and writes of every leaf but `length`."""
        size = {n: math.prod(a.shape) * a.dtype.itemsize for n, a in self.leaves.items()}
        views = [None if n == "length" else View(n, a.dtype.itemsize, True) for n, a in self.leaves.items()]
        walk = _Walk(closing)
        before = [None] * (len(self.jaxpr.invars) - len(views))
        results = walk.run(self.values, before + views)[-len(views) :]
        for name, view in zip(self.leaves, results, strict=True):
            if name != "length" and (view is None or view.buffer != name or not view.intact):
                walk.traffic.written[name] = size[name]
        found = walk.traffic.read, walk.traffic.written
        return Traffic(*({n: min(b, size[n]) for n, b in moved.items()} for moved in found))


def _marked(op, *args, **options):
    """The op as a call of its own in the program, whose name says what it is."""
    given = inspect.signature(op).bind(*args, **options).arguments
    arrays = {n: a for n, a in sorted(given.items()) if isinstance(a, jax.Array | np.ndarray)}
    rest = {n: a for n, a in given.items() if n not in arrays}
    sizes = [f"{n}={rest[n]}" for n in ("window", "block_size") if rest.get(n) is not None]

    def call(arrays):
        return op(**arrays, **rest)

    call.__name__ = f"{_MARK}{op.__name__} {' '.join(arrays)} {' '.join(sizes)}"
    return jax.jit(call)(arrays)


_MARK = "jforge.ops."


def _same(value):
    return value


class _Values:
    """The values of a program that follow from those of its inputs that are known, computed when they are asked for."""

    def __init__(self, closed, inputs: Sequence):
        self.jaxpr = closed.jaxpr
        self.found = dict(zip(self.jaxpr.constvars, closed.consts, strict=True))
        self.inputs = dict(zip(self.jaxpr.invars, inputs, strict=True))
        self.made = {out: eqn for eqn in self.jaxpr.eqns for out in eqn.outvars}

    def inner(self, closed, atoms) -> "_Values":
        return _Values(closed, [partial(self.of, atom) for atom in atoms])

    def of(self, atom):
        """The value of an atom, None where it is not known."""
        if isinstance(atom, jex.Literal):
            return atom.val
        if atom not in self.found:
            self.found.update({atom: self.inputs[atom]()} if atom in self.inputs else self.compute(self.made[atom]))
        return self.found[atom]

    def compute(self, eqn) -> dict:
        nothing = dict.fromkeys(eqn.outvars)
        if eqn.primitive.name in CALLS:
            inner = self.inner(_closed(eqn), eqn.invars)
            return {out: inner.of(a) for out, a in zip(eqn.outvars, inner.jaxpr.outvars, strict=True)}
        given = [self.of(atom) for atom in eqn.invars]
        inner = [p for p in jax.tree.leaves(list(eqn.params.values())) if isinstance(p, jex.Jaxpr | jex.ClosedJaxpr)]
        if inner or eqn.effects or any(value is None for value in given):
            return nothing
        results = eqn.primitive.bind(*map(jnp.asarray, given), **eqn.params)
        return dict(zip(eqn.outvars, results if eqn.primitive.multiple_results else [results], strict=True))


def _closed(eqn):
    """The program of a call."""
    inner = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
    return inner if hasattr(inner, "jaxpr") else jex.ClosedJaxpr(inner, ())


def _names(cache) -> list[str]:
    return [str(path[-1]).strip(".[]'") for path, _ in jax.tree_util.tree_flatten_with_path(cache)[0]]


class _Walk:
    """One pass over a jaxpr, following the views of the cache buffers."""

    def __init__(self, closing: bool):
        self.closing = closing
        self.traffic = Traffic()

    def run(self, values: _Values, views: Sequence[View | None]) -> list[View | None]:
        known = dict(zip(values.jaxpr.invars, views, strict=True))

        def look(atom) -> View | None:
            return None if isinstance(atom, jex.Literal) else known.get(atom)

        for eqn in values.jaxpr.eqns:
            inputs = [look(atom) for atom in eqn.invars]
            if any(inputs):
                known.update(zip(eqn.outvars, self.step(eqn, inputs, values), strict=True))
        return [look(atom) for atom in values.jaxpr.outvars]

    def step(self, eqn, inputs: list[View | None], values: _Values) -> list[View | None]:
        name = eqn.primitive.name
        if name in CALLS:
            if self.op(eqn, inputs, values):
                return [None] * len(eqn.outvars)
            return self.run(values.inner(_closed(eqn), eqn.invars), inputs)
        if name == "cond":
            branch = eqn.params["branches"][int(self.closing)]
            self.consume(eqn.invars[:1], inputs[:1])
            return self.run(values.inner(branch, eqn.invars[1:]), inputs[1:])
        if name in VIEWS:
            same = name not in ("broadcast_in_dim", "convert_element_type", "slice", "rev")
            return [inputs[0]._replace(intact=inputs[0].intact and same)]
        if name in GATHERS and inputs[0]:
            self.count(self.traffic.read, inputs[0], eqn.outvars[0])
            self.consume(eqn.invars[1:], inputs[1:])
            return [None]
        if name in SCATTERS:
            return [self.scatter(eqn, inputs)]
        if name not in COMPUTE | GATHERS:
            touched = ", ".join(view.buffer for view in inputs if view)
            raise ValueError(f"traffic does not know the primitive {name!r}, which touches {touched}")
        self.consume(eqn.invars, inputs)
        return [None] * len(eqn.outvars)

    def op(self, eqn, inputs: list[View | None], values: _Values) -> bool:
        """Count the call of an op by its lengths and lists; False where it is none or they are not known."""
        label = str(eqn.params.get("name", ""))
        if not label.startswith(_MARK):
            return False
        name, *words = label.removeprefix(_MARK).split()
        arrays = [word for word in words if "=" not in word]
        sizes = {n: int(size) for n, _, size in (word.partition("=") for word in words if "=" in word)}
        given = dict(zip(arrays, eqn.invars, strict=True))
        lists, read = LISTS[name] if name in LISTS else (None, RANGES[name])
        lengths = values.of(given["lengths"]) if "lengths" in given else None
        picks = values.of(given[lists]) if lists else None
        if (lengths is None and (not lists or "lengths" in given)) or (lists and picks is None):
            return False
        for buffer, atom, view in zip(arrays, eqn.invars, inputs, strict=True):
            if view and buffer in read.split():
                slots = _listed(picks, lengths, atom, sizes) if lists else _reached(lengths, given, atom, sizes)
                per_slot = math.prod(atom.aval.shape[2:]) * view.itemsize
                self.add(self.traffic.read, view, int(slots * per_slot))
            elif view:
                self.consume([atom], [view])
        return True

    def scatter(self, eqn, inputs: list[View | None]) -> View | None:
        """operand, then indices and update in the order of the primitive; scatter-add reads what it adds to."""
        target, rest = inputs[0], inputs[1:]
        self.consume(eqn.invars[1:], rest)
        if target:
            update = eqn.invars[1] if eqn.primitive.name == "dynamic_update_slice" else eqn.invars[2]
            self.count(self.traffic.written, target, update)
            if eqn.primitive.name == "scatter-add":
                self.count(self.traffic.read, target, update)
        return target

    def consume(self, atoms, views) -> None:
        for atom, view in zip(atoms, views, strict=True):
            if view:
                self.count(self.traffic.read, view, atom)

    def count(self, table: dict[str, int], view: View, atom) -> None:
        self.add(table, view, math.prod(atom.aval.shape) * view.itemsize)

    @staticmethod
    def add(table: dict[str, int], view: View, moved: int) -> None:
        table[view.buffer] = table.get(view.buffer, 0) + moved


def _reached(lengths, given, atom, sizes) -> int:
    """Slots that the queries of all rows see: those below the length, the last of them under a window."""
    T = next(iter(given[q] for q in ("q", "q_latent", "q_index") if q in given)).aval.shape[1]
    most = sizes["window"] + T - 1 if "window" in sizes else math.inf
    return sum(max(1, min(int(n), most)) for n in np.asarray(lengths))


def _listed(picks, lengths, atom, sizes) -> Fraction:
    """Slots of the listed blocks: lists for each of K heads or for each query head, B T X L, or B T L for all heads."""
    picks, size, shape = np.asarray(picks), sizes.get("block_size", 1), atom.aval.shape
    picks = picks if picks.ndim == 4 else picks[:, :, None]
    heads = shape[2] if picks.shape[2] > 1 or len(shape) == 4 else 1
    valid = ((picks >= 0) & (picks < -(-shape[1] // size))).sum(axis=-1)  # B T X
    slots = [valid[b].max(axis=-1).sum() * picks.shape[2] * size for b in range(len(picks))]
    limit = [shape[1]] * len(picks) if lengths is None else np.asarray(lengths)
    return sum(
        max(Fraction(1), min(Fraction(int(n), heads), Fraction(int(m)))) for n, m in zip(slots, limit, strict=True)
    )
