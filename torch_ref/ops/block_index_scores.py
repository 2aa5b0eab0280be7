"""Block scores of an indexer."""


def block_index_scores(q_index, k_index, lengths, *, block_size, k_scale=None):
    """score_tim = max over the seen s of block m of q_index_ti . k_index_s; none seen: -inf."""
    raise NotImplementedError("torch_ref.ops.block_index_scores is not written yet")
