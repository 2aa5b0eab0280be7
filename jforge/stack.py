"""A stack of attention layers, each of its own mechanism, with one cache: hybrids such as MiniMax-01 or MiniMax-M3.

    x_{i+1} = block(x_i, i, attend_i)          attend_i(h): what the attention of layer i makes of h

`layers` is what hf.layers(config) returns: (mechanism name or Attention, Config) of every layer; as a tuple it is
hashable, so static under jit. `params` holds the layers' parameters, the cache is the tuple of their caches.

A layer may name an earlier one, its source, by its index: (mechanism, Config, source). With `kv_shared` in its Config
it has no keys of its own and reads those of its source, to which nothing is written (Gemma 3n and 4); with
`index_shared` it takes the picks of its source (GLM-5.2).

What stands around the attention belongs to the block, any function that calls `attend` once: norms, a residual, an MLP.
Its own weights are bound to it where it is traced:

    @partial(jax.jit, static_argnames="layers", donate_argnames="cache")
    def step(params, norms, layers, x, cache):
        return stack.decode(params, layers, x, cache, partial(stack.pre_norm, norms))

Positions, pads and dtypes are those of the mechanisms. A row that one layer refuses (overflow) is NaN; layers with room
have taken its tokens all the same, so it stays NaN. With concrete lengths it raises ValueError instead.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

import jforge
from jforge.core import guard
from jforge.core.attention import Attention
from jforge.core.norm import rms_norm
from jforge.core.share import Source
from jforge.core.step import Queries, Step, Tokens, all_of, end, few_tokens, place
from jforge.cost import Cost

Layers = Sequence[tuple[str | Attention, Any] | tuple[str | Attention, Any, int]]
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
    return tuple(att.init_cache(cfg, batch, capacity, dtype) for att, cfg, _ in _resolve(layers))


def forward(params: Sequence, layers: Layers, x: Tokens, block: Block, positions=None) -> Tokens:
    """The definition, without a cache. `positions` (int B T) feed RoPE only."""
    (_, first, _), *_ = _resolve(layers)
    rows = all_of(first, x, positions)

    def call(att, params, cfg, h, _, picks):
        return att.forward(params, cfg, h, positions, **picks), None

    return _run(layers, params, x, [None] * len(layers), block, _Call(call, rows, None))[0].astype(x.dtype)


def prefill(
    params: Sequence, layers: Layers, x: Tokens, cache: tuple, block: Block, lengths=None
) -> tuple[Tokens, tuple]:
    """Append T tokens (row b its first lengths[b]) in every layer; at pads the result is 0 and x may be anything."""

    def call(att, params, cfg, h, cache, picks):
        return att.prefill(params, cfg, h, cache, lengths=lengths, **picks)

    return _step(params, layers, x, cache, block, lengths, call, None)


def decode(
    params: Sequence, layers: Layers, x: Tokens, cache: tuple, block: Block, ops=jforge.ops
) -> tuple[Tokens, tuple]:
    """Append 1 to 16 tokens a row in every layer, each through `ops`."""

    def call(att, params, cfg, h, cache, picks):
        return att.decode(params, cfg, h, cache, ops=ops, **picks)

    return _step(params, layers, few_tokens(x), cache, block, None, call, ops)


def cost(layers: Layers, *, context: int, **sizes) -> Cost:
    """The sum of the layers' costs, of the sizes that `Attention.cost` takes; buffers of one name add up. A layer that
    reads another's keys stores and writes nothing.
    """
    return reduce(add, (att.cost(cfg, context=context, **sizes) for att, cfg, _ in _resolve(layers)))


def _resolve(layers: Layers) -> list[tuple[Attention, Any, int | None]]:
    """Names replaced by their Attention, Configs and sources checked."""
    if not layers:
        raise ValueError("layers is empty; a stack has at least one")
    out: list[tuple[Attention, Any, int | None]] = []
    for index, (att, cfg, *source) in enumerate(layers):
        att = jforge.get(att) if isinstance(att, str) else att
        if not guard.fits(cfg, att.Config):
            got, want = guard.called(type(cfg)), guard.called(att.Config)
            raise TypeError(f"layers[{index}] has a {got}; its mechanism takes a {want}")
        out.append((att, cfg, source[0] if source else None))
        _check_source(out, index)
    return out


def _check_source(layers: list, index: int) -> None:
    """The layer and its source must fit: keys of the same shape in the same slots, or picks."""
    att, cfg, source = layers[index]
    shares = [name for name in ("kv_shared", "index_shared") if getattr(cfg, name, False)]
    if source is None:
        if shares:
            raise ValueError(f"layers[{index}] has {shares[0]}; it must name its source: (mechanism, Config, source)")
        return
    if isinstance(source, bool) or not isinstance(source, int) or not 0 <= source < index:
        raise ValueError(f"layers[{index}] has the source {source!r}; it must be an earlier layer, 0..{index - 1}")
    if not shares:
        raise ValueError(f"layers[{index}] has the source {source}; its Config must have kv_shared or index_shared")
    lender, own, _ = layers[source]
    if lender.lend is None or getattr(own, shares[0], False) or (shares == ["kv_shared"]) != (lender.read is not None):
        raise ValueError(f"layers[{index}] has the source {source}; that layer has nothing to lend for {shares[0]}")
    if shares == ["kv_shared"] and not _alike(att.cache_spec(cfg).borrowed, lender.cache_spec(own)):
        raise ValueError(
            f"layers[{index}] has the source {source}; its keys and values are not laid out as those there"
        )


def _alike(borrowed, spec) -> bool:
    """Whether these buffers are those of the spec."""
    shapes = [{name: (b.shape, b.limit, b.every) for name, b in buffers.items()} for buffers in (borrowed, spec)]
    return shapes[0] == shapes[1]


class _Call(NamedTuple):
    """How layers are called: call(att, params, cfg, h, cache, picks) -> (y, cache), of these tokens, through ops."""

    call: Callable
    rows: Queries
    ops: Any


def _step(params, layers: Layers, x, cache: tuple, block: Block, lengths, call, ops) -> tuple[Array, tuple]:
    """A prefill or decode: pads are blank inside, so that no norm or MLP ever sees their NaN."""
    (_, first, _), *_ = _resolve(layers)
    _one_each("cache", cache, layers)
    step = place(x, cache[0].length, lengths, first.hidden_size, None)
    y, after = _run(layers, params, step.x, cache, block, _Call(call, step.queries, ops))
    return end(_refused(step, after), y, x.dtype), after


def _refused(step: Step, after: tuple) -> Step:
    """The step without the rows that some layer did not take."""
    taken = jnp.stack([cache.length == step.length for cache in after]).all(axis=0)
    return step._replace(fits=step.fits & taken)


def _run(layers: Layers, params: Sequence, x, caches: Sequence, block: Block, how: _Call) -> tuple[Array, tuple]:
    """(x after all blocks, the caches)."""
    _one_each("params", params, layers)
    resolved, after, lent = _resolve(layers), [], {}
    lenders = {source for _, _, source in resolved if source is not None}
    for index, (layer, own, cache) in enumerate(zip(resolved, params, caches, strict=True)):

        def attend(h: Array, index=index, layer=layer, own=own, cache=cache) -> Array:
            y, new = _layer(layer, own, h, cache, index in lenders, lent, index, how)
            after.append(new)
            return y

        x = block(x, index, attend)
        if len(after) != index + 1:
            raise ValueError(f"block calls attend {len(after) - index} times in layer {index}; it must call it once")
    return x, tuple(after)


def _layer(layer, params, h: Array, cache, lends: bool, lent: dict, index: int, how: _Call) -> tuple[Array, Any]:
    """(y, the cache after) of one layer. lent: {a layer that others share with: its Source}, which it adds to."""
    att, cfg, source = layer
    if source is not None and getattr(cfg, "kv_shared", False):
        y = att.read(params, cfg, h, lent[source], how.ops)
        rows = how.rows
        return y, None if cache is None else replace(
            cache, length=cache.length + rows.keep.sum(axis=1, dtype=jnp.int32)
        )
    new = att.lend(params, cfg, how.rows._replace(x=h), cache, how.ops) if lends else None
    picks = new if source is None else lent[source].new
    y, after = how.call(att, params, cfg, h, cache, {} if picks is None or att.read is not None else {"indices": picks})
    if lends:
        lent[index] = Source(how.rows._replace(x=h), cache, after, new)
    return y, after


def _one_each(name: str, value: Sequence, layers: Layers) -> None:
    if len(value) != len(layers):
        raise ValueError(f"{name} has {len(value)} entries; it must have one for each of the {len(layers)} layers")
