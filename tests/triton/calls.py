"""Small calls of triton_kernels with the records' inputs, as torch tensors that a test may change."""

import numpy as np
import torch

import triton_kernels
from jforge.core import compare
from jforge.harness import fuzz
from jforge.harness.backends import to_torch
from jforge.harness.op import Case, Draw
from jforge.harness.ops import BY_NAME

EXAMPLES = {
    "decode_attention": (dict(B=2, T=1, N=6, K=2, S=100, H=16, V=16), (9, 100), {}),
    "decode_mla": (dict(B=2, T=1, N=4, S=100, C=16, R=8), (9, 100), {}),
    "decode_block_sparse": (dict(B=2, T=1, N=4, K=2, S=100, H=16, V=16, X=2, L=5), (9, 100), {"block_size": 8}),
    "decode_sparse_mla": (dict(B=2, T=1, N=4, S=100, C=16, R=8, L=100), (9, 100), {}),
    "index_scores": (dict(B=2, T=2, I=3, S=70, J=24), (9, 70), {}),
    "block_index_scores": (dict(B=2, T=2, I=3, S=70, J=24), (9, 70), {"block_size": 16}),
    "topk_indices": (dict(B=2, T=3, S=40), (40, 3, 0, 7, 40, 1), {"k": 9}),
    "decode_linear": (dict(B=2, N=3, H=20, V=20, decay=3, beta=1), (), {}),
    "merge_states": (dict(P=3, B=2, T=2, N=3, V=24), (3, 1), {}),
}


def given(op, dtype="float16", *, lengths=None, stored=None, seed=0, **changes):
    """Arguments by name: an op's tensors in the order of its signature, then its options. Changes of sizes and options
    are told apart by their names.
    """
    sizes, rows, options = EXAMPLES[op]
    own = {name: value for name, value in changes.items() if name in sizes}
    more = {name: value for name, value in changes.items() if name not in sizes}
    case = Case("own", op, sizes | own, rows if lengths is None else lengths, options | more)
    inputs = fuzz.inputs_of(Draw(case, dtype, seed, values="coarse", stored=stored))
    here = torch.empty(0).device
    return {
        name: to_torch(x).to(here) if isinstance(x, np.ndarray) else x
        for name, x in (*inputs.arrays.items(), *inputs.options.items())
    }


CACHES = ("k", "v", "latent", "k_rope")


def in_pages(arguments, page):
    """The same call on pools, which hold the pages of all rows in order."""
    rows, slots = next(arguments[name] for name in CACHES if name in arguments).shape[:2]
    pools = {name: arguments[name].unflatten(1, (-1, page)).flatten(0, 1) for name in CACHES if name in arguments}
    table = torch.arange(rows * slots // page, dtype=torch.int32).view(rows, -1)
    return arguments | pools | {"page_table": table}


def run(op, arguments):
    """The results of a call as a tuple. A contiguous state is not overwritten but copied first."""
    own = {name: x.clone() if name == "state" and x.is_contiguous() else x for name, x in arguments.items()}
    found = getattr(triton_kernels, op)(**own)
    return found if isinstance(found, tuple) else (found,)


def same(got, want):
    """Whether two results have the same bits; NaN is NaN."""
    return all(torch.equal(a.nan_to_num(7e4), b.nan_to_num(7e4)) for a, b in zip(got, want, strict=True))


def truth(op, arguments):
    """What the op's oracle answers."""
    with np.errstate(all="ignore"):
        return BY_NAME[op].oracle(**{name: array(x) for name, x in arguments.items()})


def agree(op, got, arguments):
    """Results are the oracle's: NaN and Inf where it has them, the rest within compare's tolerances."""
    dtype = str(next(iter(arguments.values())).dtype).removeprefix("torch.")
    pairs = []
    for x, y in zip(map(array, got), truth(op, arguments), strict=True):
        broken = np.isnan(y) | np.isposinf(y)
        assert np.array_equal(x[broken], y[broken], equal_nan=True)
        pairs.append((np.where(broken, 0, x), np.where(broken, 0, y)))
    errors = BY_NAME[op].errors(*zip(*pairs, strict=True))
    assert errors[0] <= compare.OUT[dtype] and errors[1] <= compare.LSE[dtype], errors


def array(x):
    """A tensor in float64, or with its integers."""
    if not isinstance(x, torch.Tensor):
        return x
    return (x.double() if x.is_floating_point() else x).cpu().numpy()
