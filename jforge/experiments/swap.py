"""A trained dense model read otherwise: its own weights under a window, sinks, blocks, picks, or with rounded caches.

Nothing is trained again, so what is lost is what the dense model needs and the other reading leaves out.
`Attention.forward` of each is the definition that its decode agrees with, so rows are scored without a cache.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

import jforge
from jforge import models, small, stack
from jforge.attention import dense
from jforge.core.attend import einsum
from jforge.core.attention import Attention
from jforge.core.quant import E4M3_MAX
from jforge.core.step import all_of
from jforge.models import ModelConfig

OTHERS = ("sliding_window", "sinks", "streaming", "block_sparse", "moba")
"""Mechanisms whose layers hold what a dense layer holds. The sinks that it has not learned have a logit of 0."""
DENSE = "gqa"
BYTES = 4
"""Of a number of the caches that are not rounded, and of a scale."""


def swaps(cfg: ModelConfig, tokens: int) -> dict[str, tuple[ModelConfig, dict[str, int]]]:
    """{name: (model, {"stored", "read"}: bytes of one row at `tokens` tokens)}; windows, blocks and picks are those of
    rows of so many tokens (jforge.small.reaches). cfg: of dense layers.
    """
    own = cfg.layers[0][1]
    sizes = {name: getattr(own, name) for name in own.__dataclass_fields__} | small.reaches(tokens)
    made = {DENSE: (cfg, _moved(cfg, tokens))}
    for name in OTHERS:
        other = _with(cfg, name, small.fitted(jforge.get(name).Config, sizes))
        made[name] = other, _moved(other, tokens)
    K, G = own.num_key_value_heads, own.num_attention_heads // own.num_key_value_heads
    H, V, L = own.head_dim, own.v_head_dim, len(cfg.layers)
    many = small.reaches(tokens)["index_topk"]
    values = min(tokens, G * many)  # the heads of a group may each pick others
    picked = {"stored": made[DENSE][1]["stored"], "read": L * K * BYTES * (tokens * H + values * V)}
    made["own top-k"] = _with(cfg, _attending(topk=many), own), picked
    rounded = L * K * tokens * (H + V + 2 * BYTES)
    for name, kept in (("int8", int8), ("fp8 e4m3", fp8)):
        made[name] = _with(cfg, _attending(kept), own), {"stored": rounded, "read": rounded}
    return made


def fitted_params(cfg: ModelConfig, other: ModelConfig, params: PyTree, runs: int) -> PyTree:
    """The parameters of all runs of `cfg` as the model `other` has them: with sinks of 0 where it wants sinks."""
    like = jax.eval_shape(lambda: _state(other))
    held = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    named = jax.tree_util.tree_leaves_with_path(like)
    leaves = [held.get(jax.tree_util.keystr(path), jnp.zeros((runs, *one.shape), one.dtype)) for path, one in named]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def int8(x: Float[Array, "B T K H"]) -> Float[Array, "B T K H"]:
    """What is read of int8 numbers with one float32 scale a token and head, max |x| / 127."""
    scale = _scale(x, 127)
    return jnp.round(x / scale) * scale


def fp8(x: Float[Array, "B T K H"]) -> Float[Array, "B T K H"]:
    """The same of float8_e4m3fn, whose largest is 448."""
    scale = _scale(x, E4M3_MAX)
    return (x / scale).astype(jnp.float8_e4m3fn).astype(x.dtype) * scale


def _scale(x: Array, most: float) -> Array:
    return jnp.maximum(jnp.abs(x).max(axis=-1, keepdims=True), 1e-30) / most


def _attending(kept: Callable = lambda x: x, topk: int | None = None) -> Attention:
    """Dense attention over keys and values as `kept` gives them back; each query and head over its `topk` best keys."""
    return jforge.get(DENSE)._replace(forward=partial(_forward, kept, topk), prefill=None, decode=None)


def _forward(kept: Callable, topk: int | None, params, cfg: dense.Config, x, positions=None):
    rows = all_of(cfg, x, positions)
    k, v = (kept(one) for one in dense.project_keys(params, cfg, rows))

    def mask(q, rows, S):
        seen = dense.visible(cfg, rows.order[..., None], jnp.arange(S))
        if topk is None or topk >= S:
            return seen
        B, T, N, H = q.shape
        scores = einsum("btkgh,bskh->btkgs", q.reshape(B, T, k.shape[2], -1, H), k[:, :S]).reshape(B, T, N, S)
        scores = jnp.where(seen[:, :, None], scores, -jnp.inf)
        least = jax.lax.top_k(scores, topk)[0][..., -1:]
        return seen[:, :, None] & (scores >= least)

    return dense.attend_over(params, cfg, rows, k, v, mask)


def _with(cfg: ModelConfig, att: str | Attention, own) -> ModelConfig:
    return replace(cfg, layers=((att, own),) * len(cfg.layers))


def _moved(cfg: ModelConfig, tokens: int) -> Mapping[str, int]:
    cost = stack.cost(cfg.layers, context=tokens, dtype="float32")
    return {what: int(sum(getattr(cost, what).values())) for what in ("stored", "read")}


def _state(cfg: ModelConfig) -> PyTree:
    from flax import nnx

    return nnx.state(models.Decoder(cfg, rngs=nnx.Rngs(0)), nnx.Param)
