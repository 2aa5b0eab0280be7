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


def convert(config: Any, state_dict: Mapping[str, Any], layer: int) -> tuple[Attention, Any, dict[str, jax.Array]]:
    """(Attention, Config, params) of one layer.

    config:     a parsed config.json or a transformers config.
    state_dict: the whole model's, {name: array}; torch tensors, NumPy or JAX arrays, with any module prefix.
    layer:      0 .. num_hidden_layers - 1.
    Params keep the weights' dtype. Raises ValueError for a layer outside the model, and for a weight that is missing,
    of another shape, or without a place in the Config (a bias, a quantisation scale), TypeError for a quantised one,
    naming the key; NotImplementedError as `layers` does.
    """
    found, name, cfg = read(config, layer)
    weights = Weights(state_dict, layer)
    params = {key: _jax(value) for key, value in found.split(weights, cfg).items()}
    weights.check_all_used()
    return REGISTRY[name], cfg, params


def _jax(value: np.ndarray) -> jax.Array:
    """A copy on the default device, float64 included."""
    with jax.enable_x64(value.dtype == np.float64):
        return jnp.array(value)
