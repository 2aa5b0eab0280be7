"""Reads and writes of a traced decode step, by cache buffer: the bytes that `cost` claims, taken from the program.

The rule is static. A buffer that a computation consumes whole counts once a step, however often it is used; a gather
counts the rows that it returns; the sum a buffer is capped at its size. A scatter counts its update; a returned
buffer that is not an updated version of its own input counts as written whole. Reshapes, casts and the like are views:
they move nothing by themselves. A `lax.cond` is taken to close a block in its true branch: `closing` picks the branch.
A primitive that touches a cache buffer and is not listed here raises, so that no traffic goes unseen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

VIEWS = {"broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "reshape", "rev", "slice", "squeeze",
         "stop_gradient", "transpose"}  # fmt: skip
CALLS = {"checkpoint", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit", "remat2"}
GATHERS = {"dynamic_slice", "gather"}
SCATTERS = {"dynamic_update_slice", "scatter", "scatter-add"}
COMPUTE = {"abs", "add", "and", "argmax", "argmin", "bitcast_convert_type", "clamp", "concatenate", "cos", "cumsum",
           "div", "dot_general", "eq", "exp", "exp2", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p",
           "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pad", "pow", "reduce_and", "reduce_max",
           "reduce_min", "reduce_or", "reduce_sum", "rsqrt", "select_n", "sign", "sin", "sort", "split", "sqrt",
           "square", "sub", "tanh", "top_k"}  # fmt: skip


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
    return Trace(lambda p, x, c: att.decode(p, cfg, x, c), params, x, cache)


def traffic(step, params, x, cache, *, closing: bool = False) -> Traffic:
    """Trace step(params, x, cache) -> (y, cache) and count what it reads and writes of every leaf but `length`."""
    return Trace(step, params, x, cache).count(closing)


class Trace:
    """A traced step(params, x, cache) -> (y, cache)."""

    def __init__(self, step, params, x, cache):
        closed, (_, out) = jax.make_jaxpr(step, return_shape=True)(params, x, cache)
        names, leaves = _names(cache), jax.tree.leaves(cache)
        if _names(out) != names:
            raise ValueError(f"the step returns a cache with leaves {_names(out)}; it was given {names}")
        self.jaxpr, self.leaves = closed.jaxpr, dict(zip(names, leaves, strict=True))

    def count(self, closing: bool = False) -> Traffic:
        """What it reads and writes of every leaf but `length`."""
        size = {n: math.prod(a.shape) * a.dtype.itemsize for n, a in self.leaves.items()}
        views = [None if n == "length" else View(n, a.dtype.itemsize, True) for n, a in self.leaves.items()]
        walk = _Walk(closing)
        before = [None] * (len(self.jaxpr.invars) - len(views))
        results = walk.run(self.jaxpr, before + views)[-len(views) :]
        for name, view in zip(self.leaves, results, strict=True):
            if name != "length" and (view is None or view.buffer != name or not view.intact):
                walk.traffic.written[name] = size[name]
        walk.traffic.read = {n: min(b, size[n]) for n, b in walk.traffic.read.items()}
        return walk.traffic


def _names(cache) -> list[str]:
    return [str(path[-1]).strip(".[]'") for path, _ in jax.tree_util.tree_flatten_with_path(cache)[0]]


class _Walk:
    """One pass over a jaxpr, following the views of the cache buffers."""

    def __init__(self, closing: bool):
        self.closing = closing
        self.traffic = Traffic()

    def run(self, jaxpr, views: Sequence[View | None]) -> list[View | None]:
        known = dict(zip(jaxpr.invars, views, strict=True))

        def look(atom) -> View | None:
            return None if isinstance(atom, jex.Literal) else known.get(atom)

        for eqn in jaxpr.eqns:
            inputs = [look(atom) for atom in eqn.invars]
            if any(inputs):
                known.update(zip(eqn.outvars, self.step(eqn, inputs), strict=True))
        return [look(atom) for atom in jaxpr.outvars]

    def step(self, eqn, inputs: list[View | None]) -> list[View | None]:
        name = eqn.primitive.name
        if name in CALLS:
            inner = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
            return self.run(getattr(inner, "jaxpr", inner), inputs)
        if name == "cond":
            branch = eqn.params["branches"][int(self.closing)]
            self.consume(eqn.invars[:1], inputs[:1])
            return self.run(branch.jaxpr, inputs[1:])
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

    @staticmethod
    def count(table: dict[str, int], view: View, atom) -> None:
        moved = math.prod(atom.aval.shape) * view.itemsize
        table[view.buffer] = table.get(view.buffer, 0) + moved
