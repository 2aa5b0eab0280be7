"""Run-time shape checks for everything in jforge, and Triton's interpreter, before either is imported."""

import os

import jax
import jaxtyping
import numpy as np
import pytest

os.environ.setdefault("NPROC", "16")  # as jforge.harness.backends.for_programs_that_run_once
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads cost more than they save on tensors this small
jax.config.update("jax_disable_most_optimizations", True)  # most of the suite's time is XLA's, on tiny programs
jaxtyping.install_import_hook(["jforge"], "typecheck.check")


def pytest_configure():
    """Functions inside a kernel: Triton's interpreter patches its language anew for every call of one, a third of its
    time. Once for each module is enough, as a launch patches what its end puts back.
    """
    from triton.runtime import interpreter  # reads TRITON_INTERPRET

    patched = set()

    def call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    _call_python_without_jax_arrays()


def _call_python_without_jax_arrays():
    """Mosaic's interpreter calls Python for every access to memory, which takes nearly half of its time to put the
    arguments on a device. They are on the CPU, where a copy by NumPy does.
    """
    from jax._src import callback
    from jax._src.pallas.mosaic_gpu.interpret import shared_memory

    def call(*args, callback, **_):
        return [np.asarray(result) for result in callback(*map(np.array, args))]

    callback.io_callback_impl = call
    shared_memory._to_int = lambda x: x if isinstance(x, jax.core.Tracer) else int(x)


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """Each keeps some memory mappings, of which Linux allows a process 65,530: the whole suite would need more."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _quiet_terminal(monkeypatch):
    """Tables keep one width and no colour whatever the terminal."""
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def untyped():
    """For tests of bad input: the product's own messages, not those of the tests' type checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
