"""torch_ref's mechanisms with a convolution and a recurrent state: the recurrence in steps and in blocks, what the
caches hold, and the limits in which one mechanism is another. Their laws run in test_torch_ref_laws.py.
"""

from random import Random
from types import SimpleNamespace

import dense_family as family
import pytest
import torch
from dense_family import INF, NAN, close, int32, random, tokens
from mechanisms import CASES
from state_loops import CONFIGS, LOOPS, config, init_params, last_rows

from torch_ref import get, ops
from torch_ref.attention import lightning, recurrent
from torch_ref.core import conv, delta, gates

every_case = pytest.mark.parametrize("name", CONFIGS)
every_plain = pytest.mark.parametrize("name", [f"{name}:plain" for name in LOOPS])
every_state = pytest.mark.parametrize("name", [f"{name}:plain" for name in LOOPS if name != "short_conv"])


def loop_of(name):
    return LOOPS[name.split(":")[0]]


# ---- what the caches hold


@every_case
def test_the_cache_is_the_loop_s(name):
    """After prompts of every length up to past the kernel, by prefill, by decode, and by both."""
    att, cfg, params, *_ = CASES[name]
    x, empty = tokens(cfg, new=9), att.init_cache(cfg, 2, 9, torch.float64)
    for new in range(1, 10):
        y, held = loop_of(name)(params, cfg, x[:, :new])
        half = att.prefill(params, cfg, x[:, : new // 2], empty)[1] if new > 1 else empty
        made = {
            "prefill": att.prefill(params, cfg, x[:, :new], empty),
            "decode": family.fold_decode(att, params, cfg, x[:, :new], empty),
            "both": family.fold_decode(att, params, cfg, x[:, new // 2 : new], half),
        }
        for how, (out, cache) in made.items():
            close(out, y[:, new // 2 :] if how == "both" else y)
            assert cache["length"].tolist() == [new, new]
            for buffer, expected in held.items():
                close(cache[buffer], expected)


@every_case
def test_pads_change_neither_state_nor_rows(name):
    """To the bit, in a batch with an empty, a short and a full row; a bias is no token's row."""
    att, cfg, params, *_ = CASES[name]
    x = tokens(cfg, batch=3, new=9)
    _, cache = att.prefill(params, cfg, x, att.init_cache(cfg, 3, 9, x.dtype), int32(2, 0, 9))
    y, after = att.prefill(params, cfg, torch.full_like(x, NAN), cache, int32(0, 0, 0))
    assert (y == 0).all() and all(torch.equal(after[buffer], cache[buffer]) for buffer in cache)
    x[0, 1:], x[2, 5:] = INF, NAN
    _, after = att.prefill(params, cfg, x, cache, int32(1, 0, 5))
    assert after["length"].tolist() == [3, 0, 14]
    for buffer in set(cache) - {"length"}:
        assert not after[buffer][1].any() and after[buffer].isfinite().all()
        assert cache[buffer].numel() == 0 or not torch.equal(after[buffer][0], cache[buffer][0])


@every_case
def test_blocks_change_nothing(name):
    att, cfg, params, *_ = CASES[name]
    x, made = tokens(cfg, new=11), []
    for size in (1, 2, 3, 5, 11, 64):
        sized = SimpleNamespace(**vars(cfg) | {"block_size": size})
        made.append(att.prefill(params, sized, x, att.init_cache(sized, 2, 0, x.dtype), int32(11, 6)))
    for y, cache in made[1:]:
        close(y, made[0][0])
        family.same_caches(cache, made[0][1])


@every_plain
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_states_are_wide_and_rows_are_as_asked(name, dtype):
    att, cfg, *_ = CASES[name]
    cache = att.init_cache(cfg, 2, 1000, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert all(cache[buffer].dtype == (wide if buffer == "state" else dtype) for buffer in set(cache) - {"length"})
    params, x = init_params(att, cfg, dtype), tokens(cfg, new=13, dtype=dtype)
    y, prefilled = att.prefill(params, cfg, x, cache)
    stepped, decoded = family.fold_decode(att, params, cfg, x, cache)
    assert y.dtype == stepped.dtype == att.forward(params, cfg, x).dtype == dtype
    for buffer, leaf in prefilled.items():
        assert leaf.dtype == decoded[buffer].dtype == cache[buffer].dtype
        close(leaf, decoded[buffer], 1e-5)
    exact = att.forward({n: w.double() for n, w in params.items()}, cfg, x.double())
    for result in (y, stepped):
        assert (result.double() - exact).norm() < 8 * torch.finfo(dtype).eps * exact.norm()


@every_plain
def test_what_is_convolved_is_what_is_stored(name):
    """With a bfloat16 cache, y of float32 tokens is that of raw rows rounded to bfloat16."""
    att, cfg, *_ = CASES[name]
    params, x = init_params(att, cfg, torch.float32), tokens(cfg, new=9, dtype=torch.float32)
    y, cache = att.prefill(params, cfg, x, att.init_cache(cfg, 2, 9))
    if name.startswith("short_conv"):
        rows = att.products(params, cfg, x).bfloat16()
        expected = att.output(params, cfg, x, conv.from_the_start(rows, cfg.conv_L_cache))
    else:
        rounded = att.MIXER._replace(raw=lambda *given: att.raw(*given).bfloat16())
        rows, expected = rounded.raw(params, cfg, x), recurrent.forward(rounded, params, cfg, x)
    close(y, expected, 1e-5)
    assert not torch.allclose(y, att.forward(params, cfg, x), rtol=1e-4, atol=1e-4)
    assert torch.equal(cache["conv"], rows[:, -cache["conv"].shape[1] :])


@every_plain
def test_it_never_overflows(name):
    att, cfg, params, *_ = CASES[name]
    x = tokens(cfg, new=80)
    y, cache = att.prefill(params, cfg, x, att.init_cache(cfg, 2, 0, x.dtype))
    assert cache["length"].tolist() == [80, 80] and y.isfinite().all()
    close(y, att.forward(params, cfg, x))


# ---- the op

OPS_GIVEN = {  # q and k, v, state, decay, beta
    "gated_deltanet:plain": ([2, 6, 3], [2, 6, 5], [2, 6, 3, 5], [2, 6], [2, 6]),
    "kda:plain": ([2, 3, 5], [2, 3, 5], [2, 3, 5, 5], [2, 3, 5], [2, 3]),
    "mamba2:plain": ([2, 6, 5], [2, 6, 3], [2, 6, 5, 3], [2, 6], None),
    "mamba1:plain": ([2, 7, 3], [2, 7, 1], [2, 7, 3, 1], [2, 7, 3], None),
}


@every_state
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decode_takes_an_op_that_overwrites_its_state(name, dtype):
    att, cfg, *_ = CASES[name]
    params, x, seen = init_params(att, cfg, dtype), tokens(cfg, new=5, dtype=dtype), {}

    def greedy(q, k, v, state, decay, *, beta=None):
        seen.update(q=q, k=k, v=v, state=state, decay=decay, beta=beta)
        out, new = ops.decode_linear(q, k, v, state, decay, beta=beta)
        return out, state.copy_(new)

    _, cache = att.prefill(params, cfg, x, att.init_cache(cfg, 2, 5))
    kept = {buffer: leaf.clone() for buffer, leaf in cache.items()}
    y, after = att.decode(params, cfg, x[:, :1], cache, SimpleNamespace(decode_linear=greedy))
    family.same_caches(cache, kept)
    expected, expected_cache = att.decode(params, cfg, x[:, :1], cache)
    assert torch.equal(y, expected)
    family.same_caches(after, expected_cache)
    q, v, state, decay, beta = OPS_GIVEN[name]
    shapes = dict(q=q, k=q, v=v, state=state, decay=decay, beta=beta)
    assert {key: z if z is None else list(z.shape) for key, z in seen.items()} == shapes
    assert all(z is None or z.dtype == torch.float32 for z in seen.values())


# ---- the recurrence


def form_inputs(seed, new, per_channel, with_beta, dtype=torch.float64):
    """q, k, v, g, beta, state of `core.delta`: B = 2, N = 4, H = 3, V = 5; a head forgets nothing, another all."""
    q, k, v = (random(2, new, 4, width, dtype=dtype, seed=seed + i) for i, width in enumerate((3, 3, 5)))
    g = -random(2, new, 4, *([3] if per_channel else []), dtype=dtype, seed=seed + 3).square()
    g[:, :, 0], g[:, :, 1] = 0.0, -1000.0
    beta = 2 * torch.sigmoid(random(2, new, 4, dtype=dtype, seed=seed + 4)) if with_beta else None
    k = k / k.norm(dim=-1, keepdim=True) if with_beta else k
    return q, k, v, g, beta, random(2, 4, 3, 5, dtype=dtype, seed=seed + 5)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("with_beta", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_blocks_are_the_steps(per_channel, with_beta, seed):
    """Blocks that divide the length, that do not, of one token, and one longer than all; and rows that end inside."""
    draw = Random(seed)
    size, new = (1, 12, 7, draw.randint(2, 9), 50)[seed], (9, 36, 40, draw.randint(10, 40), 23)[seed]
    *given, state = form_inputs(seed, new, per_channel, with_beta)
    out, last = delta.recurrent(*given, state)
    for actual, expected in zip(delta.blockwise(*given, state, size), (out, last), strict=True):
        close(actual, expected)
    lengths = [draw.randint(0, new), draw.randint(1, new)]
    padded = torch.arange(new) < torch.tensor(lengths)[:, None]
    ragged, ends = delta.blockwise(*given, state, size, padded)
    for b, n in enumerate(lengths):
        if n == 0:
            assert torch.equal(ends[b], state[b])
            continue
        alone = [z if z is None else z[b : b + 1, :n] for z in given]
        expected, end = delta.recurrent(*alone, state[b : b + 1])
        close(ragged[b : b + 1, :n], expected)
        close(ends[b : b + 1], end)


@pytest.mark.parametrize("per_channel", [True, False])
def test_steps_are_products_of_matrices(per_channel):
    """S_t = (I - beta k k^T) diag(e^g) S_{t-1} + beta k v^T, a head and a token at a time."""
    *given, state = form_inputs(7, 6, per_channel, True)
    q, k, v, g, beta = given
    out, last = delta.recurrent(*given, state)
    for b in range(2):
        for n in range(4):
            S = state[b, n]
            for t in range(6):
                key = k[b, t, n]
                erase = torch.eye(3, dtype=key.dtype) - beta[b, t, n] * torch.outer(key, key)
                S = erase @ torch.diag(g[b, t, n].expand(3).exp()) @ S + beta[b, t, n] * torch.outer(key, v[b, t, n])
                close(out[b, t, n], q[b, t, n] @ S)
            close(last[b, n], S)


def test_without_a_gate_the_steps_are_lightning_s():
    q, k, v, _, _, state = form_inputs(0, 9, False, False)
    decay = torch.tensor([1.0, 0.25, 0.9, 0.3], dtype=torch.float64)
    g = decay.log().expand(2, 9, 4)
    results = delta.recurrent(q, k, v, g, None, state), lightning.recurrent(q, k, v, decay, state)
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("per_channel", [True, False])
def test_sums_that_cancel_in_float32(per_channel):
    """A token that forgets nearly all, then many that forget little: the difference of two sums would keep 3 digits."""
    *given, state = form_inputs(0, 128, per_channel, True, torch.float32)
    g = given[3]
    g[:] = -1e-3
    g[:, 3] = -3e3
    wide = [z.double() for z in (*given, state)]
    for actual, exact in zip(delta.blockwise(*given, state, 64), delta.recurrent(*wide), strict=True):
        assert actual.dtype == torch.float32 and (actual - exact).norm() < 2e-6 * exact.norm()


def test_gradients_of_the_blocks_are_those_of_the_steps():
    made = []
    for form, more in ((delta.recurrent, ()), (delta.blockwise, (4,))):
        leaves = [z.requires_grad_() for z in form_inputs(2, 10, True, True)]
        out, last = form(*leaves, *more)
        (out.square().sum() + last.square().sum()).backward()
        made.append([z.grad for z in leaves])
    for actual, expected in zip(*made, strict=True):
        close(actual, expected, 1e-9)


# ---- the convolution


@pytest.mark.parametrize("kernel", [1, 2, 4, 7])
@pytest.mark.parametrize("new", [1, 2, 3, 9])
def test_the_convolution_is_torch_s(kernel, new):
    """Tap j of a torch weight X 1 L is w_conv[j], over rows with kernel - 1 zeros before them."""
    raw, weight, bias = random(2, new, 5), random(kernel, 5, seed=1), random(5, seed=2)
    rows = conv.from_the_start(raw, kernel)
    channels_first = torch.nn.functional.pad(raw.transpose(1, 2), (kernel - 1, 0))
    expected = torch.nn.functional.conv1d(channels_first, weight.T[:, None], bias, groups=5).transpose(1, 2)
    close(conv.depthwise(rows, weight, bias), expected)
    close(conv.depthwise(rows, weight), expected - bias)
    kept = conv.newest(rows, int32(new, new - 1), kernel)
    for b, n in enumerate((new, new - 1)):
        assert torch.equal(kept[b], torch.tensor(last_rows(list(raw[b, :n].numpy()), kernel, 5)))


# ---- limits


def test_kda_with_one_decay_per_head_is_gated_deltanet():
    cfg = config("kda", low_rank=False, linear_num_heads=4, linear_head_dim=3)
    fields = dict(linear_num_key_heads=4, linear_num_value_heads=4, linear_key_head_dim=3, linear_value_head_dim=3)
    twin = config("gated_deltanet", output_gate_type="sigmoid", rms_norm_eps=cfg.rms_norm_eps, **fields)
    kda, gated_deltanet = get("kda"), get("gated_deltanet")
    params = init_params(kda, cfg)
    for per_head in ("wf", "dt_bias"):
        params[per_head][:] = params[per_head][..., :1].clone()
    renamed = params | {"wa": params["wf"][..., 0], "dt_bias": params["dt_bias"][..., 0]}
    x = tokens(cfg, new=9)
    close(kda.forward(params, cfg, x), gated_deltanet.forward(renamed, twin, x))


def test_decays_are_bounded_by_the_lower_bound():
    """e^bound is the least factor, however large f is, and it is not reached by a positive rate's other end."""
    kda, cfg = get("kda"), config("kda", linear_lower_bound=-2.0, low_rank=False)
    params, x = init_params(kda, cfg), 100 * tokens(cfg)
    g = kda.tokens(params, cfg, x, random(2, 7, 45))[3]
    assert (g >= -2).all() and (g <= 0).all() and g.min() < -1.999 and g.max() > -1e-3


def test_the_step_is_clamped_after_softplus():
    mamba2, cfg = get("mamba2"), config("mamba2", time_step_limit=(0.25, 0.5))
    params, x = init_params(mamba2, cfg), tokens(cfg)
    free = config("mamba2")
    g, unclamped = (mamba2.tokens(params, c, x, random(2, 7, 38))[3] / -params["a_log"].exp() for c in (cfg, free))
    close(g, unclamped.clamp(0.25, 0.5))
    assert (unclamped < 0.25).any() and (unclamped > 0.5).any()


def test_negative_eigenvalues_double_beta():
    gated_deltanet, cfg = get("gated_deltanet"), config("gated_deltanet")
    params, x, c = init_params(gated_deltanet, cfg), tokens(cfg), random(2, 7, 42)
    doubled = config("gated_deltanet", linear_allow_neg_eigval=True)
    close(gated_deltanet.tokens(params, doubled, x, c)[4], 2 * gated_deltanet.tokens(params, cfg, x, c)[4])


def test_softplus_keeps_float64_s_digits():
    z = torch.tensor([-60.0, 0.0, 20.5, 40.0, 700.0], dtype=torch.float64)
    close(gates.softplus(z), torch.logaddexp(z, torch.zeros_like(z)), 1e-15)
