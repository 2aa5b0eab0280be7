"""What the functions of an Attention refuse before they run: another mechanism's Config, another framework's arrays,
parameters that are not there or have another shape.

The functions of a mechanism are free functions on whatever has the right fields; a Config that merely has them would
give numbers of another mechanism without a word. So the tuple hands out each function with these checks in front, in
one place for all mechanisms and variants. Under `jax.jit` they run where the function is traced alone.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache, wraps
from typing import Any
from weakref import WeakKeyDictionary

import jax
import numpy as np

_OWNED: WeakKeyDictionary[type, str] = WeakKeyDictionary()  # Configs that an Attention has, and what they are called
_UNCHECKED: WeakKeyDictionary[Callable, Callable] = WeakKeyDictionary()


def claim(config: type, name: str | None = None) -> None:
    """Note that an Attention takes this Config, as messages are to call it; a name that is given once stays."""
    path = f"{config.__module__}.{config.__qualname__}"
    if name is not None or config not in _OWNED:
        _OWNED[config] = path if name is None else f"{path} ({name})"


def called(config: type) -> str:
    return _OWNED.get(config) or f"{config.__module__}.{config.__qualname__}".removeprefix("builtins.")


def fits(cfg: Any, config: type) -> bool:
    """Whether an Attention that takes `config` takes cfg: one of this class, or of a subclass that no Attention has."""
    return next((cls for cls in type(cfg).__mro__ if cls in _OWNED), None) is config


def check_config(cfg: Any, config: type) -> None:
    if not fits(cfg, config):
        raise TypeError(f"cfg is a {called(type(cfg))}; it must be a {called(config)}")


def check_arrays(params: Mapping[str, Any], x: Any, **others: Any) -> None:
    """Raise TypeError that names an array of another framework, in `others` whatever pytree they are."""
    if not isinstance(params, Mapping):
        raise TypeError(f"params is a {called(type(params))}; it must be a dict of arrays by name")
    named = {"x": x, **{f"params[{name!r}]": value for name, value in params.items()}}
    for name, value in named.items():
        if not _ours(value):
            _reject(name, value)
    for path, leaf in jax.tree_util.tree_leaves_with_path(others):
        if hasattr(leaf, "dtype") and not _ours(leaf):
            _reject(path[0].key + jax.tree_util.keystr(path[1:]), leaf)


def _ours(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | np.generic) or hasattr(value, "__jax_array__")


def _reject(name: str, value: Any) -> None:
    kind = type(value)
    told = f"{kind.__module__.partition('.')[0]}.{kind.__name__}".removeprefix("builtins.")
    raise TypeError(f"{name} is a {told}; it must be a JAX or NumPy array")


def check_shapes(params: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError that names the first parameter of another shape. Those that nobody asks for are no mistake."""
    for name, shape in shapes.items():
        if name in params and (given := np.shape(params[name])) != tuple(shape):
            raise ValueError(f"params[{name!r}] has shape {given}; it must be {tuple(shape)}")


def unchecked(function: Callable) -> Callable:
    """The function as its file has it, if it comes from an Attention."""
    return _UNCHECKED.get(function, function)


@lru_cache(4096)  # one object a function, so that what is compiled for it is found again
def of_config(function: Callable, config: type) -> Callable:
    """function(cfg, ...) that refuses another Config."""

    @wraps(function)
    def checked(cfg, *args, **kwargs):
        check_config(cfg, config)
        return function(cfg, *args, **kwargs)

    _UNCHECKED[checked] = function
    return checked


@lru_cache(4096)
def of_params(function: Callable, config: type, shapes: Callable | None, names: tuple[str, ...]) -> Callable:
    """function(params, cfg, x, *names) that refuses another Config, other frameworks' arrays, and parameters that are
    not those of `shapes`, where it is given.
    """

    @wraps(function)
    def checked(params, cfg, x, *args, **kwargs):
        check_config(cfg, config)
        check_arrays(params, x, **dict(zip(names, args, strict=False)), **kwargs)
        wanted = {} if shapes is None else shapes(cfg)
        check_shapes(params, wanted)
        if missing := [name for name in wanted if name not in params]:
            with suppress(KeyError):  # what the function refuses in its other arguments is said first
                function(params, cfg, x, *args, **kwargs)
            shape = tuple(wanted[missing[0]])
            raise ValueError(f"params has no {missing[0]}; it must have one of shape {shape}")
        return function(params, cfg, x, *args, **kwargs)

    _UNCHECKED[checked] = function
    return checked
