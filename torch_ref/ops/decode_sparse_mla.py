"""Attention over chosen entries of a latent cache."""


def decode_sparse_mla(
    q_latent, q_rope, latent, k_rope, indices, *, scale, sinks=None, latent_scale=None, out_dtype=None
):
    """`decode_mla` over the entries that indices names."""
    raise NotImplementedError("torch_ref.ops.decode_sparse_mla is not written yet")
