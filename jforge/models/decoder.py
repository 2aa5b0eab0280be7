"""A decoder in flax.nnx: embedding, layers of attention with SwiGLU between them, and the embedding again as the head.

    x_0 = E[token]
    x  <- x + attend_i(rms(x))          jforge.stack, any mechanism a layer
    x  <- x + W_down(silu(W_gate rms(x)) * W_up rms(x))
    logits = rms(x) E^T

The parameters are the module's, the caches are not: `prefill` and `decode` take them and give them back.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

import jforge
from jforge import stack
from jforge.core.params import Params
from jforge.core.spec import Lengths
from jforge.core.step import Tokens
from jforge.cost import Cost
from jforge.models.config import ModelConfig, found
from jforge.models.start import layer_params

Ids = Int[Array, "B T"] | Int[np.ndarray, "B T"]
Logits = Float[Array, "B T vocab"]


class Decoder(nnx.Module):
    """A language model of ModelConfig `cfg`, with parameters of `dtype`."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        D, mixers = cfg.hidden_size, cfg.mixers
        self.cfg = cfg
        small = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(cfg.vocab_size, D, embedding_init=small, param_dtype=dtype, rngs=rngs)
        drawn = (layer_params(found(att), own, rngs.params(), dtype) for att, own, *_ in mixers)
        self.mixers = nnx.List([nnx.Dict({name: nnx.Param(value) for name, value in one.items()}) for one in drawn])
        self.norms = nnx.List([_norm(cfg, rngs, dtype) for _ in mixers])
        self.mlps = nnx.List([SwiGLU(cfg, rngs=rngs, dtype=dtype) for _ in cfg.layers])
        self.last = _norm(cfg, rngs, dtype)

    def __call__(self, tokens: Ids, positions: Ids | None = None) -> Logits:
        """Logits of the token after each, without a cache. positions feed RoPE only."""
        return self.head(self.mixed(self.embed(tokens), positions))

    def mixed(self, x: Tokens, positions: Ids | None = None) -> Tokens:
        """What leaves the last layer, of embedded tokens."""
        return stack.forward(self._params(), self.cfg.mixers, x, self.block, positions)

    def init_cache(self, batch: int, capacity: int, dtype=jnp.bfloat16) -> tuple:
        """The empty caches of all layers, the convolutions' among them."""
        return stack.init_cache(self.cfg.mixers, batch, capacity, dtype)

    def prefill(self, tokens: Ids, cache: tuple, lengths: Lengths | None = None) -> tuple[Logits, tuple]:
        """Append T tokens, of row b its first lengths[b]; the logits after pads say nothing."""
        x, cache = stack.prefill(self._params(), self.cfg.mixers, self.embed(tokens), cache, self.block, lengths)
        return self.head(x), cache

    def decode(self, tokens: Ids, cache: tuple, ops=jforge.ops) -> tuple[Logits, tuple]:
        """Append 1 to 16 tokens a row, through `ops`."""
        x, cache = stack.decode(self._params(), self.cfg.mixers, self.embed(tokens), cache, self.block, ops)
        return self.head(x), cache

    def index_loss(self, tokens: Ids) -> Float[Array, ""]:
        """What the indexers of all layers have still to learn (`Attention.index_loss`); 0 where there is none."""
        losses = []

        def block(x, mixer, attend):
            att, own, *_ = self.cfg.mixers[mixer]
            if (loss := found(att).index_loss) and not getattr(own, "index_shared", False):
                losses.append(loss(self.layer_params(mixer), own, self.norms[mixer](x)))
            return self.block(x, mixer, attend)

        stack.forward(self._params(), self.cfg.mixers, self.embed(tokens), block)
        return sum(losses, jnp.float32(0))

    def cost(self, *, context: int, **sizes) -> Cost:
        """Bytes of the caches of all layers, of the sizes that `Attention.cost` takes."""
        return stack.cost(self.cfg.mixers, context=context, **sizes)

    def layer_params(self, mixer: int) -> Params:
        """What its mechanism calls the parameters of one of the mixers."""
        return {name: param[...] for name, param in self.mixers[mixer].items()}

    def _params(self) -> Sequence[Params]:
        return [self.layer_params(mixer) for mixer in range(len(self.mixers))]

    def block(self, x: Tokens, mixer: int, attend) -> Tokens:
        """One of the mixers with what stands around it, as jforge.stack calls it."""
        x = x + attend(self.norms[mixer](x))
        if not self.cfg.has_mlp(mixer):
            return x
        return x + self.mlps[mixer if self.cfg.short_conv is None else mixer // 2](x)

    def head(self, x: Tokens) -> Logits:
        """Logits of what leaves the last layer."""
        return self.embed.attend(self.last(x))


class SwiGLU(nnx.Module):
    """W_down(silu(W_gate h) * W_up h) of h = rms(x)."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        D, F = cfg.hidden_size, cfg.intermediate_size
        self.norm = _norm(cfg, rngs, dtype)
        self.gate = nnx.Linear(D, F, use_bias=False, param_dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(D, F, use_bias=False, param_dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(F, D, use_bias=False, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: Tokens) -> Tokens:
        h = self.norm(x)
        return self.down(jax.nn.silu(self.gate(h)) * self.up(h))


def _norm(cfg: ModelConfig, rngs: nnx.Rngs, dtype) -> nnx.RMSNorm:
    return nnx.RMSNorm(cfg.hidden_size, epsilon=cfg.rms_norm_eps, param_dtype=dtype, rngs=rngs)
