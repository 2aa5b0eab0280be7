"""Ops that have no Mosaic GPU kernel yet. Signatures are the contract's; each call raises before any launch."""


def _unwritten(op: str):
    raise NotImplementedError(f"pallas_kernels.{op} has no kernel yet; jforge.ops.{op} computes the same function")


def decode_block_sparse(q, k, v, block_indices, lengths, *, block_size, scale, sinks=None, softcap=None,
                        page_table=None, k_scale=None, v_scale=None, out_dtype=None):  # fmt: skip
    """Attention over the listed blocks of the cache: (out, lse). Raises NotImplementedError."""
    _unwritten("decode_block_sparse")


def decode_sparse_mla(q_latent, q_rope, latent, k_rope, indices, *, scale, sinks=None, latent_scale=None,
                      out_dtype=None):  # fmt: skip
    """Absorbed latent attention over the listed tokens: (out_latent, lse). Raises NotImplementedError."""
    _unwritten("decode_sparse_mla")


def index_scores(q_index, k_index, weights, lengths, *, k_scale=None):
    """Indexer scores sum_i weights_i relu(q_i . k): B T S. Raises NotImplementedError."""
    _unwritten("index_scores")


def block_index_scores(q_index, k_index, lengths, *, block_size, k_scale=None):
    """Largest q . k of each block's seen tokens: B T I blocks. Raises NotImplementedError."""
    _unwritten("block_index_scores")


def topk_indices(scores, k):
    """Indices of the k largest scores, ties to the lower index: int32. Raises NotImplementedError."""
    _unwritten("topk_indices")


def decode_linear(q, k, v, state, decay, *, beta=None):
    """One step of linear attention: (out, state). Raises NotImplementedError."""
    _unwritten("decode_linear")
