"""One step of linear attention on a matrix state for every row and head.

    S <- decay S;   u = v, or beta (v - S^T k) with the delta rule;   S <- S + k u^T;   out = S^T q

One program owns BLOCK_V columns of one state: it reads them once, keeps them in registers, and writes them back to the
same place. The sums over the key channels stay inside a column, so programs share nothing, and the result of a row does
not depend on its batch. All arithmetic is in float32. The work is the traffic of the state: 8 H V bytes a head.

Sources: lightning attention (MiniMax-01, arXiv 2501.08313) for a decay per head; DeltaNet (arXiv 2406.06484) and Gated
DeltaNet (arXiv 2412.06464) for beta; Kimi Linear (arXiv 2510.26692) for a decay per key channel.
"""

import itertools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from torch_ref.ops import check
from triton_kernels import runtime
from triton_kernels.plan import Key, Record, pow2_ceil

MAX_KEY_DIM = 1024
PROGRAMS = 264  # two an SM


@dataclass(frozen=True)
class LinearConfig:
    """How the kernel is launched."""

    block_v: int  # columns of the state that a program owns
    num_warps: int


@triton.jit
def linear_kernel(
    q, k, v, state, decay, beta, out,
    q_stride_b, q_stride_n, k_stride_b, k_stride_n, v_stride_b, v_stride_n,
    state_stride_b, state_stride_n, state_stride_h, decay_b, decay_n, decay_h, beta_b, beta_n,
    N: tl.constexpr, H: tl.constexpr, V: tl.constexpr, H_PAD: tl.constexpr, BLOCK_V: tl.constexpr,
    CHANNEL: tl.constexpr, DELTA: tl.constexpr, POLICY: tl.constexpr,
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
    s = tl.load(places, mask=mask, other=0.0, eviction_policy=POLICY)
    k_row = tl.load(k + batch * k_stride_b + n * k_stride_n + h, mask=row, other=0.0).to(tl.float32)
    q_row = tl.load(q + batch * q_stride_b + n * q_stride_n + h, mask=row, other=0.0).to(tl.float32)
    u = tl.load(v + batch * v_stride_b + n * v_stride_n + c, mask=column, other=0.0).to(tl.float32)

    factor = decay + batch * decay_b + n * decay_n
    if CHANNEL:
        s = s * tl.load(factor + h * decay_h, mask=row, other=0.0)[:, None]
    else:
        s = s * tl.load(factor)
    if DELTA:  # both sums before the write: S^T q, to which k u^T then adds (k . q) u
        o = tl.sum(s * q_row[:, None], 0)
        u = tl.load(beta + batch * beta_b + n * beta_n) * (u - tl.sum(s * k_row[:, None], 0))
        o += tl.sum(k_row * q_row, 0) * u
    s = s + k_row[:, None] * u[None, :]
    if H < H_PAD:
        s = tl.where(row[:, None], s, 0.0)  # 0 * u is NaN where u is Inf
    tl.store(places, s, mask=mask, eviction_policy=POLICY)
    if not DELTA:
        o = tl.sum(s * q_row[:, None], 0)
    tl.store(out + (batch * N + n) * V + c, o.to(out.dtype.element_ty), mask=column)


def default_linear_config(key_dim, value_dim, rows, delta):
    """A configuration for any state of H = key_dim <= 1024: 64 columns, fewer of tall states and where programs would
    not fill the card; few threads for the delta rule, which waits for sums twice.

    It is at least 8 columns wide, because memory is read in sectors of 32 bytes.
    """
    columns = min(64 if -value_dim % 64 < 32 else 32, 16384 // max(32, pow2_ceil(key_dim)))
    while columns > 8 and rows * triton.cdiv(value_dim, columns) < PROGRAMS:
        columns //= 2
    warps = pow2_ceil(key_dim) * columns // (2048 if delta else 1024)
    return LinearConfig(columns, min(8, max(1, warps)))


def sweep_columns(key):
    """Tiles of 8 to 64 numbers a thread."""
    for columns, warps in itertools.product((8, 16, 32, 64, 128), (2, 4, 8)):
        if columns <= pow2_ceil(key.value_dim) and 8 <= pow2_ceil(key.head_dim) * columns // (32 * warps) <= 64:
            yield LinearConfig(columns, warps)


def site(q, k, v, state, decay, **options):
    """(Key, default) of a call."""
    batch, heads, key_dim = q.shape
    key = Key(runtime.FLOAT_DTYPES[q.dtype], key_dim, v.shape[-1], 1, batch * heads, 1)
    return key, default_linear_config(key_dim, v.shape[-1], batch * heads, options.get("beta") is not None)


def run(q, k, v, state, decay, *, beta=None, config=None):
    """`decode_linear` on arguments that were checked; `config` overrides the plan (for tuning)."""
    batch, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    out = torch.empty((batch, heads, value_dim), dtype=q.dtype, device=q.device)
    if not out.numel():
        return out, state
    config = config or OP.config(q, *site(q, k, v, state, decay, beta=beta))
    columns = min(config.block_v, pow2_ceil(value_dim))
    factors = decay if decay.ndim > 1 else decay[None].expand(batch, -1)
    factors = factors if factors.ndim == 3 else factors[..., None]
    rates = decay if beta is None else beta  # never read without DELTA; Triton wants a pointer
    beta_strides = (0, 0) if beta is None else beta.stride()
    runtime.launch(
        linear_kernel, (batch * heads * triton.cdiv(value_dim, columns),),
        q, k, v, state, factors, rates, out,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *state.stride()[:3], *factors.stride(), *beta_strides,
        N=heads, H=key_dim, V=value_dim, H_PAD=pow2_ceil(key_dim), BLOCK_V=columns, CHANNEL=decay.ndim == 3,
        DELTA=beta is not None, POLICY="" if value_dim % 32 else "evict_first", num_warps=config.num_warps,
    )  # fmt: skip
    return out, state


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
    for name, tensor in (("state", state), ("decay", decay), ("beta", beta)):
        if tensor is not None and tensor.dtype != torch.float32:
            raise TypeError(f"{OP.name}: {name} must be float32 in triton_kernels, got {tensor.dtype}")
    runtime.check_inputs(OP.name, {"H": (q.shape[-1], MAX_KEY_DIM)}, None, q=q, k=k, v=v, state=state)
    runtime.check_rows(OP.name, q=q, k=k, v=v, state=state)
    for size, stride, letter in zip(state.shape, state.stride(), "BNHV", strict=True):
        if size > 1 and stride == 0 and state.numel():
            raise ValueError(f"{OP.name}: state is overwritten in place, but its {letter}={size} entries share memory")
    return run(q, k, v, state, decay, beta=beta)


def calls(device, *, B=1, N=64, H=128, V=128, dtype="bfloat16", channel=False, delta=False):
    """Arguments of `run`. Zero keys without decay leave the state as it is: every call has the same answer."""
    kind = dict(dtype=getattr(torch, dtype), device=device)
    decay = torch.ones((B, N, H) if channel else (N,), device=device)
    options = dict(beta=torch.ones(B, N, device=device) if delta else None)
    while True:
        q, v, state = torch.randn(B, N, H, **kind), torch.randn(B, N, V, **kind), torch.randn(B, N, H, V, device=device)
        yield (q, torch.zeros_like(q), v, state, decay), options


OP = Record(
    "decode_linear", run=run, site=site, calls=calls, kernels=(linear_kernel,), sweep=sweep_columns,
    shapes=(dict(B=64), dict(B=8), dict(B=1)),
    offline=(
        dict(B=64), dict(B=64, channel=True, delta=True), dict(B=64, H=256, V=256, delta=True),
        dict(H=96, V=80, dtype="float32"), dict(H=1024, V=64, channel=True, delta=True),
    ),
)  # fmt: skip
