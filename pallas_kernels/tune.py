"""Measure launch configurations on the GPU at hand and write `tuning/decode_attention.json`.

    python -m pallas_kernels.tune                      every shape of SHAPES
    python -m pallas_kernels.tune --only 64x32x8x8192  one of them (B x N x K x S, every dtype and head dim listed)

A configuration is timed as device time of one whole call, merge included, over buffers taken in turn so that L2 stays
cold; it counts only if its output agrees with the default configuration's. Entries of other devices, and of shapes
that were not measured, stay in the table.
"""

import argparse
import itertools
import json
from dataclasses import asdict, replace

import jax
import numpy as np

from jforge.harness.timing import time_gpu
from pallas_kernels.compat import jnp, target
from pallas_kernels.decode_attention import make_facts, run
from pallas_kernels.plan import TUNING, Config

OP = "decode_attention"
SETS_BYTES = 256 * 2**20  # several times the L2 of an H100 or H200
SAMPLES = 30
AGREE = 1e-2

# dtype, head dim, value dim, B, N, K, S
SHAPES = (
    ("bfloat16", 128, 128, 1, 32, 8, 1024),
    ("bfloat16", 128, 128, 1, 32, 8, 4096),
    ("bfloat16", 128, 128, 1, 32, 8, 131072),
    ("bfloat16", 128, 128, 8, 32, 8, 32768),
    ("bfloat16", 128, 128, 16, 32, 8, 1024),
    ("bfloat16", 128, 128, 64, 32, 8, 8192),
    ("bfloat16", 128, 128, 128, 32, 8, 2048),
    ("bfloat16", 128, 128, 256, 32, 8, 512),
    ("bfloat16", 128, 128, 16, 32, 32, 8192),
    ("bfloat16", 128, 128, 64, 8, 1, 32768),
    ("bfloat16", 64, 64, 64, 64, 8, 8192),
    ("bfloat16", 256, 256, 16, 8, 4, 8192),
    ("bfloat16", 192, 128, 16, 16, 16, 8192),
)


def inputs(dtype, head_dim, value_dim, batch, heads, kv_heads, slots):
    """Argument sets of one shape, enough that a rotation over them reads from memory, not from L2."""
    cache_bytes = batch * slots * kv_heads * (head_dim + value_dim) * jnp.dtype(dtype).itemsize
    shapes = (batch, 1, heads, head_dim), (batch, slots, kv_heads, head_dim), (batch, slots, kv_heads, value_dim)
    lengths = jnp.full((batch,), slots, jnp.int32)
    keys = jax.random.split(jax.random.key(0), (min(20, 1 + SETS_BYTES // cache_bytes), 3))
    return [[jax.random.normal(k, s, dtype) for k, s in zip(row, shapes, strict=True)] + [lengths] for row in keys]


def call_of(shape, config):
    """The op under one configuration: (q, k, v, lengths) -> (out, lse)."""
    dtype, head_dim, value_dim, batch, heads, kv_heads, slots = shape
    sizes = dict(B=batch, T=1, S=slots, N=heads, K=kv_heads, H=head_dim, V=value_dim)
    facts = make_facts(sizes, jnp.dtype(dtype), jnp.dtype(dtype), scale=head_dim**-0.5, config=config)
    return lambda *args: run(*args, None, None, facts)


def candidates(slots):
    """Tiles and ring depths under the modelled number of splits; `tune` then varies the splits of the best."""
    for block, stages in itertools.product((64, 128), (2, 3, 4, 6)):
        if block <= max(slots, 64):
            yield Config(block, stages)


def tune(shape):
    """(best Config, its time, the default's) for one shape, in microseconds."""
    sets = inputs(*shape)
    expected = np.asarray(call_of(shape, None)(*sets[0])[0], np.float32)
    times = {None: _time(call_of(shape, None), sets)}

    def measure(config):
        try:
            call = call_of(shape, config)
            out = np.asarray(call(*sets[0])[0], np.float32)
        except ValueError as refusal:  # Mosaic raises it when the ring exceeds shared memory
            print("   ", config, "refused:", str(refusal).splitlines()[0][:80])
            return
        if np.linalg.norm(out - expected) <= AGREE * np.linalg.norm(expected):
            times[config] = _time(call, sets)

    for config in candidates(shape[-1]):
        measure(config)
    for config in sorted(filter(None, times), key=times.get)[:2]:
        for splits in (1, 2, 4, 8, 16, 24, 32, 48, 64):
            if splits * config.block <= shape[-1]:
                measure(replace(config, splits=splits))
    best = min(filter(None, times), key=times.get)
    return best, times[best], times[None]


def _time(call, sets):
    last = []
    calls = [lambda args=args: last.append(call(*args)) for args in sets]
    return time_gpu(calls, lambda: jax.block_until_ready(last), samples=SAMPLES).median


def entry_of(shape, config, device):
    dtype, head_dim, value_dim, batch, heads, kv_heads, slots = shape
    key = {"dtype": dtype, "head_dim": head_dim, "value_dim": value_dim, "group": heads // kv_heads}
    return key | {"batch_heads": batch * kv_heads, "length": slots, "device": device, "config": asdict(config)}


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="B x N x K x S of one shape, as in 64x32x8x8192")
    only = parser.parse_args().only
    if target().platform != "gpu":
        raise SystemExit("pallas_kernels.tune measures a GPU, and JAX sees none")
    device = "H100" if "H100" in target().device_kind else target().device_kind
    for shape in SHAPES:
        if only in (None, "x".join(map(str, shape[3:]))):
            best, microseconds, default = tune(shape)
            print(shape, best, f"{microseconds:.1f} us, default {default:.1f} us", flush=True)
            write([entry_of(shape, best, device)])


if __name__ == "__main__":
    main()
