"""RMS normalisation."""

import torch

from .dtypes import accumulator


def rms_norm(x, weight, eps, offset=0.0):
    """x / sqrt(mean(x^2) + eps) * (offset + weight), the mean over all the dimensions that weight has.

    x: [..., *weight.shape]. weight [H] normalises each head alone (Qwen3), [N, H] all heads together (MiniMax-M2,
    OLMo-2). offset 1.0 is the Gemma type, whose weights start at 0. Computed in float32 or wider and rounded once, to
    x's dtype.
    """
    acc = accumulator(x.dtype, weight.dtype)
    wide = x.to(acc)
    dims = tuple(range(-weight.ndim, 0))
    inverse = torch.rsqrt(wide.square().mean(dims, keepdim=True) + eps)
    return (wide * inverse * (offset + weight.to(acc))).to(x.dtype)
