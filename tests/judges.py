"""Judges that several test files share: each compares a mechanism with something, and returns an error or a verdict.

Weights and tokens come from NumPy: drawing them with JAX would compile more than the judged functions do.
"""

from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np

import jforge
import torch_ref
from jforge.attention import dense
from jforge.core import compare
from jforge.harness.backends import BACKENDS, judge, passes, to_torch
from jforge.harness.ops import BY_NAME, CASES

# Plants: each takes monkeypatch and returns the Attention that has the bug.


def patch(att, owner, name: str, value):
    """`att`, once the function (or constant) `name` of a module or class is replaced."""

    def plant(monkeypatch):
        monkeypatch.setattr(owner, name, value)
        return att

    return plant


def replaced(att, **functions):
    return lambda monkeypatch: att._replace(**functions)


def recount(att, **changes):
    """`att` whose cost has some fields made from the right one."""

    def cost(cfg, **sizes):
        right = att.cost(cfg, **sizes)
        return replace(right, **{field: change(right) for field, change in changes.items()})

    return replaced(att, cost=cost)


def unread(att, name: str):
    """`att` whose cost forgets that a buffer is read."""
    return recount(att, read=lambda cost: {n: size for n, size in cost.read.items() if n != name})


# Verdicts: each takes an Attention and says whether it noticed something wrong.


def law(name: str, cfg):
    return lambda att: not jforge.check(att, cfg, laws=(name,)).ok


def torch_forward(name: str, cfg):
    """What all modes share; that they agree is for laws and walks."""
    return lambda att: torch_error(att, name, cfg) > compare.OUT["float32"]


def case(name: str):
    chosen = next(c for c in CASES if c.name == name)
    return lambda att: not passes(judge(BACKENDS["jforge"], BY_NAME[chosen.op], chosen, "float32"), "float32")


def walks(cfg, T: int = 11):
    return lambda att: walk(att, cfg, T) > compare.OUT["float64"]


# Inputs.


def weights(att, cfg, dtype="float64", seed: int = 0) -> dict[str, np.ndarray]:
    """Parameters of the right shapes, norms about 1; float64 ones need enable_x64 to stay so."""
    shapes = jax.eval_shape(lambda: att.init_params(jax.random.key(0), cfg))
    rng = np.random.default_rng(seed)
    return {
        name: (0.4 * rng.standard_normal(p.shape) + name.endswith("norm")).astype(dtype) for name, p in shapes.items()
    }


def tokens(cfg, B: int, T: int, dtype="float64") -> np.ndarray:
    return np.random.default_rng(7).standard_normal((B, T, cfg.hidden_size)).astype(dtype)


def compiled(att, cfg):
    """(forward, prefill, decode) of params and the rest."""
    forward = jax.jit(lambda params, x: att.forward(params, cfg, x))
    prefill = jax.jit(lambda params, x, cache, lengths=None: att.prefill(params, cfg, x, cache, lengths=lengths))
    return forward, prefill, jax.jit(lambda params, x, cache: att.decode(params, cfg, x, cache))


# Errors.


def torch_error(att, name: str, cfg, T: int = 19) -> float:
    """forward of T tokens in float32 against torch_ref's."""
    params, x = weights(att, cfg, "float32"), tokens(cfg, 2, T, "float32")
    want = torch_ref.get(name).forward({n: to_torch(p) for n, p in params.items()}, cfg, to_torch(x))
    return compare.relative(compiled(att, cfg)[0](params, x), want.numpy())


def walk(att, cfg, T: int, seed: int = 0) -> float:
    """L2, L3, L5 and L6 in one: the rows of a batch live through random steps, each row with chunks of its own length
    and now and then a single token; the last third are single tokens. NaN in the pads and after every step in the
    unused slots.

    The worst error in float64 of any y against forward, and of the last cache against that of one prefill. Everything
    has one shape, so a walk costs three compilations whatever its steps.
    """
    with jax.enable_x64(True):
        B, spec, rng = 4, att.cache_spec(cfg), np.random.default_rng(seed)
        params, x, rows = weights(att, cfg), tokens(cfg, B, T), np.arange(B)[:, None]
        forward, *steps = compiled(att, cfg)
        prefill, decode, poison = *steps, jax.jit(lambda cache: spec.poison(cfg, cache))
        truth = np.asarray(forward(params, x))
        empty = poison(att.init_cache(cfg, B, T, jnp.float64))
        _, one_shot = prefill(params, x, empty, np.full(B, T, np.int32))
        done, cache, worst = np.zeros(B, np.int32), empty, 0.0
        while (done < T).any():
            room = np.maximum(T - T // 3 - done, 0)
            if single := not room.any() or (room.all() and rng.random() < 0.5):
                new, width = np.ones(B, np.int32), 1
            else:
                new, width = np.minimum(rng.integers(0, T // 2 + 2, B), room).astype(np.int32), T
            at, real = np.minimum(done[:, None] + np.arange(width), T - 1), np.arange(width) < new[:, None]
            chunk = np.where(real[..., None], x[rows, at], np.nan)
            y, cache = decode(params, chunk, cache) if single else prefill(params, chunk, cache, new)
            worst = max(worst, compare.relative(y, np.where(real[..., None], truth[rows, at], 0)))
            done, cache = done + new, poison(cache)
        return max(worst, compare.caches(spec, cfg, cache, one_shot))


def limit(att, cfg, twin, change=lambda params: params, change_x=lambda x: x) -> float:
    """The worst error in float64 of forward, a prefill and decode against the forward of `twin`, (Attention, Config,
    its parameters from those of att). `change` makes the parameters of att, `change_x` the tokens.
    """
    other, other_cfg, convert = twin
    with jax.enable_x64(True):
        params, x = change(weights(att, cfg)), change_x(tokens(cfg, 2, 10))
        forward, prefill, decode = compiled(att, cfg)
        want = compiled(other, other_cfg)[0](convert(params), x)
        y, cache = prefill(params, x[:, :6], att.init_cache(cfg, 2, 10, jnp.float64))
        errors = [compare.relative(forward(params, x), want), compare.relative(y, want[:, :6])]
        for t in range(6, 10):
            y, cache = decode(params, x[:, t : t + 1], cache)
            errors.append(compare.relative(y, want[:, t : t + 1]))
        return max(errors)


def as_gqa(cfg, rename=lambda params: params):
    """The `twin` of a mechanism on the dense family's fields and weights: gqa."""
    config = dense.Config(**{f.name: getattr(cfg, f.name) for f in fields(dense.Config)})
    return jforge.get("gqa"), config, lambda params: {name: rename(params)[name] for name in dense.shapes(config)}
