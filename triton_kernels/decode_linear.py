"""One step of linear attention on a matrix state for every row and head.

    S <- decay S;   u = v, or beta (v - S^T k) with the delta rule;   S <- S + k u^T;   out = S^T q

One program owns BLOCK_V columns of one state: it reads them once, keeps them in registers, and writes them back to the
same place. The sums over the key channels stay inside a column, so programs share nothing, and the result of a row does
not depend on its batch. All arithmetic is in float32. The work is the traffic of the state: 8 H V bytes a head.

Sources: lightning attention (MiniMax-01, arXiv 2501.08313) for a decay per head; DeltaNet (arXiv 2406.06484) and Gated
DeltaNet (arXiv 2412.06464) for beta; Kimi Linear (arXiv 2510.26692) for a decay per key channel.
"""

import torch
import triton
import triton.language as tl

from torch_ref.ops import check
from triton_kernels import runtime
from triton_kernels.plan import LinearConfig, default_linear_config, nearest, pow2_ceil

OP = "decode_linear"
MAX_KEY_DIM = 1024


@triton.jit
def linear_kernel(
    q, k, v, state, decay, beta, out,
    q_stride_b, q_stride_n, k_stride_b, k_stride_n, v_stride_b, v_stride_n,
    state_stride_b, state_stride_n, state_stride_h, decay_b, decay_n, decay_h, beta_b, beta_n,
    N: tl.constexpr, H: tl.constexpr, V: tl.constexpr, H_PAD: tl.constexpr, BLOCK_V: tl.constexpr,
    CHANNEL: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    # The column blocks of a state are neighbours in the grid, so that together they read whole rows of memory.
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    block = tl.program_id(0) % blocks
    n = tl.program_id(0) // blocks % N
    batch = (tl.program_id(0) // blocks // N).to(tl.int64)

    h = tl.arange(0, H_PAD)
    c = block * BLOCK_V + tl.arange(0, BLOCK_V)
    row, column = h < H, c < V
    mask = row[:, None] & column[None, :]
    places = state + batch * state_stride_b + n.to(tl.int64) * state_stride_n
    places = places + h[:, None] * state_stride_h + c[None, :]
    s = tl.load(places, mask=mask, other=0.0)
    k_row = tl.load(k + batch * k_stride_b + n * k_stride_n + h, mask=row, other=0.0).to(tl.float32)
    q_row = tl.load(q + batch * q_stride_b + n * q_stride_n + h, mask=row, other=0.0).to(tl.float32)
    u = tl.load(v + batch * v_stride_b + n * v_stride_n + c, mask=column, other=0.0).to(tl.float32)

    factor = decay + batch * decay_b + n * decay_n
    if CHANNEL:
        s = s * tl.load(factor + h * decay_h, mask=row, other=0.0)[:, None]
    else:
        s = s * tl.load(factor)
    if DELTA:
        u = tl.load(beta + batch * beta_b + n * beta_n) * (u - tl.sum(s * k_row[:, None], 0))
    s = s + k_row[:, None] * u[None, :]
    if H < H_PAD:
        s = tl.where(row[:, None], s, 0.0)  # 0 * u is NaN where u is Inf
    tl.store(places, s, mask=mask)
    o = tl.sum(s * q_row[:, None], 0)
    tl.store(out + (batch * N + n) * V + c, o.to(out.dtype.element_ty), mask=column)


def specialise(heads, key_dim, value_dim, config, *, channel, delta):
    """The compile-time arguments of `linear_kernel`; channel: a decay per key channel, delta: with beta."""
    return {
        "N": heads, "H": key_dim, "V": value_dim, "H_PAD": pow2_ceil(key_dim),
        "BLOCK_V": min(config.block_v, pow2_ceil(value_dim)), "CHANNEL": channel, "DELTA": delta,
    }  # fmt: skip


def _plan(q, value_dim, config):
    """The launch configuration: a table's for this dtype and these dims, else the default."""
    batch, heads, key_dim = q.shape
    if config is None:
        key = (key_dim, value_dim, 16, 1, batch * heads, 1, runtime.device_name(q.device))
        found = nearest(OP, runtime.FLOAT_DTYPES[q.dtype], *key)
        config = LinearConfig(**found) if found else default_linear_config(key_dim)
    return config


def run(q, k, v, state, decay, *, beta=None, config=None):
    """`decode_linear` on arguments that were checked; `config` overrides the table (for tuning)."""
    batch, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    out = torch.empty((batch, heads, value_dim), dtype=q.dtype, device=q.device)
    if not out.numel():
        return out, state
    config = _plan(q, value_dim, config)
    constants = specialise(heads, key_dim, value_dim, config, channel=decay.ndim == 3, delta=beta is not None)
    factors = decay if decay.ndim > 1 else decay[None].expand(batch, -1)
    factors = factors if factors.ndim == 3 else factors[..., None]
    rates = decay if beta is None else beta  # never read without DELTA; Triton wants a pointer
    beta_strides = (0, 0) if beta is None else beta.stride()
    runtime.launch(
        linear_kernel, (batch * heads * triton.cdiv(value_dim, constants["BLOCK_V"]),),
        q, k, v, state, factors, rates, out,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *state.stride()[:3], *factors.stride(), *beta_strides,
        **constants, num_warps=config.num_warps,
    )  # fmt: skip
    return out, state


def _check(q, k, v, state, decay, beta):
    """What this kernel asks beyond the contract: float32 beside q, k, v; a state that can be overwritten in place."""
    for name, tensor in (("state", state), ("decay", decay), ("beta", beta)):
        if tensor is not None and tensor.dtype != torch.float32:
            raise TypeError(f"{OP}: {name} must be float32 in triton_kernels, got {tensor.dtype}")
    runtime.check_inputs(OP, {"H": (q.shape[-1], MAX_KEY_DIM)}, None, q=q, k=k, v=v, state=state)
    runtime.check_rows(OP, q=q, k=k, v=v, state=state)
    for size, stride, letter in zip(state.shape, state.stride(), "BNHV", strict=True):
        if size > 1 and stride == 0:
            raise ValueError(f"{OP}: state is overwritten in place, but its {letter}={size} entries share memory")


def decode_linear(q, k, v, state, decay, *, beta=None):
    """One decoded token of linear attention; the equation is at the top of this file.

    q, k: B N H and v: B N V of one dtype (float16, bfloat16, float32), H at most 1024. state: float32 B N H V,
    overwritten in place. decay: float32, factors and not their logs: N, B N, or B N H with one for each key channel.
    beta: float32 B N, the write strength of the delta rule; None: u = v. Any strides; the last dimension of q, k, v and
    state contiguous.
    Returns out: B N V in q's dtype, and state, the same tensor that was given.

    Raises ValueError for shapes, strides and devices, TypeError for dtypes and for CPU tensors outside the interpreter,
    NotImplementedError for wider keys; always before any launch, so a refused state is as it was.
    """
    check.decode_linear(q, k, v, state, decay, beta=beta)
    _check(q, k, v, state, decay, beta)
    return run(q, k, v, state, decay, beta=beta)
