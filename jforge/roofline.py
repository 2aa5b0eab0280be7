"""What a card can do at most, and how long a decode step takes on it at least.

    step_floor(DEVICES["h100"], moved=..., flops=...)      # seconds

The numbers are those of data sheets: the kernel that only reads reached 94 % of the bandwidth on an
H100 and 97 % on an H200 (`ceiling` in docs/gpu_runs.jsonl).
"""

from typing import NamedTuple

from jforge.core.config import positive_int


class Device(NamedTuple):
    """One card. flops are dense products of bfloat16 with float32 sums: half of what sheets say "with sparsity"."""

    name: str
    bandwidth: float  # of its memory, bytes a second
    flops: float  # a second
    memory: int  # bytes
    source: str

    @property
    def ridge(self) -> float:
        """Flops a byte from which on a kernel is bound by arithmetic."""
        return self.flops / self.bandwidth


_GB = 10**9
DEVICES = {
    "h100": Device("H100 SXM5 80GB", 3.35e12, 989.4e12, 80 * _GB, "NVIDIA H100 Tensor Core GPU, data sheet, 2023"),
    "h200": Device("H200 SXM 141GB", 4.8e12, 989.4e12, 141 * _GB, "NVIDIA H200 Tensor Core GPU, data sheet, 2024"),
    "a100": Device("A100 SXM 80GB", 2.039e12, 312e12, 80 * _GB, "NVIDIA A100 Tensor Core GPU, data sheet, 2021"),
    "b200": Device("B200 (HGX) 180GB", 8e12, 2250e12, 180 * _GB, "NVIDIA DGX B200, data sheet, 2024, one GPU of eight"),
    "rtx4090": Device("RTX 4090", 1.008e12, 165.2e12, 24 * 2**30, "NVIDIA Ada GPU Architecture, white paper, 2022"),
    "mi300x": Device("MI300X", 5.3e12, 1307.4e12, 192 * _GB, "AMD Instinct MI300X Accelerator, data sheet, 2023"),
}


def device(name: str) -> Device:
    """The card of that name, in any case of letters. Raises ValueError that lists them."""
    found = DEVICES.get(name.lower().replace(" ", "").replace("-", ""))
    if found is None:
        raise ValueError(f"device is {name!r}; it must be one of {', '.join(DEVICES)}")
    return found


def step_floor(card: Device, moved: float, flops: float = 0) -> float:
    """Seconds that a step takes at least that moves so many bytes and does so many flops: the longer of the two."""
    return max(moved / card.bandwidth, flops / card.flops)


def padded(tokens: int, page: int | None) -> int:
    """The tokens that an engine has room for where it hands out memory by pages of `page` tokens; None: exactly those.

    Raises ValueError for a page that is no positive integer.
    """
    if page is None:
        return tokens
    positive_int("page", page)
    return -(-tokens // page) * page
