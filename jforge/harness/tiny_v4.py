"""What the cache of a DeepSeek-V4 layer of transformers holds, laid out as jforge's buffers."""

from typing import Any

import torch

from jforge.harness import hf_shim


def contents(own: Any, attention: Any) -> tuple[torch.Tensor, ...]:
    """The window, and of each compressor its entries and its rows u and z: `cache_spec` of v4_window, hca and csa.

    own: the layer's cache. attention: its self_attn, for the biases. Window and entries: B 1 S H; rows: B M X.
    """
    parts = [hf_shim.keys_and_values(own)[0]]
    for name, module in _compressors(attention).items():
        kept = hf_shim.compressed(own, name)
        parts += [kept.entries[:, None], *_rows(kept, module.position_bias)]
    return tuple(parts)


def _compressors(attention: Any) -> dict[str, Any]:
    """{name in the cache: module}; none where the layer has a window alone."""
    if (main := attention.compressor) is None:
        return {}
    return {"compressor": main} | ({"indexer": main.indexer} if hasattr(main, "indexer") else {})


def _rows(kept: hf_shim.Compressed, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[last complete block |] open block`, 0 in rows of no token.

    transformers adds the bias to a gate when its block is complete. Of the last complete block csa keeps the series
    for the next entry alone; NaN stands for the other one, which nothing reads again.
    """
    m, channels = bias.shape
    r = kept.kv.shape[1]
    behind = m if kept.overlaps else 0
    out = []
    for rows, last in ((kept.kv, kept.last_kv), (kept.gate + bias[:r], kept.last_gate)):
        state = rows.new_zeros(len(rows), behind + m, channels)
        state[:, behind : behind + r] = rows
        if last is not None:
            state[:, :m] = torch.nan
            state[:, :m, : last.shape[-1]] = last
        out.append(state)
    return out[0], out[1]
