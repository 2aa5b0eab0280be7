"""Many runs of one model as one program: every learning rate and seed is a row of an axis that vmap adds.

    plan = Plan(model=cfg, task=tasks.get("recall")(), stages=((500, 32), (1500, 64)))
    trained = train(plan, [Run(1e-3, 0), Run(3e-3, 0)])

Indexers, whose picks pass no gradient, learn what attention reads beside all else (jforge.core.distil). AdamW with a
linear warm-up, then a cosine down to nothing; gradients are clipped by their global norm. Runs of one seed start from
the same parameters and see the same rows, whatever their rate. Step n draws its rows from (seed, n) alone, so a run
that is broken off and taken up again goes on to the same bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, PyTree

from jforge.core.config import positive, positive_ints, reject, within
from jforge.models import Decoder, ModelConfig
from jforge.tasks import Batch, Task

START, DATA, HELD_OUT = 0, 1, 2
"""What keys are drawn for, from the key of a seed."""


class Run(NamedTuple):
    """One training of the plan's model."""

    learning_rate: float  # the largest
    seed: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What runs have in common.

    stages: (steps, tokens a row) of each, one after the other: short rows first shorten the plateau before recall
    rows: of a step
    every: steps between two lines of the log and two checkpoints; each stage is a multiple of it
    warm_up: share of all steps in which the rate rises
    """

    model: ModelConfig
    task: Task
    stages: tuple[tuple[int, int], ...]
    rows: int = 64
    every: int = 100
    warm_up: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self):
        positive_ints(self, "rows", "every")
        positive("clip", self.clip)
        within("warm_up", self.warm_up, 0, 1)
        within("weight_decay", self.weight_decay, 0, 1)
        if not self.stages or any(steps < 1 or steps % self.every for steps, _ in self.stages):
            reject("stages", self.stages, f"(steps, tokens) of each, steps a multiple of every={self.every}")
        if self.model.vocab_size != self.task.vocab_size:
            reject("model.vocab_size", self.model.vocab_size, f"{self.task.vocab_size}, the task's")
        for _, tokens in self.stages:
            self.task.check_length(tokens)

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(steps for steps, _ in self.stages)

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """(first step, tokens a row) of every `every` steps."""
        lengths = [tokens for steps, tokens in self.stages for _ in range(steps // self.every)]
        return [(i * self.every, tokens) for i, tokens in enumerate(lengths)]


class State(NamedTuple):
    """All that a step changes; every array but `step` has the runs as its first axis."""

    params: PyTree
    moments: optax.OptState
    step: Array  # int32, steps done


class Diverged(ValueError):
    """Every run of a plan has lost its way. The message says where."""


def start(plan: Plan, runs: Sequence[Run]) -> State:
    """Before the first step."""
    return _start(plan, jnp.asarray([run.seed for run in runs]))


@partial(jax.jit, static_argnums=0)
def _start(plan: Plan, seeds) -> State:
    def one(seed):
        params = nnx.state(Decoder(plan.model, rngs=nnx.Rngs(_key(seed, START))), nnx.Param)
        return params, _optimizer(plan).init(params)

    return State(*jax.vmap(one)(seeds), jnp.int32(0))


def train(
    plan: Plan,
    runs: Sequence[Run],
    state: State | None = None,
    each: Callable[[State, np.ndarray], None] = lambda state, losses: None,
) -> State:
    """The state after all steps, from `state` (None: the start) on.

    each: called after every chunk with the state and its losses, `every` by runs. A run whose loss is no number goes
    on being none; Diverged is raised once that holds of all.
    """
    if not runs:
        reject("runs", runs, "one run or more")
    state = start(plan, runs) if state is None else state
    rates, seeds = jnp.asarray([r.learning_rate for r in runs]), jnp.asarray([r.seed for r in runs])
    for first, tokens in plan.chunks:
        if first < int(state.step):
            continue
        state, losses = advance(plan, tokens, state, rates, seeds)
        losses = np.asarray(losses)
        each(state, losses)
        if not np.isfinite(losses[-1]).any():
            bad = ~np.isfinite(losses)
            where = ", ".join(f"{run} at step {first + int(bad[:, i].argmax()) + 1}" for i, run in enumerate(runs))
            raise Diverged(f"the loss is no number in any run: {where}; model {plan.model.layers}")
    return state


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def advance(plan: Plan, tokens: int, state: State, rates, seeds) -> tuple[State, Float[Array, "steps runs"]]:
    """`every` steps of every run, and the loss of each."""

    def step(state: State, _):
        one = partial(_step, plan, tokens, state.step)
        params, moments, losses = jax.vmap(one)(state.params, state.moments, rates, seeds)
        return State(params, moments, state.step + 1), losses

    return jax.lax.scan(step, state, length=plan.every)


def _step(plan: Plan, tokens: int, number, params, moments, rate, seed):
    """One step of one run."""
    batch = plan.task.draw(jax.random.fold_in(_key(seed, DATA), number), plan.rows, tokens)

    def losses(params):
        model = merged(plan.model, params)
        loss = cross_entropy(model(batch.tokens), batch)
        return loss + model.index_loss(batch.tokens), loss  # of parameters that have no other, or none of this one

    slopes, loss = jax.grad(losses, has_aux=True)(params)
    change, moments = _optimizer(plan).update(slopes, moments, params)
    return optax.apply_updates(params, jax.tree.map(lambda one: rate * one, change)), moments, loss


def _optimizer(plan: Plan) -> optax.GradientTransformation:
    """For a rate of 1; each run multiplies what comes out by its own."""
    rising = max(1, round(plan.warm_up * plan.steps))
    schedule = optax.warmup_cosine_decay_schedule(0, 1, rising, max(rising + 1, plan.steps))
    return optax.chain(optax.clip_by_global_norm(plan.clip), optax.adamw(schedule, weight_decay=plan.weight_decay))


def merged(cfg: ModelConfig, params: PyTree) -> Decoder:
    """The model of these parameters."""
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0)))), params)


def cross_entropy(logits: Float[Array, "B T vocab"], batch: Batch) -> Float[Array, ""]:
    """Mean over what is scored, in nats."""
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    return jnp.where(batch.scored, each, 0).sum() / batch.scored.sum()


def _key(seed, purpose: int) -> Array:
    return jax.random.fold_in(jax.random.key(seed), purpose)
