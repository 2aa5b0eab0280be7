"""Everything of JAX that is private, unstable or differs between versions, and the choice of interpreter.

Written for jax 0.11.2. Mosaic GPU's API carries no stability promise, so the other files reach it only through here.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as _interpreter
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

__all__ = [
    "BY_COLUMN", "BY_ROW", "TILE", "TILE_T", "accumulate", "cupti", "jnp", "launch", "lax", "lowering_for_cuda", "pl",
    "plgpu", "races_found", "reset_interpreter", "spread", "swizzled", "target",
]  # fmt: skip

# Register layouts of a warpgroup: an MMA accumulator, its transpose, and vectors along its rows or its columns.
TILE = plgpu.Layout.WGMMA
TILE_T = plgpu.Layout.WGMMA_TRANSPOSED
BY_ROW = plgpu.Layout.WGMMA.reduce(1)
BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)

_INTERPRETER = plgpu.InterpretGPUParams(detect_races=True)


def launch(body, *operands, **arguments):
    """`plgpu.kernel(body, **arguments)(*operands)`: compiled for a GPU, interpreted with race detection on a CPU."""
    arguments.setdefault("compiler_params", plgpu.CompilerParams(approx_math=True))
    interpret = None if target().platform == "gpu" else _INTERPRETER
    return plgpu.kernel(body, interpret=interpret, **arguments)(*operands)


def target():
    """The device that is traced for: the abstract device of `lowering_for_cuda`, else the default device."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def lowering_for_cuda():
    """A context in which tracing is for an H100, whatever the backend: there
    `jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",))` lowers the real kernels on a machine without a GPU.

    The abstract device is part of jit's cache key, so a trace made outside is not reused inside.
    """
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def races_found() -> bool:
    """Whether the interpreter saw a data race since the last reset."""
    state = _interpreter.get_races()
    return state is not None and state.races_found


def reset_interpreter() -> None:
    """Forget races, and make the interpreter usable again after an exception inside a kernel."""
    _interpreter.reset_gpu_interpret_mode_state()


def swizzled(columns: int, itemsize: int) -> tuple:
    """SMEM transforms of an MMA operand whose rows have `columns` elements: 8-row tiles as wide as the swizzle."""
    span = math.gcd(columns * itemsize, 128)
    return (plgpu.TilingTransform((8, span // itemsize)), plgpu.SwizzleTransform(span))


def accumulate(values, add, beside=tuple):
    """(`values` plus the products that `add(accumulator)` issues, *what `beside()` returns while they are under way).

    In place on a GPU, where a second accumulator would not fit the registers; into a fresh one in the interpreter,
    which knows no initial value. `beside` returns vectors along the rows.
    """
    if target().platform != "gpu":

        def fresh(accumulator):
            add(accumulator)
            return beside(), accumulator[...]

        more, products = pl.run_scoped(fresh, plgpu.ACC(values.shape, values.dtype))
        return values + products, *more

    def in_place(refs):
        add(refs[0])
        for ref, value in zip(refs[1:], beside(), strict=True):
            ref[...] = value

    shapes = [] if beside is tuple else jax.eval_shape(beside)
    more = [plgpu.layout_cast(jnp.zeros(x.shape, x.dtype), BY_ROW) for x in shapes]
    return pl.run_state(in_place)((plgpu.ACC.init(values), *more))


def spread(vector, shape: tuple[int, int], axis: int):
    """Broadcast a vector that lies along `axis` of an accumulator-shaped tile."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, (axis,)), TILE)


def cupti():
    """The reader of kernel durations that ships with JAX's CUDA plugin: `_cupti_init()`, then
    `_cupti_get_timings(True)` gives (kernel name, milliseconds) of all that ran on the process's GPU in between,
    torch's kernels included. CUPTI allows one reader a process."""
    from jax._src.lib import mosaic_gpu

    return mosaic_gpu._mosaic_gpu_ext
