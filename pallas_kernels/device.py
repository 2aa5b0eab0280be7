"""What is known of a card. A new one is an entry of `DEVICES`, and what `pallas_kernels.tune` measures on it."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Device:
    """One kind of GPU. Every device whose JAX name contains `name` is one."""

    name: str  # in the tuning tables
    kind: str  # what JAX calls it
    sms: int
    smem: int  # bytes that a program can have; several programs on one SM share the same amount
    registers: int  # of an SM
    bandwidth: int  # of its memory, GB/s
    tflops: int  # of dense products in bfloat16, 10^12 flops a second: half of what its data sheet says "with sparsity"


DEVICES = (
    Device("H100", "NVIDIA H100 80GB HBM3", sms=132, smem=227 * 1024, registers=65536, bandwidth=3350, tflops=989),
    Device("H200", "NVIDIA H200", sms=132, smem=227 * 1024, registers=65536, bandwidth=4800, tflops=989),
)


def device_of(kind: str) -> Device:
    """The entry of a card by its JAX name. One without an entry is planned for like the first, under its own name."""
    return next((device for device in DEVICES if device.name in kind), replace(DEVICES[0], name=kind))
