"""What the parser refuses, family by family: one line that names the key, its value and the rule."""

import pytest
from families import (
    DSA,
    FULL,
    GLM,
    GPT_OSS,
    HEAVY,
    LINEAR,
    LLAMA,
    M3,
    MINIMAX,
    MLA,
    PERIODIC,
    SHAPE,
    SLIDING,
    SPARSE,
    V4,
    V4_COMPRESS,
    V4_FLAT,
    V4_MAIN,
    V4_NESTED,
    YARN,
    kimi,
    nested,
    sparse,
)

from jforge.hf import layer, layers

LIST = "it must be num_hidden_layers=3 times 'full' or 'shared' .*, 'full' first$"
LONG = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 8}


def of(model_type: str, **keys) -> dict:
    return {"model_type": model_type, **SHAPE, **keys}


def rope(config: dict, **scaling) -> dict:
    return config | {"rope_scaling": scaling}


BAD_VALUES = [
    (LLAMA | {"num_key_value_heads": 3}, "num_attention_heads is 4; it must be a multiple of num_key_value_heads=3"),
    (LLAMA | {"hidden_size": "64"}, "hidden_size is '64'; it must be a positive integer"),
    (LLAMA | {"hidden_size": 66}, "head_dim is None.*hidden_size=66"),
    (rope(LLAMA, type="su", factor=2.0), "rope_type is 'su'; it must be one of default"),
    *(
        (of(m, head_dim=None), "head_dim is None; it must be a positive integer")
        for m in ("qwen3", "gemma2", "gemma3_text", "gpt_oss", "minimax_m2")
    ),
    (rope(LLAMA, type="linear"), "rope_parameters has no factor; rope_type 'linear' needs it"),
    (rope(LLAMA, type="longrope"), "rope_parameters has no short_factor; rope_type 'longrope' needs it"),
    (of("llama", rope_scaling=LONG, original_max_position_embeddings=8), "factors is .*; it must be 3 numbers"),
    (of("laguna", num_attention_heads_per_layer=[4]), "num_attention_heads_per_layer is .*num_hidden_layers=6"),
    (of("llama4_text", attention_chunk_size=0), "attention_chunk_size is 0; it must be a positive integer"),
    (of("mpt", attn_config={"softmax_scale": -1.0}), "softmax_scale is -1.0; it must be a positive number"),
    (of("olmo", clip_qkv=-1.0), "clip_qkv is -1.0; it must be a positive number"),
    (rope(LLAMA, type="yarn", factor=2.0, attention_factor=0), "attention_factor is 0; it must be a"),
    (LLAMA | {"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be an object or null"),
    (LLAMA | {"rope_parameters": {SLIDING: {}}}, "rope_parameters has no entry for full_attention"),
    (LLAMA | {"rope_parameters": {FULL: 3}}, "full_attention is 3; it must be an object"),
    (LLAMA | {"layer_types": [FULL]}, "layer_types is .*num_hidden_layers=6"),
    (LLAMA | {"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a positive integer"),
    (LLAMA | {"model_type": "minimax_m2", "head_dim": 16, "rotary_dim": "64"}, "rotary_dim is '64'"),
    (LLAMA | {"model_type": "gemma2", "query_pre_attn_scalar": 0, "layer_types": [FULL] * 6}, "query_pre"),
    # windows
    (of("mistral", sliding_window=0), "sliding_window is 0; it must be a positive integer"),
    (of("mistral", sliding_window="4096"), "sliding_window is '4096'; it must be a positive integer"),
    (of("mistral", sliding_window=True), "sliding_window is True; it must be a positive integer"),
    (of("mistral", sliding_window=None, layer_types=[SLIDING] * 6), "config has no sliding_window$"),
    (of("gemma2", sliding_window=None), "config has no sliding_window$"),
    (of("gemma2", sliding_window=-1), "sliding_window is -1; it must be a positive integer"),
    (of("gemma3_text", sliding_window=4.0), "sliding_window is 4.0; it must be a positive integer"),
    (of("gemma3_text", sliding_window_pattern=0), "sliding_window_pattern is 0; it must be a pos"),
    (GPT_OSS | {"sliding_window": None}, "config has no sliding_window$"),
    (GPT_OSS | {"sliding_window": 0}, "sliding_window is 0; it must be a positive integer"),
    (GPT_OSS | {"layer_types": [FULL]}, "layer_types is .*num_hidden_layers=6"),
    (GPT_OSS | {"num_key_value_heads": 3}, "num_attention_heads is 4; it must be a multiple of"),
    (of("qwen3", layer_types=[FULL, SLIDING] * 3), "use_sliding_window is None; it must be true in"),
    (of("qwen2", **QWEN_WINDOW | {"sliding_window": 0}, max_window_layers=0), "sliding_window is 0; it must be a pos"),
    (
        of("qwen2", **QWEN_WINDOW, max_window_layers="4"),
        "max_window_layers is '4'; it must be an integer of at least 0",
    ),
    (of("qwen3", **QWEN_WINDOW, max_window_layers=-1), "max_window_layers is -1; it must be an integer of at least 0"),
    # latent
    (MLA | {"num_key_value_heads": 1}, "num_key_value_heads is 1; it must be num_attention_heads=2"),
    (MLA | {"q_lora_rank": 0}, "q_lora_rank is 0; it must be a positive integer"),
    (MLA | {"kv_lora_rank": "512"}, "kv_lora_rank is '512'; it must be a positive integer"),
    (MLA | {"v_head_dim": -1}, "v_head_dim is -1; it must be a positive integer"),
    (MLA | {"qk_rope_head_dim": 3}, "partial_rotary_factor is 1.0; .* of the 3 channels"),
    (rope(MLA, type="yarn", **YARN, mscale="1"), "mscale is '1'; it must be a positive number"),
    (rope(MLA, type="yarn", **YARN, mscale_all_dim=-1.0), "mscale_all_dim is -1.0"),
    (rope(MLA, type="yarn"), "rope_parameters has no factor; rope_type 'yarn' needs it"),
    (kimi(), "config has neither layer_types nor linear_attn_config"),
    (kimi(full_attn_layers=[1, 2]), "config has no kda_layers"),
    (kimi(full_attn_layers=2, kda_layers=[1]), "full_attn_layers is 2; it must be a list of layers"),
    (kimi(full_attn_layers=[1], kda_layers=[3]), "layer 1 is in neither of full_attn_layers and kda_layers, as 2"),
    (kimi(full_attn_layers=[1], kda_layers=[1, 2]), "layer 0 is in both of full_attn_layers and kda_layers, as 1"),
    (kimi() | {"layer_types": [FULL]}, "layer_types is .*num_hidden_layers=2"),
    (DSA | {"index_topk": 0}, "index_topk is 0; it must be a positive integer"),
    (DSA | {"index_n_heads": "8"}, "index_n_heads is '8'; it must be a positive integer"),
    (DSA | {"index_head_dim": 3}, "index_head_dim is 3; it must be at least qk_rope_head_dim=4"),
    (DSA | {"q_lora_rank": None}, "q_lora_rank is None; it must be a positive integer"),
    (DSA | {"num_key_value_heads": 1}, "num_key_value_heads is 1; it must be num_attention_heads=2"),
    (MLA | {"layer_types": ["indexed_attention"] * 2}, "config has no index_topk"),
    (GLM | {"indexer_types": ["full"]}, rf"indexer_types is \['full'\]; {LIST}"),
    (GLM | {"indexer_types": ["shared"] * 3}, rf"indexer_types is .*; {LIST}"),
    (GLM | {"indexer_types": ["full", {}, 1]}, rf"indexer_types is .*; {LIST}"),
    (PERIODIC | {"index_topk_pattern": "FXF"}, f"index_topk_pattern is 'FXF'; {LIST}"),
    (PERIODIC | {"index_topk_pattern": 3}, f"index_topk_pattern is 3; {LIST}"),
    (PERIODIC | {"index_topk_freq": -1}, "index_topk_freq is -1; it must be a"),
    # MiniMax
    (of("minimax"), "config has neither attn_type_list nor layer_types; one"),
    (of("minimax_m3_vl"), "config has neither layer_types nor sparse_atten"),
    (MINIMAX | {"attn_type_list": [0, 2]}, r"attn_type_list is \[0, 2\]; it must be a list of 0 "),
    (MINIMAX | {"attn_type_list": [0]}, r"attn_type_list is \[0\]; it must be .*num_hidden_la"),
    (MINIMAX | {"rotary_dim": "4"}, "rotary_dim is '4'; it must be a positive integer"),
    (MINIMAX | {"rotary_dim": 8}, r"partial_rotary_factor is 1.333.*; it must be in \(0, 1\]"),
    (MINIMAX | {"head_dim": None, "hidden_size": 3, "attn_type_list": [1, 1]}, "head_dim is None; it must be given: h"),
    (MINIMAX | {"block_size": 0}, "block_size is 0; it must be a positive integer"),
    (sparse(sparse_attention_freq=[1]), r"sparse_attention_freq is \[1\]; it must be a list of"),
    (sparse(sparse_num_index_heads=4), "index_n_heads is 4; it must be num_key_value_heads=2"),
    (sparse(sparse_topk_blocks=1), "index_topk_blocks is 1; it must be at least index_init_bl"),
    (sparse(sparse_block_size=0), "sparse_block_size is 0; it must be a positive integer"),
    (M3 | {"sparse_attention_config": 3}, "sparse_attention_config is 3; it must be an object"),
    # DeepSeek-V4
    (V4 | {"compress_ratios": [0, 4]}, r"compress_ratios is \[0, 4\]; it must be .*num_hidden_layers=3"),
    (V4 | {"compress_ratios": 4}, "compress_ratios is 4; it must be a list of num_hidden_layers=3 entries"),
    (V4 | {"layer_types": [SPARSE, SPARSE, HEAVY]}, f"layer_types is .*; it must be {SLIDING} in layer 0, as"),
    (V4 | {"layer_types": [SLIDING]}, "layer_types is .*num_hidden_layers=3"),
    (V4 | {"compress_rates": {SPARSE: 2}}, f"compress_ratios is 4; it must be 2 in layer 1, as .* {SPARSE}"),
    (V4 | {"compress_rate_hca": 64}, "compress_ratios is 128; it must be 64 in layer 2"),
    (V4_NESTED | {"compress_rates": {SPARSE: 2}}, f"compress_rates has no entry for {HEAVY}"),
    (V4_NESTED | {"compress_rates": {SPARSE: 0}}, f"{SPARSE} is 0; it must be a positive integer"),
    (V4_NESTED | {"compress_rates": 4}, "compress_rates is 4; it must be an object or null"),
    (V4_NESTED | {"compress_rate_csa": "4"}, "compress_rate_csa is '4'; it must be a positive integer"),
    (V4 | {"num_key_value_heads": 4}, "num_key_value_heads is 4; it must be 1, since all heads share one"),
    (V4 | {"sliding_window": None}, "config has no sliding_window"),
    (V4 | {"q_lora_rank": 0}, "q_lora_rank is 0; it must be a positive integer"),
    (V4 | {"o_groups": 3}, "num_attention_heads is 4; it must be a multiple of o_groups=3"),
    (V4 | {"index_head_dim": 2}, "index_head_dim is 2; it must be at least qk_rope_head_dim=4"),
    (V4 | {"index_topk": -1}, "index_topk is -1; it must be a positive integer"),
    (V4 | {"rms_norm_eps": 0}, "rms_norm_eps is 0; it must be a positive number"),
    (V4 | {"qk_rope_head_dim": 3}, "qk_rope_head_dim is 3; it must be even and at most head_dim=8"),
    (V4 | {"qk_rope_head_dim": 10}, "qk_rope_head_dim is 10; it must be even and at most head_dim=8"),
    (V4 | {"partial_rotary_factor": 0.75}, "qk_rope_head_dim is 4; it must be 6, partial_rotary_factor=0.75"),
    (V4 | {"partial_rotary_factor": "1"}, "partial_rotary_factor is '1'; it must be a positive number"),
    (V4 | {"rope_theta": 0}, "rope_theta is 0; it must be a positive number"),
    (V4 | {"compress_rope_theta": "1e5"}, "compress_rope_theta is '1e5'; it must be a positive number"),
    (rope(V4_FLAT, type="yarn"), "rope_parameters has no factor; rope_type 'yarn' needs it"),
    (rope(V4_FLAT, type="su"), "rope_type is 'su'; it must be one of default"),
    (rope(V4_FLAT, type="yarn", **YARN, attention_factor=1.2), "attention_factor is 1.2; it"),
    (V4_FLAT | {"rope_scaling": 4}, "rope_scaling is 4; it must be an object or null"),
    (V4 | {"rope_parameters": {"rope_theta": 5e4}}, "rope_theta in rope_parameters is 50000.0; it must be 1"),
    (V4 | {"rope_parameters": {"partial_rotary_factor": 1.0}}, "partial_rotary_factor in rope_parameters is"),
    (V4_NESTED | {"rope_parameters": {"main": V4_MAIN}}, "rope_parameters has no entry for compress"),
    (V4_NESTED | {"rope_parameters": {"main": 3, "compress": V4_COMPRESS}}, "main is 3; it must be an object or null"),
    (nested(main={"partial_rotary_factor": None}), "rope_parameters.main has no partial_rotary_factor: transf"),
    (nested(compress={"rope_theta": None}), "rope_parameters.compress has no rope_theta: transformers would"),
    (nested(compress={"factor": "4"}), "factor is '4'; it must be a positive number"),
    (nested(compress={"attention_factor": None}), "rope_parameters.compress has no attention_factor: transformers w"),
]
NO_MECHANISM = [
    *((rope(config, type="dynamic", factor=2.0), "rope_type is 'dynamic': it scales the keys of old tokens again")
      for config in (LLAMA, MLA, V4_FLAT)),
    (rope(LLAMA, type="proportional", factor=2.0), "factor is 2.0: only 1 has a mechanism"),
    (LLAMA | {"model_type": "t5"}, "model_type 't5' is not known; known are afmoe, .*deepseek_v2, .*qwen3_next"),
    (LLAMA | {"model_type": "diffllama"}, "layer 0 of diffllama is full_attention: differential attention"),
    (LLAMA | {"model_type": "bert"}, "is_decoder is false: attention that is not causal"),
    (LLAMA | {"model_type": "roformer", "is_decoder": True, "rotary_value": True}, "rotary_value is true"),
    (of("gemma", use_bidirectional_attention=True), "use_bidirectional_attention is set"),
    (of("bert", is_decoder=True, position_embedding_type="relative_key"), "position_embedding_type is 'relative_key'"),
    (of("hunyuan_v1_moe", use_cla=True), "use_cla is True: only False is known"),
    (of("mpt", attn_config={"alibi": False}), "alibi is False: only True has a mechanism"),
    (of("mpt", attn_config={"qk_ln": True}), "qk_ln is True: only False has a mechanism"),
    (of("dbrx", attn_config={"rope_theta": 5e5}), "rope_theta is 500000.0 in attn_config and 10000.0 in transformers"),
    (of("phimoe", rope_scaling=LONG), "rope_type is 'longrope': transformers' phimoe never takes its long factors"),
    (V4 | {"model_type": "deepseek_v41"}, "model_type 'deepseek_v41' is not known"),
    (LLAMA | {"layer_types": [FULL] * 5 + [SLIDING]},
     "layer 5 of llama is sliding_attention; only its full_attention layers have a mechanism$"),
    (of("falcon", alibi=True), "alibi is true: falcon with ALiBi"),
    (of("gemma3_text", use_bidirectional_attention=True), "use_bidirectional_attention is set: .* not causal"),
    (of("gemma3_text", attn_logit_softcapping=50.0), "attn_logit_softcapping"),
    (of("qwen3_next", attention_bias=True, layer_types=[FULL] * 6), "attention_bias"),
    (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (MLA | {"model_type": "deepseek_v2", "index_topk": 2048}, "layer 0 of deepseek_v2 is indexed_attention"),
    (MLA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is given"),
    (kimi(full_attn_layers=[2], kda_layers=[1]) | {"hidden_act": "gelu"}, "hidden_act is 'gelu': only"),
    (kimi(full_attn_layers=[2], kda_layers=[1]) | {"model_type": "bailing_hybrid", "layer_types": [FULL, LINEAR]},
     "layer 0 of bailing_hybrid is full_attention: its latent layers have a gate for each head"),
    (kimi(full_attn_layers=[1], kda_layers=[2]) | {"mla_use_nope": False}, "mla_use_nope is false"),
    (kimi(full_attn_layers=[1], kda_layers=[2]) | {"mla_use_output_gate": True}, "mla_use_output_gate is true"),
    (DSA | {"index_topk_freq": 4}, "index_topk_freq is 4: only 1 is known"),
    (DSA | {"index_topk_pattern": "FSF"}, "index_topk_pattern is 'FSF': only None is known"),
    (DSA | {"indexer_types": ["full"] * 3}, r"indexer_types is \['full', .*: only None"),
    (DSA | {"indexer_rope_interleave": True}, "indexer_rope_interleave is True: only False"),
    (DSA | {"rope_interleave": False}, "rope_interleave is False: only True has a mech"),
    (DSA | {"layer_types": [FULL] * 3}, "layer 0 of deepseek_v32 is full_atten"),
    (GLM | {"indexer_rope_interleave": False}, "indexer_rope_interleave is False: only"),
    (MINIMAX | {"sliding_window": 8}, "sliding_window is 8: only None is known"),
    (MINIMAX | {"hidden_act": "gelu"}, "hidden_act is 'gelu': only 'silu' has a mech"),
    (MINIMAX | {"num_attention_heads": 6}, "num_attention_heads is 6: for a number that is no power of two"),
    (sparse(sparse_score_type="mean"), "sparse_score_type is 'mean': only 'max' has"),
    (sparse(sparse_disable_index_value=[0, 0]), "layer 1 has index values, as sparse_dis"),
    (M3 | {"qk_norm_type": "flat"}, "qk_norm_type is 'flat': only 'per_head' has a mech"),
    (M3 | {"use_gemma_norm": False}, "use_gemma_norm is False: only True has a mechanism"),
    (V4 | {"compress_ratios": [0, 2, 1]}, "compress_ratios has 2 for layer 1; only 0 .* have a mechanism"),
    (V4 | {"compress_ratios": [0, True, 4]}, "compress_ratios has True for layer 1; only 0 "),
    (V4 | {"compress_ratios": [0, [4], 4]}, r"compress_ratios has \[4\] for layer 1; only 0 "),
    (V4 | {"attention_bias": True}, "attention_bias is True: only False has a mechanism"),
    (V4_NESTED | {"layer_types": [SLIDING, FULL, HEAVY]}, "layer 1 of deepseek_v4 is full_attention; only"),
]  # fmt: skip


@pytest.mark.parametrize("config, message", BAD_VALUES)
def test_bad_values(config, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        layers(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config, message", NO_MECHANISM)
def test_what_has_no_mechanism(config, message):
    with pytest.raises(NotImplementedError, match=f"^{message}") as error:
        layers(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["model_type", "hidden_size", "num_attention_heads", "num_hidden_layers"])
@pytest.mark.parametrize("config", [LLAMA, MLA], ids=["llama", "deepseek_v3"])
def test_required_keys(config, key):
    with pytest.raises(ValueError, match=f"^config has no {key}$"):
        layers({k: v for k, v in config.items() if k != key})


@pytest.mark.parametrize("index", [-1, 6, True])
def test_layer_outside_the_model(index):
    with pytest.raises(ValueError, match=r"layer is .*; it must be in 0..5"):
        layer(LLAMA, index)


def test_config_of_another_type():
    with pytest.raises(TypeError, match="config is a list"):
        layers([LLAMA])
