"""One step of linear attention on a matrix state: decay, write, read."""

from jaxtyping import Array, Float

from jforge.core.attend import einsum
from jforge.ops import check


def decode_linear(
    q: Float[Array, "B N H"],
    k: Float[Array, "B N H"],
    v: Float[Array, "B N V"],
    state: Float[Array, "B N H V"],
    decay: Array,
    *,
    beta: Float[Array, "B N"] | None = None,
) -> tuple[Float[Array, "B N V"], Float[Array, "B N H V"]]:
    """S <- decay S;  u = v, or beta (v - S^T k);  S <- S + k u^T;  out = S^T q, all for one token a row.

    state: float32 (float64 here too), consumed: a backend may overwrite it. decay, a factor and not its log: N, B N, or
    B N H for one a key channel. beta: the delta rule. out has q's dtype. Returns (out, state).
    Sources: lightning attention (MiniMax-01, arXiv 2501.08313), DeltaNet, Gated DeltaNet, KDA.
    """
    check.decode_linear(q, k, v, state, decay, beta=beta)
    q_wide, k, v, decay = (a.astype(state.dtype) for a in (q, k, v, decay))
    factor = decay if decay.ndim > 1 else decay[None]
    state = state * factor.reshape(*factor.shape, *(1,) * (4 - factor.ndim))
    if beta is not None:
        v = beta.astype(state.dtype)[..., None] * (v - einsum("bnhv,bnh->bnv", state, k))
    state = state + k[..., None] * v[:, :, None]
    return einsum("bnhv,bnh->bnv", state, q_wide).astype(q.dtype), state
