"""The recurrence of a linear-attention state B N H V, one token at a time and in blocks.

    S_t = e^{g_t} S_{t-1} + k_t u_t^T,   o_t = S_t^T q_t
    u_t = v_t,   or with the delta rule   u_t = beta_t (v_t - (e^{g_t} S_{t-1})^T k_t)

g <= 0 is one number per head, or one per key channel (the rows of S). Shapes throughout: q, k B T N H; v B T N V; g B T
N or B T N H; beta B T N, None without the delta rule; state B N H V, that before the first token. The results are in
the widest dtype given, float32 at least.
Blocks: the WY form of DeltaNet (2406.06484) and Gated DeltaNet (2412.06464), per channel as in Kimi Linear
(2510.26692); without beta the state-space duality of Mamba-2 (2405.21060).
"""

import torch

from .dtypes import accumulator, einsum


def step(q, k, v, state, decay, beta=None):
    """(out B N V, state) after one token: q, k B N H, v B N V, decay e^g N, B N or B N H, beta B N or None.

    The delta rule reads the decayed state, and out the state that holds the new token.
    """
    wide = accumulator(q.dtype, state.dtype, decay.dtype)
    factor = decay[..., None] if decay.ndim == 3 else decay[..., None, None]
    new, k, u = factor.to(wide) * state, k.to(wide), v.to(wide)
    if beta is not None:
        u = beta[..., None] * (u - einsum("bnhv,bnh->bnv", new, k))
    new = new + einsum("bnh,bnv->bnhv", k, u)
    return einsum("bnhv,bnh->bnv", new, q), new


def recurrent(q, k, v, g, beta, state):
    """(out B T N V, state) by `step`, one token after the other."""
    outs, decay = [], g.exp()
    for t in range(q.shape[1]):
        out, state = step(q[:, t], k[:, t], v[:, t], state, decay[:, t], None if beta is None else beta[:, t])
        outs.append(out)
    return torch.stack(outs, dim=1), state


def blockwise(q, k, v, g, beta, state, block_size, token=None):
    """(out, state) of `recurrent`, block_size tokens after the other; the last block may be short.

    token: bool B T, False at the pads after a row's tokens: they write nothing and decay nothing, and what stands there
    (finite) changes no out before it. A block of m tokens makes B m m N H numbers.
    """
    if token is not None:
        k = k.masked_fill(~token[..., None, None], 0.0)
        g = g.masked_fill(~token.view(*token.shape, *[1] * (g.ndim - 2)), 0.0)
    outs = []
    for first in range(0, q.shape[1], block_size):
        inside = (z if z is None else z[:, first : first + block_size] for z in (q, k, v, g, beta))
        out, state = block(*inside, state)
        outs.append(out)
    return torch.cat(outs, dim=1), state


def block(q, k, v, g, beta, state):
    """(out, state) of `recurrent` for m tokens at once. With c_i = g_1 + .. + g_i and
    M(a, b)_ij = sum over h of a_ih b_jh e^{c_ih - c_jh}, solve

        (I + tril_-1(diag(beta) M(k, k))) U = diag(beta) (V - (k e^c) S)          U = V without the delta rule
        O = (q e^c) S + tril(M(q, k)) U,     S <- e^{c_m} S + sum over j of (k_j e^{c_m - c_j}) u_j^T
    """
    wide = accumulator(q.dtype, k.dtype, v.dtype, g.dtype, state.dtype)
    q, k, u, g = (z.to(wide) for z in (q, k, v, g if g.ndim == 4 else g[..., None]))
    carried, inside = g.cumsum(1).exp(), decays(g)
    if beta is not None:
        by_row = beta.to(wide).transpose(1, 2)[..., None]
        # the diagonal is that of I, which the solver takes for granted, and above it stand zeros
        system = by_row * einsum("bind,bjnd,bijnd->bnij", k, k, inside)
        known = by_row * (u.transpose(1, 2) - einsum("bind,bndv->bniv", k * carried, state))
        u = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True).transpose(1, 2)
    scores = einsum("bind,bjnd,bijnd->bijn", q, k, inside)
    out = einsum("bind,bndv->binv", q * carried, state) + einsum("bijn,bjnv->binv", scores, u)
    new = carried[:, -1, :, :, None] * state + einsum("bjnd,bjnv->bndv", k * inside[:, -1], u)
    return out, new


def decays(g):
    """B m m N H: e^{c_i - c_j} for j <= i, 0 above the diagonal; g: B m N H.

    The sum g_{j+1} + .. + g_i itself, since a difference of two long sums keeps few digits of a short one.
    """
    order = torch.arange(g.shape[1], device=g.device)
    behind = (order[:, None] - order)[..., None, None]
    between = g[:, :, None].masked_fill(behind <= 0, 0.0).cumsum(1)
    return between.exp().masked_fill(behind < 0, 0.0)
