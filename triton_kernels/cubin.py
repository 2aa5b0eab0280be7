"""Compile one kernel for sm_90 without a GPU and measure its machine code.

Triton and its bundled ptxas need no driver for this. A spill shows as STL/LDL instructions; a kernel that asks for more
than 227 KB of shared memory cannot be launched on an H100.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SM90 = GPUTarget("cuda", 90, 32)
MAX_SHARED = 227 * 1024
POINTER = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
POINTER |= {"int8": "*i8", "float8_e4m3fn": "*fp8e4nv", "float8_e5m2": "*fp8e5"}
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "int8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


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
        "name": name,
        **launch,
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spills": count["STL"] + count["LDL"],
        "shared": compiled.metadata.shared,
        "narrow": len(re.findall(r"\bLDGSTS(?!\S*\.128)", sass)),
        "wide": len(re.findall(r"\b(?:LDG|STG)\.\S*\.128", sass)),
        **{op.lower(): count[op] for op in ("HMMA", "HGMMA", "LDGSTS")},
    }
