"""Launch plans: how many splits fill a card, what the tables serve, what a launch may depend on."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from calls import EXAMPLES, given, run

from triton_kernels import device, offline, plan, runtime, tune
from triton_kernels.decode_linear import default_linear_config
from triton_kernels.indexer import default_score_config

H100 = "NVIDIA H100 80GB HBM3"
KEY = plan.Key("bfloat16", 128, 128, 4, 8, 4096)
DEFAULT = plan.default_config(2, 128, 128, 16)


def launched(op, config=None, **sizes):
    """(grid, constants) of the one kernel that a call launches."""
    ((_, grid, _, constants),) = offline.launches(offline.RECORDS[op], sizes, config)
    return grid, constants


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


LISTS = plan.default_config(2, 128, 128, 16).block_n
SCORES = default_score_config(2, 2, 128, 64).block_n


@pytest.mark.parametrize(
    "op, sizes, splits, constants",
    [
        # MiniMax-M3: no merge where the rows fill 132 SMs, as many splits as fill them otherwise.
        *(("decode_block_sparse", dict(B=B, S=131072), splits, {"BLOCK_N": LISTS})
          for B, splits in ((64, 1), (16, 4), (1, 16))),
        # DeepSeek-V3.2's lists of 2048: 64 heads a program.
        *(("decode_sparse_mla", dict(B=B, N=N), splits, {"ROWS": 64})
          for B, N, splits in ((64, 128, 1), (64, 64, 2), (8, 128, 8), (1, 128, 16))),
        # Indexers: two programs for each that fits an SM, each of two tiles or more.
        *((op, dict(B=B, S=65536), splits, {"BLOCK_N": SCORES})
          for op, B, splits in (("index_scores", 16, 32), ("index_scores", 1, 256), ("block_index_scores", 16, 32))),
    ],
)  # fmt: skip
def test_default_plan_fills_an_h100(op, sizes, splits, constants):
    grid, found = launched(op, **sizes)
    assert grid[1] == splits and constants.items() <= found.items()


@pytest.mark.parametrize("slots, kernels", [(40, 1), (400, 2)])
def test_merge_is_skipped_for_one_split(slots, kernels):
    with runtime.recorded() as launches:
        run("decode_attention", given("decode_attention", B=1, S=slots, lengths=(slots,)))
    assert len(launches) == kernels


@pytest.mark.parametrize("op", [op for op in EXAMPLES if op not in ("topk_indices", "merge_states", "decode_linear")])
def test_launches_do_not_depend_on_values(op):
    """The same grids and constants whatever lengths and lists hold: a captured graph can be replayed."""
    for changes in ({}, {"V": 0}) if op == "decode_block_sparse" else ({},):
        sizes = {"S": 330} | ({"L": 330} if op == "decode_sparse_mla" else {"L": 40} if "block_s" in op else {})
        arguments = given(op, lengths=(5, 330), **sizes, **changes)
        nothing = {"lengths": 0, "indices": -1, "block_indices": -1}
        empty = {n: torch.full_like(x, nothing[n]) if n in nothing else x for n, x in arguments.items()}
        found = []
        for asked in (arguments, empty):
            with runtime.recorded() as launches:
                run(op, asked)
            found.append([
                (kernel, grid, options, [x for x in args if not isinstance(x, torch.Tensor)])
                for kernel, grid, args, options in launches
            ])  # fmt: skip
        assert found[0] == found[1] and len(found[0]) == (1 if "index" in op else 2)


# --- tables


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


def test_tables_serve_whole_tiles_of_blocks(monkeypatch):
    monkeypatch.setattr(plan, "nearest", lambda *key: asdict(plan.Config(128, 4, 3, 2, 128)))
    for block_size, page, found in ((128, 0, True), (256, 128, True), (64, 0, False), (128, 64, False)):
        _, constants = launched("decode_block_sparse", M=block_size, L=1, page=page)
        assert (constants["BLOCK_N"] == 128) == found


def test_tables_serve_scores_of_keys_that_are_not_quantised(tables):
    """An entry serves its number of heads, rounded up to a power of two."""
    key = plan.Key("bfloat16", 128, 0, 32, 1, 4096)
    tune.write("index_scores", key, device.known(H100, 132), plan.Config(64, 4, 5, 2, 64))

    def found(heads, **sizes):
        return launched("index_scores", I=heads, **sizes)[1]["num_stages"] == 5

    assert found(32) and found(20)
    assert not (found(16) or found(64) or found(32, dtype="float16") or found(32, stored="int8") or found(32, J=64))


def test_tables_serve_states(tables):
    key = plan.Key("bfloat16", 128, 128, 1, 4096, 1)
    tune.write(
        "decode_linear", key, device.known(H100, 132), replace(default_linear_config(128, 128, 4096, False), block_v=16)
    )
    for sizes, columns in (({}, 16), ({"B": 64, "V": 64}, 64), ({"B": 64, "dtype": "float16"}, 64)):
        assert launched("decode_linear", **sizes)[1]["BLOCK_V"] == columns
    for dim in (1, 5, 64, 128, 1000):
        for rows, delta in ((1, False), (4096, True), (4096, False)):
            config = default_linear_config(dim, 128, rows, delta)
            assert config.block_v >= 8 and plan.pow2_ceil(dim) * config.block_v <= 128 * 32 * config.num_warps
    assert default_linear_config(128, 128, 1, True).block_v == 8
