"""The fuzz with fixed draws, and proof that it finds planted bugs."""

import importlib

import pytest

from jforge.core import masks
from jforge.harness.backends import BACKENDS
from jforge.harness.fuzz import OPS, fuzz

pytestmark = pytest.mark.usefixtures("untyped")  # the type checker draws random numbers, which hypothesis forbids
EXAMPLES = {"jforge": 40, "torch_ref": 40, "triton": 15, "pallas": 5}  # `make fuzz` runs 500 a backend
op_module = importlib.import_module("jforge.ops.decode_attention")
right = op_module.attend


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_fuzz(name, op):
    judged = fuzz(BACKENDS[name], op, EXAMPLES[name])
    assert sum(judged.values()) >= EXAMPLES[name]
    assert set(judged) <= set(BACKENDS[name].dtypes)


def _base_2(q, k, v, visible, **options):
    out, lse = right(q, k, v, visible, **options)
    return out, lse * 1.4426950408889634


def _scaled_sinks(q, k, v, visible, *, scale, cap=None, sinks=None):
    return right(q, k, v, visible, scale=scale, cap=cap, sinks=None if sinks is None else sinks * scale)


def _uncapped(q, k, v, visible, *, scale, cap=None, sinks=None):
    return right(q, k, v, visible, scale=scale, sinks=sinks)


def _wide_window(q, k, size):
    return (k <= q) & (k >= q - size)


def _strict(q, k):
    return k < q


BUGS = {
    "base-2 LSE": (op_module, "attend", _base_2),
    "scaled sinks": (op_module, "attend", _scaled_sinks),
    "no softcap": (op_module, "attend", _uncapped),
    "a window of W + 1": (masks, "window", _wide_window),
    "a query blind to its own key": (masks, "causal", _strict),
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_fuzz_finds(bug, monkeypatch):
    monkeypatch.setattr(*BUGS[bug])
    with pytest.raises(AssertionError):
        fuzz(BACKENDS["jforge"], "decode_attention", 200, shrink=False)
