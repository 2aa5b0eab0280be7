"""What caches of torch_ref's mechanisms look like, and what each mechanism says of bad input."""

import pytest
import torch
from dense_family import int32, tokens
from mechanisms import CASES, FIRST

LAYOUTS = {  # of 2 rows and a capacity of 11: {buffer: shape}, "w" behind those that are float32 or wider
    "gqa:plain": {"k": (11, 2, 6), "v": (11, 2, 5)},
    "sliding_window:plain": {"k": (5, 2, 6), "v": (5, 2, 5)},
    "chunked_local:plain": {"k": (5, 2, 6), "v": (5, 2, 5)},
    "sinks:None_plain": {"k": (11, 2, 6), "v": (11, 2, 5)},
    "sinks:5_plain": {"k": (5, 2, 6), "v": (5, 2, 5)},
    "streaming:plain": {"k": (7, 2, 6), "v": (7, 2, 5)},
    "moba:plain": {"k": (11, 2, 6), "v": (11, 2, 5), "k_mean w": (3, 2, 6), "k_sum w": (2, 6)},
    "msa:plain": {"k": (11, 2, 6), "v": (11, 2, 5), "k_index": (11, 7)},
    "mla:deepseek_v3": {"latent": (11, 8), "k_rope": (11, 4)},
    "dsa:glm_5": {"latent": (11, 8), "k_rope": (11, 4), "k_index": (11, 6)},
    "dsa:quantised": {"latent": (11, 8), "k_rope": (11, 4), "k_index": (11, 8), "k_index_scale w": (11,)},
    "v4_window": {"kv": (5, 7)},
    "hca": {"kv": (5, 7), "c_kv": (2, 7), "state_kv w": (4, 7), "state_score w": (4, 7)},
    "csa": {
        **{"kv": (5, 7), "c_kv": (2, 7), "k_index": (2, 5), "state_kv w": (8, 14), "state_score w": (8, 14)},
        **{"index_state_kv w": (8, 10), "index_state_score w": (8, 10)},
    },
    "lightning:plain": {"state w": (4, 3, 3)},
    "gated_deltanet:plain": {"state w": (6, 3, 5), "conv": (3, 42)},
    "kda:plain": {"state w": (3, 5, 5), "conv": (3, 45)},
    "mamba2:plain": {"state w": (6, 5, 3), "conv": (3, 38)},
    "mamba1:plain": {"state w": (7, 3, 1), "conv": (3, 7)},
    "short_conv:plain": {"conv": (2, 10)},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_cache_layout(name):
    att, cfg, *_ = CASES[name]
    wanted = {"length": ((2,), torch.int32)}
    for key, shape in LAYOUTS[name].items():
        buffer, *wide = key.split()
        wanted[buffer] = ((2, *shape), torch.float32 if wide else torch.bfloat16)
    if name == "dsa:quantised":
        wanted["k_index"] = (wanted["k_index"][0], torch.float8_e4m3fn)
    cache = att.init_cache(cfg, 2, 11)
    assert {buffer: (tuple(leaf.shape), leaf.dtype) for buffer, leaf in cache.items()} == wanted


def refused(message, error, call, *args):
    with pytest.raises(error, match=message):
        call(*args)


@pytest.mark.parametrize("case", FIRST.values(), ids=FIRST)
def test_bad_tokens_positions_and_lengths_are_named(case):
    att, cfg, params, *_ = case
    x, cache = tokens(cfg), att.init_cache(cfg, 2, 8, torch.float64)
    shape = r"^x has shape \[2, 7, 9\]; allowed: \[B T D=10\]$"
    refused(shape, ValueError, att.forward, params, cfg, x[..., :9])
    refused(shape, ValueError, att.prefill, params, cfg, x[..., :9], cache)
    for count in (0, 17):
        message = rf"^x has shape \[2, {count}, 10\]; allowed: \[B T D\], T from 1 to 16$"
        refused(message, ValueError, att.decode, params, cfg, x.new_zeros(2, count, 10), cache)
    message = r"^positions has dtype torch.float32; allowed: int32, int64$"
    refused(message, TypeError, att.forward, params, cfg, x, torch.zeros(2, 7))
    message = r"^lengths\[1\] is 8; allowed: 0 to 7, the tokens of x$"
    refused(message, ValueError, att.prefill, params, cfg, x, cache, int32(7, 8))


FREE = ("k", "latent", "kv", "c_kv", "length")  # whose slots say how many tokens the cache is for
ANY = (*FREE, "conv")  # of any dtype
WIDE = ("k_mean", "state_kv", "state_score", "index_state_kv", "index_state_score", "state")  # float32 or float64


@pytest.mark.parametrize("name", [*LAYOUTS, "nsa:mlp_separate"])
def test_bad_caches_are_named(name):
    att, cfg, params, *_ = CASES[name]
    x, cache = tokens(cfg, new=1), att.init_cache(cfg, 2, 8, torch.float64)
    for buffer, leaf in cache.items():
        bad = {"shape": [leaf[:1]], "dtype": [leaf.to(torch.int16)]}
        if buffer != "length":
            bad["shape"] += [leaf[..., :-1]] + ([] if buffer in FREE else [leaf[:, 1:]])
            bad["dtype"] += [leaf.bfloat16()] if buffer in WIDE else [] if buffer in ANY else [leaf.float().half()]
        for what, leaves in bad.items():
            for wrong in leaves:
                error = ValueError if what == "shape" else TypeError
                for call in (att.prefill, att.decode):
                    refused(rf'^cache\["{buffer}"\] has {what}', error, call, params, cfg, x, cache | {buffer: wrong})


F64, BF16 = torch.float64, torch.bfloat16
CACHES = [  # (case, buffer, its shape and dtype, the error, the rest of the message)
    ("gqa:plain", "v", (2, 8, 2, 4), F64, ValueError, r"has shape \[2, 8, 2, 4\]; allowed: \[B=2 S=8 v0=2 v1=5\]$"),
    ("streaming:plain", "v", (2, 1, 2, 5), F64, ValueError, r"has shape \[2, 1, 2, 5\]; allowed: \[B=2 S=7 "),
    ("streaming:plain", "v", (2, 7, 2, 5), BF16, TypeError, "has dtype torch.bfloat16; allowed: float64$"),
    ("chunked_local:plain", "v", (2, 4, 2, 5), F64, ValueError, r".* allowed: \[B=2 S=5 v0=2 v1=5\]$"),
    ("moba:plain", "k_mean", (2, 1, 2, 6), F64, ValueError, r"has shape \[2, 1, 2, 6\]; allowed: \[B=2 S=2 K=2 H=6\]$"),
    ("moba:plain", "k_mean", (2, 2, 2, 6), BF16, TypeError, "has dtype torch.bfloat16; allowed: float32, float64$"),
    ("dsa:glm_5", "k_index", (2, 7, 6), F64, ValueError, r"has shape \[2, 7, 6\]; allowed: \[B=2 S=8 J=6\]$"),
    ("nsa:plain", "k_cmp", (2, 2, 2, 6), F64, ValueError, r"has shape \[2, 2, 2, 6\]; allowed: \[B=2 S=3 K=2 H=6\]$"),
    ("v4_window", "kv", (2, 6, 7), F64, ValueError, "has S=6 slots; allowed: at most 5, the window$"),
    ("csa", "length", (2,), torch.int64, TypeError, "has dtype torch.int64; allowed: int32$"),
    ("lightning:plain", "state", (2, 4, 3, 2), F64, ValueError, r".* allowed: \[B=2 N=4 H=3 V=3\]$"),
    ("gated_deltanet:plain", "state", (2, 6, 5, 3), F64, ValueError, r".* allowed: \[B=2 N=6 H=3 V=5\]$"),
    ("mamba2:plain", "state", (2, 6, 5, 3), BF16, TypeError, "has dtype torch.bfloat16; allowed: float32, float64$"),
    ("kda:plain", "conv", (2, 4, 45), F64, ValueError, r"has shape \[2, 4, 45\]; allowed: \[B=2 S=3 X=45\]$"),
    ("short_conv:plain", "conv", (2, 3, 10), F64, ValueError, r"has shape \[2, 3, 10\]; allowed: \[B=2 S=2 X=10\]$"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "buffer", "shape", "dtype", "error", "message"), CACHES)
def test_the_cache_that_is_allowed_is_told(name, buffer, shape, dtype, error, message):
    att, cfg, params, *_ = CASES[name]
    cache = att.init_cache(cfg, 2, 8, torch.float64) | {buffer: torch.zeros(shape, dtype=dtype)}
    refused(rf'^cache\["{buffer}"\] {message}', error, att.prefill, params, cfg, tokens(cfg), cache)


STATES = (
    *("gated_deltanet:plain", "kda:plain", "kda:one_matrix", "mamba2:norm_first", "mamba1:jamba", "mamba1:falcon"),
    "short_conv:biases",
)
CHECKED = {  # the parameters whose shape would broadcast, or is none of an einsum's business
    "sinks:5_plain": ["sinks"],
    "gqa:gated": ["q_norm", "k_norm"],
    "msa:plain": ["wq_index", "wk_index", "q_index_norm", "k_index_norm"],
    "dsa:glm_5": ["wq_index", "wk_index", "ww_index", "k_index_norm", "k_index_bias"],
    "nsa:plain": ["wgate", "k_pe", "v_pe", "phi_k_in", "phi_v_in", "phi_k_out", "phi_v_out"],
    "nsa:weighted": ["phi_k", "phi_v"],
    "nsa:linear": ["phi_k", "phi_v"],
    **{name: list(CASES[name].params) for name in ("v4_window", "csa", "hca", "lightning:plain")},
    **{name: list(CASES[name].params) for name in STATES},
}


@pytest.mark.parametrize("name", CHECKED)
def test_bad_parameters_are_named(name):
    att, cfg, params, *_ = CASES[name]
    for key in CHECKED[name]:
        for wrong in (params[key][:1], params[key][None]):
            given, allowed = (str(list(z.shape)).replace("[", r"\[") for z in (wrong, params[key]))
            message = rf'^params\["{key}"\] has shape {given}; allowed: {allowed}$'
            refused(message, ValueError, att.forward, params | {key: wrong}, cfg, tokens(cfg))


INT, NONE, FLOAT = (
    "is {}; allowed: an int >= {}$",
    "is a NoneType; allowed: an int >= {}$",
    "is a float; allowed: an int",
)
FIELDS = [  # (case, a field, its value, the error, the rest of the message)
    ("gqa:gated", "qk_norm", "layer", ValueError, "is 'layer'; allowed: None, head, flat, heads$"),
    ("gqa:gated", "qk_norm_type", "batch", ValueError, "is 'batch'; allowed: rms, layer$"),
    ("gqa:gated", "qk_norm_bias", True, ValueError, "is True; allowed: True with qk_norm_type 'layer'$"),
    ("gqa:gated", "output_gate_type", "silu", ValueError, "is 'silu'; allowed: sigmoid, softplus$"),
    ("gqa:plain", "clip_qkv", 0.0, ValueError, "is 0.0; allowed: a number > 0$"),
    ("gqa:plain", "clip_qkv", "8", TypeError, "is a str; allowed: a number from"),
    ("gqa:plain", "attn_scale", True, TypeError, "is a bool; allowed: a number from"),
    ("gqa:plain", "floor_scale", -1, ValueError, "is -1; allowed: a number > 0$"),
    ("chunked_local:plain", "attention_chunk_size", 0, ValueError, INT.format(0, 1)),
    ("chunked_local:plain", "attention_chunk_size", None, TypeError, NONE.format(1)),
    ("streaming:plain", "alibi", True, ValueError, "is True; allowed: False, because sinks are met at another"),
    ("streaming:plain", "qk_norm_after_rope", True, ValueError, "is True; allowed: False, because sinks are met at"),
    *((f"{name}:plain", "alibi", True, ValueError, "is True; allowed: False, because the op over blocks knows no")
      for name in ("block_sparse", "moba", "nsa", "msa")),
    ("nsa:plain", "qk_norm_after_rope", True, ValueError, "is True; allowed: False, because keys are compressed"),
    ("sliding_window:plain", "sliding_window", 0, ValueError, INT.format(0, 1)),
    ("sliding_window:plain", "sliding_window", None, TypeError, NONE.format(1)),
    ("sinks:5_plain", "sliding_window", -1, ValueError, INT.format(-1, 1)),
    ("streaming:plain", "start_size", 0, ValueError, INT.format(0, 1)),
    ("streaming:plain", "recent_size", 2.0, TypeError, FLOAT),
    ("block_sparse:plain", "block_size", 0, ValueError, INT.format(0, 1)),
    ("block_sparse:plain", "num_local_blocks", 0, ValueError, INT.format(0, 1)),
    ("block_sparse:plain", "num_global_blocks", -1, ValueError, INT.format(-1, 0)),
    ("block_sparse:plain", "num_random_blocks", None, TypeError, NONE.format(0)),
    ("block_sparse:plain", "vert_stride", 0, ValueError, INT.format(0, 1)),
    ("block_sparse:plain", "seed", -1, ValueError, INT.format(-1, 0)),
    ("moba:plain", "moba_chunk_size", 0, ValueError, INT.format(0, 1)),
    ("moba:plain", "moba_topk", True, TypeError, "is a bool; allowed: an int >= 1$"),
    ("nsa:plain", "kernel_size", 0, ValueError, INT.format(0, 1)),
    ("nsa:plain", "kernel_size", 5, ValueError, "is 5; allowed: a multiple of kernel_stride 2$"),
    ("nsa:plain", "block_size", 7, ValueError, "is 7; allowed: a multiple of kernel_stride 2$"),
    ("nsa:plain", "kernel_size", 8, ValueError, "is 8; allowed: at most block_size 6$"),
    ("nsa:plain", "topk", 0, ValueError, INT.format(0, 1)),
    ("nsa:plain", "init_blocks", -1, ValueError, INT.format(-1, 0)),
    ("nsa:plain", "local_blocks", None, TypeError, NONE.format(0)),
    ("nsa:plain", "window_size", 0, ValueError, INT.format(0, 1)),
    ("nsa:plain", "compress", "max", ValueError, "is 'max'; allowed: mean, weighted, linear, mlp$"),
    ("msa:plain", "index_head_dim", 0, ValueError, INT.format(0, 1)),
    ("msa:plain", "index_head_dim", 5, ValueError, "is 5; allowed: >= 6, the channels RoPE turns$"),
    ("msa:plain", "index_block_size", 0, ValueError, INT.format(0, 1)),
    ("msa:plain", "index_topk_blocks", 0, ValueError, INT.format(0, 1)),
    ("msa:plain", "index_topk_blocks", 2.0, TypeError, FLOAT),
    ("msa:plain", "index_local_blocks", 0, ValueError, INT.format(0, 1)),
    ("msa:plain", "index_init_blocks", -1, ValueError, INT.format(-1, 0)),
    ("dsa:glm_5", "q_lora_rank", None, ValueError, "is None; allowed: an int >= 1"),
    ("dsa:glm_5", "index_topk", 0, ValueError, INT.format(0, 1)),
    ("dsa:glm_5", "index_topk", 2.0, TypeError, FLOAT),
    ("dsa:glm_5", "index_n_heads", 0, ValueError, INT.format(0, 1)),
    ("dsa:glm_5", "index_head_dim", 3, ValueError, "is 3; allowed: at least qk_rope_head_dim 4$"),
    ("dsa:glm_5", "index_rope_layout", "neox", ValueError, "is 'neox'; allowed: half, interleaved$"),
    ("v4_window", "sliding_window", 0, ValueError, INT.format(0, 1)),
    ("v4_window", "o_groups", 3, ValueError, "is 3; allowed: a divisor of num_attention_heads 4$"),
    ("v4_window", "qk_rope_head_dim", 3, ValueError, "is 3; allowed: an even number up to head_dim 7$"),
    ("v4_window", "qk_rope_head_dim", 8, ValueError, "is 8; allowed: an even number up to head_dim 7$"),
    ("v4_window", "q_lora_rank", None, TypeError, NONE.format(1)),
    ("hca", "compress_rate", 0, ValueError, INT.format(0, 1)),
    ("csa", "compress_rate", 4.0, TypeError, FLOAT),
    ("csa", "index_topk", 0, ValueError, INT.format(0, 1)),
    ("csa", "index_head_dim", 3, ValueError, "is 3; allowed: at least qk_rope_head_dim 4$"),
    ("lightning:plain", "layer_index", 6, ValueError, "is 6; allowed: 0 to 5, one of the 6 layers of num"),
    ("lightning:plain", "layer_index", -1, ValueError, INT.format(-1, 0)),
    ("lightning:plain", "layer_index", None, TypeError, NONE.format(0)),
    ("lightning:plain", "num_hidden_layers", 0, ValueError, INT.format(0, 1)),
    ("lightning:plain", "block_size", 0, ValueError, INT.format(0, 1)),
    ("lightning:plain", "num_attention_heads", 0, ValueError, INT.format(0, 1)),
    ("lightning:plain", "head_dim", 0, ValueError, INT.format(0, 1)),
    ("gated_deltanet:plain", "linear_num_value_heads", 5, ValueError, "is 5; allowed: a multiple of linear_num_key_"),
    ("gated_deltanet:plain", "linear_num_key_heads", 0, ValueError, INT.format(0, 1)),
    ("gated_deltanet:plain", "linear_conv_kernel_dim", 0, ValueError, INT.format(0, 1)),
    ("gated_deltanet:plain", "block_size", 0, ValueError, INT.format(0, 1)),
    ("gated_deltanet:plain", "output_gate_type", "tanh", ValueError, "is 'tanh'; allowed: silu, sigmoid$"),
    ("kda:plain", "linear_num_heads", None, TypeError, NONE.format(1)),
    ("kda:plain", "block_size", 2.0, TypeError, FLOAT),
    ("kda:plain", "linear_lower_bound", 0.0, ValueError, "is 0.0; allowed: None, or a number < 0$"),
    ("kda:plain", "linear_lower_bound", "-5", TypeError, "is a str; allowed: a number"),
    ("mamba2:plain", "norm", "rms", ValueError, "is 'rms'; allowed: None, gate_first, norm_first$"),
    ("mamba2:plain", "time_step_limit", (0.5, 0.1), ValueError, r"is \(0.5, 0.1\); allowed: low <= high$"),
    ("mamba2:plain", "time_step_limit", (0.5,), ValueError, r"is \(0.5,\); allowed: a pair \(low, high\)$"),
    ("mamba2:plain", "time_step_limit", (-1.0, 2.0), ValueError, "is -1.0; allowed: a number from 0 to inf$"),
    ("mamba2:plain", "time_step_limit", (0.0, None), TypeError, "is a NoneType; allowed: a number from 0 to inf$"),
    ("mamba2:plain", "num_heads", 5, ValueError, "is 5; allowed: a multiple of n_groups 2$"),
    ("mamba2:plain", "state_size", 0, ValueError, INT.format(0, 1)),
    ("mamba1:plain", "norm", "rms", ValueError, "is 'rms'; allowed: None, plain, weighted$"),
    ("mamba1:plain", "time_step_rank", "auto", TypeError, "is a str; allowed: an int >= 1$"),
    ("mamba1:plain", "block_size", 0, ValueError, INT.format(0, 1)),
    ("short_conv:plain", "conv_L_cache", 0, ValueError, INT.format(0, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "field", "value", "error", "message"), FIELDS)
def test_bad_fields_are_named(name, field, value, error, message):
    att, cfg, params, *_ = CASES[name]
    bad, x, cache = (
        type(cfg)(**vars(cfg) | {field: value}),
        tokens(cfg, new=1),
        att.init_cache(cfg, 2, 9, torch.float64),
    )
    calls = [(att.forward, params, bad, x), (att.prefill, params, bad, x, cache), (att.decode, params, bad, x, cache)]
    if not name.startswith(("gqa", "dsa")):  # where only those who use the field look at it
        calls.append((att.init_cache, bad, 2, 9))
    for call in calls:
        refused(f"^{field} {message}", error, *call)
