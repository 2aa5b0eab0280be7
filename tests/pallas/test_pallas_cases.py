"""Examples at the edges of the kernels' plans in Mosaic's interpreter, against float64 and for races; these and all
named cases lowered for cuda.
"""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
from mosaic import EDGES, PALLAS, lowered, lowered_draw, name_of

from jforge.core import compare
from jforge.harness import fuzz
from jforge.harness.backends import judge
from jforge.harness.op import Draw
from jforge.harness.ops import BY_NAME, CASES

NAMED = [Draw(case, "float16", 0) for case in CASES if case.op != "topk_indices"]


@pytest.mark.parametrize("draw", EDGES, ids=name_of)
def test_matches_the_oracle(draw):
    with PALLAS.planned(draw.case.plan):
        fuzz.check(PALLAS, draw)


@pytest.mark.parametrize("draw", EDGES + NAMED, ids=lambda draw: f"{draw.case.name}-{name_of(draw)}")
def test_lowers_for_cuda(draw):
    """One kernel, or two where there are splits, on the arguments as they lie; results in their dtypes."""
    text, results = lowered_draw(draw)
    op, sizes, options = BY_NAME[draw.case.op], draw.case.sizes, draw.case.options
    kernels = text.count("custom_call @mosaic_gpu_v2")
    merged = op.attends and "merge_states" in text and draw.case.plan.get("splits") != 1
    assert kernels == 1 or (kernels == 2 and merged)
    assert "stablehlo.pad" not in text and "stablehlo.transpose" not in text
    spare = -(-sizes["S"] // options["block_size"]) % 8 > 0 if op.name == "block_index_scores" else False
    assert ("stablehlo.slice" in text) == spare
    out = "float32" if op.fuzz.exact else options.get("out_dtype", draw.dtype)
    assert [str(x.dtype) for x in results] == [out, "float32"][: len(results)]


@pytest.mark.parametrize("softcap", [0.5, 30.0, 1e3, 1e5, 1e7])
def test_softcaps_from_small_to_none(softcap):
    """tanh by exp2 has float32's digits."""
    named = next(case for case in CASES if case.name == "softcap")
    case = dataclasses.replace(named, options={"softcap": softcap, "out_dtype": "float32"})
    out, lse = judge(PALLAS, BY_NAME[case.op], case, "float16")
    assert out <= compare.OUT["float16"] and lse <= compare.LSE["float32"]


STATES = [draw for draw in EDGES if draw.case.op == "decode_linear"]


@pytest.mark.parametrize("draw", STATES, ids=name_of)
def test_the_donated_state_goes_straight_through(draw):
    """One kernel, which takes the argument itself and whose result is the argument's buffer: nothing can copy it. An
    array that is not donated stays as it was."""
    inputs = fuzz.inputs_of(draw)
    with PALLAS.planned(draw.case.plan):
        text, _ = lowered(draw.case.op, *inputs.arrays.values(), donate=3, **inputs.options)
    bare = re.sub(r'"(\\.|[^"\\])*"', "", text)  # without the kernel's bytes
    assert re.findall(r" = (\S+) @\w+\(", bare) == ["call", "stablehlo.custom_call"]
    assert bare.count("stablehlo.") == 2  # the kernel and its alias
    assert re.search(r"%arg3: [^%]*tf\.aliasing_output = 1", bare)
    operands = re.search(r"@mosaic_gpu_v2\(([^)]*)\)", bare)[1].split(", ")
    result, operand = re.search(r"output_tuple_indices = \[(\d)\],\s+operand_index = (\d)", bare).groups()
    assert (result, operands[int(operand)]) == ("1", "%arg3")


def test_a_state_that_is_not_donated_stays_as_it_was():
    inputs = fuzz.inputs_of(STATES[0])
    state = jnp.asarray(inputs.arrays["state"])
    given = [jnp.asarray(x) for x in inputs.arrays.values()]
    given[3] = state
    PALLAS.ops.decode_linear(*given, **inputs.options)
    assert np.array_equal(state, inputs.arrays["state"])
