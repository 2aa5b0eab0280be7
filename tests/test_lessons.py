"""What the notebooks share: pictures that agree with the cost, tables from the spec, exercises that judge."""

import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from judges import compiled, tokens, weights

import jforge
from jforge import lessons
from jforge.lessons import EMPTY, ENTRY, KEPT, OVER, READ, STATE, WRITTEN

PROMPT, STEPS, CAPACITY = 10, 5, 20
MOVED = READ, WRITTEN, OVER, ENTRY, STATE


def watch(att, cfg):
    params, x = weights(att, cfg, "float32"), tokens(cfg, 1, PROMPT + STEPS, "float32")
    _, prefill, _ = compiled(att, cfg)
    _, cache = prefill(params, x[:, :PROMPT], att.init_cache(cfg, 1, CAPACITY, jnp.float32))
    return lessons.watch(att, params, cfg, x[:, PROMPT:], cache)


def count(codes: np.ndarray, *kinds: int) -> int:
    return int(np.isin(codes, kinds).sum())


SHOWN = {  # kinds that must be in the picture of a buffer, and kinds that must not
    "gqa": {"k": ({READ, WRITTEN, EMPTY}, {KEPT, OVER})},
    "sliding_window": {"k": ({READ, OVER}, {WRITTEN, KEPT})},
    "block_sparse": {"v": ({READ, WRITTEN, KEPT}, {OVER})},
    "dsa": {"latent": ({READ, KEPT}, {OVER}), "k_index": ({READ, WRITTEN}, {KEPT})},
    "msa": {"k": ({READ, KEPT}, {OVER}), "k_index": ({READ, WRITTEN}, {KEPT})},
    "csa": {"c_kv": ({READ, KEPT, ENTRY}, {WRITTEN, OVER}), "kv": ({OVER, READ}, {KEPT})},
    "lightning": {"state": ({STATE}, {READ, KEPT})},
}


@pytest.mark.parametrize("name", jforge.names())
def test_a_watched_step_writes_and_reads_what_the_cost_says(name):
    """Exactly, where a buffer is read whole; lists name whole blocks, and may differ between heads."""
    att = jforge.get(name)
    cfg = att.examples[0]
    found = watch(att, cfg)
    for n, buffer in att.cache_spec(cfg).items():
        whole = {context: full(buffer, cfg, context) for context in (*range(PROMPT + 1, PROMPT + STEPS + 1), 1000)}
        asked = {context: att.work(cfg, context, 1000, 1, False).read.get(n, 0) for context in whole}
        for codes, context in zip(found[n], whole, strict=False):
            usual, closing = (att.work(cfg, context, CAPACITY, 1, closes) for closes in (False, True))
            written = {math.ceil(work.written.get(n, 0)) for work in (usual, closing)}
            assert count(codes, WRITTEN, OVER, ENTRY, STATE) in written, (n, context)
            read = count(codes, *MOVED)
            assert read == whole[context] if asked == whole else read <= whole[context], (n, context)
            assert read > 0 or asked[context] == 0, (n, context)
            held = max(
                full(buffer, cfg, context - 1), whole[context]
            )  # a chunk that ends is there until the next token
            assert count(codes, EMPTY) == (len(codes) - held if buffer.has_slots else 0), (n, context)
    for n, (there, absent) in SHOWN.get(name, {}).items():
        kinds = set(found[n].ravel().tolist())
        assert there <= kinds and not absent & kinds, n


def full(buffer, cfg, context: int) -> int:
    """Slots that hold data."""
    return int(buffer.valid(cfg, jnp.full(1, context, jnp.int32))[0]) if buffer.has_slots else 1


READS = {"gqa": {}, "sliding_window": {"sliding_window": 4}, "chunked_local": {"attention_chunk_size": 4}, "sinks": {}}


@pytest.mark.parametrize("name", READS)
def test_a_reader_is_seen_to_read_its_lenders_slots_and_to_write_none(name):
    """All that the lender's own step touches, its new entry too."""
    att = jforge.get(name)
    cfg = replace(att.examples[0], kv_shared=False, **READS[name])
    params, x = weights(att, cfg, "float32"), tokens(cfg, 1, PROMPT + STEPS, "float32")
    _, prefill, _ = compiled(att, cfg)
    _, cache = prefill(params, x[:, :PROMPT], att.init_cache(cfg, 1, CAPACITY, jnp.float32))
    reader = replace(cfg, kv_shared=True)
    lender = lessons.Lender(att, params, cfg)
    own = lessons.watch(att, params, cfg, x[:, PROMPT:], cache)
    lent = lessons.watch(att, weights(att, reader, "float32"), reader, x[:, PROMPT:], cache, lender)
    assert set(lent) == set(own) == {"k", "v"}
    for n, codes in lent.items():
        assert set(codes.ravel().tolist()) <= {READ, KEPT, EMPTY}
        assert ((codes == READ) == np.isin(own[n], MOVED)).all()


def test_a_slot_that_is_read_in_secret_is_seen():
    """A decode whose output has a share of a slot of k that is in no list."""
    att = jforge.get("block_sparse")
    cfg = att.examples[0]
    honest = watch(att, cfg)
    slot = int(np.argmax((honest["k"] == KEPT).all(axis=0)))

    def decode(params, cfg, x, cache, **ops):
        y, after = att.decode(params, cfg, x, cache, **ops)
        return y + cache.k[:, slot : slot + 1].sum(axis=(2, 3))[..., None], after

    other = watch(att._replace(decode=decode), cfg)
    assert (honest["k"][:, slot] == KEPT).all() and (other["k"][:, slot] == READ).all()
    assert (honest["v"] == other["v"]).all()


@pytest.mark.parametrize("name", jforge.names())
def test_six_questions(name):
    answers = lessons.questions(name, context=4096).data.iloc[:, 0]
    asked = list(dict.fromkeys(answers.index.get_level_values(0)))
    assert asked == ["what is projected", "what is stored", "its shape", "bytes", "entries that a query reads",
                     "what is traded"]  # fmt: skip
    assert all(answers)


def test_answers_of_gqa_and_csa():
    """One by hand for each kind of buffer."""
    gqa, csa = (lessons.questions(name, context=4096).data.iloc[:, 0] for name in ("gqa", "csa"))
    assert gqa["what is projected", "from x"] == "wq 4,096 x 32 x 128, wk 4,096 x 8 x 128, wv 4,096 x 8 x 128"
    assert gqa["what is projected", "later"] == "wo 32 x 128 x 4,096"
    assert gqa["what is stored", "k"] == "B S K=8 H=128, bfloat16"
    assert gqa["its shape", "k after prefill"] == "1 x 4,096 x 8 x 128"
    assert gqa["its shape", "k at decode"] == "writes 1 x 1 x 8 x 128, reads 1 x 4,096 x 8 x 128"
    assert (gqa["bytes", "one more token"], gqa["bytes", "stored now"]) == ("4,096 B", "16.0 MiB")
    assert gqa["entries that a query reads", ""] == "4,096"
    assert csa["its shape", "c_kv at decode"].startswith("writes nothing (1 x 1 x 512 where a block ends), reads 1 x ")
    assert csa["its shape", "state_kv at decode"].startswith("writes 1/8 of 1 x 8 x 1,024 (")
    assert jforge.get("csa").traded == csa["what is traded", ""]


def test_answers_of_a_layer_that_reads_another_s_keys():
    """In a column beside its source's: it projects no keys, stores and writes nothing, and reads as much."""
    cfg = jforge.get("gqa").models["Llama-3.1-8B"]
    data = lessons.questions("gqa", {"owner": cfg, "reader": replace(cfg, kv_shared=True)}, context=4096).data
    owner, reader = data["owner"], data["reader"]
    assert owner.to_dict() == lessons.questions("gqa", context=4096).data.iloc[:, 0].to_dict()
    assert reader["what is projected", "from x"] == "wq 4,096 x 32 x 128"
    assert reader["what is stored", "k"] == "nothing; another layer's B S K=8 H=128, bfloat16"
    assert reader["its shape", "v at decode"] == "writes nothing, reads 1 x 4,096 x 8 x 128"
    assert (reader["bytes", "one more token"], reader["bytes", "stored now"]) == ("0 B", "0 B")
    assert reader["entries that a query reads", ""] == "4,096"


@pytest.mark.parametrize(
    "right,answer,taken",
    [
        (4096, 4096.0, True),
        (4096, np.int32(4096), True),
        (4096, 4100, False),
        (4096, 4095, False),
        (0.12345, 0.1235, True),
        (0.12345, 0.125, False),
        (295.22, 295, True),
        (2.0, 1.9999999, True),
        ("K", " k", True),
        ("K", "v", False),
        ([1, 0.5], (1, 0.5001), True),
        ([1, 0.5], [0.5, 1], False),
        (True, False, False),
        (math.inf, math.nan, False),
        (7, lambda: 7, True),
        (7, lambda: 8, False),
    ],
)
def test_an_exercise_tells_right_from_wrong(capsys, right, answer, taken):
    lessons.exercise(2, answer, lessons.digest(2, right))
    assert capsys.readouterr().out == f"Exercise 2: {'right' if taken else 'wrong'}\n"


def test_an_exercise_without_an_answer_or_a_digest(capsys):
    lessons.exercise(1, None, lessons.digest(1, 4))
    lessons.exercise(1, lambda a, b: a + b, "", 1, 3)
    lessons.exercise(2, 4, lessons.digest(1, 4))  # another number, another digest
    lines = "Exercise 1: not answered yet", f"Exercise 1: no digest; that of 4 is {lessons.digest(1, 4)}"
    assert capsys.readouterr().out.splitlines() == [*lines, "Exercise 2: wrong"]


@triton.jit
def double(x, out, n, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(out + at, 2 * tl.load(x + at, mask=at < n, other=0), mask=(at < n) & (at != 1))
    if tl.program_id(0) == 1:
        tl.store(out + n, tl.load(x))  # one address, no mask


@triton.jit
def twice(x):
    return x * 2


@triton.jit
def double_the_sum(x, same, out, TILE: tl.constexpr):
    n = tl.program_id(0)
    tl.store(out + n, twice(tl.sum(tl.load(x + n * TILE + tl.arange(0, TILE)), 0)))


def test_traffic_is_what_the_masks_let_through():
    """5 numbers of 4 bytes in tiles of 4, of which number 1 is not stored; the same again leaves no trace outside."""
    x, out = torch.arange(8, dtype=torch.int32), torch.full((8,), -1, dtype=torch.int32)
    with pytest.raises(ZeroDivisionError), lessons.traffic() as (loads, stores):
        double[(2,)](x, out, 5, TILE=4)
        raise ZeroDivisionError
    double[(2,)](x, out, 5, TILE=4)
    assert out.tolist() == [0, -1, 4, 6, 8, 0, -1, -1]
    first, second = (0, 0, 0), (1, 0, 0)
    assert numbers(loads, x) == [(first, [0, 1, 2, 3]), (second, [4]), (second, [0])]
    assert numbers(stores, out) == [(first, [0, 2, 3]), (second, [4]), (second, [5])]
    assert {addresses.dtype for _, addresses in loads + stores} == {np.dtype(np.int64)}


def test_traffic_of_kernels_that_are_compiled(monkeypatch):
    """As on a GPU: a JITFunction that calls another, on tensors that are copied to another place and back."""
    monkeypatch.setattr(torch.UntypedStorage, "cpu", torch.UntypedStorage.clone)
    x, out = torch.arange(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    kernel = triton.JITFunction(double_the_sum.fn)
    monkeypatch.setitem(double_the_sum.fn.__globals__, "twice", triton.JITFunction(twice.fn))
    with lessons.traffic() as (loads, stores):
        kernel[(2,)](x[2:], x, out[4:], TILE=2)
    assert out.tolist() == [0, 0, 0, 0, 2 * (2 + 3), 2 * (4 + 5), 0, 0]
    assert numbers(loads, x) == [((0, 0, 0), [2, 3]), ((1, 0, 0), [4, 5])]
    assert numbers(stores, out) == [((0, 0, 0), [4]), ((1, 0, 0), [5])]
    assert "interpret" not in triton.JITFunction.run.__qualname__


def numbers(found, tensor) -> list[tuple]:
    """Addresses as the numbers of a tensor of 4 bytes each."""
    return [(program, ((addresses - tensor.data_ptr()) / 4).tolist()) for program, addresses in found]


def test_reveal(capsys):
    lessons.reveal(4096)
    lessons.reveal(0.25, 0.5)
    assert capsys.readouterr().out == "4,096\n0.25; you said 0.5, 2 times that\n"
