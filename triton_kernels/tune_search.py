"""How `tune` measures: device time of whole calls, and the search over launch configurations.

A configuration is timed as device time of one whole call, merge included: a CUDA graph of CALLS calls that rotate over
enough input sets to miss the L2 cache, median of SAMPLES replays. It counts only if its output agrees with the default
configuration's.
"""

import itertools
import statistics
from dataclasses import replace
from functools import lru_cache, partial

import torch
import triton

from triton_kernels.cubin import BYTES, MAX_SHARED
from triton_kernels.plan import Config

CALLS, SAMPLES, WARMUP = 20, 30, 5
SETS_BYTES = 256 * 2**20  # several times the L2 of an H100 or H200
AGREE = 1e-2


def set_count(cache_bytes):
    """Argument sets that a rotation needs in order to read from memory, not from L2."""
    return max(1, min(CALLS, -(-SETS_BYTES // cache_bytes)))


def microseconds(sets, call):
    """Median device time of one call(*set)."""
    call(*sets[0])  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for args, _ in zip(itertools.cycle(sets), range(CALLS), strict=False):
            call(*args)
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
def tiles(case, compile_case):
    """Tile shapes worth timing: no spills, and a pipeline that fits in shared memory."""
    width = (case.head_dim + case.value_dim) * BYTES[case.dtype]
    found = []
    for block_n, warps, stages in itertools.product((32, 64, 128), (4, 8), (2, 3, 4)):
        config = Config(block_n, warps, stages, 1, 2 * block_n)
        if block_n * width * (stages - 1) > MAX_SHARED or (block_n, warps) == (32, 8):
            continue
        measured = compile_case(case, config)
        shared = measured["shared"]
        if measured["spills"] == 0 and shared <= MAX_SHARED:
            registers = 65536 // (measured["registers"] * warps * 32)
            found.append(replace(config, ctas_per_sm=max(1, min(registers, MAX_SHARED // (shared + 1024)))))
    return found


def plans(config):
    """The same tiles under other split plans; nothing is compiled anew."""
    for ctas, count in itertools.product((1, 2, 3, 4, 6), (1, 2, 4, 8)):
        yield replace(config, ctas_per_sm=ctas, min_split=count * config.block_n)


def search(sets, call, default, configs, plans=plans):
    """(best Config, {Config: time}) of call(*set, config=...); the three best configs are tried with other plans.

    The first result of a call is compared, a tensor of any shape.
    """
    expected = call(*sets[0], config=default)[0].float()
    times = {default: microseconds(sets, partial(call, config=default))}

    def measure(config):
        if config in times:
            return
        try:
            out = call(*sets[0], config=config)[0].float()
        except triton.runtime.errors.OutOfResources:
            return
        if (out - expected).norm() <= AGREE * expected.norm():
            times[config] = microseconds(sets, partial(call, config=config))

    for config in configs:
        measure(config)
    for config in sorted(times, key=times.get)[:3]:
        for plan in plans(config):
            measure(plan)
    return min(times, key=times.get), times
