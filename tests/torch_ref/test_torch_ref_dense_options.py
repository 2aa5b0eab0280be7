"""What the config of torch_ref's dense family can ask for beyond `dense_family.DENSE`: slopes, clips, other norms,
values that are keys, queries that grow, other gates, other RoPE; and chunks. Golden numbers, and the op's slopes.
"""

import math

import dense_family as family
import pytest
import test_torch_ref_laws as laws
import torch
from dense_family import NAN, close, config, int32, random, spied, tokens
from mechanisms import CASES, Case, in_chunk, last, streaming_loop, under_mask

from torch_ref import get, ops
from torch_ref.attention import chunked_local, dense, sliding_window, step
from torch_ref.core import alibi, ring
from torch_ref.core.norm import layer_norm, rms_norm
from torch_ref.core.rope import apply_rope, frequencies

LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factors": (1.0, 1.5, 7.0), "attention_factor": 1.19}
PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 1e2, "partial_rotary_factor": 0.67}
OPTIONS = {
    "bloom": dict(n=6, k=3, alibi=True, rope_parameters=None, attention_bias=True),
    "mpt": dict(n=3, k=3, alibi=True, rope_parameters=None, clip_qkv=0.5, attn_logit_softcapping=0.8),
    "slopes_and_angles": dict(alibi=True, qk_norm="heads"),
    "olmo": dict(clip_qkv=0.4, rope_parameters=LONG),
    "clip_behind_the_norm": dict(clip_qkv=0.3, qk_norm="head", v_norm=True),
    "phi": dict(qk_norm="head", qk_norm_type="layer", qk_norm_bias=True, attention_bias=True),
    "cohere": dict(qk_norm="heads", qk_norm_type="layer", rope_layout="interleaved"),
    "stablelm": dict(qk_norm="heads", qk_norm_type="layer", qk_norm_bias=True, norm_offset=1.0),
    "flat_layer": dict(qk_norm="flat", qk_norm_type="layer", qk_norm_bias=True, qk_norm_after_rope=True),
    "hunyuan": dict(qk_norm="head", qk_norm_after_rope=True, clip_qkv=0.5),
    "nanochat": dict(qk_norm="head", qk_norm_weight=False, qk_norm_after_rope=True, rope_layout="interleaved"),
    "flat_without_weights": dict(qk_norm="flat", qk_norm_weight=False, norm_offset=1.0),
    "llama4_nope": dict(rope_parameters=None, attn_scale=0.7, floor_scale=3),
    "all_queries_grow": dict(
        attn_scale=0.4, floor_scale=2.5, attn_scale_from=0, qk_norm="heads", qk_norm_after_rope=True
    ),
    "gemma4": dict(v_norm=True, attention_k_eq_v=True, v_head_dim=6, qk_norm="head", rope_parameters=PROPORTIONAL),
    "k_eq_v": dict(attention_k_eq_v=True, v_head_dim=6, attention_bias=True, clip_qkv=0.5, qk_norm="flat"),
    "laguna": dict(attn_output_gate=True, output_gate_type="softplus"),
    "laguna_per_head": dict(attn_output_gate=True, output_gate_type="softplus", output_gate_per_head=True),
    "lfm3": dict(attn_output_gate=True, output_gate_per_head=True, rope_parameters=PROPORTIONAL),
}  # fmt: skip
MORE = {"gqa": {}, "sliding_window": dict(sliding_window=5), "chunked_local": dict(attention_chunk_size=4)}


RINGS = ("bloom", "mpt", "slopes_and_angles", "hunyuan", "llama4_nope", "gemma4")  # of what meets positions


def case_of(mechanism, option, count=11, **fields):
    cfg = config(**OPTIONS[option] | fields)
    sees = in_chunk if mechanism == "chunked_local" else last
    loop = streaming_loop if mechanism == "streaming" else under_mask(sees)
    return Case(get(mechanism), cfg, family.init_params(cfg), loop, count)


@pytest.mark.parametrize(
    ("mechanism", "option"),
    [("gqa", option) for option in OPTIONS] + [(mechanism, option) for mechanism in list(MORE)[1:] for option in RINGS],
)
def test_options_are_the_loop_in_every_split(mechanism, option):
    case = case_of(mechanism, option, **MORE[mechanism])
    laws.test_forward_is_the_loop(case)
    laws.test_every_split_is_forward(case)


@pytest.mark.parametrize("option", ["bloom", "hunyuan", "llama4_nope", "gemma4"])
@pytest.mark.parametrize("mechanism", MORE)
def test_options_of_ragged_rows(mechanism, option):
    case = case_of(mechanism, option, **MORE[mechanism])
    laws.test_ragged_rows_equal_rows_alone(case, (13, 0, 4, 1, 6), (1, 2, 0, 12, 3))
    laws.test_inputs_are_kept_and_gradients_are_finite(case)


@pytest.mark.parametrize("option", ["olmo", "stablelm", "llama4_nope", "gemma4", "laguna_per_head"])
def test_options_of_streaming(option):
    case = case_of("streaming", option, 9, start_size=2, recent_size=3)
    laws.test_forward_is_the_loop(case)
    laws.test_every_split_is_forward(case)


@pytest.mark.parametrize("mechanism", ["block_sparse", "moba", "msa", "nsa"])
def test_options_over_blocks(mechanism):
    """Those that change what `dense` projects change it there too."""
    fields = dict(clip_qkv=0.5, attn_scale=0.7, floor_scale=3, v_norm=True, qk_norm="heads", qk_norm_type="layer")
    plain = CASES[f"{mechanism}:plain"]
    cfg = type(plain.cfg)(**vars(plain.cfg) | fields)
    params = plain.params | {name: random(*shape, seed=7) for name, shape in (("q_norm", (4, 6)), ("k_norm", (2, 6)))}
    if mechanism == "nsa":  # its loop has no factor of the query's index
        cfg.attn_scale = None
    if mechanism in ("block_sparse", "nsa"):  # the other loops pick by what they see of q before it is scaled
        laws.test_forward_is_the_loop(plain._replace(cfg=cfg, params=params))
    laws.test_every_split_is_forward(plain._replace(cfg=cfg, params=params))


@pytest.mark.parametrize("option", ["bloom", "slopes_and_angles"])
def test_sinks_beside_slopes(option):
    for window in (None, 5):
        cfg = config(**OPTIONS[option], sliding_window=window)
        params = family.init_params(cfg, sinks=(cfg.num_attention_heads,))
        case = Case(get("sinks"), cfg, params, under_mask(last), 11)
        laws.test_forward_is_the_loop(case)
        laws.test_every_split_is_forward(case)


def test_a_narrow_cache_with_slopes():
    for mechanism, more in MORE.items():
        laws.test_a_narrow_cache_is_read_as_stored(case_of(mechanism, "bloom", **more), torch.bfloat16, torch.bfloat16)


# ---- each option moves y, and its default is what was


@pytest.mark.parametrize("option", OPTIONS)
def test_no_field_is_without_effect(option):
    """Every field of the option changed back to its default gives another y, or another set of parameters."""
    base, changed = vars(config()), vars(config(**OPTIONS[option]))
    params, x = family.init_params(config(**OPTIONS[option])), tokens(config(), new=11)
    y = dense.forward(params, config(**OPTIONS[option]), x)
    for field in OPTIONS[option]:
        if field in ("n", "k", "v_head_dim", "qk_norm", "attention_k_eq_v", "output_gate_per_head"):
            continue
        if field == "norm_offset" and not changed["qk_norm_weight"] or field == "qk_norm_bias":
            continue
        if field == "qk_norm_after_rope" and not changed["qk_norm_weight"]:  # rotations keep lengths
            continue
        cfg = config(**OPTIONS[option])
        setattr(cfg, field, base[field])
        if field == "qk_norm_weight":
            params = params | {name: random(6, seed=3) for name in ("q_norm", "k_norm")}
            cfg.qk_norm = "head"
        if field == "qk_norm_type":
            cfg.qk_norm_bias = False
        assert not torch.allclose(dense.forward(params, cfg, x), y, rtol=1e-6, atol=1e-6), field


# ---- golden numbers


@pytest.mark.parametrize(
    ("n_heads", "first", "slopes"),
    [
        (6, 0, (0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125)),
        (8, 0, tuple(2.0 ** -(i + 1) for i in range(8))),
        (12, 8, (0.707107, 0.353553, 0.176777, 0.088388)),
        (1, 0, (2.0**-8,)),
    ],
)
def test_slopes(n_heads, first, slopes):
    assert len(alibi.slopes(n_heads)) == n_heads
    assert alibi.slopes(n_heads)[first:] == pytest.approx(slopes, abs=5e-7)


def test_slopes_are_mpt_s():
    """It builds those of 2n heads and takes the odd, then the even entries."""
    for n_heads in range(1, 40):
        power = 2 ** math.ceil(math.log2(n_heads))
        wide = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
        expected = wide if power == n_heads else (wide[1::2] + wide[::2])[:n_heads]
        assert alibi.slopes(n_heads) == pytest.approx(expected, rel=1e-14)


def test_the_factor_of_llama_4():
    cfg, index = config(attn_scale=0.1), torch.tensor([[0, 8190, 8191, 16382, 16383, 2**24]])
    factor = dense.rescaled(cfg, torch.ones(1, 6, 4, 6, dtype=torch.float64), index)[0, :, 0, 0]
    expected = [1, 1, 1.0693147, 1.0693147, 1.1098612, 1 + 0.1 * math.log(2049)]
    assert factor.tolist() == pytest.approx(expected, abs=5e-8)
    narrow = dense.rescaled(cfg, torch.ones(1, 6, 4, 6, dtype=torch.bfloat16), index)
    assert narrow.dtype == torch.bfloat16 and torch.equal(narrow[0, :, 0, 0], factor.bfloat16())


def test_proportional_angles_of_gemma_4():
    rope = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    theta, factor = frequencies(rope, 512)
    assert theta.shape == (256,) and factor == 1.0 and (theta > 0).sum() == 64
    assert theta[[1, 63, 64]].tolist() == pytest.approx([0.9474635, 0.0333762, 0.0], abs=5e-8)
    x = random(1, 1, 1, 512)
    y = apply_rope(x, torch.tensor([[3]]), theta)
    moved = (y != x).flatten().nonzero().flatten().tolist()
    assert moved == [*range(64), *range(256, 320)]  # pairs (j, j + 256)
    close(y[0, 0, 0, 1], x[..., 1].squeeze() * math.cos(3 * theta[1]) - x[..., 257].squeeze() * math.sin(3 * theta[1]))


def test_longrope_divides_and_multiplies():
    magnitude = math.sqrt(1 + math.log(131072 / 4096) / math.log(4096))
    assert magnitude == pytest.approx(1.1902381, abs=5e-8)
    factors = (1.0, 1.25, 8.0)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factors": factors, "attention_factor": magnitude}
    theta, factor = frequencies(rope, 6)
    assert theta.tolist() == pytest.approx([1 / (f * 1e4 ** (2 * j / 6)) for j, f in enumerate(factors)], rel=1e-14)
    assert factor == magnitude
    x = random(1, 1, 1, 6)
    close(apply_rope(x, torch.tensor([[9]]), theta, factor).norm(), magnitude * x.norm())
    partial, _ = frequencies(rope | {"factors": (1.0, 2.0), "partial_rotary_factor": 0.67}, 6)
    assert partial.tolist() == pytest.approx([1.0, 1 / (2 * 100)])


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (LONG | {"factors": (1.0, 2.0)}, r"^factors has shape \[2\]; allowed: \[3\], one for each pair that turns$"),
        (PROPORTIONAL | {"partial_rotary_factor": 0.0}, "^partial_rotary_factor is 0.0 of 6 channels; allowed"),
        (PROPORTIONAL | {"partial_rotary_factor": 1.5}, "^partial_rotary_factor is 1.5 of 6 channels; allowed"),
    ],
)  # fmt: skip
def test_bad_rope_parameters(rope, message):
    with pytest.raises(ValueError, match=message):
        frequencies(rope, 6)


def test_norms_over_fewer_dimensions_than_the_weight():
    x, weight, bias = random(2, 3, 4, 6), random(4, 6, seed=1), random(4, 6, seed=2)
    close(rms_norm(x, weight, 1e-3, dims=1)[..., 2, :], rms_norm(x[..., 2, :], weight[2], 1e-3))
    close(rms_norm(x, None, 1e-3), rms_norm(x, torch.ones(6), 1e-3))
    expected = torch.nn.functional.layer_norm(x, (6,), eps=1e-3) * (1 + weight) + bias
    close(layer_norm(x, weight, bias, 1e-3, 1.0, dims=1), expected)
    flat = torch.nn.functional.layer_norm(x, (4, 6), weight, bias, eps=1e-3)
    close(layer_norm(x, weight, bias, 1e-3), flat)


# ---- what goes into the parameters


@pytest.mark.parametrize(
    ("option", "name", "shape"),
    [
        ("cohere", "q_norm", (6,)),
        ("stablelm", "k_norm_bias", (6,)),
        ("phi", "q_norm_bias", (4, 6)),
        ("hunyuan", "k_norm", (2, 6)),
        ("laguna", "wg", (10, 4)),
        ("lfm3", "wg", (10, 4, 5)),
    ],
)
def test_bad_parameters_are_named(option, name, shape):
    _, cfg, params, *_ = case_of("gqa", option)
    given, allowed = (str(list(z)).replace("[", r"\[") for z in (shape, params[name].shape))
    with pytest.raises(ValueError, match=rf'^params\["{name}"\] has shape {given}; allowed: {allowed}$'):
        dense.forward(params | {name: random(*shape)}, cfg, tokens(cfg))


def test_values_that_are_keys_need_their_width():
    cfg = config(attention_k_eq_v=True)
    with pytest.raises(ValueError, match="^v_head_dim is 5; allowed with attention_k_eq_v: head_dim 6$"):
        dense.forward(family.init_params(cfg), cfg, tokens(cfg))


# ---- the op's slopes


def by_hand(q, k, v, lengths, slopes, scale, window=None, sinks=None, softcap=None):
    """(out, lse) one query and head at a time."""
    out, lse = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype), torch.full(q.shape[:3], -math.inf, dtype=q.dtype)
    for b, t, n in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        own, kv = int(lengths[b]) - q.shape[1] + t, n // (q.shape[2] // k.shape[2])
        seen = [s for s in range(own + 1) if window is None or s > own - window]
        logits = [scale * float(q[b, t, n] @ k[b, s, kv]) for s in seen]
        logits = logits if softcap is None else [softcap * math.tanh(z / softcap) for z in logits]
        logits = [z + float(slopes[n]) * (s - own) for z, s in zip(logits, seen, strict=True)]
        total = sum(map(math.exp, logits)) + (0.0 if sinks is None else math.exp(sinks[n]))
        if total:
            lse[b, t, n] = math.log(total)
            out[b, t, n] = sum(
                (math.exp(z) / total * v[b, s, kv] for z, s in zip(logits, seen, strict=True)), out[b, t, n]
            )
    return out, lse


ALIBI = torch.tensor([0.5, 0.25, 0.125, 1.5], dtype=torch.float64)


@pytest.mark.parametrize(
    "options", [{}, dict(window=3), dict(softcap=0.7), dict(sinks=random(4, seed=9)), dict(window=2, softcap=2.0)]
)
def test_slopes_of_the_op(options):
    q, k, v = (random(4, *shape, seed=i) for i, shape in enumerate(((2, 4, 5), (9, 2, 5), (9, 2, 3))))
    lengths = int32(9, 6, 1, 0)
    expected = by_hand(q, k, v, lengths, ALIBI, 0.4, **options)
    beyond = torch.arange(9) >= lengths[:, None]
    k[beyond], v[beyond] = NAN, math.inf
    result = ops.decode_attention(q, k, v, lengths, scale=0.4, alibi=ALIBI, **options)
    for actual, wanted in zip(result, expected, strict=True):
        close(actual, wanted)
    pages = torch.arange(19, -1, -1, dtype=torch.int32).reshape(4, 5)
    paged = {name: torch.nn.functional.pad(z, (0, 0, 0, 0, 0, 1)).unflatten(1, (5, 2)).flatten(0, 1).flip(0)
             for name, z in (("k", k), ("v", v))}  # fmt: skip
    result = ops.decode_attention(q, **paged, lengths=lengths, scale=0.4, alibi=ALIBI, page_table=pages, **options)
    for actual, wanted in zip(result, expected, strict=True):
        close(actual, wanted)


def test_no_slope_is_no_slopes():
    q, k, v = (random(2, *shape, seed=i) for i, shape in enumerate(((2, 4, 5), (9, 2, 5), (9, 2, 3))))
    given, more = (q, k, v, int32(9, 6)), dict(scale=0.4, sinks=random(4))
    flat = ops.decode_attention(*given, **more, alibi=torch.zeros(4, dtype=torch.float64))
    for actual, wanted in zip(flat, ops.decode_attention(*given, **more), strict=True):
        close(actual, wanted)


@pytest.mark.parametrize(
    ("slopes", "error", "message"),
    [
        (torch.ones(3), ValueError, r"has shape \[3\]; allowed: \[N="),
        (torch.ones(2, 1), ValueError, r"has shape \[2, 1\]; allowed: \[N="),
        (torch.ones(4).bfloat16(), TypeError, "has dtype torch.bfloat16; allowed: float32, float64$"),
        ([0.5, 0.25, 0.1, 0.2], TypeError, "is a list; allowed: a torch.Tensor$"),
    ],
)
def test_bad_slopes_are_named(slopes, error, message):
    q, k, v = (random(2, *shape, seed=i) for i, shape in enumerate(((2, 4, 5), (9, 2, 5), (9, 2, 3))))
    with pytest.raises(error, match=f"^alibi {message}"):
        ops.decode_attention(q, k, v, int32(9, 6), scale=0.4, alibi=slopes)


def test_decode_hands_slopes_in_the_order_of_the_tokens():
    """float32 slopes, and a ring that has wrapped is put in order first; without slopes the op is given none."""
    cfg = config(**OPTIONS["bloom"], sliding_window=5)
    params = family.init_params(cfg, torch.float32)
    x, (calls, spies) = tokens(cfg, new=9, dtype=torch.float32), spied(ops)
    _, cache = sliding_window.prefill(params, cfg, x, sliding_window.init_cache(cfg, 2, 9), int32(8, 2))
    _, after = sliding_window.decode(params, cfg, x[:, :1], cache, ops=spies)
    (((_, k, _, lengths), options, _),) = calls["decode_attention"]
    assert options["alibi"].dtype == torch.float32 and options["alibi"].tolist() == family.SLOPES[6]
    assert (
        lengths.tolist() == [5, 3] and torch.equal(k[0], after["k"][0].roll(1, 0)) and torch.equal(k[1], after["k"][1])
    )
    dense.decode(
        family.init_params(config()), config(), tokens(config(), new=1), dense.init_cache(config(), 2, 3), spies
    )
    assert "alibi" not in calls["decode_attention"][1][1]


@pytest.mark.parametrize(
    ("length", "order"), [(0, [0, 1, 2, 3]), (3, [0, 1, 2, 3]), (6, [2, 3, 0, 1]), (8, [0, 1, 2, 3])]
)
def test_a_ring_in_order(length, order):
    buffer = torch.arange(4.0)[None, :, None]
    assert ring.oldest_first(buffer, int32(length))[0, :, 0].tolist() == order


# ---- chunks


def test_a_chunk_of_all_tokens_is_gqa_and_the_next_token_is_alone():
    cfg, x = config(attention_chunk_size=9), tokens(config(), new=10)
    params = family.init_params(cfg)
    y = chunked_local.forward(params, cfg, x)
    close(y[:, :9], dense.forward(params, cfg, x[:, :9]))
    close(y[:, 9:], dense.forward(params, cfg, x[:, 9:]))
    window = sliding_window.forward(params, config(sliding_window=9), x)
    assert not torch.allclose(y[:, 9], window[:, 9], atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_slots_outside_the_chunk_hold_anything(size):
    """NaN in all but the first (length - 1) mod C + 1 slots after every step, and the op reads no more than these."""
    cfg = config(attention_chunk_size=size, qk_norm="head")
    params, x, (calls, spies) = family.init_params(cfg), tokens(cfg, new=12), spied(ops)
    y, cache = chunked_local.prefill(params, cfg, x, chunked_local.init_cache(cfg, 2, 12, x.dtype), int32(7, 0))
    ys = [y[:, :7]]
    for t in range(7, 12):
        valid = torch.where(cache["length"] > 0, (cache["length"] - 1) % size + 1, 0)
        beyond = torch.arange(size) >= valid[:, None]
        for side in "kv":
            cache[side] = cache[side].masked_fill(beyond[..., None, None], NAN)
        if t == 9:
            y, cache = chunked_local.prefill(params, cfg, x[:, t : t + 1], cache)
        else:
            y, cache = chunked_local.decode(params, cfg, x[:, t : t + 1], cache, spies)
            assert calls["decode_attention"][-1][0][3].tolist() == [t % size + 1, (t - 7) % size + 1]
        ys.append(y)
    close(torch.cat(ys, 1)[:1], chunked_local.forward(params, cfg, x)[:1])
    close(torch.cat(ys, 1)[1:, 7:], chunked_local.forward(params, cfg, x[1:, 7:]))


def test_a_row_without_any_slot_reads_none(monkeypatch):
    """Where lengths are not read, a row of no tokens and no room: NaN, not the slots of a chunk that is not there."""
    cfg = config(attention_chunk_size=5)
    monkeypatch.setattr(step, "room", lambda length, new, capacity: length + new <= capacity)
    empty = chunked_local.init_cache(cfg, 2, 0, torch.float64)
    y, cache = chunked_local.decode(family.init_params(cfg), cfg, tokens(cfg, new=1), empty)
    assert y.isnan().all() and cache["length"].tolist() == [0, 0]


def test_a_cache_of_the_chunk_never_overflows():
    cfg, x = config(attention_chunk_size=5), tokens(config(), new=17)
    params = family.init_params(cfg)
    y, cache = family.fold_decode(chunked_local, params, cfg, x, family.poisoned_cache(chunked_local, cfg, 2, 5))
    close(y, chunked_local.forward(params, cfg, x))
    assert chunked_local.init_cache(cfg, 2, 1000)["k"].shape[1] == 5
    wide = {side: torch.cat([cache[side], cache[side][:, :1]], 1) for side in "kv"}
    with pytest.raises(ValueError, match=r'^cache\["k"\] has S=6 slots; allowed: at most 5, the chunk$'):
        chunked_local.prefill(params, cfg, x, cache | wide)
