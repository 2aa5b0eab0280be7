"""How often a model is right, by the distance of the answer, and whether its sparse layers read where the answer is."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from jforge import stack
from jforge.experiments.training import HELD_OUT, merged
from jforge.models import ModelConfig
from jforge.models.config import found
from jforge.tasks import Task

BINS = 20
"""Distances of 2^i to 2^(i + 1) - 1 tokens, for i from 0 on; 0, where a task has no distances, is in the first."""


DEPTHS = 8
"""Equal parts of a row, by the place of the answer: the first part holds its first tokens."""


class Score(NamedTuple):
    """What held-out rows of one length say of each run."""

    right: Int[np.ndarray, "runs bins"]
    asked: Int[np.ndarray, "bins"]
    loss: np.ndarray  # nats a question, one a run
    right_by_depth: Int[np.ndarray, "runs depths"]
    asked_by_depth: Int[np.ndarray, "depths"]

    @property
    def accuracy(self) -> np.ndarray:
        """Share of right answers of each run."""
        return self.right.sum(axis=1) / self.asked.sum()


def score(cfg: ModelConfig, params: PyTree, task: Task, length: int, rows: int = 512, at_once: int = 64) -> Score:
    """Of `rows` held-out rows of `length` tokens, the same ones for every model; params: of all runs."""
    task.check_length(length)
    at_once = min(at_once, rows)
    return Score(*map(np.asarray, _score(cfg, task, length, -(-rows // at_once), at_once, params)))


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _score(cfg: ModelConfig, task: Task, length: int, batches: int, rows: int, params: PyTree):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(length), HELD_OUT), batches)

    def of_run(params):
        def of_batch(key):
            batch = task.draw(key, rows, length)
            logits = jax.nn.log_softmax(merged(cfg, params)(batch.tokens))
            nats = -jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
            right = batch.scored & (logits.argmax(axis=-1) == batch.targets)
            bins = jnp.floor(jnp.log2(jnp.maximum(batch.distance, 1))).astype(jnp.int32)
            depths = (jnp.arange(length) - batch.distance) * DEPTHS // length
            masks = (right, batch.scored)
            counts = [_count(where, n, mask) for where, n in ((bins, BINS), (depths, DEPTHS)) for mask in masks]
            return counts, jnp.where(batch.scored, nats, 0).sum()

        counts, nats = jax.tree.map(lambda a: a.sum(axis=0), jax.lax.map(of_batch, keys))
        return counts, nats / counts[1].sum()

    (right, asked, right_by_depth, asked_by_depth), loss = jax.lax.map(of_run, params)
    return right, asked[0], loss, right_by_depth, asked_by_depth[0]


def _count(where: Int[Array, "B T"], many: int, mask: Bool[Array, "B T"]) -> Int[Array, "{many}"]:
    return jnp.zeros(many, jnp.int32).at[where].add(mask.astype(jnp.int32))


def reads_the_answer(cfg: ModelConfig, params: PyTree, task: Task, length: int, rows: int = 128) -> list[float | None]:
    """For each layer, the share of rows in which the picks of the last token hold the place of its answer, by the
    mechanism's own `select`; None for a layer that picks nothing. Of one run; the task asks at the last place.
    """
    batch = task.draw(jax.random.fold_in(jax.random.key(length), HELD_OUT), rows, length)
    if not np.asarray(batch.scored[:, -1]).all():
        raise ValueError(f"task is {task}; its last token must be a question")
    read = _read(cfg, params, batch.tokens)
    place = length - 1 - np.asarray(batch.distance[:, -1])
    at = np.arange(rows)
    return [None if one is None else float(np.asarray(one)[at, place].mean()) for one in read]


@partial(jax.jit, static_argnums=0)
def _read(cfg: ModelConfig, params: PyTree, tokens) -> list[Bool[Array, "B T"] | None]:
    """Where the last token of each row looks, layer by layer."""
    model = merged(cfg, params)
    B, T = tokens.shape
    _, cache = model.prefill(tokens[:, :-1], model.init_cache(B, T, jnp.float32))
    read = []

    def block(x, mixer, attend):
        att, own, *_ = cfg.mixers[mixer]
        att, h = found(att), model.norms[mixer](x)
        if cfg.has_mlp(mixer):
            tokens = att.tokens_of(own, att.select(model.layer_params(mixer), own, h, cache[mixer]), T)
            read.append(None if tokens is None else tokens[:, 0])
        return model.block(x, mixer, attend)

    stack.decode(
        [model.layer_params(i) for i in range(len(cfg.mixers))], cfg.mixers, model.embed(tokens[:, -1:]), cache, block
    )
    return read


def one_run(params: PyTree, run: int) -> PyTree:
    """The parameters of one of the runs."""
    return jax.tree.map(lambda leaf: leaf[run], params)
