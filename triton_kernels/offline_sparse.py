"""The kernels that read lists of entries, as `offline` compiles them: representative variants and how to build each."""

from dataclasses import dataclass

from triton_kernels.cubin import BYTES, POINTER, compile_kernel, measure
from triton_kernels.decode_block_sparse import block_sparse_kernel
from triton_kernels.decode_block_sparse import specialise as specialise_block_sparse
from triton_kernels.decode_sparse_mla import sparse_mla_kernel
from triton_kernels.decode_sparse_mla import specialise as specialise_sparse_mla
from triton_kernels.plan import block_rows, default_block_config, default_mla_config


@dataclass(frozen=True)
class BlockSparse:
    """One compiled variant of `block_sparse_kernel`; with 64-key tiles, blocks and pages below 64 are gathered."""

    block: int = 128
    dtype: str = "bfloat16"
    head_dim: int = 128
    value_dim: int = 128
    group: int = 16
    page: int = 0
    lengths: bool = True
    sink: bool = False
    softcap: bool = False
    split: bool = False
    tokens: int = 2

    def __str__(self):
        flags = [name for name in ("lengths", "sink", "softcap", "split") if getattr(self, name)]
        page = [f"page {self.page}"] if self.page else []
        shape = f"{self.dtype} {self.head_dim}x{self.value_dim} G{self.group} block {self.block}"
        return " ".join(["block sparse", shape, *page, *flags])


@dataclass(frozen=True)
class SparseMla:
    """One compiled variant of `sparse_mla_kernel`; R = 0 is `decode_block_sparse` with v=None."""

    heads: int = 128
    dtype: str = "bfloat16"
    latent_dim: int = 512
    rope_dim: int = 64
    block: int = 1
    page: int = 0
    lengths: bool = False
    sink: bool = False
    softcap: bool = False
    split: bool = False
    tokens: int = 2

    def __str__(self):
        flags = [name for name in ("lengths", "sink", "softcap", "split") if getattr(self, name)]
        page = [f"page {self.page}"] if self.page else []
        shape = f"{self.dtype} {self.latent_dim}+{self.rope_dim} N{self.heads} block {self.block}"
        return " ".join(["sparse mla", shape, *page, *flags])


BLOCK_SPARSES = (
    BlockSparse(tokens=1),
    BlockSparse(page=128, sink=True, split=True),
    BlockSparse(64, head_dim=192),
    BlockSparse(16, head_dim=64, value_dim=64, group=1, split=True),
    BlockSparse(1, page=64, lengths=False),
    BlockSparse(16, head_dim=256, value_dim=256, page=16, sink=True, softcap=True),
    BlockSparse(8, group=64, page=24, softcap=True),
    BlockSparse(16, "float32", 256, 256, 64, page=16),
)
SPARSE_MLAS = (
    SparseMla(tokens=1),
    SparseMla(sink=True, split=True),
    SparseMla(64, rope_dim=0, sink=True, split=True),
    SparseMla(rope_dim=0, page=64, lengths=True, sink=True, softcap=True),
    SparseMla(32, split=True),
    SparseMla(16, split=True),
    SparseMla(4, latent_dim=128, rope_dim=0, block=128, page=128, lengths=True, split=True),
    SparseMla(128, "float32"),
)


def compile_block_sparse(case, config=None):
    """As `compile_decode`, for a `BlockSparse` case."""
    rows = block_rows(case.group)
    config = config or default_block_config(BYTES[case.dtype], case.head_dim, case.value_dim, rows)
    flags = {name: getattr(case, name) for name in ("lengths", "sink", "softcap", "split")}
    shape = (case.tokens, 4, 1, case.group, case.head_dim, case.value_dim)
    constants = specialise_block_sparse(shape, case.block, case.page, config, **flags)
    types = dict.fromkeys(("q", "k", "v", "out"), POINTER[case.dtype]) | dict.fromkeys(("scale", "softcap"), "fp32")
    return compile_listed(str(case), block_sparse_kernel, types, constants, config, case.split)


def compile_sparse_mla(case, config=None):
    """As `compile_decode`, for a `SparseMla` case."""
    config = config or default_mla_config(BYTES[case.dtype], case.latent_dim, 1, case.heads)
    flags = {name: getattr(case, name) for name in ("lengths", "sink", "softcap", "split")}
    shape = (case.tokens, 1, 1, case.heads, case.latent_dim, case.rope_dim)
    constants = specialise_sparse_mla(shape, (case.latent_dim, case.rope_dim), case.block, case.page, config, **flags)
    types = dict.fromkeys(("q_latent", "q_rope", "latent", "k_rope", "out"), POINTER[case.dtype])
    types |= dict.fromkeys(("scale", "softcap"), "fp32")
    return compile_listed(str(case), sparse_mla_kernel, types, constants, config, case.split)


def compile_listed(name, kernel, types, constants, config, split):
    """Compile a kernel that reads lists of entries, and measure it."""
    types |= dict.fromkeys(("block_indices", "indices", "lengths", "page_table"), "*i32")
    types |= dict.fromkeys(("sinks", "lse"), "*fp32") | ({"out": "*fp32"} if split else {})
    compiled = compile_kernel(kernel, types, constants, config.num_warps, config.num_stages)
    return measure(name, compiled, block_n=config.block_n, warps=config.num_warps, stages=config.num_stages)
