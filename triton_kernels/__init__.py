"""Triton versions of the attention ops: the names, signatures and meaning of `torch_ref.ops`, on torch tensors.

CUDA tensors are compiled for; CPU tensors work in a process that set `TRITON_INTERPRET=1` before the import, else they
raise TypeError. An option without a kernel raises NotImplementedError; nothing falls back by itself.
"""

from triton_kernels.block_index_scores import block_index_scores
from triton_kernels.decode_attention import decode_attention
from triton_kernels.decode_block_sparse import decode_block_sparse
from triton_kernels.decode_linear import decode_linear
from triton_kernels.decode_mla import decode_mla
from triton_kernels.decode_sparse_mla import decode_sparse_mla
from triton_kernels.index_scores import index_scores
from triton_kernels.merge_states import merge_states
from triton_kernels.topk_indices import topk_indices

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
