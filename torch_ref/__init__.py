"""The attention mechanisms and their ops in plain PyTorch, written from the specification as a second opinion.

`get(name)` gives a mechanism's functions: init_cache, forward, prefill, decode. Parameters and caches are dicts of
tensors, cfg is any object with the fields that the mechanism's file lists, and no input is changed.
"""

from . import ops
from .attention import (
    block_sparse,
    chunked_local,
    csa,
    dense,
    dsa,
    gated_deltanet,
    hca,
    kda,
    lightning,
    mamba1,
    mamba2,
    mla,
    moba,
    msa,
    nsa,
    short_conv,
    sinks,
    sliding_window,
    streaming,
    v4_window,
)

REGISTRY = {
    "single_head": dense,
    "mha": dense,
    "mqa": dense,
    "gqa": dense,
    "sliding_window": sliding_window,
    "sinks": sinks,
    "chunked_local": chunked_local,
    "streaming": streaming,
    "block_sparse": block_sparse,
    "moba": moba,
    "nsa": nsa,
    "mla": mla,
    "dsa": dsa,
    "v4_window": v4_window,
    "csa": csa,
    "hca": hca,
    "lightning": lightning,
    "msa": msa,
    "gated_deltanet": gated_deltanet,
    "kda": kda,
    "mamba2": mamba2,
    "mamba1": mamba1,
    "short_conv": short_conv,
}

__all__ = ["get", "names", "ops"]


def get(name):
    """The module that holds the mechanism's functions. Raises ValueError for an unknown name."""
    if name not in REGISTRY:
        raise ValueError(f"name is {name!r}; allowed: {', '.join(names())}")
    return REGISTRY[name]


def names():
    """The names that `get` knows."""
    return tuple(REGISTRY)
