"""torch_ref.ops beyond the op cases and the fuzz, which judge every op against the float64 oracle: gradients, quantised
caches, what no query may read, out_dtype, empty batches and caches, float64, and the messages.
"""

import math
import re

import numpy
import pytest
import torch
from dense_family import INF, NAN, int32, random
from op_contract_cases import CASES, ELSEWHERE, GOOD, NOT_A_TENSOR

from torch_ref import ops

STORED = [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]
LENGTHS = int32(9, 6, 1, 0)
# blocks of 4 slots of 9: out of order, with entries to ignore anywhere, and a list of nothing
LISTS = int32(2, -1, 0, 99, 1, 0, 0, 2, 1, -1, -1, 2, 1, 0, 6, -9, 0, 1, 0, -1, 1, -1, -1, -1).reshape(2, 2, 2, 3)
LISTS = torch.cat([LISTS, LISTS.flip(-1)])
INDICES = LISTS[:, :, 0] * 3  # tokens; a query of row 0 names 6 and 0


def given(op, dtype=torch.float64):
    """(tensors by name in the order of the op, options): B = 4, T = 2, N = 4, K = 2, S = 9."""
    shapes = {
        "decode_attention": dict(q=(4, 2, 4, 5), k=(4, 9, 2, 5), v=(4, 9, 2, 3)),
        "decode_mla": dict(q_latent=(4, 2, 4, 5), q_rope=(4, 2, 4, 3), latent=(4, 9, 5), k_rope=(4, 9, 3)),
        "index_scores": dict(q_index=(4, 2, 3, 5), k_index=(4, 9, 5), weights=(4, 2, 3)),
        "block_index_scores": dict(q_index=(4, 2, 3, 5), k_index=(4, 9, 5)),
    }
    like = {"decode_block_sparse": "decode_attention", "decode_sparse_mla": "decode_mla"}.get(op, op)
    tensors = {name: random(*shape, dtype=dtype, seed=i) for i, (name, shape) in enumerate(shapes[like].items())}
    if "weights" in tensors:
        tensors["weights"] = tensors["weights"].to(torch.promote_types(dtype, torch.float32))
    lists = {"decode_block_sparse": {"block_indices": LISTS}, "decode_sparse_mla": {"indices": INDICES}}.get(op, {})
    lengths = {} if op == "decode_sparse_mla" else {"lengths": LENGTHS}
    options = {"scale": 0.4} if op.startswith("decode") else {}
    return tensors | lists | lengths, options | ({"block_size": 4} if "block" in op else {})


def read(op):
    """bool B S: the slots that some query of the row may read."""
    slot = torch.arange(9)
    below = slot < LENGTHS[:, None]
    if op == "decode_block_sparse":  # of either KV head: a slot that no list of the row names
        stop = (LENGTHS[:, None] - 1 + torch.arange(2))[..., None, None, None]
        return ((LISTS[..., None] == slot // 4) & (slot < stop)).flatten(1, 3).any(1)
    return (INDICES[..., None] == slot).flatten(1, 2).any(1) if op == "decode_sparse_mla" else below


CACHED = {
    "decode_attention": ("k", "v"),
    "decode_block_sparse": ("k", "v"),
    "decode_mla": ("latent", "k_rope"),
    "decode_sparse_mla": ("latent", "k_rope"),
    "index_scores": ("k_index",),
    "block_index_scores": ("k_index",),
}
ATTENDING = tuple(CACHED)[:4]
every_op = pytest.mark.parametrize("op", CACHED)


def first(result):
    return result[0] if isinstance(result, tuple) else result


@every_op
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_unread_slots_reach_neither_results_nor_gradients(op, poison):
    tensors, options = given(op)
    expected = first(getattr(ops, op)(**tensors, **options))
    seen = read(op)
    assert not seen.all() and seen.any()
    for name in CACHED[op]:
        tensors[name][~seen] = poison
    leaves = {name: x.requires_grad_() for name, x in tensors.items() if x.is_floating_point()}
    out = first(getattr(ops, op)(**tensors, **options))
    torch.testing.assert_close(out, expected)
    out[out.isfinite()].square().sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves.values())
    assert all((leaves[name].grad[~seen] == 0).all() and leaves[name].grad[seen].any() for name in CACHED[op])


@every_op
@pytest.mark.parametrize("stored", STORED)
def test_stored_times_scale(op, stored):
    """A quantised cache is the cache of the products, whatever stands in the scales of slots that no query reads."""
    tensors, options = given(op, torch.float32)
    names, wide = [name for name in CACHED[op] if name != "k_rope"], dict(tensors)
    for i, name in enumerate(names):
        tensors[name] = (10 * tensors[name]).round().to(stored)
        scale = random(*tensors[name].shape[:-1], seed=7 + i).float().exp() / 10
        wide[name] = tensors[name].float() * scale[..., None]
        scale[~read(op)] = NAN
        options[{"k_index": "k_scale"}.get(name, f"{name}_scale")] = scale
    plain = {name: value for name, value in options.items() if not name.endswith("_scale")}
    got, want = getattr(ops, op)(**tensors, **options), getattr(ops, op)(**wide, **plain)
    assert first(got).dtype == torch.float32
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("op", ["decode_attention", "decode_mla"])
def test_quantised_pages_and_pages_before_the_window(op):
    """Pools in reverse order; entries of pages that lie before the window or past the length point nowhere."""
    tensors, options = given(op, torch.float32)
    lengths = int32(9, 8, 7, 9)
    names = CACHED[op]
    tensors |= {"lengths": lengths, names[0]: (10 * tensors[names[0]]).round().to(torch.int8)}
    options["window"] = 3
    scales = {"latent_scale": random(4, 9, seed=5).float().exp()}
    if op == "decode_attention":
        tensors["v"] = (10 * tensors["v"]).round().to(torch.int8)
        scales = {name: random(4, 9, 2, seed=i).float().exp() for i, name in enumerate(("k_scale", "v_scale"))}
    expected = getattr(ops, op)(**tensors, **options, **scales)

    def pool(x):
        return torch.nn.functional.pad(x, (0, 0) * (x.ndim - 2) + (0, 1)).unflatten(1, (5, 2)).flatten(0, 1).flip(0)

    table = torch.arange(19, -1, -1, dtype=torch.int32).reshape(4, 5)
    page = torch.arange(5) * 2
    table[(page + 1 < lengths[:, None] - 4) | (page >= lengths[:, None])] = 2**31 - 1
    tensors |= {name: pool(tensors[name]) for name in names}
    scales = {name: pool(scale) for name, scale in scales.items()}
    torch.testing.assert_close(getattr(ops, op)(**tensors, **options, **scales, page_table=table), expected)


@pytest.mark.parametrize("op", ATTENDING)
def test_out_dtype_chunk_and_float64(op):
    tensors, options = given(op, torch.bfloat16)
    narrow, lse = getattr(ops, op)(**tensors, **options)
    wide, same = getattr(ops, op)(**tensors, **options, out_dtype=torch.float32)
    assert wide.dtype == lse.dtype == torch.float32 and not torch.equal(wide, narrow.float())
    assert torch.equal(narrow, wide.to(torch.bfloat16)) and torch.equal(lse, same)
    if op in ("decode_attention", "decode_mla"):
        assert all(map(torch.equal, getattr(ops, op)(**tensors, **options, chunk=4), (narrow, lse)))
    assert {x.dtype for x in getattr(ops, op)(**given(op)[0], **options)} == {torch.float64}
    out, lse = getattr(ops, op)(**tensors, **options | {"scale": 1e4})
    assert out.isfinite().all() and not lse.isnan().any()


@pytest.mark.parametrize("op", ATTENDING)
def test_queries_without_keys_and_caches_without_slots(op):
    tensors, options = given(op)
    sinks = random(4)
    tensors |= {name: value[:, :0] for name, value in tensors.items() if name in CACHED[op]}
    if "lengths" in tensors:
        tensors["lengths"] = 0 * LENGTHS
    out, lse = getattr(ops, op)(**tensors, **options)
    assert (out == 0).all() and (lse == -INF).all()
    out, lse = getattr(ops, op)(**tensors, **options, sinks=sinks)
    assert (out == 0).all() and torch.equal(lse, sinks.expand(4, 2, 4))
    if op != "decode_sparse_mla":
        pools = {name: torch.ones(2, 4, *tensors[name].shape[2:]).double() for name in CACHED[op]}
        table = torch.zeros(4, 0, dtype=torch.int32)
        out, lse = getattr(ops, op)(**tensors | pools, **options, page_table=table)
        assert out.shape[:3] == (4, 2, 4) and (out == 0).all() and (lse == -INF).all()


def test_scores_of_a_cache_without_slots():
    for op, shape in (("index_scores", (4, 2, 0)), ("block_index_scores", (4, 2, 3, 0))):
        tensors, options = given(op)
        tensors |= {"k_index": tensors["k_index"][:, :0], "lengths": 0 * LENGTHS}
        assert getattr(ops, op)(**tensors, **options).shape == shape


def test_another_query_s_poison_reaches_nothing():
    """A gather is per query: what the first query names must not blank or reach the second."""
    tensors, options = given("decode_sparse_mla")
    tensors["indices"] = int32(4, 7, 8, 3).reshape(1, 2, 2).repeat(4, 1, 1)
    expected = ops.decode_sparse_mla(**tensors, **options)
    tensors["latent"][0, 4] = tensors["k_rope"][0, 4] = NAN
    out, lse = ops.decode_sparse_mla(**tensors, **options)
    assert out[0, 0].isnan().all()
    torch.testing.assert_close((out[0, 1], lse[0, 1], out[1:]), (expected[0][0, 1], expected[1][0, 1], expected[0][1:]))


def test_scores_by_hand():
    """relu before the weights and the sum; nothing clipped, scaled or summed in blocks."""
    q_index, k_index = torch.tensor([[[[1.0], [-1.0]]]]), torch.tensor([[[2.0], [-3.0], [0.0]]])
    scores = ops.index_scores(q_index, k_index, torch.tensor([[[5.0, -7.0]]]), int32(3))
    assert scores.tolist() == [[[10.0, -21.0, 0.0]]]
    q_index = torch.tensor([[[[1.0, 0.0], [0.0, -3.0]]]])
    k_index = torch.tensor([[[-2.0, 1.0], [-5.0, 2.0], [-1.0, 4.0]]])
    scores = ops.block_index_scores(q_index, k_index, int32(3), block_size=2)
    assert scores.tolist() == [[[[-2.0, -1.0], [-3.0, -12.0]]]]


def test_merge_states_of_empty_parts_and_large_lses():
    outs, lses = random(3, 2, 1, 2, 4, dtype=torch.float32), random(3, 2, 1, 2, dtype=torch.float32, seed=1)
    outs[1, 0], lses[1, 0] = NAN, -INF
    outs[:, 1, 0, 1], lses[:, 1, 0, 1] = NAN, -INF
    out, lse = ops.merge_states(outs, lses)
    kept = ops.merge_states(outs[::2], lses[::2])
    torch.testing.assert_close((out[0], lse[0]), (kept[0][0], kept[1][0]))
    assert (out[1, 0, 1] == 0).all() and lse[1, 0, 1] == -INF and out.isfinite().all()
    outs, lses = torch.stack([torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)]), torch.full((2, 1, 1, 1), 1000.0)
    out, lse = ops.merge_states(outs, lses)
    torch.testing.assert_close(out, torch.full((1, 1, 1, 2), 0.5))
    torch.testing.assert_close(lse, torch.full((1, 1, 1), 1000 + math.log(2)))


# ---- decode_linear


def state_inputs(dtype=torch.float64):
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = (random(3, 2, width, dtype=dtype, seed=i) for i, width in enumerate((5, 5, 4)))
    return q, k, v, random(3, 2, 5, 4, dtype=wide, seed=3), torch.sigmoid(random(2, dtype=wide, seed=4))


def test_the_delta_rule_stores_and_replaces():
    """With a unit key and beta 1 the state answers that key with the last value, whatever it held before."""
    q, k, v, state, decay = state_inputs()
    k = k / k.norm(dim=-1, keepdim=True)
    out, state = ops.decode_linear(k, k, v, state, decay, beta=torch.ones(3, 2))
    torch.testing.assert_close(out, v)
    out, _ = ops.decode_linear(k, k, 2 * v, state, decay, beta=torch.ones(3, 2))
    torch.testing.assert_close(out, 2 * v)
    _, kept = ops.decode_linear(q, k, v, state, torch.ones(2), beta=torch.zeros(3, 2))
    torch.testing.assert_close(kept, state)


@pytest.mark.parametrize("delta", [False, True])
def test_a_state_is_not_changed_and_its_gradients_are_finite(delta):
    tensors = [x.requires_grad_() for x in state_inputs()]
    before = [x.detach().clone() for x in tensors]
    out, state = ops.decode_linear(*tensors, beta=torch.ones(3, 2) / 2 if delta else None)
    (out.square().sum() + state.square().sum()).backward()
    assert all(torch.equal(x, kept) for x, kept in zip(tensors, before, strict=True))
    assert all(x.grad.isfinite().all() and x.grad.any() for x in tensors)


def test_a_float64_state_stays_float64_and_a_batch_may_be_empty():
    q, k, v, state, decay = state_inputs(torch.bfloat16)
    out, new = ops.decode_linear(q, k, v, state.double(), decay.double())
    _, exact = ops.decode_linear(q.double(), k.double(), v.double(), state.double(), decay.double())
    assert out.dtype == torch.bfloat16 and new.dtype == torch.float64 and torch.equal(new, exact)
    out, new = ops.decode_linear(q[:0], k[:0], v[:0], state[:0], decay)
    assert out.shape == (0, 2, 4) and new.shape == (0, 2, 5, 4)


# ---- messages


def tensors_of(arguments):
    return {n: torch.from_numpy(a.copy()) if isinstance(a, numpy.ndarray) else a for n, a in arguments.items()}


def check_refused(op, changes, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}") as caught:
        getattr(ops, op)(**tensors_of(GOOD[op]) | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("op", CASES)
def test_bad_arguments_are_named(op):
    for changes, error, message in CASES[op]:
        check_refused(op, tensors_of(changes), error, message)
    name = NOT_A_TENSOR[op]
    check_refused(op, {name: 3}, TypeError, f"{name} is a int; allowed: a torch.Tensor")
    if "scale" in GOOD[op]:
        check_refused(op, {"scale": torch.tensor(1.0)}, TypeError, "scale is a Tensor; allowed: a number from")
        check_refused(op, {"out_dtype": torch.int8}, TypeError, "out_dtype is torch.int8; allowed: None, float16")
    if op in ELSEWHERE:
        name = ELSEWHERE[op]
        other = tensors_of(GOOD[op])[name].to("meta")
        check_refused(op, {name: other}, ValueError, f"{name} is on device meta; allowed: cpu")


@pytest.mark.parametrize("op", CASES)
def test_checks_need_no_values(op):
    tensors = tensors_of(GOOD[op])
    meta = {name: value.to("meta") if torch.is_tensor(value) else value for name, value in tensors.items()}
    assert first(getattr(ops, op)(**meta)).shape == first(getattr(ops, op)(**tensors)).shape
