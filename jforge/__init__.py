"""jforge: LLM attention mechanisms as pure functions, with exact bytes, laws and kernels.

att = jforge.get("gqa")
cfg = att.Config(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8)
y, cache = att.decode(params, cfg, x, cache)
"""

import importlib

from jforge import caches, ops
from jforge.attention import REGISTRY
from jforge.core.attention import Attention
from jforge.cost import Cost
from jforge.laws import check

__all__ = [
    "Attention", "Cost", "__version__", "caches", "check", "get", "harness", "hf", "lens", "models", "names", "ops",
    "roofline", "stack", "tasks", "viz",
]  # fmt: skip
__version__ = "0.1.0"
_LAZY = ("harness", "hf", "lens", "models", "roofline", "stack", "tasks", "viz")


def names() -> tuple[str, ...]:
    """The registered mechanisms."""
    return tuple(REGISTRY)


def get(name: str) -> Attention:
    """The mechanism of that name. Raises ValueError listing those that exist."""
    if name not in REGISTRY:
        raise ValueError(f"no mechanism is called {name!r}; there are {', '.join(REGISTRY)}")
    return REGISTRY[name]


def __getattr__(name: str):
    """Parts that most programs do without are imported when they are first asked for."""
    if name in _LAZY:
        return importlib.import_module(f"jforge.{name}")
    raise AttributeError(f"module 'jforge' has no attribute {name!r}")
