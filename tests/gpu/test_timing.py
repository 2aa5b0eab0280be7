"""On a GPU: python -m pytest --noconftest -m gpu tests/gpu (without the conftest, which asks for the interpreters)."""

import pytest

pytestmark = pytest.mark.gpu

ROWS, COLUMNS, TILE, SETS = 2**19, 256, 64, 3  # 512 MiB moved a call, far beyond L2


def test_one_kernel_takes_the_same_time_through_either_framework():
    """A Mosaic kernel that adds 1 to every value: called on JAX arrays, and on the same buffers as torch tensors."""
    import jax
    import numpy as np
    import torch

    from jforge.harness.timing import time_gpu
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
    got = foreign(tensors[0])
    assert np.array_equal(got.float().cpu().numpy(), np.asarray(compiled(arrays[0]), np.float32))
    last = []

    def through_jax(i):
        last[:] = [compiled(arrays[i])]

    calls = [lambda i=i: through_jax(i) for i in range(SETS)]
    jax_time = time_gpu(calls, lambda: jax.block_until_ready(last))
    torch_time = time_gpu([lambda i=i: foreign(tensors[i]) for i in range(SETS)], torch.cuda.synchronize)
    print(f"{jax_time.median:.2f} us through JAX, {torch_time.median:.2f} us through torch")
    assert jax_time.kernels == torch_time.kernels == 1
    assert abs(jax_time.median / torch_time.median - 1) < 0.03
