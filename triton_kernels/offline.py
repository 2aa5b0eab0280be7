"""Compile the kernels for sm_90 without a GPU and report registers, spills and shared memory.

    python -m triton_kernels.offline                     a table
    python -m triton_kernels.offline --json              one JSON object a line
    python -m triton_kernels.offline --op decode_mla     one op; can be given several times

This cannot run in a process that interprets kernels, so `report` starts a new one. What is measured: see `cubin`.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass

from triton_kernels import runtime
from triton_kernels.cubin import BYTES, POINTER, compile_kernel, measure
from triton_kernels.decode_attention import decode_kernel, specialise
from triton_kernels.decode_mla import mla_kernel
from triton_kernels.decode_mla import specialise as specialise_mla
from triton_kernels.merge_states import BLOCK_V, FIXED_BLOCK_P, MAX_BLOCK_P, merge_kernel, merge_warps
from triton_kernels.offline_scores import (
    BLOCK_SCORES,
    INDEX_SCORES,
    LINEARS,
    TOPKS,
    Linear,
    Scores,
    compile_linear,
    compile_scores,
    compile_topk,
)
from triton_kernels.offline_sparse import (
    BLOCK_SPARSES,
    SPARSE_MLAS,
    BlockSparse,
    SparseMla,
    compile_block_sparse,
    compile_sparse_mla,
)
from triton_kernels.plan import (
    Config,
    LinearConfig,
    MlaConfig,
    block_rows,
    default_config,
    default_mla_config,
    table,
)


@dataclass(frozen=True)
class Decode:
    """One compiled variant of `decode_kernel`."""

    dtype: str = "bfloat16"
    head_dim: int = 128
    value_dim: int = 128
    tokens: int = 1
    group: int = 4
    window: bool = False
    sink: bool = False
    softcap: bool = False
    fixed: bool = False
    split: bool = True

    def __str__(self):
        flags = [name for name in ("window", "sink", "softcap", "fixed", "split") if getattr(self, name)]
        return f"decode {self.dtype} {self.head_dim}x{self.value_dim} T{self.tokens} G{self.group} {' '.join(flags)}"


DECODES = (
    Decode(),
    Decode(split=False, sink=True),
    Decode(dtype="float16", head_dim=64, value_dim=64, group=8, window=True, sink=True),
    Decode(head_dim=64, value_dim=64, group=1),
    Decode(head_dim=80, value_dim=80, group=1),
    Decode(head_dim=96, value_dim=96, group=6, softcap=True),
    Decode(head_dim=192, value_dim=128, group=16, split=False),
    Decode(head_dim=192, value_dim=192, group=8),
    Decode(head_dim=256, value_dim=256, group=8, softcap=True, window=True),
    Decode(tokens=4, group=8, window=True, softcap=True),
    Decode(tokens=8, group=8, fixed=True),
    Decode(group=128, fixed=True),
    Decode(head_dim=192, value_dim=128, tokens=4, group=16),
    Decode(head_dim=256, value_dim=256, tokens=4, group=16, split=False),
    Decode(head_dim=192, value_dim=192, tokens=4, group=16, softcap=True),
    Decode(head_dim=256, value_dim=256, tokens=4, group=8),
    Decode(head_dim=80, value_dim=80, tokens=4, group=16),
    Decode(dtype="float32", head_dim=64, value_dim=64),
    Decode(dtype="float32"),
    Decode(dtype="float32", tokens=4, group=16),
    Decode(dtype="float32", head_dim=96, value_dim=96, tokens=4, group=8, softcap=True, window=True),
    Decode(dtype="float32", head_dim=256, value_dim=256, group=8),
    Decode(dtype="float32", head_dim=256, value_dim=256, tokens=4, group=16),
)


@dataclass(frozen=True)
class Mla:
    """One compiled variant of `mla_kernel`."""

    heads: int = 128
    dtype: str = "bfloat16"
    latent_dim: int = 512
    rope_dim: int = 64
    tokens: int = 1
    page: int = 0
    window: bool = False
    sink: bool = False
    fixed: bool = False
    split: bool = False

    def __str__(self):
        flags = [name for name in ("window", "sink", "fixed", "split") if getattr(self, name)]
        page = [f"page {self.page}"] if self.page else []
        shape = f"{self.dtype} {self.latent_dim}+{self.rope_dim} T{self.tokens} N{self.heads}"
        return " ".join(["mla", shape, *page, *flags])


MLAS = (
    Mla(),
    Mla(page=64, sink=True),
    Mla(split=True, page=64),
    Mla(tokens=2, window=True, sink=True, page=64),
    Mla(16, split=True),
    Mla(16, split=True, page=64, window=True, fixed=True),
    Mla(32),
    Mla(128, "float32", page=64),
)
MERGES = (("bfloat16", 128, 4, False), ("float32", 128, MAX_BLOCK_P, True), ("bfloat16", 192, FIXED_BLOCK_P, True))


def compile_decode(case, config=None):
    """Measurements of one `Decode` case under `config`, by default the one that a call without a table entry takes."""
    rows = block_rows(case.tokens * case.group)
    config = config or default_config(BYTES[case.dtype], case.head_dim, case.value_dim, rows)
    flags = {name: getattr(case, name) for name in ("window", "sink", "softcap", "fixed", "split")}
    heads = 8 * case.group
    constants = specialise(case.tokens, case.group, heads, case.head_dim, case.value_dim, config, **flags)
    data = POINTER[case.dtype]
    types = {name: data for name in ("q", "k", "v", "out")} | {"lengths": "*i32", "sinks": "*fp32", "lse": "*fp32"}
    types |= {"scale": "fp32", "softcap": "fp32", "out": "*fp32" if case.split else data}
    compiled = compile_kernel(decode_kernel, types, constants, config.num_warps, config.num_stages)
    launch = {"block_n": config.block_n, "warps": config.num_warps, "stages": config.num_stages}
    return measure(str(case), compiled, **launch)


def compile_mla(case, config=None):
    """As `compile_decode`, for an `Mla` case."""
    config = config or default_mla_config(BYTES[case.dtype], case.latent_dim, case.tokens, case.heads)
    flags = {name: getattr(case, name) for name in ("window", "sink", "fixed", "split")}
    shape = (case.tokens, case.heads, case.latent_dim, case.rope_dim)
    constants = specialise_mla(shape, (case.latent_dim, case.rope_dim), case.page, config, **flags)
    data = POINTER[case.dtype]
    types = {name: data for name in ("q_latent", "q_rope", "latent", "k_rope")} | {"lengths": "*i32"}
    types |= {"page_table": "*i32", "sinks": "*fp32", "lse": "*fp32", "scale2": "fp32"}
    types["out"] = "*fp32" if case.split else data
    compiled = compile_kernel(mla_kernel, types, constants, config.num_warps, config.num_stages)
    launch = {"block_n": config.block_n, "warps": config.num_warps, "stages": config.num_stages}
    return measure(str(case), compiled, **launch)


def compile_merge(dtype, value_dim, block_p, sink):
    constants = {"HEADS": 32, "V": value_dim, "BLOCK_V": BLOCK_V, "BLOCK_P": block_p, "HAS_SINK": sink}
    types = {"parts": "*fp32", "lses": "*fp32", "sinks": "*fp32", "out": POINTER[dtype], "lse": "*fp32"}
    warps = merge_warps(block_p)
    compiled = compile_kernel(merge_kernel, types, constants | {"NATURAL": False}, warps, 3)
    return measure(f"merge {dtype} {value_dim} parts {block_p}{' sink' if sink else ''}", compiled, warps=warps)


def tuned_case(op, entry):
    """The case of an op's list that a table entry was measured with, or the nearest to it."""
    dtype, width, value_dim, group = (entry[name] for name in ("dtype", "head_dim", "value_dim", "group"))
    if op == "decode_attention":
        return Decode(dtype, width, value_dim, group=group)
    if op == "decode_block_sparse":
        return BlockSparse(128, dtype, width, value_dim, group)
    if op == "decode_linear":
        return Linear(dtype, width, value_dim, channel=True, delta=True)
    if op in ("index_scores", "block_index_scores"):
        return Scores(group, dtype, width, block=128 if op == "block_index_scores" else 0)
    return {"decode_mla": Mla, "decode_sparse_mla": SparseMla}[op](group, dtype, value_dim, width - value_dim)


def tuned(op):
    """The kernels that an op's tuning table asks for, each once: (case, Config) pairs."""
    pairs = {}
    for entry in table(op):
        fields = entry["config"]
        kind = LinearConfig if "block_v" in fields else MlaConfig if "rows" in fields else Config
        pair = tuned_case(op, entry), kind(**fields)
        code = {name: value for name, value in fields.items() if name not in ("ctas_per_sm", "min_split")}
        pairs.setdefault((pair[0], tuple(code.items())), pair)
    return list(pairs.values())


OPS = {
    "decode_attention": (compile_decode, DECODES),
    "decode_mla": (compile_mla, MLAS),
    "decode_block_sparse": (compile_block_sparse, BLOCK_SPARSES),
    "decode_sparse_mla": (compile_sparse_mla, SPARSE_MLAS),
    "decode_linear": (compile_linear, LINEARS),
    "index_scores": (compile_scores, INDEX_SCORES),
    "block_index_scores": (compile_scores, BLOCK_SCORES),
    "topk_indices": (compile_topk, TOPKS),
    "merge_states": (compile_merge, MERGES),
}


def jobs(ops):
    """(function, arguments) of every compilation for these ops: the listed cases, then the tuning tables'."""
    for op in ops:
        function, cases = OPS[op]
        yield from ((function, case if isinstance(case, tuple) else (case,)) for case in cases)
        yield from ((function, pair) for pair in tuned(op))


def report(*ops):
    """All measurements for some ops, from a process that compiles: a list of dicts. Raises CalledProcessError."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "triton_kernels.offline", "--json", *(f"--op={op}" for op in ops)]
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--op", action="append", choices=OPS, help="only this op; can be given several times")
    arguments = parser.parse_args()
    if runtime.INTERPRETED:
        parser.error("unset TRITON_INTERPRET: an interpreting process cannot compile")
    header = ("registers", "spills", "shared", "block_n", "warps", "stages", "hmma", "hgmma", "ldgsts")
    if not arguments.json:
        print(f"{'kernel':68}", *(f"{name:>9}" for name in header))
    for function, case in jobs(arguments.op or OPS):
        row = function(*case)
        line = json.dumps(row) if arguments.json else f"{row['name']:68}"
        print(line, *([] if arguments.json else (f"{row.get(name, '-'):>9}" for name in header)), flush=True)


if __name__ == "__main__":
    main()
