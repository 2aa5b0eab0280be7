"""The sizes of a decoder: its layers of attention, an MLP beside each, and how many parameters that makes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jforge
from jforge import small
from jforge.core.attention import Attention
from jforge.core.config import positive, positive_int, positive_ints, reject
from jforge.stack import Layers

CONVOLUTION = "short_conv"
"""The mechanism that stands before every layer of a model with short convolutions."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder. Field names follow Hugging Face.

    vocab_size: tokens; their embedding is the head as well (tied)
    layers: (mechanism, Config) or (mechanism, Config, source) of each layer of attention, as jforge.stack takes them
    intermediate_size: channels of each layer's SwiGLU
    short_conv: taps of a gated convolution before every layer of attention, as LFM2 has them; None for none
    """

    vocab_size: int
    layers: Layers
    intermediate_size: int
    short_conv: int | None = None
    rms_norm_eps: float = 1e-6

    def __post_init__(self):
        positive_ints(self, "vocab_size", "intermediate_size")
        positive("rms_norm_eps", self.rms_norm_eps)
        if self.short_conv is not None:
            positive_int("short_conv", self.short_conv)
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            reject("layers", self.layers, "one layer or more")
        if len({cfg.hidden_size for _, cfg, *_ in self.layers}) > 1:
            reject("layers", [cfg.hidden_size for _, cfg, *_ in self.layers], "layers of one hidden_size")

    @property
    def hidden_size(self) -> int:
        """D, of the activations."""
        return self.layers[0][1].hidden_size

    @property
    def mixers(self) -> Layers:
        """What jforge.stack runs: the layers, and the convolution before each."""
        if self.short_conv is None:
            return self.layers
        taps = jforge.get(CONVOLUTION).Config(hidden_size=self.hidden_size, conv_L_cache=self.short_conv)
        own = ((att, cfg, *(2 * s + 1 for s in source)) for att, cfg, *source in self.layers)
        return tuple(mixer for layer in own for mixer in ((CONVOLUTION, taps), layer))

    def has_mlp(self, mixer: int) -> bool:
        """Whether an MLP follows this one of the mixers: after attention it does, after a convolution not."""
        return self.short_conv is None or mixer % 2 == 1

    @property
    def parameters(self) -> int:
        """How many numbers the model learns."""
        D, mixers = self.hidden_size, self.mixers
        own = (found(att).shapes(cfg).values() for att, cfg, *_ in mixers)
        mlp = 3 * D * self.intermediate_size + D  # and its norm
        norms = D * (len(mixers) + 1)
        return self.vocab_size * D + norms + len(self.layers) * mlp + sum(math.prod(s) for one in own for s in one)


def found(att: str | Attention) -> Attention:
    """The mechanism of a layer."""
    return jforge.get(att) if isinstance(att, str) else att


def layer(att: str | Attention, hidden_size: int, heads: int = 4, tokens: int = 64, **sizes) -> tuple[Any, Any]:
    """(mechanism, Config): a layer of this width, with windows, blocks and choices for rows of `tokens` tokens.

    sizes: fields of the Config by name, in the place of jforge.small's; those that it does not have are not used, so
    that one set serves all mechanisms. Raises ValueError where the Config has a field that no size is known for.
    """
    return att, small.fitted(found(att).Config, layer_sizes(hidden_size, heads, tokens) | sizes)


def layer_sizes(hidden_size: int, heads: int, tokens: int) -> Mapping[str, Any]:
    """What `layer` starts from."""
    for name, value in (("hidden_size", hidden_size), ("heads", heads), ("tokens", tokens)):
        positive_int(name, value)
    if hidden_size % heads:
        reject("hidden_size", hidden_size, f"a multiple of heads={heads}")
    return small.widths(hidden_size, heads) | small.reaches(tokens)


def matched(cfg: ModelConfig, parameters: int, within: float = 0.02) -> ModelConfig:
    """The model with the intermediate_size that brings it nearest to `parameters`.

    Raises ValueError where it stays further away than the share `within`: its attention alone is too large, or one
    channel more is too much.
    """
    each = 3 * cfg.hidden_size * len(cfg.layers)
    channels = max(1, cfg.intermediate_size + round((parameters - cfg.parameters) / each))
    made = replace(cfg, intermediate_size=channels)
    if abs(made.parameters - parameters) > within * parameters:
        names = ", ".join(dict.fromkeys(att if isinstance(att, str) else att.summary for att, *_ in cfg.layers))
        reject("parameters", parameters, f"within {within:.0%} of {made.parameters}, the nearest of a model of {names}")
    return made
