"""The laws of every mechanism of torch_ref on every test config: forward is the loop of its equations; prefill and
decode are forward, in any chunks, of ragged rows, beside pads and empty slots that hold NaN; overflow is atomic.
"""

import pytest
import torch
from dense_family import (
    INF,
    NAN,
    close,
    default_positions,
    fold_decode,
    int32,
    odd_positions,
    poisoned_cache,
    row_of,
    same_caches,
    spied,
    tokens,
)  # fmt: skip
from mechanisms import CASES, FIRST

import torch_ref
from torch_ref import ops
from torch_ref.attention import step

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_mechanism = pytest.mark.parametrize("case", FIRST.values(), ids=FIRST)
PICKS = ("moba", "nsa", "msa", "dsa", "csa")  # rounding may move a pick, and then y by more than rounding


def name_of(att):
    return att.__name__.rsplit(".")[-1]


def test_every_mechanism_has_a_case():
    assert set(FIRST) == set(torch_ref.names())
    with pytest.raises(ValueError, match=rf"^name is 'gqq'; allowed: {', '.join(torch_ref.names())}$"):
        torch_ref.get("gqq")


def test_imports_neither_jax_nor_jforge():
    import subprocess
    import sys

    code = "import sys, torch_ref; assert not {'jax', 'jforge', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- the equations


@every_case
def test_forward_is_the_loop(case):
    """At positions with gaps too; a constant added to all of them changes nothing."""
    att, cfg, params, loop, count = case
    x = tokens(cfg, new=count)
    for positions in (default_positions(x), odd_positions(x)):
        close(att.forward(params, cfg, x, positions), loop(params, cfg, x, positions))
    close(att.forward(params, cfg, x), att.forward(params, cfg, x, default_positions(x)))
    absolute = getattr(cfg, "qk_norm_after_rope", False) and cfg.qk_norm_weight  # a weight of a channel that has turned
    if not absolute and not getattr(cfg, "index_quantised", False):  # which rounds what is turned
        close(att.forward(params, cfg, x, default_positions(x) + 50), att.forward(params, cfg, x))


@every_case
def test_every_split_is_forward(case):
    """Folded decode into a cache that it fills, and any chunks into one with room to spare, in y and in the cache."""
    att, cfg, params, _, count = case
    x = tokens(cfg, new=count)
    expected = att.forward(params, cfg, x)
    y, whole = att.prefill(params, cfg, x, poisoned_cache(att, cfg, 2, count))
    close(y, expected)
    y, folded = fold_decode(att, params, cfg, x, poisoned_cache(att, cfg, 2, count))
    close(y, expected)
    assert folded["length"].tolist() == [count] * 2
    same_caches(folded, whole)
    first, cache = att.decode(params, cfg, x[:, :3], poisoned_cache(att, cfg, 2, count))
    then, cache = fold_decode(att, params, cfg, x[:, 3:], cache)
    close(torch.cat([first, then], 1), expected)
    same_caches(cache, whole)
    _, whole = att.prefill(params, cfg, x, poisoned_cache(att, cfg, 2, count + 5))
    for split in (2, 5, [4, 2, 1, count - 7], [1, count - 1], [count - 1, 1]):
        cache, ys = poisoned_cache(att, cfg, 2, count + 5), []
        for chunk in x.split(split, dim=1):
            y, cache = att.prefill(params, cfg, chunk, cache)
            ys.append(y)
        close(torch.cat(ys, 1), expected)
        same_caches(cache, whole)


@every_case
@pytest.mark.parametrize(("first", "second"), [((13, 0, 4, 1, 6), (1, 2, 0, 12, 3)), ((3, 8, 9), (6, 3, 11))])
def test_ragged_rows_equal_rows_alone(case, first, second):
    """Rows of first[b], then second[b] tokens, then one decoded; pads hold NaN and Inf."""
    att, cfg, params, *_ = case
    batch, capacity = len(first), 26
    x, more, last = (tokens(cfg, batch, new, seed=new) for new in (max(first), max(second), 1))
    cache = poisoned_cache(att, cfg, batch, capacity)
    for row in range(batch):
        x[row, first[row] :], more[row, second[row] :] = NAN, INF
    y, cache = att.prefill(params, cfg, x, cache, int32(*first))
    y2, cache = att.prefill(params, cfg, more, cache, int32(*second))
    y3, cache = att.decode(params, cfg, last, cache)
    for row, (a, b) in enumerate(zip(first, second, strict=True)):
        assert (y[row, a:] == 0).all() and (y2[row, b:] == 0).all()
        alone = torch.cat([x[row, :a], more[row, :b], last[row]])[None]
        close(torch.cat([y[row, :a], y2[row, :b], y3[row]])[None], att.forward(params, cfg, alone))
        _, expected = att.prefill(params, cfg, alone, poisoned_cache(att, cfg, 1, capacity))
        same_caches(row_of(cache, row), expected)


@every_case
def test_inputs_are_kept_and_gradients_are_finite(case):
    """Through a ragged prefill in two chunks and a decode, with NaN at pads and in empty slots; 0 at the pads."""
    att, cfg, params, *_ = case
    _, cache = att.prefill(params, cfg, tokens(cfg, 2, 5), poisoned_cache(att, cfg, 2, 12))
    trees = params, cache, {"x": tokens(cfg, 2, 4)}
    kept = [{name: leaf.clone() for name, leaf in tree.items()} for tree in trees]
    att.prefill(params, cfg, trees[2]["x"], cache)
    att.decode(params, cfg, trees[2]["x"][:, :1], cache)
    for tree, before in zip(trees, kept, strict=True):
        same_caches(tree, before)
    params = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    x = tokens(cfg)
    x[1, 3:] = NAN
    x.requires_grad_()
    y, cache = att.prefill(params, cfg, x[:, :4], poisoned_cache(att, cfg, 2, 12), int32(4, 3))
    y2, cache = att.prefill(params, cfg, x[:, 4:], cache, int32(3, 0))
    y3, _ = att.decode(params, cfg, tokens(cfg, new=1), cache)
    sum(part.square().sum() for part in (y, y2, y3)).backward()
    ranks = {name for name in params if "index" in name or "ic_" in name}  # a pick has no derivative
    assert {name for name, leaf in params.items() if leaf.grad is None} == ranks
    assert all(leaf.grad.isfinite().all() for name, leaf in params.items() if name not in ranks)
    assert (x.grad[1, 3:] == 0).all() and x.grad[1, :3].any()


# ---- dtypes


@every_mechanism
@pytest.mark.parametrize(
    ("x_dtype", "stored"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
)
def test_a_narrow_cache_is_read_as_stored(case, x_dtype, stored):
    """Prefill sees rounded keys as decode does, which forward, without a cache, does not."""
    att, cfg, params, *_ = case
    exact = att.forward(params, cfg, tokens(cfg, new=13))
    params, x = {name: leaf.to(x_dtype) for name, leaf in params.items()}, tokens(cfg, new=13, dtype=x_dtype)
    empty = att.init_cache(cfg, 2, 16, stored)
    y, prefilled = att.prefill(params, cfg, x, empty)
    stepped, decoded = fold_decode(att, params, cfg, x, empty)
    assert y.dtype == stepped.dtype == att.forward(params, cfg, x).dtype == x_dtype
    assert {n: leaf.dtype for n, leaf in prefilled.items()} == {n: leaf.dtype for n, leaf in empty.items()}
    narrow = max(torch.finfo(x_dtype).eps, torch.finfo(stored).eps)
    assert (stepped.double() - y.double()).norm() < 4 * narrow * y.double().norm()
    for name, leaf in prefilled.items():
        loose = 1e-5 if leaf.dtype in (torch.float32, torch.int32) and x_dtype == torch.float32 else 4 * narrow
        close(decoded[name].double(), leaf.double(), loose)
    if name_of(att) not in PICKS:
        assert all((z.double() - exact).norm() < 8 * narrow * exact.norm() for z in (y, stepped))
    if x_dtype == torch.float32 and name_of(att) != "lightning":  # whose state is never narrow
        assert not torch.allclose(y, att.forward(params, cfg, x), rtol=1e-4, atol=1e-4)
        if name_of(att) not in ("mla", "dsa"):  # whose two forms round at different places
            torch.testing.assert_close(stepped, y)


@every_mechanism
def test_decode_hands_the_ops_what_the_cache_stores(case):
    """Queries in the dtype of the cache; parts that are merged or mixed come back wide, others in x's dtype."""
    att, cfg, params, *_ = case
    params, x = {name: leaf.float() for name, leaf in params.items()}, tokens(cfg, new=9, dtype=torch.float32)
    _, cache = att.prefill(params, cfg, x, att.init_cache(cfg, 2, 13), int32(9, 4))
    calls, spies = spied(ops)
    y, after = att.decode(params, cfg, x[:, :1], cache, spies)
    assert torch.equal(y, att.decode(params, cfg, x[:, :1], cache)[0])
    assert any(calls.values()) == (name_of(att) != "short_conv")  # whose few taps are no op's work
    for name in ("decode_attention", "decode_block_sparse", "decode_mla", "decode_sparse_mla"):
        for args, options, _ in calls[name]:
            assert all(z is None or z.dtype == torch.bfloat16 for z in args[: 3 if name.count("_") == 1 else 2])
            assert options["out_dtype"] == torch.float32
    for name in ("index_scores", "block_index_scores"):
        for (q, k, *_), _, _ in calls[name]:
            assert q.dtype == torch.bfloat16 and k.dtype == after["k_index"].dtype


# ---- overflow: (case, other fields, capacity)

OVERFLOW = [
    *(
        ("gqa:plain", {}, 8),
        ("mla:biases", {}, 4),
        ("dsa:glm_5", {}, 5),
        ("dsa:quantised", {}, 5),
        ("msa:plain", {}, 8),
    ),
    ("chunked_local:plain", {"attention_chunk_size": 9}, 8),
    *(("sliding_window:plain", {"sliding_window": 9}, 8), ("v4_window", {"sliding_window": 7}, 6)),
    *(("sinks:None_plain", {}, 8), ("sinks:5_plain", {"sliding_window": 9}, 8)),
    *(("streaming:plain", {"start_size": s, "recent_size": r}, c) for s, r, c in ((2, 9, 8), (9, 3, 8), (4, 5, 3))),
    *((name, {}, capacity) for name in ("block_sparse:plain", "moba:plain") for capacity in (7, 9)),
    *((name, {}, capacity) for name in ("nsa:plain", "nsa:mlp_separate") for capacity in (3, 7, 9)),
    # whole blocks and an open one: where the slots of the entries end
    *((name, {}, max(3, 4 * c.cfg.compress_rate - 1)) for name, c in CASES.items() if name[:3] in ("csa", "hca")),
]


@pytest.mark.parametrize(("name", "fields", "capacity"), OVERFLOW)
def test_overflow_is_of_a_row_and_atomic(name, fields, capacity, monkeypatch):
    """One token too many names the row on the CPU; where lengths are not read, that row alone is NaN and unchanged."""
    att, cfg, params, *_ = CASES[name]
    cfg = type(cfg)(**vars(cfg) | fields)
    x, new = tokens(cfg, 3, capacity), tokens(cfg, 3, 1, seed=5)
    empty = poisoned_cache(att, cfg, 3, capacity)
    close(att.prefill(params, cfg, x, empty)[0], att.forward(params, cfg, x))
    _, cache = att.prefill(params, cfg, x, empty, int32(capacity - 2, capacity, capacity - 2))
    for call in (att.prefill, att.decode):
        message = rf"^row 1 overflows its cache: length {capacity} \+ 1 new tokens, capacity {capacity}$"
        with pytest.raises(ValueError, match=message):
            call(params, cfg, new, cache)
    y, after = att.prefill(params, cfg, new, cache, int32(0, 0, 0))
    assert (y == 0).all()
    same_caches(after, cache)
    monkeypatch.setattr(step, "room", lambda length, new, capacity: length + new <= capacity)
    for call in (att.prefill, att.decode):
        y, after = call(params, cfg, new, cache)
        assert y[1].isnan().all() and y[::2].isfinite().all()
        assert after["length"].tolist() == [capacity - 1, capacity, capacity - 1]
        same_caches(row_of(after, 1), row_of(cache, 1))
        close(y[2:], call(params, cfg, new[2:], row_of(cache, 2))[0])
    y, after = att.decode(params, cfg, tokens(cfg, 3, 3, seed=5), cache)  # of three tokens there is room for two
    assert y.isnan().all()
    same_caches(after, cache)
