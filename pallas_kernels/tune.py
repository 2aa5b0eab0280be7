"""Measure launch configurations on the GPU at hand and write `tuning/<op>.json`.

    python -m pallas_kernels.tune                      decode_attention, every shape of its list
    python -m pallas_kernels.tune --only 64x32x8x8192  one of them (B x N x K x S, every dtype and head dim listed)
    python -m pallas_kernels.tune --op decode_mla      the latent kernels (K is 1)

A configuration is timed as device time of one whole call, merge included, over buffers taken in turn so that L2 stays
cold; it counts only if its output agrees with the default configuration's. Entries of other devices, and of shapes
that were not measured, stay in the table.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import jax
import numpy as np

from jforge.harness.timing import time_gpu
from pallas_kernels.compat import jnp, target
from pallas_kernels.decode_attention import make_facts, run
from pallas_kernels.decode_mla import make_facts as mla_facts
from pallas_kernels.decode_mla import run as run_mla
from pallas_kernels.plan import TUNING, Config

SETS_BYTES = 256 * 2**20  # several times the L2 of an H100 or H200
SAMPLES = 30
AGREE = 1e-2


@dataclass(frozen=True)
class Shape:
    """A call to measure. head_dim and value_dim are those of the table: for decode_mla latent rank and rope dims."""

    dtype: str
    head_dim: int
    value_dim: int
    B: int
    N: int
    K: int
    S: int


@dataclass(frozen=True)
class Op:
    """How to tune one op: its shapes, the shapes of its arguments without lengths, calls, candidates, splits to try."""

    shapes: tuple[Shape, ...]
    arguments: Callable  # Shape -> shapes
    call: Callable  # Shape, Config or None -> function of the arguments and lengths, and its splits
    candidates: Callable  # Shape -> Configs with the modelled number of splits
    splits: Callable  # modelled number -> numbers to try for the best candidates
    finalists: int


def _attention_arguments(x):
    return (x.B, 1, x.N, x.head_dim), (x.B, x.S, x.K, x.head_dim), (x.B, x.S, x.K, x.value_dim)


def _attention_call(x, config):
    sizes = dict(B=x.B, T=1, S=x.S, N=x.N, K=x.K, H=x.head_dim, V=x.value_dim)
    facts = make_facts(sizes, jnp.dtype(x.dtype), jnp.dtype(x.dtype), scale=x.head_dim**-0.5, config=config)
    return (lambda *args: run(*args, None, None, facts)), facts.splits


def _attention_candidates(x):
    for block, stages in itertools.product((64, 128), (2, 3, 4, 6)):
        if block <= max(x.S, 64):
            yield Config(block, stages)


def _mla_arguments(x):
    widths = x.head_dim, x.value_dim
    return *((x.B, 1, x.N, width) for width in widths), *((x.B, x.S, width) for width in widths)


def _mla_call(x, config):
    sizes = dict(B=x.B, T=1, S=x.S, N=x.N, C=x.head_dim, R=x.value_dim)
    scale = (x.head_dim + x.value_dim) ** -0.5
    facts = mla_facts(sizes, jnp.dtype(x.dtype), jnp.dtype(x.dtype), scale=scale, config=config)
    return (lambda *args: run_mla(*args, None, None, facts)), facts.splits


def _mla_candidates(x):
    yield Config(64, 2)  # no other tile fits beside its own exchange; what is left to measure is the splits


OPS = {
    "decode_attention": Op(
        tuple(
            Shape("bfloat16", *dims)
            for dims in (
                (128, 128, 1, 32, 8, 1024),
                (128, 128, 1, 32, 8, 4096),
                (128, 128, 1, 32, 8, 131072),
                (128, 128, 8, 32, 8, 32768),
                (128, 128, 16, 32, 8, 1024),
                (128, 128, 64, 32, 8, 8192),
                (128, 128, 128, 32, 8, 2048),
                (128, 128, 256, 32, 8, 512),
                (128, 128, 16, 32, 32, 8192),
                (128, 128, 64, 8, 1, 32768),
                (64, 64, 64, 64, 8, 8192),
                (256, 256, 16, 8, 4, 8192),
                (192, 128, 16, 16, 16, 8192),
            )
        ),
        _attention_arguments,
        _attention_call,
        _attention_candidates,
        lambda modelled: (1, 2, 4, 8, 16, 24, 32, 48, 64),
        finalists=2,
    ),
    "decode_mla": Op(
        tuple(
            Shape("bfloat16", 512, 64, *dims)
            for dims in (
                (128, 16, 1, 4096),
                (128, 128, 1, 4096),
                (16, 128, 1, 16384),
                (64, 64, 1, 8192),
                (1, 128, 1, 131072),
            )
        ),
        _mla_arguments,
        _mla_call,
        _mla_candidates,
        lambda modelled: sorted({max(1, modelled // 2), modelled * 2} - {modelled}),
        finalists=1,
    ),
}


def inputs(op, x):
    """Argument sets of one shape, enough that a rotation over them reads from memory, not from L2."""
    shapes = op.arguments(x)
    cache_bytes = sum(np.prod(shape) for shape in shapes[len(shapes) // 2 :]) * jnp.dtype(x.dtype).itemsize
    lengths = jnp.full((x.B,), x.S, jnp.int32)
    keys = jax.random.split(jax.random.key(0), (min(20, 1 + SETS_BYTES // int(cache_bytes)), len(shapes)))
    return [[jax.random.normal(k, s, x.dtype) for k, s in zip(row, shapes, strict=True)] + [lengths] for row in keys]


def tune(op, x):
    """(best Config, its time, the default's) for one shape, in microseconds; prints every time."""
    sets = inputs(op, x)
    default, _ = op.call(x, None)
    expected = np.asarray(default(*sets[0])[0], np.float32)
    times = {None: _time(default, sets)}

    def measure(config):
        call, splits = op.call(x, config)
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

    for config in op.candidates(x):
        measure(config)
    for config in sorted(filter(None, times), key=times.get)[: op.finalists]:
        for splits in op.splits(op.call(x, config)[1]):
            if splits * config.block <= x.S:
                measure(replace(config, splits=splits))
    best = min(filter(None, times), key=times.get)
    return best, times[best], times[None]


def _time(call, sets):
    last = []
    calls = [lambda args=args: last.append(call(*args)) for args in sets]
    return time_gpu(calls, lambda: jax.block_until_ready(last), samples=SAMPLES).median


def entry_of(x, config, device):
    key = {"dtype": x.dtype, "head_dim": x.head_dim, "value_dim": x.value_dim, "group": x.N // x.K}
    return key | {"batch_heads": x.B * x.K, "length": x.S, "device": device, "config": asdict(config)}


def write(op, entries):
    """Put entries into the table, in the place of those with the same key."""

    def key(entry):
        return tuple(str(value) for name, value in entry.items() if name != "config")

    path = TUNING / f"{op}.json"
    table = {key(entry): entry for entry in json.loads(path.read_text())["entries"]} if path.exists() else {}
    table |= {key(entry): entry for entry in entries}
    lines = ",\n".join("    " + json.dumps(entry) for entry in table.values())
    path.write_text(f'{{\n  "op": "{op}",\n  "entries": [\n{lines}\n  ]\n}}\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=OPS, default="decode_attention")
    parser.add_argument("--only", help="B x N x K x S of one shape, as in 64x32x8x8192")
    arguments = parser.parse_args()
    if target().platform != "gpu":
        raise SystemExit("pallas_kernels.tune measures a GPU, and JAX sees none")
    device = "H100" if "H100" in target().device_kind else target().device_kind
    op = OPS[arguments.op]
    for x in op.shapes:
        if arguments.only in (None, f"{x.B}x{x.N}x{x.K}x{x.S}"):
            best, microseconds, default = tune(op, x)
            print(x, best, f"{microseconds:.1f} us, default {default:.1f} us", flush=True)
            write(arguments.op, [entry_of(x, best, device)])


if __name__ == "__main__":
    main()
