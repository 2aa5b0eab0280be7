"""The Configs of the dense family: the options that shipped models differ in, and what each may be.

q, k, v go through these steps in this order: projection and bias, norm (unless it comes after RoPE), clip, RoPE, norm
(if it comes after RoPE), and of q the scaling by position.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from jforge.core import rope
from jforge.core.config import Derived, natural, one_of, positive, positive_ints, reject, within
from jforge.core.softmax import CAPS

PUBLIC = "jforge.attention.dense"
"""Where users find the classes: messages, help and pages call them so."""


@dataclass(frozen=True, kw_only=True)
class Config(Derived):
    """GQA. Names follow Hugging Face; where a default is given after `None:`, None picks it.

    hidden_size: D, of the activations
    num_attention_heads: N, of the queries
    num_key_value_heads: K, a divisor of N; None: num_attention_heads
    head_dim: H, of queries and keys; None: hidden_size // num_attention_heads
    v_head_dim: V, of values; None: head_dim
    attention_bias: on q, k and v (Qwen2)
    attention_output_bias: on o (gpt-oss)
    qk_norm: "head": one weight for all heads (Qwen3); "heads": a weight of its own for each (Cohere, StableLM);
        "flat": over N H and K H channels (OLMo-2); None: no norm
    qk_norm_type: "rms", or "layer": the mean is taken off first (Cohere, Phi)
    qk_norm_weight: False: the norm of q and k has no weight (Llama 4); then qk_norm is "head"
    qk_norm_bias: a bias after the weight of a "layer" norm (Persimmon)
    qk_norm_after_rope: norm after RoPE, not before (Llama 4, HunYuan)
    norm_offset: 1.0 for Gemma's (1 + w)
    rms_norm_eps: of the norms of q and k, and of v
    v_norm: each head's values are RMS-normed, without a weight (Gemma 3n)
    attention_k_eq_v: values are the projected keys, before their norm and RoPE (Gemma 4); there is no wv
    clip_qkv: c, q, k and v are held in [-c, c] after the norm and before RoPE (OLMo, DBRX); None: no clip
    rope_parameters: as in config.json, {"rope_type": "default", "rope_theta": 1e4}; or linear, llama3, yarn, longrope,
        proportional, and with partial_rotary_factor if not all channels turn. None: no positions at all (NoPE)
    rope_layout: "half" pairs channels j and j + r/2 (Hugging Face), "interleaved" 2j and 2j + 1
    scaling: of the logits; None: head_dim ** -0.5
    attn_logit_softcapping: c, logits become c tanh(logit / c) (Gemma 2); None: no cap
    alibi: the logits get slope_n (s - t), s and t the places of key and query in their row (BLOOM, MPT)
    attn_scale: a, queries grow with their place t in the row, by 1 + a ln(1 + floor((t + attn_scale_from) /
        floor_scale)) (Llama 4's temperature); None: they do not
    floor_scale: tokens until the first step of that factor, and between steps
    attn_scale_from: 1 where the first token counts as 1 (Llama 4), 0 where as 0 (Ministral 3)
    attn_output_gate: a gate on the heads' outputs, made from the layer's input (Qwen3-Next)
    output_gate_type: "sigmoid" or "softplus" (Laguna)
    output_gate_per_head: one number for all V channels of a head
    kv_shared: no keys and values of its own, the layer reads those of an earlier one (Gemma 3n): for jforge.stack
    """

    __module__ = PUBLIC

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    v_head_dim: int | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    qk_norm: str | None = None
    qk_norm_type: str = "rms"
    qk_norm_weight: bool = True
    qk_norm_bias: bool = False
    qk_norm_after_rope: bool = False
    norm_offset: float = 0.0
    rms_norm_eps: float = 1e-6
    v_norm: bool = False
    attention_k_eq_v: bool = False
    clip_qkv: float | None = None
    rope_parameters: Mapping[str, Any] | None = None
    rope_layout: str = "half"
    scaling: float | None = None
    attn_logit_softcapping: float | None = None
    alibi: bool = False
    attn_scale: float | None = None
    floor_scale: float = 8192
    attn_scale_from: int = 1
    attn_output_gate: bool = False
    output_gate_type: str = "sigmoid"
    output_gate_per_head: bool = False
    kv_shared: bool = False

    def __post_init__(self):
        positive_ints(self, "hidden_size", "num_attention_heads")
        heads = self.num_attention_heads
        self._derive("num_key_value_heads", heads)
        self._derive("head_dim", None if self.hidden_size % heads else self.hidden_size // heads)
        if self.head_dim is None:
            reject(
                "head_dim", None, f"given: hidden_size={self.hidden_size} is no multiple of num_attention_heads={heads}"
            )
        self._derive("v_head_dim", self.head_dim)
        positive_ints(self, "num_key_value_heads", "head_dim", "v_head_dim")
        self._derive("scaling", self.head_dim**-0.5)
        if heads % self.num_key_value_heads:
            reject("num_attention_heads", heads, f"a multiple of num_key_value_heads={self.num_key_value_heads}")
        self._check_norms()
        if self.attention_k_eq_v and self.v_head_dim != self.head_dim:
            reject("v_head_dim", self.v_head_dim, f"head_dim={self.head_dim} where attention_k_eq_v is true")
        one_of("rope_layout", self.rope_layout, rope.LAYOUTS)
        one_of("output_gate_type", self.output_gate_type, ("sigmoid", "softplus"))
        for name in ("scaling", "rms_norm_eps", "floor_scale"):
            positive(name, getattr(self, name))
        natural("attn_scale_from", self.attn_scale_from)
        for name in ("clip_qkv", "attn_scale"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))
        if self.attn_logit_softcapping is not None:
            within("attn_logit_softcapping", self.attn_logit_softcapping, *CAPS)
        object.__setattr__(self, "rope_parameters", rope.freeze(self.rope_parameters))
        if self.rope_parameters is not None:
            rope.rotary_dim(self.rope_parameters, self.head_dim)

    def _check_norms(self):
        one_of("qk_norm", self.qk_norm, (None, "head", "flat", "heads"))
        one_of("qk_norm_type", self.qk_norm_type, ("rms", "layer"))
        if not self.qk_norm_weight and self.qk_norm != "head":
            reject("qk_norm_weight", self.qk_norm_weight, f"True where qk_norm is {self.qk_norm!r}")
        if self.qk_norm_bias and (self.qk_norm_type != "layer" or not self.qk_norm_weight):
            reject("qk_norm_bias", self.qk_norm_bias, "False without the weight of a norm of qk_norm_type 'layer'")


def lacks(cfg: Config, *names: str) -> None:
    """Refuse options of the dense family that the mechanism of this Config does not have."""
    mechanism = type(cfg).__module__.rpartition(".")[2]
    for option in fields(Config):
        if option.name in names and getattr(cfg, option.name) != option.default:
            reject(option.name, getattr(cfg, option.name), f"{option.default!r} in {mechanism}")


@dataclass(frozen=True, kw_only=True)
class MHAConfig(Config):
    """As many key/value heads as query heads.

    num_key_value_heads: num_attention_heads, or None
    """

    __module__ = PUBLIC

    def __post_init__(self):
        super().__post_init__()
        if self.num_key_value_heads != self.num_attention_heads:
            allowed = f"num_attention_heads={self.num_attention_heads} in mha"
            reject("num_key_value_heads", self.num_key_value_heads, allowed)


@dataclass(frozen=True, kw_only=True)
class MQAConfig(Config):
    """One key/value head for all query heads.

    num_key_value_heads: 1
    """

    __module__ = PUBLIC

    num_key_value_heads: int | None = 1

    def __post_init__(self):
        super().__post_init__()
        one_of("num_key_value_heads", self.num_key_value_heads, (1,))


@dataclass(frozen=True, kw_only=True)
class SingleHeadConfig(MHAConfig):
    """One query head, one key/value head.

    num_attention_heads: 1
    """

    __module__ = PUBLIC

    num_attention_heads: int = 1

    def __post_init__(self):
        super().__post_init__()
        one_of("num_attention_heads", self.num_attention_heads, (1,))
