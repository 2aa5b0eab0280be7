"""Small tasks with exact answers, to train tiny models on and to measure what a mechanism can remember.

    task = tasks.get("recall")(pairs=4)                     # fields in help(tasks.Recall)
    batch = task.draw(jax.random.key(0), rows=32, length=64)   # tokens, targets, scored, distance: 32 x 64 each
    model = Model(task.vocab_size, ...)

`draw` is pure and needs no host, so it can stand inside a jitted `lax.scan` of training steps. `distance` says how far
back the answer stands, for accuracy by distance; `length` may differ from call to call, for rows longer than trained.
What such tasks do not show is how a large model does on real ones.
"""

from jforge.core.config import one_of
from jforge.tasks.copies import Copy, SelectiveCopy
from jforge.tasks.pairs import Needle, Recall, TwoHop
from jforge.tasks.task import BLANK, MARK, START, Batch, Task
from jforge.tasks.text import Text

__all__ = [
    "BLANK", "MARK", "START", "Batch", "Copy", "Needle", "Recall", "SelectiveCopy", "Task", "Text", "TwoHop", "get",
    "names",
]  # fmt: skip

REGISTRY: dict[str, type[Task]] = {
    "recall": Recall,
    "needle": Needle,
    "copy": Copy,
    "selective_copy": SelectiveCopy,
    "two_hop": TwoHop,
    "text": Text,
}


def names() -> tuple[str, ...]:
    """The tasks that there are."""
    return tuple(REGISTRY)


def get(name: str) -> type[Task]:
    """The class of the task of that name. Raises ValueError listing those that exist."""
    one_of("name", name, names())
    return REGISTRY[name]
