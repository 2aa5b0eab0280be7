"""What the package knows of a card: one entry a device, read by plans, tuner and offline check."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Device:
    """A card. `name` is how tuning tables spell it, and a part of the name that CUDA reports."""

    name: str
    sm_count: int = 132
    capability: int = 90  # of the code that is compiled: sm_90
    sm_shared: int = 228 * 1024  # bytes of shared memory of one SM
    program_shared: int = 227 * 1024  # the most that one program can have
    sm_registers: int = 65536
    l2: int = 50 * 2**20  # bytes


DEVICES = (Device("H100"), Device("H200", l2=60 * 2**20))
# The card that defaults are made for; without a GPU plans fill it, but take nothing from the tables.
TARGET = DEVICES[0]


@lru_cache
def known(name, sm_count):
    """The entry for a name that CUDA reports, with the SM count that it reports; other cards go by their full names."""
    entry = next((entry for entry in DEVICES if entry.name in name), replace(TARGET, name=name))
    return replace(entry, sm_count=sm_count)


@lru_cache
def _cuda(index):
    properties = torch.cuda.get_device_properties(index)
    return known(properties.name, properties.multi_processor_count)


NO_GPU = replace(TARGET, name="cpu")


def device_of(tensor):
    """The card that holds a tensor: a cached query, no synchronisation."""
    return _cuda(tensor.device.index or 0) if tensor.device.type == "cuda" else NO_GPU
