"""Tiny random models whose layers share keys or picks with earlier ones."""

from jforge.harness.tiny_configs import PLAIN, SHARED_PICKS, WINDOW, Model

KINDS = ["sliding_attention", "full_attention"]
SIX = KINDS * 3
ROPES = {"sliding_attention": PLAIN, "full_attention": PLAIN | {"rope_theta": 1e5}}
GEMMA3N = {
    "layer_types": SIX, "num_kv_shared_layers": 3, "sliding_window": WINDOW, "rope_parameters": ROPES,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97, "laurel_rank": 8, "altup_num_inputs": 2,
}  # fmt: skip
GEMMA4 = {
    "layer_types": SIX, "num_kv_shared_layers": 2, "sliding_window": WINDOW, "global_head_dim": 24,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97,
}  # fmt: skip
EQUAL = {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "num_kv_shared_layers": 0}
SHARED = {
    "gemma3n": Model("Gemma3n", GEMMA3N, layers=tuple(range(6))),
    "gemma3n, old spelling": Model(
        "Gemma3n", GEMMA3N | {"rope_parameters": None, "num_kv_shared_layers": 0}, layers=tuple(range(6))
    ),
    "gemma4": Model("Gemma4", GEMMA4, layers=tuple(range(6))),
    "gemma4, keys as values": Model("Gemma4", GEMMA4 | EQUAL, layers=tuple(range(6))),
    "gemma4_unified": Model(
        "gemma4_unified_text",
        {"layer_types": SIX, "sliding_window": WINDOW, "global_head_dim": 24},
        layers=tuple(range(6)),
    ),
    "glm_moe_dsa": Model("GlmMoeDsa", SHARED_PICKS, layers=tuple(range(4)), pairs_apart={"k_rope": 8, "k_index": 8}),
}
"""All layers of each; jforge.stack runs them."""
