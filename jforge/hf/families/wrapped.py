"""Language models inside image-text models: caches alone, as their weights are not compared with transformers.

Most are another family with positions of three kinds (time, height, width), which no cache shows.
"""

from jforge.core.config import reject
from jforge.hf.families.decoders import FAMILIES as DECODERS
from jforge.hf.families.dense import FAMILIES as DENSES
from jforge.hf.families.dense import plain
from jforge.hf.families.gemmas import FAMILIES as GEMMAS
from jforge.hf.families.gpts import every_head
from jforge.hf.families.latent import FAMILIES as LATENTS
from jforge.hf.families.llamas import FAMILIES as LLAMAS
from jforge.hf.families.parts import bias, fields, without_rope
from jforge.hf.family import (
    CROSS,
    FULL,
    SLIDING,
    Family,
    Layer,
    all_full,
    as_listed,
    caches_of,
    every,
    listed,
    with_encoder,
)
from jforge.hf.kept import KEPT, of_encoder
from jforge.hf.keys import ENCODER, integer

_ALONE = "its attention is not compared with transformers"
_THREE = "positions of three kinds (time, height, width) have no mechanism"
_IMAGES = "layers that attend to an image have no mechanism"


def _from_last(config: dict, index: int) -> str:
    """The last layer and every fourth before it are full (Muse)."""
    return listed(config, index) or (SLIDING if (config["num_hidden_layers"] - 1 - index) % 4 else FULL)


def _step(config: dict) -> dict:
    """Lists may go on with layers that predict more tokens."""
    kinds, count = config.get("layer_types"), integer(config, "num_hidden_layers")
    more = config.get("num_nextn_predict_layers") or 0
    if isinstance(kinds, (list, tuple)) and len(kinds) == count + more:
        config = config | {"layer_types": list(kinds[:count])}
    return config


def _mllama_kind(config: dict, index: int) -> str | tuple[str, ...]:
    """Some layers attend to an image alone: without one they keep nothing."""
    images = config["cross_attention_layers"]
    if not isinstance(images, (list, tuple)):
        reject("cross_attention_layers", images, "a list of layers")
    if index not in images:
        return all_full(config, index)
    return CROSS if config.get(ENCODER) else ()


def _mllama(config: dict, kind: str) -> dict:
    own = fields(bias)(config, FULL)
    if kind != CROSS:
        return own
    return of_encoder(config[ENCODER], own["num_key_value_heads"], own["hidden_size"] // own["num_attention_heads"])


def _t5(config: dict, kind: str) -> dict:
    """Heads of d_kv channels, whatever the model's width."""
    width = {"num_key_value_heads": integer(config, "num_attention_heads"), "head_dim": integer(config, "d_kv")}
    return without_rope()(config | width, kind)


_T5 = caches_of(Family(_t5, all_full, {FULL: Layer(None, None)}), "biases by buckets of distance have no mechanism")
_QWEN_VL = caches_of(DENSES["qwen2"], _THREE, defaults={"sliding_window": 4096, "max_window_layers": 80})
_QWEN_VL = _QWEN_VL._replace(defaults=_QWEN_VL.defaults | {"num_key_value_heads": 8})
_MUSE = {"kind": _from_last, "head_dim": 128, "why": "norms after the attention and its gate are not compared"}
_KOSMOS = {"embed_dim": "hidden_size", "attention_heads": "num_attention_heads", "layers": "num_hidden_layers"}

FAMILIES: dict[str, Family] = {
    "blip_text_model": with_encoder(caches_of(DECODERS["bert"], _ALONE), lambda config: True),
    "chameleon": plain(_ALONE, defaults={"num_key_value_heads": 32}),
    "cohere_compass_text": plain(_THREE, kind=as_listed, defaults={"sliding_window": 4096}),
    "cosmos3_edge_text": plain(_THREE, head_dim=128, defaults={"num_key_value_heads": 8}),
    "deepseek_ocr2_text": plain(_ALONE),
    "diffusion_gemma_text": caches_of(
        GEMMAS["gemma4_text"], "the tokens of a canvas see one another: attention that is not causal has no mechanism"
    ),
    "ernie4_5_vl_moe_text": caches_of(LLAMAS["ernie4_5_moe"], _THREE),
    "evolla": plain("adapters that attend to a protein have no mechanism", defaults={"num_key_value_heads": 8}),
    "glm4v_moe_text": caches_of(LLAMAS["glm4_moe"], _THREE),
    "glm4v_text": plain(_THREE, defaults={"num_key_value_heads": 2}),
    "glm_ocr_text": plain(_THREE, defaults={"num_key_value_heads": 8}),
    "granite4_vision_text": plain(_ALONE),
    "granite_docling_text": plain(_ALONE, defaults={"num_key_value_heads": 4}),
    "hunyuan_vl_text": caches_of(LLAMAS["hunyuan_v1_dense"], _THREE),
    "idefics": plain(_IMAGES, every_head),
    "kosmos_2_5_text_model": plain(_ALONE, every_head, names=_KOSMOS),
    "kosmos_2_text_model": with_encoder(plain(_ALONE, every_head, names=_KOSMOS)),
    "mistral4": caches_of(
        LATENTS["deepseek_v3"], "queries that grow with their place have no mechanism in latent attention",
        defaults={"q_lora_rank": 1024, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "rope_interleave": True},
    ),
    "mllama_text_model": Family(
        _mllama, _mllama_kind, {FULL: Layer(None, None, lacks=_IMAGES), CROSS: Layer(KEPT, None, lacks=_IMAGES)},
        {"num_key_value_heads": 8, "cross_attention_layers": (3, 8, 13, 18, 23, 28, 33, 38)},
        crosses=lambda config: bool(config["cross_attention_layers"]),
    ),
    "molmo2_text": plain(_ALONE, head_dim=128, defaults={"num_key_value_heads": 8}),
    "muse_glimmer_text": plain(**_MUSE, defaults={"num_key_value_heads": 2, "sliding_window": 2048}),
    "muse_spark_text": plain(
        **_MUSE | {"head_dim": 64}, defaults={"num_key_value_heads": 16, "sliding_window": 2048}
    ),
    "paddleocr_vl_text": caches_of(
        LLAMAS["ernie4_5"], _THREE, fields=fields(bias, head_dim=128), defaults={"num_key_value_heads": 2}
    ),
    "pix2struct_text_model": with_encoder(
        _T5._replace(
            defaults={"d_kv": 64, "is_encoder_decoder": True},
            names={"num_heads": "num_attention_heads", "num_layers": "num_hidden_layers"},
        ),
        lambda config: True,
    ),
    "pp_formulanet_text": caches_of(DECODERS["mbart"], _ALONE),
    "qwen2_5_omni_text": _QWEN_VL._replace(
        defaults={"num_key_value_heads": 4, "sliding_window": 32768, "max_window_layers": 28}
    ),
    "qwen2_5_vl_text": _QWEN_VL,
    "qwen2_vl_text": _QWEN_VL,
    "qwen3_omni_moe_text": plain(_THREE, defaults={"num_key_value_heads": 4}),
    "qwen3_vl_moe_text": plain(_THREE, defaults={"num_key_value_heads": 16}),
    "qwen3_vl_text": plain(_THREE, head_dim=128, defaults={"num_key_value_heads": 32}),
    "step3p5": plain(
        "heads of windows and their gate are not compared", kind=as_listed, head_dim=128, completed=_step,
        defaults={"num_key_value_heads": 8}, names={"num_attention_groups": "num_key_value_heads"},
    ),
    "t5gemma2_decoder": with_encoder(
        plain(
            "attention over itself and an encoder in one softmax has no mechanism", kind=every(6, SLIDING),
            head_dim=256, defaults={"num_key_value_heads": 4, "sliding_window": 4096},
        ),
        lambda config: True,
    ),
    "udop": with_encoder(
        _T5._replace(
            defaults={"d_kv": 64, "is_encoder_decoder": True},
            names={"d_model": "hidden_size", "num_heads": "num_attention_heads",
                   "num_layers": "num_hidden_layers", "num_decoder_layers": "num_hidden_layers"},
        ),
        lambda config: True,
    ),
}  # fmt: skip
