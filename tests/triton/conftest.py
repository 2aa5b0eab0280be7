"""Triton reads TRITON_INTERPRET when it is imported, so it is set before anything imports it."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

import triton_kernels


@pytest.fixture
def device():
    """Tensors are made where the kernels run: on the CPU in the interpreter, else on the GPU."""
    with torch.device("cpu" if triton_kernels.runtime.INTERPRETED else "cuda") as here:
        yield here


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Every buffer that an op allocates starts as NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
