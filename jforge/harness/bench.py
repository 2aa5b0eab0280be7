"""Times of an op: both kernel packages and their peers on a GPU, jforge and torch_ref on a CPU, on the same inputs.

A row is written only if its output passed the correctness gate on the timed inputs. GB/s counts the bytes that the
algorithm must move (queries, what is read of the caches, results), not partial results; the ceiling is a streaming
read of a large buffer, measured in the same run.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np

import jforge
from jforge.core import compare
from jforge.harness.backends import BACKENDS, KERNELS, to_torch
from jforge.harness.composites import COMPOSITES, Composite
from jforge.harness.draws import full, normal
from jforge.harness.op import Op, Work
from jforge.harness.ops import OPS
from jforge.harness.own_kernel import Own
from jforge.harness.peers import shared_tensors
from jforge.harness.timing import Call, jax_call, time_cpu, time_gpu

L2_BYTES = 64 * 2**20  # of the largest card here, so that rotating buffers leave nothing in it
WRONG = "wrong result"  # why a row has no time
TIMED: dict[str, Op | Composite] = {timed.name: timed for timed in (*OPS, *COMPOSITES) if timed.bench}


def run(names=tuple(TIMED), *, samples: int = 50, own: Own | None = None) -> Iterator[dict]:
    """The rows of these ops and steps on the machine at hand; on a CPU of those that have sizes for one, as of the
    others the two interpreters would be timed. own: somebody's function, timed beside the others as one of these ops.
    """
    on_gpu = jax.default_backend() == "gpu"
    for timed in (timed for name, timed in TIMED.items() if name in names):
        yield from (bench_gpu if on_gpu else bench_cpu)(timed, samples=samples, own=own)


def bench_cpu(op: Op | Composite, *, samples: int = 20, seed: int = 0, own: Own | None = None) -> Iterator[dict]:
    """jforge.ops, compiled by XLA, and torch_ref.ops on this CPU, float32: for a machine without a GPU."""
    for work in op.cpu:
        arrays = [a if a is None or a.dtype == jnp.int32 else a.astype(jnp.float32) for a in _inputs(op, work, seed)]
        tensors = [None if a is None else to_torch(np.asarray(a)) for a in arrays]
        packages = [("jforge (XLA)", "jax", jforge.ops), ("torch_ref", "torch", BACKENDS["torch_ref"].ops)]
        packages += [] if own is None else [(own.name, own.framework, own.ops(op.name))]
        want = _reference(op, work, arrays)
        for name, framework, ops in packages:
            call = functools.partial(op.run, ops, work.options)
            call = _xla(call, arrays) if framework == "jax" else _eager(call, tensors)
            row = {"what": op.name, "implementation": name, "dtype": "float32", **_shown(work)}
            try:
                error = _error(op, call(), want)
            except Exception as refusal:  # of somebody's own function
                yield {**row, "refused": " ".join(str(refusal).split())[:200]}
                continue
            if not error <= compare.OUT["float32"]:
                yield {**row, "error": error, "refused": WRONG}
                continue
            timing = time_cpu(call, samples=samples)
            rate = 2 * op.moved(**work.sizes, **work.options) / timing.median / 1e3
            yield {**row, "error": error, **asdict(timing), "GB_per_s": rate}


def _xla(call: Callable, arrays: list) -> Callable:
    compiled = jax.jit(call)
    return lambda: jax.block_until_ready(compiled(*arrays))


def _eager(call: Callable, tensors: list) -> Callable:
    import torch

    def run():
        with torch.no_grad():
            return call(*tensors)

    return run


def bench_gpu(op: Op | Composite, *, samples: int = 50, seed: int = 0, own: Own | None = None) -> Iterator[dict]:
    """Rows for every call and implementation, bf16; the first row is the read ceiling. Needs an NVIDIA GPU."""
    import torch

    ceiling = read_ceiling()
    yield {"what": "ceiling", "GB_per_s": ceiling, "samples": samples}
    for work in op.bench:
        moved = op.moved(**work.sizes, **work.options)
        sets = min(64, max(1, math.ceil(4 * L2_BYTES / moved)))
        inputs = [_inputs(op, work, seed + i) for i in range(sets)]
        want = _reference(op, work, inputs[0])
        for call in _implementations(op, work, inputs, own):
            yield _gated_row(op, work, call, sets, want, samples, ceiling)
        del inputs, want, call
        torch.cuda.empty_cache()  # the peers' memory, which JAX needs now


def _inputs(op: Op | Composite, work: Work, seed: int) -> list:
    """The arguments of a call in bfloat16, on the device."""
    fill = {"lengths": full, **op.fill}
    every, arrays, sizes = {**op.axes, **op.keywords}, [], {"T": 1, **work.sizes}
    for (name, axes), key in zip(every.items(), jax.random.split(jax.random.key(seed), len(every)), strict=True):
        shape = tuple(sizes[axis] for axis in axes)
        if name in work.absent:
            arrays.append(None)
        elif name in fill:
            arrays.append(fill[name](key, shape, work.sizes, work.options))
        else:
            arrays.append(normal(key, shape))
    return arrays


def _reference(op: Op | Composite, work: Work, arrays: list):
    """What a call returns, in float32 from jforge.ops."""
    more = {"out_dtype": jnp.float32} if op.attends else {}
    result = jax.jit(lambda *arrays: op.run(jforge.ops, work.options, *arrays, **more))(*arrays)
    return jax.tree.map(lambda array: np.asarray(array, np.float32), result)


def _implementations(op: Op | Composite, work: Work, inputs: list[list], own: Own | None = None) -> Iterator[Call]:
    """Ours, somebody's own, then the peers. A state is carried from call to call: donated by JAX, overwritten in place
    by torch.
    """
    import torch

    carry = None if op.carry is None else list(op.axes).index(op.carry)
    tensors = shared_tensors(inputs, carry)  # before the first call: JAX's state is given away there
    packages = [(name, BACKENDS[name].framework, BACKENDS[name].ops) for name in KERNELS]
    packages += [] if own is None else [(own.name, own.framework, own.ops(op.name))]
    for name, framework, ops in packages:
        if framework == "jax":
            yield jax_call(name, lambda *a, ops=ops: op.run(ops, work.options, *a), inputs, carry)
        else:
            yield Call(name, lambda i, ops=ops: op.run(ops, work.options, *tensors[i]), torch.cuda.synchronize)
    if work.peers is not None:
        yield from work.peers(work, inputs)


def _gated_row(op: Op | Composite, work: Work, call: Call, sets: int, want, samples: int, ceiling: float) -> dict:
    """Gate, then time. A refusal or a failed gate is a row without a time."""
    row = {"what": op.name, "implementation": call.name, "dtype": "bfloat16", **_shown(work)}
    if call.refused:
        return {**row, "refused": call.refused}
    try:
        got = call.run(0)
        call.synchronise()
    except Exception as refusal:  # a peer may fail in any way; ours are tested elsewhere
        return {**row, "refused": " ".join(str(refusal).split())[:200]}
    error = _error(op, got, want if call.want is None else call.want)
    if not error <= compare.OUT["bfloat16"]:
        return {**row, "error": error, "refused": WRONG}
    sets = call.sets or sets
    timing = time_gpu([lambda i=i: call.run(i) for i in range(sets)], call.synchronise, samples=samples)
    rate = (call.moved or op.moved(**work.sizes, **work.options)) / timing.median / 1e3
    return {**row, "error": error, "sets": sets, **asdict(timing), "GB_per_s": rate, "of_ceiling": rate / ceiling}


def _shown(work: Work) -> dict:
    """The sizes that a row shows: the axes, and the options that change what is read."""
    return {**work.sizes, **{name: work.options[name] for name in ("window", "block_size") if name in work.options}}


def _error(op: Op | Composite, got, want) -> float:
    """The worst error of what a call returns, one array or several."""
    judge = compare.worst_head if op.attends else compare.worst_row
    pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in (got, want)), strict=True)
    return max(judge(_float32(ours), theirs) for ours, theirs in pairs)


def _float32(array):
    return array.float().cpu().numpy() if hasattr(array, "cpu") else array.astype(jnp.float32)


def read_ceiling(megabytes: int = 2048) -> float:
    """GB/s of a kernel that only reads: the best of a few block sizes."""
    import torch

    from jforge.harness import ceiling

    data = torch.randint(1, 100, (megabytes * 2**20 // 4,), dtype=torch.int32, device="cuda")
    best = 0.0
    for block in ceiling.BLOCKS:
        timing = time_gpu([lambda b=block: ceiling.read(data, b)], torch.cuda.synchronize, samples=20)
        best = max(best, data.numel() * 4 / timing.median / 1e3)
    return best
