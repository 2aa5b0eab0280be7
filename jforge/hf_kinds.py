"""Which kind of layer sits where in each model family: functions of (config, layer) that give a kind.

Kinds have the names of transformers' `layer_types`. Source: configuration_*.py of transformers 5.23.0.
"""

from collections.abc import Callable
from typing import Any

from jforge.core.config import reject
from jforge.hf_keys import integer, need, section

FULL, SLIDING, LINEAR, INDEXED = "full_attention", "sliding_attention", "linear_attention", "indexed_attention"
BLOCKS = "minimax_m3_sparse"  # MSA
SHARED = "shared_indexed_attention"  # transformers has no name for it: a layer whose indexer_types entry is "shared"
_LEGACY_KINDS = {"attention": FULL, "mamba": LINEAR}  # as transformers renames them


def listed(config: dict, index: int, key: str = "layer_types") -> Any:
    """The layer's entry in config[key], a list over all layers; None if the file has no such list."""
    entries = config.get(key)
    if entries is None:
        return None
    if not isinstance(entries, (list, tuple)) or len(entries) != config["num_hidden_layers"]:
        reject(key, entries, f"a list of num_hidden_layers={config['num_hidden_layers']} entries")
    return _LEGACY_KINDS.get(entries[index], entries[index])


def all_full(config: dict, index: int) -> str:
    return listed(config, index) or FULL


def every(period: int, between: str, key: str | None = None) -> Callable[[dict, int], str]:
    """The last of every `period` layers is full, the others are of the kind `between`; config[key] sets the period."""

    def kind(config: dict, index: int) -> str:
        n = integer(config, key, period) if key else period
        return listed(config, index) or (between if (index + 1) % n else FULL)

    return kind


def _has_window(config: dict) -> bool:
    return bool(config.get("use_sliding_window")) and config.get("sliding_window", 4096) is not None


def qwen(config: dict, index: int) -> str:
    """As transformers reads it, max_window_layers counts the full layers that come before those with a window."""
    if (kind := listed(config, index)) is not None or not _has_window(config):
        return kind or FULL
    first = config.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        reject("max_window_layers", first, "an integer, 0 or more")
    return SLIDING if index >= first else FULL


def qwen3_moe(config: dict, index: int) -> str:
    return SLIDING if _has_window(config) else all_full(config, index)


def mistral(config: dict, index: int) -> str:
    """One window for all layers unless sliding_window is an explicit null: the class default is 4096."""
    return SLIDING if config.get("sliding_window", 4096) is not None else all_full(config, index)


def minimax_m2(config: dict, index: int) -> str:
    """Checkpoints list 1 for softmax attention; a 0 would be a lightning layer, as in MiniMax-Text-01."""
    return LINEAR if listed(config, index, "attn_type_list") == 0 else all_full(config, index)


def minimax(config: dict, index: int) -> str:
    """Checkpoints list 0 for lightning and 1 for softmax. Their list comes first: where layer_types is missing, the
    class of transformers fills in an alternation that no checkpoint has.
    """
    if (entry := listed(config, index, "attn_type_list")) is not None:
        if entry not in (0, 1):
            reject("attn_type_list", config["attn_type_list"], "a list of 0 (lightning) and 1 (softmax)")
        return LINEAR if entry == 0 else FULL
    if (kind := listed(config, index)) is None:
        raise ValueError("config has neither attn_type_list nor layer_types; one must list the kinds of layers")
    return kind


def minimax_m3(config: dict, index: int) -> str:
    """Checkpoints list 1 for block-sparse layers, in a section of their own. It could also ask for layers whose index
    branch adds values to the output; no released model has them, nor has MSA.
    """
    flat = {**config, **section(config, "sparse_attention_config")}
    if (kind := listed(config, index)) is None:
        if (entry := listed(flat, index, "sparse_attention_freq")) is None:
            names = "neither layer_types nor sparse_attention_config.sparse_attention_freq"
            raise ValueError(f"config has {names}; one must list the kinds of layers")
        kind = BLOCKS if entry else FULL
    if kind == BLOCKS and listed(flat, index, "sparse_disable_index_value") == 0:
        raise NotImplementedError(f"layer {index} has index values, as sparse_disable_index_value says; MSA has none")
    return kind


def deepseek(config: dict, index: int) -> str:
    """An indexer makes it DSA (DeepSeek-V3.2), also where a file keeps the model_type of V3."""
    return INDEXED if config.get("index_topk") is not None else all_full(config, index)


def all_indexed(config: dict, index: int) -> str:
    return listed(config, index) or INDEXED


def glm_moe_dsa(config: dict, index: int) -> str:
    """Which layers have an indexer is said by a list (GLM-5.2), by a string of letters, or as one in so many."""
    kind = all_indexed(config, index)
    return SHARED if kind == INDEXED and _indexer_types(config)[index] == "shared" else kind


def _indexer_types(config: dict) -> list[str]:
    """The first of the keys that is there counts. index_skip_topk_offset layers come before the first shared one."""
    count = config["num_hidden_layers"]
    for key in ("indexer_types", "index_topk_pattern"):
        if (given := config.get(key)) is None:
            continue
        types = [{"F": "full", "S": "shared"}.get(x) for x in given] if isinstance(given, str) else given
        fits = isinstance(types, (list, tuple)) and len(types) == count and all(x in ("full", "shared") for x in types)
        if not fits or types[0] != "full":
            reject(key, given, f"num_hidden_layers={count} times 'full' or 'shared' (F, S in a string), 'full' first")
        return list(types)
    period, offset = integer(config, "index_topk_freq", 1), integer(config, "index_skip_topk_offset", 2)
    return ["shared" if max(i - offset + 1, 0) % period else "full" for i in range(count)]


def kimi_linear(config: dict, index: int) -> str:
    """Checkpoints list their layers, counted from 1. Without a list there is no telling: see docs/divergences.md."""
    if (kind := listed(config, index)) is not None:
        return kind
    lists = section(config, "linear_attn_config")
    if not lists:
        raise ValueError("config has neither layer_types nor linear_attn_config; one must list the kinds of layers")
    kinds = []
    for key, kind in (("full_attn_layers", FULL), ("kda_layers", LINEAR)):
        entries = need(lists, key)
        if not isinstance(entries, (list, tuple)):
            reject(key, entries, "a list of layers, counted from 1")
        kinds += [kind] * (index + 1 in entries)
    if len(kinds) != 1:
        where = "both" if kinds else "neither"
        raise ValueError(
            f"layer {index} is in {where} of full_attn_layers and kda_layers, as {index + 1}; one must have it"
        )
    return kinds[0]
