"""Kimi Delta Attention: the delta rule with a decay of its own for every key channel.

    q, k, v = silu(conv(x W_q | x W_k | x W_v)),    q <- q / |q| / sqrt(H),  k <- k / |k|
    f = x W_f,   g = -exp(A_n) softplus(f + dt),   or bounded   g = lower sigmoid(exp(A_n) (f + dt))       B T N H
    S_t = e^g S_(t-1) + k_t u_t^T,   u_t = beta (v_t - (e^g S_(t-1))^T k_t),   o_t = S_t^T q_t,   beta = sigmoid(x W_b)
    y   = (w rms(o) sigmoid(x W_g)) W_o                                                  rms over the H of a head

e^g multiplies the rows of S, one factor a key channel. W_f and W_g are products of two matrices through H channels
where `low_rank` says so. Cache: the state, float32, and the L - 1 rows before their convolution; nothing grows.
Sources: Kimi Linear (arXiv 2510.26692), transformers' kimi_linear, glm5_next and bailing_hybrid.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jforge.core import conv, recurrent
from jforge.core.attend import einsum
from jforge.core.attention import Attention
from jforge.core.config import Described, FrozenDict, positive, positive_ints, reject
from jforge.core.norm import l2_norm, rms_norm
from jforge.core.params import Params
from jforge.core.recurrent import Recurrence, Terms
from jforge.core.softmax import accumulation_dtype, common
from jforge.core.spec import CacheSpec
from jforge.core.step import Tokens
from jforge.cost import Work


@dataclass(frozen=True, kw_only=True)
class Config(Described):
    """Field names follow Hugging Face. No RoPE: the state knows the order.

    hidden_size: D, of the activations
    linear_num_heads: N
    linear_head_dim: H, of queries, keys and values
    linear_conv_kernel_dim: L, taps of the convolution
    linear_lower_bound: of the log decay, a negative number (GLM, Ling: -5); None: a softplus, without a bound (Kimi)
    low_rank: whether the decay's input and the output gate go through H channels (Kimi, GLM)
    rms_norm_eps: of the output's norm
    block_size: tokens of a block in prefill; the result does not depend on it
    """

    hidden_size: int
    linear_num_heads: int
    linear_head_dim: int
    linear_conv_kernel_dim: int = 4
    linear_lower_bound: float | None = None
    low_rank: bool = True
    rms_norm_eps: float = 1e-6
    block_size: int = 32

    def __post_init__(self):
        positive_ints(self, "hidden_size", "linear_num_heads", "linear_head_dim", "block_size")
        conv.kernel("linear_conv_kernel_dim", self.linear_conv_kernel_dim)
        bound = self.linear_lower_bound
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, (int, float)) or not bound < 0):
            reject("linear_lower_bound", bound, "a negative number or None")
        positive("rms_norm_eps", self.rms_norm_eps)


def shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """{parameter: shape} of a Config."""
    D, N, H = cfg.hidden_size, cfg.linear_num_heads, cfg.linear_head_dim
    out = dict.fromkeys(("wq", "wk", "wv"), (D, N, H)) | {"wb": (D, N)}
    for w in ("wf", "wg"):
        out |= {f"{w}_a": (D, H), f"{w}_b": (H, N, H)} if cfg.low_rank else {w: (D, N, H)}
    return out | {
        "w_conv": (cfg.linear_conv_kernel_dim, 3 * N * H), "a_log": (N,), "dt_bias": (N, H), "o_norm": (H,),
        "wo": (N, H, D),
    }  # fmt: skip


def _through(params: Params, cfg: Config, x: Tokens, w: str) -> Float[Array, "B T N H"]:
    """x W, whether W is one matrix or two."""
    if not cfg.low_rank:
        return einsum("btd,dnh->btnh", x, params[w])
    return einsum("btc,cnh->btnh", einsum("btd,dc->btc", x, params[f"{w}_a"]).astype(x.dtype), params[f"{w}_b"])


def terms(params: Params, cfg: Config, x: Tokens, held: Float[Array, "B P X"]) -> tuple[Terms, Array]:
    """What the tokens do to the state, and the rows of the convolution up to them."""
    heads = *x.shape[:2], cfg.linear_num_heads, cfg.linear_head_dim
    raw = [jax.lax.collapse(einsum("btd,dnh->btnh", x, params[w]), 2) for w in ("wq", "wk", "wv")]
    rows = conv.beside(held, jnp.concatenate(raw, axis=-1))
    mixed = jax.nn.silu(conv.convolve(rows, params["w_conv"])).astype(x.dtype)
    q, k, v = (part.reshape(heads) for part in jnp.split(mixed, 3, axis=-1))
    q, beta = l2_norm(q) * cfg.linear_head_dim**-0.5, einsum("btd,dn->btn", x, params["wb"])
    beta = jax.nn.sigmoid(beta.astype(accumulation_dtype(x)))
    return Terms(q, l2_norm(k), v, log_decay(params, cfg, x), beta), rows


def log_decay(params: Params, cfg: Config, x: Tokens) -> Float[Array, "B T N H"]:
    """g, from the bound to 0."""
    wide = accumulation_dtype(x)
    f = _through(params, cfg, x, "wf").astype(wide) + params["dt_bias"].astype(wide)
    rate = jnp.exp(params["a_log"].astype(wide))[:, None]
    if cfg.linear_lower_bound is None:
        return -rate * jax.nn.softplus(f)
    return cfg.linear_lower_bound * jax.nn.sigmoid(rate * f)


def project_out(params: Params, cfg: Config, x: Tokens, out: Float[Array, "B T N H"], rest=None) -> Tokens:
    """Norm of each head, gate, output projection."""
    gate = jax.nn.sigmoid(_through(params, cfg, x, "wg"))
    out, gate = common(rms_norm(out, params["o_norm"], eps=cfg.rms_norm_eps), gate)
    return einsum("btnh,nhd->btd", out * gate, params["wo"])


def cache_spec(cfg: Config) -> CacheSpec:
    N, H = cfg.linear_num_heads, cfg.linear_head_dim
    return recurrent.cache_spec(N, H, H, cfg.linear_conv_kernel_dim, 3 * N * H)


def work(cfg: Config, context: int, capacity: int, new: int, closing: bool) -> Work:
    """The state and the convolution's rows, read and written whole."""
    return recurrent.work(cache_spec(cfg), new, cfg.block_size, delta=True)


RECURRENCE = Recurrence(terms, project_out, cache_spec)
forward, prefill, decode = RECURRENCE.forward, RECURRENCE.prefill, RECURRENCE.decode

kda = Attention(
    summary="the delta rule with a decay for every key channel (Kimi-Linear, GLM-5.3-Flash, Ling)",
    traded="a matrix for the cache: nothing grows, and each channel of a key fades as the token says",
    Config=Config, shapes=shapes, cache_spec=cache_spec, work=work,
    forward=forward, prefill=prefill, decode=decode,
    models=FrozenDict({
        "Kimi-Linear-48B-A3B": Config(hidden_size=2304, linear_num_heads=32, linear_head_dim=128, rms_norm_eps=1e-5),
        "GLM-5.3-Flash": Config(hidden_size=4096, linear_num_heads=64, linear_head_dim=128, linear_lower_bound=-5.0,
                                rms_norm_eps=1e-5),
    }),
    examples=(
        Config(hidden_size=12, linear_num_heads=3, linear_head_dim=4, block_size=5),
        Config(hidden_size=9, linear_num_heads=2, linear_head_dim=5, linear_conv_kernel_dim=3, block_size=4,
               linear_lower_bound=-5.0, low_rank=False),
    ),
)  # fmt: skip
