"""Tiny random transformers models, and what their attention modules saw, returned and cached, step by step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np
import torch
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Attention

from jforge import hf
from jforge.core import compare
from jforge.core.spec import Buffer
from jforge.harness import hf_shim, tiny_states, tiny_v4
from jforge.harness.tiny_configs import MODELS as SLOTS
from jforge.harness.tiny_configs import VOCAB, Model
from jforge.hf.config import read
from jforge.hf.weights import Weights

BATCH, TOKENS = 2, 10
MODELS = SLOTS | tiny_states.STATES


@dataclass
class Step:
    """One call of a layer's attention module, as NumPy arrays of shape B T D, float32 or float64."""

    x: np.ndarray | None = None
    y: np.ndarray | None = None
    stored: tuple[np.ndarray, ...] = ()  # what the layer's cache holds afterwards: B K S H, of a state B N H H
    indices: np.ndarray | None = None  # what an earlier layer picked, int32 B T L


def attention_module(model: Any, layer: int, kind: str | None = None) -> Any:
    """That of a layer; of one with two that of `kind`, as jforge.hf names it."""
    found, *_ = read(model.config, layer, kind)
    return model.get_submodule(Weights(model.state_dict(), layer, found.module).prefix.removesuffix("."))


def _ends(model: Any, layer: int, kind: str | None) -> tuple[Any, Any]:
    """(the module that is given hidden states, the one that returns what the attention makes of them)."""
    module = attention_module(model, layer, kind)
    if model.config.model_type == "bloom":  # the module adds the residual
        return module, module.dense
    return (module.self, module.output.dense) if hasattr(module, "self") else (module, module)


def tokens(count: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (BATCH, count), generator=torch.Generator().manual_seed(2))


def contents(store: Any, layer: int, attention: Any = None) -> tuple[torch.Tensor, ...]:
    """What a layer's cache holds, in the order of jforge's buffers: keys, values and index keys, or a state.

    attention: the layer's module, which DeepSeek-V4's states need.
    """
    if store is None:
        return ()
    if (state := hf_shim.lightning_state(store, layer)) is not None:
        return (state,)
    if (own := hf_shim.layer_of(store, layer)) is None:  # it reads another's keys
        return ()
    if tiny_states.is_state(attention):
        return tiny_states.contents(own, attention)
    if isinstance(attention, DeepseekV4Attention):
        return tiny_v4.contents(own, attention)
    index_keys = hf_shim.index_keys(own)
    return hf_shim.keys_and_values(own) + (() if index_keys is None else (index_keys,))


def positions_and_masks(done: int, count: int) -> dict[str, Any]:
    """What a minimax model is told with `count` tokens after `done`.

    Left alone it asks layer 0 how many tokens came before, and a lightning layer does not know: positions start at 0
    again, and the mask of several tokens has the wrong size.
    """
    q, k = torch.arange(done, done + count), torch.arange(done + count)
    mask = torch.where(k <= q[:, None], 0.0, torch.finfo(torch.float32).min)
    return {"position_ids": q[None], "attention_mask": {"full_attention": mask[None, None], "linear_attention": None}}


@torch.no_grad()
def run(
    model: Any,
    layers: tuple[int, ...],
    sizes: tuple[int, ...],
    use_cache: bool,
    kind: str | None = None,
    positions: bool = False,
) -> list[dict[int, Step]]:
    """Feed tokens in chunks of these sizes and watch these layers: {layer: Step} of every chunk.

    kind: of the mixer, where a layer has two. positions: whether the model must be told them.
    """
    steps: list[dict[int, Step]] = []
    store = hf_shim.empty_cache(model) if use_cache else None

    def given(index: int):
        def save(module, args, kwargs, output):
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            step, earlier = steps[-1].setdefault(index, Step()), kwargs.get("prev_topk_indices")
            step.x, *cached = (a.numpy().copy() for a in (x, *contents(store, index, module)))
            step.stored, step.indices = tuple(cached), None if earlier is None else earlier.numpy().copy()

        return save

    def returned(index: int):
        def save(module, args, output):
            y = output[0] if isinstance(output, tuple) else output
            steps[-1].setdefault(index, Step()).y = y.numpy().copy()

        return save

    handles = []
    for index, (first, last) in zip(layers, (_ends(model, index, kind) for index in layers), strict=True):
        handles.append(first.register_forward_hook(given(index), with_kwargs=True))
        handles.append(last.register_forward_hook(returned(index)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small lose 30 ms each to threads where cores are few
    done = 0
    for chunk in torch.split(tokens(sum(sizes)), sizes, dim=1):
        steps.append({})
        places = positions_and_masks(done, chunk.shape[1]) if hf_shim.counts_no_tokens(store) else {}
        places |= {"position_ids": torch.arange(done, done + chunk.shape[1])[None]} if positions else {}
        model(input_ids=chunk, **hf_shim.given(model, store), **places)
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
    return hf.convert(built(spec).config, built(spec).state_dict(), index, spec.kind)


@cache
def seen(spec: Model, sizes: tuple[int, ...], use_cache: bool = True) -> list[dict[int, Step]]:
    """`run` of the layers that spec names."""
    with tiny_states.in_float64() if spec.wide else nullcontext():
        return run(built(spec), spec.layers, sizes, use_cache, spec.kind, spec.positions)


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
    if spec.wide and not jax.config.jax_enable_x64:
        with jax.enable_x64(True):
            return against_transformers(spec, splits, layers, change)
    errors = dict.fromkeys(("forward", *splits, "cache"), 0.0)
    pad, total = max(map(max, splits.values())), max(map(sum, splits.values()))
    for index in layers or spec.layers:
        own = change(*layer(spec, index)) if change else layer(spec, index)
        errors["forward"] = max(errors["forward"], forward_error(spec, index, own, total))
        for split, sizes in splits.items():
            for step, y, ours in follow(own, [step[index] for step in seen(spec, sizes)], pad, total + 2):
                errors[split] = max(errors[split], compare.worst_vector(y, step.y))
                held = cache_error(own[0].cache_spec(own[1]), ours, step.stored, spec.pairs_apart, spec.whole)
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
    cache = att.init_cache(cfg, BATCH, capacity, steps[0].x.dtype)
    for i, step in enumerate(steps):
        count = step.x.shape[1]
        if i > 0 and count == 1:
            y, cache = jitted(att.decode)(params, cfg, step.x, cache, **_picks(cfg, step))
        else:
            x = np.pad(step.x, [(0, 0), (0, pad - count), (0, 0)], constant_values=np.nan)
            picks, lengths = _picks(cfg, step, pad - count), np.full(BATCH, count, np.int32)
            y, cache = jitted(att.prefill)(params, cfg, x, cache, lengths=lengths, **picks)
        yield step, np.asarray(y)[:, :count], cache


def cache_error(
    buffers, ours, theirs: tuple[np.ndarray, ...], pairs_apart: Mapping[str, int] = {}, whole: bool = False
) -> float:
    """Our buffers, in the order of their spec, against `contents`; inf where those are of another number of tokens.

    pairs_apart: {name: n} where the first n channels of theirs are evens, then odds. whole: theirs has all tokens where
    ours is a ring. NaN in a state of theirs stands for a value that transformers does not keep.
    """
    worst, length = 0.0, int(ours.length[0])
    for name, stored in zip(buffers, theirs, strict=True):
        leaf = np.asarray(getattr(ours, name))
        if buffers[name].has_slots:
            stored = stored.swapaxes(1, 2)
            if whole and (limit := buffers[name].limit) is not None:
                stored = stored[:, max(0, length - limit + 1) :]
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
    if apart < 0:
        leaf, apart = np.roll(leaf, -apart, axis=-1), 0
    leaf = np.concatenate([leaf[..., :apart:2], leaf[..., 1:apart:2], leaf[..., apart:]], axis=-1)
    return np.repeat(leaf, heads // leaf.shape[2], axis=2)
