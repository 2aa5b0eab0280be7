"""Statements of Python as JavaScript; see jforge.explorer.translate."""

import ast
from collections.abc import Iterator

from jforge.explorer.translate.expressions import Expressions, identifier, literal, stored

_ARRAYS = ("Weights", "np.ndarray")
"""Annotations of parameters: a function that has one is left out."""
_DECORATORS = ("dataclass", "cache_class", "lru_cache", "property", "cached_property")


class Statements(Expressions):
    """Of one module: `visit` gives the text of a statement as well, "" where nothing is left of it."""

    def at_top(self, node: ast.stmt) -> str:
        """A statement of the module. Modules over which it loops are asked for what it asks of any object."""
        if isinstance(node, ast.For):
            asked = {one.attr for one in ast.walk(node) if isinstance(one, ast.Attribute)}
            for module in filter(None, map(self.module, ast.walk(node.iter))):
                for name in sorted(asked & self.program.source(module).bound.keys()):
                    self.program.resolve(module, name)
        return self.visit(node)

    def _block(self, body: list[ast.stmt]) -> str:
        return "\n".join(filter(None, map(self.visit, body)))

    # --- functions and classes

    def visit_FunctionDef(self, node: ast.FunctionDef) -> str:
        self._decorators(node)
        return f"{self.bound(node.name)} = {self._function(node, node.name, node.body)};"

    def visit_Lambda(self, node: ast.Lambda) -> str:
        return self._function(node, "lambda", [ast.Return(node.body)])

    def _function(self, node: ast.FunctionDef | ast.Lambda, name: str, body: list[ast.stmt]) -> str:
        """std.def(name, parameters, whether *, those by keyword alone, whether **, the function)."""
        args = node.args
        positional = [*args.posonlyargs, *args.args]
        if any(a.annotation and ast.unparse(a.annotation) in _ARRAYS for a in positional):
            return "null"
        lacking = [None] * (len(positional) - len(args.defaults))
        parameters = self._parameters(positional, [*lacking, *args.defaults])
        keywords = self._parameters(args.kwonlyargs, args.kw_defaults)
        names = [a.arg for a in (*positional, args.vararg, *args.kwonlyargs, args.kwarg) if a]
        local = {one for statement in body for one in stored(statement)} - set(names)
        self.scopes.append(local | set(names))
        text = self._block(body)
        self.scopes.pop()
        start = f"let {', '.join(map(identifier, sorted(local)))};\n" if local else ""
        star = "*" if any(isinstance(one, ast.Yield) for one in _inside(body)) else ""
        made = f"function{star} ({', '.join(map(identifier, names))}) {{\n{start}{text}\n}}"
        spec = (literal(name), parameters, literal(bool(args.vararg)), keywords, literal(bool(args.kwarg)))
        return f"std.def({', '.join(spec)}, {made})"

    def _parameters(self, args: list[ast.arg], defaults: list[ast.expr | None]) -> str:
        """[[name], [name, default], ...]."""
        pairs = zip(args, defaults, strict=True)
        texts = ([literal(a.arg), *([self.visit(default)] if default else [])] for a, default in pairs)
        return f"[{', '.join(f'[{", ".join(text)}]' for text in texts)}]"

    def method(self, node: ast.FunctionDef) -> str:
        """std.method, std.property or std.cached_property(class, name, function); it comes after the class."""
        kind = next((name for name in self._decorators(node) if name in ("property", "cached_property")), "method")
        owner = f"{self.source.object}.{self.owner.name}"
        return f"std.{kind}({owner}, {literal(node.name)}, {self._function(node, node.name, node.body)});"

    def _decorators(self, node: ast.FunctionDef | ast.ClassDef) -> list[str]:
        calls = [one.func if isinstance(one, ast.Call) else one for one in node.decorator_list]
        names = [one.id if isinstance(one, ast.Name) else "" for one in calls]
        return names if set(names) <= set(_DECORATORS) else self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> str:
        """std.class(name, module, base, whether it is a record, fields)."""
        decorators, bases = self._decorators(node), list(map(self.visit, node.bases))
        record = "dataclass" in decorators or bases == ["std.NamedTuple"]
        base = next((base for base in bases if base != "std.NamedTuple"), "null")
        fields = ", ".join(self._field(one) for one in node.body if isinstance(one, ast.AnnAssign))
        spec = (literal(node.name), literal(self.source.name), base, literal(record), f"[{fields}]")
        return f"{self.bound(node.name)} = std.class({', '.join(spec)});"

    def _field(self, node: ast.AnnAssign) -> str:
        """[name], [name, default] or, of a dataclass's field(...), [name, default, whether it is compared]."""
        name = literal(node.target.id)
        match node.value:
            case None:
                return f"[{name}]"
            case ast.Call(func=ast.Name(id="field"), keywords=keywords):
                given = {one.arg: self.visit(one.value) for one in keywords}
                return f"[{name}, {given['default']}, {given['compare']}]"
        return f"[{name}, {self.visit(node.value)}]"

    # --- assignments

    def visit_Assign(self, node: ast.Assign) -> str:
        value = self.visit(node.value)
        return " ".join(self._assign(target, value) for target in node.targets)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> str:
        return self._assign(node.target, self.visit(node.value)) if node.value else ""

    def _assign(self, target: ast.expr, value: str) -> str:
        match target:
            case ast.Subscript():
                return f"std.put({self.visit(target.value)}, {self.visit(target.slice)}, {value});"
            case ast.Tuple():
                return f"{self.visit(target)} = std.iter({value});"
        return f"{self.visit(target)} = {value};"

    def visit_AugAssign(self, node: ast.AugAssign) -> str:
        """The third argument says that a list or a dict is changed where it is."""
        read = ast.parse(ast.unparse(node.target), mode="eval").body
        made = f"std.{self.operation(node)}({self.visit(read)}, {self.visit(node.value)}, true)"
        return self._assign(node.target, made)

    def visit_Delete(self, node: ast.Delete) -> str:
        return " ".join(f"std.remove({self.visit(one.value)}, {self.visit(one.slice)});" for one in node.targets)

    # --- the others

    def visit_Expr(self, node: ast.Expr) -> str:
        return "" if isinstance(node.value, ast.Constant) else f"{self.visit(node.value)};"  # a docstring

    def visit_Pass(self, node: ast.Pass) -> str:
        return ""

    def visit_Continue(self, node: ast.Continue) -> str:
        return "continue;"

    def visit_Return(self, node: ast.Return) -> str:
        return f"return {self.visit(node.value) if node.value else 'null'};"

    def visit_Yield(self, node: ast.Yield) -> str:
        return f"(yield {self.visit(node.value)})"

    def visit_If(self, node: ast.If) -> str:
        text = f"if ({self.test(node.test)}) {{\n{self._block(node.body)}\n}}"
        return text + (f" else {{\n{self._block(node.orelse)}\n}}" if node.orelse else "")

    def visit_For(self, node: ast.For) -> str:
        if node.orelse:
            self.generic_visit(node)
        over = f"std.iter({self.visit(node.iter)})"
        return f"for ({self.visit(node.target)} of {over}) {{\n{self._block(node.body)}\n}}"

    def visit_While(self, node: ast.While) -> str:
        if node.orelse:
            self.generic_visit(node)
        return f"while ({self.test(node.test)}) {{\n{self._block(node.body)}\n}}"

    def visit_Raise(self, node: ast.Raise) -> str:
        return f"throw {self.visit(node.exc) if node.exc else '$error'};"

    def visit_Try(self, node: ast.Try) -> str:
        if node.orelse or node.finalbody:
            self.generic_visit(node)
        caught = "".join(map(self._handler, node.handlers))
        return f"try {{\n{self._block(node.body)}\n}} catch ($error) {{\n{caught}throw $error;\n}}"

    def _handler(self, node: ast.ExceptHandler) -> str:
        named = f"{identifier(node.name)} = $error;\n" if node.name else ""
        test = f"std.isinstance($error, {self.visit(node.type)})"
        return f"if ({test}) {{\n{named}{self._block(node.body)}\n}} else "


def _inside(body: list[ast.AST]) -> Iterator[ast.AST]:
    """All nodes that are not in functions of their own."""
    for node in body:
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            yield from _inside(list(ast.iter_child_nodes(node)))
