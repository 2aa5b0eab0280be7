"""What the laws run: tokens, parameters and caches that they share, and the functions of a mechanism, compiled."""

import math
from collections import Counter
from collections.abc import Callable
from functools import cached_property

import jax
import numpy as np

from jforge.core.attention import Attention
from jforge.verdict import Found, caches


class Bench:
    """The inputs that the laws share, and jitted functions, so that each shape is compiled once.

    Compiling is what a check costs, so there are few shapes: all rows in every call, and prefills of T, of half of T
    and of 2 tokens. Tokens and outputs are sliced and joined in NumPy, where that compiles nothing. `calling` is the
    function of the mechanism that was asked last.
    """

    def __init__(self, att: Attention, cfg, seed: int, options: dict | None = None):
        self.att, self.cfg, self.seed, self.options, self.calling = att, cfg, seed, options, "cache_spec"
        self.spec = att.cache_spec(cfg)
        sizes = [s for b in self.spec.values() for s in (b.every, b.limit) if s]
        self.span = max(sizes, default=1)  # the longest window or block: every law crosses it
        self.block = math.lcm(*(b.every for b in self.spec.values() if b.every))
        self.half = max(5, self.span + 1)
        self.T = 2 * self.half
        self.capacity = self.T + 2
        near = (0, 1, self.span - 1, self.span, self.span + 1, 2 * self.span, self.T - 1)
        self.lengths = np.array(sorted({n for n in near if 0 <= n < self.T}), np.int32)  # those of ragged rows
        self.traces = Counter()  # of decode, by the shapes and dtypes that it was given
        jit = self.jit
        self.forward = jit("forward", lambda params, x: att.forward(params, cfg, x))
        self.shifted = jit("forward", lambda params, x, positions: att.forward(params, cfg, x, positions=positions))
        self.gradient = jit("forward", self._gradient)
        self.prefill = jit("prefill", lambda params, x, cache: att.prefill(params, cfg, x, cache))
        self.ragged = jit("prefill", lambda params, x, cache, n: att.prefill(params, cfg, x, cache, lengths=n))
        self.decode = jit("decode", self._decode, donate_argnums=2)
        self.select = jit("select", lambda params, x, cache: att.select(params, cfg, x, cache))
        self.tokens_of = jit("tokens_of", lambda selection: att.tokens_of(cfg, selection, self.T))
        self.poison = jit("cache_spec", lambda cache: self.spec.poison(cfg, cache))
        self.used = jit("cache_spec", lambda cache: self.spec.used(cfg, cache))
        self._params: dict = {}

    def jit(self, name: str, function: Callable, **more) -> Callable:
        """The function compiled; `calling` is its name while it runs."""
        compiled = jax.jit(function, compiler_options=self.options, **more)

        def call(*args):
            self.calling = name
            return compiled(*args)

        return call

    def _decode(self, params, x, cache):
        self.traces[str([(a.shape, a.dtype) for a in jax.tree.leaves((x, cache))])] += 1
        return self.att.decode(params, self.cfg, x, cache)

    def _gradient(self, params, x, towards):
        """Of (towards * forward).sum() by params and x, where `towards` is like an output."""
        _, back = jax.vjp(lambda params, x: self.att.forward(params, self.cfg, x), params, x)
        return back(towards)

    def params(self, dtype=np.float64):
        if np.float64 not in self._params:
            draw = self.jit("init_params", lambda key: self.att.init_params(key, self.cfg, np.float64))
            self._params[np.float64] = draw(jax.random.key(self.seed))
        if dtype not in self._params:
            self._params[dtype] = jax.tree.map(lambda a: np.asarray(a).astype(dtype), self._params[np.float64])
        return self._params[dtype]

    def x(self, dtype=np.float64) -> np.ndarray:
        """Tokens of as many rows as there are lengths."""
        rng = np.random.default_rng(self.seed + 1)
        return rng.standard_normal((len(self.lengths), self.T, self.cfg.hidden_size)).astype(dtype)

    def empty(self, dtype=np.float64, poison: bool = False):
        self.calling = "init_cache"
        cache = self.att.init_cache(self.cfg, len(self.lengths), self.capacity, dtype)
        return self.poison(cache) if poison else cache

    @cached_property
    def truth(self) -> np.ndarray:
        """forward of x in float64."""
        return np.asarray(self.forward(self.params(), self.x()))

    @cached_property
    def one_shot(self):
        """(y, cache) of one prefill of x."""
        return self.prefill(self.params(), self.x(), self.empty())

    @cached_property
    def folded(self):
        """(y, cache) of decoding x token by token."""
        return self.fold(self.x(), self.empty())

    @cached_property
    def halved(self):
        """(y, cache) of two prefills, the first just past the longest window or block."""
        x, cache, ys = self.x(), self.empty(), []
        for chunk in (x[:, : self.half], x[:, self.half :]):
            y, cache = self.prefill(self.params(), chunk, cache)
            ys.append(y)
        return np.concatenate(ys, axis=1), cache

    @cached_property
    def uneven(self):
        """(y, cache) of small chunks."""
        return self.nibble()

    def fold(self, x, cache, poison: bool = False, tokens: int = 1):
        """(y, cache) of decoding x, so many tokens at a time and the last ones alone."""
        params, ys, t = self.params(x.dtype.type), [], 0
        while t < x.shape[1]:
            size = tokens if t + tokens <= x.shape[1] else 1
            y, cache = self.decode(params, x[:, t : t + size], cache)
            cache = self.poison(cache) if poison else cache
            ys.append(y)
            t += size
        return np.concatenate(ys, axis=1), cache

    def nibble(self, poison: bool = False):
        """Prefills of 2, 1, 2 or no tokens a row, each row at another place of this cycle, until all have T."""
        x, cache, rows = self.x(), self.empty(poison=poison), np.arange(len(self.lengths))[:, None]
        done, step, y = np.zeros(len(rows), np.int32), 0, np.full(x.shape, np.nan)
        while (done < self.T).any():
            new = np.minimum(np.array((2, 1, 2, 0))[(step + rows[:, 0]) % 4], self.T - done).astype(np.int32)
            chunk, real = self.cut(done, new, 2)
            got, cache = self.ragged(self.params(), chunk, cache, new)
            at = done[:, None] + np.arange(2)
            y[np.broadcast_to(rows, at.shape)[real], at[real]] = np.asarray(got)[real]
            cache = self.poison(cache) if poison else cache
            done, step = done + new, step + 1
        return y, cache

    def cut(self, start: np.ndarray, count: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(x from start[b] on, NaN after count[b] tokens; which are not): B width D, bool B width."""
        real = np.arange(width) < count[:, None]
        at = np.minimum(start[:, None] + np.arange(width), self.T - 1)
        return np.where(real[..., None], self.x()[np.arange(len(start))[:, None], at], np.nan), real

    def same_cache(self, of: str, got, want=None) -> Found:
        """Slot by slot, against that of one prefill."""
        want = self.one_shot[1] if want is None else want
        return caches(of, jax.tree.map(np.asarray, self.used(want)), got, want)
