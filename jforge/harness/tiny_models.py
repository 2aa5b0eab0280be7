"""Tiny random transformers models, and what their attention modules saw, returned and cached, step by step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    "chunks": (5, 5),
}


Layer = tuple[Any, Any, Mapping[str, Any]]  # Attention, Config, params


@cache
def built(spec: Model) -> Any:
    return spec.build()


@cache
def layer(spec: Model, index: int) -> Layer:
    """The converted layer."""
    return hf.convert(built(spec).config, built(spec).state_dict(), index)


@cache
def seen(spec: Model, sizes: tuple[int, ...], use_cache: bool = True) -> list[dict[int, Step]]:
    """`run` of the layers that spec names."""
    return run(built(spec), spec.layers, sizes, use_cache)


@cache
def jitted(function):
    return jax.jit(function, static_argnames="cfg")


def against_transformers(
    name: str | Model,
    splits: Mapping[str, tuple[int, ...]] = SPLITS,
    layers: tuple[int, ...] = (),
    change: Callable[..., Layer] | None = None,
) -> tuple[str, dict[str, float]]:
    """(mechanism, {mode: worst relative error}) of the converted layers of a model, float32.

    Modes: a full forward without cache; each of `splits`, where a chunk of one token after the first goes through
    decode; and "cache", the contents after every chunk. jforge is fed the hidden states that transformers' attention
    module saw, so the errors are those of that module alone.
    layers: some of those that the model names. change: (Attention, Config, params) -> those to compare instead.
    """
    spec = MODELS[name] if isinstance(name, str) else name
    errors = dict.fromkeys(("forward", *splits, "cache"), 0.0)
    pad, total = max(map(max, splits.values())), max(map(sum, splits.values()))
    for index in layers or spec.layers:
        own = change(*layer(spec, index)) if change else layer(spec, index)
        errors["forward"] = max(errors["forward"], forward_error(spec, index, own, total))
        for split, sizes in splits.items():
            for step, y, ours in follow(own, [step[index] for step in seen(spec, sizes)], pad, total + 2):
                errors[split] = max(errors[split], compare.worst_vector(y, step.y))
                held = cache_error(own[0].cache_spec(own[1]), ours, step.stored, spec.pairs_apart)
                errors["cache"] = max(errors["cache"], held)
    return spec.mechanism, errors


def forward_error(spec: Model, index: int, own: Layer, count: int = TOKENS, **given) -> float:
    """The worst relative error of one forward over `count` tokens."""
    att, cfg, params = own
    step = seen(spec, (count,), use_cache=False)[0][index]
    got = jitted(att.forward)(params, cfg, step.x, **(given or _picks(cfg, step)))
    return compare.worst_vector(got, step.y)


def _picks(cfg, step: Step, pad: int = 0) -> dict[str, np.ndarray]:
    """What a layer without an indexer of its own is given: an earlier layer's picks, as many in every step."""
    if not getattr(cfg, "index_shared", False):
        return {}
    missing = cfg.index_topk - step.indices.shape[-1]
    return {"indices": np.pad(step.indices, [(0, 0), (0, pad), (0, missing)], constant_values=-1)}


def follow(own: Layer, steps: Sequence[Step], pad: int, capacity: int) -> Iterator[tuple[Step, np.ndarray, Any]]:
    """(their step, our y, our cache) of every chunk that transformers saw. What goes through prefill is padded to `pad`
    tokens with NaN: all prefills are one program.
    """
    att, cfg, params = own
    cache = att.init_cache(cfg, BATCH, capacity, jnp.float32)
    for i, step in enumerate(steps):
        count = step.x.shape[1]
        if i > 0 and count == 1:
            y, cache = jitted(att.decode)(params, cfg, step.x, cache, **_picks(cfg, step))
        else:
            x = np.pad(step.x, [(0, 0), (0, pad - count), (0, 0)], constant_values=np.nan)
            picks, lengths = _picks(cfg, step, pad - count), np.full(BATCH, count, np.int32)
            y, cache = jitted(att.prefill)(params, cfg, x, cache, lengths=lengths, **picks)
        yield step, np.asarray(y)[:, :count], cache


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
