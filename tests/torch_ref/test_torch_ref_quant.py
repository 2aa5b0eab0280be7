"""torch_ref's Hadamard rotation and float8 quantiser: the definition, the exact scale rule, the bound of the error."""

import math

import pytest
import torch
from dense_family import INF, close, random
from dsa_loop import E4M3, quantise

from torch_ref.core.quant import e4m3, hadamard


@pytest.mark.parametrize("width", [1, 2, 8, 128])
def test_hadamard_is_the_signed_sum_and_its_own_inverse(width):
    x = random(3, width)
    signs = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(width)] for i in range(width)]).double()
    close(hadamard(x), x @ signs / math.sqrt(width))
    close(hadamard(hadamard(x)), x)


def test_scale_rule_round_trips_exactly():
    """A vector of float8 values whose largest is in (224, 448], times any power of two, comes back bit by bit."""
    values = torch.tensor([sign * value for value in E4M3 for sign in (1, -1)]).double()
    tops = [value for value in E4M3 if value > 224]
    for exponent in (-21, -9, -1, 0, 3, 40):
        for top in tops:
            vector = values.clamp(-top, top) * 2.0**exponent
            x8, scale = e4m3(vector)
            assert scale.dtype == torch.float32 and float(scale) == 2.0**exponent
            assert torch.equal(x8.double() * scale, vector)


def test_scale_at_its_edges():
    def scale(amax, dtype=torch.float64):
        return float(e4m3(torch.tensor([-amax, amax / 3], dtype=dtype))[1])

    assert scale(448.0) == 1.0 and scale(224.0) == 0.5
    assert scale(math.nextafter(448.0, INF)) == 2.0 and scale(math.nextafter(224.0, INF)) == 1.0
    above = torch.nextafter(torch.tensor(448.0), torch.tensor(INF)).item()
    assert scale(above, torch.float32) == 2.0
    assert scale(0.0) == scale(1e-4) == scale(1e-7) == 2.0**-22  # 1e-4 / 448 = 2^-22.1
    assert e4m3(torch.zeros(4))[0].float().tolist() == [0.0] * 4


def test_quantisation_error_is_within_half_a_step():
    x = random(500, 16) * random(500, 1, seed=3).mul(4).exp()
    x8, scale = e4m3(x)
    step = scale.double()[:, None]
    assert ((x8.double() * step - x).abs() <= torch.maximum(x.abs() / 16, step * 2.0**-10)).all()
    top = x.abs().amax(-1).clamp(min=1e-4) / scale
    assert ((top > 224) & (top <= 448)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rotated_and_quantised_is_the_loop(dtype):
    """The loop rounds to the nearest of a list of values; vectors from far below the least scale to far above 448."""
    for row in (random(60, 8) * random(60, 1, seed=3).mul(5).exp()).to(dtype):
        x8, scale = e4m3(hadamard(row))
        expected, expected_scale = quantise(row)
        assert float(scale) == expected_scale and torch.equal(x8.double(), expected)
