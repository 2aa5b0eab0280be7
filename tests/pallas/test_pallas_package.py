"""The package exports every op with the signatures of `jforge.ops`; unwritten ones say so."""

import inspect

import pytest

import jforge.ops
import pallas_kernels
from pallas_kernels import unwritten

OPS = pallas_kernels.__all__


@pytest.mark.parametrize("name", OPS)
def test_signature(name):
    ours, theirs = (inspect.signature(getattr(package, name)) for package in (pallas_kernels, jforge.ops))
    shape = lambda signature: [(p.name, p.kind, p.default) for p in signature.parameters.values()]  # noqa: E731
    assert shape(ours) == shape(theirs)


@pytest.mark.parametrize("name", [n for n in OPS if hasattr(unwritten, n)])
def test_unwritten_ops_raise(name):
    op = getattr(pallas_kernels, name)
    required = [p for p in inspect.signature(op).parameters.values() if p.default is p.empty]
    with pytest.raises(NotImplementedError, match=name):
        op(**{p.name: None for p in required})
