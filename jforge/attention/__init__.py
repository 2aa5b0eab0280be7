"""The mechanisms. A new one is a file here, its twin in torch_ref, and a line in REGISTRY."""

from jforge.attention import (
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
from jforge.core import guard

REGISTRY = {
    "single_head": dense.single_head,
    "mha": dense.mha,
    "mqa": dense.mqa,
    "gqa": dense.gqa,
    "mla": mla.mla,
    "sliding_window": sliding_window.sliding_window,
    "chunked_local": chunked_local.chunked_local,
    "sinks": sinks.sinks,
    "streaming": streaming.streaming,
    "block_sparse": block_sparse.block_sparse,
    "moba": moba.moba,
    "nsa": nsa.nsa,
    "lightning": lightning.lightning,
    "gated_deltanet": gated_deltanet.gated_deltanet,
    "kda": kda.kda,
    "mamba1": mamba1.mamba1,
    "mamba2": mamba2.mamba2,
    "short_conv": short_conv.short_conv,
    "msa": msa.msa,
    "dsa": dsa.dsa,
    "v4_window": v4_window.v4_window,
    "csa": csa.csa,
    "hca": hca.hca,
}

for _name, _att in REGISTRY.items():
    guard.claim(_att.Config, _name)
