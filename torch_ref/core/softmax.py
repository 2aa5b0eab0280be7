"""Masked softmax and the grouped attention built on it: the one place where probabilities are made."""

import torch

from .dtypes import accumulator, einsum


def capped(scores, scale, softcap):
    """c tanh(scale scores / c), or scale scores without a cap c."""
    logits = scale * scores
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def masked_softmax(scores, mask, sinks=None):
    """p_s = exp(z_s) / (sum over seen s' of exp(z_s') + exp(sink)); lse = ln of that denominator.

    scores z: [..., S] in float32 or wider. mask: bool, broadcasts to scores; a score outside it may be NaN. sinks:
    broadcasts to scores without S. Returns p [..., S] and lse [...]. Where nothing is seen p = 0 and lse is the sink,
    or -inf. S may be 0.
    """
    scores = scores.masked_fill(~mask, -torch.inf)
    sink = scores.new_full((1,), -torch.inf) if sinks is None else sinks[..., None].to(scores.dtype)
    sink = sink.expand(*scores.shape[:-1], 1)
    top = torch.cat([scores, sink], dim=-1).amax(-1, keepdim=True).detach()
    top = top.masked_fill(top == -torch.inf, 0.0)  # -inf - (-inf) would be NaN
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True) + torch.exp(sink - top)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (top + total.log()).masked_fill(empty, -torch.inf)
    return weights / total, lse[..., 0]


def grouped_attention(q, k, v, mask, scale, sinks=None, softcap=None, bias=None):
    """out = sum over s of p_s v_s, p the masked softmax of z_s = cap(scale q . k_s) + bias_s, cap(z) = c tanh(z / c).

    q: [B, T, N, H]. k: [B, S, K, H]. v: [B, S, K, V]. Query head n reads KV head n // (N/K). mask: bool [B, T, S].
    sinks: [N], natural-log units, neither scaled nor capped. bias: [B, T, N, S], also neither. Returns out
    [B, T, N, V] and lse [B, T, N], both in float32 or wider. Keys and values that no query sees may hold NaN or Inf.
    """
    batch, new, n_heads, _ = q.shape
    kv_heads = k.shape[2]
    acc = accumulator(q.dtype, k.dtype, v.dtype)
    # 0 * NaN is NaN: a mask on the scores alone would let an unseen value through
    unseen = ~mask.any(dim=1)[..., None, None]
    k, v = k.to(acc).masked_fill(unseen, 0.0), v.to(acc).masked_fill(unseen, 0.0)
    q = q.to(acc).unflatten(2, (kv_heads, n_heads // kv_heads))
    logits = capped(einsum("btkgh,bskh->btkgs", q, k), scale, softcap)
    if bias is not None:
        logits = logits + bias.unflatten(2, (kv_heads, n_heads // kv_heads))
    sinks = None if sinks is None else sinks.unflatten(0, (kv_heads, n_heads // kv_heads))
    p, lse = masked_softmax(logits, mask[:, :, None, None, :], sinks)
    out = einsum("btkgs,bskv->btkgv", p, v)
    return out.reshape(batch, new, n_heads, v.shape[-1]), lse.reshape(batch, new, n_heads)
