"""Tiny models of the dense families beyond those of tiny_configs: (model_type, keys, mechanism, layers, ...), the
arguments of its `Model`.

Sizes are those of tiny_configs. What a class does not have, `head_dim` of GPT-2, is left out by `...`.
"""

WINDOW, CHUNK = 4, 4
SLIDING, FULL, CHUNKED = "sliding_attention", "full_attention", "chunked_attention"
MIXED = {"layer_types": [SLIDING, FULL], "sliding_window": WINDOW}
FULL_FIRST = {"layer_types": [FULL, SLIDING], "sliding_window": WINDOW}
ALL = {"sliding_window": WINDOW}

PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
PARTIAL = PLAIN | {"partial_rotary_factor": 0.5}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 32.0}
FROM_THE_START = {"original_max_position_embeddings": 1}  # a token at position 0 does not turn
LONG |= {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
ALPHA = {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 1e4}
SCALED = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0}
SCALED |= {"original_max_position_embeddings": 3, "llama_4_scaling_beta": 0.3}

OLD = dict.fromkeys(("num_key_value_heads", "head_dim", "rms_norm_eps"), ...)
OWN_DIM = {"head_dim": ...}
BIASES, USE_BIAS = {"attention_bias": True}, {"use_bias": True}
LAYER_EPS = {"rms_norm_eps": ..., "layer_norm_eps": 0.01}
DECODER = OLD | {"is_decoder": True}
BART = OLD | {"decoder_layers": 2, "decoder_attention_heads": 4, "encoder_layers": 2, "decoder_ffn_dim": 96}
BART |= {"d_model": 64, "hidden_size": ..., "num_hidden_layers": ..., "num_attention_heads": ...}
BART |= {"decoder_start_token_id": 2, "intermediate_size": ...}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
TOWERS = {"vision_config": TOWER | {"num_hidden_layers": 2, "image_size": 28, "patch_size": 14, "crop_size": 28}}
TOWERS |= {"audio_config": TOWER | {"num_blocks": 1, "ext_pw_out_channel": 32, "nemo_conv_channels": 32}}

LLAMAS = {
    "apertus, biases": ("apertus", OWN_DIM | BIASES),
    "arcee": ("arcee",),
    "aria_text": ("aria_text", {"moe_num_experts": 4, "moe_topk": 2}),
    "cohere": ("cohere", OWN_DIM | LAYER_EPS),
    "cohere, norms": ("cohere", OWN_DIM | LAYER_EPS | {"use_qk_norm": True}),
    "emu3": ("Emu3", {"rope_parameters": PLAIN | {"rope_theta": 1e6}}),
    "ernie4_5": ("ernie4_5", USE_BIAS),
    "ernie4_5_moe": ("ernie4_5_moe", OWN_DIM | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}),
    "flex_olmo": ("flex_olmo", OWN_DIM | MOE),
    "gemma": ("gemma",),
    "glm": ("glm",),
    "glm4, no biases": ("glm4", {"attention_bias": False}),
    "glm4_moe": ("glm4_moe", ROUTED | {"first_k_dense_replace": 1, "use_qk_norm": True}),
    "granite": ("granite", OWN_DIM | {"attention_multiplier": 0.3}),
    "granitemoe": ("granitemoe", OWN_DIM | EXPERTS | {"attention_multiplier": 0.3}),
    "granitemoeshared": ("granitemoeshared", OWN_DIM | EXPERTS | {"attention_multiplier": 0.3}),
    "helium": ("helium", BIASES),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"rope_parameters": ALPHA}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"num_experts": 4, "moe_topk": 2}),
    "hy_v3": ("hy_v3", MOE),
    "hyperclovax": ("hyperclovax", {"attention_multiplier": 0.3}),
    "internlm3": ("internlm3", BIASES | {"mlp_bias": True}),
    "iquestcoder": ("iquestcoder",),
    "jais2": ("jais2",),
    "ministral3": ("ministral3", {"rope_parameters": SCALED}),
    "ministral3, window": ("ministral3", {"rope_parameters": SCALED} | ALL, "sliding_window"),
    "mixtral": ("mixtral", EXPERTS),
    "mixtral, window": ("mixtral", EXPERTS | ALL, "sliding_window"),
    "nanochat": ("nanochat", OWN_DIM, "gqa", (0, 1), {"k": -8}),
    "nemotron": ("nemotron", BIASES),
    "olmo": ("olmo", OWN_DIM | {"clip_qkv": 0.8}),
    "olmoe": ("olmoe", OWN_DIM | MOE | {"clip_qkv": 0.8}),
    "persimmon": ("persimmon", OLD | {"layer_norm_eps": 0.01}, "mha"),
    "phi": ("phi", OWN_DIM | LAYER_EPS),
    "phi, norms": ("phi", OWN_DIM | LAYER_EPS | {"qk_layernorm": True}),
    "phi3, long": ("phi3", OWN_DIM | {"rope_parameters": LONG | {"attention_factor": 1.3}} | FROM_THE_START),
    "phi3, short": ("phi3", OWN_DIM | {"rope_parameters": LONG, "original_max_position_embeddings": 256}),
    "phi3, window": ("phi3", OWN_DIM | ALL, "sliding_window"),
    "phi4_multimodal": ("phi4_multimodal", OWN_DIM | TOWERS),
    "phimoe": ("phimoe", OWN_DIM | EXPERTS | BIASES),
    "seed_oss": ("seed_oss", {"attention_out_bias": True}),
    "solar_open": ("solar_open", ROUTED | BIASES),
    "stablelm": ("stablelm", OWN_DIM | LAYER_EPS | {"use_qkv_bias": True}),
    "stablelm, norms": ("stablelm", OWN_DIM | LAYER_EPS | {"qk_layernorm": True}),
    "starcoder2": ("starcoder2", OWN_DIM),
    "starcoder2, window": ("starcoder2", OWN_DIM | ALL | {"use_bias": False}, "sliding_window"),
}
ROPES = {"rope_parameters": {FULL: PARTIAL | {"rope_theta": 5e5}, SLIDING: PLAIN | {"partial_rotary_factor": 1.0}}}
BY_KIND = {"rope_parameters": {FULL: LLAMA3, SLIDING: PLAIN}}
LLAMA4 = EXPERTS | {"layer_types": [CHUNKED, FULL], "no_rope_layers": [1, 0], "attention_chunk_size": CHUNK}
LLAMA4 |= {"intermediate_size_mlp": 96, "floor_scale": 3, "attn_scale": 0.4}
HALVED, SHARED = {"local_attention": 2 * WINDOW}, MOE | {"shared_expert_intermediate_size": 32}
WINDOWS = {}
for _name, _type, _keys in (
    ("afmoe", "afmoe", MIXED | MOE | {"num_dense_layers": 1, "num_shared_experts": 1}),
    ("cohere2", "cohere2", MIXED | LAYER_EPS),
    ("cohere2_moe", "cohere2_moe", MIXED | LAYER_EPS | MOE),
    ("cwm", "cwm", MIXED | {"rope_parameters": LLAMA3}),
    ("dots1", "dots1", MIXED | OWN_DIM | ROUTED | {"n_shared_experts": 1, "first_k_dense_replace": 1}),
    ("exaone4", "exaone4", MIXED | OWN_DIM),
    ("exaone_moe", "exaone_moe", MIXED | OWN_DIM | MOE | {"num_shared_experts": 1, "first_k_dense_replace": 1}),
    ("kolibri1", "kolibri1", MIXED | EXPERTS),
    ("laguna", "laguna", MIXED | MOE | ROPES | {"num_attention_heads_per_layer": [4, 8]}),
    ("laguna, gates of channels", "laguna", MIXED | MOE | ROPES | {"gating": "per-channel"}),
    ("mellum", "mellum", MIXED | EXPERTS | BY_KIND | {"moe_intermediate_size": 32}),
    ("ministral", "ministral", MIXED),
    ("olmo3", "olmo3", MIXED | OWN_DIM | BY_KIND),
    ("smollm3", "smollm3", MIXED | OWN_DIM | {"no_rope_layers": [0, 1], "use_sliding_window": True}),
    ("vaultgemma", "vaultgemma", MIXED | {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0}),
):
    WINDOWS[f"{_name}, window"] = (_type, _keys, "sliding_window", (0,))
    WINDOWS[f"{_name}, full"] = (_type, _keys, "gqa", (1,))
WINDOWS |= {
    "modernbert-decoder, window": ("modernbert-decoder", OLD | BIASES | HALVED, "sliding_window", (1,)),
    "modernbert-decoder, full": ("modernbert-decoder", OLD | BIASES | HALVED, "mha", (0,)),
    "exaone4, no window": ("exaone4", OWN_DIM | {"layer_types": [FULL, FULL], "sliding_window": None}),
    "flint": ("flint", FULL_FIRST | MOE | BIASES, "sinks"),
    "granite_swa": ("granite_swa", FULL_FIRST | OWN_DIM | {"attention_multiplier": 0.3}, "sinks"),
    "granitemoe_swa": ("granitemoe_swa", FULL_FIRST | OWN_DIM | EXPERTS | {"layer_rope_theta": [0, 1e4]}, "sinks"),
    "llama4, chunk": ("llama4_text", LLAMA4, "chunked_local", (0,)),
    "llama4, full": ("llama4_text", LLAMA4, "gqa", (1,)),
    "qwen2_moe": ("qwen2_moe", OWN_DIM | SHARED),
    "qwen2_moe, window": ("qwen2_moe", OWN_DIM | SHARED | MIXED | {"use_sliding_window": True}, "sliding_window", (0,)),
}
SIX = {"num_attention_heads": 6, "hidden_size": 96}  # no power of two
LOCAL = {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW}
DBRX = {"attn_config": {"kv_n_heads": 2, "clip_qkv": 0.8, "rope_theta": 1e4}, "ffn_config": {"ffn_hidden_size": 32}}
DBRX |= {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "rope_parameters": PLAIN}
DBRX |= dict.fromkeys(("hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings"), ...)
GPTS = {
    "biogpt": ("biogpt", OLD, "mha"),
    "bloom": ("bloom", OLD | SIX, "mha"),
    "codegen": ("codegen", OLD | {"rotary_dim": 8}, "mha"),
    "ctrl": ("ctrl", OLD | {"dff": 96}, "mha"),
    "dbrx": ("dbrx", OLD | DBRX),
    "gpt2": ("gpt2", OLD | {"scale_attn_by_inverse_layer_idx": True}, "mha"),
    "gpt_bigcode": ("gpt_bigcode", OLD, "mqa"),
    "gpt_bigcode, a key per query": ("gpt_bigcode", OLD | {"multi_query": False}, "mha"),
    "gpt_neo, full": ("gpt_neo", OLD | LOCAL, "mha", (0,)),
    "gpt_neo, window": ("gpt_neo", OLD | LOCAL, "sliding_window", (1,), {}, True),
    "gpt_neox": ("gpt_neox", OLD | {"rope_parameters": PARTIAL}, "mha"),
    "gpt_neox_japanese": ("gpt_neox_japanese", OLD | {"intermediate_multiple_size": 1}, "mha"),
    "gptj": ("gptj", OLD | {"rotary_dim": 8}, "mha"),
    "mpt": ("mpt", OLD | SIX | {"attn_config": {"clip_qkv": 0.8}, "max_seq_len": 64}, "mha"),
    "opt": ("opt", OLD | {"ffn_dim": 96, "word_embed_proj_dim": 64}, "mha"),
    "xglm": ("xglm", OLD | {"ffn_dim": 96, "attention_heads": 4, "d_model": 64, "num_layers": 2}, "mha"),
}  # fmt: skip
BERTS = ("bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert")
BERTS += ("roberta", "roberta-prelayernorm", "roc_bert", "xlm-roberta", "xlm-roberta-xl", "roformer")
BARTS = ("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart")
BARTS += ("trocr", "whisper")
XMOD = {"xmod": ("xmod", DECODER | {"languages": ["en_XX"], "default_language": "en_XX"}, "mha")}
DECODERS = XMOD | {name: (name, DECODER, "mha") for name in BERTS} | {name: (name, BART, "mha") for name in BARTS}

MODELS = LLAMAS | WINDOWS | GPTS | DECODERS
