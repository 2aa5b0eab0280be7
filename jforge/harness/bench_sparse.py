"""Benchmarks of the ops that read a part of a cache, score one, or keep a state: both packages on the same inputs.

Each op has a few calls (`Work`): how to draw its arguments in bf16, its options, and the bytes that it must move. The
loop, the gate and the timing are those of `bench`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jforge
from jforge.harness import compare
from jforge.harness.bench import L2_BYTES, Call, gated_row, jax_call, read_ceiling


@dataclass(frozen=True)
class Work:
    """One call of an op at fixed sizes; `draw(sizes, key)` gives its arrays, `moved` the bytes that it must move.

    `run(ops, *arrays)` instead of one op: a step that takes several.
    """

    op: str
    sizes: Mapping[str, int]
    draw: Callable[[Mapping[str, int], jax.Array], tuple[Any, ...]]
    moved: int
    options: Mapping[str, Any] = field(default_factory=dict)
    run: Callable | None = None

    def __call__(self, ops, *arrays, **more):
        """What is judged of the op (or step) of a namespace: the out of an attention, all results of other ops."""
        if self.run is not None:
            return self.run(ops, *arrays, **more)
        result = getattr(ops, self.op)(*arrays, **self.options, **more)
        return result[0] if _attends(self.op) else result


def _normal(key, *shape: int, dtype=jnp.bfloat16) -> jax.Array:
    return jax.jit(lambda key: jax.random.normal(key, shape, dtype))(key)


def _lists(key, count: int, picks: int, *shape: int) -> jax.Array:
    """int32 [*shape, picks]: distinct numbers below `count` in random order."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    drawn = [rng.choice(count, picks, replace=False) for _ in range(math.prod(shape))]
    return jnp.asarray(np.reshape(drawn, (*shape, picks)), jnp.int32)


def _full(s: Mapping[str, int]) -> jax.Array:
    return jnp.full((s["B"],), s["S"], jnp.int32)


def _window(B: int, N: int, K: int, S: int, H: int, window: int | None) -> Work:
    def draw(s, key):
        a, b, c = jax.random.split(key, 3)
        return _normal(a, B, 1, N, H), _normal(b, B, S, K, H), _normal(c, B, S, K, H), _full(s)

    sizes = {"B": B, "N": N, "K": K, "S": S, "H": H, "window": window or 0}
    moved = 4 * B * (min(S, window or S) * K + N) * H
    return Work("decode_attention", sizes, draw, moved, {"scale": H**-0.5, "window": window})


def _blocks(B: int, N: int, K: int, S: int, L: int, size: int, H: int = 128) -> Work:
    def draw(s, key):
        a, b, c, d = jax.random.split(key, 4)
        k, v = _normal(b, B, S, K, H), _normal(c, B, S, K, H)
        return _normal(a, B, 1, N, H), k, v, _lists(d, S // size, L, B, 1, K), _full(s)

    sizes = {"B": B, "N": N, "K": K, "S": S, "H": H, "L": L, "block_size": size}
    moved = 4 * B * (L * size * K + N) * H
    return Work("decode_block_sparse", sizes, draw, moved, {"scale": H**-0.5, "block_size": size})


def _csa(B: int, N: int, S: int, L: int, H: int = 512) -> Work:
    """DeepSeek-V4: picked entries of one head whose keys are its values."""

    def draw(s, key):
        a, b, c = jax.random.split(key, 3)
        return _normal(a, B, 1, N, H), _normal(b, B, S, 1, H), None, _lists(c, S, L, B, 1, 1), None

    sizes = {"B": B, "N": N, "K": 1, "S": S, "H": H, "L": L, "block_size": 1}
    moved = 2 * B * (L + 2 * N) * H
    return Work("decode_block_sparse", sizes, draw, moved, {"scale": H**-0.5, "block_size": 1})


def _sparse_mla(B: int, N: int, S: int, L: int, C: int = 512, R: int = 64) -> Work:
    def draw(s, key):
        a, b, c, d, e = jax.random.split(key, 5)
        queries = _normal(a, B, 1, N, C), _normal(b, B, 1, N, R)
        return *queries, _normal(c, B, S, C), _normal(d, B, S, R), _lists(e, S, L, B, 1)

    moved = 2 * B * (L * (C + R) + N * (2 * C + R))
    return Work("decode_sparse_mla", {"B": B, "N": N, "S": S, "L": L}, draw, moved, {"scale": 192**-0.5})


def _index(B: int, heads: int, S: int, J: int = 128, size: int | None = None) -> Work:
    """index_scores, or block_index_scores with a block size."""

    def draw(s, key):
        a, b, c = jax.random.split(key, 3)
        q, k, n = _normal(a, B, 1, heads, J), _normal(b, B, S, J), _full(s)
        return (q, k, n) if size else (q, k, _normal(c, B, 1, heads, dtype=jnp.float32), n)

    sizes = {"B": B, "I": heads, "S": S, "J": J, "block_size": size or 0}
    scores = 4 * heads * -(-S // size) if size else 4 * S
    moved = B * (2 * (heads + S) * J + scores)
    op, options = ("block_index_scores", {"block_size": size}) if size else ("index_scores", {})
    return Work(op, sizes, draw, moved, options)


def _linear(B: int, N: int, H: int = 128) -> Work:
    def draw(s, key):
        *keys, last = jax.random.split(key, 5)
        q, k, v = (_normal(a, B, N, H) for a in keys[:3])
        return q, k * H**-0.5, v, _normal(keys[3], B, N, H, H, dtype=jnp.float32), jnp.linspace(0.5, 0.99, N)

    return Work("decode_linear", {"B": B, "N": N, "H": H}, draw, B * N * (8 * H * H + 8 * H))


def _msa(B: int, N: int, K: int, S: int, L: int = 16, size: int = 128, H: int = 128) -> Work:
    """The whole selection and attention of a MiniMax-M3 step: block scores, top-k, block-sparse attention."""

    def draw(s, key):
        a, b, c, d, e = jax.random.split(key, 5)
        k, v = _normal(b, B, S, K, H), _normal(c, B, S, K, H)
        return _normal(a, B, 1, N, H), k, v, _normal(d, B, 1, K, H), _normal(e, B, S, H), _full(s)

    def run(ops, q, k, v, q_index, k_index, lengths, **more):
        scores = ops.block_index_scores(q_index, k_index, lengths, block_size=size)
        picks = ops.topk_indices(scores, L)
        return ops.decode_block_sparse(q, k, v, picks, lengths, block_size=size, scale=H**-0.5, **more)[0]

    sizes = {"B": B, "N": N, "K": K, "S": S, "H": H, "L": L, "block_size": size}
    return Work("msa step", sizes, draw, 2 * B * H * (S + K + 2 * K * L * size + 2 * N), run=run)


WORK = (
    _window(64, 32, 8, 32768, 128, 1024),
    _window(64, 32, 8, 1024, 128, None),
    _blocks(64, 64, 4, 131072, 16, 128),
    _blocks(16, 64, 4, 131072, 16, 128),
    _csa(64, 64, 32768, 512),
    _sparse_mla(64, 128, 16384, 2048),
    _sparse_mla(64, 128, 131072, 2048),
    _sparse_mla(64, 64, 32768, 2048),
    _index(16, 64, 65536),
    _index(16, 4, 131072, size=128),
    _msa(16, 64, 4, 131072),
    _linear(64, 64),
)
OPS = tuple(dict.fromkeys(work.op for work in WORK))


def run(
    ops=OPS, *, samples: int = 50, seed: int = 0, packages: tuple[str, ...] = ("pallas", "triton")
) -> Iterator[dict]:
    """Rows for every call of these ops on a GPU; the first row is the read ceiling."""
    ceiling = read_ceiling()
    yield {"what": "ceiling", "GB_per_s": ceiling, "samples": samples}
    for work in WORK:
        if work.op in ops:
            sets = min(8, max(1, math.ceil(4 * L2_BYTES / work.moved)))
            keys = jax.random.split(jax.random.key(seed), sets)
            inputs = [list(work.draw(work.sizes, key)) for key in keys]
            want = _reference(work, inputs[0])
            judge = compare.worst_head if _attends(work.op) else compare.worst_row
            for call in _calls(work, inputs, packages):
                yield gated_row(work.op, call, work.sizes, work.moved, sets, want, samples, ceiling, judge)
            del inputs, want


def _reference(work: Work, arrays):
    """What a call returns, in float32 from jforge.ops."""
    more = {"out_dtype": jnp.float32} if _attends(work.op) else {}
    result = jax.jit(lambda *arrays: work(jforge.ops, *arrays, **more))(*arrays)
    return jax.tree.map(lambda array: np.asarray(array, np.float32), result)


def _attends(op: str) -> bool:
    """Does it return an attention's out, B T N V?"""
    return not op.endswith("scores") and op != "decode_linear"


def _calls(work: Work, inputs, packages) -> Iterator[Call]:
    """Pallas, then Triton. A state is carried from call to call: donated by JAX, overwritten in place by torch."""
    import torch

    import pallas_kernels
    import triton_kernels

    def to_torch(array):  # the same buffer, except where Triton writes into it
        return torch.from_dlpack(array).clone() if work.op == "decode_linear" else torch.from_dlpack(array)

    tensors = [[None if a is None else to_torch(a) for a in arrays] for arrays in inputs]
    if "pallas" in packages:
        if work.op == "decode_linear":
            yield jax_call("pallas", pallas_kernels.decode_linear, inputs, carry=3)
        else:
            yield jax_call("pallas", lambda *a: work(pallas_kernels, *a), inputs)
    if "triton" in packages:
        yield Call("triton", lambda i: work(triton_kernels, *tensors[i]), torch.cuda.synchronize)
