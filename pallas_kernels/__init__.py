"""Pallas (Mosaic GPU) versions of the attention ops: the names, signatures and meaning of `jforge.ops`, on JAX arrays.

On a GPU the kernels are compiled for sm_90; on a CPU backend they run in Mosaic's interpreter with its race detector.
An op or option without a kernel raises NotImplementedError before any launch; nothing falls back by itself.
"""

from pallas_kernels.block_index_scores import block_index_scores
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_block_sparse import decode_block_sparse
from pallas_kernels.decode_linear import decode_linear
from pallas_kernels.decode_mla import decode_mla
from pallas_kernels.decode_sparse_mla import decode_sparse_mla
from pallas_kernels.index_scores import index_scores
from pallas_kernels.merge_states import merge_states
from pallas_kernels.topk_indices import topk_indices

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
