"""Lightning attention: linear attention with a fixed decay for each head; the cache is one matrix a head.

    q, k, v = silu(x W_q), silu(x W_k), silu(x W_v)
    S_t = lambda S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t            the current token is not decayed
    y   = (sigmoid(x W_g) * rms(o)) W_o                            rms over all N H channels
    lambda_n = exp(-slope_n),  slope_n = 2^(-8 (n+1) / N) (1 - l / (L - 1 + 1e-5) + 1e-5)   in layer l of L

Three equal forms: the recurrence (decode), a sum over all pairs (`forward`), and blocks (`prefill`): products inside a
block, the state between blocks, so that the work is that of matrices and the memory that of a block.

No RoPE, no softmax, no scale. The state is float32 whatever the cache's dtype; it never grows and never overflows.

Sources: MiniMax-01 (arXiv 2501.08313), transformers' minimax. Head counts that are no power of two take ALiBi's slopes
between those of two powers, as the original code does. Padding after a row's tokens neither enters nor decays S.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

import jforge.ops as jax_ops
from jforge.core import linear
from jforge.core.attend import einsum, over_queries
from jforge.core.attention import Attention
from jforge.core.config import Derived, FrozenDict, positive, positive_int, positive_ints, reject
from jforge.core.norm import rms_norm
from jforge.core.params import Params
from jforge.core.softmax import accumulation_dtype
from jforge.core.spec import Buffer, CacheSpec, cache_class
from jforge.core.step import Tokens, all_of, begin, end, few_tokens, one_by_one, several
from jforge.cost import Work


@dataclass(frozen=True, kw_only=True)
class Config(Derived):
    """Field names follow Hugging Face where it has the field. No RoPE: the decay alone knows the order.

    hidden_size: D, of the activations
    num_attention_heads: N
    head_dim: H, of queries, keys and values; None: hidden_size // num_attention_heads
    layer_index: l, among all layers of the model; the decay follows from it
    num_hidden_layers: L, of the model
    block_size: tokens of a block in prefill; the result does not depend on it
    rms_norm_eps: of the output's norm
    """

    hidden_size: int
    num_attention_heads: int
    head_dim: int | None = None
    layer_index: int = 0
    num_hidden_layers: int = 80
    block_size: int = 256
    rms_norm_eps: float = 1e-6

    def __post_init__(self):
        positive_ints(self, "hidden_size", "num_attention_heads", "num_hidden_layers", "block_size")
        heads = self.num_attention_heads
        self._derive("head_dim", None if self.hidden_size % heads else self.hidden_size // heads)
        if self.head_dim is None:
            reject("head_dim", None, "given: hidden_size is no multiple of num_attention_heads")
        positive_int("head_dim", self.head_dim)
        index = self.layer_index
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < self.num_hidden_layers:
            reject("layer_index", index, f"an integer in 0..num_hidden_layers - 1 = {self.num_hidden_layers - 1}")
        positive("rms_norm_eps", self.rms_norm_eps)


@cache_class
class State:
    """The sum of k v^T over the tokens seen, older ones decayed."""

    state: jax.Array  # B N H H (key channel, value channel), float32 or wider
    length: jax.Array  # int32[B]


def slopes(cfg: Config) -> np.ndarray:
    """float64 [N]: how fast each head forgets, in natural-log units a token."""
    factor = 1 - cfg.layer_index / (cfg.num_hidden_layers - 1 + 1e-5) + 1e-5
    return _geometric(cfg.num_attention_heads) * factor


def _geometric(heads: int) -> np.ndarray:
    lower = 2 ** int(math.log2(heads))
    out = 2.0 ** (-8 * np.arange(1, lower + 1) / lower)
    return out if lower == heads else np.concatenate([out, _geometric(2 * lower)[::2][: heads - lower]])


def decay_of(cfg: Config, dtype=jnp.float32) -> Float[Array, "N"]:
    """The factor lambda of each head."""
    return jnp.asarray(np.exp(-slopes(cfg)), dtype)


def shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """{parameter: shape} of a Config."""
    D, N, H = cfg.hidden_size, cfg.num_attention_heads, cfg.head_dim
    return {**{name: (D, N, H) for name in ("wq", "wk", "wv", "wg")}, "o_norm": (N, H), "wo": (N, H, D)}


def project(params: Params, x: Tokens) -> list[Float[Array, "B T N H"]]:
    """q, k, v of the new tokens."""
    return [jax.nn.silu(einsum("btd,dnh->btnh", x, params[w])) for w in ("wq", "wk", "wv")]


def project_out(params: Params, cfg: Config, x: Tokens, out: Float[Array, "B T N H"]) -> Array:
    gate = jax.nn.sigmoid(einsum("btd,dnh->btnh", x, params["wg"]))
    return einsum("btnh,nhd->btd", gate * rms_norm(out, params["o_norm"], eps=cfg.rms_norm_eps), params["wo"])


def quadratic(q, k, v, slope: Float[Array, "N"], order: Int[Array, "T"]) -> Float[Array, "B T N V"]:
    """o_t = sum over s <= t of lambda^(t-s) (q_t . k_s) v_s, for the queries at `order` of keys from 0 on."""
    wide = accumulation_dtype(q)
    q, k, v = (a.astype(wide) for a in (q, k, v))
    distance = (order[:, None] - jnp.arange(k.shape[1]))[:, None]  # T 1 S
    weights = jnp.where(distance >= 0, jnp.exp(-slope[:, None] * jnp.maximum(distance, 0).astype(wide)), 0)
    return einsum("btns,bsnv->btnv", einsum("btnh,bsnh->btns", q, k) * weights, v)


def one_block(
    q, k, v, keep: Bool[Array, "B T"], slope: Float[Array, "N"], state: Float[Array, "B N H V"]
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N H V"]]:
    """(out, state) of a block. Tokens that are not kept have no decay and no key: they leave the state as it is."""
    log = jnp.where(keep[..., None], -slope, 0)
    return linear.block(q, jnp.where(keep[..., None, None], k, 0), v, log, None, state)


def forward(params: Params, cfg: Config, x: Tokens, positions=None) -> Tokens:
    """The definition, in the quadratic form. There is no RoPE, so `positions` change nothing."""
    rows = all_of(cfg, x, positions)
    _, k, v = project(params, x)
    slope = jnp.asarray(slopes(cfg), accumulation_dtype(k))

    def block(rows, _):
        x, order = rows
        out = quadratic(project(params, x)[0], k, v, slope, order[0]).astype(x.dtype)
        return project_out(params, cfg, x, out).astype(x.dtype)

    return over_queries(block, (x, rows.order), cfg.num_attention_heads * x.shape[0] * x.shape[1])


def prefill(params: Params, cfg: Config, x: Tokens, cache: State, lengths=None) -> tuple[Tokens, State]:
    """Take T tokens (row b its first lengths[b]) into the state, block by block."""
    step = begin(cfg, cache_spec(cfg), x, cache, lengths)
    slope = jnp.asarray(slopes(cfg), cache.state.dtype)

    def block(state, x, keep):
        out, state = one_block(*project(params, x), keep, slope, state)
        return state, project_out(params, cfg, x, out.astype(x.dtype)).astype(x.dtype)

    y, state = linear.blockwise(block, cache.state, max(1, min(cfg.block_size, x.shape[1])), step.x, step.keep)
    return end(step, y, x.dtype), State(state, step.length)


def decode(params: Params, cfg: Config, x: Tokens, cache: State, ops=jax_ops) -> tuple[Tokens, State]:
    """Steps of the recurrence through `ops.decode_linear`, which may overwrite the state."""
    if several(x):
        return one_by_one(decode, cache_spec(cfg), params, cfg, x, cache, ops)
    step = begin(cfg, cache_spec(cfg), few_tokens(x), cache)
    q, k, v = (a[:, 0] for a in project(params, step.x))
    out, state = ops.decode_linear(q, k, v, cache.state, decay_of(cfg, cache.state.dtype))
    return end(step, project_out(params, cfg, step.x, out[:, None]), x.dtype), State(state, step.length)


def cache_spec(cfg: Config) -> CacheSpec:
    N, H = cfg.num_attention_heads, cfg.head_dim
    return CacheSpec(State, {"state": Buffer(("B", "N", "H", "H"), (N, H, H), every=None, dtype="float32")})


def work(cfg: Config, context: int, capacity: int, new: int, closing: bool) -> Work:
    """One step, or a block of a prefill, reads and writes the whole state."""
    N, H = cfg.num_attention_heads, cfg.head_dim
    flops = linear.flops(N, H, H, new, cfg.block_size, delta=False)
    return Work({"state": 1}, {"state": 1}, flops, 1)


lightning = Attention(
    summary="linear attention with a fixed decay a head: one matrix is the cache (MiniMax-Text-01, M1)",
    traded="a matrix for the cache: nothing grows, and old tokens fade at a rate that no data changes",
    Config=Config, shapes=shapes, cache_spec=cache_spec, work=work,
    forward=forward, prefill=prefill, decode=decode,
    models=FrozenDict({"MiniMax-Text-01": Config(hidden_size=6144, num_attention_heads=64, head_dim=128)}),
    examples=(
        Config(hidden_size=12, num_attention_heads=4, head_dim=5, layer_index=1, num_hidden_layers=4, block_size=4),
        Config(hidden_size=9, num_attention_heads=3, num_hidden_layers=2, block_size=3),
    ),
)  # fmt: skip
