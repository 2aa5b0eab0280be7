"""What has no kernel raises NotImplementedError naming the argument, its value and what is taken: the shared checks."""

import math

from pallas_kernels.compat import jnp

MOST_ROWS = 65535  # of a grid, along all axes but one


def need(holds, reason: str) -> None:
    """NotImplementedError for the reason, unless the condition holds."""
    if not holds:
        raise NotImplementedError(reason)


def halves(name: str, dtype, out_dtype=None) -> None:
    """`name` has 16-bit elements, and the result is not wider than the accumulator."""
    reason = f"{name} has dtype {dtype}; wgmma multiplies 16-bit inputs, and float32 only as tf32"
    need(dtype in (jnp.float16, jnp.bfloat16), reason)
    wide = out_dtype is not None and jnp.dtype(out_dtype) == jnp.float64
    need(not wide, "out_dtype is float64; the kernel accumulates in float32")


def slots(name: str, axis: str, size: int) -> None:
    """TMA copies boxes of 8 slots."""
    need(size > 0 and size % 8 == 0, f"{name} has {axis}={size} slots; TMA needs a positive multiple of 8")


def width(name: str, axis: str, size: int, multiple: int, most: int, note: str = "") -> None:
    """The size of an axis is a positive multiple of `multiple` and at most `most`."""
    holds = 0 < size <= most and size % multiple == 0
    need(holds, f"{name} has {axis}={size}; the kernel takes multiples of {multiple} up to {most}{note}")


def grid(name: str, rows: str, sizes: dict[str, int]) -> None:
    """No size is 0, and the product of the axes named in `rows` is one of a CUDA grid."""
    given = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    holds = min(sizes.values()) > 0 and math.prod(sizes[axis] for axis in rows) <= MOST_ROWS
    most = f"{'*'.join(rows)} at most {MOST_ROWS}"
    need(holds, f"{name} has {given}; the grid must not be empty: none may be 0, {most}")
