"""Linear attention in blocks: products inside a block of tokens, one matrix state between blocks.

    S_t = exp(g_t) S_(t-1) + k_t u_t^T,   o_t = S_t^T q_t,   u_t = v_t, or beta_t (v_t - (exp(g_t) S_(t-1))^T k_t)

With c_i the log decay since the block began, token i's own included, and M(a, b)_ij = sum over the key channels h of
a_ih b_jh exp(c_ih - c_jh), whose exponents are never positive for j <= i, so that nothing overflows:

    (I + strictly lower (beta M(k, k))) U = beta (V - (k exp(c)) S)      or U = V without a delta rule
    O = (q exp(c)) S + lower (M(q, k)) U,       S <- exp(c_m) S + sum over j of (k_j exp(c_m - c_j)) u_j^T

The decay is one number a head, or one a key channel. Sources: Yang et al. 2024 (arXiv 2406.06484, 2412.06464) and KDA
(arXiv 2510.26692) for the delta rule in blocks, MiniMax-01 and Mamba-2 (arXiv 2405.21060) without it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jforge.core.attend import einsum

Decay = Float[Array, "B m N"] | Float[Array, "B m N H"]


def block(
    q: Float[Array, "B m N H"],
    k: Float[Array, "B m N H"],
    v: Float[Array, "B m N V"],
    log_decay: Decay,
    beta: Float[Array, "B m N"] | None,
    state: Float[Array, "B N H V"],
) -> tuple[Float[Array, "B m N V"], Float[Array, "B N H V"]]:
    """(out, state) of the tokens of a block, in the state's dtype. One without decay whose v, or beta, is 0 leaves the
    state as it is: a pad.
    """
    q, k, v, log_decay = (a.astype(state.dtype) for a in (q, k, v, log_decay))
    log = jnp.cumsum(log_decay, axis=1)
    log = log if log.ndim == 4 else log[..., None]
    if beta is not None:
        v = _written(k, v, log, beta.astype(state.dtype), state)
    out = einsum("bnij,bjnv->binv", _met(q, k, log), v) + einsum("binh,bnhv->binv", q * jnp.exp(log), state)
    last = log[:, -1:]
    added = einsum("bjnh,bjnv->bnhv", k * jnp.exp(last - log), v)
    return out, jnp.exp(last[:, 0])[..., None] * state + added


def _written(k, v, log, beta, state) -> Float[Array, "B m N V"]:
    """U: what each token adds at its key, which depends on what those before it in the block have added."""
    known = einsum("bjnh,bnhv->bjnv", k * jnp.exp(log), state)
    right = jnp.moveaxis(beta[..., None] * (v - known), 2, 1)  # B N m V
    lower = jnp.moveaxis(beta, 2, 1)[..., None] * _met(k, k, log)  # the diagonal is taken for 1
    solved = jax.lax.linalg.triangular_solve(lower, right, left_side=True, lower=True, unit_diagonal=True)
    return jnp.moveaxis(solved, 1, 2)


def _met(a, b, log) -> Float[Array, "B N m m"]:
    """M(a, b) for j <= i, else 0."""
    size = a.shape[1]
    causal = jnp.tril(jnp.ones((size, size), bool))[:, :, None, None]
    between = jnp.exp(jnp.where(causal, log[:, :, None] - log[:, None], -jnp.inf))  # B i j N (H or 1)
    if log.shape[-1] == 1:
        return einsum("binh,bjnh->bnij", a, b) * jnp.moveaxis(between[..., 0], 3, 1)
    return einsum("binh,bjnh,bijnh->bnij", a, b, between)


def blockwise(step: Callable, state: Any, size: int, *rows: Array) -> tuple[Array, Any]:
    """(out, state) of step(state, *rows) -> (state, out), over blocks of `size` of the tokens in rows, B T ..."""
    B, T = rows[0].shape[:2]
    size = max(size, 1)  # no tokens: no blocks
    blocks = -(-T // size)

    def split(a):  # blocks first, as scan wants them
        a = jnp.pad(a, [(0, 0), (0, blocks * size - T)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(B, blocks, size, *a.shape[2:]), 1, 0)

    state, outs = jax.lax.scan(jax.checkpoint(lambda state, rows: step(state, *rows)), state, tuple(map(split, rows)))
    return jnp.moveaxis(outs, 0, 1).reshape(B, blocks * size, *outs.shape[3:])[:, :T], state


def flops(N: int, H: int, V: int, new: int, size: int, *, delta: bool) -> int:
    """Of `new` tokens on N states of H V: steps of the recurrence for one, blocks of `size` for more.

    A step: decay, k u^T and its sum, S^T q, and S^T k for the delta rule. A block: the same products of a token with
    the state, and for each pair of tokens the scores and the values that they weigh; the delta rule has both twice, the
    second time without a token's own.
    """
    if new == 1:
        return N * H * V * (7 if delta else 5)
    size = min(size, new)
    blocks, rest = divmod(new, size)
    pairs = blocks * size * (size + 1) // 2 + rest * (rest + 1) // 2
    own = 2 * (H + V) * (pairs + (pairs - new if delta else 0))
    return N * (H * V * ((6 if delta else 4) * new + blocks + (rest > 0)) + own)
