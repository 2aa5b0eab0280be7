"""The attend step of every mechanism as ops with fixed signatures, in plain PyTorch: what the kernels must compute."""

from .block_index_scores import block_index_scores
from .decode_attention import decode_attention
from .decode_block_sparse import decode_block_sparse
from .decode_linear import decode_linear
from .decode_mla import decode_mla
from .decode_sparse_mla import decode_sparse_mla
from .index_scores import index_scores
from .merge_states import merge_states
from .topk_indices import topk_indices

__all__ = [
    "block_index_scores",
    "decode_attention",
    "decode_block_sparse",
    "decode_linear",
    "decode_mla",
    "decode_sparse_mla",
    "index_scores",
    "merge_states",
    "topk_indices",
]
