"""Expressions of Python as JavaScript; see jforge.explorer.translate."""

import ast
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

_TAKEN = {
    "arguments", "case", "catch", "const", "default", "delete", "do", "enum", "eval", "export", "extends", "function",
    "in", "instanceof", "interface", "let", "new", "null", "package", "private", "protected", "public", "static",
    "super", "switch", "this", "throw", "typeof", "undefined", "var", "void",
}  # fmt: skip
_BINARY = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div", ast.FloorDiv: "floordiv", ast.Mod: "mod",
    ast.Pow: "pow", ast.BitOr: "or", ast.BitAnd: "and",
}  # fmt: skip
_ORDER = {ast.Lt: "std.lt", ast.LtE: "std.le", ast.Gt: "std.gt", ast.GtE: "std.ge"}
_COMPARED = {
    ast.Is: "({0} === {1})", ast.IsNot: "({0} !== {1})", ast.Eq: "std.eq({0}, {1})", ast.NotEq: "!std.eq({0}, {1})",
    ast.In: "std.contains({1}, {0})", ast.NotIn: "!std.contains({1}, {0})",
}  # fmt: skip
_COMPARED |= {op: f"{name}({{0}}, {{1}})" for op, name in _ORDER.items()}
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_LIBRARIES = ("std.math", "std.jnp")  # whose functions need no bound object


def identifier(name: str) -> str:
    """A Python name as one of JavaScript."""
    return f"{name}_" if name in _TAKEN else name


def literal(value: Any) -> str:
    """Plain data as JavaScript. Raises TypeError for anything else."""
    match value:
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case int():
            return f"{value}n"
        case float():
            return repr(value) if math.isfinite(value) else f"{'-' * (value < 0)}Infinity"
        case str():
            return json.dumps(value)
        case list():
            return f"[{', '.join(map(literal, value))}]"
        case Mapping():
            return f"std.dict([{', '.join(f'[{literal(k)}, {literal(v)}]' for k, v in value.items())}])"
    raise TypeError(f"a {type(value).__name__} is no plain data")


def stored(node: ast.AST) -> Iterator[str]:
    """The names that a statement or expression binds in its own scope, or changes by an index."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
        return
    if isinstance(node, ast.Lambda):
        return
    if isinstance(node, _COMPREHENSIONS):  # its own variables are not the scope's, those of := are
        yield from (one.target.id for one in ast.walk(node) if isinstance(one, ast.NamedExpr))
        return
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
        yield node.value.id
    if isinstance(node, ast.ExceptHandler) and node.name:
        yield node.name
    for child in ast.iter_child_nodes(node):
        yield from stored(child)


class Expressions(ast.NodeVisitor):
    """Of one module: `visit` gives the text of an expression.

    program, source: the Program and Source that are being translated. owner: the class of a method.
    """

    def __init__(self, program: Any, source: Any, owner: ast.ClassDef | None = None):
        self.program, self.source, self.owner = program, source, owner
        self.scopes: list[set[str]] = []  # names of the functions and comprehensions around

    def generic_visit(self, node: ast.AST):
        raise NotImplementedError(f"{self.source.name}, line {node.lineno}: {type(node).__name__} has no translation")

    # --- names

    def visit_Name(self, node: ast.Name) -> str:
        if isinstance(node.ctx, ast.Store):
            return self.bound(node.id)
        if self._is_local(node.id):
            return identifier(node.id)
        return self.program.resolve(self.source.name, node.id)

    def bound(self, name: str) -> str:
        """The name that a statement binds: a variable of the function, or a field of the module's object."""
        return identifier(name) if self.scopes else f"{self.source.object}.{identifier(name)}"

    def _is_local(self, name: str) -> bool:
        return any(name in scope for scope in self.scopes)

    def module(self, node: ast.AST) -> str | None:
        """The module of jforge that an expression names, None where it is anything else."""
        if not isinstance(node, ast.Name) or isinstance(node.ctx, ast.Store) or self._is_local(node.id):
            return None
        return self.program.module_of(self.source.name, node.id)

    def visit_Attribute(self, node: ast.Attribute) -> str:
        if isinstance(node.ctx, ast.Store):
            return f"{self.visit(node.value)}.{node.attr}"
        if module := self.module(node.value):
            return self.program.resolve(module, node.attr)
        self.program.ask(node.attr)
        base = self.visit(node.value)
        return f"{base}.{node.attr}" if base in _LIBRARIES else f"std.attr({base}, {literal(node.attr)})"

    # --- values

    def visit_Constant(self, node: ast.Constant) -> str:
        plain = node.value is None or isinstance(node.value, (bool, int, float, str))
        return literal(node.value) if plain else self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> str:
        return f'[{self.items(node.values)}].join("")'

    def visit_FormattedValue(self, node: ast.FormattedValue) -> str:
        value = self.visit(node.value)
        if node.format_spec is not None:
            return f"std.format({value}, {self.visit(node.format_spec)})"
        return f"std.{'repr' if node.conversion == ord('r') else 'str'}({value})"

    def items(self, nodes: list[ast.expr]) -> str:
        return ", ".join(map(self.visit, nodes))

    def visit_Starred(self, node: ast.Starred) -> str:
        inner = self.visit(node.value)
        return f"...{inner}" if isinstance(node.ctx, ast.Store) else f"...std.iter({inner})"

    def visit_List(self, node: ast.List) -> str:
        return f"[{self.items(node.elts)}]"

    def visit_Tuple(self, node: ast.Tuple) -> str:
        made = f"[{self.items(node.elts)}]"
        return made if isinstance(node.ctx, ast.Store) else f"std.tuple({made})"

    def visit_Set(self, node: ast.Set) -> str:
        return f"std.set([{self.items(node.elts)}])"

    def visit_Dict(self, node: ast.Dict) -> str:
        parts = (
            f"...std.pairs({self.visit(value)})" if key is None else f"[{self.items([key, value])}]"
            for key, value in zip(node.keys, node.values, strict=True)
        )
        return f"std.dict([{', '.join(parts)}])"

    def visit_ListComp(self, node: ast.ListComp) -> str:
        return f"std.list({self._generator(node, self.visit, node.elt)})"

    def visit_SetComp(self, node: ast.SetComp) -> str:
        return f"std.set({self._generator(node, self.visit, node.elt)})"

    def visit_DictComp(self, node: ast.DictComp) -> str:
        return f"std.dict({self._generator(node, self._pair, node.key, node.value)})"

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> str:
        return self._generator(node, self.visit, node.elt)

    def _pair(self, *nodes: ast.expr) -> str:
        return f"[{self.items(list(nodes))}]"

    def _generator(self, node, made, *parts: ast.expr) -> str:
        """The first iterable is made outside, where a name may mean another thing than within."""
        outer = self.visit(node.generators[0].iter)
        self.scopes.append({name for one in node.generators for name in stored(one.target)})
        text = ""
        for at, one in enumerate(node.generators):
            over = f"std.iter({self.visit(one.iter)})" if at else "$"
            text += f"for (const {self.visit(one.target)} of {over}) "
            text += "".join(f"if ({self.test(test)}) " for test in one.ifs)
        text += f"yield {made(*parts)};"
        self.scopes.pop()
        return f"(function* ($) {{ {text} }})(std.iter({outer}))"

    # --- operations

    def visit_BinOp(self, node: ast.BinOp) -> str:
        return f"std.{self.operation(node)}({self.visit(node.left)}, {self.visit(node.right)})"

    def operation(self, node: ast.BinOp | ast.AugAssign) -> str:
        return _BINARY.get(type(node.op)) or self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> str:
        match node.op:
            case ast.Not():
                return f"!{self.test(node.operand)}"
            case ast.USub():
                return f"std.neg({self.visit(node.operand)})"
        return self.generic_visit(node)

    def test(self, node: ast.expr) -> str:
        return f"std.truth({self.visit(node)})"

    def visit_BoolOp(self, node: ast.BoolOp) -> str:
        name = "any_of" if isinstance(node.op, ast.Or) else "all_of"
        return f"std.{name}({', '.join(f'() => {self.visit(value)}' for value in node.values)})"

    def visit_Compare(self, node: ast.Compare) -> str:
        values = [self.visit(value) for value in (node.left, *node.comparators)]
        if len(node.ops) == 1:
            return _COMPARED[type(node.ops[0])].format(*values)
        return f"std.chain([{', '.join(values)}], [{', '.join(_ORDER[type(op)] for op in node.ops)}])"

    def visit_IfExp(self, node: ast.IfExp) -> str:
        return f"({self.test(node.test)} ? {self.visit(node.body)} : {self.visit(node.orelse)})"

    def visit_NamedExpr(self, node: ast.NamedExpr) -> str:
        return f"({self.visit(node.target)} = {self.visit(node.value)})"

    def visit_Subscript(self, node: ast.Subscript) -> str:
        if isinstance(node.ctx, ast.Store):  # alone `_assign` puts it; among others in a pattern it has no place
            self.generic_visit(node)
        base = self.visit(node.value)
        if not isinstance(node.slice, ast.Slice):
            return f"std.item({base}, {self.visit(node.slice)})"
        if node.slice.step:
            self.generic_visit(node)
        ends = (self.visit(end) if end else "null" for end in (node.slice.lower, node.slice.upper))
        return f"std.slice({base}, {', '.join(ends)})"

    def visit_Call(self, node: ast.Call) -> str:
        given = [self.visit(arg) for arg in node.args]
        if node.keywords:
            named = (
                f"...std.keywords({self.visit(one.value)})"
                if one.arg is None
                else f"{one.arg}: {self.visit(one.value)}"
                for one in node.keywords
            )
            given.append(f"std.named({{ {', '.join(named)} }})")
        return f"{self._callee(node.func)}({', '.join(given)})"

    def _callee(self, node: ast.expr) -> str:
        match node:
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=name):
                return f"std.base({self.source.object}.{self.owner.name}, self, {literal(name)})"
        return self.visit(node)
