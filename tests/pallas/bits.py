"""What must not change a bit: the batch, the size of the cache, the number of programs, the type of an option."""

import jax.numpy as jnp
import numpy as np
import pytest
from mosaic import PALLAS, same

from jforge.harness.op import Case
from jforge.harness.ops import BY_NAME

pytestmark = pytest.mark.usefixtures("no_races")


def given(op: str, sizes: dict, lengths=(), **options) -> tuple[list, dict]:
    """Arrays and options of a call in float16."""
    inputs = BY_NAME[op].inputs(
        Case("bits", op, dict(T=1, K=1, H=64, V=64, C=128, R=64) | sizes, lengths, options), "float16"
    )
    arrays = [None if a is None else jnp.asarray(a) for a in inputs.arrays.values()]
    return arrays, {n: jnp.asarray(o) if isinstance(o, np.ndarray) else o for n, o in inputs.options.items()}


@pytest.mark.parametrize(
    "op, N, options",
    [("decode_attention", 16, {}), ("decode_attention", 16, {"window": 70}),
     ("decode_attention", 16, {"softcap": 3.0, "out_dtype": "float32"}), ("decode_mla", 8, {"out_dtype": "float32"}),
     ("decode_mla", 40, {"out_dtype": "float32"})],
)  # fmt: skip
def test_fixed_chunk_is_batch_invariant(op, N, options):
    """A row alone, among rows of other lengths, and in caches of other sizes; sinks included."""
    call = getattr(PALLAS.ops, op)
    arrays, options = given(op, dict(B=2, N=N, S=136), (130, 30), chunk=64, sinks=True, **options)
    names = BY_NAME[op]
    both = call(*arrays, **options)
    for b, S in ((0, 136), (1, 32), (1, 64), (1, 136)):
        row = slice(b, b + 1)
        one = [a[row, :S] if name in names.caches else a[row] for name, a in zip(names.axes, arrays, strict=True)]
        assert same([part[row] for part in both], call(*one, **options)), (b, S)


@pytest.mark.parametrize(
    "op, sizes, options",
    [("decode_block_sparse", dict(N=16, X=1, L=8), {"block_size": 16}),
     ("decode_block_sparse", dict(N=8, X=1, L=90), {"block_size": 1}),
     ("decode_block_sparse", dict(N=8, X=1, V=0, L=90), {"block_size": 1, "out_dtype": "float32"}),
     ("decode_sparse_mla", dict(N=40, L=90), {"out_dtype": "float32"})],
)  # fmt: skip
def test_fixed_chunk_of_a_list_is_batch_invariant(op, sizes, options):
    """A row alone, and with a list that is longer by entries that are ignored; sinks included."""
    call, lists = getattr(PALLAS.ops, op), BY_NAME[op].lists
    arrays, options = given(op, dict(B=2, S=128) | sizes, (128, 70), sinks=True, chunk=64, **options)
    at = list(BY_NAME[op].axes).index(lists)
    both = call(*arrays, **options)
    assert not same(both, call(*arrays, **{**options, "chunk": 1000}))  # the chunk is one
    longer = [jnp.pad(a, (*[(0, 0)] * (a.ndim - 1), (0, 70)), constant_values=-1) if i == at else a
              for i, a in enumerate(arrays)]  # fmt: skip
    assert same(both, call(*longer, **options))
    for b in range(2):
        one = [a if a is None else a[b : b + 1] for a in longer]
        assert same([part[b : b + 1] for part in both], call(*one, **options)), b


@pytest.mark.parametrize("op, options", [("index_scores", {}), ("block_index_scores", {"block_size": 16})])
def test_a_score_depends_on_nothing_but_its_key(op, options):
    """A row alone and among others, by one program and by three."""
    arrays, options = given(op, dict(B=2, I=5, S=256, J=64), (250, 100), **options)
    results = []
    for rows, splits in ((2, 3), (1, 1)):
        with PALLAS.planned({"splits": splits}):
            results.append(getattr(PALLAS.ops, op)(*(x[:rows] for x in arrays), **options)[:1])
    assert same(*[[x] for x in results])


def test_options_may_be_numpy_integers_and_larger_than_the_cache():
    arrays, options = given("decode_attention", dict(B=1, T=2, N=8, S=72), (70,))
    for name, value in (("chunk", np.int64(64)), ("chunk", 2**62), ("window", np.int32(20)), ("window", 2**31 - 1)):
        big, small = ({**options, name: number} for number in (value, min(int(value), 72)))
        assert same(PALLAS.ops.decode_attention(*arrays, **big), PALLAS.ops.decode_attention(*arrays, **small)), name


@pytest.mark.parametrize("size, L, V, softcap", [(16, 5, 64, 30.0), (1, 70, 64, 30.0), (1, 70, 0, None)])
def test_options_may_be_numpy_numbers(size, L, V, softcap):
    sizes = dict(B=1, N=8, X=1, S=80, L=L, V=V)
    arrays, options = given("decode_block_sparse", sizes, (70,), block_size=size, softcap=softcap)
    other = options | dict(block_size=np.int64(size), softcap=softcap and np.float16(softcap))
    assert same(*(PALLAS.ops.decode_block_sparse(*arrays, **some) for some in (options, other)))
