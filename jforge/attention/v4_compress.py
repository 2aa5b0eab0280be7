"""How DeepSeek-V4's csa and hca turn every m tokens into one entry, and what the two kinds of layers share.

    u_s = x_s Wu    z_s = x_s Wz + bias[s mod m]    both for every token, float32 or wider
    entry w = norm(sum over its rows of softmax(z) * u), the softmax over rows, channel by channel
              then interleaved RoPE on the last R channels at position w m, the block's first token
    hca: rows are the m tokens of block w
    csa: u and z have two series of channels. Rows are the m tokens of block w - 1 with the first series and the m
         tokens of block w with the second; block 0 has none before it

Entry w is seen from the block's last token on: (w + 1) m <= t + 1, that token included. (The report's formula, read
with positions from 0, hides it from that token; every implementation shows it.)

Between steps a state holds the rows u and z that a later entry still needs: `[last complete block |] open block`, the
first half in csa only. Rows of no token are 0. A step that closes no block writes one row of it and reads none.

Sources: DeepSeek-V4 (arXiv 2606.19348) 2.3, its inference code, transformers' deepseek_v4.
"""

from dataclasses import dataclass
from fractions import Fraction

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jforge.attention import v4_window
from jforge.core import masks
from jforge.core.attend import einsum
from jforge.core.config import positive_int
from jforge.core.norm import rms_norm
from jforge.core.params import Params
from jforge.core.softmax import accumulation_dtype, masked_softmax
from jforge.core.spec import Buffer
from jforge.core.step import Queries, Step, Tokens
from jforge.cost import Work


@dataclass(frozen=True, kw_only=True)
class Config(v4_window.Config):
    """The fields of all V4 layers and m.

    compress_rate: m, tokens of a block, which becomes one entry
    """

    compress_rate: int

    def __post_init__(self):
        super().__post_init__()
        positive_int("compress_rate", self.compress_rate)


@dataclass(frozen=True)
class Compressor:
    """One compressor of a layer: the names of its parameters and buffers, and its sizes.

    params: prefix of `w{params}_kv`, `w{params}_gate`, `{params}_bias`, `{params}_norm`.
    entries: the buffer of its entries, B E width. state: prefix of `{state}_kv` and `{state}_score`, B rows X.
    """

    params: str
    entries: str
    state: str
    width: int
    rate: int  # m
    overlap: bool  # two series of channels, and the block before

    @property
    def behind(self) -> int:
        """Rows of the block before: the state's first half."""
        return self.rate if self.overlap else 0

    @property
    def channels(self) -> int:
        """X: of u and z."""
        return 2 * self.width if self.overlap else self.width

    @property
    def states(self) -> tuple[str, str]:
        return f"{self.state}_kv", f"{self.state}_score"

    def shapes(self, D: int) -> dict[str, tuple[int, ...]]:
        """{parameter: shape}."""
        p, X = self.params, self.channels
        return {f"w{p}_kv": (D, X), f"w{p}_gate": (D, X), f"{p}_bias": (self.rate, X), f"{p}_norm": (self.width,)}

    def buffers(self, width: str) -> dict[str, Buffer]:
        """The entries, with `width` for the letter of their channels, and the two states, which have no slots."""
        entries = Buffer(("B", "E", width), (self.width,), every=self.rate)
        rows, m = (self.behind + self.rate, self.channels), self.rate
        # Rows of tokens that are dropped are written again before they are read, while the same block is open.
        state = Buffer(("B", "M", "X"), rows, every=None, dtype="float32", steady=lambda cfg, n: n // m)
        return {self.entries: entries} | dict.fromkeys(self.states, state)

    def rows(self, params: Params, x: Tokens, order: Int[Array, "B T"]) -> tuple[Array, Array]:
        """u and z: B T X of tokens at these places in their rows, float32 or wider."""
        wide, p = accumulation_dtype(x), self.params
        weights = (params[name].astype(wide) for name in (f"w{p}_kv", f"w{p}_gate"))
        u, z = (einsum("btd,dx->btx", x.astype(wide), w) for w in weights)
        return u, z + params[f"{p}_bias"].astype(wide)[order % self.rate]

    def pool(
        self,
        params: Params,
        cfg: Config,
        u: Float[Array, "B E M X"],
        z: Float[Array, "B E M X"],
        held: Bool[Array, "#B E M"],
        positions: Int[Array, "B E"],
    ) -> Float[Array, "B E width"]:
        """One entry for each set of rows, those that are not `held` left out, turned by `positions`."""
        if self.overlap:
            m, w = self.rate, self.width
            u, z = (jnp.concatenate([a[:, :, :m, :w], a[:, :, m:, w:]], axis=2) for a in (u, z))
        weights, _ = masked_softmax(z.swapaxes(2, 3), held[:, :, None])
        mixed = einsum("behm,bemh->beh", weights, u)
        entry = rms_norm(mixed, params[f"{self.params}_norm"], eps=cfg.rms_norm_eps)
        return v4_window.rotate(cfg, entry[:, :, None], positions)[:, :, 0]

    def compress(self, params: Params, cfg: Config, all_rows: Queries) -> Float[Array, "B E width"]:
        """The entries of all complete blocks of x, in x's dtype: the definition."""
        x, order, positions, _ = all_rows
        m, E = self.rate, x.shape[1] // self.rate
        rows = self.rows(params, x, order)
        u, z = (a[:, : E * m].reshape(len(x), E, m, self.channels) for a in rows)
        if self.overlap:
            before = (jnp.pad(a, [(0, 0), (1, 0), (0, 0), (0, 0)])[:, :E] for a in (u, z))
            u, z = (jnp.concatenate(pair, axis=2) for pair in zip(before, (u, z), strict=True))
        held = (jnp.arange(E)[:, None] > 0) | (jnp.arange(u.shape[2]) >= self.behind)
        return self.pool(params, cfg, u, z, held[None], positions[:, : E * m : m]).astype(x.dtype)

    def extend(self, params: Params, cfg: Config, cache, step: Step) -> dict[str, Array]:
        """{buffer: its content after the step}, for any number of new tokens."""
        fresh = self.rows(params, step.x, step.positions)
        return self._leaves(self._extend(params, cfg, cache.length, fresh, step, *self._buffers(cache)))

    def extend_by_one(self, params: Params, cfg: Config, cache, step: Step) -> dict[str, Array]:
        """The same for one token a row. The state is read only in a step in which some row closes a block."""
        fresh = self.rows(params, step.x, step.positions)
        closes = (step.length % self.rate == 0) & step.keep[:, 0]

        def close(*buffers):
            return self._extend(params, cfg, cache.length, fresh, step, *buffers)

        def keep_row(entries, *states):
            row = jnp.where(step.keep[:, 0], self.behind + step.positions[:, 0] % self.rate, states[0].shape[1])
            where = jnp.arange(len(row)), row
            pairs = zip(states, fresh, strict=True)
            return entries, *(s.at[where].set(new[:, 0].astype(s.dtype), mode="drop") for s, new in pairs)

        return self._leaves(jax.lax.cond(closes.any(), close, keep_row, *self._buffers(cache)))

    def _buffers(self, cache) -> tuple[Array, ...]:
        return tuple(getattr(cache, name) for name in (self.entries, *self.states))

    def _leaves(self, arrays: tuple[Array, ...]) -> dict[str, Array]:
        return dict(zip((self.entries, *self.states), arrays, strict=True))

    def _extend(self, params, cfg, length: Int[Array, "B"], fresh, step: Step, entries, *states):
        """Make the entries that the new tokens complete and keep the rows that later ones need.

        Row i of a state is the token at position base + i. New rows stand behind the state's.
        """
        m, slots, batch = self.rate, entries.shape[1], jnp.arange(len(length))[:, None]
        base = self._base(length)[:, None]
        behind_state = states[0].shape[1] - length[:, None]
        joined = [jnp.concatenate([s, new.astype(s.dtype)], axis=1) for s, new in zip(states, fresh, strict=True)]

        def at(position: Int[Array, "B n"]) -> tuple[Array, Array, Array]:
            held = (position >= 0) & (position < step.length[:, None])
            index = jnp.where(position < length[:, None], position - base, position + behind_state)
            return *(rows[batch, jnp.where(held, index, 0)] for rows in joined), held

        entry = (length // m)[:, None] + jnp.arange(-(-step.x.shape[1] // m))  # no more can end in T tokens
        wanted = entry[..., None] * m - self.behind + jnp.arange(self.behind + m)
        u, z, held = (a.reshape(*wanted.shape, *a.shape[2:]) for a in at(wanted.reshape(len(length), -1)))
        made = self.pool(params, cfg, u, z, held, entry * m).astype(entries.dtype)
        complete = (entry + 1) * m <= step.length[:, None]
        entries = entries.at[batch, jnp.where(complete, entry, slots)].set(made, mode="drop")

        *kept, held = at(self._base(step.length)[:, None] + jnp.arange(states[0].shape[1]))
        kept, fits = (jnp.where(held[..., None], rows, 0) for rows in kept), step.fits[:, None, None]
        return entries, *(jnp.where(fits, new, old) for new, old in zip(kept, states, strict=True))

    def _base(self, length: Int[Array, "B"]) -> Int[Array, "B"]:
        """The position of the state's first row."""
        return length // self.rate * self.rate - self.behind


def seen(cfg: Config, q_pos: Int[Array, "B T"], count: int) -> Bool[Array, "B T E"]:
    """Which of `count` entries a query sees: those of blocks that end at its position or before."""
    return (jnp.arange(count) + 1) * cfg.compress_rate <= q_pos[..., None] + 1


def visible(cfg: Config, q_pos: Array, k_pos: Array) -> Array:
    """The window, and every token of a block that ends at the query or before."""
    m = cfg.compress_rate
    return masks.window(q_pos, k_pos, cfg.sliding_window) | (k_pos < (q_pos + 1) // m * m)


def layer_work(
    cfg: Config,
    compressors: tuple[Compressor, ...],
    read: dict[str, int],
    flops: int,
    context: int,
    new: int,
    closing: bool,
) -> Work:
    """The Work of a call that reads these slots of the entries, and `flops` beside the window's.

    A step writes one slot of the ring and one row of each state. One that closes a block reads its states, writes them
    anew, since the rows change places, and writes an entry of each compressor. So does a prefill, with its entries.
    """
    window, m = v4_window.work(cfg, context, context, new, closing), cfg.compress_rate
    rows = {name: Fraction(1, c.behind + c.rate) for c in compressors for name in c.states}
    whole, anew = dict.fromkeys(rows, 1), closing or new > 1
    made = 1 if new == 1 else context // m - (context - new) // m
    entries = {c.entries: made for c in compressors} if made else {}
    return Work(
        read={**window.read, **read, **(whole if anew else {})},
        written={**window.written, **({**entries, **whole} if anew else rows)},
        flops=window.flops + flops,
        entries_read=window.entries_read + sum(read.values()),
    )
