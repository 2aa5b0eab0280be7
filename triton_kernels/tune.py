"""Measure launch configurations on the GPU at hand and write `tuning/decode_attention.json`.

    python -m triton_kernels.tune                      every shape of SHAPES
    python -m triton_kernels.tune --only 64x32x8x8192  one of them (B x N x K x S, every dtype and head dim listed)

A configuration is timed as device time of one whole call, merge included: a CUDA graph of CALLS calls that rotate over
enough input sets to miss the L2 cache, median of SAMPLES replays. It is tried only if its machine code has no spills
and fits in shared memory, and counts only if its output agrees with the default configuration's. Entries of other
devices, and of shapes that were not measured, stay in the table.
"""

import argparse
import itertools
import json
import statistics
from dataclasses import asdict, replace
from functools import lru_cache

import torch

from triton_kernels import runtime
from triton_kernels.decode_attention import run
from triton_kernels.offline import BYTES, MAX_SHARED, Decode, compile_decode
from triton_kernels.plan import TUNING, Config, block_rows, default_config, pow2_ceil

OP = "decode_attention"
CALLS, SAMPLES, WARMUP = 20, 30, 5
SETS_BYTES = 256 * 2**20  # several times the L2 of an H100 or H200
AGREE = 1e-2

# dtype, head dim, value dim, B, N, K, S
SHAPES = (
    ("bfloat16", 128, 128, 1, 32, 8, 1024),
    ("bfloat16", 128, 128, 1, 32, 8, 4096),
    ("bfloat16", 128, 128, 1, 32, 8, 131072),
    ("bfloat16", 128, 128, 8, 32, 8, 32768),
    ("bfloat16", 128, 128, 16, 32, 8, 1024),
    ("bfloat16", 128, 128, 64, 32, 8, 8192),
    ("bfloat16", 128, 128, 256, 32, 8, 512),
    ("bfloat16", 128, 128, 16, 32, 32, 8192),
    ("bfloat16", 128, 128, 64, 8, 1, 32768),
    ("bfloat16", 64, 64, 1, 64, 8, 4096),
    ("bfloat16", 64, 64, 64, 64, 8, 8192),
    ("bfloat16", 256, 256, 16, 8, 4, 8192),
    ("bfloat16", 192, 128, 16, 16, 16, 8192),
)


def inputs(dtype, head_dim, value_dim, batch, heads, kv_heads, slots):
    """Argument sets of one shape, enough that a rotation over them reads from memory, not from L2."""
    kind = {"dtype": getattr(torch, dtype), "device": "cuda"}
    cache_bytes = batch * slots * kv_heads * (head_dim + value_dim) * BYTES[dtype]
    sets = []
    for _ in range(max(1, min(CALLS, -(-SETS_BYTES // cache_bytes)))):
        q = torch.randn(batch, 1, heads, head_dim, **kind)
        k = torch.randn(batch, slots, kv_heads, head_dim, **kind)
        v = torch.randn(batch, slots, kv_heads, value_dim, **kind)
        sets.append((q, k, v, torch.full((batch,), slots, dtype=torch.int32, device="cuda")))
    return sets


def microseconds(sets, config):
    """Median device time of one call."""
    scale = sets[0][0].shape[-1] ** -0.5
    run(*sets[0], scale=scale, config=config)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for args, _ in zip(itertools.cycle(sets), range(CALLS), strict=False):
            run(*args, scale=scale, config=config)
    samples = []
    for index in range(WARMUP + SAMPLES):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        if index >= WARMUP:
            samples.append(start.elapsed_time(stop) * 1000 / CALLS)
    return statistics.median(samples)


@lru_cache
def tiles(case):
    """Tile shapes worth timing: no spills, and a pipeline that fits in shared memory."""
    width = (case.head_dim + case.value_dim) * BYTES[case.dtype]
    found = []
    for block_n, warps, stages in itertools.product((32, 64, 128), (4, 8), (2, 3, 4)):
        config = Config(block_n, warps, stages, 1, 2 * block_n)
        if block_n * width * (stages - 1) > MAX_SHARED or (block_n, warps) == (32, 8):
            continue
        measured = compile_decode(case, config)
        shared = measured["shared"]
        if measured["spills"] == 0 and shared <= MAX_SHARED:
            registers = 65536 // (measured["registers"] * warps * 32)
            found.append(replace(config, ctas_per_sm=max(1, min(registers, MAX_SHARED // (shared + 1024)))))
    return found


def plans(config):
    """The same tiles under other split plans; nothing is compiled anew."""
    for ctas, count in itertools.product((1, 2, 3, 4, 6), (1, 2, 4, 8)):
        yield replace(config, ctas_per_sm=ctas, min_split=count * config.block_n)


def tune(shape):
    """(best Config, its time, the default's time) for one shape."""
    dtype, head_dim, value_dim, _, heads, kv_heads, _ = shape
    sets = inputs(*shape)
    default = default_config(BYTES[dtype], head_dim, value_dim, block_rows(heads // kv_heads))
    scale = head_dim**-0.5
    expected = run(*sets[0], scale=scale, config=default)[0].float()
    times = {default: microseconds(sets, default)}

    def measure(config):
        if config in times:
            return
        out = run(*sets[0], scale=scale, config=config)[0].float()
        if (out - expected).norm() <= AGREE * expected.norm():
            times[config] = microseconds(sets, config)

    for config in tiles(Decode(dtype, head_dim, value_dim, group=heads // kv_heads)):
        measure(config)
    for config in sorted(times, key=times.get)[:3]:
        for plan in plans(config):
            measure(plan)
    best = min(times, key=times.get)
    return best, times[best], times[default]


def entry_of(shape, config, device):
    dtype, head_dim, value_dim, batch, heads, kv_heads, slots = shape
    key = {"dtype": dtype, "head_dim": head_dim, "value_dim": value_dim, "group": pow2_ceil(heads // kv_heads)}
    key |= {"batch_heads": pow2_ceil(batch * kv_heads), "length": pow2_ceil(slots), "device": device}
    return key | {"config": asdict(config)}


def write(entries):
    """Put entries into the table, in the place of those with the same key."""

    def key(entry):
        return tuple(str(value) for name, value in entry.items() if name != "config")

    path = TUNING / f"{OP}.json"
    table = {key(entry): entry for entry in json.loads(path.read_text())["entries"]} if path.exists() else {}
    table |= {key(entry): entry for entry in entries}
    lines = ",\n".join("    " + json.dumps(entry) for entry in table.values())
    path.write_text(f'{{\n  "op": "{OP}",\n  "entries": [\n{lines}\n  ]\n}}\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="BxNxKxS of the shapes to measure")
    arguments = parser.parse_args()
    if runtime.INTERPRETED or not torch.cuda.is_available():
        parser.error("tuning needs a CUDA device, and TRITON_INTERPRET unset")
    device = torch.cuda.get_device_name()
    entries = []
    for shape in SHAPES:
        if arguments.only in (None, "x".join(map(str, shape[3:]))):
            config, best, default = tune(shape)
            entries.append(entry_of(shape, config, device))
            print(*shape, f"best {best:.1f} us, default {default:.1f} us, {config}", flush=True)
            write(entries)
    if not entries:
        parser.error(f"no shape is {arguments.only}")


if __name__ == "__main__":
    main()
