"""torch_ref's lightning attention: its three forms against each other, its decays, its state and its op."""

from random import Random
from types import SimpleNamespace

import dense_family as family
import pytest
import torch
from dense_family import INF, NAN, close, int32, random, tokens
from lightning_loop import CONFIGS, EXPONENTS, init_params, lightning_config, lightning_loop

from torch_ref import ops
from torch_ref.attention import lightning


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_the_state_is_the_loop_s(cfg):
    params, x = init_params(cfg), tokens(cfg, new=13)
    y, cache = lightning.prefill(params, cfg, x, lightning.init_cache(cfg, 2, 13, x.dtype))
    for actual, expected in zip((y, cache["state"]), lightning_loop(params, cfg, x), strict=True):
        close(actual, expected)


def test_pads_do_not_decay_the_state():
    cfg = lightning_config(layer_index=0)
    params, x = init_params(cfg), tokens(cfg, batch=3, new=9)
    _, cache = lightning.prefill(params, cfg, x, lightning.init_cache(cfg, 3, 9, x.dtype))
    y, after = lightning.prefill(params, cfg, torch.full_like(x, NAN), cache, int32(0, 0, 0))
    assert (y == 0).all()
    family.same_caches(after, cache)
    x[0, 1:], x[2, 5:] = INF, NAN
    _, after = lightning.prefill(params, cfg, x, cache, int32(1, 0, 5))
    assert torch.equal(after["state"][1], cache["state"][1]) and not torch.equal(after["state"], cache["state"])
    assert after["length"].tolist() == [10, 9, 14]


# ---- the three forms


def form_inputs(seed, new, dtype=torch.float64):
    """q, k: 2 T 4 3, v: 2 T 4 5, a state, and decays that end at both of their limits."""
    q, k, v = (random(2, new, 4, width, dtype=dtype, seed=seed + i) for i, width in enumerate((3, 3, 5)))
    return q, k, v, torch.tensor([1.0, 0.0, 0.9, 0.3], dtype=dtype), random(2, 4, 3, 5, dtype=dtype, seed=seed + 3)


@pytest.mark.parametrize("seed", range(12))
def test_recurrent_is_blockwise_is_quadratic(seed):
    """Random lengths that are no multiple of the block, longer and shorter than it."""
    draw = Random(seed)
    block_size = draw.randint(2, 12)
    new = draw.choice([n for n in range(1, 50) if n % block_size])
    q, k, v, decay, state = form_inputs(seed, new)
    out, last = lightning.recurrent(q, k, v, decay, state)
    for actual, expected in zip(lightning.blockwise(q, k, v, decay, state, block_size), (out, last), strict=True):
        close(actual, expected)
    fresh, _ = lightning.recurrent(q, k, v, decay, torch.zeros_like(state))
    close(lightning.quadratic(q, k, v, decay), fresh)
    close(lightning.blockwise(q, k, v, decay, torch.zeros_like(state), block_size)[0], fresh)


@pytest.mark.parametrize("block_size", [1, 6, 12, 13])
def test_blocks_that_divide_the_length_or_hold_it_all(block_size):
    q, k, v, decay, state = form_inputs(0, 12)
    results = lightning.blockwise(q, k, v, decay, state, block_size), lightning.recurrent(q, k, v, decay, state)
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


def test_recurrent_is_the_op_folded():
    q, k, v, decay, state = form_inputs(0, 9)
    out, last = lightning.recurrent(q, k, v, decay, state)
    for t in range(9):
        step, state = ops.decode_linear(q[:, t], k[:, t], v[:, t], state, decay)
        close(step, out[:, t])
    close(state, last)


@pytest.mark.parametrize("lengths", [(1, 11), (3, 4), (5, 10), (8, 9)])
def test_blockwise_stops_at_the_lengths(lengths):
    q, k, v, decay, state = form_inputs(3, 11)
    out, last = lightning.blockwise(q, k, v, decay, state, 4, int32(*lengths))
    for b, n in enumerate(lengths):
        row, alone = slice(b, b + 1), [x[b : b + 1, :n] for x in (q, k, v)]
        expected = lightning.recurrent(*alone, decay, state[row])
        close(out[row, :n], expected[0])
        close(last[row], expected[1])


def test_powers_that_underflow_in_float32():
    """exp(-0.917 * 256) is 0 in float32, and its inverse infinite."""
    q, k, v, _, state = form_inputs(0, 600, torch.float32)
    decay = torch.exp(-torch.tensor([0.917, 0.1, 1e-3, 5e-5]))
    wide = [x.double() for x in (q, k, v, decay, state)]
    expected = lightning.recurrent(*wide)
    for actual, exact in zip(lightning.blockwise(q, k, v, decay, state, 256), expected, strict=True):
        assert actual.dtype == torch.float32 and (actual - exact).norm() < 1e-5 * exact.norm()


# ---- decays


@pytest.mark.parametrize(
    ("layer", "heads"), [(0, (0.91701321, 0.06250063, 0.00390629)), (78, (0.01161693, 0.00079177, 0.00004949))]
)
def test_slopes_of_minimax_text_01(layer, heads):
    slopes = lightning.slopes(lightning_config(num_attention_heads=64, layer_index=layer, num_hidden_layers=80))
    assert slopes[[0, 31, 63]].tolist() == pytest.approx(heads, abs=5.1e-9)


@pytest.mark.parametrize(
    ("n_heads", "exponents"),
    [*EXPONENTS.items(), (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5])],
)
def test_slopes_between_powers_of_two(n_heads, exponents):
    slopes = lightning.slopes(lightning_config(num_attention_heads=n_heads, layer_index=0)) / (1 + 1e-5)
    close(-torch.log2(slopes), torch.tensor(exponents, dtype=torch.float64))


def test_the_last_layer_hardly_decays():
    last = lightning_config(layer_index=79, num_hidden_layers=80)
    assert ((lightning.slopes(last) > 0) & (lightning.slopes(last) < 1e-5)).all()


# ---- the cache and the op


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_state_is_float32_or_wider(dtype):
    cfg = lightning_config()
    cache = lightning.init_cache(cfg, 2, 1000, dtype)
    assert {name: (list(leaf.shape), leaf.dtype) for name, leaf in cache.items()} == {
        "state": ([2, 4, 3, 3], torch.promote_types(dtype, torch.float32)),
        "length": ([2], torch.int32),
    }
    params, x = init_params(cfg, dtype), tokens(cfg, new=13, dtype=dtype)
    y, prefilled = lightning.prefill(params, cfg, x, cache)
    stepped, decoded = family.fold_decode(lightning, params, cfg, x, cache)
    exact = lightning.forward({name: w.double() for name, w in params.items()}, cfg, x.double())
    for result in (y, stepped, lightning.forward(params, cfg, x)):
        assert result.dtype == dtype and (result.double() - exact).norm() < 8 * torch.finfo(dtype).eps * exact.norm()
    close(decoded["state"], prefilled["state"], 1e-5)
    assert decoded["state"].dtype == prefilled["state"].dtype == cache["state"].dtype


def test_decode_takes_an_op_that_overwrites_its_state():
    cfg, seen = lightning_config(), {}
    params, x = init_params(cfg, torch.float32), tokens(cfg, new=5, dtype=torch.float32)

    def greedy(q, k, v, state, decay):
        seen.update(q=q, k=k, v=v, state=state, decay=decay)
        out, new = ops.decode_linear(q, k, v, state, decay)
        return out, state.copy_(new)

    _, cache = lightning.prefill(params, cfg, x, lightning.init_cache(cfg, 2, 5))
    kept = cache["state"].clone()
    y, after = lightning.decode(params, cfg, x[:, :1], cache, SimpleNamespace(decode_linear=greedy))
    assert torch.equal(cache["state"], kept)
    expected, expected_cache = lightning.decode(params, cfg, x[:, :1], cache)
    assert torch.equal(y, expected)
    family.same_caches(after, expected_cache)
    assert {name: (list(leaf.shape), leaf.dtype) for name, leaf in seen.items()} == {
        name: (shape, torch.float32)
        for name, shape in (*((name, [2, 4, 3]) for name in "qkv"), ("state", [2, 4, 3, 3]), ("decay", [4]))
    }


def test_it_never_overflows():
    cfg = lightning_config()
    x = tokens(cfg, new=40)
    y, cache = lightning.prefill(init_params(cfg), cfg, x, lightning.init_cache(cfg, 2, 0, x.dtype))
    assert cache["length"].tolist() == [40, 40] and y.isfinite().all()


def test_blocks_of_no_token_are_refused():
    with pytest.raises(ValueError, match=r"^block_size is 0; allowed: an int >= 1$"):
        lightning.blockwise(*form_inputs(0, 5), 0)
