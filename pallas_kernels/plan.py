"""Launch plans: tile sizes from a checked-in table or a safe default, and the number of splits of a cache.

A table `tuning/<op>.json` lists measured configurations under the key (dtype, head dim, value dim, group, batch*heads
bucket, length bucket, device). Buckets are powers of two. A lookup never measures anything: dtype, dims, group and
device must match, the nearest entry wins if its two distances make less than a factor of 2 together, and without one
the default is used, which fits every supported shape. `python -m pallas_kernels.tune` measures the table again.
"""

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

TUNING = Path(__file__).parent / "tuning"
SMEM = 227 * 1024  # bytes a program can have on sm_90; several programs on one SM share the same amount
SMS = 132  # H100 and H200
RESERVED = 4 * 1024  # barriers, reduction scratch, alignment, and what the driver takes per program
MOST_SPLITS = 64


@dataclass(frozen=True)
class Config:
    """How a decode kernel walks the cache. `splits` = None leaves the number of splits to `fill_splits`."""

    block: int  # keys of one tile, a multiple of 64
    stages: int  # tiles in flight
    splits: int | None = None


def _fit(config: Config, key_width: int, value_width: int, rows: int) -> tuple[int, int]:
    """Programs of two warpgroups that one SM holds, by shared memory and by registers (an upper estimate: ptxas reports
    71 a thread for 8 rows of 128 columns, 138 for 32, 248 for 64)."""
    ring = 2 * config.stages * config.block * (key_width + value_width)
    fixed = RESERVED + rows * (2 * key_width + 2 * config.block + 4 * value_width)
    registers = 52 + rows * (value_width + config.block) // 64
    return SMEM // (ring + fixed), 65536 // (256 * -(-registers // 8) * 8)


@lru_cache
def default_config(key_width: int, value_width: int, rows: int) -> Config:
    """Tiles of 64 keys and the deepest ring (up to 4) that leaves room for a second program, else for one."""
    by_registers = _fit(Config(64, 1), key_width, value_width, rows)[1]
    for programs in (2, 1):
        for stages in (4, 3, 2):
            fits = _fit(Config(64, stages), key_width, value_width, rows)[0] >= programs
            if fits and (programs <= by_registers or programs == 1):
                return Config(64, stages)
    raise ValueError(f"no ring fits key width {key_width}, value width {value_width} and {rows} rows")


def programs_per_sm(config: Config, key_width: int, value_width: int, rows: int) -> int:
    """Programs that run on one SM at a time."""
    return max(1, min(_fit(config, key_width, value_width, rows)))


@lru_cache
def _table(op: str) -> tuple:
    path = TUNING / f"{op}.json"
    return tuple(json.loads(path.read_text())["entries"]) if path.exists() else ()


def lookup(op, dtype, head_dim, value_dim, group, batch_heads, length, device) -> Config | None:
    """The table's nearest configuration or None. group is T*N/K, batch_heads B*K, length S.

    An entry whose device is "H100" serves every device whose name contains it; group must match exactly, since it
    decides the registers.
    """

    def distance(entry):
        pairs = (("batch_heads", batch_heads), ("length", length))
        return sum(abs(math.log2(max(value, 1)) - math.log2(entry[name])) for name, value in pairs)

    wanted = (dtype, head_dim, value_dim, group)
    near = [
        e
        for e in _table(op)
        if (e["dtype"], e["head_dim"], e["value_dim"], e["group"]) == wanted
        and e["device"] in device
        and distance(e) < 1
    ]
    return Config(**min(near, key=distance)["config"]) if near else None


def bounded(keys: int | None, slots: int) -> int | None:
    """An option that counts keys, as an int that no int32 sum overflows: more than all slots are all slots."""
    return None if keys is None else min(int(keys), max(slots, 1))


def fill_splits(programs: int, tiles: int, together: int = 1, part: float = 0.0) -> int:
    """Number of splits with the least modelled time; programs = B*K*row blocks, tiles of one row, and the programs that
    an SM runs together.

    Time of a plan in tiles: an SM loads the tiles of its programs no faster when they run together, but their starts
    and ends, about one tile each, fall together. The merge kernel costs about one tile and one more for every 32 parts.
    `part` is the time to write and merge one program's partial result, where that is not small against a tile.
    """
    tiles = max(tiles, 1)

    def time(splits):
        per = -(-tiles // splits)
        count = programs * -(-tiles // per)
        loads, waves = -(-count // SMS) * per, -(-count // (SMS * together))
        return loads + waves + (1 + splits / 32 + waves * part if splits > 1 else 0)

    return min(range(1, min(tiles, MOST_SPLITS) + 1), key=time)
