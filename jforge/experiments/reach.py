"""How far back a model can see at all, from what its layers see: beyond this, recall can only be a guess."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jforge.experiments.training import merged
from jforge.models import ModelConfig
from jforge.models.config import found


def bound(cfg: ModelConfig, tokens: int) -> int | None:
    """The largest distance t - s at which the output at t can depend on the token at s, in rows of `tokens` tokens.

    The sum over layers of the farthest that any query of each sees; convolutions count too. None where a layer sees the
    first token from the last: then nothing but the row is a bound. An upper bound, and not what is used: trained stacks
    of windows look back much less far.
    """
    t = jnp.arange(tokens)
    far = 0
    for att, own, *_ in cfg.mixers:
        seen = np.broadcast_to(found(att).visible(own, t[:, None], t), (tokens, tokens))
        query, key = np.nonzero(seen)
        far += int((query - key).max())
    return None if far >= tokens - 1 else far


def measured(cfg: ModelConfig, params: PyTree, tokens: int) -> int:
    """The largest distance at which the logits of one row of random tokens have a gradient other than 0, of one run."""
    ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, tokens))
    model = merged(cfg, params)
    towards = jnp.asarray(np.random.default_rng(1).standard_normal(cfg.vocab_size), jnp.float32)

    @jax.jit
    def slope(x, t):
        return jax.grad(lambda x: model.head(model.mixed(x))[0, t] @ towards)(x)

    x, far = model.embed(jnp.asarray(ids)), 0
    for t in range(tokens):
        (used,) = np.nonzero(np.abs(np.asarray(slope(x, t))[0]).max(axis=-1))
        far = max(far, t - int(used.min(initial=t)))
    return far
