"""Token scores of a lightning indexer."""


def index_scores(q_index, k_index, weights, lengths, *, k_scale=None):
    """score_ts = sum_i weights_ti relu(q_index_ti . k_index_s); unseen s: -inf."""
    raise NotImplementedError("torch_ref.ops.index_scores is not written yet")
