"""A namespace that asks one backend first, and another one where the first refuses."""

import logging
from dataclasses import dataclass, field
from functools import cache
from typing import Any

_LOG = logging.getLogger("jforge.ops")


@dataclass(frozen=True)
class Mix:
    """Static and hashable, so it can be the `ops` argument of a jitted decode.

    fallen: {op: the reasons why calls of it went to `fallback`}, in the order in which they came; what is traced once
    is noted once.
    """

    ops: Any
    fallback: Any
    fallen: dict[str, list[str]] = field(default_factory=dict, compare=False)

    def __getattr__(self, name: str):
        if name not in self.fallback.__all__:
            raise AttributeError(f"{self.fallback.__name__} has no op called {name!r}")

        def op(*arrays, **options):
            try:
                return getattr(self.ops, name)(*arrays, **options)
            except NotImplementedError as refusal:
                self._note(name, str(refusal))
            return getattr(self.fallback, name)(*arrays, **options)

        return op

    def _note(self, name: str, reason: str) -> None:
        reasons = self.fallen.setdefault(name, [])
        if reason not in reasons:
            reasons.append(reason)
            first, second = self.ops.__name__, self.fallback.__name__
            _LOG.warning("%s.%s refuses a call, %s answers it: %s", first, name, second, reason)

    def __repr__(self) -> str:
        fallen = ", ".join(self.fallen) or "nothing"
        return f"mix({self.ops.__name__}, fallback={self.fallback.__name__}; fell back: {fallen})"


@cache
def mix(ops, fallback) -> Mix:
    """`ops`, with calls that it refuses (NotImplementedError, at trace time) answered by `fallback`: each reason is
    logged once and stands in `.fallen`. Any other error is raised. The same two give the same object, as jit would.
    """
    return Mix(ops, fallback)
