"""The signatures of an Attention's functions, as typing Protocols; their docstrings are what `help(Attention)` shows.

B batch, T new tokens, S cache slots, D model dim. An activation may be a NumPy array; caches are pytrees with
`.length`, int32[B]: the tokens that each row has seen. `cfg` is a Config of the mechanism, static under `jax.jit`.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from jforge.core.params import Params
from jforge.core.spec import CacheSpec
from jforge.cost import Cost, Work

Activations = jax.Array | np.ndarray


@runtime_checkable
class Forward(Protocol):
    """(params, cfg, x, positions=None) -> y

    The definition, without a cache: B T D -> B T D. positions, int B T, default 0..T-1, feed RoPE only.
    """

    def __call__(self, params: Params, cfg: Any, x: Activations, positions: Activations | None = None) -> jax.Array: ...


@runtime_checkable
class Prefill(Protocol):
    """(params, cfg, x, cache, lengths=None) -> (y, cache)

    Append T tokens, row b its first lengths[b], and attend over what is stored then. y is 0 at pads. A cache that
    holds tokens already makes this a chunk.
    """

    def __call__(
        self, params: Params, cfg: Any, x: Activations, cache: Any, lengths: Activations | None = None
    ) -> tuple[jax.Array, Any]: ...


@runtime_checkable
class Decode(Protocol):
    """(params, cfg, x, cache, ops=jforge.ops) -> (y, cache)

    Append the tokens of x, B T D with T = 1 to 16, and attend through the kernels in `ops`: the same numbers as T steps
    of one token, and as prefill.
    """

    def __call__(
        self, params: Params, cfg: Any, x: Activations, cache: Any, ops: Any = ...
    ) -> tuple[jax.Array, Any]: ...


@runtime_checkable
class Lend(Protocol):
    """(params, cfg, rows, cache, ops=None) -> what layers that share with this one are given

    Of the new tokens `rows` (jforge.core.step.Queries), given the cache before them, None without one: keys and values
    as they are stored, for layers that `read`; or picks, int32 B T L, for layers that take them as `indices`, as the
    layer itself then does. ops: of a decode step. None where nothing is lent.
    """

    def __call__(self, params: Params, cfg: Any, rows: Any, cache: Any, ops: Any = ...) -> Any: ...


@runtime_checkable
class Read(Protocol):
    """(params, cfg, x, source, ops=None) -> y

    Attend with queries of its own over the keys of an earlier layer, of a Config with `kv_shared`: source is a
    jforge.core.share.Source. ops: of a decode step. It returns no cache, as it writes none. None where the mechanism
    cannot.
    """

    def __call__(self, params: Params, cfg: Any, x: Activations, source: Any, ops: Any = ...) -> jax.Array: ...


@runtime_checkable
class Spec(Protocol):
    """(cfg) -> CacheSpec

    The buffers of the cache. Zeros, bytes, checks, poison and tables follow from it.
    """

    def __call__(self, cfg: Any, /) -> CacheSpec: ...


@runtime_checkable
class Shapes(Protocol):
    """(cfg) -> {parameter: shape}

    A `Drawn` shape where the name does not say how random values are drawn. None where init_params is given.
    """

    def __call__(self, cfg: Any, /) -> Mapping[str, tuple[int, ...]]: ...


@runtime_checkable
class WorkOf(Protocol):
    """(cfg, context, capacity, new, closing) -> Work

    Slots that one row reads and writes in a call that brings it to `context` tokens, and its flops: a decode step for
    new = 1, a prefill for more. closing: the step completes a block. None where cost is given.
    """

    def __call__(self, cfg: Any, context: int, capacity: int, new: int, closing: bool, /) -> Work: ...


@runtime_checkable
class Visible(Protocol):
    """(cfg, q_pos, k_pos) -> bool

    The mask as far as it does not depend on data, broadcast over both; the union over heads.
    """

    def __call__(self, cfg: Any, q_pos: Any, k_pos: Any, /) -> Any: ...


@runtime_checkable
class Select(Protocol):
    """(params, cfg, x, cache) -> indices, or None

    What decode would hand to its op for x, the next token; None where nothing is chosen.
    """

    def __call__(self, params: Params, cfg: Any, x: Activations, cache: Any) -> Any: ...


@runtime_checkable
class TokensOf(Protocol):
    """(cfg, selection, S) -> bool B T S, or None

    The tokens that those picks read, whole blocks; None where nothing is chosen. With selection None, bool 1 S S: the
    tokens that query t reads whatever is picked.
    """

    def __call__(self, cfg: Any, selection: Any, S: int, /) -> Any: ...


@runtime_checkable
class IndexLoss(Protocol):
    """(params, cfg, x) -> scalar, or None

    What a layer whose picks pass no gradient adds to a model's loss, so that its indexer learns what attention reads
    (jforge.core.distil). Only the indexer's parameters have a gradient from it. x: B T D, its input.
    """

    def __call__(self, params: Params, cfg: Any, x: Activations) -> jax.Array: ...


@runtime_checkable
class InitParams(Protocol):
    """(key, cfg, dtype=float32) -> {parameter: array}

    Random parameters; follows from shapes unless it is given.
    """

    def __call__(self, key: jax.Array, cfg: Any, dtype: Any = ...) -> Params: ...


@runtime_checkable
class InitCache(Protocol):
    """(cfg, batch, capacity, dtype=bfloat16) -> cache

    An empty one of zeros; follows from cache_spec unless it is given.
    """

    def __call__(self, cfg: Any, batch: int, capacity: int, dtype: Any = ...) -> Any: ...


@runtime_checkable
class CostOf(Protocol):
    """(cfg, *, context, batch=1, capacity=None, dtype=bfloat16, new=1, closing=False) -> Cost

    Bytes by buffer, and flops, of one decode step, or of a prefill of the `new` tokens before `context`; follows from
    cache_spec and work unless it is given.
    """

    def __call__(
        self, cfg: Any, *, context: int, batch: int = 1, capacity: int | None = None, dtype: Any = ...,
        new: int = 1, closing: bool = False,
    ) -> Cost: ...  # fmt: skip
