"""decode_attention as somebody outside would write it: in torch, in JAX, and with mistakes; mistakes in other ops."""

import jax
import jax.numpy as jnp
import torch

from jforge import ops


def in_torch(q, k, v, lengths, *, scale):
    T, N, S, K = *q.shape[1:3], *k.shape[1:3]
    ends = lengths[:, None] - T + torch.arange(1, T + 1)
    seen = (torch.arange(S) < ends[..., None])[:, None]  # B 1 T S
    k, v = (a.float().repeat_interleave(N // K, 2) for a in (k, v))
    logits = scale * torch.einsum("btnh,bsnh->bnts", q.float(), k)
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
    v = v.where(seen.any(2)[:, 0, :, None, None], 0)
    return torch.einsum("bnts,bsnv->btnv", weights, v).to(q.dtype)


def in_jax(q, k, v, lengths, *, scale):
    (B, T, N, H), S, K = q.shape, *k.shape[1:3]
    ends = lengths[:, None] - T + jnp.arange(1, T + 1)
    seen = (jnp.arange(S) < ends[..., None])[:, None, None]  # B 1 1 T S
    logits = scale * jnp.einsum("btkgh,bskh->bkgts", q.reshape(B, T, K, -1, H), k, preferred_element_type=jnp.float32)
    lse = jax.nn.logsumexp(logits, where=seen, axis=-1)
    weights = jnp.where(seen, jnp.exp(logits - jnp.where(lse == -jnp.inf, 0, lse)[..., None]), 0)
    values = jnp.where(seen.any(-2)[:, 0, 0, :, None, None], v, 0).astype(jnp.float32)
    out = jnp.einsum("bkgts,bskv->btkgv", weights, values)
    return out.reshape(B, T, N, -1).astype(q.dtype), lse.transpose(0, 3, 1, 2).reshape(B, T, N)


def forgets_the_mask_of_values(q, k, v, lengths, *, scale):
    """0 * NaN is NaN."""
    T, N, S, K = *q.shape[1:3], *k.shape[1:3]
    seen = torch.arange(S) < (lengths[:, None] - T + torch.arange(1, T + 1))[..., None]
    k, v = (a.float().repeat_interleave(N // K, 2) for a in (k, v))
    logits = (scale * torch.einsum("btnh,bsnh->bnts", q.float(), k)).masked_fill(~seen[:, None], -torch.inf)
    return torch.einsum("bnts,bsnv->btnv", logits.softmax(-1).nan_to_num(0), v).to(q.dtype)


def off_in_head_two(*arrays, **options):
    out, lse = in_jax(*arrays, **options)
    return out.at[:, 0, 2].mul(1.5), lse


def base_two(*arrays, **options):
    out, lse = in_jax(*arrays, **options)
    return out, lse / jnp.log(2)


def refuses(q, k, v, lengths, **options):
    raise NotImplementedError("no kernel for this card")


def in_neither(q, k, v, lengths, **options):
    return q * 0


def in_float32(*arrays, **options):
    return in_torch(*arrays, **options).float()


def transposed(*arrays, **options):
    return in_torch(*arrays, **options).transpose(1, 2)


def raises(q, k, v, lengths, *, scale):
    return torch.zeros(1)[5]


def three(*arrays, **options):
    return (*in_jax(*arrays, **options), None)


def merges_what_is_empty(outs, lses):
    return (jax.nn.softmax(lses, 0)[..., None] * outs).sum(0).astype(outs.dtype), jax.nn.logsumexp(lses, 0)


def scores_all(q_index, k_index, weights, lengths, *, k_scale=None):
    k = k_index if k_scale is None else k_index * k_scale[..., None]
    return jnp.einsum("bti,btis->bts", weights, jax.nn.relu(jnp.einsum("btij,bsj->btis", q_index, k)))


def touches_every_value(q, k, v, *arrays, **options):
    out, lse = ops.decode_block_sparse(q, k, v, *arrays, **options)
    return out + 0 * (k if v is None else v).sum((1, 2, 3))[:, None, None, None].astype(out.dtype), lse


def picks_what_is_unseen(scores, k):
    return jax.lax.top_k(scores, min(k, scores.shape[-1]))[1]


def forgets_the_delta_rule(q, k, v, state, decay, *, beta=None):
    return ops.decode_linear(q, k, v, state, decay)
