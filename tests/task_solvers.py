"""Each task once more, by a solver: from a row's tokens up to a place it says what is right there and where it stood.

Plain Python on lists of tokens; of a task it knows the class alone.
"""

import numpy as np

from jforge import tasks
from jforge.tasks import BLANK, MARK, START


def only(found: list[int]) -> int:
    """The one place that there may be; another number of them leaves the answer open."""
    assert len(found) == 1, f"{len(found)} places could answer"
    return found[0]


def places(tokens: list[int], token: int) -> list[int]:
    return [i for i, other in enumerate(tokens) if other == token]


def value(seen: list[int]) -> tuple[int, int]:
    """Recall and needle: the last token is a key, which stood once before."""
    at = only(places(seen[:-1], seen[-1])) + 1
    return seen[at], at


def value_of_value(seen: list[int]) -> tuple[int, int]:
    """Two hops; where they stood is the farther one."""
    middle, hop = value(seen)
    end = only([i for i in places(seen[:-1], middle) if i != hop]) + 1
    return seen[end], min(hop, end)


def after_start(seen: list[int]) -> tuple[int, int]:
    """Copy: as far behind START as the place is behind MARK."""
    said = len(seen) - 1 - only(places(seen, MARK))
    at = only(places(seen, START)) + 1 + said
    return seen[at], at


def next_symbol(seen: list[int]) -> tuple[int, int]:
    """Selective copy: of the symbols before MARK the next one."""
    mark = only(places(seen, MARK))
    at = [i for i in range(mark) if seen[i] != BLANK][len(seen) - 1 - mark]
    return seen[at], at


SOLVERS = {
    tasks.Recall: value,
    tasks.Needle: value,
    tasks.TwoHop: value_of_value,
    tasks.Copy: after_start,
    tasks.SelectiveCopy: next_symbol,
}


def faults(task: tasks.Task, batch: tasks.Batch, questions: int) -> list[str]:
    """What is wrong with a batch of NumPy arrays whose rows are to ask `questions` times each."""
    found = []
    tokens, targets, scored, distance = batch
    if tokens.min() < 0 or tokens.max() >= task.vocab_size:
        found.append(f"tokens from {tokens.min()} to {tokens.max()}")
    if targets[~scored].any() or distance[~scored].any():
        found.append("a target or a distance where nothing is scored")
    for row in range(len(tokens)):
        asked = np.flatnonzero(scored[row])
        if len(asked) != questions:
            found.append(f"row {row} asks {len(asked)} times")
        for t in asked:
            try:
                answer, at = SOLVERS[type(task)](tokens[row, : t + 1].tolist())
            except (AssertionError, IndexError) as reason:
                found.append(f"row {row}, place {t}: {reason}")
                continue
            if targets[row, t] != answer:
                found.append(f"row {row}, place {t}: target {targets[row, t]}, it is {answer}")
            if distance[row, t] != t - at:
                found.append(f"row {row}, place {t}: distance {distance[row, t]}, it is {t - at}")
    return found
