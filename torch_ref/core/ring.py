"""Ring buffers: slot (p - first) mod W holds the token at position p >= first, the newest W tokens of the row."""

import torch

from .append import replaced


def held(length, slots, first=0):
    """int32 [B, W]: the position of the token in each slot of a row of `length` tokens; below `first` it holds none.

    length: int32 [B], all tokens of the row, those before `first` included.
    """
    last = length[:, None] - 1
    slot = torch.arange(slots, dtype=torch.int32, device=length.device)
    return last - (last - first - slot) % max(slots, 1)  # a ring without slots has nothing to wrap


def oldest_first(buffer, length):
    """A copy of buffer B W ... with the row's tokens in their order, from slot 0 on; length: int32 B, all tokens."""
    slots = buffer.shape[1]
    oldest = (length - slots).clamp(min=0)
    slot = (oldest[:, None] + torch.arange(slots, device=length.device)) % max(slots, 1)
    return buffer[torch.arange(len(buffer), device=length.device)[:, None], slot]


def write(buffer, fresh, length, new, first=0):
    """A copy of buffer after the tokens length[b] .. length[b] + new[b] - 1, of which the newest W stay.

    buffer: [B, W, ...]. fresh: [B, T, ...], rounded to buffer's dtype; row b's first new[b] tokens are real. length,
    new: int32 [B]. Tokens before position `first` are not written; slots that no real token reaches stay as they are.
    """
    position = held(length + new, buffer.shape[1], first)
    token = position - length[:, None]
    written = (position >= first) & (token >= 0)
    return replaced(buffer, fresh, token, written)
