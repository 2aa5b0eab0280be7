"""Attention under a mask that heads do not share, and the mask of a list of blocks: the plain form of a gather."""

import torch

from .softmax import grouped_attention


def headwise_attention(q, k, v, mask, scale, softcap=None):
    """`grouped_attention` under one mask per list: mask is bool [B, T, lists, S], lists = K (one per KV head) or N.

    q: [B, T, N, H]. k: [B, S, K, H]. v: [B, S, K, V]. Returns out [B, T, N, V] in float32 or wider. Keys and values
    that no query of their list sees may hold NaN or Inf.
    """
    lists = mask.shape[2]
    per_list, lists_per_kv_head = q.shape[2] // lists, lists // k.shape[2]
    outs = []
    for j in range(lists):
        heads, kv_head = slice(j * per_list, (j + 1) * per_list), j // lists_per_kv_head
        one = slice(kv_head, kv_head + 1)
        outs.append(
            grouped_attention(q[:, :, heads], k[:, :, one], v[:, :, one], mask[:, :, j], scale, None, softcap)[0]
        )
    return torch.cat(outs, dim=2)


def tokens(block_indices, block_size, slots):
    """bool [..., S]: the slots whose block is in the list block_indices [..., L]; -1 names no block."""
    block = torch.arange(slots, device=block_indices.device) // block_size
    return (block_indices[..., None] == block).any(dim=-2)


def visible(block_indices, block_size, positions, slots):
    """bool [B, T, lists, S]: slot s <= t and its block is listed, for positions t: int [B, T]."""
    causal = torch.arange(slots, device=positions.device) <= positions[..., None]
    return tokens(block_indices, block_size, slots) & causal[:, :, None]
