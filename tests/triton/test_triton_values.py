"""What values may and may not do: NaN that is seen shows, sinks of any size, lists of nothing, a batch that changes."""

import numpy as np
import pytest
import torch
from calls import CACHES, agree, given, in_pages, run, same, truth

import triton_kernels as tk
from triton_kernels import plan

NAN, INF = float("nan"), float("inf")
ATTENDING = ("decode_attention", "decode_mla", "decode_block_sparse", "decode_sparse_mla")
SCORES = ("index_scores", "block_index_scores")
pytestmark = pytest.mark.usefixtures("device", "poisoned_memory")


@pytest.mark.parametrize(
    "op, argument, changes",
    [
        *(("decode_attention", name, {"T": T}) for name in "kv" for T in (1, 2)),
        *(("decode_mla", name, {"T": T}) for name in ("latent", "k_rope") for T in (1, 2)),
        *(("decode_block_sparse", "k", {"block_size": size, "V": V, "L": L})
          for size, V, L in ((1, 16, 100), (64, 16, 2), (8, 0, 13))),
        *(("decode_sparse_mla", name, {}) for name in ("latent", "k_rope")),
        ("index_scores", "k_index", {}),
        *(("block_index_scores", "k_index", {"block_size": size}) for size in (7, 16, 80)),
        ("decode_linear", "state", {"V": 40}),
    ],
)  # fmt: skip
def test_seen_nan_is_not_hidden(op, argument, changes, monkeypatch):
    """It breaks what reads it, and nothing else."""
    arguments = given(op, **changes)
    broken = arguments[argument]
    seen = (~broken[0].isnan()).flatten(1).any(1).nonzero()[0]
    broken[0, seen, ..., 0] = NAN
    got = run(op, arguments)
    assert got[0][0].isnan().any() and not got[0][1].isnan().any()
    agree(op, got, arguments)
    if op == "block_index_scores":  # in a tile of several blocks, of a part of one, and of several pieces
        monkeypatch.setattr(plan.Record, "config", lambda *_: plan.Config(32, 4, 2, 1, 32))
        agree(op, run(op, arguments), arguments)


@pytest.mark.parametrize("op", SCORES)
def test_infinite_scores(op):
    arguments = given(op)
    for name in ("q_index", "weights"):
        if name in arguments:
            arguments[name] = arguments[name].abs() + 1
    arguments["k_index"][0, 3] = INF
    got = run(op, arguments)
    assert got[0].isposinf().any()
    agree(op, got, arguments)


@pytest.mark.parametrize("op", ATTENDING)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_sinks_from_nothing_to_everything(op, dtype):
    """In the dtype of the sinks, which need not be float32; a row that sees nothing has its sink alone."""
    arguments = given(op, N=6, lengths=(0, 100))
    arguments["sinks"] = torch.tensor([-3.0, 0.0, 2.5, 8.0, -1e4, 1e4], dtype=getattr(torch, dtype))
    if "block_indices" in arguments:
        arguments["block_indices"][0] = -1
    out, lse = run(op, arguments | {"out_dtype": torch.float32})
    assert (out[0] == 0).all() and torch.equal(lse[0], arguments["sinks"].float().expand(1, -1))
    agree(op, (out, lse), arguments)


@pytest.mark.parametrize("V", [16, 0])
@pytest.mark.parametrize("block_size", [1, 8, 128])
def test_lists_without_a_block(block_size, V):
    """Entries that must be ignored; the last of them, times a block size, is 0 in 32 bits."""
    arguments = given("decode_block_sparse", block_size=block_size, V=V)
    for name in "kv":
        arguments[name] = None if arguments[name] is None else torch.full_like(arguments[name], NAN)
    ignored = torch.tensor([-1, -7, -(2**31), 2**31 - 1, 100, 2**29], dtype=torch.int32)
    arguments["block_indices"] = ignored.expand(2, 1, 2, 6)
    for lengths in (arguments["lengths"], None):
        out, lse = run("decode_block_sparse", arguments | {"lengths": lengths})
        assert (out == 0).all() and lse.isneginf().all()


def test_a_block_size_may_be_a_numpy_integer():
    arguments = given("decode_block_sparse", block_size=128, L=1)
    want = run("decode_block_sparse", arguments)
    for block_size in (np.int64(128), 2**40):
        assert same(run("decode_block_sparse", arguments | {"block_size": block_size}), want)


def test_other_slots_change_no_bit():
    """The same lists in a cache that has more slots, of NaN."""
    arguments = given("decode_sparse_mla")
    longer = {
        name: torch.cat([arguments[name], torch.full_like(arguments[name], NAN)], 1) for name in ("latent", "k_rope")
    }
    inside = arguments["indices"].where((arguments["indices"] >= 0) & (arguments["indices"] < 100), -1)
    want = run("decode_sparse_mla", arguments | {"indices": inside})
    assert same(run("decode_sparse_mla", arguments | longer | {"indices": inside}), want)


@pytest.mark.parametrize(
    "op, page, changes",
    [
        ("decode_attention", 0, {}), ("decode_attention", 0, {"window": 70, "T": 2}), ("decode_mla", 0, {}),
        ("decode_mla", 0, {"window": 40, "T": 2}), ("decode_mla", 16, {}), ("decode_mla", 32, {"window": 40, "N": 33}),
    ],
)  # fmt: skip
def test_a_fixed_chunk_is_batch_invariant(op, page, changes):
    """A row's bits are the same again, alone, and in a cache with more slots."""
    arguments = given(op, B=3, S=192, lengths=(0, 30, 130), chunk=40, sinks=True, **changes)
    arguments = in_pages(arguments, page) if page else arguments
    caches = [name for name in CACHES if name in arguments]
    whole = run(op, arguments)
    assert same(run(op, arguments), whole)
    for b, slots in ((0, 16), (1, 32), (1, 192), (2, 144)):
        row = {name: x[b : b + 1] for name, x in arguments.items() if isinstance(x, torch.Tensor) and name != "sinks"}
        row |= {name: arguments[name] if page else row[name][:, :slots] for name in caches}
        row |= {"page_table": row["page_table"][:, : -(-slots // page)]} if page else {}
        assert same(run(op, arguments | row), [part[b : b + 1] for part in whole])


@pytest.mark.parametrize(
    "op, page, changes",
    [
        ("decode_block_sparse", 0, {"block_size": 8, "L": 13}), ("decode_block_sparse", 32, {"block_size": 16, "L": 8}),
        ("decode_block_sparse", 0, {"block_size": 4, "V": 0, "L": 25}), ("decode_sparse_mla", 0, {"L": 90}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("chunk", (16, 40, 1000))
def test_a_fixed_chunk_of_a_list_is_batch_invariant(op, page, changes, chunk):
    """A row's bits are the same again, alone, and with a list that is longer by entries that are ignored."""
    arguments = given(op, B=3, S=128, lengths=(20, 70, 128), chunk=chunk, sinks=True, **changes)
    plain, arguments = arguments, in_pages(arguments, page) if page else arguments
    agree(op, run(op, arguments), plain)
    whole, lists = run(op, arguments), "indices" if op == "decode_sparse_mla" else "block_indices"
    assert same(run(op, arguments), whole)
    assert chunk > 500 or not same(run(op, arguments | {"chunk": 1000}), whole)  # the chunk is one
    longer = arguments | {lists: torch.nn.functional.pad(arguments[lists], (0, 70), value=-1)}
    assert same(run(op, longer), whole)
    for b in range(3):
        row = {name: x[b : b + 1] for name, x in longer.items() if isinstance(x, torch.Tensor) and name != "sinks"}
        row |= {name: arguments[name] for name in CACHES if page and name in arguments}
        assert same(run(op, longer | row), [part[b : b + 1] for part in whole])


def test_splits_change_no_bit_of_a_score(monkeypatch):
    """One split, and so many that most have no key."""
    for op in SCORES:
        arguments = given(op, B=3, S=200, lengths=(0, 3, 150))
        found = []
        for least in (32, 2**20):
            monkeypatch.setattr(plan.Record, "config", lambda *_, least=least: plan.Config(32, 4, 2, 1, least))
            with tk.runtime.recorded() as launches:
                run(op, arguments)
            found.append((launches[0][1][1], run(op, arguments)))
        (many, want), (one, got) = found
        assert (many, one) == (7, 1) and same(got, want)


@pytest.mark.parametrize("op", SCORES)
def test_a_length_past_the_cache_stays_in_its_row(op, monkeypatch):
    """Invalid, and unchecked on a GPU: whatever the scores are, they must not be written over the next row's."""
    arguments = given(op, T=1, S=40, lengths=(40, 5))
    want, past = run(op, arguments), arguments | {"lengths": torch.tensor([1000, 5], dtype=torch.int32)}
    if past["lengths"].device.type == "cpu":  # whose values are at hand
        with pytest.raises(ValueError, match=r"lengths\[0\] is 1000"):
            run(op, past)
    monkeypatch.setattr(tk.runtime, "check_lengths", lambda *_: None)
    monkeypatch.setattr("torch_ref.ops.check.length_values", lambda *_: None)
    assert same(run(op, past), want)


def test_forty_tokens_on_one_state():
    """Errors do not build up."""
    steps = [given("decode_linear", "float32", seed=seed) for seed in range(40)]
    state, wide = steps[0]["state"].clone(), steps[0]["state"].double()
    for arguments in steps:
        got = run("decode_linear", arguments | {"state": state})
        agree("decode_linear", got, arguments | {"state": wide})
        state, wide = got[1], torch.tensor(truth("decode_linear", arguments | {"state": wide})[1])


def test_padding_of_a_state_never_counts():
    """An infinite value stays infinite: rows that only fill a tile up would make it NaN."""
    arguments = given("decode_linear", "float32", B=1, N=1, H=5, V=3, decay=1, beta=0)
    arguments |= {"q": arguments["q"].abs(), "k": arguments["k"].abs()}
    arguments["v"][0, 0, 1] = INF
    got = run("decode_linear", arguments)
    assert got[0][0, 0].isinf().tolist() == [False, True, False]
    agree("decode_linear", got, arguments)
