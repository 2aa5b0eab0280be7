"""What Config dataclasses share: a hashable dict and checks whose message names the field, its value and the rule."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn


def reject(name: str, value: Any, allowed: str) -> NoReturn:
    """Raise the ValueError that every bad Config field gets."""
    raise ValueError(f"{name} is {shown(value)}; it must be {allowed}")


def shown(value: Any, most: int = 200) -> str:
    """A value in a message: its repr, shortened in the middle where it is long."""
    text = repr(value) if not isinstance(value, (list, tuple)) or len(value) < most else repr(value[:most])
    if len(text) <= most:
        return text
    many = f" ({len(value):,} entries)" if isinstance(value, (list, tuple, Mapping)) else ""
    return f"{text[: most // 2]} ... {text[-most // 4 :]}{many}"


def positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        reject(name, value, "a positive number")


def within(name: str, value: Any, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        reject(name, value, f"a number from {least:g} to {most:g}")


def positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        reject(name, value, "a positive integer")


def positive_ints(config: Any, *names: str) -> None:
    """Each of these fields."""
    for name in names:
        positive_int(name, getattr(config, name))


def natural(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        reject(name, value, "an integer of at least 0")


def one_of(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        reject(name, value, f"one of {', '.join(map(repr, allowed))}")


class FrozenDict(Mapping):
    """An immutable, hashable mapping of plain values: lists become tuples, dicts FrozenDicts."""

    def __init__(self, items: Mapping = {}):  # noqa: B006 (never mutated)
        self._items = {k: _freeze(v) for k, v in items.items()}

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return FrozenDict(value)
    return tuple(map(_freeze, value)) if isinstance(value, list) else value


class Described:
    """The base of all Configs: what users see of one.

    Its docstring has a line `field: what it means` for each field, and `help` of a subclass shows those of its parents
    too. Its repr says where there are no positions. Keys that a `config.json` may have beside or in `rope_parameters`
    are no fields; the error says where they go.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.__repr__ = Described.__repr__  # or `dataclass` would write its own
        parent = cls.__bases__[0]
        cls.__doc__ = inspect.cleandoc(vars(cls).get("__doc__") or "")
        if parent.__module__ != __name__ and parent.__doc__:
            cls.__doc__ += f"\n\n{parent.__module__}.{parent.__qualname__}: {parent.__doc__}"

    def __new__(cls, *args, **given):
        inside = [key for key in ("rope_theta", "rope_type", "partial_rotary_factor") if key in given]
        for key in [*inside, *(key for key in ("rope_scaling", "rotary_dim") if key in given)]:
            where = "it has no rotary positions"
            if any(f.name == "rope_parameters" for f in fields(cls)):
                example = {"rope_type": "default", "rope_theta": 1e4} | {name: given[name] for name in inside}
                where = f"rotary positions are one field, as in rope_parameters={example}"
            raise TypeError(f"{key} is {given[key]!r}; {cls.__module__}.{cls.__qualname__} has no such field: {where}")
        return super().__new__(cls)

    def __repr__(self) -> str:
        texts = {f.name: repr(getattr(self, f.name)) for f in fields(self) if f.repr}
        if texts.get("rope_parameters") == "None":
            texts["rope_parameters"] += " (NoPE: no rotary positions)"
        return f"{type(self).__qualname__}({', '.join(f'{name}={text}' for name, text in texts.items())})"


@dataclass(frozen=True, kw_only=True)
class Derived(Described):
    """The base of Configs whose fields may be None for a value that follows from the others.

    derived: {field: the value that None stood for}. `dataclasses.replace` hands on every field as it reads, so a field
    that comes with this very value follows the other fields anew, as if the Config were written out again with None
    there; any other value is the user's and stays. Two Configs that read the same are equal, whatever was derived.
    """

    derived: Mapping[str, Any] = field(default=FrozenDict(), repr=False, compare=False)

    def _derive(self, name: str, value: Any) -> None:
        """Set the field to `value` unless the user gave it another."""
        given, known = getattr(self, name), dict(self.derived)
        if given is None or (name in known and given == known[name]):
            object.__setattr__(self, name, value)
            known[name] = value
        else:
            known.pop(name, None)
        object.__setattr__(self, "derived", FrozenDict(known))
