"""What every op of this package needs around a launch: the device rule, what kernels ask of their tensors.

Triton decides at import between compiling kernels and interpreting them (`TRITON_INTERPRET=1`), so that choice is read
once here and is a fact about the process, not about a call.
"""

import functools
from contextlib import contextmanager

import numpy as np
import torch
import triton

from torch_ref.ops import check

INTERPRETED = bool(triton.knobs.runtime.interpret)


@functools.cache
def loops_are_interpreted():
    """Triton 3.6's interpreter takes arrays of one element for loop bounds; NumPy refuses that from 2.4 on."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if INTERPRETED:
    loops_are_interpreted()

# CUDA's limit for the second and third grid axis.
MAX_GRID_YZ = 65535
# Elements from slot to slot of a cache: offsets inside a tile of up to 128 slots are 32-bit.
MAX_SLOT_STRIDE = 2**31 // 128 - 1
# Widths C and R of a latent cache: more needs more registers than a program has.
MAX_LATENT, MAX_ROPE = 512, 64

FLOAT_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


# Where `recorded` collects launches; None: they run.
_record = None


@contextmanager
def recorded():
    """Launches inside are listed as (kernel, grid, args, options), not run: tensors of the meta device will do."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before


def launch(kernel, grid, *args, **options):
    """kernel[grid](*args, **options), on the device of the first argument.

    The interpreter's NumPy warnings are left out there: IEEE arithmetic on NaN and Inf is silent on a GPU.
    """
    if _record is not None:
        _record.append((kernel, grid, args, options))
        return
    if not INTERPRETED:
        with torch.cuda.device_of(args[0]):
            kernel[grid](*args, **options)
        return
    with np.errstate(all="ignore"):
        kernel[grid](*args, **options)


def check_device(op, name, device):
    """Raise TypeError for tensors that are not on a CUDA device, unless this process interprets its kernels."""
    if device.type != "cuda" and not INTERPRETED:
        raise TypeError(
            f"{op}: {name} is on {device}; Triton kernels take CUDA tensors. To run them on CPU tensors in the "
            "interpreter, set TRITON_INTERPRET=1 before triton_kernels (or triton) is imported"
        )


def check_grid(op, batch, n_splits):
    """Raise ValueError if a batch or a number of splits does not fit the second or third grid axis."""
    for axis, size in (("B", batch), ("the number of splits, S / chunk,", n_splits)):
        if size > MAX_GRID_YZ:
            raise ValueError(f"{op}: {axis} is {size}; the grid takes at most {MAX_GRID_YZ}")


def check_float(op, name, dtype):
    """Raise TypeError unless `dtype` is float16, bfloat16 or float32."""
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: {name} must be float16, bfloat16 or float32 in triton_kernels, got {dtype}")


def check_last_dim(op, **tensors):
    """Raise ValueError for a tensor whose last dimension is strided; None is skipped.

    Kernels read rows of the last dimension with 16-byte copies and have no stride for it.
    """
    for name, tensor in tensors.items():
        # An empty tensor that NumPy made has strides of 0.
        if tensor is not None and tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{op}: the last dimension of {name} must be contiguous, its stride is {tensor.stride(-1)}"
            )


def check_lengths(lengths, cache, page_table=None):
    """Raise ValueError for a length outside of 0..S where that costs no wait for a device; None is skipped."""
    if lengths is not None and lengths.device.type == "cpu":
        check.length_values(lengths, cache.shape[1] * (1 if page_table is None else page_table.shape[1]))


def check_slots(op, **caches):
    """NotImplementedError for a cache (B S ... or pages page ...; None is skipped) whose slots lie too far apart."""
    for name, cache in caches.items():
        stride = 0 if cache is None else cache.stride(1)
        if stride > MAX_SLOT_STRIDE:
            raise NotImplementedError(
                f"{op}: {name} has {stride} elements from slot to slot; at most {MAX_SLOT_STRIDE}"
            )


def check_rows(op, **tensors):
    """NotImplementedError for a tensor of which one row of the batch reaches over 2**31 elements: the offsets of
    queries, heads and list entries are 32-bit.
    """
    for name, tensor in tensors.items():
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))
        if reach >= 2**31:
            raise NotImplementedError(f"{op}: a row of {name} reaches over {reach} elements; at most {2**31 - 1}")


def check_inputs(op, widths, out_dtype, **tensors):
    """What a kernel asks of its float tensors beyond the contract; the first one is the query, None is skipped.

    widths: {letter: (width, the most that the kernel takes)}.
    """
    name, query = next(iter(tensors.items()))
    check_float(op, name, query.dtype)
    check_float(op, "out_dtype", out_dtype or query.dtype)
    for letter, (width, most) in widths.items():
        if width > most:
            raise NotImplementedError(f"{op}: {letter}={width} needs more registers than a program has; at most {most}")
    check_last_dim(op, **tensors)
    check_device(op, name, query.device)


def check_latents(op, out_dtype, latent_scale, q_latent, q_rope, latent, k_rope):
    """`check_inputs` and the offsets of a call on a latent cache."""
    if latent_scale is not None:
        raise NotImplementedError(f"{op}: a quantised latent (latent_scale) has no Triton kernel yet")
    widths = {"C": (q_latent.shape[-1], MAX_LATENT), "R": (q_rope.shape[-1], MAX_ROPE)}
    check_inputs(op, widths, out_dtype, q_latent=q_latent, q_rope=q_rope, latent=latent, k_rope=k_rope)
    check_slots(op, latent=latent, k_rope=k_rope)
    check_rows(op, q_latent=q_latent, q_rope=q_rope)
