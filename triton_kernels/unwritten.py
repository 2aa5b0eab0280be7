"""Ops that have no Triton kernel yet. Signatures are the contract's; each call raises before any launch."""


def _unwritten(op):
    raise NotImplementedError(f"triton_kernels.{op} has no kernel yet; torch_ref.ops.{op} computes the same function")


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
