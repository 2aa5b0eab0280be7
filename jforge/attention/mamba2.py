"""Mamba-2: a state-space layer as linear attention, with C for queries, B for keys and delta x for values.

    x, B, C = silu(conv(u W_x | u W_B | u W_C))             N heads of x, V wide; K groups of B and C, H wide
    delta = softplus(u W_dt + dt) within the limits,     g = -exp(A) delta                         one a head
    S_t = e^g S_(t-1) + B_t (delta_t x_t)^T,    o_t = S_t^T C_t + skip x_t               a head reads its group's B, C
    y   = n(o, silu(u W_z)) W_o       n: w rms(o gate), (w rms(o)) gate, or o gate       rms over a group's heads

u are the layer's tokens. In the paper's letters the state is N by P: here H by V, and its skip is D. transformers keeps
the state transposed. The cache never grows: the state, float32, and the rows of x, B, C before their convolution.
Sources: Dao and Gu 2024 (arXiv 2405.21060); transformers' mamba2, bamba, granitemoehybrid, nemotron_h, falcon_h1 and
zamba2. transformers limits delta in prefill only; here it is limited in every step (docs/divergences.md).
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jforge.core import conv, recurrent
from jforge.core.attend import einsum
from jforge.core.attention import Attention
from jforge.core.config import Described, FrozenDict, one_of, positive, positive_ints, reject
from jforge.core.params import Params
from jforge.core.recurrent import Recurrence, Terms
from jforge.core.softmax import accumulation_dtype, common
from jforge.core.spec import CacheSpec
from jforge.core.step import Tokens
from jforge.cost import Work

NORMS = ("gate_first", "norm_first", None)


@dataclass(frozen=True, kw_only=True)
class Config(Described):
    """Field names are those of transformers' mamba2. No RoPE: the state knows the order.

    hidden_size: D, of the activations
    num_heads: N
    head_dim: V, of x (P in the paper)
    state_size: H, of B and C (N in the paper)
    n_groups: K, of B and C, a divisor of num_heads
    conv_kernel: L, taps of the convolution
    use_bias: of the projections in and out
    use_conv_bias: of the convolution
    time_step_limit: (lowest, highest) delta
    norm: "gate_first": the gate is inside the norm (Mamba-2); "norm_first": behind it (Falcon-H1); None: no norm
    rms_norm_eps: of that norm
    block_size: tokens of a block in prefill; the result does not depend on it
    """

    hidden_size: int
    num_heads: int
    head_dim: int
    state_size: int
    n_groups: int = 1
    conv_kernel: int = 4
    use_bias: bool = False
    use_conv_bias: bool = True
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    norm: str | None = None
    rms_norm_eps: float = 1e-5
    block_size: int = 64

    def __post_init__(self):
        positive_ints(self, "hidden_size", "num_heads", "head_dim", "state_size", "n_groups", "block_size")
        conv.kernel("conv_kernel", self.conv_kernel)
        if self.num_heads % self.n_groups:
            reject("num_heads", self.num_heads, f"a multiple of n_groups={self.n_groups}")
        limit = self.time_step_limit
        pair = isinstance(limit, (tuple, list)) and len(limit) == 2 and all(isinstance(x, (int, float)) for x in limit)
        if not pair or not 0 <= limit[0] < limit[1]:
            reject("time_step_limit", limit, "two numbers, the lower one first, neither negative")
        object.__setattr__(self, "time_step_limit", tuple(map(float, limit)))
        one_of("norm", self.norm, NORMS)
        positive("rms_norm_eps", self.rms_norm_eps)


def channels(cfg: Config) -> int:
    """X, of the convolution: x of all heads, B and C of all groups."""
    return cfg.num_heads * cfg.head_dim + 2 * cfg.n_groups * cfg.state_size


def shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """{parameter: shape} of a Config."""
    D, N, V, K, H = cfg.hidden_size, cfg.num_heads, cfg.head_dim, cfg.n_groups, cfg.state_size
    inward = {"z": (N, V), "x": (N, V), "k": (K, H), "q": (K, H), "dt": (N,)}
    out = {f"w{name}": (D, *shape) for name, shape in inward.items()}
    out |= {"w_conv": (cfg.conv_kernel, channels(cfg)), "a_log": (N,), "skip": (N,), "dt_bias": (N,), "wo": (N, V, D)}
    if cfg.use_bias:
        out |= {f"b{name}": shape for name, shape in inward.items()} | {"bo": (D,)}
    if cfg.use_conv_bias:
        out |= {"b_conv": (channels(cfg),)}
    return out | ({"o_norm": (N, V)} if cfg.norm else {})


def _into(params: Params, cfg: Config, u: Tokens, name: str) -> Array:
    """u W_name (+ b_name): B T and the axes of the heads."""
    w = params[f"w{name}"]
    out = einsum("btd,dx->btx", u, w.reshape(len(w), -1)).reshape(*u.shape[:2], *w.shape[1:])
    return out + params[f"b{name}"].astype(out.dtype) if cfg.use_bias else out


def terms(params: Params, cfg: Config, u: Tokens, held: Float[Array, "B P X"]) -> tuple[Terms, Array]:
    """What the tokens do to the state, the rows of the convolution up to them, and x for the skip."""
    N, V, K, H = cfg.num_heads, cfg.head_dim, cfg.n_groups, cfg.state_size
    raw = [jax.lax.collapse(_into(params, cfg, u, name), 2) for name in "xkq"]
    rows = conv.beside(held, jnp.concatenate(raw, axis=-1))
    mixed = jax.nn.silu(conv.convolve(rows, params["w_conv"], params.get("b_conv"))).astype(u.dtype)
    x, k, q = jnp.split(mixed, [N * V, N * V + K * H], axis=-1)
    q, k = (jnp.repeat(heads.reshape(*u.shape[:2], K, H), N // K, axis=2) for heads in (q, k))
    x, delta = x.reshape(*u.shape[:2], N, V), time_step(params, cfg, u)
    log_decay = -jnp.exp(params["a_log"].astype(delta.dtype)) * delta
    return Terms(q, k, (delta[..., None] * x.astype(delta.dtype)).astype(u.dtype), log_decay, rest=x), rows


def time_step(params: Params, cfg: Config, u: Tokens) -> Float[Array, "B T N"]:
    """delta, within the limits."""
    wide = accumulation_dtype(u)
    delta = jax.nn.softplus(_into(params, cfg, u, "dt").astype(wide) + params["dt_bias"].astype(wide))
    low, high = cfg.time_step_limit
    return delta if low == 0 and math.isinf(high) else jnp.clip(delta, low, high)


def project_out(params: Params, cfg: Config, u: Tokens, out, x: Float[Array, "B T N V"]) -> Tokens:
    """Skip, norm and gate, output projection."""
    out = out + params["skip"].astype(out.dtype)[:, None] * x
    out, gate = common(out, jax.nn.silu(_into(params, cfg, u, "z")))
    out = _grouped_norm(params, cfg, out * gate) if cfg.norm == "gate_first" else _grouped_norm(params, cfg, out) * gate
    y = einsum("btnv,nvd->btd", out, params["wo"])
    return y + params["bo"].astype(y.dtype) if cfg.use_bias else y


def _grouped_norm(params: Params, cfg: Config, out: Float[Array, "B T N V"]) -> Float[Array, "B T N V"]:
    """RMSNorm over the heads of each group together; out itself where there is no norm."""
    if cfg.norm is None:
        return out
    B, T, N, V = out.shape
    wide = out.astype(accumulation_dtype(out)).reshape(B, T, cfg.n_groups, N // cfg.n_groups, V)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=(-2, -1), keepdims=True) + cfg.rms_norm_eps)
    return (wide.reshape(out.shape) * params["o_norm"].astype(wide.dtype)).astype(out.dtype)


def cache_spec(cfg: Config) -> CacheSpec:
    return recurrent.cache_spec(cfg.num_heads, cfg.state_size, cfg.head_dim, cfg.conv_kernel, channels(cfg))


def work(cfg: Config, context: int, capacity: int, new: int, closing: bool) -> Work:
    """The state and the convolution's rows, read and written whole."""
    return recurrent.work(cache_spec(cfg), new, cfg.block_size, delta=False)


RECURRENCE = Recurrence(terms, project_out, cache_spec)
forward, prefill, decode = RECURRENCE.forward, RECURRENCE.prefill, RECURRENCE.decode

mamba2 = Attention(
    summary="state-space layers as linear attention (Mamba-2, Nemotron-H, Falcon-H1, Granite 4, Bamba)",
    traded="a matrix for the cache: nothing grows, and each token says how much of the past fades",
    Config=Config, shapes=shapes, cache_spec=cache_spec, work=work,
    forward=forward, prefill=prefill, decode=decode,
    models=FrozenDict({
        "Nemotron-H-8B": Config(hidden_size=4096, num_heads=128, head_dim=64, state_size=128, n_groups=8,
                                norm="gate_first", time_step_limit=(1e-3, math.inf)),
        "Nemotron-Nano-9B-v2": Config(hidden_size=4480, num_heads=128, head_dim=80, state_size=128, n_groups=8,
                                      norm="gate_first", time_step_limit=(1e-3, math.inf)),
        "Falcon-H1-1.5B": Config(hidden_size=2048, num_heads=48, head_dim=64, state_size=256),
        "Granite-4.0-H-Tiny": Config(hidden_size=1536, num_heads=48, head_dim=64, state_size=128,
                                     norm="gate_first"),
    }),
    examples=(
        Config(hidden_size=12, num_heads=4, head_dim=3, state_size=5, n_groups=2, norm="gate_first",
               block_size=5),
        Config(hidden_size=9, num_heads=3, head_dim=4, state_size=2, conv_kernel=3, use_bias=True,
               time_step_limit=(0.5, 0.9), norm="norm_first", block_size=4),
        Config(hidden_size=8, num_heads=2, head_dim=6, state_size=4, conv_kernel=2, use_conv_bias=False,
               block_size=7),
    ),
)  # fmt: skip
