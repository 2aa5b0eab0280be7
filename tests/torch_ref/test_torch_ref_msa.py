"""torch_ref's MiniMax sparse attention against a loop that ranks one block after the other."""

import math
from types import SimpleNamespace

import dense_family as family
import pytest
import torch
from dense_family import DENSE, NAN, close, config, int32, random, tokens

import torch_ref
from torch_ref import ops
from torch_ref.attention import dense, msa

INDEX = dict(index_head_dim=7, index_block_size=3, index_topk_blocks=3, index_local_blocks=1, index_init_blocks=0)
# of 17 tokens, blocks of 3: what the index part of a config can be
SELECTIONS = {
    "own_block": dict(index_topk_blocks=1),
    "three": {},
    "single_tokens": dict(index_block_size=1, index_topk_blocks=5, index_head_dim=9),
    "first_and_last": dict(index_topk_blocks=4, index_local_blocks=2, index_init_blocks=1),
    "all_forced": dict(index_block_size=2, index_topk_blocks=4, index_local_blocks=2, index_init_blocks=2),
    "too_small_a_budget": dict(index_block_size=2, index_topk_blocks=2, index_local_blocks=3, index_init_blocks=1),
    "one_block": dict(index_block_size=32),
}


def build(fields, index):
    cfg = config(**fields, **(INDEX | index))
    width, heads = cfg.index_head_dim, cfg.num_key_value_heads
    shapes = {
        "wq_index": (10, heads, width),
        "wk_index": (10, width),
        "q_index_norm": (width,),
        "k_index_norm": (width,),
    }
    return cfg, family.init_params(cfg, **shapes)


CASES = {name: build(fields, {}) for name, fields in DENSE.items()}
CASES |= {name: build(DENSE["gemma"], index) for name, index in SELECTIONS.items()}
every_case = pytest.mark.parametrize(("cfg", "params"), CASES.values(), ids=CASES)


def index_vectors(cfg, params, row, positions):
    """q: T K J and k: T J of one row, a vector at a time."""

    def vector(x, weight, norm, position):
        z = x @ weight
        z = z / torch.sqrt((z * z).mean() + cfg.rms_norm_eps) * (cfg.norm_offset + params[norm])
        return family.rope(cfg, z, position)

    pairs = list(zip(row, positions.tolist(), strict=True))
    k = [vector(x, params["wk_index"], "k_index_norm", p) for x, p in pairs]
    heads = params["wq_index"].unbind(1)
    return [[vector(x, w, "q_index_norm", p) for w in heads] for x, p in pairs], k


def picked_blocks(cfg, q, keys, t):
    """The blocks of one index head at token t: forced ones first, then by score, a lower block before a higher."""
    current, size = t // cfg.index_block_size, cfg.index_block_size
    ranks = []
    for block in range(current + 1):
        scores = [float(q @ keys[s]) for s in range(t + 1) if s // size == block]
        forced = block < cfg.index_init_blocks or block > current - cfg.index_local_blocks
        ranks.append((-math.inf if forced else -max(scores), block))
    return [block for _, block in sorted(ranks)[: cfg.index_topk_blocks]]


def loop(params, cfg, x, positions):
    group, size, ys = cfg.num_attention_heads // cfg.num_key_value_heads, cfg.index_block_size, []
    for row, where in zip(x, positions, strict=True):
        q, keys = index_vectors(cfg, params, row, where)
        picks = [[picked_blocks(cfg, head, keys, t) for head in heads] for t, heads in enumerate(q)]

        def sees(_q, _k, t, n, picks=picks):
            return [s for s in range(t + 1) if s // size in picks[t][n // group]]

        ys.append(family.loop_over_visible(params, cfg, row[None], where[None], sees)[0])
    return torch.stack(ys)


@every_case
def test_forward_is_the_loop(cfg, params):
    x = tokens(cfg, new=17)
    close(msa.forward(params, cfg, x), loop(params, cfg, x, family.default_positions(x)))
    odd = family.odd_positions(x)
    close(msa.forward(params, cfg, x, odd), loop(params, cfg, x, odd))
    close(msa.forward(params, cfg, x, family.default_positions(x) + 50), msa.forward(params, cfg, x))


@every_case
def test_every_split_is_forward(cfg, params):
    splits = [5, 11, [4, 2, 1, 1, 9], [1, 16]]
    family.check_splits(msa, params, cfg, tokens(cfg, new=17), capacity=17, splits=splits)
    family.check_splits(msa, params, cfg, tokens(cfg, new=17), capacity=24, splits=[3])


@every_case
def test_ragged_rows_equal_rows_alone(cfg, params):
    family.check_ragged(msa, params, cfg, 30, first=(13, 0, 4, 1, 6), second=(1, 2, 0, 12, 3))


@every_case
def test_gradients_and_inputs(cfg, params):
    """The index branch only ranks, so its parameters get no gradient at all."""
    index = {name for name in params if "index" in name}
    family.check_inputs_kept(msa, params, cfg, capacity=12)
    params = {name: value.clone().requires_grad_() for name, value in params.items()}
    x = tokens(cfg)
    x[1, 3:] = NAN
    x.requires_grad_()
    y, cache = msa.prefill(params, cfg, x, family.poisoned_cache(msa, cfg, 2, 8), int32(7, 3))
    y2, _ = msa.decode(params, cfg, tokens(cfg, new=1), cache)
    (y.square().sum() + y2.square().sum()).backward()
    assert all(params[name].grad is None for name in index)
    assert all(leaf.grad.isfinite().all() for name, leaf in params.items() if name not in index)
    assert (x.grad[1, 3:] == 0).all() and x.grad[1, :3].any()


def test_a_full_cache_overflows(monkeypatch):
    cfg, params = CASES["three"]
    family.check_overflow(msa, params, cfg, 8, monkeypatch)


@pytest.mark.parametrize("name", ["gpt_oss", "gated", "first_and_last"])
def test_prefill_attends_over_what_it_stored(name):
    cfg, params = CASES[name]
    family.check_stored_precision(msa, params, cfg, tokens(cfg, new=13), capacity=16)
    cache = msa.init_cache(cfg, 2, 16)
    assert cache["k_index"].dtype == torch.bfloat16 and list(cache["k_index"].shape) == [2, 16, 7]


def test_prefill_picks_by_rounded_index_vectors():
    """120 tokens to pick 5 from lie so close that rounding queries or keys otherwise than decode moves some pick."""
    cfg, params = CASES["single_tokens"]
    params, x = {name: w.float() for name, w in params.items()}, tokens(cfg, new=120, dtype=torch.float32)
    y, _ = msa.prefill(params, cfg, x, msa.init_cache(cfg, 2, 120))
    torch.testing.assert_close(y, family.fold_decode(msa, params, cfg, x, msa.init_cache(cfg, 2, 120))[0])


# ---- the choice of blocks


@pytest.mark.parametrize("fields", DENSE.values(), ids=DENSE)
def test_it_is_dense_while_the_budget_holds_all_blocks(fields):
    cfg, params = build(fields, {})
    x = tokens(cfg, new=10)
    y, expected = msa.forward(params, cfg, x), dense.forward(params, cfg, x)
    close(y[:, :9], expected[:, :9])
    assert not torch.allclose(y[:, 9], expected[:, 9], atol=1e-4)
    stepped, _ = family.fold_decode(msa, params, cfg, x, msa.init_cache(cfg, 2, 10, x.dtype))
    close(stepped[:, :9], expected[:, :9])


def random_scores(cfg, positions, slots=16, seed=0):
    """Scores of one row, 2 KV heads, with -inf for the future, as the op gives them."""
    blocks = -(-slots // cfg.index_block_size)
    scores = random(1, len(positions), 2, blocks, seed=seed)
    where = torch.tensor([positions])
    future = torch.arange(blocks) > (where // cfg.index_block_size)[..., None, None]
    return scores.masked_fill(future, -torch.inf), where


def test_blocks_of_four_and_three_picks():
    """t = 3 has block 0, t = 11 has all of 0, 1, 2, and t = 13 has block 3, forced, and the best two of 0, 1, 2."""
    cfg = config(**(INDEX | dict(index_block_size=4)))
    scores, where = random_scores(cfg, [3, 11, 13])
    picks = msa.choose(cfg, scores, where)
    assert picks.dtype == torch.int32 and picks.shape == (1, 3, 2, 3)
    for g in range(2):
        assert sorted(picks[0, 0, g].tolist()) == [-1, -1, 0]
        assert sorted(picks[0, 1, g].tolist()) == [0, 1, 2]
        best = scores[0, 2, g, :3].argsort(descending=True)[:2].tolist()
        assert picks[0, 2, g].tolist() == [3, *best]


@pytest.mark.parametrize(
    ("index", "position", "picks"),
    [
        (dict(index_local_blocks=3), 2, [0, -1, -1]),
        (dict(index_local_blocks=2, index_init_blocks=2), 5, [0, 1, -1]),
        (dict(index_local_blocks=2, index_init_blocks=1), 14, [0, 3, 4]),
        (dict(index_init_blocks=4), 8, [0, 1, 2]),
        (dict(index_topk_blocks=99, index_local_blocks=2), 15, [4, 5, 3, 2, 1, 0]),
        (dict(index_topk_blocks=2, index_local_blocks=3), 14, [2, 3]),
    ],
)
def test_a_forced_block_is_counted_once(index, position, picks):
    """Scores rise with the block, so that the free picks are the last blocks; ties among the forced go to the lower."""
    cfg = config(**(INDEX | index))
    scores = torch.arange(6.0).expand(1, 1, 2, 6)
    scores = scores.masked_fill(torch.arange(6) > position // 3, -torch.inf)
    assert msa.choose(cfg, scores, torch.tensor([[position]])).tolist() == [[[picks, picks]]]


@pytest.mark.parametrize("step", [msa.prefill, lambda *a: family.fold_decode(msa, *a)])
def test_ties_go_to_the_lower_block(step):
    """Index keys of 0 score 0 everywhere: each query reads block 0, block 1 and its own."""
    cfg, params = build(DENSE["plain"], {})
    params, x = params | {"wk_index": torch.zeros_like(params["wk_index"])}, tokens(cfg, new=17)
    sees = lambda q, k, t, n: [s for s in range(t + 1) if s // 3 in (0, 1, t // 3)]  # noqa: E731
    expected = family.loop_over_visible(params, cfg, x, family.default_positions(x), sees)
    close(step(params, cfg, x, msa.init_cache(cfg, 2, 17, x.dtype))[0], expected)


@pytest.mark.parametrize("name", ["plain", "gemma"])
def test_index_vectors_are_the_loop(name):
    """An eps this large shows; that of the query scales all its scores alike and moves no pick."""
    cfg, params = CASES[name]
    cfg, x = config(**(vars(cfg) | {"rms_norm_eps": 0.5})), tokens(cfg, batch=1, new=5)
    positions = family.odd_positions(x)
    q, k = index_vectors(cfg, params, x[0], positions[0])
    expected = torch.stack([torch.stack(heads) for heads in q])[None], torch.stack(k)[None]
    for actual, one in zip(msa.project_index(params, cfg, x, positions), expected, strict=True):
        close(actual, one)


def test_index_vectors_turn_by_the_angles_of_the_main_heads():
    """Half-split pairs (j, j + 2) of the first 4 of 7 channels, 5e6^(-2j/4) a position; the other 3 stay."""
    cfg, params = CASES["gated"]
    x = tokens(cfg, batch=1, new=4)
    still = msa.project_index(params, cfg, x, torch.zeros(1, 4).int())
    turned = msa.project_index(params, cfg, x, torch.tensor([[0, 1, 5, 300]]))
    for before, after in zip(still, turned, strict=True):
        expected = before.clone()
        for t, p in enumerate((0, 1, 5, 300)):
            for j in range(2):
                c, s = math.cos(p * 5e6 ** (-j / 2)), math.sin(p * 5e6 ** (-j / 2))
                a, b = before[0, t, ..., j], before[0, t, ..., j + 2]
                expected[0, t, ..., j], expected[0, t, ..., j + 2] = a * c - b * s, b * c + a * s
        close(after, expected)


# ---- decode and its ops


def test_decode_goes_through_the_ops_with_stored_values():
    cfg, params = CASES["gemma"]
    params, x, seen = {name: w.float() for name, w in params.items()}, tokens(cfg, new=11, dtype=torch.float32), {}

    def spy(name):
        def op(*args, **options):
            seen[name] = (args, options, getattr(ops, name)(*args, **options))
            return seen[name][2]

        return op

    spies = SimpleNamespace(
        **{name: spy(name) for name in ("block_index_scores", "topk_indices", "decode_block_sparse")}
    )
    _, cache = msa.prefill(params, cfg, x, msa.init_cache(cfg, 2, 13), int32(11, 4))
    y, after = msa.decode(params, cfg, x[:, :1], cache, spies)
    assert y.dtype == torch.float32
    (q_index, k_index, lengths), options, scores = seen["block_index_scores"]
    assert q_index.dtype == k_index.dtype == torch.bfloat16 and list(q_index.shape) == [2, 1, 2, 7]
    assert torch.equal(k_index, after["k_index"]) and options == {"block_size": 3} and lengths.tolist() == [12, 5]
    assert scores.shape == (2, 1, 2, 5) and seen["topk_indices"][0][1] == 3
    (q, k, v, picks, lengths), options, _ = seen["decode_block_sparse"]
    assert torch.equal(picks, seen["topk_indices"][2]) and lengths.tolist() == [12, 5]
    assert {z.dtype for z in (q, k, v)} == {torch.bfloat16}
    assert options == dict(block_size=3, scale=0.9, softcap=0.8, out_dtype=torch.float32)


def test_decode_reads_the_picked_blocks_alone():
    """NaN in every key and value outside the picks reaches nothing; the index keys are read whole."""
    cfg, params = build(DENSE["mqa"], {})
    x = tokens(cfg, new=17)
    expected, cache = msa.prefill(params, cfg, x[:, :16], msa.init_cache(cfg, 2, 17, x.dtype))
    expected, after = msa.decode(params, cfg, x[:, 16:], cache)
    q_index, _ = msa.project_index(params, cfg, x[:, 16:], torch.full((2, 1), 16))
    scores = ops.block_index_scores(q_index, after["k_index"], int32(17, 17), block_size=3)
    picks = msa.choose(cfg, scores, torch.full((2, 1), 16))[:, 0, 0].tolist()
    for b in range(2):
        unread = [s for s in range(16) if s // 3 not in picks[b]]
        assert len(unread) == 9
        cache["k"][b, unread], cache["v"][b, unread] = NAN, NAN
    close(msa.decode(params, cfg, x[:, 16:], cache)[0], expected)


def test_the_registry_knows_it():
    assert torch_ref.get("msa") is msa


# ---- bad inputs


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"index_head_dim": 0}, ValueError, r"^index_head_dim is 0; allowed: an int >= 1$"),
        ({"index_head_dim": 5}, ValueError, r"^index_head_dim is 5; allowed: >= 6, the channels RoPE turns$"),
        ({"index_block_size": 0}, ValueError, r"^index_block_size is 0; allowed: an int >= 1$"),
        ({"index_topk_blocks": 0}, ValueError, r"^index_topk_blocks is 0; allowed: an int >= 1$"),
        ({"index_topk_blocks": 2.0}, TypeError, r"^index_topk_blocks is a float; allowed: an int >= 1$"),
        ({"index_local_blocks": 0}, ValueError, r"^index_local_blocks is 0; allowed: an int >= 1$"),
        ({"index_init_blocks": -1}, ValueError, r"^index_init_blocks is -1; allowed: an int >= 0$"),
    ],
)
def test_bad_fields_are_named(fields, error, message):
    good, params = CASES["plain"]
    cfg, x, cache = config(**(INDEX | fields)), tokens(good), msa.init_cache(good, 2, 9, torch.float64)
    for call in (
        lambda: msa.init_cache(cfg, 2, 9),
        lambda: msa.forward(params, cfg, x),
        lambda: msa.prefill(params, cfg, x, cache),
        lambda: msa.decode(params, cfg, x[:, :1], cache),
    ):
        with pytest.raises(error, match=message):
            call()


def test_bad_inputs_are_named():
    cfg, params = CASES["plain"]
    x, cache = tokens(cfg), msa.init_cache(cfg, 2, 9, torch.float64)
    with pytest.raises(ValueError, match=r"^x has shape \[2, 7, 10\]; allowed: \[B T=1 D=10\]$"):
        msa.decode(params, cfg, x, cache)
    with pytest.raises(ValueError, match=r"^lengths\[1\] is 8; allowed: 0 to 7, the tokens of x$"):
        msa.prefill(params, cfg, x, cache, int32(7, 8))
    for name, bad in (
        ("wq_index", (10, 1, 7)),
        ("wk_index", (10, 6)),
        ("q_index_norm", (1,)),
        ("k_index_norm", (2, 7)),
    ):
        with pytest.raises(
            ValueError, match=rf'^params\["{name}"\] has shape \[{", ".join(map(str, bad))}\]; allowed: '
        ):
            msa.forward(params | {name: torch.ones(bad, dtype=x.dtype)}, cfg, x)
    with pytest.raises(
        ValueError, match=r'^cache\["k_index"\] has shape \[2, 8, 7\]; allowed: \[B=2 S=9 k_index0=7\]$'
    ):
        msa.prefill(params, cfg, x, cache | {"k_index": cache["k_index"][:, :8]})
    with pytest.raises(TypeError, match=r'^cache\["k_index"\] has dtype torch.float32; allowed: float64$'):
        msa.decode(params, cfg, x[:, :1], cache | {"k_index": cache["k_index"].float()})
