"""Norms of vectors: RMS, layer and Euclidean."""

import torch

from .dtypes import accumulator


def rms_norm(x, weight, eps, offset=0.0, dims=None):
    """x / sqrt(mean(x^2) + eps) * (offset + weight), the mean over the last `dims` dimensions.

    dims: by default all that weight has, and the last one without a weight (None). weight broadcasts to x: [H]
    normalises each head alone (Qwen3), [N, H] all heads together (MiniMax-M2, OLMo-2), and with dims=1 each head alone
    under a weight of its own (StableLM). offset 1.0 is the Gemma type, whose weights start at 0. Computed in float32 or
    wider and rounded once, to x's dtype.
    """
    acc = accumulator(x.dtype, *(() if weight is None else (weight.dtype,)))
    wide = x.to(acc)
    inverse = torch.rsqrt(wide.square().mean(_last(dims, weight), keepdim=True) + eps)
    return _weighted(wide * inverse, weight, offset).to(x.dtype)


def layer_norm(x, weight, bias, eps, offset=0.0, dims=None):
    """(x - mean) / sqrt(variance + eps) * (offset + weight) + bias; weight and bias may be None, the rest as above."""
    given = (w.dtype for w in (weight, bias) if w is not None)
    wide = x.to(accumulator(x.dtype, *given))
    over = _last(dims, weight)
    centred = wide - wide.mean(over, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(over, keepdim=True) + eps)
    y = _weighted(centred * inverse, weight, offset)
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


def l2_norm(x, eps):
    """x / sqrt(sum(x^2) + eps) over the last dimension, in float32 or wider, to x's dtype."""
    wide = x.to(accumulator(x.dtype))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def _last(dims, weight):
    if dims is None:
        dims = 1 if weight is None else weight.ndim
    return tuple(range(-dims, 0))


def _weighted(wide, weight, offset):
    return wide if weight is None else wide * (offset + weight.to(wide.dtype))
