"""Calls of the ops, handed to whoever counts what a step reads: an op's arguments say more than its arithmetic."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps

_WATCH: ContextVar[Callable | None] = ContextVar("watch", default=None)


def watched[**P, R](op: Callable[P, R]) -> Callable[P, R]:
    """The op; within `watching(watch)` watch(op, *arguments) in its place."""

    @wraps(op)
    def call(*args: P.args, **options: P.kwargs) -> R:
        watch = _WATCH.get()
        return op(*args, **options) if watch is None else watch(op, *args, **options)

    return call


@contextmanager
def watching(watch: Callable) -> Iterator[None]:
    token = _WATCH.set(watch)
    try:
        yield
    finally:
        _WATCH.reset(token)
