"""Ops that have a contract but no implementation in this package yet: each call raises before any work."""


def decode_block_sparse(q, k, v, block_indices, lengths, *, block_size, scale, sinks=None, softcap=None,
                        page_table=None, k_scale=None, v_scale=None, out_dtype=None):  # fmt: skip
    raise NotImplementedError("decode_block_sparse is not written yet")


def decode_sparse_mla(q_latent, q_rope, latent, k_rope, indices, *, scale, sinks=None, latent_scale=None,
                      out_dtype=None):  # fmt: skip
    raise NotImplementedError("decode_sparse_mla is not written yet")


def index_scores(q_index, k_index, weights, lengths, *, k_scale=None):
    raise NotImplementedError("index_scores is not written yet")


def block_index_scores(q_index, k_index, lengths, *, block_size, k_scale=None):
    raise NotImplementedError("block_index_scores is not written yet")


def decode_linear(q, k, v, state, decay, *, beta=None):
    raise NotImplementedError("decode_linear is not written yet")
