"""What each op means, in float64 NumPy, one query at a time: slow, and with nothing to hide a mistake in."""

import numpy as np


def decode_attention(q, k, v, lengths, *, scale, window=None, sinks=None, softcap=None, chunk=None, out_dtype=None):
    """(out, lse) in float64; see jforge.ops.decode_attention. chunk and out_dtype change nothing here."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    B, T, N, _ = q.shape
    group = N // k.shape[2]
    out, lse = np.zeros((B, T, N, v.shape[-1])), np.full((B, T, N), -np.inf)
    for b, t, n in np.ndindex(B, T, N):
        end = int(lengths[b]) - T + t + 1
        start = 0 if window is None else max(0, end - window)
        sink = -np.inf if sinks is None else float(sinks[n])
        if end <= 0:
            lse[b, t, n] = sink
            continue
        logits = scale * k[b, start:end, n // group] @ q[b, t, n]
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        top = max(logits.max(), sink)
        weights = np.exp(logits - top)
        total = weights.sum() + np.exp(sink - top)
        out[b, t, n] = weights @ v[b, start:end, n // group] / total
        lse[b, t, n] = top + np.log(total)
    return out, lse


def decode_block_sparse(
    q, k, v, block_indices, lengths, *, block_size, scale, sinks=None, softcap=None, out_dtype=None
):
    """(out, lse) in float64: decode_attention of each query alone over the slots that its list lets it see."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, k if v is None else v))
    B, T, N, _ = q.shape
    S, K, X = k.shape[1], k.shape[2], block_indices.shape[2]
    out, lse = np.zeros((B, T, N, v.shape[-1])), np.full((B, T, N), -np.inf)
    for b, t, n in np.ndindex(B, T, N):
        end = S if lengths is None else int(lengths[b]) - T + t + 1
        listed = set(block_indices[b, t, n // (N // X)].tolist())
        slots = [s for s in range(min(S, end)) if s // block_size in listed]
        head, own = np.s_[b, slots, n // (N // K)], None if sinks is None else sinks[n : n + 1]
        one = (a[None, :, None] for a in (k[head], v[head]))
        query = q[b, t, n][None, None, None]
        result = decode_attention(query, *one, [len(slots)], scale=scale, sinks=own, softcap=softcap)
        out[b, t, n], lse[b, t, n] = (part[0, 0, 0] for part in result)
    return out, lse


def decode_mla(q_latent, q_rope, latent, k_rope, lengths, **options):
    """(out, lse) in float64: decode_attention with one key head, [latent | k_rope], whose values are the latent."""
    q_latent, q_rope, latent, k_rope = (np.asarray(a, np.float64) for a in (q_latent, q_rope, latent, k_rope))
    q = np.concatenate([q_latent, q_rope], axis=-1)
    k = np.concatenate([latent, k_rope], axis=-1)[:, :, None]
    return decode_attention(q, k, latent[:, :, None], lengths, **options)


def _stored(codes, scale):
    """What a cache means, in float64: its values, or codes with a scale for each slot."""
    codes = np.asarray(codes, np.float64)
    return codes if scale is None else codes * np.asarray(scale, np.float64)[..., None]


def decode_sparse_mla(q_latent, q_rope, latent, k_rope, indices, *, latent_scale=None, **options):
    """(out, lse) in float64: a token gather with one key head, [latent | k_rope], whose values are the latent."""
    q_latent, q_rope, k_rope = (np.asarray(a, np.float64) for a in (q_latent, q_rope, k_rope))
    latent = _stored(latent, latent_scale)
    q = np.concatenate([q_latent, q_rope], axis=-1)
    k = np.concatenate([latent, k_rope], axis=-1)[:, :, None]
    return decode_block_sparse(q, k, latent[:, :, None], indices[:, :, None], None, block_size=1, **options)


def index_scores(q_index, k_index, weights, lengths, *, k_scale=None):
    """(scores,) in float64; see jforge.ops.index_scores."""
    q, k, weights = np.asarray(q_index, np.float64), _stored(k_index, k_scale), np.asarray(weights, np.float64)
    scores = np.full((*q.shape[:2], k.shape[1]), -np.inf)
    for b, t in np.ndindex(q.shape[:2]):
        end = max(0, int(lengths[b]) - q.shape[1] + t + 1)
        scores[b, t, :end] = weights[b, t] @ np.maximum(q[b, t] @ k[b, :end].T, 0)
    return (scores,)


def block_index_scores(q_index, k_index, lengths, *, block_size, k_scale=None):
    """(scores,) in float64; see jforge.ops.block_index_scores."""
    q, k = np.asarray(q_index, np.float64), _stored(k_index, k_scale)
    (B, T, heads, _), S = q.shape, k.shape[1]
    scores = np.full((B, T, heads, -(-S // block_size)), -np.inf)
    for b, t, block in np.ndindex(B, T, scores.shape[-1]):
        start, end = block * block_size, min((block + 1) * block_size, int(lengths[b]) - T + t + 1)
        if end > start:
            scores[b, t, :, block] = (q[b, t] @ k[b, start:end].T).max(axis=-1)
    return (scores,)


def decode_linear(q, k, v, state, decay, *, beta=None):
    """(out, state) in float64; see jforge.ops.decode_linear."""
    q, k, v, state, decay = (np.array(a, np.float64) for a in (q, k, v, state, decay))
    out = np.zeros((*q.shape[:2], v.shape[-1]))
    for b, n in np.ndindex(q.shape[:2]):
        factor = decay[n] if decay.ndim == 1 else decay[b, n]
        state[b, n] *= np.reshape(factor, (-1, 1))
        u = v[b, n] if beta is None else beta[b, n] * (v[b, n] - k[b, n] @ state[b, n])
        state[b, n] += np.outer(k[b, n], u)
        out[b, n] = q[b, n] @ state[b, n]
    return out, state


def merge_states(outs, lses):
    """(out, lse) in float64; see jforge.ops.merge_states."""
    outs, lses = np.asarray(outs, np.float64), np.asarray(lses, np.float64)
    out, lse = np.zeros(outs.shape[1:]), np.full(lses.shape[1:], -np.inf)
    for index in np.ndindex(lse.shape):
        parts = [p for p in range(len(lses)) if lses[(p, *index)] > -np.inf]
        if parts:
            logs = np.array([lses[(p, *index)] for p in parts])
            top = logs.max()
            weights = np.exp(logs - top)
            out[index] = sum(w * outs[(p, *index)] for w, p in zip(weights, parts, strict=True)) / weights.sum()
            lse[index] = top + np.log(weights.sum())
    return out, lse
