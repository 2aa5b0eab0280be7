"""How a call of pallas_kernels is lowered for cuda on a machine without a GPU, and how abstract calls are made."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from jforge.harness import fuzz
from jforge.harness.backends import BACKENDS, Backend
from jforge.harness.op import Draw
from jforge.harness.ops import BY_NAME, OPS
from pallas_kernels import compat

PALLAS = BACKENDS["pallas"]
EDGES = [draw for op in OPS for draw in op.edges.get("pallas", ())]


def name_of(draw: Draw) -> str:
    case = draw.case
    options = {"page": draw.at, **case.plan, **case.options, "stored": draw.stored}
    parts = [*case.sizes.items(), *((name, value) for name, value in options.items() if value)]
    return "-".join([case.op, draw.dtype, *(f"{name}{value}" for name, value in parts)])


def lowered(op: str, *arrays, donate=(), **options):
    """(the text of a call for cuda, the types of its results). Shared memory is checked on the way."""
    fixed = {name: value for name, value in options.items() if not hasattr(value, "shape")}
    given = {name: value for name, value in options.items() if name not in fixed}

    def call(*arrays, **given):
        return getattr(pallas_kernels, op)(*arrays, **given, **fixed)

    with compat.lowering_for_cuda():
        traced = jax.jit(call, donate_argnums=donate).trace(*arrays, **given)
        return traced.lower(lowering_platforms=("cuda",)).as_text(), jax.tree.leaves(traced.out_info)


def lowered_draw(draw: Draw):
    """The same of an example, as its view puts it."""
    found = []

    class Lowering(Backend):
        def call(self, op, inputs):
            found.append(lowered(op, *inputs.arrays.values(), **inputs.options))
            return ()

    backend = Lowering(*(getattr(PALLAS, field.name) for field in dataclasses.fields(PALLAS)))
    with PALLAS.planned(draw.case.plan):
        BY_NAME[draw.case.op].fuzz.views[draw.view](backend, draw, fuzz.inputs_of(draw))
    return found[0]


def abstract(op: str, sizes: dict, dtype="bfloat16", **types) -> list:
    """Arguments by an op's axes, v V wide and X lists a query where these sizes are given. `types` has the dtypes that
    differ, None for an argument that is None."""
    own = {"v": {"H": sizes.get("V")}, BY_NAME[op].lists: {"K": sizes.get("X")}}
    kinds = {"lengths": "int32", BY_NAME[op].lists: "int32", "weights": "float32"} | types
    arrays = []
    for name, axes in BY_NAME[op].axes.items():
        shape = tuple(own.get(name, {}).get(axis) or sizes[axis] for axis in axes)
        kind = kinds.get(name, dtype)
        arrays.append(None if kind is None else jax.ShapeDtypeStruct(shape, jnp.dtype(kind)))
    return arrays


def zeros(arrays: list) -> list:
    return [None if x is None else jnp.zeros(x.shape, x.dtype) for x in arrays]


def same(got, want) -> bool:
    """Whether two results have the same bits."""
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(got, want, strict=True))
