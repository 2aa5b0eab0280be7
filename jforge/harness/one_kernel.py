"""One Mosaic kernel timed through JAX and through torch on the same buffers: the timing method favours neither."""

import jax
import numpy as np

from jforge.harness.timing import Timing, time_gpu

ROWS, COLUMNS, TILE, SETS = 2**19, 256, 64, 3  # 512 MiB moved a call, far beyond L2


def times() -> tuple[Timing, Timing]:
    """Of a kernel that adds 1 to every value: called on JAX arrays, and on the same buffers as torch tensors."""
    import torch

    from pallas_kernels.compat import jnp, launch, lax, pl, plgpu

    def body(x, out, x_s, full):
        rows = pl.ds(lax.axis_index("tile") * TILE, TILE)
        plgpu.copy_gmem_to_smem(x.at[rows], x_s, full)
        plgpu.barrier_wait(full)
        x_s[...] = x_s[...] + jnp.bfloat16(1)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x_s, out.at[rows])
        plgpu.wait_smem_to_gmem(0)

    def add_one(x):
        return launch(
            body,
            x,
            out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
            scratch_types=[plgpu.SMEM((TILE, COLUMNS), x.dtype), plgpu.Barrier()],
            grid=(ROWS // TILE,),
            grid_names=("tile",),
        )

    arrays = [jax.random.normal(jax.random.key(i), (ROWS, COLUMNS), jnp.bfloat16) for i in range(SETS)]
    tensors = [torch.from_dlpack(a) for a in arrays]
    compiled, foreign = jax.jit(add_one), plgpu.as_torch_kernel(add_one)
    if not np.array_equal(foreign(tensors[0]).float().cpu().numpy(), np.asarray(compiled(arrays[0]), np.float32)):
        raise RuntimeError("the kernel's results through JAX and through torch differ")
    last = []

    def through_jax(i):
        last[:] = [compiled(arrays[i])]

    through_torch = [lambda i=i: foreign(tensors[i]) for i in range(SETS)]
    return (
        time_gpu([lambda i=i: through_jax(i) for i in range(SETS)], lambda: jax.block_until_ready(last)),
        time_gpu(through_torch, torch.cuda.synchronize),
    )
