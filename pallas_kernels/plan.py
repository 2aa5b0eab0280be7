"""Launch plans: tile sizes from a checked-in table or a safe default, and the number of splits of a cache.

A table `tuning/<op>.json` lists measured configurations under the key (dtype, head dim, value dim, group, batch*heads
bucket, length bucket, device). Buckets are powers of two. A lookup never measures anything: dtype, dims, group and
device must match, the nearest entry wins if its two distances make less than a factor of 2 together, and without one
the default is used, which fits every supported shape. `python -m pallas_kernels.tune` measures the table again.
"""

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pallas_kernels.compat import target
from pallas_kernels.device import Device, device_of

TUNING = Path(__file__).parent / "tuning"
RESERVED = 4 * 1024  # bytes of a program: barriers, reduction scratch, alignment, and what the driver takes
MOST_SPLITS = 64


_FORCED: dict[str, int] = {}


@contextlib.contextmanager
def forced(**plan: int):
    """Plans made inside take these numbers in the place of what they would choose: `splits` of a row of keys, `width`
    of a program's part of a state. Other packages have other names."""
    _FORCED.update(plan)
    try:
        yield
    finally:
        _FORCED.clear()


def planned(name: str, choose: Callable[[], int]) -> int:
    """The number that a plan takes under `name`: the model's, unless one is forced."""
    return _FORCED[name] if name in _FORCED else choose()


def card() -> Device:
    """What is known of the card that is traced for."""
    return device_of(target().device_kind)


@dataclass(frozen=True)
class Config:
    """How a decode kernel walks the cache. `splits` = None leaves the number of splits to `fill_splits`."""

    block: int  # keys of one tile, a multiple of 64
    stages: int  # tiles in flight
    splits: int | None = None


@dataclass(frozen=True)
class Tunable:
    """What the tuner reads of an op: its calls and candidates."""

    op: str
    letters: str  # what the op calls head dim and value dim
    arrays: tuple[str, ...]  # axes of the arguments before lengths, queries first
    make_facts: Callable
    run: Callable
    shapes: tuple[tuple[int, ...], ...]  # calls to measure: head dim, value dim, B, N, K, S
    candidates: tuple[Config, ...]
    splits: Callable  # modelled number of splits -> numbers to try for the best candidates
    finalists: int
    dtype: str = "bfloat16"


def _fit(config: Config, key_width: int, value_width: int, rows: int) -> tuple[int, int]:
    """Programs of two warpgroups that one SM holds, by shared memory and by registers (an upper estimate: ptxas reports
    71 a thread for 8 rows of 128 columns, 138 for 32, 248 for 64)."""
    ring = 2 * config.stages * config.block * (key_width + value_width)
    fixed = RESERVED + rows * (2 * key_width + 2 * config.block + 4 * value_width)
    registers = 52 + rows * (value_width + config.block) // 64
    return card().smem // (ring + fixed), card().registers // (256 * -(-registers // 8) * 8)


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

    Group must match exactly, since it decides the registers.
    """

    def distance(entry):
        pairs = (("batch_heads", batch_heads), ("length", length))
        return sum(abs(math.log2(max(value, 1)) - math.log2(entry[name])) for name, value in pairs)

    names, wanted = ("dtype", "head_dim", "value_dim", "group", "device"), (dtype, head_dim, value_dim, group, device)
    near = [e for e in _table(op) if tuple(e[name] for name in names) == wanted and distance(e) < 1]
    return Config(**min(near, key=distance)["config"]) if near else None


def walk(op, table_key, default, model, *, S, T, window, chunk, config=None) -> dict:
    """How programs walk a cache of S slots: block, stages, splits, window and chunk of their Facts.

    `config` overrides the table; model(Config, tiles) is the number of splits where neither says one. A fixed `chunk`
    takes nothing that could differ between batches, so never the table.
    """
    window, chunk = _bounded(window, S), _bounded(chunk, S)
    span = S if window is None else min(S, window + T - 1 + default.block)
    found = None if chunk else lookup(op, *table_key, S, card().name)
    config = config or found or default
    if chunk is None:
        splits = config.splits or model(config, -(-span // config.block))
    else:
        chunk = -(-chunk // config.block) * config.block
        splits = -(-span // chunk)
    return dict(block=config.block, stages=config.stages, splits=splits, window=window, chunk=chunk)


def _bounded(keys: int | None, slots: int) -> int | None:
    """An option that counts keys, as an int that no int32 sum overflows: more than all slots are all slots."""
    return None if keys is None else min(int(keys), max(slots, 1))


def fill_splits(programs: int, tiles: int, together: int = 1, part: float = 0.0) -> int:
    """Number of splits with the least modelled time; programs = B*K*row blocks, tiles of one row, and the programs that
    an SM runs together.

    Time of a plan in tiles: an SM loads the tiles of its programs no faster when they run together, but their starts
    and ends, about one tile each, fall together. The merge kernel costs about one tile and one more for every 32 parts.
    `part` is the time to write and merge one program's partial result, where that is not small against a tile.
    """
    tiles, sms = max(tiles, 1), card().sms

    def time(splits):
        per = -(-tiles // splits)
        count = programs * -(-tiles // per)
        loads, waves = -(-count // sms) * per, -(-count // (sms * together))
        return loads + waves + (1 + splits / 32 + waves * part if splits > 1 else 0)

    return planned("splits", lambda: min(range(1, min(tiles, MOST_SPLITS) + 1), key=time))
