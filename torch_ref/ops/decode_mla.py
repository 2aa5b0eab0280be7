"""Attention over a latent cache."""


def decode_mla(
    q_latent,
    q_rope,
    latent,
    k_rope,
    lengths,
    *,
    scale,
    window=None,
    sinks=None,
    page_table=None,
    latent_scale=None,
    chunk=None,
    out_dtype=None,
):
    """out_t = sum_s p_s latent_s,  p = softmax over seen s of scale (q_latent_t . latent_s + q_rope_t . k_rope_s)."""
    raise NotImplementedError("torch_ref.ops.decode_mla is not written yet")
