"""What is public in s4: the modules that users import, what they list in `__all__`, and its members.

A member is public if its name has no leading underscore and s4 itself defines it: not what torch or
transformers bring. Signatures are read from the source, so that they are the same in every Python.
"""

import ast
import functools
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

MODULES = [
    "s4", "s4.hippo", "s4.kernel", "s4.padding", "s4.pretrained", "s4.convert", "s4.deploy", "s4.distributed",
    "s4.info", "s4.transformers",
]  # fmt: skip
Definition = ast.FunctionDef | ast.ClassDef


class Public(NamedTuple):
    """A public object: its name, itself, and the source that defines it; None for a module."""

    name: str
    value: Any
    node: Definition | None

    @property
    def parameters(self) -> list[str]:
        """The names of what it is called with, or, of a class, made with; of a named tuple its fields."""
        function = initializer(self.node) if isinstance(self.node, ast.ClassDef) else self.node
        if isinstance(function, ast.FunctionDef):
            a = function.args
            every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *([a.kwarg] if a.kwarg else [])]
            return [each.arg for each in every if each.arg not in ("self", "cls")]
        return [] if self.node is None else [name for name, _ in fields(self.node)]

    @property
    def attributes(self) -> list[str]:
        """The names that a class sets in its `__init__`, or annotates."""
        found = ast.walk(self.node) if isinstance(self.node, ast.ClassDef) else ()
        own = [n.attr for n in found if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
        return own + [name for name, _ in fields(self.node)] if isinstance(self.node, ast.ClassDef) else own

    @property
    def result(self) -> str:
        """The annotation of what a function returns; "None" of a class and of a module."""
        returns = self.node.returns if isinstance(self.node, ast.FunctionDef) else None
        return "None" if returns is None else ast.unparse(returns)

    @property
    def signature(self) -> str:
        """One line: the name, how it is called, and what comes back."""
        if isinstance(self.value, property):
            return f"{self.name}: {self.result}"
        if isinstance(self.node, ast.FunctionDef):
            return f"{self.name}({ast.unparse(self.node.args)}) -> {self.result}"
        if self.node is None:
            return self.name
        made = initializer(self.node)
        if made is not None:
            return f"{self.name}({ast.unparse(made.args)})"
        return f"{self.name}({', '.join(f'{name}: {kind}' for name, kind in fields(self.node))})"


def public(name: str) -> Iterator[Public]:
    """A public module and all that is public in it, in the order of names."""
    module = importlib.import_module(name)
    yield Public(name, module, None)
    for each in sorted(module.__all__):
        value = getattr(module, each)
        if not inspect.ismodule(value):
            yield Public(f"{name}.{each}", value, defined(value))
            if inspect.isclass(value):
                yield from _members(f"{name}.{each}", value)


def _members(name: str, kind: type) -> Iterator[Public]:
    members: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.split(".")[0] == "s4":
            members |= vars(base)
    for each, value in sorted(members.items()):
        if each.startswith("_"):
            continue
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if inspect.isfunction(function):
            yield Public(f"{name}.{each}", value, defined(function))


def defined(value: Any) -> Definition:
    """The source of a class or function."""
    value = inspect.unwrap(value)
    node: Any = _tree(value.__module__)
    for name in value.__qualname__.split("."):
        node = next(n for n in node.body if isinstance(n, Definition) and n.name == name)
    return node


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse(Path(str(sys.modules[module].__file__)).read_text())


def initializer(node: ast.ClassDef) -> ast.FunctionDef | None:
    """The `__init__` of a class, if it has one of its own."""
    found = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    return found[0] if found else None


def fields(node: Definition) -> list[tuple[str, str]]:
    """The annotated fields of a named tuple or a dataclass, with their types and defaults."""
    return [
        (
            each.target.id,
            ast.unparse(each.annotation) + (f" = {ast.unparse(each.value)}" if each.value else ""),
        )
        for each in node.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
        if not each.target.id.startswith("_") and "ClassVar" not in ast.unparse(each.annotation)
    ]
