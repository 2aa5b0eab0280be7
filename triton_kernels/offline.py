"""Compile the kernels for sm_90 without a GPU and report registers, spills, shared memory and instructions.

    python -m triton_kernels.offline                     a table
    python -m triton_kernels.offline --json              one JSON object a line
    python -m triton_kernels.offline --op decode_mla     one op; can be given several times

Triton and its bundled ptxas need no driver for this. What is compiled are the launches of real calls, on tensors
without memory: those that each op's record lists, and those of its tuning table. A spill shows as STL/LDL
instructions. A process that interprets kernels cannot compile, so `report` starts a new one.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import triton_kernels
from triton_kernels import runtime
from triton_kernels.device import TARGET
from triton_kernels.plan import table

SM90 = GPUTarget("cuda", TARGET.capability, 32)
POINTER = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "int32": "*i32", "int64": "*i64"}
POINTER |= {"int8": "*i8", "float8_e4m3fn": "*fp8e4nv", "float8_e5m2": "*fp8e5"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
RECORDS = {name: sys.modules[f"triton_kernels.{name}"].OP for name in triton_kernels.__all__}


def type_of(value):
    """Triton's name for the type of an argument."""
    if isinstance(value, torch.Tensor):
        return POINTER[str(value.dtype).removeprefix("torch.")]
    return "fp32" if isinstance(value, float) else "i32"


def compile_kernel(kernel, args, options):
    """Compile one launch with pointers and strides that are multiples of 16: without that, copies shrink."""
    launch = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    constants = {name: value for name, value in options.items() if name not in launch}
    names = [name for name in kernel.arg_names if name not in constants]
    types = dict(zip(names, map(type_of, args), strict=True))
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or "stride" in name
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=SM90, options=launch)


def measure(compiled):
    """Registers, spills, shared memory, MMA instructions and memory accesses of a compiled kernel.

    ldgsts: copies to shared memory; narrow: those below 16 bytes; wide: loads and stores of 16 bytes to registers.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.check_output([TOOLS / "cuobjdump", "--dump-resource-usage", cubin], text=True)
        sass = subprocess.check_output([TOOLS / "cuobjdump", "-sass", cubin], text=True)
    count = {op: len(re.findall(rf"\b{op}\b", sass)) for op in ("STL", "LDL", "HMMA", "HGMMA", "LDGSTS")}
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spills": count["STL"] + count["LDL"],
        "shared": compiled.metadata.shared,
        "narrow": len(re.findall(r"\bLDGSTS(?!\S*\.128)", sass)),
        "wide": len(re.findall(r"\b(?:LDG|STG)\.\S*\.128", sass)),
        **{op.lower(): count[op] for op in ("HMMA", "HGMMA", "LDGSTS")},
    }


def launches(op, sizes, config=None):
    """The launches of one call of an op: (kernel, grid, args, options), without the merge that other ops share."""
    args, options = next(op.calls("meta", **sizes))
    options = options | ({} if config is None else {"config": config})
    with runtime.recorded() as record:
        op.run(*args, **options)
    return [launch for launch in record if launch[0] in op.kernels]


def tuned(op):
    """(sizes, configuration) of every entry of an op's table: the shape that it was measured with."""
    for entry in table(op.name):
        for sizes in op.shapes:
            args, options = next(op.calls("meta", **sizes))
            key, default = op.site(*args, **options)
            if key.bucket().items() <= entry.items():
                yield sizes, type(default)(**entry["config"])
                break
        else:
            raise LookupError(f"{op.name}: the tuner has no shape for the table's entry {entry}")


def jobs(ops):
    """(op, sizes, launch) of every compilation for these ops, each once."""
    for op in ops:
        seen = []
        for sizes, config in (*((sizes, None) for sizes in op.offline), *tuned(op)):
            for kernel, _, args, options in launches(op, sizes, config):
                code = kernel, [type_of(x) for x in args], options
                if code not in seen:
                    seen.append(code)
                    yield op, sizes, (kernel, args, options)


def row(op, sizes, launch):
    """What the check prints of one compilation: the op's name and sizes, constants, measurements."""
    kernel, args, options = launch
    what = {"op": op.name, "kernel": kernel.__name__, "types": [type_of(x) for x in args], "sizes": sizes}
    return what | options | measure(compile_kernel(*launch))


def report(*names):
    """All measurements for some ops, from a process that compiles: a list of dicts. Raises CalledProcessError."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "triton_kernels.offline", "--json", *(f"--op={name}" for name in names)]
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--op", action="append", choices=RECORDS, help="only this op; can be given several times")
    arguments = parser.parse_args()
    if runtime.INTERPRETED:
        parser.error("unset TRITON_INTERPRET: an interpreting process cannot compile")
    header = ("registers", "spills", "shared", "BLOCK_N", "num_warps", "num_stages", "hmma", "hgmma", "ldgsts")
    if not arguments.json:
        print(f"{'kernel':68}", *(f"{name:>10}" for name in header))
    for op, sizes, launch in jobs(RECORDS[name] for name in arguments.op or RECORDS):
        line = row(op, sizes, launch)
        name = " ".join([line["kernel"], *(f"{size}={value}" for size, value in sizes.items())])
        table_line = [f"{name:68}", *(f"{line.get(name, '-'):>10}" for name in header)]
        print(json.dumps(line) if arguments.json else " ".join(table_line), flush=True)


if __name__ == "__main__":
    main()
