"""Gated short convolution: each channel mixes its last few tokens, between two gates.

    y = (C * conv(B * (x W_x))) W_o,      B = x W_b,   C = x W_c          * channel by channel, L taps, no activation

Cache: the last L - 1 rows of B * (x W_x) and nothing else; it never grows. Every layer of the stack that holds it has
no other memory, so a token sees the last L.
Source: LFM2 (Liquid AI 2025), transformers' lfm2, lfm2_moe and lfm3.
"""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float

import jforge.ops as jax_ops
from jforge.core import conv, linear, masks
from jforge.core.attend import einsum
from jforge.core.attention import Attention
from jforge.core.config import Described, FrozenDict, positive_ints
from jforge.core.params import Params
from jforge.core.softmax import common
from jforge.core.spec import CacheSpec, cache_class
from jforge.core.step import Tokens, all_of, begin, end, few_tokens
from jforge.cost import Work


@dataclass(frozen=True, kw_only=True)
class Config(Described):
    """Field names follow Hugging Face. No RoPE: the taps know the order.

    hidden_size: D, of the activations and of the convolution
    conv_L_cache: L, taps of the convolution
    conv_bias: of the projections and of the convolution
    block_size: tokens of a block in prefill; the result does not depend on it
    """

    hidden_size: int
    conv_L_cache: int = 3
    conv_bias: bool = False
    block_size: int = 1024

    def __post_init__(self):
        positive_ints(self, "hidden_size", "block_size")
        conv.kernel("conv_L_cache", self.conv_L_cache)


@cache_class
class Tail:
    """The inputs of the last convolutions."""

    conv: jax.Array  # B P X, the oldest first
    length: jax.Array  # int32[B]


def shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """{parameter: shape} of a Config."""
    D = cfg.hidden_size
    out = {**dict.fromkeys(("wb", "wc", "wx"), (D, D)), "w_conv": (cfg.conv_L_cache, D), "wo": (D, D)}
    return out | (dict.fromkeys(("bb", "bc", "bx", "b_conv", "bo"), (D,)) if cfg.conv_bias else {})


def visible(cfg: Config, q_pos: Array, k_pos: Array) -> Array:
    """The last L tokens up to the query's own."""
    return masks.window(q_pos, k_pos, cfg.conv_L_cache)


def _linear(params: Params, cfg: Config, x: Tokens, name: str) -> Tokens:
    y = einsum("btd,dx->btx", x, params[f"w{name}"])
    return y + params[f"b{name}"].astype(y.dtype) if cfg.conv_bias else y


def mix(params: Params, cfg: Config, x: Tokens, held: Float[Array, "B P X"]) -> tuple[Tokens, Float[Array, "B U X"]]:
    """(y, the rows of the convolution up to the tokens)."""
    rows = conv.beside(held, _linear(params, cfg, x, "b") * _linear(params, cfg, x, "x"))
    mixed = conv.convolve(rows, params["w_conv"], params.get("b_conv")).astype(x.dtype)
    mixed, gate = common(mixed, _linear(params, cfg, x, "c"))
    return _linear(params, cfg, gate * mixed, "o").astype(x.dtype), rows


def forward(params: Params, cfg: Config, x: Tokens, positions=None) -> Tokens:
    """The definition. There is no RoPE, so `positions` change nothing."""
    all_of(cfg, x, positions)
    return mix(params, cfg, x, conv.held(cfg.conv_L_cache, x, cfg.hidden_size))[0]


def prefill(params: Params, cfg: Config, x: Tokens, cache: Tail, lengths=None) -> tuple[Tokens, Tail]:
    """Take T tokens (row b its first lengths[b]), block by block."""
    step = begin(cfg, cache_spec(cfg), x, cache, lengths)

    def block(held, x, keep):
        y, rows = mix(params, cfg, x, held)
        return conv.keep_last(rows, keep), y

    y, held = linear.blockwise(block, cache.conv, max(1, min(cfg.block_size, x.shape[1])), step.x, step.keep)
    return end(step, y, x.dtype), Tail(held, step.length)


def decode(params: Params, cfg: Config, x: Tokens, cache: Tail, ops=jax_ops) -> tuple[Tokens, Tail]:
    """1 to 16 tokens a row at once. There is no op to call: a dot product of L taps a channel."""
    step = begin(cfg, cache_spec(cfg), few_tokens(x), cache)
    y, rows = mix(params, cfg, step.x, cache.conv)
    return end(step, y, x.dtype), Tail(conv.keep_last(rows, step.keep), step.length)


def cache_spec(cfg: Config) -> CacheSpec:
    return CacheSpec(Tail, {"conv": conv.buffer(cfg.conv_L_cache, cfg.hidden_size)})


def work(cfg: Config, context: int, capacity: int, new: int, closing: bool) -> Work:
    """The rows, read and written whole; L taps a channel."""
    return Work({"conv": 1}, {"conv": 1}, 2 * cfg.conv_L_cache * cfg.hidden_size * new, 1)


short_conv = Attention(
    summary="a gated convolution over the last few tokens (LFM2, LFM3)",
    traded="everything but the last tokens: the layers of attention between these must remember the rest",
    Config=Config, shapes=shapes, cache_spec=cache_spec, work=work,
    forward=forward, prefill=prefill, decode=decode, visible=visible,
    models=FrozenDict({
        "LFM2-1.2B": Config(hidden_size=2048),
        "LFM3-1.7B": Config(hidden_size=2048, conv_L_cache=7),
    }),
    examples=(
        Config(hidden_size=7, block_size=4),
        Config(hidden_size=6, conv_L_cache=5, conv_bias=True, block_size=3),
    ),
)  # fmt: skip
