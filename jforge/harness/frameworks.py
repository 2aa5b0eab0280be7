"""jforge against torch_ref on the same weights and tokens: outputs and cache contents, mode by mode."""

from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from jforge.core import compare
from jforge.core.attention import Attention
from jforge.harness.backends import to_torch

T, CAPACITY = 9, 12
MODES = ("forward", "prefill", "decode", "ragged", "cache")


def against_torch(att: Attention, twin: ModuleType, cfg, dtype: str = "float32", seed: int = 0) -> dict[str, float]:
    """{mode: relative error} of `att` against `twin`, its torch_ref namespace, with `cfg`.

    forward of T tokens; prefill of 5 and decode of the rest; a ragged prefill with NaN pads and one more token; the
    cache is compared after each of the two, on the slots that hold data.
    """
    params = att.init_params(jax.random.key(seed), cfg, jnp.dtype(dtype))
    x = np.asarray(jax.random.normal(jax.random.key(seed + 1), (3, T, cfg.hidden_size), jnp.dtype(dtype)))
    ours = _Runner(_jitted(att), params, cfg, dtype, jnp.asarray)
    theirs = _Runner(twin, {k: to_torch(np.array(v)) for k, v in params.items()}, cfg, dtype, to_torch)
    errors = dict.fromkeys(MODES, 0.0)

    def judge(mode: str, got, want) -> None:
        errors[mode] = max(errors[mode], compare.relative(got, want))

    judge("forward", ours.forward(x), theirs.forward(x))
    lengths = np.array([T - 1, 3, 0], np.int32)
    padded = np.where(np.arange(T)[None, :, None] < lengths[:, None, None], x, np.nan).astype(x.dtype)
    for tokens, rows, mode in ((x[:, :5], None, "prefill"), (padded, lengths, "ragged")):
        got, want = ours.start(tokens, rows), theirs.start(tokens, rows)
        judge(mode, got, want)
        for t in range(5, T) if rows is None else (0,):
            judge("decode", ours.decode(x[:, t : t + 1]), theirs.decode(x[:, t : t + 1]))
        spec, cache = att.cache_spec(cfg), ours.cache
        leaves = {name: jnp.asarray(_numpy(theirs.cache[name])) for name in spec}
        other = type(cache)(**leaves, length=jnp.asarray(theirs.cache["length"].numpy()))
        errors["cache"] = max(errors["cache"], compare.caches(spec, cfg, cache, other))
    return errors


def _jitted(att: Attention) -> SimpleNamespace:
    """The functions of a mechanism, compiled: op by op, compilation would take most of the time. They are wrapped, as
    jit would otherwise return to what it traced before a test planted its bug.
    """

    def compiled(call):
        return jax.jit(lambda params, cfg, *arrays, **named: call(params, cfg, *arrays, **named), static_argnums=1)

    calls = {name: compiled(getattr(att, name)) for name in ("forward", "prefill", "decode")}
    return SimpleNamespace(init_cache=att.init_cache, **calls)


class _Runner:
    """One framework's functions with NumPy at the door, holding the cache between calls."""

    def __init__(self, functions, params, cfg, dtype: str, convert):
        self.functions, self.params, self.cfg, self.dtype, self.convert = functions, params, cfg, dtype, convert

    def forward(self, x):
        return _numpy(self.functions.forward(self.params, self.cfg, self.convert(x)))

    def start(self, x, lengths):
        dtype = self.convert(x[:0]).dtype
        self.cache = self.functions.init_cache(self.cfg, len(x), CAPACITY, dtype)
        lengths = None if lengths is None else self.convert(lengths)
        y, self.cache = self.functions.prefill(self.params, self.cfg, self.convert(x), self.cache, lengths=lengths)
        return _numpy(y)

    def decode(self, x):
        y, self.cache = self.functions.decode(self.params, self.cfg, self.convert(x), self.cache)
        return _numpy(y)


def _numpy(result) -> np.ndarray:
    """float64, from either framework: torch has no way from bfloat16 to NumPy."""
    return np.asarray(result.double() if hasattr(result, "double") else result, np.float64)
