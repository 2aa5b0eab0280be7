"""The kernels of indexers and of linear attention, as `offline` compiles them: variants and how to build each."""

from dataclasses import dataclass

from triton_kernels.cubin import BYTES, POINTER, compile_kernel, measure
from triton_kernels.decode_linear import linear_kernel
from triton_kernels.decode_linear import specialise as specialise_linear
from triton_kernels.index_scores import block_kernel, token_kernel
from triton_kernels.index_scores import specialise as specialise_scores
from triton_kernels.plan import default_linear_config, default_score_config
from triton_kernels.topk_indices import pack_kernel, unpack_kernel


@dataclass(frozen=True)
class Linear:
    """One compiled variant of `linear_kernel`; channel: a decay per key channel, delta: with beta."""

    dtype: str = "bfloat16"
    head_dim: int = 128
    value_dim: int = 128
    channel: bool = False
    delta: bool = False

    def __str__(self):
        flags = [name for name in ("channel", "delta") if getattr(self, name)]
        return " ".join(["linear", f"{self.dtype} {self.head_dim}x{self.value_dim}", *flags])


@dataclass(frozen=True)
class Scores:
    """One compiled variant of `token_kernel`, or with a block of `block_kernel`; stored: a quantised dtype of keys."""

    heads: int = 64
    dtype: str = "bfloat16"
    head_dim: int = 128
    block: int = 0
    stored: str | None = None
    tokens: int = 2
    value_dim: int = 0

    def __str__(self):
        rest = [f"block {self.block}"] * bool(self.block) + [f"keys {self.stored}"] * bool(self.stored)
        return " ".join(["scores", f"{self.dtype} {self.head_dim} I{self.heads} T{self.tokens}", *rest])


LINEARS = (
    Linear(),
    Linear(channel=True, delta=True),
    Linear(head_dim=256, value_dim=256, delta=True),
    Linear("float32", 96, 80),
    Linear(head_dim=1024, value_dim=64, channel=True, delta=True),
)
INDEX_SCORES = (
    Scores(tokens=1),
    Scores(32, "float16"),
    Scores(256, head_dim=256),
    Scores(stored="float8_e4m3fn"),
    Scores(256, stored="int8"),
    Scores(256, "float32"),
    Scores(128, "float32", 256),
)
BLOCK_SCORES = (
    Scores(4, block=128, tokens=1),
    Scores(4, block=16),
    Scores(4, block=300),
    Scores(256, head_dim=256, block=128),
    Scores(4, block=128, stored="float8_e4m3fn"),
    Scores(256, "float32", block=64),
)
TOPKS = (("pack", "float32"), ("pack", "bfloat16"), ("unpack", "float32"))


def compile_linear(case, config=None):
    """As `compile_decode`, for a `Linear` case."""
    config = config or default_linear_config(case.head_dim)
    flags = {name: getattr(case, name) for name in ("channel", "delta")}
    constants = specialise_linear(64, case.head_dim, case.value_dim, config, **flags)
    types = dict.fromkeys(("q", "k", "v", "out"), POINTER[case.dtype])
    types |= dict.fromkeys(("state", "decay", "beta"), "*fp32")
    compiled = compile_kernel(linear_kernel, types, constants, config.num_warps, 1)
    return measure(str(case), compiled, warps=config.num_warps, columns=constants["BLOCK_V"])


def compile_scores(case, config=None):
    """As `compile_decode`, for a `Scores` case."""
    stored = case.stored or case.dtype
    config = config or default_score_config(BYTES[case.dtype], BYTES[stored], case.head_dim, case.heads)
    options = dict(scaled=case.stored is not None, block_size=case.block or None)
    constants = specialise_scores(case.tokens, case.heads, case.head_dim, config, **options)
    types = {"q": POINTER[case.dtype], "k": POINTER[stored], "lengths": "*i32"}
    types |= dict.fromkeys(("weights", "k_scale", "out"), "*fp32")
    kernel = block_kernel if case.block else token_kernel
    compiled = compile_kernel(kernel, types, constants, config.num_warps, config.num_stages)
    return measure(str(case), compiled, block_n=config.block_n, warps=config.num_warps, stages=config.num_stages)


def compile_topk(kernel, dtype):
    """Measurements of one kernel around torch.topk."""
    types = {"scores": POINTER[dtype], "keys": "*i64", "picks": "*i32"}
    compiled = compile_kernel({"pack": pack_kernel, "unpack": unpack_kernel}[kernel], types, {}, 4, 1)
    return measure(f"topk {kernel} {dtype}", compiled, warps=4)
