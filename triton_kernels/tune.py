"""Measure launch configurations on the GPU at hand and write `tuning/<op>.json`.

    python -m triton_kernels.tune --op decode_mla                          every shape of the op's record
    python -m triton_kernels.tune --op decode_mla --set B=128 --set page=64
                                                     these sizes in every shape, each shape once: the table stays

A configuration is timed as device time of one whole call, merge included: a CUDA graph of CALLS calls that rotate over
enough arguments to miss the L2 cache, median of SAMPLES replays. It is tried only if its machine code has no spills and
fits in shared memory, and it counts only if its output agrees with the default configuration's. Entries of other
devices, and of shapes that were not measured, stay in the table.
"""

import argparse
import itertools
import json
import statistics
from dataclasses import asdict, replace
from functools import partial

import torch
import triton

from triton_kernels import runtime
from triton_kernels.device import device_of
from triton_kernels.offline import RECORDS, compile_kernel, launches, measure
from triton_kernels.plan import TUNING, Config, nearest, table

CALLS, SAMPLES, WARMUP = 20, 30, 5
AGREE = 1e-2
SHOWN = 6


def rotation(op, sizes, device):
    """Calls of one shape that read other memory, until they hold several times the L2 cache: [(args, options)]."""
    calls = op.calls("cuda", **sizes)
    sets = [next(calls)]
    held = torch.cuda.memory_allocated()
    while len(sets) < CALLS and torch.cuda.memory_allocated() - held < 5 * device.l2:
        sets.append(next(calls))
    return sets


def microseconds(sets, run):
    """Median device time of one run(*args, **options)."""
    run(*sets[0][0], **sets[0][1])  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for (args, options), _ in zip(itertools.cycle(sets), range(CALLS), strict=False):
            run(*args, **options)
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


def candidates(op, sizes, key, device):
    """The configurations of an op's sweep without spills, and with as many programs on an SM as fit."""
    code_sizes = {
        name: size for name, size in sizes.items() if name not in ("B", "S")
    }  # one compilation for all of these
    for config in op.sweep(key):
        trial = replace(config, ctas_per_sm=1) if getattr(config, "ctas_per_sm", 1) == 0 else config
        code = [measure(compile_kernel(kernel, *rest)) for kernel, _, *rest in launches(op, code_sizes, trial)]
        shared = max(row["shared"] for row in code)
        if any(row["spills"] for row in code) or shared > device.program_shared:
            continue
        if trial is not config:
            registers = device.sm_registers // (max(row["registers"] for row in code) * config.num_warps * 32)
            trial = replace(config, ctas_per_sm=max(1, min(registers, device.program_shared // (shared + 1024))))
        yield trial


def search(sets, run, default, configs):
    """(best configuration, {configuration: time}); the three best are tried with other split plans."""

    def first(config):
        args, options = sets[0]
        result = run(*args, **options, config=config)
        return (result[0] if isinstance(result, tuple) else result).float()

    expected = first(default)
    times = {default: microseconds(sets, partial(run, config=default))}

    def time(config):
        if config in times:
            return
        try:
            out = first(config)
        except triton.runtime.errors.OutOfResources:
            return
        if (out - expected).norm() <= AGREE * expected.norm():
            times[config] = microseconds(sets, partial(run, config=config))

    for config in configs:
        time(config)
    for config in sorted(times, key=times.get)[:3]:
        for other in config.others() if isinstance(config, Config) else ():
            time(other)
    return min(times, key=times.get), times


def write(op, key, device, config):
    """Put an entry into an op's table, in the place of one for the same shapes and device."""
    entry = key.bucket() | {"device": device.name}
    others = [other for other in table(op) if not entry.items() <= other.items()]
    lines = ",\n".join("    " + json.dumps(row) for row in (*others, entry | {"config": asdict(config)}))
    (TUNING / f"{op}.json").write_text(f'{{\n  "op": "{op}",\n  "entries": [\n{lines}\n  ]\n}}\n')
    table.cache_clear()
    nearest.cache_clear()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tunable = [name for name, op in RECORDS.items() if op.shapes]
    parser.add_argument("--op", choices=tunable, required=True)
    parser.add_argument("--set", action="append", default=[], help="size of every shape; writes no table")
    arguments = parser.parse_args()
    if runtime.INTERPRETED or not torch.cuda.is_available():
        parser.error("tuning needs a CUDA device, and TRITON_INTERPRET unset")
    op = RECORDS[arguments.op]
    given = {name: int(value) for name, value in (pair.split("=") for pair in arguments.set)}
    shapes = {str(shape | given): shape | given for shape in op.shapes}
    for sizes in shapes.values():
        args, options = next(op.calls("meta", **sizes))
        key, default = op.site(*args, **options)
        device = device_of(torch.empty(0, device="cuda"))
        configs = candidates(op, sizes, key, device)
        best, times = search(rotation(op, sizes, device), op.run, default, configs)
        print(sizes, f"best {times[best]:.1f} us, default {times[default]:.1f} us, {best}", flush=True)
        for config in sorted(times, key=times.get)[:SHOWN]:
            print(f"    {times[config]:9.1f} us  {config}", flush=True)
        if not given:
            write(op.name, key, device, best)


if __name__ == "__main__":
    main()
