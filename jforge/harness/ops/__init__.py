"""The records of the ops, one file each: what an op means, how it is asked, judged, refused and timed.

Tests, `jforge equiv`, benchmarks, the fuzz, GPU runs and the tables of docs/kernels.md loop over `OPS`.
"""

from importlib import import_module

from jforge.harness.op import Case, Op

NAMES = (
    "decode_attention", "decode_mla", "decode_block_sparse", "decode_sparse_mla", "index_scores", "block_index_scores",
    "topk_indices", "decode_linear", "merge_states",
)  # fmt: skip
OPS: tuple[Op, ...] = tuple(import_module(f"jforge.harness.ops.{name}").OP for name in NAMES)
BY_NAME = {op.name: op for op in OPS}
CASES: tuple[Case, ...] = tuple(case for op in OPS for case in op.cases)


def cases(op: str | None = None, tag: str | None = None) -> tuple[Case, ...]:
    """The cases of an op, of a tag, or all."""
    return tuple(c for c in CASES if op in (None, c.op) and (tag is None or tag in c.tags))
