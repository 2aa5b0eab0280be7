"""Tiny random transformers models, and what their attention modules saw, returned and cached, step by step."""

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers import DynamicCache

from jforge import hf
from jforge.harness import compare

VOCAB, BATCH, TOKENS, WINDOW = 97, 2, 10, 4
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "query_pre_attn_scalar": 24,
    "sliding_window": WINDOW,
}
GEMMA3 = GEMMA | {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": PLAIN}}
GPT_OSS = {
    "sliding_window": WINDOW,
    "max_position_embeddings": 131072,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
LINEAR_FULL = ["linear_attention", "full_attention"] * 2
MLA = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "head_dim": 8,  # of the rotary tables: a head_dim that is given wins over the rope slice's
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
KIMI = MLA | {"q_lora_rank": None, "layer_types": LINEAR_FULL, "linear_head_dim": 16, "linear_num_heads": 4}


@dataclass(frozen=True)
class Model:
    """A transformers model of 64 dimensions, 4 query and 2 key/value heads of 16 channels, unless `kwargs` differ."""

    name: str  # prefix of the transformers classes
    kwargs: dict = field(default_factory=dict)
    layers: tuple[int, ...] = (0, 1)  # those of `mechanism`
    mechanism: str = "gqa"
    pairs_apart: bool = False  # transformers caches the rotated pairs of the second buffer as evens, then odds

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
        suffix = "TextConfig" if self.name == "Gemma3" else "Config"
        config = getattr(transformers, self.name + suffix)(**(kwargs | self.kwargs))
        config._attn_implementation = config._experts_implementation = "eager"
        return config

    def build(self) -> Any:
        model = getattr(transformers, self.name + "ForCausalLM")(self.config()).eval()
        randomize(model)
        return model


MODELS = {
    "llama, llama3 rope": Model("Llama", {"rope_parameters": LLAMA3}),
    "llama, yarn, biases": Model("Llama", {"rope_parameters": YARN, "attention_bias": True}),
    "llama, yarn mscale": Model("Llama", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}}),
    "llama, yarn options": Model(
        "Llama", {"rope_parameters": YARN | {"truncate": False, "attention_factor": 1.1, "beta_fast": 8}}
    ),
    "llama, linear rope, mha": Model("Llama", {"rope_parameters": LINEAR, "num_key_value_heads": 4}, mechanism="mha"),
    "llama, mqa": Model("Llama", {"num_key_value_heads": 1}, mechanism="mqa"),
    "llama, one head": Model(
        "Llama", {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16}, mechanism="single_head"
    ),
    "qwen2": Model("Qwen2"),
    "qwen3": Model("Qwen3", {"head_dim": 24, "rope_parameters": PLAIN | {"rope_theta": 1e6}}),
    "qwen3, biases": Model("Qwen3", {"attention_bias": True}),
    "qwen3_moe": Model("Qwen3Moe", MOE),
    "mistral": Model("Mistral", {"sliding_window": None}),
    "gemma2": Model("Gemma2", GEMMA | {"attn_logit_softcapping": 2.0}, layers=(1, 3)),
    "gemma3": Model("Gemma3", GEMMA3, layers=(1, 3)),
    "qwen2, window": Model("Qwen2", QWEN_WINDOW, layers=(1,), mechanism="sliding_window"),
    "qwen3, window": Model("Qwen3", QWEN_WINDOW, layers=(1,), mechanism="sliding_window"),
    "qwen3_moe, window": Model("Qwen3Moe", MOE | QWEN_WINDOW, mechanism="sliding_window"),
    "mistral, window": Model("Mistral", {"sliding_window": WINDOW}, mechanism="sliding_window"),
    "gemma2, window": Model(
        "Gemma2", GEMMA | {"attn_logit_softcapping": 2.0}, layers=(0, 2), mechanism="sliding_window"
    ),
    "gemma3, window": Model("Gemma3", GEMMA3, layers=(0, 2), mechanism="sliding_window"),
    "gpt_oss": Model("GptOss", GPT_OSS, mechanism="sinks"),
    "gpt_oss, no biases, mha": Model(
        "GptOss",
        GPT_OSS | {"attention_bias": False, "num_key_value_heads": 4, "rope_parameters": YARN | {"truncate": False}},
        layers=(0,),
        mechanism="sinks",
    ),
    "olmo2": Model("Olmo2"),
    "olmo2, biases, mha": Model("Olmo2", {"attention_bias": True, "num_key_value_heads": 4}, mechanism="mha"),
    "falcon, multi-query": Model("Falcon", {}, mechanism="mqa"),
    "falcon, new architecture": Model("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "falcon, a key per query": Model("Falcon", {"multi_query": False, "bias": True}, mechanism="mha"),
    "minimax_m2": Model(
        "MiniMaxM2",
        {
            "rope_parameters": PLAIN | {"rope_theta": 5e6, "partial_rotary_factor": 0.5},
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3_next": Model(
        "Qwen3Next",
        MOE
        | {
            "layer_types": LINEAR_FULL,
            "shared_expert_intermediate_size": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        layers=(1, 3),
    ),
    "deepseek_v2": Model("DeepseekV2", MLA, mechanism="mla"),
    "deepseek_v2, yarn, whole queries": Model(
        "DeepseekV2",
        MLA | {"q_lora_rank": None, "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
        mechanism="mla",
    ),
    "deepseek_v3": Model("DeepseekV3", MLA, mechanism="mla", pairs_apart=True),
    "deepseek_v3, yarn, biases": Model(
        "DeepseekV3",
        MLA | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "attention_bias": True},
        mechanism="mla",
        pairs_apart=True,
    ),
    "deepseek_v3, two mscales, whole queries, biases": Model(
        "DeepseekV3",
        MLA
        | {
            "q_lora_rank": None,
            "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
            "attention_bias": True,
        },
        mechanism="mla",
        pairs_apart=True,
    ),
    "deepseek_v3, halves, yarn in one step": Model(
        "DeepseekV3",
        MLA | {"rope_interleave": False, "rope_parameters": YARN | {"beta_fast": 1.0, "beta_slow": 1.0}},  # Kimi-K2's
        mechanism="mla",
    ),
    "kimi_linear": Model("KimiLinear", KIMI, layers=(1, 3), mechanism="mla"),
    "kimi_linear, low-rank queries, biases": Model(
        "KimiLinear", KIMI | {"q_lora_rank": 24, "attention_bias": True}, layers=(1, 3), mechanism="mla"
    ),
}


def randomize(model: Any) -> None:
    """Move every parameter off its neutral start: norms by 0.3 about theirs (0 or 1), biases by 0.3."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name or "ln_" in name or "layernorm" in name or p.ndim == 1:
                p.add_(0.3 * noise)
            else:
                p.copy_(noise if "embed" in name else noise / math.sqrt(p.shape[-1]))


@dataclass
class Step:
    """One call of a layer's attention module, as float32 NumPy arrays of shape B T D."""

    x: np.ndarray
    y: np.ndarray
    stored: tuple[np.ndarray, ...] = ()  # keys and values that the layer's cache holds afterwards, B K S H


def attention_module(model: Any, layer: int) -> Any:
    base = model.base_model
    block = (base.h if hasattr(base, "h") else base.layers)[layer]
    return block.self_attn if hasattr(block, "self_attn") else block.self_attention


def tokens(count: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (BATCH, count), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def run(model: Any, layers: tuple[int, ...], sizes: tuple[int, ...], use_cache: bool) -> list[dict[int, Step]]:
    """Feed tokens in chunks of these sizes and watch these layers: {layer: Step} of every chunk."""
    steps: list[dict[int, Step]] = []
    store = DynamicCache(config=model.config) if use_cache else None

    def hook(index: int):
        def save(module, args, kwargs, output):
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            y = output[0] if isinstance(output, tuple) else output
            cached = () if store is None else (store.layers[index].keys, store.layers[index].values)
            x, y, *cached = (a.numpy().copy() for a in (x, y, *cached))
            steps[-1][index] = Step(x, y, tuple(cached))

        return save

    handles = [attention_module(model, i).register_forward_hook(hook(i), with_kwargs=True) for i in layers]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small lose 30 ms each to threads where cores are few
    for chunk in torch.split(tokens(sum(sizes)), sizes, dim=1):
        steps.append({})
        model(input_ids=chunk, past_key_values=store, use_cache=use_cache)
    torch.set_num_threads(threads)
    for handle in handles:
        handle.remove()
    return steps


SPLITS = {  # of a window of 4 they meet lengths 3, 4, 5, 8 and 9, and a chunk of 5 in a ring that is not empty
    "prefill 1, decode": (1,) * TOKENS,
    "prefill 5, decode": (5,) + (1,) * (TOKENS - 5),
    "chunks": (3, 5, 1, 1),  # sizes that the other modes have: every new one is a compilation
}


@cache
def _jitted(function):
    return jax.jit(function, static_argnames="cfg")


def against_transformers(name: str, splits: dict[str, tuple[int, ...]] = SPLITS) -> tuple[str, dict[str, float]]:
    """(mechanism, {mode: worst relative error}) of the converted layers of MODELS[name], float32.

    Modes: a full forward without cache; each of `splits`, where a chunk of one token after the first goes through
    decode; and "cache", the contents after every chunk. jforge is fed the hidden states that transformers' attention
    module saw, so the errors are those of that module alone.
    """
    spec = MODELS[name]
    model = spec.build()
    weights = model.state_dict()
    layers = {index: hf.convert(model.config, weights, index) for index in spec.layers}
    errors = dict.fromkeys(("forward", *splits, "cache"), 0.0)
    (seen,) = run(model, spec.layers, (max(map(sum, splits.values())),), use_cache=False)
    for index, (att, cfg, params) in layers.items():
        got = _jitted(att.forward)(params, cfg, seen[index].x)
        errors["forward"] = max(errors["forward"], compare.worst_vector(got, seen[index].y))
    for split, sizes in splits.items():
        steps = run(model, spec.layers, sizes, use_cache=True)
        for index, layer in layers.items():
            output, cached = _follow(*layer, [step[index] for step in steps], spec)
            errors[split] = max(errors[split], output)
            errors["cache"] = max(errors["cache"], cached)
    return spec.mechanism, errors


def _follow(att, cfg, params, steps: list[Step], spec: Model) -> tuple[float, float]:
    """(worst error of y, worst error of the cache) while feeding jforge the chunks that transformers saw."""
    ours = att.init_cache(cfg, BATCH, sum(step.x.shape[1] for step in steps) + 2, jnp.float32)
    output = cached = 0.0
    for i, step in enumerate(steps):
        function = att.decode if i > 0 and step.x.shape[1] == 1 else att.prefill
        got, ours = _jitted(function)(params, cfg, step.x, ours)
        output = max(output, compare.worst_vector(got, step.y))
        cached = max(cached, _cache_error(att.cache_spec(cfg), ours, step.stored, spec))
    return output, cached


def _cache_error(buffers, ours, theirs: tuple[np.ndarray, ...], spec: Model) -> float:
    """Our two buffers, in the order of their spec, against transformers' `keys` and `values`, position by position.

    It keeps B K S H, K = 1 for latents; Falcon's new architecture keeps each key/value head G times. Of a window of W
    tokens it keeps the last W - 1 in their order, since the next token comes with its own key; ours is a ring with the
    token at position p in slot p mod W. inf where it keeps another number of tokens.
    """
    worst, length = 0.0, int(ours.length[0])
    for name, stored, apart in zip(buffers, theirs, (False, spec.pairs_apart), strict=True):
        leaf, stored, limit = np.asarray(getattr(ours, name)), stored.swapaxes(1, 2), buffers[name].limit
        kept = length if limit is None else min(length, limit - 1)
        if stored.shape[1] != kept:
            return math.inf
        leaf = leaf[:, np.arange(length - kept, length) % leaf.shape[1]]
        if leaf.ndim == 3:
            leaf = leaf[:, :, None]
        if apart:
            leaf = np.concatenate([leaf[..., ::2], leaf[..., 1::2]], axis=-1)
        leaf = np.repeat(leaf, stored.shape[2] // leaf.shape[2], axis=2)
        worst = max(worst, compare.worst_vector(leaf, stored))
    return worst
