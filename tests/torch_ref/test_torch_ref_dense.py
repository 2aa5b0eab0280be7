"""torch_ref's dense attention: forward against a loop over tokens, and prefill and decode against forward."""

import math
from types import SimpleNamespace

import pytest
import torch

import torch_ref
from torch_ref import ops
from torch_ref.attention import dense, step
from torch_ref.core.norm import rms_norm
from torch_ref.core.rope import apply_rope, frequencies

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 32.0, "original_max_position_embeddings": 16}


def config(n=4, k=2, **fields):
    defaults = dict(
        hidden_size=10,
        num_attention_heads=n,
        num_key_value_heads=k,
        head_dim=6,
        v_head_dim=5,
        attention_bias=False,
        attention_output_bias=False,
        qk_norm=None,
        norm_offset=0.0,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        rope_layout="half",
        attn_logit_softcapping=None,
        scaling=None,
        attn_output_gate=False,
    )
    return SimpleNamespace(**(defaults | fields))


CONFIGS = {
    "single_head": config(n=1, k=1),
    "mha": config(n=3, k=3, rope_parameters=None, scaling=0.7),
    "mqa": config(n=3, k=1, rope_layout="interleaved"),
    "qwen2": config(attention_bias=True),
    "qwen3": config(qk_norm="head"),
    "gemma": config(qk_norm="head", norm_offset=1.0, attn_logit_softcapping=0.8, scaling=0.3),
    "minimax_m2": config(qk_norm="flat", rope_parameters={"rope_theta": 5e6, "partial_rotary_factor": 0.67}),
    "gpt_oss": config(attention_bias=True, attention_output_bias=True, rope_parameters=YARN | {"truncate": False}),
    "llama3": config(rope_parameters=LLAMA3 | {"original_max_position_embeddings": 32}),
    "qwen3_next": config(attn_output_gate=True, qk_norm="head", norm_offset=1.0),
}
every_config = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def init_params(cfg, dtype=torch.float64):
    d, n, k, h, v = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.v_head_dim
    shapes = {"wq": (d, n, h), "wk": (d, k, h), "wv": (d, k, v), "wo": (n, v, d)}
    if cfg.attention_bias:
        shapes |= {"bq": (n, h), "bk": (k, h), "bv": (k, v)}
    if cfg.attention_output_bias:
        shapes["bo"] = (d,)
    if cfg.qk_norm is not None:
        flat = cfg.qk_norm == "flat"
        shapes |= {"q_norm": (n, h) if flat else (h,), "k_norm": (k, h) if flat else (h,)}
    if cfg.attn_output_gate:
        shapes["wg"] = (d, n, v)
    return {name: random(*shape, seed=i, dtype=dtype) / 2 for i, (name, shape) in enumerate(shapes.items())}


def poisoned_cache(cfg, batch, capacity, dtype=torch.float64):
    cache = dense.init_cache(cfg, batch, capacity, dtype)
    return cache | {name: torch.full_like(cache[name], math.nan) for name in ("k", "v")}


def tokens(cfg, batch=2, new=7, dtype=torch.float64):
    return random(batch, new, cfg.hidden_size, seed=99, dtype=dtype)


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def fold_decode(params, cfg, x, cache):
    ys = []
    for t in range(x.shape[1]):
        y, cache = dense.decode(params, cfg, x[:, t : t + 1], cache)
        ys.append(y)
    return torch.cat(ys, 1), cache


def assert_caches_agree(cache, other):
    assert torch.equal(cache["length"], other["length"])
    for row, length in enumerate(cache["length"].tolist()):
        for name in ("k", "v"):
            close(cache[name][row, :length], other[name][row, :length])


def slow_forward(params, cfg, x, positions):
    """The equations of one row, a head and a query at a time."""
    y = torch.zeros_like(x)
    group = cfg.num_attention_heads // cfg.num_key_value_heads
    scale = cfg.scaling or 1 / math.sqrt(cfg.head_dim)
    for b in range(len(x)):
        heads = {}
        for name in ("q", "k", "v"):
            z = torch.stack([x[b] @ params["w" + name][:, i] for i in range(params["w" + name].shape[1])], 1)
            z = z + params["b" + name] if cfg.attention_bias else z
            if cfg.qk_norm is not None and name != "v":
                z = rms_norm(z, params[name + "_norm"], cfg.rms_norm_eps, cfg.norm_offset)
            if cfg.rope_parameters is not None and name != "v":
                theta, factor = frequencies(cfg.rope_parameters, cfg.head_dim)
                z = apply_rope(z[None], positions[b : b + 1], theta, factor, cfg.rope_layout)[0]
            heads[name] = z
        for t in range(x.shape[1]):
            for n in range(cfg.num_attention_heads):
                logits = scale * heads["k"][: t + 1, n // group] @ heads["q"][t, n]
                if cfg.attn_logit_softcapping is not None:
                    logits = cfg.attn_logit_softcapping * torch.tanh(logits / cfg.attn_logit_softcapping)
                out = torch.softmax(logits, 0) @ heads["v"][: t + 1, n // group]
                if cfg.attn_output_gate:
                    out = out / (1 + torch.exp(-(x[b, t] @ params["wg"][:, n])))
                y[b, t] += out @ params["wo"][n]
    return y + params["bo"] if cfg.attention_output_bias else y


@every_config
def test_forward_is_the_loop(cfg):
    params, x = init_params(cfg), tokens(cfg)
    default = torch.arange(7).expand(2, 7)
    close(dense.forward(params, cfg, x), slow_forward(params, cfg, x, default))
    positions = torch.tensor([[3, 4, 5, 9, 10, 11, 12], [0, 2, 4, 6, 8, 10, 12]])
    close(dense.forward(params, cfg, x, positions), slow_forward(params, cfg, x, positions))
    close(dense.forward(params, cfg, x, default + 50), dense.forward(params, cfg, x))


@every_config
def test_prefill_and_decode_are_forward(cfg):
    params, x = init_params(cfg), tokens(cfg)
    expected = dense.forward(params, cfg, x)
    y, prefilled = dense.prefill(params, cfg, x, poisoned_cache(cfg, 2, 9))
    close(y, expected)
    y, decoded = fold_decode(params, cfg, x, poisoned_cache(cfg, 2, 9))
    close(y, expected)
    assert_caches_agree(prefilled, decoded)


@every_config
@pytest.mark.parametrize("split", [(7,), (1, 6), (3, 1, 3), (6, 1), (2, 2, 2, 1)])
def test_every_split_into_chunks_is_forward(cfg, split):
    params, x = init_params(cfg), tokens(cfg)
    cache, ys = poisoned_cache(cfg, 2, 7), []
    for chunk in x.split(split, dim=1):
        y, cache = dense.prefill(params, cfg, chunk, cache)
        ys.append(y)
    close(torch.cat(ys, 1), dense.forward(params, cfg, x))


@every_config
def test_ragged_rows_equal_rows_alone(cfg):
    params, x = init_params(cfg), tokens(cfg, batch=3)
    lengths = torch.tensor([7, 0, 4], dtype=torch.int32)
    x[1, 0:], x[2, 4:] = math.nan, math.inf
    y, cache = dense.prefill(params, cfg, x, poisoned_cache(cfg, 3, 9), lengths)
    more = torch.tensor([1, 2, 0], dtype=torch.int32)
    second = tokens(cfg, batch=3, new=2)
    y2, cache = dense.prefill(params, cfg, second, cache, more)
    last = random(3, 1, cfg.hidden_size, seed=5)
    y3, cache = dense.decode(params, cfg, last, cache)
    for row, (a, b) in enumerate(zip(lengths.tolist(), more.tolist(), strict=True)):
        assert (y[row, a:] == 0).all() and (y2[row, b:] == 0).all()
        alone = torch.cat([x[row, :a], second[row, :b], last[row]])[None]
        close(torch.cat([y[row, :a], y2[row, :b], y3[row]])[None], dense.forward(params, cfg, alone))
        assert cache["length"][row] == a + b + 1
        assert cache["k"][row, a + b + 1 :].isnan().all() and cache["v"][row, a + b + 1 :].isnan().all()


@every_config
def test_inputs_are_not_changed(cfg):
    params, x, cache = init_params(cfg), tokens(cfg), dense.init_cache(cfg, 2, 8, torch.float64)
    kept = [{name: value.clone() for name, value in tree.items()} for tree in (params, cache, {"x": x})]
    _, new = dense.prefill(params, cfg, x, cache)
    dense.decode(params, cfg, x[:, :1], new)
    for tree, before in zip((params, cache, {"x": x}), kept, strict=True):
        assert all(torch.equal(tree[name], before[name]) for name in before)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
def test_prefill_attends_over_what_it_stored(x_dtype, cache_dtype):
    cfg = CONFIGS["qwen3"]
    params, x = init_params(cfg, x_dtype), tokens(cfg, dtype=x_dtype)
    y, prefilled = dense.prefill(params, cfg, x, dense.init_cache(cfg, 2, 7, cache_dtype))
    stepped, decoded = fold_decode(params, cfg, x, dense.init_cache(cfg, 2, 7, cache_dtype))
    assert y.dtype == x_dtype and stepped.dtype == x_dtype
    assert prefilled["k"].dtype == prefilled["v"].dtype == cache_dtype
    torch.testing.assert_close(y, stepped)  # tighter than the rounding of a bfloat16 cache when x is float32
    if (x_dtype, cache_dtype) == (torch.float32, torch.bfloat16):
        assert not torch.allclose(y, dense.forward(params, cfg, x), rtol=1e-4, atol=1e-4)


def test_decode_hands_the_cache_dtype_to_the_op():
    cfg, seen = CONFIGS["gemma"], {}

    def spy(q, k, v, lengths, **options):
        seen.update(q=q, k=k, v=v, lengths=lengths, **options)
        return ops.decode_attention(q, k, v, lengths, **options)

    cache = dense.init_cache(cfg, 2, 4)
    dense.decode(
        init_params(cfg, torch.float32), cfg, tokens(cfg, new=1).float(), cache, SimpleNamespace(decode_attention=spy)
    )
    assert seen["q"].dtype == seen["k"].dtype == seen["v"].dtype == torch.bfloat16
    assert seen["lengths"].tolist() == [1, 1] and (seen["scale"], seen["softcap"]) == (0.3, 0.8)


@pytest.mark.parametrize("call", [dense.prefill, dense.decode])
def test_overflow_names_the_row(call):
    cfg = CONFIGS["qwen3"]
    params, cache = init_params(cfg), dense.init_cache(cfg, 3, 4, torch.float64)
    cache["length"] = torch.tensor([3, 4, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^row 1 overflows its cache: length 4 \+ 1 new tokens, capacity 4$"):
        call(params, cfg, tokens(cfg, batch=3, new=1), cache)


@pytest.mark.parametrize("call", [dense.prefill, dense.decode])
def test_overflow_of_unread_lengths_leaves_the_row_alone(call, monkeypatch):
    """What a device does, where lengths are not read: the CPU's error is taken out."""
    monkeypatch.setattr(step, "room", lambda length, new, capacity: length + new <= capacity)
    cfg = CONFIGS["gpt_oss"]
    new = 1 if call is dense.decode else 2
    params, x = init_params(cfg), tokens(cfg, batch=3, new=new)
    cache = dense.init_cache(cfg, 3, 4, torch.float64)
    _, cache = dense.prefill(
        params, cfg, tokens(cfg, batch=3, new=4), cache, torch.tensor([1, 4, 2], dtype=torch.int32)
    )
    y, after = call(params, cfg, x, cache)
    assert y[1].isnan().all() and y[::2].isfinite().all()
    assert after["length"].tolist() == [1 + new, 4, 2 + new]
    assert torch.equal(after["k"][1], cache["k"][1]) and torch.equal(after["v"][1], cache["v"][1])
    alone, _ = call(params, cfg, x[2:], {name: leaf[2:] for name, leaf in cache.items()})
    close(y[2:], alone)


def test_a_row_that_gains_nothing_may_be_full():
    cfg = CONFIGS["qwen3"]
    params, x = init_params(cfg), tokens(cfg, new=3)
    _, cache = dense.prefill(params, cfg, x, dense.init_cache(cfg, 2, 3, torch.float64))
    y, after = dense.prefill(params, cfg, x, cache, torch.zeros(2, dtype=torch.int32))
    assert (y == 0).all() and after["length"].tolist() == [3, 3]


def test_gradients_through_ragged_prefill_are_finite():
    cfg = CONFIGS["qwen3_next"]
    params = {name: value.requires_grad_() for name, value in init_params(cfg).items()}
    x = tokens(cfg)
    x[1, 3:] = math.nan
    x.requires_grad_()
    y, _ = dense.prefill(params, cfg, x, poisoned_cache(cfg, 2, 8), torch.tensor([7, 3], dtype=torch.int32))
    y.square().sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in (x, *params.values()))
    assert (x.grad[1, 3:] == 0).all() and x.grad[1, :3].all()


def test_bad_inputs_are_named():
    cfg = CONFIGS["qwen3"]
    params, x, cache = init_params(cfg), tokens(cfg), dense.init_cache(cfg, 2, 8, torch.float64)
    with pytest.raises(ValueError, match=r"^x has shape \[2, 7, 9\]; allowed: \[B T D=10\]$"):
        dense.forward(params, cfg, x[..., :9])
    with pytest.raises(ValueError, match=r"^x has shape \[2, 7, 10\]; allowed: \[B T=1 D=10\]$"):
        dense.decode(params, cfg, x, cache)
    with pytest.raises(TypeError, match=r"^positions has dtype torch.float32; allowed: int32, int64$"):
        dense.forward(params, cfg, x, torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"^lengths\[1\] is 8; allowed: 0 to 7, the tokens of x$"):
        dense.prefill(params, cfg, x, cache, torch.tensor([7, 8], dtype=torch.int32))
    with pytest.raises(ValueError, match=r'^cache\["length"\] has shape \[3\]; allowed: \[B=2\]$'):
        dense.prefill(params, cfg, x, dense.init_cache(cfg, 3, 8))
    with pytest.raises(ValueError, match=r'^cache\["v"\] has shape \[2, 8, 2, 4\]; allowed: \[B=2 S=8 v0=2 v1=5\]$'):
        dense.prefill(params, cfg, x, cache | {"v": torch.zeros(2, 8, 2, 4, dtype=torch.float64)})


def test_bad_norms_are_named():
    params, x = init_params(CONFIGS["qwen3"]), tokens(CONFIGS["qwen3"])
    with pytest.raises(ValueError, match="^qk_norm is 'layer'; allowed: None, head, flat$"):
        dense.forward(params, config(qk_norm="layer"), x)
    with pytest.raises(ValueError, match=r'^params\["q_norm"\] has shape \[6\]; allowed: \[4, 6\]$'):
        dense.forward(params, config(qk_norm="flat"), x)


def test_registry():
    assert torch_ref.names()[:4] == ("single_head", "mha", "mqa", "gqa")
    assert all(torch_ref.get(name) is dense for name in torch_ref.names()[:4])
    assert all(
        callable(getattr(torch_ref.get(n), f))
        for n in torch_ref.names()
        for f in ("init_cache", "forward", "prefill", "decode")
    )
    with pytest.raises(ValueError, match=rf"^name is 'gqq'; allowed: {', '.join(torch_ref.names())}$"):
        torch_ref.get("gqq")


def test_imports_neither_jax_nor_jforge():
    import subprocess
    import sys

    code = "import sys, torch_ref; assert not {'jax', 'jforge', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
