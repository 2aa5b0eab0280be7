"""What transformers' own caches hold, type by type: models of full width on the meta device, which needs no memory.

A prompt longer than any window runs through the model; `held` is what its cache has then, `counted` what the lens says.
Both are lists, a layer each, of buffers: (numbers in a row, dtype). FILLED, WHOLE and ALONE say how the models are
built, APART where the two differ by design: docs/divergences.md has every entry.
"""

import importlib
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from jforge import lens
from jforge.harness import hf_shim

CAUSAL, IMAGE_TEXT = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
HEADS = {"causal": "AutoModelForCausalLM", "images": "AutoModelForImageTextToText", "texts": "AutoModelForSeq2SeqLM",
         "speech": "AutoModelForSpeechSeq2Seq"}  # fmt: skip
"""What a type is built as, and the class that builds it."""

BATCH, ENCODER, LAYERS, SHORT = 2, 7, 6, 13
ROOT = Path(__file__).parents[2]
Part = tuple[int, str]

_PLAIN = {"rope_type": "default", "rope_theta": 1e4}
_MROPE = {"rope_parameters": _PLAIN | {"partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}}
_QUARTER = {"rope_parameters": _PLAIN | {"partial_rotary_factor": 0.25}}
FILLED: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [2, 5]},
    "blenderbot": {"encoder_layers": 24},  # its decoder alone makes a cache of so many layers
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _PLAIN}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {"num_hidden_layers": 6, "mlp_layer_types": ["dense"] * 6},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "diffusion_gemma_text": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_hidden_layers": 15, "num_kv_shared_layers": 5},
    "glm4_moe": {"head_dim": 128},
    "glm4v_moe_text": _MROPE | {"head_dim": 128},
    "glm4v_text": _MROPE,
    "granitemoehybrid": {"num_hidden_layers": 4, "layer_types": ["mamba", "attention"] * 2},
    "hrm_text": {"num_hidden_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl_text": {"head_dim": 128, "rope_parameters": _PLAIN | {"xdrope_section": [16, 16, 16, 16]}},
    "jetmoe": {"hidden_size": 64, "intermediate_size": 32, "vocab_size": 97, "num_key_value_heads": 3,
               "kv_channels": 12},  # tiny and not on the meta device: it asks how many tokens each expert has
    "lfm2": {"num_hidden_layers": 6, "layer_types": ["conv", "full_attention"] * 3},
    "lfm2_moe": {"num_hidden_layers": 6, "layer_types": ["conv", "full_attention"] * 3},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen3_omni_moe_text": {"hidden_size": 3584},
    "qwen4_exp_text": _QUARTER | {"indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 128,
                                  "indexer_budget": 2048, "indexer_compress_ratio": 64},
    "recurrent_gemma": {"attention_window_size": 16},  # it goes through its prompt token by token
    "step3p5": {"num_hidden_layers": 6, "layer_types": ["full_attention", "sliding_attention"] * 3,
                "sliding_window": 512, "num_sliding_attention_heads": 96},
    "zamba": {"num_hidden_layers": 9},  # two that share their attention
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
}  # fmt: skip
"""Sizes that a class leaves open, or whose defaults contradict one another; by the type of the language model."""

WHOLE = {"gpt_neo", "nemotron_h"}
"""Types of which all layers are built, as are encoder-decoders: their lists do not follow num_hidden_layers."""

ALONE = {
    "aya_vision": "Cohere2ForCausalLM",  # the class's defaults build no vision model
    "blip": "BlipTextLMHeadModel",  # no prompt without an image
    "blip-2": "OPTForCausalLM",
    "emu3": "Emu3ForCausalLM",  # a tokenizer's numbers are needed
    "evolla": "EvollaForProteinText2Text",  # the auto class does not know it
    "fast_vlm": "Qwen2ForCausalLM",  # a vision model of another package
    "gemma3n": "Gemma3nForCausalLM",
    "granite4_vision": "Granite4VisionTextModel",
    "instructblip": "OPTForCausalLM",
    "instructblipvideo": "OPTForCausalLM",
    "kosmos-2": "kosmos2.Kosmos2TextForCausalLM",
    "musicgen": "MusicgenForCausalLM",  # the auto class gives it the whole model's config
    "musicgen_melody": "MusicgenMelodyForCausalLM",
    "perception_lm": "LlamaForCausalLM",
    "vision-encoder-decoder": "BertLMHeadModel",
}
"""Types whose language model is built alone, and its class."""

APART = {
    "deepseek_v4": "open blocks, and one vector where transformers keeps it as key and as value",
    "dots3_note_text": "index keys, which transformers keeps in float32",
    "glm5_next_text": "a column of the index keys that says which tokens are pads",
    "gpt_neo": "keys of a local layer, all of which transformers keeps",
    "minimax": "the dtype of lightning's states",
    "zaya": "rows of convolutions, of which it keeps none in vain",
}
"""By the type of the language model, beside a window's last token and a convolution's spare column in all of them."""


class _Answers(TorchDispatchMode):
    """What a model asks of the values of its tensors: every number is 1, and no place of a mask is true."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0 if args[0].dtype.is_floating_point else 1
        if func is torch.ops.aten.nonzero.default and args[0].is_meta:
            return torch.empty(0, args[0].ndim, dtype=torch.long, device="meta")
        if func is torch.ops.aten.index.Tensor and args[0].is_meta:
            args = (args[0], [place for one in args[1] for place in _places(one)])
        return func(*args, **(kwargs or {}))


def _places(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """An index as it is, a mask as the numbers of no places."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [torch.empty(0, dtype=torch.long, device="meta")] * index.ndim


class Held(NamedTuple):
    config: Any
    context: int
    layers: list[list[Part]]
    cross: list[list[Part]]  # keys of an encoder


def text_of(config: Any) -> Any:
    """The config of the language model, itself where there is no other."""
    nested = (getattr(config, key, None) for key in ("text_config", "decoder"))
    return next((one for one in nested if isinstance(one, transformers.PretrainedConfig)), config)


def config_of(name: str, layers: int | None = LAYERS) -> Any:
    """The default config of the class, with the sizes that it leaves open; of at most `layers` layers."""
    made = transformers.CONFIG_MAPPING[name]
    default = made()
    text = text_of(default)
    own = dict(FILLED.get(text.model_type, {}))
    whole = layers is None or text.model_type in WHOLE or default.is_encoder_decoder
    if not whole and "num_hidden_layers" not in own and getattr(text, "num_hidden_layers", 0) > layers:
        own |= {"num_hidden_layers": layers}
    if text is default:
        config = made(**own)
    elif own:
        key = "text_config" if hasattr(default, "text_config") else "decoder"
        config = made(**{key: {"model_type": text.model_type} | own})
    else:
        config = default
    for each in (config, text_of(config)):
        if hasattr(each, "is_decoder"):
            each.is_decoder = True
    return config


def longest_window(text: Any) -> int:
    names = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size", "sliding_window_size")
    given = (getattr(text, name, None) for name in names)
    return max((window for window in given if isinstance(window, int)), default=0)


@torch.no_grad()
def held(name: str, head: str, layers: int | None = LAYERS) -> Held:
    """What the cache of this type's default model has after a prompt; head: one of HEADS."""
    config = config_of(name, layers)
    text = text_of(config)
    for each in (config, text):
        each._experts_implementation = "batched_mm"
    for tower in filter(None, (getattr(config, key, None) for key in ("vision_config", "audio_config"))):
        for key in ("num_hidden_layers", "depth"):  # no cache is theirs
            if isinstance(getattr(tower, key, None), int):
                setattr(tower, key, 1)
    asked = text if name in ALONE else config
    auto = getattr(transformers, HEADS[head])
    build = _find(ALONE[name])._from_config if name in ALONE else auto.from_config
    context = max(SHORT, longest_window(text) + 5)
    device = "cpu" if name == "jetmoe" else "meta"
    with torch.device(device):
        model = build(asked, dtype=torch.bfloat16).eval()
        given = _inputs(asked, context, head)
        try:
            out, store = _filled(model, given, name)
        except (NotImplementedError, RuntimeError):  # it asks for values of its tensors
            with _Answers():
                out, store = _filled(model, given, name)
    store, encoders = hf_shim.own_and_encoders(hf_shim.made(out) if store is None else store)
    cross = [] if encoders is None else list(_parts(encoders, text.model_type))
    own = _OWN[name](store, model) if name in _OWN else _parts(store, text.model_type)
    return Held(config, context, list(own), cross)


def _filled(model: Any, given: dict, name: str) -> tuple[Any, Any]:
    """(what the model returns, the cache that it was given or None)."""
    store = hf_shim.empty_cache(model) if name in ("granite4_vision", "recurrent_gemma") else None
    return model(**given, **hf_shim.KEEPING if store is None else hf_shim.given(model, store)), store


def _find(name: str) -> Any:
    """A model class, by its module where transformers does not export it."""
    module, _, own = name.rpartition(".")
    where = importlib.import_module(f"transformers.models.{module}.modeling_{module}") if module else transformers
    return getattr(where, own)


def _inputs(config: Any, context: int, head: str) -> dict[str, Any]:
    ids = torch.zeros(BATCH * getattr(config, "num_codebooks", 1), context, dtype=torch.long)
    if config.model_type == "moshi":
        ids = ids[:BATCH]
    width = getattr(config, "hidden_size", None) or text_of(config).hidden_size
    states = torch.zeros(BATCH, ENCODER, width, dtype=torch.bfloat16)
    if config.is_encoder_decoder and head != "causal":
        encoded = BaseModelOutput(states)
        encoded.attention_mask = torch.ones(BATCH, ENCODER, dtype=torch.long)
        return {"decoder_input_ids": ids, "encoder_outputs": encoded}
    if config.model_type in ("bert", "blip_text_model") and head != "causal":
        return {"input_ids": ids, "encoder_hidden_states": states}
    if config.model_type == "idefics":
        image = torch.zeros(BATCH, 1, ENCODER, config.vision_config.embed_dim, dtype=torch.bfloat16)
        mask = torch.zeros(BATCH, context, 1, dtype=torch.long)
        return {"input_ids": ids, "image_encoder_embeddings": image, "image_attention_mask": mask}
    return {"input_ids": ids}


def _parts(store: Any, model: str) -> Iterator[list[Part]]:
    """Of every layer that keeps something, in order, without what differs by design."""
    lightning = [index for index in range(LAYERS) if hf_shim.lightning_state(store, index) is not None]
    for index in range(max([len(store.layers), *(index + 1 for index in lightning)])):
        own = hf_shim.layer_of(store, index) if index < len(store.layers) else None
        found = [] if own is None else [*_slots(own, model), *_states(own, model)]
        if index in lightning:
            found.append(_part(hf_shim.lightning_state(store, index), dtype="float32"))
        if found:
            yield found


def _part(a: torch.Tensor, times: Fraction | int = 1, dtype: str | None = None) -> Part:
    return int(a[0].numel() * times), dtype or str(a.dtype).removeprefix("torch.")


def _slots(own: Any, model: str) -> Iterator[Part]:
    """Of a window of W tokens transformers keeps W - 1."""
    both = [a for a in hf_shim.keys_and_values(own) if a.numel()]
    for a in both[:1] if model == "deepseek_v4" else both:
        kept = a.shape[2]
        yield _part(a, Fraction(kept + hf_shim.has_window(own), kept))
    yield from (_part(hf_shim.compressed(own, name).entries) for name in hf_shim.compressors(own))
    if (keys := hf_shim.index_keys(own)) is not None:
        keys = keys[..., :-1] if model == "glm5_next_text" else keys
        yield _part(keys, dtype="bfloat16" if model == "dots3_note_text" else None)


def _states(own: Any, model: str) -> Iterator[Part]:
    """Of a convolution transformers keeps a column that it never reads."""
    if hf_shim.has_states(own):
        inputs, states = hf_shim.all_states(own)
        yield from (_part(a[..., int(model != "zaya") :]) for a in inputs)
        yield from map(_part, states)


def _recurrent_gemma(store: Any, model: Any) -> Iterator[list[Part]]:
    """States are in its modules."""
    for index, layer in enumerate(model.model.layers):
        states = hf_shim.states_in_module(layer.temporal_block)
        yield list(map(_part, states)) if states else list(_slots(store.layers[index], "recurrent_gemma"))


_OWN = {
    "recurrent_gemma": _recurrent_gemma,
    "rwkv": lambda store, model: ([_part(a[..., i]) for a in store] for i in range(store[0].shape[-1])),
    "xlstm": lambda store, model: ([_part(a) for a in state] for state in store.rnn_state.values()),
}
"""Caches that are no lists of layers."""


def counted(config: Any, context: int, encoder: bool = False) -> tuple[list[list[Part]], list[list[Part]]]:
    """(what the lens says that each cache holds, the same of an encoder's keys) in the order of transformers: the
    caches of a layer are one there, but of LongCat and its like, which have two attentions in a layer.
    """
    found = lens.from_config(config, encoder_tokens=ENCODER if encoder else None)
    layers: dict[Any, list[Part]] = {}
    cross = []
    for number, layer in enumerate(found.layers):
        own = [_buffer(buffer, context, found.model_type) for buffer in layer.spec.values()]
        own = [part for part in own if part]
        if layer.kind == "cross_attention" and encoder:
            cross.append(own)
        elif own:
            layers.setdefault(number if found.model_type == "longcat_flash" else layer.index, []).extend(own)
    return list(layers.values()), cross


def _buffer(buffer: Any, context: int, model: str) -> Part | None:
    if model == "deepseek_v4" and not buffer.has_slots:
        return None
    slots = context if model == "gpt_neo" and buffer.limit else buffer.slots(context)
    return slots * math.prod(buffer.shape), str(buffer.dtype_in("bfloat16"))
