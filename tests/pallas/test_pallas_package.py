"""The package exports every op with the signatures of `jforge.ops`; its interpreter says what it needs."""

import inspect

import jax.numpy as jnp
import pytest

import jforge.ops
import pallas_kernels
from pallas_kernels import compat


@pytest.mark.parametrize("name", pallas_kernels.__all__)
def test_signature(name):
    ours, theirs = (inspect.signature(getattr(package, name)) for package in (pallas_kernels, jforge.ops))
    shape = lambda signature: [(p.name, p.kind, p.default) for p in signature.parameters.values()]  # noqa: E731
    assert shape(ours) == shape(theirs)


def test_too_few_threads_for_the_interpreter(monkeypatch):
    """Three warpgroups on two threads would wait for ever."""
    monkeypatch.setattr(compat, "_THREADS", 2)
    q, latent = jnp.zeros((1, 1, 128, 128), jnp.float16), jnp.zeros((1, 64, 128), jnp.float16)
    given = q, q[..., :64], latent, latent[..., :64], jnp.ones(1, jnp.int32)
    with pytest.raises(RuntimeError, match="^the interpreter needs a thread for each of 3 warpgroups .* has 2: "):
        pallas_kernels.decode_mla(*given, scale=1.0)
