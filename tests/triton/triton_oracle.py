"""Float64 NumPy definitions for the Triton tests, written from the equations, one query at a time."""

import numpy as np
import torch


def decode_attention(q, k, v, lengths, *, scale, window=None, sinks=None, softcap=None):
    """(out, lse) of the op, float64. Reads only the keys that a query sees, so poison elsewhere cannot matter."""
    q, k, v = (np.asarray(x.double().cpu()) for x in (q, k, v))
    batch, tokens, heads, _ = q.shape
    group = heads // k.shape[2]
    out = np.zeros((batch, tokens, heads, v.shape[-1]))
    lse = np.full((batch, tokens, heads), -np.inf)
    for b, t, n in np.ndindex(batch, tokens, heads):
        stop = max(int(lengths[b]) - tokens + t + 1, 0)
        keys = slice(0 if window is None else max(stop - window, 0), stop)
        sink = None if sinks is None else float(sinks[n])
        cache = (k[b, keys, n // group], v[b, keys, n // group])
        out[b, t, n], lse[b, t, n] = attend(q[b, t, n], *cache, scale, sink, softcap)
    return out, lse


def attend(q, k, v, scale, sink=None, softcap=None):
    """(out, lse) of one query H over keys S H and values S V that it sees."""
    x = scale * k @ q
    if softcap is not None:
        x = softcap * np.tanh(x / softcap)
    logits = x if sink is None else np.append(x, sink)
    if not logits.size:
        return np.zeros(v.shape[-1]), -np.inf
    peak = logits.max()
    total = np.exp(logits - peak).sum()
    return np.exp(x - peak) @ v / total, peak + np.log(total)


def decode_block_sparse(
    q, k, v, block_indices, lengths, *, block_size, scale, sinks=None, softcap=None, page_table=None
):
    """(out, lse) of the op, float64. Reads only the slots that a query sees, and of a page table only their entries."""
    q, k, v = (np.asarray(x.double().cpu()) for x in (q, k, k if v is None else v))
    batch, tokens, heads, _ = q.shape
    page = k.shape[1]
    slots = page if page_table is None else page * page_table.shape[1]
    out = np.zeros((batch, tokens, heads, v.shape[-1]))
    lse = np.full((batch, tokens, heads), -np.inf)
    for b, t, n in np.ndindex(batch, tokens, heads):
        stop = slots if lengths is None else int(lengths[b]) - tokens + t + 1
        seen = listed_slots(block_indices[b, t, n * block_indices.shape[2] // heads], block_size, slots, stop)
        place = (b, seen) if page_table is None else (np.asarray(page_table[b].cpu())[seen // page], seen % page)
        cache = (x[*place, n * k.shape[2] // heads] for x in (k, v))
        sink = None if sinks is None else float(sinks[n])
        out[b, t, n], lse[b, t, n] = attend(q[b, t, n], *cache, scale, sink, softcap)
    return out, lse


def listed_slots(blocks, block_size, slots, stop):
    """The slots below `stop` of the listed blocks that are in a cache of so many slots, in the list's order."""
    starts = (block * block_size for block in blocks.tolist() if 0 <= block * block_size < slots)
    return np.array([j for start in starts for j in range(start, min(start + block_size, stop))], int)


def decode_sparse_mla(q_latent, q_rope, latent, k_rope, indices, **options):
    """(out_latent, lse) of the op, float64: one KV head, keys [latent, k_rope], values the latent, blocks of a slot."""
    q, k = torch.cat([q_latent, q_rope], -1), torch.cat([latent, k_rope], -1)[:, :, None]
    return decode_block_sparse(q, k, latent[:, :, None], indices[:, :, None], None, block_size=1, **options)


def decode_mla(q_latent, q_rope, latent, k_rope, lengths, *, page_table=None, **options):
    """(out_latent, lse) of the op, float64: one KV head, keys [latent, k_rope], values the latent.

    Of a page table only the entries below ceil(length / page) are followed; the cache past them stays NaN.
    """
    if page_table is not None:
        page = latent.shape[1]
        pages = [table[: -(-int(n) // page)].long() for table, n in zip(page_table, lengths, strict=True)]
        latent, k_rope = (gather(pool, pages, page_table.shape[1] * page) for pool in (latent, k_rope))
    q, k = torch.cat([q_latent, q_rope], -1), torch.cat([latent, k_rope], -1)[:, :, None]
    return decode_attention(q, k, latent[:, :, None], lengths, **options)


def gather(pool, pages, slots):
    """A contiguous cache B S width from a pool and every row's pages; NaN where a row has no page."""
    cache = torch.full((len(pages), slots, pool.shape[-1]), float("nan"), dtype=pool.dtype)
    for row, index in zip(cache, pages, strict=True):
        row[: len(index) * pool.shape[1]] = pool[index].flatten(0, 1)
    return cache


def merge_states(outs, lses):
    """(out, lse) of the op, float64; parts with lse = -inf are left out before any arithmetic."""
    outs, lses = (np.asarray(x.double().cpu()) for x in (outs, lses))
    peak = lses.max(0)
    weights = np.where(np.isneginf(lses), 0.0, np.exp(lses - np.where(np.isneginf(peak), 0.0, peak)))
    total = weights.sum(0)
    some = np.where(total == 0.0, 1.0, total)
    out = (np.where(weights[..., None] > 0, outs, 0.0) * weights[..., None]).sum(0) / some[..., None]
    return out, np.where(total == 0.0, -np.inf, np.where(np.isneginf(peak), 0.0, peak) + np.log(some))


def worst(out, expected):
    """Largest relative norm error of one (batch, head); where the expected norm is 0, the error itself."""
    out = np.asarray(out.double().cpu())
    error = np.linalg.norm(out - expected, axis=(1, 3))
    norm = np.linalg.norm(expected, axis=(1, 3))
    return (error / np.where(norm == 0.0, 1.0, norm)).max()


def worst_lse(lse, expected):
    """Largest absolute lse error; inf where one is -inf and the other is not, or where one is NaN."""
    lse = np.asarray(lse.double().cpu())
    if np.isnan(lse).any() or (np.isneginf(lse) != np.isneginf(expected)).any():
        return np.inf
    finite = np.isfinite(expected)
    return np.abs(lse[finite] - expected[finite]).max(initial=0.0)


def decode_linear(q, k, v, state, decay, *, beta=None):
    """(out, state) of the op, float64, one row and head at a time; decay N, B N or B N H."""
    q, k, v, state, decay = (np.asarray(x.double().cpu()) for x in (q, k, v, state, decay))
    new, out = np.empty_like(state), np.empty(v.shape)
    for b, n in np.ndindex(q.shape[:2]):
        factor = (decay if decay.ndim == 1 else decay[b])[n]
        s = np.reshape(factor, (-1, 1)) * state[b, n]
        u = v[b, n] if beta is None else float(beta[b, n]) * (v[b, n] - k[b, n] @ s)
        new[b, n] = s + np.outer(k[b, n], u)
        out[b, n] = q[b, n] @ new[b, n]
    return out, new


def indexer_products(q_index, k_index, lengths, k_scale=None):
    """((b, t), q_t . k_s as I seen) of every query, float64; unseen keys are not read."""
    q, k = (np.asarray(x.double().cpu()) for x in (q_index, k_index))
    if k_scale is not None:
        k = k * np.asarray(k_scale.double().cpu())[..., None]
    for b, t in np.ndindex(q.shape[:2]):
        yield (b, t), q[b, t] @ k[b, : max(int(lengths[b]) - q.shape[1] + t + 1, 0)].T


def index_scores(q_index, k_index, weights, lengths, *, k_scale=None):
    """Scores of the op, float64 B T S."""
    scores = np.full((*q_index.shape[:2], k_index.shape[1]), -np.inf)
    for place, x in indexer_products(q_index, k_index, lengths, k_scale):
        scores[place][: x.shape[1]] = np.asarray(weights.double().cpu())[place] @ np.maximum(x, 0.0)
    return scores


def block_index_scores(q_index, k_index, lengths, *, block_size, k_scale=None):
    """Scores of the op, float64 B T I ceil(S / block_size)."""
    scores = np.full((*q_index.shape[:3], -(-k_index.shape[1] // block_size)), -np.inf)
    for place, x in indexer_products(q_index, k_index, lengths, k_scale):
        for start in range(0, x.shape[1], block_size):
            scores[place][:, start // block_size] = x[:, start : start + block_size].max(1)
    return scores


def topk_indices(scores, k):
    """Picks of the op, by sorting (score descending, position ascending) in Python; NaN first, -inf never."""
    rows = np.asarray(scores.double().cpu()).reshape(-1, scores.shape[-1])
    picks = np.full((len(rows), k), -1)
    for pick, row in zip(picks, rows, strict=True):
        order = sorted(range(len(row)), key=lambda s: (not np.isnan(row[s]), -np.nan_to_num(row[s], nan=0.0), s))
        chosen = [s for s in order if row[s] != -np.inf][:k]
        pick[: len(chosen)] = chosen
    return picks.reshape(*scores.shape[:-1], k)


def worst_query(scores, expected):
    """Largest relative norm error of the scores of one query, B T ..; inf where -inf is misplaced and for any NaN.

    Over a query's heads and blocks together: a single product can be near 0, where float32 has no relative accuracy.
    """
    scores = np.asarray(scores.double().cpu())
    if scores.shape != expected.shape or (np.isneginf(scores) != np.isneginf(expected)).any():
        return np.inf
    seen = ~np.isneginf(expected)
    scores, expected = (np.where(seen, x, 0.0).reshape(*x.shape[:2], -1) for x in (scores, expected))
    if not np.isfinite(scores).all():
        return np.inf
    norm = np.linalg.norm(expected, axis=-1)
    return (np.linalg.norm(scores - expected, axis=-1) / np.where(norm == 0.0, 1.0, norm)).max(initial=0.0)
