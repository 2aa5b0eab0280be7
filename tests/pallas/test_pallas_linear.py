"""decode_linear in Mosaic's interpreter, against float64, its lowering for cuda, and its in-place update."""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pallas_oracle as oracle
import pytest
from pallas_oracle import LinearCase

import pallas_kernels
from jforge.core import compare
from pallas_kernels import compat

module = importlib.import_module("pallas_kernels.decode_linear")  # the package's attribute is the op

CASES = [
    # The model's state in tiles of every width; decays of a head, a row and a channel; with and without delta rule.
    LinearCase(2, 3, 128, 128, "bfloat16", width=128),
    LinearCase(2, 3, 128, 128, "float32", decay=2, beta=True, width=128),
    LinearCase(1, 2, 64, 128, "float16", decay=3, beta=True, width=64),
    LinearCase(1, 2, 128, 64, "float32", decay=3, width=64),
    LinearCase(1, 2, 256, 96, "bfloat16", decay=2, width=32),
    LinearCase(1, 1, 64, 64, "float32", beta=True),
    # Key channels that are no whole pieces of 32, fewer value columns than a tile has.
    LinearCase(2, 2, 40, 32, "float16", decay=3, beta=True),
    LinearCase(2, 3, 8, 8, "bfloat16", decay=2, beta=True),
    LinearCase(1, 3, 24, 16, "float32"),
]


@pytest.fixture(params=CASES, ids=str)
def case(request, monkeypatch):
    if request.param.width:
        monkeypatch.setattr(module, "WIDTHS", (request.param.width,))
    return request.param


def call(q, k, v, state, decay, beta):
    return pallas_kernels.decode_linear(q, k, v, state, decay, beta=beta)


def lowered(*args):
    """The text for cuda with the state donated."""
    with compat.lowering_for_cuda():
        return jax.jit(call, donate_argnums=3).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def test_matches_the_oracle(case, no_races):
    args = case.arrays()
    before = np.array(args[3])
    out, state = call(*args)
    want_out, want_state = oracle.decode_linear(*args)
    assert out.dtype == case.dtype and state.dtype == jnp.float32
    assert compare.worst_row(out, want_out) < compare.OUT[case.dtype]
    assert compare.worst_row(state.reshape(*state.shape[:2], -1), want_state.reshape(*state.shape[:2], -1)) < 1e-6
    assert np.array_equal(args[3], before)  # not donated: the caller keeps it


def test_the_donated_state_goes_straight_through(case):
    """One kernel, which takes the argument itself and whose result is the argument's buffer: nothing can copy it."""
    text = lowered(*case.arrays())
    bare = re.sub(r'"(\\.|[^"\\])*"', "", text)  # without the kernel's bytes
    assert re.findall(r" = (\S+) @\w+\(", bare) == ["call", "stablehlo.custom_call"]
    assert bare.count("stablehlo.") == 2  # the kernel and its alias
    assert re.search(r"%arg3: [^%]*tf\.aliasing_output = 1", bare)
    operands = re.search(r"@mosaic_gpu_v2\(([^)]*)\)", bare)[1].split(", ")
    result, operand = re.search(r"output_tuple_indices = \[(\d)\],\s+operand_index = (\d)", bare).groups()
    assert (result, operands[int(operand)]) == ("1", "%arg3")


@pytest.mark.parametrize("decay", [1, 3])
@pytest.mark.parametrize("H, V", [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_model_shapes_lower(H, V, decay):
    """The widest tile fits shared memory for every number of key channels."""
    B, N, dtype = 64, 64, jnp.bfloat16
    shapes = [((B, N, H), dtype), ((B, N, H), dtype), ((B, N, V), dtype), ((B, N, H, V), jnp.float32)]
    shapes += [(((N,), (B, N), (B, N, H))[decay - 1], jnp.float32), ((B, N), jnp.float32)]
    lowered(*(jax.ShapeDtypeStruct(*each) for each in shapes))


@pytest.mark.parametrize(
    "B, H, V, width",
    [(64, 128, 128, 128), (3, 128, 128, 64), (1, 128, 128, 32), (64, 256, 256, 64), (64, 64, 96, 32), (64, 8, 8, 32)],
)
def test_plan_fills_the_card(B, H, V, width):
    """Wide tiles, but two for every SM and three in shared memory."""
    assert module.make_facts((B, 64, H), V, 1, False).width == width


@pytest.mark.parametrize("change, reason", [(dict(H=12), "H=12"), (dict(H=264), "up to 256"), (dict(V=40), "V=40")])
def test_unsupported_shapes_say_why(change, reason):
    with pytest.raises(NotImplementedError, match=reason):
        call(*LinearCase(**change).arrays())


def test_float64_says_why():
    with jax.enable_x64(True):
        q, k, v, state, decay, _ = LinearCase().arrays()
        with pytest.raises(NotImplementedError, match="state has dtype float64"):
            call(q, k, v, state.astype(jnp.float64), decay, None)


def test_wrong_arguments_name_the_argument():
    q, k, v, state, decay, _ = LinearCase().arrays()
    with pytest.raises(TypeError, match="v has dtype"):
        call(q, k, v.astype(jnp.bfloat16), state, decay, None)
    with pytest.raises(ValueError, match="decay has shape"):
        call(q, k, v, state, decay[None, :, None, None], None)
