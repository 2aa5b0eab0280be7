"""The package exports every op with the signatures of `jforge.ops`, and has a kernel for each."""

import inspect

import pytest

import jforge.ops
import pallas_kernels


@pytest.mark.parametrize("name", pallas_kernels.__all__)
def test_signature(name):
    ours, theirs = (inspect.signature(getattr(package, name)) for package in (pallas_kernels, jforge.ops))
    shape = lambda signature: [(p.name, p.kind, p.default) for p in signature.parameters.values()]  # noqa: E731
    assert shape(ours) == shape(theirs)


def test_no_op_is_unwritten():
    """`jforge.ops.mix` takes an op of a module named `unwritten` from its fallback: there is none here."""
    assert not [
        name for name in pallas_kernels.__all__ if getattr(pallas_kernels, name).__module__.endswith("unwritten")
    ]
