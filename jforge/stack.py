"""A stack of attention layers, each of its own mechanism, with one cache: hybrids such as MiniMax-01 or MiniMax-M3.

    x_{i+1} = block(x_i, i, attend_i)          attend_i(h): what the attention of layer i makes of h

`layers` is what hf.layers(config) returns: (mechanism name or Attention, Config) of every layer; as a tuple it is
hashable, so static under jit. `params` holds the layers' parameters, the cache is the tuple of their caches.
What stands around the attention belongs to the block, any function that calls `attend` once: norms, a residual, an MLP.
Its own weights are bound to it where it is traced:

    @partial(jax.jit, static_argnames="layers", donate_argnames="cache")
    def step(params, norms, layers, x, cache):
        return stack.decode(params, layers, x, cache, partial(stack.pre_norm, norms))

Positions, pads and dtypes are those of the mechanisms. A row that one layer refuses (overflow) is NaN; layers with room
have taken its tokens all the same, so it stays NaN. With concrete lengths it raises ValueError instead.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

import jforge
from jforge.core import guard
from jforge.core.attention import Attention
from jforge.core.norm import rms_norm
from jforge.core.step import Step, Tokens, end, few_tokens, place
from jforge.cost import Cost

Layers = Sequence[tuple[str | Attention, Any]]
Attend = Callable[[Array], Array]
Scales = Sequence[tuple[float, float]]
Block = Callable[[Array, int, Attend], Array]


def pre_norm(
    norms: Sequence[Array], x: Tokens, layer: int, attend: Attend, *, eps: float = 1e-6, offset: float = 0.0
) -> Tokens:
    """x + attend(rms(x)), as in Llama and most models since. norms: a weight [D] a layer; offset 1 is Gemma's."""
    return x + attend(rms_norm(x, norms[layer], eps=eps, offset=offset))


def scaled_post_norm(
    norms: Sequence[Array], scales: Scales, x: Tokens, layer: int, attend: Attend, *, eps: float = 1e-5
) -> Tokens:
    """h = rms(x); alpha h + beta attend(h): the residual is the normed input (MiniMax-01, after DeepNorm).

    norms: a weight [D] a layer. scales: (alpha, beta) a layer; MiniMax-01 has one pair for each kind of layer, with
    alpha = (2 * 80)^(1/4) and beta = 1 in both.
    """
    alpha, beta = scales[layer]
    h = rms_norm(x, norms[layer], eps=eps)
    return alpha * h + beta * attend(h)


def init_cache(layers: Layers, batch: int, capacity: int, dtype=jnp.bfloat16) -> tuple:
    """The empty caches of all layers, each for `capacity` tokens."""
    return tuple(att.init_cache(cfg, batch, capacity, dtype) for att, cfg in _resolve(layers))


def forward(params: Sequence, layers: Layers, x: Tokens, block: Block, positions=None) -> Tokens:
    """The definition, without a cache. `positions` (int B T) feed RoPE only."""

    def call(att, params, cfg, h, _):
        return att.forward(params, cfg, h, positions), None

    return _run(layers, params, x, [None] * len(layers), block, call)[0].astype(x.dtype)


def prefill(
    params: Sequence, layers: Layers, x: Tokens, cache: tuple, block: Block, lengths=None
) -> tuple[Tokens, tuple]:
    """Append T tokens (row b its first lengths[b]) in every layer; at pads the result is 0 and x may be anything."""

    def call(att, params, cfg, h, cache):
        return att.prefill(params, cfg, h, cache, lengths=lengths)

    return _step(params, layers, x, cache, block, lengths, call)


def decode(
    params: Sequence, layers: Layers, x: Tokens, cache: tuple, block: Block, ops=jforge.ops
) -> tuple[Tokens, tuple]:
    """Append 1 to 16 tokens a row in every layer, each through `ops`."""

    def call(att, params, cfg, h, cache):
        return att.decode(params, cfg, h, cache, ops=ops)

    return _step(params, layers, few_tokens(x), cache, block, None, call)


def cost(layers: Layers, *, context: int, **sizes) -> Cost:
    """The sum of the layers' costs, of the sizes that `Attention.cost` takes; buffers of one name add up."""
    return reduce(add, (att.cost(cfg, context=context, **sizes) for att, cfg in _resolve(layers)))


def _resolve(layers: Layers) -> list[tuple[Attention, Any]]:
    """Names replaced by their Attention, Configs checked."""
    if not layers:
        raise ValueError("layers is empty; a stack has at least one")
    out = []
    for index, (att, cfg) in enumerate(layers):
        att = jforge.get(att) if isinstance(att, str) else att
        if not guard.fits(cfg, att.Config):
            got, want = guard.called(type(cfg)), guard.called(att.Config)
            raise TypeError(f"layers[{index}] has a {got}; its mechanism takes a {want}")
        out.append((att, cfg))
    return out


def _step(params, layers: Layers, x, cache: tuple, block: Block, lengths, call: Callable) -> tuple[Array, tuple]:
    """A prefill or decode: pads are blank inside, so that no norm or MLP ever sees their NaN."""
    (_, first), *_ = _resolve(layers)
    _one_each("cache", cache, layers)
    step = place(x, cache[0].length, lengths, first.hidden_size, None)
    y, after = _run(layers, params, step.x, cache, block, call)
    return end(_refused(step, after), y, x.dtype), after


def _refused(step: Step, after: tuple) -> Step:
    """The step without the rows that some layer did not take."""
    taken = jnp.stack([cache.length == step.length for cache in after]).all(axis=0)
    return step._replace(fits=step.fits & taken)


def _run(layers: Layers, params: Sequence, x, caches: Sequence, block: Block, call: Callable) -> tuple[Array, tuple]:
    """(x after all blocks, the caches): call(att, params, cfg, h, cache) -> (y, cache) is the attention of a layer."""
    _one_each("params", params, layers)
    after: list = []
    for index, ((att, cfg), own, cache) in enumerate(zip(_resolve(layers), params, caches, strict=True)):
        x = block(x, index, _recording(after, call, att, own, cfg, cache))
        if len(after) != index + 1:
            raise ValueError(f"block calls attend {len(after) - index} times in layer {index}; it must call it once")
    return x, tuple(after)


def _recording(after: list, call: Callable, att: Attention, params, cfg, cache) -> Attend:
    """The `attend` of a layer; it leaves the new cache in `after`."""

    def attend(h: Array) -> Array:
        y, new = call(att, params, cfg, h, cache)
        after.append(new)
        return y

    return attend


def _one_each(name: str, value: Sequence, layers: Layers) -> None:
    if len(value) != len(layers):
        raise ValueError(f"{name} has {len(value)} entries; it must have one for each of the {len(layers)} layers")
