"""Weights of a Hugging Face layer -> jforge parameters. What goes where is said by the model's Family."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jforge.attention import REGISTRY
from jforge.core.attention import Attention
from jforge.hf.config import read
from jforge.hf.weights import Weights


def convert(
    config: Any, state_dict: Mapping[str, Any], layer: int, kind: str | None = None
) -> tuple[Attention, Any, dict[str, jax.Array]]:
    """(Attention, Config, params) of one layer.

    config:     a parsed config.json or a transformers config.
    state_dict: the whole model's, {name: array}; torch tensors, NumPy or JAX arrays, with any module prefix.
    layer:      0 .. num_hidden_layers - 1.
    kind:       which mixer of a layer that has two side by side (Falcon-H1): "linear_attention", "full_attention";
                None: the first.
    Params keep the weights' dtype. Raises ValueError for a layer outside the model, and for a weight that is missing,
    of another shape, or without a place in the Config (a bias, a quantisation scale), TypeError for a quantised one,
    naming the key; NotImplementedError as `layers` does.
    """
    found, gains, name, cfg = read(config, layer, kind)
    weights = Weights(state_dict, layer, found.module)
    params = found.split(weights, cfg).items()
    params = {key: _jax((value * gains.get(key, 1)).astype(value.dtype)) for key, value in params}
    weights.check_all_used()
    return REGISTRY[name], cfg, params


def _jax(value: np.ndarray) -> jax.Array:
    """A copy on the default device, float64 included."""
    with jax.enable_x64(value.dtype == np.float64):
        return jnp.array(value)
