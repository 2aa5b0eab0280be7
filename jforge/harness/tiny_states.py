"""Tiny random models with states of delta rules, state spaces and short convolutions, and what their caches hold.

transformers computes these in float32 wherever its model's dtype is another, and its own error there is 1e-5 to 5e-5.
So they are compared in float64, with its casts redirected (`in_float64`): what is left is a formula's error.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from jforge.harness import hf_shim
from jforge.harness.tiny_configs import EXPERTS, KIMI, LINEAR_FULL, MOE, PLAIN, QWEN3_NEXT, ROUTED, WHOLE, Model, rope

DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "layer_types": LINEAR_FULL,
}
QWEN3_5 = {"linear_conv_kernel_dim": 3} | DELTA
GLM5 = WHOLE | ROUTED | {"layer_types": LINEAR_FULL, "linear_head_dim": 16, "linear_num_heads": 4, "q_lora_rank": 24}
GLM5 |= {"qk_rope_head_dim": 0, "head_dim": 0}
PARTS = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 4, "mamba_d_state": 10, "mamba_expand": 1}
BAMBA = PARTS | {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]}
GRANITE = PARTS | EXPERTS | {"layer_types": LINEAR_FULL, "shared_intermediate_size": 32, "attention_multiplier": 0.3}
FALCON_H1 = PARTS | {
    "num_hidden_layers": 2, "mamba_d_ssm": 48, "mamba_n_heads": 6, "mamba_n_groups": 3, "key_multiplier": 0.75,
    "ssm_multipliers": [0.5, 1.5, 0.75, 1.25, 0.625],  # exact in the float32 that transformers keeps them in
    "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.9, "attention_in_multiplier": 1.3,
}  # fmt: skip
NEMOTRON_H = {
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"],
    "mamba_num_heads": 6, "mamba_head_dim": 8, "ssm_state_size": 10, "n_groups": 3, "conv_kernel": 5,
    "layer_norm_epsilon": 0.01, "time_step_min": 1e-30,  # in one step transformers ignores it
}  # fmt: skip
MAMBA2 = {"num_heads": 8, "head_dim": 8, "state_size": 10, "n_groups": 4, "expand": 1, "layer_norm_epsilon": 0.01}
MAMBA = {"state_size": 6, "time_step_rank": 5}
JAMBA = {
    "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 6, "mamba_dt_rank": 5,
    "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
LFM2 = {"layer_types": ["conv", "full_attention"] * 2, "norm_eps": 0.01, "conv_L_cache": 4}
LFM3 = {"layer_types": ["conv", "full_attention", "conv", "sliding_attention"], "norm_eps": 0.01, "sliding_window": 4}
LFM2_MOE = LFM2 | MOE | {"conv_L_cache": 3, "num_dense_layers": 1}
WIDE = {"wide": True}
LINEAR, FULL = (0, 2), (1, 3)

STATES = {
    "qwen3_next, delta": Model("Qwen3Next", QWEN3_NEXT | DELTA, "gated_deltanet", LINEAR, **WIDE),
    "qwen3_5, delta": Model("Qwen3_5", QWEN3_5, "gated_deltanet", LINEAR, **WIDE),
    "qwen3_5": Model("Qwen3_5", QWEN3_5, layers=FULL),
    "qwen3_5_moe, delta": Model(
        "Qwen3_5Moe", QWEN3_5 | MOE | {"shared_expert_intermediate_size": 32}, "gated_deltanet", LINEAR, **WIDE
    ),
    "olmo_hybrid, delta": Model("OlmoHybrid", DELTA, "gated_deltanet", LINEAR, **WIDE),
    "olmo_hybrid, no negative eigenvalues": Model(
        "OlmoHybrid", DELTA | {"linear_allow_neg_eigval": False}, "gated_deltanet", LINEAR, **WIDE
    ),
    "olmo_hybrid": Model("OlmoHybrid", DELTA, layers=FULL),
    "olmo_hybrid, rope": Model("OlmoHybrid", DELTA | rope(PLAIN), layers=FULL),
    "kimi_linear, delta": Model("KimiLinear", KIMI, "kda", LINEAR, **WIDE),
    "bailing_hybrid, delta": Model("BailingHybrid", WHOLE | MOE | {"layer_types": LINEAR_FULL}, "kda", LINEAR, **WIDE),
    "bailing_hybrid, no bound": Model(
        "BailingHybrid", WHOLE | MOE | {"layer_types": LINEAR_FULL, "kda_safe_gate": False}, "kda", LINEAR, **WIDE
    ),
    "glm5_next, delta": Model("Glm5NextText", GLM5, "kda", LINEAR, head="Model", **WIDE),
    "glm5_next, no bound": Model(
        "Glm5NextText", GLM5 | {"linear_lower_bound": None}, "kda", LINEAR, head="Model", **WIDE
    ),
    "mamba2": Model("Mamba2", MAMBA2, "mamba2", **WIDE),
    "mamba2, biases": Model("Mamba2", MAMBA2 | {"use_bias": True, "use_conv_bias": False}, "mamba2", **WIDE),
    "bamba, ssm": Model("Bamba", BAMBA, "mamba2", LINEAR, positions=True, **WIDE),
    "bamba": Model("Bamba", BAMBA, layers=FULL, positions=True),
    "granitemoehybrid, ssm": Model("GraniteMoeHybrid", GRANITE, "mamba2", LINEAR, **WIDE),
    "granitemoehybrid": Model("GraniteMoeHybrid", GRANITE, layers=FULL),
    "granitemoehybrid, rope": Model("GraniteMoeHybrid", GRANITE | {"position_embedding_type": "rope"}, layers=FULL),
    "nemotron_h, ssm": Model("NemotronH", NEMOTRON_H, "mamba2", (0, 3), **WIDE),
    "nemotron_h": Model("NemotronH", NEMOTRON_H, layers=(2,)),
    "falcon_h1, ssm": Model("FalconH1", FALCON_H1, "mamba2", kind="linear_attention", **WIDE),
    "falcon_h1, norm": Model(
        "FalconH1", FALCON_H1 | {"mamba_rms_norm": True}, "mamba2", kind="linear_attention", **WIDE
    ),
    "falcon_h1, gate first": Model(
        "FalconH1", FALCON_H1 | {"mamba_rms_norm": True, "mamba_norm_before_gate": False}, "mamba2",
        kind="linear_attention", **WIDE,
    ),
    "falcon_h1": Model("FalconH1", FALCON_H1, kind="full_attention"),
    "mamba": Model("Mamba", MAMBA, "mamba1", **WIDE),
    "mamba, biases": Model("Mamba", MAMBA | {"use_bias": True, "use_conv_bias": False}, "mamba1", **WIDE),
    "falcon_mamba": Model("FalconMamba", MAMBA | {"mixer_rms_eps": 0.01}, "mamba1", **WIDE),
    "jamba, ssm": Model("Jamba", JAMBA, "mamba1", LINEAR, **WIDE),
    "jamba": Model("Jamba", JAMBA, layers=FULL),
    "lfm2, conv": Model("Lfm2", LFM2, "short_conv", LINEAR, **WIDE),
    "lfm2, conv, biases": Model("Lfm2", LFM2 | {"conv_bias": True}, "short_conv", LINEAR, **WIDE),
    "lfm2": Model("Lfm2", LFM2, layers=FULL),
    "lfm3, conv": Model("Lfm3", LFM3, "short_conv", LINEAR, **WIDE),
    "lfm3": Model("Lfm3", LFM3, layers=(1,)),
    "lfm3, window": Model("Lfm3", LFM3, "sliding_window", (3,)),
    "lfm2_moe, conv": Model("Lfm2Moe", LFM2_MOE, "short_conv", LINEAR, **WIDE),
    "lfm2_moe": Model("Lfm2Moe", LFM2_MOE, layers=FULL),
}  # fmt: skip
"""Each with the mechanism of some of its layers, as in tiny_configs.MODELS."""


@contextmanager
def in_float64() -> Iterator[None]:
    """torch's float32, and the method that casts to it, are its float64."""
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def is_state(module: Any) -> bool:
    """Whether a layer's mixer keeps states."""
    return _convolution(module) is not None


def contents(own: Any, module: Any) -> tuple[torch.Tensor, ...]:
    """The state, B N H V, if there is one, and the rows of the convolution, B P X.

    own: the layer's cache. transformers keeps one column more of the convolution than is needed, and the states of
    Mamba with their axes the other way round.
    """
    inputs, state = hf_shim.convolution_and_state(own)
    rows = inputs[..., 1:].transpose(1, 2)
    if state is None:
        return (rows,)
    if hasattr(module, "D"):  # Mamba, without heads, and Mamba-2
        state = state[..., None] if state.ndim == 3 else state.transpose(2, 3)
    return state, rows


def _convolution(module: Any) -> torch.nn.Conv1d | None:
    found = (getattr(module, name, None) for name in ("conv1d", "conv"))
    return next((layer for layer in found if isinstance(layer, torch.nn.Conv1d)), None)
