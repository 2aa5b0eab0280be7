"""Layers small enough to experiment on: a mechanism's first example, at sizes at which 64 tokens show what it does."""

from dataclasses import fields, replace
from typing import Any, NamedTuple

import jax
import numpy as np

import jforge
from jforge.core.attention import Attention
from jforge.slots import random_layer

TOKENS = 64
SIZES = {
    "sliding_window": 16, "attention_chunk_size": 16, "start_size": 4, "recent_size": 12, "block_size": 8,
    "moba_chunk_size": 8, "moba_topk": 3, "kernel_size": 8, "kernel_stride": 4, "topk": 3, "window_size": 8,
    "index_topk": 6, "index_block_size": 8, "index_topk_blocks": 3, "compress_rate": 4,
}  # fmt: skip
"""By the field of a Config: windows of a quarter of the row, blocks of an eighth, a few picks."""


class Toy(NamedTuple):
    """A layer and a row of tokens for it, in float32."""

    att: Attention
    cfg: Any
    params: dict[str, jax.Array]
    x: np.ndarray  # 1 T D


def toy(name: str, tokens: int = TOKENS) -> Toy:
    """The mechanism's first example, with the SIZES that its Config has and does not leave out (None), random weights
    and `tokens` random tokens: the same at every call.
    """
    att = jforge.get(name)
    cfg = att.examples[0]
    ours = {f.name for f in fields(cfg) if f.init and getattr(cfg, f.name) is not None}
    cfg = replace(cfg, **{field: size for field, size in SIZES.items() if field in ours})
    return Toy(att, cfg, *random_layer(att, cfg, tokens))


def sizes(cfg) -> str:
    """The SIZES that are the Config's own, in words."""
    shown = [(n, getattr(cfg, n)) for n in SIZES if getattr(cfg, n, None) is not None]
    return ", ".join(f"{n} {value}" for n, value in shown)
