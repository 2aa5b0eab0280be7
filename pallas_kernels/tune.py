"""Measure launch configurations on the GPU at hand and write `tuning/<op>.json`, for the ops that end with a TUNABLE.

    python -m pallas_kernels.tune                      every shape of every op
    python -m pallas_kernels.tune --op NAME            of one op
    python -m pallas_kernels.tune --only 64x32x8x8192  of one B x N x K x S (every head dim listed)

A configuration is timed as device time of one whole call, merge included, over buffers taken in turn so that L2 stays
cold; it counts only if its output agrees with the default configuration's. Entries of other devices, and of shapes
that were not measured, stay in the table.
"""

import argparse
import importlib
import json
import math
from dataclasses import asdict, replace

import jax
import numpy as np

import pallas_kernels
from jforge.harness.timing import time_gpu
from pallas_kernels.compat import jnp, target
from pallas_kernels.plan import TUNING, card

SETS_BYTES = 256 * 2**20  # several times the L2 of an H100 or H200
SAMPLES = 30
AGREE = 1e-2

_MODULES = (importlib.import_module(f"pallas_kernels.{name}") for name in pallas_kernels.__all__)
OPS = {module.TUNABLE.op: module.TUNABLE for module in _MODULES if hasattr(module, "TUNABLE")}


def call_of(op, sizes, config=None):
    """(a function of the arguments and lengths, its splits) for a configuration, or the default one."""
    dtype, scale = jnp.dtype(op.dtype), sizes[op.letters[0]] ** -0.5
    facts = op.make_facts(sizes, dtype, dtype, scale=scale, config=config)
    return (lambda *args: op.run(*args, None, None, facts)), facts.splits


def inputs(op, sizes):
    """Argument sets of one call, enough that a rotation over them reads from memory, not from L2."""
    shapes = [tuple(sizes[axis] for axis in axes) for axes in op.arrays]
    cache_bytes = jnp.dtype(op.dtype).itemsize * sum(map(math.prod, shapes[len(shapes) // 2 :]))
    lengths = jnp.full((sizes["B"],), sizes["S"], jnp.int32)
    keys = jax.random.split(jax.random.key(0), (min(20, 1 + SETS_BYTES // cache_bytes), len(shapes)))
    return [[jax.random.normal(k, s, op.dtype) for k, s in zip(row, shapes, strict=True)] + [lengths] for row in keys]


def tune(op, sizes):
    """(best Config, its time, the default's) for one call, in microseconds; prints every time."""
    sets = inputs(op, sizes)
    default, _ = call_of(op, sizes)
    expected = np.asarray(default(*sets[0])[0], np.float32)
    times = {None: _time(default, sets)}

    def measure(config):
        call, splits = call_of(op, sizes, config)
        try:
            out = np.asarray(call(*sets[0])[0], np.float32)
        except ValueError as refusal:  # Mosaic raises it when the ring exceeds shared memory
            print("   ", config, "refused:", str(refusal).splitlines()[0][:80])
            return
        if np.linalg.norm(out - expected) > AGREE * np.linalg.norm(expected):
            print("   ", config, "disagrees with the default")
            return
        times[config] = _time(call, sets)
        print("   ", config, f"{splits} splits: {times[config]:.1f} us", flush=True)

    for config in op.candidates:
        if config.block <= max(sizes["S"], 64):
            measure(config)
    for config in sorted(filter(None, times), key=times.get)[: op.finalists]:
        for splits in op.splits(call_of(op, sizes, config)[1]):
            if splits * config.block <= sizes["S"]:
                measure(replace(config, splits=splits))
    best = min(filter(None, times), key=times.get)
    return best, times[best], times[None]


def _time(call, sets):
    last = []
    calls = [lambda args=args: last.append(call(*args)) for args in sets]
    return time_gpu(calls, lambda: jax.block_until_ready(last), samples=SAMPLES).median


def entry_of(op, sizes, config):
    B, N, K, S, head_dim, value_dim = (sizes[axis] for axis in "BNKS" + op.letters)
    key = dict(dtype=op.dtype, head_dim=head_dim, value_dim=value_dim, group=N // K, batch_heads=B * K, length=S)
    return key | dict(device=card().name, config=asdict(config))


def write(name, entries):
    """Put entries into an op's table, in the place of those with the same key."""

    def key(entry):
        return tuple(str(value) for name, value in entry.items() if name != "config")

    path = TUNING / f"{name}.json"
    table = {key(entry): entry for entry in json.loads(path.read_text())["entries"]} if path.exists() else {}
    table |= {key(entry): entry for entry in entries}
    lines = ",\n".join("    " + json.dumps(entry) for entry in table.values())
    path.write_text(f'{{\n  "op": "{name}",\n  "entries": [\n{lines}\n  ]\n}}\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=OPS, help="without it, all")
    parser.add_argument("--only", help="B x N x K x S of one shape, as in 64x32x8x8192")
    arguments = parser.parse_args()
    if target().platform != "gpu":
        raise SystemExit("pallas_kernels.tune measures a GPU, and JAX sees none")
    for name, op in OPS.items():
        for shape in op.shapes if arguments.op in (None, name) else ():
            sizes = dict(zip(op.letters + "BNKS", shape, strict=True), T=1)
            if arguments.only in (None, "{B}x{N}x{K}x{S}".format(**sizes)):
                best, microseconds, default = tune(op, sizes)
                print(name, sizes, best, f"{microseconds:.1f} us, default {default:.1f} us", flush=True)
                write(name, [entry_of(op, sizes, best)])


if __name__ == "__main__":
    main()
