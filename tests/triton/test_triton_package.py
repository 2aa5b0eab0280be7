"""Names, signatures, argument checks and plans of triton_kernels, and what ptxas says of its kernels."""

import inspect
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import torch_ref.ops
import triton_kernels as tk
from triton_kernels import device, offline, plan, runtime, tune

OPS = sorted(tk.__all__)


def case(**changes):
    given = dict(q=torch.ones(2, 1, 4, 64), k=torch.ones(2, 9, 2, 64), v=torch.ones(2, 9, 2, 64))
    return given | dict(lengths=torch.ones(2, dtype=torch.int32), scale=1.0) | changes


def test_signatures_are_the_contract():
    assert len(OPS) == 9
    for name in OPS:
        ours, theirs = inspect.signature(getattr(tk, name)), inspect.signature(getattr(torch_ref.ops, name))
        kinds = [[(p.name, p.kind, p.default) for p in s.parameters.values()] for s in (ours, theirs)]
        assert kinds[0] == kinds[1], name


@pytest.mark.parametrize(
    "changes, error, word",
    [
        (dict(k=torch.ones(2, 9, 3, 64)), ValueError, "k|v|q"),
        (dict(k=torch.ones(2, 9, 2, 64).half()), TypeError, "k"),
        (dict(lengths=torch.ones(2)), TypeError, "lengths"),
        (dict(window=0), ValueError, "window"),
        (dict(sinks=torch.ones(3)), ValueError, "sinks"),
        (dict(out_dtype=torch.float64), TypeError, "out_dtype"),
        (dict(q=torch.ones(2, 1, 4, 64).double(), k=case()["k"].double(), v=case()["v"].double()), TypeError, "q"),
        (dict(v=torch.ones(2, 9, 2, 320)), NotImplementedError, "V=320"),
        (dict(k=torch.ones(4, 8, 2, 64), v=torch.ones(4, 8, 2, 64), page_table=torch.ones(2, 2, dtype=torch.int32)),
         NotImplementedError, "page_table"),
        (dict(k=case()["k"].to(torch.int8), v=case()["v"].to(torch.int8), k_scale=torch.ones(2, 9, 2),
              v_scale=torch.ones(2, 9, 2)), NotImplementedError, "k_scale"),
    ],
)  # fmt: skip
def test_wrong_arguments(changes, error, word, monkeypatch):
    monkeypatch.setattr(runtime, "launch", lambda *args, **kwargs: pytest.fail("launched"))
    with pytest.raises(error, match=word):
        tk.decode_attention(**case(**changes))


MLA_TENSORS = ("q_latent", "q_rope", "latent", "k_rope")


def mla_case(**changes):
    given = dict(q_latent=torch.ones(2, 1, 4, 32), q_rope=torch.ones(2, 1, 4, 8))
    given |= dict(latent=torch.ones(2, 64, 32), k_rope=torch.ones(2, 64, 8))
    return given | dict(lengths=torch.ones(2, dtype=torch.int32), scale=1.0) | changes


def pools(page):
    table = torch.zeros(2, 2, dtype=torch.int32)
    return dict(latent=torch.ones(4, page, 32), k_rope=torch.ones(4, page, 8), page_table=table)


@pytest.mark.parametrize(
    "changes, error, word",
    [
        (dict(k_rope=torch.ones(2, 64, 16)), ValueError, "k_rope|q_rope"),
        (dict(latent=torch.ones(2, 64, 32).half()), TypeError, "latent"),
        (dict(lengths=torch.ones(2)), TypeError, "lengths"),
        (dict(window=0), ValueError, "window"),
        (dict(chunk=0), ValueError, "chunk"),
        (dict(sinks=torch.ones(3)), ValueError, "sinks"),
        (dict(out_dtype=torch.float64), TypeError, "out_dtype"),
        ({name: x.double() for name, x in mla_case().items() if name in MLA_TENSORS}, TypeError, "q_latent"),
        (dict(q_latent=torch.ones(2, 1, 4, 576), latent=torch.ones(2, 64, 576)), NotImplementedError, "C=576"),
        (dict(q_rope=torch.ones(2, 1, 4, 80), k_rope=torch.ones(2, 64, 80)), NotImplementedError, "R=80"),
        (pools(48), NotImplementedError, "page size is 48"),
        (pools(8), NotImplementedError, "page size is 8"),
        (dict(k_rope=torch.ones(2, 8, 64).transpose(1, 2)), ValueError, "k_rope"),
    ],
)  # fmt: skip
def test_wrong_mla_arguments(changes, error, word, monkeypatch):
    monkeypatch.setattr(runtime, "launch", lambda *args, **kwargs: pytest.fail("launched"))
    with pytest.raises(error, match=word):
        tk.decode_mla(**mla_case(**changes))


def test_quantised_latent_is_refused():
    int8 = mla_case()["latent"].to(torch.int8)
    with pytest.raises(NotImplementedError, match="latent_scale"):
        tk.decode_mla(**mla_case(latent=int8, latent_scale=torch.ones(2, 64)))


def test_merge_arguments():
    with pytest.raises(TypeError, match="lses"):
        tk.merge_states(torch.ones(2, 1, 1, 1, 8), torch.ones(2, 1, 1, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="lses"):
        tk.merge_states(torch.ones(2, 1, 1, 1, 8), torch.ones(3, 1, 1, 1))


def test_cpu_tensors_need_the_interpreter():
    code = (
        "import torch, triton_kernels as tk\n"
        "q, n = torch.ones(1, 1, 1, 16), torch.ones(1, dtype=torch.int32)\n"
        "for call in (lambda: tk.decode_attention(q, q, q, n, scale=1.0),\n"
        "             lambda: tk.decode_mla(q, q, q[0], q[0], n, scale=1.0),\n"
        "             lambda: tk.merge_states(q[None], q[None, ..., 0]),\n"
        "             lambda: tk.decode_block_sparse(q, q, None, n.view(1, 1, 1, 1), n, block_size=1, scale=1.0),\n"
        "             lambda: tk.decode_block_sparse(q, q, q, n.view(1, 1, 1, 1), n, block_size=1, scale=1.0),\n"
        "             lambda: tk.decode_sparse_mla(q, q, q[0], q[0], n.view(1, 1, 1), scale=1.0),\n"
        "             lambda: tk.index_scores(q, q[0], q[..., 0], n),\n"
        "             lambda: tk.block_index_scores(q, q[0], n, block_size=1),\n"
        "             lambda: tk.topk_indices(q, 1),\n"
        "             lambda: tk.decode_linear(q[0], q[0], q[0], q.new_ones(1, 1, 16, 16), q[0, 0, 0, :1])):\n"
        "    try: call()\n"
        "    except TypeError as error: print('TRITON_INTERPRET=1' in str(error))\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 10


def test_split_dims():
    chunks = {64: (64, 0), 80: (64, 16), 96: (64, 32), 128: (128, 0), 192: (128, 64), 256: (256, 0), 8: (16, 0)}
    assert {width: plan.split_dim(width) for width in chunks} == chunks
    assert plan.value_chunks(80) == (64, 32)
    assert all(sum(plan.split_dim(width)) >= width for width in range(1, 257))


def test_split_counts():
    config = plan.Config(64, 4, 3, 3, 128)
    assert plan.fill_splits(programs=8, span=100, config=config, sms=132) == 1
    assert plan.fill_splits(programs=8, span=4096, config=config, sms=132) == 32
    assert 2 <= plan.fill_splits(programs=512, span=8192, config=config, sms=132) <= 4
    assert plan.fill_splits(programs=4 * 396, span=8192, config=config, sms=132) == 1
    assert plan.fill_splits(programs=8, span=0, config=config, sms=132) == 1


H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def tables(monkeypatch, tmp_path):
    """Tables of a test's own, looked up as on an H100."""
    monkeypatch.setattr(plan, "TUNING", tmp_path)
    monkeypatch.setattr(tune, "TUNING", tmp_path)
    monkeypatch.setattr(plan, "device_of", lambda tensor: device.known(H100, 132))
    for cached in (plan.table, plan.nearest):
        cached.cache_clear()
    yield tmp_path
    for cached in (plan.table, plan.nearest):
        cached.cache_clear()


KEY = plan.Key("bfloat16", 128, 128, 4, 8, 4096)
DEFAULT = plan.default_config(2, 128, 128, 16)


def chosen(**changes):
    return offline.RECORDS["decode_attention"].config(None, KEY._replace(**changes), DEFAULT)


def test_table_lookup(tables, monkeypatch):
    """Nearest bucket among entries of the same dtype, head dims, MMA rows and device; else the default."""
    near, far = plan.Config(64, 4, 3, 3, 128), plan.Config(128, 8, 2, 1, 512)
    tune.write("decode_attention", KEY, device.known(H100, 132), near)
    tune.write("decode_attention", KEY._replace(batch_heads=400, length=8000), device.known(H100, 132), far)
    assert chosen(batch_heads=16, length=3000) == near and chosen(batch_heads=500, length=9000) == far
    assert chosen(group=128) == chosen(head_dim=64) == chosen(dtype="float16") == DEFAULT
    for other in (device.NO_GPU, device.known("NVIDIA A100-SXM4-80GB", 108)):
        monkeypatch.setattr(plan, "device_of", lambda tensor, other=other: other)
        assert chosen() == DEFAULT


def test_a_retuned_entry_takes_the_place_of_the_one_in_the_table(tables):
    """Tuner and lookup know a card by one short name, whatever CUDA calls it."""
    checked_in = Path(plan.__file__).parent / "tuning" / "decode_attention.json"
    (tables / checked_in.name).write_text(checked_in.read_text())
    before = plan.table("decode_attention")
    entry = next(entry for entry in before if entry["length"] == KEY.length)
    found = plan.Config(**entry["config"])
    assert chosen() == found
    retuned = replace(found, num_stages=2)
    tune.write("decode_attention", KEY, device.known(H100, 132), retuned)
    assert chosen() == retuned
    assert len(plan.table("decode_attention")) == len(before)


def test_a_card_is_known_by_a_part_of_its_name():
    h100, pcie, other = (device.known(*card) for card in ((H100, 132), ("NVIDIA H100 PCIe", 114), ("NVIDIA B7", 160)))
    assert (h100, pcie.name, pcie.sm_count) == (device.TARGET, "H100", 114)
    assert (other.name, other.sm_count) == ("NVIDIA B7", 160)


@pytest.mark.parametrize("ops", [("decode_attention", "decode_mla", "merge_states"),
                                 ("decode_block_sparse", "decode_sparse_mla"),
                                 ("decode_linear", "index_scores", "block_index_scores", "topk_indices")])  # fmt: skip
def test_compiled_kernels_fit_sm90(ops):
    rows = offline.report(*ops)
    assert len(rows) == len(list(offline.jobs(offline.RECORDS[op] for op in ops))) <= 40
    for row in rows:
        assert row["spills"] == 0 and row["registers"] <= 255 and row["shared"] <= device.TARGET.program_shared, row
        halves = row["types"][0] in ("*bf16", "*fp16")
        if row["kernel"] == "linear_kernel":  # the state is read and written in whole vectors, as many as a thread has
            assert row["wide"] >= 2 * row["H"] * row["BLOCK_V"] // (row["num_warps"] * 32 * 4), row
        elif "HEADS_PAD" in row:  # keys are the 64 rows or more that warpgroup MMAs ask for
            assert not halves or (row["hgmma"] > 0 and row["hmma"] == 0 and row["ldgsts"] > 0), row
            assert not halves or row["narrow"] == 0 or row["SCALED"], row
        elif halves and "BLOCK_N" in row:
            assert row["hmma"] + row["hgmma"] > 0 and row["ldgsts"] > 0 and row["narrow"] == 0, row
