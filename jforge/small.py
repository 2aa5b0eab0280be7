"""Configs of a given size for any mechanism, registered ones and anybody's, from sizes by the names of fields."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any


def fitted(config: type, sizes: Mapping[str, Any]) -> Any:
    """A `config` of the sizes whose names it has. An optional field that does not take its size keeps its default, and
    so does a `block_size` that a Config can do without: it cuts a prefill in blocks, and no result depends on it.

    Raises ValueError naming the fields that it needs and `sizes` lacks, or what the Config says of those it got.
    """
    asked = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(config) if f.init}
    if lacking := [name for name, needed in asked.items() if needed and name not in sizes]:
        raise ValueError(f"sizes lack {', '.join(lacking)}, which a {config.__qualname__} of {config.__module__} needs")
    given = {name: sizes[name] for name, needed in asked.items() if needed}
    for name in (name for name, needed in asked.items() if not needed and name in sizes and name != "block_size"):
        if _takes(config, more := given | {name: sizes[name]}) or not _takes(config, given):
            given = more
    return config(**given)


def _takes(config: type, values: Mapping[str, Any]) -> bool:
    try:
        config(**values)
    except (ValueError, TypeError):
        return False
    return True


def widths(hidden_size: int, heads: int) -> dict[str, Any]:
    """Sizes of vectors for layers of this width, D = N H: as many heads, channels and ranks as a shipped layer has in
    proportion. No RoPE.
    """
    H = hidden_size // heads
    return {
        "hidden_size": hidden_size, "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 2),
        "head_dim": H, "v_head_dim": H, "q_lora_rank": hidden_size // 2, "kv_lora_rank": hidden_size // 2,
        "qk_nope_head_dim": H, "qk_rope_head_dim": H // 2, "index_n_heads": heads, "index_head_dim": H,
        "o_groups": 2, "o_lora_rank": hidden_size // 4, "linear_num_key_heads": heads, "linear_num_value_heads": heads,
        "linear_key_head_dim": H, "linear_value_head_dim": H, "linear_num_heads": heads, "linear_head_dim": H,
        "num_heads": 2 * heads, "state_size": H, "intermediate_size": 2 * hidden_size,
        "time_step_rank": max(1, hidden_size // 16),
    }  # fmt: skip


def reaches(tokens: int) -> dict[str, int]:
    """Sizes of windows, blocks and choices for rows of so many tokens: a quarter of a row is read, or less."""
    block = max(2, tokens // 16)
    return {
        "sliding_window": tokens // 4, "attention_chunk_size": tokens // 4, "start_size": block // 2,
        "recent_size": tokens // 4 - block // 2, "block_size": block, "num_global_blocks": 1, "num_local_blocks": 2,
        "num_random_blocks": 1, "moba_chunk_size": block, "moba_topk": 4, "kernel_size": block,
        "kernel_stride": block // 2, "topk": 4, "window_size": block, "compress_rate": block, "index_topk": tokens // 8,
        "index_block_size": block, "index_topk_blocks": 4,
    }  # fmt: skip
