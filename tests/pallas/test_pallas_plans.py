"""Plans: which kernel, which ring, how many splits; tables; grids that cuda has not; the models' widths."""

import functools
import importlib

import jax
import jax.numpy as jnp
import pytest
from mosaic import abstract, lowered

import pallas_kernels
from pallas_kernels import compat, index_keys, plan, tune
from pallas_kernels.device import DEVICES, device_of
from pallas_kernels.tiles import Lists

# The package's attributes are the ops.
attention, mla, linear, scores = (
    importlib.import_module(f"pallas_kernels.{name}")
    for name in ("decode_attention", "decode_mla", "decode_linear", "index_scores")
)


def test_splits():
    """One split where heads alone keep every SM busy, as many as do where they do not."""
    assert plan.fill_splits(programs=512, tiles=128, together=2) == 1
    assert plan.fill_splits(programs=128, tiles=16, together=2) == 1
    assert 128 <= 8 * plan.fill_splits(programs=8, tiles=64, together=2) <= 132
    assert plan.fill_splits(programs=136, tiles=64, together=2) > 1
    assert plan.fill_splits(programs=1, tiles=0) == 1
    with plan.forced(splits=5):
        assert plan.fill_splits(programs=512, tiles=128) == index_keys.share_splits(1, 64) == 5
    assert plan.fill_splits(programs=512, tiles=128) == 1


def test_rings():
    for H, V, rows in [(64, 64, 8), (128, 128, 8), (128, 128, 64), (256, 256, 32), (256, 64, 8)]:
        assert plan.default_config(H, V, rows).stages >= 2
    for C in (64, 128, 256, 512):
        for rows in (8, 32, 64):
            assert mla.default_config(C, rows).stages in (2, 4)  # pairs of tiles, which the kernel of many rows needs
    assert mla.default_config(512, 64) == plan.Config(64, 2)


@pytest.mark.parametrize(
    "T, N, C, many",
    [(1, 32, 512, False), (1, 40, 128, True), (1, 128, 512, True), (2, 16, 128, False), (2, 20, 64, False),
     (2, 64, 128, True), (1, 44, 128, False)],
)  # fmt: skip
def test_more_than_32_query_rows_have_a_kernel_of_their_own(T, N, C, many):
    sizes = dict(B=1, T=T, S=256, N=N, C=C, R=64)
    assert mla.make_facts(sizes, jnp.dtype("bfloat16"), None, scale=1.0).many == many


def test_splits_of_lists_are_even():
    """No split is without tiles, and tiles of one split are as many as the plan asked for."""
    for L, size, splits in [(16, 128, 5), (9, 8, 64), (640, 1, 4), (1, 8, 8)]:
        lists = Lists(T=1, count=1, K=1, L=L, size=size, S=4096, page=None)
        tiles, even = -(-lists.keys // 64), lists.even_splits(splits, 64)
        per = -(-tiles // even)
        assert (even - 1) * per < tiles <= even * per and per == -(-tiles // min(splits, tiles))


@pytest.mark.parametrize("B, T, S", [(1, 1, 131072), (16, 1, 65536), (16, 4, 65536), (300, 1, 1024), (1, 1, 64)])
def test_scores_fill_the_card(B, T, S):
    """More than half of what the card holds at a time has work, unless there are fewer tiles."""
    facts = scores.make_facts((B, T, 64, 128), S, jnp.dtype("bfloat16"))
    programs, slots, tiles = B * facts.row_blocks * facts.splits, index_keys.PROGRAMS * DEVICES[0].sms, -(-S // 64)
    assert facts.stages >= 3 and facts.splits <= tiles
    assert programs > slots // 2 or facts.splits == tiles
    assert programs <= max(index_keys.WAVES * slots, B * facts.row_blocks)


@pytest.mark.parametrize(
    "B, H, V, width",
    [
        (64, 128, 128, 64),
        (2, 128, 128, 32),
        (1, 128, 128, 32),
        (64, 256, 256, 64),
        (64, 64, 96, 32),
        (64, 8, 8, 32),
        (64, 128, 80, 80),
        (64, 128, 48, 48),
        (64, 128, 144, 48),
    ],
)
def test_states_fill_the_card(B, H, V, width):
    """Wide tiles, but two for every SM."""
    assert linear.make_facts((B, 64, H), V, 1, False).width == width


def test_table_lookup(monkeypatch):
    config = dict(block=128, stages=2, splits=7)
    key = dict(dtype="bfloat16", head_dim=128, value_dim=128, group=4, batch_heads=8, length=4096, device="H100")
    monkeypatch.setattr(plan, "_table", lambda op: ({**key, "config": config},))
    call = ("decode_attention", "bfloat16", 128, 128)
    assert plan.lookup(*call, 4, 12, 4096, "H100") == plan.Config(**config)
    assert plan.lookup(*call, 4, 8, 65536, "H100") is None
    assert plan.lookup(*call, 8, 8, 4096, "H100") is None
    assert plan.lookup(*call, 4, 8, 4096, "H200") is None


def test_cards():
    """A card is known by a part of its JAX name; another one has the first one's plans, but not its tables."""
    assert [device_of(card.kind) for card in DEVICES] == list(DEVICES)
    assert device_of("NVIDIA X").name == "NVIDIA X" and device_of("NVIDIA X").sms == DEVICES[0].sms
    with compat.lowering_for_cuda():
        assert plan.card() == DEVICES[0]


@pytest.mark.parametrize("name", tune.OPS)
def test_what_the_tuner_writes_is_found(name, monkeypatch, tmp_path):
    """A configuration of every shape of the op's record goes into the table of this card, and plans take it there."""
    op, config = tune.OPS[name], plan.Config(64, 2, 3)
    monkeypatch.setattr(tune, "TUNING", tmp_path)
    monkeypatch.setattr(plan, "TUNING", tmp_path)
    plan._table.cache_clear()
    with compat.lowering_for_cuda():
        for shape in op.shapes:
            sizes = dict(zip(op.letters + "BNKS", shape, strict=True), T=1)
            tune.write(name, [tune.entry_of(op, sizes, config)])
            plan._table.cache_clear()
            assert tune.call_of(op, sizes)[1] == 3
    plan._table.cache_clear()


def test_grids_that_cuda_has_not_say_so():
    def refused(reason, sizes, op="decode_attention", **options):
        call = functools.partial(getattr(pallas_kernels, op), scale=1.0, **options)
        with compat.lowering_for_cuda(), pytest.raises(NotImplementedError, match=reason):
            jax.eval_shape(call, *abstract(op, dict(T=1, N=1, K=1, H=16) | sizes))

    refused("65536 programs along split", dict(B=1, S=64 * 65536), chunk=64)
    refused("B=65536", dict(B=65536, S=8))
    lists = dict(B=1, X=1, S=64, L=64 * 65536, C=64, R=8)
    refused("65536 programs along split", lists, "decode_sparse_mla", chunk=64)
    refused("65536 programs along split", lists | dict(L=4 * 65536), "decode_block_sparse", block_size=16, chunk=64)


def test_rows_lie_along_the_axis_that_cuda_does_not_limit():
    """More than 65535 rows, which a batch of 512 with 128 heads has."""
    outs, lses = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 512, 2, 128, 512), (2, 512, 2, 128)))
    assert lowered("merge_states", outs, lses)[0].count("custom_call @mosaic_gpu_v2") == 1


# --- the models' widths fit shared memory, for every number of rows of a program, as final and as partial results

LATENT = dict(B=2, S=32768, C=512, R=64, L=2048)
LISTS = dict(B=64, T=1, S=32768)
MODELS = [
    *(("decode_mla", LATENT | dict(S=256, N=N, T=T), {}, dict(scale=1.0, chunk=chunk))
      for N, T in ((1, 1), (8, 2), (12, 2), (16, 2), (128, 1)) for chunk in (256, 64)),
    *(("decode_sparse_mla", LATENT | dict(N=N, T=T), {}, dict(scale=1.0))
      for N, T in ((1, 1), (8, 2), (12, 1), (64, 2), (128, 1))),
    # MiniMax-M3, NSA, MoBA's lists of heads, DeepSeek-V4's CSA (twice), tokens with K and V
    *(("decode_block_sparse", LISTS | dict(N=N, K=K, H=H, X=X, L=L), dict(v=v, lengths=None),
       dict(scale=1.0, block_size=size))
      for N, K, X, H, L, size, v in ((64, 4, 4, 128, 16, 128, "bfloat16"), (64, 4, 4, 192, 16, 64, "bfloat16"),
                                     (32, 8, 32, 128, 12, 128, "bfloat16"), (128, 1, 1, 512, 640, 1, None),
                                     (64, 1, 1, 512, 1152, 1, None), (32, 8, 8, 128, 2048, 1, "bfloat16"))),
    *((op, dict(B=2, S=4096, I=heads, T=T, J=J), {} if stored is None else dict(k_index=stored),
       ({"block_size": 128} if op == "block_index_scores" else {})
       | ({} if stored is None else {"k_scale": jax.ShapeDtypeStruct((2, 4096), jnp.float32)}))
      for op, heads, T, J in (("index_scores", 64, 1, 128), ("index_scores", 64, 4, 128), ("index_scores", 256, 1, 256),
                              ("block_index_scores", 4, 1, 128), ("block_index_scores", 4, 8, 256))
      for stored in (None, "float8_e4m3fn", "int8")),
]  # fmt: skip


@pytest.mark.parametrize("op, sizes, types, options", MODELS)
def test_model_shapes_lower(op, sizes, types, options):
    for splits in (1, 4) if op == "decode_sparse_mla" else (None,):
        with plan.forced(**({"splits": splits} if splits else {})):
            lowered(op, *abstract(op, sizes, **types), **options)


@pytest.mark.parametrize("decay", ["N", "BNH"])
@pytest.mark.parametrize("H, V", [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_states_of_models_lower(H, V, decay):
    """The widest tile fits shared memory for every number of key channels."""
    sizes = dict(B=64, N=64, H=H, V=V)
    narrow, wide = ("BNH", "BNH", "BNV"), ("BNHV", decay, "BN")
    *arrays, beta = (
        jax.ShapeDtypeStruct(tuple(sizes[axis] for axis in axes), dtype)
        for many, dtype in ((narrow, jnp.bfloat16), (wide, jnp.float32))
        for axes in many
    )
    lowered("decode_linear", *arrays, donate=3, beta=beta)
