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


def decode_block_sparse(q, k, v, block_indices, lengths, *, block_size, scale, sinks=None, softcap=None):
    """Attention of every query over the slots that its list names and that it sees, gathered one by one."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, k if v is None else v))
    lists = np.asarray(block_indices, np.int64)
    (B, T, N, _), S, K, X = q.shape, k.shape[1], k.shape[2], lists.shape[2]
    out, lse = np.zeros((B, T, N, v.shape[-1])), np.full((B, T, N), -np.inf)
    for b, t, n in np.ndindex(B, T, N):
        end = S if lengths is None else int(lengths[b]) - T + t + 1
        blocks = [j for j in lists[b, t, n * X // N] if 0 <= j * block_size < S]
        slots = [s for j in blocks for s in range(j * block_size, (j + 1) * block_size) if s < min(S, end)]
        rows = (x[b : b + 1, slots, n * K // N, None] for x in (k, v))
        options = dict(scale=scale, softcap=softcap, sinks=None if sinks is None else sinks[n : n + 1])
        one, one_lse = decode_attention(q[b : b + 1, t : t + 1, n : n + 1], *rows, [len(slots)], **options)
        out[b, t, n], lse[b, t, n] = one[0, 0, 0], one_lse[0, 0, 0]
    return out, lse


def decode_sparse_mla(q_latent, q_rope, latent, k_rope, indices, **options):
    """Attention over the listed tokens, of every head over one KV head whose values are the latents of its keys."""
    latent, k_rope, *queries = (np.asarray(x, np.float64) for x in (latent, k_rope, q_latent, q_rope))
    keys = np.concatenate([latent, k_rope], axis=-1)[:, :, None]
    lists, values = np.asarray(indices)[:, :, None], latent[:, :, None]
    return decode_block_sparse(np.concatenate(queries, axis=-1), keys, values, lists, None, block_size=1, **options)


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


def random_lists(shape, blocks):
    """int32 B T X L: the first list holds as many blocks as it can, the last of several none, the others any number, in
    any order; what is left of a list is -1 or wild, anywhere in it."""
    rng = np.random.default_rng(1)
    lists = rng.choice([-1, -7, blocks, 10**9], size=shape)
    flat, most = lists.reshape(-1, shape[-1]), min(shape[-1], blocks)
    counts = rng.integers(0, most + 1, len(flat))
    counts[-1], counts[0] = 0, most
    for entries, count in zip(flat, counts, strict=True):
        entries[rng.permutation(shape[-1])[:count]] = rng.permutation(blocks)[:count]
    return jnp.asarray(lists, jnp.int32)


def unread(lists, S, K, size, lengths):
    """Slots that no query reads, as its list does not name them or they lie too far: B S K."""
    lists = np.asarray(lists, np.int64)
    B, T, X, _ = lists.shape
    unread = np.ones((B, S, K), bool)
    for b, t, x, j in np.argwhere((lists >= 0) & (lists * size < S)):
        start, end = lists[b, t, x, j] * size, S if lengths is None else lengths[b] - T + t + 1
        unread[b, start : max(min(start + size, end), 0), x * K // X] = False
    return unread


@dataclass(frozen=True)
class ListCase(Case):
    """Shapes and options of one call of decode_block_sparse. `lengths` gives the batch also where the op takes none."""

    size: int = 16
    L: int = 5
    by_head: bool = False
    by_length: bool = True
    values: bool = True

    def arrays(self, seed=0):
        """(q, k, v or None, block_indices, lengths or None) with NaN in the unread slots, and the sinks or None."""
        (q, k, v, lengths), sinks = super().arrays(seed)
        return (q, k, v if self.values else None, self.lists, lengths if self.by_length else None), sinks

    @property
    def lists(self):
        X = self.N if self.by_head else self.K
        return random_lists((len(self.lengths), self.T, X, self.L), -(-self.S // self.size))

    @property
    def dead(self):
        return unread(self.lists, self.S, self.K, self.size, self.lengths if self.by_length else None)

    def paged(self, k, v, seed=0):
        """Pools and a page table whose entries of pages that nobody reads are wild."""
        k_pool, v_pool, table = super().paged(k, k if v is None else v, seed)
        wild = self.dead.reshape(*table.shape, -1).all(-1)
        return k_pool, None if v is None else v_pool, jnp.where(wild, 10**6, table)

    def __str__(self):
        flags = ("byhead", self.by_head), ("all", not self.by_length), ("shared", not self.values)
        return "-".join([super().__str__(), f"size{self.size}L{self.L}", *(name for name, is_set in flags if is_set)])


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


@dataclass(frozen=True)
class SparseMlaCase(MlaCase):
    """Shapes and options of one call of decode_sparse_mla. `lengths` only gives the batch."""

    L: int = 100

    def arrays(self, seed=0):
        """(q_latent, q_rope, latent, k_rope, indices) with NaN in the unread slots, and the sinks or None."""
        (*arrays, _), sinks = super().arrays(seed)
        return (*arrays, self.indices), sinks

    @property
    def indices(self):
        return random_lists((len(self.lengths), self.T, self.L), self.S)

    @property
    def dead(self):
        return unread(self.indices[:, :, None], self.S, 1, 1, None)[..., 0]

    def __str__(self):
        return f"{super().__str__()}-L{self.L}"


def index_scores(q_index, k_index, weights, lengths):
    """float64 B T S: one query and slot after the other."""
    q, k, weights = (np.asarray(x, np.float64) for x in (q_index, k_index, weights))
    (B, T, _, _), S = q.shape, k.shape[1]
    scores = np.full((B, T, S), -np.inf)
    for b, t in np.ndindex(B, T):
        for s in range(max(int(lengths[b]) - T + t + 1, 0)):
            scores[b, t, s] = weights[b, t] @ np.maximum(q[b, t] @ k[b, s], 0)
    return scores


def block_index_scores(q_index, k_index, lengths, *, block_size):
    """float64 B T I blocks: the largest product of each block's seen slots."""
    q, k = (np.asarray(x, np.float64) for x in (q_index, k_index))
    (B, T, heads, _), S = q.shape, k.shape[1]
    scores = np.full((B, T, heads, -(-S // block_size)), -np.inf)
    for b, t, e in np.ndindex(B, T, scores.shape[-1]):
        seen = k[b, e * block_size : max(min((e + 1) * block_size, int(lengths[b]) - T + t + 1), 0)]
        if len(seen):
            scores[b, t, :, e] = (q[b, t] @ seen.T).max(axis=-1)
    return scores


def decode_linear(q, k, v, state, decay, beta=None):
    """float64 (out, state): one row and head after the other."""
    q, k, v, state, decay = (np.asarray(x, np.float64) for x in (q, k, v, state, decay))
    out, new = np.zeros(v.shape), np.zeros(state.shape)
    for b, n in np.ndindex(q.shape[:2]):
        factor = decay[n] if decay.ndim == 1 else decay[b, n]
        old = np.reshape(factor, (-1, 1)) * state[b, n]
        u = v[b, n] if beta is None else float(beta[b, n]) * (v[b, n] - old.T @ k[b, n])
        new[b, n] = old + np.outer(k[b, n], u)
        out[b, n] = new[b, n].T @ q[b, n]
    return out, new


@dataclass(frozen=True)
class IndexCase:
    """Shapes of one call of index_scores, or of block_index_scores where `size` is given. `splits` forces the plan."""

    lengths: tuple
    S: int
    heads: int = 4
    J: int = 64
    T: int = 1
    dtype: str = "float16"
    k_dtype: str | None = None
    size: int | None = None
    splits: int | None = None

    def arrays(self, seed=0):
        """(q, k, weights, lengths, k_scale or None) with NaN in every slot that no query sees, in its scale too."""
        rng = np.random.default_rng(seed)
        B, T, J = len(self.lengths), self.T, self.J
        q, k = rng.normal(size=(B, T, self.heads, J)), rng.normal(size=(B, self.S, J))
        dead, scale = np.arange(self.S) >= np.array(self.lengths)[:, None], None
        if self.k_dtype:
            scale = jnp.asarray(np.where(dead, np.nan, rng.normal(size=(B, self.S))), jnp.float32)
        if self.k_dtype == "int8":
            k = np.clip(k * 30, -128, 127)
        else:
            k[dead] = np.nan
        q, k = jnp.asarray(q, self.dtype), jnp.asarray(k, jnp.float32).astype(self.k_dtype or self.dtype)
        weights = jnp.asarray(rng.normal(size=(B, T, self.heads)), jnp.float32)
        return q, k, weights, jnp.asarray(self.lengths, jnp.int32), scale

    def __str__(self):
        shape = f"{self.dtype}-B{len(self.lengths)}T{self.T}I{self.heads}S{self.S}J{self.J}"
        extra = (("size", self.size), ("splits", self.splits), ("k_", self.k_dtype))
        return "-".join([shape, *(f"{name}{value}" for name, value in extra if value)])


@dataclass(frozen=True)
class LinearCase:
    """Shapes and options of one call of decode_linear. `decay`: its axes; `width` forces the plan."""

    B: int = 1
    N: int = 2
    H: int = 64
    V: int = 64
    dtype: str = "float32"
    decay: int = 1
    beta: bool = False
    width: int | None = None

    def arrays(self, seed=0):
        """(q, k, v, state, decay, beta or None); decays are factors on both sides of 1."""
        rng = np.random.default_rng(seed)
        B, N, H, V = self.B, self.N, self.H, self.V
        q, k, v, state = (rng.normal(size=shape) for shape in ((B, N, H), (B, N, H), (B, N, V), (B, N, H, V)))
        decay = rng.uniform(0.2, 1.1, size=((N,), (B, N), (B, N, H))[self.decay - 1])
        beta = jnp.asarray(rng.uniform(size=(B, N)), jnp.float32) if self.beta else None
        narrow = (jnp.asarray(x, self.dtype) for x in (q, k / np.sqrt(H), v))
        return *narrow, jnp.asarray(state, jnp.float32), jnp.asarray(decay, jnp.float32), beta

    def __str__(self):
        shape = f"{self.dtype}-B{self.B}N{self.N}H{self.H}V{self.V}-decay{self.decay}"
        return "-".join([shape, *["beta"] * self.beta, *[f"width{self.width}"] * bool(self.width)])
