"""The names of transformers' caches. What hands one to a model, or looks into one, asks here, whichever release it is.

transformers 5.23 takes a cache as `past_key_values`, in Mamba and Mamba-2 as `cache_params`; 5.24 as `cache`, and it
warns of the old names. No version is compared: a name is looked for where it may stand.
In a layer's cache keys and values are B K S H, S tokens; a state is B N H V.
"""

import inspect
from typing import Any, NamedTuple

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DummyLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin
from transformers.models.minimax.modeling_minimax import MiniMaxCache

KEYWORDS = ("cache", "past_key_values", "cache_params")  # newest first: an old one may be left as an alias


def keyword(model: Any) -> str:
    """What the model's forward calls its cache; TypeError where it takes none."""
    known = inspect.signature(model.forward).parameters
    for name in KEYWORDS:
        if name in known:
            return name
    raise TypeError(f"{type(model).__name__}.forward takes a cache by none of the names {', '.join(KEYWORDS)}")


def given(model: Any, store: Any) -> dict[str, Any]:
    """The arguments by which the model's forward is given `store`; None: it shall keep nothing."""
    return {keyword(model): store, "use_cache": store is not None}


KEEPING = {"use_cache": True}
"""The arguments by which a model is asked to make a cache itself."""


def made(out: Any) -> Any:
    """The cache in what such a model returns: RWKV calls it its state. None where it made none."""
    return next((out[name] for name in (*KEYWORDS, "state") if out.get(name) is not None), None)


def own_and_encoders(store: Any) -> tuple[Any, Any]:
    """(the cache of the decoder's own keys, that of an encoder's or None)."""
    if hasattr(store, "cross_attention_cache"):
        return store.self_attention_cache, store.cross_attention_cache
    return store, None


def empty_cache(model: Any) -> DynamicCache:
    return MiniMaxCache() if model.config.model_type == "minimax" else DynamicCache(config=model.config)


def windows(config: Any) -> list[int | None]:
    """The window of every layer's cache, as transformers makes it of a config."""
    return [getattr(own, "sliding_window", None) for own in DynamicCache(config=config).layers]


def counts_no_tokens(store: Any) -> bool:
    """Whether a model with this cache must be told how many tokens came before."""
    return isinstance(store, MiniMaxCache)


def layer_of(store: Any, index: int) -> Any:
    """The cache of a layer; None of one that keeps nothing of its own."""
    own = store.layers[index]
    return None if isinstance(own, DummyLayer) else own


def layers_of(store: Any) -> list[Any]:
    """The caches of the layers that keep something."""
    found = (layer_of(store, index) for index in range(len(store.layers)))
    return [own for own in found if own is not None]


def lightning_state(store: Any, index: int) -> Tensor | None:
    """The state of a lightning layer of MiniMax-01; None of any other layer."""
    kept = store.linear_cache if isinstance(store, MiniMaxCache) else ()
    return kept[index] if index < len(kept) and len(kept[index]) else None


def keys_and_values(own: Any) -> tuple[Tensor, ...]:
    """Both, or neither where a layer has states alone."""
    return () if getattr(own, "keys", None) is None else (own.keys, own.values)


def has_window(own: Any) -> bool:
    """Whether its keys are the last of a window: one less than the window holds."""
    return isinstance(own, DynamicSlidingWindowLayer)


def index_keys(own: Any) -> Tensor | None:
    """B 1 S H, of layers with an indexer: MiniMax-M3's, or DeepSeek-V3.2's and GLM-5's, which have no axis of heads."""
    if getattr(own, "indexer_keys", None) is not None:
        return own.indexer_keys[:, None]
    return getattr(own, "idx_keys", None)


def has_states(own: Any) -> bool:
    return isinstance(own, LinearAttentionCacheLayerMixin)


def all_states(own: Any) -> tuple[list[Tensor], list[Tensor]]:
    """(inputs of convolutions, states) of a layer that may have several of either."""
    return tuple([a for a in held.values() if a is not None] for held in (own.conv_states, own.recurrent_states))


def states_in_module(block: Any) -> tuple[Tensor, Tensor] | None:
    """(state, inputs of the convolution) of RecurrentGemma's recurrent blocks, which keep them themselves."""
    return (block.rg_lru.recurrent_states, block.conv1d_state) if hasattr(block, "rg_lru") else None


def convolution_and_state(own: Any) -> tuple[Tensor, Tensor | None]:
    """The last inputs of a convolution, B X P, and the state of a layer that has one."""
    return own.conv_states[0], own.recurrent_states[0]


def compressors(own: Any) -> tuple[str, ...]:
    """Those of a DeepSeek-V4 layer; of any other none."""
    return tuple(getattr(own, "compressed_kv", ()))


class Compressed(NamedTuple):
    """What a DeepSeek-V4 layer keeps for one of its compressors; X channels."""

    entries: Tensor  # B S X
    kv: Tensor  # the open block's, B R X
    gate: Tensor
    overlaps: bool  # whether the last complete block is kept, for the next entry
    last_kv: Tensor | None = None  # None before a block is complete
    last_gate: Tensor | None = None


def compressed(own: Any, name: str) -> Compressed:
    """name: "compressor" or "indexer"."""
    parts = own.compressed_kv[name], own.buffer_kv[name], own.buffer_gate[name]
    if not hasattr(own, "overlap_kv"):
        return Compressed(*parts, overlaps=False)
    return Compressed(*parts, True, own.overlap_kv[name], own.overlap_gate[name])
