"""Small configs of the model families, and the shapes of their attention weights in transformers."""

import numpy as np

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
SPARSE, HEAVY, BLOCKS = "compressed_sparse_attention", "heavily_compressed_attention", "minimax_m3_sparse"

SHAPE = {
    "hidden_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "num_hidden_layers": 6,
    "max_position_embeddings": 256,
}
GPT_OSS = SHAPE | {"model_type": "gpt_oss"}
LLAMA = SHAPE | {"model_type": "llama", "hidden_size": 64, "head_dim": None}
MLA = {
    "model_type": "deepseek_v3",
    "hidden_size": 10,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "q_lora_rank": 6,
    "kv_lora_rank": 5,
    "qk_nope_head_dim": 3,
    "qk_rope_head_dim": 4,
    "v_head_dim": 2,
}
DSA = MLA | {
    "model_type": "deepseek_v32",
    "num_hidden_layers": 3,
    "index_n_heads": 3,
    "index_head_dim": 8,
    "index_topk": 4,
}
PERIODIC = DSA | {"model_type": "glm_moe_dsa"}
GLM = PERIODIC | {"indexer_types": ["full", "shared", "full"]}
KIMI_LINEAR = {
    "model_type": "kimi_linear",
    "hidden_size": 2304,
    "num_attention_heads": 32,
    "num_hidden_layers": 27,
    "num_key_value_heads": 32,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "head_dim": 72,
    "mla_use_nope": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "kda_layers": [n for n in range(1, 27) if n % 4],
        "head_dim": 128,
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
}
MINIMAX = SHAPE | {"hidden_size": 10, "num_hidden_layers": 2, "model_type": "minimax", "attn_type_list": [0, 1]}
INDEX_BRANCH = {
    "sparse_attention_freq": [0, 1],
    "sparse_num_index_heads": 2,
    "sparse_index_dim": 8,
    "sparse_block_size": 4,
    "sparse_topk_blocks": 3,
    "sparse_local_block": 2,
}
M3 = SHAPE | {
    "hidden_size": 10,
    "num_hidden_layers": 2,
    "model_type": "minimax_m3_vl",
    "sparse_attention_config": INDEX_BRANCH,
}
V4_SHAPE = {
    "model_type": "deepseek_v4",
    "hidden_size": 10,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "head_dim": 8,
    "q_lora_rank": 6,
    "o_groups": 2,
    "o_lora_rank": 3,
    "sliding_window": 4,
    "index_n_heads": 2,
    "index_head_dim": 6,
    "index_topk": 2,
    "max_position_embeddings": 256,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
V4 = V4_SHAPE | {"compress_ratios": [0, 4, 128], "qk_rope_head_dim": 4}
V4_MAIN = {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}
V4_COMPRESS = YARN | {"rope_type": "yarn", "rope_theta": 3e5, "partial_rotary_factor": 0.5, "attention_factor": 1.0}
V4_FLAT = V4 | {"rope_theta": 2e4, "compress_rope_theta": 3e5, "rope_scaling": YARN | {"type": "yarn"}}
V4_NESTED = V4_SHAPE | {
    "layer_types": [SLIDING, SPARSE, HEAVY],
    "rope_parameters": {"main": V4_MAIN, "compress": V4_COMPRESS},
}


def kimi(**linear) -> dict:
    """Two layers of Kimi-Linear whose linear_attn_config has these lists."""
    return KIMI_LINEAR | {"num_hidden_layers": 2, "linear_attn_config": linear}


def sparse(**keys) -> dict:
    return M3 | {"sparse_attention_config": INDEX_BRANCH | keys}


def nested(**changes) -> dict:
    """V4_NESTED with other entries of main and compress; None takes a key away."""
    parts = {"main": V4_MAIN, "compress": V4_COMPRESS}
    for name, change in changes.items():
        parts[name] = {key: value for key, value in (parts[name] | change).items() if value is not None}
    return V4_NESTED | {"rope_parameters": parts}


GPT_OSS_SHAPES = {
    **{"q_proj.weight": (24, 12), "k_proj.weight": (12, 12), "v_proj.weight": (12, 12), "o_proj.weight": (12, 24)},
    **{"q_proj.bias": (24,), "k_proj.bias": (12,), "v_proj.bias": (12,), "o_proj.bias": (12,), "sinks": (4,)},
}
MLA_SHAPES = {
    "q_a_proj.weight": (6, 10),
    "q_a_layernorm.weight": (6,),
    "q_b_proj.weight": (14, 6),
    "kv_a_proj_with_mqa.weight": (9, 10),
    "kv_a_layernorm.weight": (5,),
    "kv_b_proj.weight": (10, 5),
    "o_proj.weight": (10, 4),
}
DSA_SHAPES = MLA_SHAPES | {
    "indexer.wq_b.weight": (24, 6),
    "indexer.wk.weight": (8, 10),
    "indexer.k_norm.weight": (8,),
    "indexer.k_norm.bias": (8,),
    "indexer.weights_proj.weight": (3, 10),
}
LIGHTNING_SHAPES = {
    "qkv_proj.weight": (72, 10),
    "output_gate.weight": (24, 10),
    "norm.weight": (24,),
    "out_proj.weight": (10, 24),
}
MSA_SHAPES = {
    **{"q_proj.weight": (24, 10), "k_proj.weight": (12, 10), "v_proj.weight": (12, 10), "o_proj.weight": (10, 24)},
    **{"q_norm.weight": (6,), "k_norm.weight": (6,)},
    **{"indexer.q_proj.weight": (16, 10), "indexer.k_proj.weight": (8, 10)},
    **{"indexer.q_norm.weight": (8,), "indexer.k_norm.weight": (8,)},
}
V4_SHAPES = {
    "q_a_proj.weight": (6, 10),
    "q_a_norm.weight": (6,),
    "q_b_proj.weight": (32, 6),
    "kv_proj.weight": (8, 10),
    "kv_norm.weight": (8,),
    "sinks": (4,),
    "o_a_proj.weight": (6, 16),
    "o_b_proj.weight": (10, 6),
}


def compressor(prefix: str, m: int, X: int, width: int) -> dict[str, tuple[int, ...]]:
    names = ("kv_proj.weight", "gate_proj.weight", "position_bias", "kv_norm.weight")
    return {prefix + name: shape for name, shape in zip(names, ((X, 10), (X, 10), (m, X), (width,)), strict=True)}


INDEXER = "compressor.indexer."
CSA_SHAPES = {
    **V4_SHAPES,
    **compressor("compressor.", 4, 16, 8),
    **compressor(INDEXER, 4, 12, 6),
    **{f"{INDEXER}q_b_proj.weight": (12, 6), f"{INDEXER}scorer.weights_proj.weight": (2, 10)},
}
HCA_SHAPES = V4_SHAPES | compressor("compressor.", 128, 8, 8)


def weights(index: int, shapes: dict[str, tuple[int, ...]], prefix: str = "model.", seed: int = 0, dtype="float32"):
    """{name in a state dict: array} of layer `index`."""
    rng = np.random.default_rng(seed)
    return {f"{prefix}layers.{index}.self_attn.{x}": rng.normal(size=s).astype(dtype) for x, s in shapes.items()}
