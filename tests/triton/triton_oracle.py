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
        start = 0 if window is None else max(stop - window, 0)
        x = scale * k[b, start:stop, n // group] @ q[b, t, n]
        if softcap is not None:
            x = softcap * np.tanh(x / softcap)
        logits = x if sinks is None else np.append(x, float(sinks[n]))
        if logits.size:
            peak = logits.max()
            total = np.exp(logits - peak).sum()
            out[b, t, n] = np.exp(x - peak) @ v[b, start:stop, n // group] / total
            lse[b, t, n] = peak + np.log(total)
    return out, lse


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
