"""The quantiser of sparse indexers: an orthonormal Hadamard rotation, then float8 with one power of two per vector."""

import torch

from .dtypes import accumulator

E4M3_MAX = 448.0
LEAST_AMAX = 1e-4


def hadamard(x):
    """x H_J / sqrt(J), H_J the Hadamard matrix in natural (Sylvester) order: H_2n = [[H_n, H_n], [H_n, -H_n]].

    x: [..., J], J a power of two. Returns the same shape in float32 or wider. A rotation: dot products stay.
    """
    width = x.shape[-1]
    x = x.to(accumulator(x.dtype))
    stride = 1
    while stride < width:
        low, high = x.unflatten(-1, (-1, 2, stride)).unbind(-2)
        x = torch.stack([low + high, low - high], dim=-2).flatten(-3)
        stride *= 2
    return x * width**-0.5


def e4m3(x):
    """(x8, scale): x is about x8 scale, x8 = clip(x / scale, -448, 448) in float8_e4m3fn [..., J], scale float32 [...].

    scale = 2^ceil(log2(amax / 448)), amax = max(max_j |x_j|, 1e-4); DeepSeek's scale format ue8m0. x: float32 or wider.
    """
    amax = x.abs().amax(-1).clamp(min=LEAST_AMAX)
    # amax = m 2^e with m in [0.5, 1) and 448 = 0.875 2^9: comparing m gives the ceiling exactly, log2 would round
    mantissa, exponent = torch.frexp(amax)
    exponent = exponent - 9 + (mantissa > 0.875).to(exponent.dtype)
    scale = torch.ldexp(torch.ones_like(amax), exponent)
    x8 = (x / scale[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return x8, scale.to(torch.float32)
