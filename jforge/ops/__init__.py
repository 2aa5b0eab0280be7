"""The ops in pure JAX: the definition that `triton_kernels` and `pallas_kernels` are held to.

Every backend exports exactly these names with these signatures. `mix` combines two of them.
"""

from jforge.ops.decode_attention import decode_attention
from jforge.ops.decode_block_sparse import decode_block_sparse
from jforge.ops.decode_linear import decode_linear
from jforge.ops.decode_mla import decode_mla
from jforge.ops.decode_sparse_mla import decode_sparse_mla
from jforge.ops.index_scores import block_index_scores, index_scores
from jforge.ops.merge_states import merge_states
from jforge.ops.mix import mix
from jforge.ops.topk_indices import topk_indices
from jforge.ops.watch import watched

decode_attention, decode_mla = watched(decode_attention), watched(decode_mla)
decode_block_sparse, decode_sparse_mla = watched(decode_block_sparse), watched(decode_sparse_mla)
index_scores, block_index_scores = watched(index_scores), watched(block_index_scores)

__all__ = [
    "decode_attention",
    "decode_mla",
    "decode_block_sparse",
    "decode_sparse_mla",
    "index_scores",
    "block_index_scores",
    "topk_indices",
    "decode_linear",
    "merge_states",
    "mix",
]
