"""The records of the ops, one file each: what an op means, how it is asked, judged, refused and timed.

Tests, `jforge equiv`, benchmarks, the fuzz, GPU runs and the tables of docs/kernels.md loop over `OPS`.
"""

from jforge.harness.op import Case, Op
from jforge.harness.ops import (
    block_index_scores,
    decode_attention,
    decode_block_sparse,
    decode_linear,
    decode_mla,
    decode_sparse_mla,
    index_scores,
    merge_states,
    topk_indices,
)

OPS: tuple[Op, ...] = tuple(
    file.OP
    for file in (
        decode_attention,
        decode_mla,
        decode_block_sparse,
        decode_sparse_mla,
        index_scores,
        block_index_scores,
        topk_indices,
        decode_linear,
        merge_states,
    )
)
BY_NAME = {op.name: op for op in OPS}
CASES: tuple[Case, ...] = tuple(case for op in OPS for case in op.cases)


def cases(op: str | None = None, tag: str | None = None) -> tuple[Case, ...]:
    """The cases of an op, of a tag, or all."""
    return tuple(c for c in CASES if op in (None, c.op) and (tag is None or tag in c.tags))
