"""The four implementations of the ops behind one call: NumPy in, NumPy out.

On a machine without a GPU the kernels run in their interpreters, and each backend lists the dtypes that it gets right
there: Triton's interpreter miscomputes bfloat16 dots, and Mosaic's wgmma has no float32.
"""

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from jforge.core import compare
from jforge.harness import interpreters
from jforge.harness.op import Case, Inputs, Op


@dataclass(frozen=True)
class Backend:
    """`dtypes` are judged here on the CPU, `gpu_dtypes` on a GPU; `call(op, inputs)` returns float64 NumPy arrays."""

    name: str
    package: str
    framework: str
    dtypes: tuple[str, ...]
    gpu_dtypes: tuple[str, ...]

    @functools.cached_property
    def ops(self) -> ModuleType:
        """The package. Without a GPU, its interpreter is asked for before the first import."""
        if self.name == "triton":
            triton_can_run()
        if self.name in KERNELS and _RUN_ONCE and not gpu():
            interpreters.faster(self.name)
        return importlib.import_module(self.package)

    def call(self, op: str, inputs: Inputs) -> tuple[np.ndarray, ...]:
        return tuple(to_numpy(r) for r in results(getattr(self.ops, op), self.framework, inputs))

    def merge(self, parts: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
        """Partial (out, lse) of the same queries, joined in float32."""
        outs, lses = (np.stack(both).astype(np.float32) for both in zip(*parts, strict=True))
        return self.call("merge_states", Inputs({"outs": outs, "lses": lses}, {}))

    @contextlib.contextmanager
    def planned(self, plan: Mapping[str, int]) -> Iterator[None]:
        """Calls inside follow a case's plan; a package without plans of its own has nothing to follow."""
        if not plan or self.name not in KERNELS:
            yield
            return
        with importlib.import_module(f"{self.package}.plan").forced(**plan):
            yield


_ALL = ("float32", "bfloat16", "float16")
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("jforge", "jforge.ops", "jax", _ALL, _ALL),
        Backend("torch_ref", "torch_ref.ops", "torch", _ALL, _ALL),
        Backend("triton", "triton_kernels", "torch", ("float32", "float16"), _ALL),
        Backend("pallas", "pallas_kernels", "jax", ("bfloat16", "float16"), ("bfloat16", "float16")),
    )
}

KERNELS = ("triton", "pallas")


def judge(backend: Backend, op: Op, case: Case, dtype: str, seed: int = 0) -> tuple[float, float]:
    """The two errors (Op.errors) of a backend against the float64 oracle on the same rounded inputs.

    NotImplementedError passes through: a backend that refuses a case says so and nothing stands in for it.
    """
    inputs = op.inputs(case, dtype, seed)
    with backend.planned(case.plan):
        got = backend.call(op.name, inputs)
    return op.errors(got, op.truth(inputs))


def passes(errors: tuple[float, float], dtype: str) -> bool:
    return errors[0] <= compare.OUT[dtype] and errors[1] <= compare.LSE[dtype]


_RUN_ONCE: list[bool] = []
_CHEAP = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"  # those, in MLIR, take half of XLA's time


def for_programs_that_run_once() -> None:
    """`before_jax_starts`; XLA leaves out the passes that would take most of the time of small programs, and the
    interpreters what takes most of theirs. For a process of our own: both are settings of all that runs in it.
    """
    before_jax_starts()
    if _CHEAP not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{_CHEAP} {os.environ.get('XLA_FLAGS', '')}"
    _RUN_ONCE.append(True)
    if not gpu():
        jax.config.update("jax_disable_most_optimizations", True)


def before_jax_starts() -> None:
    """XLA's CPU client gets enough threads that Mosaic's interpreter can run all warpgroups of a kernel at once; on a
    GPU it leaves memory to torch.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("NPROC", str(max(16, os.cpu_count() or 1)))


def triton_can_run() -> None:
    """Without a GPU that torch sees, ask Triton for its interpreter; in time only before a kernel is defined."""
    try:
        import torch
    except ModuleNotFoundError:  # then no kernel of Triton's can be called
        return
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


@functools.cache
def gpu() -> bool:
    """Does JAX see a GPU? torch is asked only where its tensors are made."""
    return jax.default_backend() == "gpu"


def results(function: Callable, framework: str, inputs: Inputs) -> tuple:
    """What `function` returns for arrays of its framework, on a GPU where there is one; a lone result as a tuple."""
    convert, options = jnp.asarray if framework == "jax" else to_device, dict(inputs.options)
    arrays = [a if a is None else convert(a) for a in inputs.arrays.values()]
    options = {name: convert(v) if isinstance(v, np.ndarray) else v for name, v in options.items()}
    if framework == "torch" and isinstance(options.get("out_dtype"), str):
        import torch

        options["out_dtype"] = getattr(torch, options["out_dtype"])
    found = function(*arrays, **options)
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def to_numpy(result) -> np.ndarray:
    """float64, from either framework: torch has no way from bfloat16 to NumPy."""
    return result.detach().double().cpu().numpy() if hasattr(result, "cpu") else np.asarray(result, np.float64)


def to_device(array: np.ndarray):
    """`to_torch`, on a GPU where there is one."""
    import torch

    return to_torch(array).to("cuda" if torch.cuda.is_available() else "cpu")


def to_torch(array: np.ndarray):
    """A torch tensor with its own copy of the values; ml_dtypes' types are types that torch does not know."""
    import torch

    array = np.array(array)
    if array.dtype.name.startswith(("bfloat16", "float8")):
        bits = array.view(f"int{8 * array.dtype.itemsize}")
        return torch.from_numpy(bits).view(getattr(torch, array.dtype.name))
    return torch.from_numpy(array)
