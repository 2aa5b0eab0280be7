"""The kernels' interpreters, made faster: most of the time of a judged kernel on a machine without a GPU is theirs.

Each change leaves every value as it was; both reach into what Triton and JAX call private. So does `interpreted`, with
which a process that compiles Triton's kernels can look into them.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import numpy as np


@functools.cache
def faster(package: str) -> None:
    """Of "triton", once TRITON_INTERPRET is set, or "pallas"; before a kernel is interpreted."""
    {"triton": _patch_the_language_once_a_module, "pallas": _call_python_without_jax_arrays}[package]()


def _patch_the_language_once_a_module() -> None:
    """Functions inside a kernel: Triton's interpreter patches its language anew for every call of one, a third of its
    time. Once for each module is enough, as a launch patches what its end puts back.
    """
    from triton.runtime import interpreter

    patched = set()

    def call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def _call_python_without_jax_arrays() -> None:
    """Mosaic's interpreter calls Python for every access to memory, which takes nearly half of its time to put the
    arguments on a device. They are on the CPU, where a copy by NumPy does.
    """
    import jax
    from jax._src import callback
    from jax._src.pallas.mosaic_gpu.interpret import shared_memory

    def call(*args, callback, **_):
        return [np.asarray(result) for result in callback(*map(np.array, args))]

    callback.io_callback_impl = call
    shared_memory._to_int = lambda x: x if isinstance(x, jax.core.Tracer) else int(x)


@contextlib.contextmanager
def interpreted() -> Iterator[Callable]:
    """Triton kernels launched inside are interpreted, also where this process compiles them for a GPU.

    Their tensors are copied to the CPU and back. What is given is a function from addresses inside of such copies,
    int64, to those of the tensors; other addresses stay.
    """
    import triton
    from triton.runtime import interpreter, jit

    from triton_kernels import runtime

    runtime.loops_are_interpreted()
    copies: list[tuple[int, int, int]] = []  # (first address, bytes, how far away the tensor is) of the last launch

    def run(self, *args, grid, warmup, **options):
        with np.errstate(all="ignore"):  # as in triton_kernels.runtime
            return interpreter.InterpretedFunction(self.fn).run(*args, grid=grid, warmup=warmup, **options)

    def call(self, *args, **options):
        scope = interpreter._patch_lang(self.fn)
        try:
            return interpreter.InterpretedFunction(self.fn).rewrite()(*args, **options)
        finally:
            scope.restore()

    def copied(self, args, options):
        hosts, host_options = to_host(self, args, options)
        copies.clear()
        for own, host in zip((*args, *options.values()), (*hosts, *host_options.values()), strict=True):
            if hasattr(own, "untyped_storage"):
                own, host = own.untyped_storage(), host.untyped_storage()
                copies.append((host.data_ptr(), host.nbytes(), own.data_ptr() - host.data_ptr()))
        return hosts, host_options

    def home(addresses):
        found = addresses.copy()
        for first, size, away in copies:
            inside = (addresses >= first) & (addresses < first + size)
            found[inside] = addresses[inside] + away
        return found

    to_host = interpreter.GridExecutor._init_args_hst
    places = (jit.JITFunction, "run", run), (jit.JITFunction, "__call__", call)
    places += ((interpreter.GridExecutor, "_init_args_hst", copied),)
    before = [getattr(owner, name) for owner, name, _ in places]
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        try:
            for owner, name, new in places:
                setattr(owner, name, new)
            yield home
        finally:
            for (owner, name, _), old in zip(places, before, strict=True):
                setattr(owner, name, old)
