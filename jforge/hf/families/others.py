"""Families whose caches are known and whose attention is not: gates, hashes of distances, convolutions on keys and
values, two attentions in a layer, recurrences of their own.
"""

from jforge.core.config import reject
from jforge.hf.families.decoders import BIASES
from jforge.hf.families.deltas import FAMILIES as DELTAS
from jforge.hf.families.dense import DENSE, WINDOWS, plain
from jforge.hf.families.gpts import every_head
from jforge.hf.families.latent import FAMILIES as LATENTS
from jforge.hf.families.latent import indexer_types
from jforge.hf.families.parts import base, bias, fields, window, without_rope
from jforge.hf.family import (
    FULL,
    INDEXED,
    LINEAR,
    SLIDING,
    Family,
    Layer,
    all_full,
    caches_of,
    kept,
    listed,
    with_encoder,
)
from jforge.hf.kept import keys_and_values, slots
from jforge.hf.keys import integer, known

_STREAMS = "a decoder over several streams of codes"


def _beam_kind(config: dict, index: int) -> str:
    """The last layer is full too."""
    last = index == config["num_hidden_layers"] - 1
    return listed(config, index) or (SLIDING if (index + 1) % 6 and not last else FULL)


def _cpmant(config: dict, kind: str) -> dict:
    """A prompt of learned vectors lies before every row's own tokens."""
    sizes = integer(config, "num_attention_heads"), integer(config, "dim_head", 128)
    return {"buffers": keys_and_values(*sizes, more=integer(config, "prompt_length", 32))}


def _hrm(config: dict) -> dict:
    """A cache for each of H_cycles * (L_cycles + 1) passes of a stack; saved files count all in num_hidden_layers."""
    if config.get("num_layers_per_stack") is not None:
        return config
    passes = integer(config, "H_cycles", 2) * (integer(config, "L_cycles", 3) + 1)
    return config | {"num_hidden_layers": integer(config, "num_hidden_layers") * passes}


def _mimo(config: dict, kind: str) -> dict:
    """Windows have twice the heads of keys; sliding_window_size, a key of the first files, counts what lies before."""
    if config.get("sliding_window_size") is not None:
        config = config | {"sliding_window": integer(config, "sliding_window_size") + 1}
    own = fields(bias, window, head_dim=192)(config, kind) | {"v_head_dim": integer(config, "v_head_dim", 128)}
    return own | {"num_key_value_heads": own["num_key_value_heads"] * (2 if kind == SLIDING else 1)}


def _mimo_kind(config: dict, index: int) -> str:
    return listed(config, index) or (SLIDING if index and (index + 1) % 6 else FULL)


def _jetmoe(config: dict, kind: str) -> dict:
    """Every token has num_experts_per_tok queries for each key."""
    heads = integer(config, "num_key_value_heads", 16) * integer(config, "num_experts_per_tok", 2)
    return fields()(config | {"num_attention_heads": heads, "head_dim": integer(config, "kv_channels", 128)}, kind)


# --- latent attention


def _longcat_kind(config: dict, index: int) -> tuple[str, str]:
    known(config, layer_types=None, sliding_window=None, attention_chunk_size=None)  # transformers' cache obeys them
    return FULL, "second_full_attention"


def _longcat(config: dict, kind: str) -> dict:
    return LATENTS["deepseek_v3"].fields(config | {"rope_interleave": True}, FULL)


def _dots3(config: dict, kind: str) -> dict:
    """Windows have latents of their own: swa_... in the first files, per_layer_config in saved ones."""
    if kind == FULL:
        return LATENTS["deepseek_v2"].fields(config, kind)
    if kind == INDEXED:
        return LATENTS["deepseek_v32"].fields(config, kind)
    saved = config.get("per_layer_config") is not None
    rank = integer(config, "kv_lora_rank") if saved else integer(config, "swa_kv_lora_rank", 1024)
    turning = integer(config, "qk_rope_head_dim", 64)
    if not saved:
        rest = integer(config, "swa_head_dim", 256) - integer(config, "swa_qk_nope_head_dim", 192)
        turning = integer(config, "swa_qk_rope_head_dim", rest)
    limit = integer(config, "sliding_window", None) or integer(config, "sliding_window_size", 512)
    return {"buffers": {"latent": slots(rank, limit=limit), "k_rope": slots(turning, limit=limit)}}


def _dots3_kind(config: dict, index: int) -> str:
    """The first files call layers with an indexer full, unless use_dsa is false; saved ones mean what they say."""
    kind = listed(config, index)
    if kind is None:
        kind = FULL if config.get("use_sliding_window") is False or index < 2 or index % 4 == 1 else SLIDING
    picks = config.get("use_dsa", None if config.get("per_layer_config") is not None else True)
    if picks is None or kind == SLIDING:
        return kind
    return INDEXED if picks else FULL


def _hy_v4_kind(config: dict, index: int) -> str:
    """The first layer and then every fourth has an indexer; the others take its picks."""
    if (kind := listed(config, index)) not in (None, INDEXED):
        return kind
    if config.get("indexer_types") is not None:
        return INDEXED if indexer_types(config)[index] == "full" else _SHARED
    return INDEXED if index == 0 or (index - 1) % 4 == 0 else _SHARED


def _hy_v4(config: dict, kind: str) -> dict:
    return LATENTS["glm_moe_dsa"].fields(config, kind)


def _picker(config: dict, index: int) -> int | None:
    if _hy_v4_kind(config, index) != _SHARED:
        return None
    return max(i for i in range(index) if _hy_v4_kind(config, i) == INDEXED)


def _mistral_large4(config: dict, kind: str) -> dict:
    """Layers without positions have no rotary slice. One that takes another's latents may have own index keys."""
    index = config["layer_index"]
    source, picks = _source(config, index), (integer(config, "index_topk", 2048), 1)
    latents = _latents(config, index if source is None else source)
    keys = {"k_index": slots(integer(config, "index_head_dim", 128))} if _picks(config, index) else {}
    held = {"buffers": latents | keys} if source is None else {"buffers": keys, "borrowed": latents}
    return held | {"picked": dict.fromkeys(latents, picks)}


def _latents(config: dict, index: int) -> dict:
    turns = listed(config, index, "no_rope_layers")
    turns = (index + 1) % integer(config, "no_rope_layer_interval", 4) if turns is None else turns
    latents = {"latent": slots(integer(config, "kv_lora_rank", 512))}
    return latents | ({"k_rope": slots(integer(config, "qk_rope_head_dim", 64))} if turns else {})


def _source(config: dict, index: int) -> int | None:
    """The layer whose latents this one reads."""
    given = listed(config, index, "kv_source_layers")
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given <= index:
        reject(f"kv_source_layers[{index}]", given, f"a layer in 0..{index}")
    return None if given == index else given


def _picks(config: dict, index: int) -> bool:
    """Whether the layer has an indexer, as GLM-5 says it."""
    return LATENTS["glm_moe_dsa"].kind(config | {"layer_types": None}, index) == INDEXED


def _glm5_next(config: dict, kind: str) -> dict:
    """Index keys and their gates are kept a token and pooled by index_kpool as they are read."""
    if kind == LINEAR:
        return DELTAS["glm5_next_text"].fields(config, kind)
    latents = {"latent": slots(integer(config, "kv_lora_rank", 512))}
    if config.get("qk_rope_head_dim"):
        latents |= {"k_rope": slots(integer(config, "qk_rope_head_dim"))}
    pool, most = integer(config, "index_kpool", 16), integer(config, "index_topk", 2048)
    known(config, index_kpool_always_select_tail=True)
    width = 2 * integer(config, "index_head_dim", 128)
    keys = {"k_index": slots(width)} if _picks(config, config["layer_index"]) else {}
    return {"buffers": latents | keys, "picked": dict.fromkeys(latents, (most // pool * pool, pool))}


def _glm5_next_kind(config: dict, index: int) -> str:
    kind = listed(config, index) or (LINEAR if index % 4 != 3 else INDEXED)
    return INDEXED if kind == FULL else kind


def _qwen4(config: dict, kind: str) -> dict:
    """Full layers read the blocks that an indexer picks, and the open one."""
    if kind == LINEAR:
        return DELTAS["qwen3_5_text"].fields(config, kind)
    own = base(config, None, head_dim=256)
    block, most = integer(config, "indexer_compress_ratio"), integer(config, "indexer_budget")
    values = keys_and_values(own["num_key_value_heads"], own["head_dim"])
    index_keys = {"k_index": slots(integer(config, "indexer_kv_heads"), integer(config, "indexer_head_dim"))}
    return {"buffers": values | index_keys, "picked": dict.fromkeys(values, (most // block * block, block))}


def _qwen4_kind(config: dict, index: int) -> str:
    if config.get("ple_layer_ids"):
        raise NotImplementedError("ple_layer_ids is given: those layers keep token ids, which no cache here has")
    kind = listed(config, index) or (LINEAR if (index + 1) % integer(config, "full_attention_interval", 4) else INDEXED)
    return INDEXED if kind == FULL else kind


_SHARED = "shared_indexed_attention"
_GATED = "latent attention whose queries have a gate"
_SINKS = "indexed latent attention with sinks and a gate"
_NEAR = "latent attention under a window"
_PICKS = "its full layers read the tokens that an indexer picks, by heads of keys and values"
_SLICED = "latent attention where some layers have no rotary slice, or the latents of another layer"
_POOLED = "its indexer scores pools of tokens"
_DSA = Layer("dsa", None, lacks=_SINKS)
_NO_ROPE = without_rope(every_head, **BIASES)
_DECODER = {"num_decoder_layers": "num_hidden_layers", "num_decoder_attention_heads": "num_attention_heads"}
_QWEN4 = Family(
    _qwen4, _qwen4_kind, {LINEAR: Layer("gated_deltanet", None, lacks=_PICKS)} | kept(_PICKS, INDEXED),
    DELTAS["qwen3_5_text"].defaults | {"num_key_value_heads": 2},
)  # fmt: skip
_DOTS3 = Family(
    _dots3,
    _dots3_kind,
    {INDEXED: Layer("dsa", None, lacks=_NEAR), FULL: Layer("mla", None, lacks=_NEAR)} | kept(_NEAR, SLIDING),
    {"q_lora_rank": 1024},
)

FAMILIES: dict[str, Family] = {
    "axk2": caches_of(
        LATENTS["deepseek_v32"], _GATED,
        defaults={"q_lora_rank": 384, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
                  "v_head_dim": 64, "index_n_heads": 16},
    ),
    "beam": plain(
        "the output gate has a bias for each head", kind=_beam_kind, head_dim=128,
        defaults={"num_key_value_heads": 8, "sliding_window": 512},
    ),
    "big_bird": plain("sparse attention over random blocks, which its decoders drop in short rows", every_head),
    "bitnet": plain(
        "a norm of the heads' outputs before their projection", defaults={"num_key_value_heads": 5}
    ),
    "cpmant": Family(_cpmant, all_full, kept("biases by learned buckets of distance", FULL)),
    "diffllama": plain("differential attention: the difference of two softmaxes"),
    "doge": plain("a learned mask of the tokens that count, on top of causality"),
    "dots3_note_text": _DOTS3,
    "git": plain("tokens of an image see one another, those after them too", every_head),
    "glm5_next_text": Family(
        _glm5_next, _glm5_next_kind, {LINEAR: DELTAS["glm5_next_text"].layers[LINEAR]} | kept(_POOLED, INDEXED),
        DELTAS["glm5_next_text"].defaults,
    ),
    "hrm_text": plain(
        "two stacks that run in cycles, with a cache for each of their passes", head_dim=128, completed=_hrm,
    ),
    "hy_v4": Family(
        _hy_v4, _hy_v4_kind, {INDEXED: _DSA, _SHARED: _DSA}, {"q_lora_rank": 1536, "index_n_heads": 16}, source=_picker
    ),
    "jetmoe": Family(
        _jetmoe, all_full,
        {FULL: DENSE[FULL]._replace(split=None, lacks="each token picks experts for its queries and outputs")},
    ),
    "longcat_flash": Family(
        _longcat, _longcat_kind,
        dict.fromkeys((FULL, "second_full_attention"), Layer("mla", None, lacks="two latent attentions in a layer")),
        {"q_lora_rank": 1536}, {"num_layers": "num_hidden_layers"},
    ),
    "mimo_v2_flash": Family(
        _mimo, _mimo_kind,
        {kind: layer._replace(split=None, lacks="values are scaled by attention_value_scale")
         for kind, layer in WINDOWS.items()},
        {"num_key_value_heads": 4, "sliding_window": 129},
    ),
    "mistral_large4_text": Family(
        _mistral_large4, lambda config, index: listed(config, index) or INDEXED, kept(_SLICED, INDEXED), source=_source
    ),
    "moshi": plain(
        "a window that transformers has in the cache and not in the mask of a prompt",
        defaults={"sliding_window": 3000},
    ),
    "musicgen_decoder": with_encoder(plain(_STREAMS, every_head), lambda config: True),
    "musicgen_melody_decoder": plain(_STREAMS, every_head),
    "prophetnet": with_encoder(
        Family(
            _NO_ROPE, all_full,
            {FULL: DENSE[FULL]._replace(
                split=None, lacks="streams that predict several tokens ahead, with biases by buckets of distance")},
            {"is_encoder_decoder": True}, _DECODER,
        )
    ),
    "qwen4_exp_text": _QWEN4,
}  # fmt: skip
