"""Mamba: a selective state-space layer, in which each channel has a state vector and a decay for each of its entries.

    x = silu(conv(u W_x)),   z = u W_z                                                        I channels
    r, B, C = x W_r, x W_B, x W_C        each perhaps through an RMS norm; r is R wide, B and C are H wide
    delta = softplus(r W_dt + dt),     g = -exp(A) delta                                       A: I by H
    s_t = e^g s_(t-1) + (delta_t x_t) B_t,    o_t = s_t . C_t + skip x_t
    y   = (o silu(z)) W_o

u are the layer's tokens. Linear attention with a head a channel, keys B and queries C that all channels share, and
values of width 1, so `decode_linear` serves it with V = 1. In a block of a prefill an associative scan makes the
states. Cache: the state, float32, and the L - 1 rows of u W_x; it never grows.
Sources: Gu and Dao 2023 (arXiv 2312.00752); transformers' mamba, falcon_mamba and jamba. transformers starts from an
empty state in every call of several tokens (docs/divergences.md).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jforge.core import conv, recurrent
from jforge.core.attend import einsum
from jforge.core.attention import Attention
from jforge.core.config import Described, FrozenDict, one_of, positive, positive_ints
from jforge.core.norm import rms_norm
from jforge.core.params import Params
from jforge.core.recurrent import Recurrence, Terms
from jforge.core.softmax import accumulation_dtype, common
from jforge.core.spec import CacheSpec
from jforge.core.step import Tokens
from jforge.cost import Work


@dataclass(frozen=True, kw_only=True)
class Config(Described):
    """Field names are those of transformers' mamba. No RoPE: the state knows the order.

    hidden_size: D, of the activations
    intermediate_size: I, channels
    state_size: H, numbers a channel
    time_step_rank: R, of the projection to delta
    conv_kernel: L, taps of the convolution
    use_bias: of the projections in and out
    use_conv_bias: of the convolution
    norm: of r, B and C: "plain", without weights (Falcon-Mamba); "weighted" (Jamba); None (Mamba)
    rms_norm_eps: of these norms
    block_size: tokens of a block in prefill; the result does not depend on it
    """

    hidden_size: int
    intermediate_size: int
    state_size: int
    time_step_rank: int
    conv_kernel: int = 4
    use_bias: bool = False
    use_conv_bias: bool = True
    norm: str | None = None
    rms_norm_eps: float = 1e-6
    block_size: int = 64

    def __post_init__(self):
        positive_ints(self, "hidden_size", "intermediate_size", "state_size", "time_step_rank", "block_size")
        conv.kernel("conv_kernel", self.conv_kernel)
        one_of("norm", self.norm, (None, "plain", "weighted"))
        positive("rms_norm_eps", self.rms_norm_eps)


def shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """{parameter: shape} of a Config."""
    D, X, H, R = cfg.hidden_size, cfg.intermediate_size, cfg.state_size, cfg.time_step_rank
    out = {
        "wx": (D, X), "wz": (D, X), "w_conv": (cfg.conv_kernel, X), "w_dt_in": (X, R), "wk": (X, H), "wq": (X, H),
        "w_dt": (R, X), "dt_bias": (X,), "a_log": (X, H), "skip": (X,), "wo": (X, D),
    }  # fmt: skip
    if cfg.use_bias:
        out |= {"bx": (X,), "bz": (X,), "bo": (D,)}
    if cfg.use_conv_bias:
        out |= {"b_conv": (X,)}
    return out | ({"dt_norm": (R,), "k_norm": (H,), "q_norm": (H,)} if cfg.norm == "weighted" else {})


def _linear(params: Params, cfg: Config, u: Array, name: str) -> Array:
    y = einsum("btd,dx->btx", u, params[f"w{name}"])
    return y + params[f"b{name}"].astype(y.dtype) if cfg.use_bias else y


def terms(params: Params, cfg: Config, u: Tokens, held: Float[Array, "B P X"]) -> tuple[Terms, Array]:
    """What the tokens do to the state, the rows of the convolution up to them, and x for the skip."""
    rows = conv.beside(held, _linear(params, cfg, u, "x"))
    x = jax.nn.silu(conv.convolve(rows, params["w_conv"], params.get("b_conv"))).astype(u.dtype)
    r, k, q = (_normed(params, cfg, einsum("bti,ix->btx", x, params[w]), norm)
               for w, norm in (("w_dt_in", "dt_norm"), ("wk", "k_norm"), ("wq", "q_norm")))  # fmt: skip
    wide, heads = accumulation_dtype(u), (*x.shape, cfg.state_size)
    delta = jax.nn.softplus(einsum("btr,ri->bti", r, params["w_dt"]).astype(wide) + params["dt_bias"].astype(wide))
    log_decay = -jnp.exp(params["a_log"].astype(wide)) * delta[..., None]
    q, k = (jnp.broadcast_to(row[:, :, None].astype(u.dtype), heads) for row in (q, k))
    return Terms(q, k, (delta * x.astype(wide)).astype(u.dtype)[..., None], log_decay, rest=x), rows


def _normed(params: Params, cfg: Config, row: Array, name: str) -> Array:
    if cfg.norm is None:
        return row
    weight = params[name] if cfg.norm == "weighted" else jnp.ones(row.shape[-1], row.dtype)
    return rms_norm(row, weight, eps=cfg.rms_norm_eps)


def block(q, k, v, log_decay, beta, state: Float[Array, "B I H 1"]) -> tuple[Array, Array]:
    """(out, state) of a block: all states within it by an associative scan, s_i = a_i s_(i-1) + b_i."""
    q, k, v, log_decay = (a.astype(state.dtype) for a in (q, k, v, log_decay))

    def after(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    factor, added = jax.lax.associative_scan(after, (jnp.exp(log_decay), k * v), axis=1)
    states = factor * state[:, None, ..., 0] + added  # B m I H
    return einsum("bmih,bmih->bmi", states, q)[..., None], states[:, -1, ..., None]


def project_out(params: Params, cfg: Config, u: Tokens, out, x: Float[Array, "B T I"]) -> Tokens:
    """Skip, gate, output projection."""
    out = out[..., 0] + params["skip"].astype(out.dtype) * x
    out, gate = common(out, jax.nn.silu(_linear(params, cfg, u, "z")))
    return _linear(params, cfg, out * gate, "o")


def cache_spec(cfg: Config) -> CacheSpec:
    channels = cfg.intermediate_size
    return recurrent.cache_spec(channels, cfg.state_size, 1, cfg.conv_kernel, channels)


def work(cfg: Config, context: int, capacity: int, new: int, closing: bool) -> Work:
    """The state and the convolution's rows, read and written whole; 5 flops an entry of the state and a token."""
    per_token = cfg.intermediate_size * (5 * cfg.state_size + 2 * cfg.conv_kernel)
    return Work({"state": 1, "conv": 1}, {"state": 1, "conv": 1}, per_token * new, 1)


RECURRENCE = Recurrence(terms, project_out, cache_spec, block)
forward, prefill, decode = RECURRENCE.forward, RECURRENCE.prefill, RECURRENCE.decode

mamba1 = Attention(
    summary="selective state spaces: a vector a channel, each entry with its decay (Mamba, Falcon-Mamba, Jamba)",
    traded="a few numbers a channel for the cache: nothing grows, and channels do not share what they remember",
    Config=Config, shapes=shapes, cache_spec=cache_spec, work=work,
    forward=forward, prefill=prefill, decode=decode,
    models=FrozenDict({
        "Falcon-Mamba-7B": Config(hidden_size=4096, intermediate_size=8192, state_size=16, time_step_rank=256,
                                  norm="plain"),
        "Jamba-v0.1": Config(hidden_size=4096, intermediate_size=8192, state_size=16, time_step_rank=256,
                             norm="weighted"),
    }),
    examples=(
        Config(hidden_size=6, intermediate_size=10, state_size=3, time_step_rank=2, block_size=5),
        Config(hidden_size=5, intermediate_size=7, state_size=4, time_step_rank=3, conv_kernel=3, norm="weighted",
               use_bias=True, use_conv_bias=False, block_size=4),
        Config(hidden_size=4, intermediate_size=6, state_size=2, time_step_rank=2, norm="plain", block_size=3),
    ),
)  # fmt: skip
