"""Run-time shape checks for everything in jforge, and Triton's interpreter, before either is imported."""

import os

import jax
import jaxtyping
import pytest

os.environ.setdefault("NPROC", "16")  # as jforge.harness.backends.for_programs_that_run_once
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads cost more than they save on tensors this small
jax.config.update("jax_disable_most_optimizations", True)  # most of the suite's time is XLA's, on tiny programs
jaxtyping.install_import_hook(["jforge"], "typecheck.check")


def pytest_configure():
    from jforge.harness import interpreters  # once shapes are checked and TRITON_INTERPRET is set

    interpreters.faster("triton")
    interpreters.faster("pallas")


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """Each keeps some memory mappings, of which Linux allows a process 65,530: the whole suite would need more."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _quiet_terminal(monkeypatch):
    """Tables keep one width and no colour whatever the terminal."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def untyped():
    """For tests of bad input: the product's own messages, not those of the tests' type checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
