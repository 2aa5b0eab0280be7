"""Everything of JAX that is private, unstable or differs between versions, and the choice of interpreter.

Written for jax 0.11.2. Mosaic GPU's API carries no stability promise, so the other files reach it only through here.
"""

import math
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import xla_bridge
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, nvvm, vector
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as _interpreter
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.device import DEVICES

__all__ = [
    "BY_COLUMN", "BY_COPY", "BY_ROW", "TILE", "TILE_T", "accumulate", "await_rows", "commit_rows", "copy_rows", "cupti",
    "hidden", "jnp", "launch", "lax", "lowering_for_cuda", "pl", "plgpu", "races_found", "reset_interpreter", "spread",
    "swizzled", "take", "target",
]  # fmt: skip

# Register layouts of a warpgroup: an MMA accumulator, its transpose, and vectors along its rows or its columns.
TILE = plgpu.Layout.WGMMA
TILE_T = plgpu.Layout.WGMMA_TRANSPOSED
BY_ROW = plgpu.Layout.WGMMA.reduce(1)
BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)
# A vector with one element a row of a tile that `copy_rows` fills: thread t of 128 holds rows t // 8 + 16 j.
BY_COPY = plgpu.Layout.TILED(plgpu.Tiling(((16,), (4,), (1,))), (-3,), (-2, plgpu.Replicated(8)), -1)

# In the interpreter each warpgroup that waits can hold a thread of XLA's pool, which has as many threads as the machine
# has cores: on two cores three warpgroups would wait for ever. XLA reads NPROC when it starts its CPU client.
_CORES = os.cpu_count() or 1
_THREADS = int(os.environ.get("NPROC", _CORES if xla_bridge.backends_are_initialized() else max(16, _CORES)))
os.environ.setdefault("NPROC", str(_THREADS))

# Mosaic puts the last axis of a grid first: CUDA takes 2**31 - 1 blocks along that one and so many along the others.
_MOST_BLOCKS = 65535

_INTERPRETER = plgpu.InterpretGPUParams(detect_races=True)


def launch(body, *operands, **arguments):
    """`plgpu.kernel(body, **arguments)(*operands)`: compiled for a GPU, interpreted with race detection on a CPU."""
    arguments.setdefault("compiler_params", plgpu.CompilerParams(approx_math=True))
    for axis, size in zip(arguments["grid_names"][:-1], arguments["grid"], strict=False):
        if size > _MOST_BLOCKS:
            raise NotImplementedError(
                f"{arguments['kernel_name']} would run {size} programs along {axis}; CUDA takes {_MOST_BLOCKS}"
            )
    interpret = None if target().platform == "gpu" else _INTERPRETER
    if interpret and (warpgroups := arguments.get("num_threads") or 1) > _THREADS:
        raise RuntimeError(
            f"the interpreter needs a thread for each of {warpgroups} warpgroups and XLA's CPU client has {_THREADS}: "
            "import pallas_kernels before JAX's first computation, or set NPROC=16"
        )
    return plgpu.kernel(body, interpret=interpret, **arguments)(*operands)


def target():
    """The device that is traced for: the abstract device of `lowering_for_cuda`, else the default device."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def lowering_for_cuda():
    """A context in which tracing is for an H100, whatever the backend: there
    `jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",))` lowers the real kernels on a machine without a GPU.

    The abstract device is part of jit's cache key, so a trace made outside is not reused inside.
    """
    card = DEVICES[0]
    device = jax.sharding.AbstractDevice(device_kind=card.kind, num_cores=card.sms, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def races_found() -> bool:
    """Whether the interpreter saw a data race since the last reset."""
    state = _interpreter._races  # get_races asserts that a kernel has run
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


def hidden(x):
    """An int32 scalar of which the compiler does not know the range."""
    if target().platform != "gpu":
        return x

    scalar = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(scalar,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=scalar))
    def move(_, x):
        i32 = ir.IntegerType.get_signless(32)
        moved = llvm.inline_asm(i32, [x.registers.item()], "mov.b32 $0, $1;", "=r,r")
        return mgpu.FragmentedArray.splat(moved, (), is_signed=True)

    return move(x)


def take(ref, at):
    """ref[at], element by element, of a vector in global memory; `at` is in layout BY_COPY and so is the result.

    Pallas has no indexed load of its own.
    """
    if target().platform != "gpu":
        return jnp.take(ref[...], at)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), BY_COPY),
        return_type=plgpu.ShapeDtypeStruct(at.shape, ref.dtype, layout=BY_COPY),
    )
    def load(_, ref, at):
        single = ir.VectorType.get((1,), ir.MemRefType(ref.type).element_type)
        registers = np.empty_like(at.registers)
        for i, register in np.ndenumerate(at.registers):
            position = arith.index_cast(ir.IndexType.get(), vector.extract(register, [], [0]))
            registers[i] = vector.load(single, ref, [position])
        return mgpu.FragmentedArray(_registers=registers, _layout=at.layout, _is_signed=True)

    return load(ref, at)


def copy_rows(source, rows, tile):
    """tile[i] <- source[rows[i]], or zeros where rows[i] < 0, for the 64 rows of an MMA operand with 128-byte swizzle.

    source: rows of 16-bit elements in global memory, a multiple of 16 bytes wide; columns of `tile` past its width
    become 0. `rows` is in layout BY_COPY. On a GPU the copies are only issued: `commit_rows` closes a group of them and
    `await_rows` waits for groups. TMA gathers rows on Blackwell only, and one TMA copy a row and 64 columns costs more
    time to issue than the data take.
    """
    if target().platform != "gpu":
        found = jnp.take(source[...], jnp.maximum(rows, 0), axis=0)[:, : tile.shape[1]]
        found = jnp.where(rows[:, None] >= 0, found, jnp.zeros_like(found))
        tile[...] = jnp.pad(found, ((0, 0), (0, tile.shape[1] - found.shape[1])))
        return
    transforms = swizzled(64, 2)
    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), BY_COPY, plgpu.RefType(transforms)))(_issue_copies)(
        source, rows, tile
    )


def _issue_copies(_, source, rows, tile):
    """cp.async of 16 bytes a thread and instruction: 8 threads bring in 128 bytes of a row, with its swizzle."""
    i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))

    def number(value, kind=i32):
        return arith.constant(kind, value)

    source_type, tile_type = ir.MemRefType(source.type), ir.MemRefType(tile.type)
    stride = source_type.get_strides_and_offset()[0][0]
    down, across = (2 * elements for elements in tile_type.get_strides_and_offset()[0][:2])  # bytes from tile to tile
    slabs = tile_type.shape[1]
    thread = arith.remui(mgpu.utils.thread_idx(), number(128))
    row, chunk = arith.divui(thread, number(8)), arith.remui(thread, number(8))
    line = arith.remui(row, number(8))
    offset = arith.addi(arith.muli(arith.divui(row, number(8)), number(down)), arith.muli(line, number(128)))
    offset = arith.addi(offset, arith.muli(arith.xori(chunk, line), number(16)))
    to = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(tile), [offset], ir.IntegerType.get_signless(8))
    base = llvm.addrspacecast(llvm.PointerType.get(address_space=1), mgpu.utils.memref_ptr(source))
    inside = arith.cmpi(arith.CmpIPredicate.slt, arith.muli(chunk, number(8)), number(source_type.shape[1]))
    for j, register in enumerate(rows.registers.flat):
        token = vector.extract(register, [], [0])
        real = arith.cmpi(arith.CmpIPredicate.sge, token, number(0))
        if source_type.shape[1] < 64:
            real = arith.andi(real, inside)
        size = arith.select(real, number(16), number(0))
        at = arith.extui(i64, arith.maxsi(token, number(0)))
        at = arith.muli(at, number(2 * stride, i64))
        at = arith.addi(at, arith.extui(i64, arith.muli(chunk, number(16))))
        at = mgpu.utils.getelementptr(base, [at], ir.IntegerType.get_signless(8))
        for slab in range(slabs):
            copy = f"cp.async.cg.shared.global [$0 + {2 * j * down + slab * across}], [$1 + {slab * 128}], 16, $2;"
            llvm.inline_asm(ir.Type.parse("!llvm.void"), [to, at, size], copy, "r,l,r", has_side_effects=True)


def commit_rows():
    """Close the group of the copies that `copy_rows` issued since the last one; it may be empty."""
    if target().platform != "gpu":
        return

    @plgpu.inline_mgpu()
    def commit(_):
        nvvm.cp_async_commit_group()

    commit()


def await_rows(groups: int):
    """Wait until at most the last `groups` groups are under way, and let the MMAs see the data of the others.

    Each thread does so for its own copies only: it must arrive on a barrier before another warpgroup reads them.
    """
    if target().platform != "gpu":
        plgpu.commit_smem()
        return

    @plgpu.inline_mgpu()
    def wait(_):
        nvvm.cp_async_wait_group(groups)
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    wait()


def cupti():
    """The reader of kernel durations that ships with JAX's CUDA plugin: `_cupti_init()`, then
    `_cupti_get_timings(True)` gives (kernel name, milliseconds) of all that ran on the process's GPU in between,
    torch's kernels included. CUPTI allows one reader a process."""
    from jax._src.lib import mosaic_gpu

    return mosaic_gpu._mosaic_gpu_ext
