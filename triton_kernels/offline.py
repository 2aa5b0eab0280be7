"""Compile the kernels for sm_90 without a GPU and report registers, spills and shared memory.

    python -m triton_kernels.offline            a table
    python -m triton_kernels.offline --json     one JSON object a line

Triton and its bundled ptxas need no driver for this. It cannot run in a process that interprets kernels, so `report`
starts a new one. A spill shows as STL/LDL instructions in the machine code; a kernel that asks for more than 227 KB of
shared memory cannot be launched on an H100.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from triton_kernels import runtime
from triton_kernels.decode_attention import decode_kernel, specialise
from triton_kernels.decode_mla import mla_kernel
from triton_kernels.decode_mla import specialise as specialise_mla
from triton_kernels.merge_states import BLOCK_V, FIXED_BLOCK_P, MAX_BLOCK_P, merge_kernel, merge_warps
from triton_kernels.plan import Config, MlaConfig, block_rows, default_config, default_mla_config, table

SM90 = GPUTarget("cuda", 90, 32)
MAX_SHARED = 227 * 1024
POINTER = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


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


def compile_kernel(kernel, types, constants, num_warps, num_stages):
    """Compile with pointers and strides that are multiples of 16, as in real calls: without that, copies shrink."""
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or "stride" in name
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=SM90, options={"num_warps": num_warps, "num_stages": num_stages})


def measure(name, compiled, **launch):
    """Registers, spill instructions, shared memory and MMA instructions of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.check_output([TOOLS / "cuobjdump", "--dump-resource-usage", cubin], text=True)
        sass = subprocess.check_output([TOOLS / "cuobjdump", "-sass", cubin], text=True)
    count = {op: len(re.findall(rf"\b{op}\b", sass)) for op in ("STL", "LDL", "HMMA", "HGMMA", "LDGSTS")}
    return {
        "name": name,
        **launch,
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spills": count["STL"] + count["LDL"],
        "shared": compiled.metadata.shared,
        **{op.lower(): count[op] for op in ("HMMA", "HGMMA", "LDGSTS")},
    }


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


def tuned():
    """The kernels that the tuning tables ask for, each once: (function, (case, Config)) pairs."""
    pairs = {}
    for entry in table("decode_attention"):
        case = Decode(entry["dtype"], entry["head_dim"], entry["value_dim"], group=entry["group"])
        config = Config(**entry["config"])
        pairs.setdefault((case, config.block_n, config.num_warps, config.num_stages), (compile_decode, (case, config)))
    for entry in table("decode_mla"):
        rope_dim = entry["head_dim"] - entry["value_dim"]
        case = Mla(entry["group"], entry["dtype"], entry["value_dim"], rope_dim)
        config = MlaConfig(**entry["config"])
        tile = (config.block_n, config.num_warps, config.num_stages, config.rows, config.early)
        pairs.setdefault((case, *tile), (compile_mla, (case, config)))
    return list(pairs.values())


def report():
    """All measurements, from a process that compiles: a list of dicts. Raises CalledProcessError if one fails."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "triton_kernels.offline", "--json"]
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    if runtime.INTERPRETED:
        parser.error("unset TRITON_INTERPRET: an interpreting process cannot compile")
    header = ("registers", "spills", "shared", "block_n", "warps", "stages", "hmma", "hgmma", "ldgsts")
    if not arguments.json:
        print(f"{'kernel':56}", *(f"{name:>9}" for name in header))
    jobs = [(compile_decode, (case,)) for case in DECODES] + [(compile_mla, (case,)) for case in MLAS]
    jobs += tuned() + [(compile_merge, case) for case in MERGES]
    for function, case in jobs:
        row = function(*case)
        line = json.dumps(row) if arguments.json else f"{row['name']:56}"
        print(line, *([] if arguments.json else (f"{row.get(name, '-'):>9}" for name in header)), flush=True)


if __name__ == "__main__":
    main()
