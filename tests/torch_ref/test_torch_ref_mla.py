"""torch_ref's latent attention: its two forms against each other, prefill and decode against a loop over tokens."""

import math
from types import SimpleNamespace

import pytest
import torch

import torch_ref
from torch_ref import ops
from torch_ref.attention import mla, step
from torch_ref.core.rope import apply_rope, frequencies

NAN, INF = math.nan, math.inf
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 40.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def config(**fields):
    defaults = dict(
        hidden_size=10,
        num_attention_heads=3,
        q_lora_rank=7,
        kv_lora_rank=8,
        qk_nope_head_dim=5,
        qk_rope_head_dim=4,
        v_head_dim=6,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        rope_layout="interleaved",
        scaling=None,
        attention_bias=False,
    )
    return SimpleNamespace(**(defaults | fields))


CONFIGS = {
    "deepseek_v3": config(rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}),
    "deepseek_v2_lite": config(q_lora_rank=None, rope_parameters=YARN),
    "biases": config(attention_bias=True, rope_layout="half"),
    "biases_without_q_lora": config(attention_bias=True, q_lora_rank=None, num_attention_heads=1),
    "kimi_linear": config(q_lora_rank=None, rope_parameters=None),
    "scaled": config(scaling=0.7, rms_norm_eps=0.5, qk_rope_head_dim=6, rope_parameters=YARN | {"mscale": 1.0}),
}
every_config = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)


def init_params(cfg, dtype=torch.float64):
    d, n, c, r = cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank, cfg.qk_rope_head_dim
    q, nope, v, rank = cfg.qk_nope_head_dim + r, cfg.qk_nope_head_dim, cfg.v_head_dim, cfg.q_lora_rank
    shapes = {"wkv_a": (d, c + r), "kv_norm": (c,), "wk_b": (c, n, nope), "wv_b": (c, n, v), "wo": (n, v, d)}
    shapes |= {"wq": (d, n, q)} if rank is None else {"wq_a": (d, rank), "q_norm": (rank,), "wq_b": (rank, n, q)}
    if cfg.attention_bias:
        shapes |= {"bkv_a": (c + r,), "bo": (d,)} | ({} if rank is None else {"bq_a": (rank,)})
    return {name: random(*shape, seed=i, dtype=dtype) / 2 for i, (name, shape) in enumerate(shapes.items())}


def poisoned_cache(cfg, batch, capacity, dtype=torch.float64):
    cache = mla.init_cache(cfg, batch, capacity, dtype)
    return cache | {name: torch.full_like(cache[name], NAN) for name in ("latent", "k_rope")}


def tokens(cfg, batch=2, new=7, dtype=torch.float64):
    return random(batch, new, cfg.hidden_size, seed=99, dtype=dtype)


def fold_decode(params, cfg, x, cache):
    ys = []
    for t in range(x.shape[1]):
        y, cache = mla.decode(params, cfg, x[:, t : t + 1], cache)
        ys.append(y)
    return torch.cat(ys, 1), cache


def slow_forward(params, cfg, x, positions):
    """The equations of one row, a head and a query at a time, and the latents and rotated keys of all rows."""

    def norm(z, weight):
        return weight * z / torch.sqrt((z * z).mean(-1, keepdim=True) + cfg.rms_norm_eps)

    def rope(z, b):
        if cfg.rope_parameters is None:
            return z
        theta, factor = frequencies(cfg.rope_parameters, cfg.qk_rope_head_dim)
        return apply_rope(z[None, :, None], positions[b : b + 1], theta, factor, cfg.rope_layout)[0, :, 0]

    y, latents, ropes, nope = torch.zeros_like(x), [], [], cfg.qk_nope_head_dim
    for b in range(len(x)):
        kv = x[b] @ params["wkv_a"] + params.get("bkv_a", 0.0)
        latents.append(norm(kv[:, : cfg.kv_lora_rank], params["kv_norm"]))
        ropes.append(rope(kv[:, cfg.kv_lora_rank :], b))
        c_q, w = x[b], params.get("wq")
        if cfg.q_lora_rank is not None:
            c_q, w = norm(x[b] @ params["wq_a"] + params.get("bq_a", 0.0), params["q_norm"]), params["wq_b"]
        for n in range(cfg.num_attention_heads):
            q = c_q @ w[:, n]
            q = torch.cat([q[:, :nope], rope(q[:, nope:], b)], -1)
            k = torch.cat([latents[b] @ params["wk_b"][:, n], ropes[b]], -1)
            v = latents[b] @ params["wv_b"][:, n]
            for t in range(x.shape[1]):
                p = torch.softmax(mla.scaling(cfg) * k[: t + 1] @ q[t], 0)
                y[b, t] += p @ v[: t + 1] @ params["wo"][n]
    return y + params.get("bo", 0.0), torch.stack(latents), torch.stack(ropes)


@every_config
def test_forward_is_the_loop(cfg):
    params, x = init_params(cfg), tokens(cfg)
    default = torch.arange(7).expand(2, 7)
    close(mla.forward(params, cfg, x), slow_forward(params, cfg, x, default)[0])
    positions = torch.tensor([[3, 4, 5, 9, 10, 11, 12], [0, 2, 4, 6, 8, 10, 12]])
    close(mla.forward(params, cfg, x, positions), slow_forward(params, cfg, x, positions)[0])
    close(mla.forward(params, cfg, x, default + 50), mla.forward(params, cfg, x))


@every_config
def test_naive_is_absorbed(cfg):
    params, x = init_params(cfg), tokens(cfg, batch=3)
    projected = mla.project(params, cfg, x, torch.arange(7).expand(3, 7))
    causal = torch.ones(7, 7).tril().bool().expand(3, -1, -1)
    naive = mla.attend_naive(params, cfg, *projected, causal)
    close(mla.attend_absorbed(params, cfg, *projected, int32(7, 7, 7)), naive)
    for slot in projected[2:]:
        slot[1, 4:] = NAN
    seen = torch.arange(7) < int32(7, 4, 7)[:, None, None]
    q_nope, q_rope, latent, k_rope = projected
    naive = mla.attend_naive(params, cfg, q_nope[:, -1:], q_rope[:, -1:], latent, k_rope, seen)
    close(mla.attend_absorbed(params, cfg, q_nope[:, -1:], q_rope[:, -1:], latent, k_rope, int32(7, 4, 7)), naive)


@every_config
def test_prefill_and_decode_are_forward(cfg):
    params, x = init_params(cfg), tokens(cfg)
    expected, latent, k_rope = slow_forward(params, cfg, x, torch.arange(7).expand(2, 7))
    for call in (mla.prefill, fold_decode):
        y, cache = call(params, cfg, x, poisoned_cache(cfg, 2, 9))
        close(y, expected)
        assert cache["length"].tolist() == [7, 7] and cache["length"].dtype == torch.int32
        for name, stored in (("latent", latent), ("k_rope", k_rope)):
            close(cache[name][:, :7], stored)
            assert cache[name][:, 7:].isnan().all()


@every_config
@pytest.mark.parametrize("split", [(7,), (1, 6), (3, 1, 3), (6, 1), (2, 2, 2, 1)])
def test_every_split_into_chunks_is_forward(cfg, split):
    params, x = init_params(cfg), tokens(cfg)
    cache, ys = poisoned_cache(cfg, 2, 7), []
    for chunk in x.split(split, dim=1):
        y, cache = mla.prefill(params, cfg, chunk, cache)
        ys.append(y)
    close(torch.cat(ys, 1), mla.forward(params, cfg, x))


@every_config
def test_ragged_rows_equal_rows_alone(cfg):
    params, x = init_params(cfg), tokens(cfg, batch=3)
    x[1, 0:], x[2, 4:] = NAN, INF
    y, cache = mla.prefill(params, cfg, x, poisoned_cache(cfg, 3, 9), int32(7, 0, 4))
    second, last = tokens(cfg, batch=3, new=2), random(3, 1, cfg.hidden_size, seed=5)
    y2, cache = mla.prefill(params, cfg, second, cache, int32(1, 2, 0))
    y3, cache = mla.decode(params, cfg, last, cache)
    for row, (a, b) in enumerate(((7, 1), (0, 2), (4, 0))):
        assert (y[row, a:] == 0).all() and (y2[row, b:] == 0).all()
        alone = torch.cat([x[row, :a], second[row, :b], last[row]])[None]
        close(torch.cat([y[row, :a], y2[row, :b], y3[row]])[None], mla.forward(params, cfg, alone))
        assert cache["length"][row] == a + b + 1
        assert cache["latent"][row, a + b + 1 :].isnan().all() and cache["k_rope"][row, a + b + 1 :].isnan().all()


@every_config
def test_inputs_are_not_changed(cfg):
    params, x, cache = init_params(cfg), tokens(cfg), mla.init_cache(cfg, 2, 8, torch.float64)
    kept = [{name: value.clone() for name, value in tree.items()} for tree in (params, cache, {"x": x})]
    _, new = mla.prefill(params, cfg, x, cache)
    mla.decode(params, cfg, x[:, :1], new)
    for tree, before in zip((params, cache, {"x": x}), kept, strict=True):
        assert all(torch.equal(tree[name], before[name]) for name in before)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_rounding(x_dtype, cache_dtype):
    """Both forms round differently in a narrow cache, so they agree only as well as its dtype allows."""
    cfg = CONFIGS["deepseek_v3"]
    params, x = init_params(cfg, x_dtype), tokens(cfg, dtype=x_dtype)
    y, prefilled = mla.prefill(params, cfg, x, mla.init_cache(cfg, 2, 7, cache_dtype))
    stepped, decoded = fold_decode(params, cfg, x, mla.init_cache(cfg, 2, 7, cache_dtype))
    assert y.dtype == x_dtype and stepped.dtype == x_dtype
    narrow = max(torch.finfo(x_dtype).eps, torch.finfo(cache_dtype).eps)
    for name in ("latent", "k_rope"):
        close(decoded[name], prefilled[name], 4 * narrow)
    assert prefilled["latent"].dtype == prefilled["k_rope"].dtype == cache_dtype
    exact = mla.forward({name: w.double() for name, w in params.items()}, cfg, x.double())
    for result in (y, stepped):
        assert (result.double() - exact).norm() < 4 * narrow * exact.norm()
    if (x_dtype, cache_dtype) == (torch.float32, torch.bfloat16):
        assert not torch.allclose(y, mla.forward(params, cfg, x), rtol=1e-4, atol=1e-4)  # it read what it stored


def test_decode_hands_the_cache_dtype_to_the_op():
    cfg, seen = CONFIGS["scaled"], {}

    def spy(q_latent, q_rope, latent, k_rope, lengths, **options):
        seen.update(tensors=(q_latent, q_rope, latent, k_rope), lengths=lengths, **options)
        return ops.decode_mla(q_latent, q_rope, latent, k_rope, lengths, **options)

    y, _ = mla.decode(
        init_params(cfg, torch.float32),
        cfg,
        tokens(cfg, new=1).float(),
        mla.init_cache(cfg, 2, 4),
        SimpleNamespace(decode_mla=spy),
    )
    assert y.dtype == torch.float32
    assert all(x.dtype == torch.bfloat16 for x in seen["tensors"])
    assert [list(x.shape) for x in seen["tensors"]] == [[2, 1, 3, 8], [2, 1, 3, 6], [2, 4, 8], [2, 4, 6]]
    assert seen["lengths"].tolist() == [1, 1] and (seen["scale"], seen["out_dtype"]) == (0.7, torch.float32)


@pytest.mark.parametrize("call", [mla.prefill, mla.decode])
def test_overflow_names_the_row(call):
    cfg = CONFIGS["deepseek_v3"]
    cache = mla.init_cache(cfg, 3, 4, torch.float64) | {"length": int32(3, 4, 2)}
    with pytest.raises(ValueError, match=r"^row 1 overflows its cache: length 4 \+ 1 new tokens, capacity 4$"):
        call(init_params(cfg), cfg, tokens(cfg, batch=3, new=1), cache)


@pytest.mark.parametrize("call", [mla.prefill, mla.decode])
def test_overflow_of_unread_lengths_leaves_the_row_alone(call, monkeypatch):
    """What a device does, where lengths are not read: the CPU's error is taken out."""
    monkeypatch.setattr(step, "room", lambda length, new, capacity: length + new <= capacity)
    cfg = CONFIGS["biases"]
    new = 1 if call is mla.decode else 2
    params, x = init_params(cfg), tokens(cfg, batch=3, new=new)
    _, cache = mla.prefill(params, cfg, tokens(cfg, batch=3, new=4), poisoned_cache(cfg, 3, 4), int32(1, 4, 2))
    y, after = call(params, cfg, x, cache)
    assert y[1].isnan().all() and y[::2].isfinite().all()
    assert after["length"].tolist() == [1 + new, 4, 2 + new]
    assert all(torch.equal(after[name][1], cache[name][1]) for name in ("latent", "k_rope"))
    alone, _ = call(params, cfg, x[2:], {name: leaf[2:] for name, leaf in cache.items()})
    close(y[2:], alone)


@pytest.mark.parametrize("name", ["deepseek_v3", "biases_without_q_lora"])
def test_gradients_beside_pads_and_poison_are_finite(name):
    cfg = CONFIGS[name]
    params = {key: value.requires_grad_() for key, value in init_params(cfg).items()}
    x = tokens(cfg)
    x[1, 3:] = NAN
    x.requires_grad_()
    y, cache = mla.prefill(params, cfg, x, poisoned_cache(cfg, 2, 8), int32(7, 3))
    y2, _ = mla.decode(params, cfg, tokens(cfg, new=1), cache)
    (y.square().sum() + y2.square().sum()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in (x, *params.values()))
    assert (x.grad[1, 3:] == 0).all() and x.grad[1, :3].all()


@pytest.mark.parametrize(
    ("rope", "scale"),
    [
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}, 0.135233),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707}, 0.114722),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 40, "mscale_all_dim": 0}, 192**-0.5),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 40, "mscale_all_dim": None}, 192**-0.5),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 40}, 192**-0.5),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 0.5, "mscale_all_dim": 1.0}, 192**-0.5),
        ({"rope_type": "default", "rope_theta": 1e4, "factor": 40, "mscale_all_dim": 1.0}, 192**-0.5),
        ({"rope_theta": 1e4}, 192**-0.5),
        (None, 192**-0.5),
    ],
)
def test_softmax_scale(rope, scale):
    cfg = config(qk_nope_head_dim=128, qk_rope_head_dim=64, rope_parameters=rope)
    # the specification gives six digits of its constants, cut or rounded
    assert mla.scaling(cfg) == pytest.approx(scale, abs=1e-6)
    cfg.scaling = 0.25
    assert mla.scaling(cfg) == 0.25


def test_cache_layout_and_registry():
    cfg = CONFIGS["deepseek_v3"]
    cache = mla.init_cache(cfg, 2, 9)
    assert {name: (list(leaf.shape), leaf.dtype) for name, leaf in cache.items()} == {
        "latent": ([2, 9, 8], torch.bfloat16),
        "k_rope": ([2, 9, 4], torch.bfloat16),
        "length": ([2], torch.int32),
    }
    assert torch_ref.get("mla") is mla


def test_bad_inputs_are_named():
    cfg = CONFIGS["deepseek_v3"]
    params, x, cache = init_params(cfg), tokens(cfg), mla.init_cache(cfg, 2, 8, torch.float64)
    with pytest.raises(ValueError, match=r"^x has shape \[2, 7, 9\]; allowed: \[B T D=10\]$"):
        mla.forward(params, cfg, x[..., :9])
    with pytest.raises(ValueError, match=r"^x has shape \[2, 7, 10\]; allowed: \[B T=1 D=10\]$"):
        mla.decode(params, cfg, x, cache)
    with pytest.raises(TypeError, match=r"^positions has dtype torch.float32; allowed: int32, int64$"):
        mla.forward(params, cfg, x, torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"^lengths\[1\] is 8; allowed: 0 to 7, the tokens of x$"):
        mla.prefill(params, cfg, x, cache, int32(7, 8))
    with pytest.raises(ValueError, match=r'^cache\["latent"\] has shape \[2, 8, 9\]; allowed: \[B=2 S latent0=8\]$'):
        mla.prefill(params, cfg, x, cache | {"latent": torch.zeros(2, 8, 9, dtype=torch.float64)})
    with pytest.raises(ValueError, match=r'^cache\["k_rope"\] has shape \[2, 7, 4\]; allowed: \[B=2 S=8 k_rope0=4\]$'):
        mla.decode(params, cfg, x[:, :1], cache | {"k_rope": torch.zeros(2, 7, 4, dtype=torch.float64)})
    with pytest.raises(ValueError, match="^rope_layout is 'neox'; allowed: half, interleaved$"):
        mla.forward(params, config(rope_layout="neox"), x)
