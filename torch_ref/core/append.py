"""Appending ragged rows to a cache whose slot s holds the token at position s."""

import torch


def room(length, new, capacity):
    """bool [B]: whether the row's new tokens fit. length, new: int32 [B].

    On the CPU a row without room raises ValueError; on a device the answer is not read, and the row is left out.
    """
    fits = length + new <= capacity
    if length.device.type == "cpu":
        for row in (~fits).nonzero().flatten().tolist():
            raise ValueError(
                f"row {row} overflows its cache: length {int(length[row])} + {int(new[row])} new tokens, "
                f"capacity {capacity}"
            )
    return fits


def append(buffer, fresh, length, new):
    """A copy of buffer with fresh[b, i] in slot length[b] + i for i < new[b]; the other slots stay as they are.

    buffer: [B, S, ...]. fresh: [B, T, ...], rounded to buffer's dtype. length, new: int32 [B].
    """
    token = torch.arange(buffer.shape[1], device=buffer.device) - length[:, None]
    return replaced(buffer, fresh, token, (token >= 0) & (token < new[:, None]))


def replaced(buffer, fresh, token, written):
    """A copy of buffer with fresh[b, token[b, s]] in the slots s where written, bool [B, S], says so."""
    rows = torch.arange(len(buffer), device=buffer.device)[:, None]
    candidates = fresh.to(buffer.dtype)[rows, token.clamp(0, fresh.shape[1] - 1)]
    return torch.where(written.view(*written.shape, *[1] * (buffer.ndim - 2)), candidates, buffer)
