"""Causal depthwise convolution over the tokens of a row, and the state that carries it from one call to the next.

    y_t = b + sum over j < L of w_j raw_{t-L+1+j},   raw_s = 0 for s < 0

The state is the last L - 1 raw rows, B (L-1) X, the oldest first, as they were before the convolution. A row of fewer
tokens has zero rows before them: a bias of the projection belongs to tokens, so it is not in them.
"""

import torch

from .dtypes import accumulator


def joined(state, raw):
    """B (L-1+T) X: the state, then the T new raw rows, rounded to the state's dtype. What is stored is convolved."""
    return torch.cat([state, raw.to(state.dtype)], dim=1)


def from_the_start(raw, kernel):
    """`joined` of raw rows B T X that nothing precedes; kernel: L."""
    return joined(raw.new_zeros(len(raw), kernel - 1, raw.shape[2]), raw)


def depthwise(rows, weight, bias=None):
    """y: B T X in float32 or wider from rows B (L-1+T) X (`joined`), weight L X and bias X.

    Pads (rows after a row's tokens) reach no y before them.
    """
    kernel, tokens = len(weight), rows.shape[1] - len(weight) + 1
    acc = accumulator(rows.dtype, weight.dtype)
    y = sum(weight[j].to(acc) * rows[:, j : j + tokens].to(acc) for j in range(kernel))
    return y if bias is None else y + bias


def newest(rows, new, kernel):
    """The state B (L-1) X after the first new[b] of the T new rows in rows B (L-1+T) X. new: int32 B, 0 to T."""
    index = new[:, None] + torch.arange(kernel - 1, device=rows.device)
    return rows[torch.arange(len(rows), device=rows.device)[:, None], index]
