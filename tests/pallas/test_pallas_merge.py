"""The merge kernel in Mosaic's interpreter, against float64, and its lowering for cuda."""

import jax
import jax.numpy as jnp
import numpy as np
import pallas_oracle as oracle
import pytest
from jax.experimental.mosaic.gpu import core

import pallas_kernels
from pallas_kernels import compat

LIMIT = {"float16": 1e-3, "bfloat16": 4e-3, "float32": 1e-6}
# Two groups of parts (more than 32), one part, rows that are no whole number of 64 columns, every dtype.
CASES = [(3, 128, "float32"), (1, 64, "float16"), (5, 80, "bfloat16"), (34, 64, "float32"), (2, 256, "float16")]


def parts(P, V, dtype):
    """P parts of 2 rows x 2 queries x 2 heads: an empty part full of NaN, and a query with no part at all."""
    rng = np.random.default_rng(0)
    outs, lses = rng.normal(size=(P, 2, 2, 2, V)), 3 * rng.normal(size=(P, 2, 2, 2))
    lses[P // 2, 0, 0], outs[P // 2, 0, 0] = -np.inf, np.nan
    lses[:, 1, 0, 1] = -np.inf
    return jnp.asarray(outs, dtype), jnp.asarray(lses, jnp.float32)


@pytest.mark.parametrize("P, V, dtype", CASES)
def test_matches_the_oracle(P, V, dtype, no_races):
    args = parts(P, V, dtype)
    out, lse = pallas_kernels.merge_states(*args)
    want, want_lse = oracle.merge_states(*args)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    assert oracle.error(out, want) < LIMIT[dtype]
    assert oracle.lse_error(lse, want_lse) < 1e-5


@pytest.mark.parametrize("P, V, dtype", CASES)
def test_lowers_for_cuda(P, V, dtype):
    with compat.lowering_for_cuda():
        lowered = jax.jit(pallas_kernels.merge_states).trace(*parts(P, V, dtype)).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu_v2") == 1


def test_rows_lie_along_the_axis_that_cuda_does_not_limit(monkeypatch):
    """More than 65535 rows, which a batch of 512 with 128 heads has."""
    grids, lower = [], core._lower_as_gpu_kernel
    monkeypatch.setattr(
        core,
        "_lower_as_gpu_kernel",
        lambda body, grid, *args, **kwargs: grids.append(grid) or lower(body, grid, *args, **kwargs),
    )
    outs, lses = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 512, 2, 128, 512), (2, 512, 2, 128)))
    with compat.lowering_for_cuda():
        jax.jit(pallas_kernels.merge_states).trace(outs, lses).lower(lowering_platforms=("cuda",))
    assert grids == [(131072, 2, 1)]


@pytest.mark.parametrize("B, T, N", [(0, 1, 2), (2, 0, 2), (2, 1, 0)])
def test_no_rows(B, T, N):
    out, lse = pallas_kernels.merge_states(jnp.zeros((2, B, T, N, 64), jnp.float16), jnp.zeros((2, B, T, N)))
    assert out.shape == (B, T, N, 64) and out.dtype == jnp.float16
    assert lse.shape == (B, T, N) and lse.dtype == jnp.float32


def test_unsupported_calls_say_why():
    lses = jnp.zeros((2, 1, 1, 1))
    with pytest.raises(NotImplementedError, match="V=0"):
        pallas_kernels.merge_states(jnp.zeros((2, 1, 1, 1, 0), jnp.float16), lses)
    with pytest.raises(NotImplementedError, match="16 bytes"):
        pallas_kernels.merge_states(jnp.zeros((2, 1, 1, 1, 6), jnp.float16), lses)
    with pytest.raises(ValueError, match="lses"):
        pallas_kernels.merge_states(jnp.zeros((2, 1, 1, 1, 64), jnp.float16), lses[:1])
