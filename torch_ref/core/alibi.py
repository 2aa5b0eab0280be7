"""ALiBi (Press et al. 2021, 2108.12409): a logit falls by a slope of its head for every token between key and query."""

import torch


def slopes(n_heads):
    """[2^(-8 (i+1) / n)] for i < n, n the largest power of two <= N, then the first, third, .. slope of 2n heads."""
    power = 1 << (n_heads.bit_length() - 1)
    return _geometric(power) + _geometric(2 * power)[: 2 * (n_heads - power) : 2]


def bias(slopes, query, key):
    """B T N S: slope_n (s - t) in slopes' dtype, for slopes N, the indices t of the queries int B T and s of the keys
    int B S."""
    behind = (key[:, None] - query[..., None]).to(slopes.dtype)
    return slopes[:, None] * behind[:, :, None]


def tensor(n_heads, dtype, device):
    """The slopes N, rounded once to dtype."""
    return torch.tensor(slopes(n_heads), dtype=torch.float64).to(device, dtype)


def _geometric(n_heads):
    """[2^(-8 (i+1) / N)] for i = 0..N-1."""
    return [2 ** (-8 * (i + 1) / n_heads) for i in range(n_heads)]
