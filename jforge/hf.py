"""Weights of a Hugging Face layer -> jforge parameters.

    att, cfg, params = convert(model.config, model.state_dict(), layer=0)
    y = att.forward(params, cfg, hidden_states)          # what layers[0].self_attn makes of its hidden_states

torch keeps a Linear as [out, in] with the heads inside `out`; jforge keeps "D N H" (`shapes` of the mechanism). Rows
are used as they are: the Config names the RoPE layout of the checkpoint. torch is never imported.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jforge import hf_config
from jforge.attention import REGISTRY
from jforge.core.attention import Attention
from jforge.core.step import X_DTYPES
from jforge.hf_deepseek_v4 import RELEASED as V4_RELEASED

Params = dict[str, jax.Array]

_ATTENTION = re.compile(r"(?:^|\.)(?:layers\.(?P<a>\d+)\.(?:self_)?attn|h\.(?P<b>\d+)\.self_attention)\.(?P<name>.+)$")
_TOWERS = re.compile(r"vision|visual|image|audio|encoder|mtp")  # they have layers.{i}.self_attn too
_BUFFERS = (  # kept beside the weights by old checkpoints and by transformers' lightning; they follow from the config
    "rotary_emb.inv_freq",
    "slope_rate",
    "query_decay",
    "key_decay",
    "diagonal_decay",
)


def convert(config: Any, state_dict: Mapping[str, Any], layer: int) -> tuple[Attention, Any, Params]:
    """(Attention, Config, params) of one layer.

    config:     a parsed config.json or a transformers config.
    state_dict: the whole model's, {name: array}; torch tensors, NumPy or JAX arrays, with any module prefix.
    layer:      0 .. num_hidden_layers - 1.
    Params keep the weights' dtype. Raises ValueError for a layer outside the model, and for a weight that is missing,
    of another shape, or without a place in the Config (a bias, a quantisation scale), TypeError for a quantised one,
    naming the key; NotImplementedError as hf_config.layer does.
    """
    name, cfg = hf_config.layer(config, layer)
    model = hf_config.text_config(config)["model_type"]
    split = _SPLITS.get(model) or _SPLITS.get(name) or _split_projections
    weights = _Weights(state_dict, layer)
    params = split(weights, cfg)
    weights.check_all_used()
    return REGISTRY[name], cfg, params


class _Weights:
    """The attention weights of one layer, each asked for by its name below the attention module."""

    def __init__(self, state_dict: Mapping[str, Any], layer: int):
        self.prefix, self.found = _find(state_dict, layer)
        self.used: set[str] = set()

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        key = self.prefix + name
        if name not in self.found:
            raise ValueError(f"{key} is missing from the state dict; it must have shape {shape}")
        value = self.found[name]
        if tuple(value.shape) != shape:
            raise ValueError(f"{key} has shape {tuple(value.shape)}; it must be {shape}")
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in X_DTYPES:
            raise TypeError(f"{key} has dtype {dtype}; it must be dequantised to one of {', '.join(X_DTYPES)}")
        self.used.add(name)
        return _numpy(value)

    def check_all_used(self) -> None:
        for name in self.found:
            if name not in self.used and name not in _BUFFERS:
                raise ValueError(f"{self.prefix}{name} is in the state dict, but the config has no place for it")


def _find(state_dict: Mapping[str, Any], layer: int) -> tuple[str, dict[str, Any]]:
    """(prefix of the layer's attention weights, {name below it: array}); a prefix to name in errors if none is there.

    Other towers of a multimodal model and prediction heads are passed over where the text model is there as well.
    """
    groups: dict[str, dict[str, Any]] = {}
    for key, value in state_dict.items():
        match = _ATTENTION.search(key)
        if match and int(match["a"] or match["b"]) == layer:
            groups.setdefault(key[: match.start("name")], {})[match["name"]] = value
    if not groups:
        return f"layers.{layer}.self_attn.", {}
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


def _jax(value: np.ndarray) -> jax.Array:
    """A copy on the default device, float64 included."""
    with jax.enable_x64(value.dtype == np.float64):
        return jnp.array(value)


def _heads_last(weight: np.ndarray, heads: int) -> jax.Array:
    """[heads * H, D] -> D heads H."""
    return _jax(weight.T.reshape(weight.shape[1], heads, -1))


def _output(weights: _Weights, shape: tuple[int, int, int], name: str, bias: bool = False) -> Params:
    """The output projection: [D, N * V] -> N V D, and its bias."""
    N, V, D = shape
    params = {"wo": _jax(weights.take(f"{name}.weight", (D, N * V)).T.reshape(N, V, D))}
    if bias:
        params["bo"] = _jax(weights.take(f"{name}.bias", (D,)))
    return params


def _split_projections(weights: _Weights, cfg: Any) -> Params:
    """q_proj, k_proj, v_proj, o_proj, and q_norm, k_norm: every family but Falcon.

    With an output gate (Qwen3-Next) q_proj holds, head by head, [query | gate].
    """
    D, N, K, H, V = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.v_head_dim
    params = {}
    if cfg.attn_output_gate:
        both = weights.take("q_proj.weight", (N * (H + V), D)).T.reshape(D, N, H + V)
        params |= {"wq": _jax(both[..., :H]), "wg": _jax(both[..., H:])}
    else:
        params["wq"] = _heads_last(weights.take("q_proj.weight", (N * H, D)), N)
    params["wk"] = _heads_last(weights.take("k_proj.weight", (K * H, D)), K)
    params["wv"] = _heads_last(weights.take("v_proj.weight", (K * V, D)), K)
    if cfg.attention_bias:
        for x, shape in (("q", (N, H)), ("k", (K, H)), ("v", (K, V))):
            bias = weights.take(f"{x}_proj.bias", (shape[0] * shape[1],))
            params[f"b{x}"] = _jax(bias.reshape(shape))
    if cfg.qk_norm:
        flat = cfg.qk_norm == "flat"
        for x, heads in (("q", N), ("k", K)):
            norm = weights.take(f"{x}_norm.weight", (heads * H,) if flat else (H,))
            params[f"{x}_norm"] = _jax(norm.reshape(heads, H) if flat else norm)
    return params | _output(weights, (N, V, D), "o_proj", cfg.attention_output_bias)


def _split_with_sinks(weights: _Weights, cfg: Any) -> Params:
    """gpt-oss: one sink logit a query head beside the projections."""
    return _split_projections(weights, cfg) | {"sinks": _jax(weights.take("sinks", (cfg.num_attention_heads,)))}


def _split_fused(weights: _Weights, cfg: Any) -> Params:
    """Falcon's query_key_value: for each key/value head its G queries, then its key, then its value.

    With K = 1 that is [all queries | key | value], with K = N it is [query | key | value] head by head: the three
    layouts of the model are one.
    """
    D, N, K, H = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    G = N // K
    fused = weights.take("query_key_value.weight", ((N + 2 * K) * H, D)).T.reshape(D, K, G + 2, H)
    params = {
        "wq": _jax(fused[:, :, :G].reshape(D, N, H)),
        "wk": _jax(fused[:, :, G]),
        "wv": _jax(fused[:, :, G + 1]),
    }
    if cfg.attention_bias:
        bias = weights.take("query_key_value.bias", ((N + 2 * K) * H,)).reshape(K, G + 2, H)
        params |= {"bq": _jax(bias[:, :G].reshape(N, H)), "bk": _jax(bias[:, G]), "bv": _jax(bias[:, G + 1])}
    return params | _output(weights, (N, H, D), "dense", cfg.attention_output_bias)


def _split_latent(weights: _Weights, cfg: Any) -> Params:
    """MLA: q holds, head by head, [nope | rope]; kv_a [latent | rope]; kv_b, head by head, [key | value]."""
    D, N, L = cfg.hidden_size, cfg.num_attention_heads, cfg.q_lora_rank
    C, nope, R, V = cfg.kv_lora_rank, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    if L is None:
        params = {"wq": _heads_last(weights.take("q_proj.weight", (N * (nope + R), D)), N)}
    else:
        params = {
            "wq_a": _jax(weights.take("q_a_proj.weight", (L, D)).T),
            "q_norm": _jax(weights.take("q_a_layernorm.weight", (L,))),
            "wq_b": _heads_last(weights.take("q_b_proj.weight", (N * (nope + R), L)), N),
        }
    params["wkv_a"] = _jax(weights.take("kv_a_proj_with_mqa.weight", (C + R, D)).T)
    params["kv_norm"] = _jax(weights.take("kv_a_layernorm.weight", (C,)))
    both = weights.take("kv_b_proj.weight", (N * (nope + V), C)).T.reshape(C, N, nope + V)
    params |= {"wk_b": _jax(both[..., :nope]), "wv_b": _jax(both[..., nope:])}
    if cfg.attention_bias:
        params["bkv_a"] = _jax(weights.take("kv_a_proj_with_mqa.bias", (C + R,)))
        if L is not None:
            params["bq_a"] = _jax(weights.take("q_a_proj.bias", (L,)))
    return params | _output(weights, (N, V, D), "o_proj", cfg.attention_bias)


def _split_latent_with_index(weights: _Weights, cfg: Any) -> Params:
    """DSA: MLA's weights and the indexer's; a layer that takes the picks of another has none."""
    params = _split_latent(weights, cfg)
    if cfg.index_shared:
        return params
    D, L, heads, J = cfg.hidden_size, cfg.q_lora_rank, cfg.index_n_heads, cfg.index_head_dim
    return params | {
        "wq_index": _heads_last(weights.take("indexer.wq_b.weight", (heads * J, L)), heads),
        "wk_index": _jax(weights.take("indexer.wk.weight", (J, D)).T),
        "ww_index": _jax(weights.take("indexer.weights_proj.weight", (heads, D)).T),
        "k_index_norm": _jax(weights.take("indexer.k_norm.weight", (J,))),
        "k_index_bias": _jax(weights.take("indexer.k_norm.bias", (J,))),
    }


def _split_lightning(weights: _Weights, cfg: Any) -> Params:
    """Lightning: qkv_proj holds, head by head, [query | key | value]; one norm over all heads."""
    D, N, H = cfg.hidden_size, cfg.num_attention_heads, cfg.head_dim
    fused = weights.take("qkv_proj.weight", (N * 3 * H, D)).T.reshape(D, N, 3, H)
    params = {f"w{x}": _jax(fused[:, :, i]) for i, x in enumerate("qkv")}
    params["wg"] = _heads_last(weights.take("output_gate.weight", (N * H, D)), N)
    params["o_norm"] = _jax(weights.take("norm.weight", (N * H,)).reshape(N, H))
    return params | _output(weights, (N, H, D), "out_proj")


def _split_with_index(weights: _Weights, cfg: Any) -> Params:
    """MSA: an index branch beside the projections, `indexer.q_proj` in transformers, `index_q_proj` in checkpoints."""
    D, K, J = cfg.hidden_size, cfg.num_key_value_heads, cfg.index_head_dim
    branch = "index_" if "index_q_proj.weight" in weights.found else "indexer."
    return _split_projections(weights, cfg) | {
        "wq_index": _heads_last(weights.take(f"{branch}q_proj.weight", (K * J, D)), K),
        "wk_index": _jax(weights.take(f"{branch}k_proj.weight", (J, D)).T),
        "q_index_norm": _jax(weights.take(f"{branch}q_norm.weight", (J,))),
        "k_index_norm": _jax(weights.take(f"{branch}k_norm.weight", (J,))),
    }


def _split_v4_window(weights: _Weights, cfg: Any) -> Params:
    """DeepSeek-V4. o_a holds, group by group, its [rank, heads * H]; released files have names of their own."""
    D, N, H, L = cfg.hidden_size, cfg.num_attention_heads, cfg.head_dim, cfg.q_lora_rank
    g, rank, take = cfg.o_groups, cfg.o_lora_rank, _v4_take(weights)
    down = take("o_a_proj.weight", (g * rank, N // g * H)).reshape(g, rank, N // g, H)
    return {
        "wq_a": _jax(take("q_a_proj.weight", (L, D)).T),
        "q_norm": _jax(take("q_a_norm.weight", (L,))),
        "wq_b": _heads_last(take("q_b_proj.weight", (N * H, L)), N),
        "wkv": _jax(take("kv_proj.weight", (H, D)).T),
        "kv_norm": _jax(take("kv_norm.weight", (H,))),
        "sinks": _jax(take("sinks", (N,))),
        "wo_a": _jax(down.transpose(0, 2, 3, 1)),
        "wo_b": _jax(take("o_b_proj.weight", (D, g * rank)).T.reshape(g, rank, D)),
    }


def _split_hca(weights: _Weights, cfg: Any) -> Params:
    return _split_v4_window(weights, cfg) | _compressor(weights, cfg, "compressor.", "c", cfg.head_dim, series=1)


def _split_csa(weights: _Weights, cfg: Any) -> Params:
    """Channels of a compressor: the series for the next entry, then that for the entry of the token's own block."""
    D, L, heads, J = cfg.hidden_size, cfg.q_lora_rank, cfg.index_n_heads, cfg.index_head_dim
    take, branch = _v4_take(weights), "compressor.indexer."
    return (
        _split_v4_window(weights, cfg)
        | _compressor(weights, cfg, "compressor.", "c", cfg.head_dim, series=2)
        | _compressor(weights, cfg, branch, "ic", J, series=2)
        | {
            "wq_index": _heads_last(take(f"{branch}q_b_proj.weight", (heads * J, L)), heads),
            "ww_index": _jax(take(f"{branch}scorer.weights_proj.weight", (heads, D)).T),
        }
    )


def _compressor(weights: _Weights, cfg: Any, path: str, name: str, width: int, series: int) -> Params:
    D, X, take = cfg.hidden_size, series * width, _v4_take(weights)
    return {
        f"w{name}_kv": _jax(take(f"{path}kv_proj.weight", (X, D)).T),
        f"w{name}_gate": _jax(take(f"{path}gate_proj.weight", (X, D)).T),
        f"{name}_bias": _jax(take(f"{path}position_bias", (cfg.compress_rate, X))),
        f"{name}_norm": _jax(take(f"{path}kv_norm.weight", (width,))),
    }


def _v4_take(weights: _Weights) -> Callable[[str, tuple[int, ...]], np.ndarray]:
    """weights.take by transformers' names, also where the module has the name that released files give it."""
    released = not weights.prefix.endswith("self_attn.")
    return lambda name, shape: weights.take(V4_RELEASED[name] if released else name, shape)


_SPLITS: dict[str, Callable[[_Weights, Any], Params]] = {
    "csa": _split_csa,
    "dsa": _split_latent_with_index,
    "falcon": _split_fused,
    "hca": _split_hca,
    "lightning": _split_lightning,
    "mla": _split_latent,
    "msa": _split_with_index,
    "sinks": _split_with_sinks,
    "v4_window": _split_v4_window,
}
"""By model_type or by mechanism; _split_projections for all others."""
