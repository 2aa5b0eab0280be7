"""Tiny random transformers models, and what their attention modules saw, returned and cached, step by step."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import DynamicCache
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Attention
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from jforge import hf
from jforge.core import compare
from jforge.core.spec import Buffer
from jforge.harness import tiny_v4
from jforge.harness.tiny_configs import MODELS, VOCAB, Model

BATCH, TOKENS = 2, 10


@dataclass
class Step:
    """One call of a layer's attention module, as float32 NumPy arrays of shape B T D."""

    x: np.ndarray
    y: np.ndarray
    stored: tuple[np.ndarray, ...] = ()  # what the layer's cache holds afterwards: B K S H, of a state B N H H
    indices: np.ndarray | None = None  # what an earlier layer picked, int32 B T L


def attention_module(model: Any, layer: int) -> Any:
    base = model.base_model
    block = (base.h if hasattr(base, "h") else base.layers)[layer]
    return block.self_attn if hasattr(block, "self_attn") else block.self_attention


def tokens(count: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (BATCH, count), generator=torch.Generator().manual_seed(2))


def empty_cache(model: Any) -> DynamicCache:
    return MiniMaxCache() if model.config.model_type == "minimax" else DynamicCache(config=model.config)


def contents(store: DynamicCache | None, layer: int, attention: Any = None) -> tuple[torch.Tensor, ...]:
    """What a layer's cache holds, in the order of jforge's buffers: keys, values and index keys, or a state.

    attention: the layer's module, which DeepSeek-V4's states need.
    """
    if store is None:
        return ()
    if isinstance(store, MiniMaxCache) and layer < len(store.linear_cache) and len(store.linear_cache[layer]):
        return (store.linear_cache[layer],)
    own = store.layers[layer]
    if isinstance(attention, DeepseekV4Attention):
        return tiny_v4.contents(own, attention)
    index_keys = getattr(own, "idx_keys", None)
    if getattr(own, "indexer_keys", None) is not None:
        index_keys = own.indexer_keys[:, None]
    return (own.keys, own.values) if index_keys is None else (own.keys, own.values, index_keys)


def positions_and_masks(done: int, count: int) -> dict[str, Any]:
    """What a minimax model is told with `count` tokens after `done`.

    Left alone it asks layer 0 how many tokens came before, and a lightning layer does not know: positions start at 0
    again, and the mask of several tokens has the wrong size.
    """
    q, k = torch.arange(done, done + count), torch.arange(done + count)
    mask = torch.where(k <= q[:, None], 0.0, torch.finfo(torch.float32).min)
    return {"position_ids": q[None], "attention_mask": {"full_attention": mask[None, None], "linear_attention": None}}


@torch.no_grad()
def run(model: Any, layers: tuple[int, ...], sizes: tuple[int, ...], use_cache: bool) -> list[dict[int, Step]]:
    """Feed tokens in chunks of these sizes and watch these layers: {layer: Step} of every chunk."""
    steps: list[dict[int, Step]] = []
    store = empty_cache(model) if use_cache else None

    def hook(index: int):
        def save(module, args, kwargs, output):
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            y = output[0] if isinstance(output, tuple) else output
            x, y, *cached = (a.numpy().copy() for a in (x, y, *contents(store, index, module)))
            earlier = kwargs.get("prev_topk_indices")
            steps[-1][index] = Step(x, y, tuple(cached), None if earlier is None else earlier.numpy().copy())

        return save

    handles = [attention_module(model, i).register_forward_hook(hook(i), with_kwargs=True) for i in layers]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small lose 30 ms each to threads where cores are few
    done = 0
    for chunk in torch.split(tokens(sum(sizes)), sizes, dim=1):
        steps.append({})
        places = positions_and_masks(done, chunk.shape[1]) if isinstance(store, MiniMaxCache) else {}
        model(input_ids=chunk, past_key_values=store, use_cache=use_cache, **places)
        done += chunk.shape[1]
    torch.set_num_threads(threads)
    for handle in handles:
        handle.remove()
    return steps


SPLITS = {  # of a window of 4 they meet every length, and a chunk of 5 in a ring that is full and turned
    "prefill 1, decode": (1,) * TOKENS,
    "prefill 5, decode": (5,) + (1,) * (TOKENS - 5),
    "chunks": (5, 5),  # a size that another mode has: every new one is a compilation
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
        got = _jitted(att.forward)(params, cfg, seen[index].x, **_picks(cfg, seen[index]))
        errors["forward"] = max(errors["forward"], compare.worst_vector(got, seen[index].y))
    for split, sizes in splits.items():
        steps = run(model, spec.layers, sizes, use_cache=True)
        for index, layer in layers.items():
            output, cached = _follow(*layer, [step[index] for step in steps], spec)
            errors[split] = max(errors[split], output)
            errors["cache"] = max(errors["cache"], cached)
    return spec.mechanism, errors


def _picks(cfg, step: Step) -> dict[str, np.ndarray]:
    """What a layer without an indexer of its own is given: an earlier layer's picks, as many in every step."""
    if not getattr(cfg, "index_shared", False):
        return {}
    missing = cfg.index_topk - step.indices.shape[-1]
    return {"indices": np.pad(step.indices, [(0, 0), (0, 0), (0, missing)], constant_values=-1)}


def _follow(att, cfg, params, steps: list[Step], spec: Model) -> tuple[float, float]:
    """(worst error of y, worst error of the cache) while feeding jforge the chunks that transformers saw."""
    ours = att.init_cache(cfg, BATCH, sum(step.x.shape[1] for step in steps) + 2, jnp.float32)
    output = cached = 0.0
    for i, step in enumerate(steps):
        function = att.decode if i > 0 and step.x.shape[1] == 1 else att.prefill
        got, ours = _jitted(function)(params, cfg, step.x, ours, **_picks(cfg, step))
        output = max(output, compare.worst_vector(got, step.y))
        cached = max(cached, cache_error(att.cache_spec(cfg), ours, step.stored, spec.pairs_apart))
    return output, cached


def cache_error(buffers, ours, theirs: tuple[np.ndarray, ...], pairs_apart: Mapping[str, int] = {}) -> float:
    """Our buffers, in the order of their spec, against `contents`; inf where those are of another number of tokens.

    pairs_apart: {name: n} where the first n channels of theirs are evens, then odds. NaN in a state of theirs stands
    for a value that transformers does not keep.
    """
    worst, length = 0.0, int(ours.length[0])
    for name, stored in zip(buffers, theirs, strict=True):
        leaf = np.asarray(getattr(ours, name))
        if buffers[name].has_slots:
            stored = stored.swapaxes(1, 2)
            leaf = _as_stored(leaf, buffers[name], length, stored.shape[2], pairs_apart.get(name, 0))
        else:  # head by head: a row of a state belongs to one key channel, which may be as good as 0
            leaf, stored = (np.where(np.isnan(stored), 0, a).reshape(*a.shape[:2], -1) for a in (leaf, stored))
        worst = max(worst, compare.worst_row(leaf, stored))
    return worst


def _as_stored(leaf: np.ndarray, buffer: Buffer, length: int, heads: int, apart: int) -> np.ndarray:
    """A buffer of ours with slots as transformers keeps it, B S K H, K = 1 for latents and index keys.

    Falcon's new architecture keeps each key/value head G times. Of a window of W tokens it keeps the last W - 1 in
    their order, since the next token comes with its own key; ours is a ring with the token at position p in slot
    p mod W.
    """
    total = buffer.entries(length)
    kept = total if buffer.limit is None else min(total, buffer.limit - 1)
    leaf = leaf[:, np.arange(total - kept, total) % leaf.shape[1]]
    if leaf.ndim == 3:
        leaf = leaf[:, :, None]
    leaf = np.concatenate([leaf[..., :apart:2], leaf[..., 1:apart:2], leaf[..., apart:]], axis=-1)
    return np.repeat(leaf, heads // leaf.shape[2], axis=2)
