"""The mechanisms. A new one is a file here, its twin in torch_ref, and a line in REGISTRY."""

from jforge.attention import dense, mla

REGISTRY = {
    "single_head": dense.single_head,
    "mha": dense.mha,
    "mqa": dense.mqa,
    "gqa": dense.gqa,
    "mla": mla.mla,
}
