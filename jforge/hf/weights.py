"""The attention weights of one layer of a state dict, asked for by name and laid out as jforge keeps them.

torch keeps a Linear as [out, in] with the heads inside `out`; jforge keeps "D N H" (`shapes` of the mechanism). Rows
are used as they are: the Config names the RoPE layout of the checkpoint. torch is never imported.
"""

import re
from collections.abc import Mapping
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np

from jforge.core.step import X_DTYPES

ATTENTION = "self_attn|attn|self_attention|attention|multi_head_attention"
"""What the attention of a layer is called in a state dict, a regular expression."""
# what stands in that module and belongs to the block around the attention: norms of BERT and its kin, and a bias that
# gpt_neox_japanese adds after its last layer's attention
_AROUND = re.compile(r"(?:output\.)?LayerNorm\.|ln\.|self_attn_layer_norm\.|dense_bias$")
_TOWERS = re.compile(r"vision|visual|image|audio|encoder|mtp")  # they have layers.{i}.self_attn too
# kept beside the weights by old checkpoints and by transformers' lightning; they follow from the config
_BUFFERS = ("rotary_emb.inv_freq", "slope_rate", "query_decay", "key_decay", "diagonal_decay")
# masks that old checkpoints keep in the place of a bias
_MASKS = ("bias", "masked_bias", "attention.bias", "attention.masked_bias", "causal_mask", "rotary_emb.cos_cached")


class Weights:
    """The weights of a layer by their names below the attention module.

    Each is asked for with the shape that the Config gives it. Raises ValueError where it is missing or has another
    shape, TypeError where it is quantised, naming the key.
    """

    def __init__(self, state_dict: Mapping[str, Any], layer: int, module: str):
        self.prefix, self.found = _find(state_dict, layer, module)
        self.names: Mapping[str, str] = {}  # the checkpoint's own, by the names of transformers
        self._used: set[str] = set()

    def take(self, name: str, *shape: int) -> np.ndarray:
        """The array of that name, which must have this shape."""
        name = self.names.get(name, name)
        key = self.prefix + name
        if name not in self.found:
            raise ValueError(f"{key} is missing from the state dict; it must have shape {shape}")
        value = self.found[name]
        if tuple(value.shape) != shape:
            raise ValueError(f"{key} has shape {tuple(value.shape)}; it must be {shape}")
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in X_DTYPES:
            raise TypeError(f"{key} has dtype {dtype}; it must be dequantised to one of {', '.join(X_DTYPES)}")
        self._used.add(name)
        return _numpy(value)

    def has(self, name: str) -> bool:
        return name in self.found

    def linear(self, name: str, inputs: int, *outputs: int) -> np.ndarray:
        """A Linear's weight, [prod(outputs), inputs] -> inputs *outputs."""
        return self.take(f"{name}.weight", prod(outputs), inputs).T.reshape(inputs, *outputs)

    def transposed(self, name: str, inputs: int, *outputs: int) -> np.ndarray:
        """The weight of a Conv1D (GPT-2), [inputs, prod(outputs)] -> inputs *outputs."""
        return self.take(f"{name}.weight", inputs, prod(outputs)).reshape(inputs, *outputs)

    def vector(self, name: str, *shape: int) -> np.ndarray:
        """A bias or norm weight, [prod(shape)] -> shape."""
        return self.take(name, prod(shape)).reshape(shape)

    def output(self, name: str, N: int, V: int, D: int, bias: bool = False) -> dict[str, np.ndarray]:
        """The output projection wo, [D, N * V] -> N V D, and its bias bo."""
        params = {"wo": self.linear(name, N * V, D).reshape(N, V, D)}
        return params | {"bo": self.take(f"{name}.bias", D)} if bias else params

    def conv(self, name: str, L: int, X: int, bias: bool = False) -> dict[str, np.ndarray]:
        """A depthwise convolution's w_conv, [X, 1, L] -> L X, and its bias b_conv."""
        params = {"w_conv": self.take(f"{name}.weight", X, 1, L)[:, 0].T}
        return params | {"b_conv": self.take(f"{name}.bias", X)} if bias else params

    def pass_over(self, *names: str) -> None:
        """Weights that may be there and that nothing reads."""
        self._used |= set(names)

    def check_all_used(self) -> None:
        """Raise ValueError for a weight that nobody asked for: a bias or a scale would be dropped silently."""
        for name in self.found:
            if name not in self._used and name not in _BUFFERS + _MASKS:
                raise ValueError(f"{self.prefix}{name} is in the state dict, but the config has no place for it")


def _find(state_dict: Mapping[str, Any], layer: int, module: str) -> tuple[str, dict[str, Any]]:
    """(prefix of the module's weights, {name below it: array}); a prefix to name in errors if none is there.

    Other towers of a multimodal model and prediction heads are passed over where the text model is there as well.
    """
    within = re.compile(rf"(?:^|\.)(?:layers?|h|blocks)\.{layer}\.(?:norm_attn_norm\.)?(?:{module})\.(?P<name>.+)$")
    groups: dict[str, dict[str, Any]] = {}
    for key, value in state_dict.items():
        if (match := within.search(key)) and not _AROUND.match(match["name"]):
            groups.setdefault(key[: match.start("name")], {})[match["name"]] = value
    if not groups:
        name = "self_attn" if module == ATTENTION else module
        return f"layers.{layer}.{name}.", {}
    text = [prefix for prefix in groups if not _TOWERS.search(prefix)] or list(groups)
    if len(text) > 1:
        raise ValueError(f"the state dict has several attention modules for layer {layer}: {', '.join(sorted(text))}")
    return text[0], groups[text[0]]


def _numpy(value: Any) -> np.ndarray:
    """A torch tensor, NumPy or JAX array as NumPy, in its own dtype."""
    if not hasattr(value, "detach"):
        return np.asarray(value)
    value = value.detach().cpu()
    if str(value.dtype) == "torch.bfloat16":  # NumPy has no bfloat16 of its own; through float32 it is exact
        return value.float().numpy().astype(jnp.bfloat16)
    return value.numpy()
