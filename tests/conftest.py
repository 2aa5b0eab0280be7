"""Run-time checks of all shapes that jforge annotates, and Triton's interpreter, before either is imported."""

import os
from pathlib import Path

import jax
import jaxtyping
import pytest

os.environ.setdefault("NPROC", "16")  # as jforge.harness.backends.for_programs_that_run_once
os.environ.setdefault("TRITON_INTERPRET", "1")
# Programs are small and cores few; and XLA's newer emitters of fusions, in MLIR, take half of all its time to compile.
_CHEAP = "--xla_cpu_parallel_codegen_split_count=1 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
os.environ.setdefault("XLA_FLAGS", _CHEAP)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads cost more than they save on tensors this small
jax.config.update("jax_disable_most_optimizations", True)  # most of the suite's time is XLA's, on tiny programs
_PRODUCT = Path(__file__).parents[1] / "jforge"
_SHAPED = [path for path in _PRODUCT.rglob("*.py") if "from jaxtyping import" in path.read_text(encoding="utf-8")]
_NAMES = [".".join(path.relative_to(_PRODUCT.parent).with_suffix("").parts) for path in _SHAPED]
jaxtyping.install_import_hook(_NAMES, "typecheck.check")  # a check of each call costs more than most other functions


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
