# SPDX-License-Identifier: Apache-2.0
"""What a Python file imports and calls, read from its syntax tree; nothing is executed.

Relative imports are resolved, ``import x as y`` is followed to ``x``, an import inside a function or under
``TYPE_CHECKING`` counts like any other (it is only marked as lazy), and so does a module named in a string
that is handed to ``import_module`` or ``__import__``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Problem:
    """One finding: where, and what is wrong with it."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


def listing(problems: list[Problem]) -> str:
    """Return the findings as lines, for the message of a failed assertion."""
    return "\n".join(["", *map(str, problems)])


@dataclass(frozen=True)
class Import:
    """One imported name: ``from a.b import c`` is ``a.b.c``, which may be a module or a name in one."""

    name: str
    line: int
    lazy: bool


@dataclass(frozen=True)
class Source:
    """A parsed file: its path below the package's directory, and its dotted module name."""

    path: str
    module: str
    is_package: bool
    tree: ast.Module


def sources(root: Path) -> Iterator[Source]:
    """Parse every Python file of the package whose directory is ``root`` (``.../src/bottomhalf``)."""
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        parts = [root.name, *relative.with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        yield Source(str(relative), module, is_package, ast.parse(file.read_bytes(), str(file)))


def imports(source: Source) -> Iterator[Import]:
    """Yield what a file imports, wherever in it the import stands."""
    for node, lazy in _walk(source.tree, False):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy)
        elif isinstance(node, ast.ImportFrom):
            base = _resolve(source, node)
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, lazy)
        elif isinstance(node, ast.Call) and _last_name(node.func) in ("import_module", "__import__"):
            name = _text_start(node.args[0]) if node.args else None
            if name:
                yield Import(name, node.lineno, lazy)


def aliases(source: Source) -> dict[str, str]:
    """Return what each name bound by an import stands for: ``{"np": "numpy", "read": "os.read"}``."""
    bound = {}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                bound[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{_resolve(source, node)}.{alias.name}"
    return bound


def dotted(node: ast.expr) -> str | None:
    """Return ``a.b.c`` for an expression that is a chain of names, else None."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return None if base is None else f"{base}.{node.attr}"
    return None


def _walk(node: ast.AST, lazy: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and (dotted(node.test) or "").endswith("TYPE_CHECKING"):
            inside = inside or child in node.body
        yield child, inside
        yield from _walk(child, inside)


def _resolve(source: Source, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    package = source.module.split(".")
    package = package[: len(package) - node.level + (1 if source.is_package else 0)]
    return ".".join([*package, node.module] if node.module else package)


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _text_start(node: ast.expr) -> str | None:
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
