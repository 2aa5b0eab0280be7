"""Measure launch configurations on the GPU at hand and write `tuning/<op>.json`.

    python -m triton_kernels.tune                                     decode_attention, every shape of SHAPES
    python -m triton_kernels.tune --only 64x32x8x8192                 one of them (B x N x K x S, every head dim listed)
    python -m triton_kernels.tune --op decode_mla                     every shape of MLA_SHAPES
    python -m triton_kernels.tune --op decode_mla --only 128x128x4096 --page 64
                                                                      one of them (B x N x S), in pages: table unchanged
    python -m triton_kernels.tune --op decode_block_sparse            every shape of BLOCK_SHAPES
    python -m triton_kernels.tune --op decode_sparse_mla              every shape of SPARSE_MLA_SHAPES
    python -m triton_kernels.tune --op decode_linear                  likewise index_scores and block_index_scores

How it is timed: see `tune_search`. For latent caches the few configurations of MLA_CONFIGS are tried; otherwise one is
tried only if its machine code has no spills and fits in shared memory. Entries of other devices, and of shapes that
were not measured, stay in the table.
"""

import argparse
import json
from dataclasses import asdict
from functools import partial

import torch

from triton_kernels import runtime
from triton_kernels.cubin import BYTES
from triton_kernels.decode_attention import run
from triton_kernels.decode_block_sparse import run as run_block_sparse
from triton_kernels.decode_mla import run as run_mla
from triton_kernels.decode_sparse_mla import run as run_sparse_mla
from triton_kernels.offline import BlockSparse, Decode, compile_block_sparse, compile_decode
from triton_kernels.plan import (
    TUNING,
    MlaConfig,
    block_rows,
    default_block_config,
    default_config,
    default_mla_config,
    pow2_ceil,
)
from triton_kernels.tune_scores import (
    BLOCK_SCORE_SHAPES,
    INDEX_SHAPES,
    LINEAR_SHAPES,
    tune_block_index,
    tune_index,
    tune_linear,
)
from triton_kernels.tune_search import search, set_count, tiles

SHOWN = 6

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


# dtype, C, R, B, N, S
MLA_SHAPES = (
    ("bfloat16", 512, 64, 128, 128, 4096),
    ("bfloat16", 512, 64, 16, 128, 16384),
    ("bfloat16", 512, 64, 1, 128, 4096),
    ("bfloat16", 512, 64, 64, 64, 8192),
    ("bfloat16", 512, 64, 128, 16, 4096),
    ("bfloat16", 512, 64, 1, 16, 4096),
)

# dtype, head dim, value dim, B, N, K, S, block size, L
BLOCK_SHAPES = (
    ("bfloat16", 128, 128, 64, 64, 4, 131072, 128, 16),
    ("bfloat16", 128, 128, 16, 64, 4, 131072, 128, 16),
    ("bfloat16", 128, 128, 1, 64, 4, 131072, 128, 16),
    ("bfloat16", 192, 128, 64, 64, 4, 65536, 64, 16),
)

# dtype, C, R, B, N, S, L; R = 0 is decode_block_sparse with v=None
SPARSE_MLA_SHAPES = (
    ("bfloat16", 512, 64, 64, 128, 32768, 2048),
    ("bfloat16", 512, 64, 8, 128, 32768, 2048),
    ("bfloat16", 512, 64, 1, 128, 32768, 2048),
    ("bfloat16", 512, 64, 64, 64, 32768, 2048),
    ("bfloat16", 512, 64, 64, 16, 32768, 2048),
    ("bfloat16", 512, 0, 64, 64, 32768, 512),
    ("bfloat16", 512, 0, 64, 128, 32768, 1024),
)

# by query rows of a program, the default first; none of them spills for T = 1
MLA_CONFIGS = {
    16: (
        MlaConfig(32, 4, 3, 2, 128, rows=16),
        MlaConfig(32, 4, 2, 2, 128, rows=16),
        MlaConfig(32, 4, 4, 1, 128, rows=16),
        MlaConfig(64, 8, 2, 2, 256, rows=16),
        MlaConfig(64, 8, 3, 1, 256, rows=16),
    ),
    64: (
        MlaConfig(64, 8, 2, 1, 128, rows=64, early=True),
        MlaConfig(32, 8, 4, 1, 128, rows=64),
        MlaConfig(32, 8, 4, 1, 128, rows=64, early=True),
        MlaConfig(32, 8, 3, 1, 128, rows=64, early=True),
        MlaConfig(64, 8, 2, 1, 128, rows=64),
    ),
}


def inputs(dtype, head_dim, value_dim, batch, heads, kv_heads, slots):
    """Argument sets of one shape of decode_attention."""
    kind = {"dtype": getattr(torch, dtype), "device": "cuda"}
    sets = []
    for _ in range(set_count(batch * slots * kv_heads * (head_dim + value_dim) * BYTES[dtype])):
        q = torch.randn(batch, 1, heads, head_dim, **kind)
        k = torch.randn(batch, slots, kv_heads, head_dim, **kind)
        v = torch.randn(batch, slots, kv_heads, value_dim, **kind)
        sets.append((q, k, v, torch.full((batch,), slots, dtype=torch.int32, device="cuda")))
    return sets


def mla_inputs(dtype, latent_dim, rope_dim, batch, heads, slots, page=0):
    """Argument sets of one shape of decode_mla, and of each its page table (None without pages)."""
    kind = {"dtype": getattr(torch, dtype), "device": "cuda"}
    cache = (batch * slots // page, page) if page else (batch, slots)
    sets = []
    for _ in range(set_count(batch * slots * (latent_dim + rope_dim) * BYTES[dtype])):
        queries = [torch.randn(batch, 1, heads, width, **kind) for width in (latent_dim, rope_dim)]
        caches = [torch.randn(*cache, width, **kind) for width in (latent_dim, rope_dim)]
        lengths = torch.full((batch,), slots, dtype=torch.int32, device="cuda")
        table = torch.randperm(cache[0], device="cuda").int().view(batch, -1) if page else None
        sets.append((*queries, *caches, lengths, table))
    return sets


def random_lists(batch, lists, blocks, entries):
    """int32 B 1 lists L: distinct blocks in random order."""
    return torch.rand(batch, 1, lists, blocks, device="cuda").topk(entries).indices.int()


def block_inputs(dtype, head_dim, value_dim, batch, heads, kv_heads, slots, block_size, entries):
    """Argument sets of one shape of decode_block_sparse: one cache, other lists."""
    kind = {"dtype": getattr(torch, dtype), "device": "cuda"}
    q = torch.randn(batch, 1, heads, head_dim, **kind)
    k, v = (torch.randn(batch, slots, kv_heads, width, **kind) for width in (head_dim, value_dim))
    lengths = torch.full((batch,), slots, dtype=torch.int32, device="cuda")
    count = set_count(batch * kv_heads * entries * block_size * (head_dim + value_dim) * BYTES[dtype])
    lists = (random_lists(batch, kv_heads, slots // block_size, entries) for _ in range(count))
    return [(q, k, v, chosen, lengths) for chosen in lists]


def sparse_mla_inputs(dtype, latent_dim, rope_dim, batch, heads, slots, entries):
    """As `block_inputs`, for the kernel of decode_sparse_mla."""
    kind = {"dtype": getattr(torch, dtype), "device": "cuda"}
    latent = torch.randn(batch, slots, 1, latent_dim, **kind)
    k_rope = torch.randn(batch, slots, rope_dim, **kind) if rope_dim else None
    queries = [torch.randn(batch, 1, heads, width, **kind) if width else None for width in (latent_dim, rope_dim)]
    count = set_count(batch * entries * (latent_dim + rope_dim) * BYTES[dtype])
    return [(*queries, latent, k_rope, random_lists(batch, 1, slots, entries)) for _ in range(count)]


def tune(shape):
    """(entry fields, best Config, times, default Config) for one shape of decode_attention."""
    dtype, head_dim, value_dim, batch, heads, kv_heads, slots = shape
    group = heads // kv_heads
    default = default_config(BYTES[dtype], head_dim, value_dim, block_rows(group))
    configs = tiles(Decode(dtype, head_dim, value_dim, group=group), compile_decode)
    best, times = search(inputs(*shape), partial(run, scale=head_dim**-0.5), default, configs)
    return (dtype, head_dim, value_dim, group, batch * kv_heads, slots), best, times, default


def tune_mla(shape, page=0):
    """(entry fields, best Config, times, default Config) for one shape of decode_mla."""
    dtype, latent_dim, rope_dim, batch, heads, slots = shape

    def call(*args, config):
        return run_mla(*args[:-1], page_table=args[-1], scale=(latent_dim + rope_dim) ** -0.5, config=config)

    default = default_mla_config(BYTES[dtype], latent_dim, 1, heads)
    best, times = search(mla_inputs(*shape, page), call, default, MLA_CONFIGS[block_rows(heads)])
    return (dtype, latent_dim + rope_dim, latent_dim, heads, batch, slots), best, times, default


def tune_block_sparse(shape):
    """(entry fields, best Config, times, default Config) for one shape of decode_block_sparse."""
    dtype, head_dim, value_dim, batch, heads, kv_heads, _, block_size, entries = shape
    group = heads // kv_heads
    default = default_block_config(BYTES[dtype], head_dim, value_dim, block_rows(group))
    configs = tiles(BlockSparse(block_size, dtype, head_dim, value_dim, group), compile_block_sparse)
    call = partial(run_block_sparse, block_size=block_size, scale=head_dim**-0.5)
    best, times = search(block_inputs(*shape), call, default, configs)
    return (dtype, head_dim, value_dim, group, batch * kv_heads, entries * block_size), best, times, default


def tune_sparse_mla(shape):
    """(entry fields, best Config, times, default Config) for one shape of decode_sparse_mla's kernel."""
    dtype, latent_dim, rope_dim, batch, heads, _, entries = shape
    default = default_mla_config(BYTES[dtype], latent_dim, 1, heads)
    call = partial(run_sparse_mla, scale=(latent_dim + rope_dim) ** -0.5)
    best, times = search(sparse_mla_inputs(*shape), call, default, MLA_CONFIGS[block_rows(heads)])
    return (dtype, latent_dim + rope_dim, latent_dim, heads, batch, entries), best, times, default


def entry_of(fields, config, device):
    """The table's entry for what a tuner measured."""
    dtype, head_dim, value_dim, group, batch_heads, slots = fields
    key = {"dtype": dtype, "head_dim": head_dim, "value_dim": value_dim, "group": pow2_ceil(group)}
    key |= {"batch_heads": pow2_ceil(batch_heads), "length": pow2_ceil(slots), "device": device}
    return key | {"config": asdict(config)}


def write(op, entries):
    """Put entries into an op's table, in the place of those with the same key."""

    def key(entry):
        return tuple(str(value) for name, value in entry.items() if name != "config")

    path = TUNING / f"{op}.json"
    table = {key(entry): entry for entry in json.loads(path.read_text())["entries"]} if path.exists() else {}
    table |= {key(entry): entry for entry in entries}
    lines = ",\n".join("    " + json.dumps(entry) for entry in table.values())
    path.write_text(f'{{\n  "op": "{op}",\n  "entries": [\n{lines}\n  ]\n}}\n')


TUNERS = {
    "decode_attention": (SHAPES, tune),
    "decode_mla": (MLA_SHAPES, tune_mla),
    "decode_block_sparse": (BLOCK_SHAPES, tune_block_sparse),
    "decode_sparse_mla": (SPARSE_MLA_SHAPES, tune_sparse_mla),
    "decode_linear": (LINEAR_SHAPES, tune_linear),
    "index_scores": (INDEX_SHAPES, tune_index),
    "block_index_scores": (BLOCK_SCORE_SHAPES, tune_block_index),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=TUNERS, default="decode_attention")
    parser.add_argument("--only", help="the sizes of one shape, from B on and joined by x; other shapes are left out")
    parser.add_argument("--page", type=int, default=0, help="decode_mla in pages of this size; writes no table")
    arguments = parser.parse_args()
    if runtime.INTERPRETED or not torch.cuda.is_available():
        parser.error("tuning needs a CUDA device, and TRITON_INTERPRET unset")
    if arguments.page and arguments.op != "decode_mla":
        parser.error("--page goes with --op decode_mla")
    entries = []
    shapes, tuner = TUNERS[arguments.op]
    for shape in shapes:
        if arguments.only not in (None, "x".join(map(str, shape[3:]))):
            continue
        fields, best, times, default = tuner(shape, arguments.page) if arguments.page else tuner(shape)
        entries.append(entry_of(fields, best, torch.cuda.get_device_name()))
        print(*shape, f"best {times[best]:.1f} us, default {times[default]:.1f} us, {best}", flush=True)
        for config in sorted(times, key=times.get)[:SHOWN]:
            print(f"    {times[config]:9.1f} us  {config}", flush=True)
        if not arguments.page:
            write(arguments.op, entries)
    if not entries:
        parser.error(f"no shape is {arguments.only}")


if __name__ == "__main__":
    main()
