"""Steps that take several ops and are benchmarked as one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from jforge.harness.op import Work


@dataclass(frozen=True)
class Composite:
    """A step, benchmarked as an Op is: see there. run: (ops, options, *arrays, **more) -> an attention's out."""

    name: str
    axes: Mapping[str, str]
    run: Callable
    moved: Callable[..., int]
    bench: tuple[Work, ...]
    reads: Callable[[Mapping], str]
    fill: Mapping[str, Callable] = field(default_factory=dict)
    cpu: tuple[Work, ...] = ()
    attends: bool = True
    keywords: Mapping[str, str] = field(default_factory=dict)
    carry: None = None
    table: str = "parts"


def _select_and_attend(ops, options, q, k, v, q_index, k_index, lengths, **more):
    size = options["block_size"]
    scores = ops.block_index_scores(q_index, k_index, lengths, block_size=size)
    picks = ops.topk_indices(scores, options["topk"])
    return ops.decode_block_sparse(q, k, v, picks, lengths, block_size=size, scale=options["scale"], **more)[0]


MSA_STEP = Composite(
    name="msa step",  # of MiniMax-M3: block scores, top-k, block-sparse attention
    axes={"q": "BTNH", "k": "BSKH", "v": "BSKH", "q_index": "BTKH", "k_index": "BSH", "lengths": "B"},
    run=_select_and_attend,
    moved=lambda B, K, S, H, N, L, block_size, **_: 2 * B * H * (S + K + 2 * K * L * block_size + 2 * N),
    bench=(
        Work(
            {"B": 16, "N": 64, "K": 4, "S": 131072, "H": 128, "L": 16},
            {"block_size": 128, "topk": 16, "scale": 128**-0.5},
        ),
    ),
    reads=lambda row: f"all index keys, then {row['L']} blocks of {row['block_size']} a key head",
)
COMPOSITES = (MSA_STEP,)
