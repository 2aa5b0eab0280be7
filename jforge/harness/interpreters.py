"""The kernels' interpreters, made faster: most of the time of a judged kernel on a machine without a GPU is theirs.

Each change leaves every value as it was; both reach into what Triton and JAX call private.
"""

import functools

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
