"""A Triton kernel that only reads: what memory can give on this card, in the run that quotes it."""

import torch
import triton
import triton.language as tl

BLOCKS = (4096, 8192, 16384)


@triton.jit
def _read(data, sums, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * STEPS * BLOCK
    total = tl.zeros([BLOCK], tl.int32)
    for step in tl.range(STEPS):
        total += tl.load(data + start + step * BLOCK + tl.arange(0, BLOCK))
    tl.store(sums + tl.program_id(0), tl.sum(total))


def read(data: torch.Tensor, block: int, steps: int = 8) -> torch.Tensor:
    """Sum int32 `data` in programs of steps * block elements; its size must be a multiple of that."""
    programs = data.numel() // (steps * block)
    sums = torch.empty(programs, dtype=torch.int32, device=data.device)
    _read[(programs,)](data, sums, steps, block, num_warps=8)
    return sums
