"""torch_ref's layers of DeepSeek-V4: dtypes, what decode hands to the ops, layouts and bad inputs."""

import math

import dense_family as family
import pytest
import torch
from dense_family import close, tokens
from v4_loop import CASES, filled, init_params, spied_ops, v4_config

import torch_ref
from torch_ref.attention import csa, hca, v4_window

# ---- dtypes and ops


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["v4_window", "csa", "hca"])
def test_a_narrow_cache_is_read_as_stored(name, x_dtype):
    att, cfg = CASES[name]
    params, x = init_params(att, cfg, x_dtype), tokens(cfg, new=14, dtype=x_dtype)
    y, prefilled = att.prefill(params, cfg, x, att.init_cache(cfg, 2, 14))
    stepped, decoded = family.fold_decode(att, params, cfg, x, att.init_cache(cfg, 2, 14))
    assert y.dtype == stepped.dtype == x_dtype
    narrow = torch.finfo(torch.bfloat16).eps
    assert (stepped.double() - y.double()).norm() < 4 * narrow * y.double().norm()
    for key, leaf in prefilled.items():
        assert leaf.dtype == (torch.float32 if "state" in key else torch.int32 if key == "length" else torch.bfloat16)
        close(decoded[key].double(), leaf.double(), 1e-5 if "state" in key else 4 * narrow)
    if x_dtype == torch.float32:
        torch.testing.assert_close(stepped, y)
        assert not torch.allclose(y, att.forward(params, cfg, x), rtol=1e-4, atol=1e-4)


def test_decode_hands_the_ops_what_they_need():
    """The sink rides with the window alone, parts are merged in float32, picks are gathered and nothing is masked."""
    for name in ("csa", "hca"):
        att, cfg = CASES[name]
        params = init_params(att, cfg, torch.bfloat16)
        cache, (calls, spied) = filled(att, cfg, params, (13, 7), dtype=torch.bfloat16), spied_ops()
        y, after = att.decode(params, cfg, tokens(cfg, new=1, dtype=torch.bfloat16), cache, spied)
        assert y.dtype == torch.bfloat16
        (args, options, _), *others = calls["decode_attention"]
        assert torch.equal(options["sinks"], params["sinks"]) and args[3].tolist() == [5, 5]
        assert [list(x.shape) for x in args[:3]] == [[2, 1, 4, 7], [2, 5, 1, 7], [2, 5, 1, 7]]
        if att is csa:
            ((q, k, v, picks, lengths), options, _) = calls["decode_block_sparse"][0]
            assert v is None and lengths is None and options["block_size"] == 1 and picks.shape == (2, 1, 1, 2)
            ((q_index, k_index, weights, complete), _, _) = calls["index_scores"][0]
            assert q_index.dtype == k_index.dtype == torch.bfloat16 and weights.dtype == torch.float32
            assert not others
        else:
            ((q, k, v, complete), options, _) = others[0]
        assert k.shape == (2, 4, 1, 7) and complete.tolist() == [3, 2]
        assert "sinks" not in options and options["scale"] == 7**-0.5
        ((outs, lses), _, _) = calls["merge_states"][0]
        assert outs.dtype == lses.dtype == torch.float32 and outs.shape == (2, 2, 1, 4, 7)


def test_index_scores_carry_their_scale():
    att, cfg = CASES["csa"]
    params = init_params(att, cfg)
    cache, x, (calls, spied) = filled(att, cfg, params), tokens(cfg, new=1, seed=5), spied_ops()
    att.decode(params, cfg, x, cache, spied)
    ((_, _, weights, _), _, _) = calls["index_scores"][0]
    close(weights, x @ params["ww_index"] / math.sqrt(8 * 5))


# ---- layout and bad inputs


def test_cache_layout_and_registry():
    ring = {"kv": ([2, 5, 7], torch.bfloat16), "length": ([2], torch.int32)}
    wide = torch.float32
    hca_layout = ring | {
        "c_kv": ([2, 2, 7], torch.bfloat16),
        "state_kv": ([2, 4, 7], wide),
        "state_score": ([2, 4, 7], wide),
    }
    csa_layout = ring | {
        "c_kv": ([2, 2, 7], torch.bfloat16),
        "k_index": ([2, 2, 5], torch.bfloat16),
        "state_kv": ([2, 8, 14], wide),
        "state_score": ([2, 8, 14], wide),
        "index_state_kv": ([2, 8, 10], wide),
        "index_state_score": ([2, 8, 10], wide),
    }
    for name, att, layout in (("v4_window", v4_window, ring), ("hca", hca, hca_layout), ("csa", csa, csa_layout)):
        cache = att.init_cache(v4_config(), 2, 11)
        assert {key: (list(leaf.shape), leaf.dtype) for key, leaf in cache.items()} == layout
        assert torch_ref.get(name) is att
        small = att.init_cache(v4_config(), 2, 3, torch.float64)
        assert small["kv"].shape == (2, 3, 7) and ("c_kv" not in small or small["c_kv"].shape == (2, 1, 7))
        assert all(leaf.dtype == torch.float64 for key, leaf in small.items() if key != "length")


BAD_FIELDS = [
    ({"sliding_window": 0}, ValueError, "^sliding_window is 0; allowed: an int >= 1$"),
    ({"o_groups": 3}, ValueError, "^o_groups is 3; allowed: a divisor of num_attention_heads 4$"),
    ({"qk_rope_head_dim": 3}, ValueError, "^qk_rope_head_dim is 3; allowed: an even number up to head_dim 7$"),
    ({"qk_rope_head_dim": 8}, ValueError, "^qk_rope_head_dim is 8; allowed: an even number up to head_dim 7$"),
    ({"q_lora_rank": None}, TypeError, "^q_lora_rank is a NoneType; allowed: an int >= 1$"),
    ({"compress_rate": 0}, ValueError, "^compress_rate is 0; allowed: an int >= 1$"),
    ({"compress_rate": 4.0}, TypeError, "^compress_rate is a float; allowed: an int >= 1$"),
    ({"index_topk": 0}, ValueError, "^index_topk is 0; allowed: an int >= 1$"),
    ({"index_head_dim": 3}, ValueError, "^index_head_dim is 3; allowed: at least qk_rope_head_dim 4$"),
]


@pytest.mark.parametrize(("fields", "error", "message"), BAD_FIELDS, ids=range(len(BAD_FIELDS)))
def test_bad_fields_are_named(fields, error, message):
    cfg = v4_config()
    params, x, cache = init_params(csa, cfg), tokens(cfg, new=1), csa.init_cache(cfg, 2, 9, torch.float64)
    bad = v4_config(**fields)
    for call in (csa.forward, lambda *args: csa.prefill(*args, cache), lambda *args: csa.decode(*args, cache)):
        with pytest.raises(error, match=message):
            call(params, bad, x)
    with pytest.raises(error, match=message):
        csa.init_cache(bad, 2, 9)


BAD_PARAMS = {
    "sinks": ((1,), r"\[4\]"),
    "wo_a": ((2, 1, 7, 3), r"\[2, 2, 7, 3\]"),
    "c_bias": ((1, 14), r"\[4, 14\]"),
    "c_norm": ((14,), r"\[7\]"),
    "wic_gate": ((10, 5), r"\[10, 10\]"),
    "ww_index": ((10, 1), r"\[10, 8\]"),
}


@pytest.mark.parametrize("name", BAD_PARAMS)
def test_bad_parameters_are_named(name):
    cfg = v4_config()
    shape, allowed = BAD_PARAMS[name]
    params = init_params(csa, cfg) | {name: torch.zeros(shape).double()}
    given = str(list(shape)).replace("[", r"\[")
    with pytest.raises(ValueError, match=rf'^params\["{name}"\] has shape {given}; allowed: {allowed}$'):
        csa.forward(params, cfg, tokens(cfg))


BAD_BUFFERS = [
    ("kv", (2, 6, 7), torch.float64, ValueError, r"has S=6 slots; allowed: at most 5, the window$"),
    ("kv", (2, 5, 6), torch.float64, ValueError, r"has shape \[2, 5, 6\]; allowed: "),
    ("c_kv", (2, 2, 6), torch.float64, ValueError, r"has shape \[2, 2, 6\]; allowed: "),
    ("c_kv", (2, 2, 7), torch.float32, TypeError, r"has dtype torch.float32; allowed: float64$"),
    ("k_index", (2, 3, 5), torch.float64, ValueError, r"has shape \[2, 3, 5\]; allowed: "),
    ("state_kv", (2, 4, 14), torch.float64, ValueError, r"has shape \[2, 4, 14\]; allowed: "),
    ("state_score", (2, 8, 14), torch.bfloat16, TypeError, r"has dtype torch.bfloat16; allowed: float32, float64$"),
    ("index_state_kv", (2, 8, 14), torch.float64, ValueError, r"has shape \[2, 8, 14\]; allowed: "),
    ("length", (2,), torch.int64, TypeError, r"has dtype torch.int64; allowed: int32$"),
]


@pytest.mark.parametrize(("name", "shape", "dtype", "error", "message"), BAD_BUFFERS, ids=range(len(BAD_BUFFERS)))
def test_bad_caches_are_named(name, shape, dtype, error, message):
    cfg = v4_config()
    params, x = init_params(csa, cfg), tokens(cfg, new=1)
    cache = csa.init_cache(cfg, 2, 8, torch.float64) | {name: torch.zeros(shape, dtype=dtype)}
    for call in (csa.prefill, csa.decode):
        with pytest.raises(error, match=rf'^cache\["{name}"\] ' + message):
            call(params, cfg, x, cache)
