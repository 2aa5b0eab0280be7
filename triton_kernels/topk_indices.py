"""The k largest scores of every row, in one fixed order.

    picks = the first k of the positions s, by score_s descending and, in ties, by s ascending;  -1 for a score of -inf

`torch.topk` promises no order among ties, so it is given none: a kernel joins every score and its position to one
int64, the score in the upper half as an integer of the same order, the position counted down in the lower. These keys
are distinct, so their k largest are one answer on every device and in every run, and a second kernel reads the picks
from the keys alone. The order is that of `torch_ref.ops.topk_indices`, ties and NaN included.
"""

import torch
import triton
import triton.language as tl

from torch_ref.ops import check
from triton_kernels import runtime
from triton_kernels.plan import Record
from triton_kernels.tiles import ordered

BLOCK: tl.constexpr = tl.constexpr(1024)
LOW: tl.constexpr = tl.constexpr(0xFFFFFFFF)


@triton.jit(do_not_specialize=["slots"])
def pack_kernel(scores, keys, slots):
    row = tl.program_id(0).to(tl.int64) * slots
    s = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(scores + row + s, mask=s < slots, other=0.0).to(tl.float32)
    tl.store(keys + row + s, (ordered(x).to(tl.int64) << 32) | (s.to(tl.int64) ^ LOW), mask=s < slots)


@triton.jit(do_not_specialize=["found", "k"])
def unpack_kernel(keys, picks, found, k):
    """picks [rows, k] from the keys [rows, found] that were chosen, found <= k; -1 for the rest."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + row * found + place, mask=place < found, other=0)
    unseen = (place >= found) | ((key >> 32) == ordered(tl.full([BLOCK], float("-inf"), tl.float32)))
    tl.store(picks + row * k + place, tl.where(unseen, -1, (key & LOW) ^ LOW).to(tl.int32), mask=place < k)


def run(scores, k):
    """`topk_indices` on arguments that were checked."""
    slots, k = scores.shape[-1], int(k)
    picks = torch.empty((*scores.shape[:-1], k), dtype=torch.int32, device=scores.device)
    if not picks.numel() or not slots:
        return picks.fill_(-1)
    rows = picks.numel() // k
    keys = torch.empty((rows, slots), dtype=torch.int64, device=scores.device)
    runtime.launch(pack_kernel, (rows, triton.cdiv(slots, BLOCK.value)), scores.contiguous(), keys, slots)
    chosen = torch.topk(keys, min(k, slots), dim=-1).values
    grid = (rows, triton.cdiv(k, BLOCK.value))
    runtime.launch(unpack_kernel, grid, chosen, picks, chosen.shape[-1], k)
    return picks


def topk_indices(scores, k):
    """Positions of the k largest scores; the order is at the top of this file.

    scores: [..., S], float16, bfloat16 or float32, any strides (a copy is made of what is not contiguous). k: >= 1;
    above S the picks end with -1. Returns int32 [..., k]. Candidates of -inf are never picked: -1 stands for them.

    Raises ValueError for k < 1 and a scalar, TypeError for dtypes and for CPU tensors outside the interpreter.
    """
    check.topk_indices(scores, k)
    runtime.check_float(OP.name, "scores", scores.dtype)
    runtime.check_device(OP.name, "scores", scores.device)
    return run(scores, k)


def calls(device, *, S=4096, k=512, dtype="float32"):
    """Arguments of `run`."""
    while True:
        yield (torch.randn(1, S, dtype=getattr(torch, dtype), device=device), k), {}


OP = Record(
    "topk_indices", run=run, calls=calls, kernels=(pack_kernel, unpack_kernel),
    offline=(dict(), dict(dtype="bfloat16")),
)  # fmt: skip
