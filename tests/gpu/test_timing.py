"""On a GPU: python -m pytest --noconftest -m gpu tests/gpu (without the conftest, which asks for the interpreters)."""

import pytest

from jforge.harness import gpu_run

pytestmark = pytest.mark.gpu


def test_one_kernel_takes_the_same_time_through_either_framework():
    row = gpu_run.timing()
    assert row["ok"], row
