"""A namespace that takes an op from one backend where it is written and from another where it is not."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mix:
    """Static and hashable, so it can be the `ops` argument of a jitted decode. Its repr lists what falls back."""

    ops: Any
    fallback: Any

    def __getattr__(self, name: str):
        op = getattr(self.ops, name)
        return getattr(self.fallback, name) if _unwritten(op) else op

    def __repr__(self) -> str:
        missing = [n for n in self.fallback.__all__ if hasattr(self.ops, n) and _unwritten(getattr(self.ops, n))]
        return f"mix({self.ops.__name__}, fallback={self.fallback.__name__} for {', '.join(missing) or 'nothing'})"


def mix(ops, fallback) -> Mix:
    """`ops` with the ops that it has not written taken from `fallback`; nothing else falls back.

    An op that is written but refuses its arguments still raises: mix looks at which ops exist, not at their errors.
    """
    return Mix(ops, fallback)


def _unwritten(op) -> bool:
    """Each package keeps its unwritten ops in a module of that name."""
    return getattr(op, "__module__", "").rpartition(".")[2] == "unwritten"
