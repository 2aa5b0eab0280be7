"""What the kernels of an indexer share: products with a cache of keys that all its heads share, and their plan.

    x_tis = q_ti . k_s;   query t of row b sees s < lengths[b] - T + t + 1, and every score that sees nothing is -inf

One program owns one query and one split of the keys that it sees; a tile of keys is copied to shared memory once, as
the rows of an MMA whose columns are the heads. Scores never leave registers before they are final: a key's sum runs
along its row, a block's maximum down the columns. A row of an MMA depends on no other, so a NaN in an unseen key stays
in a score that is not kept. Splits share the seen keys evenly, and evenly write the -inf of the rest, so that a short
row in a long cache costs its own length. The bits of a score do not depend on the splits.

Keys of one byte (int8, fp8) become q's dtype in registers, which is exact, and k_scale multiplies the product before
the relu: a negative scale means what it says.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from triton_kernels import runtime
from triton_kernels.device import TARGET, device_of
from triton_kernels.plan import Config, Key, fill_splits, mma_width, pow2_ceil
from triton_kernels.tiles import load_tile

MAX_HEADS, MAX_DIM = 256, 256
MAX_QUERY_BYTES = 128 * 1024  # the queries of a program stay in shared memory beside its tiles of keys
MAX_SPLITS = 1024
FILL: tl.constexpr = tl.constexpr(1024)  # scores of -inf that are written at once


@triton.jit
def seen_keys(lengths, batch, t, slots, T: tl.constexpr):
    """How many keys query t of a row sees; a length from outside 0 .. S must not move a store out of its row."""
    return tl.minimum(tl.maximum(tl.load(lengths + batch) - T + t + 1, 0), slots)


@triton.jit
def products(queries, k, k_scale, first, offsets, inside, k_stride, scale_stride, J: tl.constexpr, J_PAD: tl.constexpr,
             SCALED: tl.constexpr):  # fmt: skip
    """x [keys, heads] of the keys first + offsets with the queries [J_PAD, heads]; 0 where not `inside`."""
    keys = load_tile(k + tl.cast(first, tl.int64) * k_stride, offsets * k_stride, inside, 0, J_PAD, J, False)
    x = tl.dot(keys.to(queries.dtype), queries, input_precision="ieee")
    if SCALED:
        scales = k_scale + tl.cast(first, tl.int64) * scale_stride + offsets * scale_stride
        x = x * tl.load(scales, mask=inside, other=0.0)[:, None]
    return x


def default_score_config(dtype_bytes, key_bytes, dim, heads):
    """A configuration for the scores of any indexer with I = heads of J = dim channels, as `plan.default_config`.

    dtype_bytes: of the queries; key_bytes: of the stored keys. Keys are the rows of the MMAs and heads their columns.
    Keys of one byte become operands in registers: tiles of fewer keys leave room for them. A wave is two programs for
    each that fits an SM, so that those of long rows can follow those of short ones.
    """
    rows, width = mma_width(heads), mma_width(dim)
    small = key_bytes == 1
    if dtype_bytes == 4:  # IEEE float32 products run on FMA units; more than 8 of them a thread would spill
        warps = 8 if rows > 64 else 4
        block_n, stages = min(32, 256 * warps // rows), 2
    else:
        block_n = 64 if small or rows * width > 8192 else 128
        warps = 8 if rows > 128 or (small and rows > 64) else 4
        stages = 2 if rows * width > 32768 else 4 if small else 3
    shared = (rows * dtype_bytes + stages * block_n * key_bytes) * width
    resident = max(1, min(12 // warps, TARGET.sm_shared // (shared + 2048)))
    return Config(block_n, warps, stages, 2 * resident, 2 * block_n)


def site(q_index, k_index, *rest, k_scale=None, **options):
    """(Key, default) of a call. Tables are measured with keys in q's dtype, and tell up to 64 heads apart."""
    batch, tokens, heads, dim = q_index.shape
    key = Key(runtime.FLOAT_DTYPES[q_index.dtype], dim, 0, heads, batch * tokens, k_index.shape[1])
    default = default_score_config(q_index.element_size(), k_index.element_size(), dim, heads)
    return key if k_scale is None and heads <= 64 else None, default


def launch(op, kernel, tensors, k_scale, lengths, out, config, unit=1, **constants):
    """`out`, written by a kernel. tensors: queries, keys and perhaps weights; unit: keys that no split cuts."""
    if not out.numel():
        return out
    (q_index, k_index, *weights), scaled = tensors, k_scale is not None
    (batch, tokens, heads, dim), slots = q_index.shape, k_index.shape[1]
    step = max(unit, config.block_n)
    steps = replace(config, block_n=step, min_split=max(step, config.min_split))
    n_splits = fill_splits(batch * tokens, slots, steps, device_of(q_index).sm_count, MAX_SPLITS, tolerance=0.0)
    runtime.check_grid(op, batch, n_splits)
    strides = *q_index.stride()[:3], *k_index.stride()[:2], *(stride for w in weights for stride in w.stride())
    runtime.launch(
        kernel, (tokens, n_splits, batch), *tensors, k_scale if scaled else (*weights, out)[0], lengths.contiguous(),
        out, *strides, *(k_scale.stride() if scaled else (0, 0)), slots,
        T=tokens, HEADS=heads, J=dim, HEADS_PAD=mma_width(heads), J_PAD=mma_width(dim), BLOCK_N=config.block_n,
        SCALED=scaled, **constants, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def check(op, q_index, k_index, lengths):
    """Raise for what the kernels ask beyond the contract."""
    runtime.check_lengths(lengths, k_index)
    runtime.check_slots(op, k_index=k_index)
    runtime.check_rows(op, q_index=q_index)
    heads, dim = q_index.shape[2:]
    runtime.check_inputs(op, {"I": (heads, MAX_HEADS), "J": (dim, MAX_DIM)}, None, q_index=q_index, k_index=k_index)
    if pow2_ceil(heads) * pow2_ceil(dim) * q_index.element_size() > MAX_QUERY_BYTES:
        raise NotImplementedError(
            f"{op}: I={heads} heads of J={dim} in {q_index.dtype} need more shared memory than a program has; at most "
            f"{MAX_QUERY_BYTES} bytes, I and J rounded up to powers of two"
        )


def draws(device, *, B=1, T=1, I=64, S=4096, J=128, dtype="bfloat16", stored=None):  # noqa: E741
    """q_index, k_index, weights, lengths and k_scale of full rows; stored: a quantised dtype of the keys."""
    kind = dict(dtype=getattr(torch, dtype), device=device)
    lengths = torch.full((B,), S, dtype=torch.int32, device=device)
    scale = torch.ones(B, S, device=device) if stored else None
    while True:
        q, k, weights = (
            torch.randn(B, T, I, J, **kind),
            torch.randn(B, S, J, **kind),
            torch.randn(B, T, I, device=device),
        )
        yield q, k.to(getattr(torch, stored)) if stored else k, weights, lengths, scale
