"""How tensors lie in memory: strides, what is overwritten, and offsets that 32 bits do not hold."""

import pytest
import torch
from calls import EXAMPLES, given, in_pages, run, same

import triton_kernels as tk

ROWS = {"q", "k", "v", "q_latent", "q_rope", "latent", "k_rope", "q_index", "k_index", "state"}  # read 16 bytes at once
pytestmark = pytest.mark.usefixtures("device", "poisoned_memory")


def spread(x):
    """Every second element of the last axis of a longer tensor."""
    return x.repeat_interleave(2, -1)[..., ::2]


LAYOUTS = {
    "head-major": lambda x, name: x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim > 3 else x,
    "batch-last": lambda x, name: x.transpose(0, -2).contiguous().transpose(0, -2) if x.ndim > 1 else x,
    "cut out": lambda x, name: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "of more heads": lambda x, name: torch.cat([x, x], -2)[..., : x.shape[-2], :] if x.ndim > 1 else x,
    "spread": lambda x, name: x if name in ROWS else spread(x),
    "transposed": lambda x, name: x if name in ROWS or x.ndim < 2 else x.mT.contiguous().mT,
}


@pytest.mark.parametrize("op", EXAMPLES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_no_bit(op, layout):
    """Head-major caches, fused K and V, a q sliced out of a wider projection, lists cut out of longer ones, tables."""
    changes = {"T": 2} if "T" in EXAMPLES[op][0] and op != "topk_indices" else {}
    changes |= {"sinks": True} if "scale" in given(op) else {}
    asked = [given(op, **changes)]
    if op in ("index_scores", "block_index_scores"):
        asked.append(given(op, **changes, stored="int8"))
    if op in ("decode_mla", "decode_block_sparse"):
        asked.append(in_pages(given(op, **changes, S=128), 16))
    for arguments in asked:
        laid = {n: LAYOUTS[layout](x, n) if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
        assert same(run(op, laid), run(op, arguments))


LAST = [(op, name) for op in EXAMPLES for name, x in given(op).items() if name in ROWS and isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("op, name", LAST)
def test_rows_of_the_last_dimension_are_contiguous(op, name):
    arguments = given(op)
    with pytest.raises(ValueError, match=f"last dimension of {name}"):
        run(op, arguments | {name: spread(arguments[name])})


def test_rows_too_long_for_offsets_of_32_bits_are_refused():
    far, too_far = (
        torch.empty_strided((1, 2, 1, 64), (1, stride, 1, 1), device="meta") for stride in (2**31 - 64, 2**31)
    )
    tk.runtime.check_rows("op", q=far)
    with pytest.raises(NotImplementedError, match=f"a row of q reaches over {2**31 + 63} elements"):
        tk.runtime.check_rows("op", q=too_far)


def test_slots_too_far_apart_for_offsets_of_32_bits_are_refused():
    """In a cache whose first dimension is the slot, the next slot of a row is a whole batch away."""
    arguments = given("decode_attention", B=1, N=2, K=1, S=2, lengths=(2,))
    k, most = arguments["k"], tk.runtime.MAX_SLOT_STRIDE
    far = torch.empty(most + 1 + k.shape[-1], dtype=k.dtype)
    whole = far.as_strided(k.shape, (0, most, 0, 1)).copy_(k)
    assert same(run("decode_attention", arguments | {"k": whole}), run("decode_attention", arguments))
    with pytest.raises(NotImplementedError, match=f"k has {most + 1} elements from slot to slot"):
        run("decode_attention", arguments | {"k": far.as_strided(k.shape, (0, most + 1, 0, 1))})


def test_only_the_state_is_overwritten():
    """A state cut out of a larger buffer: what lies around it, and every other argument, keeps its bits."""
    arguments = given("decode_linear")
    buffer = torch.full((4, 3, 20, 28), 7.0)
    inside = (slice(1, 3), slice(None), slice(None), slice(4, 24))
    buffer[inside] = arguments["state"]
    before, others = buffer.clone(), {name: x.clone() for name, x in arguments.items() if name != "state"}
    out, state = tk.decode_linear(**arguments | {"state": buffer[inside]})
    assert state.data_ptr() == buffer[inside].data_ptr() and same((out, state), run("decode_linear", arguments))
    assert all(torch.equal(arguments[name], x) for name, x in others.items())
    changed = buffer != before
    assert changed[inside].any()
    changed[inside] = False
    assert not changed.any()


def test_a_state_that_overlaps_itself():
    arguments = given("decode_linear")
    arguments["state"] = arguments["state"][:1].expand(2, -1, -1, -1)
    with tk.runtime.recorded() as launches, pytest.raises(ValueError, match="B=2 entries share memory"):
        tk.decode_linear(**arguments)
    assert not launches


def test_states_of_no_rows():
    arguments = given("decode_linear")
    empty = {name: x[:0] for name, x in arguments.items()}
    out, state = tk.decode_linear(**empty)
    assert out.shape == (0, 3, 20) and state is empty["state"]
