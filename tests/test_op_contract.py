"""What the four packages say to a bad call, and the signatures that they share."""

import importlib
import inspect
import re

import jax.numpy as jnp
import numpy as np
import pytest
from op_contract_cases import CASES, GOOD

from jforge.harness.backends import BACKENDS, to_torch
from jforge.harness.ops import OPS

pytestmark = pytest.mark.usefixtures("untyped")
ALIKE = {
    "k_scale": ("k", "k_index", "v_scale"),
    "latent_scale": ("latent",),
    "v_scale": ("v", "k_scale"),
}  # which one is missing?


def asked(backend, changes: dict) -> bool:
    """JAX has no int64 here, and takes calls without queries, parts or entries, but no empty pool; the values of a page
    table are looked at by torch_ref alone.
    """
    arrays = [a for a in changes.values() if isinstance(a, np.ndarray)]
    if backend.framework == "jax" and any(a.dtype == np.int64 or 0 in a.shape for a in arrays):
        return "page_table" in changes
    return backend.name == "torch_ref" or len(changes) > 1 or len(changes.get("page_table", ())) != 3


CALLS = [
    (backend, op.name, *case)
    for op in OPS
    for backend in BACKENDS.values()
    for case in CASES[op.name]
    if asked(backend, case[0])
]


def ask(backend, op: str, arguments: dict):
    convert = to_torch if backend.framework == "torch" else jnp.asarray
    given = {n: convert(a) if isinstance(a, np.ndarray) else a for n, a in arguments.items()}
    return getattr(backend.ops, op)(**given)


def what(call) -> str:
    backend, op, changes, *_ = call
    return "-".join((op, backend.name, *changes))


@pytest.mark.parametrize("backend,op,changes,error,message", CALLS, ids=map(what, CALLS))
def test_a_bad_argument_is_named(backend, op, changes, error, message):
    """One line that begins with the argument, before anything runs; floats for integers may be either error."""
    allowed = (ValueError, TypeError) if any(isinstance(v, float | bool | None) for v in changes.values()) else error
    with pytest.raises(allowed) as caught:
        ask(backend, op, GOOD[op] | changes)
    argument, *said = (re.match(r"\w+(\[[\d, ]+\])?", text)[0] for text in (message, str(caught.value)))
    assert said[0] in (argument, *ALIKE.get(argument, ())) and "\n" not in str(caught.value)


@pytest.mark.parametrize("op", [op for op in GOOD if op not in ("topk_indices", "merge_states")])
@pytest.mark.parametrize("backend", [b for b in BACKENDS.values() if "float32" in b.dtypes], ids=lambda b: b.name)
def test_a_batch_without_rows_is_answered(backend, op):
    """Arrays without elements may have any strides; decay alone has no rows."""
    batch = next(a.shape[0] for a in GOOD[op].values() if isinstance(a, np.ndarray))
    rows = {n: a[:0] for n, a in GOOD[op].items() if isinstance(a, np.ndarray) and a.shape[0] == batch}
    got = ask(backend, op, GOOD[op] | rows)
    assert all(a.shape[0] == 0 for a in (got if isinstance(got, tuple) else (got,)))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_every_op_has_one_signature(backend, op):
    def parameters(package):
        function = getattr(importlib.import_module(package), op.name)
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert parameters(backend.package) == parameters("jforge.ops")
    positional = [name for name, kind, _ in parameters("jforge.ops") if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional[: len(op.axes)] == list(op.axes) and op.name in backend.ops.__all__
