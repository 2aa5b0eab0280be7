"""Launch plans: tile sizes from a checked-in table or a safe default, and the number of splits of a cache.

A table `tuning/<op>.json` lists measured configurations under a `Key` and the short name of a device. A lookup never
measures anything: dtype, dims, device and the MMA rows that the group fills must match, the nearest buckets win, and
without a match the default is used, which fits every supported shape.
"""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from triton_kernels.device import TARGET, device_of

TUNING = Path(__file__).parent / "tuning"
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Config:
    """How one kernel is launched, and how it shares an SM."""

    block_n: int  # keys of one tile
    num_warps: int
    num_stages: int
    ctas_per_sm: int  # programs that fit one SM; sizes a wave for the split plan
    min_split: int  # smallest split worth a program, in keys

    def others(self):
        """The same tiles under other split plans, for the tuner; nothing is compiled anew."""
        for ctas, count in itertools.product((1, 2, 3, 4, 6), (1, 2, 4, 8)):
            yield replace(self, ctas_per_sm=ctas, min_split=count * self.block_n)


@dataclass(frozen=True)
class LatentConfig(Config):
    """A `Config` that also chooses the query rows of a program, and when it copies."""

    rows: int
    early: bool = False  # copy the next tile before the softmax of this one; for 64 rows, whose MMAs read shared memory


class Key(NamedTuple):
    """What a configuration depends on, from the shapes of a call. Tables hold sizes in buckets, powers of two."""

    dtype: str
    head_dim: int
    value_dim: int
    group: int  # query rows that share the keys of one program
    batch_heads: int  # how often that happens in a call
    length: int  # slots of its row, those outside of a window too

    def bucket(self):
        """The fields of a table entry."""
        sizes = {name: pow2_ceil(getattr(self, name)) for name in ("group", "batch_heads", "length")}
        return self._replace(**sizes)._asdict()


@dataclass(frozen=True)
class Record:
    """One op as its wrapper, the offline check and the tuner read it.

    run: the op on arguments that were checked; takes `config` to override the plan.
    site: (Key, default configuration) of the arguments of `run`; the key is None where tables do not apply.
    calls: (device, **sizes) -> endless (args, options) of `run` that read other memory every time.
    kernels: what `run` launches, the shared merge left out.
    offline: sizes that are compiled without a GPU; shapes: those that the tuner measures.
    sweep: Key -> configurations that the tuner tries; ctas_per_sm = 0 stands for as many as fit an SM.
    """

    name: str
    run: Callable
    calls: Callable
    kernels: tuple
    offline: tuple[dict, ...]
    site: Callable | None = None
    shapes: tuple[dict, ...] = ()
    sweep: Callable | None = None

    def config(self, tensor, key, default):
        """The table's nearest configuration for a call, or the default; `tensor` is where it runs."""
        found = key and nearest(self.name, key, device_of(tensor).name)
        return type(default)(**found) if found else default


def pow2_ceil(n):
    """Smallest power of two >= n; 1 for n <= 1."""
    return 1 << max(n - 1, 0).bit_length()


def block_rows(rows):
    """Rows of one MMA block for the T*G query rows of a KV head: 16, 32 or 64; more rows take several blocks."""
    return min(64, max(16, pow2_ceil(rows)))


def mma_width(width):
    """The power of two, at least the 16 that an MMA takes, that a dimension is padded to."""
    return max(16, pow2_ceil(width))


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


def default_config(dtype_bytes, head_dim, value_dim, rows, most_ctas=4):
    """A configuration for any supported shape: no spills and a pipeline that fits the shared memory of sm_90.

    Depends on nothing that changes with the batch or the cache, so calls with a fixed `chunk` use it as it is.
    most_ctas: fewer for lists of blocks: these are short, so programs fill an SM before a list is split.
    """
    if dtype_bytes == 4:  # IEEE float32 products run on FMA units and keep their operands in registers
        block_n = 32 if head_dim + value_dim <= 128 else 16
        wide = rows >= 32
    else:
        block_n = 64 if head_dim + value_dim <= 384 else 32
        wide = rows * sum(value_chunks(value_dim)) > 8192 or (rows == 64 and head_dim + value_dim > 256)
    stage = block_n * (sum(split_dim(head_dim)) + sum(value_chunks(value_dim))) * dtype_bytes
    ctas_per_sm = max(1, min(most_ctas, (TARGET.sm_shared - 8192) // (2 * stage + 8192)))
    return Config(block_n, 8 if wide else 4, 3, ctas_per_sm, 2 * block_n)


def default_latent_config(dtype_bytes, latent_dim, tokens, heads):
    """As `default_config`, for T*N query rows that share one latent; they fill blocks of 16, 32 or 64 rows.

    64 rows run on warpgroup MMAs with 8 warps, which share the accumulator's columns. For C = 512, q and two tiles of
    64 keys or four of 32 fill the shared memory; 64 keys and the mask of several tokens would spill.
    """
    rows, wide = block_rows(tokens * heads), latent_dim > 256
    if dtype_bytes == 4:  # IEEE float32 products run on FMA units and keep their operands in registers
        return LatentConfig(16, 8 if wide else 4, 2, 1, 64, rows=16)
    if rows < 64:
        return LatentConfig(32, 8 if wide and rows == 32 else 4, 3, 2, 128, rows=rows)
    if wide and tokens > 1:
        return LatentConfig(32, 8, 4, 1, 128, rows=64)
    return LatentConfig(64, 8, 2, 1, 128, rows=64, early=True)


def sweep_tiles(key):
    """Tile shapes whose pipeline fits in shared memory."""
    width = (key.head_dim + key.value_dim) * BYTES[key.dtype]
    for block_n, warps, stages in itertools.product((32, 64, 128), (4, 8), (2, 3, 4)):
        if block_n * width * (stages - 1) <= TARGET.program_shared and (block_n, warps) != (32, 8):
            yield Config(block_n, warps, stages, 0, 2 * block_n)


def sweep_latents(key):
    """A few configurations for the rows that the group fills; none of them spills for T = 1."""
    if block_rows(key.group) < 64:
        tiles = ((32, 4, 3, 2), (32, 4, 2, 2), (32, 4, 4, 1), (64, 8, 2, 2), (64, 8, 3, 1))
        return [LatentConfig(*tile, 4 * tile[0], rows=block_rows(key.group)) for tile in tiles]
    tiles = ((64, 2, True), (32, 4, False), (32, 4, True), (32, 3, True), (64, 2, False))
    return [LatentConfig(block_n, 8, stages, 1, 128, rows=64, early=early) for block_n, stages, early in tiles]


@lru_cache
def table(op):
    """Entries of a tuning table: dicts with the fields of a `Key`, `device` and `config`."""
    path = TUNING / f"{op}.json"
    return tuple(json.loads(path.read_text())["entries"]) if path.exists() else ()


@lru_cache
def nearest(op, key, device):
    """The fields of the table's nearest configuration for a `Key` on a device, by its short name; or None."""

    def distance(entry):
        sizes = ("group", "batch_heads", "length")
        return sum(abs(math.log2(max(getattr(key, name), 1)) - math.log2(entry[name])) for name in sizes)

    matching = [
        entry
        for entry in table(op)
        if all(entry[name] == getattr(key, name) for name in ("dtype", "head_dim", "value_dim"))
        and block_rows(entry["group"]) == block_rows(key.group)
        and entry["device"] == device
    ]
    return min(matching, key=distance)["config"] if matching else None


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


def count_splits(programs, span, chunk, config, device):
    """Splits of `span` keys: of `chunk` keys each, or as many as `programs` of one split need to fill the card."""
    return fill_splits(programs, span, config, device.sm_count) if chunk is None else max(1, -(-span // chunk))
