"""Learned sink logits: every query head has one more logit in its softmax, with no value behind it.

    p_s = exp(l_s) / (exp(sigma_n) + sum over visible u of exp(l_u)),   l_s = scale q_t . k_s

A head that finds nothing worth reading can put its mass on the sink, so its output may shrink towards 0. sigma is in
logit units: neither scaled nor capped. It is a parameter, so the cache is the dense one, or with `sliding_window` the
ring of the window. Source: gpt-oss (openai/gpt-oss and transformers); it has a window of 128 in every other layer.
"""

from dataclasses import dataclass
from types import ModuleType

from jaxtyping import Array

import jforge.ops as jax_ops
from jforge.attention import dense, sliding_window
from jforge.attention.dense import PLAIN, KVCache
from jforge.core.attention import Attention
from jforge.core.config import FrozenDict, positive_int
from jforge.core.params import Params
from jforge.core.share import Source
from jforge.core.spec import CacheSpec
from jforge.core.step import Tokens
from jforge.cost import Work


@dataclass(frozen=True, kw_only=True)
class Config(sliding_window.Config):
    """The dense family's fields and the window.

    sliding_window: W, keys visible to a query, its own included; None: every token
    """

    sliding_window: int | None = None

    def __post_init__(self):
        dense.Config.__post_init__(self)
        if self.sliding_window is not None:
            positive_int("sliding_window", self.sliding_window)


def _keys(cfg: Config) -> ModuleType:
    """Which tokens are seen and kept is the business of the mechanism without sinks."""
    return dense if cfg.sliding_window is None else sliding_window


def shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """{parameter: shape}: the dense ones and one logit a query head."""
    return dense.shapes(cfg) | {"sinks": (cfg.num_attention_heads,)}


def visible(cfg: Config, q_pos: Array, k_pos: Array) -> Array:
    return _keys(cfg).visible(cfg, q_pos, k_pos)


def forward(params: Params, cfg: Config, x: Tokens, positions=None) -> Tokens:
    """The definition; `params["sinks"]` (N) joins every softmax. `positions` (int B T) feed RoPE only."""
    return _keys(cfg).forward(params, cfg, x, positions)


def prefill(params: Params, cfg: Config, x: Tokens, cache: KVCache, lengths=None) -> tuple[Tokens, KVCache]:
    """Append T tokens (row b its first lengths[b]) and attend, sinks included."""
    return _keys(cfg).prefill(params, cfg, x, cache, lengths)


def decode(params: Params, cfg: Config, x: Tokens, cache: KVCache, ops=jax_ops) -> tuple[Tokens, KVCache]:
    """1 to 16 tokens a row through one call of `ops.decode_attention`, which carries the sinks."""
    return _keys(cfg).decode(params, cfg, x, cache, ops)


def read(params: Params, cfg: Config, x: Tokens, source: Source, ops=None) -> Tokens:
    """Attention over the keys and values of another layer, sinks included."""
    return _keys(cfg).read(params, cfg, x, source, ops)


def cache_spec(cfg: Config) -> CacheSpec:
    return _keys(cfg).cache_spec(cfg)


def work(cfg: Config, context: int, capacity: int, new: int, closing: bool) -> Work:
    """That of the mechanism without sinks: they are parameters, N numbers beside the weights."""
    return _keys(cfg).work(cfg, context, capacity, new, closing)


_YARN = {"rope_type": "yarn", "rope_theta": 1.5e5, "factor": 32.0, "original_max_position_embeddings": 4096,
         "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}  # fmt: skip
_GPT_OSS = {"hidden_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
            "attention_bias": True, "attention_output_bias": True, "rms_norm_eps": 1e-5,
            "rope_parameters": _YARN}  # fmt: skip

sinks = Attention(
    summary="one learned logit a head in every softmax, with or without a window (gpt-oss)",
    traded="one number a head: a head may attend to nothing; bytes are those of the cache below it",
    Config=Config, shapes=shapes, cache_spec=cache_spec, work=work,
    forward=forward, prefill=prefill, decode=decode, visible=visible, lend=dense.lend, read=read,
    models=FrozenDict({
        "gpt-oss-120b full": Config(**_GPT_OSS),
        "gpt-oss-120b window": Config(**_GPT_OSS, sliding_window=128),
    }),
    examples=(
        Config(hidden_size=12, num_attention_heads=4, num_key_value_heads=2, head_dim=6, rope_parameters=PLAIN,
               attention_bias=True, attention_output_bias=True),
        Config(hidden_size=12, num_attention_heads=6, num_key_value_heads=2, head_dim=4, rope_parameters=PLAIN,
               sliding_window=3),
    ),
)  # fmt: skip
