"""What `tune` measures of indexers and of linear attention: shapes, inputs and candidates."""

import itertools
from functools import partial

import torch

from triton_kernels.cubin import BYTES
from triton_kernels.decode_linear import run as run_linear
from triton_kernels.index_scores import run_blocks, run_tokens
from triton_kernels.offline_scores import Scores, compile_scores
from triton_kernels.plan import LinearConfig, default_linear_config, default_score_config, pow2_ceil
from triton_kernels.tune_search import search, set_count, tiles

# dtype, H, V, B, N
LINEAR_SHAPES = (
    ("bfloat16", 128, 128, 64, 64),
    ("bfloat16", 128, 128, 8, 64),
    ("bfloat16", 128, 128, 1, 64),
)

# dtype, J, 0, B, I, S
INDEX_SHAPES = (
    ("bfloat16", 128, 0, 16, 64, 65536),
    ("bfloat16", 128, 0, 1, 64, 131072),
    ("bfloat16", 128, 0, 64, 64, 32768),
    ("bfloat16", 128, 0, 16, 32, 65536),
)

# dtype, J, 0, B, I, S, block size
BLOCK_SCORE_SHAPES = (
    ("bfloat16", 128, 0, 16, 4, 131072, 128),
    ("bfloat16", 128, 0, 1, 4, 131072, 128),
    ("bfloat16", 128, 0, 64, 4, 32768, 128),
)


def linear_inputs(dtype, head_dim, value_dim, batch, heads):
    """Argument sets of one shape. Zero keys without decay leave the state as it is: every call has the same answer."""
    kind = {"dtype": getattr(torch, dtype), "device": "cuda"}
    sets = []
    for _ in range(set_count(batch * heads * head_dim * value_dim * BYTES["float32"])):
        q, v = (torch.randn(batch, heads, width, **kind) for width in (head_dim, value_dim))
        state = torch.randn(batch, heads, head_dim, value_dim, device="cuda")
        sets.append((q, torch.zeros_like(q), v, state, torch.ones(heads, device="cuda")))
    return sets


def linear_configs(head_dim, value_dim):
    """Tiles of 8 to 64 numbers a thread."""
    for columns, warps in itertools.product((8, 16, 32, 64, 128), (2, 4, 8)):
        if columns <= pow2_ceil(value_dim) and 8 <= pow2_ceil(head_dim) * columns // (32 * warps) <= 64:
            yield LinearConfig(columns, warps)


def tune_linear(shape):
    """(entry fields, best LinearConfig, times, default) for one shape of decode_linear."""
    dtype, head_dim, value_dim, batch, heads = shape
    default, configs = default_linear_config(head_dim), linear_configs(head_dim, value_dim)
    best, times = search(linear_inputs(*shape), run_linear, default, configs, plans=lambda config: ())
    return (dtype, head_dim, value_dim, 1, batch * heads, 1), best, times, default


def score_inputs(dtype, dim, batch, heads, slots):
    """Argument sets of one shape: q_index, k_index, weights, lengths; every row is full."""
    kind = {"dtype": getattr(torch, dtype), "device": "cuda"}
    sets = []
    for _ in range(set_count(batch * slots * dim * BYTES[dtype])):
        q, k = torch.randn(batch, 1, heads, dim, **kind), torch.randn(batch, slots, dim, **kind)
        lengths = torch.full((batch,), slots, dtype=torch.int32, device="cuda")
        sets.append((q, k, torch.randn(batch, 1, heads, device="cuda"), lengths))
    return sets


def tune_index(shape):
    """(entry fields, best Config, times, default Config) for one shape of index_scores."""
    dtype, dim, _, batch, heads, slots = shape
    default = default_score_config(BYTES[dtype], BYTES[dtype], dim, heads)
    configs = tiles(Scores(heads, dtype, dim), compile_scores)
    best, times = search(score_inputs(dtype, dim, batch, heads, slots), tokens_call, default, configs)
    return (dtype, dim, 0, heads, batch, slots), best, times, default


def tune_block_index(shape):
    """(entry fields, best Config, times, default Config) for one shape of block_index_scores."""
    dtype, dim, _, batch, heads, slots, block_size = shape
    default = default_score_config(BYTES[dtype], BYTES[dtype], dim, heads)
    configs = tiles(Scores(heads, dtype, dim, block_size), compile_scores)
    sets = score_inputs(dtype, dim, batch, heads, slots)
    best, times = search(sets, partial(blocks_call, block_size=block_size), default, configs)
    return (dtype, dim, 0, heads, batch, slots), best, times, default


def tokens_call(*args, config):
    return (run_tokens(*args, config=config),)


def blocks_call(q_index, k_index, _, lengths, *, block_size, config):
    return (run_blocks(q_index, k_index, lengths, block_size=block_size, config=config),)
