"""Launch plans: tile sizes from a checked-in table or a safe default, and the number of splits of a cache.

A table `tuning/<op>.json` lists measured configurations under the key (dtype, head dim, value dim, group, batch*heads
bucket, length bucket, device); for decode_mla the head dim is C + R, the value dim C, the group N, and there is one
head. Buckets are powers of two. A lookup never measures anything: dtype, dims, device and the MMA rows that the group
fills must match, the nearest buckets win, and without a match the default is used, which fits every supported shape.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

TUNING = Path(__file__).parent / "tuning"


@dataclass(frozen=True)
class Config:
    """How one attention kernel is launched, and how it shares an SM."""

    block_n: int  # keys of one tile
    num_warps: int
    num_stages: int
    ctas_per_sm: int  # programs that fit one SM; sizes a wave for the split plan
    min_split: int  # smallest split worth a program, in keys


@dataclass(frozen=True)
class MlaConfig(Config):
    """A `Config` that also chooses the query rows of a program, and when it copies."""

    rows: int
    early: bool = False  # copy the next tile before the softmax of this one; for 64 rows, whose MMAs read shared memory


@dataclass(frozen=True)
class LinearConfig:
    """How the kernel of decode_linear is launched."""

    block_v: int  # columns of the state that a program owns
    num_warps: int


def pow2_ceil(n):
    """Smallest power of two >= n; 1 for n <= 1."""
    return 1 << max(n - 1, 0).bit_length()


def block_rows(rows):
    """Rows of one MMA block for the T*G query rows of a KV head: 16, 32 or 64; more rows take several blocks."""
    return min(64, max(16, pow2_ceil(rows)))


def split_dim(width, least=16):
    """Two power-of-two chunks that cover a dimension: 80 -> (64, 16), 192 -> (128, 64), 128 -> (128, 0).

    Padding to the next power of two instead would multiply 80 columns' work by 1.6. Columns past `width` are masked.
    An MMA takes chunks of 16 columns; for V `least` is 32, because with 16 output columns four warps have nothing to
    share and each computes the whole product (80 MMA instructions a tile instead of 24 for V = 80).
    """
    first = max(16, pow2_ceil(width + 1) // 2)
    rest = width - first
    return first, max(least, pow2_ceil(rest)) if rest > 0 else 0


def value_chunks(width):
    """`split_dim` for the value dimension."""
    return split_dim(width, least=32)


def default_config(dtype_bytes, head_dim, value_dim, rows):
    """A configuration for any supported shape: no spills and at most 227 KB of shared memory on sm_90.

    Depends on nothing that changes with the batch or the cache, so calls with a fixed `chunk` use it as it is.
    """
    if dtype_bytes == 4:  # IEEE float32 products run on FMA units and keep their operands in registers
        block_n = 32 if head_dim + value_dim <= 128 else 16
        wide = rows >= 32
    else:
        block_n = 64 if head_dim + value_dim <= 384 else 32
        wide = rows * sum(value_chunks(value_dim)) > 8192 or (rows == 64 and head_dim + value_dim > 256)
    stage = block_n * (sum(split_dim(head_dim)) + sum(value_chunks(value_dim))) * dtype_bytes
    ctas_per_sm = max(1, min(4, 220 * 1024 // (2 * stage + 8192)))
    return Config(block_n, 8 if wide else 4, 3, ctas_per_sm, 2 * block_n)


def default_block_config(dtype_bytes, head_dim, value_dim, rows):
    """As `default_config`, for lists of blocks: these are short, so programs fill an SM before a list is split."""
    config = default_config(dtype_bytes, head_dim, value_dim, rows)
    return replace(config, ctas_per_sm=min(2, config.ctas_per_sm))


def default_mla_config(dtype_bytes, latent_dim, tokens, heads):
    """As `default_config`, for T*N query rows that share one latent; they fill blocks of 16, 32 or 64 rows.

    64 rows run on warpgroup MMAs with 8 warps, which share the accumulator's columns. For C = 512, q and two tiles of
    64 keys or four of 32 fill the shared memory; 64 keys and the mask of several tokens would spill.
    """
    rows, wide = block_rows(tokens * heads), latent_dim > 256
    if dtype_bytes == 4:  # IEEE float32 products run on FMA units and keep their operands in registers
        return MlaConfig(16, 8 if wide else 4, 2, 1, 64, rows=16)
    if rows < 64:
        return MlaConfig(32, 8 if wide and rows == 32 else 4, 3, 2, 128, rows=rows)
    if wide and tokens > 1:
        return MlaConfig(32, 8, 4, 1, 128, rows=64)
    return MlaConfig(64, 8, 2, 1, 128, rows=64, early=True)


def default_linear_config(key_dim):
    """A configuration for any state of H = key_dim <= 1024: a tile of 4096 numbers, 32 of them a thread.

    It is at least 8 columns wide, because memory is read in sectors of 32 bytes.
    """
    columns = max(8, 4096 // max(32, pow2_ceil(key_dim)))
    return LinearConfig(columns, 8 if pow2_ceil(key_dim) * columns > 4096 else 4)


def default_score_config(dtype_bytes, key_bytes, dim, heads):
    """As `default_config`, for the scores of an indexer with I = heads of J = dim channels.

    dtype_bytes: of the queries; key_bytes: of the stored keys. Keys are the rows of the MMAs and heads their columns.
    Keys of one byte become operands in registers: tiles of fewer keys leave room for them. A wave is two programs for
    each that fits an SM, so that those of long rows can follow those of short ones.
    """
    rows, width = max(16, pow2_ceil(heads)), max(16, pow2_ceil(dim))
    small = key_bytes == 1
    if dtype_bytes == 4:  # IEEE float32 products run on FMA units; more than 8 of them a thread would spill
        warps = 8 if rows > 64 else 4
        block_n, stages = min(32, 256 * warps // rows), 2
    else:
        block_n = 64 if small or rows * width > 8192 else 128
        warps = 8 if rows > 128 or (small and rows > 64) else 4
        stages = 2 if rows * width > 32768 else 4 if small else 3
    shared = (rows * dtype_bytes + stages * block_n * key_bytes) * width
    resident = max(1, min(12 // warps, 228 * 1024 // (shared + 2048)))
    return Config(block_n, warps, stages, 2 * resident, 2 * block_n)


@lru_cache
def table(op):
    """Entries of a tuning table: dicts with the key's fields and `config`."""
    path = TUNING / f"{op}.json"
    return tuple(json.loads(path.read_text())["entries"]) if path.exists() else ()


def nearest(op, dtype, head_dim, value_dim, rows, group, batch_heads, length, device):
    """The fields of the table's nearest configuration, or None.

    dtype is a name, group the query rows of one KV head (T*G), batch_heads B*K, length S; device a device name, which
    matches an entry when it contains the entry's (an entry for "H100" serves "NVIDIA H100 80GB HBM3").
    """

    def distance(entry):
        pairs = (("group", group), ("batch_heads", batch_heads), ("length", length))
        return sum(abs(math.log2(max(value, 1)) - math.log2(entry[name])) for name, value in pairs)

    matching = [
        entry
        for entry in table(op)
        if (entry["dtype"], entry["head_dim"], entry["value_dim"]) == (dtype, head_dim, value_dim)
        and block_rows(entry["group"]) == rows
        and entry["device"] in device
    ]
    return min(matching, key=distance)["config"] if matching else None


@lru_cache
def lookup(op, dtype, dtype_bytes, head_dim, value_dim, rows, group, batch_heads, length, device):
    """The table's nearest configuration, or the default; arguments as for `nearest`."""
    found = nearest(op, dtype, head_dim, value_dim, rows, group, batch_heads, length, device)
    return Config(**found) if found else default_config(dtype_bytes, head_dim, value_dim, rows)


@lru_cache
def fill_splits(programs, span, config, sms, limit=256, tolerance=0.15):
    """Number of splits that fills the card: the smallest whose waves take nearly the least time.

    programs: programs of one split (B * K * row blocks); span: most keys that one of them can see. sms * ctas_per_sm
    programs make a wave, and a wave lasts as long as the tiles of one split. Splits beyond need cost partial results
    and a longer merge, so the first count that reaches 1 - tolerance of the best rate is taken (FlashAttention's rule);
    a kernel that merges nothing asks for the least time itself. Counts that would leave a split without tiles at full
    length are never taken.
    """
    tiles = max(1, -(-span // config.block_n))
    most = max(1, min(limit, -(-span // config.min_split)))
    wave = sms * config.ctas_per_sm
    time = {}
    for count in range(1, most + 1):
        tiles_each = -(-tiles // count)
        used = -(-tiles // tiles_each)
        time[used] = -(-used * programs // wave) * tiles_each
    least = min(time.values())
    return next(count for count in sorted(time) if time[count] * (1 - tolerance) <= least)
