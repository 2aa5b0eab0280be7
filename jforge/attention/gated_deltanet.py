"""Gated DeltaNet: a matrix state that forgets by a gate and writes the error of what it knows.

    q, k, v = silu(conv(x W_q | x W_k | x W_v)),    q <- q / |q| / sqrt(H),  k <- k / |k|
    beta = sigmoid(x W_b)      g = -exp(A) softplus(x W_a + dt)                           one of each a value head
    S_t = e^g S_(t-1) + k_t u_t^T,    u_t = beta (v_t - (e^g S_(t-1))^T k_t),    o_t = S_t^T q_t
    y   = (w rms(o) silu(x W_g)) W_o                                                      rms over the V of a head

K key heads serve N value heads, N / K each. With `linear_allow_neg_eigval` beta is twice the sigmoid, so that e^g (1 -
beta), by which the state along k is multiplied, may be negative.

Cache: the state, float32, and the L - 1 rows before their convolution; nothing grows. Sources: Yang et al. 2024 (arXiv
2412.06464), transformers' qwen3_next, qwen3_5 and olmo_hybrid.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jforge.core import conv, recurrent
from jforge.core.attend import einsum
from jforge.core.attention import Attention
from jforge.core.config import Described, FrozenDict, one_of, positive, positive_ints, reject
from jforge.core.norm import l2_norm, rms_norm
from jforge.core.params import Params
from jforge.core.recurrent import Recurrence, Terms
from jforge.core.softmax import accumulation_dtype, common
from jforge.core.spec import CacheSpec
from jforge.core.step import Tokens
from jforge.cost import Work

GATES = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


@dataclass(frozen=True, kw_only=True)
class Config(Described):
    """Field names follow Hugging Face. No RoPE: the state knows the order.

    hidden_size: D, of the activations
    linear_num_key_heads: K
    linear_num_value_heads: N, a multiple of K
    linear_key_head_dim: H, of queries and keys
    linear_value_head_dim: V, of values
    linear_conv_kernel_dim: L, taps of the convolution
    linear_allow_neg_eigval: beta up to 2 (Olmo-Hybrid)
    output_gate_type: "silu" or "sigmoid"
    rms_norm_eps: of the output's norm
    block_size: tokens of a block in prefill; the result does not depend on it
    """

    hidden_size: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int = 4
    linear_allow_neg_eigval: bool = False
    output_gate_type: str = "silu"
    rms_norm_eps: float = 1e-6
    block_size: int = 64

    def __post_init__(self):
        positive_ints(self, "hidden_size", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
                      "linear_value_head_dim", "block_size")  # fmt: skip
        conv.kernel("linear_conv_kernel_dim", self.linear_conv_kernel_dim)
        if self.linear_num_value_heads % self.linear_num_key_heads:
            allowed = f"a multiple of linear_num_key_heads={self.linear_num_key_heads}"
            reject("linear_num_value_heads", self.linear_num_value_heads, allowed)
        one_of("output_gate_type", self.output_gate_type, tuple(GATES))
        positive("rms_norm_eps", self.rms_norm_eps)


def _sizes(cfg: Config) -> tuple[int, int, int, int]:
    """K, N, H, V."""
    heads = cfg.linear_num_key_heads, cfg.linear_num_value_heads
    return *heads, cfg.linear_key_head_dim, cfg.linear_value_head_dim


def channels(cfg: Config) -> int:
    """X, of the convolution: all queries, all keys, all values."""
    K, N, H, V = _sizes(cfg)
    return 2 * K * H + N * V


def shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """{parameter: shape} of a Config."""
    D, (K, N, H, V) = cfg.hidden_size, _sizes(cfg)
    return {
        "wq": (D, K, H), "wk": (D, K, H), "wv": (D, N, V), "wg": (D, N, V), "wb": (D, N), "wa": (D, N),
        "w_conv": (cfg.linear_conv_kernel_dim, channels(cfg)), "a_log": (N,), "dt_bias": (N,), "o_norm": (V,),
        "wo": (N, V, D),
    }  # fmt: skip


def terms(params: Params, cfg: Config, x: Tokens, held: Float[Array, "B P X"]) -> tuple[Terms, Array]:
    """What the tokens do to the state, and the rows of the convolution up to them."""
    K, N, H, V = _sizes(cfg)
    raw = [jax.lax.collapse(einsum("btd,dnh->btnh", x, params[w]), 2) for w in ("wq", "wk", "wv")]
    rows = conv.beside(held, jnp.concatenate(raw, axis=-1))
    mixed = jax.nn.silu(conv.convolve(rows, params["w_conv"])).astype(x.dtype)
    q, k, v = jnp.split(mixed, [K * H, 2 * K * H], axis=-1)
    q, k = (l2_norm(heads.reshape(*x.shape[:2], K, H)) for heads in (q, k))
    q, k = (jnp.repeat(heads, N // K, axis=2) for heads in (q * H**-0.5, k))
    return Terms(q, k, v.reshape(*x.shape[:2], N, V), log_decay(params, x), beta(params, cfg, x)), rows


def beta(params: Params, cfg: Config, x: Tokens) -> Float[Array, "B T N"]:
    """The share of the error that is written."""
    logits = einsum("btd,dn->btn", x, params["wb"])
    return jax.nn.sigmoid(logits.astype(accumulation_dtype(x))) * (2 if cfg.linear_allow_neg_eigval else 1)


def log_decay(params: Params, x: Tokens) -> Float[Array, "B T N"]:
    """g, at most 0."""
    wide = accumulation_dtype(x)
    a = einsum("btd,dn->btn", x, params["wa"]).astype(wide) + params["dt_bias"].astype(wide)
    return -jnp.exp(params["a_log"].astype(wide)) * jax.nn.softplus(a)


def project_out(params: Params, cfg: Config, x: Tokens, out: Float[Array, "B T N V"], rest=None) -> Tokens:
    """Norm of each head, gate, output projection."""
    gate = GATES[cfg.output_gate_type](einsum("btd,dnv->btnv", x, params["wg"]))
    out, gate = common(rms_norm(out, params["o_norm"], eps=cfg.rms_norm_eps), gate)
    return einsum("btnv,nvd->btd", out * gate, params["wo"])


def cache_spec(cfg: Config) -> CacheSpec:
    _, N, H, V = _sizes(cfg)
    return recurrent.cache_spec(N, H, V, cfg.linear_conv_kernel_dim, channels(cfg))


def work(cfg: Config, context: int, capacity: int, new: int, closing: bool) -> Work:
    """The state and the convolution's rows, read and written whole."""
    return recurrent.work(cache_spec(cfg), new, cfg.block_size, delta=True)


RECURRENCE = Recurrence(terms, project_out, cache_spec)
forward, prefill, decode = RECURRENCE.forward, RECURRENCE.prefill, RECURRENCE.decode

gated_deltanet = Attention(
    summary="a matrix state with a gate and the delta rule (Qwen3-Next, Qwen3.5, Olmo-Hybrid)",
    traded="a matrix for the cache: nothing grows, and a new value replaces the one that its key had before",
    Config=Config, shapes=shapes, cache_spec=cache_spec, work=work,
    forward=forward, prefill=prefill, decode=decode,
    models=FrozenDict({
        "Qwen3-Next-80B-A3B": Config(hidden_size=2048, linear_num_key_heads=16, linear_num_value_heads=32,
                                     linear_key_head_dim=128, linear_value_head_dim=128),
        "Olmo-Hybrid-7B": Config(hidden_size=3840, linear_num_key_heads=30, linear_num_value_heads=30,
                                 linear_key_head_dim=96, linear_value_head_dim=192, linear_allow_neg_eigval=True),
    }),
    examples=(
        Config(hidden_size=12, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=5,
               linear_value_head_dim=3, block_size=5),
        Config(hidden_size=9, linear_num_key_heads=1, linear_num_value_heads=3, linear_key_head_dim=4,
               linear_value_head_dim=6, linear_conv_kernel_dim=2, linear_allow_neg_eigval=True,
               output_gate_type="sigmoid", block_size=4),
    ),
)  # fmt: skip
