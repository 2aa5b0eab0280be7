"""Norms, rotary positions and softmax against formulas written out in the test."""

import math

import pytest
import torch

from torch_ref.core.norm import rms_norm
from torch_ref.core.rope import apply_rope, frequencies
from torch_ref.core.softmax import masked_softmax


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_per_head_and_flat(offset):
    x, head, flat = random(2, 3, 4, 6), random(6, seed=1), random(4, 6, seed=2)
    per_head, over_all = rms_norm(x, head, 1e-3, offset), rms_norm(x, flat, 1e-3, offset)
    for b, t in ((0, 0), (1, 2)):
        whole = math.sqrt(sum(float(z) ** 2 for z in x[b, t].flatten()) / 24 + 1e-3)
        torch.testing.assert_close(over_all[b, t], x[b, t] / whole * (offset + flat))
        one = math.sqrt(sum(float(z) ** 2 for z in x[b, t, 3]) / 6 + 1e-3)
        torch.testing.assert_close(per_head[b, t, 3], x[b, t, 3] / one * (offset + head))


def test_rms_norm_keeps_the_dtype_and_sums_in_float32():
    x = torch.full((1, 4096), 300.0, dtype=torch.float16)  # 300^2 is past float16
    y = rms_norm(x, torch.ones(4096, dtype=torch.float16), 1e-6)
    assert y.dtype == torch.float16 and torch.equal(y, torch.ones_like(y))


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_rope_turns_pairs_as_complex_numbers(layout, partial):
    x, positions = random(2, 3, 2, 8), torch.tensor([[0, 1, 5], [7, 8, 2]])
    r = int(8 * partial)
    theta, factor = frequencies({"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": partial}, 8)
    y = apply_rope(x, positions, theta, factor, layout)
    assert factor == 1.0 and torch.equal(y[..., r:], x[..., r:])
    for b, t, n, j in ((0, 1, 0, 0), (1, 0, 1, r // 2 - 1), (0, 2, 1, 1)):
        first, second = (j, j + r // 2) if layout == "half" else (2 * j, 2 * j + 1)
        angle = float(positions[b, t]) * 100.0 ** (-2 * j / r)
        turn = complex(math.cos(angle), math.sin(angle))
        expected = complex(x[b, t, n, first], x[b, t, n, second]) * turn
        assert complex(y[b, t, n, first], y[b, t, n, second]) == pytest.approx(expected, abs=1e-12)


def test_linear_scaling_divides_positions():
    plain, _ = frequencies({"rope_theta": 1e4}, 8)
    scaled, factor = frequencies({"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, 8)
    torch.testing.assert_close(scaled, plain / 4)
    assert factor == 1.0


def test_llama3_scaling_by_wavelength():
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    scaled, _ = frequencies(rope, 128)
    kinds = set()
    for j, value in enumerate(scaled.tolist()):
        theta = 5e5 ** (-2 * j / 128)
        wavelength = 2 * math.pi / theta
        if wavelength > 8192 / 1:
            kind, expected = "long", theta / 8
        elif wavelength < 8192 / 4:
            kind, expected = "short", theta
        else:
            blend = (8192 / wavelength - 1) / (4 - 1)
            kind, expected = "middle", (1 - blend) * theta / 8 + blend * theta
        kinds.add(kind)
        assert value == pytest.approx(expected, rel=1e-12)
    assert kinds == {"long", "short", "middle"}


def yarn(**keys):
    return {"rope_type": "yarn", "rope_theta": 1e4, "factor": 32.0, "original_max_position_embeddings": 4096} | keys


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_scaling(truncate):
    scaled, _ = frequencies(yarn(truncate=truncate), 64)
    low = 64 * math.log(4096 / (2 * math.pi * 32)) / (2 * math.log(1e4))
    high = 64 * math.log(4096 / (2 * math.pi * 1)) / (2 * math.log(1e4))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    for j, value in enumerate(scaled.tolist()):
        theta, ramp = 1e4 ** (-2 * j / 64), min(max((j - low) / (high - low), 0), 1)
        assert value == pytest.approx(theta * (1 - ramp) + theta / 32 * ramp, rel=1e-12)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, 1.3465735902799727),  # gpt-oss: 0.1 ln 32 + 1
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),  # DeepSeek-V3
        ({"mscale": 1.0, "mscale_all_dim": 0.5}, 1.3465735902799727 / 1.1732867951399863),
        ({"mscale": 0.707}, 1.3465735902799727),  # one of the two alone counts for nothing
        ({"attention_factor": 1.0}, 1.0),  # DeepSeek-V4
        ({"factor": 1.0}, 1.0),
    ],
)
def test_yarn_attention_factor(keys, expected):
    theta, factor = frequencies(yarn(**keys), 64)
    assert factor == pytest.approx(expected, rel=1e-12)
    x = random(1, 1, 1, 64)
    turned = apply_rope(x, torch.tensor([[3]]), theta, factor)
    torch.testing.assert_close(turned.norm(), factor * x.norm())


def test_yarn_with_a_ramp_of_no_width():
    theta, _ = frequencies(yarn(beta_fast=1e-9, beta_slow=1e-9, truncate=False), 8)
    assert theta.isfinite().all()


def test_rope_angles_are_not_made_in_bfloat16():
    x = torch.ones(1, 2, 1, 2, dtype=torch.bfloat16)
    y = apply_rope(x, torch.tensor([[1000, 1001]]), *frequencies({"rope_theta": 1e4}, 2))
    assert y.dtype == torch.bfloat16 and not torch.equal(y[:, 0], y[:, 1])


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_type": "dynamic", "rope_theta": 1.0},
            "^rope_type is 'dynamic'; allowed: default, linear, llama3, yarn, longrope, proportional$",
        ),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.4}, "^partial_rotary_factor is 0.4: 3 of 8 channels"),
    ],
)
def test_bad_rope_parameters(rope, message):
    with pytest.raises(ValueError, match=message):
        frequencies(rope, 8)


def test_bad_layout():
    with pytest.raises(ValueError, match="^rope_layout is 'neox'; allowed: half, interleaved$"):
        apply_rope(random(1, 1, 1, 4), torch.zeros(1, 1), *frequencies({"rope_theta": 1e4}, 4), layout="neox")


def test_softmax_with_nothing_seen_and_nan_outside_the_mask():
    scores = torch.tensor([[1.0, math.nan, 2.0], [math.nan, math.nan, math.inf]], dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    p, lse = masked_softmax(scores, mask)
    assert p[0, 1] == 0 and p[0].sum() == pytest.approx(1.0) and (p[1] == 0).all()
    assert lse.tolist() == [pytest.approx(math.log(math.e + math.e**2)), -math.inf]
    p, lse = masked_softmax(scores, mask, torch.tensor([0.5, -3.0], dtype=torch.float64))
    assert lse.tolist() == pytest.approx([math.log(math.e + math.e**2 + math.exp(0.5)), -3.0])
    assert p[0, 0] == pytest.approx(math.exp(1 - lse[0]))
