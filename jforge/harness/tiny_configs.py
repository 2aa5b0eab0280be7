"""Which tiny random transformers models there are: one or more for each family, options included."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from jforge.harness import tiny_dense

VOCAB, WINDOW = 97, 4
LINEAR_FULL = ["linear_attention", "full_attention"] * 2
LIGHTNING_FULL = ["linear_attention"] * 3 + ["full_attention"]

# RoPE
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
HALF = PLAIN | {"rope_theta": 5e6, "partial_rotary_factor": 0.5}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}


def rope(parameters: dict, **more: Any) -> dict:
    return {"rope_parameters": parameters | more}


TWO_MSCALES = rope(YARN, mscale=0.7, mscale_all_dim=1.3)
BIASES, MHA, MQA = {"attention_bias": True}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}

# experts, as few as there can be
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# families
GEMMA = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": WINDOW}
GEMMA |= {"query_pre_attn_scalar": 24}
GEMMA2 = GEMMA | {"attn_logit_softcapping": 2.0}
GEMMA3 = GEMMA | {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": PLAIN}}
GPT_OSS = EXPERTS | {"sliding_window": WINDOW, "max_position_embeddings": 131072}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
MINIMAX = EXPERTS | {
    "rope_parameters": HALF | {"rope_theta": 1e7},  # it turns all channels even so
    "block_size": 4,
    "linear_attn_alpha_factor": 1.7,
    "linear_attn_beta_factor": 0.8,
    "full_attn_alpha_factor": 1.3,
    "full_attn_beta_factor": 0.6,
}
TEXT_01 = MINIMAX | {"layer_types": LIGHTNING_FULL}
SOFTMAX_FIRST = MINIMAX | {"layer_types": ["full_attention", "linear_attention"] * 2, "head_dim": None}
MINIMAX_M3 = EXPERTS | {
    "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "rope_parameters": HALF,
    "dense_intermediate_size": 64,
    "shared_intermediate_size": 32,
    "index_n_heads": 2,
    "index_head_dim": 12,
    "index_block_size": 2,
    "index_topk_blocks": 2,  # of the 5 blocks of 10 tokens
}
TWO_LOCAL = MINIMAX_M3 | {"index_topk_blocks": 3, "index_local_blocks": 2, "index_head_dim": 16}
QWEN3_NEXT = MOE | {"layer_types": LINEAR_FULL, "shared_expert_intermediate_size": 32}
QWEN3_NEXT |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
QWEN3_NEXT |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
MLA = ROUTED | {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "head_dim": 8,  # of the rotary tables: a head_dim that is given wins over the rope slice's
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
MLA |= {"n_shared_experts": 1, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
LONG = rope(LONG, factor=32.0, attention_factor=1.3) | {"original_max_position_embeddings": 1}
WHOLE = MLA | {"q_lora_rank": None}  # queries of full rank
APART = {"k_rope": MLA["qk_rope_head_dim"]}
DSA = MLA | {"index_topk": 4, "index_n_heads": 8, "index_head_dim": 12}  # 4 of 10 tokens; few heads make ties
SHARED_PICKS = DSA | {"indexer_types": ["full", "full", "shared", "shared"], "num_hidden_layers": 4}
GLM_APART = APART | {"k_index": MLA["qk_rope_head_dim"]}
KIMI = WHOLE | {"layer_types": LINEAR_FULL, "linear_head_dim": 16, "linear_num_heads": 4}
DEEPSEEK_V4 = ROUTED | {
    "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"] * 2,
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    "mlp_layer_types": ["moe"] * 6,
    "num_key_value_heads": 1,
    "partial_rotary_factor": 0.5,
    "q_lora_rank": 24,
    "o_groups": 2,
    "o_lora_rank": 12,
    "sliding_window": WINDOW,
    "index_n_heads": 8,
    "index_head_dim": 12,
    "index_topk": 1,  # of the 2 entries of 10 tokens
    "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


@dataclass(frozen=True, eq=False)  # hashed by identity: what is built from it is kept
class Model:
    """A transformers model of 64 dimensions, 4 query and 2 key/value heads of 16 channels, unless `kwargs` differ.

    A value of `kwargs` that is `...` leaves the key to its class.
    """

    name: str  # prefix of the transformers classes, or a model_type
    kwargs: dict = field(default_factory=dict)
    mechanism: str = "gqa"
    layers: tuple[int, ...] = (0, 1)  # those of `mechanism`
    pairs_apart: dict[str, int] = field(default_factory=dict)
    """Buffers that transformers keeps with their rotated pairs as evens, then odds; and how many channels turn. A
    negative number: with so many channels, which are last in ours, first."""
    whole: bool = False
    """Whether transformers keeps every token of a layer with a window."""
    kind: str | None = None
    """Which mixer of layers with two."""
    positions: bool = False
    """Whether the model must be told the positions of tokens after others."""
    head: str = "ForCausalLM"
    """The suffix of the class."""
    wide: bool = False
    """In float64, with the casts to float32 inside redirected."""

    def config(self) -> Any:
        kwargs = {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": len(self.kwargs.get("layer_types", (0, 1))),
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        if self.name != "Falcon":
            kwargs |= {"num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 0.01}  # an eps that shows
        kwargs = {key: value for key, value in (kwargs | self.kwargs).items() if value is not ...}
        text = ("Emu3", "Gemma3", "Gemma3n", "Gemma4", "MiniMaxM3VL", "Qwen3_5", "Qwen3_5Moe")
        name, known = self.name + ("TextConfig" if self.name in text else "Config"), transformers.CONFIG_MAPPING
        config = (known[self.name] if self.name in known else getattr(transformers, name))(**kwargs)
        config._attn_implementation = config._experts_implementation = "eager"
        return config

    def build(self) -> Any:
        config = self.config()
        if self.name in transformers.CONFIG_MAPPING:
            made = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        else:
            made = getattr(transformers, self.name + self.head)
        model = made(config).eval()
        randomize(model)
        return model.double() if self.wide else model


MODELS = {
    "llama, llama3 rope": Model("Llama", rope(LLAMA3)),
    "llama, yarn, biases": Model("Llama", rope(YARN) | BIASES),
    "llama, yarn mscale": Model("Llama", TWO_MSCALES),
    "llama, yarn options": Model("Llama", rope(YARN, truncate=False, attention_factor=1.1, beta_fast=8)),
    "llama, linear rope, mha": Model("Llama", rope(LINEAR) | MHA, "mha"),
    "llama, mqa": Model("Llama", MQA, "mqa"),
    "llama, one head": Model("Llama", MQA | {"num_attention_heads": 1, "head_dim": 16}, "single_head"),
    "qwen2": Model("Qwen2"),
    "qwen3": Model("Qwen3", rope(PLAIN, rope_theta=1e6) | {"head_dim": 24}),
    "qwen3, biases": Model("Qwen3", BIASES),
    "qwen3_moe": Model("Qwen3Moe", MOE),
    "mistral": Model("Mistral", {"sliding_window": None}),
    "gemma2": Model("Gemma2", GEMMA2, layers=(1, 3)),
    "gemma3": Model("Gemma3", GEMMA3, layers=(1, 3)),
    "qwen2, window": Model("Qwen2", QWEN_WINDOW, "sliding_window", (1,)),
    "qwen3, window": Model("Qwen3", QWEN_WINDOW, "sliding_window", (1,)),
    "qwen3_moe, window": Model("Qwen3Moe", MOE | QWEN_WINDOW, "sliding_window"),
    "mistral, window": Model("Mistral", {"sliding_window": WINDOW}, "sliding_window"),
    "gemma2, window": Model("Gemma2", GEMMA2, "sliding_window", (0, 2)),
    "gemma3, window": Model("Gemma3", GEMMA3, "sliding_window", (0, 2)),
    "gpt_oss": Model("GptOss", GPT_OSS, "sinks"),
    "gpt_oss, no biases, mha": Model(
        "GptOss", GPT_OSS | MHA | rope(YARN, truncate=False) | {"attention_bias": False}, "sinks", (0,)
    ),
    "olmo2": Model("Olmo2"),
    "olmo2, biases, mha": Model("Olmo2", BIASES | MHA, "mha"),
    "falcon, multi-query": Model("Falcon", {}, "mqa"),
    "falcon, new architecture": Model("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "falcon, a key per query": Model("Falcon", {"multi_query": False, "bias": True}, "mha"),
    "minimax, lightning": Model("MiniMax", TEXT_01, "lightning", (0, 1, 2)),
    "minimax": Model("MiniMax", TEXT_01, layers=(3,)),
    "minimax, softmax first": Model("MiniMax", SOFTMAX_FIRST, "lightning", (1, 3)),
    "minimax_m3": Model("MiniMaxM3VL", MINIMAX_M3, layers=(0,)),
    "minimax_m3, block-sparse": Model("MiniMaxM3VL", MINIMAX_M3, "msa", (1, 2)),
    "minimax_m3, block-sparse, two local blocks": Model("MiniMaxM3VL", TWO_LOCAL, "msa", (1, 2)),
    "minimax_m2": Model("MiniMaxM2", EXPERTS | rope(HALF)),
    "qwen3_next": Model("Qwen3Next", QWEN3_NEXT, layers=(1, 3)),
    "deepseek_v2": Model("DeepseekV2", MLA, "mla"),
    "deepseek_v2, yarn, whole queries": Model(
        "DeepseekV2", WHOLE | rope(YARN, mscale=0.707, mscale_all_dim=0.707), "mla"
    ),
    "deepseek_v3": Model("DeepseekV3", MLA, "mla", pairs_apart=APART),
    "deepseek_v3, yarn, biases": Model(
        "DeepseekV3", MLA | BIASES | rope(YARN, mscale=1.0, mscale_all_dim=1.0), "mla", pairs_apart=APART
    ),
    "deepseek_v3, two mscales, whole queries, biases": Model(
        "DeepseekV3", WHOLE | TWO_MSCALES | BIASES, "mla", pairs_apart=APART
    ),
    "deepseek_v3, halves, yarn in one step": Model(  # Kimi-K2's
        "DeepseekV3", MLA | {"rope_interleave": False} | rope(YARN, beta_fast=1.0, beta_slow=1.0), "mla"
    ),
    "axk1": Model("axk1", MLA, "mla", pairs_apart=APART),
    "glm4_moe_lite": Model("glm4_moe_lite", MLA | {"head_dim": ...}, "mla", pairs_apart=APART),
    "minicpm3": Model("minicpm3", MLA | BIASES, "mla"),
    "minicpm3, long": Model("minicpm3", MLA | LONG, "mla"),
    "youtu": Model("youtu", MLA | rope(YARN, mscale=0.7, mscale_all_dim=1.3), "mla", pairs_apart=APART),
    "deepseek_v32": Model("DeepseekV32", DSA, "dsa", pairs_apart=APART),
    "deepseek_v32, yarn, biases": Model("DeepseekV32", DSA | TWO_MSCALES | BIASES, "dsa", pairs_apart=APART),
    "glm_moe_dsa, shared picks": Model("GlmMoeDsa", SHARED_PICKS, "dsa", (0, 1, 2, 3), GLM_APART),
    "deepseek_v4": Model("DeepseekV4", DEEPSEEK_V4, "v4_window", (0, 3)),
    "deepseek_v4, compressed sparse": Model("DeepseekV4", DEEPSEEK_V4, "csa", (1, 4)),
    "deepseek_v4, heavily compressed": Model("DeepseekV4", DEEPSEEK_V4, "hca", (2, 5)),
    "kimi_linear": Model("KimiLinear", KIMI, "mla", (1, 3)),
    "kimi_linear, low-rank queries, biases": Model("KimiLinear", KIMI | BIASES | {"q_lora_rank": 24}, "mla", (1, 3)),
}


MODELS |= {name: Model(*entry) for name, entry in tiny_dense.MODELS.items()}


def randomize(model: Any) -> None:
    """Move every parameter off its neutral start: norms by 0.3 about theirs (0 or 1), biases by 0.3.

    Tables of sines that are kept as parameters stay.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if not p.requires_grad:
                continue
            if "norm" in name or "ln_" in name or "layernorm" in name or p.ndim == 1:
                p.add_(0.3 * noise)
            else:
                p.copy_(noise if "embed" in name else noise / math.sqrt(p.shape[-1]))
