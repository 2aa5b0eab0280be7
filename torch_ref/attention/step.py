"""What every call does before and after the attention: positions, pads, rows without room."""

from functools import wraps
from typing import NamedTuple

import torch

from ..core.append import append, room
from . import inputs

MOST_TOKENS = 16  # of a row in one decode


class Step(NamedTuple):
    """T tokens on top of caches of `start` tokens; the row index is b.

    x: B T D, 0 at pads, so that a NaN there meets no weight. start: int32 B. new: int32 B, the tokens to write: 0 in a
    row without room. positions: int32 B T, start + 0..T-1. token: bool B T, False at pads. fits: bool B.
    """

    x: torch.Tensor
    start: torch.Tensor
    new: torch.Tensor
    positions: torch.Tensor
    token: torch.Tensor
    fits: torch.Tensor

    @property
    def keep(self):
        """bool B T: the tokens that are written, which are those that attend."""
        return self.token & self.fits[:, None]

    def causal(self, slots):
        """bool B T S: the slots up to each query that attends; slot s of the cache holds the token at position s."""
        slot = torch.arange(slots, device=self.x.device)
        return (slot <= self.positions[..., None]) & self.keep[..., None]

    def appended(self, cache, write=append, **new):
        """{name: buffer} after the new tokens, and the length; the given cache is not changed.

        new: {name: B T ..}, rounded to the buffer's dtype. write: `append`, or `ring.write` for buffers that are rings.
        """
        after = {name: write(cache[name], fresh, self.start, self.new) for name, fresh in new.items()}
        return after | {"length": self.start + self.new}


def empty(batch, dtype, **shapes):
    """{name: zeros, B *shape in dtype} of a cache's buffers, and a length of 0 in every row."""
    buffers = {name: torch.zeros(batch, *shape, dtype=dtype) for name, shape in shapes.items()}
    return buffers | {"length": torch.zeros(batch, dtype=torch.int32)}


def begin(x, cache, capacity, lengths=None):
    """The Step of x B T D whose row b brings lengths[b] tokens (int32 B, default T) to a cache of `capacity` slots.

    capacity None: the cache never overflows. Raises ValueError on the CPU for a row without room.
    """
    batch, tokens, _ = x.shape
    if lengths is None:
        lengths = torch.full((batch,), tokens, dtype=torch.int32, device=x.device)
    inputs.check_lengths(lengths, x)
    start = cache["length"]
    fits = torch.ones_like(start, dtype=torch.bool) if capacity is None else room(start, lengths, capacity)
    order = torch.arange(tokens, dtype=torch.int32, device=x.device)
    token = order < lengths[:, None]
    return Step(
        x=x.masked_fill(~token[..., None], 0.0),
        start=start,
        new=torch.where(fits, lengths, 0),
        positions=start[:, None] + order,
        token=token,
        fits=fits,
    )


def end(step, y):
    """y B T D with 0 at pads and NaN in all of a row without room."""
    return y.masked_fill(~step.token[..., None], 0.0).masked_fill(~step.fits[:, None, None], torch.nan)


def in_order(x, positions):
    """(order, positions) of `forward`: 0..T-1 in each row, int B T, and the positions for RoPE, checked, by default the
    same."""
    order = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    if positions is not None:
        inputs.check_positions(positions, x)
    return order, order if positions is None else positions


def token_by_token(decode):
    """A decode of 1 to 16 tokens a row from one of a single token; indices (B T L) are split like x.

    A row without room for all of its tokens takes none: on the CPU a ValueError, else the old row and NaN.
    """

    @wraps(decode)
    def of_several(params, cfg, x, cache, *ops, indices=None, **more):
        if x.ndim != 3 or x.shape[1] == 1:
            more |= {} if indices is None else {"indices": indices}
            return decode(params, cfg, x, cache, *ops, **more)
        tokens = x.shape[1]
        if not 1 <= tokens <= MOST_TOKENS:
            raise ValueError(f"x has shape {list(x.shape)}; allowed: [B T D], T from 1 to {MOST_TOKENS}")
        after, ys = cache, []
        for t in range(tokens):
            own = {} if indices is None else {"indices": indices[:, t : t + 1]}
            y, after = decode(params, cfg, x[:, t : t + 1], after, *ops, **own, **more)
            ys.append(y)
        taken = after["length"] == cache["length"] + tokens
        kept = {name: torch.where(taken.view(-1, *[1] * (a.ndim - 1)), a, cache[name]) for name, a in after.items()}
        return torch.cat(ys, dim=1).masked_fill(~taken[:, None, None], torch.nan), kept

    return of_several
