"""What a training leaves on disk: a checkpoint that is whole or not there, and a log of JSON lines beside it.

    folder/checkpoint.npz     every array of the state, and the plan and runs that it is of
    folder/log.jsonl          a line a chunk: {"step", "tokens", "loss": one a run, "seconds"}

A checkpoint is written beside the old one and then put in its place, so a full disk or a kill loses none.
"""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jforge.core.config import reject
from jforge.experiments.training import Plan, Run, State, start, train

CHECKPOINT, LOG = "checkpoint.npz", "log.jsonl"


def kept(plan: Plan, runs: Sequence[Run], folder: str | Path, each=lambda step, losses: None) -> State:
    """`train`, from the checkpoint in `folder` on where there is one; a checkpoint and a line of log a chunk.

    each: called after every chunk with the steps done and the losses, `every` by runs.
    Raises ValueError where `folder` cannot be written or holds a checkpoint of another plan or other runs.
    """
    folder, begun = Path(folder), time.perf_counter()
    made(folder)
    state = load(plan, runs, folder)
    _writing(folder, lambda: _cut(folder / LOG, 0 if state is None else int(state.step)))
    tokens = {first + plan.every: length for first, length in plan.chunks}

    def after(state: State, losses: np.ndarray) -> None:
        step = int(state.step)
        line = {"step": step, "tokens": tokens[step], "loss": losses.mean(axis=0).round(6).tolist()}
        line["seconds"] = round(time.perf_counter() - begun, 1)
        _writing(folder, lambda: _append(folder / LOG, line))
        _writing(folder, lambda: save(plan, runs, state, folder))
        each(step, losses)

    return train(plan, runs, state, after)


def made(folder: Path) -> None:
    """Make the folder where there is none. Raises ValueError where that cannot be."""
    _writing(folder, lambda: folder.mkdir(parents=True, exist_ok=True))


def save(plan: Plan, runs: Sequence[Run], state: State, folder: Path) -> None:
    """Write the checkpoint. Raises OSError, and then the one before is as it was."""
    new = folder / f"{CHECKPOINT}.new"
    try:
        with new.open("wb") as file:
            np.savez(file, of=np.str_(_said(plan, runs)), **_named(state))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, folder / CHECKPOINT)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def load(plan: Plan, runs: Sequence[Run], folder: str | Path) -> State | None:
    """The state in the folder's checkpoint, to the bit; None where there is none."""
    path = Path(folder) / CHECKPOINT
    if not path.exists():
        return None
    like = jax.eval_shape(lambda: start(plan, runs))
    try:
        with np.load(path, allow_pickle=False) as held:
            of, leaves = str(held["of"]), {name: held[name] for name in held.files}
    except (OSError, KeyError, EOFError, ValueError) as problem:
        raise ValueError(f"{path} is no checkpoint of jforge: {problem}") from None
    if of != _said(plan, runs):
        reject("folder", str(folder), f"one without the checkpoint of another training: {of}")
    leaves = [leaves[name] for name in _named(like)]
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(leaf) for leaf in leaves])


def _said(plan: Plan, runs: Sequence[Run]) -> str:
    """What a checkpoint is of: it fits no other plan and no other runs."""
    return f"{plan} {[tuple(run) for run in runs]}"


def _named(state: State) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _append(path: Path, line: dict) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _cut(path: Path, step: int) -> None:
    """Leave out what a training that was killed logged after its last checkpoint."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    path.write_text("".join(f"{one}\n" for one in lines if json.loads(one)["step"] <= step), encoding="utf-8")


def _writing(folder: Path, write) -> None:
    try:
        write()
    except OSError as problem:
        raise ValueError(f"folder is {str(folder)!r}; it cannot be written: {problem.strerror or problem}") from None
