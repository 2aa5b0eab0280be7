"""Times of an op: both kernel packages and their peers on a GPU, jforge and torch_ref on a CPU, on the same inputs.

A row is written only if its output passed the correctness gate on the timed inputs. GB/s counts the bytes that the
algorithm must move (q, the readable keys and values, out), not partial results; the ceiling is a streaming read of a
large buffer, measured in the same run.
"""

import datetime
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jforge
from jforge.harness import compare
from jforge.harness.timing import time_cpu, time_gpu

L2_BYTES = 64 * 2**20  # of the largest card here, so that rotating buffers leave nothing in it


class Shape(NamedTuple):
    """One dense decode call: every row holds S tokens."""

    B: int
    N: int
    K: int
    S: int
    H: int = 128

    @property
    def bytes_moved(self) -> int:
        """bf16 bytes of q, k, v and out."""
        return 2 * self.B * self.H * (2 * self.K * self.S + 2 * self.N)


DENSE_SHAPES = tuple(
    Shape(*sizes)
    for sizes in (
        (1, 32, 8, 131072), (8, 32, 8, 32768), (64, 32, 8, 8192), (128, 32, 8, 2048), (16, 32, 32, 8192),
        (64, 8, 1, 32768), (1, 32, 8, 4096), (1, 32, 8, 1024), (16, 32, 8, 1024), (256, 32, 8, 512),
    )
)  # fmt: skip


class Call(NamedTuple):
    """An implementation: `run(i)` computes on input set i and returns what is judged, of its own framework."""

    name: str
    run: Callable[[int], Any]
    synchronise: Callable[[], None]


def environment(commit: str | None = None) -> dict:
    """What a record must say about where it came from; `commit` where the tree has no .git to ask."""
    import torch
    import triton

    def shell(*command: str) -> str:
        if shutil.which(command[0]) is None:
            return ""
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    driver = shell("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "driver": driver,
        "versions": {
            "python": platform.python_version(),
            **{m.__name__: m.__version__ for m in (jax, torch, triton)},
        },
        "commit": commit or shell("git", "rev-parse", "--short", "HEAD") or None,
        "command": " ".join(Path(word).name if "/" in word else word for word in sys.argv),
    }


CPU_SHAPES = (Shape(1, 32, 8, 1024), Shape(4, 32, 8, 1024), Shape(1, 32, 32, 4096))


def bench_cpu(shapes=CPU_SHAPES, *, samples: int = 20, seed: int = 0) -> Iterator[dict]:
    """jforge.ops, compiled by XLA, and torch_ref.ops on this CPU, float32: for a machine without a GPU."""
    import torch

    import torch_ref
    from jforge.harness.backends import to_torch

    xla = jax.jit(lambda q, k, v, n: jforge.ops.decode_attention(q, k, v, n, scale=q.shape[-1] ** -0.5)[0])
    for shape in shapes:
        arrays = [a.astype(jnp.float32) if a.ndim == 4 else a for a in _inputs(shape, seed)]
        tensors = [to_torch(np.asarray(a)) for a in arrays]
        want = _reference(*arrays)

        def torch_call(tensors=tensors, scale=shape.H**-0.5):
            with torch.no_grad():
                return torch_ref.ops.decode_attention(*tensors, scale=scale)[0]

        calls = {"jforge (XLA)": lambda arrays=arrays: xla(*arrays).block_until_ready(), "torch_ref": torch_call}
        for name, call in calls.items():
            row = {"what": "decode_attention", "implementation": name, "dtype": "float32", **shape._asdict()}
            error = compare.worst_head(float32(call()), want)
            if error > compare.OUT["float32"]:
                yield {**row, "error": error, "refused": "wrong result"}
                continue
            timing = time_cpu(call, samples=samples)
            yield {**row, "error": error, **asdict(timing), "GB_per_s": 2 * shape.bytes_moved / timing.median / 1e3}


def bench_dense(shapes=DENSE_SHAPES, *, samples: int = 50, seed: int = 0) -> Iterator[dict]:
    """Rows for every shape and implementation, bf16; the first row is the read ceiling. Needs an NVIDIA GPU."""
    ceiling = read_ceiling()
    yield {"what": "ceiling", "GB_per_s": ceiling, "samples": samples}
    for shape in shapes:
        sets = min(64, max(1, math.ceil(4 * L2_BYTES / shape.bytes_moved)))
        inputs = [_inputs(shape, seed + i) for i in range(sets)]
        want = [jax.jit(_reference)(*arrays) for arrays in inputs[:1]]
        for call in _implementations(shape, inputs):
            yield shape_row("decode_attention", call, shape, sets, want[0], samples, ceiling)
        del inputs, want


def _inputs(shape: Shape, seed: int) -> tuple[jax.Array, ...]:
    B, N, K, S, H = shape
    keys = jax.random.split(jax.random.key(seed), 3)
    sizes = ((B, 1, N, H), (B, S, K, H), (B, S, K, H))
    arrays = [jax.random.normal(key, size, jnp.bfloat16) for key, size in zip(keys, sizes, strict=True)]
    return (*arrays, jnp.full((B,), S, jnp.int32))


def _reference(q, k, v, lengths):
    return jforge.ops.decode_attention(q, k, v, lengths, scale=q.shape[-1] ** -0.5, out_dtype=jnp.float32)[0]


def shape_row(what: str, call: Call, shape, sets: int, want, samples: int, ceiling: float) -> dict:
    """gated_row of a shape that knows the bytes it moves."""
    return gated_row(what, call, shape._asdict(), shape.bytes_moved, sets, want, samples, ceiling)


def gated_row(
    what: str, call: Call, sizes, moved: int, sets: int, want, samples: int, ceiling: float, judge=compare.worst_head
) -> dict:
    """Gate, then time. A refusal or a failed gate is a row without a time."""
    row = {"what": what, "implementation": call.name, "dtype": "bfloat16", **sizes}
    try:
        got = call.run(0)
        call.synchronise()
    except Exception as refusal:  # a peer may fail in any way; ours are tested elsewhere
        return {**row, "refused": " ".join(str(refusal).split())[:200]}
    got, want = (results if isinstance(results, tuple) else (results,) for results in (got, want))
    error = max(judge(float32(ours), theirs) for ours, theirs in zip(got, want, strict=True))
    if not error <= compare.OUT["bfloat16"]:
        return {**row, "error": error, "refused": "wrong result"}
    timing = time_gpu([lambda i=i: call.run(i) for i in range(sets)], call.synchronise, samples=samples)
    rate = moved / timing.median / 1e3
    return {**row, "error": error, "sets": sets, **asdict(timing), "GB_per_s": rate, "of_ceiling": rate / ceiling}


def float32(array):
    return array.float().cpu().numpy() if hasattr(array, "cpu") else array.astype(jnp.float32)


def _implementations(shape: Shape, inputs) -> Iterator[Call]:
    """Ours, then the peers: torch's fused attention twice, FlexAttention, and cuDNN through JAX."""
    import torch

    import pallas_kernels
    import triton_kernels

    scale = shape.H**-0.5
    yield jax_call("pallas", lambda q, k, v, n: pallas_kernels.decode_attention(q, k, v, n, scale=scale)[0], inputs)
    yield jax_call(
        "cudnn (JAX)",
        lambda q, k, v, n: jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn"),
        inputs,
    )
    tensors = [[torch.from_dlpack(a) for a in arrays] for arrays in inputs]
    for ours, theirs in zip(inputs[0], tensors[0], strict=True):
        if ours.unsafe_buffer_pointer() != theirs.data_ptr():
            raise RuntimeError("dlpack copied an input: the frameworks would not read the same buffer")
    wait = torch.cuda.synchronize
    yield Call("triton", lambda i: triton_kernels.decode_attention(*tensors[i], scale=scale)[0], wait)
    for name, function in _torch_peers():
        yield Call(name, lambda i, f=function: _heads_first(f, *tensors[i][:3], scale), wait)


def jax_call(name: str, function: Callable, inputs, carry: int | None = None) -> Call:
    """`function` compiled. carry: the argument that is donated and replaced by the second result, a state."""
    compiled, last = jax.jit(function, donate_argnums=() if carry is None else carry), []

    def run(i: int):
        result = compiled(*inputs[i])
        if carry is None:
            last[:] = [result]
        else:  # what is waited for must outlive the next call, to which the state is given
            inputs[i][carry], last[:] = result[1], result[:1]
        return result

    return Call(name, run, lambda: jax.block_until_ready(last))


def _torch_peers() -> Iterator[tuple[str, Callable]]:
    """(name, function of q, k, v in B N S H) of what torch offers."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import flex_attention

    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):

        def fused(*qkv, scale: float, backend=backend):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*qkv, scale=scale, enable_gqa=True)

        yield f"sdpa {name}", fused
    torch._dynamo.config.cache_size_limit = 64  # one specialisation a shape
    compiled = torch.compile(flex_attention, dynamic=False)
    yield "flex", lambda *qkv, scale: compiled(*qkv, scale=scale, enable_gqa=True)


def _heads_first(function: Callable, q, k, v, scale: float):
    """torch's attention wants B N S H: views of the same buffers. No mask is needed, as every key is readable."""
    return function(*(a.transpose(1, 2) for a in (q, k, v)), scale=scale).transpose(1, 2)


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


OPS = ("decode_attention", "decode_mla", "decode_block_sparse", "decode_sparse_mla", "index_scores",
       "block_index_scores", "msa step", "decode_linear")  # fmt: skip


def run(ops=OPS, *, samples: int = 50) -> Iterator[dict]:
    """The rows of these ops on the machine at hand: all on a GPU, dense attention on a CPU."""
    from jforge.harness import bench_latent, bench_sparse  # they build on this file

    if jax.default_backend() != "gpu":  # of the other ops the two interpreters would be timed
        yield from bench_cpu(samples=samples) if "decode_attention" in ops else ()
        return
    import torch

    if "decode_attention" in ops:
        yield from bench_dense(samples=samples)
    if "decode_mla" in ops:
        yield from bench_latent.bench_mla(samples=samples)
        torch.cuda.empty_cache()  # the expanded caches' memory, which JAX needs now
    if set(ops) & set(bench_sparse.OPS):
        yield from bench_sparse.run(ops, samples=samples)


def append(path: str | Path, rows: list[dict], where: dict) -> None:
    """Add rows as JSON lines, each with the environment `where` that it came from."""
    with Path(path).open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**where, **row}) + "\n")


def writable(option: str, path: str) -> None:
    """Raise ValueError unless a file can be written at `path`; nothing in it changes."""
    new = not os.path.exists(path)
    try:
        with open(path, "ab"):
            pass
    except OSError as problem:
        raise ValueError(f"{option} is {path!r}; it cannot be written: {problem.strerror}") from None
    if new:
        os.remove(path)
