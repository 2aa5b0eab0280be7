"""Which statements of which modules a translation needs, and in which order; see jforge.explorer.translate."""

import ast
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

from jforge.explorer.translate.expressions import identifier, stored
from jforge.explorer.translate.statements import Statements

_ROOT = Path(__file__).parents[3]
_CALLED_BY_STD = (
    "__init__", "__post_init__", "__getitem__", "__iter__", "__len__", "__add__", "__mul__", "__repr__",
)  # fmt: skip


class Source:
    """One module of jforge: its statements, which of them bind a name, and what it imports."""

    def __init__(self, name: str):
        self.name, self.object = name, name.replace(".", "_")
        self.statements = ast.parse(_path(name).read_text(encoding="utf-8")).body
        self.bound: dict[str, list[int]] = {}
        for at, statement in enumerate(self.statements):
            for bound in stored(statement):
                self.bound.setdefault(bound, []).append(at)

    @cached_property
    def imports(self) -> dict[str, tuple[str, str | None]]:
        """{local name: (module, name in it, None for the module itself)}."""
        found = {}
        for node in self.statements:
            if isinstance(node, ast.Import):
                found |= {alias.asname or alias.name.partition(".")[0]: (alias.name, None) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {alias.asname or alias.name: _imported(node.module, alias.name) for alias in node.names}
        return found


def _imported(module: str, name: str) -> tuple[str, str | None]:
    inner = f"{module}.{name}"
    return (inner, None) if _path(inner) else (module, name)


def _path(module: str) -> Path | None:
    """The file of a module of this project, None for any other."""
    base = _ROOT.joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists()), None)


class Program:
    """What has been asked for so far.

    replaced: {global name with its module before it: the JavaScript that stands for it}; it is not translated.
    """

    def __init__(self, replaced: Mapping[str, str]):
        self.replaced = replaced
        self.sources: dict[str, Source] = {}
        self._code: dict[tuple[str, int], str] = {}  # by module and number of the statement
        self._classes: dict[tuple[str, int], dict[str, str]] = {}  # of each class {method: its code}
        self._attributes: set[str] = set(_CALLED_BY_STD)

    def source(self, module: str) -> Source:
        if module not in self.sources:
            self.sources[module] = Source(module)
        return self.sources[module]

    def resolve(self, module: str, name: str) -> str:
        """The expression for a global name of a module. What is jforge's own is translated, the rest is std's."""
        if (full := f"{module}.{name}") in self.replaced:
            return self.replaced[full]
        source = self.source(module)
        if name in source.bound:
            for at in source.bound[name]:
                self._translate(source, at)
            return f"{source.object}.{identifier(name)}"
        other, inner = source.imports.get(name, ("builtins", name))
        if not _path(other):
            return f"std.{identifier(name)}"
        return self.source(other).object if inner is None else self.resolve(other, inner)

    def module_of(self, module: str, name: str) -> str | None:
        """The module of jforge that a global name stands for, None for anything else."""
        other, inner = self.source(module).imports.get(name, ("", ""))
        return other if inner is None and _path(other) else None

    def ask(self, attribute: str) -> None:
        """Note that objects are asked for an attribute: of classes, only the methods of such names are translated."""
        if attribute not in self._attributes:
            self._attributes.add(attribute)
            for module, at in list(self._classes):
                self._add_methods(self.source(module), at)

    def _translate(self, source: Source, at: int) -> None:
        place, node = (source.name, at), source.statements[at]
        if place in self._code:
            return
        self._code[place] = ""  # what it needs may need it
        self._code[place] = Statements(self, source).at_top(node)
        if isinstance(node, ast.ClassDef):
            self._classes[place] = {}
            self._add_methods(source, at)

    def _add_methods(self, source: Source, at: int) -> None:
        node, done = source.statements[at], self._classes[source.name, at]
        for method in node.body:
            wanted = isinstance(method, ast.FunctionDef) and method.name in self._attributes
            if wanted and method.name not in done:
                done[method.name] = ""
                done[method.name] = Statements(self, source, node).method(method)

    def written(self) -> str:
        """An object for each module, and the statements that fill it."""
        lines = []
        for source in self._in_order():
            lines.append(f"const {source.object} = {{}};")
            for at, node in enumerate(source.statements):
                lines.append(self._code.get((source.name, at), ""))
                if methods := self._classes.get((source.name, at)):
                    lines += [methods.get(one.name, "") for one in node.body if isinstance(one, ast.FunctionDef)]
        return "\n".join(filter(None, lines))

    def _in_order(self) -> Iterator[Source]:
        """Modules, each after those that it imports."""
        done = set()

        def visit(source: Source) -> Iterator[Source]:
            if source.name not in done:
                done.add(source.name)
                for module, _ in source.imports.values():
                    if module in self.sources:
                        yield from visit(self.sources[module])
                yield source

        for name in sorted(self.sources):
            yield from visit(self.sources[name])
