"""Attention over chosen blocks of a cache."""


def decode_block_sparse(
    q,
    k,
    v,
    block_indices,
    lengths,
    *,
    block_size,
    scale,
    sinks=None,
    softcap=None,
    page_table=None,
    k_scale=None,
    v_scale=None,
    out_dtype=None,
):
    """`decode_attention` over the seen slots of the blocks that block_indices names."""
    raise NotImplementedError("torch_ref.ops.decode_block_sparse is not written yet")
