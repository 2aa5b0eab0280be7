"""Float64 NumPy oracle and random cases for the Mosaic kernels, written from the op's definition alone."""

from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np


def decode_attention(q, k, v, lengths, *, scale, window=None, sinks=None, softcap=None):
    """out and lse of every query by a plain loop over what it sees."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, _ = q.shape
    group = N // k.shape[2]
    out, lse = np.zeros((B, T, N, v.shape[-1])), np.full((B, T, N), -np.inf)
    for b, t, n in np.ndindex(B, T, N):
        end = max(int(lengths[b]) - T + t + 1, 0)
        keys = slice(0 if window is None else max(end - window, 0), end)
        logits = scale * (k[b, keys, n // group] @ q[b, t, n])
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        if sinks is not None:
            logits = np.append(logits, float(sinks[n]))
        if logits.size:
            top = logits.max()
            p = np.exp(logits - top)
            lse[b, t, n] = top + np.log(p.sum())
            out[b, t, n] = p[: keys.stop - keys.start] @ v[b, keys, n // group] / p.sum()
    return out, lse


def decode_mla(q_latent, q_rope, latent, k_rope, lengths, **options):
    """Attention of every head over one KV head whose keys are latents and rope keys, and whose values are latents."""
    latent, k_rope, *queries = (np.asarray(x, np.float64) for x in (latent, k_rope, q_latent, q_rope))
    keys = np.concatenate([latent, k_rope], axis=-1)
    return decode_attention(np.concatenate(queries, axis=-1), keys[:, :, None], latent[:, :, None], lengths, **options)


def merge_states(outs, lses):
    """Weighted mean of the parts that are not empty."""
    outs, lses = np.asarray(outs, np.float64), np.asarray(lses, np.float64)
    out, lse = np.zeros(outs.shape[1:]), np.full(lses.shape[1:], -np.inf)
    for at in np.ndindex(lse.shape):
        parts = [p for p in range(len(lses)) if lses[(p, *at)] > -np.inf]
        if parts:
            levels = np.array([lses[(p, *at)] for p in parts])
            weights = np.exp(levels - levels.max())
            lse[at] = levels.max() + np.log(weights.sum())
            out[at] = weights @ np.stack([outs[(p, *at)] for p in parts]) / weights.sum()
    return out, lse


def error(out, want) -> float:
    """Largest relative norm of the difference over (batch, query, head); absolute where the wanted row is 0."""
    out = np.asarray(out, np.float64)
    norm = np.linalg.norm(want, axis=-1)
    return float(np.max(np.linalg.norm(out - want, axis=-1) / np.where(norm > 0, norm, 1)))


def lse_error(lse, want) -> float:
    """Largest difference; -inf equals -inf."""
    lse = np.asarray(lse, np.float64)
    same = np.isneginf(lse) & np.isneginf(want)
    return float(np.max(np.abs(np.where(same, 0, lse) - np.where(same, 0, want))))


@dataclass(frozen=True)
class Case:
    """Shapes and options of one call. `splits` forces the plan; None leaves it to the op."""

    lengths: tuple
    S: int
    N: int = 4
    K: int = 1
    H: int = 64
    V: int | None = None
    T: int = 1
    dtype: str = "float16"
    splits: int | None = None
    sinks: bool = False
    page: int | None = None
    options: dict = field(default_factory=dict)

    def arrays(self, seed=0):
        """(q, k, v, lengths) with NaN in every slot that no query may read, and the sinks or None."""
        rng = np.random.default_rng(seed)
        B, V = len(self.lengths), self.V or self.H
        shapes = (B, self.T, self.N, self.H), (B, self.S, self.K, self.H), (B, self.S, self.K, V)
        q, k, v = (rng.normal(size=shape) for shape in shapes)
        lengths = np.array(self.lengths, np.int32)
        k[self.dead], v[self.dead] = np.nan, np.nan
        sinks = jnp.asarray(rng.normal(size=self.N), jnp.float32) if self.sinks else None
        return tuple(jnp.asarray(x, self.dtype) for x in (q, k, v)) + (jnp.asarray(lengths),), sinks

    @property
    def dead(self):
        """Slots that no query may read: B S."""
        lengths, slot = np.array(self.lengths)[:, None], np.arange(self.S)
        window = self.options.get("window")
        return (slot >= lengths) | (False if window is None else slot < lengths - self.T + 1 - window)

    def paged(self, k, v, seed=0):
        """Pools in which the pages of all rows lie in random order among pages of NaN, and the page table, whose
        entries past a row's last page are wild."""
        rng = np.random.default_rng(seed)
        B, P = len(self.lengths), self.S // self.page
        numbers = rng.permutation(B * P + 2)[: B * P].reshape(B, P)
        pools = []
        for rows in (k, v):
            pool = np.full((B * P + 2, self.page, *rows.shape[2:]), np.nan)
            pool[numbers] = np.asarray(rows, np.float64).reshape(B, P, self.page, *rows.shape[2:])
            pools.append(jnp.asarray(pool, rows.dtype))
        used = -(-np.array(self.lengths) // self.page)
        table = np.where(np.arange(P) < used[:, None], numbers, 10**6)
        return *pools, jnp.asarray(table, jnp.int32)

    @property
    def scale(self):
        return self.H**-0.5

    def __str__(self):
        shape = f"{self.dtype}-B{len(self.lengths)}T{self.T}N{self.N}K{self.K}S{self.S}H{self.H}V{self.V or self.H}"
        extra = [f"{name}{value}" for name, value in (("splits", self.splits), ("page", self.page)) if value]
        return "-".join([shape, *extra, *["sinks"] * self.sinks, *(f"{a}{b}" for a, b in self.options.items())])


@dataclass(frozen=True)
class MlaCase(Case):
    """Shapes and options of one call of decode_mla; K, H and V are unused."""

    C: int = 128
    R: int = 64

    def arrays(self, seed=0):
        """(q_latent, q_rope, latent, k_rope, lengths) with NaN in the dead slots, and the sinks or None."""
        rng = np.random.default_rng(seed)
        B = len(self.lengths)
        shapes = [(B, self.T, self.N, width) for width in (self.C, self.R)]
        shapes += [(B, self.S, width) for width in (self.C, self.R)]
        q_latent, q_rope, latent, k_rope = (rng.normal(size=shape) for shape in shapes)
        latent[self.dead], k_rope[self.dead] = np.nan, np.nan
        sinks = jnp.asarray(rng.normal(size=self.N), jnp.float32) if self.sinks else None
        arrays = (jnp.asarray(x, self.dtype) for x in (q_latent, q_rope, latent, k_rope))
        return (*arrays, jnp.array(self.lengths, jnp.int32)), sinks

    @property
    def scale(self):
        return (self.C + self.R) ** -0.5

    def __str__(self):
        shape = f"{self.dtype}-B{len(self.lengths)}T{self.T}N{self.N}S{self.S}C{self.C}R{self.R}"
        extra = [f"{name}{value}" for name, value in (("splits", self.splits), ("page", self.page)) if value]
        return "-".join([shape, *extra, *["sinks"] * self.sinks, *(f"{a}{b}" for a, b in self.options.items())])
