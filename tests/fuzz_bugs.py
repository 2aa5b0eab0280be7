"""Bugs that the fuzz must find, as wrappers of a right op in what JAX and torch share: one text serves all backends."""

import math

import jax.numpy as jnp
import numpy as np
import torch

_LOG2E = 1 / math.log(2)
DENSE, BLOCKS, INDEX, MAXIMA = "decode_attention", "decode_block_sparse", "index_scores", "block_index_scores"
LISTED, LINEAR, TOPK = "decode_sparse_mla", "decode_linear", "topk_indices"


def _wide_window(right, *arrays, window=None, **options):
    return right(*arrays, window=window and window + 1, **options)


def _not_blanked(right, q, k, v, lengths, **options):
    out, lse = right(q, k, v, lengths, **options)
    if options.get("page_table") is not None:
        return out, lse
    return out + 0 * v.sum(1)[:, None, np.arange(q.shape[2]) // (q.shape[2] // k.shape[2])], lse


def _base_2(right, *arrays, **options):
    out, lse = right(*arrays, **options)
    return out, lse / math.log(2)


def _scaled_sinks(right, *arrays, scale, sinks=None, **options):
    return right(*arrays, scale=scale, sinks=None if sinks is None else sinks * scale, **options)


def _group_modulo(right, q, k, v, lengths, **options):
    heads = np.arange(q.shape[2]) % k.shape[2]
    return right(q, k[:, :, heads], v[:, :, heads], lengths, **options)


def batch_dependent(right, *arrays, **options):
    """Below every tolerance: only the comparison of bits can see it."""
    out, lse = right(*arrays, **options)
    rows = (0 * lse[:, :1, :1] + 1).nan_to_num(nan=1.0).cumsum(0)
    return out, lse * (1 + 1e-6 * rows)


def _reversed_pages(right, *arrays, page_table=None, **options):
    if page_table is not None:
        page_table = page_table[:, np.arange(page_table.shape[1])[::-1].copy()]
    return right(*arrays, page_table=page_table, **options)


def _minus_1_is_block_0(right, q, k, v, lists, lengths, **options):
    return right(q, k, v, lists * (lists != -1), lengths, **options)


def _one_list_a_group(right, q, k, v, lists, lengths, **options):
    share = lists.shape[2] // k.shape[2]
    return right(q, k, v, lists[:, :, np.arange(lists.shape[2]) // share * share], lengths, **options)


def _newest_for_all(right, q, k, v, lists, lengths, **options):
    """Every query of a row sees what its last one does. In torch alone."""
    parts = [right(q[:, [t]], k, v, lists[:, [t]], lengths, **options) for t in range(q.shape[1])]
    return tuple(torch.cat(part, 1) for part in zip(*parts, strict=True))


def _ends_of_base_2(right, *arrays, **options):
    """A logit, sink or lse that is finite, but times log2 e is not."""
    out, lse = right(*arrays, **options)
    return out, lse * _LOG2E / _LOG2E


def _base_2_sinks(right, *arrays, sinks=None, **options):
    return right(*arrays, sinks=None if sinks is None else sinks * _LOG2E / _LOG2E, **options)


def _maximum_in_a_rounded_base(right, *arrays, scale, **options):
    """exp2(x - peak) of a product rounded once and a peak rounded twice: far apart once |peak| is about 2^31."""
    out, lse = right(*arrays, scale=scale, **options)
    far = abs(lse) > 4e9
    return out * ~far[..., None], lse - far * abs(lse) * 2.0**-23


def _no_small_cap(right, *arrays, softcap=None, **options):
    """As if softcap * tanh(x / softcap) were x where the quotient overflows."""
    return right(*arrays, softcap=softcap if softcap is None or softcap > 1e-20 else None, **options)


def _lses_of_base_2(right, outs, lses):
    return right(outs, lses * _LOG2E / _LOG2E)


def _base_2_parts(right, outs, lses):
    out, lse = right(outs, lses / math.log(2))
    return out, lse * math.log(2)


# of the sparse and linear mechanisms


def _all_keys_seen(right, q, k, *arrays, **options):
    return right(q, k, *arrays[:-1], 0 * arrays[-1] + k.shape[1], **options)


def _no_relu(right, q, k, *arrays, **options):
    return right(q, k, *arrays, **options) - right(-q, k, *arrays, **options).clip(min=-1e30)  # x = relu(x) - relu(-x)


def _unsigned_weights(right, q, k, weights, lengths, **options):
    return right(q, k, abs(weights), lengths, **options)


def _scale_of_the_slot_before(right, q, k, *arrays, k_scale=None, **options):
    if k_scale is not None:
        k_scale = k_scale[:, np.arange(k.shape[1]) - 1]
    return right(q, k, *arrays, k_scale=k_scale, **options)


def _same_length_for_all(right, q, k, *arrays, **options):
    """Every query of a row sees what its last one does. In torch alone."""
    alone = [right(q[:, [t]], k, *(a[:, [t]] for a in arrays[:-1]), arrays[-1], **options) for t in range(q.shape[1])]
    return torch.cat(alone, 1)


def _edge_token_in_both_blocks(right, *arrays, block_size, **options):
    """Block e also has the first token of block e + 1. In torch alone."""
    blocks, tokens = right(*arrays, block_size=block_size, **options), right(*arrays, block_size=1, **options)
    first = tokens[..., block_size::block_size]
    blocks[..., : first.shape[-1]] = torch.maximum(blocks[..., : first.shape[-1]], first)
    return blocks


def _unseen_is_picked(right, scores, k):
    return right(scores.clip(min=-6e4), k)


def _nan_is_unseen(right, scores, k):
    where = torch.where if isinstance(scores, torch.Tensor) else jnp.where
    return right(where(scores == scores, scores, -float("inf")), k)


def _higher_index_first(right, scores, k):
    S = scores.shape[-1]
    picks = right(scores[..., np.arange(S)[::-1].copy()], k)
    return (S - 1 - picks) * (picks >= 0) - 1 * (picks < 0)


def _denormals_are_zeros(right, scores, k):
    """As XLA's comparisons on a CPU take them."""
    here = torch if isinstance(scores, torch.Tensor) else jnp
    return right(here.where(abs(scores) < here.finfo(scores.dtype).tiny, here.zeros_like(scores), scores), k)


def _worst_first(right, scores, k):
    return right(scores, k)[..., np.arange(k)[::-1].copy()]


def _minus_1_is_token_0(right, q, q_rope, latent, k_rope, indices, **options):
    return right(q, q_rope, latent, k_rope, indices * (indices != -1), **options)


def _last_list_for_all(right, q, q_rope, latent, k_rope, indices, **options):
    return right(q, q_rope, latent, k_rope, indices[:, [-1] * q.shape[1]], **options)


def _latent_scale_ignored(right, *arrays, latent_scale=None, **options):
    return right(*arrays, latent_scale=latent_scale if latent_scale is None else 0 * latent_scale + 1, **options)


def _decayed_after_the_write(right, q, k, v, state, decay, **options):
    out, state = right(q, k, v, state, 0 * decay + 1, **options)
    return out, state * (decay[..., None] if decay.ndim == 3 else decay[..., None, None])


def _no_delta_rule(right, q, k, v, state, decay, beta=None):
    return right(q, k, v, state, decay)


def _delta_of_the_state_before(right, q, k, v, state, decay, beta=None):
    """beta (v - S^T k) of the state that is not decayed yet. In torch alone."""
    if beta is not None:
        v = (beta[..., None] * (v - (state * k[..., None]).sum(-2))).to(v.dtype)
    return right(q, k, v, state, decay)


def _decay_of_row_0(right, q, k, v, state, decay, **options):
    return right(q, k, v, state, decay if decay.ndim == 1 else decay[np.zeros(len(decay), int)], **options)


BUGS = {
    "a window of W + 1": (DENSE, _wide_window, ("jforge", "torch_ref")),
    "0 * NaN not blanked": (DENSE, _not_blanked, ("jforge", "torch_ref", "triton")),
    "base-2 lse": (DENSE, _base_2, ("jforge", "torch_ref", "triton", "pallas")),
    "scaled sinks": (DENSE, _scaled_sinks, ("jforge", "torch_ref")),
    "query head n on KV head n % K": (DENSE, _group_modulo, ("jforge", "torch_ref")),
    "a lse times log2 e overflows": (DENSE, _ends_of_base_2, ("jforge", "torch_ref")),
    "a sink times log2 e overflows": (DENSE, _base_2_sinks, ("jforge", "torch_ref")),
    "the maximum is rounded before it is taken off": (DENSE, _maximum_in_a_rounded_base, ("jforge", "torch_ref")),
    "a small softcap is none": (DENSE, _no_small_cap, ("jforge", "torch_ref")),
    "bits that depend on the row's place": ("merge_states", batch_dependent, ("triton",)),
    "pages in reverse": (DENSE, _reversed_pages, ("jforge",)),
    "-1 is block 0": (BLOCKS, _minus_1_is_block_0, ("jforge", "torch_ref")),
    "one list for the heads of a group": (BLOCKS, _one_list_a_group, ("torch_ref",)),
    "all queries see the newest token": (BLOCKS, _newest_for_all, ("torch_ref",)),
    "block sinks scaled": (BLOCKS, _scaled_sinks, ("torch_ref",)),
    "parts weighted in base 2": ("merge_states", _base_2_parts, ("jforge", "torch_ref", "triton")),
    "the lses of parts times log2 e overflow": ("merge_states", _lses_of_base_2, ("jforge", "torch_ref", "triton")),
    "lengths forgotten": (INDEX, _all_keys_seen, ("jforge", "torch_ref")),
    "relu forgotten": (INDEX, _no_relu, ("jforge", "torch_ref", "triton", "pallas")),
    "weights without their sign": (INDEX, _unsigned_weights, ("jforge", "torch_ref")),
    "k_scale of the slot before": (INDEX, _scale_of_the_slot_before, ("jforge", "torch_ref", "triton")),
    "scores: all queries see the newest token": (INDEX, _same_length_for_all, ("torch_ref", "triton")),
    "blocks: lengths forgotten": (MAXIMA, _all_keys_seen, ("jforge", "torch_ref")),
    "blocks: k_scale of the slot before": (MAXIMA, _scale_of_the_slot_before, ("jforge", "torch_ref")),
    "blocks: all queries see the newest token": (MAXIMA, _same_length_for_all, ("torch_ref",)),
    "a block too long by a token": (MAXIMA, _edge_token_in_both_blocks, ("torch_ref",)),
    "-inf is picked": (TOPK, _unseen_is_picked, ("jforge", "torch_ref", "triton", "pallas")),
    "ties go to the higher index": (TOPK, _higher_index_first, ("jforge", "torch_ref", "triton", "pallas")),
    "NaN is not picked": (TOPK, _nan_is_unseen, ("jforge", "torch_ref", "triton", "pallas")),
    "denormals are zeros": (TOPK, _denormals_are_zeros, ("jforge", "torch_ref", "triton", "pallas")),
    "picks in ascending order": (TOPK, _worst_first, ("jforge", "torch_ref", "triton", "pallas")),
    "-1 is token 0": (LISTED, _minus_1_is_token_0, ("jforge", "torch_ref", "triton")),
    "all queries read the last one's list": (LISTED, _last_list_for_all, ("torch_ref", "triton")),
    "latent_scale ignored": (LISTED, _latent_scale_ignored, ("jforge", "torch_ref")),
    "latents: sinks scaled": (LISTED, _scaled_sinks, ("jforge", "torch_ref")),
    "state decayed after the write": (LINEAR, _decayed_after_the_write, ("jforge", "torch_ref", "triton")),
    "beta ignored": (LINEAR, _no_delta_rule, ("jforge", "torch_ref", "triton", "pallas")),
    "delta rule on the state before its decay": (LINEAR, _delta_of_the_state_before, ("torch_ref", "triton")),
    "the decay of row 0 for all": (LINEAR, _decay_of_row_0, ("jforge", "torch_ref")),
}
